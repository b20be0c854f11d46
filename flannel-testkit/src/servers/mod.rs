//! Real servers for tests, as child processes on the loopback interface, and a switch before them.
//!
//! A server dies with the test that started it, also when that is killed.

mod child;
mod etcd;
mod switch;

pub use etcd::{Etcd, EtcdOptions};
pub use switch::TcpSwitch;
