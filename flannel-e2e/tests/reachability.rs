//! Packets between pods: every family, full size, from the first one on.
#![allow(missing_docs, reason = "tests")]

use std::net::UdpSocket;
use std::time::Duration;

use flannel_core::{Family, Kernel, Lease, Scope};
use flannel_e2e::{
    Cluster, DUAL, DUAL_GW, DUAL_UDP, LIMIT, Setup, V4, V4_GW, V4_UDP, V6, V6_GW, V6_UDP,
    route_key, until,
};
use flannel_testkit::netns::{Host, Ns};

const WAIT: Duration = Duration::from_secs(2);

fn socket(pod: &Host, family: Family) -> UdpSocket {
    let ip = pod.ips.ip(family).expect("the pod has this family");
    let socket = pod.ns.run(|| UdpSocket::bind((ip, 0)));
    let socket = socket.expect("it can be entered").expect("its address");
    socket.set_read_timeout(Some(WAIT)).expect("not zero");
    socket
}

/// How many fragments a namespace has made so far.
fn fragments(ns: &Ns) -> u64 {
    let read = |file: &str| {
        let path = format!("/proc/thread-self/net/{file}");
        let text = ns.run(|| std::fs::read_to_string(path));
        text.expect("it can be entered").expect("it can be read")
    };
    let snmp = read("snmp");
    let mut ip = snmp.lines().filter_map(|line| line.strip_prefix("Ip: "));
    let (names, values) = (ip.next().expect("names"), ip.next().expect("values"));
    let v4 = names
        .split(' ')
        .zip(values.split(' '))
        .find(|(name, _)| *name == "FragCreates");
    let v6 = read("snmp6");
    let v6 = v6
        .lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .find(|(name, _)| *name == "Ip6FragCreates");
    [v4.expect("it is there").1, v6.expect("it is there").1]
        .map(|number| number.trim().parse::<u64>().expect("a number"))
        .iter()
        .sum()
}

/// Sends one packet of this size, IP header included; answers whether it arrived whole and how
/// many fragments anybody made on the way.
fn send_packet(cluster: &Cluster, family: Family, size: u32) -> (bool, u64) {
    let all = || {
        let nodes = cluster.nodes.iter().map(|node| &node.host.ns);
        let ns = nodes.chain(cluster.pods.iter().map(|pod| &pod.ns));
        ns.map(fragments).sum::<u64>()
    };
    let headers = match family {
        Family::V4 => 20 + 8,
        Family::V6 => 40 + 8,
    };
    let payload: Vec<u8> = (0..size - headers).map(|i| i.to_le_bytes()[0]).collect();
    let (from, to) = (
        socket(&cluster.pods[0], family),
        socket(&cluster.pods[1], family),
    );
    let before = all();
    from.send_to(&payload, to.local_addr().expect("bound"))
        .expect("it can be sent");
    let mut received = vec![0; 70_000];
    let len = to.recv(&mut received).unwrap_or(0);
    (received[..len] == payload[..], all() - before)
}

async fn every_pod_reaches_every_other(test: &str, config: &'static str, mtu: u32) {
    let Some(cluster) = Cluster::start(test, Setup::new(3, config)).await else {
        return;
    };
    cluster.assert_reachable("after the start");
    let families: Vec<Family> = cluster.pods[0].ips.families().collect();
    for family in families {
        assert_eq!(cluster.nodes[0].mtu, mtu);
        let (whole, fragments) = send_packet(&cluster, family, mtu);
        assert!(whole, "{family}: a packet of {mtu} bytes is lost");
        assert_eq!(fragments, 0, "{family}: a packet of {mtu} bytes is cut");
        let (_, fragments) = send_packet(&cluster, family, mtu + 1);
        assert!(fragments > 0, "{family}: the MTU could be larger");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_pod_reaches_every_other_with_full_packets_over_ipv4() {
    every_pod_reaches_every_other("reach-v4", V4, 1450).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_pod_reaches_every_other_with_full_packets_over_ipv6() {
    every_pod_reaches_every_other("reach-v6", V6, 1430).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_pod_reaches_every_other_with_full_packets_over_both() {
    every_pod_reaches_every_other("reach-dual", DUAL, 1430).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_pod_reaches_every_other_with_full_packets_without_a_tunnel() {
    every_pod_reaches_every_other("reach-gw-v4", V4_GW, 1500).await;
    every_pod_reaches_every_other("reach-gw-v6", V6_GW, 1500).await;
    every_pod_reaches_every_other("reach-gw-dual", DUAL_GW, 1500).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_pod_reaches_every_other_with_full_packets_in_datagrams() {
    every_pod_reaches_every_other("reach-udp-v4", V4_UDP, 1472).await;
    every_pod_reaches_every_other("reach-udp-v6", V6_UDP, 1452).await;
    every_pod_reaches_every_other("reach-udp-dual", DUAL_UDP, 1452).await;
}

/// The second node's overlay is stopped, its data path stays; its lease is taken out of the store.
async fn absent_peer(cluster: &mut Cluster) -> Lease {
    let absent = cluster.nodes[1].take_overlay();
    let key = absent.status().lease.as_ref().expect("ready").key.clone();
    absent.stop().await.expect("running");
    let leases = cluster.manager.snapshot().leases;
    let lease = leases.into_iter().find(|lease| lease.key == key);
    assert!(cluster.manager.remove(&key));
    wait_for_routes(cluster, false).await;
    lease.expect("it was there")
}

/// Waits until the first node's kernel has the routes to the second, or has them no more.
async fn wait_for_routes(cluster: &Cluster, there: bool) {
    let subnets = cluster.nodes[1].subnets;
    until("the routes follow the lease", LIMIT, async || {
        let observed = cluster.nodes[0].hand.observe(&Scope::default()).await;
        let objects = observed.expect("readable").objects;
        subnets
            .values()
            .all(|subnet| objects.contains_key(&route_key(*subnet)) == there)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_packet_to_a_new_peer_arrives() {
    let Some(mut cluster) = Cluster::start("first-packet", Setup::new(2, DUAL)).await else {
        return;
    };
    let lease = absent_peer(&mut cluster).await;
    for round in 0..10 {
        for family in Family::ALL {
            let (from, to) = (
                socket(&cluster.pods[0], family),
                socket(&cluster.pods[1], family),
            );
            let target = to.local_addr().expect("bound");
            cluster.manager.put_raw(lease.clone()).expect("sound");
            wait_for_routes(&cluster, true).await;
            from.send_to(b"one", target).expect("it can be sent");
            let mut buffer = [0; 16];
            let received = to.recv(&mut buffer);
            assert!(
                matches!(received, Ok(3)),
                "{family}, round {round}: {received:?}"
            );
            cluster.manager.remove(&lease.key);
            wait_for_routes(&cluster, false).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flow_that_begins_before_the_peer_is_known_arrives_from_then_on() {
    let Some(mut cluster) = Cluster::start("early-flow", Setup::new(2, DUAL)).await else {
        return;
    };
    let lease = absent_peer(&mut cluster).await;
    for family in Family::ALL {
        let (from, to) = (
            socket(&cluster.pods[0], family),
            socket(&cluster.pods[1], family),
        );
        let target = to.local_addr().expect("bound");
        // One socket from before to after; what it sends meanwhile has nowhere to go.
        for _ in 0..100 {
            from.send_to(&[0], target).ok();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        cluster.manager.put_raw(lease.clone()).expect("sound");
        wait_for_routes(&cluster, true).await;
        for number in 1..=100 {
            from.send_to(&[number], target).expect("it can be sent");
        }
        let mut buffer = [0; 16];
        let mut expected = 1;
        while expected <= 100 {
            to.recv(&mut buffer)
                .unwrap_or_else(|error| panic!("{family}: packet {expected}: {error}"));
            // Those of before may have been held back and arrive late.
            if buffer[0] != 0 {
                assert_eq!(buffer[0], expected, "{family}");
                expected += 1;
            }
        }
        cluster.manager.remove(&lease.key);
        wait_for_routes(&cluster, false).await;
    }
}
