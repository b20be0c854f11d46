//! The laws of [`Compiler`], over a small network made for the purpose.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use flannel_core::reconcile::desired::{Compiler, Desired, Rejections, Wanted};
use flannel_core::reconcile::ownership::nexthop_id;
use flannel_core::{
    Address, BackendType, DualStack, Event, Family, Fdb, IfName, Lease, LeaseAttrs, LeaseKey,
    LeaseSet, Link, LinkKind, MAIN_TABLE, MacAddr, Neighbour, Network, NetworkConfig, Nexthop,
    NodeId, Object, ObjectKey, Offload, OverlayName, Own, Peer, PoolMode, PublicIp, Rejection,
    Revision, Rng, Route, RouteProtocol, RouteTarget, Snapshot, Subnet, Sysctl, Tunnel, TunnelPeer,
};
use flannel_testkit::permute::Permutation;
use flannel_testkit::strategies::leases;
use proptest::prelude::*;

const CONFIG: &str = r#"{"Network":"10.5.0.0/16","SubnetLen":24,"EnableIPv6":true,
    "IPv6Network":"fd00:5::/48","IPv6SubnetLen":64,"Backend":{"Type":"vxlan"}}"#;

fn net(text: &str) -> Subnet {
    text.parse().expect("a subnet")
}

fn dev(name: &str) -> IfName {
    IfName::new(name).expect("a name")
}

fn mac(n: u8) -> MacAddr {
    MacAddr([0x0e, 0, 0, 0, 0, n])
}

/// A network whose peers publish a MAC, as VXLAN's do.
#[derive(Debug, Clone)]
struct Toy {
    lease: Lease,
    /// One device for both families, or one for each.
    shared: bool,
    /// Wanted for every peer on top.
    extra: Vec<Object>,
}

impl Toy {
    fn new(shared: bool) -> Self {
        let lease = Lease {
            key: LeaseKey::new("key0"),
            node: NodeId::new("node0").expect("an id"),
            instance: None,
            subnet: DualStack::both(net("10.5.0.0/24"), net("fd00:5::/64")),
            attrs: LeaseAttrs::default(),
            ttl: None,
            created: Revision(1),
            revision: Revision(1),
        };
        Self {
            lease,
            shared,
            extra: Vec::new(),
        }
    }

    fn dev(&self, family: Family) -> IfName {
        match family {
            Family::V6 if !self.shared => dev("toy6"),
            _ => dev("toy"),
        }
    }

    fn path(&self, peer: &Lease, family: Family, subnet: Subnet) -> Result<Vec<Object>, Rejection> {
        let data = peer.attrs.backend_data.get(family);
        let data: serde_json::Value = data.map_or(Ok(serde_json::Value::Null), |d| d.decode())?;
        let mac = data["VtepMAC"].as_str().unwrap_or_default().parse();
        let mac: MacAddr = mac.map_err(|error: flannel_core::MacError| Rejection::BackendData {
            reason: error.to_string(),
        })?;
        let (dev, gateway) = (self.dev(family), subnet.address());
        let remote = peer
            .attrs
            .public_ip
            .ips()
            .next()
            .expect("the public address was checked");
        let id = nexthop_id(&OverlayName::default(), gateway, dev, true);
        let mut objects = vec![
            Object::Fdb(Fdb { dev, mac, remote }),
            Object::Neighbour(Neighbour {
                dev,
                ip: gateway,
                mac,
            }),
            Object::Nexthop(Nexthop {
                id,
                gateway,
                dev,
                onlink: true,
                protocol: RouteProtocol(7),
            }),
            Object::Route(Route {
                table: MAIN_TABLE,
                dst: subnet,
                metric: Route::default_metric(family),
                target: RouteTarget::Nexthop(id),
                protocol: RouteProtocol::UNSPEC,
                source: None,
            }),
        ];
        objects.extend(self.extra.iter().cloned());
        Ok(objects)
    }
}

#[async_trait::async_trait]
impl Network for Toy {
    fn lease(&self) -> &Lease {
        &self.lease
    }

    fn mtu(&self) -> u32 {
        1450
    }

    fn local(&self) -> Vec<Object> {
        let mut objects = Vec::new();
        for family in Family::ALL {
            let dev = self.dev(family);
            objects.push(Object::Link(Link {
                name: dev,
                kind: LinkKind::Bridge,
                mtu: None,
                mac: Some(mac(0)),
                up: true,
                alias: None,
            }));
            let subnet = self.lease.subnet.get(family).expect("both families");
            objects.push(Object::Address(Address {
                dev,
                ip: subnet.address(),
                prefix_len: family.bits(),
            }));
        }
        objects.push(Object::Fdb(Fdb {
            dev: dev("toy"),
            mac: mac(40),
            remote: Ipv4Addr::new(192, 0, 2, 40).into(),
        }));
        objects.push(Object::Tunnel(Box::new(tunnel(dev("toy")))));
        objects
    }

    fn peer(
        &self,
        peer: &Lease,
        subnets: &DualStack<Subnet>,
    ) -> DualStack<Result<Vec<Object>, Rejection>> {
        subnets.map(|family, subnet| self.path(peer, family, *subnet))
    }
}

/// The node's own packet path.
fn tunnel(dev: IfName) -> Tunnel {
    Tunnel {
        dev,
        listen: DualStack::v4(SocketAddr::from(([192, 0, 2, 1], 8285))),
        own: DualStack::v4(net("10.5.0.0/24")),
        mtu: DualStack::v4(1400),
    }
}

fn empty() -> LeaseSet {
    let config = NetworkConfig::from_json(CONFIG, PoolMode::Allocated).expect("a valid config");
    let toy = Toy::new(false);
    let mut set = LeaseSet::default();
    set.set_pools(*config.pools());
    set.set_backend(BackendType::vxlan());
    set.set_own(Own {
        node: toy.lease.node.clone(),
        key: Some(toy.lease.key.clone()),
        subnets: toy.lease.subnet,
        public_ip: PublicIp::v4(Ipv4Addr::new(192, 0, 2, 1)),
    });
    set
}

fn compiler() -> Compiler {
    Compiler::new(OverlayName::default(), RouteProtocol::OURS)
}

fn scratch(toy: &Toy, set: &LeaseSet) -> Compiler {
    let mut compiler = compiler();
    compiler.set_network(Arc::new(toy.clone()), set);
    compiler
}

/// The keys under which two desired states differ.
fn difference(a: &Desired, b: &Desired) -> BTreeSet<ObjectKey> {
    let keys = a.objects.keys().chain(b.objects.keys());
    keys.filter(|key| a.objects.get(*key) != b.objects.get(*key))
        .cloned()
        .collect()
}

fn lease() -> impl Strategy<Value = Lease> {
    let honest = leases::honest_lease(DualStack::both(
        (net("10.5.0.0/16"), 24),
        (net("fd00:5::/48"), 64),
    ));
    let hostile = leases::hostile_lease(DualStack::both(net("10.5.0.0/16"), net("fd00:5::/48")));
    prop_oneof![5 => honest, 1 => hostile]
}

/// The keys that the toy wants for one family of a peer.
fn path(toy: &Toy, lease: &Lease, family: Family, subnet: Subnet) -> Option<BTreeSet<ObjectKey>> {
    let objects = toy.path(lease, family, subnet).ok()?;
    Some(objects.iter().map(Object::key).collect())
}

/// Every family of every peer is wanted whole or not at all, and then there is a reason.
fn check_whole(compiler: &Compiler, toy: &Toy, set: &LeaseSet) -> Result<(), TestCaseError> {
    let none = Rejections::new();
    let mut explained = BTreeSet::new();
    for (key, peer) in set.peers() {
        let rejections = compiler.rejected().get(key).unwrap_or(&none);
        for (family, subnet) in peer.subnets.iter() {
            let refused = rejections.iter().any(|(which, _)| *which == Some(family));
            let path = path(toy, &peer.lease, family, *subnet);
            prop_assert!(path.is_some() || refused);
            let path = path.unwrap_or_default();
            let theirs = |key: &&ObjectKey| {
                let wanted = compiler.desired().objects.get(*key);
                wanted.is_some_and(|wanted| wanted.peer.as_ref() == Some(&peer.lease.key))
            };
            let other = subnet_path_of_other_family(toy, peer, family, compiler);
            let built = path
                .iter()
                .filter(theirs)
                .filter(|key| !other.contains(*key))
                .count();
            if refused {
                prop_assert_eq!(built, 0, "half a path of {:?}", peer);
            } else {
                prop_assert_eq!(path.iter().filter(theirs).count(), path.len());
                explained.extend(path);
            }
        }
        for (family, _) in peer.rejected.iter() {
            prop_assert!(
                rejections
                    .iter()
                    .any(|(w, _)| w.is_none() || *w == Some(family))
            );
        }
        for (_, rejection) in rejections {
            if let Rejection::KeyTaken { key, by } = rejection {
                let wanted = &compiler.desired().objects[key];
                prop_assert_eq!(wanted.peer.as_ref(), Some(by));
                // What the store may have withdrawn gives way to whatever is there.
                let order = |peer: &Peer| (peer.doubted, peer.lease.seniority());
                prop_assert!(order(set.peer(by).expect("a peer")) < order(peer));
            }
        }
    }
    for (key, wanted) in &compiler.desired().objects {
        prop_assert_eq!(key, &wanted.object.key());
        prop_assert!(
            wanted.peer.is_none() || explained.contains(key),
            "{key} is nobody's"
        );
    }
    Ok(())
}

fn subnet_path_of_other_family(
    toy: &Toy,
    peer: &Peer,
    family: Family,
    compiler: &Compiler,
) -> BTreeSet<ObjectKey> {
    let other = if family == Family::V4 {
        Family::V6
    } else {
        Family::V4
    };
    let refused = compiler.rejected().get(&peer.lease.key);
    if refused.is_some_and(|all| all.iter().any(|(which, _)| *which == Some(other))) {
        return BTreeSet::new();
    }
    let subnet = peer.subnets.get(other);
    subnet
        .and_then(|subnet| path(toy, &peer.lease, other, *subnet))
        .unwrap_or_default()
}

proptest! {
    #[test]
    fn compiling_step_by_step_equals_compiling_at_once(
        history in leases::history(lease(), 0..50),
        shared in any::<bool>(),
        seed in any::<u64>(),
        which in 0..Permutation::ALL.len(),
        at in any::<prop::sample::Index>(),
    ) {
        let toy = Toy::new(shared);
        let mut set = empty();
        let mut compiler = compiler();
        let events = Permutation::ALL[which].deliver(&history, &mut Rng::new(seed));
        let at = at.index(events.len());
        for (i, event) in events.into_iter().enumerate() {
            let before = compiler.desired().clone();
            let applied = set.apply(event);
            let mut changed = compiler.update(&applied.delta, &set);
            if i == at {
                changed.extend(compiler.set_network(Arc::new(toy.clone()), &set));
            }
            prop_assert_eq!(changed, difference(&before, compiler.desired()));
            if i < at {
                prop_assert_eq!(compiler.desired(), &Desired {
                    hold_orphans: true,
                    ..Desired::default()
                });
                continue;
            }
            let scratch = scratch(&toy, &set);
            prop_assert_eq!(compiler.desired(), scratch.desired());
            prop_assert_eq!(compiler.rejected(), scratch.rejected());
            prop_assert_eq!(compiler.own_rejected(&set), scratch.own_rejected(&set));
            prop_assert_eq!(compiler.desired().hold_orphans, set.hold_orphans());
            check_whole(&compiler, &toy, &set)?;
        }
        let other = Toy::new(!shared);
        let before = compiler.desired().clone();
        let changed = compiler.set_network(Arc::new(other), &set);
        prop_assert_eq!(changed, difference(&before, compiler.desired()));
    }

    #[test]
    fn a_peer_causes_nothing_out_of_bounds(
        leases in prop::collection::vec(lease(), 0..12),
        extra in prop::collection::vec(any_object(), 0..3),
    ) {
        let toy = Toy { extra, ..Toy::new(false) };
        let mut set = empty();
        let snapshot = Snapshot { leases, revision: Revision(50), ..Snapshot::default() };
        set.apply(Event::Snapshot(snapshot));
        let compiler = scratch(&toy, &set);
        let own: Vec<_> = Toy::new(false).local().iter().map(Object::key).collect();
        for (key, wanted) in &compiler.desired().objects {
            let Some(peer) = &wanted.peer else {
                prop_assert!(own.contains(key));
                continue;
            };
            prop_assert!(!own.contains(key));
            let subnets = &set.peer(peer).expect("a peer").subnets;
            let ok = match &wanted.object {
                Object::Fdb(Fdb { dev: on, mac: found, .. })
                | Object::Neighbour(Neighbour { dev: on, mac: found, .. }) => {
                    [dev("toy"), dev("toy6")].contains(on)
                        && found.is_unicast()
                        && *found != mac(0)
                }
                Object::TunnelPeer(o) => {
                    let ends = set.peer(peer).expect("a peer").lease.attrs.public_ip;
                    o.dev == dev("toy")
                        && subnets.get(o.subnet.family()).is_some_and(|s| s.contains(&o.subnet))
                        && ends.ips().any(|ip| ip == o.endpoint.ip())
                        && o.endpoint.port() != 0
                }
                Object::Nexthop(o) => {
                    o.id == nexthop_id(&OverlayName::default(), o.gateway, o.dev, o.onlink)
                        && o.protocol != RouteProtocol::UNSPEC
                }
                Object::Route(o) => {
                    let path = match &o.target {
                        RouteTarget::Nexthop(id) => compiler
                            .desired()
                            .objects
                            .get(&ObjectKey::Nexthop(*id))
                            .is_some_and(|nexthop| nexthop.peer == wanted.peer),
                        RouteTarget::Paths(_) | RouteTarget::Other(_) => false,
                        _ => true,
                    };
                    path && o.protocol == RouteProtocol::OURS
                        && subnets.values().any(|subnet| subnet.contains(&o.dst))
                }
                _ => false,
            };
            prop_assert!(ok, "{peer} causes {}", wanted.object);
        }
    }
}

/// Of the node's own packet path a peer may have its own subnet at its own public address, and that
/// alone.
#[test]
fn a_peer_of_a_packet_path_has_its_own_subnet_at_its_own_address() {
    for (on, subnet, endpoint, fits) in [
        ("toy", "10.5.3.0/24", "198.51.100.3:8285", true),
        ("toy", "10.5.3.128/25", "198.51.100.3:8285", true),
        ("toy6", "10.5.3.0/24", "198.51.100.3:8285", false),
        ("eth0", "10.5.3.0/24", "198.51.100.3:8285", false),
        ("toy", "10.5.4.0/24", "198.51.100.3:8285", false),
        ("toy", "10.5.0.0/16", "198.51.100.3:8285", false),
        ("toy", "0.0.0.0/0", "198.51.100.3:8285", false),
        ("toy", "10.5.3.0/24", "198.51.100.7:8285", false),
        ("toy", "10.5.3.0/24", "192.0.2.1:8285", false),
        ("toy", "10.5.3.0/24", "[2001:db8:1::3]:8285", false),
        ("toy", "10.5.3.0/24", "198.51.100.3:0", false),
    ] {
        let wanted = Object::TunnelPeer(TunnelPeer {
            dev: dev(on),
            subnet: net(subnet),
            endpoint: endpoint.parse().expect("an endpoint"),
        });
        let toy = Toy {
            extra: vec![wanted.clone()],
            ..Toy::new(false)
        };
        let mut peer = peer(3, 5, 3);
        peer.subnet.v6 = None;
        let mut set = empty();
        set.apply(Event::Snapshot(Snapshot {
            leases: vec![peer],
            revision: Revision(50),
            ..Snapshot::default()
        }));
        let compiler = scratch(&toy, &set);
        let found = compiler.desired().objects.get(&wanted.key());
        assert_eq!(found.is_some(), fits, "{wanted}");
        let rejected = compiler.rejected().values().flatten();
        let refused = rejected.filter(|(_, r)| matches!(r, Rejection::Unsafe { .. }));
        assert_eq!(refused.count(), usize::from(!fits), "{wanted}");
    }
}

/// Objects near the bounds of what a peer may cause, on both sides.
fn any_object() -> impl Strategy<Value = Object> {
    let name = prop::sample::select(vec![dev("toy"), dev("toy6"), dev("eth0")]);
    let macs = prop::sample::select(vec![
        mac(0),
        mac(1),
        mac(40),
        MacAddr([0; 6]),
        MacAddr([0xff; 6]),
    ]);
    let gateway = IpAddr::from(Ipv4Addr::new(198, 51, 100, 7));
    let dsts = prop::sample::select(vec![
        net("0.0.0.0/0"),
        net("10.5.0.0/16"),
        net("10.5.3.0/24"),
        net("10.5.3.128/25"),
        net("192.0.2.0/24"),
        net("fd00:5:0:3::/64"),
        net("10.5.0.0/32"),
    ]);
    let ends = prop::sample::select(vec![
        SocketAddr::from(([198, 51, 100, 3], 8285)),
        SocketAddr::from(([198, 51, 100, 7], 8285)),
        SocketAddr::from(([198, 51, 100, 3], 0)),
    ]);
    let all = (0..13_u8, name, macs, dsts, any::<bool>(), ends);
    all.prop_map(move |(kind, dev, mac, dst, odd, endpoint)| {
        let id = nexthop_id(&OverlayName::default(), gateway, dev, false) ^ u32::from(odd);
        let route = |target| {
            Object::Route(Route {
                table: MAIN_TABLE,
                dst,
                metric: 7,
                target,
                protocol: RouteProtocol::UNSPEC,
                source: None,
            })
        };
        match kind {
            0 => Object::Link(Link {
                name: dev,
                kind: LinkKind::Bridge,
                mtu: None,
                mac: None,
                up: odd,
                alias: None,
            }),
            1 => Object::Sysctl(Sysctl {
                dev,
                family: Family::V6,
                name: "accept_ra".to_owned(),
                value: "2".to_owned(),
            }),
            2 => Object::Offload(Offload {
                dev,
                feature: "tso".to_owned(),
                on: odd,
            }),
            3 => Object::Address(Address {
                dev,
                ip: dst.address(),
                prefix_len: dst.len(),
            }),
            4 => Object::Fdb(Fdb {
                dev,
                mac,
                remote: gateway,
            }),
            5 => Object::Neighbour(Neighbour {
                dev,
                ip: dst.address(),
                mac,
            }),
            6 => Object::Nexthop(Nexthop {
                id,
                gateway,
                dev,
                onlink: false,
                protocol: RouteProtocol::UNSPEC,
            }),
            7 => route(if odd {
                RouteTarget::Other("multipath".to_owned())
            } else {
                RouteTarget::Device(dev)
            }),
            8 => route(RouteTarget::Nexthop(id)),
            9 => Object::Tunnel(Box::new(tunnel(dev))),
            _ => Object::TunnelPeer(TunnelPeer {
                dev,
                subnet: dst,
                endpoint,
            }),
        }
    })
}

fn peer(n: u8, created: u64, vtep: u8) -> Lease {
    let data = format!(r#"{{"VtepMAC":"{}"}}"#, mac(vtep));
    let data = flannel_core::BackendData::from_json(&data).expect("JSON");
    Lease {
        key: LeaseKey::new(format!("peer{n}")),
        node: NodeId::new(format!("peer{n}")).expect("an id"),
        instance: None,
        subnet: DualStack::both(
            net(&format!("10.5.{n}.0/24")),
            net(&format!("fd00:5:0:{n}::/64")),
        ),
        attrs: LeaseAttrs {
            public_ip: DualStack::both(
                Ipv4Addr::new(198, 51, 100, n),
                format!("2001:db8:1::{n}").parse().expect("an address"),
            ),
            backend_type: Some(BackendType::vxlan()),
            backend_data: DualStack::both(data.clone(), data),
        },
        ttl: None,
        created: Revision(created),
        revision: Revision(created),
    }
}

#[test]
fn the_older_of_two_peers_with_one_key_is_served_and_the_other_told() {
    let toy = Toy::new(false);
    let mut set = empty();
    let mut compiler = scratch(&toy, &set);
    let (older, newer) = (LeaseKey::new("peer2"), LeaseKey::new("peer1"));
    for lease in [peer(1, 9, 1), peer(2, 5, 1)] {
        let applied = set.apply(Event::Put(lease));
        compiler.update(&applied.delta, &set);
    }
    let fdb = ObjectKey::Fdb {
        dev: dev("toy"),
        mac: mac(1),
    };
    assert_eq!(compiler.desired().objects[&fdb].peer.as_ref(), Some(&older));
    let told = &compiler.rejected()[&newer];
    let taken = Rejection::KeyTaken {
        key: fdb.clone(),
        by: older.clone(),
    };
    assert_eq!(told[0], (Some(Family::V4), taken));
    assert_eq!(told.len(), 2);
    let theirs = |compiler: &Compiler, who: &LeaseKey| {
        let wanted = compiler.desired().objects.values();
        wanted
            .filter(|wanted| wanted.peer.as_ref() == Some(who))
            .count()
    };
    assert_eq!(theirs(&compiler, &newer), 0);

    let gone = Event::Delete {
        key: older.clone(),
        revision: Revision(20),
    };
    let delta = set.apply(gone).delta;
    let changed = compiler.update(&delta, &set);
    // Both forwarding entries change hands, all else comes and goes.
    assert_eq!(changed.len(), 8 + 6);
    assert_eq!(
        (theirs(&compiler, &newer), theirs(&compiler, &older)),
        (8, 0)
    );
    assert!(compiler.rejected().is_empty());
}

#[test]
fn a_change_of_the_second_family_alone_is_followed() {
    let toy = Toy::new(false);
    let mut set = empty();
    let mut compiler = scratch(&toy, &set);
    let before = peer(1, 5, 1);
    let mut after = before.clone();
    after.attrs.backend_data.v6 = peer(1, 5, 2).attrs.backend_data.v6;
    after.revision = Revision(6);
    for lease in [before, after] {
        let applied = set.apply(Event::Put(lease));
        compiler.update(&applied.delta, &set);
        assert_eq!(compiler.desired(), scratch(&toy, &set).desired());
    }
}

#[test]
fn who_must_be_rejected_by_others_knows_it() {
    let mut toy = Toy::new(false);
    let mine = peer(0, 5, 0);
    toy.lease.attrs = mine.attrs.clone();
    toy.lease.created = mine.created;
    let mut set = empty();
    let mut compiler = scratch(&toy, &set);
    let mut told = |event: Event| {
        let applied = set.apply(event);
        compiler.update(&applied.delta, &set);
        let scratch = scratch(&toy, &set);
        assert_eq!(compiler.own_rejected(&set), scratch.own_rejected(&set));
        compiler.own_rejected(&set)
    };
    // A younger one of our MAC is what the others reject, and one of another MAC nobody.
    assert_eq!(told(Event::Put(peer(1, 9, 0))), None);
    assert_eq!(told(Event::Put(peer(2, 3, 2))), None);
    // One that claims nothing, whatever its age and MAC.
    let mut outside = peer(4, 2, 0);
    outside.subnet = DualStack::v4(net("10.6.0.0/24"));
    assert_eq!(told(Event::Put(outside)), None);
    let mut older = peer(3, 4, 0);
    // This host has its own reason to refuse it, which the others do not have.
    older.attrs.public_ip.v4 = Some(Ipv4Addr::new(192, 0, 2, 1));
    let rejected = told(Event::Put(older)).expect("a rejection");
    assert!(
        matches!(&rejected, Rejection::KeyTaken { by, .. } if by.as_str() == "peer3"),
        "{rejected}"
    );
    let gone = Event::Delete {
        key: LeaseKey::new("peer3"),
        revision: Revision(20),
    };
    assert_eq!(told(gone), None);
}

#[test]
fn both_families_of_a_peer_may_share_an_object() {
    let toy = Toy::new(true);
    let mut set = empty();
    set.apply(Event::Put(peer(1, 1, 1)));
    let mut compiler = scratch(&toy, &set);
    assert!(compiler.rejected().is_empty());
    let of_peer = |compiler: &Compiler| {
        let wanted = compiler.desired().objects.values();
        wanted.filter(|wanted| wanted.peer.is_some()).count()
    };
    assert_eq!(of_peer(&compiler), 7);
    let mut v6_only = peer(1, 1, 1);
    (v6_only.subnet.v4, v6_only.revision) = (None, Revision(2));
    let delta = set.apply(Event::Put(v6_only)).delta;
    compiler.update(&delta, &set);
    assert_eq!(of_peer(&compiler), 4);
    assert!(compiler.rejected().is_empty());
}

#[test]
fn marks_are_put_on_where_there_are_none() {
    let mut set = empty();
    set.apply(Event::Put(peer(1, 1, 1)));
    let compiler = scratch(&Toy::new(false), &set);
    for Wanted { object, .. } in compiler.desired().objects.values() {
        match object {
            Object::Link(link) => assert_eq!(link.alias.as_deref(), Some("flannel:flannel")),
            Object::Route(route) => assert_eq!(route.protocol, RouteProtocol::OURS),
            Object::Nexthop(nexthop) => assert_eq!(nexthop.protocol, RouteProtocol(7)),
            _ => {}
        }
    }
}

#[test]
fn a_renewal_changes_nothing_that_is_wanted() {
    let mut set = empty();
    set.apply(Event::Snapshot(Snapshot {
        leases: vec![peer(1, 1, 1)],
        revision: Revision(1),
        ..Snapshot::default()
    }));
    let mut compiler = scratch(&Toy::new(false), &set);
    let renewed = Lease {
        revision: Revision(2),
        ..peer(1, 1, 1)
    };
    let delta = set.apply(Event::Put(renewed)).delta;
    assert_eq!(delta.changed.len(), 1);
    assert!(compiler.update(&delta, &set).is_empty());
    assert!(!compiler.desired().hold_orphans);
}
