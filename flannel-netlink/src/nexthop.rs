//! Nexthop objects: `RTM_NEWNEXTHOP` and what `linux/nexthop.h` says of it (Linux 5.3).
//!
//! `netlink-packet-route` knows the number of a nexthop in a route and not the object itself, so
//! the message is written here: `struct nhmsg` is family, scope, protocol, a zero byte and 32 bits
//! of flags, followed by attributes.

use std::net::IpAddr;

use flannel_core::{Nexthop, RouteProtocol};

use crate::connection::Connection;
use crate::error::Failure;
use crate::wire::{Attributes, Body, Malformed, Message, field_u8, field_u32, read_ip, read_u32};

pub(crate) const RTM_NEWNEXTHOP: u16 = 104;
pub(crate) const RTM_DELNEXTHOP: u16 = 105;
pub(crate) const RTM_GETNEXTHOP: u16 = 106;

/// The length of `struct nhmsg`.
const HEADER: usize = 8;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const RTNH_F_ONLINK: u32 = 4;
const NHA_ID: u16 = 1;
const NHA_GROUP: u16 = 2;
const NHA_BLACKHOLE: u16 = 4;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;
const NHA_ENCAP: u16 = 8;
const NHA_FDB: u16 = 11;

/// A nexthop object as the kernel tells of it: the device by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its number.
    pub(crate) id: u32,
    /// The device and the gateway; `None`: it is a group, a black hole or of another form that we
    /// have no word for.
    pub(crate) path: Option<(u32, IpAddr)>,
    onlink: bool,
    /// Who made it.
    pub(crate) protocol: RouteProtocol,
}

impl Entry {
    /// The nexthop as an object, given the name of its device.
    pub(crate) fn object(&self, dev: flannel_core::IfName) -> Option<Nexthop> {
        let (_, gateway) = self.path?;
        Some(Nexthop {
            id: self.id,
            gateway,
            dev,
            onlink: self.onlink,
            protocol: self.protocol,
        })
    }
}

/// Reads an `RTM_NEWNEXTHOP`; `None`: it has no number.
///
/// # Errors
/// [`Malformed`] if it is cut or a field has another length than the kernel gives it.
pub(crate) fn decode(body: &[u8]) -> Result<Option<Entry>, Malformed> {
    let protocol = RouteProtocol(field_u8(body, 2)?);
    let flags = field_u32(body, 4)?;
    let (mut id, mut oif, mut gateway, mut special) = (None, None, None, false);
    for attribute in Attributes::after(body, HEADER)? {
        let (kind, value) = attribute?;
        match kind {
            NHA_ID => id = Some(read_u32(value)?),
            NHA_OIF => oif = Some(read_u32(value)?),
            NHA_GATEWAY => gateway = read_ip(value),
            NHA_GROUP | NHA_BLACKHOLE | NHA_ENCAP | NHA_FDB => special = true,
            _ => {}
        }
    }
    Ok(id.map(|id| Entry {
        id,
        path: oif.zip(gateway).filter(|_| !special),
        onlink: flags & RTNH_F_ONLINK != 0,
        protocol,
    }))
}

fn header(family: u8, protocol: u8, flags: u32) -> Body {
    let [a, b, c, d] = flags.to_ne_bytes();
    Body::new(&[family, 0, protocol, 0, a, b, c, d])
}

/// The message that makes a nexthop object.
pub(crate) fn message(nexthop: &Nexthop, index: u32) -> Body {
    let family = match nexthop.gateway {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    };
    let flags = if nexthop.onlink { RTNH_F_ONLINK } else { 0 };
    let mut body = header(family, nexthop.protocol.0, flags);
    body.attribute(NHA_ID, &nexthop.id.to_ne_bytes());
    body.ip(NHA_GATEWAY, nexthop.gateway);
    body.attribute(NHA_OIF, &index.to_ne_bytes());
    body
}

/// The message that names a nexthop object: a question for it, or its removal.
pub(crate) fn reference(id: u32) -> Body {
    let mut body = header(0, 0, 0);
    body.attribute(NHA_ID, &id.to_ne_bytes());
    body
}

pub(crate) fn decode_message(message: &Message<'_>) -> Result<Option<Entry>, Failure> {
    if message.kind == RTM_NEWNEXTHOP {
        Ok(decode(message.body)?)
    } else {
        Ok(None)
    }
}

/// All nexthop objects of the namespace. A kernel that has none at all is refused by its number.
pub(crate) fn dump(connection: &mut Connection) -> Result<Vec<Entry>, Failure> {
    connection.dump(RTM_GETNEXTHOP, &header(0, 0, 0), decode_message)
}
