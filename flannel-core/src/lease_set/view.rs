//! The set as it is seen: its peers, each with the verdict on it, and what is told of the others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::judging::claimant;
use super::record::{Good, Record, Records};
use super::{Held, LeaseSet};
use crate::backend::Rejection;
use crate::event::Unreadable;
use crate::family::{DualStack, Family};
use crate::lease::{BackendType, Lease, LeaseKey, Revision};
use crate::subnet::Subnet;

/// Another node's record with what of it may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The record. While the record in the store cannot be read, its last good value.
    pub lease: Lease,
    /// The subnets that were found admissible.
    pub subnets: DualStack<Subnet>,
    /// Why a family that the record has is not among them. [`Rejection::NoSubnet`] stands in the
    /// places of the families that this node runs.
    pub rejected: DualStack<Rejection>,
    /// The store's last word lacks the record, and that is not believed yet ([`Held`]): it stays,
    /// and gives way to any record that is there.
    pub doubted: bool,
}

/// The work of a change on the set of peers: keys of records whose [`Peer`] came, differs or went,
/// each list sorted.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LeaseDelta {
    /// New peers.
    pub added: Vec<LeaseKey>,
    /// Peers of which anything is different, be it only what is admissible.
    pub changed: Vec<LeaseKey>,
    /// Peers that are gone.
    pub removed: Vec<LeaseKey>,
}

impl LeaseDelta {
    /// Whether nothing changed.
    pub const fn is_empty(&self) -> bool {
        self.added.is_empty() && self.changed.is_empty() && self.removed.is_empty()
    }

    /// Every key named.
    pub fn keys(&self) -> impl Iterator<Item = &LeaseKey> {
        self.added.iter().chain(&self.changed).chain(&self.removed)
    }
}

/// The peers of a [`LeaseSet`], in the order of their records' keys.
#[derive(Clone, Copy)]
pub struct Peers<'a>(pub(super) &'a Records);

impl<'a> Peers<'a> {
    /// How many there are.
    pub const fn len(&self) -> usize {
        self.0.peers()
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Each with its record's key.
    pub fn iter(&self) -> impl Iterator<Item = (&'a LeaseKey, &'a Arc<Peer>)> + use<'a> {
        let records = self.0.iter();
        records.filter_map(|(key, record)| Some((key, record.peer()?)))
    }

    /// The keys of their records.
    pub fn keys(&self) -> impl Iterator<Item = &'a LeaseKey> + use<'a> {
        self.iter().map(|(key, _)| key)
    }

    /// The peers alone.
    pub fn values(&self) -> impl Iterator<Item = &'a Arc<Peer>> + use<'a> {
        self.iter().map(|(_, peer)| peer)
    }
}

impl<'a> IntoIterator for Peers<'a> {
    type Item = (&'a LeaseKey, &'a Arc<Peer>);
    type IntoIter = Box<dyn Iterator<Item = Self::Item> + 'a>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.iter())
    }
}

impl std::fmt::Debug for Peers<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl PartialEq for Peers<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}

impl LeaseSet {
    /// The peers by their records' keys: every other node's record, admitted or not.
    pub const fn peers(&self) -> Peers<'_> {
        Peers(&self.records)
    }

    /// One peer, by its record's key.
    pub fn peer(&self, key: &LeaseKey) -> Option<&Arc<Peer>> {
        self.records.get(key)?.peer()
    }

    /// The peers that are admitted although they are of another backend than ours, by that: one of
    /// us has not followed a change of the config yet.
    pub const fn of_other_backends(&self) -> &BTreeMap<BackendType, BTreeSet<LeaseKey>> {
        &self.of_other_backends
    }

    /// The records that bear our node id: that of our lease, and stale ones.
    pub fn own_records(&self) -> impl Iterator<Item = &Lease> {
        let own = self.records.own().iter();
        own.filter_map(|key| self.records.get(key)?.lease())
    }

    /// The subnets that a peer's record claims on every node of the network, whoever has them.
    pub(crate) fn screened_claims_of(&self, peer: &Peer) -> DualStack<Subnet> {
        let mut claims = DualStack::default();
        for (family, screened) in self.screen(&peer.lease.key, &peer.lease).iter() {
            claims.set(family, screened.claim);
        }
        claims
    }

    /// The subnets that a peer's record has on every node of the network that does not refuse it for a
    /// reason of its own: those that it claims and no older record has.
    pub fn claims_of(&self, peer: &Peer) -> DualStack<Subnet> {
        let record = self.records.get(&peer.lease.key);
        let Some(seat) = record.and_then(Record::seat) else {
            return DualStack::default();
        };
        let mut claims = self.screened_claims_of(peer);
        for family in Family::ALL {
            if self.subnets.lost(&claimant(&seat, family)).is_some() {
                claims.set(family, None);
            }
        }
        claims
    }

    /// Why other nodes do not accept the record of our lease, by a rule that all apply: an older
    /// one has the subnet. Empty while they do, and while the record is not known.
    pub fn own_rejected(&self) -> DualStack<Rejection> {
        let record = self.own_key().and_then(|key| self.records.get(key));
        let Some(record) = record.filter(|record| matches!(record.good, Some(Good::Own(_)))) else {
            return DualStack::default();
        };
        let (Some(lease), Some(seat)) = (record.lease(), record.seat()) else {
            return DualStack::default();
        };
        let mut rejected = DualStack::default();
        for (family, screened) in self.admission.screen(lease).iter() {
            // What the config does not allow is exchanged anyway.
            let verdict = self.verdict(family, &seat, screened.clone());
            let lost = verdict.err();
            let lost = lost.filter(|lost| matches!(lost, Rejection::SubnetTaken { .. }));
            rejected.set(family, lost);
        }
        rejected
    }

    /// The records that are there and cannot be read. Where there was a good value before, it is
    /// still in force.
    pub fn unreadable(&self) -> impl ExactSizeIterator<Item = &Unreadable> {
        self.records.spoilt().iter().map(|key| {
            let record = self.records.get(key);
            let spoilt = record.and_then(|record| record.spoilt.as_ref());
            &spoilt.expect("a key of those that cannot be read").record
        })
    }

    /// A number that is another whenever something about the records that cannot be read is.
    pub(crate) const fn spoilings(&self) -> u64 {
        self.records.spoilings()
    }

    /// How far the store's history is known.
    pub const fn revision(&self) -> Revision {
        self.revision
    }

    /// Whether a snapshot was taken, believed or not.
    pub const fn synced(&self) -> bool {
        self.floor.is_some()
    }

    /// The withdrawal that waits for confirmation.
    pub const fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    /// Whether nothing may be removed from the kernel for being unwanted: until a snapshot is
    /// believed, and while a withdrawal is held.
    pub const fn hold_orphans(&self) -> bool {
        !self.believed || self.held.is_some()
    }

    /// The subnets whose routes were found in the kernel at start and stay, although no peer is known
    /// to hold them: there are records under their keys that cannot be read, and those are not gone.
    pub fn spared(&self) -> impl Iterator<Item = &Subnet> {
        let sparing = self.records.sparing().iter();
        sparing
            .filter_map(|key| self.records.get(key)?.spoilt.as_ref())
            .flat_map(|spoilt| &spoilt.spared)
    }

    /// Whether a key is that of our lease's record.
    pub fn is_own_key(&self, key: &LeaseKey) -> bool {
        self.own_key() == Some(key)
    }

    pub(super) fn own_key(&self) -> Option<&LeaseKey> {
        self.admission.own.as_ref()?.key.as_ref()
    }
}
