//! Subnets and network configs.

use flannel_core::{DualStack, Family, NetworkConfig, PoolMode, Subnet};
use proptest::prelude::*;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Either family.
pub fn family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::V4), Just(Family::V6)]
}

/// Any address of a family, the ends of its space among them.
pub fn ip(family: Family) -> impl Strategy<Value = IpAddr> {
    let bits = prop_oneof![
        8 => any::<u128>(),
        1 => Just(0),
        1 => Just(u128::MAX),
    ];
    bits.prop_map(move |bits| match family {
        #[allow(clippy::cast_possible_truncation, reason = "any 32 bits will do")]
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(bits as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(bits)),
    })
}

/// Any subnet of a family, of any length.
pub fn subnet(family: Family) -> impl Strategy<Value = Subnet> {
    (ip(family), 0..=family.bits())
        .prop_filter_map("a subnet", |(ip, len)| Subnet::new(ip, len).ok())
}

/// Any subnet inside another, of any length.
pub fn subnet_within(network: Subnet) -> impl Strategy<Value = Subnet> {
    let family = network.family();
    (any::<u128>(), network.len()..=family.bits()).prop_filter_map(
        "a subnet inside",
        move |(n, len)| {
            let host_bits = u32::from(family.bits() - network.len());
            let offset = n & 1u128
                .checked_shl(host_bits)
                .map_or(u128::MAX, |size| size - 1);
            Subnet::new(network.nth(offset)?, len).ok()
        },
    )
}

/// The text of a valid config without a backend, and what it says: the networks and the lengths.
///
/// The networks lie anywhere and hold from four subnets to very many.
pub fn config_json() -> impl Strategy<Value = String> {
    let half = |family: Family| {
        let bits = family.bits();
        (1..=bits - 4)
            .prop_flat_map(move |network_len| {
                (Just(network_len), network_len + 2..=bits - 2, ip(family))
            })
            .prop_filter_map("not the empty network", |(network_len, len, ip)| {
                Some((Subnet::new(ip, network_len).ok()?, len))
            })
    };
    (half(Family::V4), half(Family::V6), 1..4).prop_map(|((v4, len4), (v6, len6), which)| {
        format!(
            r#"{{"EnableIPv4":{},"Network":"{v4}","SubnetLen":{len4},"EnableIPv6":{},"IPv6Network":"{v6}","IPv6SubnetLen":{len6}}}"#,
            which & 1 != 0,
            which & 2 != 0,
        )
    })
}

/// A valid config of either or both families, whose subnets a store chooses.
pub fn network_config() -> impl Strategy<Value = NetworkConfig> {
    config_json().prop_filter_map("a valid config", |text| {
        NetworkConfig::from_json(&text, PoolMode::Allocated).ok()
    })
}

/// One subnet of either or both families.
pub fn dual_subnet() -> impl Strategy<Value = DualStack<Subnet>> {
    (subnet(Family::V4), subnet(Family::V6), 1..4).prop_map(|(v4, v6, which)| {
        DualStack::new(
            (which & 1 != 0).then_some(v4),
            (which & 2 != 0).then_some(v6),
        )
    })
}
