//! Snapshots: the whole store at once, believed or held.

use std::collections::BTreeMap;

use super::record::{Record, Spoilt};
use super::{
    Applied, Held, HeldReason, LeaseSet, Next, OwnChange, WithdrawalGuard, cover, outdated,
};
use crate::event::{Snapshot, Unreadable};
use crate::lease::{Lease, LeaseKey, Revision};
use crate::subnet::Subnet;
use crate::wire;

impl LeaseSet {
    pub(super) fn snapshot(
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
    pub(super) fn goes_back(
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
    pub(super) fn spare(
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
    pub(super) fn is_news(&self, key: &LeaseKey, next: &Next) -> bool {
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
    pub(super) fn sort_out(
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

    pub(super) fn own_in_snapshot(
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
}
