//! What is not ours stays as it is, also another overlay's; teardown leaves nothing.
#![allow(missing_docs, reason = "tests")]

use std::time::Duration;

use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    Address, IfName, Kernel, Lease, Link, LinkKind, MAIN_TABLE, MacAddr, MemoryManager, NodeId,
    Object, Op, Overlay, OverlayName, Route, RouteProtocol, RouteTarget, Scope, Subnet, Vxlan,
};
use flannel_e2e::{
    Cluster, DUAL, Everything, LIMIT, Peers, Setup, V4, V4_GW, config, dev, ours, route_key,
    run_in, until, within,
};
use flannel_netlink::NetlinkKernel;
use flannel_testkit::netns::{Host, Lab, Ns};
use flannel_testkit::prober::ping_matrix;
use flannel_testkit::require_tool;

fn subnet(text: &str) -> Subnet {
    text.parse().expect("a subnet")
}

/// A route of a routing daemon.
fn foreign_route(dst: &str, dev: IfName) -> Object {
    let dst = subnet(dst);
    Object::Route(Route {
        table: MAIN_TABLE,
        dst,
        metric: Route::default_metric(dst.family()),
        target: RouteTarget::Device(dev),
        protocol: RouteProtocol(4),
        source: None,
    })
}

/// Fills a namespace with things of others.
fn furnish(ns: &Ns) {
    let create = |objects: Vec<Object>| {
        let ops: Vec<Op> = objects.into_iter().map(Op::Create).collect();
        ns.apply(&ops).expect("the places are free");
    };
    ns.add_bridge("docker0", 1500).expect("a free name");
    ns.add_address("docker0", [10, 42, 250, 1].into(), 32)
        .expect("a free address");
    ns.add_address("docker0", [172, 17, 0, 1].into(), 16)
        .expect("a free address");
    let vxlan = dev("vxlan9");
    create(vec![
        Object::Link(Link {
            name: vxlan,
            kind: LinkKind::Vxlan(Vxlan {
                vni: 9,
                port: 4789,
                underlay: Some(dev("eth0")),
                local: None,
                learning: true,
                gbp: false,
            }),
            mtu: Some(1400),
            mac: Some(MacAddr([2, 0, 0, 0, 0, 9])),
            up: true,
            alias: Some("somebody's".to_owned()),
        }),
        Object::Address(Address {
            dev: vxlan,
            ip: [10, 99, 0, 1].into(),
            prefix_len: 24,
        }),
        foreign_route("10.42.251.0/24", vxlan),
        foreign_route("10.98.0.0/16", vxlan),
        foreign_route("fd00:42:0:ff00::/56", vxlan),
        foreign_route("fd00:98::/48", vxlan),
    ]);
    for command in [
        "ip route add 10.42.252.0/24 via 192.0.2.254",
        "ip route add blackhole 10.42.253.0/24",
        "ip route add 10.42.254.0/24 dev eth0 table 100",
        "ip rule add from 10.42.254.0/24 lookup 100",
        "ip neigh add 10.99.0.2 lladdr 02:00:00:00:00:0a dev vxlan9 nud permanent",
        "bridge fdb append 00:00:00:00:00:00 dev vxlan9 dst 192.0.2.200",
        "ip nexthop add id 7 via 10.99.0.2 dev vxlan9",
        "ip route add 10.97.0.0/16 nhid 7",
        "nft add table inet guard",
        "nft add chain inet guard input { type filter hook input priority 0 ; }",
        "nft add rule inet guard input ip saddr 10.66.0.0/16 counter drop",
    ] {
        run_in(ns, command);
    }
}

/// Whether a line of [`Everything`] is about things of an overlay or of the pods.
fn is_furniture(line: &str) -> bool {
    !["flannel", "cni0", "veth-pod", "proto 241", "RouteProtocol(241)"]
        .iter()
        .any(|word| line.contains(word))
        // Routes of the pods' bridge in the local table, and what IPv6 gives to every device.
        && !line.contains("dev flannel")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_foreign_is_left_as_it_is() {
    if !require_tool("foreign", "nft") {
        return;
    }
    let Some(mut cluster) = Cluster::start("foreign", Setup::new(2, DUAL)).await else {
        return;
    };
    // A node that begins anew among things of others.
    let torn = cluster.nodes[0].take_overlay().teardown().await;
    torn.expect("it can be removed");
    let ns = cluster.nodes[0].host.ns.clone();
    furnish(&ns);
    let before = Everything::of(&ns);
    let rules = run_in(&ns, "nft list ruleset");
    assert!(rules.contains("guard"));
    let furniture = before.only(is_furniture);
    assert!(furniture.about("vxlan9").len() > 10);

    let unchanged = |when: &str| {
        furniture.assert_same(&Everything::of(&ns).only(is_furniture), when);
        assert_eq!(run_in(&ns, "nft list ruleset"), rules, "{when}");
    };
    cluster.restart(0).await;
    cluster.settle().await;
    cluster.assert_reachable("among things of others");
    unchanged("after the start");
    assert_eq!(cluster.nodes[0].overlay().status().foreign, []);

    let node = &cluster.nodes[0];
    let right = node.ours().await;
    let ops: Vec<Op> = right.values().rev().cloned().map(Op::Delete).collect();
    let ops: Vec<Op> = ops
        .into_iter()
        .filter(|op| !matches!(op.object(), Object::Sysctl(_) | Object::Offload(_)))
        .collect();
    node.break_by(&ops).await;
    node.repaired("all of ours deleted", &right).await;
    cluster.assert_reachable("after the repair");
    unchanged("after the repair");

    let torn = cluster.nodes[0].take_overlay().teardown().await;
    torn.expect("it can be removed");
    before.assert_same(&Everything::of(&ns), "after the teardown");
    assert_eq!(run_in(&ns, "nft list ruleset"), rules);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_route_in_the_place_of_ours_is_reported_and_left() {
    foreign_route_in_the_way("in-the-way", V4, Peers::lease).await;
    foreign_route_in_the_way("in-the-way-gw", V4_GW, Peers::gw_lease).await;
}

async fn foreign_route_in_the_way(
    test: &str,
    config: &'static str,
    lease: fn(&Peers, u32) -> Lease,
) {
    let Some(cluster) = Cluster::start(test, Setup::new(2, config)).await else {
        return;
    };
    let (link, len) = Peers::link();
    let ns = &cluster.nodes[0].host.ns;
    ns.add_address("eth0", link, len).expect("a free address");
    let peers = Peers {
        first: [10, 42, 200, 0].into(),
        vni: 1,
    };
    let node = &cluster.nodes[0];
    let theirs = foreign_route("10.42.200.0/24", dev("eth0"));
    node.break_by(&[Op::Create(theirs.clone())]).await;
    cluster.manager.put_raw(lease(&peers, 0)).expect("sound");
    cluster.manager.put_raw(lease(&peers, 1)).expect("sound");
    let reported = node
        .overlay()
        .wait_for(|status| status.foreign.iter().any(|blocked| blocked.found == theirs));
    within("it is reported", LIMIT, reported)
        .await
        .expect("running");
    until("the peer beside it is reached", LIMIT, async || {
        let objects = node.ours().await;
        objects.contains_key(&route_key(peers.subnet(1)))
    })
    .await;
    node.overlay().resync().await.expect("running");
    let objects = node.objects().await;
    assert_eq!(objects.get(&theirs.key()), Some(&theirs));
    cluster.assert_reachable("with a foreign route in the way");

    node.break_by(&[Op::Delete(theirs)]).await;
    until("the place is taken when it is free", LIMIT, async || {
        let objects = node.ours().await;
        objects.contains_key(&route_key(peers.subnet(0)))
    })
    .await;
    node.converged().await;
    assert_eq!(node.overlay().status().foreign, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_device_of_our_name_is_reported_and_left() {
    let Some(lab) = Lab::for_test("foreign-device") else {
        return;
    };
    let underlay = lab.underlay(1).expect("an underlay");
    let ns = &underlay.nodes[0].ns;
    ns.add_bridge("flannel.1", 1500).expect("a free name");
    let before = Everything::of(ns);
    let overlay = overlay(&underlay.nodes[0], V4, "flannel", RouteProtocol::OURS).await;
    let reported = overlay.wait_for(|status| !status.foreign.is_empty());
    within("it is reported", LIMIT, reported)
        .await
        .expect("running");
    overlay.resync().await.expect("running");
    overlay.stop().await.expect("running");
    before.assert_same(&Everything::of(ns), "with a foreign device in the way");
}

/// An overlay of its own store, started but not waited for.
async fn overlay(host: &Host, text: &str, name: &str, protocol: RouteProtocol) -> Overlay {
    let manager = MemoryManager::new(config(text));
    start(host, "node-1", &manager, name, protocol).await
}

async fn start(
    host: &Host,
    node: &str,
    manager: &MemoryManager,
    name: &str,
    protocol: RouteProtocol,
) -> Overlay {
    let kernel = NetlinkKernel::in_namespace(host.ns.path()).expect("a kernel");
    let started = Overlay::builder(NodeId::new(node).expect("a node id"))
        .name(OverlayName::new(name).expect("an overlay name"))
        .route_protocol(protocol)
        .manager(manager.clone())
        .backend(VxlanBackend::new())
        .kernel(kernel)
        .start()
        .await;
    started.expect("all parts")
}

#[tokio::test(flavor = "multi_thread")]
async fn teardown_leaves_the_namespace_as_it_was() {
    let Some(lab) = Lab::for_test("teardown") else {
        return;
    };
    if !require_tool("teardown", "ip") {
        return;
    }
    let underlay = lab.underlay(2).expect("an underlay");
    let manager = MemoryManager::new(config(DUAL));
    let hosts = &underlay.nodes;
    let before = hosts.iter().map(|host| Everything::of(&host.ns));
    let before: Vec<Everything> = before.collect();
    let mut overlays = Vec::new();
    for (i, host) in hosts.iter().enumerate() {
        let node = format!("node-{}", i + 1);
        let overlay = start(host, &node, &manager, "flannel", RouteProtocol::OURS).await;
        overlays.push(overlay);
    }
    for overlay in &overlays {
        let known = overlay.wait_for(|status| status.ready && status.peers == 1);
        within("ready", LIMIT, known).await.expect("running");
        within("converged", LIMIT, overlay.converged())
            .await
            .expect("running");
    }
    let (a, b) = (overlays.remove(0), overlays.remove(0));

    // Stop leaves all of it.
    let full = Everything::of(&hosts[1].ns);
    assert_ne!(full, before[1]);
    b.stop().await.expect("running");
    full.assert_same(&Everything::of(&hosts[1].ns), "after stop");

    let hand = NetlinkKernel::in_namespace(hosts[0].ns.path()).expect("a kernel");
    let of_ours = ours(&hand, &OverlayName::default(), RouteProtocol::OURS).await;
    let preview = a.teardown_plan().await.expect("readable");
    let mut announced: Vec<Object> = Vec::new();
    for step in &preview.steps {
        assert!(matches!(step.op, Op::Delete(_)), "{step:?}");
        announced.push(step.op.object().clone());
        let dropped = step.disrupts.iter();
        announced.extend(dropped.filter_map(|key| of_ours.get(key).cloned()));
    }
    for object in of_ours.values() {
        // A setting goes with its device.
        let goes =
            announced.contains(object) || matches!(object, Object::Sysctl(_) | Object::Offload(_));
        assert!(goes, "not announced: {object}");
    }
    let now = Everything::of(&hosts[0].ns);
    a.teardown().await.expect("it can be removed");
    assert_ne!(now, before[0]);
    before[0].assert_same(&Everything::of(&hosts[0].ns), "after the teardown");
    let left = hand.observe(&Scope::default()).await.expect("readable");
    for object in announced {
        assert!(!left.objects.contains_key(&object.key()), "{object}");
    }
}

const RED: &str = r#"{ "Network": "10.42.0.0/16", "Backend": { "Type": "vxlan", "VNI": 1 } }"#;
const BLUE: &str = r#"{ "Network": "10.43.0.0/16", "Backend": { "Type": "vxlan", "VNI": 2 } }"#;

#[tokio::test(flavor = "multi_thread")]
async fn two_overlays_in_one_namespace_leave_each_other_alone() {
    let Some(lab) = Lab::for_test("two-overlays") else {
        return;
    };
    let underlay = lab.underlay(2).expect("an underlay");
    let protocols = [RouteProtocol(241), RouteProtocol(242)];
    let names = ["red", "blue"];
    let stores = [RED, BLUE].map(|text| MemoryManager::new(config(text)));
    let mut overlays = [Vec::new(), Vec::new()];
    let mut pods = [Vec::new(), Vec::new()];
    for (i, host) in underlay.nodes.iter().enumerate() {
        for which in [0, 1] {
            let (name, protocol) = (names[which], protocols[which]);
            let node = format!("node-{i}");
            let overlay = start(host, &node, &stores[which], name, protocol).await;
            within("ready", LIMIT, overlay.ready())
                .await
                .expect("ready");
            let subnet = overlay.status().lease.as_ref().expect("ready").subnet;
            overlays[which].push(overlay);
            pods[which].push(pod(
                &lab,
                &format!("{name}-{i}"),
                host,
                subnet.v4.expect("IPv4"),
            ));
        }
    }
    for overlay in overlays.iter().flatten() {
        let known = overlay.wait_for(|status| status.peers == 1);
        within("known", LIMIT, known).await.expect("running");
        within("converged", LIMIT, overlay.converged())
            .await
            .expect("running");
    }
    let reach = |pods: &[Host], when: &str| {
        for ping in ping_matrix(pods, Duration::from_secs(2)) {
            ping.result
                .unwrap_or_else(|error| panic!("{when}: {error}"));
        }
    };
    reach(&pods[0], "red");
    reach(&pods[1], "blue");

    // One is broken, repaired and torn down; of the other nothing changes.
    let host = &underlay.nodes[0];
    let hand = NetlinkKernel::in_namespace(host.ns.path()).expect("a kernel");
    let [red, blue] = names.map(|name| OverlayName::new(name).expect("an overlay name"));
    let of_blue = ours(&hand, &blue, protocols[1]).await;
    let of_red = ours(&hand, &red, protocols[0]).await;
    assert!(of_red.len() >= 6 && of_blue.len() >= 6);
    assert!(of_red.keys().all(|key| !of_blue.contains_key(key)));
    let device = of_red
        .values()
        .find(|object| matches!(object, Object::Link(_)));
    let ops = [Op::Delete(device.expect("it has one").clone())];
    for result in hand.apply(&ops).await {
        result.expect("it can be removed");
    }
    until("red is repaired", LIMIT, async || {
        ours(&hand, &red, protocols[0]).await == of_red
    })
    .await;
    reach(&pods[0], "red, repaired");
    assert_eq!(ours(&hand, &blue, protocols[1]).await, of_blue);
    for overlay in &overlays[1] {
        assert_eq!(overlay.status().repairs, 0);
    }
    overlays[0]
        .remove(0)
        .teardown()
        .await
        .expect("it can be removed");
    assert!(ours(&hand, &red, protocols[0]).await.is_empty());
    assert_eq!(ours(&hand, &blue, protocols[1]).await, of_blue);
    reach(&pods[1], "blue, alone");
    let mut lost = ping_matrix(&pods[0], Duration::from_millis(200)).into_iter();
    assert!(lost.all(|ping| ping.result.is_err()), "red is torn down");
}

/// A pod behind a bridge of its own, so that a node can have several.
fn pod(lab: &Lab, name: &str, node: &Host, subnet: Subnet) -> Host {
    let ns = lab.namespace(name).expect("a namespace");
    let (bridge, port) = (format!("br-{name}"), format!("p-{name}"));
    let (gateway, ip) = (subnet.nth(1), subnet.nth(2));
    let (gateway, ip) = (gateway.expect("/24"), ip.expect("/24"));
    node.ns.add_bridge(&bridge, 1450).expect("a free name");
    node.ns
        .add_address(&bridge, gateway, subnet.len())
        .expect("a free address");
    let pair = node.ns.add_veth(&port, &ns, "eth0", 1450);
    pair.expect("free names");
    node.ns
        .set_master(&port, Some(&bridge))
        .expect("it is there");
    node.ns.set_up(&port).expect("it is there");
    ns.set_up("eth0").expect("it is there");
    ns.add_address("eth0", ip, subnet.len())
        .expect("a free address");
    ns.add_route(self::subnet("0.0.0.0/0"), gateway, "eth0")
        .expect("a free route");
    let mut ips = flannel_core::PublicIp::default();
    ips.set_ip(ip);
    let host = Host {
        ns,
        dev: dev("eth0"),
        ips,
    };
    // A bridge takes a moment before it carries packets.
    let wait = Duration::from_millis(200);
    for _ in 0..20 {
        if flannel_testkit::prober::ping(&node.ns, None, ip, wait).is_ok() {
            return host;
        }
    }
    panic!("{name} does not answer its node");
}

#[tokio::test(flavor = "multi_thread")]
async fn overlays_in_two_namespaces_of_one_process_know_nothing_of_each_other() {
    let Some(lab) = Lab::for_test("two-namespaces") else {
        return;
    };
    let underlay = lab.underlay(2).expect("an underlay");
    let mut overlays = Vec::new();
    for host in &underlay.nodes {
        // The same name, VNI, network, node id and protocol: only the namespaces differ.
        let overlay = overlay(host, DUAL, "flannel", RouteProtocol::OURS).await;
        within("ready", LIMIT, overlay.ready())
            .await
            .expect("ready");
        overlays.push(overlay);
    }
    let there = Everything::of(&underlay.nodes[1].ns);
    assert!(!there.about("flannel-v6.1").is_empty());
    overlays
        .remove(0)
        .teardown()
        .await
        .expect("it can be removed");
    overlays[0].resync().await.expect("running");
    there.assert_same(
        &Everything::of(&underlay.nodes[1].ns),
        "the other torn down",
    );
    assert_eq!(
        Everything::of(&underlay.nodes[0].ns).about("flannel"),
        Vec::<&str>::new()
    );
    assert_eq!(overlays[0].status().repairs, 0);
}
