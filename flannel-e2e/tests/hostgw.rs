//! Host-gw on a real kernel: who is on a link, Go flannel's routes, and a change of the backend
//! while packets flow.
#![allow(missing_docs, reason = "tests")]

use std::time::Duration;

use flannel_core::{Family, MAIN_TABLE, Object, Op, Rejection, Route, RouteProtocol, RouteTarget};
use flannel_e2e::{
    Cluster, DUAL, DUAL_GW, LIMIT, Node, Path, Peers, Setup, V4_GW, config, dev, no_loss,
    route_key, run_in, try_no_loss, until, within,
};
use tokio::sync::{Mutex, MutexGuard};

/// One at a time: packets are counted.
async fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::const_new(());
    ONE.lock().await
}

const PEERS: Peers = Peers {
    first: std::net::Ipv4Addr::new(10, 42, 200, 0),
    vni: 1,
};

async fn has_route(node: &Node, n: u32) -> bool {
    let objects = node.ours().await;
    objects.contains_key(&route_key(PEERS.subnet(n)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_behind_a_router_is_rejected_and_taken_up_once_it_is_on_a_link() {
    let _alone = alone().await;
    let Some(cluster) = Cluster::start("on-link", Setup::new(2, V4_GW)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    cluster.manager.put_raw(PEERS.gw_lease(0)).expect("sound");
    let rejected = node.overlay().wait_for(|status| {
        let mut reasons = status.rejected.iter().map(|peer| &peer.reason);
        reasons.any(|reason| matches!(reason, Rejection::NotOnLink { .. }))
    });
    within("it is told", LIMIT, rejected)
        .await
        .expect("running");
    assert!(!has_route(node, 0).await);
    let (link, len) = Peers::link();
    for _ in 0..3 {
        node.host.ns.add_address("eth0", link, len).expect("free");
        until("it is taken up", LIMIT, async || has_route(node, 0).await).await;
        let nobody = node.overlay().wait_for(|status| status.rejected.is_empty());
        within("nobody is rejected", LIMIT, nobody)
            .await
            .expect("running");
        let removed = node.host.ns.remove_address("eth0", link, len);
        removed.expect("it is there");
        until("it is given up", LIMIT, async || !has_route(node, 0).await).await;
    }
    cluster.assert_reachable("with a peer behind a router");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_on_two_links_reach_those_on_their_own() {
    let _alone = alone().await;
    let setup = Setup {
        layout: vec![2, 1],
        ..Setup::new(0, DUAL_GW)
    };
    let Some(cluster) = Cluster::start("two-links", setup).await else {
        return;
    };
    let pings = cluster.pings();
    for ping in &pings {
        let near = ping.from < 2 && ping.to < 2;
        assert_eq!(ping.result.is_ok(), near, "{ping:?}");
    }
    let [near, _, far] = &cluster.nodes[..] else {
        panic!("three nodes");
    };
    for (node, count) in [(near, 2), (far, 4)] {
        let status = node.overlay().status();
        assert_eq!(status.rejected.len(), count, "{:?}", status.rejected);
        for peer in &status.rejected {
            assert!(
                matches!(peer.reason, Rejection::NotOnLink { .. }),
                "{peer:?}"
            );
        }
    }
}

/// What Go flannel's host-gw makes of its peers: routes of protocol `boot`.
fn as_go_flannel(cluster: &Cluster) -> Vec<Object> {
    let peer = &cluster.nodes[1];
    let routes = peer.subnets.values().map(|dst| {
        let gateway = peer.host.ips.ip(dst.family()).expect("both families");
        Object::Route(Route {
            table: MAIN_TABLE,
            dst: *dst,
            metric: Route::default_metric(dst.family()),
            target: RouteTarget::Gateway {
                gateway,
                dev: dev("eth0"),
                onlink: false,
            },
            protocol: RouteProtocol::BOOT,
            source: None,
        })
    });
    routes.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_over_the_take_over_of_go_flannels_routes() {
    let _alone = alone().await;
    for _chance in 0..2 {
        let Some(mut cluster) = Cluster::start("take-over-gw", Setup::new(2, DUAL_GW)).await else {
            return;
        };
        let torn = cluster.nodes[0].take_overlay().teardown().await;
        torn.expect("it can be removed");
        assert_eq!(cluster.nodes[0].ours().await.len(), 0);
        let theirs = as_go_flannel(&cluster);
        let ops: Vec<Op> = theirs.iter().cloned().map(Op::Create).collect();
        cluster.nodes[0].break_by(&ops).await;
        cluster.reachable_within("as Go flannel", LIMIT).await;

        let pods = cluster.pods.clone();
        let paths = Family::ALL.map(|family| (&pods[0], &pods[1], family));
        let measured = try_no_loss("take-over", &paths, async || {
            cluster.restart(0).await;
            cluster.nodes[0].converged().await;
        })
        .await;
        let node = &cluster.nodes[0];
        let ours = node.ours().await;
        for route in &theirs {
            assert!(
                ours.contains_key(&route.key()),
                "{route} bears our mark now"
            );
        }
        // So they go with the peer.
        let gone = cluster.nodes[1].overlay();
        gone.release().await.expect("it is held");
        until("the routes are gone", LIMIT, async || {
            let objects = node.objects().await;
            theirs
                .iter()
                .all(|route| !objects.contains_key(&route.key()))
        })
        .await;
        if measured {
            return;
        }
    }
    panic!("the machine is too busy to measure");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_that_an_administrator_made_is_reported_and_left() {
    let _alone = alone().await;
    let Some(mut cluster) = Cluster::start("by-hand", Setup::new(2, V4_GW)).await else {
        return;
    };
    let torn = cluster.nodes[0].take_overlay().teardown().await;
    torn.expect("it can be removed");
    let peer = cluster.nodes[1].subnets.v4.expect("IPv4");
    let ns = cluster.nodes[0].host.ns.clone();
    // `ip` gives it the same protocol as Go flannel does; only the gateway tells.
    run_in(&ns, &format!("ip route add {peer} via 192.0.2.254"));
    let theirs = run_in(&ns, "ip route");
    cluster.restart(0).await;
    let node = &cluster.nodes[0];
    let told = node.overlay().wait_for(|status| {
        let mut found = status.foreign.iter().map(|blocked| &blocked.found);
        found.any(|found| found.key() == route_key(peer))
    });
    within("it is reported", LIMIT, told)
        .await
        .expect("running");
    node.overlay().resync().await.expect("running");
    assert_eq!(run_in(&ns, "ip route"), theirs);
    run_in(&ns, &format!("ip route del {peer}"));
    until("the place is taken when it is free", LIMIT, async || {
        node.ours().await.contains_key(&route_key(peer))
    })
    .await;
    cluster.reachable_within("it is gone", LIMIT).await;
}

/// Whether a node has devices of VXLAN.
async fn has_tunnel(node: &Node) -> bool {
    let objects = node.objects().await;
    let mut links = objects.values().filter_map(|object| match object {
        Object::Link(link) => Some(link.name),
        _ => None,
    });
    links.any(|name| name.as_str().starts_with("flannel"))
}

/// Waits until a node publishes a backend and sends its peers' packets accordingly: through the
/// tunnel to those of VXLAN where it is of VXLAN itself.
async fn follows(cluster: &Cluster, i: usize, of_vxlan: &[bool]) {
    let node = &cluster.nodes[i];
    until("it has followed", LIMIT, async || {
        let objects = node.ours().await;
        cluster.nodes.iter().enumerate().all(|(k, peer)| {
            k == i
                || peer.subnets.values().all(|subnet| {
                    let Some(Object::Route(Route {
                        target: RouteTarget::Nexthop(id),
                        ..
                    })) = objects.get(&route_key(*subnet))
                    else {
                        return false;
                    };
                    let nexthop = objects.get(&flannel_core::ObjectKey::Nexthop(*id));
                    nexthop.and_then(Object::dev).is_some_and(|dev| {
                        dev.as_str().starts_with("flannel") == (of_vxlan[i] && of_vxlan[k])
                    })
                })
        })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_over_a_change_of_backend_node_by_node_and_back() {
    let _alone = alone().await;
    let Some(cluster) = Cluster::start("change", Setup::new(3, DUAL)).await else {
        return;
    };
    let pods = &cluster.pods;
    let between = |a: usize, b: usize| Family::ALL.map(|f| (&pods[a], &pods[b], f));
    let paths: Vec<Path<'_>> = [between(0, 1), between(2, 0)].concat();
    no_loss("change of backend", &paths, async || {
        let mut of_vxlan = vec![true; cluster.nodes.len()];
        for text in [DUAL_GW, DUAL] {
            for k in 0..cluster.nodes.len() {
                of_vxlan[k] = text == DUAL;
                cluster.views[k].set_config(&config(text));
                for i in 0..cluster.nodes.len() {
                    follows(&cluster, i, &of_vxlan).await;
                }
                cluster.assert_reachable(&format!("node {k} changed to {text}"));
            }
        }
    })
    .await;
    for node in &cluster.nodes {
        assert_eq!(node.overlay().status().rejected, []);
        assert!(has_tunnel(node).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_when_the_devices_of_the_former_backend_go() {
    let _alone = alone().await;
    let Some(cluster) = Cluster::start("former", Setup::new(2, DUAL)).await else {
        return;
    };
    for view in &cluster.views {
        view.set_config(&config(DUAL_GW));
    }
    for i in 0..2 {
        follows(&cluster, i, &[false, false]).await;
    }
    for node in &cluster.nodes {
        assert!(has_tunnel(node).await, "{} has it still", node.id);
    }
    let paths = Family::ALL.map(|family| (&cluster.pods[0], &cluster.pods[1], family));
    // They stay for half a minute; packets are sent for longer.
    let gone = Duration::from_secs(36);
    no_loss("the tunnel goes", &paths, async || {
        for node in &cluster.nodes {
            until("it goes", gone, async || !has_tunnel(node).await).await;
        }
    })
    .await;
    cluster.assert_reachable("without devices");
    for node in &cluster.nodes {
        let ours = node.ours().await;
        let mut kinds: Vec<&str> = ours.keys().map(|key| key.kind()).collect();
        kinds.dedup();
        assert_eq!(kinds, ["nexthop", "route"], "{}", node.id);
    }
}
