//! Real servers for tests, as child processes on the loopback interface, and a switch before them.
//!
//! A server dies with the test that started it, also when that is killed.

mod child;
mod etcd;
#[cfg(feature = "kube")]
mod https;
#[cfg(feature = "kube")]
mod kube;
#[cfg(feature = "kube")]
mod pki;
mod switch;
mod version;

pub use etcd::{Etcd, EtcdOptions};
#[cfg(feature = "kube")]
pub use https::Reply;
#[cfg(feature = "kube")]
pub use kube::KubeApiServer;
#[cfg(feature = "kube")]
pub use pki::Authority;
pub use switch::TcpSwitch;
pub use version::EtcdVersion;
