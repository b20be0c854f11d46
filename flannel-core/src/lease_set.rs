//! [`LeaseSet`]: folds the events of a store into the set of peers.

mod record;
mod tombstones;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::admission::{Admission, Screened};
pub use crate::admission::{HostAddresses, Own};
use crate::backend::Rejection;
use crate::compact::BULK;
use crate::config::Pool;
use crate::event::{Event, Snapshot, Unreadable};
use crate::family::{DualStack, Family};
use crate::lease::{BackendType, Lease, LeaseKey, Revision};
use crate::settle::{Claimant, Settlement};
use crate::subnet::Subnet;
use crate::wire;
pub use crate::withdrawal::{Held, HeldReason, WithdrawalGuard};

use record::{Good, Record, Records, Seat, Spoilt};
use tombstones::Tombstones;

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

/// What a change made of the set of peers: keys of records whose [`Peer`] came, differs or went,
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
///   another record since, nothing of it is used ([`Rejection::Replaced`]).
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
        for (family, screened) in self.admission.screen(&peer.lease).iter() {
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

    fn own_key(&self) -> Option<&LeaseKey> {
        self.admission.own.as_ref()?.key.as_ref()
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

    fn snapshot(
        &mut self,
        snapshot: Snapshot,
        confirming: bool,
        guard: WithdrawalGuard,
    ) -> Applied {
        let mut applied = Applied::default();
        let (revision, unconfigured) = (snapshot.revision, snapshot.unconfigured);
        let known = self.records.peers() + self.adopted.len();
        let (leases, unreadable) = self.sort_out(snapshot, &mut applied.refused);
        let restored = revision < self.revision || self.goes_back(&leases, &unreadable);
        applied.restored_from = restored.then_some(self.revision);
        let mut spared = self.spare(&unreadable);
        for lease in leases.values() {
            cover(&mut self.adopted, lease);
        }

        // A store without a config confirms nothing and is confirmed by nothing.
        let confirming = confirming
            && !unconfigured
            && self
                .held
                .is_some_and(|held| held.reason == HeldReason::Share);
        let lacks = |key: &LeaseKey| !leases.contains_key(key) && !unreadable.contains_key(key);
        let doubtful = |key: &LeaseKey, record: &Record| {
            record.peer().is_some() && lacks(key) && !(confirming && record.doubted)
        };
        let doubtful_peers = self
            .records
            .iter()
            .filter(|(key, record)| doubtful(key, record));
        // Adopted subnets are only ever fewer: what is left now was missing from the held one too.
        let doubtful_adopted = if confirming { 0 } else { self.adopted.len() };
        let withdrawal = Held {
            withdrawn: doubtful_peers.count() + doubtful_adopted,
            known,
            reason: if unconfigured {
                HeldReason::NoConfig
            } else {
                HeldReason::Share
            },
        };
        let is_lost = self
            .records
            .own()
            .iter()
            .any(|key| self.is_own_key(key) && lacks(key));
        self.own_gone |= is_lost;
        let guard = if self.own_gone || restored && leases.is_empty() {
            WithdrawalGuard::DOUBTING
        } else {
            guard
        };
        let holds = match withdrawal.reason {
            HeldReason::NoConfig => withdrawal.withdrawn > 0,
            HeldReason::Share => guard.holds(withdrawal),
        };
        self.held = holds.then_some(withdrawal);
        applied.held = self.held;
        applied.own = self.own_in_snapshot(&leases, &unreadable, revision);

        let mut changes = BTreeMap::new();
        for (key, record) in self.records.iter().filter(|(key, _)| lacks(key)) {
            let next = if holds && doubtful(key, record) {
                Next::Is {
                    value: None,
                    spoilt: outdated(record.spoilt.clone(), restored),
                    doubted: true,
                }
            } else {
                Next::Gone
            };
            changes.insert(key.clone(), next);
        }
        for (key, record) in unreadable {
            let before = self
                .records
                .get(&key)
                .and_then(|record| record.spoilt.as_ref());
            let spoilt = Spoilt {
                outdated: before.is_some_and(|before| before.outdated),
                spared: spared.remove(&key).unwrap_or_default(),
                record,
            };
            let next = Next::Is {
                value: None,
                spoilt: outdated(Some(Box::new(spoilt)), restored),
                doubted: false,
            };
            changes.insert(key, next);
        }
        for (key, lease) in leases {
            // A snapshot may hold both, a value to read and one that cannot be.
            let spoilt = match changes.remove(&key) {
                Some(Next::Is { spoilt, .. }) => spoilt.map(|spoilt| {
                    Box::new(Spoilt {
                        outdated: false,
                        ..*spoilt
                    })
                }),
                _ => None,
            };
            let next = Next::Is {
                value: self.differs(&lease).then_some(lease),
                spoilt,
                doubted: false,
            };
            changes.insert(key, next);
        }
        if !holds {
            self.adopted.clear();
            self.believed = true;
        } else if confirming {
            self.adopted.clear();
        }
        self.tombstones.clear();
        self.floor = Some(revision);
        self.revision = revision;
        changes.retain(|key, next| self.is_news(key, next));
        applied.delta = self.write(changes);
        applied
    }

    /// Whether a record is older than it was. Within one history none ever is: a backup was restored,
    /// and the store has come as far as it was since.
    fn goes_back(
        &self,
        leases: &BTreeMap<LeaseKey, Lease>,
        unreadable: &BTreeMap<LeaseKey, Unreadable>,
    ) -> bool {
        let leases = leases
            .iter()
            .filter(|(key, _)| !unreadable.contains_key(*key))
            .map(|(key, lease)| (key, lease.revision));
        let unreadable = unreadable
            .iter()
            .map(|(key, record)| (key, record.revision));
        let is_older = |(key, revision): (&LeaseKey, Revision)| {
            let known = self.records.get(key).filter(|known| !known.doubted);
            known.and_then(Record::revision) > Some(revision)
        };
        leases.chain(unreadable).any(is_older)
    }

    /// The adopted routes that unreadable records cover, of which no good value is known.
    fn spare(
        &mut self,
        unreadable: &BTreeMap<LeaseKey, Unreadable>,
    ) -> BTreeMap<LeaseKey, Vec<Subnet>> {
        let mut spared = BTreeMap::new();
        for key in unreadable.keys() {
            let record = self.records.get(key);
            if record.is_some_and(|record| record.good.is_some()) {
                continue;
            }
            let before = record.and_then(|record| record.spoilt.as_ref());
            let mut subnets = before.map_or_else(Vec::new, |before| before.spared.clone());
            // Flannel's keys say which subnets they are of. These first: a readable record may claim
            // more than it can have, and an adopted route must not go for that. A route to a part
            // of it was another's.
            if let Ok(of_key) = wire::parse_subnet_key(key.as_str()) {
                let found = of_key.values().filter(|subnet| self.adopted.remove(subnet));
                subnets.extend(found);
            }
            spared.insert(key.clone(), subnets);
        }
        spared
    }

    /// Whether a record is to be another than it is.
    fn is_news(&self, key: &LeaseKey, next: &Next) -> bool {
        match (self.records.get(key), next) {
            (None, Next::Gone) => false,
            (None, _) | (_, Next::Gone) => true,
            (
                Some(record),
                Next::Is {
                    value,
                    spoilt,
                    doubted,
                },
            ) => value.is_some() || record.spoilt != *spoilt || record.doubted != *doubted,
        }
    }

    /// The records of a snapshot by key: of two with one key the newer, and no more than fit.
    fn sort_out(
        &self,
        snapshot: Snapshot,
        refused: &mut usize,
    ) -> (BTreeMap<LeaseKey, Lease>, BTreeMap<LeaseKey, Unreadable>) {
        let mut leases: BTreeMap<LeaseKey, Lease> = BTreeMap::new();
        for lease in snapshot.leases {
            let newer = leases
                .get(&lease.key)
                .is_none_or(|other| other.revision < lease.revision);
            if newer {
                leases.insert(lease.key.clone(), lease);
            }
        }
        let mut unreadable: BTreeMap<LeaseKey, Unreadable> = BTreeMap::new();
        for record in snapshot.unreadable {
            let newer = unreadable
                .get(&record.key)
                .is_none_or(|other| other.revision < record.revision)
                && leases
                    .get(&record.key)
                    .is_none_or(|lease| lease.revision < record.revision);
            if newer {
                unreadable.insert(record.key.clone(), record);
            }
        }
        if leases.len() > self.max_records {
            let mut by_age: Vec<_> = leases.values().map(Lease::seniority).collect();
            by_age.sort_unstable();
            let too_many = by_age.split_off(self.max_records);
            for young in too_many.iter().filter(|young| !self.is_own_key(&young.key)) {
                leases.remove(&young.key);
                *refused += 1;
            }
        }
        // Those of which a good value is known are never left out: that would look like a delete.
        let room = self.max_records.saturating_sub(leases.len());
        let mut unknown = 0;
        unreadable.retain(|key, _| {
            let known = self.record(key).is_some() || self.is_own_key(key);
            unknown += usize::from(!known);
            known || unknown <= room
        });
        *refused += unknown.saturating_sub(room);
        (leases, unreadable)
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

    fn own_in_snapshot(
        &self,
        leases: &BTreeMap<LeaseKey, Lease>,
        unreadable: &BTreeMap<LeaseKey, Unreadable>,
        revision: Revision,
    ) -> Option<OwnChange> {
        let key = self.own_key()?.clone();
        if let Some(record) = unreadable.get(&key) {
            return Some(OwnChange::Unreadable(record.clone()));
        }
        Some(match leases.get(&key) {
            Some(lease) => self.own_found(lease),
            None => OwnChange::Deleted { key, revision },
        })
    }

    /// Ends the wait for a second snapshot once events have explained all that the first lacked.
    fn release(&mut self) {
        let explained = self.records.doubted().is_empty() && self.adopted.is_empty();
        if self.held.is_some() && explained {
            self.held = None;
            self.believed = true;
        }
    }

    fn judge_all(&mut self) -> LeaseDelta {
        let keys = self.records.iter();
        let with_value = keys.filter(|(_, record)| record.good.is_some());
        let changes = with_value.map(|(key, record)| {
            let next = Next::Is {
                value: record.lease().cloned(),
                spoilt: record.spoilt.clone(),
                doubted: record.doubted,
            };
            (key.clone(), next)
        });
        let changes = changes.collect();
        self.write(changes)
    }

    /// Puts records in and takes records out, and judges anew whoever that concerns.
    fn write(&mut self, changes: BTreeMap<LeaseKey, Next>) -> LeaseDelta {
        let mut before: BTreeMap<LeaseKey, Option<Arc<Peer>>> = BTreeMap::new();
        let mut claims = Vec::new();
        let is_bulk = changes.len() > BULK;
        for (key, next) in changes {
            let old = self.records.get(&key);
            let left = old.and_then(Record::seat);
            before.insert(key.clone(), old.and_then(Record::peer).cloned());
            let record = self.next_record(old, next);
            let taken = record.as_ref().and_then(Record::seat);
            if left != taken
                && let Some(left) = left
            {
                let claimants = Family::ALL.map(|family| claimant(&left, family));
                let had = claimants
                    .into_iter()
                    .filter(|who| !self.subnets.claims(who).is_empty());
                claims.extend(had.map(|who| (who, Vec::new())));
            }
            self.records.set(&key, record);
        }
        if is_bulk {
            self.records.compact();
        }
        let mut open: BTreeSet<LeaseKey> = before.keys().cloned().collect();
        open.extend(self.records.take_disturbed());
        let mut screened = BTreeMap::new();
        for key in open {
            let Some(record) = self.records.get(&key) else {
                continue;
            };
            let (Some(lease), Some(seat)) = (record.lease(), record.seat()) else {
                continue;
            };
            let found = self.screen(&key, lease);
            for family in Family::ALL {
                let who = claimant(&seat, family);
                let claim = found.get(family).and_then(|screened| screened.claim);
                let claim = claim.as_slice();
                if self.subnets.claims(&who) != claim {
                    claims.push((who, claim.to_vec()));
                }
            }
            screened.insert(key, found);
        }
        for touched in self.subnets.update(claims) {
            let key = touched.seniority.key;
            if !screened.contains_key(&key)
                && let Some(lease) = self.record(&key)
            {
                let found = self.screen(&key, lease);
                screened.insert(key, found);
            }
        }
        self.judge(screened, before)
    }

    /// The record that a change makes of one.
    fn next_record(&self, old: Option<&Record>, next: Next) -> Option<Record> {
        let Next::Is {
            value,
            spoilt,
            doubted,
        } = next
        else {
            return None;
        };
        let good = match value {
            None => old.and_then(|old| old.good.clone()),
            Some(lease) if self.admission.is_own(&lease) => Some(Good::Own(Box::new(lease))),
            Some(lease) => Some(Good::Peer(Arc::new(Peer {
                lease,
                subnets: DualStack::default(),
                rejected: DualStack::default(),
                doubted,
            }))),
        };
        Some(Record {
            good,
            spoilt,
            doubted,
        })
    }

    /// Says of each of these records what may be used. `before` has what was said of those that were
    /// written.
    fn judge(
        &mut self,
        screened: BTreeMap<LeaseKey, DualStack<Screened>>,
        mut before: BTreeMap<LeaseKey, Option<Arc<Peer>>>,
    ) -> LeaseDelta {
        let mut delta = LeaseDelta::default();
        for (key, found) in screened {
            let Some(record) = self.records.get(&key) else {
                continue;
            };
            let Some(peer) = record.peer().cloned() else {
                continue;
            };
            let seat = record.seat();
            let old = match before.remove(&key) {
                Some(old) => old,
                None => Some(Arc::clone(&peer)),
            };
            let new = Arc::new(self.verdicts(&peer, seat.as_ref(), record.doubted, &found));
            self.note_backend(&key, Some(&new));
            match old {
                Some(old) if *old == *new => self.records.judge(&key, old),
                old => {
                    let list = match old {
                        Some(_) => &mut delta.changed,
                        None => &mut delta.added,
                    };
                    list.push(key.clone());
                    self.records.judge(&key, new);
                }
            }
        }
        // What is left is there no more, or is our own now.
        for (key, old) in before {
            if old.is_some() {
                self.note_backend(&key, None);
                delta.removed.push(key);
            }
        }
        delta
    }

    /// What of a record may be used, others' claims aside.
    fn screen(&self, key: &LeaseKey, lease: &Lease) -> DualStack<Screened> {
        let mut screened = self.admission.screen(lease);
        if let Some(by) = self.records.replacement(key) {
            for family in Family::ALL {
                if screened.has(family) {
                    let by = by.clone();
                    let refused = Screened::refused(Rejection::Replaced { by });
                    screened.set(family, Some(refused));
                }
            }
        }
        screened
    }

    /// Notes whether a peer that is admitted is of another backend than ours.
    fn note_backend(&mut self, key: &LeaseKey, peer: Option<&Peer>) {
        self.of_other_backends.retain(|_, keys| {
            keys.remove(key);
            !keys.is_empty()
        });
        let Some(peer) = peer.filter(|peer| !peer.subnets.is_empty()) else {
            return;
        };
        if let Some(other) = self.admission.other_backend(&peer.lease) {
            let keys = self.of_other_backends.entry(other).or_default();
            keys.insert(key.clone());
        }
    }

    /// A peer with the verdicts on it.
    fn verdicts(
        &self,
        peer: &Peer,
        seat: Option<&Seat>,
        doubted: bool,
        screened: &DualStack<Screened>,
    ) -> Peer {
        let mut subnets = DualStack::default();
        let mut rejected = DualStack::default();
        for (family, screened) in screened.iter() {
            let Some(seat) = seat else { continue };
            match self.verdict(family, seat, screened.clone()) {
                Ok(subnet) => subnets.set(family, Some(subnet)),
                Err(rejection) => rejected.set(family, Some(rejection)),
            }
        }
        Peer {
            lease: peer.lease.clone(),
            subnets,
            rejected,
            doubted,
        }
    }

    fn verdict(
        &self,
        family: Family,
        seat: &Seat,
        screened: Screened,
    ) -> Result<Subnet, Rejection> {
        let subnet = screened.verdict?;
        match self.subnets.lost(&claimant(seat, family)) {
            None => Ok(subnet),
            Some(lost) => Err(Rejection::SubnetTaken {
                subnet,
                other: lost.to,
                by: lost.by.seniority.key.clone(),
            }),
        }
    }
}

/// The peers of a [`LeaseSet`], in the order of their records' keys.
#[derive(Clone, Copy)]
pub struct Peers<'a>(&'a Records);

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

fn claimant(seat: &Seat, family: Family) -> Claimant {
    let (doubted, seniority) = seat.clone();
    Claimant {
        doubted,
        seniority,
        family,
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
