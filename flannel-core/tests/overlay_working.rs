//! The whole SDK on fakes: what a node says of itself while something keeps it from working, tokio's
//! clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::time::Duration;

use common::*;
use flannel_core::keeper::LossPolicy;
use flannel_core::{
    Condition, ConditionType, Error, Link, LinkKind, MemoryManager, Object, ObjectKey, Overlay,
    Status, Vxlan,
};
use flannel_testkit::fake_kernel::{Failure, FakeKernel};

const MINUTE: Duration = Duration::from_secs(60);

/// A device of somebody else's.
fn foreign(name: &str, kind: LinkKind) -> Object {
    Object::Link(Link {
        name: dev(name),
        kind,
        mtu: Some(1450),
        mac: None,
        up: true,
        alias: Some("somebody's".to_owned()),
    })
}

fn vxlan(vni: u32) -> LinkKind {
    LinkKind::Vxlan(Vxlan {
        vni,
        port: 8472,
        underlay: Some(dev("eth0")),
        local: None,
        learning: true,
        gbp: false,
    })
}

/// Waits for a status, but not for ever.
async fn becomes(overlay: &Overlay, what: &str, is: impl FnMut(&Status) -> bool) {
    let wait = tokio::time::timeout(MINUTE, overlay.wait_for(is)).await;
    wait.expect(what).expect("running");
}

/// Finds the condition that keeps an overlay from getting ready in a minute.
async fn obstacle(overlay: &Overlay) -> Condition {
    match overlay.ready_within(MINUTE).await {
        Err(Error::NotReady(condition)) => condition,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_is_in_the_place_of_our_device_keeps_a_node_from_getting_ready() {
    for (what, name, kind) in [
        ("of our name", "flannel.1", LinkKind::Bridge),
        ("of our name and kind", "flannel.1", vxlan(1)),
        ("of our VNI and port", "vx0", vxlan(1)),
    ] {
        let manager = MemoryManager::new(config(DUAL));
        let kernel = FakeKernel::node(1);
        kernel.insert_foreign(foreign(name, kind)).expect("it fits");
        let overlay = builder("a", &manager, &kernel).start();
        let overlay = overlay.await.expect("all parts are there");
        let condition = obstacle(&overlay).await;
        assert_eq!(condition.kind, ConditionType::Kernel, "{what}: {condition}");
        assert!(
            condition.message.contains(name),
            "{what}: {}",
            condition.message
        );
        let status = overlay.status();
        assert!(!status.ready && !status.working, "{what}");
        assert_eq!(
            status.obstacle().map(|c| c.kind),
            Some(ConditionType::Kernel)
        );
        // Nothing but a change from outside helps, and that is noticed.
        kernel.delete_link(dev(name));
        ready_within(MINUTE, &overlay).await;
        assert!(overlay.status().working, "{what}");
        assert_eq!(overlay.status().obstacle(), None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_worked_stays_ready_and_says_that_it_does_not_work() {
    let (manager, kernels, [a, _b]) = pair().await;
    assert!(a.status().ready && a.status().working);
    let ours = ObjectKey::Link(dev("flannel.1"));
    kernels[0].delete(&ours);
    let taken = foreign("flannel.1", LinkKind::Bridge);
    kernels[0].insert_foreign(taken).expect("it fits");
    tokio::time::sleep(MINUTE).await;
    let readings = kernels[0].observations();
    tokio::time::sleep(MINUTE).await;
    let readings = kernels[0].observations() - readings;
    assert!(readings < 200, "{readings} readings in a minute");
    let status = a.status();
    assert!(status.ready && !status.working);
    let condition = status.obstacle().expect("a reason");
    assert_eq!(condition.reason, "Blocked", "{}", condition.message);
    kernels[0].delete_link(dev("flannel.1"));
    becomes(&a, "it works again", |status| status.working).await;
    drop(manager);
}

#[tokio::test(start_paused = true)]
async fn a_foreign_route_in_the_place_of_a_peers_leaves_the_node_working() {
    let (_, kernels, [a, b]) = pair().await;
    let subnet = subnet_of(&b, flannel_core::Family::V4);
    let Some(Object::Route(route)) = route_to(&kernels[0], subnet) else {
        panic!("there is no route");
    };
    kernels[0].delete(&Object::Route(route.clone()).key());
    let theirs = Object::Route(flannel_core::Route {
        protocol: flannel_core::RouteProtocol(42),
        target: flannel_core::RouteTarget::Device(dev("eth0")),
        ..route
    });
    kernels[0].insert_foreign(theirs).expect("it fits");
    let is_told = |status: &Status| !status.is_true(ConditionType::Foreign);
    becomes(&a, "the route is told of", is_told).await;
    a.converged().await.expect("running");
    assert!(a.status().working, "{:?}", a.status().conditions);
}

#[tokio::test(start_paused = true)]
async fn a_node_without_a_lease_that_counts_does_not_work() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let a = builder("a", &manager, &kernel)
        .on_lease_lost(LossPolicy::Hold)
        .start()
        .await
        .expect("all parts are there");
    ready_within(MINUTE, &a).await;
    let key = a.status().lease.as_ref().expect("a lease").key.clone();
    assert!(manager.remove(&key));
    becomes(&a, "it does not work", |status| !status.working).await;
    let status = a.status();
    assert_eq!(status.obstacle().map(|c| c.reason.as_str()), Some("Lost"));
    assert!(status.ready);
    a.reacquire().await.expect("running");
    becomes(&a, "it works again", |status| status.working).await;
}

#[tokio::test(start_paused = true)]
async fn an_interface_that_comes_late_is_waited_for() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::empty();
    let a = builder("a", &manager, &kernel).start();
    let a = a.await.expect("all parts are there");
    let condition = obstacle(&a).await;
    assert_eq!(condition.kind, ConditionType::Underlay, "{condition}");
    assert_eq!(condition.reason, "NoInterface");
    for object in FakeKernel::node(1).objects().into_values() {
        // What a boot makes, in the order in which things need one another.
        kernel.insert_foreign(object).expect("it fits");
    }
    ready_within(MINUTE, &a).await;
    assert!(a.status().working);
}

#[tokio::test(start_paused = true)]
async fn what_the_kernel_refuses_is_tried_ever_more_rarely() {
    let (_, kernels, [a, b]) = pair().await;
    let subnet = subnet_of(&b, flannel_core::Family::V4);
    let key = route_to(&kernels[0], subnet).expect("a route").key();
    kernels[0].refuse(key.clone(), Failure::Busy);
    kernels[0].delete(&key);
    kernels[0].take_log();
    tokio::time::sleep(2 * MINUTE).await;
    let log = kernels[0].take_log();
    let tries = log.iter().filter(|entry| entry.op.key() == key).count();
    assert!((2..25).contains(&tries), "{tries} tries in two minutes");
    kernels[0].accept(&key);
    becomes(&a, "it works again", |status| status.working).await;
}
