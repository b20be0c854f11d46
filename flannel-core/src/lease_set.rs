//! [`LeaseSet`]: folds the events of a store into the set of peers.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::Rejection;
use crate::family::DualStack;
use crate::lease::{Lease, LeaseKey};
use crate::subnet::Subnet;

/// Another node's record with what of it may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The record.
    pub lease: Lease,
    /// The subnets that were found admissible.
    pub subnets: DualStack<Subnet>,
    /// Why a family that the record has is not among them.
    pub rejected: DualStack<Rejection>,
}

/// What a change made of the set of peers: keys of records whose [`Peer`] came, differs or went.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LeaseDelta {
    /// New peers.
    pub added: Vec<LeaseKey>,
    /// Peers of which anything is different, be it only what is admissible.
    pub changed: Vec<LeaseKey>,
    /// Peers that are gone.
    pub removed: Vec<LeaseKey>,
}

/// The set of peers, as folded from the store's events.
#[derive(Debug, Clone, Default)]
pub struct LeaseSet {
    peers: BTreeMap<LeaseKey, Arc<Peer>>,
}

impl LeaseSet {
    /// The peers by their records' keys.
    pub const fn peers(&self) -> &BTreeMap<LeaseKey, Arc<Peer>> {
        &self.peers
    }
}
