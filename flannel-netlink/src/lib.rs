//! The Linux kernel of the flannel overlay SDK: [`NetlinkKernel`] implements
//! [`flannel_core::Kernel`] over netlink, `/proc/sys/net` and ethtool's generic netlink family.
//!
//! It is the only crate that talks to the kernel, and it never decides anything: it turns objects
//! into messages and messages into objects.
//!
//! # The journey of an op
//!
//! [`Kernel::apply`] hands its ops to a thread that lives in the network namespace. There each is
//! encoded by the codec of its kind (`link`, `address`, `neighbour`, `nexthop`, `route`, `sysctl`,
//! `offload`) and put into a batch of up to 256 requests, which goes to the kernel as one datagram.
//! The kernel carries the requests out one after the other and says of each why it failed, in its
//! own words where it has some; they come back as [`flannel_core::kernel::Error`]. An object that
//! could not be made because something is in its place is read back: the very object is success. A
//! device is made step by step and read back whole; if it is not as asked it is removed again. TUN
//! devices are made with `/dev/net/tun`, which needs the only unsafe code of this crate.
//!
//! [`Kernel::observe`] is one dump per kind. A dump that changes disturbed is repeated, and so is
//! everything if an object turns up on a device that was made meanwhile. [`Kernel::changes`] reads
//! a socket of its own on a thread of its own. [`Kernel::host_facts`] is look-ups of routes, settings
//! under `/proc/sys/net` and the chains of nf_tables; whether legacy tables are there is in `/proc` too.
//!
//! ```no_run
//! use flannel_core::{Address, IfName, Kernel, Object, Op, Scope};
//! use flannel_netlink::NetlinkKernel;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let kernel = NetlinkKernel::in_namespace("/run/netns/blue")?;
//! let address = Address {
//!     dev: IfName::new("eth0")?,
//!     ip: "192.0.2.1".parse()?,
//!     prefix_len: 24,
//! };
//! for result in kernel.apply(&[Op::Create(Object::Address(address))]).await {
//!     result?;
//! }
//! let observed = kernel.observe(&Scope::default()).await?;
//! assert!(!observed.addresses.is_empty());
//! # Ok(())
//! # }
//! ```
//!
//! # What the kernel does that one should know
//!
//! Each was found by trying on Linux 6.18, and those that matter have a test.
//!
//! | What | So |
//! |---|---|
//! | A device set down loses its routes, nexthop objects, permanent neighbours and IPv6 addresses, and keeps its forwarding entries and IPv4 addresses. | They are made again when it is up. |
//! | A nexthop object that is deleted takes all routes through it along, whoever made them. | Routes go first. |
//! | A nexthop object is deleted by its number alone. | It is looked at before, and spared if its protocol is another. |
//! | The metric 0 in the deletion of an IPv4 route means any metric; the protocol 0 means any. | The routes are looked at before. |
//! | The removal of an IPv6 route to a gateway, a device or a black hole means one through a nexthop object, too. | The routes are looked at before. |
//! | A dump of forwarding entries leaves out some that stay when others are removed meanwhile, and does not say so. | Removals are listened to, and the dump is repeated. |
//! | An IPv6 route without a metric gets 1024. | A metric of 0 is taken for 1024. |
//! | An IPv6 route without a protocol gets 3 (boot). | A protocol of 0 is rejected. |
//! | An IPv6 on-link gateway is refused (`device mismatch`) while the main table has a route to it, other than a default or unreachable one, through **another** device. | A route that moves from one device to another, with its gateway inside its own destination, is deleted before the nexthop is made. |
//! | In a namespace that never had an IPv4 address every IPv4 gateway is refused (`invalid gateway`). | Addresses go first. |
//! | Of a VXLAN device MTU, hardware address, alias, learning, local address (within its family) and underlay device change in place; VNI, port and GBP do not. | [`Error::Unsupported`] |
//! | A new VXLAN device whose MTU does not fit into its underlay's gets a smaller one, without a word. | It is read back, removed and rejected. |
//! | A TUN device without an owner lets anybody attach to it who can open `/dev/net/tun`. | It belongs to the user that the process runs as. |
//! | Two entries for one MAC address on a VXLAN device are possible for multicast and the zero address only. | Such addresses are rejected. |
//!
//! # What this crate does not do
//!
//! It keeps no state between calls, repeats no op, chooses no name, number or address, and runs no
//! program. Of routes it shows the main table; of neighbours and forwarding entries those that
//! somebody configured and that say no more than an object can (a forwarding entry with a port of
//! its own is not shown, but nothing is put in its place). Devices whose names are not printable
//! ASCII are left out with all that is on them.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod address;
mod apply;
mod claim;
mod clock;
#[doc(hidden)]
pub mod codec;
mod connection;
mod device;
mod error;
mod facts;
mod features;
mod filter;
mod keys;
mod lab;
mod link;
mod lookup;
mod names;
mod neighbour;
mod nexthop;
mod observe;
mod offload;
mod route;
mod sysctl;
mod tun;
mod watch;
mod wire;
mod witness;
mod worker;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::kernel::{Error, Result};
use flannel_core::{
    ChangeStream, Claim, Clock, Features, HostFacts, Kernel, ObjectKey, Objects, Observed, Op,
    OverlayName, Questions, Scope,
};

pub use clock::BootClock;
use worker::{Handle, Namespace};

/// `NLM_F_REPLACE`.
const REPLACE: u16 = 0x100;
/// `NLM_F_EXCL`.
const EXCL: u16 = 0x200;
/// `NLM_F_CREATE`.
const CREATE: u16 = 0x400;

/// How a [`NetlinkKernel`] works. The defaults are right for nearly everybody.
#[derive(Debug, Clone)]
pub struct NetlinkOptions {
    deadline: Duration,
    receive_buffer: usize,
    watch_buffer: usize,
}

impl Default for NetlinkOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(5),
            receive_buffer: 4 * 1024 * 1024,
            watch_buffer: 4 * 1024 * 1024,
        }
    }
}

impl NetlinkOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The longest silence of the kernel in the middle of a request; at least a millisecond.
    /// Default: 5 seconds.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline.max(Duration::from_millis(1));
        self
    }

    /// The receive buffer of the request sockets in bytes. The kernel cuts it to
    /// `net.core.rmem_max` if the process may not go beyond. Default: 4 MiB.
    #[must_use]
    pub const fn receive_buffer(mut self, bytes: usize) -> Self {
        self.receive_buffer = bytes;
        self
    }

    /// The receive buffer of the socket that hints at changes, in bytes; what does not fit is told
    /// as [`flannel_core::Change::All`]. Default: 4 MiB.
    #[must_use]
    pub const fn watch_buffer(mut self, bytes: usize) -> Self {
        self.watch_buffer = bytes;
        self
    }

    /// A kernel on the network namespace of the calling thread.
    ///
    /// # Errors
    /// As [`NetlinkKernel::new`].
    pub fn open(self) -> Result<NetlinkKernel> {
        NetlinkKernel::start(Namespace::Current, self)
    }

    /// A kernel on the network namespace of a file such as `/run/netns/blue`.
    ///
    /// # Errors
    /// As [`NetlinkKernel::in_namespace`].
    pub fn open_in(self, path: impl AsRef<Path>) -> Result<NetlinkKernel> {
        NetlinkKernel::start(Namespace::open(path.as_ref())?, self)
    }

    /// A kernel on the network namespace of an open file.
    ///
    /// # Errors
    /// As [`NetlinkKernel::in_namespace_fd`].
    pub fn open_in_fd(self, namespace: OwnedFd) -> Result<NetlinkKernel> {
        NetlinkKernel::start(Namespace::File(namespace), self)
    }
}

/// The network configuration of one Linux network namespace.
///
/// It has threads of its own in the namespace, which end when it is dropped; until then the
/// namespace stays, even if its file is removed.
#[derive(Debug)]
pub struct NetlinkKernel {
    worker: Handle,
    /// Reads everything, which may take a while, in which the other one changes things.
    reader: Handle,
}

impl NetlinkKernel {
    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// [`Error::Connection`] if no thread or no socket can be had.
    pub fn new() -> Result<Self> {
        NetlinkOptions::new().open()
    }

    /// The namespace of a file such as `/run/netns/blue` or `/proc/<pid>/ns/net`.
    ///
    /// # Errors
    /// As [`NetlinkKernel::new`]; [`Error::NotFound`] if there is no such file;
    /// [`Error::NotPermitted`] if the process may not enter the namespace, which needs
    /// `CAP_SYS_ADMIN`.
    pub fn in_namespace(path: impl AsRef<Path>) -> Result<Self> {
        NetlinkOptions::new().open_in(path)
    }

    /// The namespace of an open file.
    ///
    /// # Errors
    /// As [`NetlinkKernel::in_namespace`].
    pub fn in_namespace_fd(namespace: OwnedFd) -> Result<Self> {
        NetlinkOptions::new().open_in_fd(namespace)
    }

    fn start(namespace: Namespace, options: NetlinkOptions) -> Result<Self> {
        let worker = worker::start(namespace, options)?;
        let reader = worker.start_another()?;
        Ok(Self { worker, reader })
    }
}

#[async_trait]
impl Kernel for NetlinkKernel {
    async fn features(&self) -> Result<Features> {
        self.worker
            .call(|worker, _| features::probe(worker))
            .await?
            .map_err(|failure| failure.meaning(None, || "probing".to_owned()))
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed> {
        let scope = scope.clone();
        self.reader
            .call(move |worker, _| observe::observe(worker, &scope))
            .await?
    }

    async fn settings(&self, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
        let keys = keys.clone();
        self.worker
            .call(move |worker, _| observe::settings_alone(worker, &keys))
            .await?
    }

    async fn read(&self, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
        let keys = keys.clone();
        self.worker
            .call(move |worker, _| keys::read(worker, &keys))
            .await?
    }

    async fn links(&self) -> Result<Observed> {
        self.worker
            .call(move |worker, _| observe::links(worker))
            .await?
    }

    async fn host_facts(&self, questions: &Questions) -> Result<HostFacts> {
        let questions = questions.clone();
        self.worker
            .call(move |worker, _| facts::facts(worker, &questions))
            .await?
    }

    async fn apply(&self, ops: &[Op]) -> Vec<Result<()>> {
        let count = ops.len();
        let ops = ops.to_vec();
        let answer = self
            .worker
            .call(move |worker, abandoned| apply::apply(worker, &ops, abandoned))
            .await;
        match answer {
            Ok(results) => results,
            Err(Error::TimedOut) => (0..count).map(|_| Err(Error::TimedOut)).collect(),
            Err(error) => (0..count)
                .map(|_| {
                    Err(Error::Connection {
                        reason: error.to_string(),
                        source: None,
                    })
                })
                .collect(),
        }
    }

    fn changes(&self) -> ChangeStream {
        watch::watch(&self.worker)
    }

    async fn claim(&self, name: &OverlayName, replace: bool) -> Result<Claim> {
        claim::claim(&self.worker, name, replace).await
    }

    fn clock(&self) -> Option<Arc<dyn Clock>> {
        Some(Arc::new(BootClock::new()))
    }
}
