//! [`Tombstones`]: which records were deleted, and when.

use std::collections::{BTreeMap, BTreeSet};

use crate::lease::{LeaseKey, Revision};

/// Deletes that are remembered between two snapshots; beyond it, the oldest are forgotten.
const MAX_TOMBSTONES: usize = 65_536;

/// Records deleted since the last snapshot, so that an old write does not bring them back.
#[derive(Debug, Clone, Default)]
pub(super) struct Tombstones {
    by_key: BTreeMap<LeaseKey, Revision>,
    by_age: BTreeSet<(Revision, LeaseKey)>,
}

impl Tombstones {
    pub(super) fn get(&self, key: &LeaseKey) -> Option<Revision> {
        self.by_key.get(key).copied()
    }

    pub(super) fn insert(&mut self, key: LeaseKey, revision: Revision) {
        self.remove(&key);
        self.by_key.insert(key.clone(), revision);
        self.by_age.insert((revision, key));
        if self.by_key.len() > MAX_TOMBSTONES
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.by_key.remove(&oldest);
        }
    }

    pub(super) fn remove(&mut self, key: &LeaseKey) {
        if let Some(revision) = self.by_key.remove(key) {
            self.by_age.remove(&(revision, key.clone()));
        }
    }

    pub(super) fn clear(&mut self) {
        self.by_key.clear();
        self.by_age.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_deletes_forgets_the_oldest() {
        let mut tombstones = Tombstones::default();
        let key = |n: usize| LeaseKey::new(format!("{n}"));
        for n in 0..=MAX_TOMBSTONES {
            tombstones.insert(key(n), Revision(n as u64 / 2));
            tombstones.insert(key(n), Revision(n as u64));
        }
        assert_eq!(tombstones.by_key.len(), MAX_TOMBSTONES);
        assert_eq!(tombstones.by_age.len(), MAX_TOMBSTONES);
        assert_eq!(tombstones.get(&key(0)), None);
        assert_eq!(tombstones.get(&key(1)), Some(Revision(1)));
    }
}
