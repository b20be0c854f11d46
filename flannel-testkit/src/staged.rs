//! [`StagedManager`]: a node's view of a store whose config changes reach the nodes one by one.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use async_trait::async_trait;
use flannel_core::manager::Result;
use flannel_core::{Capabilities, Event, EventStream, Lease, LeaseRequest, Manager, NetworkConfig};
use futures_core::Stream;
use tokio::sync::mpsc;

/// A manager that tells its node of the config when the test says so; all else is the inner one's.
///
/// One for each node, on one store: so a cluster follows a change of the config node by node.
#[derive(Debug, Clone)]
pub struct StagedManager {
    inner: Arc<dyn Manager>,
    state: Arc<Mutex<State>>,
    reconnects: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct State {
    config: NetworkConfig,
    watches: Vec<mpsc::Sender<NetworkConfig>>,
}

/// How many configs a watch may be behind.
const BACKLOG: usize = 16;

impl StagedManager {
    /// The view of a node that knows this config.
    pub fn new(inner: impl Manager, config: NetworkConfig) -> Self {
        Self {
            inner: Arc::new(inner),
            state: Arc::new(Mutex::new(State {
                config,
                watches: Vec::new(),
            })),
            reconnects: Arc::default(),
        }
    }

    /// The number of times that the node had its connections to the store made anew.
    pub fn reconnects(&self) -> usize {
        self.reconnects.load(Ordering::Relaxed)
    }

    /// Tells the node of another config.
    ///
    /// # Panics
    /// If its watch has not been polled for 16 configs.
    pub fn set_config(&self, config: &NetworkConfig) {
        let mut state = self.state();
        state.config = config.clone();
        state.watches.retain(|watch| !watch.is_closed());
        for watch in &state.watches {
            let sent = watch.try_send(config.clone());
            sent.expect("the node takes in what it is told");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Manager for StagedManager {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities().with_watches_config(true)
    }

    fn reconnect(&self) {
        self.reconnects.fetch_add(1, Ordering::Relaxed);
        self.inner.reconnect();
    }

    async fn network_config(&self) -> Result<NetworkConfig> {
        Ok(self.state().config.clone())
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease> {
        self.inner.acquire_lease(request).await
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease> {
        self.inner.renew_lease(lease).await
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        self.inner.release_lease(lease).await
    }

    fn watch_leases(&self) -> EventStream {
        let (sender, configs) = mpsc::channel(BACKLOG);
        self.state().watches.push(sender);
        Box::pin(Watch {
            inner: self.inner.watch_leases(),
            configs,
        })
    }
}

/// The inner watch, with the node's own configs in the place of the store's.
struct Watch {
    inner: EventStream,
    configs: mpsc::Receiver<NetworkConfig>,
}

impl Stream for Watch {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Poll::Ready(Some(config)) = self.configs.poll_recv(cx) {
            return Poll::Ready(Some(Ok(Event::Config(config))));
        }
        loop {
            match self.inner.as_mut().poll_next(cx) {
                Poll::Ready(Some(Ok(Event::Config(_)))) => {}
                other => return other,
            }
        }
    }
}
