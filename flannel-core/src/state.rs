//! [`StateStore`]: what a node remembers over restarts, so that it boots while the store is down.

use std::fmt::Debug;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::lease::Lease;
use crate::node::InstanceId;
use crate::reconcile::known::KnownLink;
use crate::subnet::Subnet;
use crate::underlay::SavedInterface;

/// The memory of a node: its last lease and config, and which machine it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SavedState {
    /// The last lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
    /// The last network config, as JSON text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// The networks that configs of this node ever named, the latest 16: routes of ours into them
    /// are known as ours.
    #[serde(default)]
    pub networks: Vec<Subnet>,
    /// The external interface that was in use: it is kept over a restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<SavedInterface>,
    /// The machine: made once, and what a restart is known by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// The overlay's devices, to be known again though somebody took their mark meanwhile.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<KnownLink>,
    /// The namespace that they were in ([`Features::namespace`](crate::Features::namespace)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

/// A place for [`SavedState`].
#[async_trait]
pub trait StateStore: Debug + Send + Sync + 'static {
    /// Reads the state; `None` if there is none.
    ///
    /// # Errors
    /// Any error of the place. A state that cannot be read is reported and counts as none; it is
    /// [kept aside](Self::keep_aside) before another one is written.
    async fn load(&self) -> io::Result<Option<SavedState>>;

    /// Puts what cannot be read where the next [`save`](Self::save) does not write over it, for whoever
    /// wants to know what it was: it may hold the only word of which machine this is. Answers where that
    /// is, in words; `None`, as by default: it stays where it is, and is written over.
    ///
    /// # Errors
    /// Any error of the place. It is reported, and the state is written over.
    async fn keep_aside(&self) -> io::Result<Option<String>> {
        Ok(None)
    }

    /// Writes the state: afterwards either the old or the new one is there, never a part.
    ///
    /// # Errors
    /// Any error of the place. It is reported, and the overlay goes on.
    async fn save(&self, state: &SavedState) -> io::Result<()>;
}

/// The number of files that could not be read and are kept beside the present one.
const KEPT: usize = 5;

/// A [`StateStore`] in a file, replaced atomically. One that cannot be read is kept beside it, with
/// `.unreadable` at the end of its name.
#[derive(Debug, Clone)]
pub struct FileState {
    path: PathBuf,
}

impl FileState {
    /// The state in this file; its folder must exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

#[async_trait]
impl StateStore for FileState {
    async fn load(&self) -> io::Result<Option<SavedState>> {
        let path = self.path.clone();
        blocking(move || match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    async fn keep_aside(&self) -> io::Result<Option<String>> {
        let path = self.path.clone();
        blocking(move || {
            let names = (1..=KEPT).map(|n| match n {
                1 => ".unreadable".to_owned(),
                n => format!(".unreadable.{n}"),
            });
            let mut places = names.map(|name| beside(&path, &name));
            let aside = places.find(|place| !place.exists()).ok_or_else(|| {
                io::Error::other(format!("{KEPT} earlier ones are there: remove them"))
            })?;
            std::fs::copy(&path, &aside)?;
            std::fs::File::open(&aside)?.sync_all()?;
            Ok(Some(aside.display().to_string()))
        })
        .await
    }

    async fn save(&self, state: &SavedState) -> io::Result<()> {
        let path = self.path.clone();
        let bytes = serde_json::to_vec_pretty(state)?;
        blocking(move || replace(&path, &bytes)).await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// The file beside another one, with more at the end of its name.
fn beside(path: &Path, more: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(more);
    PathBuf::from(name)
}

/// Writes a file beside the target, then renames it over: a crash leaves the old or the new one.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = beside(path, ".new");
    let mut file = std::fs::File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    // The rename itself is durable once the folder is; not every system lets a folder be opened.
    let folder = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    if let Ok(folder) = std::fs::File::open(folder.unwrap_or(Path::new("."))) {
        folder.sync_all().ok();
    }
    Ok(())
}
