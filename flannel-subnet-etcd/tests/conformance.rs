//! The manager keeps the promises of every manager, on a real etcd.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::{
    DualStack, Lease, LeaseAttrs, LeaseKey, Manager, NetworkConfig, NodeId, Subnet, wire,
};
use flannel_subnet_etcd::{EtcdManager, EtcdOptions, EtcdStore};
use flannel_subnet_kv::{Layout, Op, Store as _, Txn};
use flannel_testkit::conformance::manager::{ManagerFixture, StoreFixture};
use flannel_testkit::servers::{Etcd, EtcdVersion, TcpSwitch};
use tokio::runtime::{Builder, Runtime};

/// A server for all tests that run at the same time; each has a prefix of its own.
struct RealEtcd(Arc<Etcd>);

impl RealEtcd {
    /// The server of a release; skips the test if there is none.
    fn of(version: EtcdVersion) -> Option<Self> {
        static SERVERS: Mutex<BTreeMap<EtcdVersion, Weak<Etcd>>> = Mutex::new(BTreeMap::new());
        if !version.require("a promise of every manager") {
            return None;
        }
        let mut servers = SERVERS.lock().expect("no test panicked with it");
        let running = servers.get(&version).and_then(Weak::upgrade);
        Some(Self(running.unwrap_or_else(|| {
            let etcd = Arc::new(Etcd::of(version).expect("etcd starts"));
            servers.insert(version, Arc::downgrade(&etcd));
            etcd
        })))
    }
}

fn prefix() -> String {
    static PREFIXES: Mutex<u32> = Mutex::new(0);
    let mut number = PREFIXES.lock().expect("no test panicked with it");
    *number += 1;
    format!("/test-{number}/network")
}

#[async_trait]
impl ManagerFixture for RealEtcd {
    async fn store(&self, config: NetworkConfig) -> Box<dyn StoreFixture> {
        let prefix = prefix();
        let options = EtcdOptions::new([self.0.endpoint()]).expect("an endpoint");
        let switch = TcpSwitch::new(self.0.address()).await;
        // A trial may go on with a manager after its store is dropped.
        let switch = Box::leak(Box::new(switch.expect("a free port")));
        let store = Store {
            layout: Layout::new(&prefix),
            hand: EtcdStore::new(options).expect("sound settings"),
            switch,
        };
        store.set_config(config).await;
        Box::new(store)
    }
}

struct Store {
    layout: Layout,
    /// Writes what is no manager's doing.
    hand: EtcdStore,
    /// The way of all managers to the server.
    switch: &'static TcpSwitch,
}

impl Store {
    async fn put(&self, key: &str, value: &str) -> bool {
        let txn = Txn {
            then: vec![Op::put(key, value, None)],
            ..Txn::default()
        };
        self.hand.txn(txn).await.expect("etcd answers").succeeded
    }

    async fn write(&self, key: &str, node: &NodeId, attrs: &LeaseAttrs) -> bool {
        match wire::lease_value(node, None, attrs) {
            Ok(value) => self.put(key, &value).await,
            Err(_) => false,
        }
    }
}

#[async_trait]
impl StoreFixture for Store {
    async fn manager(&self) -> Arc<dyn Manager> {
        let options = EtcdOptions::new([format!("http://{}", self.switch.address())])
            .expect("an endpoint")
            .prefix(self.layout.prefix())
            .ttl(Duration::from_secs(5))
            .holder_patience(Duration::from_secs(2));
        Arc::new(EtcdManager::new(options).expect("sound settings"))
    }

    async fn advance(&self, time: Duration) -> bool {
        // etcd has a clock of its own, and looks at its leases twice a second.
        tokio::time::sleep(time + Duration::from_secs(1)).await;
        true
    }

    async fn set_config(&self, config: NetworkConfig) -> bool {
        self.put(&self.layout.config(), config.text()).await
    }

    async fn write_raw(&self, lease: Lease) -> bool {
        let key = match lease.key.as_str() {
            key if self.layout.is_record(key) => key.to_owned(),
            end => format!("{}/{end}", self.layout.subnets()),
        };
        self.write(&key, &lease.node, &lease.attrs).await
    }

    async fn spoil(&self, key: &LeaseKey) -> bool {
        self.put(key.as_str(), "{").await
    }

    async fn interrupt_watches(&self) -> bool {
        self.switch.interrupt();
        true
    }

    async fn reserve(&self, node: &NodeId, subnets: DualStack<Subnet>) -> bool {
        let key = self.layout.record(&subnets).expect("a key of flannel's");
        self.write(&key, node, &LeaseAttrs::default()).await
    }
}

fn threads() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

mod in_path {
    use super::*;

    flannel_testkit::manager_conformance!(
        match RealEtcd::of(EtcdVersion::InPath) {
            Some(etcd) => etcd,
            None => return,
        },
        threads()
    );
}

mod v3_5 {
    use super::*;

    /// Else the tests on it would prove nothing.
    #[tokio::test]
    async fn the_server_says_that_it_is_3_5() {
        let Some(RealEtcd(etcd)) = RealEtcd::of(EtcdVersion::V3_5) else {
            return;
        };
        let client = etcd_client::Client::connect([etcd.endpoint()], None).await;
        let status = client.expect("a client").status().await;
        let status = status.expect("an answer");
        assert!(status.version().starts_with("3.5."), "{status:?}");
    }

    flannel_testkit::manager_conformance!(
        match RealEtcd::of(EtcdVersion::V3_5) {
            Some(etcd) => etcd,
            None => return,
        },
        threads()
    );
}
