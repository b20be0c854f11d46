//! The whole SDK on fakes: what an overlay tells after its end, and of what was before, tokio's clock
//! paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use flannel_core::keeper::LossPolicy;
use flannel_core::{
    ConditionType, Family, MemoryManager, Object, Overlay, Route, RouteProtocol, RouteTarget,
    Status,
};
use flannel_testkit::fake_kernel::FakeKernel;

const MINUTE: Duration = Duration::from_secs(60);

/// An overlay that has converged.
async fn running(kernel: &FakeKernel, manager: &MemoryManager) -> Overlay {
    let overlay = builder("a", manager, kernel)
        .on_lease_lost(LossPolicy::Stop)
        .start()
        .await
        .expect("all parts are there");
    ready_within(MINUTE, &overlay).await;
    overlay
}

fn assert_stopped(status: &Status, why: &str, end: &str) {
    let stopped = status.stopped.as_deref().unwrap_or_else(|| panic!("{end}"));
    assert!(stopped.contains(why), "{end}: {stopped}");
    assert!(status.ready && !status.working, "{end}");
}

#[tokio::test(start_paused = true)]
async fn a_status_says_that_its_overlay_has_stopped_however_it_did() {
    let ends = [
        ("stop", "asked to"),
        ("teardown", "torn down"),
        ("drop", "handle was dropped"),
        ("lost", "lease is lost"),
        ("replaced", "process 42"),
    ];
    for (end, why) in ends {
        let (kernel, manager) = (FakeKernel::node(1), MemoryManager::new(config(DUAL)));
        let overlay = running(&kernel, &manager).await;
        assert_eq!(overlay.status().stopped, None);
        let mut watched = overlay.watch_status();
        let mut next = None;
        match end {
            "stop" => overlay.stop().await.expect("running"),
            "teardown" => overlay.teardown().await.expect("running"),
            "drop" => drop(overlay),
            "lost" => {
                let lease = overlay.status().lease.clone().expect("a lease");
                manager.remove(&lease.key);
                overlay.stopped().await;
                assert_stopped(&overlay.status(), why, end);
            }
            _ => {
                let other = builder("b", &manager, &kernel.as_process(42)).replace_running(true);
                next = Some(other.start().await.expect("all parts are there"));
                overlay.stopped().await;
                assert_stopped(&overlay.status(), why, end);
            }
        }
        // Whoever watches hears of it, and that nothing else will come.
        let heard =
            tokio::time::timeout(MINUTE, async { while watched.changed().await.is_ok() {} });
        heard.await.expect(end);
        assert_stopped(&watched.borrow(), why, end);
        drop(next);
    }
}

#[test]
fn a_status_says_that_its_overlay_went_with_its_runtime() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime")
    };
    let (kernel, manager) = (FakeKernel::node(1), MemoryManager::new(config(DUAL)));
    let first = runtime();
    let overlay = first.block_on(running(&kernel, &manager));
    // And one that has not begun yet.
    let fresh = first.block_on(builder("b", &manager, &FakeKernel::node(2)).start());
    let fresh = fresh.expect("all parts are there");
    drop(first);
    assert_stopped(&overlay.status(), "runtime has ended", "runtime");
    assert!(fresh.status().stopped.is_some());
    runtime().block_on(async {
        let stopped = tokio::time::timeout(MINUTE, overlay.stopped()).await;
        assert!(stopped.expect("at once").to_string().contains("runtime"));
    });
}

#[tokio::test(start_paused = true)]
async fn the_last_changes_of_conditions_are_told_in_their_order() {
    let (_manager, kernels, [a, b]) = pair().await;
    let start = a.status();
    assert!(
        (5..32).contains(&start.history.len()),
        "{:?}",
        start.history
    );
    let subnet = subnet_of(&b, Family::V4);
    let Some(Object::Route(route)) = route_to(&kernels[0], subnet) else {
        panic!("there is no route");
    };
    let theirs = Object::Route(Route {
        protocol: RouteProtocol(42),
        target: RouteTarget::Blackhole,
        ..route.clone()
    });
    for _ in 0..20 {
        kernels[0].delete(&Object::Route(route.clone()).key());
        kernels[0].insert_foreign(theirs.clone()).expect("it fits");
        let is_in_the_way = |status: &Status| !status.is_true(ConditionType::Foreign);
        a.wait_for(is_in_the_way).await.expect("running");
        let before = a.status();
        settle(&a).await;
        assert!(
            Arc::ptr_eq(&before.history, &a.status().history),
            "nothing changed"
        );
        kernels[0].delete(&theirs.key());
        let is_clear = |status: &Status| status.is_true(ConditionType::Foreign);
        a.wait_for(is_clear).await.expect("running");
    }
    let status = a.status();
    assert_eq!(status.history.len(), 32);
    assert!(status.history.is_sorted_by_key(|change| change.since));
    for condition in status.conditions.iter() {
        let last = status.history.iter().rfind(|c| c.kind == condition.kind);
        // Messages may change in between.
        if let Some(last) = last {
            let same = (last.status, &last.reason, last.since);
            assert_eq!(same, (condition.status, &condition.reason, condition.since));
        }
    }
    let foreign = status
        .history
        .iter()
        .filter(|c| c.kind == ConditionType::Foreign);
    let reasons: Vec<&str> = foreign.map(|c| c.reason.as_str()).collect();
    assert!(
        reasons.ends_with(&["InTheWay", "Clear", "InTheWay", "Clear"]),
        "{reasons:?}"
    );
    let text = serde_json::to_string(&*status).expect("it can be written");
    let read: Status = serde_json::from_str(&text).expect("it can be read");
    assert_eq!(read, *status);
}
