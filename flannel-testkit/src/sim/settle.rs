//! The end of a history: faults stop, and within a bound of time everything is as it should be.

use std::time::Duration;

use flannel_core::alloc::Allocator;
use flannel_core::reconcile::plan::difference;
use flannel_core::{
    BackendType, ConditionType, DualStack, Family, Lease, LeaseAttrs, LeaseKey, LinkKind,
    Neighbour, NetworkConfig, Nexthop, NodeId, Object, ObjectKey, Objects, Pool, Route,
    RouteProtocol, RouteTarget, Snapshot, Subnet, TunnelPeer, wire,
};

use super::cluster::Tamper;
use super::hardware::{addresses, ours};
use super::judge::Invariant;
use super::model::{Expected, Hop, Me, own_record, peers};
use super::node::Node;
use super::path::{link, route_to};
use super::strangers::unmarked;
use super::uplink::all_links;
use super::world::World;

/// What may pass until everything is right, leases aside: the longest wait for a store that failed
/// (60 s) and a call to it that waits for an answer (30 s), twice, because a lease may be lost just
/// then; the longest wait for a kernel that refused (30 s); a whole reading (11 s); a withdrawal
/// that is doubted (10 s); and the longest sleep of an engine (15 s), twice.
pub(super) const BOUND: Duration = Duration::from_secs(2 * (60 + 30) + 30 + 11 + 10 + 2 * 15);

/// The number of a host on the underlay that is no node.
const NOBODY: u8 = 250;

/// How long a cluster that has converged is watched.
const REST: Duration = Duration::from_secs(25);

/// How often the cluster is compared with the model, in the time that it should take without any lease
/// that has to run out.
const LOOK: Duration = Duration::from_secs(1);

/// How often it is compared later: a lease may last a day.
const LATE_LOOK: Duration = Duration::from_secs(15);

impl World {
    /// Ends all faults and sees to it that everything becomes right. Answers how long that took.
    pub(super) async fn settle(&mut self) -> Option<Duration> {
        self.repair().await;
        let begun = self.judge.elapsed();
        let ttl = self
            .cluster
            .truth()
            .leases
            .into_iter()
            .filter_map(|l| l.ttl);
        let bound = BOUND + ttl.max().unwrap_or_default();
        let mut problems;
        let mut look = LOOK;
        loop {
            self.pass(look).await;
            if self.is_over() {
                return None;
            }
            problems = self.problems();
            let took = self.judge.elapsed().saturating_sub(begun);
            if problems.is_empty() && self.rests().await? {
                self.finish();
                self.is_tried().await?;
                self.hosts_are_told_of().await?;
                return Some(took);
            }
            if took > bound {
                break;
            }
            if took > BOUND {
                look = LATE_LOOK;
            }
        }
        let (node, what) = problems.swap_remove(0);
        let what = format!("not within {bound:?}: {what}");
        self.judge.broken(Invariant::Converges, node, what);
        None
    }

    async fn repair(&mut self) {
        for at in 0..self.nodes.len() {
            self.nodes[at].link.repair();
            self.cluster.repair(&self.nodes[at].id);
            self.nodes[at].disk.repair();
            self.repair_kernel(at);
            if let Some(process) = &self.nodes[at].process {
                process.io.spare();
            }
            if self.nodes[at].frozen {
                self.freeze(at, false);
            }
            if self.nodes[at].member {
                self.start(at).await;
            }
        }
        self.repair_gos();
        self.remove_unreadable();
        let config = self.config.clone();
        self.tamper(Tamper::Config(config));
        self.make_room();
        self.end_takings().await;
    }

    /// Sees to it that whoever has no lease can have one: where the pool is too full for that, somebody
    /// removes the records of strangers, one after the other, and then what cannot be read.
    fn make_room(&self) {
        let records = self.judge.records();
        let is_member = |lease: &&Lease| {
            self.nodes
                .iter()
                .any(|node| node.member && node.id == lease.node)
        };
        let strangers = records.leases.iter().filter(|lease| !is_member(lease));
        let strangers = strangers.map(|lease| &lease.key);
        let unreadable = records.unreadable.iter().map(|record| &record.key);
        for key in strangers.chain(unreadable) {
            let records = self.judge.records();
            let lacks = |node: &&Node| {
                node.member && own_record(&node.id, &self.config, &records.leases).is_none()
            };
            let lacking = self.nodes.iter().filter(lacks).count() + self.gos.len();
            if free_subnets(&self.config, &records) >= lacking as u128 {
                return;
            }
            self.tamper(Tamper::Remove(key.clone()));
        }
    }

    /// Somebody removes what cannot be read, but for the records of members: these write new ones. Where
    /// others wrote as well, nodes may know different last values, so that nothing replaces them all.
    fn remove_unreadable(&self) {
        for record in &self.judge.records().unreadable {
            let node = self.judge.only_node_of(&record.key);
            let is_members = |node: &_| self.nodes.iter().any(|n| n.member && n.id == *node);
            let was_others = self.written.contains(&record.key);
            if was_others || !node.as_ref().is_some_and(is_members) {
                self.tamper(Tamper::Remove(record.key.clone()));
            }
        }
    }

    /// Somebody removes what cannot be read and was written by a node alone; whether there is any.
    pub(super) fn remove_unreadable_of(&self, id: &NodeId) -> bool {
        let mut is_any = false;
        for record in &self.judge.records().unreadable {
            if self.judge.only_node_of(&record.key).as_ref() == Some(id) {
                is_any |= self.tamper(Tamper::Remove(record.key.clone()));
            }
        }
        is_any
    }

    /// Whether the cluster stays as it is; `None` if something was broken.
    async fn rests(&mut self) -> Option<bool> {
        let changes = self.judge.changes();
        self.look();
        let before = self.judge.ops();
        let unclear = self.has_unclear();
        self.pass(REST).await;
        if self.is_over() {
            return None;
        }
        if self.judge.changes() != changes {
            return Some(false);
        }
        for (at, (before, now)) in before.into_iter().zip(self.judge.ops()).enumerate() {
            // Who forgot something may find what it left only when its peers are certain.
            // What may serve a record that cannot be read may also go.
            if now > before && (self.nodes[at].forgetful || unclear) {
                return Some(false);
            }
            if now > before {
                let what = format!("{} more ops on a kernel that was right", now - before);
                self.judge.broken(Invariant::Rests, Some(at), what);
                return None;
            }
        }
        Some(self.problems().is_empty())
    }

    /// Everything is as it should be: nobody doubts any more.
    fn finish(&mut self) {
        self.check_lacked();
        for at in 0..self.nodes.len() {
            self.judge.trust(at);
        }
    }

    /// Lets nodes that know everything doubt nothing.
    pub(super) fn trust_who_knows(&mut self) {
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            let may_trust = self.judge.doubts(at)
                && !node.frozen
                && node.link.is_quiet()
                && self.cluster.is_caught_up(&node.id)
                && node.process.as_ref().is_some_and(|p| !p.io.is_busy());
            if may_trust && self.problems_of(at).is_empty() {
                self.judge.trust(at);
            }
        }
    }

    /// What is not as it should be.
    pub(super) fn problems(&self) -> Vec<(Option<usize>, String)> {
        let of = |at| {
            let problems = self.problems_of(at).into_iter();
            problems.map(move |what| (Some(at), what))
        };
        (0..self.nodes.len())
            .filter(|at| self.nodes[*at].member)
            .flat_map(of)
            .collect()
    }

    /// What is not as it should be with one node.
    fn problems_of(&self, at: usize) -> Vec<String> {
        let node = &self.nodes[at];
        let Some(process) = &node.process else {
            return vec!["it does not run".to_owned()];
        };
        if !node.link.is_quiet() || !self.cluster.is_caught_up(&node.id) {
            return vec!["deliveries are under way to it".to_owned()];
        }
        let truth = self.judge.records();
        let records = &truth.leases;
        let Some(lease) = own_record(&node.id, &self.config, records) else {
            return vec!["it has no record in the store".to_owned()];
        };
        let status = process.overlay.status();
        let mut problems = Vec::new();
        match &status.lease {
            Some(held) if held.key == lease.key && held.subnet == lease.subnet => {}
            held => problems.push(format!("it holds {held:?}, its record is {}", lease.key)),
        }
        for kind in [
            ConditionType::Store,
            ConditionType::Config,
            ConditionType::Underlay,
            ConditionType::Kernel,
            ConditionType::Forwarding,
            ConditionType::Routes,
            ConditionType::ReversePath,
        ] {
            // A narrower route that somebody left in a peer's subnet is told.
            if kind == ConditionType::Routes && self.has_narrower(at) {
                continue;
            }
            if !status.is_true(kind) {
                let condition = status.condition(kind);
                let condition = condition.map(|c| format!("{c}: {}", c.message));
                problems.push(condition.unwrap_or_default());
            }
        }
        let objects = node.kernel.objects();
        let (all_addresses, links) = self.addresses_of(at);
        let first = addresses(node.number, node.address);
        let carrier = self.carrier(at, status.external.as_ref());
        let (external, public_ip) = match carrier {
            Ok(carrier) => carrier,
            Err(why) => {
                problems.push(why);
                (node.uplink.dev(), first)
            }
        };
        let me = Me {
            addresses: &all_addresses,
            node: &node.id,
            config: &self.config,
            lease,
            public_ip: &public_ip,
            external,
            links: &links,
            mtu: link(&objects, external)
                .and_then(|l| l.mtu)
                .unwrap_or_default(),
        };
        let model = &self.setup.model;
        problems.extend(
            model
                .fault_of_own(&me)
                .map(|what| format!("its record: {what}")),
        );
        let mut backends = model.reaches(&self.config);
        backends.push(model.backend_type(&self.config));
        let condition = status.condition(ConditionType::Lease);
        let reason = condition.map_or("none", |condition| condition.reason.as_str());
        let expected = match self.is_rejected_elsewhere(&me, &backends, records) {
            true => "Rejected",
            false => "Held",
        };
        if reason != expected {
            problems.push(format!("its lease is {reason}, and should be {expected}"));
        }
        let (usable, mut rejected) = peers(&me, &backends, records);
        let expected = model.expect(&me, &usable);
        rejected.extend(expected.rejected.iter().cloned());
        // Of a record that cannot be read its last good value may be known, and rejected.
        let unreadable = &truth.unreadable;
        let is_readable = |key: &&LeaseKey| unreadable.iter().all(|record| record.key != **key);
        let told = status.rejected.iter().map(|peer| &peer.key);
        let told = told.filter(is_readable).cloned().collect();
        if rejected != told {
            problems.push(format!("it rejects {told:?}, the model {rejected:?}"));
        }
        self.compare(at, &objects, &expected, &mut problems);
        problems
    }

    /// Tells if somebody's route leads a part of a subnet of a node's record elsewhere.
    pub(super) fn has_narrower(&self, at: usize) -> bool {
        let records = self.judge.records();
        let subnets = records
            .leases
            .iter()
            .flat_map(|lease| lease.subnet.values());
        let subnets: Vec<&Subnet> = subnets.collect();
        let foreign = self.judge.foreign(at);
        foreign.values().any(|object| {
            matches!(object, Object::Route(route) if subnets.iter().any(|subnet| {
                subnet.contains(&route.dst) && subnet.len() < route.dst.len()
            }))
        })
    }

    /// Tells if a node that has no stake in it would reject a node's record.
    fn is_rejected_elsewhere(
        &self,
        me: &Me<'_>,
        backends: &[BackendType],
        records: &[Lease],
    ) -> bool {
        let nobody = NodeId::new("nobody").expect("a node id");
        let lease = Lease {
            node: nobody.clone(),
            subnet: DualStack::default(),
            attrs: LeaseAttrs::default(),
            ..me.lease.clone()
        };
        let public_ip = addresses(NOBODY, 0);
        let other = Me {
            node: &nobody,
            lease: &lease,
            public_ip: &public_ip,
            addresses: &[],
            links: &all_links(),
            ..*me
        };
        let (usable, rejected) = peers(&other, backends, records);
        let expected = self.setup.model.expect(&other, &usable);
        rejected.contains(&me.lease.key) || expected.rejected.contains(&me.lease.key)
    }

    /// How a kernel differs from what is expected.
    fn compare(
        &self,
        at: usize,
        objects: &Objects,
        expected: &Expected,
        problems: &mut Vec<String>,
    ) {
        let foreign = self.judge.foreign(at);
        for (subnet, hop) in &expected.routes {
            let is_foreign = |(key, object): (&ObjectKey, &Object)| {
                matches!(key, ObjectKey::Route { dst, .. } if dst == subnet)
                    && self.is_in_our_place(object)
            };
            if foreign.iter().any(is_foreign) {
                // What a route needs is kept for the day that its place is given back.
                if hop.as_ref().is_some_and(|hop| lacks_nexthop(objects, hop)) {
                    problems.push(format!(
                        "{subnet} would not be reached: no nexthop is {hop:?}"
                    ));
                }
                continue;
            }
            match (route_to(objects, subnet), hop) {
                (Err(why), _) => problems.push(format!("{subnet} is not reached: {why}")),
                (Ok(way), Some(Hop { dev, gateway }))
                    if way.dev != *dev || way.gateway != *gateway =>
                {
                    problems.push(format!("{subnet} is reached by {way:?}, not {hop:?}"));
                }
                _ => {}
            }
        }
        for object in expected.objects.iter().flat_map(|objects| objects.values()) {
            let found = self.nodes[at].kernel.get(&object.key());
            let differs = match &found {
                Some(found) => difference(object, found).map(|difference| difference.field),
                None => Some("it is not there".to_owned()),
            };
            if let Some(why) = differs {
                problems.push(format!("{object}: {why}"));
            }
        }
        let unclear = Unclear::of(&self.judge.records());
        let is_expected = |object: &Object| match object {
            Object::Route(route) => expected.routes.contains_key(&route.dst),
            Object::Nexthop(nexthop) => objects.values().any(|other| {
                matches!(other, Object::Route(Route { target: RouteTarget::Nexthop(id), .. })
                        if *id == nexthop.id)
                    || expected
                        .routes
                        .values()
                        .flatten()
                        .any(|hop| hop.gateway == nexthop.gateway && hop.dev == nexthop.dev)
            }),
            object => expected
                .objects
                .as_ref()
                .is_none_or(|objects| objects.contains_key(&object.key())),
        };
        // A device stays for what others still send to it; nothing is sent there any more.
        let may_stay = |object: &Object| {
            !matches!(object, Object::Route(_) | Object::Nexthop(_))
                && object
                    .dev()
                    .and_then(|dev| link(objects, dev)?.kind.backend())
                    .is_some_and(|backend| expected.may_stay.contains(&backend))
        };
        for object in unmarked(objects) {
            let knows = |dev| {
                let node = &self.nodes[at];
                !node.forgetful && node.disk.knows(dev, node.kernel.index_of(dev))
            };
            let is_link = matches!(object, Object::Link(_));
            let is_made_here = !is_link || expected.objects.is_some();
            if is_made_here && is_expected(&object) {
                problems.push(format!("{object} lacks its mark"));
            } else if is_link && object.dev().is_some_and(knows) && !may_stay(&object) {
                problems.push(format!("{object} should not be there"));
            }
        }
        for object in ours(objects) {
            // Who forgot that a network was its own cannot know what it had there.
            let is_forgotten = self.nodes[at].forgetful && !self.is_inner(&object);
            if !is_expected(&object)
                && !is_forgotten
                && !may_stay(&object)
                && !unclear.may_serve(&object)
            {
                problems.push(format!("{object} should not be there"));
            }
        }
    }

    /// Whether a record that cannot be read may be served.
    fn has_unclear(&self) -> bool {
        let unclear = Unclear::of(&self.judge.records());
        let of = |node: &Node| ours(&node.kernel.objects());
        let mut objects = self.nodes.iter().flat_map(of);
        objects.any(|object| unclear.may_serve(&object))
    }

    /// Whether a route or an address is of the network that is in force.
    fn is_inner(&self, object: &Object) -> bool {
        let place = match object {
            Object::Route(route) => route.dst,
            Object::TunnelPeer(peer) => peer.subnet,
            Object::Address(address) => Subnet::host(address.ip),
            Object::Neighbour(neighbour) => Subnet::host(neighbour.ip),
            Object::Nexthop(nexthop) => Subnet::host(nexthop.gateway),
            _ => return true,
        };
        let mut pools = self.config.pools().values();
        pools.any(|pool| pool.network().contains(&place))
    }
}

/// Tells if a route through a hop needs a nexthop object that is not there.
fn lacks_nexthop(objects: &Objects, hop: &Hop) -> bool {
    let is_it = |object: &Object| {
        matches!(object, Object::Nexthop(nexthop) if nexthop.gateway == hop.gateway
            && nexthop.dev == hop.dev
            && nexthop.protocol == RouteProtocol::OURS)
    };
    // A packet path knows its peers by itself.
    let has_path =
        matches!(link(objects, hop.dev), Some(link) if matches!(link.kind, LinkKind::Tun(_)));
    !has_path && !objects.values().any(is_it)
}

/// How many nodes could still be given subnets.
fn free_subnets(config: &NetworkConfig, records: &Snapshot) -> u128 {
    let keys = records.leases.iter().map(|lease| &lease.key);
    let keys = keys.chain(records.unreadable.iter().map(|record| &record.key));
    let taken: Vec<DualStack<Subnet>> = keys
        .filter_map(|key| wire::parse_subnet_key(key.as_str()).ok())
        .collect();
    let free = |(family, pool): (Family, &Pool)| {
        let mut allocator = Allocator::new(pool)?;
        for subnets in &taken {
            subnets
                .get(family)
                .into_iter()
                .for_each(|subnet| allocator.take(subnet));
        }
        Some(allocator.free_count())
    };
    config
        .pools()
        .iter()
        .filter_map(free)
        .min()
        .unwrap_or(u128::MAX)
}

/// The subnets of records that cannot be read.
pub(super) struct Unclear(Vec<Subnet>);

impl Unclear {
    pub(super) fn of(records: &Snapshot) -> Self {
        let keys = records.unreadable.iter().map(|record| record.key.as_str());
        let subnets = keys.filter_map(|key| wire::parse_subnet_key(key).ok());
        Self(
            subnets
                .flat_map(|both| both.values().copied().collect::<Vec<_>>())
                .collect(),
        )
    }

    /// Whether an object may serve one of them.
    pub(super) fn may_serve(&self, object: &Object) -> bool {
        match object {
            Object::Route(Route { dst: of, .. })
            | Object::TunnelPeer(TunnelPeer { subnet: of, .. }) => self.0.contains(of),
            Object::Nexthop(Nexthop { gateway: ip, .. })
            | Object::Neighbour(Neighbour { ip, .. }) => {
                self.0.iter().any(|subnet| subnet.contains_ip(*ip))
            }
            Object::Fdb(_) => !self.0.is_empty(),
            _ => false,
        }
    }
}
