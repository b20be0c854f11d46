//! Real servers for tests, as child processes on the loopback interface, and a switch before them.
//!
//! A server dies with the test that started it, also when that is killed.

mod child;
mod etcd;
mod switch;
mod version;

pub use etcd::{Etcd, EtcdOptions};
pub use switch::TcpSwitch;
pub use version::EtcdVersion;
