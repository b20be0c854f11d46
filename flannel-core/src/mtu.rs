//! How much of a packet an encapsulation takes, and how small a network may get.

use crate::family::Family;

/// The smallest MTU an IPv6 link may have (RFC 8200, section 5).
pub const MIN_IPV6: u32 = 1280;

/// The smallest MTU on which we build an IPv4 overlay: what every host must accept
/// (RFC 791, section 3.1).
pub const MIN_IPV4: u32 = 576;

/// The smallest usable MTU of an overlay of a family.
pub const fn min(family: Family) -> u32 {
    match family {
        Family::V4 => MIN_IPV4,
        Family::V6 => MIN_IPV6,
    }
}

/// The length of an outer IP header without options or extensions.
const fn ip_header(family: Family) -> u32 {
    match family {
        Family::V4 => 20,
        Family::V6 => 40,
    }
}

/// What VXLAN adds to an inner IP packet: inner Ethernet (14), VXLAN (8), UDP (8) and the outer IP
/// header (RFC 7348, section 5): 50 bytes over IPv4, 70 over IPv6.
pub const fn vxlan_overhead(underlay: Family) -> u32 {
    14 + 8 + 8 + ip_header(underlay)
}

/// What a UDP datagram adds to the IP packet in it: UDP (8) and the outer IP header: 28 bytes over
/// IPv4, 48 over IPv6.
pub const fn udp_overhead(underlay: Family) -> u32 {
    8 + ip_header(underlay)
}
