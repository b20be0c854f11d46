//! Marks that somebody took from what is ours, and what only looks like ours.

use std::collections::BTreeSet;

use flannel_core::reconcile::known::KnownLink;
use flannel_core::reconcile::ownership::Owner;
use flannel_core::{
    IfName, Link, Nexthop, Object, ObjectKey, Observed, Op, Route, RouteProtocol, RouteTarget,
};
use flannel_testkit::fake_kernel::FakeKernel;
use flannel_testkit::strategies::objects::{node_spec, ownership};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::world::{converge, observe};

proptest! {
    #[test]
    fn what_lost_nothing_but_its_mark_is_mended_in_place(
        spec in node_spec(),
        taken in vec(any::<Index>(), 1..6),
        number in 1..240_u8,
    ) {
        let kernel = FakeKernel::new();
        let desired = spec.desired();
        let mut ownership = ownership(false);
        converge(&kernel, &desired, &ownership);
        let right = observe(&kernel, &desired);
        ownership.known = known_links(&right);
        let marked: Vec<&ObjectKey> = right.objects.iter().filter(|(key, object)| {
            let is_marked = matches!(object, Object::Link(_) | Object::Nexthop(_) | Object::Route(_));
            is_marked && desired.objects.contains_key(key) && goes_with_what_is_ours(object, &right)
        }).map(|(key, _)| key).collect();
        prop_assume!(!marked.is_empty());
        let taken: BTreeSet<&ObjectKey> = taken.iter().map(|which| *which.get(&marked)).collect();
        for key in &taken {
            take_mark(&kernel, &right.objects[*key], RouteProtocol(number));
        }
        let plan = converge(&kernel, &desired, &ownership);
        prop_assert_eq!(&plan.foreign, &Vec::new());
        for step in &plan.steps {
            prop_assert!(matches!(step.op, Op::Change(_)), "{:?}", step);
            prop_assert!(taken.contains(&step.op.key()), "{:?}", step);
            prop_assert_eq!(&step.disrupts, &Vec::new());
        }
        prop_assert_eq!(observe(&kernel, &desired).objects, right.objects);
    }

    #[test]
    fn a_device_that_came_in_the_place_of_a_known_one_is_not_ours(spec in node_spec(), adopt in any::<bool>()) {
        let kernel = FakeKernel::new();
        let desired = spec.desired();
        let mut ownership = ownership(adopt);
        converge(&kernel, &desired, &ownership);
        ownership.known = known_links(&observe(&kernel, &desired));
        let ours: Vec<Link> = ownership.known.iter().map(|known| known.link.clone()).collect();
        for link in ours {
            kernel.delete_link(link.name);
            let alias = Some("somebody\u{2019}s".to_owned());
            let theirs = Object::Link(Link { alias, ..link.clone() });
            kernel.insert_foreign(theirs).expect("its place is free");
            let observed = observe(&kernel, &desired);
            let found = &observed.objects[&ObjectKey::Link(link.name)];
            prop_assert_eq!(ownership.owner(found, &observed), Owner::Foreign);
        }
    }
}

/// The devices of the overlay that are there, as an engine that has seen them knows them.
fn known_links(observed: &Observed) -> Vec<KnownLink> {
    let links = observed.objects.values().filter_map(|object| match object {
        Object::Link(link) if link.alias.is_some() => Some(link),
        _ => None,
    });
    let known = links.filter_map(|link| {
        let info = observed.links.iter().find(|info| info.name == link.name)?;
        let (index, link) = (info.index, link.clone());
        Some(KnownLink { index, link })
    });
    known.collect()
}

/// Tells if an object is a device, or goes with a device or a nexthop object: all but a route
/// straight to a gateway on the underlay, of which only the one who made it knows.
fn goes_with_what_is_ours(object: &Object, observed: &Observed) -> bool {
    let is_ours = |dev: &IfName| {
        let link = observed.objects.get(&ObjectKey::Link(*dev));
        matches!(link, Some(Object::Link(Link { alias: Some(_), .. })))
    };
    match object {
        Object::Route(route) => match &route.target {
            RouteTarget::Gateway { dev, .. } | RouteTarget::Device(dev) => is_ours(dev),
            RouteTarget::Nexthop(_) => true,
            _ => false,
        },
        _ => true,
    }
}

fn take_mark(kernel: &FakeKernel, object: &Object, number: RouteProtocol) {
    let taken = match object {
        Object::Link(link) => return kernel.set_alias(link.name, None),
        Object::Nexthop(nexthop) => Object::Nexthop(Nexthop {
            protocol: number,
            ..nexthop.clone()
        }),
        Object::Route(route) => Object::Route(Route {
            protocol: number,
            ..route.clone()
        }),
        other => other.clone(),
    };
    kernel.external(&Op::Change(taken)).expect("anybody may");
}
