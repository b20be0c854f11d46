//! The whole SDK on fakes: which interface carries the overlay while others come, look better and go,
//! tokio's clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::net::IpAddr;
use std::time::Duration;

use common::*;
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    Address, ConditionStatus, ConditionType, Error, Interface, LinkKind, MAIN_TABLE, MemoryManager,
    Object, ObjectKey, Op, Overlay, OverlayEvent, PublicIp, Route, RouteProtocol, RouteTarget,
    Subnet, UnderlayOptions,
};
use flannel_testkit::fake_kernel::{FakeKernel, LogEntry};
use flannel_testkit::staged::StagedManager;

const V4: &str = r#"{ "Network": "10.42.0.0/16", "Backend": { "Type": "vxlan" } }"#;
const MINUTE: Duration = Duration::from_secs(60);

/// A host with `eth0` (192.0.2.1) and `eth1` (198.51.100.1).
fn host() -> FakeKernel {
    FakeKernel::node(1).with_link("eth1", 1500, &[(ip("198.51.100.1"), 24)])
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn default_route(device: &str, gateway: &str, metric: u32) -> Object {
    Object::Route(Route {
        table: MAIN_TABLE,
        dst: Subnet::new(ip("0.0.0.0"), 0).expect("a subnet"),
        metric,
        target: RouteTarget::Gateway {
            gateway: ip(gateway),
            dev: dev(device),
            onlink: false,
        },
        protocol: RouteProtocol::BOOT,
        source: None,
    })
}

fn address(device: &str, text: &str) -> Object {
    Object::Address(Address {
        dev: dev(device),
        ip: ip(text),
        prefix_len: 24,
    })
}

/// The overlay of a node that works, beside one peer behind a router.
async fn started(kernel: &FakeKernel) -> (MemoryManager, Overlay) {
    let manager = MemoryManager::new(config(V4));
    let mut beyond = peer(90, "10.42.90.0/24");
    beyond.attrs.public_ip = PublicIp::v4([203, 0, 113, 9].into());
    manager.put_raw(beyond).expect("stored");
    let overlay = start("a", &manager, kernel).await;
    settle(&overlay).await;
    (manager, overlay)
}

fn carried_by(overlay: &Overlay) -> String {
    let status = overlay.status();
    let external = status.external.as_ref().expect("it is chosen");
    external.to_string()
}

/// The devices of ours that were removed or made since.
fn devices_disturbed(log: &[LogEntry]) -> Vec<String> {
    let of_devices = log.iter().filter(|entry| {
        !matches!(entry.op, Op::Change(_)) && matches!(entry.op.object(), Object::Link(_))
    });
    of_devices
        .map(|entry| entry.op.object().to_string())
        .collect()
}

async fn moves(overlay: &Overlay, limit: Duration, to: &str) {
    until(limit, to, || carried_by(overlay) == to).await;
    settle(overlay).await;
    assert!(
        overlay.status().working,
        "{:?}",
        overlay.status().conditions
    );
}

/// A route to the peers of these tests through the first interface.
fn route_to_peers() -> Object {
    Object::Route(Route {
        table: MAIN_TABLE,
        dst: "203.0.113.0/24".parse().expect("a subnet"),
        metric: 0,
        target: RouteTarget::Gateway {
            gateway: ip("192.0.2.254"),
            dev: dev("eth0"),
            onlink: false,
        },
        protocol: RouteProtocol::BOOT,
        source: None,
    })
}

#[tokio::test(start_paused = true)]
async fn another_interface_that_looks_better_changes_nothing() {
    let kernel = host();
    let (_manager, overlay) = started(&kernel).await;
    let mut events = overlay.events();
    kernel.take_log();
    // Of another kind of traffic: peers are still reached through the first.
    let better = default_route("eth1", "198.51.100.254", 0);
    let worse = default_route("eth0", "192.0.2.254", 50);
    for object in [route_to_peers(), worse] {
        kernel.insert_foreign(object).expect("it fits");
    }
    kernel.delete(&default_route("eth0", "192.0.2.254", 0).key());
    kernel.insert_foreign(better).expect("it fits");
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(carried_by(&overlay), "eth0 (192.0.2.1)");
    assert!(overlay.status().working);
    assert_eq!(kernel.take_log(), []);
    while let Ok(event) = events.try_recv() {
        assert!(
            !matches!(event, OverlayEvent::InterfaceChanged { .. }),
            "{event:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn where_the_kernel_sends_to_peers_through_another_interface_that_is_followed() {
    let kernel = host();
    let (_manager, overlay) = started(&kernel).await;
    let mut events = overlay.events();
    kernel.take_log();
    let before = default_route("eth0", "192.0.2.254", 0);
    kernel.delete(&before.key());
    kernel
        .insert_foreign(default_route("eth1", "198.51.100.254", 0))
        .expect("it fits");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(carried_by(&overlay), "eth0 (192.0.2.1)");
    let status = overlay.status();
    let condition = status.condition(ConditionType::Underlay).expect("told");
    assert_eq!(
        (condition.status, &*condition.reason),
        (ConditionStatus::False, "Lost")
    );
    assert!(
        condition.message.contains("through eth1"),
        "{}",
        condition.message
    );
    moves(&overlay, Duration::from_secs(3), "eth1 (198.51.100.1)").await;
    let status = overlay.status();
    let condition = status.condition(ConditionType::Underlay).expect("told");
    let told = "before it was eth0 (192.0.2.1), but the host's routes to peers lead through eth1";
    assert!(condition.message.contains(told), "{}", condition.message);
    let changed = std::iter::from_fn(|| events.try_recv().ok())
        .filter(|event| matches!(event, OverlayEvent::InterfaceChanged { .. }))
        .count();
    assert_eq!(changed, 1);
    assert_eq!(devices_disturbed(&kernel.take_log()), Vec::<String>::new());
    // The former one comes back and looks better: that changes nothing.
    kernel
        .insert_foreign(default_route("eth1", "198.51.100.254", 9))
        .expect("it fits");
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(carried_by(&overlay), "eth1 (198.51.100.1)");
}

#[tokio::test(start_paused = true)]
async fn an_interface_that_is_back_in_time_is_kept() {
    let kernel = host();
    kernel
        .insert_foreign(default_route("eth1", "198.51.100.254", 50))
        .expect("it fits");
    let (_manager, overlay) = started(&kernel).await;
    kernel.set_link_down(dev("eth0"));
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let status = overlay.status();
    let obstacle = status.obstacle().expect("it does not work");
    assert!(
        obstacle.message.contains("eth0 is down"),
        "{}",
        obstacle.message
    );
    kernel.set_link_up(dev("eth0"), true);
    kernel
        .insert_foreign(default_route("eth0", "192.0.2.254", 0))
        .expect("it fits");
    tokio::time::sleep(MINUTE).await;
    assert_eq!(carried_by(&overlay), "eth0 (192.0.2.1)");
    assert!(overlay.status().working);
    // And one that is not, is not.
    kernel.set_link_down(dev("eth0"));
    moves(&overlay, MINUTE, "eth1 (198.51.100.1)").await;
}

#[tokio::test(start_paused = true)]
async fn another_address_of_the_interface_is_published_within_a_second() {
    let kernel = host();
    let store = MemoryManager::new(config(V4));
    let manager = StagedManager::new(store, config(V4));
    let overlay = Overlay::builder(node("a"))
        .manager(manager.clone())
        .backend(VxlanBackend::new())
        .kernel(kernel.clone());
    let overlay = overlay.start().await.expect("all parts");
    ready_within(MINUTE, &overlay).await;
    settle(&overlay).await;
    assert_eq!(manager.reconnects(), 0);
    kernel.delete(&address("eth0", "192.0.2.1").key());
    tokio::time::sleep(Duration::from_millis(100)).await;
    kernel
        .insert_foreign(address("eth0", "192.0.2.77"))
        .expect("it fits");
    until(Duration::from_secs(1), "published", || {
        let status = overlay.status();
        let lease = status.lease.as_ref().expect("it is held");
        lease.public_ip == PublicIp::v4([192, 0, 2, 77].into())
    })
    .await;
    assert_eq!(carried_by(&overlay), "eth0 (192.0.2.77)");
    // What is connected without an address gets that of any device.
    assert_eq!(
        manager.reconnects(),
        2,
        "to the store from an address that is there"
    );
    // At once in the place of the other, it is the only one.
    kernel.delete(&address("eth0", "192.0.2.77").key());
    kernel
        .insert_foreign(address("eth0", "192.0.2.78"))
        .expect("it fits");
    moves(&overlay, MINUTE, "eth0 (192.0.2.78)").await;
    assert_eq!(manager.reconnects(), 3);
    // One more changes nothing.
    kernel
        .insert_foreign(address("eth1", "198.51.100.77"))
        .expect("it fits");
    tokio::time::sleep(MINUTE).await;
    assert_eq!(manager.reconnects(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_address_that_may_not_be_used_any_more_is_left_where_there_is_another() {
    let kernel = host();
    let (_manager, overlay) = started(&kernel).await;
    let old = (dev("eth0"), ip("192.0.2.1"));
    kernel.set_address(old.0, old.1, |info| info.deprecated = true);
    tokio::time::sleep(MINUTE).await;
    assert_eq!(
        carried_by(&overlay),
        "eth0 (192.0.2.1)",
        "there is no other one"
    );
    assert!(
        overlay.status().working,
        "{:?}",
        overlay.status().conditions
    );
    kernel
        .insert_foreign(address("eth0", "192.0.2.77"))
        .expect("it fits");
    moves(&overlay, Duration::from_secs(2), "eth0 (192.0.2.77)").await;
}

#[tokio::test(start_paused = true)]
async fn an_interface_that_is_renamed_is_followed() {
    for named in [false, true] {
        let kernel = host();
        let manager = MemoryManager::new(config(V4));
        manager.put_raw(peer(90, "10.42.90.0/24")).expect("stored");
        let mut overlay = builder("a", &manager, &kernel);
        if named {
            overlay = overlay.underlay(by_name("eth0"));
        }
        let overlay = overlay.start().await.expect("all parts");
        ready_within(MINUTE, &overlay).await;
        settle(&overlay).await;
        kernel.take_log();
        kernel.rename_link(dev("eth0"), dev("wan0"));
        tokio::time::sleep(MINUTE).await;
        assert_eq!(carried_by(&overlay), "wan0 (192.0.2.1)", "named: {named}");
        assert!(
            overlay.status().working,
            "{:?}",
            overlay.status().conditions
        );
        assert_eq!(
            devices_disturbed(&kernel.take_log()),
            Vec::<String>::new(),
            "{named}"
        );
    }
}

fn by_name(name: &str) -> UnderlayOptions {
    UnderlayOptions::of([Interface::Name(dev(name))])
}

#[tokio::test(start_paused = true)]
async fn an_interface_that_becomes_a_port_is_followed_once_its_bridge_has_the_address() {
    let kernel = host();
    let (_manager, overlay) = started(&kernel).await;
    kernel.take_log();
    let bridge = Object::Link(flannel_core::Link {
        name: dev("br0"),
        kind: LinkKind::Bridge,
        mtu: Some(1500),
        mac: None,
        up: true,
        alias: None,
    });
    kernel.insert_foreign(bridge).expect("it fits");
    kernel.set_master(dev("eth0"), Some(dev("br0")));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        carried_by(&overlay),
        "eth0 (192.0.2.1)",
        "it still has the address"
    );
    kernel.delete(&address("eth0", "192.0.2.1").key());
    kernel
        .insert_foreign(address("br0", "192.0.2.1"))
        .expect("it fits");
    kernel
        .insert_foreign(default_route("br0", "192.0.2.254", 0))
        .expect("it fits");
    moves(&overlay, Duration::from_secs(1), "br0 (192.0.2.1)").await;
    assert_eq!(devices_disturbed(&kernel.take_log()), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn an_operator_moves_the_overlay_at_once() {
    let kernel = host();
    let (_manager, overlay) = started(&kernel).await;
    kernel.take_log();
    let error = overlay.use_interface(by_name("eth7")).await;
    assert!(matches!(error, Err(Error::Interface(_))), "{error:?}");
    settle(&overlay).await;
    assert_eq!(carried_by(&overlay), "eth0 (192.0.2.1)");
    overlay
        .use_interface(by_name("eth1"))
        .await
        .expect("it is there");
    moves(&overlay, Duration::from_secs(1), "eth1 (198.51.100.1)").await;
    let status = overlay.status();
    let lease = status.lease.as_ref().expect("it is held");
    assert_eq!(lease.public_ip, PublicIp::v4([198, 51, 100, 1].into()));
    assert_eq!(devices_disturbed(&kernel.take_log()), Vec::<String>::new());
    // What was asked for stays asked for.
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(carried_by(&overlay), "eth1 (198.51.100.1)");
}

#[tokio::test(start_paused = true)]
async fn a_restart_keeps_the_interface_unless_another_one_is_named() {
    let kernel = host();
    let manager = MemoryManager::new(config(V4));
    let state = Memory::default();
    let node = || builder("a", &manager, &kernel).state(state.clone());
    let overlay = node().start().await.expect("all parts");
    ready_within(MINUTE, &overlay).await;
    settle(&overlay).await;
    overlay.stop().await.expect("running");
    // Meanwhile another one looks better.
    kernel
        .insert_foreign(default_route("eth0", "192.0.2.254", 50))
        .expect("it fits");
    kernel.delete(&default_route("eth0", "192.0.2.254", 0).key());
    kernel
        .insert_foreign(default_route("eth1", "198.51.100.254", 0))
        .expect("it fits");
    let overlay = node().start().await.expect("all parts");
    ready_within(MINUTE, &overlay).await;
    assert_eq!(carried_by(&overlay), "eth0 (192.0.2.1)");
    overlay.stop().await.expect("running");
    let overlay = node()
        .underlay(by_name("eth1"))
        .start()
        .await
        .expect("all parts");
    ready_within(Duration::from_secs(1), &overlay).await;
    assert_eq!(carried_by(&overlay), "eth1 (198.51.100.1)");
    overlay.stop().await.expect("running");
    // What is gone for good is not waited for for ever.
    let overlay = node().start().await.expect("all parts");
    ready_within(MINUTE, &overlay).await;
    assert_eq!(
        carried_by(&overlay),
        "eth1 (198.51.100.1)",
        "it has the default route"
    );
}

#[tokio::test(start_paused = true)]
async fn an_interface_that_a_boot_brings_late_is_waited_for() {
    let kernel = host();
    let manager = MemoryManager::new(config(V4));
    let state = Memory::default();
    let node = || builder("a", &manager, &kernel).state(state.clone());
    let overlay = node().start().await.expect("all parts");
    ready_within(MINUTE, &overlay).await;
    settle(&overlay).await;
    overlay.stop().await.expect("running");
    kernel.delete(&address("eth0", "192.0.2.1").key());
    kernel.delete(&default_route("eth0", "192.0.2.254", 0).key());
    kernel
        .insert_foreign(default_route("eth1", "198.51.100.254", 9))
        .expect("it fits");
    let overlay = node().start().await.expect("all parts");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(overlay.status().external.is_none());
    kernel
        .insert_foreign(address("eth0", "192.0.2.1"))
        .expect("it fits");
    kernel
        .insert_foreign(default_route("eth0", "192.0.2.254", 0))
        .expect("it fits");
    ready_within(MINUTE, &overlay).await;
    assert_eq!(carried_by(&overlay), "eth0 (192.0.2.1)");
    let gone = ObjectKey::Link(dev("eth0"));
    assert!(kernel.get(&gone).is_some());
}

#[tokio::test(start_paused = true)]
async fn an_interface_that_is_down_is_no_other_choice_though_it_is_named() {
    let kernel = FakeKernel::node(1);
    let manager = MemoryManager::new(config(DUAL));
    let overlay = builder("a", &manager, &kernel).underlay(by_name("eth0"));
    let overlay = overlay.start().await.expect("all parts");
    ready_within(MINUTE, &overlay).await;
    settle(&overlay).await;
    let before = overlay.status().lease.clone();
    // Linux keeps its IPv4 address, and takes that of IPv6.
    kernel.set_link_down(dev("eth0"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(overlay.status().lease, before, "nothing else is published");
    tokio::time::sleep(MINUTE).await;
    let status = overlay.status();
    let obstacle = status.obstacle().expect("it does not work");
    assert_eq!(obstacle.kind, ConditionType::Underlay);
    assert!(
        obstacle.message.contains("eth0 is down"),
        "{}",
        obstacle.message
    );
    kernel.set_link_up(dev("eth0"), true);
    kernel
        .insert_foreign(Object::Address(Address {
            dev: dev("eth0"),
            ip: ip("2001:db8::1"),
            prefix_len: 64,
        }))
        .expect("it fits");
    moves(&overlay, MINUTE, "eth0 (192.0.2.1, 2001:db8::1)").await;
}

#[tokio::test(start_paused = true)]
async fn another_address_of_the_interface_comes_before_an_interface_that_looks_better() {
    let kernel = host();
    let (_manager, overlay) = started(&kernel).await;
    let worse = default_route("eth0", "192.0.2.254", 50);
    kernel.insert_foreign(worse.clone()).expect("it fits");
    kernel.delete(&default_route("eth0", "192.0.2.254", 0).key());
    kernel.delete(&address("eth0", "192.0.2.1").key());
    kernel
        .insert_foreign(default_route("eth1", "198.51.100.254", 9))
        .expect("it fits");
    for object in [address("eth0", "192.0.2.77"), worse] {
        kernel.insert_foreign(object).expect("it fits");
    }
    kernel.insert_foreign(route_to_peers()).expect("it fits");
    moves(&overlay, Duration::from_secs(1), "eth0 (192.0.2.77)").await;
    tokio::time::sleep(MINUTE).await;
    assert_eq!(carried_by(&overlay), "eth0 (192.0.2.77)");
}

#[tokio::test(start_paused = true)]
async fn an_address_that_is_tentative_is_waited_for_with_the_reason() {
    let kernel = host();
    let own = (dev("eth0"), ip("2001:db8::1"));
    kernel.set_address(own.0, own.1, |info| info.tentative = true);
    let manager = MemoryManager::new(config(
        r#"{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
            "Backend": {"Type": "vxlan"}}"#,
    ));
    let overlay = builder("a", &manager, &kernel).start().await;
    let overlay = overlay.expect("all parts");
    let condition = match overlay.ready_within(Duration::from_secs(2)).await {
        Err(Error::NotReady(condition)) => condition,
        other => panic!("{other:?}"),
    };
    assert_eq!(condition.kind, ConditionType::Underlay, "{condition}");
    assert!(!condition.permanent, "{condition}");
    for part in ["2001:db8::1", "eth0", "tentative"] {
        assert!(condition.message.contains(part), "{}", condition.message);
    }
    kernel.set_address(own.0, own.1, |info| info.tentative = false);
    ready_within(Duration::from_secs(2), &overlay).await;
    assert_eq!(carried_by(&overlay), "eth0 (2001:db8::1)");
}
