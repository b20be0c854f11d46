//! The keys and leases of the store, and what etcd does with them. Time is a parameter.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use flannel_core::{Moment, Revision};

use super::txn::{Compare, Expectation, Op, OpAnswer, Txn, TxnAnswer};
use super::{Result, StoreError};

/// The shortest time to live: what is asked for below it is raised to it, as etcd does with its
/// usual election timeout.
const MIN_TTL: Duration = Duration::from_secs(2);

/// The name of a lease of the store: keys that are attached to it are deleted when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// A key with its value and its place in the store's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// The value; empty in the event of a deletion.
    pub value: Vec<u8>,
    /// When the key was made; 0 in the event of a deletion.
    pub created: Revision,
    /// When it was last written or, in the event of a deletion, deleted.
    pub modified: Revision,
    /// How often it was written since it was made; 0 in the event of a deletion.
    pub version: u64,
    /// The lease that it is attached to.
    pub lease: Option<LeaseId>,
}

impl KeyValue {
    /// What etcd compares a key with that is not there.
    const fn absent() -> Self {
        Self {
            key: String::new(),
            value: Vec::new(),
            created: Revision(0),
            modified: Revision(0),
            version: 0,
            lease: None,
        }
    }
}

/// One write, as a watch tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyEvent {
    /// The key was written.
    Put(KeyValue),
    /// The key was deleted, or its lease ended.
    Delete {
        /// The key.
        key: String,
        /// When.
        revision: Revision,
    },
}

impl KeyEvent {
    /// The key that was written or deleted.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// When it was.
    pub const fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.modified,
            Self::Delete { revision, .. } => *revision,
        }
    }

    fn apply(self, keys: &mut BTreeMap<String, KeyValue>) {
        match self {
            Self::Put(entry) => drop(keys.insert(entry.key.clone(), entry)),
            Self::Delete { key, .. } => drop(keys.remove(&key)),
        }
    }
}

/// Which keys are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyRange {
    /// One key.
    Key(String),
    /// Every key that begins with this text.
    Prefix(String),
    /// Every key from the first text on that sorts before the second.
    Between(String, String),
}

impl KeyRange {
    /// One key.
    pub fn key(key: impl Into<String>) -> Self {
        Self::Key(key.into())
    }

    /// Every key that begins with this text.
    pub fn prefix(prefix: impl Into<String>) -> Self {
        Self::Prefix(prefix.into())
    }

    /// Whether a key is meant.
    pub fn contains(&self, key: &str) -> bool {
        match self {
            Self::Key(only) => only == key,
            Self::Prefix(prefix) => key.starts_with(prefix.as_str()),
            Self::Between(from, to) => (from.as_str()..to.as_str()).contains(&key),
        }
    }

    const fn first(&self) -> &String {
        match self {
            Self::Key(key) => key,
            Self::Prefix(prefix) => prefix,
            Self::Between(from, _) => from,
        }
    }

    /// The entries that are meant, in the order of their keys.
    fn of<'a>(
        &self,
        keys: &'a BTreeMap<String, KeyValue>,
    ) -> impl Iterator<Item = &'a KeyValue> + use<'a, '_> {
        let behind = keys.range::<String, _>(self.first()..);
        behind
            .take_while(|(key, _)| self.contains(key))
            .map(|(_, entry)| entry)
    }
}

/// What a range read found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeAnswer {
    /// The revision of the store when it answered, whichever revision was read.
    pub revision: Revision,
    /// The entries in the order of their keys.
    pub entries: Vec<KeyValue>,
}

/// A lease that was granted.
#[derive(Debug, Clone)]
struct Granted {
    ttl: Duration,
    expires: Moment,
    keys: BTreeSet<String>,
}

/// All of the store: cloned, it is a backup.
#[derive(Debug, Clone)]
pub(super) struct Kv {
    revision: u64,
    compacted: u64,
    keys: BTreeMap<String, KeyValue>,
    /// The keys as they were before the first event of `log`.
    base: BTreeMap<String, KeyValue>,
    log: VecDeque<KeyEvent>,
    leases: BTreeMap<LeaseId, Granted>,
    last_lease: u64,
}

impl Default for Kv {
    /// An empty store has revision 1, as etcd's.
    fn default() -> Self {
        Self {
            revision: 1,
            compacted: 0,
            keys: BTreeMap::new(),
            base: BTreeMap::new(),
            log: VecDeque::new(),
            leases: BTreeMap::new(),
            last_lease: 0,
        }
    }
}

impl Kv {
    pub(super) const fn revision(&self) -> Revision {
        Revision(self.revision)
    }

    pub(super) const fn last_lease(&self) -> u64 {
        self.last_lease
    }

    pub(super) const fn compacted(&self) -> Revision {
        Revision(self.compacted)
    }

    // Reads

    pub(super) fn range(&self, range: &KeyRange, at: Option<Revision>) -> Result<RangeAnswer> {
        let answer = |keys: &BTreeMap<String, KeyValue>| RangeAnswer {
            revision: Revision(self.revision),
            entries: range.of(keys).cloned().collect(),
        };
        let Some(Revision(at)) = at else {
            return Ok(answer(&self.keys));
        };
        if at > self.revision {
            return Err(StoreError::FutureRevision {
                asked: Revision(at),
                current: self.revision(),
            });
        }
        if at < self.compacted {
            return Err(StoreError::Compacted {
                revision: self.compacted(),
            });
        }
        let mut keys = self.base.clone();
        let until = self.log.iter().take_while(|e| e.revision().0 <= at);
        until.cloned().for_each(|event| event.apply(&mut keys));
        Ok(answer(&keys))
    }

    /// The writes to a range from a revision on.
    pub(super) fn events(&self, range: &KeyRange, from: Revision) -> Result<Vec<KeyEvent>> {
        if from < self.compacted() {
            return Err(StoreError::Compacted {
                revision: self.compacted(),
            });
        }
        let first = self.log.partition_point(|event| event.revision() < from);
        let events = self.log.iter().skip(first);
        Ok(events
            .filter(|event| range.contains(event.key()))
            .cloned()
            .collect())
    }

    // Writes

    pub(super) fn txn(&mut self, txn: &Txn) -> Result<TxnAnswer> {
        txn.check()?;
        let succeeded = txn.compares.iter().all(|compare| self.holds(compare));
        let ops = if succeeded { &txn.then } else { &txn.or_else };
        self.check_leases(ops)?;
        let revision = self.revision + 1;
        let mut results = Vec::new();
        for op in ops {
            results.push(match op {
                Op::Put { key, value, lease } => {
                    self.put(revision, key, value, *lease);
                    OpAnswer::Put
                }
                Op::Delete(range) => {
                    let found: Vec<String> = range
                        .of(&self.keys)
                        .map(|entry| entry.key.clone())
                        .collect();
                    found.iter().for_each(|key| self.delete(revision, key));
                    OpAnswer::Deleted(found.len())
                }
                Op::Range(range) => OpAnswer::Range(range.of(&self.keys).cloned().collect()),
            });
        }
        Ok(TxnAnswer {
            succeeded,
            revision: Revision(self.revision),
            results,
        })
    }

    fn holds(&self, compare: &Compare) -> bool {
        let is = |entry: &KeyValue| match &compare.expected {
            Expectation::Created(revision) => entry.created == *revision,
            Expectation::Modified(revision) => entry.modified == *revision,
            Expectation::Value(value) => entry.value == *value,
            Expectation::Lease(lease) => entry.lease == *lease,
        };
        let mut found = compare.range.of(&self.keys).peekable();
        if found.peek().is_none() {
            // A key that is not there equals nothing, not even the empty value.
            let valued = matches!(compare.expected, Expectation::Value(_));
            return !valued && is(&KeyValue::absent());
        }
        found.all(is)
    }

    fn check_leases(&self, ops: &[Op]) -> Result<()> {
        for op in ops {
            if let Op::Put {
                lease: Some(lease), ..
            } = op
                && !self.leases.contains_key(lease)
            {
                return Err(StoreError::LeaseNotFound { lease: *lease });
            }
        }
        Ok(())
    }

    fn put(&mut self, revision: u64, key: &str, value: &[u8], lease: Option<LeaseId>) {
        let old = self.keys.get(key);
        let entry = KeyValue {
            key: key.to_owned(),
            value: value.to_vec(),
            created: old.map_or(Revision(revision), |old| old.created),
            modified: Revision(revision),
            version: old.map_or(0, |old| old.version) + 1,
            lease,
        };
        self.detach(key);
        if let Some(granted) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
            granted.keys.insert(key.to_owned());
        }
        self.write(KeyEvent::Put(entry));
    }

    fn delete(&mut self, revision: u64, key: &str) {
        self.detach(key);
        self.write(KeyEvent::Delete {
            key: key.to_owned(),
            revision: Revision(revision),
        });
    }

    fn detach(&mut self, key: &str) {
        let lease = self.keys.get(key).and_then(|entry| entry.lease);
        if let Some(granted) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
            granted.keys.remove(key);
        }
    }

    fn write(&mut self, event: KeyEvent) {
        self.revision = event.revision().0;
        self.log.push_back(event.clone());
        event.apply(&mut self.keys);
    }

    // Leases

    pub(super) fn grant(&mut self, now: Moment, ttl: Duration) -> (LeaseId, Duration) {
        let ttl = whole_seconds(ttl).max(MIN_TTL);
        self.last_lease += 1;
        let id = LeaseId(self.last_lease);
        let granted = Granted {
            ttl,
            expires: now + ttl,
            keys: BTreeSet::new(),
        };
        self.leases.insert(id, granted);
        (id, ttl)
    }

    pub(super) fn keep_alive(&mut self, now: Moment, lease: LeaseId) -> Result<Duration> {
        let granted = self.leases.get_mut(&lease);
        let granted = granted.ok_or(StoreError::LeaseNotFound { lease })?;
        granted.expires = now + granted.ttl;
        Ok(granted.ttl)
    }

    /// The time a lease has left; `None` if there is no such lease.
    pub(super) fn time_to_live(&self, now: Moment, lease: LeaseId) -> Option<Duration> {
        let granted = self.leases.get(&lease)?;
        Some(granted.expires.since(now))
    }

    /// Ends a lease: its keys are deleted at one revision.
    pub(super) fn revoke(&mut self, lease: LeaseId) -> Result<()> {
        let granted = self.leases.remove(&lease);
        let granted = granted.ok_or(StoreError::LeaseNotFound { lease })?;
        let revision = self.revision + 1;
        for key in &granted.keys {
            self.delete(revision, key);
        }
        Ok(())
    }

    /// Ends the leases whose time has run out, the earliest first.
    pub(super) fn expire(&mut self, now: Moment) {
        let mut over: Vec<(Moment, LeaseId)> = self
            .leases
            .iter()
            .filter(|(_, granted)| granted.expires <= now)
            .map(|(id, granted)| (granted.expires, *id))
            .collect();
        over.sort_unstable();
        for (_, lease) in over {
            self.revoke(lease).ok();
        }
    }

    /// The time until a lease with keys runs out.
    pub(super) fn next_expiry(&self, now: Moment) -> Option<Duration> {
        let used = self.leases.values().filter(|lease| !lease.keys.is_empty());
        used.map(|lease| lease.expires.since(now)).min()
    }

    // The history

    /// Forgets what was before a revision; the state at that revision can still be read.
    pub(super) fn compact(&mut self, at: Revision) -> Result<()> {
        if at > self.revision() {
            return Err(StoreError::FutureRevision {
                asked: at,
                current: self.revision(),
            });
        }
        if at <= self.compacted() {
            return Err(StoreError::Compacted {
                revision: self.compacted(),
            });
        }
        while self.log.front().is_some_and(|e| e.revision() < at) {
            if let Some(event) = self.log.pop_front() {
                event.apply(&mut self.base);
            }
        }
        self.compacted = at.0;
        Ok(())
    }

    /// The same state as a store has it that begins with it: every lease starts anew. Leases are
    /// named on from the given one.
    pub(super) fn restored(&self, now: Moment, last_lease: u64) -> Self {
        let mut kv = self.clone();
        kv.last_lease = kv.last_lease.max(last_lease);
        for granted in kv.leases.values_mut() {
            granted.expires = now + granted.ttl;
        }
        kv
    }
}

/// Rounded up, as the store counts whole seconds.
fn whole_seconds(time: Duration) -> Duration {
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    Duration::from_secs(seconds)
}
