//! [`Lease`]: a subnet held by a node, and what the node publishes with it.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::family::{DualStack, Family, PublicIp};
use crate::node::{InstanceId, NameError, NodeId, check_name};
use crate::subnet::Subnet;

/// The identity of a lease's record in its store: an etcd key, a Kubernetes node name.
///
/// Not the subnet: when a subnet moves from one record to another, the delete of the old record
/// may arrive after the put of the new one, and must not remove it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseKey(Arc<str>);

impl LeaseKey {
    /// The longest key, in bytes; what is longer is cut (an honest key has at most about 100).
    pub const MAX_LEN: usize = 512;

    /// A key as its store spells it.
    pub fn new(key: impl AsRef<str>) -> Self {
        let key = key.as_ref();
        let mut end = key.len().min(Self::MAX_LEN);
        while !key.is_char_boundary(end) {
            end -= 1;
        }
        Self(key[..end].into())
    }

    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LeaseKey({})", self.0)
    }
}

impl Serialize for LeaseKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for LeaseKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

/// A position in a store's history. Only compared, never computed with.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The type of a backend as flannel spells it (`vxlan`, `host-gw`, `udp`, …), in lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendType(Arc<str>);

impl BackendType {
    /// The longest type name, in bytes.
    pub const MAX_LEN: usize = 32;

    /// A backend type; upper case is lowered, as flannel does when it looks a backend up.
    ///
    /// # Errors
    /// [`NameError`] if the text is empty, too long or holds other characters than letters,
    /// digits and `-_`.
    pub fn new(name: impl AsRef<str>) -> Result<Self, NameError> {
        let name = name.as_ref();
        check_name(
            "the backend type",
            name,
            Self::MAX_LEN,
            "letters, digits and -_",
            |b| b.is_ascii_alphanumeric() || b"-_".contains(&b),
        )?;
        Ok(Self(name.to_ascii_lowercase().into()))
    }

    /// VXLAN.
    pub fn vxlan() -> Self {
        Self("vxlan".into())
    }

    /// Plain routes through the peer's public address.
    pub fn host_gw() -> Self {
        Self("host-gw".into())
    }

    /// IP packets in UDP datagrams. Flannel's records of this backend carry no type at all.
    pub fn udp() -> Self {
        Self("udp".into())
    }

    /// The type as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BackendType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BackendType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BackendType({})", self.0)
    }
}

impl Serialize for BackendType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for BackendType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::new(text).map_err(serde::de::Error::custom)
    }
}

/// Why backend data cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BackendDataError {
    /// Longer than [`BackendData::MAX_LEN`].
    #[error("backend data has {len} bytes, more than the {max} that are accepted", max = BackendData::MAX_LEN)]
    TooLong {
        /// The length in bytes.
        len: usize,
    },
    /// Not JSON, or not of the form that the backend expects.
    #[error("backend data is not as expected: {reason}")]
    Malformed {
        /// What the decoder said.
        reason: String,
    },
}

/// What a backend publishes with a lease: JSON that only that backend understands.
///
/// Opaque and bounded until the backend that owns the type parses it. Kept as compact text, so
/// that numbers and key order survive byte for byte.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendData(Arc<str>);

impl BackendData {
    /// The longest backend data accepted from a store, in bytes. Flannel's own have under 200.
    pub const MAX_LEN: usize = 16 * 1024;

    /// Backend data from JSON text; white space between tokens is dropped, all else is kept.
    ///
    /// # Errors
    /// [`BackendDataError`] if the text is too long or no JSON.
    pub fn from_json(text: &str) -> Result<Self, BackendDataError> {
        if text.len() > Self::MAX_LEN {
            return Err(BackendDataError::TooLong { len: text.len() });
        }
        serde_json::from_str::<&RawValue>(text).map_err(|error| BackendDataError::Malformed {
            reason: error.to_string(),
        })?;
        Ok(Self(compact(text).into()))
    }

    /// A value of a backend's own as backend data.
    ///
    /// # Errors
    /// [`BackendDataError`] if the value cannot be written as JSON or is too long.
    pub fn encode<T: Serialize>(value: &T) -> Result<Self, BackendDataError> {
        let text = serde_json::to_string(value).map_err(|error| BackendDataError::Malformed {
            reason: error.to_string(),
        })?;
        Self::from_json(&text)
    }

    /// The data as a value of the backend's own.
    ///
    /// # Errors
    /// [`BackendDataError::Malformed`] if it is not of that form.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, BackendDataError> {
        serde_json::from_str(&self.0).map_err(|error| BackendDataError::Malformed {
            reason: error.to_string(),
        })
    }

    /// The compact JSON text.
    pub fn as_json(&self) -> &str {
        &self.0
    }
}

/// JSON text without white space outside of strings.
fn compact(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut escaped) = (false, false);
    for c in text.chars() {
        if in_string {
            in_string = escaped || c != '"';
            escaped = !escaped && c == '\\';
        } else if c == '"' {
            in_string = true;
        } else if matches!(c, ' ' | '\t' | '\n' | '\r') {
            continue;
        }
        out.push(c);
    }
    out
}

impl fmt::Display for BackendData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BackendData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BackendData({})", self.0)
    }
}

impl Serialize for BackendData {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let raw: &RawValue = serde_json::from_str(&self.0).map_err(serde::ser::Error::custom)?;
        raw.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for BackendData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        Self::from_json(raw.get()).map_err(serde::de::Error::custom)
    }
}

/// What a node publishes with its lease: where it is reached and what its backend needs.
///
/// It has no serialisation of its own, because there is one that all nodes agree on: flannel's, which
/// [`wire`](crate::wire) reads and writes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LeaseAttrs {
    /// The underlay addresses at which peers reach the node.
    pub public_ip: PublicIp,
    /// The backend the node runs; `None` where flannel writes no type (its `udp` and `alloc`).
    pub backend_type: Option<BackendType>,
    /// Backend data per family of the overlay.
    pub backend_data: DualStack<BackendData>,
}

impl LeaseAttrs {
    /// The public address of a family.
    pub fn public_ip(&self, family: Family) -> Option<IpAddr> {
        self.public_ip.ip(family)
    }

    /// Whether the record is of a backend type; a record without a type is of type `udp`.
    pub fn is_backend(&self, backend: &BackendType) -> bool {
        match &self.backend_type {
            Some(own) => own == backend,
            None => backend.as_str() == "udp",
        }
    }
}

/// A subnet held by a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The identity of the record in its store.
    pub key: LeaseKey,
    /// The node that holds it.
    pub node: NodeId,
    /// The machine that acts as this node, where the store says so.
    pub instance: Option<InstanceId>,
    /// The node's subnets, one per family of the overlay.
    pub subnet: DualStack<Subnet>,
    /// What the node publishes.
    pub attrs: LeaseAttrs,
    /// The time left before the store drops the record, as it was when read or written; `None` if
    /// the store never drops it (a reservation, a Kubernetes node).
    pub ttl: Option<Duration>,
    /// When the claim was made: orders claims to one subnet, the older one wins. A store without
    /// creation revisions supplies another order that all nodes see alike.
    pub created: Revision,
    /// The last write: the fencing token that a renewal or release must still find.
    pub revision: Revision,
}

impl Lease {
    /// The order of claims: an older claim is smaller, equal ages are settled by the key.
    pub fn seniority(&self) -> Seniority {
        Seniority {
            created: self.created,
            key: self.key.clone(),
        }
    }
}

/// The order in which claims to one thing are honoured, the same on every node: first by age,
/// then by key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Seniority {
    /// When the claim was made.
    pub created: Revision,
    /// The record that makes it.
    pub key: LeaseKey,
}
