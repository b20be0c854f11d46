//! Where things stand in the store: flannel's keys, and ours beside them.
//!
//! | key | what it is |
//! | --- | --- |
//! | `<prefix>/config` | the network config |
//! | `<prefix>/subnets/10.5.1.0-24&fd00:5:0:1::-64` | a lease |
//! | `<prefix>/taken/10.5.1.0-24`, `<prefix>/taken/fd00:5:0:1::-64` | a marker: the subnet is taken by the record whose key is the value |
//! | `<prefix>/taken/node-worker-1` | a marker: the node holds the record whose key is the value |
//! | `<prefix>/taken/!ask/worker-1/<instance>/<instance>` | a question of the second machine, or the answer of the first |
//!
//! A transaction can ask whether a key is there, but not whether some key names a subnet as its
//! second half, or some value a node. Markers make that a question of one key. Go flannel reads
//! neither them nor anything else outside of the string `<prefix>/subnets`.

use std::net::IpAddr;
use std::time::Duration;

use flannel_core::manager::Error;
use flannel_core::{
    DualStack, Holder, InstanceId, Lease, LeaseAttrs, LeaseKey, LeaseRequest, NodeId, Subnet,
    Unreadable, stable_hash, wire,
};

use crate::store::{KeyRange, KeyValue};

/// The keys of one network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    prefix: String,
}

impl Layout {
    /// Where flannel looks unless told otherwise.
    pub const DEFAULT_PREFIX: &'static str = "/coreos.com/network";

    /// The keys under a prefix, cleaned as Go flannel cleans it: no doubled and no last slash.
    pub fn new(prefix: &str) -> Self {
        let mut cleaned = String::with_capacity(prefix.len());
        for c in prefix.chars() {
            if c != '/' || !cleaned.ends_with('/') {
                cleaned.push(c);
            }
        }
        if cleaned.ends_with('/') {
            cleaned.pop();
        }
        Self { prefix: cleaned }
    }

    /// What all keys begin with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The key of the network config.
    pub fn config(&self) -> String {
        format!("{}/config", self.prefix)
    }

    /// What the keys of leases begin with. Not a folder: Go flannel reads every key that begins
    /// so, and an unreadable one makes it drop all routes.
    pub fn subnets(&self) -> String {
        format!("{}/subnets", self.prefix)
    }

    /// The config and every lease: one range, so that both are seen at one revision and in one
    /// order. There may be strangers' keys in it.
    pub fn range(&self) -> KeyRange {
        // The text after all that begin with `…/subnets`.
        KeyRange::Between(self.config(), format!("{}/subnett", self.prefix))
    }

    /// The range that a watch follows: that one, and the questions behind it.
    pub fn watched(&self) -> KeyRange {
        // `!` sorts before all that a marker's name begins with.
        KeyRange::Between(self.config(), format!("{}0", self.questions()))
    }

    /// The text that the keys of all questions begin with.
    pub(super) fn questions(&self) -> String {
        format!("{}/taken/!ask", self.prefix)
    }

    /// Tells if a key of a watch is that of a question.
    pub(super) fn is_question(&self, key: &str) -> bool {
        key.starts_with(&self.questions())
    }

    /// Whether a key of that range is that of a lease, readable or not.
    pub fn is_record(&self, key: &str) -> bool {
        key.starts_with(&self.subnets())
    }

    /// The key of a lease of these subnets.
    ///
    /// # Errors
    /// [`Error::Invalid`] if flannel has no key for them, as for IPv6 alone.
    pub fn record(&self, subnets: &DualStack<Subnet>) -> Result<String, Error> {
        let key = wire::subnet_key(subnets).map_err(|error| Error::Invalid {
            reason: error.to_string(),
        })?;
        Ok(format!("{}/{key}", self.subnets()))
    }

    /// What the keys of all leases begin with that have this IPv4 half in this very spelling.
    pub fn records_of(&self, v4: &Subnet) -> KeyRange {
        KeyRange::prefix(format!("{}/{}-{}", self.subnets(), v4.address(), v4.len()))
    }

    /// The keys of the markers that go with a node's record.
    pub fn markers(&self, node: &NodeId, subnets: &DualStack<Subnet>) -> Vec<String> {
        let mut markers = vec![self.marker_of_node(node)];
        markers.extend(subnets.values().map(|subnet| self.marker(subnet)));
        markers
    }

    /// The key of a node's marker.
    pub fn marker_of_node(&self, node: &NodeId) -> String {
        format!("{}/taken/node-{node}", self.prefix)
    }

    /// The key of a subnet's marker.
    pub fn marker(&self, subnet: &Subnet) -> String {
        format!(
            "{}/taken/{}-{}",
            self.prefix,
            subnet.address(),
            subnet.len()
        )
    }

    /// The subnet of a marker's key.
    pub(super) fn marked(&self, key: &str) -> Option<Subnet> {
        let key = key.strip_prefix(&self.prefix)?.strip_prefix("/taken/")?;
        let (ip, len) = key.rsplit_once('-')?;
        Subnet::strict(ip.parse::<IpAddr>().ok()?, len.parse().ok()?).ok()
    }
}

impl Default for Layout {
    fn default() -> Self {
        Self::new(Self::DEFAULT_PREFIX)
    }
}

/// The identity of a record in the store: its key, or of a key that is too long for that, a part
/// of it and a hash.
pub(super) fn lease_key(key: &str) -> LeaseKey {
    if key.len() <= LeaseKey::MAX_LEN {
        return LeaseKey::new(key);
    }
    let start: String = key.chars().take(64).collect();
    LeaseKey::new(format!("{start}…{:016x}", stable_hash(key.as_bytes())))
}

/// A lease's record as it is read. Each part is there as far as it can be read: a subnet is taken
/// although nobody can say by whom.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) entry: KeyValue,
    pub(super) subnets: Result<DualStack<Subnet>, wire::Error>,
    /// The subnets that it covers, whoever holds them.
    pub(super) taken: DualStack<Subnet>,
    value: Result<wire::LeaseRecord, wire::Error>,
}

impl Record {
    pub(super) fn parse(entry: KeyValue) -> Self {
        let subnets = match entry.key.len() {
            len if len > LeaseKey::MAX_LEN => Err(wire::Error::TooLong {
                what: "lease key",
                len,
                max: LeaseKey::MAX_LEN,
            }),
            _ => wire::parse_subnet_key(&entry.key),
        };
        Self {
            taken: subnets.clone().unwrap_or_default(),
            subnets,
            value: match entry.omitted {
                true => Err(wire::Error::TooLong {
                    what: "lease value",
                    len: wire::MAX_VALUE_LEN + 1,
                    max: wire::MAX_VALUE_LEN,
                }),
                false => wire::parse_lease_value(&entry.value),
            },
            entry,
        }
    }

    /// The node that holds it.
    pub(super) fn node(&self) -> Option<NodeId> {
        self.value.as_ref().ok()?.node_id().ok()
    }

    /// The machine that wrote it.
    pub(super) fn instance(&self) -> Option<InstanceId> {
        self.value.as_ref().ok()?.instance
    }

    /// Whose it is, for a machine that asks. Go flannel's records and reservations that bear no node
    /// id are those of the node at their address.
    pub(super) fn holder(&self, request: &LeaseRequest) -> Holder {
        let (Some(node), Some(attrs)) = (self.node(), self.attrs()) else {
            return Holder::Other;
        };
        let mut ips = request.attrs.public_ip.ips();
        let derived = ips.next().map(NodeId::from_public_ip);
        if self.is_gos() && Some(&node) == derived.as_ref() {
            return Holder::Own;
        }
        Holder::of(request, &node, self.instance(), attrs)
    }

    /// What the node publishes, if that and whose it is can be read.
    pub(super) fn attrs(&self) -> Option<&LeaseAttrs> {
        let value = self.value.as_ref().ok()?;
        value.node_id().is_ok().then_some(&value.attrs)
    }

    /// Whether it carries no node id, as those that Go flannel writes.
    pub(super) fn is_gos(&self) -> bool {
        self.value.as_ref().is_ok_and(|value| value.node.is_none())
    }

    /// The lease, if all of it can be read. What time it has left only its holder asks the store;
    /// to others it has its whole time.
    pub(super) fn lease(&self, ttl: Duration) -> Result<Lease, Unreadable> {
        let entry = &self.entry;
        let parts = || {
            let (subnet, value) = (self.subnets.clone()?, self.value.clone()?);
            Ok((subnet, value.node_id()?, value.instance, value.attrs))
        };
        let (subnet, node, instance, attrs) = parts().map_err(|error: wire::Error| Unreadable {
            key: lease_key(&entry.key),
            revision: entry.modified,
            reason: error.to_string(),
        })?;
        Ok(Lease {
            key: lease_key(&entry.key),
            node,
            instance,
            subnet,
            attrs,
            ttl: entry.lease.map(|_| ttl),
            created: entry.created,
            revision: entry.modified,
        })
    }
}
