//! The namespace behind the fake kernel: objects and the rules that Linux keeps among them.

mod checks;
mod links;
mod packets;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use flannel_core::kernel::{Error, Result};
use flannel_core::reconcile::plan::difference;
use flannel_core::{
    Address, AddressInfo, Change, Family, IfName, Link, LinkInfo, MAIN_TABLE, Object, ObjectKey,
    Objects, Offload, Op, Route, RouteProtocol, RouteTarget, Subnet, Sysctl, mtu,
};

pub(super) use packets::Policy;

/// The setting by which a device gives itself a link-local address, and that it gives itself none.
const ADDR_GEN_MODE: &str = "addr_gen_mode";
const NO_ADDRESS: &str = "1";

/// The setting by which packets that come in on a device are forwarded.
const FORWARDING: &str = "forwarding";

/// Settings that the fake has, with their value on a new device.
const SYSCTLS: [(Family, &str, &str); 8] = [
    (Family::V4, FORWARDING, "1"),
    (Family::V4, "rp_filter", "0"),
    (Family::V4, "proxy_arp", "0"),
    (Family::V4, "arp_ignore", "0"),
    (Family::V6, "accept_ra", "1"),
    (Family::V6, ADDR_GEN_MODE, "0"),
    (Family::V6, "disable_ipv6", "0"),
    (Family::V6, FORWARDING, "1"),
];

/// Offloads that the fake has; all are on on a new device.
const OFFLOADS: [&str; 3] = [
    "tx-checksum-ip-generic",
    "tx-tcp-segmentation",
    "tx-udp-segmentation",
];

/// A key above those of all other kinds and not above that of any route: routes come last.
const AFTER_NEXTHOPS: ObjectKey = ObjectKey::Nexthop(u32::MAX);

/// The objects of a namespace. Of links all fields are known.
#[derive(Debug, Default)]
pub(super) struct Host {
    pub(super) objects: Objects,
    pub(super) indices: BTreeMap<IfName, u32>,
    made: u32,
    /// Devices that were made to have no IPv6 link-local address unless told otherwise.
    pub(super) without_own_address: BTreeSet<IfName>,
    /// The device that a port belongs to.
    pub(super) masters: BTreeMap<IfName, IfName>,
    /// The details of the addresses that are not plain ones.
    pub(super) marks: BTreeMap<(IfName, IpAddr), AddressInfo>,
    pub(super) told: Vec<Change>,
    policy: Policy,
}

impl Host {
    pub(super) const fn objects(&self) -> &Objects {
        &self.objects
    }

    pub(super) fn get(&self, key: &ObjectKey) -> Option<Object> {
        self.objects
            .get(key)
            .cloned()
            .or_else(|| self.default_setting(key))
    }

    pub(super) const fn policy(&mut self) -> &mut Policy {
        &mut self.policy
    }

    /// What the kernel tells of what was done, in that order.
    pub(super) fn take_told(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.told)
    }

    pub(super) fn link_infos(&self) -> Vec<LinkInfo> {
        let mut infos: Vec<_> = self
            .indices
            .iter()
            .filter_map(|(dev, index)| {
                let info = super::link_info(self.link(*dev)?, *index);
                let master = self.masters.get(dev).copied();
                Some(LinkInfo { master, ..info })
            })
            .collect();
        infos.sort_by_key(|info| info.index);
        infos
    }

    pub(super) fn apply(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Create(object) => self.create(object, false),
            Op::Change(object) => self.change(object),
            Op::Delete(object) => self.delete(object),
        }
    }

    /// Creates an object of any kind, also those that only hardware or other programs bring.
    pub(super) fn insert(&mut self, object: &Object) -> Result<()> {
        match object {
            Object::Sysctl(_) | Object::Offload(_) => self.change(object),
            _ => self.create(object, true),
        }
    }

    fn create(&mut self, object: &Object, any_kind: bool) -> Result<()> {
        let object = normal(object);
        let key = object.key();
        // What is not fit is refused first, whatever is in its place.
        let stands_alone = !matches!(
            object,
            Object::Link(_) | Object::Sysctl(_) | Object::Offload(_)
        );
        if stands_alone {
            self.check(&object, any_kind)?;
        }
        if let Some(found) = self.get(&key) {
            return if difference(&object, &found).is_none() {
                Ok(())
            } else {
                Err(Error::Exists {
                    message: found.to_string(),
                })
            };
        }
        match &object {
            Object::Link(link) => self.create_link(link, any_kind),
            Object::Sysctl(_) | Object::Offload(_) => Err(no_setting(&object)),
            _ => {
                self.put(object);
                Ok(())
            }
        }
    }

    fn change(&mut self, object: &Object) -> Result<()> {
        let object = normal(object);
        match &object {
            Object::Link(link) => self.change_link(link),
            Object::Sysctl(Sysctl { dev, .. }) | Object::Offload(Offload { dev, .. }) => {
                self.need_device(*dev)?;
                if self.default_setting(&object.key()).is_none() {
                    return Err(no_setting(&object));
                }
                // Those that the fake has are numbers.
                if let Object::Sysctl(sysctl) = &object
                    && sysctl.value.parse::<i32>().is_err()
                {
                    return Err(rejected("the setting is a number", &object));
                }
                if matches!(&object, Object::Sysctl(o) if matches!(&*o.name, FORWARDING | "rp_filter"))
                {
                    self.told.push(Change::Policy);
                }
                self.objects.insert(object.key(), object);
                Ok(())
            }
            _ => {
                self.check(&object, false)?;
                self.put(object);
                Ok(())
            }
        }
    }

    /// Puts in an object that is no link and no setting and was found fit, whatever was there.
    fn put(&mut self, object: Object) {
        self.tell_set(&object);
        let added = match &object {
            Object::Address(address) => Some(address.clone()),
            _ => None,
        };
        self.objects.insert(object.key(), object);
        if let Some(address) = added {
            self.connect(&address);
        }
    }

    /// Adds the route of an address's network, as the kernel does by itself.
    fn connect(&mut self, address: &Address) {
        let up = self.link(address.dev).is_some_and(|link| link.up);
        if let Some(route) = connected(address).filter(|_| up) {
            let route = Object::Route(route);
            if let Entry::Vacant(place) = self.objects.entry(route.key()) {
                place.insert(route.clone());
                self.tell_set(&route);
            }
        }
    }

    /// Drops the routes and nexthops through a device, and the routes through those nexthops: all but
    /// IPv6 routes without a word.
    fn drop_paths(&mut self, dev: IfName) {
        let nexthops: BTreeSet<u32> = self
            .objects
            .values()
            .filter_map(|object| match object {
                Object::Nexthop(nexthop) if nexthop.dev == dev => Some(nexthop.id),
                _ => None,
            })
            .collect();
        for id in &nexthops {
            self.objects.remove(&ObjectKey::Nexthop(*id));
        }
        self.drop_routes(|route| match &route.target {
            RouteTarget::Gateway { dev: through, .. } | RouteTarget::Device(through) => {
                *through == dev
            }
            RouteTarget::Nexthop(id) => nexthops.contains(id),
            _ => false,
        });
    }

    fn drop_routes(&mut self, goes: impl Fn(&Route) -> bool) {
        let lost: Vec<_> = self
            .objects
            .range(AFTER_NEXTHOPS..)
            .filter(|(_, object)| matches!(object, Object::Route(route) if goes(route)))
            .map(|(key, _)| key.clone())
            .collect();
        for key in lost {
            // IPv4 routes go without a word.
            if let Some(object) = self.objects.remove(&key)
                && matches!(&object, Object::Route(route) if route.dst.family() == Family::V6)
            {
                self.tell_gone(&object);
            }
        }
    }

    fn drop_neighbours(&mut self, dev: IfName, family: Option<Family>) {
        let first = ObjectKey::Neighbour {
            dev,
            ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        };
        let lost: Vec<_> = self
            .objects
            .range(first..)
            .map_while(|(key, _)| match key {
                ObjectKey::Neighbour { dev: on, ip } if *on == dev => Some((key, ip)),
                _ => None,
            })
            .filter(|(_, ip)| family.is_none_or(|family| Family::of(ip) == family))
            .map(|(key, _)| key.clone())
            .collect();
        for key in lost {
            if let Some(object) = self.objects.remove(&key) {
                self.tell_gone(&object);
            }
        }
    }

    /// Drops the peers of a packet path that is gone.
    fn drop_peers(&mut self, dev: IfName) {
        self.objects
            .retain(|_, object| !matches!(object, Object::TunnelPeer(peer) if peer.dev == dev));
    }

    /// Ends the packet paths: the program that they ran in is gone, and with it went their devices.
    pub(super) fn lose_tunnels(&mut self) {
        let devices = self.objects.keys().filter_map(|key| match key {
            ObjectKey::Tunnel(dev) => Some(*dev),
            _ => None,
        });
        for dev in devices.collect::<Vec<_>>() {
            self.delete_link(dev);
        }
    }

    fn delete(&mut self, object: &Object) -> Result<()> {
        let object = normal(object);
        let key = object.key();
        let Some(found) = self.objects.get(&key) else {
            return match &object {
                Object::Sysctl(_) | Object::Offload(_) => Err(no_setting(&object)),
                _ => Ok(()),
            };
        };
        let meant = match (&object, found) {
            (Object::Route(asked), Object::Route(is)) => {
                asked.protocol == is.protocol && asked.target == is.target
            }
            (Object::Nexthop(asked), Object::Nexthop(is)) => asked.protocol == is.protocol,
            (Object::Link(asked), Object::Link(is)) => {
                links::same_kind(&asked.kind, &is.kind) && asked.alias == is.alias
            }
            (Object::Fdb(asked), Object::Fdb(is)) => asked.remote == is.remote,
            (Object::Sysctl(_) | Object::Offload(_), _) => return Err(no_setting(&object)),
            _ => true,
        };
        if meant {
            self.delete_key(&key);
        }
        Ok(())
    }

    /// Deletes what is under a key with what follows from it.
    pub(super) fn delete_key(&mut self, key: &ObjectKey) {
        if let ObjectKey::Link(dev) = key {
            self.delete_link(*dev);
            return;
        }
        let Some(object) = self.objects.remove(key) else {
            return;
        };
        self.tell_gone(&object);
        match object {
            Object::Nexthop(nexthop) => {
                self.drop_routes(|route| route.target == RouteTarget::Nexthop(nexthop.id));
            }
            Object::Address(address) => self.disconnect(&address),
            Object::Tunnel(tunnel) => self.drop_peers(tunnel.dev),
            _ => {}
        }
    }

    /// What follows from an address that is gone. Without its last IPv4 address a device loses
    /// its IPv4 neighbours and the IPv4 routes through it, those through nexthop objects excepted.
    fn disconnect(&mut self, address: &Address) {
        if let Some(route) = connected(address) {
            let shared = self
                .addresses_of(address.dev)
                .any(|other| connected(other).is_some_and(|r| r.dst == route.dst));
            if !shared {
                self.drop_routes(|other| *other == route);
            }
        }
        if address.ip.is_ipv4() && !self.addresses_of(address.dev).any(|a| a.ip.is_ipv4()) {
            self.drop_neighbours(address.dev, Some(Family::V4));
            self.drop_routes(|route| {
                route.dst.family() == Family::V4
                    && matches!(&route.target,
                        RouteTarget::Gateway { dev, .. } | RouteTarget::Device(dev)
                        if *dev == address.dev)
            });
        }
    }

    /// Tells that an object is there now.
    fn tell_set(&mut self, object: &Object) {
        match object {
            Object::Route(route) if route.table != MAIN_TABLE => self.told.push(Change::Policy),
            Object::Address(_)
            | Object::Fdb(_)
            | Object::Neighbour(_)
            | Object::Nexthop(_)
            | Object::Route(_) => self.told.push(Change::Set(object.clone())),
            other => self.tell_doubt(other),
        }
    }

    /// Tells that an object is gone.
    fn tell_gone(&mut self, object: &Object) {
        match object {
            Object::Route(route) if route.table != MAIN_TABLE => self.told.push(Change::Policy),
            Object::Fdb(_) | Object::Neighbour(_) | Object::Nexthop(_) | Object::Route(_) => {
                self.told.push(Change::Gone(object.key()));
            }
            other => self.tell_doubt(other),
        }
    }

    fn tell_doubt(&mut self, about: &Object) {
        let change = match about {
            Object::Address(address) => Change::Address(Some(address.dev)),
            other => Change::Link(other.dev()),
        };
        if self.told.last() != Some(&change) {
            self.told.push(change);
        }
    }

    fn links(&self) -> impl Iterator<Item = &Link> {
        self.objects.values().map_while(|object| match object {
            Object::Link(link) => Some(link),
            _ => None,
        })
    }

    fn link(&self, dev: IfName) -> Option<&Link> {
        match self.objects.get(&ObjectKey::Link(dev)) {
            Some(Object::Link(link)) => Some(link),
            _ => None,
        }
    }

    fn addresses_of(&self, dev: IfName) -> impl Iterator<Item = &Address> {
        let first = ObjectKey::Address {
            dev,
            ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            prefix_len: 0,
        };
        self.objects
            .range(first..)
            .map_while(move |(_, object)| match object {
                Object::Address(address) if address.dev == dev => Some(address),
                _ => None,
            })
    }

    fn need_device(&self, dev: IfName) -> Result<()> {
        match self.link(dev) {
            Some(_) => Ok(()),
            None => Err(no_device(dev)),
        }
    }

    fn need_up(&self, dev: IfName, object: &Object) -> Result<()> {
        match self.link(dev) {
            Some(link) if link.up => Ok(()),
            Some(_) => Err(Error::Busy {
                message: format!("nexthop device is not up: {object}"),
            }),
            None => Err(no_device(dev)),
        }
    }

    /// Whether a device that comes up gives itself a link-local address.
    fn has_own_address(&self, dev: IfName) -> bool {
        let mode = self.get(&ObjectKey::Sysctl {
            dev,
            family: Family::V6,
            name: ADDR_GEN_MODE.to_owned(),
        });
        !matches!(mode, Some(Object::Sysctl(sysctl)) if sysctl.value == NO_ADDRESS)
    }

    fn default_setting(&self, key: &ObjectKey) -> Option<Object> {
        match key {
            ObjectKey::Sysctl { dev, family, name } => {
                let link = self.link(*dev)?;
                // Linux has no IPv6 on a device whose packets are smaller.
                if *family == Family::V6 && link.mtu.is_some_and(|mtu| mtu < mtu::MIN_IPV6) {
                    return None;
                }
                let (.., value) = SYSCTLS
                    .iter()
                    .find(|(of, known, _)| of == family && known == name)?;
                let value = match name.as_str() {
                    ADDR_GEN_MODE if self.without_own_address.contains(dev) => NO_ADDRESS,
                    FORWARDING if !self.default_forwarding(*family) => "0",
                    _ => value,
                };
                Some(Object::Sysctl(Sysctl {
                    dev: *dev,
                    family: *family,
                    name: name.clone(),
                    value: value.to_owned(),
                }))
            }
            ObjectKey::Offload { dev, feature } => {
                self.link(*dev)?;
                OFFLOADS.contains(&feature.as_str()).then(|| {
                    Object::Offload(Offload {
                        dev: *dev,
                        feature: feature.clone(),
                        on: true,
                    })
                })
            }
            _ => None,
        }
    }
}

/// An object as the kernel stores it: an IPv6 route without a metric gets the default one, a
/// setting has no white space around it.
fn normal(object: &Object) -> Object {
    let mut object = object.clone();
    match &mut object {
        Object::Route(route) if route.metric == 0 => {
            route.metric = Route::default_metric(route.dst.family());
        }
        Object::Sysctl(sysctl) => sysctl.value = sysctl.value.trim().to_owned(),
        _ => {}
    }
    object
}

/// The route that an address brings along. A single IPv4 address brings none. That of IPv6
/// link-local addresses is left out: every device has it, so it could not be told apart by key.
fn connected(address: &Address) -> Option<Route> {
    let dst = Subnet::new(address.ip, address.prefix_len).ok()?;
    let metric = match address.ip {
        IpAddr::V4(_) if address.prefix_len < 32 => 0,
        IpAddr::V6(ip) if !ip.is_unicast_link_local() => 256,
        _ => return None,
    };
    Some(Route {
        table: MAIN_TABLE,
        dst,
        metric,
        target: RouteTarget::Device(address.dev),
        protocol: RouteProtocol::KERNEL,
        source: address.ip.is_ipv4().then_some(address.ip),
    })
}

fn rejected(why: &str, what: impl std::fmt::Display) -> Error {
    Error::Rejected {
        message: format!("{why}: {what}"),
    }
}

fn no_device(dev: IfName) -> Error {
    Error::NoSuchDevice {
        dev: dev.to_string(),
    }
}

fn no_setting(object: &Object) -> Error {
    Error::Unsupported {
        what: format!(
            "{}: settings are changed, never made or removed",
            object.key()
        ),
    }
}
