//! Traits, values and pure logic of the flannel overlay SDK.

#![forbid(unsafe_code)]

pub mod alloc;
pub mod backend;
mod backoff;
mod clock;
mod condition;
pub mod config;
mod event;
mod family;
mod gojson;
pub mod keeper;
pub mod kernel;
mod lease;
mod lease_set;
pub mod manager;
mod memory;
pub mod mtu;
mod node;
mod object;
mod overlay;
pub mod reconcile;
mod settle;
mod state;
mod subnet;
pub mod underlay;
pub mod wire;

pub use backend::{Backend, Network, NodeContext, Note, Rejection};
pub use clock::{Clock, Moment, Rng, TokioClock, stable_hash};
pub use config::{BackendConfig, NetworkConfig, Pool, PoolMode};
pub use event::{Event, EventStream, Snapshot, Unreadable};
pub use family::{DualStack, Family, PublicIp};
pub use kernel::{Change, ChangeStream, Features, Kernel, Observed, Op, Scope};
pub use lease::{
    BackendData, BackendDataError, BackendType, Lease, LeaseAttrs, LeaseKey, Revision, Seniority,
};
pub use lease_set::{LeaseDelta, LeaseSet, Peer};
pub use manager::{Capabilities, LeaseRequest, Manager};
pub use memory::{MemoryManager, MemoryState};
pub use node::{NameError, NodeId, OverlayName};
pub use object::{
    Address, Fdb, IfName, Link, LinkKind, MAIN_TABLE, MacAddr, MacError, Neighbour, Nexthop,
    Object, ObjectKey, Objects, Offload, Route, RouteProtocol, RouteTarget, Sysctl, Vxlan,
};
pub use subnet::{Subnet, SubnetError};
pub use underlay::{AddressInfo, External, LinkInfo, Underlay};
