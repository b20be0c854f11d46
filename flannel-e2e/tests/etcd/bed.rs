//! Nodes that share a pool through a real etcd.
#![allow(dead_code, unreachable_pub, reason = "shared by several test files")]

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, TlsOptions};
use flannel_core::{ConditionType, Family, OverlayEvent, Status};
use flannel_e2e::{Cluster, DUAL, Path, Setup, no_loss, within};
use flannel_subnet_etcd::{EtcdManager, EtcdOptions};
use flannel_testkit::netns::Host;
use flannel_testkit::servers::{Etcd, EtcdOptions as ServerOptions, TcpSwitch};
use tokio::sync::{Mutex, MutexGuard, broadcast};

pub const SOON: Duration = Duration::from_secs(30);
pub const CONFIG: &str = "/coreos.com/network/config";

/// One at a time: packets are counted, and every millisecond one goes.
pub async fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::const_new(());
    ONE.lock().await
}

/// A cluster whose nodes reach their etcd, each with a client of its own, through a switch.
pub struct Bed {
    pub cluster: Cluster,
    pub etcd: Etcd,
    pub client: Client,
    pub switch: TcpSwitch,
    pub events: Vec<broadcast::Receiver<OverlayEvent>>,
}

impl Bed {
    pub async fn new(test: &str) -> Option<Self> {
        Self::with(test, ServerOptions::default(), None, |options| options).await
    }

    /// On a server of its own kind, whose clients need what `tls` says, with nodes whose settings are
    /// tuned.
    pub async fn with(
        test: &str,
        server: ServerOptions,
        tls: Option<TlsOptions>,
        tune: impl Fn(EtcdOptions) -> EtcdOptions + Send + Sync + 'static,
    ) -> Option<Self> {
        if !server.version.require(test) {
            return None;
        }
        let etcd = Etcd::with(server).expect("etcd starts");
        let options = tls.map(|tls| ConnectOptions::new().with_tls(tls));
        let client = Client::connect([etcd.endpoint()], options).await;
        let mut client = client.expect("a client");
        client.put(CONFIG, DUAL, None).await.expect("an answer");
        let switch = TcpSwitch::new(etcd.address()).await.expect("a port");
        let endpoint = etcd.endpoint();
        let (scheme, _) = endpoint.split_once("://").expect("an address");
        let endpoint = format!("{scheme}://{}", switch.address());
        let setup = Setup {
            tune: Arc::new(move |builder| {
                let options = EtcdOptions::new([&endpoint]).expect("an endpoint");
                builder.manager(EtcdManager::new(tune(options)).expect("sound settings"))
            }),
            ..Setup::new(2, DUAL)
        };
        let cluster = Cluster::start(test, setup).await?;
        cluster.assert_reachable("before");
        let events = cluster.nodes.iter().map(|node| node.overlay().events());
        Some(Self {
            events: events.collect(),
            cluster,
            etcd,
            client,
            switch,
        })
    }

    pub async fn all(&self, what: &str, is: impl Fn(&Status) -> bool + Copy) {
        for node in &self.cluster.nodes {
            let status = node.overlay().wait_for(is);
            within(what, SOON, status).await.expect("running");
        }
    }

    pub async fn noticed(&self) {
        let is = |status: &Status| !status.is_true(ConditionType::Store);
        self.all("the fault is noticed", is).await;
    }

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
        no_loss(what, &paths(&pods), async || during(self).await).await;
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
        // New peers are heard of again.
        self.cluster.settle().await;
    }
}

/// Between the pods, in both families.
fn paths(pods: &[Host]) -> [Path<'_>; 2] {
    Family::ALL.map(|family| (&pods[0], &pods[1], family))
}
