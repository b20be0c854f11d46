//! One node's overlay in a process of its own; for the test that kills it.
#![allow(clippy::print_stdout, reason = "how the program tells its parent")]

use std::error::Error;
use std::io::{Read, stdin};

use flannel_backend_hostgw::HostGwBackend;
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{MemoryManager, Overlay};
use flannel_e2e::{DUAL, Orders, config};
use flannel_netlink::NetlinkKernel;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut line = String::new();
    stdin().read_line(&mut line)?;
    let orders: Orders = serde_json::from_str(&line)?;
    let manager = MemoryManager::new(config(DUAL));
    // The config of the store counts.
    manager.import(&orders.store)?;
    let overlay = Overlay::builder(orders.node)
        .manager(manager)
        .backend(VxlanBackend::new())
        .backend(HostGwBackend::new())
        .kernel(NetlinkKernel::in_namespace(&orders.namespace)?)
        .start()
        .await?;
    overlay.ready().await?;
    println!("ready");
    // Until the parent kills us, or is gone.
    tokio::task::spawn_blocking(|| stdin().read(&mut [0])).await??;
    Ok(())
}
