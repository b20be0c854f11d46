//! Packet paths that run in userspace: [`Tun`], [`Tunnel`], [`TunnelPeer`].

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::IfName;
use crate::family::{DualStack, Family};
use crate::subnet::Subnet;

/// What a TUN device is (`TUNSETIFF`, `IFLA_TUN_*` of `linux/if_tun.h` and `linux/if_link.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tun {
    /// It is made to stay before a program holds it (`TUNSETPERSIST`). Whoever holds it decides
    /// whether it stays afterwards, so that one that differs in this alone is no other device.
    #[serde(default)]
    pub persistent: bool,
    /// Several queues may be open on it at once (`IFF_MULTI_QUEUE`).
    #[serde(default)]
    pub multi_queue: bool,
    /// Each packet has a header in front of it that speaks of segmentation and checksums
    /// (`IFF_VNET_HDR`).
    #[serde(default)]
    pub vnet_header: bool,
    /// How many packets wait for their reader at most (`txqueuelen`); more are dropped. `None`: the
    /// kernel chooses (500), any is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u32>,
}

impl Tun {
    /// A device as a [`Tunnel`] takes it: it waits for its holder, which lets it go with itself,
    /// and whoever attaches may take several queues and use the kernel's offloads. Ten times as
    /// many packets wait as the kernel would let: they come at 300,000 a second, and a reader that
    /// waits for its turn on a processor, while the sender has its own of up to ten milliseconds
    /// or more, would lose them.
    pub const FOR_TUNNEL: Self = Self {
        persistent: true,
        multi_queue: true,
        vnet_header: true,
        queue: Some(5_000),
    };

    /// Whether the one can become the other in place. Headers are what whoever attached last asked
    /// for, and whether it stays is what its holder says: neither is the device's own.
    pub const fn is_like(self, other: Self) -> bool {
        self.multi_queue == other.multi_queue
    }
}

/// The node's own end of a packet path in userspace: what comes out of a TUN device is sent to
/// peers in UDP datagrams, and what peers send is put into the device.
///
/// It is the program's own and lives as long as the program does, or as long as whoever it was
/// handed over to. It goes with its device, and its peers go with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// The TUN device.
    pub dev: IfName,
    /// Per family of the underlay: the local address and port at which datagrams are received and
    /// from which they are sent. Inner packets of a family travel in outer ones of the same family.
    pub listen: DualStack<SocketAddr>,
    /// The node's own subnets: what peers send to any other destination is dropped.
    pub own: DualStack<Subnet>,
    /// Per family: the largest inner packet, in bytes. For what is larger the sender is told so.
    pub mtu: DualStack<u32>,
}

/// A peer of a [`Tunnel`]: packets to its subnet are sent to its endpoint, and packets from its
/// endpoint are taken if their source is in its subnet. Of two subnets the longer one counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelPeer {
    /// The TUN device of the tunnel.
    pub dev: IfName,
    /// The peer's subnet.
    pub subnet: Subnet,
    /// Where the peer receives, of the subnet's family.
    pub endpoint: SocketAddr,
}

impl Tunnel {
    /// Why no packet path can be made like this; `None`: one can.
    pub fn fault(&self) -> Option<&'static str> {
        let usable = |family: Family, listen: &SocketAddr| {
            Family::of(&listen.ip()) == family && !listen.ip().is_multicast() && listen.port() != 0
        };
        if self.listen.is_empty() {
            Some("it listens nowhere: give it an address of the underlay")
        } else if !self.listen.iter().all(|(family, ip)| usable(family, ip)) {
            Some(
                "where it listens is no address of its family with a port: give one of the node's own",
            )
        } else if !self.own.iter().all(|(family, own)| own.family() == family) {
            Some("a subnet of its own stands in the other family's place")
        } else if !self.listen.families().all(|family| self.mtu.has(family)) {
            Some("it lacks the MTU of a family that it listens in: give one")
        } else {
            None
        }
    }

    /// Why this packet path cannot have such a peer; `None`: it can.
    pub fn fault_of(&self, peer: &TunnelPeer) -> Option<&'static str> {
        let (family, ip) = (peer.subnet.family(), peer.endpoint.ip());
        if Family::of(&ip) != family {
            Some("its endpoint is of the other family than its subnet")
        } else if peer.endpoint.port() == 0 || ip.is_unspecified() || ip.is_multicast() {
            Some("its endpoint is no address of one host with a port")
        } else if !self.listen.has(family) {
            Some("the packet path does not listen in its family")
        } else {
            None
        }
    }
}

impl fmt::Display for Tun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tun")?;
        for (is, name) in [
            (self.persistent, " persist"),
            (self.multi_queue, " multi_queue"),
            (self.vnet_header, " vnet_hdr"),
        ] {
            f.write_str(if is { name } else { "" })?;
        }
        match self.queue {
            Some(queue) => write!(f, " txqueuelen {queue}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tunnel {}", self.dev)?;
        for (family, listen) in self.listen.iter() {
            write!(f, " listen {listen}")?;
            if let Some(own) = self.own.get(family) {
                write!(f, " own {own}")?;
            }
            if let Some(mtu) = self.mtu.get(family) {
                write!(f, " mtu {mtu}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for TunnelPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            dev,
            subnet,
            endpoint,
        } = self;
        write!(f, "tunnel-peer {subnet} endpoint {endpoint} dev {dev}")
    }
}
