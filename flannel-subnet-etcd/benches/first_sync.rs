//! The first sync of 10,000 leases from a real etcd, against flannel's way: one range, and then one
//! call per lease for its time to live.
//!
//! `cargo bench -p flannel-subnet-etcd` (no root), on every etcd that is installed. Fails if the goal
//! is missed.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a program that measures real time and prints a table"
)]

use std::future::poll_fn;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use etcd_client::{Client, GetOptions, PutOptions};
use flannel_core::{Event, Manager};
use flannel_subnet_etcd::{EtcdManager, EtcdOptions};
use flannel_testkit::servers::{Etcd, EtcdVersion};
use tokio::task::JoinSet;

const LEASES: u32 = 10_000;

/// How many times faster we are to be, at the median of the rounds.
const GOAL: f64 = 50.0;

const ROUNDS: usize = 7;

/// How often ours is done in a round, which has one of flannel's: a hiccup weighs more in what is
/// short. The one in the middle counts.
const OURS: usize = 5;

/// Says how far it is, on a line of its own that is written over where somebody is looking.
struct Progress {
    version: EtcdVersion,
    is_terminal: bool,
}

impl Progress {
    fn new(version: EtcdVersion) -> Self {
        Self {
            version,
            is_terminal: std::io::stderr().is_terminal(),
        }
    }

    /// The beginning of a step.
    fn step(&self, what: &str) {
        if !self.is_terminal {
            eprintln!("... {}: {what}", self.version);
        }
        self.done(what, 0);
    }

    /// So many leases of a step are done.
    fn done(&self, what: &str, leases: u32) {
        if self.is_terminal && leases.is_multiple_of(500) {
            let line = format!("\r{}: {what}: {leases:>6} of {LEASES} leases", self.version);
            std::io::stderr().write_all(line.as_bytes()).ok();
        }
    }

    /// Makes room for a line of the table.
    fn clear(&self) {
        if self.is_terminal {
            eprint!("\r{:79}\r", "");
        }
    }
}

async fn fill(client: &mut Client, progress: &Progress) {
    progress.step("writing");
    client
        .put(
            "/coreos.com/network/config",
            r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#,
            None,
        )
        .await
        .expect("an answer");
    // Each of a node of its own, with a lease of its own.
    let mut numbers = 0..LEASES;
    let mut writing = JoinSet::new();
    let mut done = 0;
    loop {
        while writing.len() < 64
            && let Some(n) = numbers.next()
        {
            writing.spawn(write(client.clone(), n));
        }
        if writing.join_next().await.is_none() {
            break;
        }
        done += 1;
        progress.done("writing", done);
    }
}

/// The record of one node, as Go flannel writes it.
async fn write(mut client: Client, n: u32) {
    let [_, high, low, _] = (n << 8).to_be_bytes();
    let lease = client.lease_grant(86_400, None).await.expect("an answer");
    let key = format!("/coreos.com/network/subnets/10.{high}.{low}.0-24");
    let value = format!(
        r#"{{"PublicIP":"198.18.{high}.{low}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:{high:02x}:{low:02x}"}}}}"#
    );
    let options = PutOptions::new().with_lease(lease.id());
    let put = client.put(key, value, Some(options)).await;
    put.expect("an answer");
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

/// One range, then for each key a call for its time to live, one after the other, as flannel lists
/// leases.
async fn flannels(endpoint: &str, what: &str, progress: &Progress) -> Duration {
    let start = Instant::now();
    let mut client = Client::connect([endpoint], None).await.expect("a client");
    let options = GetOptions::new().with_prefix();
    let mut kv = client.kv_client().max_decoding_message_size(64 << 20);
    let got = kv.get("/coreos.com/network/subnets", Some(options)).await;
    let got = got.expect("an answer");
    assert_eq!(got.kvs().len(), LEASES as usize);
    for (n, kv) in (1..).zip(got.kvs()) {
        let answer = client.lease_time_to_live(kv.lease(), None).await;
        assert!(answer.expect("an answer").ttl() > 0);
        progress.done(what, n);
    }
    start.elapsed()
}

/// The rounds on one etcd, as lines of the table; the median of the ratios.
async fn measure(version: EtcdVersion) -> f64 {
    let etcd = Etcd::of(version).expect("etcd starts");
    let endpoint = etcd.endpoint();
    let progress = Progress::new(version);
    let mut client = Client::connect([&endpoint], None).await.expect("a client");
    fill(&mut client, &progress).await;
    let status = client.status().await.expect("an answer");
    let name = format!("etcd {}", status.version());
    let mut ratios = Vec::new();
    for round in 1..=ROUNDS {
        let what = format!("round {round} of {ROUNDS}");
        progress.step(&what);
        let mut times = Vec::new();
        for _ in 0..OURS {
            times.push(ours(&endpoint).await);
        }
        times.sort_unstable();
        let ours = times[OURS / 2].as_secs_f64();
        let flannels = flannels(&endpoint, &what, &progress).await.as_secs_f64();
        let ratio = flannels / ours;
        progress.clear();
        println!(
            "{name:<14} {round:>6} {:>12.1} {:>16.1} {ratio:>9.1}",
            ours * 1e3,
            flannels * 1e3
        );
        ratios.push(ratio);
    }
    ratios.sort_by(f64::total_cmp);
    let (least, median) = (ratios[0], ratios[ROUNDS / 2]);
    let verdict = if median >= GOAL { "ok" } else { "MISSED" };
    println!("{name:<14} median {median:>46.1}   goal >= {GOAL}: {verdict}, least {least:.1}\n");
    median
}

#[tokio::main]
async fn main() -> ExitCode {
    println!("first sync of {LEASES} leases: our first snapshot, and flannel's way");
    println!(
        "{:<14} {:>6} {:>12} {:>16} {:>9}",
        "", "round", "ours, ms", "flannel's, ms", "ratio"
    );
    let mut missed = false;
    for version in EtcdVersion::ALL {
        if version.require("first_sync") {
            missed |= measure(version).await < GOAL;
        }
    }
    if missed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
