//! Pods on nodes that share a pool through a real etcd in which somebody writes: the config, a record
//! of ours, a subnet of ours.
#![allow(missing_docs, reason = "tests")]

#[path = "etcd/bed.rs"]
mod bed;

use std::time::Duration;

use bed::{CONFIG, SOON, Store, on_etcd};
use etcd_client::PutOptions;
use flannel_core::{Condition, ConditionStatus, ConditionType, OverlayEvent, Status};
use flannel_e2e::{Bed, DUAL, Node, alone, within};

#[tokio::test(flavor = "multi_thread")]
async fn a_config_that_changes_in_etcd_is_applied() {
    let _alone = alone().await;
    let Some(mut bed) = on_etcd("etcd-config").await else {
        return;
    };
    let other = DUAL.replace("\"vxlan\"", "\"vxlan\", \"VNI\": 7");
    bed.store
        .client
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

fn config_condition(status: &Status) -> Condition {
    let condition = status.condition(ConditionType::Config);
    condition.expect("it is there").clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_that_cannot_be_used_loses_no_packet_and_is_told() {
    let _alone = alone().await;
    let Some(mut bed) = on_etcd("etcd-config-bad").await else {
        return;
    };
    let elsewhere = DUAL.replace("10.42.", "10.99.");
    let unusable = [
        ("{".to_owned(), "Unreadable"),
        (elsewhere.replace("vxlan", "extension"), "UnknownBackend"),
        // Half of it could be used.
        (
            elsewhere.replace("\"vxlan\"", "\"vxlan\", \"VNI\": 16777216"),
            "InvalidConfig",
        ),
    ];
    assert!(unusable.iter().all(|(text, _)| text != DUAL));
    bed.unharmed("unusable configs", async |bed| {
        for (text, reason) in &unusable {
            let put = bed.store.client.put(CONFIG, text.as_str(), None).await;
            put.expect("an answer");
            bed.all(reason, |status| config_condition(status).reason == *reason)
                .await;
            for node in &bed.cluster.nodes {
                let condition = config_condition(&node.overlay().status());
                assert_eq!(condition.status, ConditionStatus::False);
                let says = condition.message.contains("a restart would");
                assert!(says, "{condition:?}");
            }
        }
        bed.store
            .client
            .put(CONFIG, DUAL, None)
            .await
            .expect("an answer");
        bed.all("the old one is back", |status| {
            status.is_true(ConditionType::Config)
        })
        .await;
    })
    .await;
}

/// The key of a node's record.
fn record(node: &Node) -> String {
    let status = node.overlay().status();
    let lease = status.lease.as_ref().expect("a lease");
    lease.key.to_string()
}

/// Waits until a node has lost its lease and has one again; which subnets that has is told.
async fn loses_and_gets(
    bed: &mut Bed<Store>,
    n: usize,
) -> flannel_core::DualStack<flannel_core::Subnet> {
    let events = &mut bed.events[n];
    let lost = async {
        while !matches!(
            events.recv().await.expect("more"),
            OverlayEvent::LeaseLost { .. }
        ) {}
    };
    within("the event", Duration::from_secs(5), lost).await;
    let got = async {
        loop {
            if let OverlayEvent::LeaseAcquired { subnet } = events.recv().await.expect("more") {
                return subnet;
            }
        }
    };
    within("a lease again", SOON, got).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_is_deleted_by_hand_is_told_and_asked_for_again() {
    let _alone = alone().await;
    let Some(mut bed) = on_etcd("etcd-deleted").await else {
        return;
    };
    let key = record(&bed.cluster.nodes[0]);
    bed.store.client.delete(key, None).await.expect("an answer");
    let again = loses_and_gets(&mut bed, 0).await;
    assert_eq!(again, bed.cluster.nodes[0].subnets, "it was free");
    bed.cluster.settle().await;
    bed.cluster.reachable_within("afterwards", SOON).await;
}

/// Go flannel asks nobody, and it never gives way.
#[tokio::test(flavor = "multi_thread")]
async fn go_flannel_that_takes_a_subnet_of_ours_has_it_within_5_s_and_we_move() {
    let _alone = alone().await;
    let Some(mut bed) = on_etcd("etcd-go").await else {
        return;
    };
    let subnets = bed.cluster.nodes[0].subnets;
    let v4 = subnets.v4.expect("an IPv4 subnet");
    // A key of its own that covers ours: another IPv6 half.
    let taken = format!(
        "/coreos.com/network/subnets/{}-{}&fd00:42:0:ffee::-64",
        v4.address(),
        v4.len()
    );
    let data = r#"{"VNI":1,"VtepMAC":"0e:00:00:00:00:77"}"#;
    let value = format!(
        r#"{{"PublicIP":"198.51.100.7","PublicIPv6":"2001:db8:7::7","BackendType":"vxlan","BackendData":{data},"BackendV6Data":{data}}}"#
    );
    let client = &mut bed.store.client;
    let lease = client.lease_grant(3600, None).await.expect("an answer");
    let options = PutOptions::new().with_lease(lease.id());
    let put = client
        .put(taken.as_str(), value.as_str(), Some(options))
        .await;
    put.expect("an answer");
    let moved = loses_and_gets(&mut bed, 0).await;
    assert_ne!(moved.v4, Some(v4));
    let theirs = bed
        .store
        .client
        .get(taken.as_str(), None)
        .await
        .expect("an answer");
    assert_eq!(
        theirs.kvs()[0].value(),
        value.as_bytes(),
        "theirs stands as it was written"
    );
    let overlay = bed.cluster.nodes[0].overlay();
    let follows = overlay.wait_for(|status| {
        let lease = status.lease.as_ref();
        status.is_true(ConditionType::Kernel) && lease.is_some_and(|lease| lease.subnet == moved)
    });
    within("the node moves", SOON, follows)
        .await
        .expect("running");
}
