//! The host-gw backend of the flannel overlay SDK: plain routes, no tunnel.
//!
//! # What host-gw does with a packet
//!
//! A container on node A sends a packet to one on node B. On A the route of B's subnet leads to B's
//! public address, as to any gateway. The packet goes there as it is: nothing is wrapped around it,
//! so it may be as large as the link carries, and costs what routing costs. B's own routing
//! delivers it. So a peer takes a route and a nexthop object per family, and a node itself takes
//! nothing.
//!
//! Every node must be on a link of every other: a router in between has no route to the subnets. A
//! peer that is behind one is rejected with the reason, and taken up as soon as the host's own
//! routes say otherwise. What stands on the link must let packets pass whose addresses are not
//! those of a node; some clouds do not until they are told to.
//!
//! # One example
//!
//! ```
//! use flannel_backend_hostgw::HostGwBackend;
//! use flannel_core::Backend;
//!
//! let backend = HostGwBackend::new();
//! assert_eq!(backend.backend_type().as_str(), "host-gw");
//! ```
//!
//! # What this crate does not do
//!
//! It makes no system call and runs no task: it computes [`Object`](flannel_core::Object)s. The
//! overlay of `flannel-core` makes them so, and `flannel-netlink` talks to the kernel.
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backend;
mod network;

pub use backend::HostGwBackend;
