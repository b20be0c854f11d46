//! A program that undoes what we do, on a real kernel: it is told, and it costs nothing else.
#![allow(missing_docs, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use flannel_core::{ConditionType, Kernel, Object, ObjectKey, Op, OverlayEvent};
use flannel_e2e::{Cluster, DUAL, Setup, until, within};
use flannel_netlink::NetlinkKernel;

/// The time that the other program is there.
const FIGHT: Duration = Duration::from_secs(12);

/// Deletes an object whenever it is there, as fast as it can, until told to stop; answers how often.
async fn undo(hand: NetlinkKernel, object: Object, stop: Arc<AtomicBool>) -> usize {
    let key = object.key();
    let mut undone = 0;
    while !stop.load(Ordering::Relaxed) {
        // A kernel that is busy with other namespaces is asked again.
        let found = hand.read(&[key.clone()].into()).await.unwrap_or_default();
        if let Some(found) = found.get(&key) {
            let [result] = &hand.apply(&[Op::Delete(found.clone())]).await[..] else {
                panic!("one answer for one op");
            };
            undone += usize::from(result.is_ok());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    undone
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stdout, reason = "what was measured is worth a line")]
async fn a_fight_over_a_route_ends_and_all_else_is_repaired_at_once() {
    let Some(cluster) = Cluster::start("fight", Setup::new(2, DUAL)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let right = node.ours().await;
    let routes: Vec<&Object> = right
        .values()
        .filter(|object| matches!(object, Object::Route(_)))
        .collect();
    let [fought, other] = routes[..] else {
        panic!("one route a family: {routes:?}");
    };
    let (fought, other) = (fought.clone(), other.clone());
    let repairs = Arc::new(AtomicUsize::new(0));
    let mut events = node.overlay().events();
    let counts = {
        let (repairs, key) = (Arc::clone(&repairs), fought.key());
        tokio::spawn(async move {
            while let Ok(event) = events.recv().await {
                if matches!(&event, OverlayEvent::Step { step, repair: true } if step.op.key() == key)
                {
                    repairs.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    };
    let stop = Arc::new(AtomicBool::new(false));
    let hand = NetlinkKernel::in_namespace(node.host.ns.path()).expect("a kernel");
    let adversary = tokio::spawn(undo(hand, fought.clone(), Arc::clone(&stop)));
    tokio::time::sleep(FIGHT / 2).await;
    let status = node.overlay().status();
    let told = status
        .condition(ConditionType::Foreign)
        .expect("one of each");
    assert_eq!(told.reason, "Contended", "{told}");
    assert!(
        told.message.starts_with(&fought.to_string()),
        "{}",
        told.message
    );
    assert!(status.working, "{:?}", status.conditions);
    for _ in 0..5 {
        // No more often than is borne for ever.
        let start = tokio::time::Instant::now();
        node.break_by(&[Op::Delete(other.clone())]).await;
        let is_back = async |key: &ObjectKey| node.objects().await.contains_key(key);
        until(
            "another route is back",
            Duration::from_secs(1),
            async || is_back(&other.key()).await,
        )
        .await;
        println!("another route was back after {:?}", start.elapsed());
        assert!(start.elapsed() < Duration::from_millis(500));
    }
    tokio::time::sleep(FIGHT / 2).await;
    stop.store(true, Ordering::Relaxed);
    let undone = adversary.await.expect("no panic");
    let made = repairs.load(Ordering::Relaxed);
    println!("{made} repairs, undone {undone} times in {FIGHT:?}");
    assert!((20..=32).contains(&made), "{made} repairs");
    within("it comes back", Duration::from_secs(31), async {
        node.repaired("the route is back", &right).await;
    })
    .await;
    cluster.assert_reachable("after the fight");
    counts.abort();
}
