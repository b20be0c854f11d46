//! [`NetworkConfig`]: the network as flannel's JSON describes it, valid by construction.

use std::net::IpAddr;

use serde_json::Value;

use crate::family::DualStack;
use crate::lease::BackendType;
use crate::subnet::Subnet;

/// Why a network config cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not a JSON object.
    #[error("the network config is not a JSON object: {reason}")]
    Json {
        /// What the parser said.
        reason: String,
    },
    /// A key holds a value that breaks a rule.
    #[error("{key} = {value}: {rule}")]
    Key {
        /// The key, with `Backend.` before a backend's own.
        key: String,
        /// The value, cut to 64 characters; `missing` if there is none.
        value: String,
        /// The rule, and where it helps, the way out.
        rule: String,
    },
}

impl Error {
    /// A key that breaks a rule.
    pub fn key(key: impl Into<String>, value: impl ToString, rule: impl Into<String>) -> Self {
        let value = value.to_string().chars().take(64).collect();
        Self::Key {
            key: key.into(),
            value,
            rule: rule.into(),
        }
    }
}

/// Where a pool's subnets come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolMode {
    /// Our store chooses them (etcd): length, minimum and maximum are derived and checked.
    Allocated,
    /// Someone else assigns them (Kubernetes' pod CIDRs): only the network itself counts.
    Assigned,
}

/// The part of the network of one family: where subnets lie and how long they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    pub(crate) network: Subnet,
    /// The first and the last subnet; `None` where subnets are assigned by someone else.
    pub(crate) range: Option<(Subnet, Subnet)>,
}

impl Pool {
    /// The whole network.
    pub const fn network(&self) -> Subnet {
        self.network
    }

    /// The first and the last subnet to be given out, both of the subnet length; `None` where
    /// subnets are assigned by someone else.
    pub const fn range(&self) -> Option<(Subnet, Subnet)> {
        self.range
    }

    /// The length of a node's subnet; `None` where subnets are assigned by someone else.
    pub const fn subnet_len(&self) -> Option<u8> {
        match self.range {
            Some((first, _)) => Some(first.len()),
            None => None,
        }
    }

    /// Whether a node may hold this subnet under this config: of the right length and in the
    /// range, or inside the network where subnets are assigned.
    pub fn fits(&self, subnet: &Subnet) -> bool {
        match self.range {
            None => self.network.contains(subnet),
            Some((first, last)) => {
                self.network.contains(subnet)
                    && subnet.len() == first.len()
                    && *subnet >= first
                    && *subnet <= last
            }
        }
    }

    /// Whether a peer's subnet may be routed: inside the network, and where subnets are given out
    /// by length, no larger than a quarter of it (flannel refuses configs with fewer than four).
    pub fn admits(&self, subnet: &Subnet) -> bool {
        self.network.contains(subnet)
            && (self.range.is_none() || subnet.len() >= self.network.len().saturating_add(2))
    }

    /// Whether an address lies in the network.
    pub fn contains_ip(&self, ip: IpAddr) -> bool {
        self.network.contains_ip(ip)
    }
}

/// The backend that the config selects, with the backend's own keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendConfig {
    pub(crate) backend_type: BackendType,
    /// The members of the `Backend` object in the order of the text, `Type` among them.
    pub(crate) entries: Vec<(String, Value)>,
}

impl BackendConfig {
    /// The selected type.
    pub const fn backend_type(&self) -> &BackendType {
        &self.backend_type
    }
}

/// The network: pools, firewall mode and backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    pub(crate) pools: DualStack<Pool>,
    pub(crate) nftables: bool,
    pub(crate) backend: BackendConfig,
    /// The text it was read from, for saving and comparing.
    pub(crate) text: String,
    pub(crate) mode: PoolMode,
}
