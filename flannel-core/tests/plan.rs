//! The laws of the plan, on a kernel that has Linux's rules.

#[path = "plan/golden.rs"]
mod golden;
#[path = "plan/marks.rs"]
mod marks;
#[path = "plan/world.rs"]
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use flannel_core::reconcile::desired::{Desired, Wanted};
use flannel_core::reconcile::ownership::{Owner, nexthop_id};
use flannel_core::reconcile::plan::{Blocked, Plan, Why, plan, plan_keys, teardown};
use flannel_core::{
    Address, BackendType, Family, IfName, Kernel, Link, LinkKind, MAIN_TABLE, Object, ObjectKey,
    Objects, Observed, Op, OverlayName, Route, RouteProtocol, RouteTarget,
};
use flannel_testkit::fake_kernel::{Failure, FakeKernel, FaultKind};
use flannel_testkit::strategies::objects::{
    NodeSpec, any_object, differing, if_name, ip, node_spec, ownership, public_ip, slot_subnet,
};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::Index;
use world::*;

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

    /// A route that is spared stays with all that it needs, whatever is looked at, and goes once it
    /// is not spared any more.
    #[test]
    fn what_is_spared_stays_whole(spec in node_spec(), which in any::<Index>(), adopt in any::<bool>()) {
        let (kernel, ownership) = (FakeKernel::new(), ownership(adopt));
        let all = spec.desired();
        converge(&kernel, &all, &ownership);
        let routes: Vec<_> = all.objects.keys().filter(|key| key.kind() == "route").collect();
        prop_assume!(!routes.is_empty());
        let route = (*which.get(&routes)).clone();
        let ObjectKey::Route { dst, .. } = &route else { unreachable!("it is a route") };

        let mut without = all.clone();
        let mut open = vec![route.clone()];
        while let Some(key) = open.pop() {
            let others = without.objects.iter().filter(|(other, _)| **other != key);
            let is_needed = others.clone().any(|(_, other)| other.object.needs().contains(&key));
            if !matches!(key, ObjectKey::Link(_)) && !is_needed
                && let Some(gone) = without.objects.remove(&key)
            {
                open.extend(gone.object.needs());
            }
        }
        let observed = observe(&kernel, &all);
        let gone = plan(&observed, &without, &ownership);
        prop_assert!(gone.steps.iter().any(|step| step.op.key() == route), "{:?}", gone);

        without.spared = vec![*dst];
        let kept = plan(&observed, &without, &ownership);
        prop_assert!(kept.steps.is_empty(), "{:?}", kept.steps);
        for key in observed.objects.keys() {
            let part = plan_keys(&observed, &without, &ownership, &BTreeSet::from([key.clone()]));
            prop_assert!(part.steps.is_empty(), "{key}: {:?}", part.steps);
        }
    }

    #[test]
    fn it_converges_under_finite_faults(
        world in world(),
        faults in vec((any::<Index>(), any::<Index>(), 0..6_usize), 0..6),
    ) {
        let (kernel, ownership, _) = world.build();
        let desired = world.after.desired();
        let kinds =
            ["link", "address", "tunnel", "tunnel-peer", "fdb", "neighbour", "nexthop", "route"];
        let failures = [Failure::Busy, Failure::Exists, Failure::NotFound, Failure::TimedOut];
        let dev = world.after.dev(Family::V4);
        let dev_is_foreign = world.foreign.iter().any(|o| o.key() == ObjectKey::Link(dev));
        for (which, kind, after) in &faults {
            kernel.fail_next(match which.index(4) {
                0 if !dev_is_foreign => FaultKind::DeviceDeleted { dev, after: *after },
                1 => FaultKind::Observe { failure: Failure::Interrupted },
                2 => FaultKind::ApplyTimesOut { after: *after },
                _ => FaultKind::Op { kind: kinds[kind.index(kinds.len())], failure: *kind.get(&failures) },
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
        let desired = world.after.desired();
        let before = observe(&kernel, &desired);
        // No route of others leads to a node.
        let may_take_over = |object: &Object| {
            let wanted = desired.objects.get(&object.key());
            ownership.may_take_over(object, &before) && !matches!(object, Object::Route(_))
                || wanted.is_some_and(|w| ownership.lost_its_number(&w.object, object, &before))
        };
        let plan = plan_now(&kernel, &world.after.desired(), &ownership);
        let dropped: BTreeSet<_> = plan.steps.iter().flat_map(|step| &step.disrupts).collect();
        for step in &plan.steps {
            let object = step.op.object();
            let taken_over = foreign.get(&step.op.key()).is_none_or(may_take_over);
            prop_assert!(taken_over, "{} {}", step.op.verb(), object);
            apply(&kernel, step);
        }
        for (key, object) in &foreign {
            let goes_with_its_device = dropped.contains(key) && key.kind() != "link";
            if !goes_with_its_device && !may_take_over(object) {
                prop_assert_eq!(kernel.get(key), Some(object.clone()));
            }
        }
    }

    #[test]
    fn nothing_is_made_but_what_is_desired(world in world()) {
        let (kernel, ownership, _) = world.build();
        let desired = world.after.desired();
        let steps = plan_now(&kernel, &desired, &ownership).steps;
        for (at, step) in steps.iter().enumerate() {
            if let (Why::Stopgap { .. }, Op::Create(object)) = (&step.why, &step.op) {
                let removed = steps.get(at + 2).map(|step| &step.op);
                prop_assert_eq!(removed, Some(&Op::Delete(object.clone())));
            } else if let Op::Create(object) | Op::Change(object) = &step.op {
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
    fn while_devices_are_held_none_that_is_unwanted_is_removed(world in world()) {
        let (kernel, ownership, _) = world.build();
        let held_backends = [BackendType::vxlan(), BackendType::udp()].into();
        let desired = Desired { held_backends, ..world.after.desired() };
        let plan = converge(&kernel, &desired, &ownership);
        let wants = |dev| desired.objects.contains_key(&ObjectKey::Link(dev));
        for step in plan.steps.iter().filter(|step| step.why == Why::Orphan) {
            let object = step.op.object();
            if let Object::Link(_) | Object::Address(_) | Object::Tunnel(_) = object {
                prop_assert!(object.dev().is_some_and(wants), "removes {}", object);
            }
        }
        // All else is as if they were not held, and they go as soon as they are let go.
        let free = Desired { held_backends: BTreeSet::new(), ..desired };
        let rest = converge(&kernel, &free, &ownership);
        for step in &rest.steps {
            prop_assert!(step.why == Why::Orphan, "{:?}", step);
            prop_assert!(matches!(
                step.op.object(),
                Object::Link(_) | Object::Address(_) | Object::Tunnel(_) | Object::TunnelPeer(_)
            ));
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
    fn a_plan_of_what_differs_is_the_whole_plan_while_devices_are_held(
        world in world(),
        third in node_spec(),
        slot in 2..12_u8,
    ) {
        let (kernel, ownership, _) = World { mishaps: Vec::new(), ..world.clone() }.build();
        let held = |spec: &NodeSpec| {
            let mut desired = spec.desired();
            desired.held_backends = [BackendType::vxlan(), BackendType::udp()].into();
            desired
        };
        let before = held(&world.after);
        for step in plan_now(&kernel, &before, &ownership).steps {
            apply(&kernel, &step);
        }
        // The node had another subnet before, which may become a peer's.
        let (dev, subnet) = (world.before.dev(Family::V4), slot_subnet(Family::V4, slot));
        let address = Address::of_tunnel(dev, subnet);
        let _ = kernel.insert_foreign(Object::Address(address));
        let mut after = world.after.clone();
        after.peers = third.peers;
        let desired = held(&after);
        let at_first = plan_now(&kernel, &before, &ownership);
        let is_route = |blocked: &Blocked| matches!(blocked.wanted, Object::Route(_));
        prop_assume!(at_first.foreign.iter().all(is_route));
        let observed = observe(&kernel, &desired);
        let mut keys = differing(&plain(&before), &plain(&desired));
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
            prop_assert!(matches!(hop, Hop::Direct(_) | Hop::Tunnel(..) | Hop::Datagrams(_)), "{:?}", hop);
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
            if !dropped.contains(key) || key.kind() == "link" {
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
        let spec = NodeSpec { named_after_vni: true, udp: false, ..spec };
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
                // A route to a node on the link gets our mark, and leads where it led.
                Op::Change(Object::Route(route)) => {
                    let is_mark = matches!(&step.why,
                        Why::Drifted { field } if field.starts_with("protocol"));
                    prop_assert!(is_mark, "{:?}", step);
                    prop_assert_eq!(Object::Route(route.clone()).dev(), IfName::new("eth0").ok());
                }
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
    fn a_boot_route_is_taken_over_only_where_it_leads_to_the_same_node(
        spec in node_spec(),
        slot in any::<Index>(),
        (others, adopt) in any::<(bool, bool)>(),
    ) {
        prop_assume!(!spec.peers.is_empty());
        let peers: Vec<_> = spec.peers.iter().collect();
        let (slot, (node, _)) = *slot.get(&peers);
        let kernel = FakeKernel::node(1);
        let theirs = Object::Route(Route {
            table: MAIN_TABLE,
            dst: slot_subnet(Family::V4, *slot),
            metric: 0,
            target: RouteTarget::Gateway {
                gateway: public_ip(Family::V4, node + if others { 100 } else { 0 }),
                dev: IfName::new("eth0").expect("a name"),
                onlink: false,
            },
            protocol: RouteProtocol::BOOT, source: None });
        kernel.insert_foreign(theirs.clone()).expect("it fits");
        let ownership = ownership(adopt);
        let plan = converge(&kernel, &spec.desired(), &ownership);
        let now = kernel.get(&theirs.key()).expect("it is never removed");
        if adopt && !others {
            prop_assert_eq!(ownership.owner(&now, &observe(&kernel, &spec.desired())), Owner::Ours);
            prop_assert_eq!(plan.foreign, Vec::new());
            let left = Desired::default();
            converge(&kernel, &left, &ownership);
            prop_assert_eq!(kernel.get(&theirs.key()), None, "ours is swept");
        } else {
            prop_assert_eq!(&now, &theirs);
            prop_assert_eq!(&plan.foreign[0].found, &theirs);
        }
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
                        || found.is_some_and(|found| {
                            ownership.may_take_over(found, &observed)
                                || ownership.lost_its_number(object, found, &observed)
                        }),
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

/// A node with one peer, in both families.
fn one_peer() -> NodeSpec {
    NodeSpec {
        vni: 1,
        port: 8472,
        named_after_vni: true,
        mtu: 1400,
        mac: 1,
        learning: false,
        ipv6: true,
        udp: false,
        nexthops: true,
        peers: BTreeMap::from([(2, (2, false))]),
    }
}

fn link_mut(desired: &mut Desired, dev: IfName) -> &mut Link {
    match desired.objects.get_mut(&ObjectKey::Link(dev)) {
        Some(Wanted {
            object: Object::Link(link),
            ..
        }) => link,
        other => unreachable!("{dev} is wanted: {other:?}"),
    }
}

#[test]
fn a_device_that_something_wanted_is_on_is_not_removed() {
    let spec = one_peer();
    let (kernel, ownership, mut desired) = (FakeKernel::new(), ownership(false), spec.desired());
    converge(&kernel, &desired, &ownership);
    desired
        .objects
        .remove(&ObjectKey::Link(spec.dev(Family::V4)));
    assert_eq!(plan_now(&kernel, &desired, &ownership), Plan::default());
}

#[test]
fn a_device_is_made_after_the_one_it_is_bound_to() {
    let spec = one_peer();
    let (kernel, ownership, mut desired) = (FakeKernel::new(), ownership(false), spec.desired());
    let under = Link {
        name: IfName::new("under0").expect("a device name"),
        kind: LinkKind::Bridge,
        mac: None,
        mtu: Some(1500),
        ..link_mut(&mut desired, spec.dev(Family::V4)).clone()
    };
    for family in Family::ALL {
        if let LinkKind::Vxlan(vxlan) = &mut link_mut(&mut desired, spec.dev(family)).kind {
            vxlan.underlay = Some(under.name);
        }
    }
    let under = Wanted {
        object: Object::Link(under),
        peer: None,
    };
    desired.objects.insert(under.object.key(), under);
    converge(&kernel, &desired, &ownership);
    let observed = observe(&kernel, &Desired::default());
    let plan = teardown(&observed, &ownership);
    assert_eq!(
        plan.steps.len(),
        1,
        "the bound devices go with it: {plan:#?}"
    );
    for step in &plan.steps {
        apply(&kernel, step);
    }
    assert_eq!(
        differing(&kernel.objects(), &FakeKernel::new().objects()),
        BTreeSet::new()
    );
}

#[test]
fn what_a_device_set_down_loses_is_made_again_where_it_can_be() {
    let spec = one_peer();
    let (kernel, ownership, mut desired) = (FakeKernel::new(), ownership(false), spec.desired());
    converge(&kernel, &desired, &ownership);
    let dev = spec.dev(Family::V6);
    link_mut(&mut desired, dev).up = false;
    desired
        .objects
        .retain(|key, _| !matches!(key.kind(), "nexthop" | "route"));
    let plan = converge(&kernel, &desired, &ownership);
    let kinds: Vec<_> = plan
        .steps
        .iter()
        .filter(|step| step.op.object().dev() == Some(dev))
        .map(|step| (step.op.verb(), step.op.key().kind()))
        .collect();
    let expected = [
        ("change", "link"),
        ("create", "address"),
        ("create", "neighbour"),
    ];
    assert_eq!(kinds, expected);
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
