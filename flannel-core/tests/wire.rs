//! Stored forms: the exact bytes of every backend, Go's leniency, and no panic on any bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::wire::{
    Error, LeaseRecord, lease_value, parse_lease_value, parse_subnet_key, subnet_key,
};
use flannel_core::{
    BackendData, BackendType, DualStack, InstanceId, LeaseAttrs, NodeId, PublicIp, Subnet,
};
use flannel_testkit::strategies::config::dual_subnet;
use proptest::prelude::*;

const MAC4: &str = r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#;
const MAC6: &str = r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"}"#;
const KEY4: &str = r#"{"PublicKey":"xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=","Port":51820}"#;
const KEY6: &str = r#"{"PublicKey":"xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=","Port":51821}"#;

fn node(id: &str) -> NodeId {
    NodeId::new(id).expect("a node id")
}

fn derived(ip: &str) -> NodeId {
    NodeId::from_public_ip(ip.parse().expect("an address"))
}

fn attrs(
    v4: Option<&str>,
    v6: Option<&str>,
    backend: Option<&str>,
    data: [Option<&str>; 2],
) -> LeaseAttrs {
    let data = data.map(|text| text.map(|text| BackendData::from_json(text).expect("JSON")));
    let [data4, data6] = data;
    LeaseAttrs {
        public_ip: PublicIp::new(
            v4.map(|ip| ip.parse().expect("IPv4")),
            v6.map(|ip| ip.parse().expect("IPv6")),
        ),
        backend_type: backend.map(|name| BackendType::new(name).expect("a type")),
        backend_data: DualStack::new(data4, data6),
    }
}

#[test]
fn values_are_flannels_byte_for_byte() {
    let (v4, v6) = (Some("1.2.3.4"), Some("fd00::1"));
    let go = derived("1.2.3.4");
    let ours = node("worker-1");
    let none = [None, None];
    macro_rules! golden {
        ($file:literal, $node:expr, $attrs:expr) => {
            (
                $file,
                include_str!(concat!("golden/lease/", $file)),
                $node,
                $attrs,
            )
        };
    }
    for (file, bytes, node, attrs) in [
        golden!(
            "vxlan.json",
            &go,
            attrs(v4, None, Some("vxlan"), [Some(MAC4), None])
        ),
        golden!(
            "vxlan-dual.json",
            &go,
            attrs(v4, v6, Some("vxlan"), [Some(MAC4), Some(MAC6)])
        ),
        golden!("host-gw.json", &go, attrs(v4, None, Some("host-gw"), none)),
        golden!(
            "host-gw-dual.json",
            &go,
            attrs(v4, v6, Some("host-gw"), none)
        ),
        golden!(
            "wireguard-dual.json",
            &go,
            attrs(v4, v6, Some("wireguard"), [Some(KEY4), Some(KEY6)])
        ),
        golden!("ipip.json", &go, attrs(v4, None, Some("ipip"), none)),
        golden!("ipsec.json", &go, attrs(v4, None, Some("ipsec"), none)),
        golden!("udp.json", &go, attrs(v4, None, None, none)),
        golden!(
            "with-node-id.json",
            &ours,
            attrs(v4, None, Some("host-gw"), none)
        ),
        golden!(
            "v6-only.json",
            &ours,
            attrs(None, v6, Some("vxlan"), [None, Some(MAC6)])
        ),
    ] {
        assert_eq!(
            lease_value(node, None, &attrs).expect(file),
            bytes,
            "{file}"
        );
        let record = parse_lease_value(bytes.as_bytes()).expect(file);
        assert_eq!(record.attrs, attrs, "{file}");
        assert_eq!(&record.node_id().expect(file), node, "{file}");
        assert_eq!(record.node.is_some(), !node.is_derived(), "{file}");
    }
}

#[test]
fn text_of_other_programs_is_escaped_as_go_does() {
    let data = "\"a<b> & \u{2028}c\\n\"";
    let attrs = attrs(Some("1.2.3.4"), None, Some("extension"), [Some(data), None]);
    let bytes = include_str!("golden/lease/extension.json");
    assert_eq!(
        lease_value(&derived("1.2.3.4"), None, &attrs).expect("writable"),
        bytes
    );
    let read = parse_lease_value(bytes.as_bytes()).expect("readable");
    let text = |attrs: &LeaseAttrs| {
        let data = attrs.backend_data.v4.as_ref().expect("data");
        data.decode::<String>().expect("a string")
    };
    assert_eq!(text(&read.attrs), text(&attrs));
}

fn read(text: &str) -> LeaseRecord {
    parse_lease_value(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn values_are_read_as_leniently_as_in_go() {
    let none = [None, None];
    let host_gw = attrs(Some("1.2.3.4"), None, Some("host-gw"), none);
    for text in [
        r#"{"BackendType":"host-gw","PublicIP":"1.2.3.4"}"#,
        r#" {"publicip" : "1.2.3.4", "BACKENDTYPE":"host-gw", "x":[{"PublicIP":null}]} "#,
        r#"{"PublicIP":"9.9.9.9","BackendType":"host-gw","BackendType":null,"PUBLICIP":"1.2.3.4"}"#,
        r#"{"PublicIP":"1.2.3.4","PublicIPv6":"::","Bac\u212aendType":"Host-GW"}"#,
        r#"{"PublicIP":"1.2.3.4","BackendType":"host-gw","NodeID":null}"#,
    ] {
        let record = read(text);
        assert_eq!(record.attrs, host_gw, "{text}");
        assert_eq!(record.node_id(), Ok(derived("1.2.3.4")), "{text}");
    }
    assert_eq!(read("{}"), LeaseRecord::default());
    assert_eq!(read("{}").node_id(), Err(Error::NoIdentity));
    assert_eq!(
        read(r#"{"PublicIP":"0.0.0.0","PublicIPv6":null}"#),
        LeaseRecord::default()
    );
    assert_eq!(
        read(r#"{"PublicIPv6":"FD00:0::1"}"#).node_id(),
        Ok(derived("fd00::1"))
    );
    let mapped = attrs(None, Some("::ffff:1.2.3.4"), None, none);
    assert_eq!(read(r#"{"PublicIPv6":"1.2.3.4"}"#).attrs, mapped);
    let null = attrs(None, None, None, [Some("null"), None]);
    assert_eq!(read(r#"{"BackendData": null }"#).attrs, null);
    assert_eq!(
        parse_lease_value(b"{\"PublicIP\":\"1.2.3.4\",\"x\":\"\xff\"}").map(|r| r.attrs),
        Ok(attrs(Some("1.2.3.4"), None, None, none))
    );
}

#[test]
fn broken_values_are_refused_by_name() {
    let long = format!(
        r#"{{"BackendData":"{}"}}"#,
        "x".repeat(BackendData::MAX_LEN)
    );
    let huge = " ".repeat(70_000);
    for (text, message) in [
        ("", "the lease value is not a JSON object: "),
        ("null", "the lease value is not a JSON object: "),
        (
            r#"{"PublicIP":"1.2.3.4"}}"#,
            "the lease value is not a JSON object: ",
        ),
        (
            r#"{"PublicIP":null}"#,
            "PublicIP = null: must be an IPv4 address",
        ),
        (
            r#"{"PublicIP":"fd00::1"}"#,
            r#"PublicIP = "fd00::1": must be an IPv4 address"#,
        ),
        (
            r#"{"PublicIP":"x","PublicIP":"1.2.3.4"}"#,
            r#"PublicIP = "x": must be"#,
        ),
        (
            r#"{"PublicIPv6":""}"#,
            r#"PublicIPv6 = "": must be an IPv6 address or null"#,
        ),
        (
            r#"{"PublicIPv6":7}"#,
            "PublicIPv6 = 7: must be an IPv6 address or null",
        ),
        (r#"{"BackendType":7}"#, "BackendType = 7: must be a string"),
        (
            r#"{"BackendType":"a b"}"#,
            r#"BackendType = "a b": the backend type "a b" may hold"#,
        ),
        (
            r#"{"PublicIP":"1.2.3.4","NodeID":""}"#,
            r#"NodeID = "": the node id must have"#,
        ),
        (
            r#"{"PublicIP":"1.2.3.4","NodeID":"ip=1.2.3.5"}"#,
            r#"NodeID = "ip=1.2.3.5": "#,
        ),
        (
            r#"{"PublicIP":"1.2.3.4","NodeID":"a","Instance":"b"}"#,
            r#"Instance = "b": the instance id must have 32 characters, not 1"#,
        ),
        (
            r#"{"PublicIP":"1.2.3.4","NodeID":{}}"#,
            "NodeID = {}: must be a string",
        ),
        (&long, "BackendData = …: backend data has 16386 bytes"),
        (
            &huge,
            "the lease value has 70000 bytes, more than the 65536",
        ),
    ] {
        match parse_lease_value(text.as_bytes()) {
            Ok(record) => panic!("{text} was read as {record:?}"),
            Err(error) => {
                assert!(
                    error.to_string().starts_with(message),
                    "{text}\n  said {error}"
                );
            }
        }
    }
}

#[test]
fn values_that_would_be_read_as_something_else_are_not_written() {
    let none = [None, None];
    let ours = node("a");
    let compatible = attrs(None, Some("::1.2.3.4"), None, none);
    assert!(matches!(
        lease_value(&ours, None, &compatible),
        Err(Error::Member { .. })
    ));
    let v6 = attrs(None, Some("fd00::1"), None, none);
    assert!(lease_value(&derived("fd00::1"), None, &v6).is_ok());
    assert!(matches!(
        lease_value(&derived("1.2.3.4"), None, &v6),
        Err(Error::Identity { .. })
    ));
    let both = attrs(Some("1.2.3.4"), Some("fd00::1"), None, none);
    assert!(lease_value(&derived("1.2.3.4"), None, &both).is_ok());
    assert!(matches!(
        lease_value(&derived("fd00::1"), None, &both),
        Err(Error::Identity { .. })
    ));
    let swelling = format!("\"{}\"", "<".repeat(10_000));
    let swelling = attrs(None, None, None, [None, Some(&swelling)]);
    assert!(matches!(
        lease_value(&ours, None, &swelling),
        Err(Error::TooLong { .. })
    ));
}

fn subnets(list: &[&str]) -> DualStack<Subnet> {
    DualStack::of_subnets(list.iter().map(|text| text.parse().expect("a subnet")))
}

#[test]
fn keys_are_flannels() {
    for (key, expected) in [
        ("10.5.1.0-24", &["10.5.1.0/24"][..]),
        (
            "10.12.13.0-24&fd00:12:13::-56",
            &["10.12.13.0/24", "fd00:12:13::/56"],
        ),
        ("10.5.1.0-31", &["10.5.1.0/31"]),
        ("10.5.1.0-24&fd00::-127", &["10.5.1.0/24", "fd00::/127"]),
        ("10.5.1.0-24&::-64", &["10.5.1.0/24", "::/64"]),
    ] {
        let expected = subnets(expected);
        assert_eq!(parse_subnet_key(key), Ok(expected), "{key}");
        assert_eq!(subnet_key(&expected).as_deref(), Ok(key));
        let whole = format!("/coreos.com/network/subnets/{key}");
        assert_eq!(parse_subnet_key(&whole), Ok(expected), "{whole}");
    }
    // What Go reads although it never writes it.
    for (key, expected) in [
        ("junk10.5.1.0-24", &["10.5.1.0/24"][..]),
        ("7.10.5.1.0-24", &["10.5.1.0/24"]),
        ("a&10.5.1.0-24", &["10.5.1.0/24"]),
        ("é10.5.1.0-024&fd00:0::-064", &["10.5.1.0/24", "fd00::/64"]),
    ] {
        assert_eq!(parse_subnet_key(key), Ok(subnets(expected)), "{key}");
    }
}

#[test]
fn what_is_no_lease_key_is_refused() {
    for key in [
        "",
        "-",
        "&",
        "10",
        "10.12.13.0",
        "10.12.13-24",
        "10.12.13.300-24",
        "10.12.13.0-24hi",
        "&2001::-56",
        "10.12.13.0-24&:12:13:-56",
        "10.12.13.0-24&20011::-56",
        "10.12.13.0-24&2001-56",
        "10.12.13.0-24&2001::",
        "10.12.13.0-24&2001::-56hi",
        "10.5.1.7-24",
        "0.0.0.0-0",
        "0.0.0.0-0&fd00::-64",
        "10.5.1.0-24&::-0",
        "10.5.1.0-32",
        "10.5.1.0-24&fd00::-128",
        "10.5.1.0-24&FD00::-64",
        "10.5.1.0-24/extra",
        "10.5.01.0-24",
        "10.5.1.0-24&fd00::1-64",
        "10.5.1.0-24&",
        "10.5.1.0-",
        "10.5.1.0-+24",
        "10.5.1.0-256",
        "config",
        "fd00::-64",
        "99910.5.1.0-24",
        "10.5.1.0-24&1.2.3.4-96x",
    ] {
        match parse_subnet_key(key) {
            Ok(subnets) => panic!("{key} was read as {subnets}"),
            Err(error) => assert!(matches!(error, Error::Key { .. }), "{key}: {error}"),
        }
    }
    assert!(matches!(
        parse_subnet_key(&"1".repeat(2000)),
        Err(Error::TooLong { .. })
    ));
}

#[test]
fn keys_that_go_cannot_read_are_not_written() {
    for list in [
        &[][..],
        &["fd00::/64"],
        &["0.0.0.0/0"],
        &["0.0.0.0/0", "fd00::/64"],
        &["10.5.1.0/32"],
        &["10.5.1.0/24", "fd00::/128"],
        &["10.5.1.0/24", "::/0"],
        &["10.5.1.0/24", "::ffff:10.5.0.0/112"],
        &["10.5.1.0/24", "::10.5.0.0/112"],
    ] {
        let result = subnet_key(&subnets(list));
        assert!(
            matches!(result, Err(Error::Unwritable { .. })),
            "{list:?}: {result:?}"
        );
    }
    let swapped = DualStack::v4("fd00::/64".parse().expect("a subnet"));
    assert!(subnet_key(&swapped).is_err());
}

fn any_attrs() -> impl Strategy<Value = LeaseAttrs> {
    let data = || {
        prop::option::of(prop_oneof![
            "[a-zA-Z0-9 <>&\u{2028}\"\\\\\n]{0,40}"
                .prop_map(|text| BackendData::encode(&text).expect("short")),
            any::<u64>().prop_map(|n| BackendData::encode(&n).expect("short")),
            Just(BackendData::from_json("null").expect("JSON")),
            Just(BackendData::from_json(MAC4).expect("JSON")),
        ])
    };
    (
        prop::option::of(any::<u32>()),
        prop::option::of(prop_oneof![any::<u128>(), (0u128..1 << 50)]),
        prop::option::of("[a-z0-9_-]{1,32}"),
        data(),
        data(),
    )
        .prop_map(|(v4, v6, backend, data4, data6)| LeaseAttrs {
            public_ip: PublicIp::new(
                v4.map(Ipv4Addr::from_bits)
                    .filter(|ip| !ip.is_unspecified()),
                v6.map(Ipv6Addr::from_bits),
            ),
            backend_type: backend.map(|name| BackendType::new(name).expect("a type")),
            backend_data: DualStack::new(data4, data6),
        })
}

fn any_node(attrs: &LeaseAttrs) -> impl Strategy<Value = NodeId> + use<> {
    let ip = attrs.public_ip.ips().next();
    ("[a-zA-Z0-9._:-]{1,40}", any::<bool>()).prop_map(move |(id, derived)| match ip {
        Some(ip) if derived => NodeId::from_public_ip(ip),
        _ => NodeId::new(id).expect("a node id"),
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(
        (attrs, node) in any_attrs().prop_flat_map(|attrs| {
            let node = any_node(&attrs);
            (Just(attrs), node)
        }),
        instance in prop::option::of(any::<u128>().prop_map(InstanceId::from_bits)),
    ) {
        let dotted = attrs.public_ip.v6.is_some_and(|ip| {
            ip.is_unspecified() || (0x0100_0000..=0xffff_ffff).contains(&ip.to_bits())
        });
        match lease_value(&node, instance, &attrs) {
            Err(error) => prop_assert!(dotted, "{}", error),
            Ok(value) => {
                prop_assert!(!dotted);
                let unescaped = value.contains(['<', '>', '&', '\u{2028}', '\n']);
                prop_assert!(!unescaped);
                let read = parse_lease_value(value.as_bytes()).expect("what we wrote");
                prop_assert_eq!(read.node_id(), Ok(node.clone()));
                let written = instance.filter(|_| !node.is_derived());
                prop_assert_eq!(read.instance, written);
                prop_assert_eq!(read.attrs.public_ip, attrs.public_ip);
                prop_assert_eq!(&read.attrs.backend_type, &attrs.backend_type);
                let meaning = |attrs: &LeaseAttrs| {
                    let [a, b] = [&attrs.backend_data.v4, &attrs.backend_data.v6].map(|data| {
                        data.as_ref().map(|data| data.decode::<serde_json::Value>().expect("JSON"))
                    });
                    (a, b)
                };
                prop_assert_eq!(meaning(&read.attrs), meaning(&attrs));
                prop_assert_eq!(lease_value(&node, instance, &read.attrs), Ok(value));
            }
        }
    }

    #[test]
    fn a_written_key_is_read_back(subnets in dual_subnet()) {
        if let Ok(key) = subnet_key(&subnets) {
            prop_assert_eq!(parse_subnet_key(&key), Ok(subnets));
        } else {
            let plain = |ip: IpAddr| matches!(ip, IpAddr::V6(ip) if ip.segments()[..5] != [0; 5]);
            let writable = subnets.v4.is_some_and(|v4| (1..32).contains(&v4.len()))
                && subnets.v6.is_none_or(|v6| (1..128).contains(&v6.len()) && plain(v6.address()));
            prop_assert!(!writable);
        }
    }

    #[test]
    fn a_key_that_is_read_names_subnets_of_both_kinds(key in "[0-9a-f.:&/-]{0,30}") {
        if let Ok(subnets) = parse_subnet_key(&key) {
            prop_assert!(subnets.check_families().is_ok() && subnets.v4.is_some());
        }
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), text in ".{0,100}") {
        let _ = parse_lease_value(&bytes);
        let _ = parse_lease_value(text.as_bytes());
        let _ = parse_subnet_key(&text);
        let _ = parse_subnet_key(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn no_members_panic(names in prop::collection::vec(
        prop::sample::select(vec!["PublicIP", "PublicIPv6", "BackendType", "BackendData",
            "BackendV6Data", "NodeID", "Instance", "other"]), 0..8),
        values in prop::collection::vec(prop_oneof![
            Just("null".to_owned()), Just("\"1.2.3.4\"".to_owned()), Just("\"::1\"".to_owned()),
            Just("\"\\ud800\"".to_owned()), Just("1e999999".to_owned()), Just("{}".to_owned()),
            ".{0,20}".prop_map(|text| format!("{text:?}")),
        ], 8))
    {
        let members: Vec<String> = names.iter().zip(&values)
            .map(|(name, value)| format!("\"{name}\":{value}")).collect();
        let _ = parse_lease_value(format!("{{{}}}", members.join(",")).as_bytes());
    }
}
