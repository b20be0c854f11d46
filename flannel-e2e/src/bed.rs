//! A cluster on a store behind a switch, so that the store can fail while packets run.

use std::time::Duration;

use flannel_core::{ConditionType, Family, OverlayEvent, Status};
use flannel_testkit::netns::Host;
use flannel_testkit::servers::TcpSwitch;
use tokio::sync::{Mutex, MutexGuard, broadcast};

use crate::{Cluster, Path, Setup, no_loss, within};

/// How long the nodes of a bed may take for anything.
const SOON: Duration = Duration::from_secs(60);

/// Two nodes whose leases are in a real store, and packets between their pods.
#[derive(Debug)]
pub struct Bed<S> {
    /// The nodes.
    pub cluster: Cluster,
    /// The store.
    pub store: S,
    /// What the nodes reach it through.
    pub switch: TcpSwitch,
    /// What each node tells.
    pub events: Vec<broadcast::Receiver<OverlayEvent>>,
}

/// One at a time: packets are counted, and every millisecond one goes.
pub async fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::const_new(());
    ONE.lock().await
}

/// Between two pods, in both families.
pub fn both_families(pods: &[Host]) -> [Path<'_>; 2] {
    Family::ALL.map(|family| (&pods[0], &pods[1], family))
}

impl<S: Send + Sync> Bed<S> {
    /// Starts nodes that reach the store through the switch; `None` if the test cannot run, which
    /// has been said.
    pub async fn start(test: &str, setup: Setup, store: S, switch: TcpSwitch) -> Option<Self> {
        let cluster = Cluster::start(test, setup).await?;
        cluster.assert_reachable("before");
        let events = cluster.nodes.iter().map(|node| node.overlay().events());
        Some(Self {
            events: events.collect(),
            cluster,
            store,
            switch,
        })
    }

    /// Waits until every node's status is so.
    pub async fn all(&self, what: &str, is: impl Fn(&Status) -> bool + Copy + Send + Sync) {
        for node in &self.cluster.nodes {
            let status = node.overlay().wait_for(is);
            within(what, SOON, status).await.expect("running");
        }
    }

    /// Waits until every node says that something is wrong with the store.
    pub async fn noticed(&self) {
        let is = |status: &Status| !status.is_true(ConditionType::Store);
        self.all("the fault is noticed", is).await;
    }

    /// Waits until every node says that the store is well.
    pub async fn healed(&self) {
        let is = |status: &Status| status.is_true(ConditionType::Store);
        self.all("the store is back", is).await;
    }

    /// Does something while packets run: none is lost, and no step is taken in any kernel.
    pub async fn unharmed(&mut self, what: &str, mut during: impl AsyncFnMut(&mut Self)) {
        let pods = self.cluster.pods.clone();
        let mut before = Vec::new();
        for node in &self.cluster.nodes {
            before.push(node.ours().await);
        }
        let paths = both_families(&pods);
        no_loss(what, &paths, async || during(self).await).await;
        for (node, before) in self.cluster.nodes.iter().zip(before) {
            node.converged().await;
            assert_eq!(node.ours().await, before, "{what}");
        }
        for events in &mut self.events {
            while let Ok(event) = events.try_recv() {
                let is_step = matches!(event, OverlayEvent::Step { .. });
                assert!(!is_step, "{what}: {event:?}");
            }
        }
        self.cluster.settle().await;
    }
}
