//! The watch of the manager on the fake store: whatever happens to it, it tells all there is and
//! says when it cannot.

#[path = "store/common.rs"]
mod common;

use std::time::Duration;

use flannel_core::manager::Error;
use flannel_core::{Event, EventStream, LeaseKey, Manager, Revision};
use flannel_testkit::fake_store::{Cut, Delivery, KeyRange, Layout, StoreManager};
use tokio::time::{Instant, sleep, timeout};

use common::{SECOND, V4, World, acquire, next, request, snapshot, until};

/// A watch that has begun, and the node it is of.
async fn begun(world: &World) -> (StoreManager, EventStream) {
    let node = world.node("watcher");
    let mut watch = node.watch_leases();
    snapshot(&mut watch).await;
    until(&mut watch, |event| matches!(event, Event::Config(_))).await;
    (node, watch)
}

#[tokio::test(start_paused = true)]
async fn a_deaf_watch_is_noticed_within_seconds() {
    let world = World::new(V4);
    let (node, mut watch) = begun(&world).await;
    // A while of silence that is none.
    for _ in 0..10 {
        let event = next(&mut watch).await;
        assert!(
            matches!(event, Ok(Event::Progress(Revision(2)))),
            "{event:?}"
        );
    }
    assert_eq!(node.store().counts()["watch"], 1);
    node.store().deafen_watches();
    let start = Instant::now();
    let lease = acquire(&world.node("a"), &request("a")).await;
    assert!(matches!(
        next(&mut watch).await,
        Err(Error::Unavailable { .. })
    ));
    let (_, keys) = snapshot(&mut watch).await;
    assert_eq!(keys, [lease.key.to_string()]);
    assert!(start.elapsed() <= 6 * SECOND, "after {:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn every_end_of_a_watch_is_followed_by_a_snapshot() {
    type Break = fn(&World, &StoreManager);
    let breaks: [(&str, Break); 5] = [
        ("broken", |_, node| node.store().break_watches()),
        ("cut", |_, node| {
            node.store().cut(Cut::Fail);
            node.store().heal();
        }),
        ("deaf", |_, node| node.store().deafen_watches()),
        ("behind", |world, node| {
            let hold = Delivery {
                hold: true,
                ..Delivery::PLAIN
            };
            node.store().deliver(hold);
            world.go("10.5.8.0-24", [198, 51, 100, 8]);
            world.go("10.5.8.0-24", [198, 51, 100, 8]);
            let compacted = world.store.compact(world.store.revision());
            compacted.expect("compacted");
            node.store().deliver(Delivery::PLAIN);
        }),
        ("restored", |world, _| {
            world.store.restore(&world.store.backup())
        }),
    ];
    for (what, end) in breaks {
        let world = World::new(V4);
        world.go("10.5.7.0-24", [198, 51, 100, 7]);
        let (node, mut watch) = begun(&world).await;
        end(&world, &node);
        world
            .store
            .delete(format!("{}/10.5.7.0-24", world.layout.subnets()));
        world.go("10.5.9.0-24", [198, 51, 100, 9]);
        let first = next(&mut watch).await;
        assert!(first.is_err(), "{what}: {first:?}");
        let (revision, keys) = snapshot(&mut watch).await;
        assert_eq!(revision, world.store.revision(), "{what}");
        assert_eq!(
            keys,
            world
                .keys()
                .iter()
                .map(|key| { format!("{}{key}", Layout::DEFAULT_PREFIX) })
                .collect::<Vec<_>>(),
            "{what}"
        );
        world.go("10.5.10.0-24", [198, 51, 100, 10]);
        until(&mut watch, |event| matches!(event, Event::Put(_))).await;
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_missed_and_nothing_old_is_told_while_a_watch_begins() {
    // Opening the watch takes a second, the reading another one.
    for tenths in 0..25 {
        let world = World::new(V4);
        let node = world.node("watcher");
        node.store().set_latency(SECOND / 2);
        let mut watch = node.watch_leases();
        let begun = async {
            let (revision, keys) = snapshot(&mut watch).await;
            if keys.is_empty() {
                until(&mut watch, |event| matches!(event, Event::Put(_))).await;
            }
            for _ in 0..3 {
                if let Ok(Event::Put(lease)) = next(&mut watch).await {
                    assert!(lease.revision > revision, "written after {tenths} tenths");
                }
            }
        };
        let written = async {
            sleep(SECOND * tenths / 10).await;
            world.go("10.5.7.0-24", [198, 51, 100, 7]);
        };
        tokio::join!(biased; begun, written);
        assert_eq!(node.store().counts()["watch"], 1, "after {tenths} tenths");
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_too_long_for_a_record_is_not_taken_for_another() {
    let world = World::new(V4);
    let (_, mut watch) = begun(&world).await;
    let (start, end) = (format!("{}/", world.layout.subnets()), "10.5.9.0-24");
    let longest = "x".repeat(LeaseKey::MAX_LEN - start.len() - end.len()) + end;
    world.go(&longest, [198, 51, 100, 9]);
    let put = next(&mut watch).await;
    let Ok(Event::Put(lease)) = put else {
        panic!("the longest key gives {put:?}");
    };
    let longer = format!("{longest}!");
    world.go(&longer, [198, 51, 100, 9]);
    world.store.delete(format!("{start}{longer}"));
    for _ in 0..2 {
        match next(&mut watch).await {
            Ok(Event::Unreadable(unreadable)) => assert_ne!(unreadable.key, lease.key),
            Ok(Event::Delete { key, .. }) => assert_ne!(key, lease.key),
            other => panic!("a longer one gives {other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_is_told_once_in_a_while_and_then_found_again() {
    for cut in [Cut::Fail, Cut::Hang, Cut::Deny] {
        let world = World::new(V4);
        let (node, mut watch) = begun(&world).await;
        node.store().cut(cut);
        let start = Instant::now();
        let mut errors = 0;
        while start.elapsed() < 600 * SECOND {
            assert!(next(&mut watch).await.is_err() || errors == 0, "{cut:?}");
            errors += 1;
        }
        assert!(
            (60..300).contains(&errors),
            "{cut:?}: {errors} reports in ten minutes"
        );
        node.store().heal();
        let healed = Instant::now();
        snapshot(&mut watch).await;
        assert!(
            healed.elapsed() <= 9 * SECOND,
            "{cut:?}: after {:?}",
            healed.elapsed()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_restored_store_is_seen_as_it_is_although_its_revisions_are_old() {
    let world = World::new(V4);
    world.go("10.5.7.0-24", [198, 51, 100, 7]);
    let backup = world.store.backup();
    for _ in 0..5 {
        world.go("10.5.9.0-24", [198, 51, 100, 9]);
    }
    let (_, mut watch) = begun(&world).await;
    world.store.restore(&backup);
    let (revision, keys) = snapshot(&mut watch).await;
    assert_eq!(revision, Revision(3));
    assert_eq!(keys.len(), 1);
    world.go("10.5.8.0-24", [198, 51, 100, 8]);
    let put = until(&mut watch, |event| matches!(event, Event::Put(_))).await;
    assert!(matches!(put, Event::Put(lease) if lease.revision == Revision(4)));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_lost_on_the_worst_lawful_delivery() {
    let world = World::new(V4);
    let (node, mut watch) = begun(&world).await;
    node.store().deliver(Delivery {
        delay: SECOND,
        reorder: Some(7),
        split: true,
        repeat: true,
        ..Delivery::PLAIN
    });
    for n in 1..=9 {
        world.go(&format!("10.5.{n}.0-24"), [198, 51, 100, n]);
    }
    let mut seen = std::collections::BTreeSet::new();
    let start = Instant::now();
    while seen.len() < 9 {
        assert!(start.elapsed() < 60 * SECOND, "only {seen:?} is told");
        if let Ok(Event::Put(lease)) = next(&mut watch).await {
            seen.insert(lease.key);
        }
    }
    assert_eq!(node.store().counts()["watch"], 1, "in one watch");
}

#[tokio::test(start_paused = true)]
async fn junk_is_reported_and_what_is_not_flannels_is_passed_over() {
    let world = World::new(V4);
    let (_, mut watch) = begun(&world).await;
    let subnets = world.layout.subnets();
    for (key, value) in [
        (format!("{subnets}/junk"), "{}"),
        (format!("{subnets}-old/10.5.9.0-24"), r#"{"PublicIP":null}"#),
        (
            format!("{subnets}/{}10.5.9.0-24", "x".repeat(600)),
            r#"{"PublicIP":"192.0.2.1"}"#,
        ),
        (
            format!("{subnets}/10.5.9.0-24"),
            r#"{"PublicIP":"0.0.0.0"}"#,
        ),
    ] {
        world.store.put(&key, value);
        let event = next(&mut watch).await;
        let Ok(Event::Unreadable(unreadable)) = event else {
            panic!("{key} gives {event:?}");
        };
        world.store.delete(&key);
        let event = next(&mut watch).await;
        let Ok(Event::Delete { key: deleted, .. }) = event else {
            panic!("the end of {key} gives {event:?}");
        };
        assert_eq!(deleted, unreadable.key);
    }
    world.store.put("/coreos.com/network/other", "?");
    world
        .store
        .put("/coreos.com/networks/subnets/10.5.9.0-24", "?");
    world.store.put(world.layout.config(), "?");
    let event = next(&mut watch).await;
    assert!(
        matches!(event, Ok(Event::ConfigUnreadable { .. })),
        "{event:?}"
    );
    world.store.delete(world.layout.config());
    let event = next(&mut watch).await;
    assert!(
        matches!(event, Ok(Event::ConfigUnreadable { .. })),
        "{event:?}"
    );
}

/// How often a node's record has been written.
fn writes(world: &World, lease: &flannel_core::Lease) -> u64 {
    world.store.entries(&KeyRange::key(lease.key.as_str()))[0].version
}

#[tokio::test(start_paused = true)]
async fn beside_go_flannel_our_record_is_put_again_once_after_each_write() {
    for beside_go in [false, true] {
        let world = World::new(V4);
        if beside_go {
            world.go("10.5.9.0-24", [198, 51, 100, 7]);
        }
        // What only looks like theirs does not count.
        world
            .store
            .put(format!("{}/10.5.7.0-25", world.layout.subnets()), "{}");
        let node = world.node("a");
        let mut lease = acquire(&node, &request("a")).await;
        let mut watch = node.watch_leases();
        let follow = async |watch: &mut EventStream, time: Duration| {
            let watching = async {
                loop {
                    drop(next(watch).await);
                }
            };
            timeout(time, watching).await.expect_err("it goes on");
        };
        follow(&mut watch, 31 * SECOND).await;
        let echoes = u64::from(beside_go);
        assert_eq!(writes(&world, &lease), 1 + echoes);
        follow(&mut watch, 600 * SECOND).await;
        assert_eq!(writes(&world, &lease), 1 + echoes, "once");
        // The lease is renewed by who has not heard of that; each renewal is a write then.
        lease.attrs.public_ip.v4 = Some([192, 0, 2, 77].into());
        lease = node.renew_lease(&lease).await.expect("renewed");
        assert_eq!(writes(&world, &lease), 2 + echoes);
        follow(&mut watch, 31 * SECOND).await;
        assert_eq!(writes(&world, &lease), 2 + 2 * echoes);
        let renewed = node.renew_lease(&lease).await.expect("renewed");
        assert_eq!(writes(&world, &lease), 2 + 3 * echoes);
        node.release_lease(&renewed).await.expect("released");
    }
}
