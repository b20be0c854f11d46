//! [`FileState`]: the saved state in a file that nobody else reads, and that nobody can make us
//! hang on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;

use super::{SavedState, StateStore};

/// A [`StateStore`] in a regular file, replaced atomically, with mode 0600 since it holds the
/// config.
///
/// One that cannot be read is kept beside it, with `.unreadable` at the end of its name. What
/// stands in its place and is no regular file (a symbolic link, a FIFO, a device, a folder) is
/// neither followed, opened nor replaced: reading and writing fail until it is removed. Links in
/// the folders above it are followed. Each access has an answer within five seconds.
///
/// Accesses run on tokio's threads for blocking work. One to a file system that never answers keeps
/// its thread, and tokio waits for it when the runtime is dropped: end such a runtime with
/// [`shutdown_timeout`](tokio::runtime::Runtime::shutdown_timeout).
#[derive(Debug, Clone)]
pub struct FileState {
    path: PathBuf,
    /// One access at a time, so that a late one undoes no later one.
    turn: Arc<Mutex<()>>,
}

/// Why a state file was neither read nor written, inside of an [`io::Error`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileStateError {
    /// Something else stands in its place.
    #[error("{} is {found}, not a regular file: remove it or give another path", .path.display())]
    NotAFile {
        /// The place.
        path: PathBuf,
        /// The thing that is there, in words.
        found: &'static str,
    },
    /// No saved state is that large.
    #[error("{} has more than {limit} bytes, so it is no saved state", .path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most that is read, in bytes.
        limit: u64,
    },
    /// The file system has not answered; it may yet do what was asked.
    #[error("{} has not answered within {after:?}", .path.display())]
    TimedOut {
        /// The file.
        path: PathBuf,
        /// The time that it was given.
        after: Duration,
    },
    /// As many files that cannot be read as may be are kept already.
    #[error("{kept} earlier ones are kept beside {}: remove them", .path.display())]
    TooManyKept {
        /// The file.
        path: PathBuf,
        /// The number of them.
        kept: usize,
    },
    /// Every name for a new file beside it is taken.
    #[error("{tried} files of earlier tries are beside {}: remove them", .path.display())]
    NoName {
        /// The file.
        path: PathBuf,
        /// The number of names that were tried.
        tried: usize,
    },
}

impl FileStateError {
    /// The typed reason inside of an error of [`FileState`]; `None`: it is the system's own.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl From<FileStateError> for io::Error {
    fn from(error: FileStateError) -> Self {
        let kind = match error {
            FileStateError::NotAFile { .. } => io::ErrorKind::InvalidInput,
            FileStateError::TooLarge { .. } => io::ErrorKind::FileTooLarge,
            FileStateError::TimedOut { .. } => io::ErrorKind::TimedOut,
            FileStateError::TooManyKept { .. } | FileStateError::NoName { .. } => {
                io::ErrorKind::AlreadyExists
            }
        };
        Self::new(kind, error)
    }
}

/// The time that one access may take. A write to a busy disk takes less than a second.
const PATIENCE: Duration = Duration::from_secs(5);

/// The most that is read, in bytes. A config, the largest part of a state, has 64 KiB at most
/// ([`NetworkConfig::MAX_LEN`](crate::NetworkConfig::MAX_LEN)), and may be six times that as JSON.
const LIMIT: u64 = 1 << 20;

/// The number of files that could not be read and are kept beside the present one.
const KEPT: usize = 5;

/// The number of names that are tried for a new file. One is taken for each process of our id that
/// died while it wrote, and for each that somebody planted.
const NAMES: usize = 1000;

impl FileState {
    /// The state in this file; its folder must exist, and should be writable by its owner alone.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            turn: Arc::default(),
        }
    }

    /// Does something with the file, but does not wait for it for ever.
    async fn access<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (path, turn) = (self.path.clone(), Arc::clone(&self.turn));
        let access = async move {
            let turn = turn.lock_owned().await;
            let work = move || {
                let done = work(&path);
                drop(turn);
                done
            };
            tokio::task::spawn_blocking(work)
                .await
                .unwrap_or_else(|error| Err(io::Error::other(error)))
        };
        let timed_out = || FileStateError::TimedOut {
            path: self.path.clone(),
            after: PATIENCE,
        };
        let answer = tokio::time::timeout(PATIENCE, access).await;
        answer.unwrap_or_else(|_| Err(timed_out().into()))
    }
}

#[async_trait]
impl StateStore for FileState {
    async fn load(&self) -> io::Result<Option<SavedState>> {
        self.access(|path| match read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    async fn keep_aside(&self) -> io::Result<Option<String>> {
        self.access(|path| {
            let aside = keep(path)?;
            sync_folder(path)?;
            Ok(Some(aside.display().to_string()))
        })
        .await
    }

    async fn save(&self, state: &SavedState) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(state)?;
        self.access(move |path| replace(path, &bytes)).await
    }
}

/// Reads the whole of a file that is a regular one and no larger than a state can be.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let too_large = || FileStateError::TooLarge {
        path: path.to_owned(),
        limit: LIMIT,
    };
    regular(path, &fs::symlink_metadata(path)?)?;
    let mut options = OpenOptions::new();
    let file = harmless(options.read(true)).open(path)?;
    // What was looked at may have been replaced since; what is open cannot be.
    let found = file.metadata()?;
    regular(path, &found)?;
    close_to_others(&file, &found);
    if found.len() > LIMIT {
        return Err(too_large().into());
    }
    let mut bytes = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > LIMIT {
        true => Err(too_large().into()),
        false => Ok(bytes),
    }
}

/// Writes a new file beside the target, then renames it over: a crash leaves the old or the new
/// one.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) => regular(path, &found)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let (mut file, new) = create_beside(path)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        fs::remove_file(&new).ok();
    }
    written?;
    sync_folder(path)
}

/// Makes a file that was not there, under a name that nothing else has: what somebody planted is
/// neither followed nor written to nor removed.
fn create_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    let pid = std::process::id();
    for n in 0..NAMES {
        let new = beside(path, &format!(".new.{pid}.{n}"));
        match create(&new) {
            Ok(file) => return Ok((file, new)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    let path = path.to_owned();
    Err(FileStateError::NoName { path, tried: NAMES }.into())
}

/// Makes a file that only we can read. If there is anything under its name, a dangling link too, it
/// fails.
fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    harmless(options.write(true).create_new(true)).open(path)
}

/// Puts what is in a file under another name beside it, without reading it: it may be of any size.
/// The file itself stays until it is replaced, where the file system knows second names.
fn keep(path: &Path) -> io::Result<PathBuf> {
    regular(path, &fs::symlink_metadata(path)?)?;
    for n in 1..=KEPT {
        let aside = match n {
            1 => beside(path, ".unreadable"),
            n => beside(path, &format!(".unreadable.{n}")),
        };
        match fs::hard_link(path, &aside) {
            Ok(()) => return Ok(aside),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(_) => match create(&aside) {
                // In place of an empty file of ours, so that nobody else's is replaced.
                Ok(_) => {
                    let renamed = fs::rename(path, &aside);
                    if renamed.is_err() {
                        fs::remove_file(&aside).ok();
                    }
                    return renamed.map(|()| aside);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            },
        }
    }
    let path = path.to_owned();
    Err(FileStateError::TooManyKept { path, kept: KEPT }.into())
}

/// Refuses what is no regular file.
fn regular(path: &Path, found: &fs::Metadata) -> io::Result<()> {
    let kind = found.file_type();
    if kind.is_file() {
        return Ok(());
    }
    let (path, found) = (path.to_owned(), in_words(kind));
    Err(FileStateError::NotAFile { path, found }.into())
}

#[cfg(unix)]
fn in_words(kind: fs::FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match () {
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_dir() => "a folder",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () => "a device",
    }
}

#[cfg(not(unix))]
fn in_words(kind: fs::FileType) -> &'static str {
    match kind.is_dir() {
        true => "a folder",
        false => "a link",
    }
}

/// Opens no link, waits for nobody at the other end of a FIFO, and makes files for their owner
/// alone.
#[cfg(unix)]
fn harmless(options: &mut OpenOptions) -> &mut OpenOptions {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    options.mode(0o600).custom_flags(flags)
}

#[cfg(not(unix))]
fn harmless(options: &mut OpenOptions) -> &mut OpenOptions {
    options
}

/// Takes from others what an earlier version let them read. Where we may not, it is as it was.
#[cfg(unix)]
fn close_to_others(file: &File, found: &fs::Metadata) {
    use std::os::unix::fs::PermissionsExt;
    if found.permissions().mode() & 0o077 != 0 {
        file.set_permissions(fs::Permissions::from_mode(0o600)).ok();
    }
}

#[cfg(not(unix))]
fn close_to_others(_: &File, _: &fs::Metadata) {}

/// The file beside another one, with more at the end of its name.
fn beside(path: &Path, more: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(more);
    PathBuf::from(name)
}

/// Makes names durable. Not every system lets a folder be opened, and not every file system syncs
/// one.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let Ok(folder) = File::open(folder.unwrap_or(Path::new("."))) else {
        return Ok(());
    };
    match folder.sync_all() {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::task::Poll;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_access_that_does_not_end_is_left_and_the_next_one_waits_for_it() {
        let state = FileState::new("/nowhere/state");
        let (go, wait) = std::sync::mpsc::sync_channel::<()>(1);
        let first = state.access(move |_| {
            wait.recv().ok();
            Ok(1)
        });
        let moves_on = async {
            // No time passes by itself while a blocking thread works.
            tokio::time::advance(PATIENCE).await;
            std::future::pending::<()>().await;
        };
        let error = tokio::select! {
            biased;
            answer = first => answer.expect_err("it does not end"),
            () = moves_on => unreachable!("it is pending"),
        };
        let after = PATIENCE;
        let path = PathBuf::from("/nowhere/state");
        let late = FileStateError::TimedOut { path, after };
        assert_eq!(FileStateError::of(&error), Some(&late));
        let mut next = Box::pin(state.access(|_| Ok(2)));
        let waits = poll_fn(|cx| Poll::Ready(next.as_mut().poll(cx).is_pending()));
        assert!(waits.await, "the first one is still at work");
        go.send(()).expect("it waits");
        assert_eq!(next.await.expect("its turn has come"), 2);
    }
}
