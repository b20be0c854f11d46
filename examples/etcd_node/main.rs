//! A real node: its lease on etcd, the backend of the config there, until it is told to stop. With
//! `--lab` it runs in a network namespace of its own on an underlay that all nodes of the lab share,
//! so that two terminals make a cluster on one machine.
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
#[path = "../shared/node/mod.rs"]
mod node;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use flannel::{EtcdManager, Manager, PublicIp, error_chain};
use tokio::time::{Instant, sleep};

use crate::flags::Flags;
use crate::node::{End, PATIENCE, Place, Stop};

/// The command that runs it as root.
const AGAIN: &str = "sudo -E cargo run --features etcd --example etcd_node --";

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let mut flags = Flags::parse();
    flags.common.take_over = flags.take_over;
    node::log("error");
    node::exit("etcd_node", run(flags).await)
}

async fn run(flags: Flags) -> Result<(), End> {
    let common = &flags.common;
    let id = node::node(flags.node.as_deref())?;
    if common.hold {
        return node::keep(common, &id);
    }
    let manager = EtcdManager::new(flags.etcd()?).map_err(End::usage)?;
    let underlay = common.underlay(PublicIp::default())?;
    let mut stop = Stop::new(common.run_for())?;
    node::check_rights(common, AGAIN).await?;
    tokio::select! {
        found = find_config(&manager) => found?,
        () = stop.asked() => return match stop.time_is_up() {
            true => Err(End::problem("etcd did not answer in time")),
            false => Ok(()),
        },
    }
    let mut place = Place::find(common, &id)?;
    let served = node::serve(common, id, manager, underlay, &mut place, &mut stop).await;
    // Also after a failure: nobody is to find half a lab.
    place.leave(common)?;
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
        if !std::mem::replace(&mut is_told, true)
            && std::io::IsTerminal::is_terminal(&std::io::stderr())
        {
            let endpoints = manager.store().endpoints().join(",");
            let limit = PATIENCE.as_secs();
            eprintln!("etcd does not answer at {endpoints}; trying for {limit} s");
        }
        sleep(Duration::from_millis(300)).await;
    }
}
