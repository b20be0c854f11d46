//! A whole cluster on one machine: every node a network namespace on a common underlay, with a pod
//! behind it. The nodes lease subnets, build an overlay, reach one another, and heal when
//! something is broken.
//!
//! `sudo -E cargo run --example mesh`

#![allow(
    clippy::disallowed_methods,
    clippy::exit,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a program for the terminal"
)]

mod cluster;
mod repair;
mod report;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use flannel::{Subnet, error_chain};
use flannel_testkit::netns::{Error as LabError, Lab};
use tracing_subscriber::EnvFilter;

use crate::cluster::Cluster;
use crate::report::{Outcome, Report};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Builds a cluster of nodes as network namespaces, shows that every pod reaches every other, and
/// that whatever is broken heals. Needs root; touches nothing outside of its own namespaces.
#[derive(Parser, Clone)]
struct Flags {
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..=64))]
    nodes: u16,
    /// The backend that carries packets between nodes
    #[arg(long, value_enum, default_value_t = Backend::Vxlan)]
    backend: Backend,
    /// The address families of the overlay
    #[arg(long, value_enum, default_value_t = Families::Dual)]
    family: Families,
    /// The IPv4 network that nodes lease their subnets from
    #[arg(long, value_name = "CIDR", default_value = "10.42.0.0/16")]
    network: Subnet,
    /// The IPv6 network that nodes lease their subnets from
    #[arg(long, value_name = "CIDR", default_value = "fd00:42::/48")]
    ipv6_network: Subnet,
    /// Skip the demonstration of repairs
    #[arg(long)]
    no_break: bool,
    /// Leave everything as it is at the end, and print how to look at it and how to remove it
    #[arg(long)]
    keep: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    Vxlan,
    HostGw,
    Udp,
}

impl Backend {
    const fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::Udp => "udp",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Families {
    V4,
    V6,
    Dual,
}

impl Families {
    const fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Dual => "dual",
        }
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let flags = Flags::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| "error".into()))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let lab = match if flags.keep {
        Lab::named("mesh")
    } else {
        Lab::new("mesh")
    } {
        Ok(lab) => Arc::new(lab),
        Err(error @ LabError::NotPermitted { .. }) => {
            eprintln!("mesh: {error}: sudo -E cargo run --example mesh");
            return ExitCode::FAILURE;
        }
        Err(error) => return fail(&error),
    };
    // The cluster runs as a task of its own, so that Ctrl-C is heard whatever it is doing.
    let work = tokio::spawn(run(flags.clone(), Arc::clone(&lab)));
    let (done, interrupted) = tokio::select! {
        done = work => (done, false),
        _ = tokio::signal::ctrl_c() => (Ok(Err("interrupted".into())), true),
    };
    let outcome = match done {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => {
            lab.cleanup();
            eprintln!("all namespaces are removed");
            let code = fail(error.as_ref());
            if interrupted {
                std::process::exit(1); // the task may be in the middle of something slow
            }
            return code;
        }
        Err(panic) => {
            lab.cleanup();
            return fail(&panic);
        }
    };
    if flags.keep {
        if let Some(lab) = Arc::into_inner(lab) {
            report::how_to_look(flags.backend, &lab.keep());
        }
    } else {
        lab.cleanup();
        eprintln!("all namespaces are removed");
    }
    match outcome {
        Outcome::Good => ExitCode::SUCCESS,
        Outcome::Problem(what) => {
            eprintln!("mesh: {what}");
            ExitCode::from(3)
        }
    }
}

async fn run(flags: Flags, lab: Arc<Lab>) -> Result<Outcome, Error> {
    let start = Instant::now();
    let mut report = Report::new(&flags);

    step("making namespaces, starting the nodes");
    let mut cluster = Cluster::start(&flags, &lab).await?;
    report.leases(&cluster);
    if !flags.json {
        report::show_nodes(&cluster);
    }

    step("pinging every pod from every other");
    let pings = cluster.ping_all();
    report.pings(&pings);
    if !flags.json {
        report::show_pings(&cluster, &pings);
    }

    if !flags.no_break {
        step("breaking things");
        let repairs = repair::demonstrate(&cluster).await?;
        if !flags.json {
            report::show_repairs(&repairs);
        }
        report.repairs(repairs);

        step("pinging again");
        let again = cluster.ping_all();
        report.pings(&again);
    }

    step("restarting a node while packets flow");
    let restart = cluster.restart_first(&flags).await?;
    if !flags.json {
        report::show_restart(&restart);
    }
    report.restart(&restart);

    cluster.stop().await;
    report.finish(start.elapsed(), flags.json)
}

fn step(what: &str) {
    eprintln!("... {what}");
}

fn fail(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    eprintln!("mesh: {}", error_chain(error));
    ExitCode::FAILURE
}
