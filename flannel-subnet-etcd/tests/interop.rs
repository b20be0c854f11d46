//! Byte for byte as Go flannel reads and writes it, on a real etcd.

mod common;

use std::time::Duration;

use common::{
    CONFIG, DUAL_CONFIG, SOON, acquire, begun, hand, manager, options, put, request, server,
    subnet, until,
};
use etcd_client::{Client, GetOptions, PutOptions};
use flannel_core::manager::Error;
use flannel_core::{DualStack, Event, LeaseRequest, Manager, NodeId, PublicIp};
use flannel_testkit::servers::EtcdVersion;
use tokio::time::timeout;

common::on_each_etcd! {
    a_record_is_go_flannels_with_one_member_more
    a_dual_stack_record_has_go_flannels_key
    go_flannels_record_of_our_address_is_taken_over_and_given_its_full_time
    go_flannels_other_records_are_peers_and_taken
    a_reservation_stays_one
    a_prefix_is_cleaned_as_go_flannel_cleans_it
    a_missing_config_and_a_bad_one_are_told_apart
    a_network_of_ipv6_alone_is_refused_in_words
    a_dual_stack_record_beside_single_stack_go_nodes_needs_leave
    we_give_way_to_go_flannel_within_5_s
    strange_keys_beside_the_leases_are_reported_and_harm_nobody
}

const SUBNETS: &str = "/coreos.com/network/subnets/";

/// What Go flannel with VXLAN writes for 192.0.2.77.
const GOS: &str = r#"{"PublicIP":"192.0.2.77","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:77"}}"#;

/// Everything under a text, as key, value and time to live.
async fn everything(client: &mut Client, prefix: &str) -> Vec<(String, String, Option<i64>)> {
    let options = GetOptions::new().with_prefix();
    let got = client.get(prefix, Some(options)).await.expect("an answer");
    let mut found = Vec::new();
    for kv in got.kvs() {
        let ttl = match kv.lease() {
            0 => None,
            lease => {
                let answer = client.lease_time_to_live(lease, None).await;
                Some(answer.expect("an answer").granted_ttl())
            }
        };
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        found.push((text(kv.key()), text(kv.value()), ttl));
    }
    found
}

fn dual(mut request: LeaseRequest, v6: &str) -> LeaseRequest {
    let v6 = v6.parse().expect("an address");
    request.attrs.public_ip = PublicIp::new(request.attrs.public_ip.v4, Some(v6));
    request.attrs.backend_data.v6 = request.attrs.backend_data.v4.clone();
    request
}

async fn a_record_is_go_flannels_with_one_member_more(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    let ours = manager(options(etcd.endpoint()));
    let mut wants = request("worker-1", 1);
    wants.previous = DualStack::v4(subnet("10.5.52.0/24"));
    acquire(&ours, &wants).await;
    let record = (
        format!("{SUBNETS}10.5.52.0-24"),
        concat!(
            r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","#,
            r#""BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"NodeID":"worker-1"}"#
        )
        .to_owned(),
        Some(86_400),
    );
    // Nothing else stands where Go flannel looks.
    assert_eq!(
        everything(&mut client, "/coreos.com/network/subnets").await,
        std::slice::from_ref(&record)
    );
    // The markers live and die with the record.
    let lease = client
        .get(record.0.as_str(), None)
        .await
        .expect("an answer")
        .kvs()[0]
        .lease();
    let answer = client
        .lease_time_to_live(
            lease,
            Some(etcd_client::LeaseTimeToLiveOptions::new().with_keys()),
        )
        .await
        .expect("an answer");
    let mut keys: Vec<String> = answer
        .keys()
        .iter()
        .map(|key| String::from_utf8_lossy(key).into_owned())
        .collect();
    keys.sort();
    assert_eq!(
        keys,
        [
            record.0.as_str(),
            "/coreos.com/network/taken/10.5.52.0-24",
            "/coreos.com/network/taken/node-worker-1"
        ]
    );
}

async fn a_dual_stack_record_has_go_flannels_key(version: EtcdVersion) {
    let (etcd, mut client) = server(version, DUAL_CONFIG).await;
    let ours = manager(options(etcd.endpoint()));
    let mut wants = dual(request("worker-1", 1), "2001:db8::1");
    wants.previous = DualStack::new(Some(subnet("10.5.1.0/24")), Some(subnet("fd00:5:0:7::/64")));
    acquire(&ours, &wants).await;
    let found = everything(&mut client, SUBNETS).await;
    assert_eq!(found[0].0, format!("{SUBNETS}10.5.1.0-24&fd00:5:0:7::-64"));
    assert!(found[0].1.starts_with(
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan","BackendData":{"#
    ));
    assert_eq!(found.len(), 1);
}

async fn go_flannels_record_of_our_address_is_taken_over_and_given_its_full_time(
    version: EtcdVersion,
) {
    let (etcd, mut client) = server(version, CONFIG).await;
    let granted = client.lease_grant(100, None).await.expect("an answer");
    let key = format!("{SUBNETS}10.5.33.0-24");
    let lease = Some(PutOptions::new().with_lease(granted.id()));
    client
        .put(key.as_str(), GOS, lease)
        .await
        .expect("an answer");
    let ours = manager(options(etcd.endpoint()));
    let lease = acquire(&ours, &request("worker-77", 77)).await;
    assert_eq!(lease.subnet, DualStack::v4(subnet("10.5.33.0/24")));
    let found = everything(&mut client, SUBNETS).await;
    assert_eq!(found.len(), 1);
    assert!(found[0].1.contains(r#""NodeID":"worker-77""#), "{found:?}");
    assert_eq!(found[0].2, Some(86_400));
}

async fn go_flannels_other_records_are_peers_and_taken(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    put(&mut client, &format!("{SUBNETS}10.5.33.0-24"), GOS).await;
    let ours = manager(options(etcd.endpoint()));
    let mut wants = request("worker-1", 1);
    wants.previous = DualStack::v4(subnet("10.5.33.0/24"));
    let lease = acquire(&ours, &wants).await;
    assert!(!lease.subnet.overlaps(&wants.previous));
    let mut watch = ours.watch_leases();
    let snapshot = until(&mut watch, |item| match item {
        Ok(Event::Snapshot(snapshot)) => Some(snapshot),
        _ => None,
    })
    .await;
    let theirs = snapshot
        .leases
        .iter()
        .find(|lease| lease.subnet == wants.previous);
    let theirs = theirs.expect("Go flannel's record is read");
    assert_eq!(theirs.node, NodeId::from_public_ip([192, 0, 2, 77].into()));
    assert_eq!(theirs.ttl, None, "a reservation");
}

async fn a_reservation_stays_one(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    let key = format!("{SUBNETS}10.5.40.0-24");
    put(
        &mut client,
        &key,
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#,
    )
    .await;
    let ours = manager(options(etcd.endpoint()));
    let other = acquire(&ours, &request("worker-2", 2)).await;
    assert_ne!(other.subnet, DualStack::v4(subnet("10.5.40.0/24")));
    let node = manager(options(etcd.endpoint()));
    let lease = acquire(&node, &request("worker-1", 1)).await;
    assert_eq!((lease.key.as_str(), lease.ttl), (key.as_str(), None));
    let renewed = node.renew_lease(&lease).await.expect("it is ours");
    node.release_lease(&renewed).await.expect("it is ours");
    let found = everything(&mut client, &key).await;
    assert_eq!(
        found.len(),
        1,
        "a released reservation is kept for its node"
    );
    assert_eq!(found[0].2, None);
    assert!(found[0].1.contains("192.0.2.1"));
}

async fn a_prefix_is_cleaned_as_go_flannel_cleans_it(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    put(&mut client, "/my/net/config", CONFIG).await;
    let ours = manager(options(etcd.endpoint()).prefix("//my///net/"));
    acquire(&ours, &request("worker-1", 1)).await;
    assert_eq!(everything(&mut client, "/my/net/subnets/").await.len(), 1);
}

async fn a_missing_config_and_a_bad_one_are_told_apart(version: EtcdVersion) {
    let (etcd, mut client) = server(version, "{").await;
    let ours = manager(options(etcd.endpoint()));
    assert!(matches!(ours.network_config().await, Err(Error::Config(_))));
    client
        .delete("/coreos.com/network/config", None)
        .await
        .expect("an answer");
    let missing = ours.network_config().await;
    let Err(Error::NoConfig { hint }) = missing else {
        panic!("{missing:?}");
    };
    assert!(hint.contains("config"), "{hint}");
}

async fn a_network_of_ipv6_alone_is_refused_in_words(version: EtcdVersion) {
    let (etcd, _client) = server(
        version,
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}"#,
    )
    .await;
    let refused = manager(options(etcd.endpoint()))
        .acquire_lease(&request("worker-1", 1))
        .await;
    let Err(Error::Invalid { reason }) = refused else {
        panic!("{refused:?}");
    };
    assert!(reason.contains("IPv4"), "{reason}");
}

async fn a_dual_stack_record_beside_single_stack_go_nodes_needs_leave(version: EtcdVersion) {
    let (etcd, mut client) = server(version, DUAL_CONFIG).await;
    put_leased(&mut client, &format!("{SUBNETS}10.5.33.0-24"), GOS).await;
    let wants = dual(request("worker-1", 1), "2001:db8::1");
    let refused = manager(options(etcd.endpoint()))
        .acquire_lease(&wants)
        .await;
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
    let found = everything(&mut client, SUBNETS).await;
    assert_eq!(found.len(), 1, "nothing was written: {found:?}");
    let bold = manager(options(etcd.endpoint()).mixed_families(true));
    acquire(&bold, &wants).await;
}

/// Writes as Go flannel does: with a lease of etcd.
async fn put_leased(client: &mut Client, key: &str, value: &str) {
    let lease = client
        .lease_grant(3600, None)
        .await
        .expect("an answer")
        .id();
    let options = PutOptions::new().with_lease(lease);
    client
        .put(key, value, Some(options))
        .await
        .expect("an answer");
}

async fn we_give_way_to_go_flannel_within_5_s(version: EtcdVersion) {
    // Its node still runs with a config of before.
    let former = CONFIG.replace("10.5.0.0/16\"", "10.5.0.0/16\", \"SubnetLen\": 25");
    assert_ne!(former, CONFIG);
    let (etcd, mut client) = server(version, &former).await;
    let ours = manager(options(etcd.endpoint()));
    ours.network_config().await.expect("it is seen");
    put(&mut client, "/coreos.com/network/config", CONFIG).await;
    let lease = acquire(&ours, &request("worker-1", 1)).await;
    let mut watch = begun(&ours).await;
    let v4 = lease.subnet.v4.expect("an IPv4 subnet");
    // Nobody can have written that: half of the network, and a reservation.
    put_leased(&mut client, &format!("{SUBNETS}10.5.0.0-17"), GOS).await;
    put_leased(&mut client, &format!("{SUBNETS}10.5.128.0-17"), "{}").await;
    put(&mut client, &format!("{SUBNETS}{}-26", v4.address()), GOS).await;
    for _ in 0..3 {
        until(&mut watch, |item| {
            matches!(item, Ok(Event::Put(_) | Event::Unreadable(_))).then_some(())
        })
        .await;
    }
    ours.renew_lease(&lease).await.expect("it is still ours");
    // As Go flannel writes, without a question: half of what is ours, under a key of its own.
    let half = format!("{SUBNETS}{}-25", v4.address());
    put_leased(&mut client, &half, GOS).await;
    let gone = until(&mut watch, |item| match item {
        Ok(Event::Delete { key, .. }) => (key == lease.key).then_some(()),
        _ => None,
    });
    timeout(Duration::from_secs(5), gone)
        .await
        .expect("within 5 s");
    let lost = ours.renew_lease(&lease).await;
    let Err(Error::LeaseLost { reason, .. }) = lost else {
        panic!("{lost:?}");
    };
    assert!(reason.contains(&half), "{reason}");
    let mut wants = request("worker-1", 1);
    wants.previous = lease.subnet;
    let next = acquire(&ours, &wants).await;
    assert!(!next.subnet.overlaps(&lease.subnet));
    let theirs = hand(&etcd).await.get(half, None).await.expect("an answer");
    assert_eq!(
        theirs.kvs()[0].value(),
        GOS.as_bytes(),
        "theirs is untouched"
    );
}

async fn strange_keys_beside_the_leases_are_reported_and_harm_nobody(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    let ours = manager(options(etcd.endpoint()));
    acquire(&ours, &request("worker-1", 1)).await;
    let mut watch = begun(&ours).await;
    for (key, value) in [
        ("subnets/10.5.9.0-24", "{"),
        ("subnets/hello", GOS),
        ("subnets-old", GOS),
        ("subnets/10.5.10.0-24/extra", GOS),
    ] {
        put(&mut client, &format!("/coreos.com/network/{key}"), value).await;
        until(&mut watch, |item| {
            matches!(item, Ok(Event::Unreadable(_))).then_some(())
        })
        .await;
    }
    // Bytes that are no text, as a key and as a value.
    let key = [SUBNETS.as_bytes(), b"\xff\xfe"].concat();
    client
        .put(key, b"\xff".to_vec(), None)
        .await
        .expect("an answer");
    until(&mut watch, |item| {
        matches!(item, Ok(Event::Unreadable(_))).then_some(())
    })
    .await;
    put(&mut client, &format!("{SUBNETS}10.5.11.0-24"), GOS).await;
    let put = until(&mut watch, |item| match item {
        Ok(Event::Put(lease)) => Some(lease),
        _ => None,
    });
    let lease = timeout(SOON, put).await.expect("soon");
    assert_eq!(lease.subnet, DualStack::v4(subnet("10.5.11.0/24")));
    acquire(&ours, &request("worker-2", 2)).await;
}
