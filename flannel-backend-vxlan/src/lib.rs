//! The VXLAN backend of the flannel overlay SDK: flannel's own overlay, as a pure function.
//!
//! # What VXLAN does with a packet
//!
//! A container on node A sends a packet to one on node B. On A the route of B's subnet leads to the
//! device `flannel.<VNI>` with B's subnet address as gateway. The neighbour entry of that gateway
//! says which MAC address to put on the frame: that of B's end of the overlay, its VTEP. The
//! device's forwarding entry for that MAC says to which public address the frame is sent, in a UDP
//! datagram (RFC 7348). On B the device of the same VNI unpacks it, and B's own routing delivers
//! it. So a peer takes a route, a nexthop object, a neighbour and a forwarding entry per family;
//! no address is ever asked for on the wire, and the first packet is not lost.
//!
//! With `DirectRouting` a peer that is on a link of this node needs no tunnel: its subnet is routed
//! straight to its public address.
//!
//! # One example
//!
//! ```
//! use flannel_backend_vxlan::VxlanBackend;
//! use flannel_core::Backend;
//!
//! let backend = VxlanBackend::new();
//! assert_eq!(backend.backend_type().as_str(), "vxlan");
//! ```
//!
//! # What this crate does not do
//!
//! It makes no system call and runs no task: it computes [`Object`](flannel_core::Object)s. The
//! overlay of `flannel-core` makes them so, and `flannel-netlink` talks to the kernel.
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backend;
mod config;
mod data;
mod network;

pub use backend::{ChecksumOffload, VxlanBackend};
pub use config::{DEFAULT_PORT, VxlanConfig};
pub use data::VxlanData;
