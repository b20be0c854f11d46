//! Devices: `RTM_NEWLINK` and what `linux/if_link.h` says of it.
//!
//! What this kernel changes in place on a VXLAN device, found by trying: MTU, hardware address,
//! alias, up and down, learning, the local address within its family, and the underlay device. It
//! refuses to change the VNI, the port, the GBP flag and the family of the local address.

use std::net::IpAddr;

use flannel_core::kernel::{Error, Result};
use flannel_core::{IfName, Link, LinkInfo, LinkKind, MacAddr, Tun, Vxlan};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkExtentMask, LinkHeader,
    LinkMessage,
};
use nix::errno::Errno;
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};

use crate::connection::Connection;
use crate::error::Failure;
use crate::names::Names;
use crate::tun;
use crate::wire::{
    Attributes, Malformed, Message, field_u32, read_ip, read_mac, read_text, read_u8, read_u16,
    read_u32,
};

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
    queue: u32,
    mac: Option<MacAddr>,
    alias: Option<String>,
    /// The kernel's name of its kind; empty for hardware.
    kind: String,
    /// The device it is bound to or paired with, if that is in this namespace.
    link: Option<u32>,
    master: Option<u32>,
    vxlan: VxlanDevice,
    /// What it is as a TUN device, if it is one.
    tun: Option<Tun>,
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
    const IFLA_TXQLEN: u16 = 13;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_IFALIAS: u16 = 20;
    const IFLA_LINK_NETNSID: u16 = 37;

    let mut device = Device {
        index: field_u32(body, 4)?,
        name: None,
        flags: field_u32(body, 8)?,
        mtu: 0,
        queue: 0,
        mac: None,
        alias: None,
        kind: String::new(),
        link: None,
        master: None,
        vxlan: VxlanDevice::default(),
        tun: None,
    };
    let mut elsewhere = false;
    for attribute in Attributes::after(body, HEADER)? {
        let (kind, value) = attribute?;
        match kind {
            IFLA_ADDRESS => device.mac = read_mac(value),
            IFLA_IFNAME => device.name = IfName::new(read_text(value)).ok(),
            IFLA_MTU => device.mtu = read_u32(value)?,
            IFLA_TXQLEN => device.queue = read_u32(value)?,
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
    match device.kind.as_str() {
        "vxlan" => device.vxlan = decode_vxlan(data)?,
        "tun" => device.tun = tun::decode(data)?,
        _ => {}
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
    /// Whether it is bound to or paired with another device of this namespace.
    pub(crate) const fn has_link(&self) -> bool {
        self.link.is_some() || self.vxlan.link.is_some()
    }

    /// Tells if it is a VXLAN device that receives on a UDP port of a family; one that has no address
    /// may do so in both.
    pub(crate) fn receives_on(&self, port: u16, is_v6: bool) -> bool {
        self.is_vxlan()
            && self.vxlan.port == port
            && self.flags & IFF_UP != 0
            && self
                .vxlan
                .local
                .is_none_or(|local| local.is_ipv6() == is_v6)
    }

    /// Whether it is a VXLAN device.
    pub(crate) fn is_vxlan(&self) -> bool {
        self.kind == "vxlan"
    }

    /// Whether what is on the device may have gone when it became this.
    pub(crate) fn loses_to(&self, now: &Self) -> bool {
        let was_set_down = self.flags & IFF_UP != 0 && now.flags & IFF_UP == 0;
        was_set_down
            || self.mac != now.mac
            || self.master != now.master
            || self.kind != now.kind
            || self.vxlan != now.vxlan
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
            "tun" => match self.tun {
                Some(tun) => LinkKind::Tun(Tun {
                    queue: Some(self.queue),
                    ..tun
                }),
                None => LinkKind::Other("tap".to_owned()),
            },
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
    get_one(connection, LinkUnspec::new_with_name(name.as_str()).build())
}

/// One device by index; `None`: there is none.
pub(crate) fn get_by_index(
    connection: &mut Connection,
    index: u32,
) -> Result<Option<Device>, Failure> {
    get_one(connection, LinkUnspec::new_with_index(index).build())
}

fn get_one(connection: &mut Connection, which: LinkMessage) -> Result<Option<Device>, Failure> {
    let request = lean(which);
    match connection.get(RTM_GETLINK, 0, &request, decode_message) {
        Err(failure) if failure.errno() == Some(Errno::ENODEV) => Ok(None),
        other => other,
    }
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
                .proxy(false)
                .l2miss(false)
                .l3miss(false);
            builder = attach(builder, vxlan, underlay);
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

/// The message that changes what can be changed of a VXLAN device in place, all of it.
pub(crate) fn alteration(index: u32, vxlan: &Vxlan, underlay: Option<u32>) -> LinkMessage {
    let builder = LinkMessageBuilder::<LinkVxlan>::new_with_info_kind(InfoKind::Vxlan)
        .index(index)
        .id(vxlan.vni);
    attach(builder, vxlan, underlay).build()
}

fn attach(
    mut builder: LinkMessageBuilder<LinkVxlan>,
    vxlan: &Vxlan,
    underlay: Option<u32>,
) -> LinkMessageBuilder<LinkVxlan> {
    if let Some(index) = underlay {
        builder = builder.dev(index);
    }
    builder = match vxlan.local {
        Some(IpAddr::V4(local)) => builder.local(local),
        Some(IpAddr::V6(local)) => builder.local6(local),
        None => builder,
    };
    builder.learning(vxlan.learning)
}

/// The message that keeps a device from giving itself an IPv6 link-local address.
pub(crate) fn no_link_local(index: u32) -> LinkMessage {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let mut message = LinkUnspec::new_with_index(index).build();
    message
        .attributes
        .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
            vec![mode],
        )]));
    message
}

/// The device that a device is bound to.
pub(crate) const fn underlay(link: &Link) -> Option<IfName> {
    match &link.kind {
        LinkKind::Vxlan(vxlan) => vxlan.underlay,
        _ => None,
    }
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
