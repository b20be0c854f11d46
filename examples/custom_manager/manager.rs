//! The subnet manager: everything that a store has to bring for an overlay to run on it.

use async_trait::async_trait;
use flannel::alloc::choose_among;
use flannel::manager::{Error, LeaseRequest, Result};
use flannel::{
    Capabilities, Event, EventStream, Lease, LeaseKey, Manager, NetworkConfig, PoolMode, Revision,
    Snapshot, wire,
};

use crate::kv::{Row, Store, Table};

/// This row changes with every claim: what it guards is that nobody else claimed meanwhile.
const CLAIMS: &str = "claims";

#[derive(Debug)]
pub(crate) struct KvManager {
    pub(crate) store: Store,
}

fn read_lease(key: &str, row: &Row) -> Option<Lease> {
    let record = wire::parse_lease_value(row.2.as_bytes()).ok()?;
    Some(Lease {
        key: LeaseKey::new(key),
        node: record.node_id().ok()?,
        instance: None,
        subnet: wire::parse_subnet_key(key).ok()?,
        attrs: record.attrs,
        ttl: None,
        created: Revision(row.0),
        revision: Revision(row.1),
    })
}

fn leases(table: &Table) -> Vec<Lease> {
    table
        .rows
        .iter()
        .filter_map(|(key, row)| read_lease(key, row))
        .collect()
}

fn lost(key: &LeaseKey) -> Error {
    Error::LeaseLost {
        key: key.clone(),
        reason: "it was changed or deleted since".to_owned(),
    }
}

fn invalid(error: impl std::error::Error) -> Error {
    Error::Invalid {
        reason: error.to_string(),
    }
}

impl KvManager {
    fn read_back(&self, key: &str) -> Result<Lease> {
        let lease = self.store.get(key).and_then(|row| read_lease(key, &row));
        lease.ok_or_else(|| lost(&LeaseKey::new(key)))
    }
}

#[async_trait]
impl Manager for KvManager {
    fn name(&self) -> &'static str {
        "kv"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::NONE.with_allocates(true)
    }

    async fn network_config(&self) -> Result<NetworkConfig> {
        let text = self.store.get("config").map(|row| row.2);
        let text = text.ok_or(Error::NoConfig {
            hint: "write the key config".to_owned(),
        })?;
        Ok(NetworkConfig::from_json(&text, PoolMode::Allocated)?)
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease> {
        loop {
            let (config, table) = (self.network_config().await?, self.store.read());
            let claims = table.rows.get(CLAIMS).map_or(0, |row| row.1);
            let known = leases(&table);
            let own = known.iter().find(|lease| lease.node == request.node);
            if let Some(own) = own.filter(|own| config.fits(&own.subnet)) {
                let attrs = request.attrs.clone();
                let lease = Lease {
                    attrs,
                    ..own.clone()
                };
                return self.renew_lease(&lease).await;
            }
            // Allocation is the SDK's: previous subnet, slot of the node's hash, next free.
            let taken = known
                .iter()
                .flat_map(|lease| lease.subnet.values().copied());
            let subnet = choose_among(config.pools(), taken, &request.node, &request.previous)?;
            let key = wire::subnet_key(&subnet).map_err(invalid)?;
            let value = wire::lease_value(&request.node, None, &request.attrs).map_err(invalid)?;
            let mut writes = vec![
                (CLAIMS, claims, Some(String::new())),
                (&*key, 0, Some(value)),
            ];
            writes.extend(own.map(|own| (own.key.as_str(), own.revision.0, None)));
            if self.store.commit(&writes) {
                return self.read_back(&key);
            }
            tokio::task::yield_now().await; // somebody else claimed meanwhile: look again
        }
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease> {
        let value = wire::lease_value(&lease.node, None, &lease.attrs).map_err(invalid)?;
        let key = lease.key.as_str();
        if lease.revision.0 == 0 || !self.store.commit(&[(key, lease.revision.0, Some(value))]) {
            return Err(lost(&lease.key));
        }
        self.read_back(key)
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        let (key, revision) = (lease.key.as_str(), lease.revision.0);
        if self.store.get(key).is_none() || self.store.commit(&[(key, revision, None)]) {
            return Ok(());
        }
        Err(lost(&lease.key))
    }

    fn watch_leases(&self) -> EventStream {
        // A blocking query gives the whole table, so every event is a snapshot.
        self.store.watch(|table| {
            let (leases, revision) = (leases(&table), Revision(table.index));
            Ok(Event::Snapshot(Snapshot {
                leases,
                revision,
                ..Snapshot::default()
            }))
        })
    }
}
