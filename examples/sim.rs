//! Clusters in simulation: nodes crash, sleep and lose the store, kernels fail, strangers meddle, and
//! what must hold is checked all the while. One seed gives one history, bit for bit.
//!
//! `cargo run --release --example sim -- --seeds 1000`

#![allow(
    clippy::disallowed_methods,
    clippy::exit,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a program for the terminal"
)]

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write, stderr};
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use flannel::{HostGwBackend, UdpBackend, VxlanBackend};
use flannel_testkit::sim::{Failure, Progress, Report, Sim};
use serde::Serialize;

/// Simulates clusters of overlays on fakes: many histories of crashes, partitions, failing kernels
/// and hostile records, each drawn from a seed. Needs no root and no kernel.
#[derive(Parser)]
struct Flags {
    /// How many seeds to run
    #[arg(long, value_name = "N", default_value_t = 200)]
    seeds: u64,
    /// How many more seeds to run, each with 9 nodes and 120 steps
    #[arg(long, value_name = "N", default_value_t = 0)]
    large: u64,
    /// Run this one seed alone and print its history; with --seeds, begin with it
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// How many nodes each cluster has
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=30))]
    nodes: u8,
    /// The backend of the nodes; both: the config changes from one to the other and back
    #[arg(long, value_enum, default_value_t = Backend::Vxlan)]
    backend: Backend,
    /// How many things happen in each history, beside the start of the nodes
    #[arg(long, value_name = "N", default_value_t = 40)]
    steps: usize,
    /// How many threads to use; by default as many as there are processors
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// How long to make histories that fail smaller at most, in seconds and all in all
    #[arg(long, value_name = "S", default_value_t = 120)]
    shrink_seconds: u64,
    /// Run only every Nth seed twice, to see that both runs are the same
    #[arg(long, value_name = "N", default_value_t = 1)]
    twice: u64,
    /// With --seed: print all that can be observed, line by line, on stderr; of a seed that fails,
    /// in its minimal history
    #[arg(long)]
    trace: bool,
    /// Fail if some kind of fault that applies to the backend never took effect: for runs of thousands of seeds
    #[arg(long)]
    complete: bool,
    /// Print how often each kind of fault took effect
    #[arg(long)]
    counts: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    Vxlan,
    HostGw,
    Udp,
    Both,
    All,
}

impl Backend {
    fn sim(self) -> Sim {
        match self {
            Self::Vxlan => Sim::new(VxlanBackend::new),
            Self::HostGw => Sim::new(HostGwBackend::new).of_host_gw(),
            Self::Udp => Sim::new(UdpBackend::new).of_udp(),
            Self::All => Sim::new(VxlanBackend::new)
                .with(HostGwBackend::new)
                .with(UdpBackend::new)
                .of_all(),
            Self::Both => Sim::new(VxlanBackend::new)
                .with(HostGwBackend::new)
                .of_both(),
        }
    }
}

/// The result as a program reads it.
#[derive(Serialize)]
struct Summary<'a> {
    seeds: u64,
    failed: &'a [Failure],
    steps: u64,
    seconds: f64,
    slowest_seconds: f64,
    counts: &'a BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let sim = flags
        .backend
        .sim()
        .nodes(flags.nodes.into())
        .steps(flags.steps)
        .shrink_for(Duration::from_secs(flags.shrink_seconds));
    let start = Instant::now();
    let many = flags.seed.is_none() || std::env::args().any(|arg| arg.starts_with("--seeds"));
    let (report, digest) = if let (Some(seed), false) = (flags.seed, many) {
        one(&sim, seed, &flags)
    } else {
        let jobs = flags
            .jobs
            .or_else(|| available_parallelism().ok().map(usize::from))
            .unwrap_or(1);
        let first = flags.seed.unwrap_or(0);
        let meter = Meter::new(start);
        let run = |sim: &Sim, seeds: u64| {
            let seeds = first..first.saturating_add(seeds);
            sim.run_seeds(seeds, jobs, flags.twice, &|progress| meter.show(progress))
        };
        let mut report = run(&sim, flags.seeds);
        if flags.large > 0 {
            report = report.and(run(&sim.clone().nodes(9).steps(120), flags.large));
        }
        meter.end();
        (report, None)
    };
    let seconds = start.elapsed().as_secs_f64();
    if flags.json {
        let summary = Summary {
            seeds: report.seeds,
            failed: &report.failed,
            steps: report.steps,
            seconds,
            slowest_seconds: report.slowest.as_secs_f64(),
            counts: &report.counts,
            digest,
        };
        match serde_json::to_string_pretty(&summary) {
            Ok(text) => println!("{text}"),
            Err(error) => {
                eprintln!("sim: the result cannot be written as JSON: {error}");
                return ExitCode::FAILURE;
            }
        }
    } else {
        if flags.counts {
            for (kind, times) in &report.counts {
                println!("{times:>9}  {kind}");
            }
        }
        print!("{report}");
        println!(
            "{} steps in {seconds:.1} s; the slowest cluster was right {:.1} s of virtual time \
             after its last fault",
            report.steps,
            report.slowest.as_secs_f64()
        );
        if let Some((seed, took)) = report.costliest.filter(|_| many) {
            println!("seed {seed} took longest, {:.1} s", took.as_secs_f64());
        }
    }
    let missing = report.missing();
    if flags.complete && !missing.is_empty() {
        eprintln!("sim: never took effect: {}", missing.join(", "));
        return ExitCode::from(3);
    }
    if report.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    }
}

/// One seed with its history; a failing one is made small.
fn one(sim: &Sim, seed: u64, flags: &Flags) -> (Report, Option<String>) {
    let history = sim.history(seed);
    if !flags.json {
        print!("{history}");
    }
    let run = sim.replay(&history);
    let digest = format!("{:016x}", run.digest);
    if !flags.json {
        println!("digest {digest}");
    }
    let report = sim.seeds(seed..seed.saturating_add(1), 1, &|_| {});
    if flags.trace {
        let mut trace = stderr().lock();
        let failure = report.failed.first();
        let minimal = failure.and_then(|failure| failure.minimal.as_ref());
        let shown = minimal.map_or(&history, |run| &run.history);
        for line in sim.replay_in_full(shown).trace {
            // Nobody reads any more: nothing to be done about it.
            writeln!(trace, "{line}").ok();
        }
    }
    (report, Some(digest))
}

/// A line on stderr that says how far the seeds are, where somebody sees it.
struct Meter {
    start: Instant,
    /// When the line is to be written next; `None`: never.
    next: Mutex<Option<Instant>>,
}

impl Meter {
    fn new(start: Instant) -> Self {
        Self {
            start,
            next: Mutex::new(stderr().is_terminal().then_some(start)),
        }
    }

    fn show(&self, progress: Progress) {
        let Ok(mut next) = self.next.lock() else {
            return;
        };
        let now = Instant::now();
        if next.is_none_or(|next| now < next) {
            return;
        }
        *next = Some(now + Duration::from_millis(200));
        let Progress { done, failed, of } = progress;
        let rate = done as f64 / self.start.elapsed().as_secs_f64().max(0.001);
        eprint!("\r{done} of {of} seeds, {failed} failed, {rate:.0} seeds/s ");
    }

    fn end(&self) {
        if let Ok(next) = self.next.lock()
            && next.is_some()
        {
            eprintln!();
        }
    }
}
