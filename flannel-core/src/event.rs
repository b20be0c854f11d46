//! What a [`Manager`](crate::Manager)'s watch delivers.

use std::pin::Pin;

use futures_core::Stream;

use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseKey, Revision};
use crate::manager::Error;

/// The whole set of records at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// Every record that could be read, our own among them.
    pub leases: Vec<Lease>,
    /// The records that are there and could not be read.
    pub unreadable: Vec<Unreadable>,
    /// The position in the store's history that this is the state of.
    pub revision: Revision,
    /// The store has no network config, where that is kept beside the records: it may have lost
    /// everything, so what it lacks is no statement.
    pub unconfigured: bool,
}

/// A record that is there and could not be read. It counts neither as a lease nor as deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The record.
    pub key: LeaseKey,
    /// The record's last write.
    pub revision: Revision,
    /// What is wrong with it.
    pub reason: String,
}

/// One thing that happened in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The complete state: what is missing from it is gone.
    Snapshot(Snapshot),
    /// A record was written.
    Put(Lease),
    /// A record was removed, or its time ran out.
    Delete {
        /// The record.
        key: LeaseKey,
        /// When it was removed.
        revision: Revision,
    },
    /// A record was written and cannot be read: its last good value stays in force.
    Unreadable(Unreadable),
    /// Nothing happened up to this revision: the watch is alive.
    Progress(Revision),
    /// The network config was written.
    Config(NetworkConfig),
    /// The network config was written and cannot be used: the last good one stays in force.
    ConfigUnreadable {
        /// What is wrong with it.
        reason: String,
    },
}

/// A watch of a store. See [`crate::Manager::watch_leases`] for its promises.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<Event, Error>> + Send>>;
