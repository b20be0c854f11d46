//! The laws of the plan, on a kernel that has Linux's rules.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use flannel_core::kernel::Error;
use flannel_core::reconcile::desired::{Desired, Wanted};
use flannel_core::reconcile::ownership::{Owner, Ownership, nexthop_id};
use flannel_core::reconcile::plan::{Plan, Step, Why, difference, plan, plan_keys, teardown};
use flannel_core::{
    Family, IfName, Kernel, MAIN_TABLE, MacAddr, Object, ObjectKey, Objects, Observed, Op,
    OverlayName, Route, RouteTarget, Scope, Subnet,
};
use flannel_testkit::fake_kernel::{Failure, FakeKernel, FaultKind};
use flannel_testkit::strategies::objects::{
    Mishap, NodeSpec, altered, any_object, differing, foreign, if_name, ip, mishap, node_spec,
    ownership, slot_subnet,
};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::Index;

/// The result of a future that never waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    match future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("a fake kernel without latency answers at once"),
    }
}

fn try_observe(kernel: &FakeKernel, desired: &Desired) -> Result<Observed, Error> {
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

fn observe(kernel: &FakeKernel, desired: &Desired) -> Observed {
    try_observe(kernel, desired).expect("no fault is set")
}

fn plan_now(kernel: &FakeKernel, desired: &Desired, ownership: &Ownership) -> Plan {
    plan(&observe(kernel, desired), desired, ownership)
}

/// Applies a step that must succeed.
fn apply(kernel: &FakeKernel, step: &Step) {
    for result in now(kernel.apply(std::slice::from_ref(&step.op))) {
        if let Err(error) = result {
            panic!("{} {}: {error}", step.op.verb(), step.op.object());
        }
    }
}

/// Applies a plan, of which every step must succeed, and checks that nothing is left to do.
fn converge(kernel: &FakeKernel, desired: &Desired, ownership: &Ownership) -> Plan {
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
struct World {
    before: NodeSpec,
    after: NodeSpec,
    foreign: Vec<Object>,
    mishaps: Vec<Mishap>,
    adopt_flannel: bool,
}

fn world() -> impl Strategy<Value = World> {
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
fn mixed(before: &NodeSpec, other: NodeSpec, keep: [bool; 4]) -> NodeSpec {
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
    fn build(&self) -> (FakeKernel, Ownership, Objects) {
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
            .map(|(_, found)| (found.key(), found))
            .collect();
        (kernel, ownership, foreign)
    }
}

fn befall(kernel: &FakeKernel, there: &[Object], mishap: &Mishap) {
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
enum Hop {
    NoRoute,
    /// To a node, without tunnel.
    Direct(IpAddr),
    /// Through the tunnel to a VTEP behind a public address.
    Tunnel(MacAddr, IpAddr),
    Broken(&'static str),
}

fn route_key(dst: Subnet) -> ObjectKey {
    ObjectKey::Route {
        table: MAIN_TABLE,
        dst,
        metric: Route::default_metric(dst.family()),
    }
}

fn hop(objects: &Objects, dst: Subnet) -> (Option<IfName>, Hop) {
    let Some(Object::Route(route)) = objects.get(&route_key(dst)) else {
        return (None, Hop::NoRoute);
    };
    let (gateway, dev) = match &route.target {
        RouteTarget::Gateway { gateway, dev, .. } => (*gateway, *dev),
        RouteTarget::Nexthop(id) => match objects.get(&ObjectKey::Nexthop(*id)) {
            Some(Object::Nexthop(nexthop)) => (nexthop.gateway, nexthop.dev),
            _ => return (None, Hop::Broken("no nexthop")),
        },
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

/// The devices of which something is dropped in a plan.
fn disrupted(plan: &Plan) -> BTreeSet<IfName> {
    plan.steps
        .iter()
        .filter(|step| !step.disrupts.is_empty())
        .filter_map(|step| step.op.object().dev())
        .collect()
}

/// The subnets of all slots.
fn subnets() -> impl Iterator<Item = Subnet> {
    Family::ALL
        .into_iter()
        .flat_map(|family| (2..12).map(move |slot| slot_subnet(family, slot)))
}

proptest! {
    #[test]
    fn one_plan_leads_from_any_state_to_the_desired_one(world in world()) {
        let (kernel, ownership, _) = world.build();
        let desired = world.after.desired();
        let plan = converge(&kernel, &desired, &ownership);
        prop_assert!(!world.foreign.is_empty() || plan.foreign.is_empty(), "{:?}", plan.foreign);
        if plan.foreign.is_empty() {
            for (key, wanted) in &desired.objects {
                let there = kernel.get(key).is_some();
                prop_assert!(there, "nothing is blocked, but not there: {}", wanted.object);
            }
        }
    }

    #[test]
    fn it_converges_under_finite_faults(
        world in world(),
        faults in vec((any::<Index>(), any::<Index>(), 0..6_usize), 0..6),
    ) {
        let (kernel, ownership, _) = world.build();
        let desired = world.after.desired();
        let kinds = ["link", "address", "fdb", "neighbour", "nexthop", "route"];
        let failures = [Failure::Busy, Failure::Exists, Failure::NotFound, Failure::TimedOut];
        let dev = world.after.dev(Family::V4);
        let dev_is_foreign = world.foreign.iter().any(|o| o.key() == ObjectKey::Link(dev));
        for (which, kind, after) in &faults {
            kernel.fail_next(match which.index(4) {
                0 if !dev_is_foreign => FaultKind::DeviceDeleted { dev, after: *after },
                1 => FaultKind::Observe { failure: Failure::Interrupted },
                2 => FaultKind::ApplyTimesOut { after: *after },
                _ => FaultKind::Op { kind: *kind.get(kinds.as_slice()), failure: *kind.get(&failures) },
            });
        }
        let mut left = true;
        for _ in 0..faults.len() * 2 + 3 {
            let Ok(observed) = try_observe(&kernel, &desired) else { continue };
            let plan = plan(&observed, &desired, &ownership);
            left = !plan.steps.is_empty();
            if !left {
                break;
            }
            let ops: Vec<_> = plan.steps.into_iter().map(|step| step.op).collect();
            let results = now(kernel.apply(&ops));
            prop_assert_eq!(results.len(), ops.len());
        }
        prop_assert!(!left, "still not converged");
    }

    #[test]
    fn a_path_that_stays_is_whole_after_every_step(world in world()) {
        let (kernel, ownership, _) = world.build();
        let plan = plan_now(&kernel, &world.after.desired(), &ownership);
        let disrupted = disrupted(&plan);
        let mut states = vec![kernel.objects()];
        for step in &plan.steps {
            apply(&kernel, step);
            states.push(kernel.objects());
        }
        for dst in subnets() {
            let hops: Vec<_> = states.iter().map(|objects| hop(objects, dst)).collect();
            let (Some((Some(dev), first)), Some((_, last))) = (hops.first(), hops.last()) else {
                continue;
            };
            if first == last && !matches!(first, Hop::Broken(_)) && !disrupted.contains(dev) {
                for (_, hop) in &hops {
                    prop_assert_eq!(hop, first, "{} after a step of {:#?}", dst, plan.steps);
                }
            }
        }
    }

    #[test]
    fn no_route_stands_without_its_neighbour_and_forwarding_entry(world in world()) {
        let (kernel, ownership, _) = world.build();
        let plan = plan_now(&kernel, &world.after.desired(), &ownership);
        let foreign: BTreeSet<_> = world.foreign.iter().map(Object::key).collect();
        let is_broken = |objects: &Objects, dst| matches!(hop(objects, dst).1, Hop::Broken(_));
        let at_first = kernel.objects();
        let mut disrupted = BTreeSet::new();
        for step in &plan.steps {
            apply(&kernel, step);
            if !step.disrupts.is_empty() {
                disrupted.extend(step.op.object().dev());
            }
            let objects = kernel.objects();
            for dst in subnets().filter(|dst| !is_broken(&at_first, *dst)) {
                let (dev, hop) = hop(&objects, dst);
                let excused = dev.is_some_and(|dev| disrupted.contains(&dev))
                    || foreign.contains(&route_key(dst));
                prop_assert!(
                    excused || !matches!(hop, Hop::Broken(_)),
                    "{} is {:?} after {} {}", dst, hop, step.op.verb(), step.op.object()
                );
            }
        }
    }

    #[test]
    fn moving_a_subnet_never_opens_a_black_hole(
        before in node_spec(),
        peers in btree_map(2..12_u8, (2..9_u8, any::<bool>()), 0..6),
        other_device in any::<bool>(),
        nexthops in any::<bool>(),
    ) {
        let before = NodeSpec { named_after_vni: true, ..before };
        let after = NodeSpec {
            peers,
            nexthops,
            vni: if other_device { before.vni + 1 } else { before.vni },
            ..before.clone()
        };
        let (kernel, ownership) = (FakeKernel::new(), ownership(false));
        converge(&kernel, &before.desired(), &ownership);
        let old = kernel.objects();
        let plan = plan_now(&kernel, &after.desired(), &ownership);
        let mut states = Vec::new();
        for step in &plan.steps {
            apply(&kernel, step);
            states.push(kernel.objects());
        }
        let new = kernel.objects();
        for dst in subnets() {
            let (old, new) = (hop(&old, dst).1, hop(&new, dst).1);
            if old == Hop::NoRoute || new == Hop::NoRoute {
                continue;
            }
            for (objects, step) in states.iter().zip(&plan.steps) {
                let hop = hop(objects, dst).1;
                prop_assert!(
                    hop == old || hop == new,
                    "{} goes to {:?}, neither {:?} nor {:?}, after {} {}",
                    dst, hop, old, new, step.op.verb(), step.op.object()
                );
            }
        }
    }

    #[test]
    fn foreign_objects_are_left_as_they_are(world in world()) {
        let (kernel, ownership, foreign) = world.build();
        let before = observe(&kernel, &world.after.desired());
        let may_take_over = |object: &Object| ownership.may_take_over(object, &before);
        let plan = plan_now(&kernel, &world.after.desired(), &ownership);
        let dropped: BTreeSet<_> = plan.steps.iter().flat_map(|step| &step.disrupts).collect();
        for step in &plan.steps {
            let object = step.op.object();
            let taken_over = foreign.get(&step.op.key()).is_none_or(may_take_over);
            prop_assert!(taken_over, "{} {}", step.op.verb(), object);
            apply(&kernel, step);
        }
        for (key, object) in &foreign {
            if !dropped.contains(key) && !may_take_over(object) {
                prop_assert_eq!(kernel.get(key), Some(object.clone()));
            }
        }
    }

    #[test]
    fn nothing_is_made_but_what_is_desired(world in world()) {
        let (kernel, ownership, _) = world.build();
        let desired = world.after.desired();
        for step in plan_now(&kernel, &desired, &ownership).steps {
            if let Op::Create(object) | Op::Change(object) = &step.op {
                let wanted = desired.objects.get(&object.key()).map(|wanted| &wanted.object);
                prop_assert_eq!(wanted, Some(object));
            }
        }
    }

    #[test]
    fn while_orphans_are_held_none_is_removed(world in world()) {
        let (kernel, ownership, _) = world.build();
        let desired = Desired { hold_orphans: true, ..world.after.desired() };
        for step in converge(&kernel, &desired, &ownership).steps {
            prop_assert_ne!(step.why, Why::Orphan);
        }
    }

    #[test]
    fn a_plan_of_what_differs_is_the_whole_plan(world in world(), same in any::<bool>()) {
        let (kernel, ownership, _) = World { mishaps: Vec::new(), ..world.clone() }.build();
        let before = world.before.desired();
        let base = observe(&kernel, &before);
        let at_first = plan(&base, &before, &ownership);
        let foreign: BTreeSet<_> = world.foreign.iter().map(Object::key).collect();
        for mishap in &world.mishaps {
            let there: Vec<_> = before
                .objects
                .keys()
                .filter(|key| !foreign.contains(key))
                .filter_map(|key| kernel.get(key))
                .collect();
            befall(&kernel, &there, mishap);
        }
        let desired = if same { before.clone() } else { world.after.desired() };
        let observed = observe(&kernel, &desired);
        let mut keys = differing(&base.objects, &observed.objects);
        keys.extend(differing(&plain(&before), &plain(&desired)));
        keys.extend(at_first.foreign.iter().map(|blocked| blocked.wanted.key()));
        keys.extend(at_first.steps.iter().map(|step| step.op.key()));
        let whole = plan(&observed, &desired, &ownership);
        prop_assert_eq!(plan_keys(&observed, &desired, &ownership, &keys), whole);
    }

    #[test]
    fn a_plan_of_a_route_makes_all_that_the_route_needs(spec in node_spec()) {
        let (kernel, ownership, desired) = (FakeKernel::new(), ownership(false), spec.desired());
        for dst in subnets().filter(|dst| desired.objects.contains_key(&route_key(*dst))) {
            let observed = observe(&kernel, &desired);
            for step in plan_keys(&observed, &desired, &ownership, &[route_key(dst)].into()).steps {
                apply(&kernel, &step);
            }
            let hop = hop(&kernel.objects(), dst).1;
            prop_assert!(matches!(hop, Hop::Direct(_) | Hop::Tunnel(..)), "{:?}", hop);
        }
    }

    #[test]
    fn a_plan_of_no_keys_is_empty(world in world()) {
        let (kernel, ownership, _) = world.build();
        let desired = world.after.desired();
        let observed = observe(&kernel, &desired);
        let none = plan_keys(&observed, &desired, &ownership, &BTreeSet::new());
        prop_assert_eq!(none, Plan::default());
    }

    #[test]
    fn teardown_leaves_what_was_there_before(world in world()) {
        let kernel = FakeKernel::new();
        let ownership = ownership(false);
        for object in &world.foreign {
            let _ = kernel.insert_foreign(object.clone());
        }
        let before = kernel.objects();
        converge(&kernel, &world.before.desired(), &ownership);
        let observed = observe(&kernel, &Desired::default());
        for step in teardown(&observed, &ownership).steps {
            apply(&kernel, &step);
        }
        prop_assert_eq!(differing(&before, &kernel.objects()), BTreeSet::new());
        let observed = observe(&kernel, &Desired::default());
        prop_assert_eq!(teardown(&observed, &ownership), Plan::default());
    }

    #[test]
    fn teardown_of_a_torn_node_removes_all_of_ours_and_no_more(world in world()) {
        let (kernel, ownership, foreign) = world.build();
        let observed = observe(&kernel, &Desired::default());
        let plan = teardown(&observed, &ownership);
        let dropped: BTreeSet<_> = plan.steps.iter().flat_map(|step| &step.disrupts).collect();
        for step in &plan.steps {
            prop_assert!(matches!(step.op, Op::Delete(_)));
            apply(&kernel, step);
        }
        for (key, object) in &foreign {
            if !dropped.contains(key) {
                prop_assert_eq!(kernel.get(key), Some(object.clone()));
            }
        }
        let observed = observe(&kernel, &Desired::default());
        let bound_to = IfName::new("flannel.1").ok();
        let is_bound_to = foreign.values().any(|o| o.needs().iter().any(|need| {
            Some(need) == bound_to.map(ObjectKey::Link).as_ref() && matches!(o, Object::Link(_))
        }));
        for object in observed.objects.values() {
            let ours = ownership.owner(object, &observed) == Owner::Ours;
            prop_assert!(!ours || (is_bound_to && object.dev() == bound_to), "{} is left", object);
        }
    }

    #[test]
    fn what_go_flannel_left_is_adopted_untouched(spec in node_spec(), stale in 20..30_u8) {
        let spec = NodeSpec { named_after_vni: true, ..spec };
        let kernel = FakeKernel::new();
        let insert = |object: Object| match object {
            Object::Sysctl(_) => kernel.external(&Op::Change(object)),
            object => kernel.insert_foreign(object),
        };
        for object in spec.left_by_go_flannel() {
            insert(object).expect("Go flannel could make it");
        }
        let gone = NodeSpec {
            peers: BTreeMap::from([(stale, (stale, false))]),
            ..spec.clone()
        };
        let mut left_over = BTreeSet::new();
        for object in gone.left_by_go_flannel() {
            if kernel.get(&object.key()).is_none() {
                left_over.insert(object.key());
                insert(object).expect("Go flannel could make it");
            }
        }
        let plan = converge(&kernel, &spec.desired(), &ownership(true));
        for step in &plan.steps {
            prop_assert!(step.disrupts.is_empty());
            match &step.op {
                Op::Change(Object::Link(_)) => {
                    let is_alias = matches!(&step.why,
                        Why::Drifted { field } if field.starts_with("alias"));
                    prop_assert!(is_alias, "{:?}", step);
                }
                Op::Create(Object::Nexthop(_)) => prop_assert!(spec.nexthops),
                Op::Delete(object) => {
                    prop_assert!(left_over.remove(&object.key()), "removes {}", object);
                }
                op => prop_assert!(false, "{} {}", op.verb(), op.object()),
            }
        }
        prop_assert_eq!(left_over, BTreeSet::new());
        prop_assert_eq!(plan.foreign, Vec::new());
    }

    #[test]
    fn no_input_panics_or_touches_what_is_foreign(
        there in vec(any_object(), 0..24),
        wanted in vec(any_object(), 0..24),
        misplaced in any::<(bool, bool)>(),
        hold_orphans in any::<bool>(),
        adopt_flannel in any::<bool>(),
    ) {
        let ownership = ownership(adopt_flannel);
        let mut observed = Observed::default();
        for object in there {
            observed.objects.insert(object.key(), object);
        }
        let mut desired = Desired { hold_orphans, ..Desired::default() };
        for object in wanted {
            desired.objects.insert(object.key(), Wanted { object, peer: None });
        }
        if misplaced.0 {
            rotate(&mut observed.objects);
        }
        if misplaced.1 {
            rotate(&mut desired.objects);
        }
        let whole = plan(&observed, &desired, &ownership);
        let mut free = BTreeSet::new();
        for step in &whole.steps {
            let key = step.op.key();
            let found = observed.objects.get(&key).filter(|found| found.key() == key);
            let owner = found.map(|found| ownership.owner(found, &observed));
            match &step.op {
                Op::Create(_) => {
                    prop_assert!(found.is_none() || free.contains(&key), "over {:?}", found);
                }
                Op::Change(object) => prop_assert!(
                    owner != Some(Owner::Foreign)
                        || free.contains(&key)
                        || found.is_some_and(|found| ownership.may_take_over(found, &observed)),
                    "alters {:?} to {}", found, object
                ),
                Op::Delete(object) => {
                    prop_assert_ne!(ownership.owner(object, &observed), Owner::Foreign);
                    free.insert(key);
                }
            }
            free.extend(step.disrupts.iter().cloned());
        }
        prop_assert_eq!(plan(&observed, &desired, &ownership), whole);
        let keys: BTreeSet<_> = observed.objects.keys().cloned().collect();
        plan_keys(&observed, &desired, &ownership, &keys);
        teardown(&observed, &ownership);
    }

    #[test]
    fn a_nexthop_id_follows_from_overlay_gateway_and_device(
        v4 in ip(Family::V4),
        v6 in ip(Family::V6),
        dev in if_name(),
    ) {
        let name = OverlayName::default();
        let other = OverlayName::new("other").expect("a name");
        let id = nexthop_id(&name, v4, dev, true);
        prop_assert!(id >= 1 << 31, "the lower half is left to others");
        prop_assert_eq!(id, nexthop_id(&name, v4, dev, true));
        prop_assert_ne!(id, nexthop_id(&other, v4, dev, true));
        prop_assert_ne!(id, nexthop_id(&name, v6, dev, true));
        prop_assert_ne!(id, nexthop_id(&name, v4, dev, false));
    }

    #[test]
    fn no_two_subnets_of_a_pool_share_a_nexthop_id(
        base in any::<u128>(),
        shift in 0_u32..=99,
        slots in (0_u32..1 << 29, 0_u32..1 << 29),
        v4_slots in (0_u32..1 << 24, 0_u32..1 << 24),
    ) {
        let (name, dev) = (OverlayName::default(), IfName::new("flannel.1").expect("a name"));
        let mask = ((1_u128 << 29) - 1) << shift;
        let v6 = |slot: u32| IpAddr::from((base & !mask | u128::from(slot) << shift).to_be_bytes());
        let v4 = |slot: u32| IpAddr::from((0x0a00_0000_u32 | slot).to_be_bytes());
        let id = |gateway| nexthop_id(&name, gateway, dev, true);
        prop_assert_eq!(id(v6(slots.0)) == id(v6(slots.1)), slots.0 == slots.1);
        prop_assert_eq!(id(v4(v4_slots.0)) == id(v4(v4_slots.1)), v4_slots.0 == v4_slots.1);
    }
}

#[test]
fn a_device_that_something_wanted_is_on_is_not_removed() {
    let spec = NodeSpec {
        vni: 1,
        port: 8472,
        named_after_vni: true,
        mtu: 1400,
        mac: 1,
        learning: false,
        ipv6: true,
        nexthops: true,
        peers: BTreeMap::from([(2, (2, false))]),
    };
    let (kernel, ownership, mut desired) = (FakeKernel::new(), ownership(false), spec.desired());
    converge(&kernel, &desired, &ownership);
    desired
        .objects
        .remove(&ObjectKey::Link(spec.dev(Family::V4)));
    assert_eq!(plan_now(&kernel, &desired, &ownership), Plan::default());
}

fn plain(desired: &Desired) -> Objects {
    desired
        .objects
        .iter()
        .map(|(key, wanted)| (key.clone(), wanted.object.clone()))
        .collect()
}

/// Puts every value under the key of another.
fn rotate<V>(map: &mut BTreeMap<ObjectKey, V>) {
    let (keys, mut values): (Vec<_>, Vec<_>) = std::mem::take(map).into_iter().unzip();
    if !values.is_empty() {
        values.rotate_left(1);
    }
    map.extend(keys.into_iter().zip(values));
}

mod golden {
    //! Golden triples: what is there, what is wanted, and the plan between them, as JSON. The files
    //! show what a plan looks like to a reader and to programs, and pin the serialised form.

    use std::fs;
    use std::path::{Path, PathBuf};

    use flannel_core::reconcile::desired::{Desired, Wanted};
    use flannel_core::reconcile::plan::{Plan, plan};
    use flannel_testkit::strategies::objects::ownership;
    use serde::de::DeserializeOwned;
    use serde::{Deserialize, Serialize};

    /// What is wanted, with what the plan is told of ownership beside the test kit's networks.
    #[derive(Serialize, Deserialize)]
    struct Case {
        /// What the case shows.
        about: String,
        adopt_flannel: bool,
        hold_orphans: bool,
        objects: Vec<Wanted>,
    }

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plan")
    }

    fn read<T: DeserializeOwned>(path: &Path) -> T {
        let text =
            fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[test]
    fn each_golden_state_and_wish_give_the_golden_plan() {
        let mut cases: Vec<_> = fs::read_dir(folder())
            .expect("the golden cases are there")
            .map(|entry| entry.expect("the folder can be listed").path())
            .collect();
        cases.sort();
        assert!(cases.len() >= 8, "only {} golden cases", cases.len());
        for case in cases {
            let observed = read(&case.join("observed.json"));
            let wish: Case = read(&case.join("desired.json"));
            let desired = Desired {
                objects: wish
                    .objects
                    .into_iter()
                    .map(|wanted| (wanted.object.key(), wanted))
                    .collect(),
                hold_orphans: wish.hold_orphans,
            };
            let made = plan(&observed, &desired, &ownership(wish.adopt_flannel));
            let golden: Plan = read(&case.join("plan.json"));
            assert_eq!(
                made,
                golden,
                "{} ({}); the plan is now: {}",
                case.display(),
                wish.about,
                serde_json::to_string_pretty(&made).expect("a plan can be written"),
            );
            let golden: serde_json::Value = read(&case.join("plan.json"));
            let written = serde_json::to_value(&made).expect("a plan can be written");
            assert_eq!(written, golden, "{}", case.display());
        }
    }
}
