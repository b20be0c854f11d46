//! What was counted: packets by direction, by reason and by peer.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use flannel_core::PeerTraffic;

macro_rules! counters {
    ($(#[$outer:meta])* $shard:ident, $(#[$outer2:meta])* $total:ident { $($(#[$doc:meta])* $name:ident,)* }) => {
        $(#[$outer])*
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub(crate) struct $shard {
            $(pub(crate) $name: Counter,)*
        }

        $(#[$outer2])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        #[non_exhaustive]
        pub struct $total {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl $total {
            pub(crate) fn add(&mut self, shard: &$shard) {
                $(self.$name += shard.$name.value();)*
            }

            /// Every counter with its name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }
    };
}

counters! {
    /// The counters of one thread. Only that thread adds to them.
    Shard,
    /// The counters of a forwarder since it was started.
    Totals {
        /// Packets read from the TUN device, as large as the kernel gave them.
        tun_reads,
        /// Datagrams sent.
        sent_packets,
        /// Bytes of these, without outer headers.
        sent_bytes,
        /// Messages that these were sent in. `sent_packets / sent_messages` is the figure of health
        /// under load: 30 to 45 in bulk.
        sent_messages,
        /// Datagrams received, whether they were good or not.
        received_packets,
        /// Bytes of these.
        received_bytes,
        /// Messages that these came in.
        received_messages,
        /// Packets written to the TUN device, as large as they were made.
        tun_writes,
        /// Datagrams that these were made of.
        delivered_packets,
        /// ICMP errors written.
        icmp_sent,
        /// ICMP errors that were not written because there were too many.
        icmp_suppressed,
        /// Dropped: a packet from the device that is none.
        tun_malformed,
        /// Dropped: no peer has the destination.
        no_route,
        /// Dropped: larger than the MTU of its family, or than the path to the peer takes.
        too_big,
        /// Dropped: its TTL or hop limit is used up.
        ttl_exceeded,
        /// Dropped: the socket had no room. What waited below it was not sent for a while, and nobody
        /// waits for that at the others' cost.
        send_full,
        /// Dropped: the kernel could not send it (no route on the underlay, a firewall, no memory).
        send_failed,
        /// Dropped: there is no socket of the endpoint's family.
        no_socket,
        /// Dropped: a datagram from an address that is no peer's.
        stranger,
        /// Dropped: a datagram of a peer whose inner source is not in that peer's subnets.
        spoofed,
        /// Dropped: a datagram whose inner destination is not in our subnets.
        not_ours,
        /// Dropped: a datagram that holds no IP packet.
        malformed,
        /// Dropped: a datagram that did not fit the buffer.
        truncated,
        /// Dropped: the device refused it, because it is down, or for what is in it.
        write_failed,
    }
}

/// A number that one thread adds to and any may read.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds, as the only one who does.
    pub(crate) fn add(&self, n: u64) {
        let now = self.0.load(Ordering::Relaxed);
        self.0.store(now.wrapping_add(n), Ordering::Relaxed);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What was exchanged with a peer. Each message adds to it once, however many packets it holds.
#[derive(Debug, Default)]
pub struct PeerCounters {
    sent: Pair,
    received: Pair,
    dropped: AtomicU64,
}

/// Each direction has a thread of its own, and so a cache line.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Pair {
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl PeerCounters {
    pub(crate) fn sent(&self, packets: u64, bytes: u64) {
        self.sent.packets.fetch_add(packets, Ordering::Relaxed);
        self.sent.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn received(&self, packets: u64, bytes: u64) {
        self.received.packets.fetch_add(packets, Ordering::Relaxed);
        self.received.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn dropped(&self, packets: u64) {
        self.dropped.fetch_add(packets, Ordering::Relaxed);
    }

    /// The numbers as they are now.
    pub fn totals(&self, endpoint: SocketAddr) -> PeerTraffic {
        let mut traffic = PeerTraffic::new(endpoint);
        traffic.sent_packets = self.sent.packets.load(Ordering::Relaxed);
        traffic.sent_bytes = self.sent.bytes.load(Ordering::Relaxed);
        traffic.received_packets = self.received.packets.load(Ordering::Relaxed);
        traffic.received_bytes = self.received.bytes.load(Ordering::Relaxed);
        traffic.dropped = self.dropped.load(Ordering::Relaxed);
        traffic
    }
}
