//! What a UDP node publishes and builds: flannel's record, a TUN device, a packet path and routes.
#![allow(missing_docs, reason = "tests")]

use std::sync::Arc;

use flannel_backend_udp::{DEFAULT_PORT, UdpBackend, UdpConfig};
use flannel_core::backend::Error;
use flannel_core::wire::{lease_value, parse_lease_value};
use flannel_core::{
    Backend, BackendType, Family, IfName, Lease, Network, NetworkConfig, Object, PoolMode,
    Rejection, RouteTarget, TunFault,
};
use flannel_testkit::conformance::backend::{Input, NodeFixture, all};

const DUAL: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48",
    "Backend":{"Type":"udp"}}"#;
const V4: &str = r#"{"Network":"10.5.0.0/16"}"#;
const V6: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48",
    "Backend":{"Type":"udp","Port":9000}}"#;

fn config(json: &str) -> NetworkConfig {
    NetworkConfig::from_json(json, PoolMode::Allocated).expect("valid")
}

/// A node of a network by its number on the link, with the families of the config as the engine
/// has it.
fn node(json: &str, number: u8) -> NodeFixture {
    let mut node = NodeFixture::numbered(config(json), number);
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

fn register(backend: &UdpBackend, node: &NodeFixture) -> Result<Arc<dyn Network>, Error> {
    let lease = node.lease(backend.attrs(&node.cx())?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime.block_on(backend.register_network(&node.cx(), lease))
}

fn network(node: &NodeFixture) -> Arc<dyn Network> {
    register(&UdpBackend::new(), node).expect("a network")
}

fn peer(json: &str) -> Lease {
    let node = node(json, 2);
    node.lease(UdpBackend::new().attrs(&node.cx()).expect("attributes"))
}

fn path(network: &dyn Network, peer: &Lease, family: Family) -> Result<Vec<Object>, Rejection> {
    let answers = network.peer(peer, &peer.subnet);
    answers.get(family).expect("asked for").clone()
}

fn texts(objects: &[Object]) -> Vec<String> {
    objects.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn every_law_of_backends_is_kept() {
    let named = UdpBackend::new().with_device(IfName::new("fl-udp").expect("a name"));
    for config in [DUAL, V4, V6] {
        for backend in [UdpBackend::new(), named.clone()] {
            let input = Input::new(&backend, config, 28).expect("a valid config");
            for (law, outcome) in all(&backend, &input).await {
                outcome.unwrap_or_else(|how| panic!("{law}: {how}"));
            }
        }
    }
}

/// Flannel's records of this backend have neither type nor data.
#[test]
fn the_record_is_flannels_byte_for_byte() {
    let written = |config| {
        let node = node(config, 1);
        let attrs = UdpBackend::new().attrs(&node.cx()).expect("attributes");
        lease_value(&node.node, None, &attrs).expect("it can be written")
    };
    assert_eq!(
        written(V4),
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"NodeID":"node1"}"#
    );
    assert_eq!(
        written(DUAL),
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","NodeID":"node1"}"#
    );
    assert_eq!(
        written(V6),
        r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1","NodeID":"node1"}"#
    );
}

#[test]
fn a_record_of_go_flannel_becomes_a_peer_at_our_own_port() {
    let value = br#"{"PublicIP":"192.0.2.2","PublicIPv6":null}"#;
    let record = parse_lease_value(value).expect("flannel's");
    let peer = Lease {
        attrs: record.attrs,
        ..peer(V4)
    };
    let objects = path(&*network(&node(V4, 1)), &peer, Family::V4).expect("accepted");
    assert_eq!(
        texts(&objects),
        [
            "tunnel-peer 10.5.2.0/24 endpoint 192.0.2.2:8285 dev flannel0",
            "route 10.5.2.0/24 dev flannel0",
        ]
    );
}

#[test]
fn a_node_takes_a_device_its_addresses_and_a_packet_path() {
    let network = network(&node(DUAL, 1));
    assert_eq!(
        texts(&network.local()),
        [
            "link flannel0 type tun persist multi_queue vnet_hdr txqueuelen 5000 mtu 1452 up alias \
             \"flannel:flannel\"",
            "sysctl flannel0 IPv6 accept_ra = 0",
            "sysctl flannel0 IPv6 disable_ipv6 = 0",
            "address 10.5.1.0/32 dev flannel0",
            "address fd00:5:0:1::/128 dev flannel0",
            "tunnel flannel0 listen 192.0.2.1:8285 own 10.5.1.0/24 mtu 1472 \
             listen [2001:db8::1]:8285 own fd00:5:0:1::/64 mtu 1452",
        ]
    );
    let objects = path(&*network, &peer(DUAL), Family::V6).expect("accepted");
    assert_eq!(
        texts(&objects),
        [
            "tunnel-peer fd00:5:0:2::/64 endpoint [2001:db8::2]:8285 dev flannel0",
            "route fd00:5:0:2::/64 dev flannel0",
        ]
    );
}

#[test]
fn the_mtu_leaves_room_for_the_tightest_family() {
    for (json, mtu, inner) in [
        (V4, 1500, 1472),
        (V6, 1500, 1452),
        (DUAL, 1500, 1452),
        (V4, 9000, 8972),
        (V4, 65_536, 65_507),
    ] {
        assert_eq!(
            network(&node(json, 1).with_mtu(mtu)).mtu(),
            inner,
            "{json} {mtu}"
        );
    }
    let small = register(&UdpBackend::new(), &node(V6, 1).with_mtu(1300));
    let error = small.expect_err("1252 bytes are too few for IPv6");
    assert!(error.to_string().contains("1328"), "{error}");
    assert!(
        UdpBackend::new()
            .attrs(&node(V4, 1).with_mtu(1300).cx())
            .is_ok()
    );
}

#[test]
fn the_configs_keys_are_flannels_and_one_of_ours() {
    let read = |backend: &str| {
        let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{backend}}}"#);
        UdpConfig::from_network(&config(&json))
    };
    let plain = read(r#"{"Type":"udp"}"#).expect("flannel's defaults");
    assert_eq!(
        plain,
        UdpConfig {
            port: DEFAULT_PORT,
            mtu: None
        }
    );
    let set = read(r#"{"Type":"udp","port":9000,"MTU":1400}"#).expect("valid");
    assert_eq!(
        set,
        UdpConfig {
            port: 9000,
            mtu: Some(1400)
        }
    );
    for bad in [
        r#"{"Type":"udp","Port":0}"#,
        r#"{"Type":"udp","Port":65536}"#,
        r#"{"Type":"udp","MTU":-1}"#,
    ] {
        let error = read(bad).expect_err(bad).to_string();
        assert!(error.contains("Backend."), "{error}");
    }
    let json = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp","MTU":2000}}"#;
    let network = network(&node(json, 1));
    assert_eq!(network.mtu(), 1472, "no more than the interface carries");
    let notes = network.notes();
    assert!(notes.iter().any(|note| note.topic == "mtu"), "{notes:?}");
}

/// Flannel's own backend takes every record for one of its kind, and sends to nodes that listen
/// to nothing. Ours reaches them as they are, where they are on a link.
#[test]
fn peers_of_other_backends_are_sent_no_datagrams() {
    let network = network(&node(V4, 1));
    let mut peer = peer(V4);
    for (backend, tunnelled) in [
        (None, true),
        (Some(BackendType::udp()), true),
        (Some(BackendType::vxlan()), false),
        (Some(BackendType::host_gw()), false),
    ] {
        peer.attrs.backend_type = backend;
        for (public_ip, on_link) in [([192, 0, 2, 2], true), ([198, 51, 100, 2], false)] {
            peer.attrs.public_ip.v4 = Some(public_ip.into());
            let answer = path(&*network, &peer, Family::V4);
            match answer {
                Ok(objects) => {
                    assert!(tunnelled || on_link);
                    let is_sent_datagrams = objects.iter().any(|object| {
                        matches!(object, Object::Route(route)
                            if matches!(route.target, RouteTarget::Device(_)))
                    });
                    assert_eq!(is_sent_datagrams, tunnelled);
                    // Its own are taken: it may be of ours before we hear of it.
                    let end = objects
                        .iter()
                        .find(|object| matches!(object, Object::TunnelPeer(_)));
                    let end = end.expect("an end").to_string();
                    assert!(end.contains("192.0.2.2:8285") || tunnelled, "{end}");
                }
                Err(Rejection::NotOnLink { .. }) => assert!(!tunnelled && !on_link),
                Err(other) => panic!("{other}"),
            }
        }
    }
}

/// A node that cannot carry packets says so before it asks for a lease.
#[test]
fn a_kernel_without_tun_or_packet_paths_is_refused_with_the_remedy() {
    let mut node = node(V4, 1);
    node.features.tunnels = false;
    let error = UdpBackend::new()
        .attrs(&node.cx())
        .expect_err("no packet paths");
    assert!(error.to_string().contains("WithTunnels"), "{error}");
    node.features.tun = false;
    let error = UdpBackend::new()
        .attrs(&node.cx())
        .expect_err("no TUN devices");
    assert!(error.to_string().contains("/dev/net/tun"), "{error}");
    // What is forbidden is not mended by a module.
    for (fault, remedy) in [
        (TunFault::Forbidden, "--device"),
        (TunFault::Mode, "chmod"),
        (TunFault::NoRight, "CAP_NET_ADMIN"),
        (TunFault::NoDriver, "modprobe tun"),
    ] {
        node.features.tun_fault = Some(fault);
        let error = UdpBackend::new().attrs(&node.cx()).expect_err("none");
        let error = error.to_string();
        assert!(error.contains(remedy), "{error}");
        assert_eq!(
            error.contains("modprobe"),
            fault == TunFault::NoDriver,
            "{error}"
        );
    }
}

#[test]
fn a_family_that_does_not_work_here_costs_the_other_nothing() {
    let mut node = node(DUAL, 1);
    node.external.local.v6 = None;
    let there = network(&node);
    let why = there.lacks().v6.expect("it has no address");
    assert!(why.contains("no IPv6 address to send from"), "{why}");
    let local: Vec<String> = there.local().iter().map(ToString::to_string).collect();
    let own = "tunnel flannel0 listen 192.0.2.1:8285 own 10.5.1.0/24 mtu 1472".to_owned();
    assert!(local.contains(&own), "{local:?}");
    node.external.local.v4 = None;
    let error = UdpBackend::new().attrs(&node.cx()).expect_err("none works");
    assert!(matches!(error, Error::Underlay { .. }), "{error}");
}
