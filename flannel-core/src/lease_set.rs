//! [`LeaseSet`]: folds the events of a store into the set of peers.

mod judging;
mod record;
mod snapshot;
mod tombstones;
mod view;

use std::collections::{BTreeMap, BTreeSet};

use crate::admission::Admission;
pub use crate::admission::{HostAddresses, Own};
use crate::config::Pool;
use crate::event::{Event, Snapshot, Unreadable};
use crate::family::DualStack;
use crate::lease::{BackendType, Lease, LeaseKey, Revision};
use crate::settle::Settlement;
use crate::subnet::Subnet;
pub use crate::withdrawal::{Held, HeldReason, WithdrawalGuard};

use record::{Record, Records, Spoilt};
use tombstones::Tombstones;
pub use view::{LeaseDelta, Peer, Peers};

/// What happened to the record under our own key.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum OwnChange {
    /// It was written in our name: by us, or by someone who changed it for us. Every snapshot that
    /// has it says so, news or not: a restored backup may have set back what we wrote.
    Written(Lease),
    /// It is gone; every believed snapshot that lacks it says so. Not meant is a lease that was
    /// written after this revision.
    Deleted {
        /// The record.
        key: LeaseKey,
        /// When it was removed, or the revision of the snapshot that lacks it.
        revision: Revision,
    },
    /// It was written in another node's name.
    Taken(Lease),
    /// It was written and cannot be read.
    Unreadable(Unreadable),
}

/// Deletes of peers' records that came together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Deletes {
    /// The records, each with the revision at which it was deleted.
    pub keys: Vec<(LeaseKey, Revision)>,
    /// How many came, those included whose records were written again before they were judged.
    pub came: usize,
    /// Our own record was deleted with them.
    pub own: bool,
}

/// What an event did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Applied {
    /// What changed among the peers.
    pub delta: LeaseDelta,
    /// What happened to our own record.
    pub own: Option<OwnChange>,
    /// A snapshot was not believed: it removed nothing, or not all that it lacks. It is to be read
    /// again after a grace period and given to [`LeaseSet::apply_confirming`].
    pub held: Option<Held>,
    /// The store, or a record in it, went back from this revision: a backup was restored.
    pub restored_from: Option<Revision>,
    /// Records that were not taken, because there are too many.
    pub refused: usize,
}

/// The set of peers, as folded from the store's events.
///
/// - Per record the newest revision counts. Repeats and old events change nothing, whatever their
///   order; deleting a record touches that record only.
/// - Our own records are kept apart and are never peers.
/// - A record that cannot be read keeps its last good value, but as long as its node has written
///   another record since, nothing of it is used
///   ([`Rejection::Replaced`](crate::Rejection::Replaced)).
/// - A snapshot is the truth, but one that withdraws too much ([`WithdrawalGuard`]) removes
///   nothing until a second one confirms it, and so do deletes that come together
///   ([`apply_burst`](Self::apply_burst)). Deletes that come one by one are believed. A record that
///   is there beats one that is held so.
/// - A store without a network config makes no statement by what it lacks.
/// - That our own record is gone is told at once, whatever is held.
/// - Two records with overlapping subnets are settled by [`Seniority`](crate::Seniority), for each
///   family by itself, our own among them.
///
/// Applying an event takes time in proportion to what it changes.
#[derive(Debug, Clone)]
pub struct LeaseSet {
    admission: Admission,
    guard: WithdrawalGuard,
    max_records: usize,

    records: Records,
    of_other_backends: BTreeMap<BackendType, BTreeSet<LeaseKey>>,
    subnets: Settlement<Subnet>,

    revision: Revision,
    /// The revision of the last snapshot.
    floor: Option<Revision>,
    tombstones: Tombstones,

    /// Routes found in the kernel at start that no record has covered yet.
    adopted: BTreeSet<Subnet>,
    held: Option<Held>,
    believed: bool,
    /// Our own record was there and went, and is not back.
    own_gone: bool,
}

/// A record as it is to be.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "most are of the large kind, and each is moved once"
)]
enum Next {
    /// It is not there.
    Gone,
    /// It is there, or may be.
    Is {
        /// Its new value; `None`: what was known stays.
        value: Option<Lease>,
        spoilt: Option<Box<Spoilt>>,
        doubted: bool,
    },
}

impl Default for LeaseSet {
    fn default() -> Self {
        Self::new(WithdrawalGuard::default())
    }
}

impl LeaseSet {
    /// The most records kept unless set otherwise. Flannel's largest network has 2^20 subnets; a
    /// store that holds more is broken or hostile.
    pub const MAX_RECORDS: usize = 1_048_576;

    /// A set without peers. Nobody is admitted before it is told who we are, the pools and the
    /// backend.
    pub fn new(guard: WithdrawalGuard) -> Self {
        Self {
            admission: Admission::default(),
            guard,
            max_records: Self::MAX_RECORDS,
            records: Records::default(),
            of_other_backends: BTreeMap::new(),
            subnets: Settlement::default(),
            revision: Revision::default(),
            floor: None,
            tombstones: Tombstones::default(),
            adopted: BTreeSet::new(),
            held: None,
            believed: false,
            own_gone: false,
        }
    }

    /// The same with another limit on the number of records. Of a snapshot with more, the oldest
    /// are taken.
    #[must_use]
    pub const fn with_max_records(mut self, max_records: usize) -> Self {
        self.max_records = max_records;
        self
    }

    /// Tells who we are; all records are judged anew.
    pub fn set_own(&mut self, own: Own) -> LeaseDelta {
        if self.admission.own.as_ref() == Some(&own) {
            return LeaseDelta::default();
        }
        let before = self.admission.own.replace(own);
        if before.and_then(|before| before.key) != self.own_key().cloned() {
            self.own_gone = false;
        }
        self.judge_all()
    }

    /// Tells the addresses of this host; if they are others than before, all records are judged
    /// anew.
    pub fn set_host(&mut self, host: HostAddresses) -> LeaseDelta {
        if self.admission.host == host {
            return LeaseDelta::default();
        }
        self.admission.host = host;
        self.judge_all()
    }

    /// Tells the pools of the network; all records are judged anew.
    pub fn set_pools(&mut self, pools: DualStack<Pool>) -> LeaseDelta {
        if self.admission.pools == pools {
            return LeaseDelta::default();
        }
        self.admission.pools = pools;
        self.judge_all()
    }

    /// Tells our backend; all records are judged anew, those of another backend are rejected.
    pub fn set_backend(&mut self, backend: BackendType) -> LeaseDelta {
        self.set_backends(backend, Vec::new())
    }

    /// Tells our backend, and the other ones that it reaches; all records are judged anew, those of
    /// any further backend are rejected.
    pub fn set_backends(&mut self, ours: BackendType, reaches: Vec<BackendType>) -> LeaseDelta {
        let same = self.admission.backend.as_ref() == Some(&ours);
        if same && self.admission.reaches == reaches {
            return LeaseDelta::default();
        }
        self.admission.backend = Some(ours);
        self.admission.reaches = reaches;
        self.judge_all()
    }

    /// Tells the subnets of peers whose routes were found in the kernel at start. Until a snapshot
    /// is believed they count as known peers.
    pub fn set_adopted(&mut self, subnets: Vec<Subnet>) {
        if self.believed {
            return;
        }
        self.adopted = subnets.into_iter().collect();
        for peer in Peers(&self.records).values() {
            cover(&mut self.adopted, &peer.lease);
        }
    }

    /// Takes an event in. Config events are not meant for the set and change nothing.
    pub fn apply(&mut self, event: Event) -> Applied {
        match event {
            Event::Snapshot(snapshot) => self.snapshot(snapshot, false, self.guard),
            Event::Put(lease) => self.put(lease),
            Event::Delete { key, revision } => self.delete(key, revision),
            Event::Unreadable(unreadable) => self.mark(unreadable),
            Event::Progress(revision) => {
                self.revision = self.revision.max(revision);
                Applied::default()
            }
            Event::Config(_) | Event::ConfigUnreadable { .. } => Applied::default(),
        }
    }

    /// Takes a snapshot in that was read a grace period after one that was held: what both lack is
    /// withdrawn. What only this one lacks is guarded as ever.
    pub fn apply_confirming(&mut self, snapshot: Snapshot) -> Applied {
        self.snapshot(snapshot, true, self.guard)
    }

    /// Takes a snapshot in after a silence that cost leases: whatever it lacks, if only one peer, is
    /// held until a second one lacks it too.
    pub(crate) fn apply_doubting(&mut self, snapshot: Snapshot) -> Applied {
        self.snapshot(snapshot, false, WithdrawalGuard::DOUBTING)
    }

    /// Takes deletes in that came together, as of one transaction. If they are more than the guard
    /// lets pass, or if our own record went as well, they are held as a snapshot is: what a second
    /// reading ([`apply_confirming`](Self::apply_confirming)) lacks is withdrawn then. That some are
    /// back already does not make the others more certain.
    pub fn apply_burst(&mut self, deletes: Deletes) -> Applied {
        let Deletes { keys, came, own } = deletes;
        let mut applied = Applied::default();
        let mut fresh: Vec<(LeaseKey, Revision)> = Vec::new();
        for (key, revision) in keys {
            self.revision = self.revision.max(revision);
            if !self.is_old_delete(&key, revision) {
                fresh.push((key, revision));
            }
        }
        let is_known = |key: &LeaseKey| {
            let record = self.records.get(key);
            record.is_some_and(|record| record.peer().is_some() && !record.doubted)
        };
        let withdrawal = Held {
            withdrawn: fresh.iter().filter(|(key, _)| is_known(key)).count(),
            known: self.records.peers(),
            reason: HeldReason::Share,
        };
        let guard = if own || self.own_gone {
            WithdrawalGuard::DOUBTING
        } else {
            self.guard
        };
        let holds = withdrawal.withdrawn > 0
            && guard.holds(Held {
                withdrawn: came.max(withdrawal.withdrawn),
                ..withdrawal
            });
        let mut changes = BTreeMap::new();
        for (key, revision) in fresh {
            self.tombstones.insert(key.clone(), revision);
            let record = self.records.get(&key);
            let kept = record.filter(|record| holds && record.peer().is_some());
            let next = match kept {
                Some(record) => Next::Is {
                    value: None,
                    spoilt: record.spoilt.clone(),
                    doubted: true,
                },
                None => Next::Gone,
            };
            changes.insert(key, next);
        }
        if holds {
            let before = self.held.map_or(0, |held| held.withdrawn);
            self.held = Some(Held {
                withdrawn: withdrawal.withdrawn + before,
                reason: self.held.map_or(HeldReason::Share, |held| held.reason),
                ..withdrawal
            });
            applied.held = self.held;
        }
        applied.delta = self.write(changes);
        self.release();
        applied
    }

    fn put(&mut self, lease: Lease) -> Applied {
        self.revision = self.revision.max(lease.revision);
        let mut applied = Applied::default();
        if self.is_old_write(&lease.key, lease.revision) {
            return applied;
        }
        if !self.has_room_for(&lease.key) {
            applied.refused = 1;
            return applied;
        }
        self.tombstones.remove(&lease.key);
        // We are in the store, be it under another key: it has not lost us.
        self.own_gone &= !self.admission.is_own(&lease);
        cover(&mut self.adopted, &lease);
        let differs = self.differs(&lease);
        let was_marked = |record: &Record| record.spoilt.is_some() || record.doubted;
        if differs || self.records.get(&lease.key).is_some_and(was_marked) {
            if differs && self.is_own_key(&lease.key) {
                applied.own = Some(self.own_found(&lease));
            }
            let key = lease.key.clone();
            let next = Next::Is {
                value: Some(lease),
                spoilt: None,
                doubted: false,
            };
            applied.delta = self.write([(key, next)].into());
        }
        self.release();
        applied
    }

    fn delete(&mut self, key: LeaseKey, revision: Revision) -> Applied {
        self.revision = self.revision.max(revision);
        let mut applied = Applied::default();
        if self.is_old_delete(&key, revision) {
            return applied;
        }
        self.tombstones.insert(key.clone(), revision);
        if self.is_own_key(&key) {
            self.own_gone = true;
            let key = key.clone();
            applied.own = Some(OwnChange::Deleted { key, revision });
        }
        applied.delta = self.write([(key, Next::Gone)].into());
        self.release();
        applied
    }

    fn mark(&mut self, unreadable: Unreadable) -> Applied {
        self.revision = self.revision.max(unreadable.revision);
        let mut applied = Applied::default();
        let record = self.records.get(&unreadable.key);
        let before = record.and_then(|record| record.spoilt.as_deref());
        if self.is_old_write(&unreadable.key, unreadable.revision)
            || before.is_some_and(|before| before.record == unreadable)
        {
            return applied;
        }
        let (outdated, spared) =
            before.map_or((false, Vec::new()), |b| (b.outdated, b.spared.clone()));
        if !self.has_room_for(&unreadable.key) {
            applied.refused = 1;
            return applied;
        }
        self.tombstones.remove(&unreadable.key);
        if self.is_own_key(&unreadable.key) {
            applied.own = Some(OwnChange::Unreadable(unreadable.clone()));
        }
        let key = unreadable.key.clone();
        let next = Next::Is {
            value: None,
            spoilt: Some(Box::new(Spoilt {
                record: unreadable,
                outdated,
                spared,
            })),
            doubted: false,
        };
        applied.delta = self.write([(key, next)].into());
        self.release();
        applied
    }

    /// Whether a write is older than what is known of the record.
    fn is_old_write(&self, key: &LeaseKey, revision: Revision) -> bool {
        let before_snapshot = self.floor.is_some_and(|floor| revision < floor);
        let record = self.records.get(key);
        let known = record
            .filter(|record| !record.doubted)
            .and_then(Record::revision);
        match (known, self.tombstones.get(key)) {
            (Some(known), _) => revision < known,
            (None, Some(deleted)) => revision <= deleted,
            (None, None) => before_snapshot,
        }
    }

    /// Whether a delete is older than what is known of the record.
    fn is_old_delete(&self, key: &LeaseKey, revision: Revision) -> bool {
        let record = self.records.get(key);
        let deleted = self.tombstones.get(key);
        match record.and_then(|record| Some((record.doubted, record.revision()?))) {
            Some((false, known)) => revision < known,
            Some((true, known)) => match deleted {
                Some(deleted) => revision <= deleted,
                // The snapshot that lacks it may be of a restored, younger history.
                None => revision < self.floor.map_or(known, |floor| floor.min(known)),
            },
            None => deleted.max(self.floor).is_some_and(|seen| revision <= seen),
        }
    }

    fn record(&self, key: &LeaseKey) -> Option<&Lease> {
        self.records.get(key)?.lease()
    }

    fn has_room_for(&self, key: &LeaseKey) -> bool {
        self.records.len() < self.max_records
            || self.records.get(key).is_some()
            || self.is_own_key(key)
    }

    /// Whether a record is new or says something else than what is known. Time goes by between two
    /// readings of one write: that alone is no difference.
    fn differs(&self, lease: &Lease) -> bool {
        self.record(&lease.key).is_none_or(|known| {
            known.revision != lease.revision
                || known.node != lease.node
                || known.instance != lease.instance
                || known.subnet != lease.subnet
                || known.attrs != lease.attrs
                || known.created != lease.created
        })
    }

    fn own_found(&self, lease: &Lease) -> OwnChange {
        if self.admission.is_own(lease) {
            OwnChange::Written(lease.clone())
        } else {
            OwnChange::Taken(lease.clone())
        }
    }

    /// Ends the wait for a second snapshot once events have explained all that the first lacked.
    fn release(&mut self) {
        let explained = self.records.doubted().is_empty() && self.adopted.is_empty();
        if self.held.is_some() && explained {
            self.held = None;
            self.believed = true;
        }
    }
}

/// A record that cannot be read, once the history that its last good value is of has ended.
fn outdated(spoilt: Option<Box<Spoilt>>, restored: bool) -> Option<Box<Spoilt>> {
    spoilt.map(|mut spoilt| {
        spoilt.outdated |= restored;
        spoilt
    })
}

/// Takes out the adopted subnets that a record covers: they are the record's from now on.
fn cover(adopted: &mut BTreeSet<Subnet>, lease: &Lease) {
    for subnet in lease.subnet.values() {
        while let Some(inside) = adopted.range(subnet..).next().copied()
            && subnet.contains(&inside)
        {
            adopted.remove(&inside);
        }
    }
}
