//! The system calls that nothing safe is there for: the only place with unsafe code.
#![allow(
    unsafe_code,
    reason = "ioctl on TUN, socket options of UDP offload, sendmmsg and recvmmsg have no safe form"
)]

mod address;
pub(crate) mod descriptors;
mod receive;
mod send;
mod tun;
mod udp;

pub(crate) use receive::{Datagrams, ReceiveBatch};
pub(crate) use send::SendBatch;
pub(crate) use tun::{Offload, attach, hold, is_attached, leave, namespace_of, set_offload};
pub(crate) use udp::{can_segment, open_raw, open_udp, path_mtu, widen};
