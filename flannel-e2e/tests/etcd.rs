//! Pods on nodes that share a pool through a real etcd, while etcd fails: not a packet is lost, not
//! a route is withdrawn.
#![allow(missing_docs, reason = "tests")]

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, CompactionOptions, PutOptions};
use flannel_core::{ConditionType, Family, OverlayEvent, Status};
use flannel_e2e::{Cluster, DUAL, Path, Setup, no_loss, within};
use flannel_subnet_etcd::{EtcdManager, EtcdOptions};
use flannel_testkit::netns::Host;
use flannel_testkit::require_tool;
use flannel_testkit::servers::{Etcd, TcpSwitch};
use tokio::sync::{Mutex, MutexGuard, broadcast};

const SOON: Duration = Duration::from_secs(30);
const CONFIG: &str = "/coreos.com/network/config";

/// One at a time: packets are counted, and every millisecond one goes.
async fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::const_new(());
    ONE.lock().await
}

/// A cluster whose nodes reach their etcd, each with a client of its own, through a switch.
struct Bed {
    cluster: Cluster,
    etcd: Etcd,
    client: Client,
    switch: TcpSwitch,
    events: Vec<broadcast::Receiver<OverlayEvent>>,
}

impl Bed {
    async fn new(test: &str) -> Option<Self> {
        if !require_tool(test, "etcd") {
            return None;
        }
        let etcd = Etcd::start().expect("etcd starts");
        let mut client = Client::connect([etcd.endpoint()], None)
            .await
            .expect("a client");
        client.put(CONFIG, DUAL, None).await.expect("an answer");
        let switch = TcpSwitch::new(etcd.address()).await.expect("a port");
        let endpoint = format!("http://{}", switch.address());
        let setup = Setup {
            tune: Arc::new(move |builder| {
                let options = EtcdOptions::new([&endpoint]).expect("an endpoint");
                builder.manager(EtcdManager::new(options).expect("sound settings"))
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

    async fn all(&self, what: &str, is: impl Fn(&Status) -> bool + Copy) {
        for node in &self.cluster.nodes {
            let status = node.overlay().wait_for(is);
            within(what, SOON, status).await.expect("running");
        }
    }

    async fn noticed(&self) {
        let is = |status: &Status| !status.is_true(ConditionType::Store);
        self.all("the fault is noticed", is).await;
    }

    async fn healed(&self) {
        let is = |status: &Status| status.is_true(ConditionType::Store);
        self.all("the store is back", is).await;
    }

    /// Does something while packets run: none is lost, and no step is taken in any kernel.
    async fn unharmed(&mut self, what: &str, mut during: impl AsyncFnMut(&mut Self)) {
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

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_killed_and_comes_back_loses_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = Bed::new("etcd-killed").await else {
        return;
    };
    bed.unharmed("kill -9", async |bed| {
        bed.etcd.kill();
        bed.noticed().await;
        bed.etcd.restart().expect("it starts again");
        bed.healed().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_frozen_for_30_s_loses_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = Bed::new("etcd-frozen").await else {
        return;
    };
    bed.unharmed("SIGSTOP", async |bed| {
        bed.etcd.freeze();
        let frozen = tokio::time::sleep(Duration::from_secs(30));
        bed.noticed().await;
        frozen.await;
        bed.etcd.thaw();
        bed.healed().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compaction_while_the_nodes_are_cut_off_loses_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = Bed::new("etcd-compacted").await else {
        return;
    };
    bed.unharmed("compaction", async |bed| {
        bed.switch.turn(None);
        bed.noticed().await;
        for n in 0..20 {
            bed.client
                .put(format!("/other/{n}"), "x", None)
                .await
                .expect("an answer");
        }
        let config = bed
            .client
            .put(CONFIG, DUAL, Some(PutOptions::new().with_prev_key()))
            .await;
        let header = config.expect("an answer");
        let revision = header.header().expect("a header").revision();
        let physical = Some(CompactionOptions::new().with_physical());
        bed.client
            .compact(revision, physical)
            .await
            .expect("an answer");
        bed.switch.turn(Some(bed.etcd.address()));
        bed.healed().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_that_are_taken_away_and_given_back_lose_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = Bed::new("etcd-denied").await else {
        return;
    };
    bed.client
        .user_add("root", "rootpw", None)
        .await
        .expect("an answer");
    bed.client.role_add("root").await.expect("an answer");
    bed.client
        .user_grant_role("root", "root")
        .await
        .expect("an answer");
    bed.unharmed("permission denied", async |bed| {
        bed.client.auth_enable().await.expect("an answer");
        // A watch that is open stays so; what is broken comes back as a stranger.
        bed.switch.interrupt();
        bed.noticed().await;
        let root = etcd_client::ConnectOptions::new().with_user("root", "rootpw");
        let root = Client::connect([bed.etcd.endpoint()], Some(root)).await;
        root.expect("root may")
            .auth_disable()
            .await
            .expect("an answer");
        bed.healed().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_that_changes_in_etcd_is_applied() {
    let _alone = alone().await;
    let Some(mut bed) = Bed::new("etcd-config").await else {
        return;
    };
    let other = DUAL.replace("\"vxlan\"", "\"vxlan\", \"VNI\": 7");
    bed.client
        .put(CONFIG, other, None)
        .await
        .expect("an answer");
    for node in &bed.cluster.nodes {
        flannel_e2e::until("the device of VNI 7", SOON, async || {
            let objects = node.objects().await;
            objects
                .keys()
                .any(|key| key.to_string().contains("flannel.7"))
        })
        .await;
    }
    bed.cluster.reachable_within("after the change", SOON).await;
}
