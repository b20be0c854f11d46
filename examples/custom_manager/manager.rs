//! The subnet manager: everything that a store has to bring for an overlay to run on it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use flannel::alloc::{Allocator, choose};
use flannel::manager::{Error, LeaseRequest, Result};
use flannel::{
    Capabilities, DualStack, Event, EventStream, Lease, LeaseKey, Manager, NetworkConfig, PoolMode,
    Revision, Snapshot, wire,
};

use crate::kv::{Store, Table};

/// This row changes with every claim: what it guards is that nobody else claimed meanwhile.
const CLAIMS: &str = "claims";

#[derive(Debug)]
pub(crate) struct KvManager {
    pub(crate) store: Store,
}

fn read_lease(key: &str, row: &(u64, u64, String)) -> Option<Lease> {
    let record = wire::parse_lease_value(row.2.as_bytes()).ok()?;
    Some(Lease {
        key: LeaseKey::new(key),
        node: record.node_id().ok()?,
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

#[async_trait]
impl Manager for KvManager {
    fn name(&self) -> &'static str {
        "kv"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::NONE.with_allocates(true)
    }

    async fn network_config(&self) -> Result<NetworkConfig> {
        let text = self
            .store
            .read()
            .rows
            .get("config")
            .map(|row| row.2.clone());
        let text = text.ok_or(Error::NoConfig {
            hint: "write the key config".to_owned(),
        })?;
        Ok(NetworkConfig::from_json(&text, PoolMode::Allocated)?)
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease> {
        loop {
            let (config, table) = (self.network_config().await?, self.store.read());
            let (known, claims) = (
                leases(&table),
                table.rows.get(CLAIMS).map_or(0, |row| row.1),
            );
            let fits = |lease: &Lease| {
                config.pools().same_families(&lease.subnet)
                    && lease.subnet.iter().all(|(family, subnet)| {
                        config
                            .pools()
                            .get(family)
                            .is_some_and(|pool| pool.fits(subnet))
                    })
            };
            let own = known.iter().find(|lease| lease.node == request.node);
            if let Some(own) = own.filter(|own| fits(own)) {
                return self
                    .renew_lease(&Lease {
                        attrs: request.attrs.clone(),
                        ..own.clone()
                    })
                    .await;
            }
            // Allocation is the SDK's: previous subnet, slot of the node's hash, next free.
            let mut free = config.pools().map(|_, pool| Allocator::new(pool));
            for subnet in known.iter().flat_map(|lease| lease.subnet.values()) {
                if let Some(Some(allocator)) = free.get_mut(subnet.family()) {
                    allocator.take(subnet);
                }
            }
            let free = DualStack::new(
                free.v4.as_ref().and_then(Option::as_ref),
                free.v6.as_ref().and_then(Option::as_ref),
            );
            let subnet = choose(&free, &request.node, &request.previous)?;
            let key = wire::subnet_key(&subnet).map_err(invalid)?;
            let value = wire::lease_value(&request.node, &request.attrs).map_err(invalid)?;
            let mut writes = vec![
                (CLAIMS, claims, Some(String::new())),
                (&*key, 0, Some(value)),
            ];
            writes.extend(own.map(|own| (own.key.as_str(), own.revision.0, None)));
            if self.store.commit(&writes) {
                let row = self.store.read().rows.get(&key).cloned();
                return row
                    .and_then(|row| read_lease(&key, &row))
                    .ok_or_else(|| lost(&LeaseKey::new(key)));
            }
            tokio::task::yield_now().await; // somebody else claimed meanwhile: look again
        }
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease> {
        let value = wire::lease_value(&lease.node, &lease.attrs).map_err(invalid)?;
        let key = lease.key.as_str();
        if lease.revision.0 == 0 || !self.store.commit(&[(key, lease.revision.0, Some(value))]) {
            return Err(lost(&lease.key));
        }
        let row = self.store.read().rows.get(key).cloned();
        row.and_then(|row| read_lease(key, &row))
            .ok_or_else(|| lost(&lease.key))
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        let gone = !self.store.read().rows.contains_key(lease.key.as_str());
        if gone
            || self
                .store
                .commit(&[(lease.key.as_str(), lease.revision.0, None)])
        {
            return Ok(());
        }
        Err(lost(&lease.key))
    }

    fn watch_leases(&self) -> EventStream {
        Box::pin(Snapshots {
            next: Box::pin(next(self.store.clone(), u64::MAX)),
        })
    }
}

/// A blocking query gives the whole table, so every event is a snapshot.
struct Snapshots {
    next: Pin<Box<dyn Future<Output = (Store, Table)> + Send>>,
}

async fn next(store: Store, seen: u64) -> (Store, Table) {
    let table = store.wait(seen).await;
    (store, table)
}

impl futures_core::Stream for Snapshots {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.next.as_mut().poll(cx).map(|(store, table)| {
            self.next = Box::pin(next(store, table.index));
            let (leases, unreadable) = (leases(&table), Vec::new());
            Some(Ok(Event::Snapshot(Snapshot {
                leases,
                unreadable,
                revision: Revision(table.index),
            })))
        })
    }
}
