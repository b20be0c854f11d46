//! [`FakeStore`]: a revisioned key-value store as etcd v3 is, in memory, and [`StoreManager`], a
//! [`Manager`](flannel_core::Manager) that keeps flannel's own layout in it.
//!
//! It keeps etcd's rules: one revision for the whole store; conditional transactions over keys and
//! ranges; leases that take their keys along when they end; a history that can be read and watched
//! from any revision that was not compacted away; a backup that is restored with the revision it
//! had. A program reaches it through a [`StoreLink`] of its own, on which anything can go wrong
//! that can go wrong on the way to a server.
//!
//! Nothing in it is random and no time passes but that of the given [`Clock`] and of tokio, so
//! under a paused clock one sequence of calls gives one history.

mod kv;
mod link;
mod watch;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flannel_core::{Clock, Moment, Revision};
use tokio::sync::Notify;

pub use flannel_subnet_kv::{
    Compare, Decision, Expectation, KeyEvent, KeyRange, KeyValue, KvOptions as StoreOptions,
    Layout, LeaseId, Op, OpAnswer, Page, PageAnswer, RangeAnswer, StoreError, StoreResult, Txn,
    TxnAnswer, View, WatchAnswer, decide,
};

use kv::Kv;
pub use link::{CallFault, Cut, Delivery, Silence, StoreLink};
pub use watch::LinkWatch;

/// Flannel's subnet manager on a fake store.
pub type StoreManager = flannel_subnet_kv::KvManager<StoreLink>;

/// A store in memory.
///
/// Clones are handles on one and the same store. The calls of this type happen at once and cannot
/// fail on the way: they are for a test's own hand. Programs under test go through a
/// [`link`](Self::link).
#[derive(Clone)]
pub struct FakeStore {
    inner: Arc<Inner>,
}

struct Inner {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// Told of every write, and of a restore.
    changed: Notify,
}

#[derive(Default)]
struct State {
    kv: Kv,
    /// Counts the restores: a watch belongs to one incarnation.
    incarnation: u64,
}

/// The whole of a store at one moment.
#[derive(Debug, Clone)]
pub struct Backup(Kv);

impl FakeStore {
    /// An empty store whose leases age on this clock.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            inner: Arc::new(Inner {
                clock,
                state: Mutex::default(),
                changed: Notify::new(),
            }),
        }
    }

    /// A new way to the store, on which nothing is wrong yet.
    pub fn link(&self, name: impl Into<String>) -> StoreLink {
        StoreLink::new(self.clone(), name.into())
    }

    // Writes

    /// Does a transaction.
    ///
    /// # Errors
    /// [`StoreError::Refused`], or [`StoreError::LeaseNotFound`] if a key is to be attached to a
    /// lease that is not there. Nothing is changed then.
    pub fn txn(&self, txn: &Txn) -> StoreResult<TxnAnswer> {
        self.with(|kv, _| kv.txn(txn))
    }

    /// Writes a key that is attached to no lease, whatever is there, and says at which revision.
    pub fn put(&self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Revision {
        self.write(Op::put(key, value, None))
    }

    /// Writes a key under a new lease, whatever is there.
    pub fn put_for(
        &self,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
        ttl: Duration,
    ) -> Revision {
        let (lease, _) = self.with(|kv, now| kv.grant(now, ttl));
        self.write(Op::put(key, value, Some(lease)))
    }

    /// Deletes a key; says whether there was one.
    pub fn delete(&self, key: impl Into<String>) -> bool {
        let before = self.revision();
        self.write(Op::delete(key)) > before
    }

    /// Does one op that nothing can be wrong with, and says at which revision the store is then.
    fn write(&self, op: Op) -> Revision {
        let txn = Txn {
            then: vec![op],
            ..Txn::default()
        };
        let answer = self.txn(&txn);
        answer.map_or_else(|_| self.revision(), |answer| answer.revision)
    }

    /// Forgets the history before a revision. Watches that have not come so far end with
    /// [`StoreError::Compacted`].
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if that is done already, [`StoreError::FutureRevision`].
    pub fn compact(&self, at: Revision) -> StoreResult<()> {
        let result = self.with(|kv, _| kv.compact(at));
        self.inner.changed.notify_waiters();
        result
    }

    /// Everything there is, to be restored later.
    pub fn backup(&self) -> Backup {
        Backup(self.with(|kv, _| kv.clone()))
    }

    /// Replaces everything by a backup: the revision **goes back**, what was written since is
    /// forgotten, and its revisions are used again for other writes. Leases begin anew with their
    /// full time; all watches break.
    pub fn restore(&self, Backup(kv): &Backup) {
        let now = self.inner.clock.now();
        let mut state = self.lock();
        // Else a program that still knows a lease of the lost time would find another's.
        let last_lease = state.kv.last_lease();
        state.kv = kv.restored(now, last_lease);
        state.incarnation += 1;
        drop(state);
        self.inner.changed.notify_waiters();
    }

    // Looks

    /// The revision of the last write.
    pub fn revision(&self) -> Revision {
        self.with(|kv, _| kv.revision())
    }

    /// How often the store was restored, and the revision of the last write: while both are the
    /// same, so are all entries.
    pub fn version(&self) -> (u64, Revision) {
        let revision = self.revision();
        (self.incarnation(), revision)
    }

    /// The entries of a range as they are now.
    pub fn entries(&self, range: &KeyRange) -> Vec<KeyValue> {
        let answer = self.with(|kv, _| kv.range(range, None));
        answer.map(|answer| answer.entries).unwrap_or_default()
    }

    /// The entries of a range as they were, and the revision of the store now.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] or [`StoreError::FutureRevision`].
    pub fn entries_at(&self, range: &KeyRange, at: Revision) -> StoreResult<RangeAnswer> {
        self.with(|kv, _| kv.range(range, Some(at)))
    }

    /// The time that is left of a lease; `None` if there is no such lease.
    pub fn time_to_live(&self, lease: LeaseId) -> Option<Duration> {
        self.with(|kv, now| kv.time_to_live(now, lease))
    }

    /// Every write to a range that the history still holds.
    pub fn history(&self, range: &KeyRange) -> Vec<KeyEvent> {
        let events = self.with(|kv, _| kv.events(range, kv.compacted()));
        events.unwrap_or_default()
    }

    // Inside

    /// Does something with the store as it is now, without what has expired.
    fn with<T>(&self, act: impl FnOnce(&mut Kv, Moment) -> T) -> T {
        let now = self.inner.clock.now();
        let mut state = self.lock();
        let before = state.kv.revision();
        state.kv.expire(now);
        let result = act(&mut state.kv, now);
        let written = state.kv.revision() != before;
        drop(state);
        if written {
            self.inner.changed.notify_waiters();
        }
        result
    }

    /// No call leaves the state half changed, so one that panicked left it whole.
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        let state = self.inner.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    fn incarnation(&self) -> u64 {
        self.lock().incarnation
    }

    fn changed(&self) -> &Notify {
        &self.inner.changed
    }
}

impl fmt::Debug for FakeStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let revision = self.lock().kv.revision();
        write!(f, "FakeStore(at {revision})")
    }
}
