//! [`Ownership`]: which of the kernel's objects are ours.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::clock::stable_hash;
use crate::node::OverlayName;
use crate::object::{IfName, RouteProtocol};
use crate::subnet::Subnet;

/// Whose an observed object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// Bears our mark: we keep it right and remove it when it is no longer wanted.
    Ours,
    /// Go flannel's: taken over where it is wanted, removed where it is not.
    Flannel,
    /// Anybody else's: reported when it stands in the way, never touched.
    Foreign,
}

/// By what a fresh process knows its own objects again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ownership {
    /// The overlay's name: in the alias of our devices and in the ids of our nexthops.
    pub overlay: OverlayName,
    /// The protocol number of our routes, nexthops and neighbours.
    pub protocol: RouteProtocol,
    /// The networks of the overlay, past and present: a route of ours has its destination here.
    pub networks: Vec<Subnet>,
    /// Whether what Go flannel left is taken over.
    pub adopt_flannel: bool,
}

/// The id of the nexthop object for a gateway: found again by any later process, and proof that
/// the object is this overlay's.
///
/// Gateways that differ in no more than 29 neighbouring bits (the subnets of one pool, the hosts
/// of one link) never share an id on one device. The three highest bits tell our ids by family and
/// `onlink`, so they never share one across these either; ids below 2^31 are left to others.
pub fn nexthop_id(overlay: &OverlayName, gateway: IpAddr, dev: IfName, onlink: bool) -> u32 {
    const BITS: u32 = 29;
    const MASK: u32 = (1 << BITS) - 1;
    let (mut rest, family) = match gateway {
        IpAddr::V4(ip) => (u128::from(ip.to_bits()), 0),
        IpAddr::V6(ip) => (ip.to_bits(), 1),
    };
    // Folding by exclusive or keeps any 29 neighbouring bits apart.
    let mut folded = 0;
    while rest != 0 {
        folded ^= rest & u128::from(MASK);
        rest >>= BITS;
    }
    let folded = u32::try_from(folded).unwrap_or_default();
    let salt = stable_hash(format!("{overlay}/{dev}").as_bytes());
    #[allow(clippy::cast_possible_truncation, reason = "any 29 bits of the hash will do")]
    let mut id = (folded ^ salt as u32) & MASK;
    // Odd factors and exclusive shifts can be undone, so different inputs stay different.
    id = id.wrapping_mul(0x0d16_8aab) & MASK;
    id ^= id >> 15;
    id = id.wrapping_mul(0x1b87_3593) & MASK;
    0x8000_0000 | family << 30 | u32::from(onlink) << 29 | id
}
