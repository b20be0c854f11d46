//! Messages, made by our own codec and by hand. What the kernel itself sent is in the corpus as
//! `ok-kernel-…`.

use flannel_core::{
    Address, Fdb, IfName, Link, LinkKind, MAIN_TABLE, MacAddr, Neighbour, Nexthop, Object, Offload,
    Op, Route, RouteProtocol, RouteTarget, Vxlan,
};
use flannel_netlink::codec::{Batch, encode, encode_offload};

use super::seed;
use crate::corpus::Entry;
use crate::netlink::{KINDS, index};

const HEADER: usize = 16;

pub(super) fn seeds() -> Vec<(&'static str, Entry)> {
    let mut seeds = Vec::new();
    let mut all = Batch::default();
    for (name, object) in objects() {
        let mut batch = Batch::default();
        for batch in [&mut batch, &mut all] {
            encode(&Op::Create(object.clone()), None, index, batch).expect("a request");
        }
        let bytes = batch.bytes();
        let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
        let at = KINDS.iter().position(|known| *known == kind);
        let at = at
            .and_then(|at| u8::try_from(at).ok())
            .expect("a known kind");
        let body = [&[at], &bytes[HEADER..]].concat();
        seeds.push(seed("netlink_message", format!("ok-{name}"), body.clone()));
        let cut = [&[at], &bytes[HEADER..HEADER + 7]].concat();
        seeds.push(seed("netlink_message", format!("bad-{name}-cut"), cut));
        if name == "route-v4" {
            seeds.push(seed("netlink", "ok-one", bytes));
            seeds.push(seed("netlink", "bad-cut", &bytes[..bytes.len() - 1]));
            let mut short = bytes.to_vec();
            short[0] = 15;
            seeds.push(seed("netlink", "bad-shorter-than-its-header", short));
            let mut long = bytes.to_vec();
            // The first attribute is longer than the message.
            long[HEADER + 12] = 0xff;
            seeds.push(seed("netlink", "bad-long-attribute", long));
        }
    }
    all.number(7);
    all.acknowledge(true);
    seeds.push(seed("netlink", "ok-all", all.bytes()));
    seeds.push(seed("netlink", "ok-nothing", []));
    seeds.push(seed("netlink", "bad-one-byte", [0]));
    seeds.extend(answers());
    seeds.extend(features());
    seeds
}

fn answers() -> Vec<(&'static str, Entry)> {
    let text = attribute(1, b"Invalid argument, it said\0");
    let number = (-22_i32).to_ne_bytes();
    let request = [20_u32.to_ne_bytes(), [0; 4], [0; 4], [0; 4]].concat();
    let answer = |name: &str, flags: u16, parts: &[&[u8]]| {
        let bytes = [&flags.to_ne_bytes()[..], &parts.concat()].concat();
        seed("netlink_answer", name, bytes)
    };
    vec![
        answer("ok-good", 0x100, &[&[0; 4], &request]),
        answer("ok-refused", 0, &[&number, &request]),
        answer("ok-words-capped", 0x300, &[&number, &request, &text]),
        answer(
            "ok-words-whole",
            0x200,
            &[&number, &request, &[9; 4], &text],
        ),
        answer(
            "ok-least-number",
            0x300,
            &[&i32::MIN.to_ne_bytes(), &request],
        ),
        answer("ok-positive", 0x300, &[&7_i32.to_ne_bytes(), &request]),
        answer("bad-no-number", 0x300, &[&[1, 2, 3]]),
        answer("bad-no-request", 0x300, &[&number, &request[..15]]),
        answer(
            "bad-long-text",
            0x300,
            &[&number, &request, &[0xff, 0xff, 1, 0]],
        ),
        // The request claims to be as long as can be.
        answer(
            "ok-endless-request",
            0x200,
            &[&number, &[0xff; 4], &request[4..], &text],
        ),
    ]
}

fn features() -> Vec<(&'static str, Entry)> {
    let mut batch = Batch::default();
    encode_offload(
        &Offload {
            dev: dev("flannel.1"),
            feature: "tx-checksum-ip-generic".to_owned(),
            on: false,
        },
        &mut batch,
    );
    let request = &batch.bytes()[HEADER..];
    let bit = |name: &[u8]| attribute(1, &attribute(2, name));
    let set = |kind, bits: &[u8]| attribute(kind, &attribute(3, bits));
    let bits = [bit(b"tx-checksum-ip-generic\0"), bit(b"rx-gro\0")].concat();
    let header = [11, 1, 0, 0];
    let answer = |parts: &[&[u8]]| [&header[..], &parts.concat()].concat();
    vec![
        seed("ethtool", "ok-request", request),
        seed("ethtool", "ok-none", header),
        seed(
            "ethtool",
            "ok-answer",
            answer(&[
                &set(2, &bits),
                &set(3, &bits),
                &set(4, &bit(b"rx-gro\0")),
                &set(5, &[]),
            ]),
        ),
        seed(
            "ethtool",
            "ok-no-name",
            answer(&[&set(4, &attribute(1, &[]))]),
        ),
        seed(
            "ethtool",
            "ok-no-text",
            answer(&[&set(4, &bit(&[0xff, 0xfe, 0]))]),
        ),
        seed("ethtool", "bad-short", [11, 1]),
        seed("ethtool", "bad-cut", &request[..request.len() - 5]),
        seed(
            "ethtool",
            "bad-long-bit",
            answer(&[&set(4, &[0xff, 0, 1, 0])]),
        ),
    ]
}

/// An attribute with its padding.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(value.len() + 4).expect("a short value");
    let mut bytes = len.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn dev(name: &str) -> IfName {
    IfName::new(name).expect("a device name")
}

/// One object of each form that is asked for.
fn objects() -> Vec<(&'static str, Object)> {
    let ip = |text: &str| text.parse().expect("an address");
    let (v4, v6) = (dev("flannel.1"), dev("flannel-v6.1"));
    let mac = MacAddr([0x0e, 0x11, 0x22, 0x33, 0x44, 0x55]);
    let link = |name, kind| {
        Object::Link(Link {
            name,
            kind,
            mtu: Some(1450),
            mac: Some(mac),
            up: false,
            alias: None,
        })
    };
    let vxlan = |local: &str| {
        LinkKind::Vxlan(Vxlan {
            vni: 1,
            port: 8472,
            underlay: Some(dev("eth0")),
            local: Some(ip(local)),
            learning: false,
            gbp: true,
        })
    };
    let address = |dev, text: &str, prefix_len| {
        Object::Address(Address {
            dev,
            ip: ip(text),
            prefix_len,
        })
    };
    let nexthop = |id, dev, gateway: &str| {
        Object::Nexthop(Nexthop {
            id,
            gateway: ip(gateway),
            dev,
            onlink: true,
            protocol: RouteProtocol::OURS,
        })
    };
    let route = |dst: &str, metric, table, target| {
        Object::Route(Route {
            table,
            dst: dst.parse().expect("a subnet"),
            metric,
            target,
            protocol: RouteProtocol::OURS,
            source: None,
        })
    };
    let gateway = |gateway: &str, dev| RouteTarget::Gateway {
        gateway: ip(gateway),
        dev,
        onlink: true,
    };
    vec![
        ("link-vxlan", link(v4, vxlan("192.0.2.1"))),
        ("link-vxlan-v6", link(v6, vxlan("2001:db8::1"))),
        ("link-bridge", link(dev("cni0"), LinkKind::Bridge)),
        (
            "link-veth",
            link(
                dev("eth0"),
                LinkKind::Veth {
                    peer: Some(dev("eth1")),
                },
            ),
        ),
        ("address-v4", address(v4, "10.5.1.0", 32)),
        ("address-v6", address(v6, "fd00:5:0:1::", 128)),
        (
            "fdb",
            Object::Fdb(Fdb {
                dev: v4,
                mac,
                remote: ip("192.0.2.7"),
            }),
        ),
        (
            "fdb-v6",
            Object::Fdb(Fdb {
                dev: v6,
                mac,
                remote: ip("2001:db8::7"),
            }),
        ),
        (
            "neighbour-v4",
            Object::Neighbour(Neighbour {
                dev: v4,
                ip: ip("10.5.2.0"),
                mac,
            }),
        ),
        (
            "neighbour-v6",
            Object::Neighbour(Neighbour {
                dev: v6,
                ip: ip("fd00:5:0:2::"),
                mac,
            }),
        ),
        ("nexthop-v4", nexthop(5, v4, "10.5.2.0")),
        ("nexthop-v6", nexthop(u32::MAX, v6, "fd00:5:0:2::")),
        (
            "route-v4",
            route("10.5.2.0/24", 0, MAIN_TABLE, RouteTarget::Nexthop(5)),
        ),
        (
            "route-v6",
            route("fd00:5:0:2::/64", 1024, MAIN_TABLE, RouteTarget::Nexthop(7)),
        ),
        (
            "route-gateway",
            route("10.5.2.0/24", 7, MAIN_TABLE, gateway("10.5.2.0", v4)),
        ),
        (
            "route-via-v6",
            route("10.5.2.0/24", 7, MAIN_TABLE, gateway("fd00::1", v4)),
        ),
        (
            "route-device",
            route("10.5.0.0/16", 0, 100, RouteTarget::Device(v4)),
        ),
        (
            "route-table",
            route("fd00:5::/48", 1, 70_000, RouteTarget::Device(v6)),
        ),
        (
            "route-blackhole",
            route("10.5.0.0/16", 9, MAIN_TABLE, RouteTarget::Blackhole),
        ),
    ]
}
