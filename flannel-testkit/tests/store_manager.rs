//! What the manager on the fake store promises beyond every manager's promises: beside Go flannel,
//! after a restored backup, with calls that fail or arrive late.

#[path = "store/common.rs"]
mod common;

use flannel_core::manager::Error;
use flannel_core::{
    DualStack, Event, Lease, LeaseAttrs, LeaseRequest, Manager, PublicIp, Revision, Subnet, wire,
};
use flannel_testkit::fake_store::{CallFault, Cut, KeyRange, Silence, StoreManager, StoreOptions};
use tokio::time::{Instant, sleep, timeout};

use common::{SECOND, V4, World, acquire, request, snapshot, until};

const DUAL: &str = r#"{"Network":"10.5.0.0/20","SubnetLen":24,
    "EnableIPv6":true,"IPv6Network":"fd00:5::/60"}"#;

fn wanting(name: &str, subnets: &[&str]) -> LeaseRequest {
    let subnets = subnets
        .iter()
        .map(|text| text.parse::<Subnet>().expect("a subnet"));
    LeaseRequest {
        previous: DualStack::of_subnets(subnets),
        ..request(name)
    }
}

fn is_lost<T: std::fmt::Debug>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::LeaseLost { .. }))
}

// What is in the store

#[tokio::test(start_paused = true)]
async fn records_and_markers_come_and_go_together() {
    let world = World::new(DUAL);
    let node = world.node("a");
    let wants = wanting("a", &["10.5.3.0/24", "fd00:5:0:4::/64"]);
    let all = [
        "/subnets/10.5.3.0-24&fd00:5:0:4::-64",
        "/taken/10.5.3.0-24",
        "/taken/fd00:5:0:4::-64",
        "/taken/node-a",
    ];
    let lease = acquire(&node, &wants).await;
    assert_eq!(world.keys(), all);
    node.release_lease(&lease).await.expect("released");
    assert!(world.keys().is_empty(), "{:?}", world.keys());

    let lease = acquire(&node, &wants).await;
    sleep(23 * 3600 * SECOND).await;
    node.renew_lease(&lease).await.expect("renewed");
    sleep(23 * 3600 * SECOND).await;
    assert_eq!(world.keys(), all, "a renewal renews them all");
    sleep(2 * 3600 * SECOND).await;
    assert!(world.keys().is_empty(), "{:?}", world.keys());
}

#[tokio::test(start_paused = true)]
async fn a_store_without_races_is_joined_with_one_transaction() {
    let world = World::new(DUAL);
    for name in ["a", "b", "c", "d", "e"] {
        let node = world.node(name);
        acquire(&node, &request(name)).await;
        let counts = node.store().counts();
        // Of both families, whether Go flannel was faster is looked at afterwards.
        assert_eq!((counts["txn"], counts["range"]), (1, 2), "{name}");
    }
    let world = World::new(V4);
    for name in ["a", "b", "c", "d", "e"] {
        let node = world.node(name);
        acquire(&node, &request(name)).await;
        let counts = node.store().counts();
        assert_eq!((counts["txn"], counts["range"]), (1, 1), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn two_records_never_share_a_half() {
    // Both want the same half, of either family, and the other halves differ: no key is equal.
    for (first, second) in [
        (
            ["10.5.3.0/24", "fd00:5:0:4::/64"],
            ["10.5.3.0/24", "fd00:5:0:5::/64"],
        ),
        (
            ["10.5.3.0/24", "fd00:5:0:4::/64"],
            ["10.5.4.0/24", "fd00:5:0:4::/64"],
        ),
    ] {
        let world = World::new(DUAL);
        let nodes = ["a", "b"].map(|name| world.node(name));
        let wants = [wanting("a", &first), wanting("b", &second)];
        for node in &nodes {
            node.store().set_latency(SECOND);
        }
        let (a, b) = tokio::join!(
            biased;
            nodes[0].acquire_lease(&wants[0]),
            nodes[1].acquire_lease(&wants[1])
        );
        let (a, b) = (a.expect("a lease"), b.expect("a lease"));
        assert!(
            !a.subnet.overlaps(&b.subnet),
            "{} and {}",
            a.subnet,
            b.subnet
        );
        assert_eq!(nodes[1].store().counts()["txn"], 2, "the race took place");
    }
}

#[tokio::test(start_paused = true)]
async fn a_marker_that_outlived_its_record_is_no_hindrance() {
    let world = World::new(DUAL);
    let wants = ["10.5.3.0/24", "fd00:5:0:4::/64"];
    let lease = acquire(&world.node("a"), &wanting("a", &wants)).await;
    assert!(
        world.store.delete(lease.key.as_str()),
        "somebody removes the record alone"
    );
    let node = world.node("b");
    let lease = acquire(&node, &wanting("b", &wants)).await;
    assert_eq!(lease.subnet, wanting("b", &wants).previous);
    assert_eq!(node.store().counts()["txn"], 2, "one try finds the markers");
    let other = acquire(&world.node("a"), &wanting("a", &wants)).await;
    assert!(!other.subnet.overlaps(&lease.subnet));
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_arrives_late_gives_no_second_record() {
    let world = World::new(V4);
    let node = world.node("a");
    let (link, wants) = (node.store(), request("a"));
    // The range and the grant pass, the transaction is held up.
    link.fail_after(2, CallFault::Park(Silence::Hang));
    let given_up = timeout(SECOND, node.acquire_lease(&wants)).await;
    assert!(given_up.is_err());
    assert_eq!(link.pending_faults(), 0);
    // Asked again, the node wants another subnet, and gets it.
    let again = world.node("a");
    let lease = acquire(&again, &wanting("a", &["10.5.9.0/24"])).await;
    assert_eq!(link.deliver_parked(), 1);
    assert_eq!(world.keys().len(), 3, "{:?}", world.keys());
    assert_eq!(acquire(&again, &request("a")).await.subnet, lease.subnet);
}

#[tokio::test(start_paused = true)]
async fn a_config_that_changes_on_the_way_is_the_one_that_counts() {
    let world = World::new(V4);
    let node = world.node("a");
    node.store().set_latency(SECOND);
    let acquired = async { acquire(&node, &request("a")).await };
    let changed = async {
        sleep(3 * SECOND).await;
        let other = r#"{"Network":"10.5.0.0/20","SubnetLen":26}"#;
        world.store.put(world.layout.config(), other);
    };
    let (lease, ()) = tokio::join!(biased; acquired, changed);
    assert_eq!(lease.subnet.v4.expect("IPv4").len(), 26);
    assert_eq!(world.keys().len(), 3);
}

// Beside Go flannel

#[tokio::test(start_paused = true)]
async fn go_flannels_record_of_our_address_is_taken_over() {
    let world = World::new(V4);
    let wants = request("a");
    let ip = wants.attrs.public_ip.v4.expect("an address").octets();
    world.go("10.5.7.0-24", ip);
    let lease = acquire(&world.node("a"), &wants).await;
    assert_eq!(lease.subnet.to_string(), "10.5.7.0/24");
    assert_eq!(lease.node, wants.node);
    assert_eq!(lease.created, Revision(3), "the same record");
    let keys = [
        "/subnets/10.5.7.0-24",
        "/taken/10.5.7.0-24",
        "/taken/node-a",
    ];
    assert_eq!(world.keys(), keys);
    // A node of ours behind the same address is another node.
    let mut other = request("b");
    other.attrs.public_ip = wants.attrs.public_ip;
    let other = acquire(&world.node("b"), &other).await;
    assert!(!other.subnet.overlaps(&lease.subnet));
}

#[tokio::test(start_paused = true)]
async fn a_reservation_stays_without_expiry_and_stays_when_it_is_released() {
    let world = World::new(V4);
    let wants = request("a");
    let value = wire::lease_value(&wants.node, None, &LeaseAttrs::default()).expect("a value");
    let key = format!("{}/10.5.7.0-24", world.layout.subnets());
    world.store.put(&key, value);
    let node = world.node("a");
    let lease = acquire(&node, &wants).await;
    let renewed = node.renew_lease(&lease).await.expect("renewed");
    assert_eq!((lease.ttl, renewed.ttl), (None, None));
    sleep(48 * 3600 * SECOND).await;
    node.release_lease(&renewed).await.expect("released");
    let other = wanting("b", &["10.5.7.0/24"]);
    let other = acquire(&world.node("b"), &other).await;
    assert_ne!(other.subnet, lease.subnet, "it is still reserved");
    assert!(is_lost(&node.renew_lease(&renewed).await));
    assert_eq!(acquire(&node, &wants).await.subnet, lease.subnet);
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_go_flannel_overwrote_is_lost_and_left_alone() {
    let world = World::new(V4);
    let node = world.node("a");
    let lease = acquire(&node, &request("a")).await;
    let end = lease.key.as_str().rsplit_once('/').expect("a path").1;
    world.go(end, [198, 51, 100, 7]);
    assert!(is_lost(&node.renew_lease(&lease).await));
    let next = acquire(&node, &wanting("a", &["10.5.4.0/24"])).await;
    assert!(!next.subnet.overlaps(&lease.subnet));
    let entry = world.store.entries(&KeyRange::key(lease.key.as_str()));
    assert!(entry[0].value.starts_with(br#"{"PublicIP":"198.51.100.7""#));
}

#[tokio::test(start_paused = true)]
async fn what_is_written_while_we_look_is_not_overwritten() {
    let other = [198, 51, 100, 7];
    for release in [false, true] {
        let world = World::new(V4);
        let node = world.node("a");
        let lease = acquire(&node, &request("a")).await;
        let end = lease.key.as_str().rsplit_once('/').expect("a path").1;
        // Behind the look at the record, which takes two seconds, and before the write.
        node.store().set_latency(SECOND);
        let written = async {
            sleep(SECOND * 5 / 2).await;
            world.go(end, other);
        };
        let mut changed = lease.clone();
        changed.attrs.public_ip = PublicIp::v4([192, 0, 2, 99].into());
        let call = async {
            if release {
                is_lost(&node.release_lease(&lease).await)
            } else {
                is_lost(&node.renew_lease(&changed).await)
            }
        };
        let (lost, ()) = tokio::join!(biased; call, written);
        assert!(lost, "release: {release}");
        let entry = world.store.entries(&KeyRange::key(lease.key.as_str()));
        let theirs = br#"{"PublicIP":"198.51.100.7""#;
        assert!(entry[0].value.starts_with(theirs), "release: {release}");
        let counts = node.store().counts();
        assert!(release || counts["grant"] - 1 == counts["revoke"]);
    }
}

#[tokio::test(start_paused = true)]
async fn we_give_way_when_go_flannel_claims_what_is_ours() {
    let world = World::new(DUAL);
    let node = world.node("a");
    let wants = wanting("a", &["10.5.3.0/24", "fd00:5:0:4::/64"]);
    let lease = acquire(&node, &wants).await;
    let mut watch = node.watch_leases();
    snapshot(&mut watch).await;
    let start = Instant::now();
    world.go("10.5.9.0-24&fd00:5:0:4::-64", [198, 51, 100, 7]);
    let deleted = |event: &Event| matches!(event, Event::Delete { key, .. } if *key == lease.key);
    until(&mut watch, deleted).await;
    assert!(start.elapsed() < 5 * SECOND);
    assert!(is_lost(&node.renew_lease(&lease).await));
    let next = acquire(&node, &wants).await;
    assert_eq!(next.subnet.v4, lease.subnet.v4);
    assert_ne!(next.subnet.v6, lease.subnet.v6);
}

#[tokio::test(start_paused = true)]
async fn we_do_not_give_way_to_a_claim_of_everything() {
    let world = World::new(DUAL);
    let node = world.node("a");
    let wants = wanting("a", &["10.5.3.0/24", "fd00:5:0:4::/64"]);
    let lease = acquire(&node, &wants).await;
    let mut watch = node.watch_leases();
    snapshot(&mut watch).await;
    world.go("10.5.0.0-20&fd00:5::-60", [198, 51, 100, 7]);
    until(
        &mut watch,
        |event| matches!(event, Event::Put(other) if other.key != lease.key),
    )
    .await;
    node.renew_lease(&lease).await.expect("it is still ours");
    assert_eq!(acquire(&node, &wants).await.key, lease.key);
    let other = acquire(&world.node("b"), &wanting("b", &[])).await;
    assert!(!other.subnet.overlaps(&lease.subnet));
}

#[tokio::test(start_paused = true)]
async fn a_claim_of_go_flannels_that_no_condition_sees_is_noticed_at_once() {
    let world = World::new(DUAL);
    let node = world.node("a");
    node.store().set_latency(SECOND);
    let wants = wanting("a", &["10.5.3.0/24", "fd00:5:0:4::/64"]);
    let acquired = async { acquire(&node, &wants).await };
    let go = async {
        sleep(3 * SECOND).await;
        world.go("10.5.9.0-24&fd00:5:0:4::-64", [198, 51, 100, 7]);
    };
    let (lease, ()) = tokio::join!(biased; acquired, go);
    assert_ne!(lease.subnet.v6, wants.previous.v6);
    assert_eq!(world.keys().len(), 5, "{:?}", world.keys());
}

#[tokio::test(start_paused = true)]
async fn no_record_is_written_that_crashes_go_nodes_unless_it_is_allowed() {
    let dual_request = request("a");
    let mut addressless = request("a");
    addressless.attrs.public_ip.v6 = None;
    for (config, go, wants, allowed) in [
        (DUAL, "10.5.9.0-24", &dual_request, false),
        // No node of a network that never had IPv6 has written that.
        (V4, "10.5.9.0-24&fd00:5:0:4::-64", &dual_request, true),
        (DUAL, "10.5.9.0-24&fd00:5:0:4::-64", &addressless, false),
        (DUAL, "10.5.9.0-24&fd00:5:0:4::-64", &dual_request, true),
        (V4, "10.5.9.0-24", &addressless, true),
    ] {
        let world = World::new(config);
        world.go(go, [198, 51, 100, 7]);
        let keys = world.keys();
        let refused = world.node("a").acquire_lease(wants).await;
        assert_eq!(
            refused.is_ok(),
            allowed,
            "{config} beside {go}: {refused:?}"
        );
        if !allowed {
            assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
            assert_eq!(world.keys(), keys);
        }
        let options = StoreOptions {
            mixed_families: true,
            ..StoreOptions::default()
        };
        let bold = StoreManager::new(world.store.link("a"), options);
        acquire(&bold, wants).await;
    }
    let world = World::new(DUAL);
    let node = world.node("a");
    let mut lease = acquire(&node, &dual_request).await;
    world.go("10.5.9.0-24&fd00:5:0:9::-64", [198, 51, 100, 7]);
    world.store.put(world.layout.config(), V4);
    let refused = node.acquire_lease(&addressless).await;
    let has_seen_both =
        matches!(&refused, Err(Error::Invalid { reason }) if reason.contains("10.5.9.0"));
    assert!(has_seen_both, "{refused:?}");
    world.store.put(world.layout.config(), DUAL);
    lease.attrs.public_ip.v6 = None;
    let refused = node.renew_lease(&lease).await;
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
}

// Failures

#[tokio::test(start_paused = true)]
async fn a_renewal_whose_answer_is_lost_is_found_to_be_done() {
    for fault in [CallFault::LoseAnswer, CallFault::LoseRequest] {
        let world = World::new(V4);
        let node = world.node("a");
        let lease = acquire(&node, &request("a")).await;
        let mut changed = lease.clone();
        changed.attrs.public_ip = PublicIp::v4([192, 0, 2, 99].into());
        // A reading, a grant, the transaction.
        node.store().fail_after(2, fault(Silence::Error));
        let result = node.renew_lease(&changed).await;
        let entry = world.store.entries(&KeyRange::key(lease.key.as_str()));
        if fault(Silence::Error).name() == "answer lost" {
            let renewed = result.expect("it was done");
            assert_eq!(renewed.revision, entry[0].modified);
            assert!(renewed.revision > lease.revision);
        } else {
            assert!(
                matches!(result, Err(Error::Unavailable { .. })),
                "{result:?}"
            );
            assert_eq!(entry[0].modified, lease.revision);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_renewal_of_what_is_published_already_writes_nothing() {
    let world = World::new(V4);
    let node = world.node("a");
    let lease = acquire(&node, &request("a")).await;
    let before = world.store.revision();
    sleep(3600 * SECOND).await;
    let renewed = node.renew_lease(&lease).await.expect("it is ours");
    assert_eq!((renewed.ttl, renewed.revision), (lease.ttl, lease.revision));
    assert_eq!(world.store.revision(), before);
    // Its whole time is before it again.
    sleep(lease.ttl.expect("it expires") - SECOND).await;
    assert!(node.renew_lease(&renewed).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_record_is_kept_when_the_answer_about_it_is_lost() {
    let world = World::new(V4);
    let node = world.node("a");
    let lease = acquire(&node, &request("a")).await;
    // The node starts again, and the answer to each of its calls is lost in turn: of those that
    // extend what stands, and of those that write something else.
    for (ip, call) in (0..6).map(|n| (97 + n / 3, n % 3)) {
        let again = world.node("a");
        let lost = CallFault::LoseAnswer(Silence::Error);
        again.store().fail_after(usize::from(call), lost);
        let mut wants = request("a");
        wants.attrs.public_ip.v4 = Some([192, 0, 2, ip].into());
        let result = again.acquire_lease(&wants).await;
        let is_written = ip > 97;
        // What became of a transaction is looked up.
        match result {
            Ok(found) if call == 2 && is_written => assert_eq!(found.subnet, lease.subnet),
            Err(Error::Unavailable { .. }) if call < 2 || !is_written => {}
            result => panic!("call {call}: {result:?}"),
        }
        let entries = world.store.entries(&KeyRange::key(lease.key.as_str()));
        assert_eq!(entries.len(), 1, "the record is gone with call {call}");
    }
    assert_eq!(acquire(&node, &request("a")).await.subnet, lease.subnet);
}

#[tokio::test(start_paused = true)]
async fn what_may_hang_on_a_lease_is_not_taken_back() {
    let world = World::new(V4);
    let node = world.node("a");
    // Of the transaction nothing is heard, nor of what then extends the lease that its record has.
    for well in [2, 1] {
        let lost = CallFault::LoseAnswer(Silence::Error);
        node.store().fail_after(well, lost);
    }
    let failed = node.acquire_lease(&request("a")).await;
    assert!(
        matches!(failed, Err(Error::Unavailable { .. })),
        "{failed:?}"
    );
    let written = world.keys().len();
    assert_eq!(written, 3, "the record and its markers stand");
    let lease = acquire(&node, &request("a")).await;
    assert_eq!(
        (world.keys().len(), lease.created),
        (written, lease.revision)
    );
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_given_back_when_the_pool_is_full() {
    let world = World::new(r#"{"Network":"10.5.0.0/24","SubnetLen":26}"#);
    for name in ["a", "b", "c"] {
        acquire(&world.node(name), &request(name)).await;
    }
    let node = world.node("d");
    let full = node.acquire_lease(&request("d")).await;
    assert!(matches!(full, Err(Error::PoolExhausted { .. })), "{full:?}");
    let counts = node.store().counts();
    assert_eq!(counts.get("grant"), counts.get("revoke"));
}

#[tokio::test(start_paused = true)]
async fn a_revision_that_is_used_twice_deceives_nobody() {
    let world = World::new(V4);
    let backup = world.store.backup();
    let [a, b] = ["a", "b"].map(|name| world.node(name));
    let wants = |name| wanting(name, &["10.5.3.0/24"]);
    let ours = acquire(&a, &wants("a")).await;
    world.store.restore(&backup);
    let theirs = acquire(&b, &wants("b")).await;
    let known = |lease: &Lease| (lease.key.clone(), lease.created, lease.revision);
    assert_eq!(
        known(&ours),
        known(&theirs),
        "the same in all that a condition can ask for"
    );
    assert!(is_lost(&a.renew_lease(&ours).await));
    assert!(is_lost(&a.release_lease(&ours).await));
    b.renew_lease(&theirs).await.expect("it is theirs");
}

#[tokio::test(start_paused = true)]
async fn what_the_store_says_becomes_the_error_that_means_it() {
    let world = World::new(V4);
    let node = world.node("a");
    node.store().cut(Cut::Deny);
    let denied = node.network_config().await;
    assert!(matches!(denied, Err(Error::Denied { .. })), "{denied:?}");
    node.store().cut(Cut::Fail);
    let failed = node.acquire_lease(&request("a")).await;
    assert!(
        matches!(
            failed,
            Err(Error::Unavailable {
                source: Some(_),
                ..
            })
        ),
        "{failed:?}"
    );
    node.store().heal();
    world.store.put(world.layout.config(), "{");
    assert!(matches!(node.network_config().await, Err(Error::Config(_))));
    world.store.delete(world.layout.config());
    assert!(matches!(
        node.network_config().await,
        Err(Error::NoConfig { .. })
    ));
    let six = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/60"}"#;
    world.store.put(world.layout.config(), six);
    let refused = node.acquire_lease(&request("a")).await;
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
}
