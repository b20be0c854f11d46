//! Trees that have changed a lot are built anew: one that grew in the order of its keys is half empty,
//! because a full node is split into two halves of which one gets no more.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::take;

/// After so many changes at once a tree is built anew: that takes less time than they took.
pub(crate) const BULK: usize = 1_000;

/// The same map in the least room.
pub(crate) fn compact_map<K: Ord, V>(map: &mut BTreeMap<K, V>) {
    *map = take(map).into_iter().collect();
}

/// The same set in the least room.
pub(crate) fn compact_set<T: Ord>(set: &mut BTreeSet<T>) {
    *set = take(set).into_iter().collect();
}
