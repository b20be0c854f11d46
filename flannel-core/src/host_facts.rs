//! [`HostFacts`]: what a host does with packets beside what an overlay's objects say, and the
//! [`Questions`] that a kernel answers with it.
//!
//! Objects may all be as they should be and no packet passes: forwarding is off, a policy rule
//! leads elsewhere, a filter drops. Nothing of this is ours to change; it is asked about and told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::family::Family;
use crate::object::IfName;

/// The questions to a kernel ([`Kernel::host_facts`](crate::Kernel::host_facts)).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Questions {
    /// The families whose settings are asked for.
    pub families: BTreeSet<Family>,
    /// The devices whose settings are asked for, beside the global ones.
    pub devices: BTreeSet<IfName>,
    /// The packets whose way is asked for.
    pub lookups: Vec<Lookup>,
    /// Tells that packet filters are asked for.
    pub firewall: bool,
}

/// A packet whose way is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lookup {
    /// Its destination.
    pub dst: IpAddr,
    /// Its source. Of a packet of this host: one of its addresses, or `None` for any.
    pub src: Option<IpAddr>,
    /// The device that it comes in on; `None`: it is sent by this host.
    pub input: Option<IfName>,
}

impl Lookup {
    /// A packet that this host sends.
    pub const fn to(dst: IpAddr, src: Option<IpAddr>) -> Self {
        let input = None;
        Self { dst, src, input }
    }

    /// A packet that comes in on a device.
    pub const fn from(src: IpAddr, dst: IpAddr, input: IfName) -> Self {
        Self {
            dst,
            src: Some(src),
            input: Some(input),
        }
    }
}

/// The answers of a kernel. What it cannot say is left out, and means *not known*.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct HostFacts {
    /// The settings of the devices, and the global ones under `None`.
    pub settings: BTreeMap<(Family, Option<IfName>), PacketSettings>,
    /// The fates of the packets asked about, in the order of the questions. Those behind the end
    /// are not known either.
    pub routed: Vec<Option<Routed>>,
    /// The policy rules in front of that which leads to the main table, where an answer is of
    /// another table or none.
    pub rules: Vec<PolicyRule>,
    /// The packet filters.
    pub firewall: Option<Firewall>,
}

impl HostFacts {
    /// A setting of a device, or the global one.
    pub fn setting(&self, family: Family, dev: Option<IfName>) -> PacketSettings {
        let found = self.settings.get(&(family, dev));
        found.copied().unwrap_or_default()
    }
}

/// Settings that decide what becomes of packets which come in on a device, or on any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PacketSettings {
    /// Packets are forwarded.
    ///
    /// IPv4 looks at the device alone; the global setting, when written, is copied to all. IPv6
    /// looks at the global one; that of a device is `force_forwarding` (Linux 6.17), which does
    /// without it.
    pub forwarding: Option<bool>,
    /// The filter by the way back (IPv4 only). In force is the higher one of a device's and the
    /// global.
    pub reverse_path: Option<ReversePath>,
}

/// A filter of packets that come in by the way back to their source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReversePath {
    /// None.
    Off,
    /// The way back must be through the same device.
    Strict,
    /// There must be a way back.
    Loose,
}

/// The fate of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Routed {
    /// It leaves through a device.
    Through {
        /// The device.
        dev: IfName,
        /// The next hop, if it is not the destination itself.
        gateway: Option<IpAddr>,
        /// The table whose route it is.
        table: u32,
    },
    /// It is for this host.
    Local,
    /// It goes nowhere.
    Refused(Refused),
}

/// Why a packet goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refused {
    /// There is no route.
    NoRoute,
    /// The route says `unreachable`; or the packet came in where packets are not forwarded.
    Unreachable,
    /// The route says `prohibit`.
    Prohibited,
    /// The route is a black hole; or the packet came in where a filter drops it.
    Dropped,
}

/// A rule of policy routing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyRule {
    /// The family.
    pub family: Family,
    /// Its place: lower ones come first.
    pub priority: u32,
    /// The table it leads to; `None`: it refuses packets itself.
    pub table: Option<u32>,
}

/// The packet filters of a host, as far as they can be read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Firewall {
    /// Chains at the hook of forwarded packets that drop what none of their rules accepts.
    pub dropping: Vec<FilterChain>,
    /// The part that cannot be read, and why.
    pub unread: Option<String>,
}

/// A chain of a packet filter.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FilterChain {
    /// The families that it sees.
    pub families: FilterFamily,
    /// Its table.
    pub table: String,
    /// Its name.
    pub chain: String,
}

/// The families of a packet filter's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FilterFamily {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
    /// Both.
    Inet,
}

impl FilterFamily {
    /// Tells if it sees packets of a family.
    pub const fn sees(self, family: Family) -> bool {
        match self {
            Self::Inet => true,
            Self::Ip => matches!(family, Family::V4),
            Self::Ip6 => matches!(family, Family::V6),
        }
    }
}

impl std::fmt::Display for FilterFamily {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Inet => "inet",
        })
    }
}
