//! The UDP backend of the flannel overlay SDK: a packet path in user space, made fast.
//!
//! # What it does with a packet
//!
//! A container on node A sends a packet to one on node B. On A the route of B's subnet leads to a
//! TUN device, and the [`Forwarder`] reads the packet there: often one of 64 KiB, of which the
//! sender's kernel has made no segments yet. The forwarder makes them, looks up B's endpoint, and
//! sends each as one UDP datagram, raw as flannel's `udp` backend does it, up to 64 of them in one
//! system call's one message. On B the datagrams come up together; those that belong to one stream
//! become one large packet again, which is written to B's TUN device, and B's own routing delivers
//! it.
//!
//! What comes from an address that is no peer's, carries a source that is not that peer's, or is
//! not for this node, is dropped and counted.
//!
//! # Where the code is
//!
//! - [`packet`]: what is done to packets, as pure functions over bytes;
//! - [`table`]: which peer has which subnet;
//! - [`Forwarder`]: threads, sockets and queues;
//! - `sys`: the system calls, the only place with unsafe code.
#![deny(unsafe_code)]

mod backend;
#[cfg(feature = "baseline")]
pub mod baseline;
mod config;
mod counters;
mod forward;
mod forwarders;
mod kernel;
mod network;
pub mod packet;
mod sockets;
mod spec;
mod sys;
pub mod table;

pub use backend::UdpBackend;
pub use config::{DEFAULT_PORT, UdpConfig};
pub use counters::{PeerCounters, PeerTotals, Totals};
pub use forward::{Capabilities, Error, Failure, Forwarder, Health, Report, Watch};
pub use forwarders::Forwarders;
pub use kernel::{PacketPath, Peers, Running, WithTunnels};
pub use sockets::{InNamespace, Sockets, UdpOptions};
pub use spec::{Options, Threads, TunnelSpec};
