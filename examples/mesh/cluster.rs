//! The nodes: namespaces, overlays, pods.

use std::sync::Arc;
use std::time::Duration;

use flannel::{
    DualStack, Forwarders, HostGwBackend, InNamespace, MemoryManager, NetlinkKernel, NetworkConfig,
    NodeId, Overlay, PoolMode, Status, Subnet, UdpBackend, VxlanBackend, WithTunnels, udp,
};
use flannel_testkit::netns::{Host, Lab, Ns};
use flannel_testkit::prober::{Options, Pinged, Prober, Report as Probed, ping_matrix};

use crate::{Backend, Error, Families, Flags};

/// One node.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) ns: Ns,
    /// What carries its packets with the UDP backend: it outlives the overlay.
    paths: Forwarders,
    pub(crate) overlay: Overlay,
    pub(crate) subnets: DualStack<Subnet>,
    pub(crate) mtu: u32,
}

/// All nodes with a pod each.
pub(crate) struct Cluster {
    manager: MemoryManager,
    pub(crate) nodes: Vec<Node>,
    pub(crate) pods: Vec<Host>,
}

impl Cluster {
    pub(crate) async fn start(flags: &Flags, lab: &Lab) -> Result<Self, Error> {
        let config = NetworkConfig::from_json(&config_text(flags), PoolMode::Allocated)?;
        let manager = MemoryManager::new(config);
        let underlay = tokio::task::block_in_place(|| lab.underlay(usize::from(flags.nodes)))?;
        let mut starting = Vec::new();
        for (i, host) in underlay.nodes.into_iter().enumerate() {
            let (name, manager, flags) =
                (format!("node-{}", i + 1), manager.clone(), flags.clone());
            let sockets = InNamespace::fd(host.ns.fd().try_clone_to_owned()?);
            let paths = Forwarders::new(udp::Options::default(), Arc::new(sockets));
            starting.push(tokio::spawn(start_node(
                name, host.ns, paths, manager, flags,
            )));
        }
        let mut nodes = Vec::new();
        for node in starting {
            nodes.push(node.await??);
        }
        for node in &nodes {
            // Every node knows every other before the first ping.
            let others = nodes.len() - 1;
            node.overlay
                .wait_for(|status| status.peers == others)
                .await?;
            node.overlay.converged().await?;
        }
        let pods = tokio::task::block_in_place(|| {
            let pods = nodes.iter().enumerate().map(|(i, node)| {
                lab.pod(&format!("pod-{}", i + 1), &node.ns, &node.subnets, node.mtu)
            });
            pods.collect::<Result<Vec<_>, _>>()
        })?;
        Ok(Self {
            manager,
            nodes,
            pods,
        })
    }

    /// One ping for every ordered pair of pods and every family.
    pub(crate) fn ping_all(&self) -> Vec<Pinged> {
        tokio::task::block_in_place(|| ping_matrix(&self.pods, Duration::from_secs(2)))
    }

    /// Stops the first node's overlay and starts it anew, as an upgrade does, while numbered
    /// packets flow between its pod and the second one's.
    pub(crate) async fn restart_first(&mut self, flags: &Flags) -> Result<Probed, Error> {
        let options = Options {
            rate: 2_000,
            packets: 5_000,
            ..Options::default()
        };
        let (a, b) = (&self.pods[0], &self.pods[1]);
        let ip = |host: &Host| host.ips.ips().next().ok_or("a pod has no address");
        let prober = Prober::start((&a.ns, ip(a)?), (&b.ns, ip(b)?), options)?;
        let flowing =
            tokio::task::block_in_place(|| prober.wait_received(1_000, Duration::from_secs(5)));
        if flowing {
            let node = self.nodes.remove(0);
            node.overlay.stop().await?;
            let manager = self.manager.clone();
            let again = start_node(node.name, node.ns, node.paths, manager, flags.clone()).await?;
            self.nodes.insert(0, again);
        }
        Ok(tokio::task::block_in_place(|| prober.finish()))
    }

    /// Stops the overlays; packets keep flowing.
    pub(crate) async fn stop(self) {
        for node in self.nodes {
            node.overlay.stop().await.ok();
        }
    }
}

async fn start_node(
    name: String,
    ns: Ns,
    paths: Forwarders,
    manager: MemoryManager,
    flags: Flags,
) -> Result<Node, Error> {
    let kernel = NetlinkKernel::in_namespace_fd(ns.fd().try_clone_to_owned()?)?;
    let builder = Overlay::builder(NodeId::new(&name)?).manager(manager);
    let builder = match flags.backend {
        Backend::Vxlan => builder.kernel(kernel).backend(VxlanBackend::new()),
        Backend::HostGw => builder.kernel(kernel).backend(HostGwBackend::new()),
        Backend::Udp => builder
            .kernel(WithTunnels::new(kernel, paths.clone()))
            .backend(UdpBackend::new()),
    };
    let overlay = builder.start().await?;
    overlay.ready().await?;
    let status = overlay.status();
    let Status {
        lease: Some(lease),
        mtu: Some(mtu),
        ..
    } = &*status
    else {
        return Err(format!("{name} is ready without a lease").into());
    };
    let (subnets, mtu) = (lease.subnet, *mtu);
    Ok(Node {
        name,
        ns,
        paths,
        overlay,
        subnets,
        mtu,
    })
}

fn config_text(flags: &Flags) -> String {
    let v4 = format!(r#""Network": "{}""#, flags.network);
    let v6 = format!(
        r#""EnableIPv6": true, "IPv6Network": "{}""#,
        flags.ipv6_network
    );
    let networks = match flags.family {
        Families::V4 => v4,
        Families::V6 => format!(r#""EnableIPv4": false, {v6}"#),
        Families::Dual => format!("{v4}, {v6}"),
    };
    format!(
        r#"{{ {networks}, "Backend": {{ "Type": "{}" }} }}"#,
        flags.backend.name()
    )
}
