//! The whole SDK on fakes: two machines of one node id, one machine of two, tokio's clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::time::Duration;

use common::*;
use flannel_core::{
    ConditionType, Error, Family, InstanceId, MemoryManager, ObjectKey, Overlay, OverlayEvent,
    StateStore,
};
use flannel_testkit::fake_kernel::FakeKernel;
use tokio::sync::broadcast;

const MINUTE: Duration = Duration::from_secs(60);

/// How often a lease was got and lost since the events were looked at last.
fn changes(events: &mut broadcast::Receiver<OverlayEvent>) -> (usize, usize) {
    let (mut got, mut lost) = (0, 0);
    while let Ok(event) = events.try_recv() {
        got += usize::from(matches!(event, OverlayEvent::LeaseAcquired { .. }));
        lost += usize::from(matches!(event, OverlayEvent::LeaseLost { .. }));
    }
    (got, lost)
}

fn lease_condition(overlay: &Overlay) -> (String, String) {
    let status = overlay.status();
    let condition = status.condition(ConditionType::Lease).expect("one");
    (condition.reason.clone(), condition.message.clone())
}

#[tokio::test(start_paused = true)]
async fn the_second_machine_of_a_node_id_is_refused_while_the_first_lives() {
    let manager = MemoryManager::new(config(DUAL));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let first = start("localhost", &manager, &kernels[0]).await;
    let mut events = first.events();
    let second = builder("localhost", &manager, &kernels[1])
        .start()
        .await
        .expect("all parts are there");
    let refused = tokio::time::timeout(MINUTE, second.ready()).await;
    let Ok(Err(Error::NotReady(condition))) = refused else {
        panic!("the second one is {refused:?}");
    };
    assert_eq!(condition.reason, "NodeIdHeld");
    let public_ip = first.status().lease.as_ref().expect("a lease").public_ip;
    let ip = public_ip.v4.expect("an address").to_string();
    assert!(condition.message.contains(&ip), "{}", condition.message);
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(changes(&mut events), (0, 0), "the first one is not touched");

    // It is asked for again, so a machine that takes over a broken one's name needs no help.
    let subnet = subnet_of(&first, Family::V4);
    first.stop().await.expect("running");
    second
        .wait_for(|status| status.is_true(ConditionType::Lease))
        .await
        .expect("running");
    assert_eq!(subnet_of(&second, Family::V4), subnet);
}

#[tokio::test(start_paused = true)]
async fn a_node_id_that_is_taken_over_stays_taken() {
    let manager = MemoryManager::new(config(DUAL));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let first = start("localhost", &manager, &kernels[0]).await;
    let second = builder("localhost", &manager, &kernels[1]).take_over(true);
    let second = second.start().await.expect("all parts are there");
    ready_within(MINUTE, &second).await;
    first
        .wait_for(|status| {
            let lease = status.condition(ConditionType::Lease);
            lease.is_some_and(|lease| lease.reason == "NodeIdHeld")
        })
        .await
        .expect("running");
    let mut events = [first.events(), second.events()];
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(events.each_mut().map(changes), [(0, 0); 2]);
}

#[tokio::test(start_paused = true)]
async fn a_machine_is_known_again_by_its_state_or_by_its_mac() {
    let manager = MemoryManager::new(config(DUAL));
    let state = Memory::default();
    let kernel = FakeKernel::node(1);
    let with = |kernel: &FakeKernel, state: &Memory| {
        builder("a", &manager, kernel).state(state.clone()).start()
    };
    let first = with(&kernel, &state).await.expect("all parts are there");
    ready_within(MINUTE, &first).await;
    let subnet = subnet_of(&first, Family::V4);
    let saved = state.load().await.expect("readable").expect("a state");
    let instance = saved.instance.expect("an instance");
    drop(first);
    // On other hardware, at another address, with the state: the disk moved.
    let moved = with(&FakeKernel::node(2), &state)
        .await
        .expect("all parts are there");
    ready_within(MINUTE, &moved).await;
    assert_eq!(subnet_of(&moved, Family::V4), subnet);
    let saved = state.load().await.expect("readable").expect("a state");
    assert_eq!(saved.instance, Some(instance));
    drop(moved);
    // Where it was before, without the state, while an earlier run seems to live.
    let back = with(&kernel, &state).await.expect("all parts are there");
    ready_within(MINUTE, &back).await;
    let forgetful = with(&kernel, &Memory::default())
        .await
        .expect("all parts are there");
    ready_within(MINUTE, &forgetful).await;
    assert_eq!(subnet_of(&forgetful, Family::V4), subnet);
}

#[tokio::test(start_paused = true)]
async fn machines_that_were_cloned_with_their_state_come_to_rest() {
    let manager = MemoryManager::new(config(DUAL));
    let state = Memory::default();
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let original = builder("a", &manager, &kernels[0]).state(state.clone());
    let original = original.start().await.expect("all parts are there");
    ready_within(MINUTE, &original).await;
    let copy = Memory::default();
    let saved = state.load().await.expect("readable").expect("a state");
    copy.save(&saved).await.expect("writable");
    let clone = builder("a", &manager, &kernels[1]).state(copy.clone());
    let clone = clone.start().await.expect("all parts are there");
    tokio::time::sleep(5 * MINUTE).await;
    let mut events = [original.events(), clone.events()];
    tokio::time::sleep(20 * MINUTE).await;
    assert_eq!(events.each_mut().map(changes), [(0, 0); 2]);
    let both = [&original, &clone].map(|overlay| lease_condition(overlay).0);
    assert!(
        both.contains(&"Held".to_owned()) && both.contains(&"NodeIdHeld".to_owned()),
        "{both:?}"
    );
    let instances = [
        state.load().await.expect("readable").expect("a state"),
        copy.load().await.expect("readable").expect("a state"),
    ]
    .map(|saved| saved.instance);
    assert_ne!(instances[0], instances[1], "each is its own machine now");
}

#[tokio::test(start_paused = true)]
async fn a_renamed_machine_keeps_its_subnet_and_its_peers_do_nothing() {
    let (manager, kernels, [a, b]) = pair().await;
    let subnet = subnet_of(&a, Family::V4);
    a.stop().await.expect("running");
    let mut events = b.events();
    let renamed = start("a.example.org", &manager, &kernels[0]).await;
    settle(&renamed).await;
    settle(&b).await;
    assert_eq!(subnet_of(&renamed, Family::V4), subnet);
    assert_eq!(lease_condition(&renamed).0, "Held");
    assert_eq!(manager.snapshot().leases.len(), 2);
    while let Ok(event) = events.try_recv() {
        assert!(!matches!(event, OverlayEvent::Step { .. }), "{event:?}");
    }
    assert!(route_to(&kernels[1], subnet).is_some());
}

#[tokio::test(start_paused = true)]
async fn whom_others_must_reject_says_so() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    // A living machine of this MAC, at another address.
    let mut older = peer(7, "10.42.200.0/24");
    older.subnet.v6 = None;
    manager
        .put_raw(older)
        .expect("no family is in the wrong place");
    let a = builder("a", &manager, &kernel)
        .instance(InstanceId::from_bits(7))
        .start()
        .await
        .expect("all parts are there");
    ready_within(MINUTE, &a).await;
    let mac = manager
        .snapshot()
        .leases
        .iter()
        .find(|lease| lease.node == node("a"))
        .expect("its record")
        .attrs
        .backend_data
        .clone();
    let mut older = peer(7, "10.42.200.0/24");
    older.attrs.backend_data.v4 = mac.v4;
    manager
        .put_raw(older)
        .expect("no family is in the wrong place");
    settle(&a).await;
    let (reason, message) = lease_condition(&a);
    assert_eq!(reason, "Rejected", "{message}");
    assert!(message.contains("10.42.200.0-24"), "{message}");
    let mut now = manager.snapshot().leases;
    now.retain(|lease| lease.node != node("a"));
    manager.remove(&now[0].key);
    settle(&a).await;
    assert_eq!(lease_condition(&a).0, "Held");
    assert!(kernel.get(&ObjectKey::Link(dev("flannel.1"))).is_some());
}
