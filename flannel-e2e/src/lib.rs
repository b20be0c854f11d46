//! The SDK whole, on a real kernel: what its tests and benchmarks share.
//!
//! A [`Cluster`] is a number of nodes, each a network namespace with an overlay and a pod, on an
//! underlay. Tests break it through a kernel handle of their own ([`Node::hand`]), wait for
//! conditions ([`until`]), and send packets; on a [`Bed`] the store is broken. [`Everything`] is the whole configuration of a
//! namespace as text, to be compared. [`NodeProcess`] is a node in a process of its own, to be
//! killed; a [`Program`] is any of ours, run as users do.
//!
//! Everything here panics when it cannot do what it should: it is for tests.
#![forbid(unsafe_code)]

mod bed;
mod cluster;
mod everything;
mod measure;
mod peers;
mod process;
mod program;
mod wait;

pub use bed::{Bed, alone, both_families};
pub use cluster::{
    Cluster, DUAL, DUAL_GW, DUAL_UDP, Node, Setup, V4, V4_GW, V4_UDP, V6, V6_GW, V6_UDP, ours,
    paths,
};
pub use everything::{Everything, run_in};
pub use measure::{Path, no_loss, probe, try_no_loss};
pub use peers::{Peers, config, dev, route_key};
pub use process::{NodeProcess, Orders};
pub use program::Program;
pub use wait::{LIMIT, until, within};
