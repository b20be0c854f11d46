//! [`plan`]: the pure way from what the kernel has to what it should have.
//!
//! The order of a plan is its meaning. Deletes that the kernel forces stand directly before the
//! create that needs them; then come creates and changes in the order of keys, so that an object
//! is made after what it needs; last come the deletes of what is no longer wanted, in reverse. A
//! path is therefore whole before it is used, and used by nobody before it is taken down.
//!
//! What the kernel drops by itself is planned for: what is on a device that is removed, the
//! neighbours of a device that gets another hardware address, routes and the like of a device that
//! is set down. These count as gone, so that what is wanted of them is made again in the same plan.

mod difference;
mod links;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::kernel::{Observed, Op};
use crate::lease::LeaseKey;
use crate::object::{
    Address, IfName, Link, MAIN_TABLE, Nexthop, Object, ObjectKey, Route, RouteTarget, TunnelPeer,
};
use crate::subnet::Subnet;

use super::desired::{Desired, Wanted};
use super::ownership::{Owner, Ownership};

pub use difference::{Difference, difference};
use links::Links;

/// Why a step is taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Why {
    /// It is wanted and not there.
    Missing,
    /// It is there and differs.
    Drifted {
        /// The first field that differs, with what it is and what it should be.
        field: String,
    },
    /// It is ours and no longer wanted.
    Orphan,
    /// It differs in what the kernel cannot change: it is removed and made anew.
    Rebuild {
        /// The field, with what it is and what it should be.
        field: String,
    },
    /// It is ours or Go flannel's and keeps the kernel from making what is wanted.
    InTheWay {
        /// What it keeps from being made.
        of: ObjectKey,
    },
    /// It is made and directly removed again, so that the kernel takes what is wanted.
    Stopgap {
        /// What could not be made without it.
        of: ObjectKey,
    },
}

/// One change with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The change.
    pub op: Op,
    /// Why it is made.
    pub why: Why,
    /// The peer that it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<LeaseKey>,
    /// What stops working between this step and those that follow: keys of objects that the kernel
    /// drops with it. Empty for all but devices that are removed, set down or given another
    /// hardware address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disrupts: Vec<ObjectKey>,
}

/// A wanted object whose place is taken by somebody else's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocked {
    /// What is wanted.
    pub wanted: Object,
    /// What is there.
    pub found: Object,
    /// The peer it would serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<LeaseKey>,
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wanted, found, .. } = self;
        write!(f, "{wanted} is wanted, but {found} is there and not ours")
    }
}

/// What to do, in order, and what cannot be done.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Plan {
    /// The changes in their order.
    pub steps: Vec<Step>,
    /// What is wanted and blocked by foreign objects. Nothing that needs it is in the steps.
    pub foreign: Vec<Blocked>,
}

/// What to do so that the kernel has what it should have.
///
/// Pure and total: any input gives a plan, the same input the same plan. Objects that are right
/// already are left alone, whoever made them; that is adoption. Nothing foreign is removed or
/// altered; but what others put on a device or nexthop object of ours goes with it.
///
/// One thing is left to the next round: a device that loses its last IPv4 address, because none is
/// wanted any more, loses its IPv4 routes and neighbours, and they are missing then.
pub fn plan(observed: &Observed, desired: &Desired, ownership: &Ownership) -> Plan {
    Planner::new(observed, desired, ownership).run(None)
}

/// The part of [`plan`] that concerns some keys: cheap when they are few.
///
/// Equal to the whole plan if nothing else differs; `keys` must therefore hold all that is not
/// right, also what was blocked before. Where something else than a route is blocked, what is there
/// may serve any that needs that: then only the whole plan tells what may go. What the keys need and
/// what they force is planned with them: when a device is made or removed, all that is on it.
pub fn plan_keys(
    observed: &Observed,
    desired: &Desired,
    ownership: &Ownership,
    keys: &BTreeSet<ObjectKey>,
) -> Plan {
    Planner::new(observed, desired, ownership).run(Some(keys))
}

/// How to remove everything that bears our mark, and nothing else: what Go flannel left counts as
/// foreign unless it has been taken over.
pub fn teardown(observed: &Observed, ownership: &Ownership) -> Plan {
    let ours = Ownership {
        adopt_flannel: false,
        ..ownership.clone()
    };
    plan(observed, &Desired::default(), &ours)
}

/// A key that is wanted, there, or both.
type Pair<'a> = (&'a ObjectKey, Option<&'a Wanted>, Option<&'a Object>);

struct Planner<'a> {
    observed: &'a Observed,
    desired: &'a Desired,
    ownership: &'a Ownership,
    links: Links<'a>,
    steps: Vec<Step>,
    foreign: Vec<Blocked>,
    /// Wanted keys that are blocked, or need what is blocked.
    held: BTreeSet<&'a ObjectKey>,
    /// What is there and serves what is held back: it is not removed as unwanted.
    kept: BTreeSet<ObjectKey>,
    /// What is removed already because it is in the way.
    cleared: BTreeSet<ObjectKey>,
    orphans: Vec<(&'a ObjectKey, &'a Object)>,
}

impl<'a> Planner<'a> {
    fn new(observed: &'a Observed, desired: &'a Desired, ownership: &'a Ownership) -> Self {
        Self {
            observed,
            desired,
            ownership,
            links: Links::default(),
            steps: Vec::new(),
            foreign: Vec::new(),
            held: BTreeSet::new(),
            kept: BTreeSet::new(),
            cleared: BTreeSet::new(),
            orphans: Vec::new(),
        }
    }

    fn run(mut self, keys: Option<&BTreeSet<ObjectKey>>) -> Plan {
        // What a spared route needs is known only when the route has been looked at.
        let keys = keys.filter(|_| self.desired.spared.is_empty());
        let keys = keys.map(|keys| self.with_addresses(self.with_needs(keys)));
        let about = |key: &ObjectKey| keys.as_ref().is_none_or(|keys| keys.contains(key));
        self.plan_links(&about);
        match &keys {
            Some(keys) if self.links.are_settled() => {
                for key in keys {
                    if let Some(pair) = self.pair(key) {
                        self.visit(pair);
                    }
                }
            }
            _ => {
                for pair in merge(&self.desired.objects, &self.observed.objects) {
                    if about(pair.0) || self.is_unsettled(pair) {
                        self.visit(pair);
                    }
                }
            }
        }
        self.sweep();
        Plan {
            steps: self.steps,
            foreign: self.foreign,
        }
    }

    /// The keys with all that they need, so that what is planned can be made.
    fn with_needs(&self, keys: &BTreeSet<ObjectKey>) -> BTreeSet<ObjectKey> {
        let mut all = keys.clone();
        let mut open: Vec<_> = keys.iter().cloned().collect();
        while let Some(key) = open.pop() {
            let Some(wanted) = self.desired.objects.get(&key) else {
                continue;
            };
            for need in wanted.object.needs() {
                if self.desired.objects.contains_key(&need) && all.insert(need.clone()) {
                    open.push(need);
                }
            }
        }
        all
    }

    /// The keys with those of our unwanted addresses that are inside of routes among them: an address
    /// that stayed goes when its subnet becomes a peer's.
    fn with_addresses(&self, mut keys: BTreeSet<ObjectKey>) -> BTreeSet<ObjectKey> {
        let routes = keys.iter().rev().map_while(|key| {
            let ObjectKey::Route { dst, .. } = key else {
                return None;
            };
            Some(*dst)
        });
        let routes: Vec<Subnet> = routes.collect();
        if routes.is_empty() {
            return keys;
        }
        let first = ObjectKey::Address {
            dev: IfName::FIRST,
            ip: Ipv4Addr::UNSPECIFIED.into(),
            prefix_len: 0,
        };
        let end = ObjectKey::Tunnel(IfName::FIRST);
        let addresses = self.observed.objects.range(first..end);
        let ours = addresses.filter(|(key, object)| {
            !self.desired.objects.contains_key(key)
                && self.ownership.owner(object, self.observed) != Owner::Foreign
        });
        for (key, _) in ours {
            if let ObjectKey::Address { ip, .. } = key
                && routes.iter().any(|dst| dst.contains_ip(*ip))
            {
                keys.insert(key.clone());
            }
        }
        keys
    }

    fn pair(&self, key: &ObjectKey) -> Option<Pair<'a>> {
        let wanted = self.desired.objects.get_key_value(key);
        let found = self.observed.objects.get_key_value(key);
        let key = wanted.map(|(key, _)| key).or(found.map(|(key, _)| key))?;
        Some((key, wanted.map(|(_, w)| w), found.map(|(_, f)| f)))
    }

    /// Decides on one key. Keys come in their order, so that what an object needs has been decided.
    fn visit(&mut self, (key, wanted, found): Pair<'a>) {
        let is_under_its_key = |object: &Object| object.key() == *key;
        if !wanted.is_none_or(|wanted| is_under_its_key(&wanted.object))
            || !found.is_none_or(is_under_its_key)
        {
            return;
        }
        let found = found.filter(|found| !self.is_lost(found));
        match (wanted, found) {
            (Some(_), _) if matches!(key, ObjectKey::Link(_)) => {}
            (Some(wanted), _) if self.needs_held(&wanted.object) => self.hold(key, found),
            (Some(wanted), None) => self.make(key, wanted),
            (Some(wanted), Some(found)) => self.correct(key, wanted, found),
            (None, Some(found)) if self.is_spared(found) => self.keep_needs_of(found),
            (None, Some(found)) => {
                if !self.desired.hold_orphans
                    && !self.stays_unwanted(found)
                    && self.ownership.owner(found, self.observed) != Owner::Foreign
                {
                    self.orphans.push((key, found));
                }
            }
            (None, None) => {}
        }
    }

    /// Whether an object is left although nobody wants it: settings go with their device, and
    /// devices stay with their addresses and packet paths while peers may still send to them.
    fn stays_unwanted(&self, found: &Object) -> bool {
        match found {
            Object::Sysctl(_) | Object::Offload(_) => true,
            // An address of a subnet that has become a peer's would keep the kernel from using that.
            Object::Address(Address { ip, .. }) if self.is_routed(*ip) => false,
            Object::Link(Link { name: dev, .. })
            | Object::Address(Address { dev, .. })
            | Object::TunnelPeer(TunnelPeer { dev, .. }) => self.is_on_a_held_device(*dev),
            Object::Tunnel(tunnel) => self.is_on_a_held_device(tunnel.dev),
            _ => false,
        }
    }

    /// Tells if a device that nobody wants stays while peers may still send to it.
    fn is_on_a_held_device(&self, dev: IfName) -> bool {
        let key = ObjectKey::Link(dev);
        let Some(Object::Link(link)) = self.observed.objects.get(&key) else {
            return false;
        };
        let backend = link.kind.backend();
        backend.is_some_and(|backend| self.desired.held_backends.contains(&backend))
            && !self.desired.objects.contains_key(&key)
    }

    /// Whether a route is wanted to a subnet that holds an address.
    fn is_routed(&self, ip: IpAddr) -> bool {
        let keys = self.desired.objects.keys().rev();
        let mut routes = keys.map_while(|key| match key {
            ObjectKey::Route { dst, .. } => Some(dst),
            _ => None,
        });
        routes.any(|dst| dst.contains_ip(ip))
    }

    /// Whether an object that is there is a route that stays although nobody wants it: one through a
    /// device that stays itself, or is none of ours.
    fn is_spared(&self, found: &Object) -> bool {
        let stays = |dev| {
            let link = self.observed.objects.get(&ObjectKey::Link(dev));
            self.is_to_serve(dev)
                || link
                    .is_some_and(|link| self.ownership.owner(link, self.observed) == Owner::Foreign)
        };
        matches!(found, Object::Route(route) if self.desired.spared.contains(&route.dst))
            && self.dev_of(found).is_some_and(stays)
    }

    fn make(&mut self, key: &'a ObjectKey, wanted: &'a Wanted) {
        let op = match &wanted.object {
            Object::Sysctl(_) | Object::Offload(_) => {
                if let Some(link) = self.foreign_device(&wanted.object) {
                    self.block(key, wanted, link);
                    return;
                }
                Op::Change(wanted.object.clone())
            }
            Object::Address(address) => {
                if let Some(other) = self.other_length(address) {
                    let other_key = other.key();
                    if self.desired.objects.contains_key(&other_key)
                        || self.ownership.owner(other, self.observed) == Owner::Foreign
                    {
                        self.block(key, wanted, other);
                        return;
                    }
                    let why = Why::InTheWay { of: key.clone() };
                    self.step(Op::Delete(other.clone()), why, wanted.peer.clone());
                    self.cleared.insert(other_key);
                }
                Op::Create(wanted.object.clone())
            }
            _ => Op::Create(wanted.object.clone()),
        };
        self.step_with_stopgap(key, op, Why::Missing, wanted);
    }

    fn correct(&mut self, key: &'a ObjectKey, wanted: &'a Wanted, found: &'a Object) {
        let Some(Difference { field, .. }) = difference(&wanted.object, found) else {
            return;
        };
        let bears_a_mark = self.ownership.owner(found, self.observed) != Owner::Foreign;
        let is_ours = bears_a_mark || self.takes_over(wanted, found);
        if !is_ours {
            self.block(key, wanted, found);
            return;
        }
        // What bears no mark gets ours, so that it is followed and removed like all of ours.
        if let (Object::Route(wanted), Object::Route(found)) = (&wanted.object, found)
            && bears_a_mark
            && self.same_hop(wanted, found)
        {
            return;
        }
        let op = Op::Change(wanted.object.clone());
        self.step_with_stopgap(key, op, Why::Drifted { field }, wanted);
    }

    /// Whether what is there is taken over although it bears no mark. Of a route nothing but where
    /// it leads tells that it is Go flannel's: to the same node as the one that is wanted.
    fn takes_over(&self, wanted: &Wanted, found: &Object) -> bool {
        let leads_there = match found {
            Object::Route(Route {
                target: RouteTarget::Gateway { gateway, .. },
                ..
            }) => self.end_of(&wanted.object) == Some(*gateway),
            _ => true,
        };
        leads_there && self.ownership.may_take_over(found, self.observed)
            || self
                .ownership
                .lost_its_number(&wanted.object, found, self.observed)
    }

    /// The address on the underlay to which a wanted route leads at last.
    fn end_of(&self, wanted: &Object) -> Option<IpAddr> {
        let desired = |key| Some(&self.desired.objects.get(&key)?.object);
        let Object::Route(route) = wanted else {
            return None;
        };
        let (gateway, dev) = match route.target {
            RouteTarget::Gateway { gateway, dev, .. } => (gateway, dev),
            RouteTarget::Device(dev) => {
                let subnet = route.dst;
                return match desired(ObjectKey::TunnelPeer { dev, subnet })? {
                    Object::TunnelPeer(peer) => Some(peer.endpoint.ip()),
                    _ => None,
                };
            }
            RouteTarget::Nexthop(id) => match desired(ObjectKey::Nexthop(id))? {
                Object::Nexthop(nexthop) => (nexthop.gateway, nexthop.dev),
                _ => return None,
            },
            _ => return None,
        };
        let Some(Object::Neighbour(neighbour)) = desired(ObjectKey::Neighbour { dev, ip: gateway })
        else {
            return Some(gateway);
        };
        match desired(ObjectKey::Fdb {
            dev,
            mac: neighbour.mac,
        })? {
            Object::Fdb(fdb) => Some(fdb.remote),
            _ => None,
        }
    }

    /// Whether a route sends packets where it should, by way of a nexthop object or without. Who
    /// made it does not count. A nexthop object that is not wanted will be removed, and the route
    /// with it: then it is not the same.
    fn same_hop(&self, wanted: &Route, found: &Route) -> bool {
        let (id, holder, hop) = match (&wanted.target, &found.target) {
            (wanted, found) if wanted == found => return true,
            (RouteTarget::Nexthop(id), hop) => (id, None, hop),
            (hop, RouteTarget::Nexthop(id)) => (id, Some(&self.observed.objects), hop),
            _ => return false,
        };
        let key = ObjectKey::Nexthop(*id);
        let Some(wanted) = self.desired.objects.get(&key) else {
            return false;
        };
        let nexthop = match holder {
            Some(objects) => objects.get(&key),
            None => Some(&wanted.object),
        };
        matches!((nexthop, hop),
            (Some(Object::Nexthop(nexthop)), RouteTarget::Gateway { gateway, dev, onlink })
            if nexthop.gateway == *gateway && nexthop.dev == *dev && nexthop.onlink == *onlink)
    }

    /// The device of a setting if it is there and somebody else's.
    fn foreign_device(&self, setting: &Object) -> Option<&'a Object> {
        let dev = setting.dev()?;
        if self.links.is_made(dev) {
            return None;
        }
        let link = self.observed.objects.get(&ObjectKey::Link(dev))?;
        (self.ownership.owner(link, self.observed) == Owner::Foreign).then_some(link)
    }

    /// The same IPv6 address with another length, which the kernel would not have beside it.
    fn other_length(&self, address: &Address) -> Option<&'a Object> {
        let Address { dev, ip, .. } = *address;
        let key = |prefix_len| ObjectKey::Address {
            dev,
            ip,
            prefix_len,
        };
        self.observed
            .objects
            .range(key(0)..=key(u8::MAX))
            .map(|(_, object)| object)
            .find(|object| {
                matches!(object, Object::Address(other)
                    if ip.is_ipv6() && other.dev == dev && other.ip == ip)
                    && !self.is_lost(object)
            })
    }

    /// Adds a step, with a route before it and its removal after it where the kernel would not take
    /// the gateway otherwise.
    fn step_with_stopgap(&mut self, key: &ObjectKey, op: Op, why: Why, wanted: &Wanted) {
        let stopgap = self.stopgap(op.object());
        let why_stopgap = Why::Stopgap { of: key.clone() };
        if let Some(route) = &stopgap {
            let op = Op::Create(route.clone());
            self.step(op, why_stopgap.clone(), wanted.peer.clone());
        }
        self.step(op, why, wanted.peer.clone());
        if let Some(route) = stopgap {
            self.step(Op::Delete(route), why_stopgap, wanted.peer.clone());
        }
    }

    /// The route that makes the kernel see an IPv6 gateway where it is wanted.
    ///
    /// IPv6 refuses an on-link gateway while the best route to its address leads through another
    /// device, as the very route does that is to move here (the gateway of a tunnel is the first
    /// address of the peer's subnet), or somebody's route to a wider network. A route to that one address overrules it for a moment, and no
    /// packet is lost. Left behind by a crash, it is an orphan of ours.
    fn stopgap(&self, object: &Object) -> Option<Object> {
        let (gateway, dev) = match object {
            Object::Nexthop(Nexthop {
                gateway: IpAddr::V6(gateway),
                dev,
                onlink: true,
                ..
            })
            | Object::Route(Route {
                target:
                    RouteTarget::Gateway {
                        gateway: IpAddr::V6(gateway),
                        dev,
                        onlink: true,
                    },
                ..
            }) => (*gateway, *dev),
            _ => return None,
        };
        let through = self.dev_of(self.best_route_to(gateway)?)?;
        let route = Object::Route(Route {
            table: MAIN_TABLE,
            dst: Subnet::host(gateway),
            metric: 1,
            target: RouteTarget::Device(dev),
            protocol: self.ownership.protocol,
            source: None,
        });
        let is_free = !self.observed.objects.contains_key(&route.key());
        let would_be_ours = self.ownership.owner(&route, self.observed) == Owner::Ours;
        (through != dev && is_free && would_be_ours).then_some(route)
    }

    /// The route that a packet to an address takes, of those that are there and stay; the default
    /// route does not count.
    ///
    /// In the order of keys, all that holds an address stands before it, what is longest last. What
    /// stands in between holds other addresses only: what it has in common with this one is longer
    /// than anything before that can hold it.
    fn best_route_to(&self, ip: Ipv6Addr) -> Option<&'a Object> {
        let key = |dst, metric| ObjectKey::Route {
            table: MAIN_TABLE,
            dst,
            metric,
        };
        let routes = &self.observed.objects;
        let first = key(Subnet::new(Ipv6Addr::UNSPECIFIED, 1).ok()?, 0);
        let mut last = Subnet::host(ip);
        loop {
            let (found, _) = routes.range(&first..=&key(last, u32::MAX)).next_back()?;
            let ObjectKey::Route { dst, .. } = *found else {
                return None;
            };
            let IpAddr::V6(other) = dst.address() else {
                return None;
            };
            let longest = if dst.contains_ip(IpAddr::V6(ip)) {
                let mut metrics = routes.range(key(dst, 0)..=key(dst, u32::MAX));
                let stays = metrics.find(|(_, object)| !self.is_lost(object));
                if let Some((_, object)) = stays {
                    return Some(object);
                }
                u32::from(dst.len()).checked_sub(1)?
            } else {
                (ip.to_bits() ^ other.to_bits()).leading_zeros()
            };
            if longest == 0 {
                return None;
            }
            last = Subnet::new(ip, u8::try_from(longest).ok()?).ok()?;
        }
    }

    fn step(&mut self, op: Op, why: Why, peer: Option<LeaseKey>) {
        self.steps.push(Step {
            op,
            why,
            peer,
            disrupts: Vec::new(),
        });
    }

    fn needs_held(&self, object: &Object) -> bool {
        !self.held.is_empty() && object.needs().iter().any(|need| self.held.contains(need))
    }

    fn block(&mut self, key: &'a ObjectKey, wanted: &'a Wanted, found: &'a Object) {
        self.foreign.push(Blocked {
            wanted: wanted.object.clone(),
            found: found.clone(),
            peer: wanted.peer.clone(),
        });
        self.hold(key, Some(found));
    }

    /// Leaves a wanted key as it is, and what is there with all that it needs.
    fn hold(&mut self, key: &'a ObjectKey, found: Option<&'a Object>) {
        self.held.insert(key);
        if let Some(found) = found {
            self.keep_needs_of(found);
        }
    }

    /// Keeps what an object needs as far as it is not wanted anyway.
    fn keep_needs_of(&mut self, object: &Object) {
        let mut open = object.needs();
        while let Some(key) = open.pop() {
            if self.desired.objects.contains_key(&key) {
                continue;
            }
            if let Some(object) = self.observed.objects.get(&key)
                && self.kept.insert(key)
            {
                open.extend(object.needs());
            }
        }
    }

    /// The device of an object that is there; of a route through a nexthop object, that one's.
    fn dev_of(&self, object: &Object) -> Option<IfName> {
        match object {
            Object::Route(Route {
                target: RouteTarget::Nexthop(id),
                ..
            }) => self.observed.objects.get(&ObjectKey::Nexthop(*id))?.dev(),
            object => object.dev(),
        }
    }

    /// Removes what is ours and not wanted, last what is needed most.
    fn sweep(&mut self) {
        let falling = self.falling_devices();
        let orphans = std::mem::take(&mut self.orphans);
        let mut fallen = BTreeSet::new();
        for (key, object) in orphans.into_iter().rev() {
            if self.kept.contains(key) || self.cleared.contains(key) {
                continue;
            }
            let on_falling = self.dev_of(object).filter(|dev| falling.contains(dev));
            match (object, on_falling) {
                (Object::Link(link), Some(_)) if !fallen.contains(&link.name) => {
                    let moved = |key: &_| self.desired.objects.contains_key(key);
                    let step = self.removal(object, link.name, Why::Orphan, moved);
                    self.steps.push(step);
                    fallen.extend(self.falls_with(link.name));
                }
                (Object::Link(_), _) | (_, Some(_)) => {}
                // With its last address a device that has to stay would lose what it stays for.
                (Object::Address(address), None)
                    if !self.is_to_serve(address.dev) && !self.is_routed(address.ip) => {}
                (_, None) => self.step(Op::Delete(object.clone()), Why::Orphan, None),
            }
        }
    }

    /// Whether a device is wanted and can be made what it should be.
    fn is_to_serve(&self, dev: IfName) -> bool {
        let key = ObjectKey::Link(dev);
        self.desired.objects.contains_key(&key) && !self.held.contains(&key)
    }

    /// The devices that are removed as unwanted, with those that fall with them: not those on
    /// which something wanted or held back depends, nor those that others bound theirs to.
    fn falling_devices(&self) -> BTreeSet<IfName> {
        let mut unwanted: BTreeSet<IfName> = self
            .orphans
            .iter()
            .filter(|(key, _)| !self.kept.contains(*key))
            .filter_map(|(key, _)| match key {
                ObjectKey::Link(dev) => Some(*dev),
                _ => None,
            })
            .collect();
        if unwanted.is_empty() {
            return unwanted;
        }
        for wanted in self.desired.objects.values() {
            for need in wanted.object.needs() {
                if let ObjectKey::Link(dev) = need {
                    unwanted.remove(&dev);
                }
            }
        }
        unwanted
            .into_iter()
            .filter(|dev| self.foreign_bound_to(*dev).is_none())
            .flat_map(|dev| self.falls_with(dev))
            .collect()
    }
}

/// The pairs of two maps in the order of their keys.
fn merge<'a>(
    desired: &'a BTreeMap<ObjectKey, Wanted>,
    observed: &'a BTreeMap<ObjectKey, Object>,
) -> impl Iterator<Item = Pair<'a>> {
    let mut desired = desired.iter().peekable();
    let mut observed = observed.iter().peekable();
    std::iter::from_fn(move || {
        let order = match (desired.peek(), observed.peek()) {
            (Some((wanted, _)), Some((found, _))) => wanted.cmp(found),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return None,
        };
        let wanted = desired.next_if(|_| order.is_le());
        let found = observed.next_if(|_| order.is_ge());
        let key = wanted.map(|(key, _)| key).or(found.map(|(key, _)| key))?;
        Some((key, wanted.map(|(_, w)| w), found.map(|(_, f)| f)))
    })
}
