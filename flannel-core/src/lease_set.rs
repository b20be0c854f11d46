//! [`LeaseSet`]: folds the events of a store into the set of peers.

mod tombstones;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::admission::Admission;
pub use crate::admission::Own;
use crate::backend::Rejection;
use crate::config::Pool;
use crate::event::{Event, Snapshot, Unreadable};
use crate::family::{DualStack, Family};
use crate::lease::{BackendType, Lease, LeaseKey, Revision};
use crate::node::NodeId;
use crate::settle::{Claimant, Settlement};
use crate::subnet::Subnet;
use crate::wire;
pub use crate::withdrawal::{Held, WithdrawalGuard};

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
    /// The store went back from this revision: a backup was restored.
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
///   nothing until a second one confirms it. Deletes that are delivered one by one are believed.
/// - Two records with overlapping subnets are settled by [`Seniority`](crate::Seniority), for each
///   family by itself.
///
/// Applying an event takes time in proportion to what it changes.
#[derive(Debug, Clone)]
pub struct LeaseSet {
    admission: Admission,
    guard: WithdrawalGuard,
    max_records: usize,

    peers: BTreeMap<LeaseKey, Arc<Peer>>,
    of_other_backends: BTreeMap<BackendType, BTreeSet<LeaseKey>>,
    own_records: BTreeMap<LeaseKey, Lease>,
    unreadable: BTreeMap<LeaseKey, Unreadable>,
    subnets: Settlement<Subnet>,

    revision: Revision,
    /// The revision of the last snapshot.
    floor: Option<Revision>,
    tombstones: Tombstones,

    /// Routes found in the kernel at start that no record has covered yet.
    adopted: BTreeSet<Subnet>,
    /// The unreadable records of which a good value is known.
    garbled: BTreeSet<LeaseKey>,
    /// Of these, those whose good value is of a history that a restored backup ended: its revision
    /// says nothing any more.
    outdated: BTreeSet<LeaseKey>,
    /// Of the adopted routes, those that unreadable records cover, of which no good value is known.
    spared: BTreeMap<LeaseKey, Vec<Subnet>>,
    /// Peers that the last snapshot lacks and that are kept until a second one lacks them too.
    doubted: BTreeSet<LeaseKey>,
    held: Option<Held>,
    believed: bool,
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
            peers: BTreeMap::new(),
            of_other_backends: BTreeMap::new(),
            own_records: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            subnets: Settlement::default(),
            revision: Revision::default(),
            floor: None,
            tombstones: Tombstones::default(),
            adopted: BTreeSet::new(),
            garbled: BTreeSet::new(),
            outdated: BTreeSet::new(),
            spared: BTreeMap::new(),
            doubted: BTreeSet::new(),
            held: None,
            believed: false,
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
        self.admission.own = Some(own);
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
        for peer in self.peers.values() {
            cover(&mut self.adopted, &peer.lease);
        }
    }

    /// The peers by their records' keys: every other node's record, admitted or not.
    pub const fn peers(&self) -> &BTreeMap<LeaseKey, Arc<Peer>> {
        &self.peers
    }

    /// The peers that are admitted although they are of another backend than ours, by that: one of
    /// us has not followed a change of the config yet.
    pub const fn of_other_backends(&self) -> &BTreeMap<BackendType, BTreeSet<LeaseKey>> {
        &self.of_other_backends
    }

    /// The records that bear our node id: that of our lease, and stale ones.
    pub const fn own_records(&self) -> &BTreeMap<LeaseKey, Lease> {
        &self.own_records
    }

    /// The records that are there and cannot be read. Where there was a good value before, it is
    /// still in force.
    pub const fn unreadable(&self) -> &BTreeMap<LeaseKey, Unreadable> {
        &self.unreadable
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
        self.spared.values().flatten()
    }

    /// Takes an event in. Config events are not meant for the set and change nothing.
    pub fn apply(&mut self, event: Event) -> Applied {
        match event {
            Event::Snapshot(snapshot) => self.snapshot(snapshot, false),
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
        self.snapshot(snapshot, true)
    }

    /// Takes a snapshot in after a silence that cost leases: whatever it lacks, if only one peer, is
    /// held until a second one lacks it too.
    pub(crate) fn apply_doubting(&mut self, snapshot: Snapshot) -> Applied {
        let doubting = WithdrawalGuard {
            share_percent: 0,
            floor: 1,
        };
        let usual = std::mem::replace(&mut self.guard, doubting);
        let applied = self.snapshot(snapshot, false);
        self.guard = usual;
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
        self.unreadable.remove(&lease.key);
        self.garbled.remove(&lease.key);
        self.outdated.remove(&lease.key);
        self.spared.remove(&lease.key);
        self.doubted.remove(&lease.key);
        cover(&mut self.adopted, &lease);
        if self.differs(&lease) {
            applied.own = self.own_written(&lease);
            applied.delta = self.write(vec![(lease.key.clone(), Some(lease))]);
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
        self.unreadable.remove(&key);
        self.garbled.remove(&key);
        self.outdated.remove(&key);
        self.spared.remove(&key);
        self.doubted.remove(&key);
        self.tombstones.insert(key.clone(), revision);
        applied.delta = self.write(vec![(key.clone(), None)]);
        if self.is_own_key(&key) {
            applied.own = Some(OwnChange::Deleted { key, revision });
        }
        self.release();
        applied
    }

    fn mark(&mut self, unreadable: Unreadable) -> Applied {
        self.revision = self.revision.max(unreadable.revision);
        let mut applied = Applied::default();
        if self.is_old_write(&unreadable.key, unreadable.revision)
            || self.unreadable.get(&unreadable.key) == Some(&unreadable)
        {
            return applied;
        }
        if !self.has_room_for(&unreadable.key) {
            applied.refused = 1;
            return applied;
        }
        self.tombstones.remove(&unreadable.key);
        self.doubted.remove(&unreadable.key);
        if self.is_own_key(&unreadable.key) {
            applied.own = Some(OwnChange::Unreadable(unreadable.clone()));
        }
        let key = unreadable.key.clone();
        self.unreadable.insert(key.clone(), unreadable);
        if let Some(last) = self.record(&key).cloned() {
            self.garbled.insert(key.clone());
            applied.delta = self.write(vec![(key, Some(last))]);
        }
        self.release();
        applied
    }

    fn snapshot(&mut self, snapshot: Snapshot, confirming: bool) -> Applied {
        let mut applied = Applied {
            restored_from: (snapshot.revision < self.revision).then_some(self.revision),
            ..Applied::default()
        };
        let revision = snapshot.revision;
        let (mut leases, unreadable) = self.sort_out(snapshot, &mut applied.refused);

        let known = self.peers.len() + self.adopted.len();
        self.spared.retain(|key, _| unreadable.contains_key(key));
        for key in unreadable.keys() {
            // Flannel's keys say which subnets they are of. These first: a readable record may claim
            // more than it can have, and an adopted route must not go for that.
            let known = self.record(key).is_some();
            if let (false, Ok(subnets)) = (known, wire::parse_subnet_key(key.as_str())) {
                // A route to a part of it was another's.
                let found = subnets
                    .values()
                    .filter(|subnet| self.adopted.remove(subnet));
                let found: Vec<Subnet> = found.copied().collect();
                if !found.is_empty() {
                    self.spared.insert(key.clone(), found);
                }
            }
        }
        for lease in leases.values() {
            cover(&mut self.adopted, lease);
        }
        let lacks = |key: &LeaseKey| !leases.contains_key(key) && !unreadable.contains_key(key);
        let (sure, doubtful): (BTreeSet<_>, BTreeSet<_>) = self
            .peers
            .keys()
            .filter(|key| lacks(key))
            .cloned()
            .partition(|key| confirming && self.doubted.contains(key));
        // Adopted subnets are only ever fewer: what is left now was missing from the held one too.
        let adopted_are_sure = confirming && self.held.is_some();
        let doubtful_adopted = if adopted_are_sure {
            0
        } else {
            self.adopted.len()
        };
        let withdrawal = Held {
            withdrawn: doubtful.len() + doubtful_adopted,
            known,
        };
        self.held = self.guard.holds(withdrawal).then_some(withdrawal);
        applied.held = self.held;

        let mut removed = sure;
        if self.held.is_some() {
            if adopted_are_sure {
                self.adopted.clear();
            }
            self.doubted = doubtful;
            self.unreadable.retain(|key, _| self.doubted.contains(key));
        } else {
            removed.extend(doubtful);
            removed.extend(self.own_records.keys().filter(|key| lacks(key)).cloned());
            self.adopted.clear();
            self.doubted.clear();
            self.unreadable.clear();
            self.believed = true;
        }
        applied.own = self.own_in_snapshot(&leases, &unreadable, revision);
        self.unreadable.extend(unreadable);
        self.tombstones.clear();
        self.floor = Some(revision);
        self.revision = revision;

        let known = |key: &&LeaseKey| leases.contains_key(*key) || self.record(key).is_some();
        let garbled: BTreeSet<LeaseKey> = self.unreadable.keys().filter(known).cloned().collect();
        if applied.restored_from.is_some() {
            let unread = garbled.iter().filter(|key| !leases.contains_key(*key));
            self.outdated = unread.cloned().collect();
        } else {
            self.outdated
                .retain(|key| garbled.contains(key) && !leases.contains_key(key));
        }
        let before = std::mem::replace(&mut self.garbled, garbled);
        let review = before
            .symmetric_difference(&self.garbled)
            .chain(&self.outdated);
        let review: BTreeMap<LeaseKey, Option<Lease>> = review
            .filter_map(|key| Some((key.clone(), Some(self.record(key)?.clone()))))
            .collect();
        leases.retain(|_, lease| self.differs(lease));
        let written = leases.into_iter().map(|(key, lease)| (key, Some(lease)));
        let gone = removed.into_iter().map(|key| (key, None));
        let mut records = review;
        records.extend(written.chain(gone));
        applied.delta = self.write(records.into_iter().collect());
        applied
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
        if self.doubted.contains(key) {
            before_snapshot
        } else if let Some(known) = self.known_revision(key) {
            revision < known
        } else if let Some(deleted) = self.tombstones.get(key) {
            revision <= deleted
        } else {
            before_snapshot
        }
    }

    /// Whether a delete is older than what is known of the record.
    fn is_old_delete(&self, key: &LeaseKey, revision: Revision) -> bool {
        if let Some(known) = self.known_revision(key) {
            // The snapshot that lacks a doubted record may be of a restored, younger history.
            let since = self.floor.filter(|_| self.doubted.contains(key));
            revision < since.map_or(known, |floor| floor.min(known))
        } else {
            self.tombstones
                .get(key)
                .max(self.floor)
                .is_some_and(|seen| revision <= seen)
        }
    }

    /// The last write of a record, readable or not, that is there.
    fn known_revision(&self, key: &LeaseKey) -> Option<Revision> {
        let unreadable = self.unreadable.get(key).map(|record| record.revision);
        unreadable.or_else(|| self.record(key).map(|lease| lease.revision))
    }

    fn record(&self, key: &LeaseKey) -> Option<&Lease> {
        let peer = self.peers.get(key).map(|peer| &peer.lease);
        peer.or_else(|| self.own_records.get(key))
    }

    fn has_room_for(&self, key: &LeaseKey) -> bool {
        self.peers.len() + self.own_records.len() + self.unreadable.len() < self.max_records
            || self.record(key).is_some()
            || self.unreadable.contains_key(key)
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

    fn is_own_key(&self, key: &LeaseKey) -> bool {
        let own = self.admission.own.as_ref();
        own.is_some_and(|own| own.key.as_ref() == Some(key))
    }

    fn own_written(&self, lease: &Lease) -> Option<OwnChange> {
        let news = self.is_own_key(&lease.key) && self.differs(lease);
        news.then(|| self.own_found(lease))
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
        let key = self.admission.own.as_ref()?.key.as_ref()?;
        if let Some(record) = unreadable.get(key) {
            return Some(OwnChange::Unreadable(record.clone()));
        }
        match leases.get(key) {
            Some(lease) => Some(self.own_found(lease)),
            None if self.held.is_some() => None,
            None => Some(OwnChange::Deleted {
                key: key.clone(),
                revision,
            }),
        }
    }

    /// Ends the wait for a second snapshot once events have explained all that the first lacked.
    fn release(&mut self) {
        if self.held.is_some() && self.doubted.is_empty() && self.adopted.is_empty() {
            self.held = None;
            self.believed = true;
        }
    }

    fn judge_all(&mut self) -> LeaseDelta {
        let peers = self.peers.values().map(|peer| &peer.lease);
        let all = peers.chain(self.own_records.values());
        self.write(
            all.map(|lease| (lease.key.clone(), Some(lease.clone())))
                .collect(),
        )
    }

    /// Puts records in and takes records out, and judges anew whoever that concerns.
    fn write(&mut self, records: Records) -> LeaseDelta {
        let (records, replaced) = self.with_garbled(records);
        let mut claims = Vec::new();
        let mut judged = BTreeMap::new();
        for (key, lease) in records {
            let theirs = match lease {
                Some(lease) if self.admission.is_own(&lease) => {
                    self.own_records.insert(key.clone(), lease);
                    None
                }
                other => {
                    self.own_records.remove(&key);
                    other
                }
            };
            let theirs = theirs.map(|lease| (self.screen(&lease, &replaced), lease));
            let before = self.peers.get(&key).map(|peer| peer.lease.seniority());
            let after = theirs.as_ref().map(|(_, lease)| lease.seniority());
            for family in Family::ALL {
                let claimant = |seniority| Claimant { seniority, family };
                if before != after
                    && let Some(gone) = before.clone().map(claimant)
                    && !self.subnets.claims(&gone).is_empty()
                {
                    claims.push((gone, Vec::new()));
                }
                if let Some((screened, _)) = &theirs
                    && let Some(who) = after.clone().map(claimant)
                {
                    let claim = screened
                        .get(family)
                        .and_then(|verdict| verdict.as_ref().ok());
                    if self.subnets.claims(&who) != claim.map_or(&[][..], std::slice::from_ref) {
                        claims.push((who, claim.copied().into_iter().collect()));
                    }
                }
            }
            judged.insert(key, theirs);
        }
        for touched in self.subnets.update(claims) {
            let key = touched.seniority.key;
            if !judged.contains_key(&key)
                && let Some(peer) = self.peers.get(&key)
            {
                let screened = self.screen(&peer.lease, &replaced);
                judged.insert(key, Some((screened, peer.lease.clone())));
            }
        }
        let mut delta = LeaseDelta::default();
        for (key, theirs) in judged {
            let peer = theirs.map(|(screened, lease)| Arc::new(self.peer(screened, lease)));
            self.note_backend(&key, peer.as_deref());
            match (self.peers.get(&key), peer) {
                (None, None) => {}
                (Some(_), None) => {
                    self.peers.remove(&key);
                    delta.removed.push(key);
                }
                (Some(old), Some(new)) if *old == new => {}
                (old, Some(new)) => {
                    let list = if old.is_some() {
                        &mut delta.changed
                    } else {
                        &mut delta.added
                    };
                    list.push(key.clone());
                    self.peers.insert(key, new);
                }
            }
        }
        delta
    }

    /// With the records to be written, those that cannot be read of the same nodes; and by which
    /// record each of these is replaced, if it is. Looks at the other records only if a node is
    /// concerned that has one that cannot be read.
    fn with_garbled(&self, records: Records) -> (Records, Replaced) {
        if self.garbled.is_empty() {
            return (records, Replaced::new());
        }
        let mut records: BTreeMap<LeaseKey, Option<Lease>> = records.into_iter().collect();
        let nodes: BTreeSet<&NodeId> = records
            .iter()
            .flat_map(|(key, lease)| [self.record(key), lease.as_ref()])
            .flatten()
            .map(|lease| &lease.node)
            .collect();
        // A snapshot may hold both, a value to read and one that cannot be.
        let to_be = |key| match records.get(key) {
            Some(to_be) => to_be.as_ref(),
            None => self.record(key),
        };
        let garbled = self.garbled.iter().filter_map(to_be);
        let garbled: Vec<&Lease> = garbled.filter(|last| nodes.contains(&last.node)).collect();
        let age = |lease: &Lease| (!self.outdated.contains(&lease.key), lease.revision);
        let mut newest: BTreeMap<&NodeId, Option<(Age, LeaseKey)>> =
            garbled.iter().map(|last| (&last.node, None)).collect();
        if newest.is_empty() {
            return (records.into_iter().collect(), Replaced::new());
        }
        let peers = self.peers.values().map(|peer| &peer.lease);
        let stay = peers.filter(|lease| !records.contains_key(&lease.key));
        for lease in stay.chain(records.values().flatten()) {
            if let Some(newest) = newest.get_mut(&lease.node) {
                let this = Some((age(lease), lease.key.clone()));
                *newest = this.max(newest.take());
            }
        }
        let mut replaced = Replaced::new();
        for last in &garbled {
            let newest = newest.get(&last.node).cloned().flatten();
            let by = newest.filter(|(newest, _)| *newest > age(last));
            replaced.insert(last.key.clone(), by.map(|(_, by)| by));
        }
        let review = garbled
            .into_iter()
            .filter(|last| !records.contains_key(&last.key));
        let review: Vec<Lease> = review.cloned().collect();
        records.extend(
            review
                .into_iter()
                .map(|last| (last.key.clone(), Some(last))),
        );
        (records.into_iter().collect(), replaced)
    }

    /// What of a record may be used, others' claims aside.
    fn screen(&self, lease: &Lease, replaced: &Replaced) -> DualStack<Result<Subnet, Rejection>> {
        let mut screened = self.admission.screen(lease);
        if !self.garbled.contains(&lease.key) {
            return screened;
        }
        let by = match replaced.get(&lease.key) {
            Some(by) => by.clone(),
            None => self
                .peers
                .get(&lease.key)
                .and_then(|peer| replaced_by(peer)),
        };
        for family in Family::ALL {
            if let (Some(by), Some(_)) = (&by, screened.get(family)) {
                let by = by.clone();
                screened.set(family, Some(Err(Rejection::Replaced { by })));
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

    fn peer(&self, screened: DualStack<Result<Subnet, Rejection>>, lease: Lease) -> Peer {
        let mut subnets = DualStack::default();
        let mut rejected = DualStack::default();
        for (family, verdict) in screened.iter() {
            let seniority = lease.seniority();
            let lost = self.subnets.lost(&Claimant { seniority, family });
            match (verdict, lost) {
                (Err(rejection), _) => rejected.set(family, Some(rejection.clone())),
                (Ok(subnet), None) => subnets.set(family, Some(*subnet)),
                (Ok(subnet), Some(lost)) => {
                    let rejection = Rejection::SubnetTaken {
                        subnet: *subnet,
                        other: lost.to,
                        by: lost.by.seniority.key.clone(),
                    };
                    rejected.set(family, Some(rejection));
                }
            }
        }
        Peer {
            lease,
            subnets,
            rejected,
        }
    }
}

/// Records as they are to be; `None`: not at all.
type Records = Vec<(LeaseKey, Option<Lease>)>;

/// How new a record is: whether it is of the history that goes on, and its last write.
type Age = (bool, Revision);

/// Records that cannot be read, each with the newer one of its node if there is one.
type Replaced = BTreeMap<LeaseKey, Option<LeaseKey>>;

/// The record that a peer was found replaced by.
fn replaced_by(peer: &Peer) -> Option<LeaseKey> {
    peer.rejected
        .values()
        .find_map(|rejection| match rejection {
            Rejection::Replaced { by } => Some(by.clone()),
            _ => None,
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
