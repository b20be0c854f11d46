//! The manager on the fake store keeps the promises of every manager: on a perfect link, on a slow
//! one that delivers write by write, and on threads.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::{
    DualStack, Lease, LeaseAttrs, LeaseKey, Manager, NetworkConfig, NodeId, Subnet, TokioClock,
    wire,
};
use flannel_testkit::conformance::manager::{ManagerFixture, StoreFixture};
use flannel_testkit::fake_store::{
    Delivery, FakeStore, Layout, StoreLink, StoreManager, StoreOptions,
};
use tokio::runtime::{Builder, Runtime};

/// What is between the nodes and the store.
#[derive(Clone, Copy)]
struct Way {
    latency: Duration,
    delivery: Delivery,
    /// Whether the clock is tokio's paused one.
    paused: bool,
}

const PERFECT: Way = Way {
    latency: Duration::ZERO,
    delivery: Delivery::PLAIN,
    paused: true,
};

#[async_trait]
impl ManagerFixture for Way {
    async fn store(&self, config: NetworkConfig) -> Box<dyn StoreFixture> {
        let store = Store {
            way: *self,
            store: FakeStore::new(Arc::new(TokioClock::new())),
            layout: Layout::default(),
            links: Mutex::default(),
        };
        store.set_config(config).await;
        Box::new(store)
    }
}

struct Store {
    way: Way,
    store: FakeStore,
    layout: Layout,
    /// Those of all managers.
    links: Mutex<Vec<StoreLink>>,
}

impl Store {
    fn write(&self, key: &str, node: &NodeId, attrs: &LeaseAttrs) -> bool {
        let Ok(value) = wire::lease_value(node, None, attrs) else {
            return false;
        };
        self.store.put(key, value);
        true
    }
}

#[async_trait]
impl StoreFixture for Store {
    async fn manager(&self) -> Arc<dyn Manager> {
        let link = self.store.link("a node");
        let mut links = self.links.lock().expect("no test panicked with it");
        links.push(link.clone());
        drop(links);
        link.set_latency(self.way.latency);
        link.deliver(self.way.delivery);
        let options = StoreOptions {
            ttl: Duration::from_secs(10),
            holder_patience: Duration::from_secs(3),
            ..StoreOptions::default()
        };
        Arc::new(StoreManager::new(link, options))
    }

    async fn advance(&self, time: Duration) -> bool {
        if self.way.paused {
            tokio::time::advance(time).await;
        }
        self.way.paused
    }

    async fn set_config(&self, config: NetworkConfig) -> bool {
        self.store.put(self.layout.config(), config.text());
        true
    }

    async fn write_raw(&self, lease: Lease) -> bool {
        let key = match lease.key.as_str() {
            key if self.layout.is_record(key) => key.to_owned(),
            end => format!("{}/{end}", self.layout.subnets()),
        };
        self.write(&key, &lease.node, &lease.attrs)
    }

    async fn spoil(&self, key: &LeaseKey) -> bool {
        self.store.put(key.as_str(), "{");
        true
    }

    async fn interrupt_watches(&self) -> bool {
        let links = self.links.lock().expect("no test panicked with it");
        links.iter().for_each(StoreLink::break_watches);
        true
    }

    async fn reserve(&self, node: &NodeId, subnets: DualStack<Subnet>) -> bool {
        let key = self.layout.record(&subnets).expect("a key of flannel's");
        self.write(&key, node, &LeaseAttrs::default())
    }
}

fn paused() -> Runtime {
    Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
}

mod at_once {
    use super::*;
    flannel_testkit::manager_conformance!(PERFECT, paused());
}

mod slowly {
    use super::*;

    const WAY: Way = Way {
        latency: Duration::from_millis(7),
        delivery: Delivery {
            delay: Duration::from_millis(30),
            split: true,
            ..Delivery::PLAIN
        },
        ..PERFECT
    };

    flannel_testkit::manager_conformance!(WAY, paused());
}

mod on_threads {
    use super::*;

    fn threads() -> Runtime {
        Builder::new_multi_thread()
            .worker_threads(2)
            .enable_time()
            .build()
            .expect("a runtime")
    }

    const WAY: Way = Way {
        paused: false,
        ..PERFECT
    };

    flannel_testkit::manager_conformance!(WAY, threads());
}
