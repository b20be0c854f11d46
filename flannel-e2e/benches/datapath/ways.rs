//! The ways between the pods.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
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
use nix::sched::CpuSet;
use nix::unistd::Pid;

use crate::ground::{CABLE, Ground};
use crate::traffic::pin;

/// The port of the UDP backend and of the proxy.
const PORT: u16 = 8285;
/// How many packets wait in the proxy's device: as many as in the UDP backend's.
const QUEUE: u32 = 5_000;

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
    /// The threads that forward, of each node.
    threads: [Vec<Pid>; 2],
    over: Arc<AtomicBool>,
}

/// What is between two pods.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) family: Family,
    /// Of the cable.
    pub(crate) mtu: u32,
    /// So many peers more, that exist in the store alone.
    pub(crate) peers: u32,
}

impl Plan {
    pub(crate) const USUAL: Self = Self {
        family: Family::V4,
        mtu: 1500,
        peers: 0,
    };
}

/// The threads of this process that forward packets.
fn forwarding() -> BTreeSet<i32> {
    let tasks = fs::read_dir("/proc/self/task").expect("the kernel tells");
    let forwards = |task: &fs::DirEntry| {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        name.starts_with(PROXY) || name.starts_with("flannel-udp")
    };
    let tasks = tasks.flatten().filter(forwards);
    let ids = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok());
    ids.collect()
}

/// What the threads of the simple proxies are called.
const PROXY: &str = "simple-proxy";

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
    /// Makes one; `None` if that is not permitted here.
    pub(crate) async fn new(kind: WayKind, plan: Plan, options: &Options) -> Option<Self> {
        let mut way = Self {
            kind,
            ground: Ground::new(&format!("way-{}", kind as u8), plan.mtu)?,
            overlays: Vec::new(),
            proxies: Vec::new(),
            threads: [Vec::new(), Vec::new()],
            over: Arc::new(AtomicBool::new(false)),
        };
        match kind {
            WayKind::Bare => way.routes(plan.mtu),
            WayKind::Vxlan | WayKind::Udp => way.overlay(plan.peers, options).await,
            WayKind::Baseline => way.proxies(plan.mtu - 28),
        }
        way.ground.assert_reachable(kind.name(), plan.family);
        Some(way)
    }

    /// Gives each node, with its pod, a processor of its own, or lets both have all there are.
    pub(crate) fn separate(&mut self, processors: Option<[usize; 2]>) {
        self.ground.processors = processors;
        for (node, threads) in self.threads.iter().enumerate() {
            for thread in threads {
                match processors {
                    Some(processors) => pin(*thread, [processors[node]]),
                    None => pin(*thread, 0..CpuSet::count()),
                }
            }
        }
    }

    /// Notes the threads of a node: those that are there and were not before.
    fn note_threads(&mut self, node: usize, before: &BTreeSet<i32>) {
        let now = forwarding();
        let new = now.difference(before);
        self.threads[node] = new.map(|id| Pid::from_raw(*id)).collect();
    }

    fn routes(&mut self, mtu: u32) {
        self.ground.add_pods([by_hand(1), by_hand(2)], mtu);
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

    async fn overlay(&mut self, peers: u32, options: &Options) {
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
            let before = forwarding();
            let overlay = with_backend(builder, self.kind, host, options)
                .start()
                .await;
            let overlay = overlay.expect("all parts");
            overlay.ready().await.expect("ready");
            self.overlays.push(overlay);
            self.note_threads(i, &before);
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
    fn proxies(&mut self, mtu: u32) {
        self.ground.add_pods([by_hand(1), by_hand(2)], mtu);
        for (from, to) in [(0, 1), (1, 0)] {
            let host = &self.ground.nodes[from];
            for command in [
                "ip tuntap add dev flannel0 mode tun multi_queue".to_owned(),
                format!("ip link set flannel0 mtu {mtu} txqueuelen {QUEUE} up"),
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
            let before = forwarding();
            let (started, start) = mpsc::channel();
            let proxy = thread::Builder::new().name(PROXY.to_owned());
            let proxy = proxy.spawn(move || {
                started.send(()).expect("it is waited for");
                baseline::run(&queue, socket, peer, &over).expect("it runs until it is stopped");
            });
            self.proxies.push(proxy.expect("a thread"));
            // It has its name by then.
            start.recv().expect("it runs");
            self.note_threads(from, &before);
        }
    }
}

fn with_backend(
    builder: OverlayBuilder,
    kind: WayKind,
    host: &Host,
    options: &Options,
) -> OverlayBuilder {
    if kind == WayKind::Vxlan {
        return builder.backend(VxlanBackend::new()).kernel(kernel(host));
    }
    let sockets = InNamespace::fd(namespace(host));
    let path = Forwarders::new(options.clone(), Arc::new(sockets));
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
