//! The whole SDK on fakes: what is undone again and again is repaired ever more rarely, and told, tokio's
//! clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use flannel_backend_hostgw::HostGwBackend;
use flannel_core::{
    Condition, ConditionStatus, ConditionType, Family, Link, MemoryManager, Object, ObjectKey, Op,
    Overlay, OverlayBuilder, Route, RouteProtocol, RouteTarget, Status,
};
use flannel_testkit::fake_kernel::FakeKernel;
use tokio::task::JoinHandle;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// The longest that a repair takes which does not wait.
const AT_ONCE: Duration = Duration::from_millis(50);

/// Somebody who looks every few milliseconds and undoes what we did, until dropped.
struct Adversary(JoinHandle<()>);

impl Adversary {
    fn start(kernel: &FakeKernel, undo: impl Fn(&FakeKernel) + Send + 'static) -> Self {
        let kernel = kernel.clone();
        Self(tokio::spawn(async move {
            loop {
                undo(&kernel);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }))
    }

    fn deletes(kernel: &FakeKernel, key: ObjectKey) -> Self {
        Self::start(kernel, move |kernel| {
            if kernel.get(&key).is_some() {
                kernel.delete(&key);
            }
        })
    }
}

impl Drop for Adversary {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The number of times that an object was made or changed since the log was taken.
fn repairs(kernel: &FakeKernel, key: &ObjectKey) -> usize {
    let log = kernel.take_log();
    let ours = log.iter().filter(|entry| entry.op.key() == *key);
    ours.filter(|entry| !matches!(entry.op, Op::Delete(_)))
        .count()
}

fn condition(overlay: &Overlay, kind: ConditionType) -> Condition {
    overlay
        .status()
        .condition(kind)
        .expect("one of each")
        .clone()
}

async fn becomes(overlay: &Overlay, limit: Duration, is: impl FnMut(&Status) -> bool) {
    let wait = tokio::time::timeout(limit, overlay.wait_for(is)).await;
    let conditions = || Arc::clone(&overlay.status().conditions);
    wait.unwrap_or_else(|_| panic!("{:#?}", conditions()))
        .expect("running");
}

#[tokio::test(start_paused = true)]
async fn a_peers_route_that_is_fought_for_is_told_and_delays_nothing_else() {
    let (_manager, kernels, [a, b]) = pair().await;
    let kernel = &kernels[0];
    let [v4, v6] = [Family::V4, Family::V6].map(|family| {
        let route = route_to(kernel, subnet_of(&b, family));
        route.expect("a route").key()
    });
    kernel.take_log();
    let adversary = Adversary::deletes(kernel, v4.clone());
    tokio::time::sleep(2 * MINUTE).await;
    let first = repairs(kernel, &v4);
    assert!((20..35).contains(&first), "{first} repairs in two minutes");
    tokio::time::sleep(10 * MINUTE).await;
    let later = repairs(kernel, &v4);
    assert!((20..45).contains(&later), "{later} repairs in ten minutes");

    let told = condition(&a, ConditionType::Foreign);
    assert_eq!(
        (told.status, told.reason.as_str()),
        (ConditionStatus::False, "Contended")
    );
    let text = &told.message;
    assert!(
        text.starts_with("route 10.42.") && text.contains("times in"),
        "{text}"
    );
    assert!(a.status().working, "{:#?}", a.status().conditions);

    // All else is repaired at once.
    kernel.delete(&v6);
    until(AT_ONCE, "another route", || kernel.get(&v6).is_some()).await;

    drop(adversary);
    until(31 * SECOND, "it is repaired", || kernel.get(&v4).is_some()).await;
    becomes(&a, 2 * MINUTE, |status| {
        status.is_true(ConditionType::Foreign)
    })
    .await;
    kernel.delete(&v4);
    until(AT_ONCE, "it is as any other", || kernel.get(&v4).is_some()).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_own_objects_are_fought_for_does_not_work_until_they_are_left_alone() {
    let key = ObjectKey::Link(dev("flannel.1"));
    let undo = |kernel: &FakeKernel| {
        let Some(Object::Link(link)) = kernel.get(&ObjectKey::Link(dev("flannel.1"))) else {
            return;
        };
        if link.mtu != Some(1400) {
            let altered = Link {
                mtu: Some(1400),
                ..link
            };
            kernel
                .external(&Op::Change(Object::Link(altered)))
                .expect("it fits");
        }
    };
    let (_manager, kernels, [a, _b]) = pair().await;
    let kernel = &kernels[0];
    kernel.take_log();
    let adversary = Adversary::start(kernel, undo);
    becomes(&a, MINUTE, |status| !status.working).await;
    tokio::time::sleep(5 * MINUTE).await;
    let made = repairs(kernel, &key);
    assert!((20..50).contains(&made), "{made} repairs in five minutes");
    // All that time it does not work, and says why.
    let mut ended = a.watch_status();
    let since = condition(&a, ConditionType::Kernel).since;
    for _ in 0..300 {
        tokio::time::sleep(SECOND).await;
        let status = ended.borrow_and_update().clone();
        assert!(!status.working && status.ready);
        let told = status.obstacle().expect("a reason");
        assert_eq!(
            (told.reason.as_str(), told.since),
            ("Contended", since),
            "{told}"
        );
        assert!(
            told.message.starts_with("link flannel.1"),
            "{}",
            told.message
        );
    }
    drop(adversary);
    becomes(&a, 45 * SECOND, |status| status.working).await;
    becomes(&a, 2 * MINUTE, |status| {
        status.is_true(ConditionType::Foreign)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn whose_routes_take_the_place_of_ours_is_told() {
    let (_manager, kernels, [a, b]) = pair().await;
    let kernel = &kernels[0];
    let Some(Object::Route(route)) = route_to(kernel, subnet_of(&b, Family::V4)) else {
        panic!("there is no route");
    };
    let theirs = Object::Route(Route {
        protocol: RouteProtocol(99),
        target: RouteTarget::Blackhole,
        ..route.clone()
    });
    let key = theirs.key();
    let ours = Object::Route(route);
    // For a while theirs is there, for a while nothing.
    let turn = std::sync::atomic::AtomicU32::new(0);
    let _adversary = Adversary::start(kernel, move |kernel| {
        match turn.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 40 {
            0 => {
                kernel.delete(&ours.key());
                kernel.insert_foreign(theirs.clone()).expect("it fits");
            }
            20 => kernel.delete(&theirs.key()),
            _ => {}
        }
    });
    becomes(&a, MINUTE, |status| {
        let told = status.condition(ConditionType::Foreign);
        told.is_some_and(|told| told.reason == "Contended")
    })
    .await;
    let told = condition(&a, ConditionType::Foreign).message;
    assert!(told.contains("protocol 99"), "{told}");
    kernel.take_log();
    tokio::time::sleep(5 * MINUTE).await;
    let made = repairs(kernel, &key);
    assert!(made < 40, "{made} repairs in five minutes");
}

#[tokio::test(start_paused = true)]
async fn two_of_one_name_that_know_no_lock_come_to_rest() {
    let (_manager, kernels, [a, b]) = pair().await;
    let other = MemoryManager::new(config(DUAL));
    let rival = builder("a", &other, &kernels[0].without_lock()).start();
    let rival = rival.await.expect("all parts are there");
    tokio::time::sleep(2 * MINUTE).await;
    kernels[0].take_log();
    tokio::time::sleep(5 * MINUTE).await;
    let made = kernels[0].take_log().len();
    assert!(made < 300, "{made} changes in five minutes");
    let told = [&a, &rival].map(|overlay| condition(overlay, ConditionType::Foreign).reason);
    assert!(told.iter().any(|reason| reason == "Contended"), "{told:?}");
    drop(rival);
    becomes(&a, 2 * MINUTE, |status| {
        status.is_true(ConditionType::Foreign)
    })
    .await;
    settle(&a).await;
    assert!(route_to(&kernels[0], subnet_of(&b, Family::V4)).is_some());
}

/// The kernel takes routes along with an interface that flaps, and nobody is to blame for it.
#[tokio::test(start_paused = true)]
async fn what_goes_with_the_external_interface_comes_back_at_once() {
    let manager = MemoryManager::new(config(
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"host-gw"}}"#,
    ));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let with = |name: &str, kernel: &FakeKernel| -> OverlayBuilder {
        Overlay::builder(node(name))
            .manager(manager.clone())
            .backend(HostGwBackend::new())
            .kernel(kernel.clone())
    };
    let [a, b] = [with("a", &kernels[0]), with("b", &kernels[1])];
    let (a, b) = (
        a.start().await.expect("complete"),
        b.start().await.expect("complete"),
    );
    for overlay in [&a, &b] {
        ready_within(MINUTE, overlay).await;
        settle(overlay).await;
    }
    let subnet = subnet_of(&b, Family::V4);
    assert!(route_to(&kernels[0], subnet).is_some());
    for n in 0..60 {
        kernels[0].set_link_down(dev("eth0"));
        assert!(route_to(&kernels[0], subnet).is_none());
        tokio::time::sleep(Duration::from_millis(300)).await;
        kernels[0].set_link_up(dev("eth0"), true);
        let default = kernels[0]
            .clone()
            .with_default_route("eth0", [192, 0, 2, 254].into());
        until(SECOND, &format!("flap {n}"), || {
            route_to(&default, subnet).is_some()
        })
        .await;
    }
    assert!(a.status().is_true(ConditionType::Foreign));
}
