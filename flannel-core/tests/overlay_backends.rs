//! The whole SDK on fakes: host-gw, and a change of the backend while the cluster runs, node by
//! node; tokio's clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::net::IpAddr;
use std::time::Duration;

use common::*;
use flannel_backend_hostgw::HostGwBackend;
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    Address, BackendType, ConditionStatus, ConditionType, DualStack, Family, Lease, MAIN_TABLE,
    MemoryManager, NetworkConfig, Object, ObjectKey, Op, Overlay, OverlayBuilder, PublicIp,
    Rejection, Route, RouteProtocol, RouteTarget, Subnet, UnderlayOptions,
};
use flannel_testkit::fake_kernel::FakeKernel;
use flannel_testkit::staged::StagedManager;
use tokio::time::sleep;

/// Longer than the devices of a former backend stay.
const LONG: Duration = Duration::from_secs(60);

fn host_gw() -> NetworkConfig {
    config(&DUAL.replace("vxlan", "host-gw"))
}

/// A node whose config is its own.
struct Node {
    name: &'static str,
    manager: StagedManager,
    kernel: FakeKernel,
    overlay: Overlay,
}

impl Node {
    async fn start(name: &'static str, manager: StagedManager, kernel: FakeKernel) -> Self {
        let overlay = both(name, &manager, &kernel).start().await;
        let overlay = overlay.expect("all parts");
        overlay.ready().await.expect("ready");
        Self {
            name,
            manager,
            kernel,
            overlay,
        }
    }

    fn tunnel(&self) -> bool {
        let there = |name| self.kernel.get(&ObjectKey::Link(dev(name))).is_some();
        assert_eq!(there("flannel.1"), there("flannel-v6.1"));
        there("flannel.1")
    }
}

/// A node with both backends.
fn both(name: &str, manager: &StagedManager, kernel: &FakeKernel) -> OverlayBuilder {
    Overlay::builder(node(name))
        .manager(manager.clone())
        .backend(VxlanBackend::new())
        .backend(HostGwBackend::new())
        .kernel(kernel.clone())
}

async fn cluster(config: &NetworkConfig) -> (MemoryManager, Vec<Node>) {
    let store = MemoryManager::new(config.clone());
    let mut nodes = Vec::new();
    for (name, number) in [("a", 1), ("b", 2), ("c", 3)] {
        let manager = StagedManager::new(store.clone(), config.clone());
        nodes.push(Node::start(name, manager, FakeKernel::node(number)).await);
    }
    rest(&nodes).await;
    (store, nodes)
}

async fn rest(nodes: &[Node]) {
    for node in nodes {
        settle(&node.overlay).await;
    }
}

/// The gateway and the device by which a node reaches a subnet.
fn way(kernel: &FakeKernel, dst: Subnet) -> Option<(IpAddr, String)> {
    let (gateway, dev) = match route_to(kernel, dst)? {
        Object::Route(Route {
            target: RouteTarget::Gateway { gateway, dev, .. },
            ..
        }) => (gateway, dev),
        Object::Route(Route {
            target: RouteTarget::Nexthop(id),
            ..
        }) => match kernel.get(&ObjectKey::Nexthop(id))? {
            Object::Nexthop(nexthop) => (nexthop.gateway, nexthop.dev),
            _ => return None,
        },
        _ => return None,
    };
    Some((gateway, dev.to_string()))
}

/// Asserts that every node reaches every other: through the tunnel where both are of VXLAN, else
/// straight.
fn assert_ways(nodes: &[Node], is_vxlan: impl Fn(usize) -> bool) {
    for (i, from) in nodes.iter().enumerate() {
        assert_eq!(from.overlay.status().rejected, [], "{}", from.name);
        for (k, to) in nodes.iter().enumerate().filter(|(k, _)| *k != i) {
            for family in Family::ALL {
                let found = way(&from.kernel, subnet_of(&to.overlay, family));
                let (_, dev) = found.expect("every peer is routed");
                let tunnelled = dev.starts_with("flannel");
                assert_eq!(
                    tunnelled,
                    is_vxlan(i) && is_vxlan(k),
                    "{} to {} by {dev}",
                    from.name,
                    to.name
                );
            }
        }
    }
}

/// Asserts that no route to a subnet was removed; a stopgap leads to a single address.
fn assert_no_gap(nodes: &[Node]) {
    for node in nodes {
        for entry in node.kernel.take_log() {
            let removed = matches!(&entry.op, Op::Delete(Object::Route(route))
                if route.dst.len() < route.dst.family().bits());
            assert!(!removed, "{}: {entry:?}", node.name);
        }
    }
}

fn tells_of_change(node: &Node) -> bool {
    let status = node.overlay.status();
    status
        .notes
        .iter()
        .any(|note| note.topic == "backend-change")
}

#[tokio::test(start_paused = true)]
async fn a_change_of_backend_node_by_node_cuts_nobody_off() {
    let (_, nodes) = cluster(&config(DUAL)).await;
    assert_ways(&nodes, |_| true);
    assert_no_gap(&nodes);
    let last = nodes.len() - 1;
    for (i, node) in nodes.iter().enumerate() {
        node.manager.set_config(&host_gw());
        rest(&nodes).await;
        assert_ways(&nodes, |k| k > i);
        assert_no_gap(&nodes);
        if i < last {
            sleep(LONG).await;
            let all = nodes
                .iter()
                .all(|node| node.tunnel() && tells_of_change(node));
            assert!(all, "devices stay while some are still of VXLAN");
        }
    }
    assert!(
        nodes
            .iter()
            .all(|node| node.tunnel() && !tells_of_change(node))
    );
    sleep(LONG).await;
    assert!(nodes.iter().all(|node| !node.tunnel()), "they go at last");
    assert_ways(&nodes, |_| false);

    for (i, node) in nodes.iter().enumerate().rev() {
        node.manager.set_config(&config(DUAL));
        rest(&nodes).await;
        assert_ways(&nodes, |k| k >= i);
        assert_no_gap(&nodes);
    }
    sleep(LONG).await;
    assert!(
        nodes
            .iter()
            .all(|node| node.tunnel() && !tells_of_change(node))
    );
}

#[tokio::test(start_paused = true)]
async fn a_change_of_backend_everywhere_at_once_cuts_nobody_off() {
    let (_, nodes) = cluster(&config(DUAL)).await;
    assert_no_gap(&nodes);
    for (config, is_vxlan) in [(host_gw(), false), (config(DUAL), true)] {
        for node in &nodes {
            node.manager.set_config(&config);
        }
        rest(&nodes).await;
        assert_ways(&nodes, |_| is_vxlan);
        assert_no_gap(&nodes);
        assert!(nodes.iter().all(Node::tunnel));
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_in_the_middle_of_a_change_keeps_the_device_for_those_that_need_it() {
    let (_, mut nodes) = cluster(&config(DUAL)).await;
    nodes[0].manager.set_config(&host_gw());
    rest(&nodes).await;
    assert_no_gap(&nodes);

    let a = nodes.remove(0);
    a.overlay.stop().await.expect("running");
    let a = Node::start(a.name, a.manager, a.kernel).await;
    nodes.insert(0, a);
    rest(&nodes).await;
    sleep(LONG).await;
    assert!(nodes[0].tunnel(), "others may still send to it");
    assert_ways(&nodes, |k| k > 0);
    assert_no_gap(&nodes);

    for node in &nodes[1..] {
        node.manager.set_config(&host_gw());
    }
    rest(&nodes).await;
    sleep(LONG).await;
    assert!(nodes.iter().all(|node| !node.tunnel()));
    assert_ways(&nodes, |_| false);
}

#[tokio::test(start_paused = true)]
async fn where_the_new_backend_does_not_fit_the_former_stays_in_force() {
    let store = MemoryManager::new(config(DUAL));
    let mut nodes = Vec::new();
    for (name, number) in [("a", 1), ("b", 2)] {
        let manager = StagedManager::new(store.clone(), config(DUAL));
        let kernel = FakeKernel::node(number);
        let mut builder = both(name, &manager, &kernel);
        if number == 1 {
            // Behind NAT, where host-gw does not work.
            let by_name = flannel_core::Interface::Name(dev("eth0"));
            let told = PublicIp::v4([203, 0, 113, 7].into());
            builder = builder.underlay(UnderlayOptions::of([by_name]).public_ip(told));
        }
        let overlay = builder.start().await.expect("all parts");
        overlay.ready().await.expect("ready");
        nodes.push(Node {
            name,
            manager,
            kernel,
            overlay,
        });
    }
    rest(&nodes).await;
    let (a, b) = (&nodes[0], &nodes[1]);
    a.manager.set_config(&host_gw());
    rest(&nodes).await;
    let status = a.overlay.status();
    let condition = status.condition(ConditionType::Config).expect("told");
    assert_eq!(condition.status, ConditionStatus::False);
    assert!(condition.message.contains("NAT"), "{}", condition.message);
    assert!(a.tunnel());
    let (_, device) = way(&a.kernel, subnet_of(&b.overlay, Family::V4)).expect("routed");
    assert_eq!(device, "flannel.1");
}

/// A record of another host-gw node, with an address on the fake link.
fn gw_peer(n: u8, subnet: &str) -> Lease {
    let mut lease = peer(n, subnet);
    lease.attrs.backend_type = Some(BackendType::host_gw());
    lease.attrs.backend_data = DualStack::default();
    lease
}

/// One host-gw node.
async fn alone() -> (MemoryManager, FakeKernel, Overlay) {
    let store = MemoryManager::new(host_gw());
    let kernel = FakeKernel::node(1);
    let overlay = start_gw(&store, &kernel).await;
    (store, kernel, overlay)
}

async fn start_gw(store: &MemoryManager, kernel: &FakeKernel) -> Overlay {
    let overlay = Overlay::builder(node("a"))
        .manager(store.clone())
        .backend(HostGwBackend::new())
        .kernel(kernel.clone())
        .start()
        .await
        .expect("all parts");
    overlay.ready().await.expect("ready");
    settle(&overlay).await;
    overlay
}

fn dst() -> Subnet {
    "10.42.99.0/24".parse().expect("a subnet")
}

#[tokio::test(start_paused = true)]
async fn a_peer_is_taken_up_as_soon_as_it_is_on_a_link() {
    let (store, kernel, a) = alone().await;
    let mut far = gw_peer(9, "10.42.99.0/24");
    far.attrs.public_ip = PublicIp::v4([198, 51, 100, 9].into());
    store.put_raw(far).expect("stored");
    settle(&a).await;
    assert_eq!(route_to(&kernel, dst()), None);
    let rejected = |a: &Overlay| {
        let status = a.status();
        let mut reasons = status.rejected.iter().map(|peer| &peer.reason);
        reasons.any(|reason| matches!(reason, Rejection::NotOnLink { .. }))
    };
    assert!(rejected(&a));
    let on_link = Object::Address(Address {
        dev: dev("eth0"),
        ip: [198, 51, 100, 1].into(),
        prefix_len: 24,
    });
    for _ in 0..2 {
        kernel.insert_foreign(on_link.clone()).expect("it fits");
        until(Duration::from_secs(1), "it is taken up", || {
            route_to(&kernel, dst()).is_some() && !rejected(&a)
        })
        .await;
        kernel.external(&Op::Delete(on_link.clone())).expect("ok");
        until(Duration::from_secs(1), "it is gone", || {
            route_to(&kernel, dst()).is_none() && rejected(&a)
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_address_that_becomes_this_nodes_own_is_no_peers_any_more() {
    let (store, kernel, a) = alone().await;
    store.put_raw(gw_peer(9, "10.42.99.0/24")).expect("stored");
    settle(&a).await;
    assert!(route_to(&kernel, dst()).is_some());
    let second = Object::Address(Address {
        dev: dev("eth0"),
        ip: [192, 0, 2, 9].into(),
        prefix_len: 32,
    });
    kernel.insert_foreign(second).expect("it fits");
    until(Duration::from_secs(1), "it is rejected", || {
        route_to(&kernel, dst()).is_none()
    })
    .await;
    let status = a.status();
    let reason = &status.rejected[0].reason;
    assert!(matches!(reason, Rejection::PublicIp { .. }), "{reason}");
}

fn boot_route(gateway: [u8; 4]) -> Object {
    Object::Route(Route {
        table: MAIN_TABLE,
        dst: dst(),
        metric: 0,
        target: RouteTarget::Gateway {
            gateway: gateway.into(),
            dev: dev("eth0"),
            onlink: false,
        },
        protocol: RouteProtocol::BOOT,
        source: None,
    })
}

#[tokio::test(start_paused = true)]
async fn a_route_of_go_flannel_is_adopted_followed_and_at_last_removed() {
    let store = MemoryManager::new(host_gw());
    let kernel = FakeKernel::node(1);
    kernel
        .insert_foreign(boot_route([192, 0, 2, 9]))
        .expect("it fits");
    store.put_raw(gw_peer(9, "10.42.99.0/24")).expect("stored");
    kernel.take_log();
    let a = start_gw(&store, &kernel).await;
    for entry in kernel.take_log() {
        let harmless = matches!(
            entry.op,
            Op::Create(Object::Nexthop(_)) | Op::Change(Object::Route(_))
        );
        assert!(harmless, "{entry:?}");
    }
    assert_eq!(a.status().foreign, []);
    let gateway = |kernel: &FakeKernel| way(kernel, dst()).map(|(gateway, _)| gateway);
    assert_eq!(gateway(&kernel), Some([192, 0, 2, 9].into()));

    // The peer moves, and leaves.
    let mut moved = gw_peer(10, "10.42.99.0/24");
    moved.node = node("peer-9");
    store.put_raw(moved.clone()).expect("stored");
    settle(&a).await;
    assert_eq!(gateway(&kernel), Some([192, 0, 2, 10].into()));
    assert!(store.remove(&moved.key));
    settle(&a).await;
    assert_eq!(route_to(&kernel, dst()), None);
}

#[tokio::test(start_paused = true)]
async fn a_route_that_somebody_made_to_another_gateway_is_reported_and_left() {
    let store = MemoryManager::new(host_gw());
    let kernel = FakeKernel::node(1);
    let theirs = boot_route([192, 0, 2, 77]);
    kernel.insert_foreign(theirs.clone()).expect("it fits");
    store.put_raw(gw_peer(9, "10.42.99.0/24")).expect("stored");
    let a = start_gw(&store, &kernel).await;
    assert_eq!(a.status().foreign[0].found, theirs);
    assert_eq!(kernel.get(&theirs.key()), Some(theirs.clone()));
    kernel.delete(&theirs.key());
    settle(&a).await;
    assert_eq!(a.status().foreign, []);
    assert!(route_to(&kernel, dst()).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_route_that_somebody_puts_in_the_place_of_ours_outlives_a_change_of_the_peer() {
    let (store, kernel, a) = alone().await;
    let lease = gw_peer(9, "10.42.99.0/24");
    store.put_raw(lease.clone()).expect("stored");
    settle(&a).await;
    // Both at once, so that the peer's new address is known before the kernel's hint is heard.
    let theirs = boot_route([192, 0, 2, 77]);
    kernel.external(&Op::Change(theirs.clone())).expect("ok");
    let mut moved = gw_peer(10, "10.42.99.0/24");
    moved.node = lease.node;
    store.put_raw(moved).expect("stored");
    settle(&a).await;
    assert_eq!(kernel.get(&theirs.key()), Some(theirs.clone()));
    assert_eq!(a.status().foreign[0].found, theirs);
}

#[tokio::test(start_paused = true)]
async fn routes_of_departed_peers_are_removed_at_the_start() {
    let (store, kernel, a) = alone().await;
    let lease = gw_peer(9, "10.42.99.0/24");
    store.put_raw(lease.clone()).expect("stored");
    settle(&a).await;
    a.stop().await.expect("running");
    assert!(route_to(&kernel, dst()).is_some(), "packets keep flowing");
    assert!(store.remove(&lease.key));
    let a = start_gw(&store, &kernel).await;
    assert_eq!(route_to(&kernel, dst()), None);
    let left = kernel.objects().into_values();
    let nexthops = left.filter(|object| matches!(object, Object::Nexthop(_)));
    assert_eq!(nexthops.count(), 0);
    a.stop().await.expect("running");
}
