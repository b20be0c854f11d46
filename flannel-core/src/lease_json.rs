//! A lease as JSON outside of a store: in saved state, in exports, in the input of a dry run.
//!
//! `{"key", "node"?, "subnet"?, "ipv6_subnet"?, "attrs", "ttl_seconds"?, "created"?, "revision"?}`,
//! where `attrs` is the value that flannel keeps in etcd. A lease without `node` is that of the
//! node id in `attrs`, else of the node with that public address.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::family::DualStack;
use crate::lease::{Lease, LeaseKey, Revision};
use crate::node::NodeId;
use crate::subnet::Subnet;
use crate::wire;

#[derive(Serialize, Deserialize)]
struct Document {
    key: LeaseKey,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<NodeId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subnet: Option<Subnet>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ipv6_subnet: Option<Subnet>,
    attrs: Box<RawValue>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ttl_seconds: Option<u64>,
    #[serde(default)]
    created: Revision,
    #[serde(default)]
    revision: Revision,
}

impl Serialize for Lease {
    /// A time left is written in whole seconds, rounded down.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::Error;
        let attrs =
            wire::lease_value(&self.node, self.instance, &self.attrs).map_err(Error::custom)?;
        let document = Document {
            key: self.key.clone(),
            node: Some(self.node.clone()),
            subnet: self.subnet.v4,
            ipv6_subnet: self.subnet.v6,
            attrs: RawValue::from_string(attrs).map_err(Error::custom)?,
            ttl_seconds: self.ttl.map(|ttl| ttl.as_secs()),
            created: self.created,
            revision: self.revision,
        };
        document.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Lease {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let document = Document::deserialize(deserializer)?;
        let record =
            wire::parse_lease_value(document.attrs.get().as_bytes()).map_err(Error::custom)?;
        let node = match document.node {
            Some(node) => node,
            None => record.node_id().map_err(Error::custom)?,
        };
        let subnet = DualStack::new(document.subnet, document.ipv6_subnet);
        subnet.check_families().map_err(Error::custom)?;
        Ok(Self {
            key: document.key,
            node,
            instance: record.instance,
            subnet,
            attrs: record.attrs,
            ttl: document.ttl_seconds.map(Duration::from_secs),
            created: document.created,
            revision: document.revision,
        })
    }
}
