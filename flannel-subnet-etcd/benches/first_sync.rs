//! The first sync of 10,000 leases from a real etcd, against flannel's way: one range, and then one
//! call per lease for its time to live.
//!
//! `cargo bench -p flannel-subnet-etcd` (needs etcd in the path, no root). Fails if the goal is
//! missed.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a program that measures real time and prints a table"
)]

use std::future::poll_fn;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use etcd_client::{Client, GetOptions, PutOptions, Txn, TxnOp};
use flannel_core::{Event, Manager};
use flannel_subnet_etcd::{EtcdManager, EtcdOptions};
use flannel_testkit::servers::Etcd;

const LEASES: u32 = 10_000;

/// How many times faster we are to be.
const GOAL: f64 = 50.0;

const ROUNDS: usize = 5;

async fn fill(client: &mut Client) {
    client
        .put(
            "/coreos.com/network/config",
            r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#,
            None,
        )
        .await
        .expect("an answer");
    let numbers: Vec<u32> = (0..LEASES).collect();
    for chunk in numbers.chunks(100) {
        let lease = client.lease_grant(86_400, None).await.expect("an answer");
        let puts = chunk.iter().map(|n| {
            let [_, high, low, _] = (n << 8).to_be_bytes();
            let key = format!("/coreos.com/network/subnets/10.{high}.{low}.0-24");
            let value = format!(
                r#"{{"PublicIP":"198.18.{high}.{low}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:{high:02x}:{low:02x}"}}}}"#
            );
            TxnOp::put(key, value, Some(PutOptions::new().with_lease(lease.id())))
        });
        let txn = Txn::new().and_then(puts.collect::<Vec<_>>());
        client.txn(txn).await.expect("an answer");
    }
}

/// Until the first snapshot of a fresh manager.
async fn ours(endpoint: &str) -> Duration {
    let start = Instant::now();
    let options = EtcdOptions::new([endpoint]).expect("an endpoint");
    let manager = EtcdManager::new(options).expect("sound settings");
    let mut watch = manager.watch_leases();
    let first = poll_fn(|cx| watch.as_mut().poll_next(cx)).await;
    let time = start.elapsed();
    let Some(Ok(Event::Snapshot(snapshot))) = first else {
        panic!("no snapshot: {first:?}");
    };
    assert_eq!(snapshot.leases.len(), LEASES as usize);
    time
}

/// One range, then one call per key, as flannel lists leases.
async fn flannels(endpoint: &str) -> Duration {
    let start = Instant::now();
    let mut client = Client::connect([endpoint], None).await.expect("a client");
    let options = GetOptions::new().with_prefix();
    let mut kv = client.kv_client().max_decoding_message_size(64 << 20);
    let got = kv.get("/coreos.com/network/subnets", Some(options)).await;
    let got = got.expect("an answer");
    assert_eq!(got.kvs().len(), LEASES as usize);
    for kv in got.kvs() {
        let answer = client.lease_time_to_live(kv.lease(), None).await;
        assert!(answer.expect("an answer").ttl() > 0);
    }
    start.elapsed()
}

#[tokio::main]
async fn main() -> ExitCode {
    let etcd = match Etcd::start() {
        Ok(etcd) => etcd,
        Err(error) => {
            eprintln!("etcd does not start (Debian: apt-get install etcd-server): {error}");
            return ExitCode::FAILURE;
        }
    };
    let endpoint = etcd.endpoint();
    eprintln!("... writing {LEASES} leases");
    let mut client = Client::connect([&endpoint], None).await.expect("a client");
    fill(&mut client).await;
    let mut ratios = Vec::new();
    for round in 1..=ROUNDS {
        eprintln!("... round {round} of {ROUNDS}");
        let (ours, flannels) = (ours(&endpoint).await, flannels(&endpoint).await);
        println!(
            "first sync of {LEASES} leases: {:8.1} ms, flannel's way {:8.1} ms",
            ours.as_secs_f64() * 1e3,
            flannels.as_secs_f64() * 1e3
        );
        ratios.push(flannels.as_secs_f64() / ours.as_secs_f64());
    }
    ratios.sort_by(f64::total_cmp);
    let median = ratios[ROUNDS / 2];
    println!("median: {median:.0} times as fast (goal: {GOAL})");
    if median >= GOAL {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
