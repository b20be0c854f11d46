//! The first reading on a real etcd: in pages, all at one revision, without a call per key.

mod common;

use std::time::Duration;

use common::{CONFIG, manager, options, server, until};
use etcd_client::{Client, PutOptions, Txn, TxnOp};
use flannel_core::{Event, Lease, Manager, Snapshot};
use flannel_subnet_etcd::{EtcdManager, EtcdOptions};
use flannel_testkit::servers::{Etcd, EtcdVersion};

common::on_each_etcd! {
    twelve_thousand_leases_are_read_in_pages_and_without_a_call_per_key
    all_pages_are_of_one_revision
    huge_values_beside_the_leases_hide_nobody
}

const RECORDS: u32 = 12_000;

/// More than one page, in one range of keys.
const PAGES: std::ops::RangeInclusive<u64> = 2..=12;

fn key(n: u32) -> String {
    let [_, high, low, _] = (n << 8).to_be_bytes();
    format!("/coreos.com/network/subnets/10.{high}.{low}.0-24")
}

/// What Go flannel writes.
fn value(n: u32) -> String {
    let [_, high, low, _] = (n << 8).to_be_bytes();
    format!(r#"{{"PublicIP":"198.18.{high}.{low}","PublicIPv6":null}}"#)
}

async fn fill(client: &mut Client, records: std::ops::Range<u32>) {
    let lease = client.lease_grant(3600, None).await.expect("an answer");
    let numbers: Vec<u32> = records.collect();
    for chunk in numbers.chunks(100) {
        let puts = chunk.iter().map(|n| {
            let options = PutOptions::new().with_lease(lease.id());
            TxnOp::put(key(*n), value(*n), Some(options))
        });
        let txn = Txn::new().and_then(puts.collect::<Vec<_>>());
        client.txn(txn).await.expect("an answer");
    }
}

/// A manager on a server that others use, too: what it takes is not what is tried here.
fn patient(etcd: &Etcd) -> EtcdManager {
    let options: EtcdOptions = options(etcd.endpoint());
    manager(options.call_timeout(Duration::from_secs(20)))
}

async fn first(manager: &EtcdManager) -> Snapshot {
    let mut watch = manager.watch_leases();
    until(&mut watch, |item| match item {
        Ok(Event::Snapshot(snapshot)) => Some(snapshot),
        _ => None,
    })
    .await
}

async fn twelve_thousand_leases_are_read_in_pages_and_without_a_call_per_key(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    fill(&mut client, 0..RECORDS).await;
    let ours = patient(&etcd);
    let read = first(&ours).await;
    assert_eq!(read.leases.len(), RECORDS as usize);
    assert!(read.leases.is_sorted_by(|a, b| a.key < b.key));
    let calls = ours.store().calls();
    assert_eq!((calls.leases, calls.txns), (0, 0), "{calls:?}");
    assert!(PAGES.contains(&calls.ranges), "{calls:?}");
}

/// One record wanders between the first page and the last: it is in each reading, and once.
async fn all_pages_are_of_one_revision(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    fill(&mut client, 1..RECORDS).await;
    client.put(key(0), value(0), None).await.expect("an answer");
    let wandering = tokio::spawn(async move {
        let (mut from, mut to) = (0, RECORDS);
        loop {
            let steps = [
                TxnOp::delete(key(from), None),
                TxnOp::put(key(to), value(0), None),
            ];
            let done = client.txn(Txn::new().and_then(steps)).await;
            done.expect("an answer");
            (from, to) = (to, from);
        }
    });
    let ours = patient(&etcd);
    for reading in 0..30 {
        let read = first(&ours).await;
        let ends = [key(0), key(RECORDS)];
        let is_end = |lease: &&Lease| ends.iter().any(|end| end == lease.key.as_str());
        let found = read.leases.iter().filter(is_end);
        assert_eq!(found.count(), 1, "reading {reading}");
        assert_eq!(read.leases.len(), RECORDS as usize, "reading {reading}");
    }
    wandering.abort();
}

/// Together more than any answer that is taken.
async fn huge_values_beside_the_leases_hide_nobody(version: EtcdVersion) {
    let (etcd, mut client) = server(version, CONFIG).await;
    fill(&mut client, 0..20).await;
    let huge = "x".repeat(1_400_000);
    for n in 0..60 {
        let key = format!("/coreos.com/network/subnets/10.0.10.0-24-{n}");
        client
            .put(key, huge.as_str(), None)
            .await
            .expect("an answer");
    }
    let ours = patient(&etcd);
    let snapshot = first(&ours).await;
    assert_eq!(snapshot.leases.len(), 20);
    assert_eq!(snapshot.unreadable.len(), 60);
}
