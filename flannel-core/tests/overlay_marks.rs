//! The whole SDK on fakes: somebody takes the mark of what is ours, while a node runs and while it does
//! not; tokio's clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::net::IpAddr;
use std::time::Duration;

use common::*;
use flannel_backend_hostgw::HostGwBackend;
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    BackendType, ConditionType, DualStack, Family, Features, Lease, LeaseAttrs, Link,
    MemoryManager, Nexthop, Object, ObjectKey, Op, Overlay, OverlayBuilder, Route, RouteProtocol,
    RouteTarget, Subnet,
};
use flannel_testkit::fake_kernel::{Failure, FakeKernel};

const MINUTE: Duration = Duration::from_secs(60);
const THEIRS: RouteProtocol = RouteProtocol(4);

fn alias_of(kernel: &FakeKernel, name: &str) -> Option<String> {
    match kernel.get(&ObjectKey::Link(dev(name))) {
        Some(Object::Link(Link { alias, .. })) => alias,
        other => panic!("{other:?}"),
    }
}

fn route_numbered(kernel: &FakeKernel, object: Object) -> Object {
    let Object::Route(route) = object else {
        panic!("no route: {object}");
    };
    let theirs = Object::Route(Route {
        protocol: THEIRS,
        ..route
    });
    kernel
        .external(&Op::Change(theirs.clone()))
        .expect("anybody may");
    theirs
}

#[tokio::test(start_paused = true)]
async fn a_device_that_somebody_takes_the_mark_of_stays_ours() {
    let (_manager, kernels, [a, _b]) = pair().await;
    for alias in [None, Some("a VPN"), None] {
        let before = kernels[0].objects();
        kernels[0].take_log();
        for name in ["flannel.1", "flannel-v6.1"] {
            kernels[0].set_alias(dev(name), alias);
        }
        settle(&a).await;
        assert_eq!(kernels[0].objects(), before, "{alias:?}");
        let done = kernels[0].take_log();
        let in_place = |entry: &_| {
            matches!(
                entry,
                flannel_testkit::fake_kernel::LogEntry {
                    op: Op::Change(Object::Link(_)),
                    ..
                }
            )
        };
        assert!(done.len() == 2 && done.iter().all(in_place), "{done:?}");
        assert!(a.status().working && a.status().foreign.is_empty());
    }
    // That of another overlay is no empty mark.
    kernels[0].set_alias(dev("flannel.1"), Some("flannel:other"));
    tokio::time::sleep(MINUTE).await;
    assert_eq!(
        alias_of(&kernels[0], "flannel.1").as_deref(),
        Some("flannel:other")
    );
    assert!(!a.status().working);
}

#[tokio::test(start_paused = true)]
async fn what_lost_its_number_is_ours_by_the_device_or_id_that_it_goes_with() {
    let (_manager, kernels, [a, b]) = pair().await;
    let before = kernels[0].objects();
    for family in Family::ALL {
        let route = route_to(&kernels[0], subnet_of(&b, family)).expect("there");
        route_numbered(&kernels[0], route);
    }
    let nexthops = before.values().filter_map(|object| match object {
        Object::Nexthop(nexthop) => Some(nexthop.clone()),
        _ => None,
    });
    for nexthop in nexthops {
        let protocol = THEIRS;
        let theirs = Object::Nexthop(Nexthop {
            protocol,
            ..nexthop
        });
        kernels[0]
            .external(&Op::Change(theirs))
            .expect("anybody may");
    }
    settle(&a).await;
    assert_eq!(kernels[0].objects(), before);
    assert!(a.status().is_true(ConditionType::Foreign));
}

fn host_gw(name: &str, manager: &MemoryManager, kernel: &FakeKernel) -> OverlayBuilder {
    Overlay::builder(node(name))
        .manager(manager.clone())
        .backend(HostGwBackend::new())
        .kernel(kernel.clone())
}

/// Straight to a gateway on the underlay leads the route of anybody: only that it was ours tells.
#[tokio::test(start_paused = true)]
async fn a_route_on_the_underlay_is_ours_if_it_was() {
    let manager = MemoryManager::new(config(&DUAL.replace("vxlan", "host-gw")));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let mut features = Features::all();
    features.nexthops = false;
    kernels[0].set_features(features);
    let a = host_gw("a", &manager, &kernels[0])
        .start()
        .await
        .expect("all parts");
    let b = host_gw("b", &manager, &kernels[1])
        .start()
        .await
        .expect("all parts");
    ready_within(MINUTE, &a).await;
    ready_within(MINUTE, &b).await;
    settle(&a).await;
    let dst = subnet_of(&b, Family::V4);
    let ours = route_to(&kernels[0], dst).expect("there");
    let theirs = route_numbered(&kernels[0], ours.clone());
    settle(&a).await;
    assert_eq!(route_to(&kernels[0], dst), Some(ours.clone()));
    assert!(a.status().is_true(ConditionType::Foreign));
    // One that was there before us has never been ours, however often it is read.
    a.stop().await.expect("running");
    kernels[0].delete(&ours.key());
    kernels[0]
        .insert_foreign(theirs.clone())
        .expect("the place is free");
    let a = host_gw("a", &manager, &kernels[0])
        .start()
        .await
        .expect("all parts");
    ready_within(MINUTE, &a).await;
    settle(&a).await;
    for _ in 0..3 {
        a.resync().await.expect("running");
        settle(&a).await;
        assert_eq!(route_to(&kernels[0], dst), Some(theirs.clone()));
        assert!(!a.status().is_true(ConditionType::Foreign));
    }
}

/// A node straight behind the underlay, with a peer that is only a record.
async fn with_a_peer() -> (MemoryManager, FakeKernel, Overlay, Subnet) {
    let manager = MemoryManager::new(config(&DUAL.replace("vxlan", "host-gw")));
    let kernel = FakeKernel::node(1);
    let mut features = Features::all();
    features.nexthops = false;
    kernel.set_features(features);
    manager.put_raw(gateway(7)).expect("it is sound");
    let a = host_gw("a", &manager, &kernel).start().await;
    let a = a.expect("all parts");
    ready_within(MINUTE, &a).await;
    settle(&a).await;
    let dst = gateway(7).subnet.v4.expect("an IPv4 subnet");
    (manager, kernel, a, dst)
}

/// The record of a subnet behind a host of the underlay.
fn gateway(n: u8) -> Lease {
    let record = peer(n, "10.42.77.0/24");
    Lease {
        node: node("peer"),
        attrs: LeaseAttrs {
            backend_type: Some(BackendType::host_gw()),
            backend_data: DualStack::default(),
            ..record.attrs
        },
        ..record
    }
}

/// Something else may be wanted in its place by the time that it is mended, or nothing.
#[tokio::test(start_paused = true)]
async fn a_route_that_lost_its_number_is_ours_whatever_is_wanted_in_its_place_meanwhile() {
    let (manager, kernel, a, dst) = with_a_peer().await;
    let ours = route_to(&kernel, dst).expect("there");
    // The node hears of the one before it has mended the other, and the other way round.
    for (n, refused) in [(8, false), (9, true), (10, false)] {
        let before = route_to(&kernel, dst).expect("there");
        if refused {
            kernel.refuse(before.key(), Failure::Busy);
        }
        route_numbered(&kernel, before.clone());
        if refused {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        manager.put_raw(gateway(n)).expect("it is sound");
        if refused {
            tokio::time::sleep(Duration::from_secs(1)).await;
            kernel.accept(&before.key());
        }
        let leads_to = |n: u8| {
            let gateway = IpAddr::from([192, 0, 2, n]);
            matches!(route_to(&kernel, dst), Some(Object::Route(Route {
                target: RouteTarget::Gateway { gateway: found, .. },
                protocol: RouteProtocol::OURS,
                ..
            })) if found == gateway)
        };
        until(MINUTE, "it leads to the new gateway", || leads_to(n)).await;
        settle(&a).await;
        assert!(a.status().is_true(ConditionType::Foreign), "{n}");
    }
    // And removed when nobody wants it.
    let before = route_to(&kernel, dst).expect("there");
    route_numbered(&kernel, before);
    assert!(manager.remove(&gateway(10).key), "it was there");
    until(MINUTE, "it is gone", || route_to(&kernel, dst).is_none()).await;
    // What comes to the place of one that was removed is somebody's, however alike.
    manager.put_raw(gateway(7)).expect("it is sound");
    until(MINUTE, "it is there", || route_to(&kernel, dst).is_some()).await;
    settle(&a).await;
    assert_eq!(route_to(&kernel, dst), Some(ours.clone()));
    a.stop().await.expect("running");
}

fn remembering(kernel: &FakeKernel, manager: &MemoryManager, memory: &Memory) -> OverlayBuilder {
    Overlay::builder(node("a"))
        .manager(manager.clone())
        .backend(VxlanBackend::new())
        .kernel(kernel.clone())
        .adopt_flannel(false)
        .state(memory.clone())
}

fn in_namespace(kernel: &FakeKernel, name: &str) {
    let mut features = Features::all();
    features.namespace = Some(name.to_owned());
    kernel.set_features(features);
}

#[tokio::test(start_paused = true)]
async fn a_mark_that_is_taken_while_nobody_runs_is_missed_in_the_same_namespace_only() {
    for is_same in [true, false] {
        let manager = MemoryManager::new(config(DUAL));
        let (kernel, memory) = (FakeKernel::node(1), Memory::default());
        in_namespace(&kernel, "boot-1/4:1");
        let a = remembering(&kernel, &manager, &memory).start().await;
        let a = a.expect("all parts");
        ready_within(MINUTE, &a).await;
        settle(&a).await;
        a.stop().await.expect("running");
        let before = kernel.objects();
        kernel.set_alias(dev("flannel.1"), None);
        if !is_same {
            in_namespace(&kernel, "boot-2/4:1");
        }
        let a = remembering(&kernel, &manager, &memory).start().await;
        let a = a.expect("all parts");
        tokio::time::sleep(MINUTE).await;
        assert_eq!(a.status().working, is_same, "{:?}", a.status().conditions);
        assert_eq!(kernel.objects() == before, is_same);
    }
}
