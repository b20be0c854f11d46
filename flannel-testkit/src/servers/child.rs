//! A child process that does not outlive this one.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::skipping::is_installed;

/// A program that runs until it is dropped.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts a program whose output goes to a file.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`]: the program, or `setpriv` of util-linux, is not there.
    #[allow(clippy::disallowed_methods, reason = "a test starts a server")]
    pub(super) fn start<A: AsRef<OsStr>>(
        program: &str,
        args: impl IntoIterator<Item = A>,
        log: &Path,
    ) -> io::Result<Self> {
        if !is_installed(program) {
            let problem = format!("{program} is not installed");
            return Err(io::Error::new(io::ErrorKind::NotFound, problem));
        }
        let output = File::options().create(true).append(true).open(log)?;
        // The kernel kills the child when the thread that made it ends, whatever ends it.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--", program])
            .args(args);
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        Ok(Self {
            child: spawn(command)?,
            log: log.to_owned(),
        })
    }

    #[cfg(feature = "kube")]
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap_or(i32::MAX);
        kill(Pid::from_raw(pid), signal).ok();
    }

    /// Whether it runs; otherwise what it said last.
    pub(super) fn check(&mut self) -> io::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                let lines: Vec<&str> = log.lines().rev().take(5).collect();
                Err(io::Error::other(format!(
                    "it ended with {status}: {}",
                    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
                )))
            }
        }
    }

    /// Ends it at once, as a power cut does.
    pub(super) fn kill(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Makes a child in a thread that lives as long as the process: a test's own thread may end before
/// the child is to.
fn spawn(mut command: Command) -> io::Result<Child> {
    let (made, child) = mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("servers".to_owned())
        .spawn(move || {
            made.send(command.spawn()).ok();
            loop {
                std::thread::park();
            }
        })?;
    child.recv().map_err(io::Error::other)?
}

/// So many loopback ports that are free now, no two the same. Another program may take one before it
/// is used, which is seen then.
pub(super) fn free_ports(count: usize) -> io::Result<Vec<u16>> {
    let bind = |_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let listeners: Vec<TcpListener> = (0..count).map(bind).collect::<io::Result<_>>()?;
    let port = |listener: &TcpListener| Ok(listener.local_addr()?.port());
    listeners.iter().map(port).collect()
}

/// A folder of its own, removed when dropped.
#[derive(Debug)]
pub(super) struct Folder(PathBuf);

static FOLDERS: AtomicU32 = AtomicU32::new(0);

impl Folder {
    pub(super) fn new(what: &str) -> io::Result<Self> {
        let number = FOLDERS.fetch_add(1, Ordering::Relaxed);
        let name = format!("flannel-{what}-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::remove_dir_all(&path).ok();
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Leaves it behind.
    pub(super) fn keep(self) -> PathBuf {
        let path = self.0.clone();
        std::mem::forget(self);
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}
