//! [`StateStore`]: what a node remembers over restarts, so that it boots while the store is down.

mod file;

use std::fmt::{self, Debug};
use std::io;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

pub use self::file::{FileState, FileStateError};
use crate::lease::Lease;
use crate::node::InstanceId;
use crate::reconcile::known::KnownLink;
use crate::subnet::Subnet;
use crate::underlay::SavedInterface;

/// The memory of a node: its last lease and config, and which machine it is.
///
/// As it holds the config, it may hold secrets.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
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

impl Debug for SavedState {
    /// Without the config, which may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SavedState")
            .field("lease", &self.lease)
            .field("networks", &self.networks)
            .field("interface", &self.interface)
            .field("instance", &self.instance)
            .field("devices", &self.devices)
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

/// A place for [`SavedState`].
///
/// A call that takes longer than ten seconds is dropped and counts as failed. A state that cannot
/// be saved makes the condition [`State`](crate::ConditionType::State) false, and is saved again
/// after 1 s to 60 s until it is; the overlay works meanwhile.
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
    /// Any error of the place. It is reported, and tried again: nothing is saved before it is done.
    async fn keep_aside(&self) -> io::Result<Option<String>> {
        Ok(None)
    }

    /// Writes the state: afterwards either the old or the new one is there, never a part.
    ///
    /// # Errors
    /// Any error of the place. It is reported and tried again, and the overlay goes on.
    async fn save(&self, state: &SavedState) -> io::Result<()>;
}
