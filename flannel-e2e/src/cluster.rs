//! [`Cluster`]: nodes on an underlay, each with an overlay and a pod.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use flannel_backend_hostgw::HostGwBackend;
use flannel_backend_udp::{Forwarders, InNamespace, Options, UdpBackend, WithTunnels};
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    DualStack, Family, IfName, Kernel, MemoryManager, NodeId, Object, ObjectKey, Objects, Op,
    Overlay, OverlayBuilder, OverlayName, PublicIp, RouteProtocol, Scope, Subnet,
};
use flannel_netlink::NetlinkKernel;
use flannel_testkit::netns::{Host, Lab, Underlay};
use flannel_testkit::prober::{Pinged, ping_matrix};
use flannel_testkit::require_tool;
use flannel_testkit::staged::StagedManager;

use crate::peers::config;
use crate::wait::{LIMIT, until, within};

/// An overlay of both families.
pub const DUAL: &str = r#"{
    "Network": "10.42.0.0/16",
    "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
    "Backend": { "Type": "vxlan" }
}"#;

/// An IPv4 overlay.
pub const V4: &str = r#"{ "Network": "10.42.0.0/16", "Backend": { "Type": "vxlan" } }"#;

/// An overlay of IPv6 alone.
pub const V6: &str = r#"{
    "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
    "Backend": { "Type": "vxlan" }
}"#;

/// An overlay of both families by plain routes.
pub const DUAL_GW: &str = r#"{
    "Network": "10.42.0.0/16",
    "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
    "Backend": { "Type": "host-gw" }
}"#;

/// An IPv4 overlay by plain routes.
pub const V4_GW: &str = r#"{ "Network": "10.42.0.0/16", "Backend": { "Type": "host-gw" } }"#;

/// An overlay of IPv6 alone by plain routes.
pub const V6_GW: &str = r#"{
    "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
    "Backend": { "Type": "host-gw" }
}"#;

/// An overlay of both families in UDP datagrams.
pub const DUAL_UDP: &str = r#"{
    "Network": "10.42.0.0/16",
    "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
    "Backend": { "Type": "udp" }
}"#;

/// An IPv4 overlay in UDP datagrams, as the config of who names no backend has it.
pub const V4_UDP: &str = r#"{ "Network": "10.42.0.0/16" }"#;

/// An overlay of IPv6 alone in UDP datagrams.
pub const V6_UDP: &str = r#"{
    "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
    "Backend": { "Type": "udp" }
}"#;

/// Start may take longer than a repair: namespaces are made, and other tests run.
const START: Duration = Duration::from_secs(30);

/// What kind of cluster to make.
pub struct Setup {
    /// How many nodes each subnet of the underlay has.
    pub layout: Vec<usize>,
    /// The network config.
    pub config: &'static str,
    /// The backend for VXLAN; the others have no options.
    pub backend: VxlanBackend,
    /// What is different about the nodes' overlays.
    pub tune: Arc<dyn Fn(OverlayBuilder) -> OverlayBuilder + Send + Sync>,
}

impl fmt::Debug for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Setup")
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

impl Setup {
    /// Nodes on one link with default options.
    pub fn new(nodes: usize, config: &'static str) -> Self {
        Self {
            layout: vec![nodes],
            config,
            backend: VxlanBackend::new(),
            tune: Arc::new(|builder| builder),
        }
    }
}

/// Nodes that have found one another, each with a pod.
#[derive(Debug)]
pub struct Cluster {
    /// The owner of all namespaces.
    pub lab: Lab,
    /// The network under the overlay.
    pub underlay: Underlay,
    /// The store.
    pub manager: MemoryManager,
    /// The store as each node sees it: config changes reach the nodes one by one.
    pub views: Vec<StagedManager>,
    /// The nodes.
    pub nodes: Vec<Node>,
    /// A pod of each node, in the same order.
    pub pods: Vec<Host>,
    setup: Setup,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Its namespace and underlay addresses.
    pub host: Host,
    /// What carries its packets with the UDP backend. It outlives the overlay.
    pub paths: Forwarders,
    /// A way to its kernel that the overlay knows nothing of.
    pub hand: NetlinkKernel,
    /// The subnets leased.
    pub subnets: DualStack<Subnet>,
    /// The MTU for its pods.
    pub mtu: u32,
    overlay: Option<Overlay>,
}

/// A kernel in a host's namespace.
fn kernel(host: &Host) -> NetlinkKernel {
    let fd = host.ns.fd().try_clone_to_owned();
    NetlinkKernel::in_namespace_fd(fd.expect("a descriptor")).expect("a kernel")
}

/// Forwarders in a host's namespace.
pub fn paths(host: &Host) -> Forwarders {
    let fd = host.ns.fd().try_clone_to_owned();
    let sockets = InNamespace::fd(fd.expect("a descriptor"));
    Forwarders::new(Options::default(), Arc::new(sockets))
}

impl Cluster {
    /// Makes a cluster and waits until every node has every other, or skips the test if that is
    /// not permitted here.
    ///
    /// # Panics
    /// If it does not come up.
    pub async fn start(test: &str, setup: Setup) -> Option<Self> {
        let lab = Lab::for_test(test)?;
        if !require_tool(test, "ip") {
            return None;
        }
        let underlay = lab.routed_underlay(&setup.layout).expect("an underlay");
        let manager = MemoryManager::new(config(setup.config));
        let view = || StagedManager::new(manager.clone(), config(setup.config));
        let mut cluster = Self {
            lab,
            views: underlay.nodes.iter().map(|_| view()).collect(),
            underlay,
            manager,
            nodes: Vec::new(),
            pods: Vec::new(),
            setup,
        };
        for i in 0..cluster.underlay.nodes.len() {
            cluster.add_node(i).await;
        }
        cluster.settle().await;
        Some(cluster)
    }

    /// Starts the node on a host of the underlay, with its pod.
    async fn add_node(&mut self, i: usize) {
        let host = self.underlay.nodes[i].clone();
        let id = NodeId::new(format!("node-{}", i + 1)).expect("a node id");
        let paths = paths(&host);
        let overlay = self.start_overlay(i, &id, &host, &paths).await;
        let status = overlay.status();
        let lease = status.lease.as_ref().expect("it is ready");
        let node = Node {
            hand: kernel(&host),
            paths,
            subnets: lease.subnet,
            mtu: status.mtu.expect("it is ready"),
            overlay: Some(overlay),
            id,
            host,
        };
        let name = format!("pod-{}", i + 1);
        let pod = self.lab.pod(&name, &node.host.ns, &node.subnets, node.mtu);
        self.pods.push(pod.expect("a pod"));
        self.nodes.push(node);
    }

    /// The overlay of a node on a host, before it is started, that sees the store as the i-th node does.
    pub fn builder(
        &self,
        i: usize,
        id: &NodeId,
        host: &Host,
        paths: &Forwarders,
    ) -> OverlayBuilder {
        let builder = Overlay::builder(id.clone())
            .manager(self.views[i].clone())
            .backend(self.setup.backend.clone())
            .backend(HostGwBackend::new())
            .backend(UdpBackend::new())
            .kernel(WithTunnels::new(kernel(host), paths.clone()));
        (self.setup.tune)(builder)
    }

    async fn start_overlay(
        &self,
        i: usize,
        id: &NodeId,
        host: &Host,
        paths: &Forwarders,
    ) -> Overlay {
        let overlay = self.builder(i, id, host, paths);
        let overlay = overlay.start().await.expect("all parts");
        within("the overlay is ready", START, overlay.ready())
            .await
            .expect("ready");
        overlay
    }

    /// Starts a node's overlay that was stopped.
    pub async fn restart(&mut self, i: usize) {
        let node = &self.nodes[i];
        assert!(node.overlay.is_none(), "it runs");
        let overlay = self
            .start_overlay(i, &node.id, &node.host, &node.paths)
            .await;
        self.nodes[i].overlay = Some(overlay);
    }

    /// Waits until every node has every other and nothing left to do.
    pub async fn settle(&self) {
        let others = self.nodes.len() - 1;
        for node in self.nodes.iter().filter(|node| node.overlay.is_some()) {
            let overlay = node.overlay();
            let known = overlay.wait_for(|status| status.peers >= others);
            within("the peers are known", START, known)
                .await
                .expect("running");
            node.converged().await;
        }
    }

    /// Takes a node's addresses on the underlay away and gives it others, and waits until it publishes
    /// them. Answers which.
    pub async fn readdress(&mut self, i: usize) -> PublicIp {
        let subnets = self.underlay.segments[0].subnets;
        let old = self.nodes[i].host.ips;
        let mut new = PublicIp::default();
        for (family, subnet) in subnets.iter() {
            new.set_ip(subnet.nth(101).expect("it is large"));
            let old = old.ip(family).expect("both families");
            let ns = &self.nodes[i].host.ns;
            ns.remove_address("eth0", old, subnet.len())
                .expect("it is there");
        }
        self.nodes[i].host.ips = new;
        let node = &self.nodes[i];
        node.configure_underlay(&self.underlay);
        let published = node.overlay().wait_for(|status| {
            let lease = status.lease.as_ref();
            lease.is_some_and(|lease| lease.public_ip == new)
        });
        within("it is published", LIMIT, published)
            .await
            .expect("running");
        new
    }

    /// Pings every pod from every other in every family.
    pub fn pings(&self) -> Vec<Pinged> {
        ping_matrix(&self.pods, Duration::from_secs(1))
    }

    /// Asserts that every pod reaches every other in every family, at the first try.
    ///
    /// # Panics
    /// If a ping is lost.
    pub fn assert_reachable(&self, when: &str) {
        let pings = self.pings();
        let families = self.pods[0].ips.ips().count();
        let pods = self.pods.len();
        assert_eq!(pings.len(), pods * (pods - 1) * families, "{when}");
        for ping in pings {
            let Pinged {
                from, to, family, ..
            } = ping;
            if let Err(error) = ping.result {
                panic!("{when}: {family} from pod {from} to pod {to}: {error}");
            }
        }
    }

    /// Waits until every pod reaches every other, where the underlay itself takes its time.
    pub async fn reachable_within(&self, when: &str, limit: Duration) {
        until(when, limit, async || {
            self.pings().iter().all(|ping| ping.result.is_ok())
        })
        .await;
    }
}

impl Node {
    /// The overlay.
    ///
    /// # Panics
    /// If it is stopped.
    pub fn overlay(&self) -> &Overlay {
        self.overlay.as_ref().expect("it runs")
    }

    /// Takes the overlay out, to stop it or tear it down.
    ///
    /// # Panics
    /// If it is stopped.
    pub fn take_overlay(&mut self) -> Overlay {
        self.overlay.take().expect("it runs")
    }

    /// Waits until the overlay has nothing left to do.
    pub async fn converged(&self) {
        within("it converges", START, self.overlay().converged())
            .await
            .expect("running");
    }

    /// Everything in the kernel, with what is on the overlay's devices and their settings.
    pub async fn objects(&self) -> Objects {
        let scope = overlay_scope(&self.hand).await;
        self.hand.observe(&scope).await.expect("readable").objects
    }

    /// What in the kernel is the overlay's.
    pub async fn ours(&self) -> Objects {
        ours(&self.hand, &OverlayName::default(), RouteProtocol::OURS).await
    }

    /// Changes the kernel behind the overlay's back.
    ///
    /// # Panics
    /// If it refuses.
    pub async fn break_by(&self, ops: &[Op]) {
        for (op, result) in ops.iter().zip(self.hand.apply(ops).await) {
            if let Err(error) = result {
                panic!("{} {}: {error}", op.verb(), op.object());
            }
        }
    }

    /// Waits until the kernel has all of `right`; answers how long it took.
    ///
    /// # Panics
    /// If it has not within the limit, with what is missing.
    pub async fn repaired(&self, what: &str, right: &Objects) -> Duration {
        let mut missing = String::new();
        let start = tokio::time::Instant::now();
        while start.elapsed() < LIMIT {
            let now = self.objects().await;
            let wrong: Vec<_> = right
                .iter()
                .filter(|(key, object)| now.get(key) != Some(object))
                .map(|(key, object)| format!("\n  wanted {object:?}\n  found {:?}", now.get(key)))
                .collect();
            if wrong.is_empty() {
                return start.elapsed();
            }
            missing = wrong.concat();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let failing = &self.overlay().status().failing;
        panic!("{what}: not right within {LIMIT:?}:{missing}\n  failing: {failing:?}");
    }

    /// How many packets a device has sent.
    pub fn sent_packets(&self, dev: IfName) -> u64 {
        // `/proc/net` is the namespace of the main thread, `/sys` that of the mount.
        let read = || std::fs::read_to_string("/proc/thread-self/net/dev");
        let text = self.host.ns.run(read).expect("it can be entered");
        let text = text.expect("it can be read");
        let columns = text
            .lines()
            .find_map(|line| line.trim().strip_prefix(&format!("{dev}:")))
            .expect("the device is there");
        // Eight columns of what was received, then bytes and packets sent.
        let sent = columns.split_whitespace().nth(9);
        sent.and_then(|sent| sent.parse().ok()).expect("a number")
    }

    /// Gives the host its underlay addresses and default routes, as far as they are missing.
    pub fn configure_underlay(&self, underlay: &Underlay) {
        let ns = &self.host.ns;
        ns.set_up("eth0").expect("eth0 is there");
        for (segment, family) in underlay
            .segments
            .iter()
            .flat_map(|segment| Family::ALL.map(|family| (segment, family)))
        {
            let (Some(ip), Some(subnet)) = (self.host.ips.ip(family), segment.subnets.get(family))
            else {
                continue;
            };
            if !subnet.contains_ip(ip) {
                continue;
            }
            ns.add_address("eth0", ip, subnet.len())
                .expect("an address");
            let gateway = segment.gateways.ip(family).expect("both families");
            let all = match family {
                Family::V4 => "0.0.0.0/0",
                Family::V6 => "::/0",
            };
            let all = all.parse().expect("a subnet");
            ns.add_route(all, gateway, "eth0").expect("a route");
        }
    }
}

/// The devices of any overlay, or of Go flannel, and their settings.
async fn overlay_scope(hand: &NetlinkKernel) -> Scope {
    let mut scope = Scope::default();
    let observed = hand.observe(&Scope::default()).await.expect("readable");
    for object in observed.objects.into_values() {
        if let Object::Link(link) = object
            && link.name.as_str().starts_with("flannel")
        {
            scope.devices.insert(link.name);
            scope.settings.insert(ObjectKey::Sysctl {
                dev: link.name,
                family: Family::V6,
                name: "accept_ra".to_owned(),
            });
            scope.settings.insert(ObjectKey::Offload {
                dev: link.name,
                feature: "tx-checksum-ip-generic".to_owned(),
            });
        }
    }
    scope
}

/// What bears the marks of an overlay.
pub async fn ours(hand: &NetlinkKernel, overlay: &OverlayName, protocol: RouteProtocol) -> Objects {
    let scope = overlay_scope(hand).await;
    let mut objects = hand.observe(&scope).await.expect("readable").objects;
    let alias = Some(overlay.link_alias());
    let links: Vec<IfName> = objects
        .values()
        .filter_map(|object| match object {
            Object::Link(link) if link.alias == alias => Some(link.name),
            _ => None,
        })
        .collect();
    objects.retain(|_, object| match object {
        Object::Route(route) => route.protocol == protocol,
        Object::Nexthop(nexthop) => nexthop.protocol == protocol,
        // The kernel gives IPv6 devices a link-local address of its own.
        Object::Address(address) => {
            links.contains(&address.dev)
                && !matches!(address.ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
        }
        other => other.dev().is_some_and(|dev| links.contains(&dev)),
    });
    objects
}
