//! Notifications of packet filters: that something about them changed, never what.
//!
//! They have a thread of their own, which does not listen for a second after each: whoever writes
//! thousands of rules at a time costs no more than that they are read once.

use std::io::{self, PipeReader};
use std::sync::Arc;

use flannel_core::Change;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;
use nix::poll::PollTimeout;

use super::{Received, Shared, receive, wait};
use crate::connection::open;

/// `NFNLGRP_NFTABLES` of `linux/netfilter/nfnetlink_compat.h`: changes of tables, chains and rules.
const GROUP: u32 = 7;
/// Bytes of the socket's buffer. What does not fit is lost, and says no more than what is there.
const BUFFER: usize = 32 * 1024;
/// The quiet after a notification, in milliseconds: nothing is listened to.
const QUIET: u16 = 1000;

/// The thread.
pub(super) struct FilterWatch {
    shared: Arc<Shared>,
    /// Closed by the stream when it is dropped.
    stop: PipeReader,
    socket: Socket,
}

impl FilterWatch {
    /// A watch in the namespace of the calling thread. `None`: this kernel has no nf_tables, or it
    /// may not be listened to; filters are then read when something else is.
    pub(super) fn new(shared: &Arc<Shared>, stop: &PipeReader) -> Option<Self> {
        let opened = subscribe().and_then(|socket| {
            Ok(Self {
                shared: Arc::clone(shared),
                stop: stop.try_clone()?,
                socket,
            })
        });
        opened
            .inspect_err(|error| tracing::debug!(%error, "packet filters are not watched"))
            .ok()
    }

    /// Tells of changes until the stream is dropped or the socket breaks.
    pub(super) fn run(self) {
        loop {
            if wait(&self.stop, Some(&self.socket), PollTimeout::NONE).is_err() {
                return;
            }
            match self.is_told() {
                Ok(true) => self.shared.tell(&mut vec![Change::Policy]),
                Ok(false) => {}
                Err(error) => {
                    tracing::debug!(%error, "packet filters are watched no more");
                    return;
                }
            }
            if wait(&self.stop, None, PollTimeout::from(QUIET)).is_err() {
                return;
            }
        }
    }

    /// Empties the socket; whether anything was in it.
    fn is_told(&self) -> Result<bool, Errno> {
        /// After so many the rest is left for the next time.
        const MOST: usize = 4096;
        let mut told = false;
        for _ in 0..MOST {
            match receive(&self.socket, &mut [0; 64])? {
                Received::Datagram(_) | Received::Lost => told = true,
                Received::Nothing => break,
            }
        }
        Ok(told)
    }
}

fn subscribe() -> io::Result<Socket> {
    let mut socket = open(NETLINK_NETFILTER, BUFFER)?;
    socket.bind_auto()?;
    socket.add_membership(GROUP)?;
    Ok(socket)
}
