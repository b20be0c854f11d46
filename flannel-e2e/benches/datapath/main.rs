//! The ways between two pods, measured against one another: bare routing, kernel VXLAN, the UDP
//! backend, and a proxy that moves one packet per system call, as flannel's does.
//!
//! `cargo xtask datapath` (root; it works in namespaces of its own, and all traffic is between
//! them). The ways stand side by side and are measured in turns, round after round, in three modes of
//! the devices between the nodes; of each the median is taken, and of its ratio to another way's in
//! the same round, so that what else the machine does concerns both. Streams are measured with each
//! of two congestion controls, because the machine's own, whichever it is, decides much of the result.
//! Prints tables with the goals beside the ratios; `--svg FILE` draws them, `--rounds N` takes more or
//! fewer.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a program that measures real time and prints a table"
)]

mod congestion;
mod ground;
mod report;
mod svg;
mod traffic;
mod ways;

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use flannel_backend_udp::Options;
use flannel_core::Family;

use congestion::Congestion;
use ground::Mode;
use report::{Kind, Table, Values};
use ways::{Plan, Way, WayKind};

/// What is measured of each way in each round, a value for each [`Kind`].
pub(crate) fn sample(way: &Way, family: Family, args: &Args, works: &[Work]) -> Values {
    let path = way.ground.path(family);
    let short = |long: u64| Duration::from_millis(if args.quick { long / 4 } else { long });
    let mut values = Values::default();
    for work in works {
        match work {
            Work::Stream => {
                let one = traffic::streams(path, 1, short(300), short(1_200));
                values.set(Kind::Stream, one.rate / 1e9);
                values.set(Kind::Cpu, one.cpu);
            }
            Work::Streams => {
                let four = traffic::streams(path, 4, short(300), short(800));
                values.set(Kind::Streams, four.rate / 1e9);
            }
            Work::Small => {
                let small = traffic::highest_rate(path, 1, short(250));
                values.set(Kind::Small, small / 1e3);
            }
            Work::Flood => {
                let flood = traffic::flood(path, f64::INFINITY, 1, short(400));
                values.set(Kind::Flood, flood.loss * 100.0);
            }
            Work::RoundTrips => {
                let (median, slow) = traffic::round_trips(path, short(500));
                values.set(Kind::Median, median);
                values.set(Kind::Slow, slow);
            }
        }
    }
    values
}

/// What pods do to be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Work {
    Stream,
    Streams,
    Small,
    Flood,
    RoundTrips,
}

impl Work {
    /// What is known then.
    const fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Stream => &[Kind::Stream, Kind::Cpu],
            Self::Streams => &[Kind::Streams],
            Self::Small => &[Kind::Small],
            Self::Flood => &[Kind::Flood],
            Self::RoundTrips => &[Kind::Median, Kind::Slow],
        }
    }
}

#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// Draw the tables too
    #[arg(long, value_name = "FILE")]
    svg: Option<String>,
    /// How often each way is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Shorter measurements, for a look
    #[arg(long)]
    quick: bool,
    /// The three modes alone, without what follows them
    #[arg(long)]
    modes_only: bool,
    /// These modes alone
    #[arg(long, value_enum, value_delimiter = ',')]
    modes: Vec<Mode>,
    /// These congestion controls alone, where streams are measured with several
    #[arg(long, value_enum, value_delimiter = ',')]
    congestions: Vec<Congestion>,
    /// These ways alone
    #[arg(long, value_enum, value_delimiter = ',')]
    ways: Vec<WayKind>,
    /// This work alone
    #[arg(long, value_enum, value_delimiter = ',')]
    works: Vec<Work>,
    /// How the UDP backend works, as JSON: `{"threads": "One"}`
    #[arg(long, value_name = "JSON", value_parser = options, default_value = "{}")]
    options: Options,
    /// What cargo gives a benchmark; without it nothing is measured
    #[arg(long, hide = true)]
    bench: bool,
    /// Parts of other benchmarks
    #[arg(hide = true)]
    words: Vec<String>,
}

fn options(text: &str) -> Result<Options, serde_json::Error> {
    serde_json::from_str(text)
}

/// What was asked for, or all.
fn chosen<T: ValueEnum>(asked: &[T]) -> Vec<T> {
    match asked {
        [] => T::value_variants().to_vec(),
        some => some.to_vec(),
    }
}

impl Args {
    fn works(&self) -> Vec<Work> {
        chosen(&self.works)
    }
}

/// Those that were asked for, and are there.
fn congestions(args: &Args) -> Vec<Congestion> {
    let mut all = chosen(&args.congestions);
    all.retain(|congestion| match congestion.check() {
        Ok(()) => true,
        Err(error) => {
            let (name, own) = (congestion.name(), congestion::machines_own());
            // Most is measured with it, so that is never left out.
            let is_usual = *congestion == Congestion::Cubic;
            eprintln!(
                "... {name} cannot be had here ({error}; `modprobe tcp_{name}` loads it): {}",
                match is_usual {
                    true => format!("streams go by this machine's own, {own}"),
                    false => "left out".to_owned(),
                }
            );
            is_usual
        }
    });
    all
}

/// Measures ways in turns.
fn measure(args: &Args, works: &[Work], what: &str, ways: &[Way], family: Family) -> Table {
    let mut table = Table::new(what, ways.iter().map(|way| way.kind).collect());
    table.keep(|kind| works.iter().any(|work| work.kinds().contains(&kind)));
    for round in 0..args.rounds.max(1) {
        let mut row = vec![Values::default(); ways.len()];
        for i in 0..ways.len() {
            let at = (i + round) % ways.len();
            let (name, of) = (ways[at].kind.name(), args.rounds);
            eprintln!("... {what}: round {} of {of}, {name}", round + 1);
            row[at] = sample(&ways[at], family, args, works);
        }
        table.add(row);
    }
    table
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let args = Args::parse();
    let others = args.words.iter().any(|word| word != "datapath");
    if !args.bench || others {
        return ExitCode::SUCCESS;
    }
    eprintln!("... making namespaces");
    let mut ways = Vec::new();
    for kind in chosen(&args.ways) {
        let Some(way) = Way::new(kind, Plan::USUAL, &args.options).await else {
            return ExitCode::SUCCESS;
        };
        ways.push(way);
    }
    let mut tables = Vec::new();
    let congestions = congestions(&args);
    for congestion in congestions.iter().copied() {
        // What is not TCP is the same with each of them.
        let works = args.works().into_iter().filter(|work| {
            congestion == Congestion::Cubic || matches!(work, Work::Stream | Work::Streams)
        });
        let works: Vec<Work> = works.collect();
        if works.is_empty() {
            continue;
        }
        for mode in chosen(&args.modes) {
            for way in &ways {
                way.ground.set_mode(mode);
                way.ground.set_congestion(congestion);
            }
            let what = format!("{}{}", mode.name(), congestion.suffix());
            tables.push(tokio::task::block_in_place(|| {
                measure(&args, &works, &what, &ways, Family::V4)
            }));
        }
    }
    for way in &ways {
        way.ground.set_congestion(Congestion::Cubic);
    }
    let mut missed = 0;
    for table in &tables {
        print!("{table}");
        missed += report::goals(table);
    }
    if !args.modes_only {
        for table in further(&args, &congestions, ways).await {
            print!("{table}");
            missed += report::goals(&table);
            tables.push(table);
        }
    }
    if let Some(file) = &args.svg
        && let Err(error) = fs::write(file, svg::draw(&tables))
    {
        eprintln!("{file}: {error}");
        return ExitCode::FAILURE;
    }
    if missed > 0 {
        println!("{missed} goals were missed");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// What is measured of fewer works: a processor for each node, large packets below; and in the mode
/// `nic` alone: a lossy underlay, many flows, many peers, IPv6.
async fn further(args: &Args, congestions: &[Congestion], mut ways: Vec<Way>) -> Vec<Table> {
    let mut tables = separated(args, &mut ways);
    tables.extend(jumbo(args).await);
    for way in &ways {
        way.ground.set_mode(Mode::Nic);
        way.ground.lose(1);
    }
    for congestion in congestions.iter().copied() {
        for way in &ways {
            way.ground.set_congestion(congestion);
        }
        let what = format!("1 % lost by the underlay{}", congestion.suffix());
        tables.push(measure_bulk(args, &what, &ways, 1));
    }
    for way in &ways {
        way.ground.lose_none();
        way.ground.set_congestion(Congestion::Cubic);
    }
    tables.push(measure_bulk(args, "64 streams", &ways, 64));
    ways.retain(|way| way.kind != WayKind::Baseline);
    ways.retain(|way| way.kind != WayKind::Udp);
    let many = Plan {
        peers: 50_000,
        ..Plan::USUAL
    };
    if let Some(way) = Way::new(WayKind::Udp, many, &args.options).await {
        way.ground.set_mode(Mode::Nic);
        ways.push(way);
        tables.push(tokio::task::block_in_place(|| {
            measure(args, &args.works(), "50,000 peers", &ways, Family::V4)
        }));
    }
    drop(ways);
    let plan = Plan {
        family: Family::V6,
        ..Plan::USUAL
    };
    let mut ways = Vec::new();
    for kind in [WayKind::Bare, WayKind::Vxlan, WayKind::Udp] {
        if let Some(way) = Way::new(kind, plan, &args.options).await {
            way.ground.set_mode(Mode::Nic);
            ways.push(way);
        }
    }
    tables.push(tokio::task::block_in_place(|| {
        measure(
            args,
            &args.works(),
            "IPv6 inside and outside",
            &ways,
            Family::V6,
        )
    }));
    tables
}

/// A node and its pod have a processor, the others the other: so it is where nodes are busy.
fn separated(args: &Args, ways: &mut [Way]) -> Vec<Table> {
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
    if processors < 2 {
        eprintln!("... one processor per node: left out, there is only one");
        return Vec::new();
    }
    for way in &mut *ways {
        way.separate(Some([0, 1]));
    }
    let modes = chosen(&args.modes).into_iter().map(|mode| {
        for way in &*ways {
            way.ground.set_mode(mode);
        }
        let what = format!("one processor per node, {}", mode.name());
        measure_bulk(args, &what, ways, 1)
    });
    let tables = modes.collect();
    for way in ways {
        way.separate(None);
    }
    tables
}

/// An underlay of 9,000 bytes.
async fn jumbo(args: &Args) -> Vec<Table> {
    let plan = Plan {
        mtu: 9_000,
        ..Plan::USUAL
    };
    let mut ways = Vec::new();
    for kind in chosen(&args.ways) {
        ways.extend(Way::new(kind, plan, &args.options).await);
    }
    let modes = [Mode::Nic, Mode::Wire].into_iter().map(|mode| {
        for way in &ways {
            way.ground.set_mode(mode);
        }
        let what = format!("9,000 bytes, {}", mode.name());
        measure_bulk(args, &what, &ways, 1)
    });
    modes.collect()
}

/// Streams alone.
fn measure_bulk(args: &Args, what: &str, ways: &[Way], count: usize) -> Table {
    let mut table = Table::new(what, ways.iter().map(|way| way.kind).collect());
    table.keep(|kind| Work::Stream.kinds().contains(&kind));
    let (lead, time) = (Duration::from_millis(500), Duration::from_millis(1_500));
    tokio::task::block_in_place(|| {
        for round in 0..args.rounds.max(1) {
            eprintln!("... {what}: round {} of {}", round + 1, args.rounds);
            let mut row = vec![Values::default(); ways.len()];
            for i in 0..ways.len() {
                let at = (i + round) % ways.len();
                let bulk = traffic::streams(ways[at].ground.path(Family::V4), count, lead, time);
                row[at].set(Kind::Stream, bulk.rate / 1e9);
                row[at].set(Kind::Cpu, bulk.cpu);
            }
            table.add(row);
        }
    });
    table
}
