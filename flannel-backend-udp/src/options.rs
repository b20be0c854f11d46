//! How a forwarder works.

use serde::{Deserialize, Serialize};

/// How a forwarder works. The default is right for most.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Workers, each with a TUN queue of its own and a socket of its own per family: 1 to 16.
    pub workers: u16,
    /// Whether a worker is one thread or two.
    pub threads: Threads,
    /// Large packets between the kernel and the forwarder (segmentation and checksum offload).
    pub offload: bool,
    /// The checksum of a packet is verified before it is merged with others: without it, a packet
    /// that was damaged on the way could reach its receiver as a good one.
    pub verify: bool,
    /// Bytes of the sockets' receive buffers. To be sent may wait what the kernel keeps for
    /// neighbours that do not answer, however many there are.
    pub socket_buffer: u32,
    /// ICMP errors a second, at most.
    pub icmp_rate: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            workers: 1,
            threads: Threads::Auto,
            offload: true,
            verify: true,
            socket_buffer: 4 << 20,
            icmp_rate: 100,
        }
    }
}

/// How many threads a worker has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Threads {
    /// One for both directions, and where the process may use two processors or more a second that
    /// takes what comes in while the first fills a processor which no other thread wants: the latency
    /// and the cost of one, the bytes of two.
    #[default]
    Auto,
    /// One for both directions: the least latency and the least processor time per byte.
    One,
    /// One for each direction: the most bytes a second of one stream, where processors are idle.
    PerDirection,
}
