//! Ten minutes without the store, on fakes: nodes whose leases are in a store of flannel's layout,
//! tokio's clock paused. No route is withdrawn, nobody exits, and renewal resumes; neither while the
//! leases outlast the outage nor where they were made so short that they end in it.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    ConditionType, Family, Objects, Overlay, OverlayEvent, Revision, Subnet, TokioClock,
};
use flannel_testkit::fake_kernel::FakeKernel;
use flannel_testkit::fake_store::{
    Cut, FakeStore, KeyRange, Layout, StoreLink, StoreManager, StoreOptions,
};
use tokio::sync::broadcast;

const MINUTE: Duration = Duration::from_secs(60);
const OUTAGE: Duration = MINUTE.saturating_mul(10);

struct Node {
    link: StoreLink,
    kernel: FakeKernel,
    overlay: Overlay,
    events: broadcast::Receiver<OverlayEvent>,
}

impl Node {
    /// What has happened since it was last asked.
    fn events(&mut self) -> Vec<OverlayEvent> {
        let events = std::iter::from_fn(|| self.events.try_recv().ok());
        events.collect()
    }

    fn subnet(&self) -> Subnet {
        subnet_of(&self.overlay, Family::V4)
    }
}

/// Three nodes on one store that know one another.
struct World {
    store: FakeStore,
    nodes: Vec<Node>,
}

impl World {
    async fn new(ttl: Duration) -> Self {
        let store = FakeStore::new(Arc::new(TokioClock::new()));
        store.put(Layout::default().config(), DUAL);
        let mut nodes = Vec::new();
        for (n, name) in (1..).zip(["a", "b", "c"]) {
            let link = store.link(name);
            let options = StoreOptions {
                ttl,
                ..StoreOptions::default()
            };
            let kernel = FakeKernel::node(n);
            let overlay = Overlay::builder(node(name))
                .manager(StoreManager::new(link.clone(), options))
                .backend(VxlanBackend::new())
                .kernel(kernel.clone())
                .start()
                .await
                .expect("all parts are there");
            overlay.ready().await.expect("ready");
            nodes.push(Node {
                link,
                kernel,
                events: overlay.events(),
                overlay,
            });
        }
        for node in &mut nodes {
            settle(&node.overlay).await;
            assert_eq!(node.overlay.status().peers, 2);
            node.events();
            node.kernel.take_log();
        }
        Self { store, nodes }
    }

    fn kernels(&self) -> Vec<Objects> {
        let kernels = self.nodes.iter().map(|node| node.kernel.objects());
        kernels.collect()
    }

    fn subnets(&self) -> Vec<Subnet> {
        self.nodes.iter().map(Node::subnet).collect()
    }

    /// When each record was made, by its key.
    fn records(&self) -> Vec<(String, Revision)> {
        let records = KeyRange::prefix(Layout::default().subnets());
        let records = self.store.entries(&records).into_iter();
        records.map(|entry| (entry.key, entry.created)).collect()
    }

    async fn outage(&self, cut: Cut) {
        for node in &self.nodes {
            node.link.cut(cut);
        }
        tokio::time::sleep(OUTAGE).await;
        for node in &self.nodes {
            assert!(!node.overlay.status().is_true(ConditionType::Store));
            node.link.heal();
        }
    }

    /// Waits until every node holds its lease by the store's word and hears of the others.
    async fn is_whole(&self) {
        for node in &self.nodes {
            until(MINUTE * 5, "the store is back", || {
                let status = node.overlay.status();
                [
                    ConditionType::Store,
                    ConditionType::Lease,
                    ConditionType::Peers,
                ]
                .iter()
                .all(|kind| status.is_true(*kind))
                    && status.peers == 2
            })
            .await;
            settle(&node.overlay).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn ten_minutes_down_withdraw_no_route_and_renewal_resumes() {
    for cut in [Cut::Fail, Cut::Hang] {
        // A renewal is due after 10 minutes: in the outage, which begins after 5.
        let mut world = World::new(MINUTE * 20).await;
        let (kernels, subnets, records) = (world.kernels(), world.subnets(), world.records());
        tokio::time::sleep(MINUTE * 5).await;
        world.outage(cut).await;
        assert_eq!(world.kernels(), kernels, "{cut:?}");
        world.is_whole().await;
        tokio::time::sleep(MINUTE * 60).await;
        assert_eq!(
            world.records(),
            records,
            "{cut:?}: the very records are renewed"
        );
        assert_eq!(world.subnets(), subnets);
        for node in &mut world.nodes {
            assert_eq!(node.kernel.take_log(), [], "{cut:?}: no step in any kernel");
            let events = node.events();
            let renewals = events
                .iter()
                .filter(|event| **event == OverlayEvent::LeaseRenewed);
            assert!(renewals.count() >= 4, "{cut:?}: {events:?}");
            let is_lost = |event: &OverlayEvent| matches!(event, OverlayEvent::LeaseLost { .. });
            assert!(!events.iter().any(is_lost), "{cut:?}: {events:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn leases_of_two_minutes_that_end_in_ten_minutes_down_are_had_again_and_no_route_goes() {
    for cut in [Cut::Fail, Cut::Hang] {
        let mut world = World::new(MINUTE * 2).await;
        let (kernels, subnets, records) = (world.kernels(), world.subnets(), world.records());
        world.outage(cut).await;
        assert_eq!(world.records(), [], "the leases have ended");
        assert_eq!(world.kernels(), kernels, "{cut:?}");
        world.is_whole().await;
        assert_eq!(
            world.subnets(),
            subnets,
            "{cut:?}: they are free, so they are had again"
        );
        let again = world.records();
        assert!(
            again.iter().all(|record| !records.contains(record)),
            "{cut:?}: a record that is gone is not revived"
        );
        tokio::time::sleep(MINUTE * 10).await;
        assert_eq!(world.records(), again, "{cut:?}: and renewed from then on");
        for node in &mut world.nodes {
            assert_eq!(node.kernel.take_log(), [], "{cut:?}: no step in any kernel");
            let events = node.events();
            let losses = events
                .iter()
                .filter(|event| matches!(event, OverlayEvent::LeaseLost { .. }));
            assert_eq!(losses.count(), 1, "{cut:?}: {events:?}");
        }
    }
}
