//! What stands in the store and no node can have written costs nobody a subnet and stops nobody.
#![allow(missing_docs, reason = "tests")]

#[path = "store/common.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod common;

use common::{SECOND, V4, World, acquire, request, snapshot, until};
use flannel_core::manager::Error;
use flannel_core::{DualStack, Event, Lease, LeaseRequest, Manager};
use flannel_testkit::fake_store::StoreManager;

const SMALL: &str = r#"{"Network":"10.5.0.0/24","SubnetLen":26}"#;

fn wanting(name: &str, subnet: &str) -> LeaseRequest {
    LeaseRequest {
        previous: DualStack::v4(subnet.parse().expect("a subnet")),
        ..request(name)
    }
}

/// Puts a value under a key of a record, with a lease of the store or without.
fn put(world: &World, key: &str, value: &str, expires: bool) {
    let key = format!("{}/{key}", world.layout.subnets());
    if expires {
        world.store.put_for(key, value, 3600 * SECOND);
    } else {
        world.store.put(key, value);
    }
}

/// Whether a node that follows the store, renews and starts again keeps its subnet.
async fn keeps(world: &World, node: &StoreManager, lease: &Lease) -> Result<(), Error> {
    let mut watch = node.watch_leases();
    snapshot(&mut watch).await;
    let renewed = node.renew_lease(lease).await?;
    assert_eq!(renewed.revision, lease.revision, "nothing was written");
    let again = world.node(lease.node.as_str());
    let found = again.acquire_lease(&request(lease.node.as_str())).await?;
    assert_eq!(found.key, lease.key, "it moved");
    assert_eq!(found.revision, lease.revision, "nothing was written");
    Ok(())
}

const GO: &str = r#"{"PublicIP":"198.51.100.7","PublicIPv6":null}"#;

#[tokio::test(start_paused = true)]
async fn nobody_gives_way_to_what_go_flannel_cannot_have_written() {
    for (key, value, expires) in [
        ("10.5.3.0-25", "{}", true),
        ("10.5.0.0-21", "{}", true),
        ("10.5.0.0-21", GO, true),
        ("10.5.3.0-24&fd00::-64", "{}", true),
        ("10.5.3.0-24&fd00::-64", GO, true),
        // Of another length, unaligned, in another spelling, outside.
        ("10.5.3.128-25", GO, true),
        ("10.5.3.7-24", GO, true),
        ("junk10.5.3.0-24", GO, true),
        ("10.5.3.0-24/extra", GO, true),
        ("10.4.0.0-14", GO, true),
        // At no address of a node, and of another backend than the config's, which is udp.
        ("10.5.3.0-25", r#"{"PublicIP":"127.0.0.1"}"#, true),
        ("10.5.3.0-25", r#"{"PublicIP":"10.5.9.9"}"#, true),
        (
            "10.5.3.0-25",
            r#"{"PublicIP":"198.51.100.7","BackendType":"vxlan"}"#,
            true,
        ),
        // A reservation.
        ("10.5.3.0-25", GO, false),
    ] {
        let world = World::new(V4);
        let node = world.node("a");
        let lease = acquire(&node, &wanting("a", "10.5.3.0/24")).await;
        put(&world, key, value, expires);
        let kept = keeps(&world, &node, &lease).await;
        assert!(kept.is_ok(), "{key} {value}: {kept:?}");
        // Who joins then has a subnet too.
        let other = acquire(&world.node("b"), &request("b")).await;
        assert!(!other.subnet.overlaps(&lease.subnet), "{key} {value}");
    }
}

#[tokio::test(start_paused = true)]
async fn halves_of_everything_evict_nobody_and_stop_nobody() {
    for value in ["{}", GO] {
        let world = World::new(SMALL);
        let node = world.node("a");
        let lease = acquire(&node, &request("a")).await;
        put(&world, "10.5.0.0-25", value, true);
        put(&world, "10.5.0.128-25", value, true);
        keeps(&world, &node, &lease).await.expect("it is kept");
        for name in ["b", "c"] {
            acquire(&world.node(name), &request(name)).await;
        }
        let full = world.node("d").acquire_lease(&request("d")).await;
        assert!(matches!(full, Err(Error::PoolExhausted { .. })), "{full:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_join_goes_round_debris_and_takes_what_it_covers_last() {
    let world = World::new(SMALL);
    for key in ["10.5.0.64-27", "10.5.0.128-28"] {
        put(&world, key, "{}", true);
    }
    let first = acquire(&world.node("a"), &request("a")).await;
    assert_eq!(first.subnet.to_string(), "10.5.0.192/26");
    for name in ["b", "c"] {
        acquire(&world.node(name), &request(name)).await;
    }
    // Where the very key stands, no record can be made; and what was had before is had again.
    let world = World::new(SMALL);
    for key in ["10.5.0.64-26", "10.5.0.128-26junk", "10.5.0.192-27"] {
        put(&world, key, "{}", true);
    }
    let lease = acquire(&world.node("a"), &request("a")).await;
    assert_eq!(lease.subnet.to_string(), "10.5.0.192/26");
    let full = world.node("b").acquire_lease(&request("b")).await;
    assert!(matches!(full, Err(Error::PoolExhausted { .. })), "{full:?}");
    let world = World::new(SMALL);
    put(&world, "10.5.0.128-28", "{}", true);
    let lease = acquire(&world.node("a"), &wanting("a", "10.5.0.128/26")).await;
    assert_eq!(lease.subnet.to_string(), "10.5.0.128/26");
}

#[tokio::test(start_paused = true)]
async fn who_gives_way_says_to_whom() {
    let world = World::new(r#"{"Network":"10.5.0.0/20","SubnetLen":25}"#);
    let node = world.node("a");
    let lease = acquire(&node, &wanting("a", "10.5.3.0/25")).await;
    let mut watch = node.watch_leases();
    snapshot(&mut watch).await;
    // Under a config that was not seen yet nobody can have written it.
    world.go("10.5.3.0-24", [198, 51, 100, 7]);
    until(&mut watch, |event| matches!(event, Event::Put(_))).await;
    node.renew_lease(&lease).await.expect("it is still ours");
    world.store.put(world.layout.config(), V4);
    until(&mut watch, |event| matches!(event, Event::Config(_))).await;
    world.go("10.5.3.0-24", [198, 51, 100, 7]);
    let deleted = |event: &Event| matches!(event, Event::Delete { key, .. } if *key == lease.key);
    until(&mut watch, deleted).await;
    let lost = node.renew_lease(&lease).await.expect_err("it is lost");
    let text = lost.to_string();
    for part in ["10.5.3.0-24", "198.51.100.7", "we removed our record"] {
        assert!(text.contains(part), "{text}");
    }
}

/// A store with far more in it than one answer may be.
#[tokio::test(start_paused = true)]
async fn a_store_of_any_size_is_joined_and_left_as_it_is() {
    let world = World::new(V4);
    let node = |name: &str| {
        let node = world.node(name);
        node.store().set_largest(4_000);
        node
    };
    let first = acquire(&node("a"), &request("a")).await;
    for n in 0..40 {
        // Strangers' keys, and values too large for any lease under keys of flannel's.
        put(&world, &format!("junk-{n:02}"), &"x".repeat(3_000), false);
        put(&world, &format!("10.6.{n}.0-24"), &"x".repeat(5_000), true);
        put(&world, &format!("10.5.4.{n}-32"), &"x".repeat(900), true);
    }
    let again = node("a");
    assert_eq!(
        acquire(&again, &request("a")).await.revision,
        first.revision
    );
    // Something else to publish: a transaction.
    let mut wants = request("a");
    wants.attrs.public_ip.v4 = Some([192, 0, 2, 200].into());
    let written = acquire(&again, &wants).await;
    assert_eq!(written.key, first.key);
    assert!(written.revision > first.revision);
    again.renew_lease(&written).await.expect("it stands");
    let second = acquire(&node("b"), &request("b")).await;
    assert!(!second.subnet.overlaps(&first.subnet));
    let watching = node("c");
    let mut watch = watching.watch_leases();
    let event = until(&mut watch, |event| matches!(event, Event::Snapshot(_))).await;
    let Event::Snapshot(snapshot) = event else {
        unreachable!("it is one");
    };
    assert_eq!((snapshot.leases.len(), snapshot.unreadable.len()), (2, 120));
    let told = |start: &str| {
        let of_kind = snapshot
            .unreadable
            .iter()
            .find(|record| record.key.as_str().contains(start));
        of_kind.expect("it is told").reason.clone()
    };
    assert!(told("junk-").contains("no lease key"), "{}", told("junk-"));
    assert!(told("10.6.3.0").contains("bytes"), "{}", told("10.6.3.0"));
}
