//! [`Burst`]: deletes of peers' records, kept for a moment, so that those which come together are
//! judged together.

use std::collections::{BTreeMap, BTreeSet};
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
    deletes: BTreeMap<LeaseKey, Revision>,
    /// The records that were deleted, those among them that were written again since.
    all: BTreeSet<LeaseKey>,
    /// Our own was among them.
    own: bool,
    /// When the first and the last of them came.
    came: Option<(Moment, Moment)>,
}

impl Burst {
    /// Takes a delete of a peer's record.
    pub(super) fn add(&mut self, key: LeaseKey, revision: Revision, now: Moment) {
        self.all.insert(key.clone());
        let latest = self.deletes.entry(key).or_default();
        *latest = revision.max(*latest);
        self.extend(now);
    }

    /// Our own record was deleted.
    pub(super) fn add_own(&mut self, now: Moment) {
        self.own = true;
        self.extend(now);
    }

    fn extend(&mut self, now: Moment) {
        let first = self.came.map_or(now, |(first, _)| first);
        self.came = Some((first, now));
    }

    /// The record was written at a revision: an earlier delete of it says nothing any more, but that
    /// it came with the others.
    pub(super) fn written(&mut self, key: &LeaseKey, revision: Revision) {
        if self
            .deletes
            .get(key)
            .is_some_and(|deleted| *deleted < revision)
        {
            self.deletes.remove(key);
        }
    }

    /// When the deletes are to be judged.
    pub(super) fn due(&self) -> Option<Moment> {
        let (first, last) = self.came?;
        Some((last + GAP).min(first + LONGEST))
    }

    /// Takes all of them out.
    pub(super) fn take(&mut self) -> Deletes {
        let Self {
            deletes, all, own, ..
        } = std::mem::take(self);
        Deletes {
            came: all.len(),
            own,
            keys: deletes.into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> LeaseKey {
        LeaseKey::new(name)
    }

    #[test]
    fn what_comes_close_together_is_one_burst_and_none_lasts_long() {
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
        assert_eq!(burst.take().keys.len(), 13);
        assert_eq!((burst.due(), burst.take()), (None, Deletes::default()));
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
        let deletes = burst.take();
        assert_eq!(deletes.keys, [(key("a"), Revision(5))]);
        assert_eq!((deletes.came, deletes.own), (2, true), "they came together");
    }
}
