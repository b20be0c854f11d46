//! Machines behind node ids on a real etcd, while packets run: one that was renamed, two of one name.
#![allow(missing_docs, reason = "tests")]

#[path = "etcd/bed.rs"]
mod bed;

use std::time::Duration;

use bed::{SOON, Store, nodes_on_etcd};
use etcd_client::GetOptions;
use flannel_core::{ConditionType, Error, NodeId, PublicIp, wire};
use flannel_e2e::{Bed, alone, within};
use tokio::time::Instant;

const SUBNETS: &str = "/coreos.com/network/subnets/";

/// The node ids of all records, and the addresses in them.
async fn records(bed: &Bed<Store>) -> Vec<(String, PublicIp)> {
    let mut client = bed.store.client.clone();
    let all = GetOptions::new().with_prefix();
    let found = client.get(SUBNETS, Some(all)).await.expect("an answer");
    let mut records: Vec<_> = found
        .kvs()
        .iter()
        .map(|entry| {
            let record = wire::parse_lease_value(entry.value()).expect("a record");
            let node = record.node_id().expect("a node");
            (node.to_string(), record.attrs.public_ip)
        })
        .collect();
    records.sort_by(|a, b| a.0.cmp(&b.0));
    records
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_renamed_loses_no_packet_and_no_subnet() {
    let _alone = alone().await;
    let Some(mut bed) = nodes_on_etcd("etcd-renamed", 2).await else {
        return;
    };
    let subnets = bed.cluster.nodes[1].subnets;
    let addresses: Vec<_> = records(&bed).await.into_iter().map(|r| r.1).collect();
    let mut names = ["web.example.org", "web", "web.example.net"].into_iter();
    bed.unharmed("another name", async |bed| {
        let overlay = bed.cluster.nodes[1].take_overlay();
        overlay.stop().await.expect("running");
        // Its instance went with the process, so it asks for whoever has its address and MAC.
        let name = names.next().expect("few tries");
        bed.cluster.nodes[1].id = NodeId::new(name).expect("a node id");
        bed.cluster.restart(1).await;
        bed.cluster.settle().await;
    })
    .await;
    let node = &bed.cluster.nodes[1];
    let status = node.overlay().status();
    assert!(status.is_true(ConditionType::Lease), "{status:?}");
    assert_eq!(status.lease.as_ref().map(|l| l.subnet), Some(subnets));
    let names = ["node-1", node.id.as_str()].map(str::to_owned);
    let expected: Vec<_> = names.into_iter().zip(addresses).collect();
    assert_eq!(records(&bed).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_machine_of_a_name_is_refused_and_costs_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = nodes_on_etcd("etcd-twins", 3).await else {
        return;
    };
    // The third machine goes, and comes back under the name of the first.
    let mut third = bed.cluster.nodes.pop().expect("three");
    bed.cluster.pods.pop();
    let overlay = third.take_overlay();
    overlay.drain(Duration::ZERO).await.expect("all is removed");
    bed.all("the third is gone", |status| status.peers == 1)
        .await;
    bed.cluster.settle().await;
    let events = bed.cluster.nodes.iter();
    bed.events = events.map(|node| node.overlay().events()).collect();
    let before = records(&bed).await;
    let (id, ips) = {
        let first = &bed.cluster.nodes[0];
        (first.id.clone(), first.host.ips)
    };
    let ip = ips.v4.expect("both families").to_string();
    bed.unharmed("a second machine of the name", async |bed| {
        let twin = bed.cluster.builder(2, &id, &third.host, &third.paths);
        let twin = twin.start().await.expect("all parts");
        let asked = Instant::now();
        let refused = within("it is answered", SOON, twin.ready()).await;
        assert!(asked.elapsed() < Duration::from_secs(10), "nobody answers");
        assert!(
            matches!(&refused, Err(Error::NotReady(condition))
                if condition.reason == "NodeIdHeld" && condition.message.contains(&ip)),
            "{refused:?}"
        );
        twin.stop().await.expect("running");
    })
    .await;
    assert_eq!(records(&bed).await, before);
}
