//! The shortest host program: one node, leases in memory, VXLAN, in a namespace of its own.
//!
//! `sudo -E cargo run --example host`

#![allow(
    clippy::disallowed_methods,
    clippy::exit,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a program for the terminal"
)]

use clap::Parser;
use flannel::{
    ConditionType, MemoryManager, NetlinkKernel, NetworkConfig, NodeId, Overlay, PoolMode,
    VxlanBackend, error_chain,
};
use flannel_testkit::netns::{Error as LabError, Lab};

/// Runs one node in a namespace of its own and prints its lease and its conditions.
#[derive(Parser)]
struct Flags {}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    Flags::parse();
    if let Err(error) = run().await {
        eprintln!("host: {}", error_chain(error.as_ref()));
        if error
            .downcast_ref()
            .is_some_and(|error| matches!(error, LabError::NotPermitted { .. }))
        {
            eprintln!("host: sudo -E cargo run --example host");
        }
        std::process::exit(1);
    }
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    // A namespace with an interface, so that the example leaves this machine alone.
    let lab = Lab::new("host")?;
    let node = lab.underlay(1)?.nodes.remove(0);

    // From here on it is what a host program does.
    let config = r#"{ "Network": "10.42.0.0/16", "Backend": { "Type": "vxlan" } }"#;
    let overlay = Overlay::builder(NodeId::new("node-a")?)
        .manager(MemoryManager::new(NetworkConfig::from_json(
            config,
            PoolMode::Allocated,
        )?))
        .backend(VxlanBackend::new())
        .kernel(NetlinkKernel::in_namespace_fd(
            node.ns.fd().try_clone_to_owned()?,
        )?)
        .start()
        .await?;
    overlay.ready().await?;
    let status = overlay.status();
    if let Some(lease) = &status.lease {
        let ips: Vec<String> = lease.public_ip.ips().map(|ip| ip.to_string()).collect();
        println!(
            "lease {} public {} mtu {}",
            lease.subnet,
            ips.join(","),
            status.mtu.unwrap_or(0)
        );
    }
    for condition in status.conditions.iter() {
        println!("condition {condition} {}", condition.message);
    }
    let healthy = status.is_true(ConditionType::Kernel);
    overlay.stop().await?; // packets keep flowing
    if healthy {
        Ok(())
    } else {
        Err("the kernel has not converged".into())
    }
}
