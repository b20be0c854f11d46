//! The ways between the pods.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use clap::ValueEnum;
use flannel_backend_udp::{
    Forwarders, InNamespace, Options, Sockets, UdpBackend, UdpOptions, WithTunnels, baseline,
};
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    BackendType, DualStack, Family, MemoryManager, NodeId, Overlay, OverlayBuilder, PublicIp,
    Subnet,
};
use flannel_e2e::{Peers, config, dev, run_in};
use flannel_netlink::NetlinkKernel;
use flannel_testkit::netns::Host;

use crate::ground::{CABLE, Ground};

/// The port of the UDP backend and of the proxy.
const PORT: u16 = 8285;

/// How packets get from node to node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WayKind {
    /// Routes made by hand.
    Bare,
    /// The kernel's VXLAN, by the VXLAN backend.
    Vxlan,
    /// The UDP backend.
    Udp,
    /// A packet per system call.
    Baseline,
}

impl WayKind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare routing",
            Self::Vxlan => "VXLAN",
            Self::Udp => "UDP",
            Self::Baseline => "one packet a call",
        }
    }
}

/// Two pods and what is between them.
#[derive(Debug)]
pub(crate) struct Way {
    pub(crate) kind: WayKind,
    pub(crate) ground: Ground,
    overlays: Vec<Overlay>,
    proxies: Vec<JoinHandle<()>>,
    over: Arc<AtomicBool>,
}

/// The subnet of a node's pods, where no overlay has chosen one.
fn by_hand(node: usize) -> DualStack<Subnet> {
    let subnet = |text: String| text.parse::<Subnet>().expect("a subnet");
    DualStack::both(
        subnet(format!("10.42.{node}.0/24")),
        subnet(format!("fd00:42:0:{node}::/64")),
    )
}

fn namespace(host: &Host) -> std::os::fd::OwnedFd {
    host.ns.fd().try_clone_to_owned().expect("a descriptor")
}

fn kernel(host: &Host) -> NetlinkKernel {
    NetlinkKernel::in_namespace_fd(namespace(host)).expect("a kernel")
}

impl Way {
    /// Makes one, with so many peers more, that exist in the store alone; `None` if that is not
    /// permitted here.
    pub(crate) async fn new(kind: WayKind, family: Family, peers: u32) -> Option<Self> {
        let mut way = Self {
            kind,
            ground: Ground::new(&format!("way-{}", kind as u8))?,
            overlays: Vec::new(),
            proxies: Vec::new(),
            over: Arc::new(AtomicBool::new(false)),
        };
        match kind {
            WayKind::Bare => way.routes(),
            WayKind::Vxlan | WayKind::Udp => way.overlay(peers).await,
            WayKind::Baseline => way.proxies(),
        }
        way.ground.assert_reachable(kind.name(), family);
        Some(way)
    }

    fn routes(&mut self) {
        self.ground.add_pods([by_hand(1), by_hand(2)], 1500);
        for (from, to) in [(0, 1), (1, 0)] {
            let ips = self.ground.nodes[to].ips;
            for (family, subnet) in by_hand(to + 1).iter() {
                let gateway = ips.ip(family).expect("both families");
                run_in(
                    &self.ground.nodes[from].ns,
                    &format!("ip route add {subnet} via {gateway} dev {CABLE}"),
                );
            }
        }
    }

    async fn overlay(&mut self, peers: u32) {
        let backend = match self.kind {
            WayKind::Udp => "udp",
            _ => "vxlan",
        };
        // Wide enough for 50,000 peers.
        let text = format!(
            r#"{{ "Network": "10.0.0.0/8", "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
                 "Backend": {{ "Type": "{backend}" }} }}"#
        );
        let manager = MemoryManager::new(config(&text));
        let others = Peers {
            first: [10, 1, 0, 0].into(),
            vni: 1,
        };
        for (i, node) in [1, 2].into_iter().enumerate() {
            let id = NodeId::new(format!("node-{node}")).expect("a node id");
            let own: DualStack<Subnet> = DualStack::both(
                format!("10.0.{node}.0/24").parse().expect("a subnet"),
                format!("fd00:42:0:{node}::/64").parse().expect("a subnet"),
            );
            manager.reserve(&id, own).expect("it is free");
            let builder = Overlay::builder(id).manager(manager.clone());
            let host = &self.ground.nodes[i];
            let overlay = with_backend(builder, self.kind, host).start().await;
            let overlay = overlay.expect("all parts");
            overlay.ready().await.expect("ready");
            self.overlays.push(overlay);
        }
        for n in 0..peers {
            let mut lease = others.gw_lease(n);
            lease.attrs.backend_type = Some(BackendType::udp());
            manager.put_raw(lease).expect("sound");
        }
        let mut subnets = Vec::new();
        let mut mtu = 0;
        for overlay in &self.overlays {
            let all = overlay.wait_for(|status| status.peers > peers as usize);
            all.await.expect("running");
            overlay.converged().await.expect("running");
            let status = overlay.status();
            subnets.push(status.lease.as_ref().expect("it is ready").subnet);
            mtu = status.mtu.expect("it is ready");
        }
        let subnets = subnets.try_into().expect("two nodes");
        self.ground.add_pods(subnets, mtu);
    }

    /// Two of the simplest there are, over IPv4.
    fn proxies(&mut self) {
        self.ground.add_pods([by_hand(1), by_hand(2)], 1472);
        for (from, to) in [(0, 1), (1, 0)] {
            let host = &self.ground.nodes[from];
            for command in [
                "ip tuntap add dev flannel0 mode tun multi_queue".to_owned(),
                "ip link set flannel0 mtu 1472 txqueuelen 1000 up".to_owned(),
                format!("ip route add 10.42.{}.0/24 dev flannel0", to + 1),
            ] {
                run_in(&host.ns, &command);
            }
            let v4 = |ips: PublicIp| IpAddr::V4(ips.v4.expect("both families"));
            let listen = SocketAddr::new(v4(host.ips), PORT);
            let peer = SocketAddr::new(v4(self.ground.nodes[to].ips), PORT);
            let sockets = InNamespace::fd(namespace(host));
            let queue = sockets.tun_queue(&dev("flannel0"), false).expect("a queue");
            let options = UdpOptions {
                buffer: Options::default().socket_buffer,
                merge: false,
                shared: false,
            };
            let socket = sockets.udp(listen, &options).expect("a socket");
            let over = Arc::clone(&self.over);
            self.proxies.push(thread::spawn(move || {
                baseline::run(&queue, socket, peer, &over).expect("it runs until it is stopped");
            }));
        }
    }
}

fn with_backend(builder: OverlayBuilder, kind: WayKind, host: &Host) -> OverlayBuilder {
    if kind == WayKind::Vxlan {
        return builder.backend(VxlanBackend::new()).kernel(kernel(host));
    }
    let sockets = InNamespace::fd(namespace(host));
    let path = Forwarders::new(Options::default(), Arc::new(sockets));
    builder
        .backend(UdpBackend::new())
        .kernel(WithTunnels::new(kernel(host), path))
}

impl Drop for Way {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for proxy in self.proxies.drain(..) {
            // It has panicked if it is not well, and has said so.
            proxy.join().ok();
        }
        self.overlays.clear();
    }
}
