//! The whole SDK on fakes: of all overlays of one name in one namespace, one works at a time, tokio's
//! clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::time::Duration;

use common::*;
use flannel_core::{
    Claim, Claimant, Condition, ConditionType, Error, InstanceId, Kernel, MemoryManager, Overlay,
    OverlayBuilder, OverlayName, RouteProtocol, kernel,
};
use flannel_testkit::fake_kernel::FakeKernel;

const MINUTE: Duration = Duration::from_secs(60);

/// The overlay of a process of one machine, on a store.
fn process(pid: u32, manager: &MemoryManager, kernel: &FakeKernel) -> OverlayBuilder {
    builder("a", manager, &kernel.as_process(pid)).instance(InstanceId::from_bits(7))
}

async fn started(builder: OverlayBuilder) -> Overlay {
    builder.start().await.expect("all parts are there")
}

async fn refused(overlay: &Overlay) -> Condition {
    let ready = tokio::time::timeout(MINUTE, overlay.ready()).await;
    match ready.expect("an answer") {
        Err(Error::NotReady(condition)) => condition,
        other => panic!("{other:?}"),
    }
}

fn is_held_by_the_first(result: &Result<(), Error>) -> bool {
    let first = Claimant::Process(1);
    matches!(result, Err(Error::Kernel(kernel::Error::Held { by })) if *by == first)
}

/// An overlay of process 1 that has converged, with its store and kernel.
async fn first() -> (MemoryManager, FakeKernel, Overlay) {
    let (manager, kernel) = (MemoryManager::new(config(DUAL)), FakeKernel::node(1));
    let a = started(process(1, &manager, &kernel)).await;
    ready_within(MINUTE, &a).await;
    settle(&a).await;
    kernel.take_log();
    (manager, kernel, a)
}

#[tokio::test(start_paused = true)]
async fn a_second_overlay_changes_nothing_and_names_the_first() {
    let (_manager, kernel, a) = first().await;
    // Of another cluster: the default name is enough.
    let other = MemoryManager::new(config(DUAL));
    let b = started(builder("b", &other, &kernel.as_process(42))).await;
    let condition = refused(&b).await;
    assert_eq!(condition.kind, ConditionType::Kernel);
    assert_eq!(condition.reason, "OverlayHeld");
    assert!(
        condition.permanent && condition.message.starts_with("process 1 "),
        "{}",
        condition.message
    );
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(kernel.take_log(), []);
    assert_eq!(other.snapshot().leases, [], "nor does it take a lease");
    assert_eq!(a.status().repairs, 0);
    assert!(a.status().working && !b.status().working && !b.status().ready);

    // And nothing of the first one's goes, whatever is asked.
    assert!(is_held_by_the_first(&b.release().await));
    b.resync().await.expect("running");
    b.plan().await.expect("a plan");
    assert!(is_held_by_the_first(&b.teardown().await));
    let c = started(process(42, &other, &kernel)).await;
    assert!(is_held_by_the_first(&c.teardown().await), "at once");
    let d = started(process(42, &other, &kernel)).await;
    assert!(is_held_by_the_first(&d.drain(MINUTE).await));
    assert_eq!(kernel.take_log(), []);
    assert!(a.status().working);
}

#[tokio::test(start_paused = true)]
async fn a_second_overlay_goes_on_when_the_first_ends_however_it_does() {
    for end in ["stop", "drop", "teardown"] {
        let (manager, kernel, a) = first().await;
        let b = started(process(42, &manager, &kernel)).await;
        refused(&b).await;
        match end {
            "stop" => a.stop().await.expect("running"),
            "teardown" => a.teardown().await.expect("running"),
            _ => drop(a),
        }
        let limit = Duration::from_secs(3);
        let works = tokio::time::timeout(limit, b.wait_for(|status| status.working)).await;
        works.expect(end).expect("running");
    }
}

#[tokio::test(start_paused = true)]
async fn an_overlay_that_follows_another_at_once_is_not_refused() {
    let (manager, kernel, a) = first().await;
    drop(a);
    let b = started(process(1, &manager, &kernel)).await;
    b.ready().await.expect("ready");
    b.stop().await.expect("running");
    let c = started(process(1, &manager, &kernel)).await;
    c.ready().await.expect("ready");
    assert_eq!(kernel.take_log(), []);
}

#[tokio::test(start_paused = true)]
async fn overlays_of_other_names_and_of_other_namespaces_live_side_by_side() {
    let (manager, kernel, _a) = first().await;
    let other = r#"{ "Network": "10.99.0.0/16", "Backend": { "Type": "vxlan", "VNI": 9 } }"#;
    let named = builder("n", &MemoryManager::new(config(other)), &kernel)
        .name(OverlayName::new("other").expect("a name"))
        .route_protocol(RouteProtocol(99));
    ready_within(MINUTE, &started(named).await).await;
    let elsewhere = builder("e", &manager, &FakeKernel::node(2));
    ready_within(MINUTE, &started(elsewhere).await).await;
}

#[tokio::test(start_paused = true)]
async fn an_overlay_is_handed_over_and_nothing_in_the_kernel_is_touched() {
    let (manager, kernel, a) = first().await;
    let objects = kernel.objects();
    let b = started(process(42, &manager, &kernel).replace_running(true)).await;
    ready_within(MINUTE, &b).await;
    let stopped = tokio::time::timeout(MINUTE, a.stopped()).await;
    let stopped = stopped.expect("it stops");
    assert!(
        matches!(
            stopped,
            Error::HandedOver {
                to: Claimant::Process(42)
            }
        ),
        "{stopped}"
    );
    settle(&b).await;
    assert_eq!(kernel.take_log(), []);
    assert_eq!(kernel.objects(), objects);
    // The one that has it now can be replaced as well.
    let c = started(process(43, &manager, &kernel).replace_running(true)).await;
    ready_within(MINUTE, &c).await;
    assert!(matches!(b.stopped().await, Error::HandedOver { .. }));
}

#[tokio::test(start_paused = true)]
async fn who_does_not_hand_over_is_waited_for_and_named() {
    let kernel = FakeKernel::node(1);
    let name = OverlayName::default();
    let held: Claim = kernel.claim(&name, false).await.expect("free");
    let manager = MemoryManager::new(config(DUAL));
    let b = started(process(42, &manager, &kernel).replace_running(true)).await;
    let start = tokio::time::Instant::now();
    assert_eq!(refused(&b).await.reason, "OverlayHeld");
    assert!(start.elapsed() >= Duration::from_secs(5));
    // The host program is answered all the while.
    tokio::time::timeout(Duration::from_secs(1), b.resync())
        .await
        .expect("in time")
        .expect("running");
    drop(held);
    let works = tokio::time::timeout(MINUTE, b.wait_for(|status| status.working)).await;
    works.expect("it goes on").expect("running");
}
