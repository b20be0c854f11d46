//! Strategies for kernel objects and for the state of a node: what is wanted, what was left behind,
//! what is somebody else's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use flannel_core::reconcile::desired::{Desired, Wanted};
use flannel_core::reconcile::ownership::{Ownership, nexthop_id};
use flannel_core::{
    Address, DualStack, Family, Fdb, IfName, LeaseKey, Link, LinkKind, MAIN_TABLE, MacAddr,
    Neighbour, Nexthop, Object, ObjectKey, OverlayName, Route, RouteProtocol, RouteTarget, Subnet,
    Sysctl, Tun, Tunnel, TunnelPeer, Vxlan,
};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::Index;

/// A unicast hardware address.
pub fn mac() -> impl Strategy<Value = MacAddr> {
    any::<u64>().prop_map(MacAddr::local)
}

/// A device name.
pub fn if_name() -> impl Strategy<Value = IfName> {
    vec(proptest::sample::select(b"abcxyz019.-_".to_vec()), 1..=15)
        .prop_filter_map("a name of dots is none", |bytes| {
            IfName::new(String::from_utf8(bytes).ok()?).ok()
        })
}

/// An address that a host can have.
pub fn ip(family: Family) -> BoxedStrategy<IpAddr> {
    match family {
        Family::V4 => (0x0a00_0001_u32..0xdf00_0000)
            .prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits)))
            .prop_filter("not loopback", |ip| !ip.is_loopback())
            .boxed(),
        Family::V6 => any::<u64>()
            .prop_map(|bits| {
                IpAddr::V6(Ipv6Addr::from_bits(
                    (0xfd << 120) | (u128::from(bits) << 32) | 1,
                ))
            })
            .boxed(),
    }
}

/// A subnet of a length that routes have.
pub fn subnet(family: Family) -> impl Strategy<Value = Subnet> {
    let lengths = match family {
        Family::V4 => 12..=32_u8,
        Family::V6 => 48..=128,
    };
    (ip(family), lengths)
        .prop_map(|(ip, len)| Subnet::new(ip, len).unwrap_or_else(|_| Subnet::host(ip)))
}

/// Objects of most kinds that can be made in the order of their keys in a namespace that has the
/// underlay device, up, and nothing else.
pub fn makeable(underlay: IfName) -> impl Strategy<Value = Vec<Object>> {
    let device = (
        (1..1_u32 << 24),
        1024..=u16::MAX,
        proptest::option::of(576..=1400_u32),
        proptest::option::of(mac()),
        proptest::option::of("[ -~]{1,60}"),
        any::<(bool, bool)>(),
    );
    (vec(device, 1..=2), vec(any::<(Index, bool, u64)>(), 0..12)).prop_map(
        move |(devices, dependants)| {
            let mut objects = BTreeMap::new();
            let mut add = |object: Object| {
                objects.entry(object.key()).or_insert(object);
            };
            let names = ["fl.gen-0", "fl.gen-1"];
            let mut links = Vec::new();
            let mut taken = BTreeSet::new();
            for (name, (vni, port, mtu, mac, alias, (learning, bound))) in names.iter().zip(devices)
            {
                let Ok(name) = IfName::new(name) else {
                    continue;
                };
                if !taken.insert((vni, port)) {
                    continue;
                }
                links.push(name);
                add(Object::Link(Link {
                    name,
                    kind: LinkKind::Vxlan(Vxlan {
                        vni,
                        port,
                        underlay: bound.then_some(underlay),
                        local: bound.then_some(IpAddr::from([192, 0, 2, 1])),
                        learning,
                        gbp: false,
                    }),
                    mtu,
                    mac,
                    up: true,
                    alias,
                }));
            }
            for (n, (which, with_nexthop, number)) in (1_u8..).zip(dependants) {
                let dev = *which.get(&links);
                let mac = MacAddr::local(number);
                let [a, b, c, ..] = number.to_be_bytes();
                let gateway = IpAddr::from([10, n, a, b]);
                add(Object::Address(Address {
                    dev,
                    ip: IpAddr::from([10, 200, n, a]),
                    prefix_len: 16 + c % 17,
                }));
                add(Object::Fdb(Fdb {
                    dev,
                    mac,
                    remote: IpAddr::from([192, 0, 2, n]),
                }));
                add(Object::Neighbour(Neighbour {
                    dev,
                    ip: gateway,
                    mac,
                }));
                let id = 1000 + u32::from(n);
                if with_nexthop {
                    add(Object::Nexthop(Nexthop {
                        id,
                        gateway,
                        dev,
                        onlink: true,
                        protocol: RouteProtocol(a.max(5)),
                    }));
                }
                let target = if with_nexthop {
                    RouteTarget::Nexthop(id)
                } else {
                    RouteTarget::Gateway {
                        gateway,
                        dev,
                        onlink: true,
                    }
                };
                if let Ok(dst) = Subnet::new(IpAddr::from([100, n, b, c]), 17 + a % 16) {
                    add(Object::Route(Route {
                        table: MAIN_TABLE,
                        dst,
                        metric: u32::from(c),
                        target,
                        protocol: RouteProtocol(a.max(5)),
                        source: None,
                    }));
                }
            }
            objects.into_values().collect()
        },
    )
}

/// An object of any kind, related to nothing, out of few values so that keys collide.
pub fn any_object() -> impl Strategy<Value = Object> {
    let dev = || {
        proptest::sample::select(vec!["eth0", "flannel.1", "flannel.2", "fl0"])
            .prop_map(|name| IfName::new(name).expect("a device name"))
    };
    let family = || proptest::sample::select(Family::ALL.to_vec());
    let small_ip = || {
        (family(), 0..4_u8, 0..3_u8).prop_map(|(family, a, b)| match family {
            Family::V4 => IpAddr::from([10, 5, a, b]),
            Family::V6 => IpAddr::from([0xfd00, 5, u16::from(a), 0, 0, 0, 0, u16::from(b)]),
        })
    };
    let small_mac = || (0..4_u8).prop_map(|n| MacAddr([0x0e, 0, 0, 0, 0, n]));
    let protocol = || proptest::sample::select(vec![2, 3, 99, 241]).prop_map(RouteProtocol);
    let alias = proptest::sample::select(vec![
        None,
        Some(""),
        Some("flannel:flannel"),
        Some("flannel:other"),
        Some("mine"),
    ]);
    let vxlan = (
        1..3_u32,
        8471..8473_u16,
        proptest::option::of(dev()),
        proptest::option::of(small_ip()),
        any::<(bool, bool)>(),
    )
        .prop_map(|(vni, port, underlay, local, (learning, gbp))| {
            LinkKind::Vxlan(Vxlan {
                vni,
                port,
                underlay,
                local,
                learning,
                gbp,
            })
        });
    let kind = prop_oneof![
        4 => vxlan,
        2 => (any::<(bool, bool)>(), prop::option::of(1u32..3)).prop_map(|(is, queue)| {
            let (persistent, multi_queue) = is;
            LinkKind::Tun(Tun { persistent, multi_queue, vnet_header: true, queue })
        }),
        1 => Just(LinkKind::Bridge),
        1 => Just(LinkKind::Other(String::new())),
    ];
    let link = (
        dev(),
        kind,
        proptest::option::of(1400..1402_u32),
        proptest::option::of(small_mac()),
        any::<bool>(),
        alias,
    )
        .prop_map(|(name, kind, mtu, mac, up, alias)| {
            Object::Link(Link {
                name,
                kind,
                mtu,
                mac,
                up,
                alias: alias.map(str::to_owned),
            })
        });
    let target = prop_oneof![
        (small_ip(), dev(), any::<bool>()).prop_map(|(gateway, dev, onlink)| {
            RouteTarget::Gateway {
                gateway,
                dev,
                onlink,
            }
        }),
        (0..4_u32).prop_map(RouteTarget::Nexthop),
        dev().prop_map(RouteTarget::Device),
        Just(RouteTarget::Blackhole),
        Just(RouteTarget::Other("two paths".to_owned())),
    ];
    prop_oneof![
        link,
        (dev(), family(), 0..2_u8).prop_map(|(dev, family, value)| {
            Object::Sysctl(Sysctl {
                dev,
                family,
                name: "forwarding".to_owned(),
                value: value.to_string(),
            })
        }),
        (dev(), small_ip(), 0..=128_u8).prop_map(|(dev, ip, prefix_len)| {
            Object::Address(Address {
                dev,
                ip,
                prefix_len,
            })
        }),
        (dev(), family(), 8285..8287_u16).prop_map(|(dev, family, port)| {
            Object::Tunnel(Box::new(tunnel_of(dev, [family], port, 1400)))
        }),
        (dev(), small_ip(), 16..=32_u8, small_ip(), 8285..8287_u16).prop_map(
            |(dev, ip, len, endpoint, port)| {
                Object::TunnelPeer(TunnelPeer {
                    dev,
                    subnet: Subnet::new(ip, len).unwrap_or_else(|_| Subnet::host(ip)),
                    endpoint: SocketAddr::new(endpoint, port),
                })
            }
        ),
        (dev(), small_mac(), small_ip())
            .prop_map(|(dev, mac, remote)| { Object::Fdb(Fdb { dev, mac, remote }) }),
        (dev(), small_ip(), small_mac())
            .prop_map(|(dev, ip, mac)| { Object::Neighbour(Neighbour { dev, ip, mac }) }),
        (0..4_u32, small_ip(), dev(), any::<bool>(), protocol()).prop_map(
            |(id, gateway, dev, onlink, protocol)| {
                Object::Nexthop(Nexthop {
                    id: if id == 0 {
                        nexthop_id(&OverlayName::default(), gateway, dev, onlink)
                    } else {
                        id
                    },
                    gateway,
                    dev,
                    onlink,
                    protocol,
                })
            }
        ),
        (small_ip(), 16..=32_u8, target, protocol()).prop_map(|(ip, len, target, protocol)| {
            let dst = Subnet::new(ip, len).unwrap_or_else(|_| Subnet::host(ip));
            Object::Route(Route {
                table: MAIN_TABLE,
                dst,
                metric: Route::default_metric(dst.family()),
                target,
                protocol,
                source: None,
            })
        }),
    ]
}

/// A node's overlay in short: enough to say what its kernel should have.
///
/// The networks are `10.5.0.0/16` and `fd00:5::/48`; the node itself has slot 1, peers have others.
/// Peer node `n` has the VTEP address `0e:…:n` and the public addresses `192.0.2.n` and
/// `2001:db8::n`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSpec {
    /// The VNI.
    pub vni: u32,
    /// The UDP port.
    pub port: u16,
    /// Whether the device is named after the VNI, as Go flannel names it.
    pub named_after_vni: bool,
    /// The MTU of the devices.
    pub mtu: u32,
    /// The last byte of the hardware address of our own devices.
    pub mac: u8,
    /// Whether the devices learn forwarding entries.
    pub learning: bool,
    /// Whether packets go through a packet path in userspace and not through VXLAN; the one device
    /// of both families is `flannel0` then.
    pub udp: bool,
    /// Whether there is IPv6 beside IPv4.
    pub ipv6: bool,
    /// Whether routes go through nexthop objects.
    pub nexthops: bool,
    /// The node that has each slot, and whether it is reached without tunnel.
    pub peers: BTreeMap<u8, (u8, bool)>,
}

/// A node's overlay with up to six peers.
pub fn node_spec() -> impl Strategy<Value = NodeSpec> {
    (
        (1..3_u32, 8472..8474_u16, any::<bool>()),
        (1400..1402_u32, 1..3_u8, any::<bool>()),
        (any::<bool>(), any::<bool>(), proptest::bool::weighted(0.3)),
        btree_map(2..12_u8, (2..9_u8, proptest::bool::weighted(0.2)), 0..6),
    )
        .prop_map(
            |((vni, port, named_after_vni), (mtu, mac, learning), (ipv6, nexthops, udp), peers)| {
                NodeSpec {
                    vni,
                    port,
                    named_after_vni,
                    mtu,
                    mac,
                    learning,
                    udp,
                    ipv6,
                    nexthops,
                    peers,
                }
            },
        )
}

/// The overlay `flannel` with the protocol number and networks of [`NodeSpec`].
pub fn ownership(adopt_flannel: bool) -> Ownership {
    Ownership {
        overlay: OverlayName::default(),
        protocol: RouteProtocol::OURS,
        networks: ["10.5.0.0/16", "fd00:5::/48"]
            .iter()
            .filter_map(|network| network.parse().ok())
            .collect(),
        adopt_flannel,
        known: Vec::new(),
    }
}

impl NodeSpec {
    /// The name of the device of a family.
    pub fn dev(&self, family: Family) -> IfName {
        let name = match (family, self.named_after_vni) {
            _ if self.udp => "flannel0".to_owned(),
            (Family::V4, true) => format!("flannel.{}", self.vni),
            (Family::V6, true) => format!("flannel-v6.{}", self.vni),
            (Family::V4, false) => "fl4".to_owned(),
            (Family::V6, false) => "fl6".to_owned(),
        };
        IfName::new(name).expect("a name of a few characters")
    }

    /// The families of the overlay.
    pub fn families(&self) -> impl Iterator<Item = Family> + use<> {
        let ipv6 = self.ipv6;
        Family::ALL
            .into_iter()
            .filter(move |family| *family == Family::V4 || ipv6)
    }

    /// What the kernel should have.
    pub fn desired(&self) -> Desired {
        let mut desired = Desired::default();
        let mut want = |object: Object, peer: Option<LeaseKey>| {
            desired
                .objects
                .entry(object.key())
                .or_insert(Wanted { object, peer });
        };
        for family in self.families() {
            for object in self.local(family) {
                want(object, None);
            }
            for (slot, (node, direct)) in &self.peers {
                for object in self.peer(family, *slot, *node, *direct) {
                    want(object, Some(LeaseKey::new(format!("node-{node}"))));
                }
            }
        }
        desired
    }

    fn local(&self, family: Family) -> Vec<Object> {
        let dev = self.dev(family);
        let mac = MacAddr([0x0e, 0xff, 0, 0, 0, self.mac]);
        let vxlan = LinkKind::Vxlan(Vxlan {
            vni: self.vni,
            port: self.port,
            underlay: IfName::new("eth0").ok(),
            local: Some(public_ip(family, 1)),
            learning: self.learning,
            gbp: false,
        });
        let (kind, mac) = if self.udp {
            (LinkKind::Tun(Tun::FOR_TUNNEL), None)
        } else {
            (vxlan, Some(mac))
        };
        let link = Object::Link(Link {
            name: dev,
            kind,
            mtu: Some(self.mtu),
            mac,
            up: true,
            alias: Some(OverlayName::default().link_alias()),
        });
        let setting = Object::Sysctl(Sysctl {
            dev,
            family: Family::V6,
            name: "accept_ra".to_owned(),
            value: "0".to_owned(),
        });
        let own = Subnet::host(slot_subnet(family, 1).address());
        let address = Object::Address(Address {
            dev,
            ip: own.address(),
            prefix_len: own.len(),
        });
        let mut objects = vec![link, setting, address];
        if self.udp {
            let tunnel = tunnel_of(dev, self.families(), self.port, self.mtu);
            objects.push(Object::Tunnel(Box::new(tunnel)));
        }
        objects
    }

    /// What is needed to reach the node that has a slot.
    pub fn peer(&self, family: Family, slot: u8, node: u8, direct: bool) -> Vec<Object> {
        let dev = self.dev(family);
        let dst = slot_subnet(family, slot);
        let gateway = dst.address();
        let mac = MacAddr([0x0e, 0, 0, 0, 0, node]);
        let remote = public_ip(family, node);
        let route = |target| {
            Object::Route(Route {
                table: MAIN_TABLE,
                dst,
                metric: Route::default_metric(family),
                target,
                protocol: RouteProtocol::OURS,
                source: None,
            })
        };
        if direct {
            let eth0 = IfName::new("eth0").expect("a device name");
            return vec![route(RouteTarget::Gateway {
                gateway: remote,
                dev: eth0,
                onlink: false,
            })];
        }
        if self.udp {
            let peer = Object::TunnelPeer(TunnelPeer {
                dev,
                subnet: dst,
                endpoint: SocketAddr::new(remote, self.port),
            });
            return vec![peer, route(RouteTarget::Device(dev))];
        }
        let mut objects = vec![
            Object::Fdb(Fdb { dev, mac, remote }),
            Object::Neighbour(Neighbour {
                dev,
                ip: gateway,
                mac,
            }),
        ];
        if self.nexthops {
            let id = nexthop_id(&OverlayName::default(), gateway, dev, true);
            objects.push(Object::Nexthop(Nexthop {
                id,
                gateway,
                dev,
                onlink: true,
                protocol: RouteProtocol::OURS,
            }));
            objects.push(route(RouteTarget::Nexthop(id)));
        } else {
            objects.push(route(RouteTarget::Gateway {
                gateway,
                dev,
                onlink: true,
            }));
        }
        objects
    }

    /// What Go flannel leaves behind of the same overlay over VXLAN: no alias, protocol `boot`, no nexthops.
    pub fn left_by_go_flannel(&self) -> Vec<Object> {
        let plain = Self {
            nexthops: false,
            named_after_vni: true,
            udp: false,
            ..self.clone()
        };
        let wanted = plain.desired().objects.into_values();
        wanted
            .map(|wanted| match wanted.object {
                Object::Link(link) => Object::Link(Link {
                    alias: None,
                    ..link
                }),
                Object::Route(route) => Object::Route(Route {
                    protocol: RouteProtocol::BOOT,
                    ..route
                }),
                other => other,
            })
            .collect()
    }
}

/// A packet path of the node 1 of [`NodeSpec`].
pub fn tunnel_of(
    dev: IfName,
    families: impl IntoIterator<Item = Family>,
    port: u16,
    mtu: u32,
) -> Tunnel {
    let mut tunnel = Tunnel {
        dev,
        listen: DualStack::default(),
        own: DualStack::default(),
        mtu: DualStack::default(),
    };
    for family in families {
        let listen = SocketAddr::new(public_ip(family, 1), port);
        tunnel.listen.set(family, Some(listen));
        tunnel.own.set(family, Some(slot_subnet(family, 1)));
        tunnel.mtu.set(family, Some(mtu));
    }
    tunnel
}

/// The subnet of a slot.
pub fn slot_subnet(family: Family, slot: u8) -> Subnet {
    let (ip, len) = match family {
        Family::V4 => (IpAddr::from([10, 5, slot, 0]), 24),
        Family::V6 => (
            IpAddr::from([0xfd00, 5, 0, u16::from(slot), 0, 0, 0, 0]),
            64,
        ),
    };
    Subnet::new(ip, len).unwrap_or_else(|_| Subnet::host(ip))
}

/// The public address of a node.
pub fn public_ip(family: Family, node: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([192, 0, 2, node]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(node)]),
    }
}

/// Something that befell a node's kernel while nobody looked.
#[derive(Debug, Clone)]
pub enum Mishap {
    /// An object, chosen among all that are there, is deleted.
    Deleted(Index),
    /// An object, chosen likewise, is replaced by what [`altered`] makes of it.
    Altered(Index),
    /// A device is set down; and up again, or not.
    Down(Index, bool),
}

/// Something that befell a node's kernel while nobody looked.
pub fn mishap() -> impl Strategy<Value = Mishap> {
    prop_oneof![
        3 => any::<Index>().prop_map(Mishap::Deleted),
        3 => any::<Index>().prop_map(Mishap::Altered),
        1 => any::<(Index, bool)>().prop_map(|(which, up)| Mishap::Down(which, up)),
    ]
}

/// An object that is altered in one field: not in its key, except that an address gets another
/// length.
pub fn altered(object: &Object) -> Object {
    let mac = MacAddr([0x0e, 0xee, 0, 0, 0, 1]);
    match object.clone() {
        Object::Link(o) => Object::Link(Link {
            mtu: Some(1300),
            ..o
        }),
        Object::Sysctl(o) => Object::Sysctl(Sysctl {
            value: "2".to_owned(),
            ..o
        }),
        Object::Tunnel(mut o) => {
            for listen in [&mut o.listen.v4, &mut o.listen.v6].into_iter().flatten() {
                listen.set_port(4444);
            }
            Object::Tunnel(o)
        }
        Object::TunnelPeer(mut o) => {
            o.endpoint.set_ip(public_ip(o.subnet.family(), 200));
            Object::TunnelPeer(o)
        }
        Object::Fdb(o) => Object::Fdb(Fdb {
            remote: public_ip(Family::of(&o.remote), 200),
            ..o
        }),
        Object::Neighbour(o) => Object::Neighbour(Neighbour { mac, ..o }),
        Object::Address(o) => Object::Address(Address {
            prefix_len: match o.ip {
                IpAddr::V4(_) => 24,
                IpAddr::V6(_) => 64,
            },
            ..o
        }),
        Object::Nexthop(o) => Object::Nexthop(Nexthop { onlink: false, ..o }),
        Object::Route(o) => Object::Route(Route {
            target: RouteTarget::Blackhole,
            ..o
        }),
        other => other,
    }
}

/// Objects of other people on the node `192.0.2.1`: some beside the overlay, some in its way, some
/// that look like ours, and one like Go flannel's (the `boot` route on-link through `flannel.1`).
pub fn foreign() -> impl Strategy<Value = Vec<Object>> {
    let name = |name: &str| IfName::new(name).expect("a device name");
    let link = |dev: &str, kind: LinkKind, alias: Option<&str>| {
        Object::Link(Link {
            name: name(dev),
            kind,
            mtu: None,
            mac: None,
            up: true,
            alias: alias.map(str::to_owned),
        })
    };
    let vxlan = |vni: u32, port: u16| {
        LinkKind::Vxlan(Vxlan {
            vni,
            port,
            underlay: None,
            local: None,
            learning: true,
            gbp: false,
        })
    };
    let address = |dev: &str, ip: [u8; 4], prefix_len: u8| {
        Object::Address(Address {
            dev: name(dev),
            ip: IpAddr::from(ip),
            prefix_len,
        })
    };
    let route = |dst: Subnet, target: RouteTarget, protocol: u8| {
        Object::Route(Route {
            table: MAIN_TABLE,
            dst,
            metric: Route::default_metric(dst.family()),
            target,
            protocol: RouteProtocol(protocol),
            source: None,
        })
    };
    let via_eth0 = RouteTarget::Gateway {
        gateway: IpAddr::from([192, 0, 2, 250]),
        dev: name("eth0"),
        onlink: false,
    };
    let via_other = RouteTarget::Gateway {
        gateway: IpAddr::from([10, 5, 9, 0]),
        dev: name("other.7"),
        onlink: true,
    };
    let via_ours = RouteTarget::Gateway {
        gateway: IpAddr::from([10, 5, 50, 0]),
        dev: name("flannel.1"),
        onlink: true,
    };
    let outside = Subnet::host([10, 99, 0, 1]);
    let dev = name("flannel.1");
    let gateway = slot_subnet(Family::V4, 3).address();
    let all = vec![
        link("cni0", LinkKind::Bridge, None),
        address("cni0", [10, 5, 1, 1], 24),
        link("other.7", vxlan(7, 8472), Some("flannel:other")),
        route(slot_subnet(Family::V4, 9), via_other, 241),
        link("vx.rival", vxlan(1, 8472), None),
        link("fl4", LinkKind::Bridge, None),
        link(
            "vx.bound",
            LinkKind::Vxlan(Vxlan {
                vni: 9,
                port: 9999,
                underlay: IfName::new("flannel.1").ok(),
                local: None,
                learning: true,
                gbp: false,
            }),
            None,
        ),
        address("flannel.1", [169, 254, 7, 7], 16),
        route(slot_subnet(Family::V4, 2), via_eth0.clone(), 99),
        route(slot_subnet(Family::V4, 5), via_eth0.clone(), 3),
        route(slot_subnet(Family::V4, 40), via_eth0.clone(), 3),
        route(slot_subnet(Family::V4, 77), via_eth0.clone(), 4),
        route(outside, via_eth0, 241),
        route(slot_subnet(Family::V4, 50), via_ours, 3),
        Object::Nexthop(Nexthop {
            id: nexthop_id(&OverlayName::default(), gateway, dev, true),
            gateway: IpAddr::from([192, 0, 2, 251]),
            dev: name("eth0"),
            onlink: true,
            protocol: RouteProtocol(99),
        }),
        Object::Nexthop(Nexthop {
            id: 4711,
            gateway,
            dev,
            onlink: true,
            protocol: RouteProtocol::OURS,
        }),
        Object::Neighbour(Neighbour {
            dev: name("eth0"),
            ip: IpAddr::from([192, 0, 2, 252]),
            mac: MacAddr([0x0e, 9, 9, 9, 9, 9]),
        }),
    ];
    let count = 0..=all.len();
    proptest::sample::subsequence(all, count).prop_map(|mut objects| {
        objects.sort_by_key(Object::key);
        objects
    })
}

/// The keys under which two maps of objects differ.
pub fn differing(
    one: &BTreeMap<ObjectKey, Object>,
    other: &BTreeMap<ObjectKey, Object>,
) -> BTreeSet<ObjectKey> {
    one.keys()
        .chain(other.keys())
        .filter(|key| one.get(key) != other.get(key))
        .cloned()
        .collect()
}
