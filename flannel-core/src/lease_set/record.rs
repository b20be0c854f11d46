//! [`Record`]: what is known of the record under one key, and [`Records`]: all of them, with what
//! is looked up of them.
//!
//! A record is a state machine. Its state is three things:
//!
//! | last good value | now | the last snapshot | what of it is used |
//! |---|---|---|---|
//! | known | readable | has it | the value |
//! | known | readable | lacks it (*doubted*) | the value; any record that is there beats it |
//! | known | unreadable | has it | the value, until its node has written another record since |
//! | known | unreadable | lacks it | as above, and any record that is there beats it |
//! | none | unreadable | has it | nothing; adopted routes under its key are spared |
//! | none | – | – | it is not there: a tombstone may say since when |
//!
//! A put leads to the first line, an unreadable write to the third or fifth, a delete to the last. A
//! snapshot that is held leads from a line to the one below it, one that is believed to the last.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Peer;
use crate::compact::{compact_map, compact_set};
use crate::event::Unreadable;
use crate::lease::{Lease, LeaseKey, Revision, Seniority};
use crate::node::NodeId;
use crate::subnet::Subnet;

/// What is known of one record that is there, or may be.
#[derive(Debug, Clone)]
pub(super) struct Record {
    /// The last value that could be read.
    pub(super) good: Option<Good>,
    /// That it cannot be read now.
    pub(super) spoilt: Option<Box<Spoilt>>,
    /// The last snapshot, or a burst of deletes, lacks it; it stays until that is confirmed.
    pub(super) doubted: bool,
}

/// A value that could be read, and whose it is.
#[derive(Debug, Clone)]
pub(super) enum Good {
    /// Our own.
    Own(Box<Lease>),
    /// Another node's.
    Peer(Arc<Peer>),
}

/// A record that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spoilt {
    /// What was found.
    pub(super) record: Unreadable,
    /// The last good value is of a history that a restored backup ended: its revision says nothing
    /// of any other one.
    pub(super) outdated: bool,
    /// The adopted routes that it covers, of which no good value is known.
    pub(super) spared: Vec<Subnet>,
}

/// How a record ranks among those that claim the same: those that are there before those that are
/// doubted, then by age.
pub(super) type Seat = (bool, Seniority);

/// How new a record is among those of its node: whether it is of the history that goes on, and its
/// last readable write.
pub(super) type Age = (bool, Revision);

impl Record {
    /// The last good value.
    pub(super) fn lease(&self) -> Option<&Lease> {
        match &self.good {
            Some(Good::Own(lease)) => Some(lease),
            Some(Good::Peer(peer)) => Some(&peer.lease),
            None => None,
        }
    }

    /// The peer, if it is another node's.
    pub(super) const fn peer(&self) -> Option<&Arc<Peer>> {
        match &self.good {
            Some(Good::Peer(peer)) => Some(peer),
            _ => None,
        }
    }

    /// How it ranks among those that claim the same.
    pub(super) fn seat(&self) -> Option<Seat> {
        Some((self.doubted, self.lease()?.seniority()))
    }

    /// The last write that is known, readable or not.
    pub(super) fn revision(&self) -> Option<Revision> {
        match &self.spoilt {
            Some(spoilt) => Some(spoilt.record.revision),
            None => self.lease().map(|lease| lease.revision),
        }
    }

    fn age(&self) -> Option<Age> {
        let outdated = self.spoilt.as_ref().is_some_and(|spoilt| spoilt.outdated);
        self.lease().map(|lease| (!outdated, lease.revision))
    }

    /// Whether the last good value is known and what is there now cannot be read.
    const fn is_garbled(&self) -> bool {
        self.spoilt.is_some() && self.good.is_some()
    }

    fn place(&self, key: &LeaseKey) -> Option<Place> {
        let node = self.lease()?.node.clone();
        Some((node, self.age()?, key.clone()))
    }
}

/// Where a record stands among those of its node.
type Place = (NodeId, Age, LeaseKey);

/// All records by their keys.
#[derive(Debug, Clone, Default)]
pub(super) struct Records {
    map: BTreeMap<LeaseKey, Record>,
    peers: usize,
    own: BTreeSet<LeaseKey>,
    spoilt: BTreeSet<LeaseKey>,
    /// The number of changes to those.
    spoilings: u64,
    /// Those of them that spare routes.
    sparing: BTreeSet<LeaseKey>,
    doubted: BTreeSet<LeaseKey>,
    /// The records by node and age.
    by_node: BTreeSet<Place>,
    /// Places that were taken or left since [`take_disturbed`](Self::take_disturbed).
    disturbed: Vec<Place>,
}

impl Records {
    pub(super) fn get(&self, key: &LeaseKey) -> Option<&Record> {
        self.map.get(key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&LeaseKey, &Record)> {
        self.map.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.map.len()
    }

    /// How many of them are peers'.
    pub(super) const fn peers(&self) -> usize {
        self.peers
    }

    /// The keys of those that bear our node id.
    pub(super) const fn own(&self) -> &BTreeSet<LeaseKey> {
        &self.own
    }

    /// The keys of those that cannot be read.
    pub(super) const fn spoilt(&self) -> &BTreeSet<LeaseKey> {
        &self.spoilt
    }

    /// A number that is another whenever something about these is.
    pub(super) const fn spoilings(&self) -> u64 {
        self.spoilings
    }

    /// The keys of those that cannot be read and spare routes: few, and at the start alone.
    pub(super) const fn sparing(&self) -> &BTreeSet<LeaseKey> {
        &self.sparing
    }

    /// The keys of those that the last snapshot lacks.
    pub(super) const fn doubted(&self) -> &BTreeSet<LeaseKey> {
        &self.doubted
    }

    /// Puts a record in the place of what is known; without a value and without a word that there is
    /// one, it is gone.
    pub(super) fn set(&mut self, key: &LeaseKey, record: Option<Record>) {
        let record = record.filter(|record| record.good.is_some() || record.spoilt.is_some());
        let before = self.map.get(key);
        let place = |record: Option<&Record>| record.and_then(|record| record.place(key));
        let (left, taken) = (place(before), place(record.as_ref()));
        let was_spoilt = before.is_some_and(|record| record.spoilt.is_some());
        let was_garbled = before.is_some_and(Record::is_garbled);
        let is_garbled = record.as_ref().is_some_and(Record::is_garbled);
        self.peers -= usize::from(before.is_some_and(|record| record.peer().is_some()));
        self.peers += usize::from(
            record
                .as_ref()
                .is_some_and(|record| record.peer().is_some()),
        );
        let is_own = |record: &Record| matches!(record.good, Some(Good::Own(_)));
        keep(&mut self.own, key, record.as_ref().is_some_and(is_own));
        let is_spoilt = record
            .as_ref()
            .is_some_and(|record| record.spoilt.is_some());
        self.spoilings += u64::from(was_spoilt || is_spoilt);
        keep(&mut self.spoilt, key, is_spoilt);
        let spoilt = record.as_ref().and_then(|record| record.spoilt.as_ref());
        let spares = spoilt.is_some_and(|spoilt| !spoilt.spared.is_empty());
        keep(&mut self.sparing, key, spares);
        keep(
            &mut self.doubted,
            key,
            record.as_ref().is_some_and(|record| record.doubted),
        );
        match record {
            Some(record) => drop(self.map.insert(key.clone(), record)),
            None => drop(self.map.remove(key)),
        }
        if left != taken || was_garbled != is_garbled {
            if let Some(left) = left {
                self.by_node.remove(&left);
                self.disturbed.push(left);
            }
            if let Some(taken) = taken {
                self.by_node.insert(taken.clone());
                self.disturbed.push(taken);
            }
        }
    }

    /// Takes the least room, after very many changes.
    pub(super) fn compact(&mut self) {
        compact_map(&mut self.map);
        compact_set(&mut self.by_node);
    }

    /// Puts the verdict on a peer in the place of an earlier one. The record itself is the same.
    pub(super) fn judge(&mut self, key: &LeaseKey, peer: Arc<Peer>) {
        if let Some(record) = self.map.get_mut(key) {
            record.good = Some(Good::Peer(peer));
        }
    }

    /// The unreadable records whose next newer one of the same node may be another than before.
    pub(super) fn take_disturbed(&mut self) -> BTreeSet<LeaseKey> {
        let places = std::mem::take(&mut self.disturbed);
        let mut keys = BTreeSet::new();
        for (node, age, key) in places {
            let first = (node.clone(), age, LeaseKey::new(""));
            let before = self.by_node.range(..first).next_back();
            if let Some((_, older, _)) = before.filter(|other| other.0 == node) {
                // The writes of one transaction have one revision.
                let from = (node.clone(), *older, LeaseKey::new(""));
                let of_one_age = self.by_node.range(from..);
                let of_one_age =
                    of_one_age.take_while(|other| other.0 == node && other.1 == *older);
                keys.extend(of_one_age.map(|(.., key)| key.clone()));
            }
            keys.insert(key);
        }
        keys.retain(|key| self.map.get(key).is_some_and(Record::is_garbled));
        keys
    }

    /// The record by which an unreadable one is replaced: the next one that its node wrote.
    pub(super) fn replacement(&self, key: &LeaseKey) -> Option<&LeaseKey> {
        let record = self.map.get(key).filter(|record| record.is_garbled())?;
        let (node, (is_current, revision), _) = record.place(key)?;
        let newer = (is_current, Revision(revision.0.checked_add(1)?));
        let (of, _, next) = self
            .by_node
            .range((node.clone(), newer, LeaseKey::new(""))..)
            .next()?;
        (*of == node).then_some(next)
    }
}

fn keep(keys: &mut BTreeSet<LeaseKey>, key: &LeaseKey, is_in: bool) {
    if is_in {
        keys.insert(key.clone());
    } else {
        keys.remove(key);
    }
}
