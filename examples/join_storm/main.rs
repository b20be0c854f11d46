//! A thousand nodes that ask etcd for a lease at the same moment: how long it takes, how many
//! transactions it costs, and whether anybody got what another one has.
//!
//! `cargo run --release --features etcd --example join_storm -- --svg storm.svg`

#![allow(
    clippy::disallowed_methods,
    clippy::exit,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a program for the terminal"
)]

#[path = "../shared/etcd.rs"]
mod explain;
mod pool;
mod progress;
mod report;
mod storm;
mod svg;

use std::io::{ErrorKind, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, value_parser};
use flannel::kv::{KeyRange, Layout, Op, Store, Txn};
use flannel::{EtcdOptions, EtcdStore, error_chain};
use flannel_testkit::servers::Etcd;
use tracing_subscriber::EnvFilter;

use crate::pool::Pool;
use crate::progress::Progress;
use crate::report::Report;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Lets many nodes lease a subnet on etcd at once, each with a subnet manager of its own, and
/// checks that all got one and no two the same. Needs no root; what it writes to etcd it removes.
#[derive(Parser, Clone)]
struct Flags {
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = value_parser!(u32).range(1..=20_000))]
    nodes: u32,
    /// How many of them may ask at the same time [default: all]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    concurrency: Option<u32>,
    /// How many subnets the pool has [default: the power of two from twice the nodes on]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=Pool::LARGEST as i64))]
    pool: Option<u32>,
    /// Over how many connections the nodes reach etcd; as many as there are nodes is possible if
    /// the limit of open files allows it (`ulimit -n`)
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = value_parser!(u32).range(1..))]
    connections: u32,
    /// Where etcd is [default: one of its own, in a temporary directory]
    #[arg(long, value_name = "URL,…", value_delimiter = ',')]
    endpoints: Vec<String>,
    /// Draw how long the leases took into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// Leave what was written in etcd, and print how to look at it and how to remove it
    #[arg(long)]
    keep: bool,
}

#[tokio::main(flavor = "multi_thread")]
async fn main() -> ExitCode {
    let flags = Flags::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| "error".into()))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match run(&flags).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("join_storm: {}", error_chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn run(flags: &Flags) -> Result<ExitCode, Error> {
    let own = match flags.endpoints.is_empty() {
        true => Some(start_etcd()?),
        false => None,
    };
    let endpoints = match &own {
        Some(etcd) => vec![etcd.endpoint()],
        None => flags.endpoints.clone(),
    };
    let options = match storm::options(&endpoints) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("join_storm: {error}");
            return Ok(ExitCode::from(2));
        }
    };
    // The storm runs as a task of its own, so that Ctrl-C is heard whatever it is doing.
    let progress = Arc::new(Progress::new(flags.nodes));
    let work = tokio::spawn(work(flags.clone(), options.clone(), Arc::clone(&progress)));
    let abort = work.abort_handle();
    let done = tokio::select! {
        done = work => done.map_err(Error::from).and_then(|done| done),
        _ = tokio::signal::ctrl_c() => {
            abort.abort();
            Err("interrupted".into())
        }
    };
    progress.end();
    clean_up(flags, own, &options).await;
    let report = done?;
    if let Some(file) = &flags.svg {
        let drawn = svg::histogram(&report.title(), report.times());
        std::fs::write(file, drawn).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    report.print(flags.json)?;
    Ok(match report.problem() {
        None => ExitCode::SUCCESS,
        Some(problem) => {
            eprintln!("join_storm: {problem}");
            ExitCode::from(3)
        }
    })
}

async fn work(
    flags: Flags,
    options: EtcdOptions,
    progress: Arc<Progress>,
) -> Result<Report, Error> {
    let hand = EtcdStore::new(options.clone())?;
    let pool = Pool::new(flags.pool, flags.nodes);
    storm::prepare(&hand, &pool).await?;
    let joined = storm::join(&flags, options, &progress).await?;
    let records = storm::records(&hand).await?;
    Ok(Report::new(&flags, &pool, &joined, &records))
}

fn start_etcd() -> Result<Etcd, Error> {
    tokio::task::block_in_place(Etcd::start).map_err(|error| match error.kind() {
        ErrorKind::NotFound => format!(
            "{error}: install it (Debian: apt-get install etcd-server), or say with --endpoints \
             where one is"
        )
        .into(),
        _ => format!("starting etcd: {error}").into(),
    })
}

/// Leaves etcd as it was, or says how to look at what is left.
async fn clean_up(flags: &Flags, own: Option<Etcd>, options: &EtcdOptions) {
    let Ok(hand) = EtcdStore::new(options.clone()) else {
        return;
    };
    let prefix = format!("{}/", hand.layout().prefix());
    let endpoints = hand.endpoints().join(",");
    match own {
        Some(etcd) if flags.keep => {
            let data = etcd.keep();
            let data = data.display();
            eprintln!("kept:   {data}");
            eprintln!("look:   etcd --data-dir {data} & etcdctl get --prefix {prefix}");
            eprintln!("remove: rm -r {data}");
        }
        Some(etcd) => {
            drop(etcd);
            eprintln!("etcd is stopped and its data are removed");
        }
        None if flags.keep => {
            eprintln!("look:   etcdctl --endpoints {endpoints} get --prefix {prefix}");
            eprintln!("remove: etcdctl --endpoints {endpoints} del --prefix {prefix}");
        }
        None => {
            let txn = Txn {
                then: vec![Op::Delete(KeyRange::prefix(prefix.as_str()))],
                ..Txn::default()
            };
            match hand.txn(txn).await {
                Ok(_) => eprintln!("all keys under {prefix} are removed"),
                Err(error) => eprintln!(
                    "the keys under {prefix} could not be removed: {}: \
                     etcdctl --endpoints {endpoints} del --prefix {prefix}",
                    error_chain(&error)
                ),
            }
        }
    }
}

/// Keys of our own, so that a cluster in the same etcd sees nothing of it.
fn layout() -> Layout {
    Layout::new(&format!("/flannel-join-storm/{}", std::process::id()))
}
