//! The UDP backend on a real kernel, where it differs from the others: what carries the packets is a
//! program of its own.
#![allow(
    clippy::print_stderr,
    missing_docs,
    reason = "tests; how long it took is printed"
)]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use flannel_backend_udp::PacketPath;
use flannel_core::{Error, Family, Kernel, Object, ObjectKey, Op, Scope};
use flannel_e2e::{
    Cluster, DUAL, DUAL_GW, DUAL_UDP, LIMIT, Node, Path, Setup, V4_UDP, config, dev, no_loss,
    until, within,
};
use tokio::time::Instant;

/// So long between two readings without a hint that whatever is repaired in time is hinted at.
const NEVER: Duration = Duration::from_secs(3600);

fn every(config: &'static str, nodes: usize, resync: Duration) -> Setup {
    Setup {
        tune: Arc::new(move |builder| builder.resync_every(resync)),
        ..Setup::new(nodes, config)
    }
}

async fn index_of_device(node: &Node) -> Option<u32> {
    let observed = node
        .hand
        .observe(&Scope::default())
        .await
        .expect("readable");
    let link = observed
        .links
        .iter()
        .find(|link| link.name == dev("flannel0"));
    link.map(|link| link.index)
}

/// Deleted by somebody, the device is made again with all on it, and a new forwarder takes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_deleted_again_and_again_is_healed() {
    let Some(cluster) = Cluster::start("tun-gone", every(DUAL_UDP, 3, NEVER)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let right = node.ours().await;
    let before = node.paths.running();
    let link = right
        .get(&ObjectKey::Link(dev("flannel0")))
        .expect("it is there");
    for _ in 0..5 {
        let index = index_of_device(node).await;
        node.break_by(&[Op::Delete(link.clone())]).await;
        node.repaired("the device is made again", &right).await;
        node.converged().await;
        assert_ne!(index_of_device(node).await, index);
        assert_eq!(node.paths.running(), before);
        cluster.assert_reachable("the device is another");
    }
    let status = node.overlay().status();
    let [traffic] = &status.traffic[..] else {
        panic!("one packet path: {:?}", status.traffic);
    };
    assert_eq!(traffic.dev, dev("flannel0"));
    assert!(traffic.counts["delivered_packets"] > 0, "{traffic:?}");
    assert!(traffic.counts.contains_key("spoofed"), "{traffic:?}");
    // Two others, each with an endpoint of each family.
    assert_eq!(traffic.peers.len(), 4, "{traffic:?}");
    assert!(
        traffic.peers.iter().all(|peer| peer.received_packets > 0),
        "{traffic:?}"
    );
}

/// Nobody hints at the end of a forwarder that ends without a word: the timer finds it.
#[tokio::test(flavor = "multi_thread")]
async fn a_forwarder_that_is_gone_is_started_again() {
    let often = Duration::from_millis(500);
    let Some(cluster) = Cluster::start("path-gone", every(DUAL_UDP, 2, often)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let before = node.paths.running();
    let device = index_of_device(node).await;
    for _ in 0..3 {
        node.paths.close(dev("flannel0")).await;
        until("it runs again", LIMIT, async || {
            node.paths.running() == before
        })
        .await;
        cluster.assert_reachable("with another forwarder");
    }
    assert_eq!(index_of_device(node).await, device, "the device has stayed");
    assert!(node.overlay().status().repairs >= 3);
}

/// The node's address on the underlay changes: its own sockets follow, and its peers' endpoints.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_address_is_followed_on_the_same_device() {
    let Some(mut cluster) = Cluster::start("udp-moved", every(DUAL_UDP, 3, NEVER)).await else {
        return;
    };
    let device = index_of_device(&cluster.nodes[0]).await;
    let moved = cluster.readdress(0).await;
    cluster
        .reachable_within("the address is another", LIMIT)
        .await;
    cluster.settle().await;
    let moved: BTreeSet<IpAddr> = moved.ips().collect();
    let node = &cluster.nodes[0];
    let own = node.paths.running().remove(0).tunnel.listen;
    let own: BTreeSet<IpAddr> = own.values().map(std::net::SocketAddr::ip).collect();
    assert_eq!(own, moved);
    for other in &cluster.nodes[1..] {
        let peers = other.paths.running().remove(0).peers;
        let ends: BTreeSet<IpAddr> = peers.values().map(std::net::SocketAddr::ip).collect();
        assert!(moved.is_subset(&ends), "{ends:?}");
    }
    assert_eq!(index_of_device(node).await, device, "the device has stayed");
}

/// Waits until a node publishes the backend of its config, and all nodes reach the others by it or
/// without a tunnel.
async fn follows(cluster: &Cluster, k: usize, text: &str) {
    let wanted = config(text).backend().backend_type().clone();
    let published = cluster.nodes[k]
        .overlay()
        .wait_for(|status| status.backend.as_ref() == Some(&wanted));
    within("the backend is another", LIMIT, published)
        .await
        .expect("running");
    cluster.settle().await;
}

/// Through each backend, node by node and back to the first: what a rolling update does.
#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_over_a_change_through_all_backends_node_by_node() {
    let Some(cluster) = Cluster::start("udp-change", Setup::new(3, DUAL_UDP)).await else {
        return;
    };
    let pods = cluster.pods.clone();
    let between = |a: usize, b: usize| Family::ALL.map(|f| (&pods[a], &pods[b], f));
    let paths: Vec<Path<'_>> = [between(0, 1), between(2, 0)].concat();
    no_loss("change of backend", &paths, async || {
        for text in [DUAL, DUAL_UDP, DUAL_GW, DUAL_UDP] {
            for k in 0..cluster.nodes.len() {
                cluster.views[k].set_config(&config(text));
                follows(&cluster, k, text).await;
                cluster.assert_reachable(&format!("node {k} changed to {text}"));
            }
        }
    })
    .await;
    for node in &cluster.nodes {
        assert_eq!(node.overlay().status().rejected, []);
    }
}

/// A node that leaves takes device, addresses, routes and forwarder along.
#[tokio::test(flavor = "multi_thread")]
async fn teardown_leaves_no_device_and_no_forwarder() {
    let Some(mut cluster) = Cluster::start("udp-torn", every(DUAL_UDP, 2, NEVER)).await else {
        return;
    };
    let torn = cluster.nodes[0].take_overlay().teardown().await;
    torn.expect("it can be removed");
    let node = &cluster.nodes[0];
    assert_eq!(node.ours().await.into_values().collect::<Vec<Object>>(), []);
    assert_eq!(index_of_device(node).await, None);
    assert_eq!(node.paths.running(), []);
}

/// The port of the backend is another program's when the node starts: it waits, says whose, and is ready
/// as soon as the port is free.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_port_is_taken_names_the_holder_and_waits() {
    let Some(mut cluster) = Cluster::start("udp-taken", every(V4_UDP, 2, NEVER)).await else {
        return;
    };
    let torn = cluster.nodes[0].take_overlay().teardown().await;
    torn.expect("it can be removed");
    let ns = cluster.nodes[0].host.ns.clone();
    let mut socket = None;
    until("the threads that had it have ended", LIMIT, async || {
        let bound = ns.run(|| std::net::UdpSocket::bind("0.0.0.0:8285"));
        socket = bound.expect("the namespace").ok();
        socket.is_some()
    })
    .await;
    let node = &cluster.nodes[0];
    let overlay = cluster.builder(0, &node.id, &node.host, &node.paths);
    let overlay = overlay.start().await.expect("all parts");
    let soon = Duration::from_secs(2);
    let condition = match overlay.ready_within(soon).await {
        Err(Error::NotReady(condition)) => condition,
        other => panic!("{other:?}"),
    };
    let holder = format!("process {} (", std::process::id());
    for part in ["UDP port 8285", "is in use by", &holder] {
        assert!(
            condition.message.contains(part),
            "{condition} {}",
            condition.message
        );
    }
    let start = Instant::now();
    drop(socket);
    within("it is ready", LIMIT, overlay.ready())
        .await
        .expect("ready");
    eprintln!(
        "ready {:?} after the port was free: {}",
        start.elapsed(),
        condition.message
    );
    overlay.stop().await.expect("stopped");
    cluster.restart(0).await;
    cluster.reachable_within("the port is ours", LIMIT).await;
}
