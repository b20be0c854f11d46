//! The state of a [`MemoryManager`](super::MemoryManager) as data that can be saved.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use super::store::{Record, Store, check_families};
use crate::clock::Moment;
use crate::config::{NetworkConfig, PoolMode};
use crate::family::{DualStack, PublicIp};
use crate::lease::{BackendData, BackendType, Lease, LeaseAttrs, LeaseKey, Revision};
use crate::manager::{Error, Result};
use crate::node::{InstanceId, NodeId};
use crate::subnet::Subnet;

/// Raised when a state of before can no longer be read.
const FORMAT: u32 = 1;

/// Everything a [`MemoryManager`](super::MemoryManager) holds, in a stable JSON form.
///
/// As it holds the config, it may hold secrets.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryState {
    format: u32,
    revision: Revision,
    pool_mode: Mode,
    config: String,
    leases: Vec<SavedLease>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    reservations: BTreeMap<NodeId, DualStack<Subnet>>,
}

impl fmt::Debug for MemoryState {
    /// Without the config, which may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryState")
            .field("revision", &self.revision)
            .field("leases", &self.leases)
            .field("reservations", &self.reservations)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Allocated,
    Assigned,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedLease {
    key: LeaseKey,
    node: NodeId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    instance: Option<InstanceId>,
    subnet: DualStack<Subnet>,
    #[serde(default)]
    public_ip: PublicIp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    backend_type: Option<BackendType>,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "present"
    )]
    backend_data: Option<BackendData>,
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "present"
    )]
    backend_v6_data: Option<BackendData>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ttl_ms: Option<u64>,
    created: Revision,
    revision: Revision,
}

/// Data that is there, be it `null`: that is data too.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<BackendData>, D::Error> {
    BackendData::deserialize(deserializer).map(Some)
}

impl SavedLease {
    fn new(lease: Lease) -> Self {
        let attrs = lease.attrs;
        Self {
            key: lease.key,
            node: lease.node,
            instance: lease.instance,
            subnet: lease.subnet,
            public_ip: attrs.public_ip,
            backend_type: attrs.backend_type,
            backend_data: attrs.backend_data.v4,
            backend_v6_data: attrs.backend_data.v6,
            // A lifetime beyond 500 million years is as good as that.
            ttl_ms: lease
                .ttl
                .map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
            created: lease.created,
            revision: lease.revision,
        }
    }

    fn restore(&self, now: Moment) -> Record {
        let ttl = self.ttl_ms.map(Duration::from_millis);
        let (data4, data6) = (self.backend_data.clone(), self.backend_v6_data.clone());
        Record {
            lease: Lease {
                key: self.key.clone(),
                node: self.node.clone(),
                instance: self.instance,
                subnet: self.subnet,
                attrs: LeaseAttrs {
                    public_ip: self.public_ip,
                    backend_type: self.backend_type.clone(),
                    backend_data: DualStack::new(data4, data6),
                },
                ttl,
                created: self.created,
                revision: self.revision,
            },
            expires: ttl.map(|ttl| now + ttl),
        }
    }
}

impl Store {
    pub(super) fn export(&self, now: Moment) -> MemoryState {
        let config = self.config();
        let leases = self.records().values().map(|record| record.at(now));
        MemoryState {
            format: FORMAT,
            revision: self.revision(),
            pool_mode: match config.mode() {
                PoolMode::Allocated => Mode::Allocated,
                PoolMode::Assigned => Mode::Assigned,
            },
            config: config.text().to_owned(),
            leases: leases.map(SavedLease::new).collect(),
            reservations: self.reservations().clone(),
        }
    }

    pub(super) fn import(&mut self, now: Moment, state: &MemoryState) -> Result<()> {
        let invalid = |reason: String| Err(Error::Invalid { reason });
        if state.format != FORMAT {
            let format = state.format;
            return invalid(format!("the state has format {format}, this is {FORMAT}"));
        }
        let mode = match state.pool_mode {
            Mode::Allocated => PoolMode::Allocated,
            Mode::Assigned => PoolMode::Assigned,
        };
        let config = NetworkConfig::from_json(&state.config, mode)?;
        let mut keys = std::collections::BTreeSet::new();
        for lease in &state.leases {
            check_families(&lease.subnet)?;
            if !keys.insert(&lease.key) {
                return invalid(format!("the state holds record {} twice", lease.key));
            }
        }
        state.reservations.values().try_for_each(check_families)?;
        let records = state.leases.iter().map(|lease| lease.restore(now));
        let reservations = state.reservations.clone();
        self.replace(config, state.revision, records.collect(), reservations);
        Ok(())
    }
}
