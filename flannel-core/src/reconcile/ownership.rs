//! [`Ownership`]: which of the kernel's objects are ours.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::known::KnownLink;
use crate::clock::stable_hash;
use crate::kernel::Observed;
use crate::node::OverlayName;
use crate::object::{
    IfName, Link, LinkKind, Nexthop, Object, ObjectKey, Route, RouteProtocol, RouteTarget,
};
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
    /// Devices that are ours whatever became of their alias.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub known: Vec<KnownLink>,
}

/// The alias of every overlay's devices begins with this.
const ALIAS_PREFIX: &str = "flannel:";

impl Ownership {
    /// Whose an object is.
    ///
    /// | object | ours | Go flannel's |
    /// | --- | --- | --- |
    /// | device | its alias is that of the overlay, or it is [known](Self::known) | VXLAN without alias, named `flannel.<VNI>` or `flannel-v6.<VNI>` |
    /// | address | inside the networks, on our device | the same on Go flannel's device |
    /// | setting, packet path with its peers, forwarding entry, neighbour | on our device | on Go flannel's device |
    /// | nexthop object | our protocol, and its id is [`nexthop_id`] of what it holds | never |
    /// | route | our protocol, inside the networks, not through a device or nexthop of another overlay | protocol `boot`, inside the networks, gateway on-link on our device or Go flannel's |
    ///
    /// Everything else is foreign. Go flannel's column counts only with
    /// [`adopt_flannel`](Self::adopt_flannel).
    pub fn owner(&self, object: &Object, observed: &Observed) -> Owner {
        match object {
            Object::Link(link) => self.link_owner(link, observed),
            Object::Address(address) => {
                if self.holds_ip(address.ip) {
                    self.device_owner(address.dev, observed)
                } else {
                    Owner::Foreign
                }
            }
            Object::Sysctl(_)
            | Object::Offload(_)
            | Object::Tunnel(_)
            | Object::TunnelPeer(_)
            | Object::Fdb(_)
            | Object::Neighbour(_) => object
                .dev()
                .map_or(Owner::Foreign, |dev| self.device_owner(dev, observed)),
            Object::Nexthop(nexthop) => self.nexthop_owner(nexthop),
            Object::Route(route) => self.route_owner(route, observed),
        }
    }

    /// Tells if a foreign object is ours but for its protocol number, which somebody changed, by the rest
    /// of its mark: the id of a nexthop object, which follows from what it holds; the way of a route,
    /// when it is through a device or nexthop object of ours. `wanted` is what we want under its key.
    pub fn lost_its_number(&self, wanted: &Object, found: &Object, observed: &Observed) -> bool {
        match (wanted, found) {
            (Object::Nexthop(_), Object::Nexthop(found)) => self.has_our_id(found),
            (Object::Route(wanted), Object::Route(found)) if wanted.target == found.target => {
                match found.target {
                    RouteTarget::Gateway { dev, .. } | RouteTarget::Device(dev) => {
                        self.device_owner(dev, observed) == Owner::Ours
                    }
                    RouteTarget::Nexthop(id) => {
                        let nexthop = observed.objects.get(&ObjectKey::Nexthop(id));
                        matches!(nexthop, Some(Object::Nexthop(nexthop)) if self.has_our_id(nexthop))
                    }
                    RouteTarget::Blackhole | RouteTarget::Paths(_) | RouteTarget::Other(_) => false,
                }
            }
            _ => false,
        }
    }

    /// Whether a foreign object may be taken over because its very key is wanted. Nothing but its
    /// place tells that it is ours to change; therefore it is never removed as unwanted.
    ///
    /// - A nexthop object of our protocol: one of ours that somebody gave another gateway. Not if
    ///   it leads through another overlay's device.
    /// - A route of Go flannel's `host-gw` or direct routing: its gateway is a node on the underlay,
    ///   as an administrator's may be. Only where it leads to the very node that the wanted route
    ///   leads to, which the plan knows; it then gets our mark, and nobody sees a difference.
    pub fn may_take_over(&self, object: &Object, observed: &Observed) -> bool {
        match object {
            Object::Nexthop(nexthop) => {
                nexthop.protocol == self.protocol
                    && !self.is_of_another_overlay(nexthop.dev, observed)
            }
            Object::Route(Route {
                dst,
                protocol: RouteProtocol::BOOT,
                target: RouteTarget::Gateway { onlink: false, .. },
                ..
            }) => self.adopt_flannel && self.holds(dst),
            _ => false,
        }
    }

    fn holds(&self, subnet: &Subnet) -> bool {
        self.networks.iter().any(|network| network.contains(subnet))
    }

    fn holds_ip(&self, ip: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains_ip(ip))
    }

    fn link_owner(&self, link: &Link, observed: &Observed) -> Owner {
        let alias = link.alias.as_deref().unwrap_or_default();
        if is_alias_of(alias, &self.overlay)
            || self.known.iter().any(|known| known.is(link, observed))
        {
            return Owner::Ours;
        }
        match &link.kind {
            LinkKind::Vxlan(vxlan)
                if self.adopt_flannel
                    && alias.is_empty()
                    && is_flannel_name(link.name, vxlan.vni) =>
            {
                Owner::Flannel
            }
            _ => Owner::Foreign,
        }
    }

    fn device_owner(&self, dev: IfName, observed: &Observed) -> Owner {
        match observed.objects.get(&ObjectKey::Link(dev)) {
            Some(Object::Link(link)) => self.link_owner(link, observed),
            _ => Owner::Foreign,
        }
    }

    fn nexthop_owner(&self, nexthop: &Nexthop) -> Owner {
        let ours = nexthop.protocol == self.protocol && self.has_our_id(nexthop);
        if ours { Owner::Ours } else { Owner::Foreign }
    }

    fn has_our_id(&self, nexthop: &Nexthop) -> bool {
        let Nexthop {
            gateway,
            dev,
            onlink,
            ..
        } = *nexthop;
        nexthop.id == nexthop_id(&self.overlay, gateway, dev, onlink)
    }

    fn route_owner(&self, route: &Route, observed: &Observed) -> Owner {
        if !self.holds(&route.dst) {
            return Owner::Foreign;
        }
        if route.protocol == self.protocol {
            return if self.is_through_another_overlay(&route.target, observed) {
                Owner::Foreign
            } else {
                Owner::Ours
            };
        }
        match route.target {
            RouteTarget::Gateway {
                dev, onlink: true, ..
            } if self.adopt_flannel
                && route.protocol == RouteProtocol::BOOT
                && self.device_owner(dev, observed) != Owner::Foreign =>
            {
                Owner::Flannel
            }
            _ => Owner::Foreign,
        }
    }

    fn is_through_another_overlay(&self, target: &RouteTarget, observed: &Observed) -> bool {
        let dev = match target {
            RouteTarget::Gateway { dev, .. } | RouteTarget::Device(dev) => *dev,
            RouteTarget::Nexthop(id) => match observed.objects.get(&ObjectKey::Nexthop(*id)) {
                Some(Object::Nexthop(nexthop)) => nexthop.dev,
                _ => return false,
            },
            RouteTarget::Paths(paths) => {
                let mut paths = paths.iter();
                return paths.any(|path| self.is_of_another_overlay(path.dev, observed));
            }
            RouteTarget::Blackhole | RouteTarget::Other(_) => return false,
        };
        self.is_of_another_overlay(dev, observed)
    }

    fn is_of_another_overlay(&self, dev: IfName, observed: &Observed) -> bool {
        matches!(observed.objects.get(&ObjectKey::Link(dev)),
            Some(Object::Link(Link { alias: Some(alias), .. }))
            if bears_the_mark_of_an_overlay(alias) && !is_alias_of(alias, &self.overlay))
    }
}

/// Tells if an alias is the mark of an overlay, of whichever.
pub(super) fn bears_the_mark_of_an_overlay(alias: &str) -> bool {
    alias.starts_with(ALIAS_PREFIX)
}

fn is_alias_of(alias: &str, overlay: &OverlayName) -> bool {
    alias.strip_prefix(ALIAS_PREFIX) == Some(overlay.as_str())
}

/// Whether a name is one that Go flannel gives to a VXLAN device of this VNI.
fn is_flannel_name(name: IfName, vni: u32) -> bool {
    ["flannel.", "flannel-v6."]
        .into_iter()
        .any(|prefix| name.as_str().strip_prefix(prefix) == Some(&vni.to_string()))
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
    #[allow(
        clippy::cast_possible_truncation,
        reason = "any 29 bits of the hash will do"
    )]
    let mut id = (folded ^ salt as u32) & MASK;
    // Odd factors and exclusive shifts can be undone, so different inputs stay different.
    id = id.wrapping_mul(0x0d16_8aab) & MASK;
    id ^= id >> 15;
    id = id.wrapping_mul(0x1b87_3593) & MASK;
    0x8000_0000 | family << 30 | u32::from(onlink) << 29 | id
}
