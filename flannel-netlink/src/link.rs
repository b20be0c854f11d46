//! Devices: `RTM_NEWLINK` and what `linux/if_link.h` says of it.
//!
//! What this kernel changes in place on a VXLAN device, found by trying: MTU, hardware address,
//! alias, up and down, learning, the local address within its family, and the underlay device. It
//! refuses to change the VNI, the port, the GBP flag and the family of the local address.

use std::net::IpAddr;

use flannel_core::kernel::{Error, Result};
use flannel_core::{IfName, Link, LinkInfo, LinkKind, MacAddr, Object, Vxlan};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkExtentMask, LinkHeader,
    LinkMessage,
};
use nix::errno::Errno;
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};

use crate::connection::Connection;
use crate::error::{Failure, no_device};
use crate::names::Names;
use crate::wire::{
    Attributes, Malformed, Message, field_u32, read_ip, read_mac, read_text, read_u8, read_u16,
    read_u32,
};
use crate::{CREATE, EXCL};

pub(crate) const RTM_NEWLINK: u16 = 16;
pub(crate) const RTM_DELLINK: u16 = 17;
pub(crate) const RTM_GETLINK: u16 = 18;
pub(crate) const RTM_SETLINK: u16 = 19;

/// The length of `struct ifinfomsg`.
const HEADER: usize = 16;
const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
const IFF_LOWER_UP: u32 = 0x1_0000;

/// A device as the kernel tells of it: other devices by index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device {
    /// Its index.
    pub(crate) index: u32,
    /// Its name, unless it is none that we can write.
    pub(crate) name: Option<IfName>,
    /// `IFF_*`.
    flags: u32,
    mtu: u32,
    mac: Option<MacAddr>,
    alias: Option<String>,
    /// The kernel's name of its kind; empty for hardware.
    kind: String,
    /// The device it is bound to or paired with, if that is in this namespace.
    link: Option<u32>,
    master: Option<u32>,
    vxlan: VxlanDevice,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct VxlanDevice {
    vni: u32,
    port: u16,
    link: Option<u32>,
    local: Option<IpAddr>,
    learning: bool,
    gbp: bool,
}

/// Reads an `RTM_NEWLINK`.
///
/// # Errors
/// [`Malformed`] if it is cut or a field has another length than the kernel gives it.
pub(crate) fn decode(body: &[u8]) -> Result<Device, Malformed> {
    const IFLA_ADDRESS: u16 = 1;
    const IFLA_IFNAME: u16 = 3;
    const IFLA_MTU: u16 = 4;
    const IFLA_LINK: u16 = 5;
    const IFLA_MASTER: u16 = 10;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_IFALIAS: u16 = 20;
    const IFLA_LINK_NETNSID: u16 = 37;

    let mut device = Device {
        index: field_u32(body, 4)?,
        name: None,
        flags: field_u32(body, 8)?,
        mtu: 0,
        mac: None,
        alias: None,
        kind: String::new(),
        link: None,
        master: None,
        vxlan: VxlanDevice::default(),
    };
    let mut elsewhere = false;
    for attribute in Attributes::after(body, HEADER)? {
        let (kind, value) = attribute?;
        match kind {
            IFLA_ADDRESS => device.mac = read_mac(value),
            IFLA_IFNAME => device.name = IfName::new(read_text(value)).ok(),
            IFLA_MTU => device.mtu = read_u32(value)?,
            IFLA_LINK => device.link = Some(read_u32(value)?).filter(|index| *index != 0),
            IFLA_MASTER => device.master = Some(read_u32(value)?).filter(|index| *index != 0),
            IFLA_LINKINFO => decode_info(value, &mut device)?,
            IFLA_IFALIAS => {
                device.alias = Some(read_text(value)).filter(|alias| !alias.is_empty());
            }
            IFLA_LINK_NETNSID => elsewhere = true,
            _ => {}
        }
    }
    if elsewhere {
        // The index is one of another namespace.
        device.link = None;
        device.vxlan.link = None;
    }
    Ok(device)
}

fn decode_info(info: &[u8], device: &mut Device) -> Result<(), Malformed> {
    const IFLA_INFO_KIND: u16 = 1;
    const IFLA_INFO_DATA: u16 = 2;
    let mut data: &[u8] = &[];
    for attribute in Attributes(info) {
        let (kind, value) = attribute?;
        match kind {
            IFLA_INFO_KIND => device.kind = read_text(value),
            IFLA_INFO_DATA => data = value,
            _ => {}
        }
    }
    if device.kind == "vxlan" {
        device.vxlan = decode_vxlan(data)?;
    }
    Ok(())
}

fn decode_vxlan(data: &[u8]) -> Result<VxlanDevice, Malformed> {
    const IFLA_VXLAN_ID: u16 = 1;
    const IFLA_VXLAN_LINK: u16 = 3;
    const IFLA_VXLAN_LOCAL: u16 = 4;
    const IFLA_VXLAN_LEARNING: u16 = 7;
    const IFLA_VXLAN_PORT: u16 = 15;
    const IFLA_VXLAN_LOCAL6: u16 = 17;
    const IFLA_VXLAN_GBP: u16 = 23;
    let mut vxlan = VxlanDevice::default();
    for attribute in Attributes(data) {
        let (kind, value) = attribute?;
        match kind {
            IFLA_VXLAN_ID => vxlan.vni = read_u32(value)?,
            IFLA_VXLAN_LINK => vxlan.link = Some(read_u32(value)?).filter(|index| *index != 0),
            IFLA_VXLAN_LOCAL | IFLA_VXLAN_LOCAL6 => vxlan.local = read_ip(value),
            IFLA_VXLAN_LEARNING => vxlan.learning = read_u8(value)? != 0,
            IFLA_VXLAN_PORT => vxlan.port = u16::from_be(read_u16(value)?),
            IFLA_VXLAN_GBP => vxlan.gbp = true,
            _ => {}
        }
    }
    Ok(vxlan)
}

impl Device {
    /// Whether its name is worth a hint for every neighbour that changes on it.
    pub(crate) fn is_vxlan(&self) -> bool {
        self.kind == "vxlan"
    }

    /// The device as an object; `None`: its name cannot be written.
    pub(crate) fn object(&self, names: &Names) -> Option<Link> {
        let kind = match self.kind.as_str() {
            _ if self.flags & IFF_LOOPBACK != 0 => LinkKind::Loopback,
            "vxlan" => LinkKind::Vxlan(Vxlan {
                vni: self.vxlan.vni,
                port: self.vxlan.port,
                underlay: self.vxlan.link.and_then(|index| names.get(index)),
                local: self.vxlan.local,
                learning: self.vxlan.learning,
                gbp: self.vxlan.gbp,
            }),
            "bridge" => LinkKind::Bridge,
            "veth" => LinkKind::Veth {
                peer: self.link.and_then(|index| names.get(index)),
            },
            "tun" => LinkKind::Tun,
            other => LinkKind::Other(other.to_owned()),
        };
        Some(Link {
            name: self.name?,
            kind,
            mtu: Some(self.mtu),
            mac: self.mac,
            up: self.flags & IFF_UP != 0,
            alias: self.alias.clone(),
        })
    }

    /// What an object does not say of the device.
    pub(crate) fn info(&self, names: &Names) -> Option<LinkInfo> {
        Some(LinkInfo {
            name: self.name?,
            index: self.index,
            mtu: self.mtu,
            up: self.flags & IFF_UP != 0,
            running: self.flags & IFF_LOWER_UP != 0,
            loopback: self.flags & IFF_LOOPBACK != 0,
            mac: self.mac,
            master: self.master.and_then(|index| names.get(index)),
        })
    }
}

fn decode_message(message: &Message<'_>) -> Result<Option<Device>, Failure> {
    if message.kind == RTM_NEWLINK {
        Ok(Some(decode(message.body)?))
    } else {
        Ok(None)
    }
}

/// Asks for no statistics, which are most of what the kernel would send.
fn lean(mut message: LinkMessage) -> LinkMessage {
    message
        .attributes
        .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    message
}

/// All devices of the namespace, in the kernel's order.
pub(crate) fn dump(connection: &mut Connection) -> Result<Vec<Device>, Failure> {
    connection.dump(RTM_GETLINK, &lean(LinkMessage::default()), decode_message)
}

/// One device by name; `None`: there is none.
pub(crate) fn get(connection: &mut Connection, name: IfName) -> Result<Option<Device>, Failure> {
    let request = lean(LinkUnspec::new_with_name(name.as_str()).build());
    match connection.get(RTM_GETLINK, 0, &request, decode_message) {
        Err(failure) if failure.errno() == Some(Errno::ENODEV) => Ok(None),
        other => other,
    }
}

/// Whether what is there is what was asked for. What was not asked is right as it is.
pub(crate) fn satisfies(found: &Link, asked: &Link) -> Result<(), String> {
    let differs = |what: &str, found: &dyn std::fmt::Debug, asked: &dyn std::fmt::Debug| {
        Err(format!("{what} is {found:?} and not {asked:?}"))
    };
    match (&found.kind, &asked.kind) {
        (LinkKind::Veth { .. }, LinkKind::Veth { peer: None }) => {}
        (is, wanted) if is == wanted => {}
        (is, wanted) => return differs("kind", is, wanted),
    }
    if asked.mtu.is_some() && found.mtu != asked.mtu {
        return differs("MTU", &found.mtu, &asked.mtu);
    }
    if asked.mac.is_some() && found.mac != asked.mac {
        return differs("hardware address", &found.mac, &asked.mac);
    }
    if asked.alias.is_some() && found.alias != asked.alias {
        return differs("alias", &found.alias, &asked.alias);
    }
    if found.up != asked.up {
        return differs("up", &found.up, &asked.up);
    }
    Ok(())
}

/// What of a device is set in one message with its kind.
fn dress<T>(mut builder: LinkMessageBuilder<T>, link: &Link) -> LinkMessageBuilder<T> {
    if let Some(mtu) = link.mtu {
        builder = builder.mtu(mtu);
    }
    if let Some(mac) = link.mac {
        builder = builder.address(mac.0.to_vec());
    }
    builder
}

/// The message that makes a device, down and without an alias.
///
/// # Errors
/// [`Error::Unsupported`] for a kind that is not made by netlink.
pub(crate) fn creation(link: &Link, underlay: Option<u32>) -> Result<LinkMessage> {
    let name = link.name.as_str();
    let mut message = match &link.kind {
        LinkKind::Vxlan(vxlan) => {
            let mut builder = LinkVxlan::new(name, vxlan.vni)
                .port(vxlan.port)
                .learning(vxlan.learning)
                .proxy(false)
                .l2miss(false)
                .l3miss(false);
            if let Some(index) = underlay {
                builder = builder.dev(index);
            }
            builder = match vxlan.local {
                Some(IpAddr::V4(local)) => builder.local(local),
                Some(IpAddr::V6(local)) => builder.local6(local),
                None => builder,
            };
            if vxlan.gbp {
                builder = builder.gbp();
            }
            dress(builder, link).build()
        }
        LinkKind::Bridge => dress(LinkBridge::new(name), link).build(),
        LinkKind::Veth { peer: Some(peer) } => {
            dress(LinkVeth::new(name, peer.as_str()), link).build()
        }
        LinkKind::Veth { peer: None } => dress(
            LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
                .name(name.to_owned()),
            link,
        )
        .build(),
        kind => {
            return Err(Error::Unsupported {
                what: format!("making a device of kind {kind:?}: make it with other means"),
            });
        }
    };
    // The builder of bridges makes them up.
    message.header = LinkHeader::default();
    Ok(message)
}

fn underlay_index(link: &Link, names: &Names) -> Result<Option<u32>> {
    underlay(link).map(|dev| names.index(dev)).transpose()
}

/// Makes a device. If that fails half-way nothing stays behind.
pub(crate) fn create(connection: &mut Connection, names: &Names, link: &Link) -> Result<()> {
    let failed = |failure: Failure| failure.meaning(None, || format!("link {}", link.name));
    // Names of devices and of their other names (altnames) share one space; the kernel looks.
    let message = creation(link, underlay_index(link, names)?)?;
    if let Err(failure) = connection.request(RTM_NEWLINK, CREATE | EXCL, &message) {
        if failure.errno() == Some(Errno::EEXIST)
            && let Some(found) = read(connection, link.name).map_err(failed)?
        {
            return satisfies(&found, link).map_err(|why| Error::Exists {
                message: format!("{}: its {why}", Object::Link(found.clone())),
            });
        }
        return Err(match failure.errno() {
            // Not the device itself but what it is bound to.
            Some(Errno::ENODEV) => Error::NoSuchDevice {
                dev: underlay(link).map_or_else(|| link.name.to_string(), |u| u.to_string()),
            },
            _ => failed(failure),
        });
    }
    let finished = finish(connection, link);
    if finished.is_err() {
        // What failed is told; that the rest is gone is seen when the state is read again.
        drop(delete_message(connection, link.name));
    }
    finished
}

/// The device that a device is bound to.
pub(crate) const fn underlay(link: &Link) -> Option<IfName> {
    match &link.kind {
        LinkKind::Vxlan(vxlan) => vxlan.underlay,
        _ => None,
    }
}

/// Sets what can only be set on a device that is there, brings it up and reads it back.
fn finish(connection: &mut Connection, link: &Link) -> Result<()> {
    let failed = |failure: Failure| failure.meaning(Some(link.name), || link.name.to_string());
    if matches!(link.kind, LinkKind::Vxlan(_)) {
        // No IPv6 link-local address: nobody uses it, and its duplicate detection would send
        // packets into the overlay. The kernel refuses this while it makes the device. A kernel
        // without IPv6 has nothing to switch off.
        let mut message = LinkUnspec::new_with_name(link.name.as_str()).build();
        message
            .attributes
            .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
                vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
            )]));
        match connection.request(RTM_SETLINK, 0, &message) {
            Err(failure)
                if !matches!(
                    failure.errno(),
                    Some(Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP)
                ) =>
            {
                return Err(failed(failure));
            }
            _ => {}
        }
    }
    if link.alias.is_some() || link.up {
        let mut builder = LinkUnspec::new_with_name(link.name.as_str());
        if let Some(alias) = &link.alias {
            builder = builder.alias(alias.clone());
        }
        if link.up {
            builder = builder.up();
        }
        connection
            .request(RTM_SETLINK, 0, &builder.build())
            .map_err(failed)?;
    }
    verify(connection, link)
}

/// Reads a device back: success of a request alone does not prove that it was carried out in full.
fn verify(connection: &mut Connection, link: &Link) -> Result<()> {
    let failed = |failure: Failure| failure.meaning(Some(link.name), || link.name.to_string());
    let found = read(connection, link.name)
        .map_err(failed)?
        .ok_or_else(|| no_device(link.name))?;
    satisfies(&found, link).map_err(|why| Error::Rejected {
        message: format!("the kernel took it and made something else of it: its {why}"),
    })
}

/// One device by name as an object.
fn read(connection: &mut Connection, name: IfName) -> Result<Option<Link>, Failure> {
    let Some(device) = get(connection, name)? else {
        return Ok(None);
    };
    let names = if device.link.is_some() || device.vxlan.link.is_some() {
        Names::read(connection)?
    } else {
        Names::default()
    };
    Ok(device.object(&names))
}

/// Alters a device in place.
pub(crate) fn change(connection: &mut Connection, names: &Names, link: &Link) -> Result<()> {
    let failed = |failure: Failure| failure.meaning(Some(link.name), || link.name.to_string());
    let device = get(connection, link.name)
        .map_err(failed)?
        .ok_or_else(|| no_device(link.name))?;
    let found = device.object(names).ok_or_else(|| no_device(link.name))?;
    let bound_to = underlay_index(link, names)?;
    let fixed = |what: &str| {
        Err(Error::Unsupported {
            what: format!("changing {what} of {} in place", link.name),
        })
    };
    match (&found.kind, &link.kind) {
        (LinkKind::Vxlan(is), LinkKind::Vxlan(asked)) => {
            let family = |local: Option<IpAddr>| local.map(|ip| ip.is_ipv6());
            if is.vni != asked.vni {
                return fixed("the VNI");
            }
            if is.port != asked.port {
                return fixed("the port");
            }
            if is.gbp != asked.gbp {
                return fixed("the GBP flag");
            }
            if family(is.local) != family(asked.local) {
                return fixed("the family of the local address");
            }
            if asked.underlay.is_none() && device.vxlan.link.is_some() {
                return fixed("the underlay device to none");
            }
            if is != asked {
                let mut builder =
                    LinkMessageBuilder::<LinkVxlan>::new_with_info_kind(InfoKind::Vxlan)
                        .index(device.index)
                        .id(asked.vni)
                        .learning(asked.learning);
                if let Some(index) = bound_to {
                    builder = builder.dev(index);
                }
                builder = match asked.local {
                    Some(IpAddr::V4(local)) => builder.local(local),
                    Some(IpAddr::V6(local)) => builder.local6(local),
                    None => builder,
                };
                connection
                    .request(RTM_NEWLINK, 0, &builder.build())
                    .map_err(failed)?;
            }
        }
        (LinkKind::Veth { .. }, LinkKind::Veth { peer: None }) => {}
        (is, asked) if is == asked => {}
        (LinkKind::Veth { .. }, LinkKind::Veth { .. }) => return fixed("the other end"),
        _ => return fixed("the kind"),
    }
    let mut builder = LinkUnspec::new_with_index(device.index);
    let mut wanted = false;
    if let Some(mtu) = link.mtu.filter(|mtu| Some(*mtu) != found.mtu) {
        builder = builder.mtu(mtu);
        wanted = true;
    }
    if let Some(mac) = link.mac.filter(|mac| Some(*mac) != found.mac) {
        builder = builder.address(mac.0.to_vec());
        wanted = true;
    }
    if let Some(alias) = link.alias.as_ref().filter(|_| link.alias != found.alias) {
        builder = builder.alias(alias.clone());
        wanted = true;
    }
    if link.up != found.up {
        builder = if link.up {
            builder.up()
        } else {
            builder.down()
        };
        wanted = true;
    }
    if wanted {
        connection
            .request(RTM_SETLINK, 0, &builder.build())
            .map_err(failed)?;
    }
    verify(connection, link)
}

/// Removes a device, unless what has its name now is of another kind, another VXLAN network or
/// bears another alias.
pub(crate) fn delete(connection: &mut Connection, names: &Names, link: &Link) -> Result<()> {
    let failed = |failure: Failure| failure.meaning(Some(link.name), || link.name.to_string());
    let Some(device) = get(connection, link.name).map_err(failed)? else {
        return Ok(());
    };
    let Some(found) = device.object(names) else {
        return Ok(());
    };
    let same_kind = match (&found.kind, &link.kind) {
        (LinkKind::Vxlan(is), LinkKind::Vxlan(meant)) => is.vni == meant.vni,
        (LinkKind::Other(is), LinkKind::Other(meant)) => is == meant,
        (is, meant) => std::mem::discriminant(is) == std::mem::discriminant(meant),
    };
    if !same_kind || found.alias != link.alias {
        return Ok(());
    }
    let message = LinkUnspec::new_with_index(device.index).build();
    match connection.request(RTM_DELLINK, 0, &message) {
        Err(failure) if failure.errno() == Some(Errno::ENODEV) => Ok(()),
        other => other.map_err(failed),
    }
}

fn delete_message(connection: &mut Connection, name: IfName) -> Result<(), Failure> {
    let message = LinkUnspec::new_with_name(name.as_str()).build();
    connection.request(RTM_DELLINK, 0, &message)
}

/// A request that names no device and sets nothing: with the right to change devices the kernel
/// answers `EINVAL`, without it `EPERM`. It never does anything.
pub(crate) fn harmless() -> LinkMessage {
    LinkMessage::default()
}

/// A request for a new device of a kind without what the kind needs. The kernel answers `EINVAL`
/// if it knows the kind and `EOPNOTSUPP` if it does not; it makes nothing in either case.
pub(crate) fn incomplete_vxlan() -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header = LinkHeader::default();
    message.header.interface_family = AddressFamily::Unspec;
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        netlink_packet_route::link::LinkInfo::Kind(InfoKind::Vxlan),
    ]));
    message
}
