//! What a simulated machine comes with: its interfaces, and what other programs have there.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::reconcile::ownership::nexthop_id;
use flannel_core::{
    Address, Family, Fdb, Features, IfName, Link, LinkKind, MAIN_TABLE, MacAddr, Neighbour,
    Nexthop, Object, ObjectKey, Objects, OverlayName, PublicIp, Route, RouteProtocol, RouteTarget,
    Subnet, Vxlan,
};

use super::path::link;
use crate::fake_kernel::{FakeKernel, default_route};

/// Made by an administrator (`RTPROT_STATIC`).
pub(super) const STATIC: RouteProtocol = RouteProtocol(4);

/// The alias of a device that somebody put in the place of ours.
pub(super) const PLACE_TAKEN: &str = "in your place";

/// How many addresses lie between one set of addresses of a node and its next.
const STRIDE: u8 = 40;

/// The metric of the default routes of the first uplink: there are better ones.
pub(super) const FIRST_METRIC: u32 = 1024;

/// The external interface that every node has at first.
pub(super) fn external() -> IfName {
    name("eth0")
}

pub(super) fn name(name: &str) -> IfName {
    IfName::new(name).expect("a device name")
}

/// The addresses of a node on the underlay: the first, the second and so on of its own.
pub(super) fn addresses(number: u8, set: u8) -> PublicIp {
    let host = number.wrapping_add(STRIDE.wrapping_mul(set % 4));
    PublicIp::both(
        Ipv4Addr::new(192, 0, 2, host),
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host.into()),
    )
}

/// The address of a node in a LAN of its own that lies in the overlay's usual networks, where no
/// node of ours gets a subnet: the first subnet of a network is nobody's. Not every node has one.
fn lan(number: u8) -> Vec<(IpAddr, u8)> {
    if number % 2 == 1 {
        return Vec::new();
    }
    vec![
        (Ipv4Addr::new(10, 42, 0, number).into(), 25),
        (
            Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, number.into()).into(),
            65,
        ),
    ]
}

/// The addresses of a machine that belong neither to the overlay nor to an uplink, each with the length
/// of its prefix.
pub(super) fn inner_addresses(number: u8) -> impl Iterator<Item = (IpAddr, u8)> {
    let bridge = [(Ipv4Addr::new(10, 99, 0, 1).into(), 24)];
    bridge.into_iter().chain(lan(number))
}

/// The router of the underlay.
pub(super) fn router(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, 254).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xfe).into(),
    }
}

/// A machine as it is after it was switched on.
pub(super) fn machine(number: u8, set: u8, boot: u64) -> FakeKernel {
    let kernel = FakeKernel::empty();
    let mut features = Features::all();
    features.namespace = Some(format!("machine {number}, boot {boot}"));
    kernel.set_features(features);
    with_external(kernel, number, set)
}

/// The same machine with its external interface.
pub(super) fn with_external(kernel: FakeKernel, number: u8, set: u8) -> FakeKernel {
    let addresses: Vec<(IpAddr, u8)> = addresses(number, set)
        .ips()
        .map(|ip| (ip, prefix_len(Family::of(&ip))))
        .collect();
    let kernel = kernel.with_link("eth0", 1500, &addresses);
    for family in Family::ALL {
        let route = default_route(external(), router(family), FIRST_METRIC);
        kernel.insert_foreign(route).ok();
    }
    kernel
}

pub(super) const fn prefix_len(family: Family) -> u8 {
    match family {
        Family::V4 => 24,
        Family::V6 => 64,
    }
}

/// Puts in what other programs have on a machine; answers what of it is there then.
pub(super) fn furnish(kernel: &FakeKernel, number: u8) -> BTreeMap<ObjectKey, Object> {
    let (bridge, tunnel) = (name("br-lan"), name("vxlan99"));
    let (v4, v6) = (router(Family::V4), router(Family::V6));
    let mac = MacAddr([0x02, 0x99, 0, 0, 0, 1]);
    let link = |name, kind| {
        Object::Link(Link {
            name,
            kind,
            mtu: Some(1450),
            mac: Some(MacAddr([0x02, 0x99, 0, 0, 0, 0x10])),
            up: true,
            alias: None,
        })
    };
    let gateway = |gateway| RouteTarget::Gateway {
        gateway,
        dev: external(),
        onlink: false,
    };
    let lan = lan(number).into_iter().map(|(ip, prefix_len)| {
        Object::Address(Address {
            dev: bridge,
            ip,
            prefix_len,
        })
    });
    let objects: Vec<Object> = [
        link(bridge, LinkKind::Bridge),
        Object::Address(Address {
            dev: bridge,
            ip: Ipv4Addr::new(10, 99, 0, 1).into(),
            prefix_len: 24,
        }),
        link(
            tunnel,
            LinkKind::Vxlan(Vxlan {
                vni: 99,
                port: 4789,
                underlay: Some(external()),
                local: None,
                learning: true,
                gbp: false,
            }),
        ),
        Object::Fdb(Fdb {
            dev: tunnel,
            mac,
            remote: Ipv4Addr::new(192, 0, 2, 99).into(),
        }),
        Object::Neighbour(Neighbour {
            dev: tunnel,
            ip: Ipv4Addr::new(10, 98, 0, 1).into(),
            mac,
        }),
        Object::Nexthop(Nexthop {
            id: 77,
            gateway: v4,
            dev: external(),
            onlink: false,
            protocol: STATIC,
        }),
        route("10.97.0.0/16", 0, RouteTarget::Nexthop(77)),
        route("10.98.0.0/16", 0, gateway(v4)),
        // In the network, but of no use to peers: another metric.
        route("10.42.3.0/24", 77, gateway(v4)),
        route("2001:db8:99::/48", 1024, gateway(v6)),
    ]
    .into_iter()
    .chain(lan)
    .collect();
    for object in &objects {
        // What hangs on an interface that is down cannot be there.
        kernel.insert_foreign(object.clone()).ok();
    }
    let there = kernel.objects();
    let mine =
        |(key, _): &(&ObjectKey, &Object)| objects.iter().any(|object| object.key() == **key);
    there
        .iter()
        .filter(mine)
        .map(|(key, object)| (key.clone(), object.clone()))
        .collect()
}

fn route(dst: &str, metric: u32, target: RouteTarget) -> Object {
    Object::Route(Route {
        table: MAIN_TABLE,
        dst: dst.parse::<Subnet>().expect("a subnet"),
        metric,
        target,
        protocol: STATIC,
        source: None,
    })
}

/// All that bears the overlay's marks, in the order of keys.
pub(super) fn ours(objects: &Objects) -> Vec<Object> {
    let alias = OverlayName::default().link_alias();
    let is_ours = |dev: IfName| {
        link(objects, dev).is_some_and(|link| link.alias.as_deref() == Some(alias.as_str()))
    };
    let marked = |object: &&Object| match object {
        Object::Nexthop(o) => {
            let name = OverlayName::default();
            o.protocol == RouteProtocol::OURS
                && o.id == nexthop_id(&name, o.gateway, o.dev, o.onlink)
        }
        Object::Route(route) => route.protocol == RouteProtocol::OURS,
        // A device's own link-local address comes and goes with it.
        Object::Address(Address {
            ip: IpAddr::V6(ip), ..
        }) if ip.is_unicast_link_local() => false,
        object => object.dev().is_some_and(is_ours),
    };
    objects.values().filter(marked).cloned().collect()
}
