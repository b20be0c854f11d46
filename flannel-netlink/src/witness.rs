//! [`Witness`]: whether entries were removed from a device while they were read.
//!
//! A dump of forwarding entries or neighbours is sent in pieces, and where the next piece begins
//! the kernel remembers as a *count*. When entries before that place are removed in between, as
//! many that stay are left out, and no flag says so (found by trying, Linux 6.18). But each removal
//! is an event, so the events are listened to while the entries are read.

use std::os::fd::AsRawFd;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use crate::connection::open;
use crate::error::Failure;
use crate::neighbour::{self, RTM_DELNEIGH};
use crate::wire::Messages;

/// `RTNLGRP_NEIGH` of `linux/rtnetlink.h`: neighbours and forwarding entries.
const GROUP: u32 = 3;
/// Room for some hundred events; more are as good as a removal.
const BUFFER: usize = 256 * 1024;

/// Listens to removals of neighbours and forwarding entries from when it is made.
#[derive(Debug)]
pub(crate) struct Witness {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Witness {
    pub(crate) fn new() -> Result<Self, Failure> {
        let subscribe = || -> std::io::Result<Socket> {
            let mut socket = open(NETLINK_ROUTE, BUFFER)?;
            socket.bind_auto()?;
            socket.add_membership(GROUP)?;
            Ok(socket)
        };
        Ok(Self {
            socket: subscribe()
                .map_err(|error| Failure::Broken(format!("no netlink socket: {error}")))?,
            buffer: vec![0; 16 * 1024],
        })
    }

    /// Whether an entry of a device was removed, or may have been, since this was asked last.
    pub(crate) fn saw_removal(&mut self, index: u32) -> Result<bool, Failure> {
        let mut saw = false;
        loop {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
            match recv(self.socket.as_raw_fd(), &mut self.buffer, flags) {
                Ok(len) => saw |= self.buffer.get(..len).is_none_or(|d| has_removal(d, index)),
                Err(Errno::EAGAIN) => return Ok(saw),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => saw = true,
                Err(errno) => return Err(Failure::Broken(format!("receiving: {errno}"))),
            }
        }
    }
}

/// Whether a datagram tells of a removal from a device; one that cannot be read may.
fn has_removal(datagram: &[u8], index: u32) -> bool {
    Messages(datagram).any(|message| match message {
        Ok(message) => {
            message.kind == RTM_DELNEIGH
                && neighbour::decode(message.body).is_ok_and(|entry| entry.index == index)
        }
        Err(_) => true,
    })
}
