//! [`Backend`] and [`Network`]: pure functions from leases to kernel objects.

use std::fmt::Debug;
use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::config::{self, NetworkConfig};
use crate::family::{DualStack, Family};
use crate::kernel::{Features, Observed};
use crate::lease::{BackendDataError, BackendType, Lease, LeaseAttrs, LeaseKey};
use crate::lease_set::LeaseSet;
use crate::manager::BoxError;
use crate::node::{NodeId, OverlayName};
use crate::object::{MacAddr, Object, ObjectKey};
use crate::subnet::Subnet;
use crate::underlay::{External, Underlay};

/// The result of a backend's call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a backend cannot work with what it was given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The backend's part of the network config cannot be used.
    #[error("the backend config cannot be used")]
    Config(#[from] config::Error),
    /// The underlay lacks something.
    #[error("the underlay does not fit: {reason}")]
    Underlay {
        /// What is missing.
        reason: String,
    },
    /// The kernel lacks something.
    #[error("the kernel lacks {what}")]
    Unsupported {
        /// What is missing.
        what: String,
    },
    /// Our own lease lacks something.
    #[error("our lease does not fit: {reason}")]
    Lease {
        /// What is missing.
        reason: String,
    },
    /// Something else went wrong.
    #[error("{what}")]
    Other {
        /// What was tried.
        what: String,
        /// What went wrong.
        #[source]
        source: Option<BoxError>,
    },
}

/// Why a peer, or one family of it, is not programmed. A report, never a failure of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Rejection {
    /// It runs another backend.
    #[error("backend type is {found}, ours is {ours}")]
    BackendType {
        /// The peer's.
        found: String,
        /// Ours.
        ours: BackendType,
    },
    /// It has no subnet of a family that we run, nor any other we could use.
    #[error("it has no subnet of a family that this node runs")]
    NoSubnet,
    /// The record says one family and holds another.
    #[error("{subnet} stands in the place of an {family} subnet")]
    WrongFamily {
        /// The place.
        family: Family,
        /// What stands there.
        subnet: Subnet,
    },
    /// Its subnet is not one of the network's.
    #[error("subnet {subnet} is not in the network {network}, or too large for it")]
    OutsideNetwork {
        /// The peer's.
        subnet: Subnet,
        /// The network of that family.
        network: Subnet,
    },
    /// Its subnet overlaps ours.
    #[error("subnet {subnet} overlaps our own {own}")]
    OverlapsOwn {
        /// The peer's.
        subnet: Subnet,
        /// Ours.
        own: Subnet,
    },
    /// Its subnet overlaps this host's LAN, or covers an address of this host.
    #[error("subnet {subnet} overlaps {host}, which this host has on a device of its own")]
    OverlapsHost {
        /// The peer's.
        subnet: Subnet,
        /// The prefix of an address of this host, or the address itself.
        host: Subnet,
    },
    /// Its subnet overlaps that of an older record.
    #[error("subnet {subnet} overlaps {other} of the older record {by}")]
    SubnetTaken {
        /// The peer's.
        subnet: Subnet,
        /// The older one.
        other: Subnet,
        /// Whose it is.
        by: LeaseKey,
    },
    /// An object it needs is that of an older record: the same VTEP MAC, the same key.
    #[error("{key} belongs to the older record {by}")]
    KeyTaken {
        /// The object.
        key: ObjectKey,
        /// Whose it is.
        by: LeaseKey,
    },
    /// Its record cannot be read any more, and its node has written another one since.
    #[error("the record cannot be read any more, and its node has written {by} since")]
    Replaced {
        /// The newer record.
        by: LeaseKey,
    },
    /// Its public address is missing or cannot be one.
    #[error("public address {found}: {reason}")]
    PublicIp {
        /// What it publishes.
        found: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Its backend data is missing or wrong.
    #[error("backend data: {reason}")]
    BackendData {
        /// What is wrong with it.
        reason: String,
    },
    /// It publishes a MAC of this node: a machine was cloned, or renamed.
    #[error("its MAC {mac} is this node's own")]
    OwnMac {
        /// The MAC.
        mac: MacAddr,
    },
    /// It cannot be reached without a router, which this backend needs.
    #[error("{public_ip} is not on a link of this node: {reason}")]
    NotOnLink {
        /// The peer's public address.
        public_ip: String,
        /// What stands in between.
        reason: String,
    },
    /// The backend asked for an object that a peer may not cause. A defect of the backend.
    #[error("the backend wants {key}, which a peer may not cause: {reason}")]
    Unsafe {
        /// The object.
        key: ObjectKey,
        /// The rule.
        reason: String,
    },
}

impl From<BackendDataError> for Rejection {
    fn from(error: BackendDataError) -> Self {
        Self::BackendData {
            reason: error.to_string(),
        }
    }
}

/// What a backend may know when it decides what to publish and what to build.
#[derive(Debug, Clone, Copy)]
pub struct NodeContext<'a> {
    /// The overlay's name.
    pub overlay: &'a OverlayName,
    /// This node.
    pub node: &'a NodeId,
    /// The network config.
    pub config: &'a NetworkConfig,
    /// The chosen external interface.
    pub external: &'a External,
    /// The host's own network.
    pub underlay: &'a Arc<Underlay>,
    /// What the kernel can do.
    pub features: &'a Features,
    /// What the kernel has, so that what is there can be adopted.
    pub observed: &'a Observed,
    /// The lease this process holds now. What it publishes stands, whatever the kernel shows: a
    /// device whose MAC somebody changed is repaired, not followed.
    pub held: Option<&'a Lease>,
    /// The lease this node held last, if one is known: of an earlier run, from the saved state.
    pub previous: Option<&'a Lease>,
}

impl NodeContext<'_> {
    /// The address of the external interface from which outer packets of a family are sent.
    ///
    /// # Errors
    /// [`Error::Underlay`] if the interface has none, [`Error::Unsupported`] if this host does not
    /// have the family.
    pub fn source(&self, family: Family) -> Result<IpAddr> {
        if family == Family::V6 && !self.features.ipv6 {
            return Err(Error::Unsupported {
                what: "IPv6: it is switched off (net.ipv6.conf.all.disable_ipv6)".to_owned(),
            });
        }
        let External { dev, local, .. } = self.external;
        local.ip(family).ok_or_else(|| Error::Underlay {
            reason: format!(
                "interface {dev} has no {family} address to send from, which the {family} overlay \
                 needs"
            ),
        })
    }
}

/// A part of a network for each family of the config that works on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PerFamily<T> {
    /// The parts.
    pub works: DualStack<T>,
    /// Why the other families do not work here.
    pub lacks: DualStack<String>,
}

impl<T> PerFamily<T> {
    /// Makes the part of each family. One that does not work on this host costs the others nothing.
    ///
    /// # Errors
    /// The error of `make`, if no family works, or if it is not this host that is in the way.
    pub fn make(config: &NetworkConfig, mut make: impl FnMut(Family) -> Result<T>) -> Result<Self> {
        let (mut works, mut lacks) = (DualStack::default(), DualStack::default());
        let mut first = None;
        for family in config.families() {
            match make(family) {
                Ok(part) => works.set(family, Some(part)),
                Err(error @ (Error::Underlay { .. } | Error::Unsupported { .. })) => {
                    lacks.set(family, Some(error.to_string()));
                    first.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        match first {
            Some(error) if works.iter().next().is_none() => Err(error),
            _ => Ok(Self { works, lacks }),
        }
    }
}

/// A way to carry packets between nodes.
///
/// What every implementation promises, and the test of `flannel_testkit::conformance::backend`
/// that checks it:
///
/// - [`attrs`](Self::attrs) is a pure function of its context, and needs no lease
///   (`attrs_are_a_pure_function`).
/// - What it publishes, another node with the same config accepts (`peers_accept_what_we_publish`).
///
/// Backends never see a [`Manager`](crate::Manager): the overlay acquires the lease.
#[async_trait]
pub trait Backend: Debug + Send + Sync + 'static {
    /// The type by which the network config selects this backend.
    fn backend_type(&self) -> BackendType;

    /// The types of other backends whose nodes this one's network reaches as well, as they are:
    /// while a cluster changes its type node by node, nobody is cut off. A peer of any further type
    /// is rejected. By default there are none.
    ///
    /// Each of two types must reach the other one, and must receive what the other one sends, for
    /// as long as the devices of the former type stay
    /// ([`Desired::held_backends`](crate::reconcile::desired::Desired::held_backends)).
    fn reaches(&self) -> Vec<BackendType> {
        Vec::new()
    }

    /// What this node publishes with its lease.
    ///
    /// # Errors
    /// [`Error`] if the config, the underlay or the kernel does not fit.
    fn attrs<'a>(&self, cx: &NodeContext<'a>) -> Result<LeaseAttrs>;

    /// Turns our lease into a [`Network`]. Called again whenever config, underlay or lease change;
    /// must change nothing in the kernel.
    ///
    /// # Errors
    /// [`Error`] if the config, the underlay, the kernel or the lease does not fit.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn register_network<'a>(
        &self,
        cx: &NodeContext<'a>,
        lease: Lease,
    ) -> Result<Arc<dyn Network>>;
}

/// Whether our lease has a subnet of every family of the config.
///
/// # Errors
/// [`Error::Lease`] names the family without one.
pub fn check_lease(config: &NetworkConfig, lease: &Lease) -> Result<()> {
    match config.families().find(|family| !lease.subnet.has(*family)) {
        None => Ok(()),
        Some(family) => Err(Error::Lease {
            reason: format!("it has no {family} subnet, which the config asks for"),
        }),
    }
}

/// Something worth telling that is neither an error nor a condition, such as why checksum offload
/// is off.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Note {
    /// What it is about, in one word.
    pub topic: String,
    /// The text.
    pub text: String,
}

/// A network that a backend made of our lease: a cheap, immutable value.
///
/// The laws, and the tests of `flannel_testkit::conformance::backend` that check them:
///
/// - *Pure*: the same inputs, the same objects (`network_is_pure`).
/// - *Local*: what a peer causes depends on that peer's lease alone; leases never see one another
///   (by construction: [`peer`](Self::peer) is given one).
/// - *Complete*: what a peer's objects need is among them, among ours, or nobody's to make
///   (`peer_objects_are_closed_under_needs`).
/// - *Safe*: a peer causes no device, address or setting, no route outside of its own subnet, and
///   nothing that [`Network::local`] claims (`peer_objects_stay_in_bounds`); no lease makes it
///   panic (`hostile_leases_never_panic`).
/// - *Monotone MTU*: never above that of the underlay less the overhead
///   (`mtu_leaves_room_for_the_overhead`).
#[async_trait]
pub trait Network: Debug + Send + Sync + 'static {
    /// Our lease.
    fn lease(&self) -> &Lease;

    /// The largest packet, in bytes, that containers of this node may send.
    fn mtu(&self) -> u32;

    /// What the node itself needs: devices, their settings, addresses.
    fn local(&self) -> Vec<Object>;

    /// What is needed to reach one peer, per family. `subnets` are those of the peer's subnets
    /// that were found admissible: in the pool, of the right family, overlapping nobody older; its
    /// public address has been checked for them as well. Only these families are answered.
    fn peer(
        &self,
        peer: &Lease,
        subnets: &DualStack<Subnet>,
    ) -> DualStack<std::result::Result<Vec<Object>, Rejection>>;

    /// What is worth telling about how the network is built.
    fn notes(&self) -> Vec<Note> {
        Vec::new()
    }

    /// The families of the config that the network does without, and why each does not work on this
    /// host.
    fn lacks(&self) -> DualStack<String> {
        DualStack::default()
    }

    /// Runs a userspace data path for as long as it is polled. Kernel backends have none and never
    /// return. Must tolerate that kernel objects are absent or made again.
    ///
    /// # Errors
    /// [`Error`] if the data path cannot go on; it is then started anew after a while.
    ///
    /// # Cancel safety
    /// Stops the data path.
    async fn run(&self, leases: watch::Receiver<Arc<LeaseSet>>) -> Result<()> {
        drop(leases);
        std::future::pending().await
    }
}
