//! [`WithTunnels`]: a kernel that has packet paths as well.

mod apply;
mod hints;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::kernel::Result;
use flannel_core::{
    ChangeStream, Claim, Clock, Features, HostFacts, IfName, Kernel, Note, Object, ObjectKey,
    Objects, Observed, Op, OverlayName, PathFault, Questions, Scope, Subnet, Traffic, Tunnel,
    TunnelPeer,
};
use tokio::sync::Mutex;

use hints::Both;

/// The peers of a packet path: where each subnet is.
pub type Peers = BTreeMap<Subnet, SocketAddr>;

/// A packet path that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// What it was asked to be.
    pub tunnel: Tunnel,
    /// Its peers.
    pub peers: Arc<Peers>,
}

/// What carries packets between TUN devices and sockets: forwarders of this process, or a stand-in.
///
/// It decides nothing, and what it has is read back: the reconciler makes right what is not.
#[async_trait]
pub trait PacketPath: Debug + Send + Sync + 'static {
    /// The packet paths that run now. One whose device is gone, or was made anew, or that cannot
    /// carry packets any more, does not run; what it still holds may be let go at this opportunity.
    fn running(&self) -> Vec<Running>;

    /// Starts a packet path without peers on a device that is there; one of that device that does
    /// not run any more is let go.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`](flannel_core::kernel::Error::NoSuchDevice),
    /// [`Error::Rejected`](flannel_core::kernel::Error::Rejected) of a device that is no TUN device
    /// as [`flannel_core::Tun::FOR_TUNNEL`], [`Error::Busy`](flannel_core::kernel::Error::Busy) of
    /// an address or port that is not free.
    ///
    /// # Cancel safety
    /// It may have been started.
    async fn open(&self, tunnel: &Tunnel) -> Result<()>;

    /// Makes a packet path that runs be as given, without losing what it carries. If that fails it
    /// goes on as it was.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Error::NotFound`](flannel_core::kernel::Error::NotFound) if none
    /// runs on the device.
    ///
    /// # Cancel safety
    /// It may have been altered.
    async fn alter(&self, tunnel: &Tunnel) -> Result<()>;

    /// Sets the peers of a packet path that runs, all of them, at once for each packet.
    ///
    /// # Errors
    /// [`Error::NotFound`](flannel_core::kernel::Error::NotFound) if none runs on the device.
    ///
    /// # Cancel safety
    /// They may have been set.
    async fn set_peers(&self, dev: IfName, peers: Arc<Peers>) -> Result<()>;

    /// Ends a packet path; none is no error.
    ///
    /// # Cancel safety
    /// It may have been ended.
    async fn close(&self, dev: IfName);

    /// Hints, from the call on, that a packet path may not be what it was.
    fn hints(&self) -> ChangeStream;

    /// What the packet paths that run have counted.
    fn traffic(&self) -> Vec<Traffic> {
        Vec::new()
    }

    /// The packet paths that are there and carry nothing at the moment, with the reason. A change of
    /// these is hinted at.
    fn faults(&self) -> Vec<PathFault> {
        Vec::new()
    }

    /// What is worth telling about how packets are carried, such as what the kernel lacks.
    fn notes(&self) -> Vec<Note> {
        Vec::new()
    }
}

/// A kernel with packet paths: objects of kind tunnel and tunnel-peer are made by a [`PacketPath`],
/// all others by the kernel inside.
///
/// To the reconciler it is a kernel like any other. What holds of every kernel holds of it, and the
/// same suite checks it (`flannel_testkit::conformance::kernel`).
#[derive(Debug)]
pub struct WithTunnels<K> {
    inner: K,
    path: Arc<dyn PacketPath>,
    /// Held while packet paths are changed: each change begins with what runs.
    changing: Mutex<()>,
}

impl<K: Kernel> WithTunnels<K> {
    /// A kernel with what carries packets in the same network namespace.
    pub fn new(inner: K, path: impl PacketPath) -> Self {
        Self::with_shared_path(inner, Arc::new(path))
    }

    /// The same with a packet path that is shared with others.
    pub fn with_shared_path(inner: K, path: Arc<dyn PacketPath>) -> Self {
        Self {
            inner,
            path,
            changing: Mutex::new(()),
        }
    }

    /// The kernel inside.
    pub const fn inner(&self) -> &K {
        &self.inner
    }

    /// What carries packets.
    pub const fn path(&self) -> &Arc<dyn PacketPath> {
        &self.path
    }

    fn running_on(&self, dev: IfName) -> Option<Running> {
        let mut running = self.path.running().into_iter();
        running.find(|running| running.tunnel.dev == dev)
    }
}

#[async_trait]
impl<K: Kernel> Kernel for WithTunnels<K> {
    async fn features(&self) -> Result<Features> {
        let mut features = self.inner.features().await?;
        features.tunnels = features.tun;
        Ok(features)
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed> {
        let mut observed = self.inner.observe(scope).await?;
        for Running { tunnel, peers } in self.path.running() {
            let dev = tunnel.dev;
            // Only what is on a device is told of: one that came since is seen the next time.
            if !observed.objects.contains_key(&ObjectKey::Link(dev)) {
                continue;
            }
            let peers = peers.iter().map(|(subnet, endpoint)| {
                Object::TunnelPeer(TunnelPeer {
                    dev,
                    subnet: *subnet,
                    endpoint: *endpoint,
                })
            });
            for object in std::iter::once(Object::Tunnel(Box::new(tunnel))).chain(peers) {
                observed.objects.insert(object.key(), object);
            }
        }
        Ok(observed)
    }

    async fn settings(&self, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
        self.inner.settings(keys).await
    }

    async fn read(&self, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
        let (tunnels, others): (Vec<_>, Vec<_>) = keys
            .iter()
            .cloned()
            .partition(|key| matches!(key, ObjectKey::Tunnel(_) | ObjectKey::TunnelPeer { .. }));
        let mut found = if others.is_empty() {
            Objects::new()
        } else {
            self.inner.read(&others.into_iter().collect()).await?
        };
        if tunnels.is_empty() {
            return Ok(found);
        }
        let running = self.path.running();
        let running_on = |dev: IfName| running.iter().find(|running| running.tunnel.dev == dev);
        for key in tunnels {
            let object = match &key {
                ObjectKey::Tunnel(dev) => {
                    running_on(*dev).map(|running| Object::Tunnel(Box::new(running.tunnel.clone())))
                }
                ObjectKey::TunnelPeer { dev, subnet } => running_on(*dev).and_then(|running| {
                    let (dev, subnet) = (*dev, *subnet);
                    let endpoint = *running.peers.get(&subnet)?;
                    Some(Object::TunnelPeer(TunnelPeer {
                        dev,
                        subnet,
                        endpoint,
                    }))
                }),
                _ => None,
            };
            found.extend(object.map(|object| (key, object)));
        }
        Ok(found)
    }

    async fn links(&self) -> Result<Observed> {
        self.inner.links().await
    }

    async fn host_facts(&self, questions: &Questions) -> Result<HostFacts> {
        self.inner.host_facts(questions).await
    }

    async fn apply(&self, ops: &[Op]) -> Vec<Result<()>> {
        apply::apply(self, ops).await
    }

    fn changes(&self) -> ChangeStream {
        Box::pin(Both::new(self.inner.changes(), self.path.hints()))
    }

    async fn claim(&self, name: &OverlayName, replace: bool) -> Result<Claim> {
        self.inner.claim(name, replace).await
    }

    fn traffic(&self) -> Vec<Traffic> {
        let mut traffic = self.inner.traffic();
        traffic.extend(self.path.traffic());
        traffic
    }

    fn path_faults(&self) -> Vec<PathFault> {
        let mut faults = self.inner.path_faults();
        faults.extend(self.path.faults());
        faults
    }

    fn notes(&self) -> Vec<Note> {
        let mut notes = self.inner.notes();
        notes.extend(self.path.notes());
        notes
    }

    fn clock(&self) -> Option<Arc<dyn Clock>> {
        self.inner.clock()
    }
}
