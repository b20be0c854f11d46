//! A real node: leases on etcd, VXLAN, until it is told to stop. With `--lab` it runs in a network
//! namespace of its own on an underlay that all nodes of the lab share, so that two terminals make
//! a cluster on one machine.
//!
//! `sudo -E cargo run --features etcd --example etcd_node -- --lab demo --node a`

#![allow(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "a program for the terminal"
)]

#[path = "../shared/etcd.rs"]
mod explain;
mod flags;
mod place;
mod serve;
mod tell;

use std::future::Future;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use flannel::{EtcdManager, Manager, error_chain};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, sleep_until};
use tracing_subscriber::EnvFilter;

use crate::flags::Flags;
use crate::place::Place;

/// How long etcd may take to answer at the start: it may be starting, too.
const PATIENCE: Duration = Duration::from_secs(10);

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Why it ends with another exit code than 0: the code and one line.
#[derive(Debug)]
pub(crate) struct End {
    code: u8,
    why: String,
}

impl End {
    /// Something failed.
    pub(crate) fn failed(why: impl ToString) -> Self {
        Self {
            code: 1,
            why: why.to_string(),
        }
    }

    /// The flags cannot be used.
    pub(crate) fn usage(why: impl ToString) -> Self {
        Self {
            code: 2,
            why: why.to_string(),
        }
    }

    /// It ran to the end and found a problem.
    pub(crate) fn problem(why: impl ToString) -> Self {
        Self {
            code: 3,
            why: why.to_string(),
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
    match run(flags).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(end) => {
            eprintln!("etcd_node: {}", end.why);
            ExitCode::from(end.code)
        }
    }
}

async fn run(flags: Flags) -> Result<(), End> {
    let node = flags.node()?;
    let manager = EtcdManager::new(flags.etcd()?).map_err(End::usage)?;
    let underlay = flags.underlay()?;
    let mut stop = Stop::new(flags.run_for())?;
    place::check_rights(&flags).await?;
    tokio::select! {
        found = find_config(&manager) => found?,
        () = stop.asked() => return match stop.time_is_up() {
            true => Err(End::problem("etcd did not answer in time")),
            false => Ok(()),
        },
    }
    let mut place = Place::find(&flags, &node)?;
    let served = serve::serve(&flags, node, manager, underlay, &mut place, &mut stop).await;
    // Also after a failure: nobody is to find half a lab.
    place.leave(&flags)?;
    served
}

/// Waits until etcd answers, and sees that there is a network config.
async fn find_config(manager: &EtcdManager) -> Result<(), End> {
    let start = Instant::now();
    let mut is_told = false;
    loop {
        let Err(error) = manager.network_config().await else {
            return Ok(());
        };
        if !error.is_transient() || start.elapsed() >= PATIENCE {
            return Err(End::failed(explain::line(manager.store(), &error)));
        }
        tracing::info!(error = error_chain(&error), "etcd does not answer yet");
        if !std::mem::replace(&mut is_told, true) && std::io::stderr().is_terminal() {
            let endpoints = manager.store().endpoints().join(",");
            let limit = PATIENCE.as_secs();
            eprintln!("etcd does not answer at {endpoints}; trying for {limit} s");
        }
        sleep(Duration::from_millis(300)).await;
    }
}

/// What ends the program in good order: SIGTERM, SIGINT, or the end of its time.
pub(crate) struct Stop {
    terminate: Signal,
    interrupt: Signal,
    at: Option<Instant>,
}

impl Stop {
    fn new(run_for: Option<Duration>) -> Result<Self, End> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(End::failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(End::failed)?,
            at: run_for.map(|time| Instant::now() + time),
        })
    }

    /// Waits until it is to stop.
    pub(crate) fn asked(&mut self) -> impl Future<Output = ()> + Send {
        let at = self.at;
        let time_is_up = async move {
            match at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        async {
            tokio::select! {
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
                () = time_is_up => {}
            }
        }
    }

    /// Whether its time is up.
    pub(crate) fn time_is_up(&self) -> bool {
        self.at.is_some_and(|at| Instant::now() >= at)
    }
}
