//! Devices come first in a plan: what becomes of a device decides what becomes of all on it.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};

use crate::family::Family;
use crate::kernel::Op;
use crate::object::{IfName, Link, LinkKind, Object, ObjectKey, Route, RouteTarget, Vxlan};
use crate::reconcile::desired::Wanted;
use crate::reconcile::ownership::Owner;

use super::difference::{Difference, difference, vxlan_family};
use super::{Pair, Planner, Step, Why};

/// What becomes of the devices.
#[derive(Default)]
pub(super) struct Links<'a> {
    /// Removed before anything else is made.
    gone: BTreeSet<IfName>,
    /// Made.
    made: BTreeSet<IfName>,
    /// Given another hardware address: their neighbours are gone.
    flushed: BTreeSet<IfName>,
    /// Set down: of what is on them forwarding entries and IPv4 addresses stay.
    downed: BTreeSet<IfName>,
    /// Made when first needed.
    index: OnceCell<Index<'a>>,
}

/// The devices that are there, by what may keep others from being made or take them along.
#[derive(Default)]
struct Index<'a> {
    by_vni: BTreeMap<(u32, u16, Family), Vec<&'a Object>>,
    by_underlay: BTreeMap<IfName, Vec<&'a Object>>,
}

impl Links<'_> {
    /// Whether all devices stay what they are, with all that is on them.
    pub(super) fn are_settled(&self) -> bool {
        self.gone.is_empty()
            && self.made.is_empty()
            && self.flushed.is_empty()
            && self.downed.is_empty()
    }

    pub(super) fn is_made(&self, dev: IfName) -> bool {
        self.made.contains(&dev)
    }

    fn is_settled(&self, dev: IfName) -> bool {
        ![&self.gone, &self.made, &self.flushed, &self.downed]
            .iter()
            .any(|devs| devs.contains(&dev))
    }
}

/// What is to be done about a device that is wanted.
enum Verdict<'a> {
    Right,
    Change(Difference),
    /// Make it, having removed these first.
    Make {
        clear: Vec<&'a Object>,
        why: Why,
    },
    /// Somebody else's object is in the place.
    Blocked(&'a Object),
    /// What it is bound to is held back.
    Held,
}

impl<'a> Planner<'a> {
    /// Decides on the wanted devices among some keys.
    pub(super) fn plan_links(&mut self, about: &dyn Fn(&ObjectKey) -> bool) {
        let mut verdicts = Vec::new();
        for (key, wanted, link) in self.wanted_links(about) {
            let verdict = self.verdict(wanted, link);
            if let Verdict::Blocked(_) | Verdict::Held = verdict {
                self.held.insert(key);
            }
            verdicts.push((key, wanted, link, verdict));
        }
        for (.., verdict) in &verdicts {
            if let Verdict::Make { clear, .. } = verdict {
                for dev in clear.iter().filter_map(|object| object.dev()) {
                    let falling = self.falls_with(dev);
                    self.links.gone.extend(falling);
                }
            }
        }
        let mut deleted = BTreeSet::new();
        for (key, wanted, link, verdict) in verdicts {
            let is_gone = self.links.gone.contains(&link.name);
            match verdict {
                Verdict::Right | Verdict::Change(_) if is_gone => {
                    self.make_link(wanted, link, Why::Missing);
                }
                Verdict::Right => {}
                Verdict::Change(difference) => self.change_link(key, wanted, link, difference),
                Verdict::Make { clear, why } => {
                    for object in clear {
                        self.clear(key, link.name, &why, object, &mut deleted);
                    }
                    self.make_link(wanted, link, why);
                }
                Verdict::Blocked(found) => self.block(key, wanted, found),
                Verdict::Held => self.hold(key, self.observed.objects.get(key)),
            }
        }
    }

    /// The wanted devices among some keys, each after the one that it is bound to.
    fn wanted_links(
        &self,
        about: &dyn Fn(&ObjectKey) -> bool,
    ) -> Vec<(&'a ObjectKey, &'a Wanted, &'a Link)> {
        let mut ordered = Vec::new();
        let mut seen = BTreeSet::new();
        for key in self.desired.objects.keys() {
            if !matches!(key, ObjectKey::Link(_)) {
                break;
            }
            let mut chain = Vec::new();
            let mut next = Some(key.clone());
            while let Some(key) = next.take() {
                if let Some((key, wanted)) = self.desired.objects.get_key_value(&key)
                    && let Object::Link(link) = &wanted.object
                    && ObjectKey::Link(link.name) == *key
                    && about(key)
                    && seen.insert(link.name)
                {
                    chain.push((key, wanted, link));
                    next = underlay(link).map(ObjectKey::Link);
                }
            }
            ordered.extend(chain.into_iter().rev());
        }
        ordered
    }

    fn verdict(&self, wanted: &'a Wanted, link: &'a Link) -> Verdict<'a> {
        if self.needs_held(&wanted.object) {
            return Verdict::Held;
        }
        let mut clear = Vec::new();
        let mut why = Why::Missing;
        if let Some(found) = self.observed.objects.get(&ObjectKey::Link(link.name)) {
            if found.key() != ObjectKey::Link(link.name) {
                return Verdict::Held;
            }
            let Some(difference) = difference(&wanted.object, found) else {
                return Verdict::Right;
            };
            if self.ownership.owner(found, self.observed) == Owner::Foreign {
                return Verdict::Blocked(found);
            }
            if difference.in_place {
                return Verdict::Change(difference);
            }
            if let Some(bound) = self.foreign_bound_to(link.name) {
                return Verdict::Blocked(bound);
            }
            clear.push(found);
            why = Why::Rebuild {
                field: difference.field,
            };
        }
        for rival in self.rivals(link) {
            if self.ownership.owner(rival, self.observed) == Owner::Foreign || self.stays(rival) {
                return Verdict::Blocked(rival);
            }
            if let Some(bound) = rival.dev().and_then(|dev| self.foreign_bound_to(dev)) {
                return Verdict::Blocked(bound);
            }
            clear.push(rival);
        }
        Verdict::Make { clear, why }
    }

    /// The devices that are there under other names and that the kernel would not have beside this
    /// one: VXLAN devices of the same VNI, port and family.
    fn rivals(&self, link: &Link) -> Vec<&'a Object> {
        let LinkKind::Vxlan(vxlan) = &link.kind else {
            return Vec::new();
        };
        let rivals = self.index().by_vni.get(&vni_key(vxlan));
        rivals
            .into_iter()
            .flatten()
            .copied()
            .filter(|rival| rival.dev() != Some(link.name))
            .collect()
    }

    /// Whether a device is wanted just as it is, or so that it can become it in place.
    fn stays(&self, found: &Object) -> bool {
        self.desired
            .objects
            .get(&found.key())
            .is_some_and(|wanted| {
                difference(&wanted.object, found).is_none_or(|difference| difference.in_place)
            })
    }

    /// A foreign device that would go with this one.
    pub(super) fn foreign_bound_to(&self, dev: IfName) -> Option<&'a Object> {
        self.falls_with(dev)
            .into_iter()
            .filter(|bound| *bound != dev)
            .filter_map(|bound| self.observed.objects.get(&ObjectKey::Link(bound)))
            .find(|bound| self.ownership.owner(bound, self.observed) == Owner::Foreign)
    }

    /// A device with those that the kernel removes with it: VXLAN devices bound to it.
    pub(super) fn falls_with(&self, dev: IfName) -> BTreeSet<IfName> {
        let mut falling = BTreeSet::from([dev]);
        let mut open = vec![dev];
        while let Some(dev) = open.pop() {
            let bound = self.index().by_underlay.get(&dev);
            for dev in bound.into_iter().flatten().filter_map(|b| b.dev()) {
                if falling.insert(dev) {
                    open.push(dev);
                }
            }
        }
        falling
    }

    fn index(&self) -> &Index<'a> {
        self.links.index.get_or_init(|| {
            let mut index = Index::default();
            for (key, object) in &self.observed.objects {
                let ObjectKey::Link(name) = key else { break };
                let Object::Link(link) = object else { continue };
                let LinkKind::Vxlan(vxlan) = &link.kind else {
                    continue;
                };
                if link.name != *name {
                    continue;
                }
                index.by_vni.entry(vni_key(vxlan)).or_default().push(object);
                if let Some(dev) = vxlan.underlay {
                    index.by_underlay.entry(dev).or_default().push(object);
                }
            }
            index
        })
    }

    fn change_link(
        &mut self,
        key: &ObjectKey,
        wanted: &Wanted,
        link: &Link,
        Difference { field, .. }: Difference,
    ) {
        if let Some(Object::Link(found)) = self.observed.objects.get(key) {
            if link.mac.is_some() && link.mac != found.mac {
                self.links.flushed.insert(link.name);
            }
            if found.up && !link.up {
                self.links.downed.insert(link.name);
            }
        }
        let disrupts = if self.links.is_settled(link.name) {
            Vec::new()
        } else {
            let here = BTreeSet::from([link.name]);
            let mut keys = self.keys_on(&here, |_| true);
            keys.retain(|key| {
                self.observed
                    .objects
                    .get(key)
                    .is_some_and(|object| self.is_lost(object))
            });
            keys
        };
        self.steps.push(Step {
            op: Op::Change(wanted.object.clone()),
            why: Why::Drifted { field },
            peer: wanted.peer.clone(),
            disrupts,
        });
    }

    fn make_link(&mut self, wanted: &Wanted, link: &Link, why: Why) {
        self.links.made.insert(link.name);
        self.step(Op::Create(wanted.object.clone()), why, wanted.peer.clone());
    }

    /// Removes a device directly before the one that cannot be made beside it.
    fn clear(
        &mut self,
        of: &ObjectKey,
        name: IfName,
        why: &Why,
        object: &Object,
        deleted: &mut BTreeSet<IfName>,
    ) {
        let Some(dev) = object.dev().filter(|dev| !deleted.contains(dev)) else {
            return;
        };
        let why = if dev == name {
            why.clone()
        } else {
            Why::InTheWay { of: of.clone() }
        };
        let step = self.removal(object, dev, why, |_| false);
        self.steps.push(step);
        deleted.extend(self.falls_with(dev));
    }

    /// The step that removes a device with all on it, but for what has moved elsewhere before.
    pub(super) fn removal(
        &self,
        object: &Object,
        dev: IfName,
        why: Why,
        has_moved: impl Fn(&ObjectKey) -> bool,
    ) -> Step {
        let goes = |key: &ObjectKey| *key != ObjectKey::Link(dev) && !has_moved(key);
        Step {
            op: Op::Delete(object.clone()),
            why,
            peer: None,
            disrupts: self.keys_on(&self.falls_with(dev), goes),
        }
    }

    /// The keys of what is on devices and fits; settings are not counted.
    pub(super) fn keys_on(
        &self,
        devs: &BTreeSet<IfName>,
        fits: impl Fn(&ObjectKey) -> bool,
    ) -> Vec<ObjectKey> {
        self.observed
            .objects
            .iter()
            .filter(|(key, object)| {
                !matches!(object, Object::Sysctl(_) | Object::Offload(_))
                    && self.dev_of(object).is_some_and(|dev| devs.contains(&dev))
                    && fits(key)
            })
            .map(|(key, _)| key.clone())
            .collect()
    }

    /// Whether an object that is there will be gone once the devices are as they should be.
    pub(super) fn is_lost(&self, object: &Object) -> bool {
        let Links {
            gone,
            flushed,
            downed,
            ..
        } = &self.links;
        if gone.is_empty() && flushed.is_empty() && downed.is_empty() {
            return false;
        }
        let Some(dev) = self.dev_of(object) else {
            return false;
        };
        gone.contains(&dev)
            || match object {
                Object::Address(address) => downed.contains(&dev) && address.ip.is_ipv6(),
                Object::Neighbour(_) => flushed.contains(&dev) || downed.contains(&dev),
                Object::Nexthop(_) | Object::Route(_) => downed.contains(&dev),
                _ => false,
            }
    }

    /// Whether a key is on a device that does not stay what it is.
    pub(super) fn is_unsettled(&self, (_, wanted, found): Pair<'a>) -> bool {
        let wanted = wanted.and_then(|wanted| match &wanted.object {
            Object::Route(Route {
                target: RouteTarget::Nexthop(id),
                ..
            }) => self
                .desired
                .objects
                .get(&ObjectKey::Nexthop(*id))?
                .object
                .dev(),
            object => object.dev(),
        });
        let found = found.and_then(|found| self.dev_of(found));
        [wanted, found]
            .into_iter()
            .flatten()
            .any(|dev| !self.links.is_settled(dev))
    }
}

const fn underlay(link: &Link) -> Option<IfName> {
    match &link.kind {
        LinkKind::Vxlan(vxlan) => vxlan.underlay,
        _ => None,
    }
}

const fn vni_key(vxlan: &Vxlan) -> (u32, u16, Family) {
    (vxlan.vni, vxlan.port, vxlan_family(vxlan))
}
