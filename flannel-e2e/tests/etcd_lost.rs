//! Pods on four nodes while the etcd that they share loses what it knew: records, config, all of it.
//! Not a packet is lost, not a step is taken in any kernel, and every node is in the store again.
#![allow(missing_docs, reason = "tests")]

#[path = "etcd/bed.rs"]
mod bed;

use std::time::Duration;

use bed::{CONFIG, SOON, Store, nodes_on_etcd};
use etcd_client::{DeleteOptions, GetOptions};
use flannel_core::{ConditionType, Status};
use flannel_e2e::{Bed, DUAL, alone, until};

const NODES: usize = 4;
const NETWORK: &str = "/coreos.com/network";
const SUBNETS: &str = "/coreos.com/network/subnets/";

/// Longer than a withdrawal that is doubted waits for its second reading.
const GRACE: Duration = Duration::from_secs(13);

/// How many records there are.
async fn records(bed: &Bed<Store>) -> i64 {
    let counted = GetOptions::new().with_prefix().with_count_only();
    let mut client = bed.store.client.clone();
    match client.get(SUBNETS, Some(counted)).await {
        Ok(found) => found.count(),
        Err(_) => -1,
    }
}

/// Waits until every node is in the store again, and none doubts anything.
async fn recovered(bed: &Bed<Store>) {
    let all = i64::try_from(NODES).expect("few");
    until("every node has its record again", SOON, async || {
        records(bed).await == all
    })
    .await;
    let is = |status: &Status| {
        let peers = status.is_true(ConditionType::Peers) && status.peers + 1 == NODES;
        peers && status.is_true(ConditionType::Lease) && status.is_true(ConditionType::Store)
    };
    bed.all("nobody doubts anything", is).await;
}

async fn delete_all(bed: &mut Bed<Store>, prefix: &str) {
    let all = Some(DeleteOptions::new().with_prefix());
    bed.store
        .client
        .delete(prefix, all)
        .await
        .expect("an answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_are_deleted_all_at_once_lose_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = nodes_on_etcd("etcd-emptied", NODES).await else {
        return;
    };
    bed.unharmed("del --prefix of all records", async |bed| {
        delete_all(bed, SUBNETS).await;
        recovered(bed).await;
        // With markers and config, and these come back.
        delete_all(bed, NETWORK).await;
        bed.store
            .client
            .put(CONFIG, DUAL, None)
            .await
            .expect("an answer");
        recovered(bed).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_comes_back_empty_and_gets_its_config_back_loses_no_packet() {
    let _alone = alone().await;
    let Some(mut bed) = nodes_on_etcd("etcd-wiped", NODES).await else {
        return;
    };
    bed.unharmed("an empty etcd", async |bed| {
        bed.store.etcd.restart_empty().expect("it starts again");
        let is = |status: &Status| {
            let peers = status.condition(ConditionType::Peers);
            peers.is_some_and(|peers| peers.reason == "StoreUnconfigured")
        };
        bed.all("it is told that the store makes no statement", is)
            .await;
        // However long that lasts.
        tokio::time::sleep(2 * GRACE).await;
        bed.store
            .client
            .put(CONFIG, DUAL, None)
            .await
            .expect("an answer");
        recovered(bed).await;
        tokio::time::sleep(GRACE).await;
    })
    .await;
}
