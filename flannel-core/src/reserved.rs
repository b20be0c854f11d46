//! Address ranges that no network and no node's subnet may lie in: hosts give them a meaning of
//! their own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::subnet::Subnet;

/// The ranges of IPv4, with what they are for (RFC 6890, RFC 5771).
const V4: [(Ipv4Addr, u8, &str); 4] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8, "is for \"this network\""),
    (Ipv4Addr::new(127, 0, 0, 0), 8, "is for loopback"),
    (Ipv4Addr::new(169, 254, 0, 0), 16, "is link-local"),
    (Ipv4Addr::new(224, 0, 0, 0), 4, "is for multicast"),
];

/// The ranges of IPv6 (RFC 4291).
const V6: [(Ipv6Addr, u8, &str); 3] = [
    (Ipv6Addr::UNSPECIFIED, 8, "is for loopback and mapped IPv4"),
    (
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0),
        10,
        "is link-local",
    ),
    (
        Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0),
        8,
        "is for multicast",
    ),
];

/// The ranges that a function of their prefix picks, the first of them.
fn find(picks: impl Fn(&Subnet) -> bool) -> Option<(Subnet, &'static str)> {
    let v4 = V4
        .iter()
        .map(|(ip, len, what)| (IpAddr::V4(*ip), *len, *what));
    let v6 = V6
        .iter()
        .map(|(ip, len, what)| (IpAddr::V6(*ip), *len, *what));
    v4.chain(v6).find_map(|(ip, len, what)| {
        let range = Subnet::new(ip, len).ok()?;
        picks(&range).then_some((range, what))
    })
}

/// The reserved range that a subnet lies in, and what it is for.
pub(crate) fn around(subnet: &Subnet) -> Option<(Subnet, &'static str)> {
    find(|range| range.contains(subnet))
}

/// Whether a subnet has an address of a reserved range.
pub(crate) fn touches(subnet: &Subnet) -> bool {
    find(|range| range.overlaps(subnet)).is_some()
}
