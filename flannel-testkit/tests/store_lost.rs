//! Hundreds of nodes (optimised, a thousand) on a store that loses what it knew: everybody is there
//! again, and those whose kernels are simulated too have not taken a step.
#![allow(missing_docs, reason = "tests")]

#[path = "store/common.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use common::{SECOND, World, acquire};
use flannel_backend_vxlan::{VxlanBackend, VxlanData};
use flannel_core::{
    BackendType, ConditionType, DualStack, InstanceId, LeaseAttrs, LeaseRequest, MacAddr, Manager,
    NodeId, Overlay, PublicIp, Status,
};
use flannel_testkit::fake_kernel::FakeKernel;
use flannel_testkit::fake_store::{
    KeyEvent, KeyRange, Op, StoreManager, StoreOptions, Txn, WatchAnswer,
};
use tokio::sync::Notify;
use tokio::time::Instant;

const CONFIG: &str = r#"{"Network":"10.0.0.0/12","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;
/// The number of nodes: work grows with the square of it, and only optimised it is done in time.
const NODES: u16 = if cfg!(debug_assertions) { 250 } else { 1000 };
/// The number of those that have a kernel.
const WHOLE: u8 = 4;
const LATENCY: Duration = Duration::from_millis(1);

/// A node without a kernel: it holds a lease, and asks for it again as soon as its record is gone.
fn request(n: u16) -> LeaseRequest {
    let [high, low] = n.to_be_bytes();
    let data = VxlanData {
        vni: 1,
        vtep_mac: MacAddr([0x0e, 0, 0, 1, high, low]),
    };
    let attrs = LeaseAttrs {
        public_ip: PublicIp::v4([172, 16, high, low].into()),
        backend_type: Some(BackendType::vxlan()),
        backend_data: DualStack::v4(data.encode().expect("valid")),
    };
    let node = NodeId::new(format!("robot-{n}")).expect("a node id");
    LeaseRequest {
        instance: Some(InstanceId::from_bits(n.into())),
        ..LeaseRequest::new(node, attrs)
    }
}

/// Nodes without kernels, by the keys of their records: whoever's record is gone is told.
type Robots = BTreeMap<String, Arc<Notify>>;

async fn robot(world: &World, n: u16) -> (String, Arc<Notify>) {
    let link = world.store.link(format!("robot-{n}"));
    link.set_latency(LATENCY);
    let manager = StoreManager::new(link, StoreOptions::default());
    let mut wants = request(n);
    let lease = acquire(&manager, &wants).await;
    wants.previous = lease.subnet;
    let gone = Arc::new(Notify::new());
    let told = Arc::clone(&gone);
    tokio::spawn(async move {
        loop {
            told.notified().await;
            while manager.acquire_lease(&wants).await.is_err() {
                tokio::time::sleep(SECOND / 4).await;
            }
        }
    });
    (lease.key.to_string(), gone)
}

/// Tells robots, by one watch for all: it is not the store's watches that are tried here.
async fn follow(world: &World, robots: Robots) {
    let link = world.store.link("robots");
    link.set_latency(LATENCY);
    let range = KeyRange::prefix(world.layout.subnets());
    let mut watch = link.watch(range, None).await.expect("it is there");
    tokio::spawn(async move {
        loop {
            let answer = watch.next().await.expect("it lives");
            let WatchAnswer::Events { events, .. } = answer else {
                continue;
            };
            for event in events {
                if let KeyEvent::Delete { key, .. } = event
                    && let Some(gone) = robots.get(&key)
                {
                    gone.notify_one();
                }
            }
        }
    });
}

/// Deletes a range at one revision.
fn delete_all(world: &World, range: KeyRange) {
    let txn = Txn {
        then: vec![Op::Delete(range)],
        ..Txn::default()
    };
    world.store.txn(&txn).expect("nothing is wrong with it");
}

/// Every record's key, and what it says.
fn records(world: &World) -> BTreeMap<String, Vec<u8>> {
    let range = KeyRange::prefix(world.layout.subnets());
    let entries = world.store.entries(&range).into_iter();
    entries.map(|entry| (entry.key, entry.value)).collect()
}

async fn settled(
    what: &str,
    world: &World,
    overlays: &[Overlay],
    before: &BTreeMap<String, Vec<u8>>,
) {
    let start = Instant::now();
    while records(world) != *before {
        if start.elapsed() > 60 * SECOND {
            let now = records(world);
            let lacks: Vec<_> = before
                .iter()
                .filter(|(key, value)| now.get(*key) != Some(value))
                .map(|(key, value)| (key, String::from_utf8_lossy(value)))
                .collect();
            panic!("{what}: not there again: {lacks:?}");
        }
        tokio::time::sleep(SECOND / 10).await;
    }
    for overlay in overlays {
        let is = |status: &Status| {
            status.is_true(ConditionType::Peers)
                && status.is_true(ConditionType::Lease)
                && status.peers + 1 == usize::from(NODES)
        };
        overlay.wait_for(is).await.expect("running");
        overlay.converged().await.expect("running");
    }
}

fn no_steps(what: &str, kernels: &[FakeKernel]) {
    for kernel in kernels {
        let log = kernel.take_log();
        assert!(log.is_empty(), "{what}: {:?}", log.first());
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_loses_a_route_when_the_store_loses_all_records() {
    let world = World::new(CONFIG);
    let kernels: Vec<_> = (1..=WHOLE).map(FakeKernel::node).collect();
    let mut overlays = Vec::new();
    for (n, kernel) in (1..=WHOLE).zip(&kernels) {
        let link = world.store.link(format!("whole-{n}"));
        link.set_latency(LATENCY);
        let overlay = Overlay::builder(NodeId::new(format!("whole-{n}")).expect("a node id"))
            .seed(n.into())
            .manager(StoreManager::new(link, StoreOptions::default()))
            .backend(VxlanBackend::new())
            .kernel(kernel.clone())
            .start()
            .await
            .expect("all parts");
        overlay.ready().await.expect("ready");
        overlays.push(overlay);
    }
    let mut robots = Robots::new();
    for n in 0..NODES - u16::from(WHOLE) {
        robots.extend([robot(&world, n).await]);
    }
    follow(&world, robots).await;
    let before = records(&world);
    assert_eq!(before.len(), usize::from(NODES));
    settled("at first", &world, &overlays, &before).await;
    kernels.iter().for_each(|kernel| drop(kernel.take_log()));

    // As `del --prefix` does it, and one after the other.
    let prefix = world.layout.prefix().to_owned();
    delete_all(&world, KeyRange::prefix(world.layout.subnets()));
    settled("all at once", &world, &overlays, &before).await;
    no_steps("all at once", &kernels);
    for key in before.keys() {
        world.store.delete(key);
        tokio::time::sleep(Duration::from_micros(100)).await;
    }
    settled("one after the other", &world, &overlays, &before).await;
    no_steps("one after the other", &kernels);

    // With the config, which comes back after a while.
    let config = world.layout.config();
    delete_all(&world, KeyRange::prefix(prefix));
    tokio::time::sleep(30 * SECOND).await;
    world.store.put(config, CONFIG);
    settled("everything", &world, &overlays, &before).await;
    tokio::time::sleep(30 * SECOND).await;
    no_steps("everything", &kernels);
}

/// Once the config is back, the second reading comes, whatever else is deleted before it.
#[tokio::test(start_paused = true)]
async fn a_delete_after_the_config_is_back_puts_no_reading_off() {
    let world = World::new(CONFIG);
    let link = world.store.link("a");
    let overlay = Overlay::builder(NodeId::new("a").expect("a node id"))
        .manager(StoreManager::new(link.clone(), StoreOptions::default()))
        .backend(VxlanBackend::new())
        .kernel(FakeKernel::node(1))
        .start();
    let overlay = overlay.await.expect("all parts");
    overlay.ready().await.expect("ready");
    let join = async |n| acquire(&world.node("robot"), &request(n)).await.key;
    for n in 0..3 {
        join(n).await;
    }
    let knows = |n| move |status: &Status| status.peers == n;
    overlay.wait_for(knows(3)).await.expect("running");
    // None of them comes back.
    delete_all(&world, KeyRange::prefix(world.layout.prefix()));
    link.break_watches();
    tokio::time::sleep(5 * SECOND).await;
    let held = overlay.status();
    let held = held.condition(ConditionType::Peers).expect("told");
    assert_eq!(held.reason, "StoreUnconfigured");
    world.store.put(world.layout.config(), CONFIG);
    tokio::time::sleep(SECOND).await;
    for n in 10..18 {
        join(n).await;
    }
    overlay.wait_for(knows(11)).await.expect("running");
    // More than is believed at once.
    delete_all(&world, KeyRange::prefix(world.layout.subnets()));
    let is_settled = |status: &Status| status.peers == 0 && status.is_true(ConditionType::Peers);
    let settled = tokio::time::timeout(60 * SECOND, overlay.wait_for(is_settled)).await;
    settled
        .expect("the second reading decides")
        .expect("running");
}
