//! The keys and leases of the store, and what etcd does with them. Time is a parameter.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use flannel_core::{Moment, Revision};
use flannel_subnet_kv::{
    Compare, Expectation, KeyEvent, KeyRange, KeyValue, LeaseId, Op, OpAnswer, RangeAnswer,
    StoreError, StoreResult, Txn, TxnAnswer,
};

/// The most compares, and the most ops, of one transaction: etcd's own limit.
const MAX_OPS: usize = 128;

/// The shortest time to live: what is asked for below it is raised to it, as etcd does with its
/// usual election timeout.
const MIN_TTL: Duration = Duration::from_secs(2);

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

    pub(super) fn range(&self, range: &KeyRange, at: Option<Revision>) -> StoreResult<RangeAnswer> {
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
    pub(super) fn events(&self, range: &KeyRange, from: Revision) -> StoreResult<Vec<KeyEvent>> {
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

    pub(super) fn txn(&mut self, txn: &Txn) -> StoreResult<TxnAnswer> {
        check(txn)?;
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

    fn check_leases(&self, ops: &[Op]) -> StoreResult<()> {
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
            omitted: false,
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

    pub(super) fn keep_alive(&mut self, now: Moment, lease: LeaseId) -> StoreResult<Duration> {
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
    pub(super) fn revoke(&mut self, lease: LeaseId) -> StoreResult<()> {
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
    pub(super) fn compact(&mut self, at: Revision) -> StoreResult<()> {
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

/// Refuses what etcd refuses: too much, and a key that is written twice.
fn check(txn: &Txn) -> StoreResult<()> {
    for (what, len) in [
        ("compares", txn.compares.len()),
        ("ops", txn.then.len().max(txn.or_else.len())),
    ] {
        if len > MAX_OPS {
            let reason = format!("a transaction of {len} {what}, {MAX_OPS} are allowed");
            return Err(StoreError::Refused { reason });
        }
    }
    for ops in [&txn.then, &txn.or_else] {
        for (n, op) in ops.iter().enumerate() {
            let Op::Put { key, .. } = op else { continue };
            let twice = ops.iter().enumerate().any(|(m, other)| match other {
                Op::Put { key: other, .. } => m != n && other == key,
                Op::Delete(range) => range.contains(key),
                Op::Range(_) => false,
            });
            if twice {
                let reason = format!("{key} is written twice in one transaction");
                return Err(StoreError::Refused { reason });
            }
        }
    }
    Ok(())
}
