//! The socket that a packet path is handed over by: a file of ours, in a folder that nobody else
//! may write to.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::geteuid;

/// The number of those who may wait to be heard.
const WAITING: i32 = 16;

/// Listens under a name, in the place of whoever did before.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(folder(path))?;
    check_folder(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // The file has the mode of the socket, so that it is never anybody else's.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, WAITING)?;
    Ok(UnixListener::from(socket))
}

/// Becomes the process that whoever connects is told of: else that is the one which began to
/// listen.
pub(super) fn inherit(socket: OwnedFd) -> io::Result<UnixListener> {
    rustix::net::listen(&socket, WAITING)?;
    Ok(UnixListener::from(socket))
}

/// Sees that nobody but us and root may put another file in the place of the socket.
pub(super) fn check_folder(path: &Path) -> io::Result<()> {
    let folder = folder(path);
    let found = match fs::metadata(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    let us = geteuid().as_raw();
    let others = match found.uid() {
        uid if uid != 0 && uid != us => format!("it belongs to the user {uid}"),
        _ if found.mode() & 0o022 != 0 => format!("its mode is {:o}", found.mode() & 0o7777),
        _ => return Ok(()),
    };
    Err(io::Error::other(format!(
        "others may write to the folder {} ({others}): give the socket one of its own, of mode 0700",
        folder.display()
    )))
}

fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// By what a file is told from another one of its name.
pub(super) fn file_id(path: &Path) -> Option<(u64, u64)> {
    id_of(fs::symlink_metadata(path))
}

/// The namespace that a file stands for.
pub(super) fn namespace_id(path: &Path) -> Option<(u64, u64)> {
    id_of(fs::metadata(path))
}

fn id_of(file: io::Result<fs::Metadata>) -> Option<(u64, u64)> {
    let file = file.ok()?;
    Some((file.dev(), file.ino()))
}
