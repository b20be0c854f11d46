//! What we know of the host's own network, and which part of it carries the overlay.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::family::{Family, PublicIp};
use crate::kernel::Observed;
use crate::object::{IfName, MacAddr, Object, ObjectKey, Route, RouteTarget};
use crate::subnet::Subnet;

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
}

/// The external interface: what carries the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct External {
    /// The device.
    pub dev: IfName,
    /// Its index.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The device's own addresses: what outer packets are sent from.
    pub local: PublicIp,
    /// The addresses peers are told: the device's own, unless set otherwise (NAT).
    pub public: PublicIp,
    /// Why this one was chosen, in words.
    pub reason: String,
}

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
            | Self::NoSuchInterface { .. }
            | Self::NoSuchAddress { .. }
            | Self::NoMatch { .. }
            | Self::Unreachable { .. }
            | Self::NoAddress { .. }
            | Self::Disagree { .. }
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

/// What decides the choice of the external interface. By default: the default route.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UnderlayOptions {
    /// Tried in this order; the first that leads to an interface wins. If none is given, the
    /// public address must be one of an interface; without that, the default route decides.
    pub interfaces: Vec<Interface>,
    /// The addresses that peers are told instead of the interface's own.
    pub public_ip: PublicIp,
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
    /// what is on them, and without routes to destinations in the overlay's networks.
    pub fn from_observed(
        observed: &Observed,
        networks: &[Subnet],
        own_dev: impl Fn(IfName) -> bool,
    ) -> Self {
        let routes = observed.objects.values().filter_map(|object| match object {
            Object::Route(route) => Some(route),
            _ => None,
        });
        let routes = routes
            .filter(|route| !networks.iter().any(|network| network.contains(&route.dst)))
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
                let dev = Object::Route(route.clone()).dev();
                (!dev.is_some_and(&own_dev)).then_some(route)
            });
        Self {
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
            routes: routes.collect(),
        }
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
            _ => Reach::None,
        }
    }

    /// The link of this name.
    pub fn link(&self, name: IfName) -> Option<&LinkInfo> {
        self.links.iter().find(|link| link.name == name)
    }

    fn has_address(&self, dev: IfName, ip: IpAddr) -> bool {
        self.addresses
            .iter()
            .any(|address| address.dev == dev && address.ip == ip)
    }

    fn dev_of_address(&self, ip: IpAddr) -> Option<IfName> {
        self.addresses
            .iter()
            .find(|address| address.ip == ip)
            .map(|address| address.dev)
    }

    /// The best usable address of a device: global before link-local, lasting before passing, in
    /// the kernel's order.
    fn best_address(&self, dev: IfName, family: Family) -> Option<IpAddr> {
        self.addresses
            .iter()
            .filter(|address| address.dev == dev && Family::of(&address.ip) == family)
            .filter(|address| !address.deprecated && !address.tentative && usable(address.ip))
            .min_by_key(|address| {
                (
                    is_link_local(address.ip),
                    !address.permanent,
                    address.temporary,
                )
            })
            .map(|address| address.ip)
    }

    /// The device of the default route of a family, if a single one can be read from it.
    fn default_dev(&self, family: Family) -> Option<IfName> {
        self.routes
            .iter()
            .filter(|route| route.dst.len() == 0 && route.dst.family() == family)
            .filter_map(|route| match route.target {
                RouteTarget::Gateway { dev, .. } | RouteTarget::Device(dev) => {
                    Some((route.metric, dev))
                }
                _ => None,
            })
            .min()
            .map(|(_, dev)| dev)
    }

    /// Chooses the external interface as flannel does, with the reason.
    ///
    /// A pure function of what was observed. `families` are those of the overlay: each needs an
    /// address on the interface, or a public address set.
    ///
    /// # Errors
    /// [`Error`] says what was looked for and not found.
    pub fn choose(
        &self,
        options: &UnderlayOptions,
        families: &[Family],
    ) -> Result<External, Error> {
        if !options.interfaces.is_empty() {
            let mut tried = Vec::new();
            for interface in &options.interfaces {
                match self.find(interface, options, families) {
                    Ok(external) => return Ok(external),
                    Err(error) => tried.push(error),
                }
            }
            return Err(match <[Error; 1]>::try_from(tried) {
                Ok([only]) => only,
                Err(tried) => Error::NoneOf { tried },
            });
        }
        if let Some(ip) = options.public_ip.ips().next() {
            return self.find(&Interface::Address(ip), options, families);
        }
        let devs: Vec<_> = families
            .iter()
            .filter_map(|family| self.default_dev(*family).map(|dev| (*family, dev)))
            .collect();
        match devs[..] {
            [] => Err(Error::NoDefaultRoute {
                family: families.first().copied().unwrap_or(Family::V4),
            }),
            [(_, v4), (_, v6)] if v4 != v6 => Err(Error::Disagree { v4, v6 }),
            [(family, dev), ..] => {
                let reason = format!("it has the {family} default route");
                self.external(dev, PublicIp::default(), options, families, reason)
            }
        }
    }

    fn find(
        &self,
        interface: &Interface,
        options: &UnderlayOptions,
        families: &[Family],
    ) -> Result<External, Error> {
        let mut local = PublicIp::default();
        let (dev, reason) = match interface {
            Interface::Name(name) => {
                self.link(*name)
                    .ok_or(Error::NoSuchInterface { name: *name })?;
                (*name, "it is the one named".to_owned())
            }
            Interface::Address(ip) => {
                let dev = self
                    .dev_of_address(*ip)
                    .ok_or(Error::NoSuchAddress { ip: *ip })?;
                local.set_ip(*ip);
                (dev, format!("it has the address {ip}"))
            }
            Interface::Matching(pattern) => self.find_matching(pattern, families, &mut local)?,
            Interface::Reaching(ip) => {
                let route = self.route_to(*ip).ok_or(Error::Unreachable { ip: *ip })?;
                let dev = Object::Route(route.clone()).dev();
                (
                    dev.ok_or(Error::Unreachable { ip: *ip })?,
                    format!("{ip} is reached through it"),
                )
            }
        };
        self.external(dev, local, options, families, reason)
    }

    fn find_matching(
        &self,
        pattern: &str,
        families: &[Family],
        local: &mut PublicIp,
    ) -> Result<(IfName, String), Error> {
        let regex = regex_lite::Regex::new(pattern).map_err(|error| Error::Pattern {
            pattern: pattern.to_owned(),
            reason: error.to_string(),
        })?;
        for link in &self.links {
            let matching: PublicIp = families
                .iter()
                .filter_map(|family| {
                    let mut addresses = self.addresses.iter().filter(|address| {
                        address.dev == link.name
                            && Family::of(&address.ip) == *family
                            && usable(address.ip)
                    });
                    addresses.find(|address| regex.is_match(&address.ip.to_string()))
                })
                .fold(PublicIp::default(), |mut all, address| {
                    all.set_ip(address.ip);
                    all
                });
            if !families.is_empty() && families.iter().all(|family| matching.has(*family)) {
                *local = matching;
                return Ok((link.name, format!("its address matches {pattern:?}")));
            }
        }
        self.links
            .iter()
            .find(|link| regex.is_match(link.name.as_str()))
            .map(|link| (link.name, format!("its name matches {pattern:?}")))
            .ok_or_else(|| Error::NoMatch {
                pattern: pattern.to_owned(),
            })
    }

    fn external(
        &self,
        dev: IfName,
        fixed: PublicIp,
        options: &UnderlayOptions,
        families: &[Family],
        reason: String,
    ) -> Result<External, Error> {
        let link = self.link(dev).ok_or(Error::NoSuchInterface { name: dev })?;
        if link.mtu == 0 {
            return Err(Error::NoMtu { dev });
        }
        let (mut local, mut public) = (PublicIp::default(), PublicIp::default());
        for family in families {
            // A public address that the interface has is also the one to send from.
            let told = options.public_ip.ip(*family);
            let own = fixed
                .ip(*family)
                .or_else(|| told.filter(|ip| self.has_address(dev, *ip)))
                .or_else(|| self.best_address(dev, *family));
            if let Some(ip) = own {
                local.set_ip(ip);
            }
            match told.or(own) {
                Some(ip) => public.set_ip(ip),
                None => {
                    return Err(Error::NoAddress {
                        dev,
                        family: *family,
                    });
                }
            }
        }
        Ok(External {
            dev,
            index: link.index,
            mtu: link.mtu,
            local,
            public,
            reason,
        })
    }
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
