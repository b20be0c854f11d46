//! Overlay networks as a library: flannel, in Rust.
//!
//! A **host program** (an orchestrator, a micro-VM fleet, an edge platform, a Kubernetes
//! distribution) picks a **subnet manager** and one or more **backends**, and gets a network in
//! which every container or virtual machine on every node reaches every other. The formats are
//! flannel's, byte for byte: a cluster may mix Go `flanneld` and programs built on this crate.
//!
//! # A host program
//!
//! ```no_run
//! # #[cfg(all(feature = "netlink", feature = "vxlan"))]
//! # async fn program() -> Result<(), Box<dyn std::error::Error>> {
//! use flannel::{MemoryManager, NetlinkKernel, NetworkConfig, NodeId, Overlay, PoolMode, VxlanBackend};
//!
//! let config = r#"{ "Network": "10.42.0.0/16", "Backend": { "Type": "vxlan" } }"#;
//! let config = NetworkConfig::from_json(config, PoolMode::Allocated)?;
//! let overlay = Overlay::builder(NodeId::new("node-a")?)
//!     .manager(MemoryManager::new(config))
//!     .backend(VxlanBackend::new())
//!     .kernel(NetlinkKernel::new()?)
//!     .start()
//!     .await?;
//! overlay.ready().await?;
//! println!("{:?}", overlay.status().lease);
//! overlay.stop().await?; // packets keep flowing
//! # Ok(())
//! # }
//! ```
//!
//! # How it works
//!
//! 1. The [`Manager`] gives the node a [`Lease`]: a [`Subnet`] per address family, published
//!    together with the node's underlay address and what its backend needs. It then tells of
//!    everybody's leases as a stream of [`Event`]s.
//! 2. A [`LeaseSet`] folds the events into [`Peer`]s. A peer's record is hostile input: what lies
//!    outside of the pool, overlaps our own subnet or an older one, or cannot be a public address,
//!    is rejected with the reason, and disturbs nobody else.
//! 3. The [`Backend`] that the [`NetworkConfig`] selects turns our lease into a [`Network`]: a pure
//!    function from leases to kernel [`Object`]s.
//! 4. The [`Overlay`] compares these objects with what the [`Kernel`] has and repairs the
//!    difference: at start (adopting what is right, so that no packet is lost), on every change,
//!    on every hint of the kernel, and on a timer. [`reconcile::plan`] is the pure heart of it.
//!
//! # What the handle gives
//!
//! [`Overlay::status`] (typed conditions, rejected peers, failing objects), [`Overlay::events`]
//! (what was repaired and why, each one line as text), [`Overlay::plan`] (a dry run), [`Overlay::resync`],
//! [`Overlay::stop`] (packets keep flowing), [`Overlay::drain`] and [`Overlay::teardown`] (which
//! [`Overlay::teardown_plan`] shows beforehand). With a [`FileState`] a node boots while the store
//! is down.
//!
//! # Nodes on different machines
//!
//! With the feature `etcd` they share a pool through etcd v3, together with Go flanneld:
//!
//! ```no_run
//! # #[cfg(feature = "etcd")]
//! # fn options() -> Result<(), flannel::OptionsError> {
//! use flannel::{EtcdManager, EtcdOptions, Password, TlsFiles};
//!
//! let options = EtcdOptions::new(["https://10.0.0.1:2379", "https://10.0.0.2:2379"])?
//!     .user("flannel", Password::file("/etc/flannel/password"))
//!     .tls(TlsFiles {
//!         ca: Some("/etc/flannel/ca.pem".into()),
//!         ..TlsFiles::default()
//!     });
//! let manager = EtcdManager::new(options)?; // for Overlay::builder(..).manager(..)
//! # Ok(())
//! # }
//! ```
//!
//! The network config is then that under `/coreos.com/network/config`, and what is put there later
//! is applied. The README says what is written to etcd and which rights that needs;
//! `examples/etcd_node` is a whole node.
//!
//! With the feature `kube` a node's lease is on its Kubernetes Node, in flannel's annotations,
//! again together with Go flanneld:
//!
//! ```no_run
//! # #[cfg(feature = "kube")]
//! # fn options() -> Result<(), flannel::KubeOptionsError> {
//! use flannel::{AnnotationPrefix, ConfigSource, KubeAccess, KubeManager, KubeOptions};
//!
//! let access = KubeAccess::kubeconfig("/etc/kubernetes/kubelet.conf", None);
//! let config = ConfigSource::file("/etc/kube-flannel/net-conf.json");
//! let options = KubeOptions::new(access, config, AnnotationPrefix::default());
//! let manager = KubeManager::new(options)?; // the node id is the name of the Node
//! # Ok(())
//! # }
//! ```
//!
//! The subnets are the Node's pod CIDRs. `deploy/` has manifests with the rights that it takes;
//! `examples/kube_node` is a whole node.
//!
//! # Bring your own
//!
//! Every seam is an object-safe trait: a store is a [`Manager`], a way to carry packets a
//! [`Backend`], a system that holds the objects a [`Kernel`]. `flannel-testkit` has the conformance
//! suite of each, and fakes; `examples/custom_manager.rs` and `examples/custom_backend.rs` show the
//! way.
//!
//! # Features
//!
//! | feature | default | brings |
//! |---|---|---|
//! | `host-gw` | yes | [`HostGwBackend`]: flannel's host-gw, plain routes without a tunnel |
//! | `netlink` | yes | [`NetlinkKernel`]: the Linux kernel over netlink |
//! | `udp` | yes | [`UdpBackend`]: flannel's UDP, with [`Forwarders`] that carry the packets and [`WithTunnels`], which a kernel goes into to have them |
//! | `vxlan` | yes | [`VxlanBackend`]: flannel's VXLAN |
//! | `etcd` | no | `EtcdManager`: leases on etcd v3. Building it needs `protoc` and its well-known types: on Debian `apt-get install protobuf-compiler libprotobuf-dev` |
//! | `kube` | no | `KubeManager`: leases on the Nodes of a Kubernetes cluster |
//! | `k8s-latest` | no | with `kube`, for programs in which nothing else chooses a version of `k8s-openapi` |
//!
//! # What it does not do
//!
//! It never exits, forks, runs a shell, reads the environment, installs a signal handler or sets a
//! global; it writes no file unless given one. Those are the host program's.
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub use flannel_core::{
    alloc, backend, config, keeper, kernel, manager, mtu, reconcile, underlay, wire,
};

// The handle.
pub use flannel_core::{
    Check, Condition, ConditionStatus, ConditionType, Error, FailingObject, LeaseStatus, Listed,
    Overlay, OverlayBuilder, OverlayEvent, PathFault, PeerTraffic, Preflight, RejectedPeer, Status,
    Traffic,
};

// The seams.
pub use flannel_core::{
    Backend, Claim, Claimant, Clock, FileState, FileStateError, Kernel, Manager, MemoryManager,
    MemoryState, Network, SavedState, StateStore,
};

// Leases and their store.
pub use flannel_core::keeper::{KeeperOptions, LossPolicy};
pub use flannel_core::{
    BackendConfig, BackendData, BackendDataError, BackendType, Capabilities, DualStack, Event,
    EventStream, Family, Lease, LeaseAttrs, LeaseDelta, LeaseKey, LeaseRequest, LeaseSet,
    NameError, NetworkConfig, NodeId, OverlayName, Own, Peer, Pool, PoolMode, PublicIp, Rejection,
    Revision, Seniority, Snapshot, Subnet, SubnetError, Unreadable, WithdrawalGuard,
};

// The kernel's objects and the underlay.
pub use flannel_core::{
    Address, AddressInfo, Change, ChangeStream, External, Fdb, Features, Gateways, Hop, IfName,
    Interface, Link, LinkInfo, LinkKind, MAIN_TABLE, MacAddr, MacError, Neighbour, Nexthop,
    NodeContext, Note, Object, ObjectKey, Objects, Observed, Offload, Op, Reach, Route, RoutePath,
    RouteProtocol, RouteTarget, Scope, Sysctl, Tun, TunFault, Tunnel, TunnelPeer, Underlay,
    UnderlayOptions, Vxlan,
};

// Time and chance as parameters.
pub use flannel_core::{Backoff, Moment, Rng, TokioClock, error_chain, runtime_fault, stable_hash};

#[cfg(feature = "netlink")]
pub use flannel_netlink::{BootClock, NetlinkKernel, NetlinkOptions};

#[cfg(feature = "host-gw")]
pub use flannel_backend_hostgw::HostGwBackend;

#[cfg(feature = "udp")]
pub use flannel_backend_udp::{
    self as udp, Forwarders, InNamespace, PacketPath, UdpBackend, UdpConfig, WithTunnels,
};

#[cfg(feature = "vxlan")]
pub use flannel_backend_vxlan::{ChecksumOffload, VxlanBackend, VxlanConfig, VxlanData};

#[cfg(feature = "etcd")]
pub use flannel_subnet_etcd::{
    Calls, EtcdManager, EtcdOptions, EtcdStore, OptionsError, Password, TlsFiles, kv,
};

#[cfg(feature = "kube")]
pub use flannel_subnet_kube::{
    Access as KubeAccess, AnnotationPrefix, Client as KubeClient, ConfigSource, KubeEvent,
    KubeManager, KubeOptions, NodeSettings, OptionsError as KubeOptionsError,
};

/// The README's program, compiled with the tests.
#[cfg(all(doctest, feature = "netlink", feature = "vxlan"))]
#[doc = include_str!("../README.md")]
struct Readme;
