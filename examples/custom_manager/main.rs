//! A store of a third party in the place of etcd. `kv.rs` stands in for the store, `manager.rs` is
//! all that has to be written; here it runs the conformance suite of managers on itself.
//!
//! `cargo run --example custom_manager`

#![allow(
    clippy::disallowed_methods,
    clippy::exit,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a program for the terminal"
)]

mod kv;
mod manager;

use std::process::ExitCode;
use std::sync::Arc;

use async_trait::async_trait;
use flannel::{Manager, NetworkConfig};
use flannel_testkit::conformance::manager::{ManagerFixture, StoreFixture, all, summary};

use crate::kv::Store;
use crate::manager::KvManager;

/// What the conformance suite needs: fresh stores, and clients of one store.
struct Fixture;

#[async_trait]
impl ManagerFixture for Fixture {
    async fn store(&self, config: NetworkConfig) -> Box<dyn StoreFixture> {
        let store = Store::new();
        store.commit(&[("config", 0, Some(config.text().to_owned()))]);
        Box::new(store)
    }
}

#[async_trait]
impl StoreFixture for Store {
    async fn manager(&self) -> Arc<dyn Manager> {
        Arc::new(KvManager {
            store: self.clone(),
        })
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let reports = all(&Fixture).await;
    for report in &reports {
        println!("{report}");
    }
    println!("{}", summary(&reports));
    if reports.iter().all(|report| report.outcome.is_ok()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    }
}
