//! The interface that carries the overlay, while others come, look better and go.
#![allow(
    missing_docs,
    clippy::print_stdout,
    reason = "tests, which print what they measured"
)]

use std::time::Duration;

use flannel_core::{ConditionStatus, ConditionType, Interface, UnderlayOptions};
use flannel_e2e::{
    Cluster, DUAL, DUAL_UDP, LIMIT, Node, Setup, alone, both_families, dev, no_loss, run_in, until,
};
use flannel_testkit::netns::Ns;

fn carried_by(node: &Node) -> String {
    let status = node.overlay().status();
    let external = status.external.as_ref().expect("it is chosen");
    external.dev.to_string()
}

async fn is_carried_by(node: &Node, device: &str) -> Duration {
    until(device, LIMIT, async || carried_by(node) == device).await
}

fn by_name(name: &str) -> UnderlayOptions {
    UnderlayOptions::of([Interface::Name(dev(name))])
}

/// Gives a node a second interface to the same link, `eth1`.
fn second_interface(router: &Ns, ns: &Ns) {
    let made = router.add_veth("node1b", ns, "eth1", 1500);
    made.expect("the names are free");
    router
        .set_master("node1b", Some("br0"))
        .expect("it is there");
    router.set_up("node1b").expect("it is there");
    for line in [
        "ip link set eth1 up",
        "ip addr add 192.0.2.201/24 dev eth1",
        "ip addr add 2001:db8:1::201/64 dev eth1 nodad",
    ] {
        run_in(ns, line);
    }
}

/// As a DHCP client on all interfaces of a host does.
#[tokio::test(flavor = "multi_thread")]
async fn a_better_default_route_on_a_link_of_containers_moves_nothing() {
    let _alone = alone().await;
    let Some(cluster) = Cluster::start("if-better", Setup::new(2, DUAL)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let ns = &node.host.ns;
    no_loss(
        "a better default route",
        &both_families(&cluster.pods),
        async || {
            run_in(ns, "ip link add v9 type veth peer name v9p");
            run_in(ns, "ip link set v9 up");
            run_in(ns, "ip link set v9p up");
            run_in(ns, "ip addr add 169.254.17.3/16 dev v9");
            run_in(
                ns,
                "ip route replace default dev v9 src 169.254.17.3 metric 0",
            );
            run_in(
                ns,
                "ip route add default via 192.0.2.254 dev eth0 metric 300",
            );
            tokio::time::sleep(Duration::from_secs(5)).await;
            assert_eq!(carried_by(node), "eth0");
            run_in(ns, "ip link del v9");
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interface_that_is_renamed_is_followed_without_loss() {
    let _alone = alone().await;
    for (test, config) in [("if-renamed", DUAL), ("if-renamed-udp", DUAL_UDP)] {
        let Some(cluster) = Cluster::start(test, Setup::new(2, config)).await else {
            return;
        };
        let node = &cluster.nodes[0];
        let ns = &node.host.ns;
        let named = node.overlay().use_interface(by_name("eth0")).await;
        named.expect("it is there");
        // Linux renames an interface that is up since 6.5 only; before, it is down for a moment.
        let mut to = ["wan0", "eth0"].into_iter().cycle();
        let mut from = "eth0";
        no_loss("another name", &both_families(&cluster.pods), async || {
            let name = to.next().expect("it goes on for ever");
            run_in(ns, &format!("ip link set {from} name {name}"));
            from = name;
            let taken = is_carried_by(node, name).await;
            println!("{test}: {name} is followed after {taken:?}");
        })
        .await;
        assert!(node.overlay().status().working);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bridge_over_the_interface_is_followed_once_it_has_the_address() {
    let _alone = alone().await;
    let Some(cluster) = Cluster::start("if-bridged", Setup::new(2, DUAL)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let ns = &node.host.ns;
    let status = node.overlay().status();
    let local = status.external.as_ref().expect("it is chosen").local;
    let (v4, v6) = (local.v4.expect("both"), local.v6.expect("both"));
    for line in [
        "ip link add br7 type bridge".to_owned(),
        "ip link set br7 up".to_owned(),
        "ip link set eth0 master br7".to_owned(),
        format!("ip addr del {v4}/24 dev eth0"),
        format!("ip addr del {v6}/64 dev eth0"),
        format!("ip addr add {v4}/24 dev br7"),
        format!("ip addr add {v6}/64 dev br7 nodad"),
        "ip route replace default via 192.0.2.254 dev br7".to_owned(),
    ] {
        run_in(ns, &line);
    }
    let taken = is_carried_by(node, "br7").await;
    println!("the bridge is followed after {taken:?}");
    cluster.reachable_within("over the bridge", LIMIT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_moves_the_overlay_without_loss() {
    let _alone = alone().await;
    let Some(cluster) = Cluster::start("if-moved", Setup::new(2, DUAL)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let ns = &node.host.ns;
    second_interface(&cluster.underlay.router, ns);
    let mut to = ["eth1", "eth0"].into_iter().cycle();
    no_loss(
        "another interface",
        &both_families(&cluster.pods),
        async || {
            let name = to.next().expect("it goes on for ever");
            let moved = node.overlay().use_interface(by_name(name)).await;
            moved.expect("it is there");
            let taken = is_carried_by(node, name).await;
            cluster.settle().await;
            println!("{name} carries the overlay after {taken:?}");
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_interface_is_taken_when_the_one_in_use_is_gone() {
    let _alone = alone().await;
    let Some(cluster) = Cluster::start("if-gone", Setup::new(2, DUAL)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let ns = &node.host.ns;
    second_interface(&cluster.underlay.router, ns);
    for line in [
        "ip route add default via 192.0.2.254 dev eth1 metric 500",
        "ip -6 route add default via 2001:db8:1::fe dev eth1 metric 2000",
    ] {
        run_in(ns, line);
    }
    assert_eq!(carried_by(node), "eth0");
    ns.set_down("eth0").expect("it is there");
    let taken = is_carried_by(node, "eth1").await;
    println!("eth1 is taken {taken:?} after eth0 went down");
    let status = node.overlay().status();
    let condition = status.condition(ConditionType::Underlay).expect("told");
    assert_eq!(condition.status, ConditionStatus::True);
    assert!(
        condition.message.contains("before it was eth0"),
        "{}",
        condition.message
    );
    cluster.reachable_within("over the other one", LIMIT).await;
}
