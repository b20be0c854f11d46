//! Machines behind node ids on a store: who asks, who answers, and what is taken.
#![allow(missing_docs, reason = "tests")]

#[path = "store/common.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod common;

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use common::{SECOND, V4, World, acquire, request, until};
use flannel_core::manager::Error;
use flannel_core::{Event, InstanceId, Lease, LeaseRequest, Manager, wire};
use flannel_testkit::fake_store::{Cut, StoreLink, StoreManager, StoreOptions};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// The request of a machine under a node id. Its address is that of the machine's name.
fn of_machine(id: &str, machine: &str) -> LeaseRequest {
    let bits = machine.bytes().fold(7, |n, b| n * 31 + u128::from(b));
    LeaseRequest {
        instance: Some(InstanceId::from_bits(bits)),
        attrs: request(machine).attrs,
        ..request(id)
    }
}

/// A machine: its manager, the link that it has to the store, and, while it lives, its watch.
struct Machine {
    link: StoreLink,
    manager: Arc<StoreManager>,
    watch: Option<JoinHandle<()>>,
}

impl Machine {
    fn new(world: &World, name: &str) -> Self {
        let link = world.store.link(name);
        Self {
            manager: Arc::new(StoreManager::new(link.clone(), StoreOptions::default())),
            link,
            watch: None,
        }
    }

    async fn joined(world: &World, name: &str, request: &LeaseRequest) -> (Self, Lease) {
        let mut machine = Self::new(world, name);
        let lease = acquire(&machine.manager, request).await;
        machine.follow().await;
        (machine, lease)
    }

    /// Follows the store from now on.
    async fn follow(&mut self) {
        let mut watch = self.manager.watch_leases();
        until(&mut watch, |event| matches!(event, Event::Snapshot(_))).await;
        self.watch = Some(tokio::spawn(async move {
            while poll_fn(|cx| watch.as_mut().poll_next(cx)).await.is_some() {}
        }));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(watch) = &self.watch {
            watch.abort();
        }
    }
}

/// Measures a claim: its time, and its outcome.
async fn timed(machine: &Machine, wants: &LeaseRequest) -> (Duration, Result<Lease, Error>) {
    let asked = Instant::now();
    let lease = machine.manager.acquire_lease(wants).await;
    (asked.elapsed(), lease)
}

fn questions(world: &World) -> usize {
    let keys = world.keys();
    keys.iter().filter(|key| key.contains("!ask")).count()
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_lives_answers_within_seconds_and_keeps_its_record() {
    let world = World::new(V4);
    let (first, lease) = Machine::joined(&world, "a", &of_machine("localhost", "a")).await;
    let second = Machine::new(&world, "b");
    let (took, refused) = timed(&second, &of_machine("localhost", "b")).await;
    assert!(took < 2 * SECOND, "{took:?}");
    let Err(Error::NodeIdHeld { public_ip, .. }) = &refused else {
        panic!("{refused:?}");
    };
    assert_eq!(*public_ip, lease.attrs.public_ip);
    let renewed = first.manager.renew_lease(&lease).await.expect("it is ours");
    assert_eq!(renewed.revision, lease.revision, "nothing was written");
    assert_eq!(questions(&world), 0, "an answered question is taken away");
}

#[tokio::test(start_paused = true)]
async fn who_does_not_answer_in_time_is_taken_from_in_one_transaction() {
    let world = World::new(V4);
    let (first, lease) = Machine::joined(&world, "a", &of_machine("localhost", "a")).await;
    drop(first);
    let second = Machine::new(&world, "b");
    let (took, taken) = timed(&second, &of_machine("localhost", "b")).await;
    assert!((15 * SECOND..17 * SECOND).contains(&took), "{took:?}");
    let taken = taken.expect("a lease");
    assert_eq!(
        (&taken.key, taken.created),
        (&lease.key, lease.created),
        "the record is the same"
    );
    assert_eq!(questions(&world), 0);
}

#[tokio::test(start_paused = true)]
async fn a_question_outlives_the_call_that_put_it_but_not_its_asker() {
    let world = World::new(V4);
    let (first, _) = Machine::joined(&world, "a", &of_machine("localhost", "a")).await;
    drop(first);
    let second = Machine::new(&world, "b");
    let wants = of_machine("localhost", "b");
    // Calls that are given up on before anybody can have answered.
    for _ in 0..3 {
        let call = second.manager.acquire_lease(&wants);
        assert!(tokio::time::timeout(4 * SECOND, call).await.is_err());
        assert_eq!(questions(&world), 1);
    }
    let (took, taken) = timed(&second, &wants).await;
    assert!(took < 5 * SECOND, "{took:?}");
    taken.expect("a lease");

    let (third, _) = Machine::joined(&world, "c", &of_machine("other", "c")).await;
    drop(third);
    let asker = Machine::new(&world, "d");
    let wants = of_machine("other", "d");
    let call = asker.manager.acquire_lease(&wants);
    assert!(tokio::time::timeout(SECOND, call).await.is_err());
    drop(asker);
    assert_eq!(questions(&world), 1);
    tokio::time::sleep(120 * SECOND).await;
    assert_eq!(questions(&world), 0, "it ends with its lease");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_was_away_for_a_while_answers_when_it_is_back() {
    let world = World::new(V4);
    let (first, lease) = Machine::joined(&world, "a", &of_machine("localhost", "a")).await;
    first.link.cut(Cut::Fail);
    let second = Machine::new(&world, "b");
    let call = tokio::spawn({
        let (manager, wants) = (Arc::clone(&second.manager), of_machine("localhost", "b"));
        async move { manager.acquire_lease(&wants).await }
    });
    tokio::time::sleep(8 * SECOND).await;
    first.link.heal();
    let refused = call.await.expect("no panic");
    assert!(
        matches!(refused, Err(Error::NodeIdHeld { .. })),
        "{refused:?}"
    );
    first.manager.renew_lease(&lease).await.expect("it is ours");
}

#[tokio::test(start_paused = true)]
async fn an_asker_that_loses_the_store_begins_anew() {
    let world = World::new(V4);
    let (first, _) = Machine::joined(&world, "a", &of_machine("localhost", "a")).await;
    drop(first);
    let second = Machine::new(&world, "b");
    let wants = of_machine("localhost", "b");
    let call = second.manager.acquire_lease(&wants);
    assert!(tokio::time::timeout(10 * SECOND, call).await.is_err());
    // The question is gone for a while, so nobody can have answered it.
    for key in world.keys() {
        if key.contains("!ask") {
            world
                .store
                .delete(format!("{}{key}", world.layout.prefix()));
        }
    }
    let (took, taken) = timed(&second, &wants).await;
    assert!(took >= 15 * SECOND, "{took:?}");
    taken.expect("a lease");
}

#[tokio::test(start_paused = true)]
async fn a_renamed_machine_takes_its_record_and_its_markers_along() {
    let world = World::new(V4);
    let (former, lease) = Machine::joined(&world, "a", &of_machine("web", "a")).await;
    drop(former);
    let (renamed, now) = Machine::joined(&world, "a", &of_machine("web.example.org", "a")).await;
    assert_eq!((&now.key, now.created), (&lease.key, lease.created));
    let subnet = lease.key.as_str().rsplit('/').next().expect("a key");
    let mut keys = world.keys();
    keys.sort();
    let mut expected = vec![
        format!("/subnets/{subnet}"),
        format!("/taken/{subnet}"),
        "/taken/node-web.example.org".to_owned(),
    ];
    expected.sort();
    assert_eq!(keys, expected);
    drop(renamed);
}

#[tokio::test(start_paused = true)]
async fn the_record_of_a_former_name_goes_beside_the_one_of_the_present() {
    for (what, instance, least) in [
        ("of its own instance", true, Duration::ZERO),
        ("of an instance that does not answer", false, 15 * SECOND),
    ] {
        let world = World::new(V4);
        // As a backup brings it back: the machine has both.
        let mut former = of_machine("web", "a");
        if !instance {
            former.instance = Some(InstanceId::from_bits(3));
        }
        let value = wire::lease_value(&former.node, former.instance, &former.attrs);
        let key = format!("{}/10.5.9.0-24", world.layout.subnets());
        let own = of_machine("web.example.org", "a");
        let (_node, lease) = Machine::joined(&world, "a", &own).await;
        let before = Instant::now();
        world
            .store
            .put_for(&key, value.expect("a value"), 3600 * SECOND);
        let is_there = || world.keys().contains(&"/subnets/10.5.9.0-24".to_owned());
        while is_there() {
            assert!(before.elapsed() < 60 * SECOND, "{what}: it stays");
            tokio::time::sleep(SECOND / 10).await;
        }
        assert!(before.elapsed() >= least, "{what}: it went too soon");
        let kept = format!(
            "/subnets/{}",
            lease.key.as_str().rsplit('/').next().expect("a key")
        );
        assert!(world.keys().contains(&kept), "{what}");

        // And it goes too if it was there before a restart.
        let value = wire::lease_value(&former.node, former.instance, &former.attrs);
        drop(_node);
        world
            .store
            .put_for(&key, value.expect("a value"), 3600 * SECOND);
        let asked = Instant::now();
        let (_node, again) = Machine::joined(&world, "a", &own).await;
        assert_eq!(again.key, lease.key, "{what}");
        assert!(asked.elapsed() < 2 * SECOND, "{what}: a start waits for it");
        while is_there() {
            assert!(asked.elapsed() < 60 * SECOND, "{what}: it stays");
            tokio::time::sleep(SECOND / 10).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_reservation_for_another_node_is_nobodys_former_record() {
    let world = World::new(V4);
    let kept = of_machine("db", "a");
    let value = wire::lease_value(&kept.node, None, &kept.attrs).expect("a value");
    let key = format!("{}/10.5.9.0-24", world.layout.subnets());
    world.store.put(&key, value);
    let (_node, lease) = Machine::joined(&world, "a", &of_machine("web", "a")).await;
    assert!(!lease.key.as_str().ends_with("10.5.9.0-24"));
    tokio::time::sleep(60 * SECOND).await;
    assert!(world.keys().contains(&"/subnets/10.5.9.0-24".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_questions_keeps_nobody_from_following() {
    let world = World::new(V4);
    let wants = of_machine("localhost", "a");
    let (first, lease) = Machine::joined(&world, "a", &wants).await;
    let mut watch = first.manager.watch_leases();
    until(&mut watch, |event| matches!(event, Event::Snapshot(_))).await;
    let holder = wants.instance.expect("one");
    for n in 0..2000 {
        let key = format!(
            "{}/taken/!ask/localhost/{holder}/{n:032x}",
            world.layout.prefix()
        );
        world.store.put(key, "{}");
    }
    let before = Instant::now();
    world.go("10.5.77.0-24", [198, 51, 100, 7]);
    until(
        &mut watch,
        |event| matches!(event, Event::Put(lease) if lease.key.as_str().ends_with("10.5.77.0-24")),
    )
    .await;
    assert!(before.elapsed() < 2 * SECOND, "{:?}", before.elapsed());
    first.manager.renew_lease(&lease).await.expect("it is ours");
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_of_our_address_no_longer_is_left_alone() {
    let world = World::new(V4);
    let (first, lease) = Machine::joined(&world, "a", &of_machine("a", "a")).await;
    // A clone of it joins beside it, and gets an address of its own when it is seen.
    let mut clone = of_machine("b", "b");
    clone.attrs = of_machine("a", "a").attrs;
    let (second, mut own) = Machine::joined(&world, "b", &clone).await;
    assert_ne!(own.key, lease.key);
    tokio::time::sleep(10 * SECOND).await;
    own.attrs = of_machine("b", "b").attrs;
    second.manager.renew_lease(&own).await.expect("it is ours");
    tokio::time::sleep(180 * SECOND).await;
    let renewed = first.manager.renew_lease(&lease).await;
    assert!(renewed.is_ok(), "{renewed:?}");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_is_a_new_instance_does_not_answer_for_the_one_it_was() {
    let world = World::new(V4);
    let original = of_machine("localhost", "a");
    let (first, lease) = Machine::joined(&world, "a", &original).await;
    let mut clone = of_machine("localhost", "b");
    clone.instance = original.instance;
    let (second, _) = Machine::joined(&world, "b", &clone).await;
    let lost = first.manager.renew_lease(&lease).await;
    assert!(matches!(lost, Err(Error::LeaseLost { .. })), "{lost:?}");
    let fresh = LeaseRequest {
        instance: Some(InstanceId::from_bits(1)),
        ..original.clone()
    };
    let (_, refused) = timed(&first, &fresh).await;
    let Err(Error::NodeIdHeld { public_ip, .. }) = &refused else {
        panic!("{refused:?}");
    };
    assert_eq!(*public_ip, clone.attrs.public_ip);
    drop(second);
    let (took, taken) = timed(&first, &fresh).await;
    assert!(taken.is_ok(), "nobody else is there: {taken:?}");
    assert!(took < 20 * SECOND, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn many_records_of_dead_machines_keep_nobody_from_joining() {
    for (what, of) in [("of former names", "old-"), ("of the node id", "")] {
        let world = World::new(V4);
        let own = of_machine("web", "a");
        for n in 1..=9 {
            let mut theirs = own.clone();
            theirs.instance = Some(InstanceId::from_bits(n));
            if of.is_empty() {
                theirs.attrs = request(&format!("m{n}")).attrs;
            } else {
                theirs.node = flannel_core::NodeId::new(format!("{of}{n}")).expect("a node id");
            }
            let value = wire::lease_value(&theirs.node, theirs.instance, &theirs.attrs);
            let key = format!("{}/10.5.{n}.0-24", world.layout.subnets());
            world
                .store
                .put_for(&key, value.expect("a value"), 24 * 3600 * SECOND);
        }
        let machine = Machine::new(&world, "a");
        let before = Instant::now();
        loop {
            let call = machine.manager.acquire_lease(&own);
            match tokio::time::timeout(30 * SECOND, call).await {
                Ok(lease) => {
                    lease.expect("a lease");
                    break;
                }
                Err(_) => tokio::time::sleep(2 * SECOND).await,
            }
            assert!(before.elapsed() < 600 * SECOND, "{what}: it never joins");
        }
        assert!(
            before.elapsed() < 30 * SECOND,
            "{what}: {:?}",
            before.elapsed()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_hangs_is_noticed_while_a_former_record_is_looked_at() {
    let world = World::new(V4);
    let own = of_machine("web", "a");
    let (machine, _) = Machine::joined(&world, "a", &own).await;
    let mut watch = machine.manager.watch_leases();
    until(&mut watch, |event| matches!(event, Event::Snapshot(_))).await;
    let mut former = of_machine("old", "a");
    former.instance = Some(InstanceId::from_bits(3));
    let value = wire::lease_value(&former.node, former.instance, &former.attrs);
    let key = format!("{}/10.5.9.0-24", world.layout.subnets());
    world
        .store
        .put_for(&key, value.expect("a value"), 3600 * SECOND);
    until(
        &mut watch,
        |event| matches!(event, Event::Put(lease) if lease.node == former.node),
    )
    .await;
    tokio::time::timeout(2 * SECOND, async {
        loop {
            common::next(&mut watch).await.ok();
        }
    })
    .await
    .expect_err("it goes on");
    machine.link.cut(Cut::Hang);
    let noticed = tokio::time::timeout(30 * SECOND, async {
        while common::next(&mut watch).await.is_ok() {}
    });
    assert!(noticed.await.is_ok(), "the silence is not noticed");
}

#[tokio::test(start_paused = true)]
async fn hundreds_of_machines_of_one_node_id_take_nothing_from_the_one_that_lives() {
    let world = World::new(V4);
    let (first, lease) = Machine::joined(&world, "a", &of_machine("localhost", "a")).await;
    let mut calls = Vec::new();
    for n in 0..1000_u32 {
        let second = Machine::new(&world, &format!("m{n}"));
        let mut wants = of_machine("localhost", "b");
        wants.instance = Some(InstanceId::from_bits(1_000_000 + u128::from(n)));
        wants.attrs.public_ip = flannel_core::PublicIp::v4((0x0a64_0000 + n).into());
        calls.push(tokio::spawn(async move {
            second.manager.acquire_lease(&wants).await
        }));
    }
    let mut taken = 0;
    for call in calls {
        let got = call.await.expect("no panic");
        taken += usize::from(!matches!(got, Err(Error::NodeIdHeld { .. })));
    }
    assert_eq!(taken, 0);
    first.manager.renew_lease(&lease).await.expect("it is ours");
}

#[tokio::test(start_paused = true)]
async fn a_renamed_machine_keeps_what_it_uses_where_its_new_name_had_a_record() {
    let world = World::new(V4);
    let (dead, old) = Machine::joined(&world, "b", &of_machine("db", "b")).await;
    drop(dead);
    let (former, lease) = Machine::joined(&world, "a", &of_machine("web", "a")).await;
    drop(former);
    let renamed = LeaseRequest {
        previous: lease.subnet,
        ..of_machine("db", "a")
    };
    let (_node, now) = Machine::joined(&world, "a", &renamed).await;
    assert_ne!(old.subnet, lease.subnet);
    assert_eq!(now.subnet, lease.subnet, "its containers are there");
    assert_eq!(
        world
            .keys()
            .iter()
            .filter(|key| key.starts_with("/subnets/"))
            .count(),
        1
    );
}

#[tokio::test(start_paused = true)]
async fn who_asks_seldom_and_briefly_is_not_kept_waiting_for_ever() {
    let world = World::new(V4);
    let (first, _) = Machine::joined(&world, "a", &of_machine("localhost", "a")).await;
    drop(first);
    let second = Machine::new(&world, "b");
    let wants = of_machine("localhost", "b");
    for _ in 0..10 {
        let call = second.manager.acquire_lease(&wants);
        if let Ok(taken) = tokio::time::timeout(5 * SECOND, call).await {
            taken.expect("a lease");
            return;
        }
        // As an engine that was refused for a long time.
        tokio::time::sleep(60 * SECOND).await;
    }
    panic!("the node id of a dead machine is not taken");
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_written_again_and_again_keeps_nobody_busy() {
    let world = World::new(V4);
    let own = of_machine("web", "a");
    let (machine, _) = Machine::joined(&world, "a", &own).await;
    let key = format!("{}/10.5.9.0-24", world.layout.subnets());
    let start = world.store.revision();
    for n in 0..2000 {
        let former = of_machine("old", "a");
        let instance = Some(InstanceId::from_bits(1000 + n));
        let value = wire::lease_value(&former.node, instance, &former.attrs);
        world
            .store
            .put_for(&key, value.expect("a value"), 3600 * SECOND);
        tokio::time::sleep(SECOND / 200).await;
    }
    let written = world.store.revision().0 - start.0 - 2000;
    assert!(written < 500, "{written} writes of ours in 10 s");
    drop(machine);
}

#[tokio::test(start_paused = true)]
async fn an_earlier_run_takes_nothing_from_a_later_one_under_another_name() {
    let world = World::new(V4);
    let (old, lease) = Machine::joined(&world, "a", &of_machine("web", "a")).await;
    let (new, now) = Machine::joined(&world, "b", &of_machine("web.example.org", "a")).await;
    assert_eq!(now.key, lease.key);
    let lost = old.manager.renew_lease(&lease).await;
    assert!(matches!(lost, Err(Error::LeaseLost { .. })), "{lost:?}");
    let (_, refused) = timed(&old, &of_machine("web", "a")).await;
    assert!(
        matches!(&refused, Err(Error::Invalid { reason }) if reason.contains("web.example.org")),
        "{refused:?}"
    );
    // Nor when that one has to move.
    new.manager.release_lease(&now).await.expect("it is ours");
    let moved = LeaseRequest {
        previous: flannel_core::DualStack::v4("10.5.9.0/24".parse().expect("a subnet")),
        ..of_machine("web.example.org", "a")
    };
    let now = acquire(&new.manager, &moved).await;
    assert_ne!(now.key, lease.key);
    tokio::time::sleep(60 * SECOND).await;
    new.manager.renew_lease(&now).await.expect("it is ours");
    let (_, refused) = timed(&old, &of_machine("web", "a")).await;
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
    // The later one has ended.
    drop(new);
    let (took, back) = timed(&old, &of_machine("web", "a")).await;
    assert_eq!(back.expect("a lease").key, now.key);
    assert!(took < 20 * SECOND, "{took:?}");
}

/// A marker of the former node id that names another record is of the machine that has the id now:
/// without it, that one's node could get a second lease.
#[tokio::test(start_paused = true)]
async fn the_marker_of_whoever_has_the_former_id_now_stays() {
    let marker = |world: &World| format!("{}/taken/node-web", world.layout.prefix());
    let is_there = |world: &World| world.keys().contains(&"/taken/node-web".to_owned());
    let others = |world: &World| format!("{}/10.5.77.0-24", world.layout.subnets());
    // The one record of the machine is taken along.
    let world = World::new(V4);
    let (former, lease) = Machine::joined(&world, "a", &of_machine("web", "a")).await;
    drop(former);
    let theirs = others(&world);
    world
        .store
        .put_for(marker(&world), theirs.as_str(), 3600 * SECOND);
    let (_renamed, now) = Machine::joined(&world, "a", &of_machine("web.example.org", "a")).await;
    assert_eq!(now.key, lease.key);
    assert!(is_there(&world));
    // One that stands beside it goes, with the marker that names it, and no other.
    for is_theirs in [true, false] {
        let world = World::new(V4);
        let own = of_machine("web.example.org", "a");
        let (_node, _) = Machine::joined(&world, "a", &own).await;
        let former = of_machine("web", "a");
        let value = wire::lease_value(&former.node, former.instance, &former.attrs);
        let key = format!("{}/10.5.9.0-24", world.layout.subnets());
        let named = match is_theirs {
            true => others(&world),
            false => key.clone(),
        };
        world
            .store
            .put_for(marker(&world), named.as_str(), 3600 * SECOND);
        world
            .store
            .put_for(&key, value.expect("a value"), 3600 * SECOND);
        let before = Instant::now();
        while world.keys().contains(&"/subnets/10.5.9.0-24".to_owned()) {
            assert!(before.elapsed() < 60 * SECOND, "it stays");
            tokio::time::sleep(SECOND / 10).await;
        }
        assert_eq!(is_there(&world), is_theirs);
    }
}
