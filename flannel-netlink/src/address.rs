//! Addresses: `RTM_NEWADDR` and what `linux/if_addr.h` says of it.

use std::net::IpAddr;

use flannel_core::{Address, AddressInfo, IfName};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};

use crate::connection::Connection;
use crate::error::Failure;
use crate::wire::{Attributes, Malformed, field_u8, field_u32, read_ip, read_u32};

pub(crate) const RTM_NEWADDR: u16 = 20;
pub(crate) const RTM_DELADDR: u16 = 21;
pub(crate) const RTM_GETADDR: u16 = 22;

/// The length of `struct ifaddrmsg`.
const HEADER: usize = 8;
const RT_SCOPE_LINK: u8 = 253;
const IFA_F_TEMPORARY: u32 = 0x01;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_DEPRECATED: u32 = 0x20;
const IFA_F_TENTATIVE: u32 = 0x40;
const IFA_F_PERMANENT: u32 = 0x80;

/// An address as the kernel tells of it: the device by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The device.
    pub(crate) index: u32,
    /// The address.
    pub(crate) ip: IpAddr,
    /// The length of its on-link prefix.
    pub(crate) prefix_len: u8,
    scope: u8,
    flags: u32,
}

impl Entry {
    /// What tells it from others.
    pub(crate) const fn key(&self) -> (u32, IpAddr, u8) {
        (self.index, self.ip, self.prefix_len)
    }

    /// The address as an object.
    pub(crate) const fn object(&self, dev: IfName) -> Address {
        Address {
            dev,
            ip: self.ip,
            prefix_len: self.prefix_len,
        }
    }

    /// What an object does not say of the address.
    pub(crate) const fn info(&self, dev: IfName) -> AddressInfo {
        AddressInfo {
            dev,
            ip: self.ip,
            prefix_len: self.prefix_len,
            link_scope: self.scope >= RT_SCOPE_LINK,
            deprecated: self.flags & IFA_F_DEPRECATED != 0,
            permanent: self.flags & IFA_F_PERMANENT != 0,
            temporary: self.flags & IFA_F_TEMPORARY != 0,
            tentative: self.flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED) != 0,
        }
    }
}

/// Reads an `RTM_NEWADDR`; `None`: of another family than ours.
///
/// # Errors
/// [`Malformed`] if it is cut or a field has another length than the kernel gives it.
pub(crate) fn decode(body: &[u8]) -> Result<Option<Entry>, Malformed> {
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    const IFA_FLAGS: u16 = 8;
    let prefix_len = field_u8(body, 1)?;
    let mut flags = u32::from(field_u8(body, 2)?);
    let scope = field_u8(body, 3)?;
    let index = field_u32(body, 4)?;
    let mut address = None;
    let mut local = None;
    for attribute in Attributes::after(body, HEADER)? {
        let (kind, value) = attribute?;
        match kind {
            IFA_ADDRESS => address = read_ip(value),
            IFA_LOCAL => local = read_ip(value),
            IFA_FLAGS => flags = read_u32(value)?,
            _ => {}
        }
    }
    // IFA_LOCAL is ours; IFA_ADDRESS is the other end's on a point-to-point link, else the same.
    Ok(local.or(address).map(|ip| Entry {
        index,
        ip,
        prefix_len,
        scope,
        flags,
    }))
}

/// The message that makes or removes an address.
pub(crate) fn message(address: &Address, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = match address.ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.prefix_len = address.prefix_len;
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(address.ip));
    message
        .attributes
        .push(AddressAttribute::Address(address.ip));
    if address.ip.is_ipv6() {
        // Without it the address cannot be used for a second or more after each repair. Its
        // uniqueness is what the lease is for.
        message.header.flags = AddressHeaderFlags::Nodad;
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

/// All addresses of the namespace, in the kernel's order.
pub(crate) fn dump(connection: &mut Connection) -> Result<Vec<Entry>, Failure> {
    connection.dump(RTM_GETADDR, &AddressMessage::default(), |message| {
        if message.kind == RTM_NEWADDR {
            Ok(decode(message.body)?)
        } else {
            Ok(None)
        }
    })
}
