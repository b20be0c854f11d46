//! What the whole SDK takes on a real kernel: from a lease to its route, repairs, and scale.
//!
//! `cargo bench -p flannel-e2e --bench overlay` (root; it works in namespaces of its own). Arguments
//! choose parts: `events`, `repair`, `rebuild`, `scale`, `host-gw`, `cost`, `router`,
//! `memory`. Times are taken by a socket that hears what the kernel tells of its routes and neighbours.
//! Fails if a goal is missed.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a program that measures real time and prints a table"
)]

mod bed;
mod cost;
mod ear;
mod hostgw;
mod memory;
mod router;

use std::env;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use flannel_core::{DualStack, NodeId, Object, Op};
use flannel_e2e::{Peers, route_key};

use bed::Bed;

/// The goals.
const EVENT_P99: Duration = Duration::from_millis(20);
const REPAIR_P99: Duration = Duration::from_millis(50);
const REBUILD: Duration = Duration::from_secs(1);
/// The most that bad peers may slow good ones down.
const BAD_PEERS: f64 = 1.5;
/// The most that a peer of 50,000 may take, as a multiple of one of 5,000: 10 would be quadratic.
const GROWTH: f64 = 2.0;

/// Peers while events and repairs are measured.
const PEERS: u32 = 1_000;
const EVENTS: u32 = 1_000;
const REPAIRS: usize = 100;

const CONFIG: &str =
    r#"{ "Network": "10.0.0.0/8", "SubnetLen": 24, "Backend": { "Type": "vxlan" } }"#;

/// The subnets of good peers; the node's own is the last of the pool, bad ones stand before it.
const GOOD: Peers = Peers {
    first: std::net::Ipv4Addr::new(10, 1, 0, 0),
    vni: 1,
};
const BAD: Peers = Peers {
    first: std::net::Ipv4Addr::new(10, 250, 0, 0),
    vni: 1,
};

struct Times(Vec<Duration>);

impl Times {
    fn new(mut times: Vec<Duration>) -> Self {
        times.sort();
        Self(times)
    }

    fn quantile(&self, percent: usize) -> Duration {
        let last = self.0.len().saturating_sub(1);
        self.0[(self.0.len() * percent / 100).min(last)]
    }
}

/// The table.
#[derive(Default)]
struct Table {
    missed: usize,
}

impl Table {
    fn line(&mut self, what: &str, measured: &str, goal: &str, reached: bool) {
        let verdict = if reached { "" } else { "MISSED" };
        println!("{what:<52} {measured:<34} {goal:<14} {verdict}");
        self.missed += usize::from(!reached);
    }

    fn times(&mut self, what: &str, times: &Times, goal: Duration) {
        let p99 = times.quantile(99);
        let (p50, n) = (times.quantile(50), times.0.len());
        let measured = format!("p50 {}, p99 {}, {n} times", ms(p50), ms(p99));
        let goal_text = format!("p99 <= {}", ms(goal));
        self.line(what, &measured, &goal_text, p99 <= goal);
    }
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

fn progress(what: &str) {
    eprintln!("... {what}");
}

fn events(table: &mut Table) {
    progress("events");
    let mut bed = Bed::new("events", PEERS);
    bed.start(PEERS);
    let good = bed.events(PEERS);
    let what = format!("lease event to kernel, {PEERS} peers");
    table.times(&what, &good, EVENT_P99);

    progress("events among bad peers");
    // A peer's gateway that is an address of this very host: the kernel refuses the nexthop.
    let mut bed = Bed::new("bad-events", PEERS);
    bed.start(PEERS);
    let ns = &bed.host.ns;
    ns.add_bridge("docker0", 1500).expect("a free name");
    for n in 0..100 {
        let ip = BAD.subnet(n).address();
        ns.add_address("docker0", ip, 32).expect("a free address");
    }
    for n in 0..100 {
        let mut lease = BAD.lease(n);
        let data = format!(r#"{{"VNI":1,"VtepMAC":"0e:88:00:00:00:{n:02x}"}}"#);
        let data = flannel_core::BackendData::from_json(&data).expect("JSON");
        lease.attrs.backend_data = DualStack::v4(data);
        lease.node = NodeId::new(format!("bad-{n}")).expect("a node id");
        bed.manager.put_raw(lease).expect("sound");
    }
    let overlay = bed.overlay.as_ref().expect("it runs");
    let refused = overlay.wait_for(|status| status.failing.len() >= 100);
    bed.runtime.block_on(refused).expect("running");
    let bad = bed.events(PEERS);
    table.times("the same, 100 bad peers among them", &bad, EVENT_P99);
    let failing = bed.overlay.as_ref().expect("it runs").status();
    assert!(
        failing.failing.len() >= 100,
        "the bad peers are not refused"
    );
    let ratio = bad.quantile(99).as_secs_f64() / good.quantile(99).as_secs_f64();
    table.line(
        "p99 with bad peers to p99 without",
        &format!("{ratio:.2}"),
        &format!("<= {BAD_PEERS}"),
        ratio <= BAD_PEERS,
    );
}

fn repair(table: &mut Table) {
    let mut bed = Bed::new("repair", PEERS);
    bed.start(PEERS);
    let right = bed.ours();
    for kind in ["route", "neighbour", "fdb"] {
        progress(&format!("repair of a {kind}"));
        let objects = right.values().filter(|object| object.key().kind() == kind);
        let mut times = Vec::new();
        for (i, object) in objects.step_by(7).take(REPAIRS).enumerate() {
            std::thread::sleep(Duration::from_millis((i * 37 % 50) as u64 + 20));
            bed.ear.forget();
            let start = Instant::now();
            bed.apply(Op::Delete(object.clone()));
            assert!(bed.ear.hears(object), "{object} did not come back");
            times.push(start.elapsed());
        }
        let what = format!("a {kind} deleted until it is back, {PEERS} peers");
        table.times(&what, &Times::new(times), REPAIR_P99);
    }
    bed.converged();
    assert_eq!(bed.ours(), right);
}

fn rebuild(table: &mut Table) {
    progress("rebuild of a device");
    let mut bed = Bed::new("rebuild", PEERS);
    bed.start(PEERS);
    let right = bed.ours();
    let mut times = Vec::new();
    for _ in 0..10 {
        let link = Object::Link(bed.link("flannel.1"));
        bed.converged();
        let start = Instant::now();
        bed.apply(Op::Delete(link));
        let all = bed
            .ear
            .hears_routes(PEERS as usize, Duration::from_secs(30));
        times.push(start.elapsed());
        assert!(all, "not all routes came back");
        bed.converged();
        assert_eq!(bed.ours(), right);
    }
    let times = Times::new(times);
    let slowest = times.quantile(100);
    let measured = format!("median {}, slowest {}", ms(times.quantile(50)), ms(slowest));
    let goal = format!("<= {}", ms(REBUILD));
    let what = format!("a deleted device until all is back, {PEERS} peers");
    table.line(&what, &measured, &goal, slowest <= REBUILD);
}

fn scale(table: &mut Table) {
    let mut per_peer = Vec::new();
    for peers in [5_000_u32, 50_000] {
        progress(&format!("{peers} peers"));
        let mut bed = Bed::new("scale", peers);
        let first = bed.start(peers);
        progress(&format!("{peers} peers, flap"));
        let mut link = bed.link("flannel.1");
        link.up = false;
        bed.converged();
        let start = Instant::now();
        bed.apply(Op::Change(Object::Link(link)));
        let down = start.elapsed();
        let all = bed
            .ear
            .hears_routes(peers as usize, Duration::from_secs(300));
        let flap = start.elapsed() - down;
        assert!(all, "not all routes came back");
        bed.converged();
        let objects = bed.ours();
        for n in 0..peers {
            assert!(objects.contains_key(&route_key(GOOD.subnet(n))), "peer {n}");
        }
        for (what, time) in [
            ("first sync", first),
            ("link set down (the kernel alone)", down),
            ("from then until all is back", flap),
        ] {
            let each = time.as_secs_f64() * 1e6 / f64::from(peers);
            let measured = format!("{}, {each:.1} us a peer", ms(time));
            table.line(&format!("{what}, {peers} peers"), &measured, "", true);
        }
        per_peer.push([first, flap].map(|time| time.as_secs_f64() / f64::from(peers)));
    }
    for (i, what) in ["first sync", "back after a flap"].into_iter().enumerate() {
        let ratio = per_peer[1][i] / per_peer[0][i];
        table.line(
            &format!("{what}: a peer of 50,000 to one of 5,000"),
            &format!("{ratio:.2}"),
            &format!("<= {GROWTH}"),
            ratio <= GROWTH,
        );
    }
}

fn main() -> ExitCode {
    let wanted: Vec<String> = env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    if let [memory::CHILD, peers] = wanted.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        memory::child(peers.parse().expect("a number of peers"));
        return ExitCode::SUCCESS;
    }
    let mut table = Table::default();
    for (name, part) in [
        ("events", events as fn(&mut Table)),
        ("repair", repair),
        ("rebuild", rebuild),
        ("scale", scale),
        ("host-gw", hostgw::measure),
        ("cost", cost::measure),
        ("router", router::measure),
        ("memory", memory::measure),
    ] {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            part(&mut table);
        }
    }
    if table.missed == 0 {
        ExitCode::SUCCESS
    } else {
        eprintln!("{} goals are missed", table.missed);
        ExitCode::FAILURE
    }
}
