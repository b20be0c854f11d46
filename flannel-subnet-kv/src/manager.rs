//! [`KvManager`]: leases on a store as flannel lays them out, beside Go flannel.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::manager::{Error, Result};
use flannel_core::{
    Capabilities, DualStack, EventStream, Lease, LeaseAttrs, LeaseRequest, Manager, NetworkConfig,
    Pool,
};

use crate::decide::{self, View, decide, removal, value};
use crate::layout::{Layout, Record, lease_key};
use crate::list_watch::ListWatch;
use crate::store::{KeyRange, KeyValue, LeaseId, Store, StoreError};
use crate::txn::{Compare, Op, Txn, TxnAnswer};

/// How a [`KvManager`] uses the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvOptions {
    /// The keys.
    pub layout: Layout,
    /// How long a lease lasts. Default: 24 hours, as flannel's.
    pub ttl: Duration,
    /// How often a silent watch is asked how far it is. Default: 2 s.
    pub progress_interval: Duration,
    /// How long a watch may be silent after it was asked, and how long its first reading may take.
    /// Default: 3 s.
    pub patience: Duration,
    /// Whether to write records of other families than those of the records of Go flannel, whose
    /// nodes they crash. Default: no.
    pub mixed_families: bool,
}

impl Default for KvOptions {
    fn default() -> Self {
        Self {
            layout: Layout::default(),
            ttl: Duration::from_secs(24 * 3600),
            progress_interval: Duration::from_secs(2),
            patience: Duration::from_secs(3),
            mixed_families: false,
        }
    }
}

/// How often a claim is tried anew before the caller is told to come again.
const ATTEMPTS: usize = 64;

/// How often a claim without an answer is looked after before the caller is told.
const SILENCES: usize = 2;

/// A subnet manager on a revisioned key-value store, in flannel's etcd layout.
///
/// - A lease is claimed in one transaction per candidate. It is conditional on the config and on
///   the candidate alone, so that nodes which join at once are in each other's way only where they
///   want the same subnet; when it fails, it brings the reading that the next one starts from.
/// - Each family of a record has a marker key of its own, and so has its node, outside of what Go
///   flannel reads, that live and die with the record: so two dual-stack records cannot share one
///   half, and a claim that arrives late cannot give a node a second record.
/// - Writes are conditional on the revision at which the record was last seen, and the record is
///   looked at before: the revisions of a store that was restored from a backup are used twice.
/// - Where Go flannel, which asks nobody, has written an overlapping record, ours is given up.
/// - The watch is a reading and a watch, and again from the beginning whenever anything is wrong
///   with it, silence included.
///
/// It does nothing for a network without IPv4, for which flannel has no keys.
#[derive(Debug, Clone)]
pub struct KvManager<S> {
    store: S,
    options: Arc<KvOptions>,
    /// The lease that we hold, as far as we know.
    own: Arc<Mutex<Option<Lease>>>,
    /// The pools when we last asked for a lease.
    pools: Arc<Mutex<DualStack<Pool>>>,
}

impl<S: Store> KvManager<S> {
    /// A manager that reaches its store over this link.
    pub fn new(store: S, options: KvOptions) -> Self {
        Self {
            store,
            options: Arc::new(options),
            own: Arc::default(),
            pools: Arc::default(),
        }
    }

    /// The way to the store.
    pub const fn store(&self) -> &S {
        &self.store
    }

    /// How the store is used.
    pub fn options(&self) -> &KvOptions {
        &self.options
    }

    fn set_own(&self, lease: Option<Lease>) {
        *self.own.lock().unwrap_or_else(PoisonError::into_inner) = lease;
    }

    fn set_pools(&self, pools: DualStack<Pool>) {
        *self.pools.lock().unwrap_or_else(PoisonError::into_inner) = pools;
    }

    fn pools(&self) -> DualStack<Pool> {
        *self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn own(&self) -> Option<Lease> {
        let own = self.own.lock();
        own.unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn view(&self) -> Result<View> {
        let layout = &self.options.layout;
        let answer = self.store.range(layout.range()).await?;
        Ok(View::new(layout, answer.entries))
    }

    /// Writes until a record of ours stands that nobody else has a better claim to.
    async fn claim(&self, request: &LeaseRequest, lease: &mut Option<LeaseId>) -> Result<Lease> {
        let layout = &self.options.layout;
        let mut view = self.view().await?;
        let mut silences = 0;
        for _ in 0..ATTEMPTS {
            let decision = decide(layout, &view, request, self.options.mixed_families)?;
            self.set_pools(*view.config()?.pools());
            let used = if decision.reserved {
                None
            } else {
                match *lease {
                    Some(lease) => Some(lease),
                    None => {
                        let (granted, _) = self.store.grant(self.options.ttl).await?;
                        *lease = Some(granted);
                        *lease
                    }
                }
            };
            let answer = match self.store.txn(decision.txn(layout, used)).await {
                // It may have been done: then there is a record of ours to be found.
                Err(StoreError::Unavailable { .. }) if silences < SILENCES => {
                    silences += 1;
                    view = self.view().await?;
                    continue;
                }
                answer => answer?,
            };
            let succeeded = answer.succeeded;
            let mut ranges = answer.ranges();
            view.read(layout, ranges.next().unwrap_or_default());
            if !succeeded {
                for (key, found) in decision.markers().iter().zip(ranges) {
                    view.marker(key.clone(), found.into_iter().next());
                }
                continue;
            }
            let is_ours = |record: &&Record| record.entry.key == decision.key;
            let Some(ours) = view.records.iter().find(is_ours) else {
                continue;
            };
            let held = ours.lease(self.options.ttl);
            let held = held.map_err(|unreadable| Error::Corrupt {
                key: unreadable.key,
                reason: unreadable.reason,
            })?;
            let pools = self.pools();
            let mut others = view.records.iter();
            if !others.any(|other| decide::yields(&pools, ours, other)) {
                return Ok(held);
            }
            // Go flannel was faster, in a way that no condition could see.
            self.store.txn(removal(layout, &held)).await?;
            view = self.view().await?;
        }
        Err(Error::Conflict {
            reason: format!("{ATTEMPTS} claims in a row came too late"),
        })
    }

    /// Our record, if it stands as we know it; nothing if it is gone.
    async fn find_ours(&self, lease: &Lease) -> Result<Option<Record>> {
        let key = KeyRange::key(lease.key.as_str());
        let found = self.store.range(key).await?.entries.pop();
        still_ours(lease, found)
    }

    /// Extends the lease of a record that needs no change.
    async fn extend(&self, lease: &Lease, held: LeaseId) -> Result<Lease> {
        let ttl = match self.store.keep_alive(held).await {
            Err(StoreError::LeaseNotFound { .. }) => return Err(gone(lease)),
            ttl => ttl?,
        };
        // It may have been taken from us meanwhile, together with its lease or without.
        match self.find_ours(lease).await? {
            Some(record) if record.entry.lease == Some(held) => Ok(Lease {
                ttl: Some(ttl),
                ..lease.clone()
            }),
            _ => Err(gone(lease)),
        }
    }

    /// Writes a record anew under a new lease, if it was not written since it was seen.
    async fn write(
        &self,
        lease: &Lease,
        record: &Record,
        value: String,
        expires: bool,
    ) -> Result<Lease> {
        let granted = match expires {
            false => None,
            true => Some(self.store.grant(self.options.ttl).await?),
        };
        let mut renewed = lease.clone();
        renewed.ttl = granted.map(|(_, ttl)| ttl);
        let granted = granted.map(|(lease, _)| lease);
        let key = lease.key.as_str();
        let markers = self.options.layout.markers(&lease.node, &record.taken);
        let mut then = vec![Op::put(key, value.as_str(), granted)];
        then.extend(markers.into_iter().map(|m| Op::put(m, key, granted)));
        let txn = Txn {
            compares: vec![Compare::unchanged(key, lease.revision)],
            then,
            or_else: vec![Op::Range(KeyRange::key(key))],
        };
        match self.store.txn(txn).await {
            Ok(answer) if answer.succeeded => {
                renewed.revision = answer.revision;
                Ok(renewed)
            }
            Ok(answer) => {
                if let Some(granted) = granted {
                    self.store.revoke(granted).await.ok();
                }
                still_ours(lease, found(answer))?;
                Err(gone(lease))
            }
            Err(error @ StoreError::Unavailable { .. }) => {
                // It may have been done: what stands there now tells.
                let there = self.store.range(KeyRange::key(key)).await?.entries.pop();
                match there {
                    Some(entry)
                        if entry.value == value.as_bytes()
                            && entry.lease == granted
                            && entry.modified > lease.revision =>
                    {
                        renewed.revision = entry.modified;
                        Ok(renewed)
                    }
                    there => {
                        still_ours(lease, there)?.ok_or_else(|| gone(lease))?;
                        Err(error.into())
                    }
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Refuses attributes that would crash dual-stack Go nodes, if there are any.
    async fn check_attrs(&self, lease: &Lease) -> Result<()> {
        let lacks_address = lease.subnet.v6.is_some() && lease.attrs.public_ip.v6.is_none();
        if self.options.mixed_families || !lacks_address {
            return Ok(());
        }
        self.view().await?.check_go(&lease.subnet, &lease.attrs)
    }

    /// Gives our lease up if Go flannel has written a record that overlaps it.
    pub(crate) async fn yield_to(&self, other: &Record) -> Result<(), StoreError> {
        let Some(own) = self.own() else { return Ok(()) };
        if !other.is_gos() || lease_key(&other.entry.key) == own.key {
            return Ok(());
        }
        if decide::is_in_the_way(&self.pools(), &other.taken, &own.subnet) {
            self.store.txn(removal(&self.options.layout, &own)).await?;
        }
        Ok(())
    }
}

/// The record of a lease if it was not written since; an error if it was.
fn still_ours(lease: &Lease, found: Option<KeyValue>) -> Result<Option<Record>> {
    let Some(record) = found.map(Record::parse) else {
        return Ok(None);
    };
    let lost = |reason: String| {
        Err(Error::LeaseLost {
            key: lease.key.clone(),
            reason,
        })
    };
    let (node, revision) = (record.node(), record.entry.modified);
    // A revision alone proves nothing: a store that was restored uses it a second time.
    if node.as_ref() != Some(&lease.node) {
        return lost(match node {
            Some(node) => format!("it belongs to node {node} now"),
            None => "it cannot be read any more".to_owned(),
        });
    }
    if revision != lease.revision {
        let held = lease.revision;
        return lost(format!(
            "it was written at revision {revision}, after our {held}"
        ));
    }
    Ok(Some(record))
}

fn gone(lease: &Lease) -> Error {
    Error::LeaseLost {
        key: lease.key.clone(),
        reason: "the record is gone".to_owned(),
    }
}

/// The single entry that a failed transaction of ours read.
fn found(answer: TxnAnswer) -> Option<KeyValue> {
    answer.ranges().next()?.pop()
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Denied { reason } => Self::Denied { reason },
            StoreError::Refused { reason } => Self::Invalid { reason },
            error => Self::Unavailable {
                reason: "a call to the store failed".to_owned(),
                source: Some(Box::new(error)),
            },
        }
    }
}

#[async_trait]
impl<S: Store> Manager for KvManager<S> {
    fn name(&self) -> &'static str {
        self.store.kind()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::ALL
    }

    async fn network_config(&self) -> Result<NetworkConfig> {
        self.view().await?.config()
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease> {
        let previous = request.previous.check_families();
        previous.map_err(|error| Error::Invalid {
            reason: error.to_string(),
        })?;
        let mut granted = None;
        let claimed = self.claim(request, &mut granted).await;
        match (&claimed, granted) {
            (Ok(lease), _) => self.set_own(Some(lease.clone())),
            // A record of ours may hang on it.
            (Err(Error::Unavailable { .. } | Error::Denied { .. }), _) => {}
            // Nobody uses it; if it cannot be given back it runs out by itself.
            (Err(_), Some(granted)) => drop(self.store.revoke(granted).await),
            (Err(_), None) => {}
        }
        claimed
    }

    /// Where nothing that is published has changed, the store's lease is extended and the record is
    /// left as it is: no other node is told of it, and a store that takes no writes can do it.
    async fn renew_lease(&self, lease: &Lease) -> Result<Lease> {
        let record = self.find_ours(lease).await?;
        let record = record.ok_or_else(|| gone(lease))?;
        self.check_attrs(lease).await?;
        let value = value(&lease.node, &lease.attrs)?;
        let renewed = match record.entry.lease {
            Some(held) if record.entry.value == value.as_bytes() => {
                self.extend(lease, held).await?
            }
            held => self.write(lease, &record, value, held.is_some()).await?,
        };
        self.set_own(Some(renewed.clone()));
        Ok(renewed)
    }

    /// A reservation is kept for its node: its record stays, without what the node published.
    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        let Some(record) = self.find_ours(lease).await? else {
            return Ok(());
        };
        let mut txn = removal(&self.options.layout, lease);
        if record.entry.lease.is_none() {
            let attrs = LeaseAttrs {
                public_ip: lease.attrs.public_ip,
                ..LeaseAttrs::default()
            };
            let value = value(&lease.node, &attrs)?;
            txn.then = vec![Op::put(lease.key.as_str(), value, None)];
        }
        match self.store.txn(txn).await {
            Ok(answer) if answer.succeeded => {}
            Ok(answer) => {
                still_ours(lease, found(answer))?;
            }
            // It may have been done.
            Err(error @ StoreError::Unavailable { .. }) => {
                if self.find_ours(lease).await?.is_some() {
                    return Err(error.into());
                }
            }
            Err(error) => return Err(error.into()),
        }
        self.set_own(None);
        Ok(())
    }

    fn watch_leases(&self) -> EventStream {
        Box::pin(ListWatch::new(self.clone()))
    }
}
