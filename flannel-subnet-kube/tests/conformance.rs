//! The manager keeps the promises of every manager, on a real API server.

mod common;

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use common::{admin, annotate};
use flannel_core::{Family, LeaseKey, Manager, NetworkConfig, NodeId, PoolMode};
use flannel_subnet_kube::{ConfigSource, KubeManager};
use flannel_testkit::conformance::manager::{self, ManagerFixture, StoreFixture, Verdict};
use flannel_testkit::servers::KubeApiServer;
use serde_json::json;

/// One server for all promises, which are tried one after the other: its Nodes are removed before
/// each.
struct RealKube {
    server: Arc<Mutex<KubeApiServer>>,
    stores: Mutex<usize>,
}

#[async_trait]
impl ManagerFixture for RealKube {
    async fn store(&self, config: NetworkConfig) -> Box<dyn StoreFixture> {
        let number = {
            let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
            *stores += 1;
            *stores
        };
        let store = Store {
            server: Arc::clone(&self.server),
            file: format!("net-conf-{number}.json"),
            config: Mutex::new(config.clone()),
            names: Mutex::default(),
        };
        {
            let server = store.server();
            let nodes = server.object("/api/v1/nodes").expect("an answer");
            for node in nodes.expect("a list")["items"].as_array().expect("items") {
                let name = node["metadata"]["name"].as_str().expect("a name");
                server.remove_node(name).expect("removed");
            }
        }
        store.set_config(config).await;
        Box::new(store)
    }
}

struct Store {
    server: Arc<Mutex<KubeApiServer>>,
    file: String,
    config: Mutex<NetworkConfig>,
    names: Mutex<Vec<String>>,
}

impl Store {
    fn server(&self) -> std::sync::MutexGuard<'_, KubeApiServer> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The n-th subnet of each family.
    fn cidrs(&self, n: usize) -> Vec<String> {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let config = NetworkConfig::from_json(config.text(), PoolMode::Assigned).expect("a config");
        let cidr = |family: Family| {
            let network = config.pools().get(family)?.network();
            let len = if family == Family::V4 { 26 } else { 64 };
            network.subnets(len).nth(n).map(|subnet| subnet.to_string())
        };
        Family::ALL.into_iter().filter_map(cidr).collect()
    }
}

#[async_trait]
impl StoreFixture for Store {
    async fn manager(&self) -> Arc<dyn Manager> {
        let server = self.server();
        let config = ConfigSource::file(server.folder().join(&self.file));
        let options = admin(&server, &server.url(), config);
        Arc::new(KubeManager::new(options).expect("sound settings"))
    }

    async fn add_node(&self, node: &NodeId) {
        let number = {
            let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
            if names.iter().any(|name| name == node.as_str()) {
                return;
            }
            names.push(node.as_str().to_owned());
            names.len() - 1
        };
        let cidrs = self.cidrs(number);
        let cidrs: Vec<&str> = cidrs.iter().map(String::as_str).collect();
        let made = self.server().add_node(node.as_str(), &cidrs);
        made.expect("the Node is made");
    }

    async fn set_config(&self, config: NetworkConfig) -> bool {
        common::write(self.server().folder(), &self.file, config.text());
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = config;
        true
    }

    async fn spoil(&self, key: &LeaseKey) -> bool {
        let spoilt = [("backend-data", json!("{"))];
        annotate(&self.server(), key.as_str(), &spoilt);
        true
    }

    async fn interrupt_watches(&self) -> bool {
        let mut server = self.server();
        common::lose_history(&mut server);
        true
    }
}

/// What cannot be tried: nothing is allocated, nothing expires, and nobody can write in another
/// node's name.
const SKIPPED: [&str; 17] = [
    "a_lease_that_no_longer_fits_is_replaced",
    "pool_is_used_to_the_last_subnet",
    "records_of_any_length_are_respected",
    "what_no_peer_accepts_is_in_nobodys_way",
    "previous_subnet_is_honoured",
    "taken_previous_subnet_is_not_given",
    "reserved_subnet_is_kept",
    "renewal_extends_the_lease",
    "a_record_that_another_wrote_is_lost",
    "release_frees_the_subnet",
    "a_node_id_in_use_is_refused",
    "a_node_id_is_taken_over_on_request",
    "the_same_machine_keeps_its_lease",
    "a_renamed_machine_keeps_its_subnet",
    "a_copy_of_a_living_node_takes_nothing",
    "both_families_or_none",
    "expiry_is_delivered",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_promise_of_a_manager_is_kept() {
    if !KubeApiServer::require("kube conformance") {
        return;
    }
    let server = KubeApiServer::start().expect("a server");
    let fixture = RealKube {
        server: Arc::new(Mutex::new(server)),
        stores: Mutex::new(0),
    };
    let reports = manager::all(&fixture).await;
    let broken: Vec<String> = reports
        .iter()
        .filter(|report| report.outcome.is_err())
        .map(ToString::to_string)
        .collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    let is_skipped = |verdict: &_| matches!(verdict, Ok(Verdict::Skipped(_)));
    let skipped: Vec<&str> = reports
        .iter()
        .filter(|report| is_skipped(&report.outcome))
        .map(|report| report.name)
        .collect();
    assert_eq!(skipped, SKIPPED);
}
