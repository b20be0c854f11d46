//! The engine and the host around the overlay: when the kernel is asked what becomes of packets,
//! about which peers, and what is told of the answers.
//!
//! Peers are asked about in turn, a few at a time, so that it costs the same however many there
//! are. What was off, and what a notification names, is asked about first.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::time::Duration;

use super::Engine;
use crate::clock::Moment;
use crate::condition::{ConditionStatus, ConditionType};
use crate::family::Family;
use crate::host_checks::{Finding, HostPlan, Way, WayKind, in_the_way, judge, suspects};
use crate::host_facts::{HostFacts, Lookup, Questions, Routed};
use crate::kernel::{self, Change};
use crate::lease::LeaseKey;
use crate::object::{IfName, MAIN_TABLE, Object, ObjectKey, Route, RouteTarget};
use crate::reconcile::ownership::Owner;
use crate::subnet::Subnet;

/// The most peers that the kernel is asked about at a time, over all families.
const SAMPLE: usize = 8;

/// The most that are asked about again because they were off, or because a notification names them.
const FIRST: usize = 4;

/// The least time between two looks, however much is told meanwhile.
const GAP: Duration = Duration::from_secs(1);

/// The same after peers have come that are too many to be asked about all at once.
const SLOW: Duration = Duration::from_secs(10);

/// The wait before what was seen to be off is believed: a route of ours that somebody deletes is
/// back long before.
const CONFIRM: Duration = Duration::from_millis(150);

/// The interval at which what is off is looked at without any hint.
const OFF: Duration = Duration::from_secs(5);

/// The longest that an answer may take: the engine waits for it.
const PATIENCE: Duration = Duration::from_secs(1);

/// The engine's knowledge of the host around the overlay.
#[derive(Debug)]
pub(super) struct HostChecks {
    /// When to look.
    at: Option<Moment>,
    last: Option<Moment>,
    /// The host has been looked at: nobody waits for it any more.
    pub(super) done: bool,
    /// The conditions that the last look saw to be off and that were not before.
    doubted: BTreeSet<ConditionType>,
    /// Addresses to be asked about first.
    first: BTreeSet<IpAddr>,
    /// The peers' subnets that were asked about last.
    cursors: BTreeMap<Family, Subnet>,
    /// The devices that lead to containers.
    pods: BTreeSet<(Family, IfName)>,
}

impl HostChecks {
    pub(super) const fn new(now: Moment) -> Self {
        Self {
            at: Some(now),
            last: None,
            done: false,
            doubted: BTreeSet::new(),
            first: BTreeSet::new(),
            cursors: BTreeMap::new(),
            pods: BTreeSet::new(),
        }
    }

    /// Something happened that the host is to be looked at for.
    pub(super) fn hint(&mut self, now: Moment) {
        self.hint_after(GAP, now);
    }

    /// Peers have come, of which there are so many now. They are asked about in turn: it does no good to
    /// look for each.
    pub(super) fn hint_of_peers(&mut self, peers: usize, now: Moment) {
        self.hint_after(if peers > SAMPLE { SLOW } else { GAP }, now);
    }

    fn hint_after(&mut self, gap: Duration, now: Moment) {
        let at = self.last.map_or(now, |last| now.max(last + gap));
        self.at = Some(self.at.map_or(at, |before| before.min(at)));
    }

    fn hint_about(&mut self, dst: &Subnet, now: Moment) {
        if self.first.len() < FIRST {
            self.first.insert(inside(dst));
        }
        self.hint(now);
    }
}

impl Engine {
    /// Hears what the kernel tells, as far as it may make packets go another way.
    pub(super) fn host_told(&mut self, changes: &[Change]) {
        let now = self.now();
        for change in changes {
            match change {
                Change::Policy
                | Change::Link(_)
                | Change::Address(_)
                | Change::Route
                | Change::All
                | Change::Set(Object::Link(_) | Object::Address(_))
                | Change::Gone(ObjectKey::Link(_) | ObjectKey::Address { .. })
                | Change::Key(ObjectKey::Link(_) | ObjectKey::Address { .. }) => {
                    self.host_checks.hint(now);
                }
                Change::Set(object @ Object::Route(_)) => {
                    let wanted = self.compiler.desired().objects.get(&object.key());
                    if wanted.is_none_or(|wanted| wanted.object != *object) {
                        self.route_told(&object.key(), now);
                    }
                }
                Change::Gone(key @ ObjectKey::Route { .. })
                | Change::Key(key @ ObjectKey::Route { .. }) => self.route_told(key, now),
                Change::Set(_) | Change::Gone(_) | Change::Key(_) | Change::Neighbour(_) => {}
            }
        }
    }

    /// Routes of others may change as often as they like: those into our networks matter.
    fn route_told(&mut self, key: &ObjectKey, now: Moment) {
        if let ObjectKey::Route { dst, .. } = key
            && dst.len() > 0
            && self.networks.iter().any(|network| network.overlaps(dst))
        {
            self.host_checks.hint_about(dst, now);
        }
    }

    /// When the host is to be looked at.
    pub(super) fn host_check_at(&self) -> Option<Moment> {
        self.host_checks.at.filter(|_| self.can_check_host())
    }

    /// Before the peers are known and everything was made once there is nothing to ask about.
    fn can_check_host(&self) -> bool {
        let knows_peers = self.leases.synced() || self.lease.held().is_none();
        let is_made = knows_peers && self.reconciler.converged();
        self.network.is_some() && (self.host_checks.done || is_made)
    }

    /// Looks at the host around the overlay where that is due.
    pub(super) async fn check_host(&mut self) {
        let now = self.now();
        if self.host_check_at().is_none_or(|at| at > now) {
            return;
        }
        self.host_checks.at = None;
        self.host_checks.last = Some(now);
        let mut plan = self.host_plan();
        let facts = match self.ask_host(&mut plan).await {
            Ok(facts) => facts,
            Err(error) => {
                tracing::debug!(%error, "the kernel does not say what becomes of packets");
                self.host_checks.done = true;
                self.host_checks.at = Some(self.now() + OFF);
                return;
            }
        };
        let Some(observed) = self.reconciler.observed() else {
            return;
        };
        let findings = judge(&plan, &facts, &observed.objects);
        let off = suspects(&plan, &facts);
        self.host_checks.first = off.into_iter().take(FIRST).collect();
        self.conclude_host(findings);
    }

    /// Tells what was found. Of what just began to be off a second look is taken first.
    fn conclude_host(&mut self, findings: [Finding; 4]) {
        let now = self.now();
        let is_news = |finding: &Finding| {
            let before = self.conditions.get(finding.kind);
            let was_off = before.is_some_and(|before| before.status == ConditionStatus::False);
            let may_pass = matches!(
                finding.kind,
                ConditionType::Routes | ConditionType::ReversePath
            );
            finding.is_off() && may_pass && !was_off
        };
        // Nobody believes in anything yet at the start.
        let is_first = !self.host_checks.done;
        let is_doubted = |finding: &&Finding| {
            let is_second = self.host_checks.doubted.contains(&finding.kind);
            is_news(finding) && !is_first && !is_second
        };
        let doubted: BTreeSet<ConditionType> = findings
            .iter()
            .filter(is_doubted)
            .map(|finding| finding.kind)
            .collect();
        self.host_checks.doubted.clone_from(&doubted);
        self.host_checks.done = true;
        if !doubted.is_empty() {
            self.host_checks.at = Some(now + CONFIRM);
        } else if findings.iter().any(Finding::is_off) {
            self.host_checks.at = Some(now + OFF);
        }
        for finding in findings {
            if !doubted.contains(&finding.kind) {
                let (kind, status) = (finding.kind, finding.status);
                self.condition(kind, status, finding.reason, finding.message, false);
            }
        }
    }

    /// Asks the kernel; once more if containers turn out to be behind another device than before.
    async fn ask_host(&mut self, plan: &mut HostPlan) -> kernel::Result<HostFacts> {
        let inputs = plan.inputs.clone();
        plan.inputs.extend(self.host_checks.pods.iter().copied());
        let (facts, pods) = self.ask_once(plan).await?;
        if pods == self.host_checks.pods {
            return Ok(facts);
        }
        plan.inputs = inputs;
        plan.inputs.extend(pods.iter().copied());
        self.host_checks.pods = pods;
        let (facts, _) = self.ask_once(plan).await?;
        Ok(facts)
    }

    /// Asks the kernel; answers as well which devices lead to containers.
    async fn ask_once(
        &mut self,
        plan: &HostPlan,
    ) -> kernel::Result<(HostFacts, BTreeSet<(Family, IfName)>)> {
        let pods: Vec<(Family, Lookup)> = self.pods_lookups().collect();
        let ways = plan.ways.iter().map(|way| way.lookup);
        let lookups = pods.iter().map(|(_, lookup)| *lookup);
        let inputs = plan.inputs.iter().map(|(_, dev)| *dev);
        let questions = Questions {
            families: plan.inputs.iter().map(|(family, _)| *family).collect(),
            devices: inputs
                .chain(ways.clone().filter_map(|way| way.input))
                .collect(),
            lookups: ways.chain(lookups).collect(),
            firewall: true,
        };
        let asked = self.parts.kernel.host_facts(&questions);
        let answer = tokio::time::timeout(PATIENCE, asked).await;
        let facts = answer.map_err(|_| kernel::Error::TimedOut)??;
        let external = self.external.as_ref().map(|external| external.dev);
        let answers = facts.routed.get(plan.ways.len()..).unwrap_or_default();
        let devices = pods
            .iter()
            .zip(answers)
            .filter_map(|((family, _), answer)| match answer {
                Some(Routed::Through {
                    dev, gateway: None, ..
                }) if external != Some(*dev) => Some((*family, *dev)),
                _ => None,
            });
        let devices = devices.collect();
        Ok((facts, devices))
    }

    /// The questions where packets to our own containers go.
    fn pods_lookups(&self) -> impl Iterator<Item = (Family, Lookup)> + use<> {
        let subnets = self.lease.lease().map(|lease| lease.subnet);
        let subnets = subnets.unwrap_or_default();
        let subnets: Vec<Subnet> = subnets.values().copied().collect();
        subnets
            .into_iter()
            .filter_map(|subnet| Some((subnet.family(), Lookup::to(subnet.nth(2)?, None))))
    }

    /// The things that the overlay counts on, for some of the peers.
    fn host_plan(&mut self) -> HostPlan {
        let sampled = self.sample();
        let addresses = self.own_addresses();
        let mut plan = HostPlan {
            inputs: addresses.keys().copied().collect(),
            ..HostPlan::default()
        };
        let (Some(config), Some(external)) = (&self.config, &self.external) else {
            return plan;
        };
        plan.networks = config.pools().values().map(|pool| pool.network()).collect();
        // What comes to an address comes in on the device that has it, or to one of a loopback device
        // on that which the route leads through.
        let local = external.local.ip(Family::V4);
        let local = local
            .filter(|local| self.has_address(external.dev, *local) || self.is_on_loopback(*local));
        for (peer, about, route, (dev, gateway)) in sampled {
            let family = Family::of(&about);
            plan.inputs.insert((family, dev));
            let own = addresses.get(&(family, dev)).copied();
            let out = WayKind::Out {
                route,
                dev,
                gateway,
            };
            let mut ways = vec![(Lookup::to(about, own), out)];
            let is_external = external.dev == dev;
            // IPv6 has no such filter.
            if family == Family::V4 {
                if let Some(here) = own.or_else(|| local.filter(|_| is_external)) {
                    let lookup = Lookup::from(about, here, dev);
                    ways.push((lookup, WayKind::In { carries: false }));
                }
                let found = self.leases.peer(&peer);
                let public = found.and_then(|found| found.lease.attrs.public_ip.ip(family));
                if let (Some(public), Some(local), false) = (public, local, is_external) {
                    let lookup = Lookup::from(public, local, external.dev);
                    ways.push((lookup, WayKind::In { carries: true }));
                }
            }
            plan.ways.extend(ways.into_iter().map(|(lookup, kind)| Way {
                peer: peer.clone(),
                about,
                lookup,
                kind,
            }));
        }
        // Where there is no peer of a family yet, what comes will come in there.
        for family in config.families() {
            if !plan.inputs.iter().any(|(of, _)| *of == family) {
                plan.inputs.insert((family, external.dev));
            }
        }
        plan
    }

    fn has_address(&self, dev: IfName, ip: IpAddr) -> bool {
        let observed = self.reconciler.observed();
        let addresses = observed.map_or(&[][..], |observed| &observed.addresses);
        addresses
            .iter()
            .any(|address| (address.dev, address.ip) == (dev, ip))
    }

    fn is_on_loopback(&self, ip: IpAddr) -> bool {
        let observed = self.reconciler.observed();
        let links = observed.map_or(&[][..], |observed| &observed.links);
        let mut loopback = links.iter().filter(|link| link.loopback);
        loopback.any(|link| self.has_address(link.name, ip))
    }

    /// The node's own addresses on the overlay's devices.
    fn own_addresses(&self) -> BTreeMap<(Family, IfName), IpAddr> {
        let desired = self.compiler.desired().objects.iter();
        // Their kind is one of the lowest ranks.
        let first = desired.map_while(|(key, wanted)| match key {
            ObjectKey::Link(_)
            | ObjectKey::Sysctl { .. }
            | ObjectKey::Offload { .. }
            | ObjectKey::Address { .. } => Some(wanted),
            _ => None,
        });
        first
            .filter_map(|wanted| match &wanted.object {
                Object::Address(address) => {
                    Some(((Family::of(&address.ip), address.dev), address.ip))
                }
                _ => None,
            })
            .collect()
    }

    /// Some peers, with an address behind each, the key of its route and where that leads: first
    /// those that are suspect, then the next in turn of each family.
    fn sample(&mut self) -> Vec<Sampled> {
        let Some(config) = self.config.clone() else {
            return Vec::new();
        };
        let mut sampled: BTreeMap<ObjectKey, Sampled> = BTreeMap::new();
        for ip in std::mem::take(&mut self.host_checks.first) {
            if let Some(key) = self.route_of(ip)
                && let Some(found) = self.sampled(&key, Some(ip))
            {
                sampled.insert(key, found);
            }
        }
        let share = SAMPLE / config.families().count().max(1);
        for family in config.families() {
            let Some(pool) = config.pools().get(family) else {
                continue;
            };
            for (key, dst) in self.next_in_turn(pool.network(), share) {
                if sampled.len() < SAMPLE
                    && let Some(found) = self.sampled(&key, None)
                {
                    self.host_checks.cursors.insert(family, dst);
                    sampled.entry(key).or_insert(found);
                }
            }
        }
        sampled.into_values().collect()
    }

    /// The question about a route to a peer, if the kernel has that as it should: other conditions
    /// tell of what is missing, or not ours.
    fn sampled(&self, key: &ObjectKey, about: Option<IpAddr>) -> Option<Sampled> {
        let wanted = self.compiler.desired().objects.get(key)?;
        let observed = self.reconciler.observed()?;
        let objects = &self.compiler.desired().objects;
        let (Object::Route(route), Object::Route(found)) =
            (&wanted.object, observed.objects.get(key)?)
        else {
            return None;
        };
        let hop = hop(route, |key| Some(&objects.get(key)?.object))?;
        let is_there = self::hop(found, |key| observed.objects.get(key)) == Some(hop);
        // What an earlier record left in front of a route, and nobody may remove yet, is ours as well.
        let ownership = self.ownership();
        let is_ours = |object: &Object| ownership.owner(object, observed) != Owner::Foreign;
        let is_behind_ours = |ip: &IpAddr| {
            let front = in_the_way(key, *ip, &observed.objects);
            front.is_some_and(is_ours)
        };
        let about = about.filter(|ip| route.dst.contains_ip(*ip));
        let about = about.into_iter().chain(self.narrower(route, is_ours));
        let mut about = about.chain([inside(&route.dst)]);
        let about = about.find(|ip| !is_behind_ours(ip))?;
        let peer = wanted.peer.clone()?;
        is_there.then(|| (peer, about, key.clone(), hop))
    }

    /// The next routes to peers behind those of the last time.
    fn next_in_turn(&mut self, network: Subnet, most: usize) -> Vec<(ObjectKey, Subnet)> {
        let cursor = self.host_checks.cursors.get(&network.family()).copied();
        let cursor = cursor.filter(|cursor| network.contains(cursor));
        let start = cursor.unwrap_or_else(|| {
            let size = network.last_bits() - network.first_bits();
            let offset = u128::from(self.parts.rng.next_u64()) % size.max(1);
            Subnet::host(network.nth(offset).unwrap_or_else(|| network.address()))
        });
        let first = key_of(network, 0);
        let last = key_of(Subnet::host(network.last_address()), u32::MAX);
        let middle = key_of(start, u32::MAX);
        let objects = &self.compiler.desired().objects;
        let behind = (Bound::Excluded(middle.clone()), Bound::Included(last));
        let routes = objects.range(behind).chain(objects.range(first..=middle));
        let routes = routes.filter_map(|(key, wanted)| match (key, &wanted.peer) {
            (ObjectKey::Route { dst, .. }, Some(_)) => Some((key.clone(), *dst)),
            _ => None,
        });
        routes.take(most).collect()
    }

    /// The wanted route to a peer that an address belongs to.
    fn route_of(&self, ip: IpAddr) -> Option<ObjectKey> {
        let objects = &self.compiler.desired().objects;
        (0..=Family::of(&ip).bits()).rev().find_map(|len| {
            let dst = Subnet::new(ip, len).ok()?;
            let mut routes = objects.range(key_of(dst, 0)..=key_of(dst, u32::MAX));
            routes.find_map(|(key, wanted)| wanted.peer.is_some().then(|| key.clone()))
        })
    }

    /// An address behind a route of ours that somebody's narrower route leads elsewhere, if there is any.
    fn narrower(&self, route: &Route, is_ours: impl Fn(&Object) -> bool) -> Option<IpAddr> {
        let found = self.reconciler.observed()?;
        let end = key_of(Subnet::host(route.dst.last_address()), u32::MAX);
        let start = Bound::Excluded(key_of(route.dst, u32::MAX));
        let mut routes = found.objects.range((start, Bound::Included(end)));
        routes.find_map(|(key, object)| match key {
            ObjectKey::Route { dst, .. } if !is_ours(object) => Some(inside(dst)),
            _ => None,
        })
    }
}

/// A peer to be asked about: its record, an address behind it, the key of its route, and where that
/// leads.
type Sampled = (LeaseKey, IpAddr, ObjectKey, Hop);

/// A device, and a gateway behind it.
type Hop = (IfName, Option<IpAddr>);

/// Where a route leads, given what nexthop objects there are.
fn hop<'a>(route: &Route, object: impl Fn(&ObjectKey) -> Option<&'a Object>) -> Option<Hop> {
    match &route.target {
        RouteTarget::Gateway { gateway, dev, .. } => Some((*dev, Some(*gateway))),
        RouteTarget::Device(dev) => Some((*dev, None)),
        RouteTarget::Nexthop(id) => match object(&ObjectKey::Nexthop(*id))? {
            Object::Nexthop(nexthop) => Some((nexthop.dev, Some(nexthop.gateway))),
            _ => None,
        },
        RouteTarget::Blackhole | RouteTarget::Paths(_) | RouteTarget::Other(_) => None,
    }
}

fn key_of(dst: Subnet, metric: u32) -> ObjectKey {
    ObjectKey::Route {
        table: MAIN_TABLE,
        dst,
        metric,
    }
}

/// An address in a subnet that is no network address, where there is one: that may be the next hop.
fn inside(subnet: &Subnet) -> IpAddr {
    subnet.nth(1).unwrap_or_else(|| subnet.address())
}
