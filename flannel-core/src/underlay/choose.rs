//! The choice of the external interface, where none is in use yet or another one is wanted.

use std::cmp::Reverse;
use std::net::IpAddr;

use super::way::Way;
use super::{
    AddressInfo, Error, External, Interface, Underlay, UnderlayOptions, devices, is_link_local,
    usable,
};
use crate::family::{Family, PublicIp};
use crate::object::IfName;
use crate::subnet::Subnet;

impl Underlay {
    /// Chooses the external interface as flannel does, with the reason.
    ///
    /// A pure function of what was observed. `families` are those of the overlay: each needs an
    /// address on the interface, or a public address set. Of several addresses it takes the one that
    /// the default route names as its source, else one in the prefix that holds the router. A link of
    /// containers ([`Underlay::inward`]), an IPv4 link-local address and an address inside of the
    /// overlay are chosen only if they are named.
    ///
    /// # Errors
    /// [`Error`] says what was looked for and not found.
    pub fn choose(
        &self,
        options: &UnderlayOptions,
        families: &[Family],
    ) -> Result<External, Error> {
        if !options.interfaces.is_empty() {
            let interfaces = options.interfaces.iter();
            let found = interfaces.map(|interface| self.find(interface, options, families));
            return first_that_fits(found);
        }
        if let Some(ip) = options.public_ip.ips().next() {
            return self.find(&Interface::Address(ip), options, families);
        }
        let (family, way) = self.way_of_all(families)?;
        let reason = format!("it has the {family} default route");
        self.external(&way.devs, PublicIp::default(), options, families, reason)
    }

    /// Chooses for as many families as can work: where not all do, for the first that does, and says
    /// why not for the others.
    ///
    /// # Errors
    /// [`Error`] of all families together if none works.
    pub(crate) fn choose_some(
        &self,
        options: &UnderlayOptions,
        families: &[Family],
    ) -> Result<(External, Vec<(Family, Error)>), Error> {
        let error = match self.choose(options, families) {
            Ok(external) => return Ok((external, Vec::new())),
            Err(error) => error,
        };
        let mut works = families.iter().filter_map(|family| {
            let external = self.choose(options, &[*family]).ok()?;
            Some((*family, external))
        });
        let (family, external) = works.next().ok_or_else(|| error.clone())?;
        let others = families.iter().filter(|other| **other != family);
        let lacking = others.map(|other| (*other, error.clone())).collect();
        Ok((external, lacking))
    }

    /// The default route that all families agree on.
    fn way_of_all(&self, families: &[Family]) -> Result<(Family, Way), Error> {
        let mut found: Option<(Family, Way)> = None;
        for family in families {
            let way = match self.default_way(*family) {
                Ok(way) => way,
                // The other family may tell.
                Err(Error::NoDefaultRoute { .. }) => continue,
                Err(error) => return Err(error),
            };
            match &found {
                None => found = Some((*family, way)),
                Some((_, first)) => {
                    if let (Some(v4), Some(v6)) = (first.devs.first(), way.devs.first())
                        && !first.devs.iter().any(|dev| way.devs.contains(dev))
                    {
                        let (v4, v6) = (*v4, *v6);
                        return Err(Error::Disagree { v4, v6 });
                    }
                }
            }
        }
        let family = families.first().copied().unwrap_or(Family::V4);
        found.ok_or(Error::NoDefaultRoute { family })
    }

    /// The best default route of a family that leads to other hosts.
    fn default_way(&self, family: Family) -> Result<Way, Error> {
        let mut refused = None;
        for way in Way::all(&self.routes, family) {
            match self.check_way(family, &way) {
                Ok(()) => return Ok(way),
                Err(error) => {
                    refused.get_or_insert(error);
                }
            }
        }
        Err(refused.unwrap_or(Error::NoDefaultRoute { family }))
    }

    /// Tells if a default route leads to other hosts: not to containers, and from an address that
    /// others may be told. That it has no address yet is found later: that is waited for.
    fn check_way(&self, family: Family, way: &Way) -> Result<(), Error> {
        if way.devs.is_empty() {
            let route = way.text.clone();
            return Err(Error::UnclearDefaultRoute { family, route });
        }
        if let Some(dev) = way.devs.iter().find(|dev| self.inward.contains(dev)) {
            return Err(self.inward_error(*dev, family));
        }
        match self.address_on(&way.devs, family, Some(way), false) {
            Err(error @ Error::Unsuitable { .. }) => Err(error),
            _ => Ok(()),
        }
    }

    fn inward_error(&self, dev: IfName, family: Family) -> Error {
        let master = self.link(dev).and_then(|link| link.master);
        let mut addresses = self.addresses.iter();
        let address = addresses.find(|a| a.dev == dev && self.is_of_containers(a.ip));
        let why = match (address, master) {
            (Some(address), _) => format!("its address {} is inside of the overlay", address.ip),
            (None, Some(bridge)) if self.inward.contains(&bridge) => {
                format!("it is a port of {bridge}, which is one")
            }
            (None, _) => "a route to a single address of the overlay leads to it".to_owned(),
        };
        Error::Inward { family, dev, why }
    }

    /// The best address on devices for other nodes to know; `named`: somebody named them, so that any
    /// address will do that another node can send to.
    fn address_on(
        &self,
        devs: &[IfName],
        family: Family,
        way: Option<&Way>,
        named: bool,
    ) -> Result<Option<IpAddr>, Error> {
        let fits = |address: &&AddressInfo| {
            Family::of(&address.ip) == family
                && usable(address.ip)
                && !address.deprecated
                && (named || self.why_unsuitable(address.ip).is_none())
        };
        let tentative = |address: &AddressInfo| Error::Tentative {
            dev: address.dev,
            ip: address.ip,
        };
        if let Some(source) = way.and_then(|way| way.source) {
            let mut everywhere = self.addresses.iter().filter(fits);
            match everywhere.find(|address| address.ip == source) {
                Some(address) if address.tentative => return Err(tentative(address)),
                Some(_) => return Ok(Some(source)),
                None => {}
            }
        }
        let gateways = way.map_or(&[][..], |way| way.gateways.as_slice());
        let holds_router = |address: &AddressInfo| {
            Subnet::new(address.ip, address.prefix_len)
                .is_ok_and(|prefix| gateways.iter().any(|ip| prefix.contains_ip(*ip)))
        };
        let here = || {
            let addresses = self.addresses.iter();
            addresses.filter(|a| devs.contains(&a.dev) && Family::of(&a.ip) == family)
        };
        let candidates = here().filter(fits).filter(|address| !address.tentative);
        let best = candidates.min_by_key(|address| {
            (
                Reverse(holds_router(address)),
                self.why_unsuitable(address.ip).is_some(),
                address.link_scope,
                // A virtual address that moves from host to host has no prefix of its own.
                address.prefix_len == family.bits(),
                address.temporary,
                devs.iter().position(|dev| *dev == address.dev),
            )
        });
        if let Some(best) = best {
            return Ok(Some(best.ip));
        }
        if let Some(address) = here().filter(fits).find(|address| address.tentative) {
            return Err(tentative(address));
        }
        let mut unsuitable = here()
            .filter(|address| usable(address.ip) && !address.deprecated && !address.tentative)
            .filter_map(|address| Some((address, self.why_unsuitable(address.ip)?)));
        match unsuitable.next() {
            None => Ok(None),
            Some((address, what)) => Err(Error::Unsuitable {
                dev: address.dev,
                family,
                ip: address.ip,
                what: what.to_owned(),
            }),
        }
    }

    /// Why an address is not for other nodes unless somebody says so.
    fn why_unsuitable(&self, ip: IpAddr) -> Option<&'static str> {
        if is_link_local(ip) {
            return Some("link-local");
        }
        self.is_of_containers(ip)
            .then_some("inside of the overlay's network")
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
                let mut addresses = self.addresses.iter();
                let address = addresses.find(|address| address.ip == *ip);
                let address = address.ok_or(Error::NoSuchAddress { ip: *ip })?;
                local.set_ip(*ip);
                (address.dev, format!("it has the address {ip}"))
            }
            Interface::Matching(pattern) => self.find_matching(pattern, families, &mut local)?,
            Interface::Reaching(ip) => {
                let unreachable = Error::Unreachable { ip: *ip };
                let route = self.route_to(*ip).ok_or_else(|| unreachable.clone())?;
                let dev = devices(&route.target).next().ok_or(unreachable)?;
                if self.inward.contains(&dev) {
                    return Err(self.inward_error(dev, Family::of(ip)));
                }
                (dev, format!("{ip} is reached through it"))
            }
        };
        self.external(&[dev], local, options, families, reason)
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

    /// The external interface on devices, the first of which names it, with its addresses; `fixed`
    /// are those that are given.
    pub(super) fn external(
        &self,
        devs: &[IfName],
        fixed: PublicIp,
        options: &UnderlayOptions,
        families: &[Family],
        reason: String,
    ) -> Result<External, Error> {
        let mut links = Vec::with_capacity(devs.len());
        for dev in devs {
            let link = self
                .link(*dev)
                .ok_or(Error::NoSuchInterface { name: *dev })?;
            if link.mtu == 0 {
                return Err(Error::NoMtu { dev: *dev });
            }
            links.push(link);
        }
        if let (Some(first), true) = (links.first(), links.iter().all(|link| !link.up)) {
            return Err(Error::Down { dev: first.name });
        }
        let [first, others @ ..] = links.as_slice() else {
            let family = families.first().copied().unwrap_or(Family::V4);
            return Err(Error::NoDefaultRoute { family });
        };
        let mut external = External {
            dev: first.name,
            index: first.index,
            others: others.iter().map(|link| link.name).collect(),
            mtu: others.iter().fold(first.mtu, |mtu, link| mtu.min(link.mtu)),
            local: PublicIp::default(),
            public: PublicIp::default(),
            reason,
        };
        // An address that leads to an interface names it, with all others that it has.
        let is_named = options.interfaces.iter().any(|interface| match interface {
            Interface::Name(_) | Interface::Address(_) | Interface::Matching(_) => true,
            Interface::Reaching(_) => false,
        });
        for family in families {
            // A public address that the interface has is also the one to send from.
            let told = options.public_ip.ip(*family);
            let is_here = |ip: &IpAddr| {
                let mut addresses = self.addresses.iter();
                addresses.any(|address| address.dev == first.name && address.ip == *ip)
            };
            let given = fixed.ip(*family).or_else(|| told.filter(is_here));
            let own = match given {
                Some(ip) => Ok(Some(ip)),
                None => {
                    let mut ways = Way::all(&self.routes, *family).into_iter();
                    let way = ways.find(|way| devs.iter().any(|dev| way.devs.contains(dev)));
                    self.address_on(devs, *family, way.as_ref(), is_named)
                }
            };
            // Where others are told another one, it is only what a tunnel is bound to.
            let own = own.or_else(|error| told.map(|_| None).ok_or(error))?;
            if let Some(ip) = own {
                external.local.set_ip(ip);
            }
            let ip = told.or(own).ok_or(Error::NoAddress {
                dev: first.name,
                family: *family,
            })?;
            external.public.set_ip(ip);
        }
        Ok(external)
    }
}

/// The first that fits, else why each does not.
fn first_that_fits(all: impl Iterator<Item = Result<External, Error>>) -> Result<External, Error> {
    let mut tried = Vec::new();
    for one in all {
        match one {
            Ok(external) => return Ok(external),
            Err(error) => tried.push(error),
        }
    }
    Err(match <[Error; 1]>::try_from(tried) {
        Ok([only]) => only,
        Err(tried) => Error::NoneOf { tried },
    })
}
