//! Who gets what several claim: settlement by seniority, kept up to date change by change.
//!
//! Claimants are taken in the order of their age. A claimant is *accepted* exactly when none of
//! its claims conflicts with a claim of an accepted older one; otherwise it loses whole. So if A
//! beats B, and B alone stands in the way of C, then C is accepted. The outcome depends on the
//! claims only, never on the order in which they came: every node settles alike.

use std::collections::{BTreeMap, BTreeSet, btree_set};
use std::fmt::Debug;

use crate::compact::{BULK, compact_map, compact_set};
use crate::family::Family;
use crate::lease::{LeaseKey, Revision, Seniority};
use crate::object::ObjectKey;
use crate::subnet::Subnet;

/// One family of one record: wins or loses as a whole. Older ones are smaller.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claimant {
    /// The record may be gone: whatever is there for certain comes before it.
    pub(crate) doubted: bool,
    /// Age and key of the record.
    pub(crate) seniority: Seniority,
    /// Which family of it.
    pub(crate) family: Family,
}

impl Claimant {
    /// Whether the two may be in conflict: both families of one record never are.
    fn rivals(&self, other: &Self) -> bool {
        self.seniority.key != other.seniority.key
    }
}

/// A thing that can be claimed. In its order, what lies inside of a claim stands directly behind
/// it.
pub(crate) trait Claim: Clone + Debug + Ord {
    /// Claims of one shape conflict only when they are equal.
    type Shape: Clone + Debug + Ord;

    /// The shape of this claim.
    fn shape(&self) -> Self::Shape;

    /// The claim of another, wider shape that holds this one, if the shape has one.
    fn widened(&self, shape: &Self::Shape) -> Option<Self>;

    /// Whether `other` is this claim or lies inside of it.
    fn holds(&self, other: &Self) -> bool;
}

/// Keys of kernel objects conflict when they are equal.
impl Claim for ObjectKey {
    type Shape = ();

    fn shape(&self) {}

    fn widened(&self, (): &()) -> Option<Self> {
        None
    }

    fn holds(&self, other: &Self) -> bool {
        self == other
    }
}

/// Subnets conflict when they overlap, that is when one contains the other.
impl Claim for Subnet {
    type Shape = (Family, u8);

    fn shape(&self) -> (Family, u8) {
        (self.family(), self.len())
    }

    fn widened(&self, &(family, len): &(Family, u8)) -> Option<Self> {
        if family == self.family() && len < self.len() {
            self.supernet(len)
        } else {
            None
        }
    }

    fn holds(&self, other: &Self) -> bool {
        self.contains(other)
    }
}

/// Claims with their claimants, to look conflicts up in.
#[derive(Debug, Clone)]
struct Index<C: Claim> {
    entries: BTreeSet<(C, Claimant)>,
    /// How many entries there are of each shape: wider claims are looked up only where there are
    /// any.
    shapes: BTreeMap<C::Shape, usize>,
    /// The least claimant, where the entries of a claim begin.
    first: Claimant,
}

impl<C: Claim> Default for Index<C> {
    fn default() -> Self {
        Self {
            entries: BTreeSet::new(),
            shapes: BTreeMap::new(),
            first: Claimant {
                doubted: false,
                seniority: Seniority {
                    created: Revision(0),
                    key: LeaseKey::new(""),
                },
                family: Family::V4,
            },
        }
    }
}

impl<C: Claim> Index<C> {
    fn insert(&mut self, claims: &[C], who: &Claimant) {
        for claim in claims {
            if self.entries.insert((claim.clone(), who.clone())) {
                *self.shapes.entry(claim.shape()).or_default() += 1;
            }
        }
    }

    fn remove(&mut self, claims: &[C], who: &Claimant) {
        for claim in claims {
            if self.entries.remove(&(claim.clone(), who.clone()))
                && let Some(count) = self.shapes.get_mut(&claim.shape())
            {
                *count -= 1;
                if *count == 0 {
                    self.shapes.remove(&claim.shape());
                }
            }
        }
    }

    /// The entries from the first of a claim on.
    fn from(&self, claim: C) -> btree_set::Range<'_, (C, Claimant)> {
        self.entries.range((claim, self.first.clone())..)
    }

    /// Every entry whose claim conflicts with this one, in an order that depends on the entries
    /// only.
    fn conflicting(&self, claim: &C) -> impl Iterator<Item = &(C, Claimant)> {
        let around = self
            .shapes
            .keys()
            .filter_map(|shape| claim.widened(shape))
            .flat_map(|wide| {
                self.from(wide.clone())
                    .take_while(move |(other, _)| *other == wide)
            });
        let inside = self
            .from(claim.clone())
            .take_while(|(other, _)| claim.holds(other));
        around.chain(inside)
    }

    /// Those with a claim that conflicts with one of these and who are younger than `who`.
    fn younger_rivals(&self, claims: &[C], who: &Claimant, into: &mut BTreeSet<Claimant>) {
        for claim in claims {
            into.extend(
                self.conflicting(claim)
                    .map(|(_, other)| other)
                    .filter(|other| *other > who && other.rivals(who))
                    .cloned(),
            );
        }
    }
}

/// To whom a claimant lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lost<C> {
    /// The claim that was taken.
    pub(crate) claim: C,
    /// The older claim that conflicts with it.
    pub(crate) to: C,
    /// Whose that is.
    pub(crate) by: Claimant,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing<C> {
    /// Only while an update is under way.
    Undecided,
    Accepted,
    /// Rare, and large.
    Lost(Box<Lost<C>>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry<C> {
    /// Sorted, without repeats, not empty.
    claims: Vec<C>,
    standing: Standing<C>,
}

/// All claimants with their claims and who of them is accepted.
#[derive(Debug, Clone)]
pub(crate) struct Settlement<C: Claim> {
    claimants: BTreeMap<Claimant, Entry<C>>,
    /// The claims of the accepted. No two of rivals conflict.
    accepted: Index<C>,
    /// The claims of all others.
    waiting: Index<C>,
}

impl<C: Claim> Default for Settlement<C> {
    fn default() -> Self {
        Self {
            claimants: BTreeMap::new(),
            accepted: Index::default(),
            waiting: Index::default(),
        }
    }
}

impl<C: Claim> Settlement<C> {
    /// Replaces the claims of some claimants; none at all withdraws the claimant. Returns everyone
    /// whose outcome may differ from before, the given ones among them.
    pub(crate) fn update(
        &mut self,
        changes: impl IntoIterator<Item = (Claimant, Vec<C>)>,
    ) -> BTreeSet<Claimant> {
        let mut touched = BTreeSet::new();
        let mut work = BTreeSet::new();
        let mut changed = 0;
        for (who, mut claims) in changes {
            changed += 1;
            self.withdraw(&who, &mut work);
            claims.sort_unstable();
            claims.dedup();
            if !claims.is_empty() {
                self.waiting.insert(&claims, &who);
                let standing = Standing::Undecided;
                self.claimants
                    .insert(who.clone(), Entry { claims, standing });
                work.insert(who.clone());
            }
            touched.insert(who);
        }
        // The oldest first, and deciding one adds only younger ones: whoever is decided here finds
        // all older ones decided for good.
        while let Some(who) = work.pop_first() {
            self.decide(&who, &mut work);
            touched.insert(who);
        }
        if changed > BULK {
            compact_map(&mut self.claimants);
            compact_set(&mut self.accepted.entries);
            compact_set(&mut self.waiting.entries);
        }
        touched
    }

    /// Takes a claimant out; those who may have lost to it are to be decided again.
    fn withdraw(&mut self, who: &Claimant, work: &mut BTreeSet<Claimant>) {
        let Some(entry) = self.claimants.remove(who) else {
            return;
        };
        if entry.standing == Standing::Accepted {
            self.accepted.remove(&entry.claims, who);
            self.waiting.younger_rivals(&entry.claims, who, work);
        } else {
            self.waiting.remove(&entry.claims, who);
        }
    }

    /// Decides about one claimant; the younger ones to whom that matters are to be decided next.
    fn decide(&mut self, who: &Claimant, work: &mut BTreeSet<Claimant>) {
        let Some(entry) = self.claimants.get_mut(who) else {
            return;
        };
        let lost = entry.claims.iter().find_map(|claim| {
            let (to, by) = self
                .accepted
                .conflicting(claim)
                .find(|(_, other)| other < who && other.rivals(who))?;
            Some(Box::new(Lost {
                claim: claim.clone(),
                to: to.clone(),
                by: by.clone(),
            }))
        });
        let was_accepted = entry.standing == Standing::Accepted;
        let is_accepted = lost.is_none();
        entry.standing = lost.map_or(Standing::Accepted, Standing::Lost);
        if is_accepted && !was_accepted {
            self.waiting.remove(&entry.claims, who);
            self.accepted.younger_rivals(&entry.claims, who, work);
            self.waiting.younger_rivals(&entry.claims, who, work);
            self.accepted.insert(&entry.claims, who);
        } else if was_accepted && !is_accepted {
            self.accepted.remove(&entry.claims, who);
            self.waiting.younger_rivals(&entry.claims, who, work);
            self.waiting.insert(&entry.claims, who);
        }
    }

    /// The claims of a claimant, sorted; empty if there are none.
    pub(crate) fn claims(&self, who: &Claimant) -> &[C] {
        self.claimants
            .get(who)
            .map_or(&[], |entry| entry.claims.as_slice())
    }

    /// To whom a claimant lost; `None` if it is accepted or claims nothing.
    pub(crate) fn lost(&self, who: &Claimant) -> Option<&Lost<C>> {
        match &self.claimants.get(who)?.standing {
            Standing::Lost(lost) => Some(lost),
            Standing::Accepted | Standing::Undecided => None,
        }
    }

    /// The accepted claimant of exactly this claim; the older one if both families of a record
    /// make it.
    pub(crate) fn holder(&self, claim: &C) -> Option<&Claimant> {
        self.accepted
            .from(claim.clone())
            .next()
            .filter(|(other, _)| other == claim)
            .map(|(_, who)| who)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::*;
    use crate::object::MacAddr;

    fn claimant() -> impl Strategy<Value = Claimant> {
        (
            0..6_u64,
            0..8_u8,
            prop_oneof![Just(Family::V4), Just(Family::V6)],
        )
            .prop_map(|(created, key, family)| Claimant {
                doubted: key % 4 == 3,
                seniority: Seniority {
                    created: Revision(created),
                    key: LeaseKey::new(format!("k{key}")),
                },
                family,
            })
    }

    /// Few addresses and many lengths, so that nesting is common.
    fn subnet() -> impl Strategy<Value = Subnet> {
        (any::<bool>(), 0..64_u128, 0..7_u8).prop_map(|(v6, slot, wider)| {
            let family = if v6 { Family::V6 } else { Family::V4 };
            let bits = u32::from(family.bits());
            Subnet::from_bits(family, slot << (bits - 6), 6 - wider)
        })
    }

    fn object_key() -> impl Strategy<Value = ObjectKey> {
        (0..6_u64).prop_map(|n| match n {
            0..3 => ObjectKey::Nexthop(u32::try_from(n).unwrap_or_default()),
            _ => ObjectKey::Fdb {
                dev: crate::object::IfName::new("x").expect("a valid name"),
                mac: MacAddr::local(n << 32),
            },
        })
    }

    type Changes<C> = Vec<Vec<(Claimant, Vec<C>)>>;

    fn changes<C: Debug>(claim: impl Strategy<Value = C>) -> impl Strategy<Value = Changes<C>> {
        vec(vec((claimant(), vec(claim, 0..4)), 1..4), 1..40)
    }

    /// The definition, word for word.
    fn greedy<C: Claim>(claims: &BTreeMap<Claimant, Vec<C>>) -> BTreeSet<Claimant> {
        let conflict =
            |a: &[C], b: &[C]| a.iter().any(|a| b.iter().any(|b| a.holds(b) || b.holds(a)));
        let mut accepted: BTreeSet<Claimant> = BTreeSet::new();
        for (who, wants) in claims {
            let free = accepted
                .iter()
                .all(|older| !older.rivals(who) || !conflict(wants, &claims[older]));
            if free && !wants.is_empty() {
                accepted.insert(who.clone());
            }
        }
        accepted
    }

    fn check<C: Claim>(changes: &Changes<C>) -> Result<(), TestCaseError> {
        let mut settlement = Settlement::default();
        let mut claims: BTreeMap<Claimant, Vec<C>> = BTreeMap::new();
        for batch in changes {
            let before = settlement.clone();
            let touched = settlement.update(batch.iter().cloned());
            claims.extend(batch.iter().cloned());

            let mut scratch = Settlement::default();
            scratch.update(claims.iter().rev().map(|(who, c)| (who.clone(), c.clone())));
            prop_assert_eq!(&settlement.claimants, &scratch.claimants);
            prop_assert_eq!(&settlement.accepted.entries, &scratch.accepted.entries);
            prop_assert_eq!(&settlement.accepted.shapes, &scratch.accepted.shapes);
            prop_assert_eq!(&settlement.waiting.entries, &scratch.waiting.entries);
            prop_assert_eq!(&settlement.waiting.shapes, &scratch.waiting.shapes);

            let accepted: BTreeSet<Claimant> = settlement
                .claimants
                .iter()
                .filter(|(_, entry)| entry.standing == Standing::Accepted)
                .map(|(who, _)| who.clone())
                .collect();
            prop_assert_eq!(&accepted, &greedy(&claims));

            for who in claims.keys().filter(|who| !touched.contains(who)) {
                prop_assert_eq!(before.claimants.get(who), settlement.claimants.get(who));
            }
            for (who, entry) in &settlement.claimants {
                if let Standing::Lost(lost) = &entry.standing {
                    prop_assert!(lost.by < *who && accepted.contains(&lost.by));
                    prop_assert!(entry.claims.contains(&lost.claim));
                    prop_assert!(settlement.claims(&lost.by).contains(&lost.to));
                    prop_assert!(lost.claim.holds(&lost.to) || lost.to.holds(&lost.claim));
                }
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn settling_subnets_step_by_step_equals_settling_them_at_once(c in changes(subnet())) {
            check(&c)?;
        }

        #[test]
        fn settling_keys_step_by_step_equals_settling_them_at_once(c in changes(object_key())) {
            check(&c)?;
        }

        #[test]
        fn conflicts_are_found_whatever_the_nesting(
            all in btree_map(subnet(), claimant(), 0..40),
            asked in subnet(),
        ) {
            let mut index = Index::default();
            for (claim, who) in &all {
                index.insert(std::slice::from_ref(claim), who);
            }
            let found: BTreeSet<Subnet> = index.conflicting(&asked).map(|(s, _)| *s).collect();
            let all: BTreeSet<Subnet> =
                all.into_keys().filter(|other| other.overlaps(&asked)).collect();
            prop_assert_eq!(found, all);
        }
    }

    #[test]
    fn who_loses_stands_in_nobodys_way() {
        let who = |n: u64| Claimant {
            doubted: false,
            seniority: Seniority {
                created: Revision(n),
                key: LeaseKey::new(format!("{n}")),
            },
            family: Family::V4,
        };
        let key = ObjectKey::Nexthop;
        let mut settlement = Settlement::default();
        settlement.update([(who(3), vec![key(2)]), (who(2), vec![key(1), key(2)])]);
        assert_eq!(settlement.lost(&who(3)).map(|lost| &lost.by), Some(&who(2)));
        let touched = settlement.update([(who(1), vec![key(1)])]);
        assert_eq!(touched.len(), 3);
        assert_eq!(settlement.lost(&who(2)).map(|lost| &lost.by), Some(&who(1)));
        assert_eq!(settlement.lost(&who(3)), None);
        assert_eq!(settlement.holder(&key(2)), Some(&who(3)));
    }
}
