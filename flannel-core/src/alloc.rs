//! Which subnet a node gets: pure, total and stable.
//!
//! A pool is a row of **slots**, one per subnet that can be given out, counted from zero. An
//! [`Allocator`] knows which slots are free, whatever is taken: subnets of any length, twice,
//! nested, larger or smaller than a slot, partly outside. [`choose`] then picks for a node its
//! previous subnet, else the slot of its hash, else the next free one behind that. So a node that
//! lost all memory finds its subnet again, and many that join at once rarely want the same.

use std::collections::BTreeMap;

use crate::clock::stable_hash;
use crate::config::Pool;
use crate::family::{DualStack, Family};
use crate::manager;
use crate::node::NodeId;
use crate::subnet::Subnet;

/// No slot of a pool is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no free {family} subnet is left in the pool")]
pub struct PoolExhausted {
    /// The family whose pool is full.
    pub family: Family,
}

impl From<PoolExhausted> for manager::Error {
    fn from(PoolExhausted { family }: PoolExhausted) -> Self {
        Self::PoolExhausted { family }
    }
}

/// The free slots of one pool.
///
/// Every call takes O(log n) time, n being the number of subnets taken; the taking of a subnet
/// larger than a slot, and its release, as much again for each subnet taken inside it.
#[derive(Debug, Clone)]
pub struct Allocator {
    pool: Pool,
    first: Subnet,
    slots: u128,
    /// What is taken, and how many times. Subnets nest or are apart, they never cross: `release`
    /// rests on that.
    taken: BTreeMap<Subnet, usize>,
    /// How many entries of `taken` have each length: the lengths at which to look for a subnet
    /// that contains another.
    lengths: BTreeMap<u8, usize>,
    /// Runs of free slots, first to last, never adjacent.
    free: BTreeMap<u128, u128>,
    free_count: u128,
}

impl Allocator {
    /// An allocator with nothing taken; `None` where someone else assigns the subnets.
    pub fn new(pool: &Pool) -> Option<Self> {
        let (first, last) = pool.range()?;
        let shift = u32::from(first.family().bits() - first.len());
        // A pool is a part of its family's addresses, so the difference is below 2^128; only if
        // each slot were one address of all of them would the count not fit.
        let slots = last.first_bits().checked_sub(first.first_bits())?;
        let slots = slots.checked_shr(shift).unwrap_or(0).checked_add(1)?;
        Some(Self {
            pool: *pool,
            first,
            slots,
            taken: BTreeMap::new(),
            lengths: BTreeMap::new(),
            free: BTreeMap::from([(0, slots - 1)]),
            free_count: slots,
        })
    }

    /// The pool that is allocated from.
    pub const fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The number of slots.
    pub const fn slots(&self) -> u128 {
        self.slots
    }

    /// The number of slots that overlap nothing taken.
    pub const fn free_count(&self) -> u128 {
        self.free_count
    }

    /// The subnet of a slot, if there is such a slot.
    pub fn subnet(&self, slot: u128) -> Option<Subnet> {
        (slot < self.slots)
            .then(|| Subnet::from_bits(self.first.family(), self.slot_bits(slot), self.first.len()))
    }

    /// Marks a subnet of any length as taken, once more if it is already. One that no peer accepts
    /// ([`Pool::admits`]) is ignored, such as half of the network: no node can hold that, so a few
    /// such records must not leave nobody a subnet.
    pub fn take(&mut self, subnet: &Subnet) {
        let Some((from, to)) = self.slots_of(subnet) else {
            return;
        };
        if !self.pool.admits(subnet) {
            return;
        }
        let count = self.taken.entry(*subnet).or_insert(0);
        *count = count.saturating_add(1);
        if *count == 1 {
            *self.lengths.entry(subnet.len()).or_insert(0) += 1;
            self.occupy(from, to);
        }
    }

    /// Takes one mark back. Slots become free when nothing overlaps them any more. A subnet that
    /// is not marked is ignored.
    pub fn release(&mut self, subnet: &Subnet) {
        match self.taken.get_mut(subnet) {
            None => return,
            Some(count) if *count > 1 => {
                *count -= 1;
                return;
            }
            Some(_) => self.taken.remove(subnet),
        };
        if let Some(count) = self.lengths.get_mut(&subnet.len()) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&subnet.len());
            }
        }
        // What is smaller than a slot has kept the whole slot.
        let block = subnet.supernet(self.first.len()).unwrap_or(*subnet);
        let Some((from, to)) = self.slots_of(&block) else {
            return;
        };
        if self.is_contained(&block) {
            return;
        }
        // Everything else that overlaps the block now lies inside it, but may begin before the
        // first slot of the pool.
        let mut lowest = block;
        let mut slot = from;
        while slot <= to {
            let next = self.taken.range(lowest..).next();
            let next = next.and_then(|(subnet, _)| self.slots_of(subnet));
            let Some((start, end)) = next.filter(|(start, _)| *start <= to) else {
                self.vacate(slot, to);
                return;
            };
            if slot < start {
                self.vacate(slot, start - 1);
            }
            slot = end + 1;
            if slot <= to {
                lowest = self.lowest_at(slot);
            }
        }
    }

    /// Whether a subnet of any length overlaps nothing taken. Says so of every subnet that shares
    /// no address with the pool, as nothing is known of those.
    pub fn is_free(&self, subnet: &Subnet) -> bool {
        !self.is_contained(subnet)
            && self
                .taken
                .range(subnet..)
                .next()
                .is_none_or(|(next, _)| !subnet.contains(next))
    }

    /// The first free slot at or behind a slot, going on from the beginning when the end is
    /// reached; `None` if nothing is free.
    pub fn next_free_from(&self, slot: u128) -> Option<u128> {
        let slot = if slot < self.slots { slot } else { 0 };
        if let Some((_, end)) = self.free.range(..=slot).next_back()
            && *end >= slot
        {
            return Some(slot);
        }
        let mut behind = self.free.range(slot..);
        let (start, _) = behind.next().or_else(|| self.free.first_key_value())?;
        Some(*start)
    }

    /// The first and the last slot that a subnet shares an address with.
    fn slots_of(&self, subnet: &Subnet) -> Option<(u128, u128)> {
        let (_, last) = self.pool.range()?;
        if subnet.family() != self.first.family() {
            return None;
        }
        let low = subnet.first_bits().max(self.first.first_bits());
        let high = subnet.last_bits().min(last.last_bits());
        let slot = |bits: u128| (bits - self.first.first_bits()) >> self.shift();
        (low <= high).then(|| (slot(low), slot(high)))
    }

    /// The number of address bits inside a slot: 2 or more, as configs are checked for it.
    fn shift(&self) -> u32 {
        u32::from(self.first.family().bits() - self.first.len()).min(127)
    }

    /// The first address of a slot.
    fn slot_bits(&self, slot: u128) -> u128 {
        self.first.first_bits() + (slot << self.shift())
    }

    /// Whether the subnet, or one that contains it, is taken.
    fn is_contained(&self, subnet: &Subnet) -> bool {
        self.lengths.range(..=subnet.len()).any(|(len, _)| {
            subnet
                .supernet(*len)
                .is_some_and(|outer| self.taken.contains_key(&outer))
        })
    }

    /// The subnet that sorts before all others that begin at or behind a slot: the largest one
    /// that begins with it.
    fn lowest_at(&self, slot: u128) -> Subnet {
        let (family, bits) = (self.first.family(), self.slot_bits(slot));
        let len = u32::from(family.bits()).saturating_sub(bits.trailing_zeros());
        Subnet::from_bits(family, bits, u8::try_from(len).unwrap_or(family.bits()))
    }

    /// Removes the slots `from..=to` from the free runs; some may be gone already.
    fn occupy(&mut self, from: u128, to: u128) {
        while let Some((&start, &end)) = self.free.range(..=to).next_back() {
            if end < from {
                break;
            }
            self.free.remove(&start);
            self.free_count -= end.min(to) - start.max(from) + 1;
            if start < from {
                self.free.insert(start, from - 1);
            }
            if end > to {
                self.free.insert(to + 1, end);
            }
        }
    }

    /// Adds the slots `from..=to`, none of which is free, to the free runs.
    fn vacate(&mut self, from: u128, to: u128) {
        self.free_count += to - from + 1;
        let (mut start, mut end) = (from, to);
        if let Some((&before, &last)) = self.free.range(..from).next_back()
            && last + 1 == from
        {
            start = before;
        }
        if let Some(last) = self.free.remove(&(to + 1)) {
            end = last;
        }
        self.free.insert(start, end);
    }

    /// The subnet for a node out of this pool alone.
    fn choose(&self, node: &NodeId, previous: Option<&Subnet>) -> Option<Subnet> {
        previous
            .filter(|subnet| self.pool.fits(subnet) && self.is_free(subnet))
            .copied()
            .or_else(|| {
                let home = u128::from(home_hash(node, self.first.family())) % self.slots;
                self.subnet(self.next_free_from(home)?)
            })
    }
}

/// What decides where in a pool a node looks first. The families differ, so that two nodes that
/// meet in one pool do not have to meet in the other.
fn home_hash(node: &NodeId, family: Family) -> u64 {
    let mut text = node.as_str().as_bytes().to_vec();
    text.extend([0, family.bits()]);
    stable_hash(&text)
}

/// The subnets for a node: one out of each pool, or none at all.
///
/// In each family: the previous subnet if the pool still has it and it is free, else the slot of
/// the node's hash, else the first free slot behind that, past the end of the pool from its
/// beginning. The same input gives the same answer on every machine. What the node itself still
/// holds has to be released first, or it counts as taken.
///
/// # Errors
/// [`PoolExhausted`] names the first family of which no slot is free.
pub fn choose(
    allocators: &DualStack<&Allocator>,
    node: &NodeId,
    previous: &DualStack<Subnet>,
) -> Result<DualStack<Subnet>, PoolExhausted> {
    let mut chosen = DualStack::default();
    for (family, allocator) in allocators.iter() {
        let subnet = allocator
            .choose(node, previous.get(family))
            .ok_or(PoolExhausted { family })?;
        chosen.set(family, Some(subnet));
    }
    Ok(chosen)
}

/// The same for a store that keeps no [`Allocator`]s: `taken` are the subnets of all records, which
/// are gone through at each call.
///
/// # Errors
/// As [`choose`]. A pool whose subnets are assigned by someone else counts as exhausted.
pub fn choose_among(
    pools: &DualStack<Pool>,
    taken: impl IntoIterator<Item = Subnet>,
    node: &NodeId,
    previous: &DualStack<Subnet>,
) -> Result<DualStack<Subnet>, PoolExhausted> {
    let mut allocators = DualStack::default();
    for (family, pool) in pools.iter() {
        let allocator = Allocator::new(pool).ok_or(PoolExhausted { family })?;
        allocators.set(family, Some(allocator));
    }
    for subnet in taken {
        if let Some(allocator) = allocators.get_mut(subnet.family()) {
            allocator.take(&subnet);
        }
    }
    let allocators = DualStack::new(allocators.v4.as_ref(), allocators.v6.as_ref());
    choose(&allocators, node, previous)
}
