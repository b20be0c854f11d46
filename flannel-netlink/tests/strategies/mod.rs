//! Objects as the kernel takes them, for properties with and without a kernel.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "shared by several test binaries"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::{
    Address, Family, Fdb, IfName, Link, LinkKind, MacAddr, Neighbour, Nexthop, Object, Route,
    RouteProtocol, RouteTarget, Subnet, Vxlan,
};
use proptest::prelude::*;

/// The devices that objects are on.
pub const DEVICES: [&str; 2] = ["flannel.1", "flannel-v6.1"];

pub fn dev(name: &str) -> IfName {
    IfName::new(name).expect("a device name")
}

pub fn device() -> impl Strategy<Value = IfName> + Clone {
    prop::sample::select(DEVICES.map(dev).to_vec())
}

pub fn mac() -> impl Strategy<Value = MacAddr> {
    any::<[u8; 6]>()
        .prop_map(|[first, rest @ ..]| {
            let [a, b, c, d, e] = rest;
            MacAddr([first & 0xfe, a, b, c, d, e])
        })
        .prop_filter("not all zeros", MacAddr::is_unicast)
}

/// An address that a host may have: 10/8 less its edges, or fd00::/8.
pub fn ip(family: Family) -> BoxedStrategy<IpAddr> {
    match family {
        Family::V4 => (1..0x00ff_fffe_u32)
            .prop_map(|n| IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n)))
            .boxed(),
        Family::V6 => any::<[u8; 15]>()
            .prop_map(|rest| {
                let mut bytes = [0xfd; 16];
                bytes[1..].copy_from_slice(&rest);
                IpAddr::V6(Ipv6Addr::from(bytes))
            })
            .boxed(),
    }
}

pub fn family() -> impl Strategy<Value = Family> + Clone {
    prop::sample::select(Family::ALL.to_vec())
}

pub fn any_ip() -> impl Strategy<Value = IpAddr> {
    family().prop_flat_map(ip)
}

pub fn subnet(family: Family) -> impl Strategy<Value = Subnet> {
    (ip(family), 8..=family.bits())
        .prop_map(|(ip, len)| Subnet::new(ip, len).expect("not too long"))
}

pub fn protocol() -> impl Strategy<Value = RouteProtocol> + Clone {
    any::<u8>().prop_map(RouteProtocol)
}

pub fn address() -> impl Strategy<Value = Object> {
    (device(), family())
        .prop_flat_map(|(dev, family)| (Just(dev), ip(family), 1..=family.bits()))
        .prop_map(|(dev, ip, prefix_len)| {
            Object::Address(Address {
                dev,
                ip,
                prefix_len,
            })
        })
}

pub fn fdb() -> impl Strategy<Value = Object> {
    (device(), mac(), any_ip()).prop_map(|(dev, mac, remote)| Object::Fdb(Fdb { dev, mac, remote }))
}

pub fn neighbour() -> impl Strategy<Value = Object> {
    (device(), any_ip(), mac())
        .prop_map(|(dev, ip, mac)| Object::Neighbour(Neighbour { dev, ip, mac }))
}

pub fn nexthop() -> impl Strategy<Value = Object> {
    (1..=u32::MAX, any_ip(), device(), any::<bool>(), protocol()).prop_map(
        |(id, gateway, dev, onlink, protocol)| {
            Object::Nexthop(Nexthop {
                id,
                gateway,
                dev,
                onlink,
                protocol,
            })
        },
    )
}

pub fn target(family: Family) -> impl Strategy<Value = RouteTarget> {
    let gateway = match family {
        // An IPv4 route may have an IPv6 gateway, but not the other way round.
        Family::V4 => any_ip().boxed(),
        Family::V6 => ip(Family::V6),
    };
    prop_oneof![
        3 => (gateway, device(), any::<bool>()).prop_map(|(gateway, dev, onlink)| {
            RouteTarget::Gateway { gateway, dev, onlink }
        }),
        2 => (1..=u32::MAX).prop_map(RouteTarget::Nexthop),
        1 => device().prop_map(RouteTarget::Device),
        1 => Just(RouteTarget::Blackhole),
    ]
}

pub fn route() -> impl Strategy<Value = Object> {
    let table = prop_oneof![Just(254_u32), 1..=252_u32, 256..=u32::MAX];
    family().prop_flat_map(move |family| {
        let metric = match family {
            Family::V4 => any::<u32>().boxed(),
            Family::V6 => (1..=u32::MAX).boxed(),
        };
        let protocol = match family {
            Family::V4 => protocol().boxed(),
            Family::V6 => (1..=u8::MAX).prop_map(RouteProtocol).boxed(),
        };
        (
            table.clone(),
            subnet(family),
            metric,
            target(family),
            protocol,
        )
            .prop_map(|(table, dst, metric, target, protocol)| {
                Object::Route(Route {
                    table,
                    dst,
                    metric,
                    target,
                    protocol,
                    source: None,
                })
            })
    })
}

pub fn other_than_link() -> impl Strategy<Value = Object> {
    prop_oneof![address(), fdb(), neighbour(), nexthop(), route()]
}

/// A device of a kind that netlink makes; VXLAN devices are on the devices above.
pub fn link() -> impl Strategy<Value = Link> {
    let vxlan = (
        0..1_u32 << 24,
        1..=u16::MAX,
        prop::option::of(device()),
        prop::option::of(any_ip()),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(vni, port, underlay, local, learning, gbp)| {
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
        1 => Just(LinkKind::Bridge),
        1 => Just(LinkKind::Veth { peer: Some(dev("x1")) }),
    ];
    (
        "x0|flannel\\.[0-9]{1,6}",
        kind,
        prop::option::of(1280..=1400_u32),
        prop::option::of(mac()),
        any::<bool>(),
        prop::option::of("[ -~]{1,60}"),
    )
        .prop_map(|(name, kind, mtu, mac, up, alias)| Link {
            name: dev(&name),
            kind,
            mtu,
            mac,
            up,
            alias,
        })
}
