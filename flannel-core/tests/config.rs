//! The network config: flannel's own table of examples, every rule, and no panic on any text.

use flannel_core::{
    BackendType, DualStack, Family, NetworkConfig, Pool, PoolMode, Subnet, config::Error,
};
use flannel_testkit::strategies::config::config_json;
use proptest::prelude::*;

fn parse(text: &str) -> Result<NetworkConfig, Error> {
    NetworkConfig::from_json(text, PoolMode::Allocated)
}

/// The error of a text that must be refused, as its user reads it.
fn refused(text: &str) -> String {
    match parse(text) {
        Ok(config) => panic!("{text} was accepted as {config:?}"),
        Err(error) => error.to_string(),
    }
}

fn ends(pool: &Pool) -> (u8, String, String) {
    let (first, last) = pool.range().expect("the pool is allocated from");
    (
        first.len(),
        first.address().to_string(),
        last.address().to_string(),
    )
}

#[test]
fn derived_values_are_flannels() {
    for (network, len, min, max) in [
        ("10.3.0.0/16", 24, "10.3.1.0", "10.3.255.0"),
        ("10.0.0.0/22", 24, "10.0.1.0", "10.0.3.0"),
        ("10.0.0.0/23", 25, "10.0.0.128", "10.0.1.128"),
        ("10.0.0.0/28", 30, "10.0.0.4", "10.0.0.12"),
        ("255.255.0.0/16", 24, "255.255.1.0", "255.255.255.0"),
    ] {
        let config = parse(&format!(r#"{{"network":"{network}"}}"#)).expect(network);
        let pool = config.pools().v4.expect("IPv4 is on by default");
        assert_eq!(ends(&pool), (len, min.to_owned(), max.to_owned()));
        assert_eq!(config.families().collect::<Vec<_>>(), [Family::V4]);
    }
    for (network, len, min, max) in [
        ("fc00::/48", 64, "fc00:0:0:1::", "fc00:0:0:ffff::"),
        ("fd00::/63", 65, "fd00::8000:0:0:0", "fd00:0:0:1:8000::"),
        ("fd00::/124", 126, "fd00::4", "fd00::c"),
    ] {
        let text = format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}"}}"#);
        let config = parse(&text).expect(network);
        let pool = config.pools().v6.expect("IPv6 is on");
        assert_eq!(ends(&pool), (len, min.to_owned(), max.to_owned()));
        assert_eq!(config.families().collect::<Vec<_>>(), [Family::V6]);
    }
}

#[test]
fn given_values_are_kept() {
    let config = parse(
        r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0","SubnetLen":28}"#,
    );
    let pool = config.expect("valid").pools().v4.expect("IPv4 is on");
    assert_eq!(ends(&pool), (28, "10.3.5.0".into(), "10.3.8.0".into()));

    let config =
        parse(r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.5.0"}"#);
    let pool = config
        .expect("one subnet is enough")
        .pools()
        .v4
        .expect("IPv4 is on");
    assert_eq!(ends(&pool), (24, "10.3.5.0".into(), "10.3.5.0".into()));

    let config = parse(
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetLen":124,
            "IPv6SubnetMin":"fc00:0:0:1::","IPv6SubnetMax":"fc00:0:0:f::"}"#,
    );
    let pool = config.expect("valid").pools().v6.expect("IPv6 is on");
    let expected = (124, "fc00:0:0:1::".into(), "fc00:0:0:f::".into());
    assert_eq!(ends(&pool), expected);
}

#[test]
fn values_that_say_nothing_are_as_if_absent() {
    let plain = parse(r#"{"Network":"10.3.0.0/16"}"#).expect("valid");
    for text in [
        r#"{"Network":"10.3.1.5/16"}"#,
        r#"{"Network":"10.3.0.0/16","SubnetLen":0}"#,
        r#"{"Network":"10.3.0.0/16","SubnetLen":null}"#,
        r#"{"Network":"10.3.0.0/16","SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0"}"#,
        r#"{"Network":"10.3.0.0/16","IPv6SubnetMin":"::","IPv6SubnetMax":null}"#,
        r#"{"Network":"10.3.0.0/16","EnableIPv4":null,"EnableIPv6":null,"EnableNFTables":null}"#,
        r#"{"Network":"10.3.0.0/16","Networks":[{}],"Foo":1e999999,"SubnetLength":"x"}"#,
        "\t{ \"Network\" :\n\"10.3.0.0/16\" }\r\n",
    ] {
        let config = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(config.pools(), plain.pools(), "{text}");
        assert_eq!(config.text(), text);
    }
}

#[test]
fn keys_match_as_in_go() {
    for text in [
        r#"{"NETWORK":"10.3.0.0/16","subnetlen":26}"#,
        r#"{"Networ\u212a":"10.3.0.0/16","\u017fubnetLen":26}"#,
        r#"{"Network":"10.4.0.0/16","network":"10.3.0.0/16","SubnetLen":27,"SUBNETLEN":26}"#,
        r#"{"Network":"10.3.0.0/16","SubnetLen":26,"SubnetLen":null}"#,
        r#"{"Network":"10.3.0.0/16","SubnetLen":26,"SubnetMin":"10.3.9.0","SubnetMin":"0.0.0.0"}"#,
    ] {
        let config = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let pool = config.pools().v4.expect("IPv4 is on");
        let expected = (26, "10.3.0.64".into(), "10.3.255.192".into());
        assert_eq!(ends(&pool), expected, "{text}");
    }
    let text = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48",
                   "IPv6SubnetMin":"fd00:0:0:9::","IPv6SubnetMin":null}"#;
    let pool = parse(text).expect("valid").pools().v6.expect("IPv6 is on");
    assert_eq!(ends(&pool).1, "fd00:0:0:1::");
}

#[test]
fn every_broken_rule_names_key_value_and_rule() {
    let v4 = |rest: &str| format!(r#"{{"Network":"10.0.0.0/16",{rest}}}"#);
    let v6 = |rest: &str| {
        format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48",{rest}}}"#)
    };
    let net6 = |network: &str| {
        format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":{network}}}"#)
    };
    let cases: Vec<(String, &str)> = vec![
        (
            "{}".into(),
            "Network = missing: must be an IPv4 network such as 10.5.0.0/16, unless EnableIPv4 is false",
        ),
        (r#"{"Network":"0.0.0.0/0"}"#.into(), "Network = missing: "),
        (
            r#"{"Network":null}"#.into(),
            "Network = null: must be an IPv4 network",
        ),
        (
            r#"{"Network":""}"#.into(),
            r#"Network = "": must be an IPv4 network"#,
        ),
        (
            r#"{"Network":"fd00::/48"}"#.into(),
            r#"Network = "fd00::/48": must be an IPv4 network"#,
        ),
        (
            r#"{"Network":"10.0.0.0"}"#.into(),
            r#"Network = "10.0.0.0": must be an IPv4"#,
        ),
        (
            r#"{"Network":"10.0.0.0/33"}"#.into(),
            r#"Network = "10.0.0.0/33": must be"#,
        ),
        (
            r#"{"Network":7}"#.into(),
            "Network = 7: must be an IPv4 network",
        ),
        (
            r#"{"Network":"x","Network":"10.0.0.0/16"}"#.into(),
            r#"Network = "x": must be"#,
        ),
        (
            r#"{"Network":"10.0.0.0/29"}"#.into(),
            "Network = 10.0.0.0/29: is too small: use a /28 or larger",
        ),
        (
            r#"{"Network":"10.0.0.0/24","SubnetLen":25}"#.into(),
            "SubnetLen = 25: must be at least 26, so that the network 10.0.0.0/24 holds four subnets",
        ),
        (
            v4(r#""SubnetLen":31"#),
            "SubnetLen = 31: must be at most 30",
        ),
        (
            v4(r#""SubnetLen":18446744073709551615"#),
            "SubnetLen = 18446744073709551615: must be at most 30",
        ),
        (
            v4(r#""SubnetLen":18446744073709551616"#),
            "SubnetLen = 18446744073709551616: must be a whole number",
        ),
        (
            v4(r#""SubnetLen":-1"#),
            "SubnetLen = -1: must be a whole number",
        ),
        (
            v4(r#""SubnetLen":24.0"#),
            "SubnetLen = 24.0: must be a whole number",
        ),
        (
            v4(r#""SubnetLen":1e1"#),
            "SubnetLen = 1e1: must be a whole number",
        ),
        (
            v4(r#""SubnetLen":"24""#),
            r#"SubnetLen = "24": must be a whole number"#,
        ),
        (
            v4(r#""SubnetLen":[24]"#),
            "SubnetLen = [24]: must be a whole number",
        ),
        (
            v4(r#""SubnetMin":"10.1.0.0""#),
            "SubnetMin = 10.1.0.0: must lie in the network 10.0.0.0/16",
        ),
        (
            v4(r#""SubnetMax":"9.0.0.0""#),
            "SubnetMax = 9.0.0.0: must lie in the network 10.0.0.0/16",
        ),
        (
            v4(r#""SubnetMin":"10.0.1.1""#),
            "SubnetMin = 10.0.1.1: must be the start of a /24 subnet, such as 10.0.1.0",
        ),
        (
            v4(r#""SubnetMax":"10.0.8.9""#),
            "SubnetMax = 10.0.8.9: must be the start of a /24 subnet, such as 10.0.8.0",
        ),
        (
            v4(r#""SubnetMin":"10.0.9.0","SubnetMax":"10.0.8.0""#),
            "SubnetMin = 10.0.9.0: must not lie behind SubnetMax (10.0.8.0)",
        ),
        (
            v4(r#""SubnetMin":null"#),
            "SubnetMin = null: must be an IPv4 address",
        ),
        (
            v4(r#""SubnetMin":"""#),
            r#"SubnetMin = "": must be an IPv4 address"#,
        ),
        (
            v4(r#""SubnetMax":"::""#),
            r#"SubnetMax = "::": must be an IPv4 address"#,
        ),
        (
            v4(r#""EnableIPv4":"true""#),
            r#"EnableIPv4 = "true": must be true or false"#,
        ),
        (
            v4(r#""EnableNFTables":1"#),
            "EnableNFTables = 1: must be true or false",
        ),
        (
            v4(r#""IPv6Network":null"#),
            "IPv6Network = null: must be an IPv6 network",
        ),
        (
            v4(r#""IPv6Network":"10.0.0.0/16""#),
            r#"IPv6Network = "10.0.0.0/16": must be an IPv6 network such as fd00:5::/48"#,
        ),
        (
            v4(r#""EnableIPv4":false"#),
            "EnableIPv4 = false: must be true unless EnableIPv6 is",
        ),
        (
            v4(r#""EnableIPv6":true"#),
            "IPv6Network = missing: must be an IPv6 network",
        ),
        (net6(r#""::/0""#), "IPv6Network = missing: "),
        (
            net6(r#""fd00::/125""#),
            "IPv6Network = fd00::/125: is too small: use a /124 or larger",
        ),
        (
            v6(r#""IPv6SubnetLen":127"#),
            "IPv6SubnetLen = 127: must be at most 126",
        ),
        (
            v6(r#""IPv6SubnetLen":49"#),
            "IPv6SubnetLen = 49: must be at least 50",
        ),
        (
            v6(r#""IPv6SubnetMin":"""#),
            r#"IPv6SubnetMin = "": must be an IPv6 address"#,
        ),
        (
            v6(r#""IPv6SubnetMin":"fe00::""#),
            "IPv6SubnetMin = fe00::: must lie in the network fd00::/48",
        ),
        (
            v6(r#""IPv6SubnetMax":"fe00::""#),
            "IPv6SubnetMax = fe00::: must lie in the network fd00::/48",
        ),
        (
            v6(r#""IPv6SubnetMin":"fd00::1""#),
            "IPv6SubnetMin = fd00::1: must be the start of a /64 subnet, such as fd00::",
        ),
        (
            v6(r#""IPv6SubnetMax":"fd00::1""#),
            "IPv6SubnetMax = fd00::1: must be the start of a /64 subnet",
        ),
        (v4(r#""Backend":null"#), "Backend = null: names no backend"),
        (
            v4(r#""Backend":{}"#),
            "Backend.Type = missing: names no backend",
        ),
        (
            v4(r#""Backend":{"Type":""}"#),
            "Backend.Type = missing: names no backend",
        ),
        (
            v4(r#""Backend":{"Type":5}"#),
            "Backend.Type = a number: must be a string",
        ),
        (
            v4(r#""Backend":{"Type":"a b"}"#),
            "Backend.Type = a b: the backend type",
        ),
        (
            v4(r#""Backend":"vxlan""#),
            r#"Backend = a string: must be an object"#,
        ),
        ("null".into(), "the network config is not a JSON object: "),
        ("[]".into(), "the network config is not a JSON object: "),
        (String::new(), "the network config is not a JSON object: "),
        (
            r#"{"Network":"10.0.0.0/16"}x"#.into(),
            "the network config is not a JSON object: ",
        ),
        (
            "\u{feff}{}".into(),
            "the network config is not a JSON object: it begins with a byte-order mark",
        ),
        (
            " ".repeat(70_000),
            "the network config is not a JSON object: it has 70000 bytes",
        ),
    ];
    for (text, message) in cases {
        let error = refused(&text);
        assert!(
            error.starts_with(message),
            "{text}\n  said {error}\n  want {message}"
        );
    }
}

#[test]
fn assigned_pools_have_only_a_network() {
    let text = r#"{"Network":"10.0.0.0/31","SubnetLen":99,"SubnetMin":"9.9.9.9"}"#;
    let config = NetworkConfig::from_json(text, PoolMode::Assigned).expect("valid");
    let network: Subnet = "10.0.0.0/31".parse().expect("a subnet");
    let pool = config.pools().v4.expect("IPv4 is on");
    assert_eq!((pool.network(), pool.range()), (network, None));
    assert_eq!(config.mode(), PoolMode::Assigned);
    assert!(NetworkConfig::from_json("{}", PoolMode::Assigned).is_err());
}

#[test]
fn both_families_have_their_pools() {
    let text = r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","EnableNFTables":true}"#;
    let config = parse(text).expect("valid");
    let networks = config.pools().map(|_, pool| pool.network().to_string());
    assert_eq!(
        networks,
        DualStack::both("10.0.0.0/16".into(), "fd00::/48".into())
    );
    assert!(config.nftables());
}

#[test]
fn absent_backend_is_udp() {
    let config = parse(r#"{"Network":"10.0.0.0/16"}"#).expect("valid");
    assert_eq!(*config.backend().backend_type(), BackendType::udp());
    assert_eq!(config.backend().u32("Port", 8285, 1..=65535), Ok(8285));
}

#[test]
fn backend_keys_are_read_as_in_go() {
    let text = r#"{"Network":"10.0.0.0/16","Backend":{"type":"host-gw"},"Backend":{"TYPE":"VXLAN",
        "vni":7,"VNI":null,"Port":1,"port":4789,"GBP":true,"psk":"s\u0065cret","MTU":0,
        "Learning":"yes","Big":4294967296,"Float":1.0,"Key":["s3cret"],"Low":9,"low":1}}"#;
    let config = parse(text).expect("valid");
    let backend = config.backend();
    assert_eq!(*backend.backend_type(), BackendType::vxlan());
    assert_eq!(backend.u32("VNI", 1, 0..=0xff_ffff), Ok(7));
    assert_eq!(backend.u32("Port", 0, 0..=65535), Ok(4789));
    assert_eq!(backend.u32("Absent", 99, 0..=1), Ok(99));
    assert_eq!(backend.u32("Low", 0, 0..=8), Ok(1));
    assert_eq!(backend.bool("gbp", false), Ok(true));
    assert_eq!(backend.bool("DirectRouting", true), Ok(true));
    assert_eq!(backend.string("PSK"), Ok(Some("secret".to_owned())));
    assert_eq!(backend.string("Mode"), Ok(None));
    for (error, message) in [
        (
            backend.u32("MTU", 0, 576..=65535).unwrap_err(),
            "Backend.MTU = 0: must be a whole number from 576 to 65535",
        ),
        (
            backend.u32("Big", 0, 0..=u32::MAX).unwrap_err(),
            "Backend.Big = 4294967296: must be a whole number from 0 to 4294967295",
        ),
        (
            backend.u32("Float", 0, 0..=9).unwrap_err(),
            "Backend.Float = 1.0: must be a whole number from 0 to 9",
        ),
        (
            backend.bool("Learning", false).unwrap_err(),
            r#"Backend.Learning = "yes": must be true or false, without quotes"#,
        ),
        (
            backend.string("Key").unwrap_err(),
            "Backend.Key = an array or object: must be a string",
        ),
    ] {
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn debug_output_shows_no_secret() {
    let text = r#"{"Network":"10.0.0.0/16","Backend":{"Type":"wireguard","PSK":"s3cret"}}"#;
    let shown = format!("{:?}", parse(text).expect("valid"));
    assert!(
        shown.contains("PSK") && !shown.contains("s3cret"),
        "{shown}"
    );
}

/// JSON-like text: pieces that a config is made of, in any order.
fn almost_config() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "null",
        "true",
        "false",
        "0",
        "24",
        "-1",
        "1e9",
        "24.0",
        "\"Network\":",
        "\"SubnetLen\":",
        "\"SubnetMin\":",
        "\"SubnetMax\":",
        "\"EnableIPv6\":",
        "\"IPv6Network\":",
        "\"IPv6SubnetLen\":",
        "\"IPv6SubnetMin\":",
        "\"Backend\":",
        "\"Type\":",
        "\"vxlan\"",
        "\"10.0.0.0/8\"",
        "\"255.255.255.255\"",
        "\"fd00::/1\"",
        "\"ffff::\"",
        "\"\\ud800\"",
        "\"",
    ]);
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

/// A JSON value of any kind for a key of the config.
fn any_value() -> impl Strategy<Value = String> {
    use std::net::{Ipv4Addr, Ipv6Addr};
    prop_oneof![
        any::<u64>().prop_map(|n| n.to_string()),
        (0u8..140).prop_map(|n| n.to_string()),
        any::<f64>().prop_map(|n| format!("{n:?}")),
        Just("null".to_owned()),
        (any::<u32>(), 0u8..40)
            .prop_map(|(ip, len)| format!("\"{}/{len}\"", Ipv4Addr::from_bits(ip))),
        any::<u32>().prop_map(|ip| format!("\"{}\"", Ipv4Addr::from_bits(ip))),
        (any::<u128>(), 0u8..140)
            .prop_map(|(ip, len)| format!("\"{}/{len}\"", Ipv6Addr::from_bits(ip))),
        any::<u128>().prop_map(|ip| format!("\"{}\"", Ipv6Addr::from_bits(ip))),
    ]
}

proptest! {
    #[test]
    fn no_text_panics(text in ".{0,200}", mixed in almost_config()) {
        for mode in [PoolMode::Allocated, PoolMode::Assigned] {
            for text in [&text, &mixed] {
                let _ = NetworkConfig::from_json(text, mode);
            }
        }
    }

    #[test]
    fn no_values_panic(values in prop::collection::vec(any_value(), 7)) {
        let text = format!(
            r#"{{"EnableIPv6":true,"Network":{},"SubnetLen":{},"SubnetMin":{},"SubnetMax":{},"IPv6Network":{},"IPv6SubnetLen":{},"IPv6SubnetMin":{}}}"#,
            values[0], values[1], values[2], values[3], values[4], values[5], values[6]
        );
        let _ = parse(&text);
    }

    #[test]
    fn an_accepted_pool_is_sound(text in config_json()) {
        let config = match parse(&text) {
            Ok(config) => config,
            Err(error) => {
                let is_reserved = error.to_string().contains("choose another network");
                prop_assert!(is_reserved, "{}: {}", text, error);
                return Ok(());
            }
        };
        for (family, pool) in config.pools().iter() {
            let (first, last) = pool.range().expect("the pool is allocated from");
            prop_assert_eq!(pool.network().family(), family);
            prop_assert!(pool.network().contains(&first) && pool.network().contains(&last));
            prop_assert!(first < last && first.len() == last.len());
            prop_assert!(first.len() >= pool.network().len() + 2);
            prop_assert!(pool.fits(&first) && pool.fits(&last));
        }
    }
}

#[test]
fn a_network_in_a_reserved_range_is_refused_and_every_other_one_is_taken() {
    let v4 = |network: &str| parse(&format!(r#"{{"Network":"{network}"}}"#));
    let v6 = |network: &str| {
        parse(&format!(
            r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}"}}"#
        ))
    };
    for reserved in [
        "0.0.0.0/8",
        "0.7.0.0/16",
        "127.0.0.0/8",
        "127.9.0.0/16",
        "169.254.0.0/16",
        "169.254.128.0/20",
        "224.0.0.0/4",
        "239.255.0.0/16",
    ] {
        let error = v4(reserved).expect_err(reserved).to_string();
        assert!(
            error.starts_with("Network = ") && error.contains("10.5.0.0/16"),
            "{error}"
        );
    }
    for reserved in [
        "::/8",
        "::ffff:10.5.0.0/112",
        "fe80::/10",
        "fe80:5::/32",
        "ff00::/8",
        "ff05::/16",
    ] {
        let error = v6(reserved).expect_err(reserved).to_string();
        assert!(
            error.starts_with("IPv6Network = ") && error.contains("fd00:5::/48"),
            "{error}"
        );
    }
    for taken in [
        "1.0.0.0/8",
        "10.5.0.0/16",
        "100.64.0.0/10",
        "126.0.0.0/8",
        "128.0.0.0/1",
        "169.253.0.0/16",
        "192.0.2.0/24",
        "240.0.0.0/4",
        "255.255.0.0/16",
    ] {
        assert!(v4(taken).is_ok(), "{taken}");
    }
    for taken in [
        "100::/8",
        "2001:db8::/32",
        "fc00::/7",
        "fec0::/10",
        "8000::/1",
    ] {
        assert!(v6(taken).is_ok(), "{taken}");
    }
    let assigned = NetworkConfig::from_json(r#"{"Network":"127.0.0.0/8"}"#, PoolMode::Assigned);
    assert!(assigned.is_err(), "whoever assigns the subnets");
}

#[test]
fn a_backend_reads_every_kind_of_scalar_as_go_does() {
    let text = r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "x",
        "Interval": -25, "interval": 9223372036854775807, "Low": -9223372036854775808,
        "Most": 18446744073709551615, "Zero": -0, "Ratio": 0.5, "Exp": 1e3, "Huge": 1e400,
        "Quoted": "7", "None": null, "On": true, "Over": 18446744073709551616,
        "Mixed": 1, "MIXED": 1.5}}"#;
    let config = NetworkConfig::from_json(text, PoolMode::Allocated).expect("valid");
    let backend = config.backend();
    assert_eq!(
        backend.i64("Interval"),
        Ok(Some(i64::MAX)),
        "the last entry counts"
    );
    assert_eq!(backend.i64("Low"), Ok(Some(i64::MIN)));
    assert_eq!(backend.i64("Zero"), Ok(Some(0)));
    assert_eq!(backend.u64("Most"), Ok(Some(u64::MAX)));
    assert_eq!(backend.f64("Ratio"), Ok(Some(0.5)));
    assert_eq!(backend.f64("Exp"), Ok(Some(1000.0)));
    assert_eq!(backend.f64("Most"), Ok(Some(18_446_744_073_709_551_615.0)));
    for absent in ["None", "Absent"] {
        assert_eq!(backend.i64(absent), Ok(None));
        assert_eq!(backend.u64(absent), Ok(None));
        assert_eq!(backend.f64(absent), Ok(None));
    }
    for (key, shown) in [
        ("Exp", "1e3"),
        ("Most", "18446744073709551615"),
        ("Mixed", "1.5"),
    ] {
        let error = backend.i64(key).expect_err("no i64").to_string();
        assert!(error.contains(key) && error.contains(shown), "{error}");
    }
    for key in ["Low", "Zero", "Over", "Ratio"] {
        backend.u64(key).expect_err("no u64");
    }
    backend.f64("Huge").expect_err("infinite");
    for key in ["Quoted", "On"] {
        backend.i64(key).expect_err("no number");
        let error = backend.f64(key).expect_err("no number").to_string();
        assert!(!error.contains('7'), "a text may be a secret: {error}");
    }
}
