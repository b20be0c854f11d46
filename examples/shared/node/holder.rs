//! The process that has what we need, and cannot be talked to: it is ended.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};

/// The time that it may take to end, in seconds.
const ENDS_WITHIN: i64 = 10;

/// Ends the process that listens on a socket, if it is the same program as this one and the same
/// user's, and waits for its end. Answers its id. It is looked for by what it has open: the kernel
/// names to who connects the process that began to listen (`SO_PEERCRED`), which may have left the
/// socket to another, as an old version's process does to the one that keeps its packets.
pub(super) fn end(socket: &Path) -> io::Result<u32> {
    let processes = fs::read_dir("/proc")?.flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for id in ids {
        let Some(pid) = Pid::from_raw(id.cast_signed()) else {
            continue;
        };
        if id == std::process::id() || !is_program(id) {
            continue;
        }
        // From here on it is this process that is meant, whoever gets its id later.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
            continue;
        };
        if !is_program(id) || !listens(id, socket) {
            continue;
        }
        pidfd_send_signal(&process, Signal::TERM)?;
        let limit = Timespec {
            tv_sec: ENDS_WITHIN,
            tv_nsec: 0,
        };
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        return match poll(&mut ended, Some(&limit))? {
            0 => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("process {id} does not end"),
            )),
            _ => Ok(id),
        };
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "no process of this program and user listens there",
    ))
}

/// Tells if a process is this user's and runs a program of this one's name, be it an older file.
fn is_program(id: u32) -> bool {
    let is_ours = fs::metadata(format!("/proc/{id}"))
        .is_ok_and(|process| process.uid() == geteuid().as_raw());
    let name = |link: &str| {
        let path = fs::read_link(link).ok()?.into_os_string().into_string();
        let path = path.ok()?;
        let path = path.strip_suffix(" (deleted)").unwrap_or(&path).to_owned();
        Some(Path::new(&path).file_name()?.to_owned())
    };
    is_ours && {
        let its = name(&format!("/proc/{id}/exe"));
        its.is_some() && its == name("/proc/self/exe")
    }
}

/// Tells if a process has the socket open that listens under a name.
fn listens(id: u32, socket: &Path) -> bool {
    // The table of its own network namespace: proc(5), `/proc/net/unix`.
    let table = fs::read_to_string(format!("/proc/{id}/net/unix")).unwrap_or_default();
    let sockets = table.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(3);
        let (flags, inode) = (fields.next()?, fields.nth(2)?);
        let is_it = flags == "00010000" && Path::new(fields.next()?) == socket;
        is_it.then(|| format!("socket:[{inode}]"))
    });
    let sockets: Vec<String> = sockets.collect();
    let open = fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten();
    let mut links = open
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok());
    links.any(|link| sockets.iter().any(|socket| link == Path::new(socket)))
}
