//! What workers read from and write to.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flannel_core::{DualStack, Family, Subnet};
use nix::errno::Errno;
use nix::sys::uio::writev;

use crate::packet::coalesce::Merge;
use crate::packet::vnet;
use crate::sockets::Sockets;
use crate::table::Table;

/// What packets are forwarded by.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) table: Arc<Table>,
    pub(crate) own: DualStack<Subnet>,
    pub(crate) mtu: DualStack<u32>,
}

/// The descriptors of a worker.
#[derive(Debug)]
pub(crate) struct Io {
    /// The queues of all workers: each reads from its own and writes to that of the flow.
    pub(crate) queues: Arc<[OwnedFd]>,
    /// The worker's own queue.
    pub(crate) index: usize,
    pub(crate) sockets: DualStack<Arc<Socket>>,
    /// Packets on the queues have headers.
    pub(crate) vnet: bool,
    pub(crate) merge: Merge,
    /// What ICMP errors over IPv4 are sent by.
    pub(crate) raw: Option<Arc<OwnedFd>>,
    pub(crate) opener: Arc<dyn Sockets>,
}

/// A socket of one family.
#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) fd: OwnedFd,
    /// It has room for all that waits for neighbours which do not answer.
    pub(crate) is_wide: bool,
    /// It takes many datagrams as one message. A device below may turn out not to.
    pub(crate) can_segment: AtomicBool,
    pub(crate) can_merge: bool,
}

impl Io {
    pub(crate) fn queue(&self) -> BorrowedFd<'_> {
        self.queues[self.index].as_fd()
    }

    pub(crate) fn socket(&self, family: Family) -> Option<&Socket> {
        self.sockets.get(family).map(|socket| &**socket)
    }

    /// The most packets of a message to a family.
    pub(crate) fn segments(&self, family: Family) -> u16 {
        let can = self
            .socket(family)
            .is_some_and(|socket| socket.can_segment.load(Ordering::Relaxed));
        if can { u16::MAX } else { 1 }
    }

    /// Writes a packet to the queue of its flow. The first part is the header, which is left out
    /// where the queue has none.
    pub(crate) fn write(&self, steer: u32, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let queue = &self.queues[steer as usize % self.queues.len()];
        let parts = if self.vnet { parts } else { &parts[1..] };
        loop {
            match writev(queue, parts) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes a packet that is complete.
    pub(crate) fn write_plain(&self, steer: u32, packet: &[u8]) -> io::Result<()> {
        let header = [0; vnet::LEN];
        self.write(steer, &[IoSlice::new(&header), IoSlice::new(packet)])
    }
}

/// Why a worker cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The TUN device is gone, or was made anew.
    #[error("the TUN device gave {0}")]
    Device(Arc<str>),
    /// A socket gave an error that is about no packet.
    #[error("a socket gave {0}")]
    Socket(Arc<str>),
    /// The worker panicked: a defect of this crate.
    #[error("the worker panicked: {0}")]
    Panic(Arc<str>),
}

impl Failure {
    pub(crate) fn device(error: &io::Error) -> Self {
        Self::Device(error.to_string().into())
    }

    pub(crate) fn panic(payload: &(dyn std::any::Any + Send)) -> Self {
        let text = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Self::Panic(text.unwrap_or("no message").into())
    }

    pub(crate) fn socket(error: &io::Error) -> Self {
        Self::Socket(error.to_string().into())
    }
}

/// Whether an error of a TUN queue says that its device is gone.
pub(crate) fn is_detached(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADFD | libc::EBADF | libc::ENODEV | libc::ENXIO)
    )
}
