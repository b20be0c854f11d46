//! What a tunnel costs: the same traffic between two pods by bare routing, host-gw and VXLAN.
//!
//! `cargo xtask throughput` (root; it works in namespaces of its own, and all traffic is between
//! them). The three stand side by side and are measured in turns, and of each the median is taken,
//! so that only ratios are told. Prints a table; `--svg FILE` also draws it.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a program that measures real time and prints a table"
)]

mod svg;
mod traffic;

use std::env;
use std::fs;
use std::process::ExitCode;

use flannel_core::Family;
use flannel_e2e::{Cluster, Setup, V4, V4_GW, run_in};

use traffic::Kind;

/// Measurements of each path and kind, of which the median is taken.
const ROUNDS: usize = 11;

/// Two pods and what is between them.
struct Way {
    name: &'static str,
    cluster: Cluster,
}

impl Way {
    fn measure(&self, kind: Kind) -> f64 {
        let (from, to) = (&self.cluster.pods[0], &self.cluster.pods[1]);
        let ip = to.ips.ip(Family::V4).expect("IPv4");
        traffic::measure(kind, &from.ns, &to.ns, ip)
    }
}

/// The three ways, each in namespaces of its own; `None` if that is not permitted here.
async fn ways() -> Option<Vec<Way>> {
    let mut bare = Cluster::start("bare", Setup::new(2, V4_GW)).await?;
    // Routes made by hand in the place of the overlay's.
    for i in 0..2 {
        let torn = bare.nodes[i].take_overlay().teardown().await;
        torn.expect("it can be removed");
    }
    for (node, peer) in [(0, 1), (1, 0)] {
        let subnet = bare.nodes[peer].subnets.v4.expect("IPv4");
        let gateway = bare.nodes[peer].host.ips.v4.expect("IPv4");
        let command = format!("ip route add {subnet} via {gateway}");
        run_in(&bare.nodes[node].host.ns, &command);
    }
    let host_gw = Cluster::start("host-gw", Setup::new(2, V4_GW)).await?;
    let vxlan = Cluster::start("vxlan", Setup::new(2, V4)).await?;
    let all = [
        ("bare routing", bare),
        ("host-gw", host_gw),
        ("vxlan", vxlan),
    ];
    let ways = all.map(|(name, cluster)| {
        cluster.assert_reachable(name);
        Way { name, cluster }
    });
    Some(ways.into())
}

/// The medians of one kind, a way each.
struct Row {
    kind: Kind,
    medians: Vec<f64>,
}

impl Row {
    /// The median of a way as a multiple of the first one's.
    fn ratio(&self, way: usize) -> f64 {
        self.medians[way] / self.medians[0]
    }
}

fn measure(ways: &[Way]) -> Vec<Row> {
    let mut rows = Vec::new();
    for kind in Kind::ALL {
        let mut taken = vec![Vec::new(); ways.len()];
        for round in 0..ROUNDS {
            eprintln!("... {}, round {} of {ROUNDS}", kind.name(), round + 1);
            // Each is first, second and third in turn.
            for i in 0..ways.len() {
                let way = (i + round) % ways.len();
                taken[way].push(ways[way].measure(kind));
            }
        }
        let medians = taken.into_iter().map(median).collect();
        rows.push(Row { kind, medians });
    }
    rows
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn show(ways: &[Way], rows: &[Row]) {
    print!("| |");
    for way in ways {
        print!(" {} |", way.name);
    }
    print!("\n|---|");
    println!("{}", "---|".repeat(ways.len()));
    for row in rows {
        print!("| {} |", row.kind.name());
        for (i, median) in row.medians.iter().enumerate() {
            print!(" {} ({:.2}) |", row.kind.show(*median), row.ratio(i));
        }
        println!();
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    // `cargo test --benches` runs it too, and wants no measurement; a word asks for another part.
    let svg = args.iter().position(|arg| arg == "--svg");
    let svg = svg.map(|at| args.get(at + 1).cloned().unwrap_or_default());
    let words = args.iter().filter(|arg| !arg.starts_with('-'));
    let asks_for_others = words
        .clone()
        .any(|word| word != "throughput" && svg.as_ref() != Some(word));
    if !args.iter().any(|arg| arg == "--bench") || asks_for_others {
        return ExitCode::SUCCESS;
    }
    eprintln!("... making namespaces");
    let Some(ways) = ways().await else {
        return ExitCode::SUCCESS;
    };
    let rows = tokio::task::block_in_place(|| measure(&ways));
    show(&ways, &rows);
    if let Some(file) = svg {
        let names: Vec<&str> = ways.iter().map(|way| way.name).collect();
        if let Err(error) = fs::write(&file, svg::bars(&names, &rows)) {
            eprintln!("{file}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
