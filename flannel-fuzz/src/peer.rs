//! A whole record of a peer: from the key and the value in a store to kernel objects.

use std::sync::{Arc, LazyLock};

use flannel_backend_vxlan::VxlanBackend;
use flannel_core::reconcile::desired::Compiler;
use flannel_core::wire::{parse_lease_value, parse_subnet_key};
use flannel_core::{
    Backend, Family, Lease, LeaseKey, Network, Object, OverlayName, Rejection, Revision, Route,
    RouteProtocol, Subnet,
};
use flannel_testkit::conformance::backend::NodeFixture;

/// A node with its own lease and network.
struct Node {
    fixture: NodeFixture,
    network: Arc<dyn Network>,
}

/// The node without and with direct routing.
static NODES: LazyLock<[Node; 2]> = LazyLock::new(|| [node(false), node(true)]);

fn node(direct: bool) -> Node {
    let config = format!(
        r#"{{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48",
            "Backend":{{"Type":"vxlan","DirectRouting":{direct}}}}}"#
    );
    let fixture = NodeFixture::new(&config).expect("a config");
    let backend = VxlanBackend::new();
    let attrs = backend.attrs(&fixture.cx()).expect("attributes");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let lease = fixture.lease(attrs);
    let network = runtime
        .block_on(backend.register_network(&fixture.cx(), lease))
        .expect("a network");
    Node { fixture, network }
}

/// The first line is the key, the rest the value. Accepted is what leads to objects.
pub(crate) fn peer(bytes: &[u8]) -> bool {
    let at = bytes.iter().position(|byte| *byte == b'\n');
    let (key, value) = bytes.split_at(at.unwrap_or(bytes.len()));
    let key = String::from_utf8_lossy(key);
    let (Ok(subnet), Ok(record)) = (parse_subnet_key(&key), parse_lease_value(value)) else {
        return false;
    };
    let Ok(id) = record.node_id() else {
        return false;
    };
    let lease = Lease {
        key: LeaseKey::new(&key),
        node: id,
        instance: None,
        subnet,
        attrs: record.attrs,
        ttl: None,
        created: Revision(7),
        revision: Revision(7),
    };
    let mut programmed = false;
    for node in NODES.iter() {
        programmed |= program(node, &lease);
    }
    programmed
}

/// Whether the peer gets objects; all of them must be within what a peer may cause.
fn program(node: &Node, lease: &Lease) -> bool {
    let own = node.network.lease();
    let set = node
        .fixture
        .lease_set(&VxlanBackend::new(), own, lease.clone());
    let mut compiler = Compiler::new(OverlayName::default(), RouteProtocol::OURS);
    compiler.set_network(Arc::clone(&node.network), &set);
    for (_, rejection) in compiler.rejected().values().flatten() {
        // The backend asked for what no peer may have: it believed the record.
        assert!(
            !matches!(rejection, Rejection::Unsafe { .. }),
            "{rejection}"
        );
    }
    let mut programmed = false;
    for wanted in compiler.desired().objects.values() {
        if wanted.peer.is_some() {
            programmed = true;
            check(node, &wanted.object);
        }
    }
    programmed
}

fn check(node: &Node, object: &Object) {
    let own = node.network.lease();
    let pools = node.fixture.config.pools();
    let in_pool = |subnet: &Subnet| pools.values().any(|pool| pool.network().contains(subnet));
    match object {
        Object::Route(Route { dst, .. }) => {
            assert!(in_pool(dst), "{object} leads out of the network");
            let mine = own.subnet.values().find(|mine| mine.overlaps(dst));
            assert_eq!(mine, None, "{object} takes our own subnet");
        }
        Object::Fdb(fdb) => {
            assert!(fdb.mac.is_unicast(), "{object}");
            let remote = fdb.remote;
            let ours = node.fixture.external.public.ips().any(|ip| ip == remote);
            assert!(!ours, "{object} sends to ourselves");
            assert!(
                !remote.is_multicast() && !remote.is_unspecified() && !remote.is_loopback(),
                "{object} sends to no host"
            );
            assert!(
                !in_pool(&Subnet::host(remote)),
                "{object} sends in a circle"
            );
        }
        Object::Neighbour(neighbour) => {
            assert!(neighbour.mac.is_unicast(), "{object}");
            assert!(in_pool(&Subnet::host(neighbour.ip)), "{object}");
        }
        Object::Nexthop(nexthop) => {
            assert_ne!(nexthop.id, 0);
            let gateway = Subnet::host(nexthop.gateway);
            let direct = nexthop.dev == node.fixture.external.dev;
            assert_eq!(in_pool(&gateway), !direct, "{object}");
            assert!(Family::ALL.contains(&gateway.family()));
        }
        other => panic!("a peer has no {other}"),
    }
}
