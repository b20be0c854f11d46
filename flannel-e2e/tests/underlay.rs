//! The network under the overlay goes, comes back and changes; the overlay follows.
#![allow(missing_docs, reason = "tests")]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::{
    ConditionStatus, ConditionType, Family, Link, LinkKind, Object, ObjectKey, Route, RouteTarget,
    Subnet,
};
use flannel_e2e::{
    Cluster, DUAL, DUAL_GW, DUAL_UDP, LIMIT, Node, Setup, dev, route_key, until, within,
};

/// So long between two readings without a hint that whatever is followed in time is hinted at.
const NEVER: Duration = Duration::from_secs(3600);

fn on_hints(layout: &[usize], config: &'static str) -> Setup {
    Setup {
        layout: layout.to_vec(),
        tune: Arc::new(|builder| builder.resync_every(NEVER)),
        ..Setup::new(0, config)
    }
}

async fn condition(node: &Node, kind: ConditionType, wanted: ConditionStatus) {
    let holds = node
        .overlay()
        .wait_for(|status| status.condition(kind).map(|c| c.status) == Some(wanted));
    within(&format!("{kind} is {wanted}"), LIMIT, holds)
        .await
        .expect("running");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interface_that_was_down_is_healed() {
    interface_down("eth0-down", DUAL).await;
    interface_down("eth0-down-gw", DUAL_GW).await;
    interface_down("eth0-down-udp", DUAL_UDP).await;
}

async fn interface_down(test: &str, config: &'static str) {
    let Some(cluster) = Cluster::start(test, on_hints(&[3], config)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let right = node.ours().await;
    node.host.ns.set_down("eth0").expect("it is there");
    condition(node, ConditionType::Underlay, ConditionStatus::False).await;
    node.configure_underlay(&cluster.underlay);
    condition(node, ConditionType::Underlay, ConditionStatus::True).await;
    cluster.reachable_within("eth0 is up again", LIMIT).await;
    node.converged().await;
    node.repaired("eth0 up again", &right).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_went_and_came_back_are_healed() {
    bare_interface("eth0-bare", DUAL).await;
    bare_interface("eth0-bare-gw", DUAL_GW).await;
    bare_interface("eth0-bare-udp", DUAL_UDP).await;
}

async fn bare_interface(test: &str, config: &'static str) {
    let Some(cluster) = Cluster::start(test, on_hints(&[3], config)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let right = node.ours().await;
    let subnets = cluster.underlay.segments[0].subnets;
    for (family, subnet) in subnets.iter() {
        let ip = node.host.ips.ip(family).expect("both families");
        let removed = node.host.ns.remove_address("eth0", ip, subnet.len());
        removed.expect("it is there");
    }
    condition(node, ConditionType::Underlay, ConditionStatus::False).await;
    node.configure_underlay(&cluster.underlay);
    condition(node, ConditionType::Underlay, ConditionStatus::True).await;
    cluster
        .reachable_within("the addresses are back", LIMIT)
        .await;
    node.converged().await;
    node.repaired("addresses back", &right).await;
}

async fn device_mtus(node: &Node, wanted: [u32; 2], pods: u32) {
    until("the devices follow the MTU", LIMIT, async || {
        let objects = node.objects().await;
        let mtus = ["flannel.1", "flannel-v6.1"].map(|name| {
            match objects.get(&ObjectKey::Link(dev(name))) {
                Some(Object::Link(link)) => link.mtu.unwrap_or(0),
                _ => 0,
            }
        });
        mtus == wanted
    })
    .await;
    let told = node.overlay().wait_for(|status| status.mtu == Some(pods));
    within("the status follows the MTU", LIMIT, told)
        .await
        .expect("running");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mtu_of_the_interface_is_followed() {
    let Some(cluster) = Cluster::start("eth0-mtu", on_hints(&[2], DUAL)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    device_mtus(node, [1450, 1430], 1430).await;
    for (outer, devices, pods) in [
        (1400, [1350, 1330], 1330),
        (1500, [1450, 1430], 1430),
        // Less than an IPv6 overlay needs: the last good state stays in force.
        (1360, [1310, 1290], 1290),
    ] {
        node.host.ns.set_mtu("eth0", outer).expect("it is there");
        device_mtus(node, devices, pods).await;
        node.converged().await;
        cluster.assert_reachable(&format!("MTU {outer}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_address_is_published_and_followed_by_all() {
    let Some(mut cluster) = Cluster::start("eth0-moved", on_hints(&[3], DUAL)).await else {
        return;
    };
    let right = cluster.nodes[1].ours().await;
    let moved = cluster.readdress(0).await;
    let node = &cluster.nodes[0];
    let leases = cluster.manager.snapshot().leases;
    let stored = leases.iter().find(|lease| lease.node == node.id);
    assert_eq!(stored.map(|lease| lease.attrs.public_ip), Some(moved));
    for other in &cluster.nodes[1..] {
        until("the peers follow", LIMIT, async || {
            let objects = other.objects().await;
            let remotes: BTreeSet<IpAddr> = objects
                .values()
                .filter_map(|object| match object {
                    Object::Fdb(fdb) => Some(fdb.remote),
                    _ => None,
                })
                .collect();
            moved.ips().all(|ip| remotes.contains(&ip))
        })
        .await;
    }
    cluster
        .reachable_within("the address is another", LIMIT)
        .await;
    cluster.settle().await;
    // Nothing but the remotes is different, on either side.
    let now = cluster.nodes[1].ours().await;
    assert!(right.keys().eq(now.keys()));
    let objects = node.objects().await;
    for (name, family) in [("flannel.1", Family::V4), ("flannel-v6.1", Family::V6)] {
        let link = objects.get(&ObjectKey::Link(dev(name)));
        let Some(Object::Link(Link {
            kind: LinkKind::Vxlan(vxlan),
            ..
        })) = link
        else {
            panic!("{name} is not there");
        };
        assert_eq!(vxlan.local, moved.ip(family));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interface_that_is_made_again_is_healed() {
    interface_anew("eth0-anew", DUAL).await;
    interface_anew("eth0-anew-gw", DUAL_GW).await;
}

async fn interface_anew(test: &str, config: &'static str) {
    let Some(cluster) = Cluster::start(test, on_hints(&[3], config)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let right = node.ours().await;
    // The overlay devices are bound to it, and go with it.
    node.host.ns.remove_link("eth0").expect("it is there");
    condition(node, ConditionType::Underlay, ConditionStatus::False).await;
    let router = &cluster.underlay.router;
    let made = router.add_veth("node1", &node.host.ns, "eth0", 1500);
    made.expect("the names are free");
    router
        .set_master("node1", Some("br0"))
        .expect("it is there");
    router.set_up("node1").expect("it is there");
    node.configure_underlay(&cluster.underlay);
    condition(node, ConditionType::Underlay, ConditionStatus::True).await;
    cluster.reachable_within("eth0 is made again", LIMIT).await;
    node.converged().await;
    node.repaired("eth0 made again", &right).await;
}

const DIRECT: &str = r#"{
    "Network": "10.42.0.0/16",
    "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
    "Backend": { "Type": "vxlan", "DirectRouting": true }
}"#;

/// The gateway and the device by which a node reaches a subnet.
async fn way(node: &Node, subnet: Subnet) -> Option<(IpAddr, String)> {
    let objects = node.objects().await;
    let Some(Object::Route(Route { target, .. })) = objects.get(&route_key(subnet)) else {
        return None;
    };
    let (gateway, dev) = match target {
        RouteTarget::Gateway { gateway, dev, .. } => (gateway, dev),
        RouteTarget::Nexthop(id) => match objects.get(&ObjectKey::Nexthop(*id)) {
            Some(Object::Nexthop(nexthop)) => (&nexthop.gateway, &nexthop.dev),
            _ => return None,
        },
        _ => return None,
    };
    Some((*gateway, dev.to_string()))
}

/// Asserts that a node reaches another without or with the tunnel, by its routes.
async fn reaches(node: &Node, other: &Node, direct: bool) {
    for (family, subnet) in other.subnets.iter() {
        let tunnel = match family {
            Family::V4 => "flannel.1",
            Family::V6 => "flannel-v6.1",
        };
        let public = other.host.ips.ip(family).expect("both families");
        let wanted = if direct {
            (public, "eth0".to_owned())
        } else {
            (subnet.address(), tunnel.to_owned())
        };
        let what = format!("{} to {subnet} by {wanted:?}", node.id);
        until(&what, LIMIT, async || {
            way(node, *subnet).await.as_ref() == Some(&wanted)
        })
        .await;
    }
}

/// How many packets the tunnels of a node have sent.
fn tunnelled(node: &Node) -> u64 {
    ["flannel.1", "flannel-v6.1"]
        .map(|name| node.sent_packets(dev(name)))
        .iter()
        .sum()
}

/// Pings between two pods in both families; answers how many packets both nodes' tunnels sent.
fn ping_between(cluster: &Cluster, a: usize, b: usize) -> u64 {
    let sent = || tunnelled(&cluster.nodes[a]) + tunnelled(&cluster.nodes[b]);
    let before = sent();
    let (from, to) = (&cluster.pods[a], &cluster.pods[b]);
    let ips: Vec<IpAddr> = to.ips.ips().collect();
    let wait = Duration::from_secs(2);
    for result in flannel_testkit::prober::ping_each(&from.ns, None, &ips, wait) {
        result.expect("an answer");
    }
    sent() - before
}

#[tokio::test(flavor = "multi_thread")]
async fn only_peers_behind_a_router_take_the_tunnel_with_direct_routing() {
    let Some(cluster) = Cluster::start("direct", on_hints(&[2, 1], DIRECT)).await else {
        return;
    };
    let [near, neighbour, far] = &cluster.nodes[..] else {
        panic!("three nodes");
    };
    reaches(near, neighbour, true).await;
    reaches(neighbour, near, true).await;
    reaches(near, far, false).await;
    reaches(far, near, false).await;
    cluster.assert_reachable("with direct routing");
    assert_eq!(ping_between(&cluster, 0, 1), 0, "no tunnel is needed");
    assert!(ping_between(&cluster, 0, 2) >= 4);

    // A neighbour that moves behind a router, and back: the underlay's routes are followed.
    let mut detours = Vec::new();
    for (family, gateway) in Family::ALL
        .into_iter()
        .zip(cluster.underlay.segments[0].gateways.ips())
    {
        let peer = neighbour.host.ips.ip(family).expect("both families");
        detours.push((Subnet::host(peer), gateway));
    }
    for (peer, gateway) in &detours {
        let added = near.host.ns.add_route(*peer, *gateway, "eth0");
        added.expect("it is free");
    }
    reaches(near, neighbour, false).await;
    cluster.assert_reachable("behind a router");
    for (peer, gateway) in &detours {
        let removed = near.host.ns.remove_route(*peer, *gateway, "eth0");
        removed.expect("it is there");
    }
    reaches(near, neighbour, true).await;
    near.converged().await;
    cluster.assert_reachable("on the link again");
    assert_eq!(ping_between(&cluster, 0, 1), 0, "no tunnel is needed");
    let plan = near.overlay().plan().await.expect("readable");
    assert_eq!(plan.steps, []);
}
