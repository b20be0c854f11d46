//! The verdicts: which subnets of which records are used, worked out anew for what a change touches.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::record::{Good, Record, Seat};
use super::{LeaseDelta, LeaseSet, Next, Peer};
use crate::admission::Screened;
use crate::backend::Rejection;
use crate::compact::BULK;
use crate::family::{DualStack, Family};
use crate::lease::{Lease, LeaseKey};
use crate::settle::Claimant;
use crate::subnet::Subnet;

impl LeaseSet {
    pub(super) fn judge_all(&mut self) -> LeaseDelta {
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
    pub(super) fn write(&mut self, changes: BTreeMap<LeaseKey, Next>) -> LeaseDelta {
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
    pub(super) fn next_record(&self, old: Option<&Record>, next: Next) -> Option<Record> {
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
    pub(super) fn judge(
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
    pub(super) fn screen(&self, key: &LeaseKey, lease: &Lease) -> DualStack<Screened> {
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
    pub(super) fn note_backend(&mut self, key: &LeaseKey, peer: Option<&Peer>) {
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
    pub(super) fn verdicts(
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

    pub(super) fn verdict(
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

pub(super) fn claimant(seat: &Seat, family: Family) -> Claimant {
    let (doubted, seniority) = seat.clone();
    Claimant {
        doubted,
        seniority,
        family,
    }
}
