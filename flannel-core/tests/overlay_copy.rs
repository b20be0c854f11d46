//! What the engine believes of the kernel between two whole readings, and what it reads.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::time::Duration;

use common::*;
use flannel_core::reconcile::ownership::nexthop_id;
use flannel_core::{
    ConditionType, Family, MAIN_TABLE, MacAddr, MemoryManager, Neighbour, Nexthop, Object,
    ObjectKey, Op, Overlay, OverlayName, Route, RouteProtocol, RouteTarget, Subnet,
};
use flannel_testkit::fake_kernel::{Failure, FakeKernel, FaultKind};

/// A node with peers in both families, at rest: the next whole reading is seconds away.
async fn at_rest() -> (FakeKernel, Overlay, [Overlay; 1], MemoryManager) {
    let (manager, [kernel, _], [a, b]) = pair().await;
    for n in 20..30 {
        let subnet = format!("10.42.{}.0/24", 100 + n);
        manager.put_raw(peer(n, &subnet)).expect("stored");
    }
    settle(&a).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    (kernel, a, [b], manager)
}

fn foreign(n: u8, gateway: u8) -> Object {
    Object::Route(Route {
        table: MAIN_TABLE,
        dst: format!("203.0.{n}.0/24").parse().expect("a subnet"),
        metric: 0,
        target: RouteTarget::Gateway {
            gateway: [192, 0, 2, gateway].into(),
            dev: dev("eth0"),
            onlink: false,
        },
        protocol: RouteProtocol(186),
        source: None,
    })
}

/// Neither a peer that comes or goes, nor an object that is deleted or altered, nor what routing
/// daemons do costs a reading of everything.
#[tokio::test(start_paused = true)]
async fn what_happens_every_day_reads_nothing_whole() {
    let (kernel, a, _b, manager) = at_rest().await;
    let before = kernel.observations();
    let start = tokio::time::Instant::now();
    let new = peer(9, "10.42.99.0/24");
    let key = manager.put_raw(new).expect("stored").key;
    let dst: Subnet = "10.42.99.0/24".parse().expect("a subnet");
    let soon = Duration::from_millis(400);
    until(soon, "it is made", || route_to(&kernel, dst).is_some()).await;
    let route = route_to(&kernel, dst).expect("it is there");
    kernel.delete(&route.key());
    until(soon, "it is back", || route_to(&kernel, dst).is_some()).await;
    for n in 0..40 {
        kernel.insert_foreign(foreign(n, 254)).expect("it fits");
        kernel
            .external(&Op::Change(foreign(n, 253)))
            .expect("it fits");
        tokio::time::sleep(Duration::from_millis(10)).await;
        kernel.delete(&foreign(n, 253).key());
    }
    assert!(manager.remove(&key));
    until(soon, "it is gone", || route_to(&kernel, dst).is_none()).await;
    tokio::time::sleep(soon).await;
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "the timer is not meant"
    );
    assert_eq!(kernel.observations(), before);
    assert!(a.status().ready);
}

/// A device that is set down and up at once loses routes and nexthop objects without a word.
#[tokio::test(start_paused = true)]
async fn what_goes_without_a_word_comes_back() {
    let (kernel, _a, _b, _manager) = at_rest().await;
    let right = kernel.objects();
    for name in ["flannel.1", "flannel-v6.1"] {
        kernel.set_link_down(dev(name));
        kernel.set_link_up(dev(name), true);
        assert_ne!(kernel.objects(), right, "{name} took nothing along");
        until(Duration::from_secs(1), name, || kernel.objects() == right).await;
    }
    let nexthops: Vec<ObjectKey> = right
        .keys()
        .filter(|key| matches!(key, ObjectKey::Nexthop(_)))
        .cloned()
        .collect();
    for key in nexthops {
        kernel.delete(&key);
        until(Duration::from_secs(1), "with its routes", || {
            kernel.objects() == right
        })
        .await;
    }
}

/// A foreign object keeps from being made what is in its place, and all that needs that.
#[tokio::test(start_paused = true)]
async fn what_waited_for_a_place_that_was_taken_is_made_when_it_is_free() {
    let (kernel, a, _b, manager) = at_rest().await;
    let dst: Subnet = "10.42.99.0/24".parse().expect("a subnet");
    let gateway = dst.address();
    let flannel = dev("flannel.1");
    let id = nexthop_id(&OverlayName::default(), gateway, flannel, true);
    let theirs = Object::Nexthop(Nexthop {
        id,
        gateway: [192, 0, 2, 254].into(),
        dev: dev("eth0"),
        onlink: false,
        protocol: RouteProtocol(186),
    });
    kernel.insert_foreign(theirs.clone()).expect("it fits");
    manager.put_raw(peer(9, "10.42.99.0/24")).expect("stored");
    until(Duration::from_secs(1), "it is told", || {
        a.status()
            .foreign
            .iter()
            .any(|blocked| blocked.found == theirs)
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(route_to(&kernel, dst), None);
    kernel.delete(&theirs.key());
    until(Duration::from_secs(1), "it is made", || {
        route_to(&kernel, dst).is_some() && a.status().foreign.is_empty()
    })
    .await;
}

/// Whatever becomes of the notifications of a fault, it is made good before the timer reads: at once,
/// or when the loss is told.
#[tokio::test(start_paused = true)]
async fn torn_late_repeated_and_reordered_notifications_mislead_nobody() {
    let (kernel, _a, _b, _manager) = at_rest().await;
    let right = kernel.objects();
    let by = Duration::from_millis(700);
    let faults = [
        FaultKind::Overrun,
        FaultKind::HintsTorn,
        FaultKind::HintsRepeated,
        FaultKind::HintsLate { by },
    ];
    let victims = ["route", "nexthop", "neighbour", "fdb"];
    for fault in faults {
        for kind in victims {
            let is_ours = |object: &Object| match object {
                Object::Route(route) => route.protocol == RouteProtocol::OURS,
                _ => true,
            };
            let ours = right.iter().filter(|(_, object)| is_ours(object));
            let mut keys = ours.map(|(key, _)| key).filter(|key| key.kind() == kind);
            let (one, two) = (keys.next().expect("one"), keys.next_back().expect("two"));
            kernel.fail_next(fault.clone());
            kernel.delete(one);
            kernel.delete(two);
            until(
                Duration::from_secs(2),
                &format!("{kind}, {fault:?}"),
                || kernel.objects() == right,
            )
            .await;
            kernel.assert_faults_consumed();
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert_eq!(kernel.objects(), right);
        }
    }
    // One that makes a neighbour wrong, and the routes of its device go in the same breath.
    kernel.fail_next(FaultKind::HintsReordered);
    let link = right.get(&ObjectKey::Link(dev("flannel.1")));
    let Some(Object::Link(link)) = link.cloned() else {
        panic!("it is there");
    };
    let mut other = link.clone();
    other.mac = Some(MacAddr([2, 9, 9, 9, 9, 9]));
    kernel
        .external(&Op::Change(Object::Link(other)))
        .expect("it can be changed");
    until(Duration::from_secs(2), "a MAC address, reordered", || {
        kernel.objects() == right
    })
    .await;
    kernel.assert_faults_consumed();
}

/// What somebody makes right is looked at before it is believed: an old word of it would hide a fault.
#[tokio::test(start_paused = true)]
async fn a_repeated_word_hides_no_fault() {
    let (kernel, _a, _b, _manager) = at_rest().await;
    let right = kernel.objects();
    let is_v4 = |object: &&Object| matches!(object, Object::Neighbour(n) if n.ip.is_ipv4());
    let Some(Object::Neighbour(neighbour)) = right.values().find(is_v4).cloned() else {
        panic!("there is one");
    };
    let key = ObjectKey::Neighbour {
        dev: neighbour.dev,
        ip: neighbour.ip,
    };
    let family = Family::of(&neighbour.ip);
    // The word of our own repair comes a second time after that of its removal.
    kernel.delete(&key);
    kernel.fail_next(FaultKind::HintsRepeated);
    until(Duration::from_secs(1), "it is back", || {
        kernel.get(&key).is_some()
    })
    .await;
    kernel.assert_faults_consumed();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let stranger = Neighbour {
        mac: MacAddr([2, 9, 9, 9, 9, 9]),
        ..neighbour
    };
    kernel
        .external(&Op::Change(Object::Neighbour(stranger)))
        .expect("it fits");
    until(Duration::from_secs(1), &family.to_string(), || {
        kernel.objects() == right
    })
    .await;
}

/// A machine sleeps, or the process is stopped, while the kernel is being read. How long that took is
/// no measure of what a reading costs: the next ones must not wait for a multiple of it.
#[tokio::test(start_paused = true)]
async fn a_reading_during_a_long_sleep_puts_off_no_other_for_long() {
    let (manager, kernel, clock) = (
        MemoryManager::new(config(DUAL)),
        FakeKernel::node(1),
        Sleepy::new(),
    );
    let a = builder("a", &manager, &kernel)
        .clock(clock.clone())
        .resync_every(Duration::from_secs(1_000_000))
        .start()
        .await
        .expect("all parts are there");
    a.ready().await.expect("ready");
    settle(&a).await;
    let right = kernel.objects();
    let is_own = |key: &&ObjectKey| key.dev() == Some(dev("flannel.1"));
    let own = |kind| right.keys().filter(is_own).find(|key| key.kind() == kind);
    let address = own("address").expect("it has one");
    let is_right = || kernel.objects() == right && a.status().is_true(ConditionType::Kernel);
    let soon = Duration::from_secs(5);
    // Everything is read after an overrun, else the links and what is on them.
    for fault in [None, Some(FaultKind::Overrun)] {
        for asleep_after in (0..100).step_by(5).map(Duration::from_millis) {
            kernel.set_latency(Duration::from_millis(20));
            fault.iter().for_each(|f| kernel.fail_next(f.clone()));
            kernel.delete(address);
            tokio::time::sleep(asleep_after).await;
            clock.sleep(Duration::from_secs(600));
            until(soon, "all is right again", is_right).await;
            kernel.set_latency(Duration::ZERO);
            kernel.delete(address);
            until(soon, "and again", is_right).await;
            kernel.assert_faults_consumed();
        }
    }
}

/// A removal that waits for something else to be made waits no longer when that is not wanted any more.
#[tokio::test(start_paused = true)]
async fn what_waited_for_a_failed_object_goes_when_that_is_not_wanted_any_more() {
    let (kernel, a, _b, manager) = at_rest().await;
    let right = kernel.objects();
    let subnet = "10.42.99.0/24";
    let key = manager.put_raw(peer(9, subnet)).expect("stored").key;
    let dst = subnet.parse().expect("a subnet");
    let soon = Duration::from_secs(1);
    until(soon, "it is made", || route_to(&kernel, dst).is_some()).await;
    let refused = ObjectKey::Fdb {
        dev: dev("flannel.1"),
        mac: MacAddr([0x0e, 0, 0, 0, 1, 11]),
    };
    kernel.refuse(refused, Failure::Busy);
    manager.put_raw(peer(11, subnet)).expect("stored");
    until(soon, "it is refused", || !a.status().failing.is_empty()).await;
    assert!(manager.remove(&key));
    until(soon, "nothing is left", || kernel.objects() == right).await;
    until(soon, "that is told", || {
        a.status().is_true(ConditionType::Kernel)
    })
    .await;
}
