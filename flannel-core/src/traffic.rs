//! [`Traffic`]: what a packet path in user space has counted.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::object::IfName;

/// What the packet path on a device has counted since it was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Traffic {
    /// The TUN device.
    pub dev: IfName,
    /// Packets, bytes and messages by what became of them: of those that were dropped each reason
    /// has a counter. The names are the packet path's own.
    pub counts: BTreeMap<String, u64>,
    /// What was exchanged with each peer.
    pub peers: Vec<PeerTraffic>,
}

impl Traffic {
    /// The counts of a device, with no peer yet.
    pub fn new(dev: IfName, counts: impl IntoIterator<Item = (String, u64)>) -> Self {
        Self {
            dev,
            counts: counts.into_iter().collect(),
            peers: Vec::new(),
        }
    }
}

/// What was exchanged with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PeerTraffic {
    /// Where the peer is.
    pub endpoint: SocketAddr,
    /// Packets sent to it.
    pub sent_packets: u64,
    /// Bytes of these, without outer headers.
    pub sent_bytes: u64,
    /// Good packets received from it.
    pub received_packets: u64,
    /// Bytes of these.
    pub received_bytes: u64,
    /// Packets of it that were dropped: the source not its own, the destination not ours, or none
    /// at all.
    pub dropped: u64,
}

impl PeerTraffic {
    /// Nothing so far with the peer at this endpoint.
    pub const fn new(endpoint: SocketAddr) -> Self {
        Self {
            endpoint,
            sent_packets: 0,
            sent_bytes: 0,
            received_packets: 0,
            received_bytes: 0,
            dropped: 0,
        }
    }
}
