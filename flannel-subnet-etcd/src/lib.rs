//! [`EtcdManager`]: leases on etcd v3, in flannel's own layout, so that Go `flanneld` and programs
//! built on this SDK share one cluster.
//!
//! ```no_run
//! use flannel_subnet_etcd::{EtcdManager, EtcdOptions};
//!
//! # fn main() -> Result<(), flannel_subnet_etcd::OptionsError> {
//! let options = EtcdOptions::new(["http://10.0.0.1:2379", "http://10.0.0.2:2379"])?;
//! let manager = EtcdManager::new(options)?; // nothing is contacted yet
//! # Ok(())
//! # }
//! ```
//!
//! How leases are laid out, claimed, kept and watched is that of [`flannel_subnet_kv`]; this crate
//! brings the client: several endpoints with a rotation of its own (one that is dead or frozen
//! loses no call), deadlines on everything, TLS and passwords from files that are read again when
//! they change.
//!
//! Building it needs `protoc` and its well-known types: on Debian
//! `apt-get install protobuf-compiler libprotobuf-dev`.
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod client;
mod codec;
mod error;
mod manager;
mod options;
mod rotation;
mod secret;
mod tls;
mod watch;

/// The layer between: flannel's layout on any revisioned store, and the values that go to one.
pub use flannel_subnet_kv as kv;

pub use client::{Calls, EtcdStore};
pub use manager::EtcdManager;
pub use options::{EtcdOptions, OptionsError};
pub use secret::Password;
pub use tls::TlsFiles;
pub use watch::EtcdWatch;
