//! Traits, values and pure logic of the flannel overlay SDK.

#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod admission;
pub mod alloc;
pub mod backend;
mod backoff;
mod claim;
mod clock;
mod compact;
mod condition;
pub mod config;
mod error_chain;
mod event;
mod family;
mod farewell;
mod gateway;
mod gojson;
mod holder;
mod host_checks;
mod host_facts;
pub mod keeper;
pub mod kernel;
mod lease;
mod lease_json;
mod lease_set;
mod listed;
pub mod manager;
mod memory;
pub mod mtu;
mod node;
mod object;
mod overlay;
mod path_fault;
mod port_holder;
pub mod reconcile;
mod reconnect;
mod reserved;
mod runtime;
mod settle;
mod state;
mod status;
mod subnet;
mod traffic;
mod tun_fault;
pub mod underlay;
pub mod wire;
mod withdrawal;

pub use admission::no_address_of_a_node;
pub use backend::{Backend, Network, NodeContext, Note, Rejection};
pub use backoff::Backoff;
pub use claim::{Claim, Claimant};
pub use clock::{Clock, Moment, Rng, TokioClock, stable_hash};
pub use condition::{Condition, ConditionStatus, ConditionType};
pub use config::{BackendConfig, NetworkConfig, Pool, PoolMode};
pub use error_chain::error_chain;
pub use event::{Event, EventStream, Snapshot, Unreadable};
pub use family::{DualStack, Family, PublicIp};
pub use gateway::{Gateways, Hop, no_public_ip};
pub use holder::Holder;
pub use host_facts::{
    FilterChain, FilterFamily, Firewall, HostFacts, Lookup, PacketSettings, PolicyRule, Questions,
    Refused, ReversePath, Routed,
};
pub use kernel::{Change, ChangeStream, Features, Kernel, Observed, Op, Scope};
pub use lease::{
    BackendData, BackendDataError, BackendType, Lease, LeaseAttrs, LeaseKey, Revision, Seniority,
};
pub use lease_set::{
    Applied, Deletes, Held, HeldReason, HostAddresses, LeaseDelta, LeaseSet, Own, OwnChange, Peer,
    Peers, WithdrawalGuard,
};
pub use listed::Listed;
pub use manager::{Capabilities, LeaseRequest, Manager};
pub use memory::{MemoryManager, MemoryState};
pub use node::{InstanceId, NameError, NodeId, OverlayName};
pub use object::{
    Address, Fdb, IfName, Link, LinkKind, MAIN_TABLE, MacAddr, MacError, Neighbour, Nexthop,
    Object, ObjectKey, Objects, Offload, Route, RoutePath, RouteProtocol, RouteTarget, Sysctl, Tun,
    Tunnel, TunnelPeer, Vxlan,
};
pub use overlay::{Check, Error, Overlay, OverlayBuilder, Preflight};
pub use path_fault::PathFault;
pub use port_holder::{udp_address_holder, udp_port_holder};
pub use reconnect::{Dead, Reconnect};
pub use runtime::runtime_fault;
pub use state::{FileState, FileStateError, SavedState, StateStore};
pub use status::{FailingObject, LeaseStatus, OverlayEvent, RejectedPeer, Status};
pub use subnet::{Subnet, SubnetError};
pub use traffic::{PeerTraffic, Traffic};
pub use tun_fault::TunFault;
pub use underlay::{
    AddressInfo, External, Interface, LinkInfo, Reach, SavedInterface, Underlay, UnderlayOptions,
};
