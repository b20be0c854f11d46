//! Queues and sockets, as a tunnel needs them.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use flannel_core::{DualStack, IfName};

use super::Error;
use super::io::Socket;
use crate::options::Options;
use crate::sockets::{Sockets, UdpOptions};
use crate::sys::{self, Offload};

/// The queues of all workers.
#[derive(Debug, Clone)]
pub(crate) struct Queues {
    pub(crate) fds: Arc<[OwnedFd]>,
    pub(crate) vnet: bool,
    pub(crate) offload: Offload,
}

/// What was opened, or handed over.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) queues: Queues,
    /// Of each worker, a socket of each family.
    pub(crate) sockets: Vec<DualStack<Arc<Socket>>>,
}

/// Duplicates of what is open, to be sent away.
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) queues: Vec<OwnedFd>,
    /// Of each worker, IPv4 before IPv6.
    pub(crate) sockets: Vec<OwnedFd>,
    /// The device was lost, so the queues are of no use.
    pub(crate) is_detached: bool,
}

impl Queues {
    /// Attaches to a queue for each worker.
    pub(crate) fn open(
        device: &IfName,
        options: &Options,
        opener: &dyn Sockets,
    ) -> Result<Self, Error> {
        let vnet = options.offload;
        let fds: Result<Vec<OwnedFd>, Error> = (0..options.workers)
            .map(|_| {
                opener
                    .tun_queue(device, vnet)
                    .map_err(|source| Error::Device {
                        device: *device,
                        source,
                    })
            })
            .collect();
        Ok(Self::new(fds?, vnet))
    }

    /// Takes queues that are attached, and asks for large packets.
    pub(crate) fn new(fds: Vec<OwnedFd>, vnet: bool) -> Self {
        // The offloads are the device's: asking by one queue asks for all.
        let offload = match fds.first() {
            Some(queue) if vnet => sys::set_offload(queue.as_fd()),
            _ => Offload {
                tcp: false,
                udp: false,
            },
        };
        Self {
            fds: fds.into(),
            vnet,
            offload,
        }
    }
}

impl Socket {
    /// Opens a socket of each worker on an address.
    pub(crate) fn open(
        listen: SocketAddr,
        options: &Options,
        opener: &dyn Sockets,
    ) -> Result<Vec<Arc<Self>>, Error> {
        let asked = UdpOptions {
            buffer: options.socket_buffer,
            merge: options.offload,
            shared: options.workers > 1,
        };
        (0..options.workers)
            .map(|_| {
                opener
                    .udp(listen, &asked)
                    .map(|fd| Arc::new(Self::new(fd, options)))
                    .map_err(|source| Error::Socket { listen, source })
            })
            .collect()
    }

    /// Takes a socket that is bound.
    pub(crate) fn new(fd: OwnedFd, options: &Options) -> Self {
        let (can_segment, can_merge) = sys::can_segment(fd.as_fd());
        // Also of one that was handed over: who opened it may have given it less.
        let is_wide = sys::widen(fd.as_fd());
        Self {
            fd,
            is_wide,
            can_segment: AtomicBool::new(can_segment && options.offload),
            can_merge,
        }
    }
}
