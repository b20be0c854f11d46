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
//! # One example
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use flannel_backend_udp::table::TableBuilder;
//! use flannel_backend_udp::{Forwarder, InNamespace, Options};
//! use flannel_core::{DualStack, Tunnel};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let tunnel = Tunnel {
//!     dev: "flannel0".parse()?,
//!     listen: DualStack::v4("192.0.2.1:8285".parse()?),
//!     own: DualStack::of_subnets(["10.42.1.0/24".parse()?]),
//!     mtu: DualStack::both(1472, 1472),
//! };
//! let sockets = Arc::new(InNamespace::current());
//! let watch = Arc::new(|report: &_| eprintln!("{report:?}"));
//! let forwarder = Forwarder::start(tunnel, Options::default(), sockets, watch)?;
//!
//! let mut peers = TableBuilder::new();
//! peers.insert("10.42.2.0/24".parse()?, "192.0.2.2:8285".parse()?);
//! forwarder.set_table(peers.build());
//! # Ok(())
//! # }
//! ```
//!
//! # Decisions
//!
//! - **Whose a datagram is** its source says, address and port: flannel sends from the port that it
//!   listens on. A peer behind a NAT that changes the port is a stranger.
//! - **TTL**: the nodes' kernels take theirs, as on any route; the forwarder takes one more, where
//!   it sends, and none where it receives. So a traceroute shows it, and a packet whose TTL is used
//!   up is answered with its own address.
//! - **No fragments outside**: sockets set the outer "don't fragment" (`IP_PMTUDISC_DO`). A packet
//!   too long for the path, because the path is narrower than the MTU says, is dropped and its
//!   sender told ("fragmentation needed", "packet too big") with the size that the kernel knows.
//! - **Order**: packets of one flow leave and arrive in the order in which they came.
//! - **A holder that is killed** (`kill -9`) takes its device along, with addresses and routes: a
//!   device without a reader would swallow every packet, also under Go flannel started in its place.
//!   Every packet is lost until another overlay has made its own. What is to outlive its process is
//!   [handed over](Forwarder::hand_over), and then nothing is lost.
//! - **Who changes to this backend** sends before its new record is heard of. So each peer that is
//!   reached has an endpoint here, whatever its backend; which ones are sent to, the routes say.
//!
//! # Where the code is
//!
//! - [`packet`]: what is done to packets, as pure functions over bytes;
//! - [`table`]: which peer has which subnet;
//! - [`Forwarder`]: threads, sockets and queues;
//! - [`UdpBackend`]: which objects a lease becomes, as every backend says it;
//! - [`WithTunnels`]: a kernel that has packet paths, around one that has not: [`Forwarders`] are
//!   its packet paths;
//! - `sys`: the system calls, the only place with unsafe code.
//!
//! # What this crate does not do
//!
//! It makes no device, address or route: `flannel-netlink` does. It encrypts nothing, and whoever can
//! send with a peer's address and port can send as that peer.
#![deny(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backend;
#[cfg(feature = "baseline")]
pub mod baseline;
mod config;
mod counters;
mod forward;
mod forwarders;
mod handover;
mod kernel;
mod namespace;
mod network;
mod options;
pub mod packet;
mod sockets;
mod sys;
pub mod table;

pub use backend::UdpBackend;
pub use config::{DEFAULT_PORT, UdpConfig};
pub use counters::{PeerCounters, Totals};
pub use forward::{Capabilities, Error, Failure, Forwarder, Health, Report, Watch};
pub use forwarders::Forwarders;
pub use handover::{HandoverError, Versions};
pub use kernel::{PacketPath, Peers, Running, WithTunnels};
pub use namespace::NamespaceId;
pub use options::{Options, Threads};
pub use sockets::{InNamespace, Sockets, UdpOptions};
