//! The whole SDK on fakes: what a node says of the host around it, which it does not change,
//! tokio's clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::time::Duration;

use common::*;
use flannel_backend_hostgw::HostGwBackend;
use flannel_core::{
    Address, BackendType, ConditionStatus, ConditionType, DualStack, Error, Family, FilterChain,
    FilterFamily, Firewall, LeaseAttrs, LeaseKey, MAIN_TABLE, MemoryManager, Object, Op, Overlay,
    OverlayEvent, PublicIp, ReversePath, Route, RouteProtocol, RouteTarget, Status, Subnet, Sysctl,
};
use flannel_testkit::fake_kernel::{FakeKernel, FaultKind};

const MINUTE: Duration = Duration::from_secs(60);
const POOL: &str = "10.42.0.0/16";

fn net(text: &str) -> Subnet {
    text.parse().expect("a subnet")
}

fn route(table: u32, dst: Subnet, target: RouteTarget) -> Object {
    Object::Route(Route {
        table,
        dst,
        metric: 0,
        target,
        protocol: RouteProtocol::BOOT,
        source: None,
    })
}

fn forwarding_of(name: &str, on: bool) -> Object {
    Object::Sysctl(Sysctl {
        dev: dev(name),
        family: Family::V4,
        name: "forwarding".to_owned(),
        value: u8::from(on).to_string(),
    })
}

async fn becomes(overlay: &Overlay, what: &str, is: impl FnMut(&Status) -> bool) -> Duration {
    let start = tokio::time::Instant::now();
    let wait = tokio::time::timeout(MINUTE, overlay.wait_for(is)).await;
    wait.expect(what).expect("running");
    start.elapsed()
}

/// The settings without which a kernel does not forward.
const SWITCHES: [(Family, &str); 2] = [
    (Family::V4, "sysctl -w net.ipv4.ip_forward=1"),
    (Family::V6, "sysctl -w net.ipv6.conf.all.forwarding=1"),
];

/// A network of one family.
const fn single(family: Family) -> &'static str {
    match family {
        Family::V4 => r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#,
        Family::V6 => {
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:42::/48",
                "Backend":{"Type":"vxlan"}}"#
        }
    }
}

/// A node in a network of IPv4 alone.
async fn alone() -> (FakeKernel, Overlay) {
    let manager = MemoryManager::new(config(single(Family::V4)));
    let kernel = FakeKernel::node(1);
    let overlay = start("a", &manager, &kernel).await;
    settle(&overlay).await;
    (kernel, overlay)
}

/// The message of a condition that becomes false soon.
async fn told(overlay: &Overlay, kind: ConditionType) -> String {
    let is_false = |status: &Status| {
        let condition = status.condition(kind);
        condition.is_some_and(|condition| condition.status == ConditionStatus::False)
    };
    let took = becomes(overlay, &kind.to_string(), is_false).await;
    assert!(took <= Duration::from_secs(2), "{kind} after {took:?}");
    let status = overlay.status();
    status.condition(kind).expect("one of each").message.clone()
}

/// The obstacle of a node that does not work.
async fn obstacle(overlay: &Overlay, kind: ConditionType) -> String {
    let is = |status: &Status| status.obstacle().is_some_and(|c| c.kind == kind);
    let took = becomes(overlay, &kind.to_string(), is).await;
    assert!(took <= Duration::from_secs(2), "{kind} after {took:?}");
    let status = overlay.status();
    assert!(status.ready && !status.working);
    status.obstacle().expect("a reason").message.clone()
}

#[tokio::test(start_paused = true)]
async fn without_forwarding_a_node_does_not_get_ready_and_says_what_mends_it() {
    for (family, what) in SWITCHES {
        let manager = MemoryManager::new(config(single(family)));
        let kernel = FakeKernel::node(1);
        kernel.set_forwarding(family, false);
        let overlay = builder("a", &manager, &kernel).start();
        let overlay = overlay.await.expect("all parts are there");
        let condition = match overlay.ready_within(MINUTE).await {
            Err(Error::NotReady(condition)) => condition,
            other => panic!("{other:?}"),
        };
        assert_eq!(condition.kind, ConditionType::Forwarding);
        assert!(condition.message.contains(what), "{}", condition.message);
        assert!(!overlay.status().working);
        kernel.set_forwarding(family, true);
        ready_within(Duration::from_secs(2), &overlay).await;
        overlay.stop().await.expect("stopped");
    }
}

/// A family that does not work never costs the other: the node works, and says what is off.
#[tokio::test(start_paused = true)]
async fn without_forwarding_of_one_family_a_node_works_and_says_what_mends_the_other() {
    let manager = MemoryManager::new(config(DUAL));
    for (family, what) in SWITCHES {
        let kernel = FakeKernel::node(1);
        kernel.set_forwarding(family, false);
        let overlay = builder("a", &manager, &kernel).start();
        let overlay = overlay.await.expect("all parts are there");
        ready_within(MINUTE, &overlay).await;
        let message = told(&overlay, ConditionType::Forwarding).await;
        assert!(message.contains(what), "{message}");
        let status = overlay.status();
        let condition = status.condition(ConditionType::Forwarding).expect("one");
        assert_eq!(condition.reason, "ForwardingOffInOneFamily");
        assert!(status.working);
        // Without the other one it does not work any more.
        let other = Family::ALL.into_iter().find(|other| *other != family);
        kernel.set_forwarding(other.expect("two"), false);
        obstacle(&overlay, ConditionType::Forwarding).await;
        kernel.set_forwarding(Family::V4, true);
        kernel.set_forwarding(Family::V6, true);
        let is_on = |status: &Status| status.is_true(ConditionType::Forwarding);
        becomes(&overlay, "all is on", is_on).await;
        overlay.stop().await.expect("stopped");
    }
}

#[tokio::test(start_paused = true)]
async fn forwarding_that_is_switched_off_is_told_and_so_is_its_return() {
    let (kernel, a) = alone().await;
    kernel.set_forwarding(Family::V4, false);
    let message = obstacle(&a, ConditionType::Forwarding).await;
    assert!(message.contains("net.ipv4.ip_forward=1"), "{message}");
    kernel.set_forwarding(Family::V4, true);
    let took = becomes(&a, "it works again", |status| status.working).await;
    assert!(took <= Duration::from_secs(2), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn the_devices_own_setting_counts_and_its_name_is_written_as_sysctl_takes_it() {
    let (kernel, a) = alone().await;
    let change = |on| Op::Change(forwarding_of("flannel.1", on));
    kernel.external(&change(false)).expect("written");
    let message = obstacle(&a, ConditionType::Forwarding).await;
    let command = "sysctl -w net.ipv4.conf.flannel/1.forwarding=1";
    assert!(message.contains(command), "{message}");
    kernel.external(&change(true)).expect("written");
    becomes(&a, "it works again", |status| status.working).await;
    // That of a device on which nothing comes in that is to be forwarded does not.
    let other = Op::Change(forwarding_of("eth0", false));
    kernel.external(&other).expect("written");
    tokio::time::sleep(MINUTE).await;
    assert!(a.status().working);
}

/// Where packets to our own containers go, packets of these come in.
#[tokio::test(start_paused = true)]
async fn the_containers_device_is_found_by_the_route_to_our_own_subnet() {
    let (kernel, a) = alone().await;
    let _ = kernel.clone().with_link("cni0", 1450, &[]);
    let own = subnet_of(&a, Family::V4);
    let to_pods = route(MAIN_TABLE, own, RouteTarget::Device(dev("cni0")));
    kernel.insert_foreign(to_pods).expect("it fits");
    let off = Op::Change(forwarding_of("cni0", false));
    kernel.external(&off).expect("written");
    let message = obstacle(&a, ConditionType::Forwarding).await;
    assert!(message.contains("cni0"), "{message}");
    kernel.delete_link(dev("cni0"));
    becomes(&a, "it works again", |status| status.working).await;
}

#[tokio::test(start_paused = true)]
async fn a_policy_rule_in_front_of_our_routes_is_an_obstacle_until_it_goes() {
    let (_manager, kernels, [a, _b]) = pair().await;
    let other = route(100, net(POOL), RouteTarget::Device(dev("eth0")));
    kernels[0].insert_foreign(other).expect("it fits");
    tokio::time::sleep(MINUTE).await;
    assert!(a.status().working, "without a rule nobody asks that table");
    kernels[0].set_rule(1000, net(POOL), Some(100));
    let message = obstacle(&a, ConditionType::Routes).await;
    for part in ["flannel.1", "eth0", "table 100", "ip rule del pref 1000"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    kernels[0].delete_rule(Family::V4, 1000);
    let took = becomes(&a, "it works again", |status| status.working).await;
    assert!(took <= Duration::from_secs(2), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_rule_that_was_there_first_keeps_a_node_from_working_once_it_has_peers() {
    let manager = MemoryManager::new(config(DUAL));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    kernels[1].set_rule(7, net(POOL), None);
    let _a = start("a", &manager, &kernels[0]).await;
    let b = builder("b", &manager, &kernels[1]).start();
    let b = b.await.expect("all parts are there");
    let condition = match b.ready_within(MINUTE).await {
        Err(Error::NotReady(condition)) => condition,
        other => panic!("{other:?}"),
    };
    assert_eq!(condition.kind, ConditionType::Routes);
    assert!(
        condition.message.contains("ip rule del pref 7"),
        "{}",
        condition.message
    );
    kernels[1].delete_rule(Family::V4, 7);
    ready_within(Duration::from_secs(2), &b).await;
}

/// One peer's share of a black hole is told and keeps nobody else from anything.
#[tokio::test(start_paused = true)]
async fn a_narrower_route_in_front_of_one_peer_of_many_is_found_and_named() {
    let manager = MemoryManager::new(config(
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#,
    ));
    for n in 2..60 {
        manager
            .put_raw(peer(n, &format!("10.42.{n}.0/24")))
            .expect("stored");
    }
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    let hole = route(MAIN_TABLE, net("10.42.31.128/25"), RouteTarget::Blackhole);
    kernel.insert_foreign(hole.clone()).expect("it fits");
    let is_told = |status: &Status| {
        let routes = status.condition(ConditionType::Routes);
        routes.is_some_and(|routes| routes.status == ConditionStatus::False)
    };
    let took = becomes(&a, "it is told", is_told).await;
    assert!(took <= Duration::from_secs(2), "{took:?}");
    let status = a.status();
    assert!(status.working, "the others are reached");
    let routes = status
        .condition(ConditionType::Routes)
        .expect("it is there");
    assert_eq!(routes.reason, "SomeRoutedElsewhere");
    let command = "ip route del blackhole 10.42.31.128/25";
    assert!(routes.message.contains(command), "{}", routes.message);
    // It stays told, whichever peers are asked about next.
    let mut told = 0;
    for _ in 0..60 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        told += u32::from(is_told(&a.status()));
    }
    assert_eq!(told, 60);
    kernel.delete(&hole.key());
    becomes(&a, "it is gone", |status| !is_told(status)).await;
}

/// Without any hint every peer gets its turn.
#[tokio::test(start_paused = true)]
async fn what_is_in_front_of_one_peer_is_found_in_time_without_a_hint() {
    let manager = MemoryManager::new(config(
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#,
    ));
    for n in 2..60 {
        manager
            .put_raw(peer(n, &format!("10.42.{n}.0/24")))
            .expect("stored");
    }
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    settle(&a).await;
    kernel.fail_next(FaultKind::HintsLost);
    kernel.set_rule(5, net("10.42.31.0/24"), None);
    kernel.assert_faults_consumed();
    let is_told = |status: &Status| {
        let routes = status.condition(ConditionType::Routes);
        routes.is_some_and(|routes| routes.status == ConditionStatus::False)
    };
    let wait = tokio::time::timeout(MINUTE * 3, a.wait_for(is_told)).await;
    wait.expect("it is told").expect("running");
}

/// Where few are known all of them are asked about at once; among many it does no good to look for each.
#[tokio::test(start_paused = true)]
async fn a_peer_that_comes_to_many_does_not_have_the_host_looked_at_for_it() {
    let manager = MemoryManager::new(config(
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#,
    ));
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    let come = async |peers: std::ops::Range<u8>| {
        let before = kernel.looks();
        for n in peers {
            manager
                .put_raw(peer(n, &format!("10.42.{n}.0/24")))
                .expect("stored");
            tokio::time::sleep(Duration::from_secs(2)).await;
            settle(&a).await;
        }
        kernel.looks() - before
    };
    // The timer has its own looks.
    let few = come(2..8).await;
    assert!(few >= 6, "{few} looks");
    come(8..22).await;
    let many = come(22..52).await;
    assert!((6..20).contains(&many), "{many} looks for 30 peers");
}

/// The look on the timer comes just before the reading by which a lost hint is found out.
#[tokio::test(start_paused = true)]
async fn a_route_of_ours_that_is_missing_for_a_moment_is_no_news_of_the_host() {
    let (_manager, kernels, [a, b]) = pair().await;
    let subnet = subnet_of(&b, Family::V4);
    let found = route_to(&kernels[0], subnet).expect("a route");
    let mut events = a.events();
    for _ in 0..5 {
        kernels[0].fail_next(FaultKind::HintsLost);
        kernels[0].delete(&found.key());
        kernels[0].assert_faults_consumed();
        until(MINUTE * 2, "it is back", || {
            route_to(&kernels[0], subnet).is_some()
        })
        .await;
        settle(&a).await;
    }
    while let Ok(event) = events.try_recv() {
        if let OverlayEvent::Condition(condition) = event {
            assert_ne!(condition.kind, ConditionType::Routes, "{condition}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_strict_filter_is_told_only_where_the_way_back_is_another() {
    let (_manager, kernels, [a, _b]) = pair().await;
    kernels[0].set_reverse_path(ReversePath::Strict);
    tokio::time::sleep(MINUTE).await;
    assert!(a.status().working, "the way back is the same");
    // The other node's address is behind another device: what comes from there is dropped.
    let kernel = kernels[0].clone().with_link("eth1", 1500, &[]);
    let back = route(
        MAIN_TABLE,
        net("192.0.2.2/32"),
        RouteTarget::Device(dev("eth1")),
    );
    kernel.insert_foreign(back.clone()).expect("it fits");
    let is = |status: &Status| {
        status
            .obstacle()
            .is_some_and(|c| c.kind == ConditionType::ReversePath)
    };
    becomes(&a, "it is told", is).await;
    let status = a.status();
    let message = &status.obstacle().expect("a reason").message;
    assert!(
        message.contains("sysctl -w net.ipv4.conf.eth0.rp_filter=2"),
        "{message}"
    );
    kernel.set_reverse_path(ReversePath::Loose);
    becomes(&a, "a loose one passes it", |status| status.working).await;
}

/// Packets to an address of the loopback device come in on the device that the way to peers leads through.
#[tokio::test(start_paused = true)]
async fn a_strict_filter_is_told_where_the_address_is_on_the_loopback_device_too() {
    let (manager, kernels, [a, _b]) = pair().await;
    a.stop().await.expect("running");
    let own = "198.51.100.9".parse().expect("an address");
    let on_loopback = Object::Address(Address {
        dev: dev("lo"),
        ip: own,
        prefix_len: 32,
    });
    kernels[0].insert_foreign(on_loopback).expect("it fits");
    let is_default =
        |object: &Object| matches!(object, Object::Route(route) if route.dst == net("0.0.0.0/0"));
    let objects = kernels[0].objects();
    let Some(Object::Route(default)) = objects.values().find(|object| is_default(object)) else {
        panic!("there is no default route");
    };
    let from_loopback = Route {
        source: Some(own),
        ..default.clone()
    };
    let changed = kernels[0].external(&Op::Change(Object::Route(from_loopback)));
    changed.expect("anybody may");
    let a = start("a", &manager, &kernels[0]).await;
    settle(&a).await;
    let status = a.status();
    let lease = status.lease.as_ref().expect("it is held");
    assert_eq!(lease.public_ip.ip(Family::V4), Some(own));
    kernels[0].set_reverse_path(ReversePath::Strict);
    tokio::time::sleep(MINUTE).await;
    assert!(a.status().working, "the way back is the same");
    let kernel = kernels[0].clone().with_link("eth1", 1500, &[]);
    let through = RouteTarget::Device(dev("eth1"));
    let back = route(MAIN_TABLE, net("192.0.2.2/32"), through);
    kernel.insert_foreign(back).expect("it fits");
    let message = obstacle(&a, ConditionType::ReversePath).await;
    let mend = "sysctl -w net.ipv4.conf.eth0.rp_filter=2";
    assert!(message.contains(mend), "{message}");
}

#[tokio::test(start_paused = true)]
async fn a_dropping_chain_alone_is_unknown_and_names_the_chain() {
    let manager = MemoryManager::new(config(
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#,
    ));
    let kernel = FakeKernel::node(1);
    let chain = |families, chain: &str| FilterChain {
        families,
        table: "filter".to_owned(),
        chain: chain.to_owned(),
    };
    let firewall = |dropping, unread: Option<&str>| {
        let mut firewall = Firewall::default();
        firewall.dropping = dropping;
        firewall.unread = unread.map(ToOwned::to_owned);
        Some(firewall)
    };
    for (given, reason, part) in [
        (
            firewall(vec![chain(FilterFamily::Inet, "fwd")], None),
            "PolicyDrop",
            "table inet filter, chain fwd",
        ),
        (
            firewall(vec![chain(FilterFamily::Ip6, "fwd")], None),
            "Clear",
            "",
        ),
        (
            firewall(vec![], Some("legacy tables")),
            "CannotBeRead",
            "legacy tables",
        ),
        (None, "NotKnown", "does not say"),
    ] {
        kernel.set_firewall(given);
        let a = start("a", &manager, &kernel).await;
        let status = a.status();
        let found = status
            .condition(ConditionType::Firewall)
            .expect("it is there");
        assert_eq!(found.reason, reason);
        assert!(found.message.contains(part), "{}", found.message);
        let is_clear = reason == "Clear";
        assert_eq!(found.status == ConditionStatus::True, is_clear);
        assert_ne!(found.status, ConditionStatus::False);
        assert!(status.working && status.obstacle().is_none());
        a.stop().await.expect("stopped");
    }
}

/// A network of both families whose only peer has one of them counts on the host in both.
#[tokio::test(start_paused = true)]
async fn forwarding_is_judged_of_a_family_that_no_peer_has_yet() {
    let both = DUAL.replace("vxlan", "host-gw");
    let manager = MemoryManager::new(config(&both));
    let mut other = peer(9, "10.42.9.0/24");
    other.key = LeaseKey::new("v6-alone");
    other.subnet = DualStack::v6(net("fd00:42:0:9::/64"));
    other.attrs = LeaseAttrs {
        public_ip: PublicIp::both([192, 0, 2, 9].into(), "2001:db8::9".parse().expect("one")),
        backend_type: Some(BackendType::host_gw()),
        ..LeaseAttrs::default()
    };
    manager.put_raw(other).expect("stored");
    let kernel = FakeKernel::node(1);
    let overlay = Overlay::builder(node("a"))
        .manager(manager.clone())
        .backend(HostGwBackend::new())
        .kernel(kernel.clone());
    let overlay = overlay.start().await.expect("all parts are there");
    ready_within(MINUTE, &overlay).await;
    settle(&overlay).await;
    for family in Family::ALL {
        kernel.set_forwarding(family, false);
        told(&overlay, ConditionType::Forwarding).await;
        kernel.set_forwarding(family, true);
        let is_on = |status: &Status| status.is_true(ConditionType::Forwarding);
        becomes(&overlay, "it is on again", is_on).await;
    }
}
