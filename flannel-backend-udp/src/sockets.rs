//! Where TUN queues and sockets come from.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::thread;

use flannel_core::{IfName, udp_address_holder};
use nix::sched::{CloneFlags, setns};

use crate::namespace::NamespaceId;
use crate::sys;

/// Opens what a forwarder works on. What is opened belongs to a network namespace for good, so
/// this decides in which one an overlay lives.
///
/// A forwarder asks on a thread of its own, at its start and whenever something was lost.
pub trait Sockets: fmt::Debug + Send + Sync {
    /// A queue of a TUN device that is there and has several queues; non-blocking.
    /// With `vnet` each packet has a [header](crate::packet::vnet).
    ///
    /// # Errors
    ///
    /// `NotFound` where there is no such device: none may be made.
    fn tun_queue(&self, device: &IfName, vnet: bool) -> io::Result<OwnedFd>;

    /// A UDP socket, bound, non-blocking, which never lets a datagram be fragmented.
    ///
    /// # Errors
    ///
    /// What the system said.
    fn udp(&self, listen: SocketAddr, options: &UdpOptions) -> io::Result<OwnedFd>;

    /// A socket that ICMP errors over IPv4 are sent by: raw, with headers of our own, non-blocking.
    /// What has an address of this node as its source the kernel takes from nobody but itself, so
    /// not from the device. Without such a socket errors bear the address that the packet was for.
    ///
    /// # Errors
    ///
    /// What the system said; needs `CAP_NET_RAW`.
    fn raw(&self) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The most bytes of an outer packet on the way to a peer, as far as the kernel knows.
    ///
    /// # Errors
    ///
    /// What the system said.
    fn path_mtu(&self, to: SocketAddr) -> io::Result<u32>;

    /// Names who has an address and port that is in use, in words; `None`: it cannot be told.
    fn holder(&self, listen: SocketAddr) -> Option<String> {
        let _ = listen;
        None
    }

    /// The namespace that all this is opened in: a device that is in another one is none of this
    /// overlay's, though a queue of it is open here.
    ///
    /// # Errors
    ///
    /// It is not known; then every device that is offered is taken.
    fn namespace(&self) -> io::Result<NamespaceId> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// What a socket is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpOptions {
    /// Bytes of its receive buffer. How much may wait to be sent the forwarder sets itself.
    pub buffer: u32,
    /// Datagrams may come up together.
    pub merge: bool,
    /// Several sockets of this user may have its address.
    pub shared: bool,
}

/// The sockets of one network namespace.
#[derive(Debug)]
pub struct InNamespace {
    namespace: Option<OwnedFd>,
}

impl InNamespace {
    /// The namespace of the thread that starts the forwarder. Needs `CAP_NET_ADMIN` there.
    pub const fn current() -> Self {
        Self { namespace: None }
    }

    /// The namespace of a descriptor. Entering it, on threads that are made for it and end with
    /// the call, needs `CAP_SYS_ADMIN`.
    pub const fn fd(namespace: OwnedFd) -> Self {
        Self {
            namespace: Some(namespace),
        }
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let Some(namespace) = &self.namespace else {
            return work();
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("flannel-udp-ns".to_owned());
            let inside = thread.spawn_scoped(scope, || {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                work()
            })?;
            inside
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
        })
    }
}

impl Sockets for InNamespace {
    fn tun_queue(&self, device: &IfName, vnet: bool) -> io::Result<OwnedFd> {
        self.run(|| sys::attach(device, vnet))
    }

    fn udp(&self, listen: SocketAddr, options: &UdpOptions) -> io::Result<OwnedFd> {
        self.run(|| sys::open_udp(listen, options))
    }

    fn raw(&self) -> io::Result<OwnedFd> {
        self.run(sys::open_raw)
    }

    fn path_mtu(&self, to: SocketAddr) -> io::Result<u32> {
        self.run(|| sys::path_mtu(to))
    }

    fn holder(&self, listen: SocketAddr) -> Option<String> {
        let holder = self.run(|| Ok(udp_address_holder(listen)));
        holder.ok().flatten()
    }

    fn namespace(&self) -> io::Result<NamespaceId> {
        let file = match &self.namespace {
            Some(namespace) => File::from(namespace.try_clone()?).metadata()?,
            None => fs::metadata("/proc/thread-self/ns/net")?,
        };
        Ok(NamespaceId::of(&file))
    }
}
