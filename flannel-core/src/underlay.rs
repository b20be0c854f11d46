//! What we know of the host's own network, and which part of it carries the overlay.

mod choose;
pub(crate) mod in_use;
mod way;

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::family::{Family, PublicIp};
use crate::kernel::Observed;
use crate::object::{IfName, MacAddr, Object, ObjectKey, Route, RoutePath, RouteTarget};
use crate::subnet::Subnet;

pub use in_use::SavedInterface;

/// A link of the host with what an [`Object::Link`] does not say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkInfo {
    /// Its name.
    pub name: IfName,
    /// Its index in the namespace; changes when the device is made again.
    pub index: u32,
    /// The largest packet it carries, in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it has a carrier (`IFF_LOWER_UP`).
    pub running: bool,
    /// Whether it is the loopback device.
    pub loopback: bool,
    /// Its hardware address, if it has one of six bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// The bridge or bond it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub master: Option<IfName>,
}

/// An address of the host with what an [`Object::Address`] does not say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressInfo {
    /// The device.
    pub dev: IfName,
    /// The address.
    pub ip: IpAddr,
    /// The length of its on-link prefix.
    pub prefix_len: u8,
    /// Whether it is meant to be used no further than the link (`RT_SCOPE_LINK` and narrower).
    #[serde(default)]
    pub link_scope: bool,
    /// It may no longer be used for new connections (`IFA_F_DEPRECATED`).
    #[serde(default)]
    pub deprecated: bool,
    /// It does not expire (`IFA_F_PERMANENT`).
    #[serde(default)]
    pub permanent: bool,
    /// IPv6: a temporary address; IPv4: a secondary one (the same flag bit, 0x01).
    #[serde(default)]
    pub temporary: bool,
    /// Duplicate detection has not passed yet, or has failed (`IFA_F_TENTATIVE`,
    /// `IFA_F_DADFAILED`): it cannot be used.
    #[serde(default)]
    pub tentative: bool,
}

/// The host's own network: everything that is not the overlay's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Underlay {
    /// The links, in the kernel's order.
    pub links: Vec<LinkInfo>,
    /// The addresses, in the kernel's order.
    pub addresses: Vec<AddressInfo>,
    /// The routes of the main table.
    pub routes: Vec<Route>,
    /// The networks of the overlay. An address in one of them is a container's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<Subnet>,
    /// The links that lead to containers: they carry an address of the overlay's networks or a route
    /// to a single one, or are a port of a bridge that does.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub inward: BTreeSet<IfName>,
}

/// The external interface: what carries the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct External {
    /// The device; where the default route has several, the first of them.
    pub dev: IfName,
    /// Its index.
    pub index: u32,
    /// The other devices of the default route: packets may leave through any of them, so that a
    /// tunnel is bound to the address alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<IfName>,
    /// The least MTU of these devices, in bytes.
    pub mtu: u32,
    /// The device's own addresses: what outer packets are sent from.
    pub local: PublicIp,
    /// The addresses peers are told: the device's own, unless set otherwise (NAT).
    pub public: PublicIp,
    /// Why this one was chosen, in words.
    pub reason: String,
}

impl std::fmt::Display for External {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.dev)?;
        for other in &self.others {
            write!(f, "+{other}")?;
        }
        let mut ips = self.local.ips().peekable();
        if ips.peek().is_some() {
            let ips: Vec<String> = ips.map(|ip| ip.to_string()).collect();
            write!(f, " ({})", ips.join(", "))?;
        }
        Ok(())
    }
}

/// The result of a choice.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why no external interface can be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no default route to go by.
    #[error("there is no {family} default route: name the interface or its address")]
    NoDefaultRoute {
        /// The family without one.
        family: Family,
    },
    /// The default route is none that leads to a device that we can tell.
    #[error(
        "the {family} default route ({route}) does not say which interface it leads through: name \
         the interface or its address"
    )]
    UnclearDefaultRoute {
        /// The family.
        family: Family,
        /// The route, in words.
        route: String,
    },
    /// The default route leads to containers.
    #[error(
        "the {family} default route leads through {dev}, which is a link of containers: {why}; name \
         the interface if it is the one"
    )]
    Inward {
        /// The family.
        family: Family,
        /// The device.
        dev: IfName,
        /// The reason, in words.
        why: String,
    },
    /// The interface has addresses of the family, and none that other nodes may be told.
    #[error(
        "interface {dev} has no {family} address for other nodes, only {ip}, which is {what}; name \
         that address if it is the one"
    )]
    Unsuitable {
        /// The interface.
        dev: IfName,
        /// The family.
        family: Family,
        /// The address.
        ip: IpAddr,
        /// Why it is not used, in words.
        what: String,
    },
    /// The address of the interface cannot be used yet.
    #[error(
        "the address {ip} of interface {dev} is tentative: duplicate detection has not passed, or has \
         found another host with it"
    )]
    Tentative {
        /// The interface.
        dev: IfName,
        /// The address.
        ip: IpAddr,
    },
    /// The named interface does not exist.
    #[error("there is no interface {name}")]
    NoSuchInterface {
        /// The name given.
        name: IfName,
    },
    /// No interface has the address.
    #[error(
        "no interface has the address {ip}: name the interface as well if the address is behind NAT"
    )]
    NoSuchAddress {
        /// The address given.
        ip: IpAddr,
    },
    /// No interface matches the pattern.
    #[error("no interface has an address or a name that matches {pattern:?}")]
    NoMatch {
        /// The pattern given.
        pattern: String,
    },
    /// The pattern is no regular expression.
    #[error("the interface pattern {pattern:?} is no regular expression: {reason}")]
    Pattern {
        /// The pattern given.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The target cannot be reached.
    #[error("there is no route to {ip}, which the interface should reach")]
    Unreachable {
        /// The address given.
        ip: IpAddr,
    },
    /// The interface has no address that can be used.
    #[error(
        "interface {dev} has no usable {family} address: give it one, or set the public address"
    )]
    NoAddress {
        /// The interface.
        dev: IfName,
        /// The family without one.
        family: Family,
    },
    /// The families lead to different interfaces.
    #[error("IPv4 leads to interface {v4}, IPv6 to {v6}: name the one to use")]
    Disagree {
        /// The interface of IPv4.
        v4: IfName,
        /// The interface of IPv6.
        v6: IfName,
    },
    /// The interface is administratively down.
    #[error("interface {dev} is down")]
    Down {
        /// The interface.
        dev: IfName,
    },
    /// The interface reports no MTU.
    #[error("interface {dev} has MTU 0")]
    NoMtu {
        /// The interface.
        dev: IfName,
    },
    /// Several were tried and none fits.
    #[error("no external interface fits: {}", .tried.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NoneOf {
        /// Why each does not.
        tried: Vec<Self>,
    },
}

impl Error {
    /// Tells if a change of the host's network can help: one that boots gets its interfaces, addresses
    /// and routes later.
    pub fn can_pass(&self) -> bool {
        match self {
            Self::Pattern { .. } => false,
            Self::NoneOf { tried } => tried.iter().any(Self::can_pass),
            Self::NoDefaultRoute { .. }
            | Self::UnclearDefaultRoute { .. }
            | Self::Inward { .. }
            | Self::Unsuitable { .. }
            | Self::Tentative { .. }
            | Self::NoSuchInterface { .. }
            | Self::NoSuchAddress { .. }
            | Self::NoMatch { .. }
            | Self::Unreachable { .. }
            | Self::NoAddress { .. }
            | Self::Disagree { .. }
            | Self::Down { .. }
            | Self::NoMtu { .. } => true,
        }
    }
}

/// One way to point at an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Interface {
    /// By its name.
    Name(IfName),
    /// By one of its addresses, which is then used.
    Address(IpAddr),
    /// By a regular expression, unanchored, over its addresses, then over its name.
    Matching(String),
    /// The one through which this address is reached.
    Reaching(IpAddr),
}

impl std::fmt::Display for Interface {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => write!(f, "the one named {name}"),
            Self::Address(ip) => write!(f, "the one with the address {ip}"),
            Self::Matching(pattern) => write!(f, "the one that matches {pattern:?}"),
            Self::Reaching(ip) => write!(f, "the one that reaches {ip}"),
        }
    }
}

/// What decides the choice of the external interface. By default: the default route.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct UnderlayOptions {
    /// Tried in this order; the first that leads to an interface wins. If none is given, the
    /// public address must be one of an interface; without that, the default route decides.
    pub interfaces: Vec<Interface>,
    /// The addresses that peers are told instead of the interface's own.
    pub public_ip: PublicIp,
}

impl UnderlayOptions {
    /// The interface that the first of these leads to.
    pub fn of(interfaces: impl IntoIterator<Item = Interface>) -> Self {
        Self {
            interfaces: interfaces.into_iter().collect(),
            public_ip: PublicIp::default(),
        }
    }

    /// The same, with what peers are told instead of the interface's own addresses.
    #[must_use]
    pub const fn public_ip(mut self, told: PublicIp) -> Self {
        self.public_ip = told;
        self
    }
}

impl std::fmt::Display for UnderlayOptions {
    /// Says what was asked for, in words: the same for the same options.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let interfaces = self.interfaces.iter().map(ToString::to_string);
        let told = self.public_ip.ips().map(|ip| format!("told as {ip}"));
        let all: Vec<String> = interfaces.chain(told).collect();
        match all.as_slice() {
            [] => f.write_str("the one of the default route"),
            all => f.write_str(&all.join(", ")),
        }
    }
}

/// How a destination is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// On a link of this host, through the device.
    OnLink(IfName),
    /// Through a router.
    Router(IpAddr),
    /// Not at all, or not by a route that we can read.
    None,
}

impl Underlay {
    /// The host's own network out of what was observed: without the overlay's devices (`own_dev`),
    /// what is on them, and without routes to destinations in the overlay's networks, those of now
    /// and those that it had before (`former`).
    pub fn from_observed(
        observed: &Observed,
        networks: &[Subnet],
        former: &[Subnet],
        own_dev: impl Fn(IfName) -> bool,
    ) -> Self {
        let routes = observed.objects.values().filter_map(|object| match object {
            Object::Route(route) => Some(route),
            _ => None,
        });
        let outward = routes
            .clone()
            .filter(|route| !is_inside(networks, &route.dst) && !is_inside(former, &route.dst))
            .filter_map(|route| {
                let mut route = route.clone();
                if let RouteTarget::Nexthop(id) = route.target
                    && let Some(Object::Nexthop(nexthop)) =
                        observed.objects.get(&ObjectKey::Nexthop(id))
                {
                    route.target = RouteTarget::Gateway {
                        gateway: nexthop.gateway,
                        dev: nexthop.dev,
                        onlink: nexthop.onlink,
                    };
                }
                let is_ours = devices(&route.target).any(&own_dev);
                (!is_ours).then_some(route)
            });
        let mut this = Self {
            links: observed
                .links
                .iter()
                .filter(|link| !own_dev(link.name))
                .cloned()
                .collect(),
            addresses: observed
                .addresses
                .iter()
                .filter(|a| !own_dev(a.dev))
                .cloned()
                .collect(),
            routes: outward.collect(),
            networks: networks.to_vec(),
            inward: BTreeSet::new(),
        };
        let to_one = routes.filter_map(|route| match route.target {
            RouteTarget::Device(dev)
                if route.dst.len() == route.dst.family().bits()
                    && is_inside(networks, &route.dst)
                    && !own_dev(dev) =>
            {
                Some(dev)
            }
            _ => None,
        });
        let addresses = this.addresses.iter();
        let with_address = addresses
            .filter(|a| this.is_of_containers(a.ip))
            .map(|a| a.dev);
        let mut inward: BTreeSet<IfName> = to_one.chain(with_address).collect();
        let ports = this.links.iter();
        let ports = ports.filter(|link| link.master.is_some_and(|of| inward.contains(&of)));
        let ports: Vec<IfName> = ports.map(|link| link.name).collect();
        inward.extend(ports);
        this.inward = inward;
        this
    }

    /// Tells if an address is in one of the overlay's networks.
    fn is_of_containers(&self, ip: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains_ip(ip))
    }

    /// The route a packet to this address takes: the longest prefix, then the lowest metric.
    pub fn route_to(&self, ip: IpAddr) -> Option<&Route> {
        self.routes
            .iter()
            .filter(|route| route.dst.contains_ip(ip))
            .min_by_key(|route| (std::cmp::Reverse(route.dst.len()), route.metric))
    }

    /// How an address is reached.
    pub fn reach(&self, ip: IpAddr) -> Reach {
        match self.route_to(ip).map(|route| &route.target) {
            Some(RouteTarget::Device(dev)) => Reach::OnLink(*dev),
            Some(RouteTarget::Gateway { gateway, .. }) => Reach::Router(*gateway),
            Some(RouteTarget::Paths(paths)) => match paths.first() {
                Some(RoutePath {
                    gateway: Some(gateway),
                    ..
                }) => Reach::Router(*gateway),
                Some(RoutePath { gateway: None, dev }) => Reach::OnLink(*dev),
                None => Reach::None,
            },
            Some(RouteTarget::Nexthop(_) | RouteTarget::Blackhole | RouteTarget::Other(_))
            | None => Reach::None,
        }
    }

    /// The link of this name.
    pub fn link(&self, name: IfName) -> Option<&LinkInfo> {
        self.links.iter().find(|link| link.name == name)
    }
}

fn is_inside(networks: &[Subnet], dst: &Subnet) -> bool {
    networks.iter().any(|network| network.contains(dst))
}

/// The devices that packets of a route leave through, as far as it says so.
fn devices(target: &RouteTarget) -> impl Iterator<Item = IfName> + '_ {
    let (one, several) = match target {
        RouteTarget::Gateway { dev, .. } | RouteTarget::Device(dev) => (Some(*dev), &[][..]),
        RouteTarget::Paths(paths) => (None, paths.as_slice()),
        RouteTarget::Nexthop(_) | RouteTarget::Blackhole | RouteTarget::Other(_) => (None, &[][..]),
    };
    one.into_iter().chain(several.iter().map(|path| path.dev))
}

/// Whether other nodes may be told this address: unicast, of more than this host.
fn usable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast() && !ip.is_broadcast()
        }
        // A link-local IPv6 address means nothing without a zone, which a lease cannot carry.
        IpAddr::V6(ip) => {
            !ip.is_unspecified()
                && !ip.is_loopback()
                && !ip.is_multicast()
                && !ip.is_unicast_link_local()
        }
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V4(ip) if ip.is_link_local())
}
