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
use flannel_testkit::fake_kernel::{Failure, FakeKernel, FaultKind};
use flannel_testkit::fake_store::{FakeStore, KeyRange, Layout, StoreManager, StoreOptions};
use tokio::sync::broadcast;

const MINUTE: Duration = Duration::from_secs(60);

/// Counts how often a lease was got and lost since the events were looked at last.
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
    let forgetful = with(&kernel.without_lock(), &Memory::default())
        .await
        .expect("all parts are there");
    ready_within(MINUTE, &forgetful).await;
    assert_eq!(subnet_of(&forgetful, Family::V4), subnet);
}

/// A machine and its clone, made with its state while it ran, some minutes later.
async fn cloned() -> ([Overlay; 2], [Memory; 2]) {
    let manager = MemoryManager::new(config(DUAL));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let [state, copy] = [Memory::default(), Memory::default()];
    let original = builder("a", &manager, &kernels[0]).state(state.clone());
    let original = original.start().await.expect("all parts are there");
    ready_within(MINUTE, &original).await;
    let saved = state.load().await.expect("readable").expect("a state");
    copy.save(&saved).await.expect("writable");
    let clone = builder("a", &manager, &kernels[1]).state(copy.clone());
    let clone = clone.start().await.expect("all parts are there");
    tokio::time::sleep(5 * MINUTE).await;
    ([original, clone], [state, copy])
}

#[tokio::test(start_paused = true)]
async fn machines_that_were_cloned_with_their_state_come_to_rest() {
    let ([original, clone], [state, copy]) = cloned().await;
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

#[tokio::test(start_paused = true)]
async fn a_machine_whose_node_id_was_taken_while_it_was_off_says_so_and_uses_nothing_of_it() {
    let manager = MemoryManager::new(config(DUAL));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let state = Memory::default();
    let broken = builder("db", &manager, &kernels[0]).state(state.clone());
    let broken = broken.start().await.expect("all parts are there");
    ready_within(MINUTE, &broken).await;
    drop(broken);
    let replacement = start("db", &manager, &kernels[1]).await;
    // It is mended, and booted anew: nothing is in its kernel.
    let kernel = FakeKernel::node(1);
    let mended = builder("db", &manager, &kernel).state(state.clone());
    let mended = mended.start().await.expect("all parts are there");
    let refused = tokio::time::timeout(MINUTE, mended.ready()).await;
    assert!(
        matches!(&refused, Ok(Err(Error::NotReady(condition))) if condition.reason == "NodeIdHeld"),
        "{refused:?}"
    );
    let mut events = mended.events();
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(lease_condition(&mended).0, "NodeIdHeld");
    let mut told = 0;
    while let Ok(event) = events.try_recv() {
        told += usize::from(matches!(event, OverlayEvent::Condition(_)));
    }
    assert!(told < 10, "its conditions changed {told} times");
    assert!(kernel.get(&ObjectKey::Link(dev("flannel.1"))).is_none());
    replacement.stop().await.expect("running");
    mended
        .wait_for(|status| status.is_true(ConditionType::Lease))
        .await
        .expect("running");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_was_cloned_gets_its_node_id_back_when_the_clone_is_gone() {
    let ([original, clone], _) = cloned().await;
    let (holder, other) = match lease_condition(&clone).0.as_str() {
        "Held" => (clone, original),
        _ => (original, clone),
    };
    holder.stop().await.expect("running");
    let back = other.wait_for(|status| status.is_true(ConditionType::Lease));
    let back = tokio::time::timeout(5 * MINUTE, back).await;
    assert!(back.is_ok(), "{:?}", lease_condition(&other));
}

#[tokio::test(start_paused = true)]
async fn two_runs_of_one_machine_take_nothing_from_each_other() {
    let manager = MemoryManager::new(config(DUAL)).with_ttl(10 * MINUTE);
    let kernel = FakeKernel::node(1);
    let old = start("a", &manager, &kernel).await;
    let new = builder("a", &manager, &kernel.without_lock());
    let new = new.start().await.expect("all parts are there");
    ready_within(MINUTE, &new).await;
    let mut events = [old.events(), new.events()];
    tokio::time::sleep(120 * MINUTE).await;
    assert_eq!(events.each_mut().map(changes), [(0, 0); 2]);
}

#[tokio::test(start_paused = true)]
async fn a_record_of_a_former_name_that_goes_by_itself_is_no_failure_of_the_start() {
    let clock = std::sync::Arc::new(flannel_core::TokioClock::new());
    let store = FakeStore::new(clock);
    let layout = Layout::default();
    store.put(layout.config(), DUAL);
    let kernel = FakeKernel::node(1);
    let with = |link: &str, name: &str| {
        let manager = StoreManager::new(store.link(link), StoreOptions::default());
        Overlay::builder(node(name))
            .manager(manager)
            .backend(flannel_backend_vxlan::VxlanBackend::new())
            .kernel(kernel.clone())
    };
    let former = with("a", "web").start().await.expect("all parts are there");
    ready_within(MINUTE, &former).await;
    drop(former);
    let records = || {
        let entries = store.entries(&KeyRange::prefix(layout.subnets()));
        entries
            .into_iter()
            .map(|entry| (entry.key, entry.value))
            .collect::<Vec<_>>()
    };
    let (_, value) = records().pop().expect("a record");
    let renamed = with("b", "web.example.org")
        .start()
        .await
        .expect("all parts are there");
    ready_within(MINUTE, &renamed).await;
    drop(renamed);
    // A backup brings the former one back, before a restart.
    let (key, own) = records().pop().expect("a record");
    store.delete(&key);
    store.put_for(
        "/coreos.com/network/subnets/10.42.3.0-24&fd00:42:0:3::-64",
        value,
        60 * MINUTE,
    );
    store.put_for(&key, own, 60 * MINUTE);
    for n in 0..20_u8 {
        let theirs = peer(100 + n, &format!("10.42.{}.0/24", 100 + n));
        let value = flannel_core::wire::lease_value(&theirs.node, None, &theirs.attrs);
        store.put_for(
            format!("{}/10.42.{}.0-24", layout.subnets(), 100 + n),
            value.expect("a value"),
            60 * MINUTE,
        );
    }
    // The record is seen before all is programmed.
    kernel.fail_next(FaultKind::Op {
        kind: "route",
        failure: Failure::Busy,
    });
    let again = with("c", "web.example.org")
        .start()
        .await
        .expect("all parts are there");
    let mut reasons = Vec::new();
    let mut ready = std::pin::pin!(again.ready());
    let mut is_ready = false;
    for _ in 0..120 {
        tokio::select! {
            done = &mut ready, if !is_ready => {
                done.expect("no failure of the start");
                is_ready = true;
            }
            () = tokio::time::sleep(Duration::from_secs(1) / 2) => {}
        }
        reasons.push(lease_condition(&again).0);
    }
    assert!(is_ready, "{reasons:?}");
    reasons.dedup();
    assert!(
        reasons.ends_with(&["Rejected".to_owned(), "Held".to_owned()]),
        "{reasons:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn two_runs_of_one_machine_under_two_names_come_to_rest() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let state = Memory::default();
    let old = builder("a", &manager, &kernel)
        .state(state.clone())
        .start()
        .await
        .expect("all parts are there");
    ready_within(MINUTE, &old).await;
    let new = builder("a.example.org", &manager, &kernel.without_lock()).state(state.clone());
    let new = new.start().await.expect("all parts are there");
    ready_within(MINUTE, &new).await;
    tokio::time::sleep(5 * MINUTE).await;
    let mut events = [old.events(), new.events()];
    tokio::time::sleep(120 * MINUTE).await;
    assert_eq!(events.each_mut().map(changes), [(0, 0); 2]);
    assert_eq!(lease_condition(&new).0, "Held", "the later one");
    let (reason, message) = lease_condition(&old);
    assert!(
        reason == "Refused" && message.contains("a.example.org"),
        "{message}"
    );
    new.stop().await.expect("running");
    old.wait_for(|status| status.is_true(ConditionType::Lease))
        .await
        .expect("running");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_moves_to_its_former_record_leaves_none_behind() {
    use flannel_core::{LeaseRequest, Manager};
    let manager = MemoryManager::new(config(DUAL));
    let request = LeaseRequest {
        instance: Some(InstanceId::from_bits(7)),
        ..LeaseRequest::new(node("web.example.org"), peer(7, "10.42.1.0/24").attrs)
    };
    manager.acquire_lease(&request).await.expect("a lease");
    let other = DUAL.replace("10.42.0.0/16", "10.43.0.0/16");
    manager.set_config(config(&other));
    let mut former = peer(7, "10.43.9.0/24");
    former.subnet.v6 = Some("fd00:42:0:9::/64".parse().expect("a subnet"));
    former.instance = request.instance;
    manager
        .put_raw(former.clone())
        .expect("no family is in the wrong place");
    let lease = manager.acquire_lease(&request).await.expect("a lease");
    assert_eq!(lease.subnet, former.subnet);
    assert_eq!(manager.snapshot().leases, [lease]);
}

#[tokio::test(start_paused = true)]
async fn a_renamed_machine_keeps_what_it_uses_where_its_new_name_had_a_record() {
    use flannel_core::{LeaseRequest, Manager};
    let manager = MemoryManager::new(config(DUAL));
    let dead = LeaseRequest {
        instance: Some(InstanceId::from_bits(6)),
        ..LeaseRequest::new(node("db"), peer(6, "10.42.1.0/24").attrs)
    };
    manager.acquire_lease(&dead).await.expect("a lease");
    let mut request = LeaseRequest {
        instance: Some(InstanceId::from_bits(7)),
        ..LeaseRequest::new(node("web"), peer(7, "10.42.1.0/24").attrs)
    };
    let lease = manager.acquire_lease(&request).await.expect("a lease");
    request.node = node("db");
    request.previous = lease.subnet;
    let now = manager.acquire_lease(&request).await.expect("a lease");
    assert_eq!(now.subnet, lease.subnet, "its containers are there");
    assert_eq!(manager.snapshot().leases, [now]);
}
