//! Neighbours and forwarding entries: `RTM_NEWNEIGH` and what `linux/neighbour.h` says of it.
//!
//! The two are one message: a forwarding entry has the family `AF_BRIDGE`, the hardware address as
//! its key and the remote in the place of the neighbour's address.

use std::net::IpAddr;

use flannel_core::{Fdb, IfName, MacAddr, Neighbour, ObjectKey};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use crate::connection::Connection;
use crate::error::Failure;
use crate::wire::{
    Attributes, Malformed, Message, field_u8, field_u16, field_u32, read_ip, read_mac,
};

pub(crate) const RTM_NEWNEIGH: u16 = 28;
pub(crate) const RTM_DELNEIGH: u16 = 29;
pub(crate) const RTM_GETNEIGH: u16 = 30;

/// The length of `struct ndmsg`.
const HEADER: usize = 12;
pub(crate) const AF_BRIDGE: u8 = 7;
pub(crate) const NUD_PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 0x02;
const NTF_PROXY: u8 = 0x08;

/// A neighbour or forwarding entry as the kernel tells of it: the device by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The device.
    pub(crate) index: u32,
    /// `AF_*`.
    pub(crate) family: u8,
    /// `NUD_*`.
    pub(crate) state: u16,
    flags: u8,
    dst: Option<IpAddr>,
    mac: Option<MacAddr>,
    /// It says more than our objects can, such as a port of its own.
    special: bool,
}

/// Reads an `RTM_NEWNEIGH` or `RTM_DELNEIGH`.
///
/// # Errors
/// [`Malformed`] if it is cut.
pub(crate) fn decode(body: &[u8]) -> Result<Entry, Malformed> {
    const NDA_DST: u16 = 1;
    const NDA_LLADDR: u16 = 2;
    const NDA_PORT: u16 = 6;
    const NDA_VNI: u16 = 7;
    const NDA_IFINDEX: u16 = 8;
    const NDA_SRC_VNI: u16 = 11;
    const NDA_NH_ID: u16 = 13;
    let mut entry = Entry {
        index: field_u32(body, 4)?,
        family: field_u8(body, 0)?,
        state: field_u16(body, 8)?,
        flags: field_u8(body, 10)?,
        dst: None,
        mac: None,
        special: false,
    };
    for attribute in Attributes::after(body, HEADER)? {
        let (kind, value) = attribute?;
        match kind {
            NDA_DST => entry.dst = read_ip(value),
            NDA_LLADDR => entry.mac = read_mac(value),
            // The kernel sends these only where they differ from the device's own.
            NDA_PORT | NDA_VNI | NDA_IFINDEX | NDA_SRC_VNI | NDA_NH_ID => entry.special = true,
            _ => {}
        }
    }
    Ok(entry)
}

impl Entry {
    /// Whether somebody configured it, so that it does not come and go by itself.
    pub(crate) const fn is_permanent(&self) -> bool {
        self.state & NUD_PERMANENT != 0
    }

    /// Whether it is in a table of the device itself: not an address answered for others, nor an
    /// entry of the bridge that the device is a port of.
    pub(crate) const fn is_of_device(&self) -> bool {
        if self.family == AF_BRIDGE {
            self.flags & NTF_SELF != 0
        } else {
            self.flags & NTF_PROXY == 0
        }
    }

    /// The key of the entry, whatever its state.
    pub(crate) fn key(&self, dev: IfName) -> Option<ObjectKey> {
        if self.family == AF_BRIDGE {
            self.mac.map(|mac| ObjectKey::Fdb { dev, mac })
        } else {
            self.dst.map(|ip| ObjectKey::Neighbour { dev, ip })
        }
    }

    /// The entry as a permanent neighbour, if it is one.
    pub(crate) fn neighbour(&self, dev: IfName) -> Option<Neighbour> {
        let usable = self.family != AF_BRIDGE && self.is_permanent() && self.flags & NTF_PROXY == 0;
        Some(Neighbour {
            dev,
            ip: self.dst.filter(|_| usable)?,
            mac: self.mac?,
        })
    }

    /// The entry as a permanent forwarding entry of the device itself, if it is one.
    pub(crate) fn fdb(&self, dev: IfName) -> Option<Fdb> {
        let usable = self.family == AF_BRIDGE
            && self.is_permanent()
            && self.flags & NTF_SELF != 0
            && !self.special;
        Some(Fdb {
            dev,
            mac: self.mac.filter(|mac| usable && mac.is_unicast())?,
            remote: self.dst?,
        })
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn address(ip: IpAddr) -> NeighbourAttribute {
    NeighbourAttribute::Destination(match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    })
}

/// The message that makes or removes a neighbour.
pub(crate) fn neighbour_message(neighbour: &Neighbour, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        address(neighbour.ip),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.0.to_vec()),
    ];
    message
}

/// The message that makes or removes a forwarding entry.
pub(crate) fn fdb_message(fdb: &Fdb, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![
        address(fdb.remote),
        NeighbourAttribute::LinkLayerAddress(fdb.mac.0.to_vec()),
    ];
    message
}

/// The question for one neighbour.
pub(crate) fn neighbour_query(ip: IpAddr, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    message.attributes = vec![address(ip)];
    message
}

/// The question for one forwarding entry.
pub(crate) fn fdb_query(mac: MacAddr, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Own;
    message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())];
    message
}

pub(crate) fn decode_message(message: &Message<'_>) -> Result<Option<Entry>, Failure> {
    if message.kind == RTM_NEWNEIGH {
        Ok(Some(decode(message.body)?))
    } else {
        Ok(None)
    }
}

/// The neighbours of a device, of both families.
pub(crate) fn dump(connection: &mut Connection, index: u32) -> Result<Vec<Entry>, Failure> {
    let mut request = NeighbourMessage::default();
    // The device is an attribute here, and a field of the header for forwarding entries.
    request.attributes.push(NeighbourAttribute::IfIndex(index));
    let entries = connection.dump(RTM_GETNEIGH, &request, decode_message)?;
    Ok(of_device(entries, index))
}

/// The forwarding entries of a device.
pub(crate) fn dump_fdb(connection: &mut Connection, index: u32) -> Result<Vec<Entry>, Failure> {
    let mut request = NeighbourMessage::default();
    request.header.family = AddressFamily::Bridge;
    request.header.ifindex = index;
    let entries = connection.dump(RTM_GETNEIGH, &request, decode_message)?;
    Ok(of_device(entries, index))
}

/// A kernel that does not know the filter sends the entries of all devices.
fn of_device(mut entries: Vec<Entry>, index: u32) -> Vec<Entry> {
    entries.retain(|entry| entry.index == index);
    entries
}
