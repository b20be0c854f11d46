//! A real node: its lease on its Kubernetes Node, the backend of the config, until it is told to stop.
//! With `--lab` it runs in a network namespace of its own on an underlay that all nodes of the lab
//! share, so that two terminals and an API server make a cluster on one machine.
//!
//! `sudo -E cargo run --features kube --example kube_node -- --kubeconfig FILE --lab demo --node a`

#![allow(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "a program for the terminal"
)]

mod flags;
#[path = "../shared/node/mod.rs"]
mod node;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use flannel::{KubeEvent, KubeManager, Manager, NodeId, PublicIp, error_chain, manager};
use tokio::time::{Instant, sleep};

use crate::flags::Flags;
use crate::node::{End, PATIENCE, Place, Stop};

/// The command that runs it as root.
const AGAIN: &str = "sudo -E cargo run --features kube --example kube_node --";

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let flags = Flags::parse();
    // The client logs as an error what is only tried again.
    node::log("error,kube_client=off");
    node::exit("kube_node", run(flags).await)
}

async fn run(flags: Flags) -> Result<(), End> {
    let common = &flags.common;
    let id = node::node(flags.node().as_deref())?;
    if common.hold {
        return node::keep(common, &id);
    }
    let (options, server) = flags.kube()?;
    let manager = KubeManager::new(options).map_err(End::usage)?;
    // What is said wrong is said before anything is tried.
    common.underlay(PublicIp::default())?;
    let mut stop = Stop::new(common.run_for())?;
    node::check_rights(common, AGAIN).await?;
    let told = tokio::select! {
        told = find(&manager, &id, &server) => told?,
        () = stop.asked() => return match stop.time_is_up() {
            true => Err(End::problem("the API server did not answer in time")),
            false => Ok(()),
        },
    };
    let underlay = common.underlay(told)?;
    let mut place = Place::find(common, &id)?;
    let restored = tokio::spawn(tell(manager.clone()));
    let served = node::serve(common, id, manager, underlay, &mut place, &mut stop).await;
    restored.abort();
    // Also after a failure: nobody is to find half a lab.
    place.leave(common)?;
    served
}

/// Waits until the API server answers and knows our Node, and sees that there is a network config.
/// Answers the addresses that an operator has set on the Node.
async fn find(manager: &KubeManager, node: &NodeId, server: &str) -> Result<PublicIp, End> {
    let start = Instant::now();
    loop {
        let found = async {
            manager.network_config().await?;
            manager.node_settings(node).await
        };
        let error = match found.await {
            Ok(settings) => return Ok(settings.public_ip),
            Err(error) => error,
        };
        if !error.is_transient() || start.elapsed() >= PATIENCE {
            return Err(End::failed(explain(server, &error)));
        }
        tracing::info!(
            error = error_chain(&error),
            "the API server does not answer yet"
        );
        sleep(Duration::from_millis(300)).await;
    }
}

/// What is wrong, and what to do.
fn explain(server: &str, error: &manager::Error) -> String {
    let why = error_chain(error);
    match error {
        manager::Error::Config(_) => format!("{why}; correct it (--net-conf)"),
        manager::Error::Denied { .. } => format!(
            "{why}; deploy/kube-node.yaml has the rules that are needed: kubectl apply -f it"
        ),
        manager::Error::NotReady { .. } => format!("{why}; give --node"),
        error if error.is_transient() => format!(
            "the API server ({server}) does not answer: {why}; say with --kubeconfig how it is \
             reached"
        ),
        _ => why,
    }
}

/// Prints what was done to our Node and made good.
async fn tell(manager: KubeManager) {
    let mut events = manager.events();
    loop {
        match events.recv().await {
            Ok(KubeEvent::Restored { node, differences }) => {
                for one in differences {
                    let (key, found) = (one.annotation.name(), one.found);
                    let found = found.unwrap_or_else(|| "nothing".to_owned());
                    node::say(&format!(
                        "restored node={node} annotation={key} found={found:?}"
                    ));
                }
            }
            Ok(KubeEvent::NodeRecreated { node, .. }) => {
                node::say(&format!("restored node={node} object=Node"));
            }
            Ok(KubeEvent::ConditionRestored { key }) => {
                node::say(&format!("restored node={key} condition=NetworkUnavailable"));
            }
            Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
            Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
        }
    }
}
