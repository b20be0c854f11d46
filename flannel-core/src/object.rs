//! Kernel objects as data: [`Object`], its [`ObjectKey`], and the maps that hold them.
//!
//! Devices are named, never numbered: an index changes when a device is made again, a name does
//! not. The order of [`ObjectKey`]'s variants *is* the order in which objects are made; they are
//! removed in the reverse order. [`Object::needs`] names only keys of a lower rank.

mod tunnel;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::family::Family;
use crate::lease::BackendType;
use crate::node::NameError;
use crate::subnet::Subnet;

pub use tunnel::{Tun, Tunnel, TunnelPeer};

/// The name of a network device: 1 to 15 bytes, no `/`, no white space, not `.` or `..`
/// (`dev_valid_name` of the Linux kernel, less what is not printable ASCII).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName {
    /// The name, padded with zeros, so that comparing bytes compares names.
    bytes: [u8; Self::MAX_LEN],
}

impl IfName {
    /// The longest name, in bytes (`IFNAMSIZ` less the closing zero).
    pub const MAX_LEN: usize = 15;

    /// Before every name in the order of names, and none itself.
    pub(crate) const FIRST: Self = Self {
        bytes: [0; Self::MAX_LEN],
    };

    /// A device name.
    ///
    /// # Errors
    /// [`NameError`] if the kernel would not take the name.
    pub fn new(name: impl AsRef<str>) -> Result<Self, NameError> {
        let name = name.as_ref();
        crate::node::check_name(
            "the device name",
            name,
            Self::MAX_LEN,
            "printable ASCII but no space, slash or colon",
            |b| b.is_ascii_graphic() && b != b'/' && b != b':',
        )?;
        if name == "." || name == ".." {
            return Err(NameError::Character {
                what: "the device name",
                text: name.to_owned(),
                allowed: "more than dots",
            });
        }
        let mut bytes = [0; Self::MAX_LEN];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Self { bytes })
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        let len = self
            .bytes
            .iter()
            .position(|b| *b == 0)
            .unwrap_or(Self::MAX_LEN);
        std::str::from_utf8(&self.bytes[..len]).unwrap_or_default()
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for IfName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl Serialize for IfName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for IfName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::new(text).map_err(serde::de::Error::custom)
    }
}

/// Why a text is no MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a MAC address: write six pairs of hexadecimal digits, such as 0e:11:22:33:44:55"
)]
pub struct MacError {
    /// What was given, cut to 64 characters.
    pub text: String,
}

/// An Ethernet hardware address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Whether the address may belong to one device: neither multicast nor all zeros.
    pub fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }

    /// A locally administered unicast address out of 46 bits of a number.
    pub fn local(number: u64) -> Self {
        let [b0, b1, b2, b3, b4, b5, ..] = number.to_be_bytes();
        Self([(b0 & 0xfe) | 0x02, b1, b2, b3, b4, b5])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    /// Reads six pairs of hexadecimal digits separated by `:` or `-`, or three groups of four
    /// separated by `.` (the six-byte forms that Go's `net.ParseMAC` takes).
    fn from_str(text: &str) -> Result<Self, MacError> {
        let bad = || MacError {
            text: text.chars().take(64).collect(),
        };
        let (group, seps): (usize, &[char]) = match text.len() {
            17 => (2, &[':', '-']),
            14 => (4, &['.']),
            _ => return Err(bad()),
        };
        let sep = text
            .chars()
            .nth(group)
            .filter(|c| seps.contains(c))
            .ok_or_else(bad)?;
        let mut digits = String::with_capacity(12);
        for part in text.split(sep) {
            if part.len() != group || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            digits.push_str(part);
        }
        let number = u64::from_str_radix(&digits, 16).map_err(|_| bad())?;
        let [_, _, bytes @ ..] = number.to_be_bytes();
        Ok(Self(bytes))
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The number in the protocol field of a route, nexthop or neighbour: who made it
/// (`rtm_protocol` of rtnetlink(7)).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct RouteProtocol(pub u8);

impl RouteProtocol {
    /// Not known (`RTPROT_UNSPEC`).
    pub const UNSPEC: Self = Self(0);
    /// Made by the kernel (`RTPROT_KERNEL`), such as the route of a connected network.
    pub const KERNEL: Self = Self(2);
    /// What `ip route` and Go flannel leave (`RTPROT_BOOT`).
    pub const BOOT: Self = Self(3);
    /// Ours unless set otherwise: a number that no routing daemon has registered.
    pub const OURS: Self = Self(241);
}

/// The main routing table (`RT_TABLE_MAIN`).
pub const MAIN_TABLE: u32 = 254;

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Its name.
    pub name: IfName,
    /// What kind of device it is.
    pub kind: LinkKind,
    /// The largest packet it carries, in bytes; `None`: the kernel chooses, any is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Its hardware address; `None`: the kernel chooses, any is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// Whether it is administratively up.
    pub up: bool,
    /// Its alias (`ip link set alias`): our mark of ownership; `None`: any is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
}

/// The kind of a device with what cannot be said of other kinds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum LinkKind {
    /// A VXLAN device.
    Vxlan(Vxlan),
    /// A bridge.
    Bridge,
    /// One end of a pair of virtual Ethernet devices.
    Veth {
        /// The other end, where it is in the same namespace and its name is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        peer: Option<IfName>,
    },
    /// A TUN device. One whose maker's kernel does not tell more (before Linux 4.17) counts as
    /// [`Tun::FOR_TUNNEL`].
    Tun(Tun),
    /// The loopback device.
    Loopback,
    /// Hardware, or a kind that we have no word for; the kernel's own name of it, if it has one.
    Other(String),
}

impl LinkKind {
    /// The backend whose overlay devices are of this kind, if there is one.
    pub fn backend(&self) -> Option<BackendType> {
        match self {
            Self::Vxlan(_) => Some(BackendType::vxlan()),
            Self::Tun(_) => Some(BackendType::udp()),
            _ => None,
        }
    }
}

/// What a VXLAN device is (RFC 7348; `IFLA_VXLAN_*` of `linux/if_link.h`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vxlan {
    /// The VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// The UDP port on which it receives and to which it sends.
    pub port: u16,
    /// The device of the underlay it is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub underlay: Option<IfName>,
    /// The source address of its outer packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<IpAddr>,
    /// Whether it learns forwarding entries from what it receives.
    #[serde(default)]
    pub learning: bool,
    /// Whether it carries group policy marks (`GBP`).
    #[serde(default)]
    pub gbp: bool,
}

/// A setting under `/proc/sys/net/<ipv4|ipv6>/conf/<device>/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sysctl {
    /// The device.
    pub dev: IfName,
    /// Which of the two trees.
    pub family: Family,
    /// The name of the file, such as `accept_ra`: lower-case letters, digits and `_`.
    pub name: String,
    /// What is in it, without white space at the ends.
    pub value: String,
}

/// An offload of a device that is switched on or off (`ethtool -K`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offload {
    /// The device.
    pub dev: IfName,
    /// The kernel's name of the feature, such as `tx-checksum-ip-generic`.
    pub feature: String,
    /// Whether it is on.
    pub on: bool,
}

/// An address of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The device.
    pub dev: IfName,
    /// The address.
    pub ip: IpAddr,
    /// The length of its on-link prefix.
    pub prefix_len: u8,
}

impl Sysctl {
    /// No address or route from the router advertisements that arrive on a device (`accept_ra` of
    /// ip-sysctl): whoever is at the other end of a tunnel is no router of this node.
    pub fn no_router_advertisements(dev: IfName) -> Self {
        Self {
            dev,
            family: Family::V6,
            name: "accept_ra".to_owned(),
            value: "0".to_owned(),
        }
    }

    /// The device has IPv6, whatever new devices have by default.
    pub fn with_ipv6(dev: IfName) -> Self {
        Self {
            dev,
            family: Family::V6,
            name: "disable_ipv6".to_owned(),
            value: "0".to_owned(),
        }
    }
}

impl Address {
    /// The address that a tunnel's device has of the node's subnet, as with flannel: the subnet's
    /// own, without an on-link prefix.
    pub fn of_tunnel(dev: IfName, subnet: Subnet) -> Self {
        Self {
            dev,
            ip: subnet.address(),
            prefix_len: subnet.family().bits(),
        }
    }
}

/// An entry of a device's forwarding database: the remote of a MAC address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fdb {
    /// The device.
    pub dev: IfName,
    /// The hardware address, a peer's VTEP.
    pub mac: MacAddr,
    /// Where frames to it are sent.
    pub remote: IpAddr,
}

/// A permanent entry of a device's neighbour table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// The device.
    pub dev: IfName,
    /// The address resolved.
    pub ip: IpAddr,
    /// What it resolves to.
    pub mac: MacAddr,
}

/// A nexthop object: a gateway with a number, which any count of routes may use (Linux 5.3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nexthop {
    /// Its number in the namespace, not zero.
    pub id: u32,
    /// The next node on the way.
    pub gateway: IpAddr,
    /// The device it is behind.
    pub dev: IfName,
    /// Take the gateway as reachable on the device whatever the addresses say.
    #[serde(default)]
    pub onlink: bool,
    /// Who made it.
    #[serde(default)]
    pub protocol: RouteProtocol,
}

/// A unicast (or blackhole) route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The routing table.
    pub table: u32,
    /// The destination.
    pub dst: Subnet,
    /// The metric as the kernel reports it: IPv6 routes made without one have 1024.
    pub metric: u32,
    /// Where packets go.
    pub target: RouteTarget,
    /// Who made it.
    #[serde(default)]
    pub protocol: RouteProtocol,
    /// The address that this host's own packets are sent from (`RTA_PREFSRC`); `None`: the kernel
    /// picks one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
}

impl Route {
    /// The same route with another protocol number.
    pub(crate) fn with_number(&self, protocol: RouteProtocol) -> Self {
        Self {
            protocol,
            ..self.clone()
        }
    }

    /// The metric that the kernel gives a route made without one.
    pub const fn default_metric(family: Family) -> u32 {
        match family {
            Family::V4 => 0,
            Family::V6 => 1024,
        }
    }
}

/// Where a route sends packets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum RouteTarget {
    /// To a gateway.
    Gateway {
        /// The next node on the way.
        gateway: IpAddr,
        /// The device it is behind.
        dev: IfName,
        /// Take the gateway as reachable on the device whatever the addresses say.
        #[serde(default)]
        onlink: bool,
    },
    /// To a nexthop object.
    Nexthop(u32),
    /// Straight to the device.
    Device(IfName),
    /// Nowhere: packets are dropped.
    Blackhole,
    /// Over several paths, one for each flow; never asked for.
    Paths(Vec<RoutePath>),
    /// Something else that we never ask for; in the kernel's words.
    Other(String),
}

/// One of several paths of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutePath {
    /// The next node on the way; `None`: straight to the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// The device.
    pub dev: IfName,
}

/// One object of the kernel's network configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Object {
    /// A device.
    Link(Link),
    /// A setting of a device.
    Sysctl(Sysctl),
    /// An offload of a device.
    Offload(Offload),
    /// An address.
    Address(Address),
    /// The node's own packet path. It is large, and there is one.
    Tunnel(Box<Tunnel>),
    /// A peer of it.
    #[serde(rename = "tunnel-peer")]
    TunnelPeer(TunnelPeer),
    /// A forwarding entry.
    Fdb(Fdb),
    /// A neighbour entry.
    Neighbour(Neighbour),
    /// A nexthop object.
    Nexthop(Nexthop),
    /// A route.
    Route(Route),
}

/// The kernel's own key of an [`Object`]: two objects with one key cannot both exist.
///
/// The order of the variants is the order of making.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ObjectKey {
    /// A device by name.
    Link(IfName),
    /// A setting by device, tree and file.
    Sysctl {
        /// The device.
        dev: IfName,
        /// Which of the two trees.
        family: Family,
        /// The name of the file.
        name: String,
    },
    /// An offload by device and feature.
    Offload {
        /// The device.
        dev: IfName,
        /// The kernel's name of the feature.
        feature: String,
    },
    /// An address by device, address and length.
    Address {
        /// The device.
        dev: IfName,
        /// The address.
        ip: IpAddr,
        /// The length of its on-link prefix.
        prefix_len: u8,
    },
    /// A packet path by device.
    Tunnel(IfName),
    /// A peer of it by device and subnet.
    #[serde(rename = "tunnel-peer")]
    TunnelPeer {
        /// The device.
        dev: IfName,
        /// The peer's subnet.
        subnet: Subnet,
    },
    /// A forwarding entry by device and hardware address.
    Fdb {
        /// The device.
        dev: IfName,
        /// The hardware address.
        mac: MacAddr,
    },
    /// A neighbour by device and address.
    Neighbour {
        /// The device.
        dev: IfName,
        /// The address.
        ip: IpAddr,
    },
    /// A nexthop object by number.
    Nexthop(u32),
    /// A route by table, destination and metric. **Not** by protocol: the kernel would let us
    /// overwrite somebody else's.
    Route {
        /// The routing table.
        table: u32,
        /// The destination.
        dst: Subnet,
        /// The metric.
        metric: u32,
    },
}

impl Object {
    /// The kernel's key of the object.
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::Link(o) => ObjectKey::Link(o.name),
            Self::Sysctl(o) => ObjectKey::Sysctl {
                dev: o.dev,
                family: o.family,
                name: o.name.clone(),
            },
            Self::Offload(o) => ObjectKey::Offload {
                dev: o.dev,
                feature: o.feature.clone(),
            },
            Self::Address(o) => ObjectKey::Address {
                dev: o.dev,
                ip: o.ip,
                prefix_len: o.prefix_len,
            },
            Self::Tunnel(o) => ObjectKey::Tunnel(o.dev),
            Self::TunnelPeer(o) => ObjectKey::TunnelPeer {
                dev: o.dev,
                subnet: o.subnet,
            },
            Self::Fdb(o) => ObjectKey::Fdb {
                dev: o.dev,
                mac: o.mac,
            },
            Self::Neighbour(o) => ObjectKey::Neighbour {
                dev: o.dev,
                ip: o.ip,
            },
            Self::Nexthop(o) => ObjectKey::Nexthop(o.id),
            Self::Route(o) => ObjectKey::Route {
                table: o.table,
                dst: o.dst,
                metric: o.metric,
            },
        }
    }

    /// The keys of what must stand before this object is made, each of a lower rank. A key that
    /// nobody desires is no obstacle: the kernel may have the thing from elsewhere.
    pub fn needs(&self) -> Vec<ObjectKey> {
        match self {
            Self::Link(Link {
                kind:
                    LinkKind::Vxlan(Vxlan {
                        underlay: Some(dev),
                        ..
                    }),
                ..
            }) => {
                vec![ObjectKey::Link(*dev)]
            }
            Self::Link(_) => Vec::new(),
            Self::Sysctl(Sysctl { dev, .. })
            | Self::Offload(Offload { dev, .. })
            | Self::Address(Address { dev, .. })
            | Self::Fdb(Fdb { dev, .. }) => vec![ObjectKey::Link(*dev)],
            Self::Tunnel(o) => vec![ObjectKey::Link(o.dev)],
            Self::TunnelPeer(o) => vec![ObjectKey::Link(o.dev), ObjectKey::Tunnel(o.dev)],
            Self::Neighbour(o) => {
                vec![
                    ObjectKey::Link(o.dev),
                    ObjectKey::Fdb {
                        dev: o.dev,
                        mac: o.mac,
                    },
                ]
            }
            Self::Nexthop(o) => vec![
                ObjectKey::Link(o.dev),
                ObjectKey::Neighbour {
                    dev: o.dev,
                    ip: o.gateway,
                },
            ],
            Self::Route(o) => match &o.target {
                RouteTarget::Gateway { gateway, dev, .. } => vec![
                    ObjectKey::Link(*dev),
                    ObjectKey::Neighbour {
                        dev: *dev,
                        ip: *gateway,
                    },
                ],
                RouteTarget::Nexthop(id) => vec![ObjectKey::Nexthop(*id)],
                // Into a packet path that does not know the subnet, packets would be lost.
                RouteTarget::Device(dev) => vec![
                    ObjectKey::Link(*dev),
                    ObjectKey::TunnelPeer {
                        dev: *dev,
                        subnet: o.dst,
                    },
                ],
                RouteTarget::Blackhole | RouteTarget::Paths(_) | RouteTarget::Other(_) => {
                    Vec::new()
                }
            },
        }
    }

    /// The device the object is on or goes through; a route through a nexthop object names none.
    pub const fn dev(&self) -> Option<IfName> {
        match self {
            Self::Link(o) => Some(o.name),
            Self::Sysctl(Sysctl { dev, .. })
            | Self::Offload(Offload { dev, .. })
            | Self::Address(Address { dev, .. })
            | Self::TunnelPeer(TunnelPeer { dev, .. })
            | Self::Fdb(Fdb { dev, .. })
            | Self::Neighbour(Neighbour { dev, .. })
            | Self::Nexthop(Nexthop { dev, .. })
            | Self::Route(Route {
                target: RouteTarget::Gateway { dev, .. } | RouteTarget::Device(dev),
                ..
            }) => Some(*dev),
            Self::Tunnel(o) => Some(o.dev),
            Self::Route(_) => None,
        }
    }
}

impl ObjectKey {
    /// The device that the key names; of routes and nexthop objects, `None`.
    pub const fn dev(&self) -> Option<IfName> {
        match self {
            Self::Link(dev)
            | Self::Sysctl { dev, .. }
            | Self::Offload { dev, .. }
            | Self::Address { dev, .. }
            | Self::Tunnel(dev)
            | Self::TunnelPeer { dev, .. }
            | Self::Fdb { dev, .. }
            | Self::Neighbour { dev, .. } => Some(*dev),
            Self::Nexthop(_) | Self::Route { .. } => None,
        }
    }

    /// The kind of the object in one word, as in status, metrics and the examples' output.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Link(_) => "link",
            Self::Sysctl { .. } => "sysctl",
            Self::Offload { .. } => "offload",
            Self::Address { .. } => "address",
            Self::Tunnel(_) => "tunnel",
            Self::TunnelPeer { .. } => "tunnel-peer",
            Self::Fdb { .. } => "fdb",
            Self::Neighbour { .. } => "neighbour",
            Self::Nexthop(_) => "nexthop",
            Self::Route { .. } => "route",
        }
    }

    /// The place of the kind in the order of making; equal ranks do not need one another, except
    /// that one link may be bound to another.
    pub const fn rank(&self) -> u8 {
        match self {
            Self::Link(_) => 0,
            Self::Sysctl { .. } => 1,
            Self::Offload { .. } => 2,
            Self::Address { .. } => 3,
            Self::Tunnel(_) => 4,
            Self::TunnelPeer { .. } => 5,
            Self::Fdb { .. } => 6,
            Self::Neighbour { .. } => 7,
            Self::Nexthop(_) => 8,
            Self::Route { .. } => 9,
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(name) => write!(f, "link {name}"),
            Self::Sysctl { dev, family, name } => write!(f, "sysctl {dev} {family} {name}"),
            Self::Offload { dev, feature } => write!(f, "offload {dev} {feature}"),
            Self::Address {
                dev,
                ip,
                prefix_len,
            } => write!(f, "address {ip}/{prefix_len} dev {dev}"),
            Self::Tunnel(dev) => write!(f, "tunnel {dev}"),
            Self::TunnelPeer { dev, subnet } => write!(f, "tunnel-peer {subnet} dev {dev}"),
            Self::Fdb { dev, mac } => write!(f, "fdb {mac} dev {dev}"),
            Self::Neighbour { dev, ip } => write!(f, "neighbour {ip} dev {dev}"),
            Self::Nexthop(id) => write!(f, "nexthop {id}"),
            Self::Route { table, dst, metric } => {
                write!(f, "route {dst}")?;
                if *table != MAIN_TABLE {
                    write!(f, " table {table}")?;
                }
                if *metric != Route::default_metric(dst.family()) {
                    write!(f, " metric {metric}")?;
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for Object {
    /// The object as `ip`, `bridge` and `ethtool` would nearly write it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(o) => {
                write!(f, "link {}", o.name)?;
                match &o.kind {
                    LinkKind::Vxlan(v) => {
                        write!(f, " type vxlan id {} port {}", v.vni, v.port)?;
                        if let Some(dev) = v.underlay {
                            write!(f, " dev {dev}")?;
                        }
                        if let Some(local) = v.local {
                            write!(f, " local {local}")?;
                        }
                        if v.learning {
                            f.write_str(" learning")?;
                        }
                        if v.gbp {
                            f.write_str(" gbp")?;
                        }
                    }
                    LinkKind::Bridge => f.write_str(" type bridge")?,
                    LinkKind::Veth { .. } => f.write_str(" type veth")?,
                    LinkKind::Tun(tun) => write!(f, " type {tun}")?,
                    LinkKind::Loopback => f.write_str(" type loopback")?,
                    LinkKind::Other(kind) if kind.is_empty() => {}
                    LinkKind::Other(kind) => write!(f, " type {kind}")?,
                }
                if let Some(mtu) = o.mtu {
                    write!(f, " mtu {mtu}")?;
                }
                if let Some(mac) = o.mac {
                    write!(f, " address {mac}")?;
                }
                f.write_str(if o.up { " up" } else { " down" })?;
                match &o.alias {
                    Some(alias) => write!(f, " alias {alias:?}"),
                    None => Ok(()),
                }
            }
            Self::Sysctl(o) => write!(f, "{} = {}", self.key(), o.value),
            Self::Offload(o) => write!(f, "{} {}", self.key(), if o.on { "on" } else { "off" }),
            Self::Address(_) => fmt::Display::fmt(&self.key(), f),
            Self::Tunnel(o) => fmt::Display::fmt(o, f),
            Self::TunnelPeer(o) => fmt::Display::fmt(o, f),
            Self::Fdb(o) => write!(f, "fdb {} dst {} dev {}", o.mac, o.remote, o.dev),
            Self::Neighbour(o) => write!(f, "neighbour {} lladdr {} dev {}", o.ip, o.mac, o.dev),
            Self::Nexthop(o) => {
                write!(f, "nexthop {} via {} dev {}", o.id, o.gateway, o.dev)?;
                f.write_str(if o.onlink { " onlink" } else { "" })
            }
            Self::Route(o) => write!(f, "{} {}", self.key(), o.target),
        }
    }
}

impl fmt::Display for RouteTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gateway {
                gateway,
                dev,
                onlink,
            } => {
                write!(f, "via {gateway} dev {dev}")?;
                f.write_str(if *onlink { " onlink" } else { "" })
            }
            Self::Nexthop(id) => write!(f, "nhid {id}"),
            Self::Device(dev) => write!(f, "dev {dev}"),
            Self::Blackhole => f.write_str("blackhole"),
            Self::Paths(paths) => {
                f.write_str("over")?;
                for (i, RoutePath { gateway, dev }) in paths.iter().enumerate() {
                    f.write_str(if i == 0 { " " } else { ", " })?;
                    match gateway {
                        Some(gateway) => write!(f, "via {gateway} dev {dev}")?,
                        None => write!(f, "dev {dev}")?,
                    }
                }
                Ok(())
            }
            Self::Other(what) => f.write_str(what),
        }
    }
}

/// Objects by the kernel's key, in the order of making.
pub type Objects = BTreeMap<ObjectKey, Object>;
