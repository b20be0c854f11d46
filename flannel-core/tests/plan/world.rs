//! A node on the fake kernel: what befell it, how plans are carried out on it, and where its packets
//! go.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use flannel_core::kernel::Error;
use flannel_core::reconcile::desired::Desired;
use flannel_core::reconcile::ownership::Ownership;
use flannel_core::reconcile::plan::{Plan, Step, difference, plan};
use flannel_core::{
    Family, IfName, Kernel, MAIN_TABLE, MacAddr, Object, ObjectKey, Objects, Observed, Op, Route,
    RouteProtocol, RouteTarget, Scope, Subnet,
};
use flannel_testkit::fake_kernel::FakeKernel;
use flannel_testkit::strategies::objects::{
    Mishap, NodeSpec, altered, foreign, mishap, node_spec, ownership, slot_subnet,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// The result of a future that never waits.
pub(crate) fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    match future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("a fake kernel without latency answers at once"),
    }
}

pub(crate) fn try_observe(kernel: &FakeKernel, desired: &Desired) -> Result<Observed, Error> {
    let scope = Scope {
        devices: kernel.objects().values().filter_map(Object::dev).collect(),
        settings: desired
            .objects
            .keys()
            .filter(|key| matches!(key.kind(), "sysctl" | "offload"))
            .cloned()
            .collect(),
    };
    now(kernel.observe(&scope))
}

pub(crate) fn observe(kernel: &FakeKernel, desired: &Desired) -> Observed {
    try_observe(kernel, desired).expect("no fault is set")
}

pub(crate) fn plan_now(kernel: &FakeKernel, desired: &Desired, ownership: &Ownership) -> Plan {
    plan(&observe(kernel, desired), desired, ownership)
}

/// Applies a step that must succeed.
pub(crate) fn apply(kernel: &FakeKernel, step: &Step) {
    for result in now(kernel.apply(std::slice::from_ref(&step.op))) {
        if let Err(error) = result {
            panic!("{} {}: {error}", step.op.verb(), step.op.object());
        }
    }
}

/// Applies a plan, of which every step must succeed, and checks that nothing is left to do.
pub(crate) fn converge(kernel: &FakeKernel, desired: &Desired, ownership: &Ownership) -> Plan {
    let plan = plan_now(kernel, desired, ownership);
    for step in &plan.steps {
        apply(kernel, step);
    }
    let rest = plan_now(kernel, desired, ownership);
    assert!(rest.steps.is_empty(), "left to do: {:#?}", rest.steps);
    plan
}

/// A node that was converged to one overlay; then things befell it, and it is to have another.
#[derive(Debug, Clone)]
pub(crate) struct World {
    pub(crate) before: NodeSpec,
    pub(crate) after: NodeSpec,
    pub(crate) foreign: Vec<Object>,
    pub(crate) mishaps: Vec<Mishap>,
    pub(crate) adopt_flannel: bool,
}

pub(crate) fn world() -> impl Strategy<Value = World> {
    (
        node_spec(),
        node_spec(),
        any::<[bool; 4]>(),
        prop_oneof![Just(Vec::new()), foreign()],
        vec(mishap(), 0..6),
        any::<bool>(),
    )
        .prop_map(
            |(before, other, keep, foreign, mishaps, adopt_flannel)| World {
                after: mixed(&before, other, keep),
                before,
                foreign,
                mishaps,
                adopt_flannel,
            },
        )
}

/// A second spec that has some things in common with the first.
pub(crate) fn mixed(before: &NodeSpec, other: NodeSpec, keep: [bool; 4]) -> NodeSpec {
    let [vni, device, families, peers] = keep;
    let mut after = other;
    if vni {
        after.vni = before.vni;
        after.port = before.port;
        after.named_after_vni = before.named_after_vni;
    }
    if device {
        after.mac = before.mac;
        after.mtu = before.mtu;
        after.learning = before.learning;
        after.udp = before.udp;
    }
    if families {
        after.ipv6 = before.ipv6;
        after.nexthops = before.nexthops;
    }
    if peers {
        after.peers.clone_from(&before.peers);
    }
    after
}

impl World {
    /// The kernel in the state in which the overlay finds it, and the foreign objects in it.
    pub(crate) fn build(&self) -> (FakeKernel, Ownership, Objects) {
        let kernel = FakeKernel::new();
        let ownership = ownership(self.adopt_flannel);
        let desired = self.before.desired();
        for object in &self.foreign {
            let _ = kernel.insert_foreign(object.clone());
        }
        converge(&kernel, &desired, &ownership);
        for object in &self.foreign {
            let _ = kernel.insert_foreign(object.clone());
        }
        let foreign: BTreeSet<_> = self.foreign.iter().map(Object::key).collect();
        for mishap in &self.mishaps {
            let there: Vec<_> = desired
                .objects
                .keys()
                .filter(|key| !foreign.contains(key))
                .filter_map(|key| kernel.get(key))
                .collect();
            befall(&kernel, &there, mishap);
        }
        let foreign = self
            .foreign
            .iter()
            .filter_map(|object| Some((object, kernel.get(&object.key())?)))
            .filter(|(object, found)| difference(object, found).is_none())
            .filter(|(object, _)| !self.adopt_flannel || !is_like_go_flannels(object))
            .map(|(_, found)| (found.key(), found))
            .collect();
        (kernel, ownership, foreign)
    }
}

/// Whether an object may be taken for Go flannel's where that is adopted.
pub(crate) fn is_like_go_flannels(object: &Object) -> bool {
    matches!(
        object,
        Object::Route(Route {
            protocol: RouteProtocol::BOOT,
            target: RouteTarget::Gateway { onlink: true, .. },
            ..
        })
    )
}

pub(crate) fn befall(kernel: &FakeKernel, there: &[Object], mishap: &Mishap) {
    let pick = |which: &Index| (!there.is_empty()).then(|| which.get(there));
    match mishap {
        Mishap::Deleted(which) => {
            if let Some(object) = pick(which) {
                kernel.delete(&object.key());
            }
        }
        Mishap::Altered(which) => {
            if let Some(object) = pick(which) {
                let altered = altered(object);
                if altered.key() != object.key() {
                    kernel.delete(&object.key());
                }
                let _ = kernel.external(&Op::Change(altered));
            }
        }
        Mishap::Down(which, up) => {
            let links: Vec<_> = there
                .iter()
                .filter_map(|object| match object {
                    Object::Link(link) => Some(link.name),
                    _ => None,
                })
                .collect();
            if !links.is_empty() {
                let dev = *which.get(&links);
                kernel.set_link_down(dev);
                kernel.set_link_up(dev, *up);
            }
        }
    }
}

/// Where packets to a destination go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Hop {
    NoRoute,
    /// To a node, without tunnel.
    Direct(IpAddr),
    /// Through the tunnel to a VTEP behind a public address.
    Tunnel(MacAddr, IpAddr),
    /// Through the packet path in userspace.
    Datagrams(SocketAddr),
    Broken(&'static str),
}

pub(crate) fn route_key(dst: Subnet) -> ObjectKey {
    ObjectKey::Route {
        table: MAIN_TABLE,
        dst,
        metric: Route::default_metric(dst.family()),
    }
}

pub(crate) fn hop(objects: &Objects, dst: Subnet) -> (Option<IfName>, Hop) {
    let Some(Object::Route(route)) = objects.get(&route_key(dst)) else {
        return (None, Hop::NoRoute);
    };
    let (gateway, dev) = match &route.target {
        RouteTarget::Gateway { gateway, dev, .. } => (*gateway, *dev),
        RouteTarget::Nexthop(id) => match objects.get(&ObjectKey::Nexthop(*id)) {
            Some(Object::Nexthop(nexthop)) => (nexthop.gateway, nexthop.dev),
            _ => return (None, Hop::Broken("no nexthop")),
        },
        RouteTarget::Device(dev) => return (Some(*dev), datagrams(objects, *dev, dst)),
        _ => return (None, Hop::Broken("a route to nowhere")),
    };
    if dev.as_str() == "eth0" {
        return (Some(dev), Hop::Direct(gateway));
    }
    let Some(Object::Neighbour(neighbour)) =
        objects.get(&ObjectKey::Neighbour { dev, ip: gateway })
    else {
        return (Some(dev), Hop::Broken("no neighbour"));
    };
    let mac = neighbour.mac;
    match objects.get(&ObjectKey::Fdb { dev, mac }) {
        Some(Object::Fdb(fdb)) => (Some(dev), Hop::Tunnel(mac, fdb.remote)),
        _ => (Some(dev), Hop::Broken("no forwarding entry")),
    }
}

fn datagrams(objects: &Objects, dev: IfName, subnet: Subnet) -> Hop {
    if !objects.contains_key(&ObjectKey::Tunnel(dev)) {
        return Hop::Broken("no packet path");
    }
    match objects.get(&ObjectKey::TunnelPeer { dev, subnet }) {
        Some(Object::TunnelPeer(peer)) => Hop::Datagrams(peer.endpoint),
        _ => Hop::Broken("no peer of the packet path"),
    }
}

/// The devices of which something is dropped in a plan.
pub(crate) fn disrupted(plan: &Plan) -> BTreeSet<IfName> {
    plan.steps
        .iter()
        .filter(|step| !step.disrupts.is_empty())
        .filter_map(|step| step.op.object().dev())
        .collect()
}

/// The subnets of all slots.
pub(crate) fn subnets() -> impl Iterator<Item = Subnet> {
    Family::ALL
        .into_iter()
        .flat_map(|family| (2..12).map(move |slot| slot_subnet(family, slot)))
}
