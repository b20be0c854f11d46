//! Many peers, bad ones among them, disturb nobody.
#![allow(missing_docs, reason = "tests")]

use std::net::Ipv4Addr;

use flannel_core::{BackendData, BackendType, DualStack, Family, Lease, MacAddr, PublicIp};
use flannel_e2e::{Cluster, LIMIT, Peers, Setup, V4, no_loss, route_key, within};

const GOOD: u32 = 200;

/// A record with something wrong in it.
fn hostile(cluster: &Cluster, peers: &Peers, n: u32) -> Lease {
    let mut lease = peers.lease(GOOD + 10 + n % 10);
    let node = &cluster.nodes[0];
    let own = node.subnets.v4.expect("IPv4");
    let leases = cluster.manager.snapshot().leases;
    let data = |vni: u32, mac: MacAddr| {
        let text = format!(r#"{{"VNI":{vni},"VtepMAC":"{mac}"}}"#);
        DualStack::v4(BackendData::from_json(&text).expect("JSON"))
    };
    let ip = |a, b, c, d| PublicIp::v4(Ipv4Addr::new(a, b, c, d));
    match n {
        // Where it says it is.
        0 => lease.attrs.public_ip = PublicIp::default(),
        1 => lease.attrs.public_ip = ip(127, 0, 0, 1),
        2 => lease.attrs.public_ip = ip(224, 0, 0, 1),
        3 => lease.attrs.public_ip = ip(255, 255, 255, 255),
        4 => lease.attrs.public_ip = ip(10, 42, 7, 7),
        5 => lease.attrs.public_ip = node.host.ips,
        // What it claims.
        6 => lease.subnet = DualStack::v4("0.0.0.0/0".parse().expect("a subnet")),
        7 => lease.subnet = DualStack::v4("10.0.0.0/8".parse().expect("a subnet")),
        8 => lease.subnet = DualStack::v4("192.0.2.0/24".parse().expect("a subnet")),
        9 => lease.subnet = DualStack::v4(own),
        10 => lease.subnet = DualStack::v4(own.supernet(20).expect("it is longer")),
        11 => lease.subnet = DualStack::v4(peers.subnet(5)),
        12 => lease.subnet = DualStack::v6("fd00::/64".parse().expect("a subnet")),
        13 => lease.subnet = DualStack::default(),
        // What it publishes.
        14 => lease.attrs.backend_type = Some(BackendType::host_gw()),
        15 => lease.attrs.backend_data = DualStack::default(),
        16 => lease.attrs.backend_data = data(7, MacAddr([2, 0, 0, 0, 0, 1])),
        17 => lease.attrs.backend_data = data(1, MacAddr([0xff; 6])),
        // The MAC addresses of ourselves and of an older peer.
        18 => {
            let ours = leases.iter().find(|lease| lease.node == node.id);
            lease.attrs.backend_data = ours.expect("we have one").attrs.backend_data.clone();
        }
        _ => lease.attrs.backend_data = data(1, peers.mac(5)),
    }
    lease.key = flannel_core::LeaseKey::new(format!("hostile-{n}"));
    lease.node = flannel_core::NodeId::new(format!("hostile-{n}")).expect("a node id");
    lease
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_peers_are_reported_and_disturb_nobody() {
    let Some(cluster) = Cluster::start("hostile", Setup::new(2, V4)).await else {
        return;
    };
    let peers = Peers {
        first: [10, 42, 1, 0].into(),
        vni: 1,
    };
    // Not the subnets that the two nodes hold.
    let is_free = |n: &u32| {
        let taken = cluster.nodes.iter().flat_map(|node| node.subnets.values());
        taken
            .into_iter()
            .all(|held| !held.overlaps(&peers.subnet(*n)))
    };
    let good: Vec<u32> = (0..GOOD).filter(is_free).collect();
    let path = (&cluster.pods[0], &cluster.pods[1], Family::V4);
    let known = 1 + good.len() + 20;
    no_loss("hostile peers", &[path], async || {
        for n in &good {
            cluster.manager.put_raw(peers.lease(*n)).expect("sound");
        }
        for n in 0..20 {
            let lease = hostile(&cluster, &peers, n);
            // The store itself refuses a family in the place of the other.
            cluster.manager.put_raw(lease).expect("sound");
        }
        for node in &cluster.nodes {
            let told = node.overlay().wait_for(|status| status.peers == known);
            within("all are known", LIMIT, told).await.expect("running");
            node.converged().await;
        }
    })
    .await;

    for node in &cluster.nodes {
        let status = node.overlay().status();
        let rejected: Vec<&str> = status.rejected.iter().map(|r| r.key.as_str()).collect();
        // What is this node's own address, subnet and MAC is another's elsewhere.
        let relative = [5, 9, 10, 18];
        for n in 0..20 {
            let key = format!("hostile-{n}");
            let is_rejected = rejected.contains(&key.as_str());
            let is_first = node.id == cluster.nodes[0].id;
            assert!(
                is_rejected || (relative.contains(&n) && !is_first),
                "{key} on {}: {:?}",
                node.id,
                status.rejected
            );
        }
        assert!(
            rejected.iter().all(|key| key.starts_with("hostile")),
            "{rejected:?}"
        );
        assert!(status.failing.is_empty(), "{:?}", status.failing);
        let objects = node.ours().await;
        for n in &good {
            assert!(
                objects.contains_key(&route_key(peers.subnet(*n))),
                "peer {n}"
            );
        }
    }
    cluster.assert_reachable("among hostile peers");
}
