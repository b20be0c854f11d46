//! Routes: `RTM_NEWROUTE` and what `linux/rtnetlink.h` says of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::kernel::{Error, Result};
use flannel_core::{Family, IfName, Route, RoutePath, RouteProtocol, RouteTarget, Subnet};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteScope, RouteType, RouteVia,
};
use nix::errno::Errno;

use crate::connection::Connection;
use crate::error::Failure;
use crate::names::{Named, Names};
use crate::wire::{Attributes, Body, Malformed, field_u32, read_ip, read_u32};

pub(crate) const RTM_NEWROUTE: u16 = 24;
pub(crate) const RTM_DELROUTE: u16 = 25;
pub(crate) const RTM_GETROUTE: u16 = 26;

/// The length of `struct rtmsg`.
const HEADER: usize = 12;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const RTN_UNICAST: u8 = 1;
const RTN_BLACKHOLE: u8 = 6;
const RTNH_F_ONLINK: u32 = 4;
const RTM_F_CLONED: u32 = 0x200;
/// The loopback device has this index in every namespace; IPv6 black holes are on it.
const LOOPBACK: u32 = 1;

/// A route as the kernel tells of it: the device by index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The routing table.
    pub(crate) table: u32,
    /// The destination.
    pub(crate) dst: Subnet,
    /// The metric.
    pub(crate) metric: u32,
    /// Who made it.
    pub(crate) protocol: RouteProtocol,
    /// Where packets go.
    pub(crate) path: Path,
    /// The address that this host's own packets are sent from.
    pub(crate) source: Option<IpAddr>,
}

/// Where a route sends packets: the device by index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Path {
    /// To a gateway behind a device.
    Gateway(IpAddr, u32, bool),
    /// To a nexthop object.
    Nexthop(u32),
    /// Straight to a device.
    Device(u32),
    /// Nowhere.
    Blackhole,
    /// Over several paths: gateway and device of each.
    Several(Vec<(Option<IpAddr>, u32)>),
    /// Something else that we never ask for.
    Other(String),
}

impl Entry {
    /// The route as an object; an `Err` is the name of a device that cannot be told.
    pub(crate) fn object(&self, names: &Names) -> Result<Route, Named> {
        let named = |index| match names.name(index) {
            Named::Device(name) => Ok(name),
            other => Err(other),
        };
        let target = match &self.path {
            Path::Gateway(gateway, index, onlink) => RouteTarget::Gateway {
                gateway: *gateway,
                dev: named(*index)?,
                onlink: *onlink,
            },
            Path::Nexthop(id) => RouteTarget::Nexthop(*id),
            Path::Device(index) => RouteTarget::Device(named(*index)?),
            Path::Blackhole => RouteTarget::Blackhole,
            Path::Several(paths) => {
                let path = |&(gateway, index): &(Option<IpAddr>, u32)| {
                    named(index).map(|dev| RoutePath { gateway, dev })
                };
                RouteTarget::Paths(paths.iter().map(path).collect::<Result<_, _>>()?)
            }
            Path::Other(what) => RouteTarget::Other(what.clone()),
        };
        Ok(Route {
            table: self.table,
            dst: self.dst,
            metric: self.metric,
            target,
            protocol: self.protocol,
            source: self.source,
        })
    }
}

/// Reads an `RTM_NEWROUTE`; `None`: it is none that an object can stand for: of another family,
/// local, multicast, cached, or with a key that holds more than ours (type of service, source).
///
/// # Errors
/// [`Malformed`] if it is cut or a field has another length than the kernel gives it.
pub(crate) fn decode(body: &[u8]) -> Result<Option<Entry>, Malformed> {
    const RTA_DST: u16 = 1;
    const RTA_OIF: u16 = 4;
    const RTA_GATEWAY: u16 = 5;
    const RTA_PRIORITY: u16 = 6;
    const RTA_PREFSRC: u16 = 7;
    const RTA_MULTIPATH: u16 = 9;
    const RTA_TABLE: u16 = 15;
    const RTA_VIA: u16 = 18;
    const RTA_ENCAP: u16 = 22;
    const RTA_NH_ID: u16 = 30;
    let [family, dst_len, src_len, tos, table, protocol, _, kind] = body
        .first_chunk()
        .copied()
        .ok_or(Malformed("a message shorter than its header"))?;
    let flags = field_u32(body, 8)?;
    let unspecified = match family {
        AF_INET => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AF_INET6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return Ok(None),
    };
    let Some(kind) = Kind::of(kind) else {
        return Ok(None);
    };
    if src_len != 0 || tos != 0 || flags & RTM_F_CLONED != 0 {
        return Ok(None);
    }
    let mut entry = Entry {
        table: table.into(),
        dst: Subnet::new(unspecified, 0).map_err(|_| Malformed("a subnet"))?,
        metric: 0,
        protocol: RouteProtocol(protocol),
        path: Path::Blackhole,
        source: None,
    };
    let (mut dst, mut oif, mut gateway, mut nexthop) = (unspecified, None, None, None);
    let (mut several, mut is_encapsulated) = (None, false);
    for attribute in Attributes::after(body, HEADER)? {
        let (kind, value) = attribute?;
        match kind {
            RTA_DST => dst = read_ip(value).ok_or(Malformed("a destination of another length"))?,
            RTA_OIF => oif = Some(read_u32(value)?),
            RTA_GATEWAY => gateway = read_ip(value),
            RTA_VIA => gateway = decode_via(value)?,
            RTA_PRIORITY => entry.metric = read_u32(value)?,
            RTA_TABLE => entry.table = read_u32(value)?,
            RTA_NH_ID => nexthop = Some(read_u32(value)?),
            RTA_PREFSRC => entry.source = read_ip(value),
            RTA_MULTIPATH => several = Some(decode_paths(value)?),
            RTA_ENCAP => is_encapsulated = true,
            _ => {}
        }
    }
    entry.dst = Subnet::new(dst, dst_len)
        .ok()
        .filter(|dst| dst.family() == Family::of(&unspecified))
        .ok_or(Malformed("a destination that is no subnet"))?;
    entry.path = match kind {
        Kind::Blackhole => Path::Blackhole,
        Kind::Refusal(what) => Path::Other(what),
        Kind::Unicast if is_encapsulated => Path::Other("encapsulated".to_owned()),
        // Of a group of nexthop objects the paths are told, unless that is switched off
        // (`net.ipv4.nexthop_compat_mode`).
        Kind::Unicast => match (several, nexthop, gateway, oif) {
            (Some(paths), ..) => paths,
            (None, Some(id), ..) => Path::Nexthop(id),
            (None, None, Some(gateway), Some(index)) => {
                Path::Gateway(gateway, index, flags & RTNH_F_ONLINK != 0)
            }
            (None, None, None, Some(index)) => Path::Device(index),
            (None, None, _, None) => Path::Other("no device".to_owned()),
        },
    };
    Ok(Some(entry))
}

/// Reads the paths of a route that has several: for each a `struct rtnexthop` (length, flags, weight,
/// device), followed by its attributes.
fn decode_paths(mut value: &[u8]) -> Result<Path, Malformed> {
    const LEN: usize = 8;
    const RTA_GATEWAY: u16 = 5;
    const RTA_VIA: u16 = 18;
    const RTA_ENCAP: u16 = 22;
    let cut = Malformed("a path that is cut");
    let mut paths = Vec::new();
    while !value.is_empty() {
        let len = value.first_chunk().copied().map(u16::from_ne_bytes);
        let len = usize::from(len.ok_or(cut)?);
        let path = value.get(..len).filter(|path| path.len() >= LEN);
        let path = path.ok_or(cut)?;
        let index = field_u32(path, 4)?;
        let mut gateway = None;
        for attribute in Attributes::after(path, LEN)? {
            match attribute? {
                (RTA_GATEWAY, value) => gateway = read_ip(value),
                (RTA_VIA, value) => gateway = decode_via(value)?,
                (RTA_ENCAP, _) => return Ok(Path::Other("encapsulated".to_owned())),
                _ => {}
            }
        }
        paths.push((gateway, index));
        value = value.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Path::Several(paths))
}

/// The types of routes that take part in forwarding.
enum Kind {
    Unicast,
    Blackhole,
    Refusal(String),
}

impl Kind {
    fn of(kind: u8) -> Option<Self> {
        match kind {
            RTN_UNICAST => Some(Self::Unicast),
            RTN_BLACKHOLE => Some(Self::Blackhole),
            // Unspecified, local, broadcast, anycast and multicast.
            0 | 2..=5 => None,
            7 => Some(Self::Refusal("unreachable".to_owned())),
            8 => Some(Self::Refusal("prohibit".to_owned())),
            9 => Some(Self::Refusal("throw".to_owned())),
            other => Some(Self::Refusal(format!("type {other}"))),
        }
    }
}

/// Reads a gateway of another family than the destination (`struct rtvia`).
pub(crate) fn decode_via(value: &[u8]) -> Result<Option<IpAddr>, Malformed> {
    let (_family, address) = value
        .split_at_checked(2)
        .ok_or(Malformed("a gateway without a family"))?;
    Ok(read_ip(address))
}

/// A route as the kernel keeps it: an IPv6 route without a metric gets the default one.
pub(crate) fn normal(mut route: Route) -> Route {
    if route.metric == 0 {
        route.metric = Route::default_metric(route.dst.family());
    }
    route
}

const fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// The message that makes or removes a route. `index` gives the index of a device.
///
/// # Errors
/// Those of `index`; [`Error::Unsupported`] for a target that we never ask for.
pub(crate) fn message(
    route: &Route,
    index: impl Fn(IfName) -> Result<u32>,
) -> Result<RouteMessage> {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.dst.address());
    header.destination_prefix_length = route.dst.len();
    header.protocol = route.protocol.0.into();
    header.scope = RouteScope::Universe;
    header.kind = RouteType::Unicast;
    let attributes = &mut message.attributes;
    match u8::try_from(route.table) {
        Ok(table) => header.table = table,
        Err(_) => attributes.push(RouteAttribute::Table(route.table)),
    }
    attributes.push(RouteAttribute::Destination(RouteAddress::from(
        route.dst.address(),
    )));
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    if let Some(source) = route.source {
        attributes.push(RouteAttribute::PrefSource(RouteAddress::from(source)));
    }
    match &route.target {
        RouteTarget::Gateway {
            gateway,
            dev,
            onlink,
        } => {
            attributes.push(match (gateway, route.dst.family()) {
                (IpAddr::V6(gateway), Family::V4) => RouteAttribute::Via(RouteVia::Inet6(*gateway)),
                _ => RouteAttribute::Gateway(RouteAddress::from(*gateway)),
            });
            attributes.push(RouteAttribute::Oif(index(*dev)?));
            if *onlink {
                header.flags = RouteFlags::Onlink;
            }
        }
        RouteTarget::Nexthop(id) => attributes.push(RouteAttribute::NhId(*id)),
        RouteTarget::Device(dev) => {
            attributes.push(RouteAttribute::Oif(index(*dev)?));
            if route.dst.family() == Family::V4 {
                header.scope = RouteScope::Link;
            }
        }
        RouteTarget::Blackhole => header.kind = RouteType::BlackHole,
        other => {
            return Err(Error::Unsupported {
                what: format!("making a route to {other:?}"),
            });
        }
    }
    Ok(message)
}

/// The message that removes a route and no other.
///
/// # Errors
/// As [`message`].
pub(crate) fn removal(
    route: &Route,
    index: impl Fn(IfName) -> Result<u32>,
) -> Result<RouteMessage> {
    let mut message = message(route, index)?;
    // Whatever its scope: the one that was made with another scope is the same route.
    message.header.scope = RouteScope::NoWhere;
    if route.target == RouteTarget::Blackhole && route.dst.family() == Family::V6 {
        // IPv6 does not look at the type; the device tells a black hole from another route.
        message.attributes.push(RouteAttribute::Oif(LOOPBACK));
    }
    Ok(message)
}

/// The question which route a packet to the first address of a subnet takes, as the table has it.
pub(crate) fn lookup(dst: Subnet) -> Body {
    const RTM_F_LOOKUP_TABLE: u32 = 0x1000;
    const RTM_F_FIB_MATCH: u32 = 0x2000;
    const RTA_DST: u16 = 1;
    let family = match dst.family() {
        Family::V4 => AF_INET,
        Family::V6 => AF_INET6,
    };
    let [a, b, c, d] = (RTM_F_LOOKUP_TABLE | RTM_F_FIB_MATCH).to_ne_bytes();
    let len = dst.family().bits();
    let mut body = Body::new(&[family, len, 0, 0, 0, 0, 0, 0, a, b, c, d]);
    body.ip(RTA_DST, dst.address());
    body
}

/// The routes of a table and family.
pub(crate) fn dump(
    connection: &mut Connection,
    family: Family,
    table: u32,
) -> Result<Vec<Entry>, Failure> {
    let mut request = RouteMessage::default();
    request.header.address_family = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    match u8::try_from(table) {
        Ok(table) => request.header.table = table,
        Err(_) => request.attributes.push(RouteAttribute::Table(table)),
    }
    let answer = connection.dump(RTM_GETROUTE, &request, |message| {
        if message.kind != RTM_NEWROUTE {
            return Ok(None);
        }
        // A kernel that does not know the filter sends all tables and families.
        let entry = decode(message.body)?;
        Ok(entry.filter(|entry| entry.table == table && entry.dst.family() == family))
    });
    match answer {
        // The table has never had a route, or the family is not there.
        Err(failure)
            if matches!(
                failure.errno(),
                Some(Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP)
            ) =>
        {
            Ok(Vec::new())
        }
        other => other,
    }
}
