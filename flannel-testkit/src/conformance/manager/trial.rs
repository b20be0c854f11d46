//! The view that a trial has of its stores, so that no manager is accused of what the trial itself
//! did.
//!
//! A trial on a slow store may take longer than the leases of the store live, and whatever it then
//! finds says nothing about the manager. And a manager whose watches begin with no snapshot cannot
//! be tried further: one promise is broken, not each that is looked at through a watch. So the
//! suite tries a promise on stores and managers that pass everything through and take notes.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::manager::Result;
use flannel_core::{
    Capabilities, DualStack, Event, EventStream, Lease, LeaseKey, LeaseRequest, Manager,
    NetworkConfig, NodeId, Subnet,
};
use futures_core::Stream;
use tokio::time::Instant;

use super::{ManagerFixture, StoreFixture};

/// A fixture of which notes are taken.
pub(super) struct Observed<'a> {
    fixture: &'a dyn ManagerFixture,
    notes: Arc<Notes>,
}

impl<'a> Observed<'a> {
    /// `hopeless`: it is known that no watch begins with a snapshot, so none is waited for.
    pub(super) fn new(fixture: &'a dyn ManagerFixture, hopeless: bool) -> Self {
        let notes = Arc::new(Notes {
            hopeless,
            ..Notes::default()
        });
        Self { fixture, notes }
    }

    /// A lease has ended that the trial took for living: what it found says nothing.
    pub(super) fn outlived_its_leases(&self) -> bool {
        self.notes.outlived.load(Ordering::SeqCst)
    }

    /// Watches were read, and none of them began with a snapshot.
    pub(super) fn no_watch_began(&self) -> bool {
        let seen = |flag: &AtomicBool| flag.load(Ordering::SeqCst);
        seen(&self.notes.watched) && !seen(&self.notes.began)
    }

    /// The part of the time that went by because the trial let it.
    pub(super) fn advanced(&self) -> Duration {
        self.notes.advanced().total()
    }
}

#[async_trait]
impl ManagerFixture for Observed<'_> {
    async fn store(&self, config: NetworkConfig) -> Box<dyn StoreFixture> {
        Box::new(ObservedStore {
            store: self.fixture.store(config).await,
            leases: Arc::default(),
            notes: Arc::clone(&self.notes),
        })
    }
}

/// The notes of one trial.
#[derive(Debug, Default)]
struct Notes {
    hopeless: bool,
    outlived: AtomicBool,
    watched: AtomicBool,
    began: AtomicBool,
    advanced: Mutex<Advanced>,
}

impl Notes {
    fn advanced(&self) -> MutexGuard<'_, Advanced> {
        self.advanced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time that a trial let pass.
#[derive(Debug, Default)]
struct Advanced {
    done: Duration,
    since: Option<Instant>,
}

impl Advanced {
    fn total(&self) -> Duration {
        self.done + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// The leases of one store that a trial holds.
#[derive(Debug, Default)]
struct Leases(Mutex<BTreeMap<LeaseKey, Life>>);

impl Leases {
    fn held(&self) -> MutexGuard<'_, BTreeMap<LeaseKey, Life>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The life of a lease since it was given or renewed.
#[derive(Debug, Clone, Copy)]
struct Life {
    /// The earliest moment that it may count from.
    from: Instant,
    ttl: Duration,
    /// The time that the trial meant to let pass since.
    meant: Duration,
    /// The time that the fixture took for that, by the clock that `from` is of.
    taken: Duration,
    /// The time that went by for the lease at the most: a fixture may have a clock of its own, or
    /// sleep a little longer.
    passed: Duration,
}

impl Life {
    /// Tells if it may be over although the trial takes it for living.
    fn is_outlived(&self, now: Instant) -> bool {
        let of_itself = now.duration_since(self.from).saturating_sub(self.taken);
        self.meant < self.ttl && of_itself + self.passed >= self.ttl
    }
}

struct ObservedStore {
    store: Box<dyn StoreFixture>,
    leases: Arc<Leases>,
    notes: Arc<Notes>,
}

#[async_trait]
impl StoreFixture for ObservedStore {
    async fn manager(&self) -> Arc<dyn Manager> {
        Arc::new(ObservedManager {
            manager: self.store.manager().await,
            leases: Arc::clone(&self.leases),
            notes: Arc::clone(&self.notes),
        })
    }

    async fn add_node(&self, node: &NodeId) {
        self.store.add_node(node).await;
    }

    async fn advance(&self, time: Duration) -> bool {
        let begun = Instant::now();
        self.notes.advanced().since = Some(begun);
        let is_done = self.store.advance(time).await;
        let taken = begun.elapsed();
        let mut advanced = self.notes.advanced();
        advanced.since = None;
        advanced.done += taken;
        drop(advanced);
        if is_done {
            for life in self.leases.held().values_mut() {
                life.meant += time;
                life.taken += taken;
                life.passed += time.max(taken);
            }
        }
        is_done
    }

    async fn set_config(&self, config: NetworkConfig) -> bool {
        self.store.set_config(config).await
    }

    async fn write_raw(&self, lease: Lease) -> bool {
        self.store.write_raw(lease).await
    }

    async fn spoil(&self, key: &LeaseKey) -> bool {
        self.store.spoil(key).await
    }

    async fn interrupt_watches(&self) -> bool {
        self.store.interrupt_watches().await
    }

    async fn reserve(&self, node: &NodeId, subnets: DualStack<Subnet>) -> bool {
        self.store.reserve(node, subnets).await
    }
}

/// A manager of which notes are taken; it has to pass on every method, those with a default too.
#[derive(Debug, Clone)]
struct ObservedManager {
    manager: Arc<dyn Manager>,
    leases: Arc<Leases>,
    notes: Arc<Notes>,
}

impl ObservedManager {
    /// Notes whether the trial went on for too long: at an answer or a snapshot, as it judges by
    /// these.
    ///
    /// Not at other events: a manager that fails to deliver one is waited for until leases end, and
    /// what is delivered then is no excuse.
    fn look(&self) {
        let now = Instant::now();
        let held = self.leases.held();
        if held.values().any(|life| life.is_outlived(now)) {
            self.notes.outlived.store(true, Ordering::SeqCst);
        }
    }

    fn note(&self, from: Instant, lease: &Lease) {
        self.look();
        let mut held = self.leases.held();
        let Some(ttl) = lease.ttl else {
            held.remove(&lease.key);
            return;
        };
        let life = Life {
            from,
            ttl,
            meant: Duration::ZERO,
            taken: Duration::ZERO,
            passed: Duration::ZERO,
        };
        held.insert(lease.key.clone(), life);
    }
}

#[async_trait]
impl Manager for ObservedManager {
    fn name(&self) -> &'static str {
        self.manager.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.manager.capabilities()
    }

    async fn network_config(&self) -> Result<NetworkConfig> {
        self.manager.network_config().await
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease> {
        let from = Instant::now();
        let result = self.manager.acquire_lease(request).await;
        match &result {
            Ok(lease) => self.note(from, lease),
            Err(_) => self.look(),
        }
        result
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease> {
        let from = Instant::now();
        let result = self.manager.renew_lease(lease).await;
        match &result {
            Ok(lease) => self.note(from, lease),
            Err(_) => self.look(),
        }
        result
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        let result = self.manager.release_lease(lease).await;
        self.look();
        if result.is_ok() {
            self.leases.held().remove(&lease.key);
        }
        result
    }

    fn watch_leases(&self) -> EventStream {
        Box::pin(ObservedWatch {
            stream: self.manager.watch_leases(),
            of: self.clone(),
        })
    }

    fn reconnect(&self) {
        self.manager.reconnect();
    }
}

struct ObservedWatch {
    stream: EventStream,
    of: ObservedManager,
}

impl Stream for ObservedWatch {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let notes = Arc::clone(&self.of.notes);
        notes.watched.store(true, Ordering::SeqCst);
        if notes.hopeless {
            return Poll::Ready(None);
        }
        let poll = self.stream.as_mut().poll_next(cx);
        if let Poll::Ready(Some(Ok(Event::Snapshot(_)))) = &poll {
            self.of.look();
            notes.began.store(true, Ordering::SeqCst);
        }
        poll
    }
}
