//! What a host-gw node publishes and builds: flannel's record, and routes.
#![allow(missing_docs, reason = "tests")]

use std::net::IpAddr;
use std::sync::Arc;

use flannel_backend_hostgw::HostGwBackend;
use flannel_core::backend::Error;
use flannel_core::wire::{lease_value, parse_lease_value};
use flannel_core::{
    Backend, DualStack, Family, IfName, Lease, Network, NetworkConfig, Note, Object, PoolMode,
    PublicIp, Rejection, RouteTarget, Subnet, Underlay,
};
use flannel_testkit::conformance::backend::{Input, NodeFixture, all};

const DUAL: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48",
    "Backend":{"Type":"host-gw"}}"#;
const V4: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#;
const V6: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48",
    "Backend":{"Type":"host-gw"}}"#;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A node of a network by its number on the link.
fn node(config: &str, number: u8) -> NodeFixture {
    let config = NetworkConfig::from_json(config, PoolMode::Allocated).expect("valid");
    let mut node = NodeFixture::numbered(config, number);
    // As the engine has it: only the families of the config.
    for ips in [&mut node.external.local, &mut node.external.public] {
        if !node.config.pools().has(Family::V4) {
            ips.v4 = None;
        }
        if !node.config.pools().has(Family::V6) {
            ips.v6 = None;
        }
    }
    node
}

fn network_by(backend: &HostGwBackend, node: &NodeFixture) -> Arc<dyn Network> {
    let lease = node.lease(backend.attrs(&node.cx()).expect("attributes"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime
        .block_on(backend.register_network(&node.cx(), lease))
        .expect("a network")
}

fn network(node: &NodeFixture) -> Arc<dyn Network> {
    network_by(&HostGwBackend::new(), node)
}

/// What the second node of a network publishes.
fn peer(config: &str) -> Lease {
    let node = node(config, 2);
    node.lease(HostGwBackend::new().attrs(&node.cx()).expect("attributes"))
}

/// What a network makes of a peer's family.
fn path(network: &dyn Network, peer: &Lease, family: Family) -> Result<Vec<Object>, Rejection> {
    let answers = network.peer(peer, &peer.subnet);
    answers.get(family).expect("asked for").clone()
}

fn texts(objects: &[Object]) -> Vec<String> {
    objects.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn every_law_of_backends_is_kept() {
    for config in [DUAL, V4, V6] {
        for backend in [
            HostGwBackend::new(),
            HostGwBackend::new().with_nexthops(false),
        ] {
            let input = Input::new(&backend, config, 0).expect("a valid config");
            for (law, outcome) in all(&backend, &input).await {
                outcome.unwrap_or_else(|how| panic!("{law}: {how}"));
            }
        }
    }
}

#[test]
fn the_record_is_flannels_byte_for_byte() {
    let written = |config| {
        let node = node(config, 1);
        let attrs = HostGwBackend::new().attrs(&node.cx()).expect("attributes");
        lease_value(&node.node, None, &attrs).expect("it can be written")
    };
    assert_eq!(
        written(V4),
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw","NodeID":"node1"}"#
    );
    assert_eq!(
        written(DUAL),
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"host-gw","NodeID":"node1"}"#
    );
    assert_eq!(
        written(V6),
        r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1","BackendType":"host-gw","NodeID":"node1"}"#
    );
}

#[test]
fn a_record_of_go_flannel_becomes_a_route() {
    let value = br#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"host-gw"}"#;
    let record = parse_lease_value(value).expect("flannel's");
    let peer = Lease {
        attrs: record.attrs,
        ..peer(V4)
    };
    let objects = path(&*network(&node(V4, 1)), &peer, Family::V4).expect("accepted");
    assert!(texts(&objects)[0].ends_with("via 192.0.2.2 dev eth0"));
}

#[test]
fn the_node_itself_takes_nothing_and_a_peer_two_objects_per_family() {
    let network = network(&node(DUAL, 1));
    assert_eq!(network.local(), []);
    let peer = peer(DUAL);
    for (family, gateway, dst) in [
        (Family::V4, "192.0.2.2", "10.5.2.0/24"),
        (Family::V6, "2001:db8::2", "fd00:5:0:2::/64"),
    ] {
        let objects = path(&*network, &peer, family).expect("accepted");
        let Some(Object::Nexthop(nexthop)) = objects.first() else {
            panic!("{objects:?}");
        };
        let id = nexthop.id;
        assert_eq!(
            texts(&objects),
            [
                format!("nexthop {id} via {gateway} dev eth0"),
                format!("route {dst} nhid {id}"),
            ]
        );
    }
}

#[test]
fn without_nexthop_objects_routes_are_flannels_own() {
    let mut node = node(V4, 1);
    let by_option = network_by(&HostGwBackend::new().with_nexthops(false), &node);
    node.features.nexthops = false;
    for network in [by_option, network(&node)] {
        let objects = path(&*network, &peer(V4), Family::V4).expect("accepted");
        let [Object::Route(route)] = &objects[..] else {
            panic!("{objects:?}");
        };
        let target = RouteTarget::Gateway {
            gateway: ip("192.0.2.2"),
            dev: IfName::new("eth0").expect("a name"),
            onlink: false,
        };
        assert_eq!(route.target, target);
        assert!(matches!(&network.notes()[..], [Note { topic, .. }] if topic == "nexthops"));
    }
}

#[test]
fn containers_get_the_mtu_of_the_underlay() {
    for mtu in [1280, 1500, 9000] {
        assert_eq!(network(&node(DUAL, 1).with_mtu(mtu)).mtu(), mtu);
    }
}

/// The same node with a route of its own to where a peer is.
fn with_way(node: &NodeFixture, to: &str, target: RouteTarget) -> NodeFixture {
    let mut underlay = Underlay::clone(&node.underlay);
    let mut route = underlay.routes[0].clone();
    route.dst = to.parse().expect("a subnet");
    route.target = target;
    underlay.routes.push(route);
    NodeFixture {
        underlay: Arc::new(underlay),
        ..node.clone()
    }
}

#[test]
fn a_peer_behind_a_router_is_rejected_until_it_is_on_a_link() {
    let here = node(V4, 1);
    let mut peer = peer(V4);
    peer.attrs.public_ip = PublicIp::v4([198, 51, 100, 9].into());
    let rejection = path(&*network(&here), &peer, Family::V4).expect_err("behind a router");
    assert_eq!(
        rejection.to_string(),
        "198.51.100.9 is not on a link of this node: 192.0.2.254 is the way to it"
    );

    let mut nowhere = here.clone();
    let mut underlay = Underlay::clone(&here.underlay);
    underlay.routes.clear();
    nowhere.underlay = Arc::new(underlay);
    let rejection = path(&*network(&nowhere), &peer, Family::V4).expect_err("no route");
    assert!(matches!(rejection, Rejection::NotOnLink { .. }));

    let eth1 = RouteTarget::Device(IfName::new("eth1").expect("a name"));
    let reached = with_way(&here, "198.51.100.0/24", eth1);
    let objects = path(&*network(&reached), &peer, Family::V4).expect("on a link");
    assert!(texts(&objects)[0].ends_with("via 198.51.100.9 dev eth1"));
}

#[test]
fn each_family_is_reached_or_rejected_by_itself() {
    let mut peer = peer(DUAL);
    peer.attrs.public_ip.v6 = Some("2001:db8:1::9".parse().expect("an address"));
    let network = network(&node(DUAL, 1));
    assert!(path(&*network, &peer, Family::V4).is_ok());
    let v6 = path(&*network, &peer, Family::V6);
    assert!(matches!(v6, Err(Rejection::NotOnLink { .. })), "{v6:?}");
}

#[test]
fn who_names_no_address_is_reached_nowhere() {
    let network = network(&node(V4, 1));
    let mut peer = peer(V4);
    peer.attrs.public_ip = PublicIp::default();
    let answer = path(&*network, &peer, Family::V4);
    assert!(
        matches!(answer, Err(Rejection::PublicIp { .. })),
        "{answer:?}"
    );
}

#[test]
fn behind_nat_the_backend_says_that_it_does_not_work() {
    let mut here = node(V4, 1);
    here.external.public = PublicIp::v4([203, 0, 113, 7].into());
    let error = HostGwBackend::new().attrs(&here.cx()).expect_err("NAT");
    let Error::Underlay { reason } = error else {
        panic!("{error}");
    };
    assert!(
        reason.contains("203.0.113.7") && reason.contains("192.0.2.1"),
        "{reason}"
    );
}

#[tokio::test]
async fn a_lease_without_a_subnet_of_each_family_is_refused() {
    let here = node(DUAL, 1);
    let backend = HostGwBackend::new();
    let mut lease = here.lease(backend.attrs(&here.cx()).expect("attributes"));
    lease.subnet = DualStack::v4("10.5.1.0/24".parse::<Subnet>().expect("a subnet"));
    let error = backend.register_network(&here.cx(), lease).await;
    assert!(matches!(error, Err(Error::Lease { .. })), "{error:?}");
}
