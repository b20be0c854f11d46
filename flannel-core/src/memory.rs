//! [`MemoryManager`]: a subnet manager inside the process.

mod saved;
mod store;

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use futures_core::Stream;
use tokio::time::Sleep;

use crate::clock::{Clock, Moment, TokioClock};
use crate::config::NetworkConfig;
use crate::event::{Event, EventStream, Snapshot};
use crate::family::DualStack;
use crate::lease::{Lease, LeaseKey};
use crate::manager::{Capabilities, LeaseRequest, Manager, Result};
use crate::node::NodeId;
use crate::subnet::Subnet;

pub use saved::MemoryState;
use store::{Machine, Store};

/// A full [`Manager`] that keeps everything in memory: for hosts of one process, demos and tests.
///
/// Clones share one store, so that each "node" of a program holds a handle of its own: a machine lives
/// as long as a watch of the handle that it got its lease by. Records have flannel's lease keys
/// (`10.5.1.0-24`), so a node whose subnet changes gets a new record. Leases never expire, unless
/// [`with_ttl`](Self::with_ttl) says so.
///
/// ```
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use flannel_core::{
///     LeaseRequest, Manager, MemoryManager, NetworkConfig, NodeId, PoolMode,
/// };
///
/// let config = NetworkConfig::from_json(r#"{"Network": "10.5.0.0/16"}"#, PoolMode::Allocated)?;
/// let manager = MemoryManager::new(config);
/// let request = LeaseRequest::new(NodeId::new("worker-1")?, Default::default());
/// let lease = manager.acquire_lease(&request).await?;
/// assert!(lease.subnet.v4.is_some());
/// # Ok(())
/// # }
/// ```
pub struct MemoryManager {
    shared: Arc<Shared>,
    machine: Machine,
}

impl Clone for MemoryManager {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            machine: Machine::default(),
        }
    }
}

struct Shared {
    store: Mutex<Store>,
}

impl Shared {
    /// Does something with the store as it is now: without what has expired. Watchers are woken
    /// after the lock is gone.
    fn with<T>(&self, f: impl FnOnce(&mut Store, Moment) -> T) -> T {
        // No call leaves the store half changed, so one that panicked left it whole.
        let mut store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        let now = store.clock.now();
        store.expire(now);
        let result = f(&mut store, now);
        let wakers = store.take_wakers();
        drop(store);
        wakers.into_iter().for_each(std::task::Waker::wake);
        result
    }
}

impl MemoryManager {
    /// An empty store that holds this config.
    ///
    /// Subnets are only given out of a config that was read with
    /// [`PoolMode::Allocated`](crate::PoolMode::Allocated).
    pub fn new(config: NetworkConfig) -> Self {
        let store = Store::new(config, Arc::new(TokioClock::new()));
        Self {
            shared: Arc::new(Shared {
                store: Mutex::new(store),
            }),
            machine: Machine::default(),
        }
    }

    /// Lets leases that are written from now on expire unless they are renewed in this time.
    ///
    /// Watches then need a tokio runtime whose timer is on.
    #[must_use]
    pub fn with_ttl(self, ttl: Duration) -> Self {
        self.shared.with(|store, _| store.ttl = Some(ttl));
        self
    }

    /// Measures the age of leases with another clock than tokio's; for a store that is still
    /// empty.
    #[must_use]
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        self.shared.with(|store, _| store.clock = clock);
        self
    }

    /// Replaces the network config. Leases that no longer fit it stay until their nodes ask again.
    pub fn set_config(&self, config: NetworkConfig) {
        self.shared.with(|store, _| store.set_config(config));
    }

    /// Keeps subnets for a node: nobody else gets them, and the node's lease of them does not
    /// expire (one that it holds already: from its next renewal on). Replaces an earlier
    /// reservation of the node.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::manager::Error::Invalid) if the config does not allow a node these subnets, if the node holds
    /// others, or if they overlap another node's lease or reservation.
    pub fn reserve(&self, node: &NodeId, subnets: DualStack<Subnet>) -> Result<()> {
        self.shared.with(|store, _| store.reserve(node, subnets))
    }

    /// Ends a node's reservation; says whether there was one. A lease that the node holds stays
    /// until it is released or expires after its next renewal.
    pub fn unreserve(&self, node: &NodeId) -> bool {
        self.shared.with(|store, _| store.unreserve(node))
    }

    /// Writes a record as another party would, without any question: a peer appears, or is
    /// changed, even to something nonsensical. The store sets the revisions; a time to live is
    /// taken from the lease. Returns what was stored.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::manager::Error::Invalid) if a subnet stands in the place of the other family.
    pub fn put_raw(&self, lease: Lease) -> Result<Lease> {
        self.shared.with(|store, now| store.put_raw(now, lease))
    }

    /// Removes a record, whoever holds it: a peer disappears. Says whether there was one.
    pub fn remove(&self, key: &LeaseKey) -> bool {
        self.shared.with(|store, _| store.delete(key))
    }

    /// All records as they are now.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.with(|store, now| store.snapshot(now))
    }

    /// The whole state, to be saved.
    pub fn export(&self) -> MemoryState {
        self.shared.with(|store, now| store.export(now))
    }

    /// Replaces everything, the config included, by a state that was saved. Leases have as much
    /// time left as they had then. Watches start again with a snapshot; revisions go on from the
    /// higher of the two.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::manager::Error::Invalid) or [`Error::Config`](crate::manager::Error::Config) if the state is not sound; nothing is changed then.
    pub fn import(&self, state: &MemoryState) -> Result<()> {
        self.shared.with(|store, now| store.import(now, state))
    }
}

impl fmt::Debug for MemoryManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryManager").finish_non_exhaustive()
    }
}

#[async_trait]
impl Manager for MemoryManager {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn capabilities(&self) -> Capabilities {
        let expires = self.shared.with(|store, _| store.ttl.is_some());
        Capabilities::ALL.with_expires(expires)
    }

    async fn network_config(&self) -> Result<NetworkConfig> {
        Ok(self.shared.with(|store, _| store.config().clone()))
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease> {
        self.shared
            .with(|store, now| store.acquire(now, &self.machine, request))
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease> {
        self.shared
            .with(|store, now| store.renew(now, &self.machine, lease))
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        self.shared.with(|store, _| store.release(lease))
    }

    /// Every snapshot is followed by the config that holds then.
    fn watch_leases(&self) -> EventStream {
        Box::pin(Watch {
            shared: Arc::clone(&self.shared),
            machine: self.machine.clone(),
            subscription: None,
            timer: None,
        })
    }
}

/// The longest a watch sleeps while leases can expire: the clock may go on while tokio's timers
/// stand still (a suspended machine).
const MAX_SLEEP: Duration = Duration::from_secs(5);

/// A subscription, and the timer that makes expiry seen while nobody calls.
struct Watch {
    shared: Arc<Shared>,
    machine: Machine,
    /// The subscription's number, once the watch has been polled.
    subscription: Option<u64>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Stream for Watch {
    type Item = Result<Event>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let watch = self.get_mut();
        loop {
            let (event, expiry) = watch.shared.with(|store, now| {
                let id = *watch
                    .subscription
                    .get_or_insert_with(|| store.subscribe(watch.machine.clone()));
                let event = store.next_event(id, now, cx.waker());
                (event, store.next_expiry(now))
            });
            if let Some(event) = event {
                return Poll::Ready(Some(Ok(event)));
            }
            let Some(wait) = expiry else {
                watch.timer = None;
                return Poll::Pending;
            };
            let mut timer = Box::pin(tokio::time::sleep(wait.min(MAX_SLEEP)));
            if timer.as_mut().poll(cx).is_pending() {
                watch.timer = Some(timer);
                return Poll::Pending;
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(id) = self.subscription {
            self.shared.with(|store, _| store.unsubscribe(id));
        }
    }
}
