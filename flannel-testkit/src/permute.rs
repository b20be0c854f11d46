//! Histories of a store, and the ways in which a watch may lawfully deliver one.
//!
//! Whoever folds events must end up with the same state for every [`Permutation`] of a history.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use flannel_core::{Event, Lease, LeaseKey, Revision, Rng, Snapshot, Unreadable};

/// What was written to a store, write by write.
#[derive(Debug, Clone, Default)]
pub struct History {
    writes: Vec<Event>,
    /// The records that are there, and when each was made.
    created: BTreeMap<LeaseKey, Revision>,
}

impl History {
    /// A store that nothing was written to.
    pub fn new() -> Self {
        Self::default()
    }

    fn next(&self) -> Revision {
        Revision(self.writes.len() as u64 + 1)
    }

    /// Writes a record; the store sets its revisions.
    pub fn put(&mut self, mut lease: Lease) {
        lease.revision = self.next();
        lease.created = *self
            .created
            .entry(lease.key.clone())
            .or_insert(lease.revision);
        self.writes.push(Event::Put(lease));
    }

    /// Removes a record, if it is there.
    pub fn delete(&mut self, key: &LeaseKey) {
        if self.created.remove(key).is_some() {
            let revision = self.next();
            let key = key.clone();
            self.writes.push(Event::Delete { key, revision });
        }
    }

    /// Writes something that cannot be read.
    pub fn corrupt(&mut self, key: &LeaseKey) {
        let revision = self.next();
        self.created.entry(key.clone()).or_insert(revision);
        self.writes.push(Event::Unreadable(Unreadable {
            key: key.clone(),
            revision,
            reason: "junk".to_owned(),
        }));
    }

    /// The writes in the store's order, revision by revision from 1 on.
    pub fn writes(&self) -> &[Event] {
        &self.writes
    }

    /// What the store holds after the first `n` writes.
    pub fn snapshot(&self, n: usize) -> Snapshot {
        let n = n.min(self.writes.len());
        let mut last = BTreeMap::new();
        for event in self.writes.iter().take(n) {
            if let Some(key) = key_of(event) {
                last.insert(key, event);
            }
        }
        let mut snapshot = Snapshot {
            revision: Revision(n as u64),
            ..Snapshot::default()
        };
        for event in last.into_values() {
            match event {
                Event::Put(lease) => snapshot.leases.push(lease.clone()),
                Event::Unreadable(record) => snapshot.unreadable.push(record.clone()),
                _ => {}
            }
        }
        snapshot
    }
}

/// The record that an event is about.
pub(crate) fn key_of(event: &Event) -> Option<&LeaseKey> {
    match event {
        Event::Put(lease) => Some(&lease.key),
        Event::Delete { key, .. } => Some(key),
        Event::Unreadable(record) => Some(&record.key),
        _ => None,
    }
}

/// A way in which a watch may deliver a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permutation {
    /// As it was written.
    Identity,
    /// Writes are delivered again, also long after.
    Repeated,
    /// The watch breaks off again and again; each time a snapshot comes first.
    Split,
    /// Writes are missed, and a snapshot stands for them.
    Squashed,
    /// The order is the store's only for each record by itself.
    Reordered,
}

impl Permutation {
    /// Every way.
    pub const ALL: [Self; 5] = [
        Self::Identity,
        Self::Repeated,
        Self::Split,
        Self::Squashed,
        Self::Reordered,
    ];

    /// The events that a watch delivers which was there from the beginning.
    pub fn deliver(self, history: &History, rng: &mut Rng) -> Vec<Event> {
        let mut events = vec![Event::Snapshot(history.snapshot(0))];
        let writes = history.writes();
        match self {
            Self::Identity => events.extend_from_slice(writes),
            Self::Repeated => {
                for (i, write) in writes.iter().enumerate() {
                    events.push(write.clone());
                    for _ in 0..below(rng, 3) {
                        events.extend(writes.get(below(rng, i + 1)).cloned());
                    }
                }
            }
            Self::Split => {
                for (i, write) in writes.iter().enumerate() {
                    events.push(write.clone());
                    if below(rng, 3) == 0 {
                        events.push(Event::Snapshot(history.snapshot(i + 1)));
                    }
                }
            }
            Self::Squashed => {
                let mut missed = 0;
                for (i, write) in writes.iter().enumerate() {
                    // Missing what came before a record turned unreadable would lose its last good
                    // value: another history, not another delivery of this one.
                    let readable = !matches!(write, Event::Unreadable(_));
                    if missed > 0 && (!readable || below(rng, 4) == 0) {
                        events.push(Event::Snapshot(history.snapshot(i)));
                        missed = 0;
                    }
                    if readable && (missed > 0 || below(rng, 2) == 0) {
                        missed += 1;
                    } else {
                        events.push(write.clone());
                    }
                }
                if missed > 0 {
                    events.push(Event::Snapshot(history.snapshot(writes.len())));
                }
            }
            Self::Reordered => {
                let mut queues: BTreeMap<_, VecDeque<_>> = BTreeMap::new();
                for write in writes {
                    let queue = queues.entry(key_of(write)).or_default();
                    queue.push_back(write.clone());
                }
                let mut queues: Vec<_> = queues.into_values().collect();
                while !queues.is_empty() {
                    let which = below(rng, queues.len());
                    match queues.get_mut(which).and_then(VecDeque::pop_front) {
                        Some(write) => events.push(write),
                        None => drop(queues.swap_remove(which)),
                    }
                }
            }
        }
        events
    }
}

/// A number below `limit`; 0 if that is 0.
pub(crate) fn below(rng: &mut Rng, limit: usize) -> usize {
    let limit = Duration::from_nanos(limit as u64);
    usize::try_from(rng.below(limit).as_nanos()).unwrap_or_default()
}
