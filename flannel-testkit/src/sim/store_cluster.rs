//! Flannel's subnet manager on the fake store, as the store of a simulated cluster: with what goes
//! wrong on the wire below a manager, and with Go peers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use flannel_core::{
    BackendType, DualStack, Family, Lease, LeaseKey, Manager, NetworkConfig, NodeId, PublicIp,
    Revision, Snapshot, Subnet, TokioClock, Unreadable, wire,
};

use super::action::WireAction;
use super::cluster::{Cluster, Founding, Tamper};
use crate::fake_store::{
    Backup, CallFault, Cut, Delivery, FakeStore, KeyRange, KeyValue, Layout, Silence, StoreLink,
    StoreManager, StoreOptions,
};
use crate::go_peer::{GoMode, GoOptions, GoPeer, read_record};

/// How long leases last that are not said to be shorter: flannel's 24 hours.
const TTL: Duration = Duration::from_secs(24 * 3600);

/// The largest answer that arrives, in bytes: a sixtieth of what a client of etcd takes, as the
/// stores are smaller than real ones.
const LARGEST: usize = 128 * 1024;

/// [`StoreManager`]s on a [`FakeStore`].
#[derive(Debug)]
pub struct StoreCluster {
    store: FakeStore,
    options: StoreOptions,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    links: BTreeMap<NodeId, StoreLink>,
    /// What of each link's counts is known.
    counted: BTreeMap<NodeId, BTreeMap<&'static str, u64>>,
    backup: Option<Backup>,
    /// The entries that were there at the last look, with what they say.
    parsed: BTreeMap<String, (KeyValue, Result<Lease, String>)>,
}

impl StoreCluster {
    /// A store as described. Leases without end last as long as flannel's.
    pub fn new(founding: &Founding) -> Self {
        let store = FakeStore::new(Arc::new(TokioClock::new()));
        let options = StoreOptions {
            ttl: founding.ttl.unwrap_or(TTL),
            ..StoreOptions::default()
        };
        store.put(options.layout.config(), founding.config.text());
        Self {
            store,
            options,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(&self, node: &NodeId) -> StoreLink {
        let mut state = self.state();
        let new = || {
            let link = self.store.link(node.as_str());
            link.set_largest(LARGEST);
            link
        };
        state.links.entry(node.clone()).or_insert_with(new).clone()
    }

    fn layout(&self) -> &Layout {
        &self.options.layout
    }

    /// Every record as it lies in the store.
    fn entries(&self) -> Vec<KeyValue> {
        self.store
            .entries(&KeyRange::prefix(self.layout().subnets()))
    }

    /// Writes under a record's key, with the lease's time if it has any.
    fn put(&self, key: &LeaseKey, value: impl Into<Vec<u8>>, ttl: Option<Duration>) {
        match ttl {
            Some(ttl) => self.store.put_for(key.as_str(), value, ttl),
            None => self.store.put(key.as_str(), value),
        };
    }

    /// Writes a node's record again as it is, with another time to live.
    fn rewrite(&self, node: &NodeId, subnets: &DualStack<Subnet>, ttl: Option<Duration>) -> bool {
        let Some(key) = self.record_key(subnets) else {
            return false;
        };
        let entries = self.entries();
        let is_theirs = |entry: &&KeyValue| {
            entry.key == key.as_str()
                && entry.lease.is_some() != ttl.is_some()
                && parse(entry).is_ok_and(|lease| lease.node == *node)
        };
        let found = entries.iter().find(is_theirs);
        if let Some(entry) = found {
            self.put(&key, entry.value.clone(), ttl);
        }
        found.is_some()
    }

    /// The same record with the time that it has left.
    fn timed(&self, lease: Lease, entry: &KeyValue) -> Lease {
        let ttl = entry.lease.and_then(|lease| self.store.time_to_live(lease));
        Lease { ttl, ..lease }
    }
}

/// The record that an entry holds, without the time that it has left.
fn parse(entry: &KeyValue) -> Result<Lease, wire::Error> {
    let record = wire::parse_lease_value(&entry.value)?;
    Ok(Lease {
        key: LeaseKey::new(&entry.key),
        node: record.node_id()?,
        instance: record.instance,
        subnet: wire::parse_subnet_key(&entry.key)?,
        attrs: record.attrs,
        ttl: None,
        created: entry.created,
        revision: entry.modified,
    })
}

impl Cluster for StoreCluster {
    fn manager(&self, node: &NodeId) -> Arc<dyn Manager> {
        Arc::new(StoreManager::new(self.link(node), self.options.clone()))
    }

    fn truth(&self) -> Snapshot {
        let mut snapshot = Snapshot {
            revision: self.store.revision(),
            ..Snapshot::default()
        };
        let mut before = std::mem::take(&mut self.state().parsed);
        let mut parsed = BTreeMap::new();
        for entry in self.entries() {
            let known = before.remove(&entry.key);
            let (entry, content) = match known.filter(|(known, _)| *known == entry) {
                Some(known) => known,
                None => {
                    let content = parse(&entry).map_err(|error| error.to_string());
                    (entry, content)
                }
            };
            match &content {
                Ok(lease) => snapshot.leases.push(self.timed(lease.clone(), &entry)),
                Err(reason) => snapshot.unreadable.push(Unreadable {
                    key: LeaseKey::new(&entry.key),
                    revision: entry.modified,
                    reason: reason.clone(),
                }),
            }
            parsed.insert(entry.key.clone(), (entry, content));
        }
        self.state().parsed = parsed;
        snapshot
    }

    fn version(&self) -> Option<(u64, Revision)> {
        Some(self.store.version())
    }

    fn tamper(&self, tamper: Tamper) -> bool {
        match tamper {
            Tamper::Put(lease) => {
                self.put(&lease.key, text(&lease), lease.ttl);
            }
            Tamper::Remove(key) => return self.store.delete(key.as_str()),
            Tamper::Garble(key) => {
                let key = match key.as_str().starts_with(&self.layout().subnets()) {
                    true => key,
                    false => LeaseKey::new(format!("{}/{key}", self.layout().subnets())),
                };
                self.put(&key, *b"{\"PublicIP\":\xff", None);
            }
            Tamper::Raw(name, value) => {
                let key = LeaseKey::new(format!("{}/{name}", self.layout().subnets()));
                self.put(&key, value, Some(self.options.ttl));
            }
            Tamper::Config(config) => {
                self.store.put(self.layout().config(), config.text());
            }
            Tamper::BadConfig => {
                self.store.put(self.layout().config(), "{\"Network\":");
            }
            Tamper::NoConfig => return self.store.delete(self.layout().config()),
            Tamper::Backup => self.state().backup = Some(self.store.backup()),
            Tamper::Restore => match self.state().backup.clone() {
                Some(backup) => self.store.restore(&backup),
                None => return false,
            },
            Tamper::Compact => return self.store.compact(self.store.revision()).is_ok(),
            // A reservation is a record without a time to live.
            Tamper::Reserve(node, subnets) => return self.rewrite(&node, &subnets, None),
            Tamper::Unreserve(node, subnets) => {
                return self.rewrite(&node, &subnets, Some(self.options.ttl));
            }
        }
        true
    }

    fn record_key(&self, subnets: &DualStack<Subnet>) -> Option<LeaseKey> {
        // What flannel has no key for can be written all the same: nobody can read it.
        let part = |subnet: &Subnet| format!("{}-{}", subnet.address(), subnet.len());
        let unkeyed = || {
            let parts: Vec<String> = subnets.values().map(part).collect();
            format!("{}/{}", self.layout().subnets(), parts.join("&"))
        };
        let key = self.layout().record(subnets);
        Some(LeaseKey::new(key.unwrap_or_else(|_| unkeyed())))
    }

    fn supports(&self, config: &NetworkConfig) -> bool {
        config.pools().has(Family::V4)
    }

    fn disturb(&self, node: &NodeId, action: WireAction) -> bool {
        let link = self.link(node);
        let silence = |hangs| if hangs { Silence::Hang } else { Silence::Error };
        match action {
            WireAction::Cut => link.cut(Cut::Hang),
            WireAction::Refuse => link.cut(Cut::Fail),
            WireAction::Deny => link.cut(Cut::Deny),
            WireAction::Heal => link.heal(),
            WireAction::Latency(latency) => link.set_latency(latency),
            WireAction::LoseRequest { after, hangs } => {
                link.fail_after(after.into(), CallFault::LoseRequest(silence(hangs)));
            }
            WireAction::LoseAnswer { after, hangs } => {
                link.fail_after(after.into(), CallFault::LoseAnswer(silence(hangs)));
            }
            WireAction::Park { after, hangs } => {
                link.fail_after(after.into(), CallFault::Park(silence(hangs)));
            }
            WireAction::DeliverParked => {
                link.deliver_parked();
            }
            WireAction::Deliver(way) => link.deliver(Delivery {
                squash: way & 1 != 0,
                reorder: (way & 2 != 0).then_some(way.into()),
                split: way & 4 != 0,
                repeat: way & 8 != 0,
                hold: way & 16 != 0,
                delay: Duration::from_millis(if way & 32 != 0 { 1500 } else { 0 }),
            }),
            WireAction::Break => link.break_watches(),
            WireAction::Deafen => link.deafen_watches(),
        }
        true
    }

    fn is_caught_up(&self, node: &NodeId) -> bool {
        self.link(node).is_caught_up(&self.layout().subnets())
    }

    fn felt(&self, node: &NodeId) -> BTreeMap<&'static str, u64> {
        let link = self.link(node);
        let counts = link.counts();
        let known = self.state().counted.insert(node.clone(), counts.clone());
        let known = known.unwrap_or_default();
        counts
            .into_iter()
            .map(|(what, times)| (what, times - known.get(what).copied().unwrap_or_default()))
            .filter(|(_, times)| *times > 0)
            .collect()
    }

    fn repair(&self, node: &NodeId) {
        let link = self.link(node);
        link.heal();
        link.clear_faults();
        link.set_latency(Duration::ZERO);
        link.deliver(Delivery::PLAIN);
        link.deliver_parked();
    }

    fn go_peer(&self, name: &NodeId, public_ip: PublicIp, options: GoOptions) -> Option<GoPeer> {
        let options = GoOptions {
            prefix: self.layout().prefix().to_owned(),
            ttl: self.options.ttl,
            renew_margin: self.options.ttl / 2,
            ..options
        };
        Some(GoPeer::new(
            self.link(name),
            name.as_str(),
            public_ip,
            options,
        ))
    }

    fn harm_to_go(&self, mode: GoMode, record: &LeaseKey) -> Option<String> {
        let entries = self.entries();
        let entry = entries.iter().find(|entry| entry.key == record.as_str())?;
        let reads = read_record(mode, &entry.key, &entry.value);
        reads.is_harmful().then(|| format!("{reads:?}"))
    }
}

/// A record's value as anybody could write it, right or wrong.
fn text(lease: &Lease) -> String {
    let attrs = &lease.attrs;
    let ip = |family| match attrs.public_ip(family) {
        Some(ip) => format!("\"{ip}\""),
        None => "null".to_owned(),
    };
    let v4 = attrs
        .public_ip
        .v4
        .unwrap_or(std::net::Ipv4Addr::UNSPECIFIED);
    let mut text = format!("{{\"PublicIP\":\"{v4}\",\"PublicIPv6\":{}", ip(Family::V6));
    let mut add = |name: &str, value: &str| {
        write!(text, ",\"{name}\":{value}").unwrap_or_default();
    };
    let quoted = |kind: &BackendType| format!("\"{kind}\"");
    if let Some(kind) = &attrs.backend_type {
        add("BackendType", &quoted(kind));
    }
    for (family, data) in attrs.backend_data.iter() {
        let name = match family {
            Family::V4 => "BackendData",
            Family::V6 => "BackendV6Data",
        };
        add(name, data.as_json());
    }
    if !lease.node.is_derived() {
        add("NodeID", &format!("\"{}\"", lease.node));
        if let Some(instance) = lease.instance {
            add("Instance", &format!("\"{instance}\""));
        }
    }
    text.push('}');
    text
}
