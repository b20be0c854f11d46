//! Pods on nodes that have their leases on a real API server, while that fails and while a thousand
//! other nodes come and go: not a packet is lost.
#![allow(missing_docs, reason = "tests")]

use std::sync::Arc;
use std::time::Duration;

use flannel_core::{DualStack, Status};
use flannel_e2e::{Bed, DUAL, Setup, alone, both_families, no_loss, until, within};
use flannel_subnet_kube::{Access, AnnotationPrefix, ConfigSource, KubeManager, KubeOptions};
use flannel_testkit::servers::{KubeApiServer, TcpSwitch};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

/// A cluster whose nodes reach their API server, each with a client of its own, through a switch.
async fn on_kube(test: &str) -> Option<Bed<KubeApiServer>> {
    if !KubeApiServer::require(test) {
        return None;
    }
    let server = KubeApiServer::start().expect("a server");
    for n in 1..=2 {
        let cidrs = [format!("10.42.{n}.0/24"), format!("fd00:42:0:{n}::/64")];
        let cidrs = cidrs.each_ref().map(String::as_str);
        server.add_node(&format!("node-{n}"), &cidrs).expect("made");
    }
    let switch = TcpSwitch::new(server.address()).await.expect("a port");
    let token = server.folder().join("token");
    std::fs::write(&token, server.admin_token()).expect("written");
    let url = format!("https://{}", switch.address());
    let access = Access::token(url, server.ca(), token);
    let config = ConfigSource::Text(DUAL.to_owned());
    let options = KubeOptions::new(access, config, AnnotationPrefix::default());
    let options = options.probe_every(Duration::from_secs(1));
    let setup = Setup {
        tune: Arc::new(move |builder| {
            let manager = KubeManager::new(options.clone());
            builder.manager(manager.expect("sound settings"))
        }),
        ..Setup::new(2, DUAL)
    };
    Bed::start(test, setup, server, switch).await
}

/// A node that is nothing but its record is heard of by all, and its end.
async fn hear_of_another(bed: &Bed<KubeApiServer>, server: &KubeApiServer) {
    add_record(server, "another", 200, 1);
    bed.all("another node is heard of", |status| status.peers == 2)
        .await;
    server.remove_node("another").expect("removed");
    bed.all("its end is heard of", |status| status.peers == 1)
        .await;
}

/// The annotations of a node with this VTEP.
fn annotations(mac: u32) -> Value {
    let [_, a, b, c] = mac.to_be_bytes();
    let data = format!("{{\"VNI\":1,\"VtepMAC\":\"02:00:00:{a:02x}:{b:02x}:{c:02x}\"}}");
    let prefix = "flannel.alpha.coreos.com";
    json!({
        format!("{prefix}/kube-subnet-manager"): "true",
        format!("{prefix}/backend-type"): "vxlan",
        format!("{prefix}/backend-data"): data,
        format!("{prefix}/public-ip"): format!("198.18.{b}.{c}"),
    })
}

/// Makes a Node of a node that does not exist.
fn add_record(server: &KubeApiServer, name: &str, subnet: u8, mac: u32) {
    let cidr = format!("10.42.{subnet}.0/24");
    let node = json!({
        "metadata": {"name": name, "annotations": annotations(mac)},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
    });
    server.create("/api/v1/nodes", &node).expect("made");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_killed_for_a_minute_loses_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = on_kube("kube-killed").await else {
        return;
    };
    bed.unharmed("kill -9 for a minute", async |bed| {
        bed.store.kill();
        let minute = tokio::time::sleep(Duration::from_secs(60));
        bed.noticed().await;
        minute.await;
        bed.store.restart().expect("it starts again");
        bed.healed().await;
    })
    .await;
    hear_of_another(&bed, &bed.store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_to_another_api_server_loses_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = on_kube("kube-failover").await else {
        return;
    };
    let second = KubeApiServer::beside(&bed.store).expect("another server");
    bed.unharmed("failover", async |bed| {
        bed.switch.turn(Some(second.address()));
        bed.store.kill();
        bed.healed().await;
        bed.store.restart().expect("it starts again");
        bed.switch.turn(Some(bed.store.address()));
        bed.healed().await;
        bed.store.freeze();
        bed.noticed().await;
        bed.switch.turn(Some(second.address()));
        bed.healed().await;
    })
    .await;
    hear_of_another(&bed, &second).await;
    bed.store.thaw();
}

/// How many nodes come and go.
const CROWD: u32 = 1000;

/// Makes Nodes come, change and go, from several threads at once.
fn churn(server: &KubeApiServer) {
    std::thread::scope(|scope| {
        for lane in 0..8 {
            scope.spawn(move || {
                for n in (0..CROWD).filter(|n| n % 8 == lane) {
                    // Many have one subnet, of which the oldest has it.
                    let subnet = 10 + u8::try_from(n % 200).unwrap_or_default();
                    let name = format!("crowd-{n}");
                    add_record(server, &name, subnet, n + 1);
                    let path = format!("/api/v1/nodes/{name}");
                    let patch = json!({"metadata": {"annotations": annotations(n + 5000)}});
                    server.merge(&path, &patch).expect("changed");
                    if n % 3 == 0 {
                        server.remove_node(&name).expect("removed");
                    }
                }
            });
        }
    });
    std::thread::scope(|scope| {
        for lane in 0..8 {
            scope.spawn(move || {
                for n in (0..CROWD).filter(|n| n % 8 == lane && n % 3 != 0) {
                    let name = format!("crowd-{n}");
                    server.remove_node(&name).expect("removed");
                }
            });
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_nodes_that_come_and_go_lose_no_packet_of_two_others() {
    let _alone = alone().await;
    let Some(bed) = on_kube("kube-churn").await else {
        return;
    };
    let pods = bed.cluster.pods.clone();
    let mut before = Vec::new();
    for node in &bed.cluster.nodes {
        before.push(node.ours().await);
    }
    no_loss("churn", &both_families(&pods), async || {
        tokio::task::block_in_place(|| churn(&bed.store));
        bed.all("all are gone", |status| status.peers == 1).await;
    })
    .await;
    for (node, before) in bed.cluster.nodes.iter().zip(before) {
        node.converged().await;
        assert_eq!(node.ours().await, before, "something is left of them");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_made_again_with_another_pod_cidr_and_spoilt_annotations_comes_back() {
    let _alone = alone().await;
    let Some(bed) = on_kube("kube-again").await else {
        return;
    };
    let key = "flannel.alpha.coreos.com/public-ip";
    let path = "/api/v1/nodes/node-2";
    for spoilt in [json!("198.18.0.1"), json!("nowhere"), Value::Null] {
        let patch = json!({"metadata": {"annotations": {key: spoilt}}});
        bed.store.merge(path, &patch).expect("changed");
        let restored = async || {
            let node = bed.store.node("node-2").expect("an answer");
            let node = node.expect("the Node is there");
            let ip = bed.cluster.nodes[1].host.ips.v4.expect("both families");
            node["metadata"]["annotations"][key] == json!(ip.to_string())
        };
        until("the address is restored", SOON, restored).await;
        bed.cluster.reachable_within("after it", SOON).await;
    }

    bed.store.remove_node("node-2").expect("removed");
    let cidrs = ["10.42.99.0/24", "fd00:42:0:99::/64"];
    bed.store.add_node("node-2", &cidrs).expect("made");
    let subnets = cidrs.map(|cidr| cidr.parse().expect("a subnet"));
    let moved = DualStack::of_subnets(subnets);
    let node = &bed.cluster.nodes[1];
    let has = |status: &Status| status.lease.as_ref().is_some_and(|it| it.subnet == moved);
    let status = node.overlay().wait_for(has);
    within("the node has its new subnets", SOON, status)
        .await
        .expect("running");
    // A node's own address in its subnet is that of its overlay device.
    let mut host = node.host.clone();
    for subnet in moved.values() {
        host.ips.set_ip(subnet.address());
    }
    let both = [bed.cluster.pods[0].clone(), host];
    until("the new subnets are reached", SOON, async || {
        let pings = flannel_testkit::prober::ping_matrix(&both, Duration::from_secs(1));
        pings.iter().all(|ping| ping.result.is_ok())
    })
    .await;
}
