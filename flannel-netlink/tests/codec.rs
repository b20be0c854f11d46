//! From objects to bytes and back, without a kernel.
#![allow(missing_docs, reason = "a test")]

mod strategies;

use std::collections::BTreeMap;

use flannel_core::kernel::{Error, Result};
use flannel_core::{
    Family, Fdb, IfName, Link, LinkKind, MacAddr, Neighbour, Nexthop, Object, Op, Route,
    RouteProtocol, RouteTarget, Tun,
};
use flannel_netlink::codec::{Batch, decode, decode_answer, decode_features, encode};
use proptest::prelude::*;
use strategies::{DEVICES, dev, link, other_than_link};

fn index(name: IfName) -> Result<u32> {
    let place = DEVICES.iter().position(|device| *device == name.as_str());
    place
        .and_then(|place| u32::try_from(place + 2).ok())
        .ok_or_else(|| Error::NoSuchDevice {
            dev: name.to_string(),
        })
}

fn devices() -> BTreeMap<u32, IfName> {
    DEVICES
        .iter()
        .zip(2..)
        .map(|(name, index)| (index, dev(name)))
        .collect()
}

fn datagram(op: &Op) -> Batch {
    let mut batch = Batch::default();
    encode(op, None, index, &mut batch).expect("a request");
    batch
}

/// The bytes of one request as hexadecimal digits, without sequence number and port.
fn hex(op: Op) -> String {
    let mut batch = datagram(&op);
    batch.number(0);
    batch.acknowledge(true);
    let digits = batch.bytes().iter().map(|byte| format!("{byte:02x}"));
    digits.collect()
}

proptest! {
    /// What is asked of the kernel reads back as what was asked.
    #[test]
    fn a_request_says_what_was_asked(object in other_than_link()) {
        let batch = datagram(&Op::Create(object.clone()));
        prop_assert_eq!(decode(batch.bytes(), &devices()), Ok(vec![object]));
    }

    /// The same for devices, less what is set after they are made.
    #[test]
    fn a_request_for_a_device_says_what_was_asked(asked in link()) {
        let batch = datagram(&Op::Create(Object::Link(asked.clone())));
        let Ok([Object::Link(found)]) = decode(batch.bytes(), &devices())
            .map(|objects| <[Object; 1]>::try_from(objects).expect("one object"))
        else {
            panic!("no device");
        };
        prop_assert_eq!(found.name, asked.name);
        prop_assert_eq!(found.mac, asked.mac);
        prop_assert_eq!(found.mtu.filter(|mtu| *mtu != 0), asked.mtu);
        prop_assert!(!found.up, "a device is made down");
        if !matches!(asked.kind, LinkKind::Veth { .. }) {
            prop_assert_eq!(found.kind, asked.kind);
        }
    }

    /// Several requests in one datagram read as each by itself.
    #[test]
    fn a_batch_is_its_requests(objects in prop::collection::vec(other_than_link(), 0..20)) {
        let mut batch = Batch::default();
        for object in &objects {
            encode(&Op::Create(object.clone()), None, index, &mut batch).expect("a request");
        }
        batch.number(7);
        batch.acknowledge(false);
        prop_assert_eq!(batch.len(), objects.len());
        prop_assert_eq!(decode(batch.bytes(), &devices()), Ok(objects));
    }

    /// No bytes make a decoder panic or run on.
    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        drop(decode(&bytes, &devices()));
        drop(decode_features(&bytes));
        for flags in [0, 0x100, 0x200, 0x300] {
            drop(decode_answer(flags, &bytes));
        }
    }

    /// Bytes that look like messages reach the decoders of the kinds, and those do not panic.
    #[test]
    fn no_message_makes_a_decoder_panic(
        kind in prop::sample::select(vec![16_u16, 20, 24, 28, 104]),
        body in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut bytes = u32::try_from(body.len() + 16).expect("short").to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(&body);
        drop(decode(&bytes, &devices()));
    }

    /// A valid request that is damaged in one place, or cut, is read or refused.
    #[test]
    fn no_damage_makes_a_decoder_panic(
        object in prop_oneof![other_than_link(), link().prop_map(Object::Link)],
        place in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        end in any::<prop::sample::Index>(),
    ) {
        let mut bytes = datagram(&Op::Create(object)).bytes().to_vec();
        let place = place.index(bytes.len());
        bytes[place] = byte;
        drop(decode(&bytes, &devices()));
        bytes.truncate(end.index(bytes.len()));
        drop(decode(&bytes, &devices()));
    }
}

fn nexthop(id: u32, gateway: &str) -> Object {
    Object::Nexthop(Nexthop {
        id,
        gateway: gateway.parse().expect("an address"),
        dev: dev(DEVICES[0]),
        onlink: true,
        protocol: RouteProtocol::OURS,
    })
}

/// The bytes that iproute2 6.1 sends for the same, taken from its `sendmsg`; little-endian.
#[test]
#[cfg(target_endian = "little")]
fn requests_are_those_of_iproute2() {
    // ip nexthop add id 5 via 10.5.1.0 dev <index 2> onlink proto 241
    assert_eq!(
        hex(Op::Create(nexthop(5, "10.5.1.0"))),
        "30000000680005060000000000000000\
         0200f100040000000800010005000000080006000a0501000800050002000000"
    );
    // ip nexthop replace id 6 via fd00:5:1:: dev <index 2> onlink proto 241
    assert_eq!(
        hex(Op::Change(nexthop(6, "fd00:5:1::"))),
        "3c000000680005050000000000000000\
         0a00f10004000000080001000600000014000600fd000005000100000000000000000000\
         0800050002000000"
    );
    // ip nexthop del id 5
    assert_eq!(
        hex(Op::Delete(nexthop(5, "10.5.1.0"))),
        "20000000690005000000000000000000\
         00000000000000000800010005000000"
    );
    // ip neigh add 10.5.1.0 lladdr 0e:11:22:33:44:55 dev <index 2> nud permanent
    let mac = MacAddr([0x0e, 0x11, 0x22, 0x33, 0x44, 0x55]);
    assert_eq!(
        hex(Op::Create(Object::Neighbour(Neighbour {
            dev: dev(DEVICES[0]),
            ip: "10.5.1.0".parse().expect("an address"),
            mac,
        }))),
        "300000001c0005060000000000000000\
         020000000200000080000000080001000a0501000a0002000e11223344550000"
    );
    // bridge fdb add 0e:11:22:33:44:55 dev <index 2> dst 192.0.2.7 self permanent, which puts the
    // hardware address first and calls the state NOARP too
    assert_eq!(
        hex(Op::Create(Object::Fdb(Fdb {
            dev: dev(DEVICES[0]),
            mac,
            remote: "192.0.2.7".parse().expect("an address"),
        }))),
        "300000001c0005060000000000000000\
         070000000200000080000200\
         08000100c00002070a0002000e11223344550000"
    );
    // ip route add 10.5.1.0/24 nhid 6 proto 241
    assert_eq!(
        hex(Op::Create(Object::Route(Route {
            table: 254,
            dst: "10.5.1.0/24".parse().expect("a subnet"),
            metric: Route::default_metric(Family::V4),
            target: RouteTarget::Nexthop(6),
            protocol: RouteProtocol::OURS,
            source: None
        }))),
        "2c000000180005060000000000000000\
         02180000fef1000100000000080001000a05010008001e0006000000"
    );
}

/// An IPv6 route without a protocol would be made with another.
#[test]
fn an_ipv6_route_needs_a_protocol() {
    let route = Route {
        table: 254,
        dst: "fd00::/64".parse().expect("a subnet"),
        metric: 1024,
        target: RouteTarget::Blackhole,
        protocol: RouteProtocol::UNSPEC,
        source: None,
    };
    for (op, fits) in [
        (Op::Create(Object::Route(route.clone())), false),
        (Op::Change(Object::Route(route.clone())), false),
        (Op::Delete(Object::Route(route)), true),
    ] {
        let result = encode(&op, None, index, &mut Batch::default());
        assert_eq!(result.is_ok(), fits, "{}", op.verb());
    }
}

/// What the kernel would take for something else is refused before it is asked.
#[test]
fn what_the_kernel_would_misread_is_rejected() {
    let route = Route {
        table: 254,
        dst: "10.5.1.0/24".parse().expect("a subnet"),
        metric: 0,
        target: RouteTarget::Nexthop(0),
        protocol: RouteProtocol::OURS,
        source: None,
    };
    let table_zero = Route {
        table: 0,
        target: RouteTarget::Blackhole,
        ..route.clone()
    };
    let multicast = Fdb {
        dev: dev(DEVICES[0]),
        mac: MacAddr([1, 0, 0x5e, 0, 0, 1]),
        remote: "192.0.2.7".parse().expect("an address"),
    };
    for object in [
        nexthop(0, "10.5.1.0"),
        Object::Route(route),
        Object::Route(table_zero),
        Object::Fdb(multicast),
    ] {
        for op in [
            Op::Create(object.clone()),
            Op::Change(object.clone()),
            Op::Delete(object.clone()),
        ] {
            let result = encode(&op, None, index, &mut Batch::default());
            assert!(
                matches!(result, Err(Error::Rejected { .. })),
                "{object}: {result:?}"
            );
        }
    }
}

#[test]
fn a_device_kind_that_netlink_does_not_make_is_unsupported() {
    for kind in [
        LinkKind::Tun(Tun::FOR_TUNNEL),
        LinkKind::Loopback,
        LinkKind::Other("dummy".to_owned()),
    ] {
        let link = Link {
            name: dev("x0"),
            kind,
            mtu: None,
            mac: None,
            up: true,
            alias: None,
        };
        let result = encode(
            &Op::Create(Object::Link(link)),
            None,
            index,
            &mut Batch::default(),
        );
        assert!(
            matches!(result, Err(Error::Unsupported { .. })),
            "{result:?}"
        );
    }
}

/// An answer with the kernel's words, capped as we ask for and not capped.
#[test]
fn the_kernels_words_are_read() {
    let attribute = [&[0x0d, 0, 1, 0][..], b"no such\0x\0\0\0"].concat();
    let request = [20_u32.to_ne_bytes(), [0; 4], [0; 4], [0; 4]].concat();
    let number = (-22_i32).to_ne_bytes();
    let capped = [&number[..], &request, &attribute].concat();
    assert_eq!(
        decode_answer(0x300, &capped),
        Ok(Some((22, Some("no such".to_owned()))))
    );
    let whole = [&number[..], &request, &[9; 4], &attribute].concat();
    assert_eq!(
        decode_answer(0x200, &whole),
        Ok(Some((22, Some("no such".to_owned()))))
    );
    assert_eq!(decode_answer(0, &whole), Ok(Some((22, None))));
    assert_eq!(decode_answer(0x100, &[0; 20]), Ok(None));
}
