//! Configs, keys, leases and backend data.

use super::seed;
use crate::corpus::Entry;

/// Flannel's own, as the core's tests have them.
const VALUES: &[(&str, &str)] = &[
    (
        "extension",
        include_str!("../../../flannel-core/tests/golden/lease/extension.json"),
    ),
    (
        "host-gw",
        include_str!("../../../flannel-core/tests/golden/lease/host-gw.json"),
    ),
    (
        "udp",
        include_str!("../../../flannel-core/tests/golden/lease/udp.json"),
    ),
    (
        "v6-only",
        include_str!("../../../flannel-core/tests/golden/lease/v6-only.json"),
    ),
    (
        "vxlan",
        include_str!("../../../flannel-core/tests/golden/lease/vxlan.json"),
    ),
    (
        "vxlan-dual",
        include_str!("../../../flannel-core/tests/golden/lease/vxlan-dual.json"),
    ),
    (
        "wireguard-dual",
        include_str!("../../../flannel-core/tests/golden/lease/wireguard-dual.json"),
    ),
    (
        "with-node-id",
        include_str!("../../../flannel-core/tests/golden/lease/with-node-id.json"),
    ),
];

const ODD_VALUES: &[(&str, &str)] = &[
    (
        "ok-any-case",
        r#"{"PUBLICIP":"1.2.3.4","backendtype":"VXLAN","bac\u212aenddata":{"a":[1.50,1e400]}}"#,
    ),
    (
        "ok-last-wins",
        r#"{"PublicIP":"1.2.3.4","PublicIP":"1.2.3.5","BackendType":"","BackendType":null}"#,
    ),
    (
        "ok-mapped",
        r#"{"PublicIP":"0.0.0.0","PublicIPv6":"::ffff:1.2.3.4"}"#,
    ),
    (
        "ok-compatible",
        r#"{"PublicIP":"1.2.3.4","PublicIPv6":"::1.2.3.4"}"#,
    ),
    ("ok-nobody", "{}"),
    (
        "ok-half-surrogate",
        r#"{"PublicIP":"1.2.3.4","BackendData":"\ud800<&>"}"#,
    ),
    (
        "ok-spaces",
        "{ \"PublicIP\" : \"1.2.3.4\" ,\n \"BackendData\" : { \"a b\" : \" \\\" \" } }",
    ),
    ("bad-cut", r#"{"PublicIP":"1.2.3.4","BackendData":{"VNI":1"#),
    ("bad-ip", r#"{"PublicIP":"1.2.3.4.5"}"#),
    ("bad-v6", r#"{"PublicIP":"1.2.3.4","PublicIPv6":7}"#),
    (
        "bad-type",
        r#"{"PublicIP":"1.2.3.4","BackendType":"a type of more than thirty-two bytes"}"#,
    ),
    (
        "bad-node-id",
        r#"{"PublicIP":"1.2.3.4","NodeID":"ip=1.2.3.4"}"#,
    ),
    ("bad-array", "[]"),
    ("bad-behind", "{}{}"),
];

const CONFIGS: &[(&str, &str)] = &[
    ("ok-small", r#"{"Network":"10.5.0.0/16"}"#),
    (
        "ok-vxlan",
        r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":5,"Port":4789,"MTU":1500,"GBP":true,"Learning":false,"DirectRouting":true}}"#,
    ),
    (
        "ok-dual",
        r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","IPv6SubnetLen":64,"EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#,
    ),
    (
        "ok-v6-only",
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}"#,
    ),
    (
        "ok-v6-whole",
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetLen":124,"IPv6SubnetMin":"fc00:0:0:5::10","IPv6SubnetMax":"fc00:0:0:8::20"}"#,
    ),
    (
        "ok-range",
        r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0","SubnetLen":28}"#,
    ),
    ("ok-smallest", r#"{"Network":"10.0.0.0/28"}"#),
    ("ok-largest", r#"{"Network":"0.0.0.0/1","SubnetLen":3}"#),
    (
        "ok-any-case",
        r#"{"Networ\u212a":"10.3.0.0/16","\u017fubnetLen":26,"BACKEND":{"TYPE":"VXLAN","vni":null}}"#,
    ),
    (
        "ok-last-wins",
        r#"{"Network":"10.4.0.0/16","network":"10.3.0.0/16","SubnetLen":27,"SUBNETLEN":26}"#,
    ),
    (
        "ok-junk-beside",
        r#"{"Network":"10.3.0.0/16","Networks":[{}],"Foo":1e999999,"SubnetLength":"x"}"#,
    ),
    (
        "ok-assigned",
        r#"{"Network":"10.0.0.0/31","SubnetLen":99,"SubnetMin":"9.9.9.9"}"#,
    ),
    (
        "bad-too-small",
        r#"{"Network":"10.0.0.0/29","SubnetLen":30}x"#,
    ),
    ("bad-everything", r#"{"Network":"0.0.0.0/0"}"#),
    ("bad-no-family", r#"{"EnableIPv4":false}"#),
    (
        "bad-v4-as-v6",
        r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"10.0.0.0/16"}"#,
    ),
    (
        "bad-backend",
        r#"{"Network":"10.0.0.0/16","Backend":{"Type":""}}"#,
    ),
    (
        "bad-null-backend",
        r#"{"Network":"10.0.0.0/16","Backend":null}"#,
    ),
    ("bad-deep", "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["),
];

const KEYS: &[(&str, &str)] = &[
    ("ok-v4", "10.5.1.0-24"),
    ("ok-dual", "10.5.1.0-24&fd00:5:0:1::-64"),
    ("ok-path", "/coreos.com/network/subnets/10.5.1.0-24"),
    ("ok-junk-before", "x&y10.5.1.0-24"),
    ("ok-dots-before", "1.2.3.10.5.1.0-24"),
    ("ok-long-zeros", "10.0.0.0-08"),
    ("ok-shortest", "128.0.0.0-1&8000::-1"),
    ("ok-longest", "10.5.1.2-31&fd00::2-127"),
    ("ok-compatible", "10.5.1.0-24&::1:0:0-96"),
    ("bad-host-bits", "10.5.1.1-24"),
    ("bad-everything", "0.0.0.0-0"),
    ("bad-single", "10.5.1.0-32"),
    ("bad-v6-only", "fd00:5:0:1::-64"),
    ("bad-v6-length", "10.5.1.0-24&fd00::-128"),
    ("bad-name", "config"),
    ("bad-empty", ""),
    ("bad-number", "10.5.1.0-256"),
    ("bad-octet", "10.5.1.256-24"),
];

const LEASES: &[(&str, &str)] = &[
    (
        "ok-whole",
        r#"{"key":"10.5.1.0-24","node":"node-1","subnet":"10.5.1.0/24","ipv6_subnet":"fd00:5:0:1::/64","attrs":{"PublicIP":"1.2.3.4","PublicIPv6":"fd00::1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"NodeID":"node-1"},"ttl_seconds":86400,"created":5,"revision":7}"#,
    ),
    (
        "ok-derived",
        r#"{"key":"k","subnet":"10.5.1.0/24","attrs":{"PublicIP":"1.2.3.4"}}"#,
    ),
    (
        "ok-no-subnet",
        r#"{"key":"","node":"n","attrs":{},"ttl_seconds":18446744073709551615,"created":18446744073709551615}"#,
    ),
    (
        "ok-state",
        r#"{"lease":{"key":"k","node":"n","subnet":"10.5.1.0/24","attrs":{"PublicIP":"1.2.3.4","BackendData":"<\u2028>"}},"config":"{\"Network\":\"10.5.0.0/16\"}","networks":["10.5.0.0/16","fd00:5::/48"]}"#,
    ),
    (
        "bad-families",
        r#"{"key":"k","node":"n","subnet":"fd00::/64","attrs":{}}"#,
    ),
    (
        "bad-nobody",
        r#"{"key":"k","subnet":"10.5.1.0/24","attrs":{}}"#,
    ),
    (
        "bad-attrs",
        r#"{"key":"k","node":"n","attrs":{"PublicIP":7}}"#,
    ),
    (
        "bad-twice",
        r#"{"key":"k","key":"l","node":"n","attrs":{}}"#,
    ),
    ("bad-empty-state", r#"{"networks":[]}"#),
];

const DATA: &[(&str, &str)] = &[
    ("ok-vxlan", r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#),
    (
        "ok-vxlan-dotted",
        r#"{"vtepmac":"c6d2.326f.8f44","x":[],"vni":16777215}"#,
    ),
    (
        "ok-vxlan-dashes",
        r#"{"VtepMAC":"C6-D2-32-6F-8F-44","VNI":null}"#,
    ),
    (
        "ok-vxlan-twice",
        r#"{"VNI":1,"VNI":2,"VtepMAC":"c6:d2:32:6f:8f:44","VtepMAC":null}"#,
    ),
    (
        "ok-nobodys-mac",
        r#"{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}"#,
    ),
    ("ok-group-mac", r#"{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}"#),
    (
        "ok-big-vni",
        r#"{"VNI":4294967296,"VtepMAC":"c6:d2:32:6f:8f:44"}"#,
    ),
    (
        "ok-wireguard",
        r#"{"PublicKey":"xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=","Port":51820}"#,
    ),
    ("ok-null", "null"),
    ("ok-spaces", " { \"a\" : [ 1 , 2.50 , \" \\\\\\\" \" ] } "),
    ("ok-number", "-0.0e-9999"),
    ("ok-text", r#""a\u003cb\ud800""#),
    ("bad-empty", ""),
    ("bad-cut", r#"{"VNI":1,"#),
    ("bad-quotes", "{'VNI':1}"),
    ("bad-two", "{} {}"),
    ("bad-nan", "NaN"),
];

pub(super) fn seeds() -> Vec<(&'static str, Entry)> {
    let mut seeds = Vec::new();
    let mut add = |target, list: &[(&str, &str)]| {
        seeds.extend(list.iter().map(|(name, text)| seed(target, *name, *text)));
    };
    add("network_config", CONFIGS);
    add("lease_key", KEYS);
    add("lease_value", ODD_VALUES);
    add("lease_json", LEASES);
    add("backend_data", DATA);
    for (name, value) in VALUES {
        seeds.push(seed("lease_value", format!("ok-{name}"), *value));
    }
    seeds.extend(peers());
    seeds
}

fn peers() -> impl Iterator<Item = (&'static str, Entry)> {
    let vxlan = |ip: &str, mac: &str| {
        format!(
            r#"{{"PublicIP":"{ip}","PublicIPv6":"2001:db8::2","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        )
    };
    let (key, ip, mac) = (
        "10.5.2.0-24&fd00:5:0:2::-64",
        "192.0.2.2",
        "0e:00:00:00:00:02",
    );
    let record =
        |name: &str, key: &str, value: String| seed("peer", name, format!("{key}\n{value}"));
    [
        record("ok-dual", key, vxlan(ip, mac)),
        record("ok-v4", "10.5.2.0-24", vxlan(ip, mac)),
        record("ok-quarter", "10.5.64.0-18", vxlan(ip, mac)),
        record("ok-far", key, vxlan("198.51.100.7", mac)),
        record("ok-one-half", "11.0.0.0-8&fd00:5:0:2::-64", vxlan(ip, mac)),
        record("bad-everything", "0.0.0.0-1&8000::-1", vxlan(ip, mac)),
        record("bad-half-the-world", "128.0.0.0-1", vxlan(ip, mac)),
        record("bad-half-the-network", "10.5.128.0-17", vxlan(ip, mac)),
        record("bad-outside", "192.168.1.0-24", vxlan(ip, mac)),
        record("bad-our-subnet", "10.5.1.128-25", vxlan(ip, mac)),
        record("bad-our-address", "10.5.2.0-24", vxlan("192.0.2.1", mac)),
        record("bad-inside-address", "10.5.2.0-24", vxlan("10.5.3.1", mac)),
        record("bad-group-address", "10.5.2.0-24", vxlan("224.0.0.1", mac)),
        record(
            "bad-type",
            key,
            vxlan(ip, mac).replace("vxlan", "wireguard"),
        ),
        record("bad-nobody", key, "{}".to_owned()),
    ]
    .into_iter()
}
