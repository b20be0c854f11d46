//! Leases, honest and hostile, and the histories of stores that hold them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use flannel_core::{
    BackendData, BackendType, DualStack, Family, Lease, LeaseAttrs, LeaseKey, NodeId, PublicIp,
    Revision, Subnet,
};
use proptest::prelude::*;

use super::config::{ip, subnet, subnet_within};
use crate::permute::History;

/// The key of a record; few, so that records are written more than once.
pub fn lease_key() -> impl Strategy<Value = LeaseKey> {
    (0..8_u8).prop_map(|n| LeaseKey::new(format!("key{n}")))
}

/// The id of a node; few, so that nodes hold more than one record.
pub fn node_id() -> impl Strategy<Value = NodeId> {
    prop_oneof![
        4 => (0..6_u8).prop_map(|n| NodeId::new(format!("node{n}"))).prop_filter_map("an id", Result::ok),
        1 => (1..6_u8).prop_map(|n| NodeId::from_public_ip(Ipv4Addr::new(192, 0, 2, n).into())),
    ]
}

/// Addresses of the documentation networks, where peers can be reached.
pub fn public_ip() -> impl Strategy<Value = PublicIp> {
    (1..=254_u8, 1..=u16::MAX).prop_map(|(v4, v6)| {
        DualStack::both(
            Ipv4Addr::new(192, 0, 2, v4),
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, v6),
        )
    })
}

/// Addresses that may be missing or anything, those among them that are nobody's.
pub fn any_public_ip() -> impl Strategy<Value = PublicIp> {
    let odd_v4 = prop::sample::select(vec![
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::BROADCAST,
        Ipv4Addr::new(0, 1, 2, 3),
        Ipv4Addr::new(169, 254, 1, 1),
        Ipv4Addr::new(224, 0, 0, 1),
    ]);
    let odd_v6 = prop::sample::select(vec![
        Ipv6Addr::UNSPECIFIED,
        Ipv6Addr::LOCALHOST,
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
        Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
        Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped(),
    ]);
    (
        prop::option::of(prop_oneof![any::<Ipv4Addr>(), odd_v4]),
        prop::option::of(prop_oneof![any::<Ipv6Addr>(), odd_v6]),
    )
        .prop_map(|(v4, v6)| DualStack::new(v4, v6))
}

/// What a VXLAN node publishes; few MACs, so that nodes collide.
pub fn vxlan_data() -> impl Strategy<Value = BackendData> {
    (0..32_u8)
        .prop_map(|n| format!(r#"{{"VNI":1,"VtepMAC":"0e:00:00:00:00:{n:02x}"}}"#))
        .prop_filter_map("backend data", |text| BackendData::from_json(&text).ok())
}

/// Backend data that may be anything.
pub fn any_backend_data() -> impl Strategy<Value = BackendData> {
    let odd = prop::sample::select(vec![
        "null",
        "{}",
        "[]",
        "0",
        "\"\"",
        r#"{"VNI":1}"#,
        r#"{"VNI":-1,"VtepMAC":"0e:00:00:00:00:01"}"#,
        r#"{"VNI":99999999999,"VtepMAC":"0e:00:00:00:00:01"}"#,
        r#"{"VNI":2,"VtepMAC":"0e:00:00:00:00:01"}"#,
        r#"{"VNI":1,"VtepMAC":""}"#,
        r#"{"VNI":1,"VtepMAC":null}"#,
        r#"{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}"#,
        r#"{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#,
        r#"{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}"#,
        r#"{"VNI":1,"VtepMAC":"0e:00:00:00:00:01:02:03"}"#,
        r#"{"PublicKey":"AAAA","Port":0}"#,
    ]);
    let text = any::<String>().prop_filter_map("text", |text| serde_json::to_string(&text).ok());
    prop_oneof![
        4 => odd.prop_filter_map("data", |text| BackendData::from_json(text).ok()),
        1 => text.prop_filter_map("data", |text| BackendData::from_json(&text).ok()),
        2 => vxlan_data(),
    ]
}

/// Attributes that may be anything.
pub fn any_attrs() -> impl Strategy<Value = LeaseAttrs> {
    let data = || prop::option::of(any_backend_data());
    let backend = prop::sample::select(vec![
        None,
        Some(BackendType::vxlan()),
        Some(BackendType::host_gw()),
        Some(BackendType::udp()),
    ]);
    (any_public_ip(), backend, data(), data()).prop_map(|(public_ip, backend_type, v4, v6)| {
        LeaseAttrs {
            public_ip,
            backend_type,
            backend_data: DualStack::new(v4, v6),
        }
    })
}

fn assemble(
    subnets: impl Strategy<Value = DualStack<Subnet>>,
    attrs: impl Strategy<Value = LeaseAttrs>,
) -> impl Strategy<Value = Lease> {
    let ttl = prop::option::of((0..100_000_u64).prop_map(Duration::from_secs));
    let revisions = (1..20_u64, 0..20_u64);
    (lease_key(), node_id(), subnets, attrs, ttl, revisions).prop_map(
        |(key, node, subnet, attrs, ttl, (created, since))| Lease {
            key,
            node,
            instance: None,
            subnet,
            attrs,
            ttl,
            created: Revision(created),
            revision: Revision(created + since),
        },
    )
}

/// A lease of an honest VXLAN node: one subnet of a given length in each of the networks. Subnets
/// are few, so that they collide.
pub fn honest_lease(networks: DualStack<(Subnet, u8)>) -> impl Strategy<Value = Lease> {
    let subnets = (0..12_usize, 0..12_usize, 1..4_u8).prop_map(move |(v4, v6, which)| {
        let half = |family, n, bit| {
            let (network, len) = *networks.get(family)?;
            let only = networks.families().count() == 1;
            (only || which & bit != 0).then(|| network.subnets(len).nth(n))?
        };
        DualStack::new(half(Family::V4, v4, 1), half(Family::V6, v6, 2))
    });
    let attrs =
        (public_ip(), vxlan_data(), vxlan_data()).prop_map(|(public_ip, v4, v6)| LeaseAttrs {
            public_ip,
            backend_type: Some(BackendType::vxlan()),
            backend_data: DualStack::both(v4, v6),
        });
    assemble(subnets, attrs)
}

/// Any subnet: inside a network with any length, or anywhere, of the family or not.
fn any_subnet(network: Option<Subnet>, family: Family) -> impl Strategy<Value = Subnet> {
    let network = network.unwrap_or_else(|| match family {
        Family::V4 => Subnet::host(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        Family::V6 => Subnet::host(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
    });
    prop_oneof![
        6 => subnet_within(network),
        2 => (0..=network.len()).prop_filter_map("a supernet", move |len| network.supernet(len)),
        2 => subnet(family),
        1 => subnet(Family::V4),
        1 => subnet(Family::V6),
        1 => ip(family).prop_map(Subnet::host),
    ]
}

/// A lease that may claim anything, the networks' subnets above all.
pub fn hostile_lease(networks: DualStack<Subnet>) -> impl Strategy<Value = Lease> {
    let subnets = (
        prop::option::of(any_subnet(networks.v4, Family::V4)),
        prop::option::of(any_subnet(networks.v6, Family::V6)),
    )
        .prop_map(|(v4, v6)| DualStack::new(v4, v6));
    assemble(subnets, any_attrs())
}

/// A history in which such leases are written, rewritten, renewed, deleted and spoilt.
pub fn history(
    lease: impl Strategy<Value = Lease>,
    writes: impl Into<prop::collection::SizeRange>,
) -> impl Strategy<Value = History> {
    prop::collection::vec((lease, 0..10_u8), writes).prop_map(|writes| {
        let mut history = History::new();
        for (lease, what) in writes {
            match what {
                0..6 => history.put(lease),
                6..9 => history.delete(&lease.key),
                _ => history.corrupt(&lease.key),
            }
        }
        history
    })
}
