//! [`Burst`]: deletes of peers' records, kept for a moment, so that those which come together are
//! judged together.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::clock::Moment;
use crate::lease::{LeaseKey, Revision};
use crate::lease_set::Deletes;

/// How long after a delete the next one belongs to the same burst: far more than lies between two
/// messages of one transaction's deletes, far less than a peer that is gone takes to be missed.
const GAP: Duration = Duration::from_millis(50);

/// The longest that a delete is kept.
const LONGEST: Duration = Duration::from_millis(500);

/// Deletes that are not judged yet.
#[derive(Debug, Default)]
pub(super) struct Burst {
    deletes: BTreeMap<LeaseKey, Deleted>,
    /// The records that were deleted, those among them that were written again since, and when.
    all: BTreeMap<LeaseKey, Moment>,
    /// Our own was among them.
    own: bool,
    /// When the last of them came.
    last: Option<Moment>,
}

/// A delete that waits: whoever lives writes its record again meanwhile.
#[derive(Debug, Clone, Copy)]
struct Deleted {
    revision: Revision,
    came: Moment,
}

impl Burst {
    /// Takes a delete of a peer's record.
    pub(super) fn add(&mut self, key: LeaseKey, revision: Revision, now: Moment) {
        self.all.insert(key.clone(), now);
        let latest = self.deletes.entry(key).or_insert(Deleted {
            revision,
            came: now,
        });
        if revision > latest.revision {
            *latest = Deleted {
                revision,
                came: now,
            };
        }
        self.last = Some(now);
    }

    /// Our own record was deleted.
    pub(super) const fn add_own(&mut self, now: Moment) {
        self.own = true;
        self.last = Some(now);
    }

    /// The record was written at a revision: an earlier delete of it says nothing any more, but that
    /// it came with the others.
    pub(super) fn written(&mut self, key: &LeaseKey, revision: Revision) {
        if self
            .deletes
            .get(key)
            .is_some_and(|deleted| deleted.revision < revision)
        {
            self.deletes.remove(key);
        }
    }

    /// When deletes are to be judged.
    pub(super) fn due(&self) -> Option<Moment> {
        let quiet = self.last? + GAP;
        let oldest = self.deletes.values().map(|deleted| deleted.came).min();
        Some(oldest.map_or(quiet, |oldest| quiet.min(oldest + LONGEST)))
    }

    /// Takes those out that are to be judged now: all, or where more of them keep coming, those that
    /// have waited as long as a single one would.
    pub(super) fn take(&mut self, now: Moment) -> Deletes {
        if self.last.is_none_or(|last| last + GAP <= now) {
            return self.take_all();
        }
        let waits = |deleted: &Deleted| deleted.came + GAP > now;
        let (wait, judged) = std::mem::take(&mut self.deletes)
            .into_iter()
            .partition(|(_, deleted)| waits(deleted));
        self.deletes = wait;
        let deletes = Deletes {
            came: self.all.len(),
            own: self.own,
            keys: revisions(judged),
        };
        self.all.retain(|_, came| *came + LONGEST > now);
        deletes
    }

    /// Takes all of them out.
    pub(super) fn take_all(&mut self) -> Deletes {
        let Self {
            deletes, all, own, ..
        } = std::mem::take(self);
        Deletes {
            came: all.len(),
            own,
            keys: revisions(deletes),
        }
    }
}

fn revisions(deletes: BTreeMap<LeaseKey, Deleted>) -> Vec<(LeaseKey, Revision)> {
    deletes
        .into_iter()
        .map(|(key, deleted)| (key, deleted.revision))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> LeaseKey {
        LeaseKey::new(name)
    }

    #[test]
    fn what_comes_close_together_is_one_burst_and_nothing_waits_long() {
        let start = Moment::default();
        let at = |millis| start + Duration::from_millis(millis);
        let mut burst = Burst::default();
        assert_eq!(burst.due(), None);
        burst.add(key("a"), Revision(1), at(0));
        assert_eq!(burst.due(), Some(at(50)));
        for n in 1..=12 {
            burst.add(key(&format!("b{n}")), Revision(1), at(n * 40));
        }
        assert_eq!(burst.due(), Some(at(500)), "not for ever");
        // The last ones have not waited yet for their records to be written again.
        let judged = burst.take(at(500));
        assert_eq!((judged.keys.len(), judged.came), (12, 13));
        assert_eq!(burst.due(), Some(at(530)));
        assert_eq!(burst.take(at(530)).keys, [(key("b12"), Revision(1))]);
        assert_eq!((burst.due(), burst.take_all()), (None, Deletes::default()));
    }

    #[test]
    fn a_later_write_takes_a_delete_back_and_an_earlier_one_does_not() {
        let now = Moment::default();
        let mut burst = Burst::default();
        burst.add(key("a"), Revision(5), now);
        burst.written(&key("a"), Revision(4));
        burst.add(key("b"), Revision(5), now);
        burst.written(&key("b"), Revision(6));
        burst.add_own(now);
        let deletes = burst.take_all();
        assert_eq!(deletes.keys, [(key("a"), Revision(5))]);
        assert_eq!((deletes.came, deletes.own), (2, true), "they came together");
    }
}
