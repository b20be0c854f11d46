//! Not one packet is lost over anything that leaves the data path as it should be.
#![allow(missing_docs, reason = "tests")]

use std::os::unix::net::UnixStream;
use std::time::Duration;

use flannel_backend_udp::PacketPath;
use flannel_backend_vxlan::VxlanData;
use flannel_core::{
    Address, Family, Fdb, Lease, Link, LinkKind, MAIN_TABLE, MacAddr, Neighbour, Object, Op, Route,
    RouteProtocol, RouteTarget, Vxlan,
};
use flannel_e2e::{
    Cluster, DUAL, DUAL_GW, DUAL_UDP, LIMIT, NodeProcess, Path, Peers, Setup, dev, no_loss, probe,
    route_key, try_no_loss, until,
};
use flannel_testkit::netns::Host;
use tokio::sync::{Mutex, MutexGuard};

/// One at a time: packets are counted, and every millisecond one goes.
async fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::const_new(());
    ONE.lock().await
}

/// Between the first two pods, in both families.
fn paths(pods: &[Host]) -> [Path<'_>; 2] {
    Family::ALL.map(|family| (&pods[0], &pods[1], family))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_20_ms_is_seen() {
    let _alone = alone().await;
    let Some(mut cluster) = Cluster::start("outage", Setup::new(2, DUAL)).await else {
        return;
    };
    let overlay = cluster.nodes[0].take_overlay();
    overlay.stop().await.expect("running");
    let node = &cluster.nodes[0];
    let peer = cluster.nodes[1].subnets.v4.expect("both families");
    let key = route_key(peer);
    let route = node.objects().await.get(&key).cloned();
    let route = route.expect("the overlay made it");
    let [v4, v6] = paths(&cluster.pods);
    let reports = probe(&[v4, v6], async || {
        node.break_by(&[Op::Delete(route.clone())]).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        node.break_by(&[Op::Create(route.clone())]).await;
    })
    .await;
    let [hit, spared] = &reports[..] else {
        panic!("two paths");
    };
    assert!(hit.forth.lost_count() >= 15, "{hit}");
    assert_eq!(hit.back.lost_count(), 0, "{hit}");
    assert_eq!(spared.lost(), 0, "{spared}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_down_for_20_ms_is_seen() {
    let _alone = alone().await;
    let Some(mut cluster) = Cluster::start("outage-link", Setup::new(2, DUAL)).await else {
        return;
    };
    let overlay = cluster.nodes[0].take_overlay();
    overlay.stop().await.expect("running");
    let underlay = &cluster.underlay.router;
    let reports = probe(&paths(&cluster.pods), async || {
        underlay.set_down("node1").expect("it is there");
        tokio::time::sleep(Duration::from_millis(20)).await;
        underlay.set_up("node1").expect("it is there");
    })
    .await;
    for report in reports {
        // Held-back packets show as a gap, those towards the device as lost.
        assert!(report.back.lost_count() >= 15, "{report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_over_stop_and_start() {
    let _alone = alone().await;
    stop_and_start("restart", DUAL).await;
    stop_and_start("restart-gw", DUAL_GW).await;
    stop_and_start("restart-udp", DUAL_UDP).await;
}

async fn stop_and_start(test: &str, config: &'static str) {
    let Some(mut cluster) = Cluster::start(test, Setup::new(2, config)).await else {
        return;
    };
    let pods = cluster.pods.clone();
    let before = cluster.nodes[0].ours().await;
    no_loss("stop and start", &paths(&pods), async || {
        for _ in 0..3 {
            let overlay = cluster.nodes[0].take_overlay();
            overlay.stop().await.expect("running");
            cluster.restart(0).await;
            cluster.nodes[0].converged().await;
        }
    })
    .await;
    assert_eq!(cluster.nodes[0].ours().await, before);
    assert_eq!(cluster.nodes[0].overlay().status().repairs, 0);
}

/// What carries packets goes from one holder to the next, as to the process that comes after.
#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_over_a_handover_of_what_carries_them() {
    let _alone = alone().await;
    let Some(mut cluster) = Cluster::start("handover", Setup::new(2, DUAL_UDP)).await else {
        return;
    };
    let pods = cluster.pods.clone();
    no_loss("handover", &paths(&pods), async || {
        for _ in 0..3 {
            let overlay = cluster.nodes[0].take_overlay();
            overlay.stop().await.expect("running");
            let heirs = flannel_e2e::paths(&cluster.nodes[0].host);
            let (mine, theirs) = UnixStream::pair().expect("a pair");
            let (old, new) = (cluster.nodes[0].paths.clone(), heirs.clone());
            let giving = tokio::task::spawn_blocking(move || old.hand_over(dev("flannel0"), &mine));
            let taking = tokio::task::spawn_blocking(move || new.take_over(&theirs));
            giving.await.expect("no panic").expect("it is handed over");
            let device = taking.await.expect("no panic").expect("it is taken over");
            assert_eq!(device, dev("flannel0"));
            assert_eq!(cluster.nodes[0].paths.running(), []);
            cluster.nodes[0].paths = heirs;
            cluster.restart(0).await;
            cluster.nodes[0].converged().await;
        }
    })
    .await;
    assert_eq!(cluster.nodes[0].overlay().status().repairs, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_over_a_killed_process_and_its_successor() {
    let _alone = alone().await;
    kill("killed", DUAL).await;
    kill("killed-gw", DUAL_GW).await;
}

async fn kill(test: &str, config: &'static str) {
    let Some(mut cluster) = Cluster::start(test, Setup::new(2, config)).await else {
        return;
    };
    let overlay = cluster.nodes[0].take_overlay();
    overlay.stop().await.expect("running");
    let node = &cluster.nodes[0];
    let before = node.ours().await;
    let start = || {
        let (id, store) = (node.id.clone(), cluster.manager.export());
        let program = env!("CARGO_BIN_EXE_flannel-e2e-node");
        NodeProcess::start(program, &node.host.ns, id, store)
    };
    let mut process = Some(start());
    no_loss("SIGKILL", &paths(&cluster.pods), async || {
        process.take().expect("it runs").kill();
        process = Some(start());
    })
    .await;
    // It does its work: what is broken is repaired by the successor.
    let gone = before.values().next_back().expect("routes come last");
    node.break_by(&[Op::Delete(gone.clone())]).await;
    until("the new process repairs", LIMIT, async || {
        node.ours().await == before
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_over_a_reconcile_of_what_is_right() {
    let _alone = alone().await;
    reconcile("resync", DUAL).await;
    reconcile("resync-gw", DUAL_GW).await;
}

async fn reconcile(test: &str, config: &'static str) {
    let Some(cluster) = Cluster::start(test, Setup::new(2, config)).await else {
        return;
    };
    no_loss("resync", &paths(&cluster.pods), async || {
        for _ in 0..50 {
            for node in &cluster.nodes {
                node.overlay().resync().await.expect("running");
            }
        }
    })
    .await;
    for node in &cluster.nodes {
        assert_eq!(node.overlay().status().repairs, 0);
        let plan = node.overlay().plan().await.expect("readable");
        assert_eq!(plan.steps, []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_while_another_peer_comes_and_goes() {
    let _alone = alone().await;
    churn("churn", DUAL, Peers::lease).await;
    churn("churn-gw", DUAL_GW, Peers::gw_lease).await;
}

async fn churn(test: &str, config: &'static str, lease: fn(&Peers, u32) -> Lease) {
    let Some(cluster) = Cluster::start(test, Setup::new(2, config)).await else {
        return;
    };
    let (link, len) = Peers::link();
    for node in &cluster.nodes {
        let added = node.host.ns.add_address("eth0", link, len);
        added.expect("a free address");
    }
    let peers = Peers {
        first: [10, 42, 200, 0].into(),
        vni: 1,
    };
    let right = [cluster.nodes[0].ours().await, cluster.nodes[1].ours().await];
    no_loss("churn", &paths(&cluster.pods), async || {
        for round in 0..20 {
            let lease = lease(&peers, round % 3);
            let route = route_key(peers.subnet(round % 3));
            cluster.manager.put_raw(lease.clone()).expect("sound");
            for node in &cluster.nodes {
                until("the peer is there", LIMIT, async || {
                    node.ours().await.contains_key(&route)
                })
                .await;
            }
            cluster.manager.remove(&lease.key);
            for (node, right) in cluster.nodes.iter().zip(&right) {
                until("nothing of the peer is left", LIMIT, async || {
                    node.ours().await == *right
                })
                .await;
            }
        }
    })
    .await;
}

/// What Go flanneld makes for one family: a device without alias, an address, and for each peer a
/// neighbour, a forwarding entry and an on-link route of protocol `boot`.
fn as_go_flannel(
    mac: MacAddr,
    family: Family,
    host: &Host,
    own: &Lease,
    peer: &Lease,
) -> Vec<Object> {
    let (name, mtu) = match family {
        Family::V4 => (dev("flannel.1"), 1450),
        Family::V6 => (dev("flannel-v6.1"), 1430),
    };
    let subnet = |lease: &Lease| *lease.subnet.get(family).expect("both families");
    let data = peer.attrs.backend_data.get(family).expect("both families");
    let data: VxlanData = data.decode().expect("ours");
    let gateway = subnet(peer).address();
    vec![
        Object::Link(Link {
            name,
            kind: LinkKind::Vxlan(Vxlan {
                vni: 1,
                port: 8472,
                underlay: Some(host.dev),
                local: host.ips.ip(family),
                learning: false,
                gbp: false,
            }),
            mtu: Some(mtu),
            mac: Some(mac),
            up: true,
            alias: None,
        }),
        Object::Address(Address {
            dev: name,
            ip: subnet(own).address(),
            prefix_len: family.bits(),
        }),
        Object::Neighbour(Neighbour {
            dev: name,
            ip: gateway,
            mac: data.vtep_mac,
        }),
        Object::Fdb(Fdb {
            dev: name,
            mac: data.vtep_mac,
            remote: peer.attrs.public_ip(family).expect("both families"),
        }),
        Object::Route(Route {
            table: MAIN_TABLE,
            dst: subnet(peer),
            metric: Route::default_metric(family),
            target: RouteTarget::Gateway {
                gateway,
                dev: name,
                onlink: true,
            },
            protocol: RouteProtocol::BOOT,
            source: None,
        }),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn no_packet_is_lost_over_the_take_over_from_go_flannel() {
    let _alone = alone().await;
    for _chance in 0..2 {
        let Some(measured) = take_over().await else {
            return;
        };
        if measured {
            return;
        }
    }
    panic!("the machine is too busy to measure");
}

/// Answers whether it was measured; `None` if it is not permitted here.
async fn take_over() -> Option<bool> {
    let mut cluster = Cluster::start("take-over", Setup::new(2, DUAL)).await?;
    // The first node becomes one of Go flannel's: same lease, MACs that only the devices know.
    let torn = cluster.nodes[0].take_overlay().teardown().await;
    torn.expect("it can be removed");
    let node = &cluster.nodes[0];
    let leases = cluster.manager.snapshot().leases;
    let (own, peer): (Vec<Lease>, Vec<Lease>) =
        leases.into_iter().partition(|lease| lease.node == node.id);
    let ([own], [peer]) = (&own[..], &peer[..]) else {
        panic!("two leases");
    };
    let mut own = own.clone();
    let mut right = Vec::new();
    for family in Family::ALL {
        let mac = MacAddr([0x66, 1, 2, 3, 4, u8::from(family == Family::V6)]);
        let data = VxlanData {
            vni: 1,
            vtep_mac: mac,
        };
        let data = data.encode().expect("it is short");
        own.attrs.backend_data.set(family, Some(data));
        let objects = as_go_flannel(mac, family, &node.host, &own, peer);
        let ops: Vec<Op> = objects.iter().cloned().map(Op::Create).collect();
        node.break_by(&ops).await;
        right.extend(objects);
    }
    cluster.manager.put_raw(own).expect("sound");
    cluster
        .reachable_within("the other node follows", LIMIT)
        .await;

    let pods = cluster.pods.clone();
    let measured = try_no_loss("take-over", &paths(&pods), async || {
        cluster.restart(0).await;
        cluster.nodes[0].converged().await;
    })
    .await;
    let now = cluster.nodes[0].objects().await;
    for before in right {
        match (&before, now.get(&before.key())) {
            (Object::Link(before), Some(Object::Link(now))) => {
                assert_eq!(now.mac, before.mac);
                assert_eq!(now.alias.as_deref(), Some("flannel:flannel"));
            }
            // The same effect counts as right, in either form.
            (Object::Route(_), Some(Object::Route(_))) => {}
            (_, found) => assert_eq!(found, Some(&before)),
        }
    }
    Some(measured)
}
