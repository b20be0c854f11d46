//! How much of a packet an encapsulation takes, and how small a network may get.

use crate::backend::{self, Note};
use crate::config;
use crate::family::Family;
use crate::underlay::External;

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

/// The largest inner packet of a family where an outer one takes `overhead` bytes more: of outer
/// packets that are never larger than the external interface carries, whatever `Backend.MTU` says.
///
/// # Errors
/// If what remains is less than the family needs: [`backend::Error::Config`] where that is so on every
/// host, [`backend::Error::Underlay`] where it is this host's external interface.
pub fn inner(
    configured: Option<u32>,
    external: u32,
    family: Family,
    overhead: u32,
) -> backend::Result<u32> {
    let needed = min(family) + overhead;
    if let Some(mtu) = configured.filter(|mtu| *mtu < needed) {
        return Err(config::Error::key(
            "Backend.MTU",
            mtu.to_string(),
            format!(
                "leaves {} bytes for {family} packets, which need {}: an outer MTU of at least \
                 {needed} is needed",
                mtu.saturating_sub(overhead),
                min(family),
            ),
        )
        .into());
    }
    if external < needed {
        return Err(backend::Error::Underlay {
            reason: format!(
                "the external interface carries packets of {external} bytes, which leaves {} for \
                 {family} packets, which need {}: an MTU of at least {needed} is needed",
                external.saturating_sub(overhead),
                min(family),
            ),
        });
    }
    Ok(configured.map_or(external, |mtu| mtu.min(external)) - overhead)
}

/// What is worth telling of a `Backend.MTU` that is larger than the external interface carries.
pub fn note(configured: Option<u32>, external: &External) -> Option<Note> {
    let mtu = configured.filter(|mtu| *mtu > external.mtu)?;
    Some(Note {
        topic: "mtu".to_owned(),
        text: format!(
            "Backend.MTU is {mtu}, but interface {} carries {}: the latter counts",
            external.dev, external.mtu
        ),
    })
}
