//! [`Bed`]: one node with a store full of peers.

use std::time::{Duration, Instant};

use flannel_backend_hostgw::HostGwBackend;
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    DualStack, Family, IfName, Kernel, Lease, Link, MemoryManager, NodeId, Object, ObjectKey,
    Objects, Op, Overlay, OverlayName, RouteProtocol, Scope,
};
use flannel_e2e::{Peers, config, dev, ours};
use flannel_netlink::{NetlinkKernel, NetlinkOptions};
use flannel_testkit::netns::{Host, Lab};
use tokio::runtime::Runtime;

use crate::ear::Ear;
use crate::{CONFIG, EVENTS, GOOD, Times};

/// One node with a store full of peers.
pub(crate) struct Bed {
    pub(crate) runtime: Runtime,
    _lab: Lab,
    pub(crate) host: Host,
    pub(crate) manager: MemoryManager,
    hand: NetlinkKernel,
    pub(crate) ear: Ear,
    host_gw: HostGwBackend,
    pub(crate) overlay: Option<Overlay>,
}

/// Waits until the kernel has taken down the namespaces of the bed before: with 50,000 peers in them
/// that takes it longer than any of our deadlines.
pub(crate) fn kernel_is_free() {
    for _ in 0..30 {
        let lab = Lab::new("settling").unwrap_or_else(|error| panic!("{error}"));
        if lab.namespace("probe").is_ok() {
            return;
        }
    }
}

impl Bed {
    /// A node of VXLAN.
    pub(crate) fn new(name: &str, peers: u32) -> Self {
        Self::of(name, CONFIG, (0..peers).map(|n| GOOD.lease(n)))
    }

    /// A node of host-gw, on one link with all of its peers.
    pub(crate) fn host_gw(name: &str, peers: u32, backend: HostGwBackend) -> Self {
        let config = CONFIG.replace("vxlan", "host-gw");
        let mut bed = Self::of(name, &config, (0..peers).map(|n| GOOD.gw_lease(n)));
        let (link, len) = Peers::link();
        let added = bed.host.ns.add_address("eth0", link, len);
        added.expect("a free address");
        bed.host_gw = backend;
        bed
    }

    fn of(name: &str, text: &str, peers: impl Iterator<Item = Lease>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let lab = Lab::new(name).unwrap_or_else(|error| panic!("{error}"));
        kernel_is_free();
        let underlay = lab.underlay(1).expect("an underlay");
        let host = underlay.nodes[0].clone();
        let manager = MemoryManager::new(config(text));
        let own = "10.255.255.0/24".parse().expect("a subnet");
        manager
            .reserve(&node(), DualStack::v4(own))
            .expect("it is free");
        for peer in peers {
            manager.put_raw(peer).expect("sound");
        }
        // The kernel itself takes long to set a device with very many nexthop objects down.
        let hand = NetlinkOptions::new()
            .deadline(Duration::from_secs(120))
            .open_in(host.ns.path())
            .expect("a kernel");
        let ear = Ear::new(&host.ns);
        Self {
            runtime,
            _lab: lab,
            host,
            manager,
            hand,
            ear,
            host_gw: HostGwBackend::new(),
            overlay: None,
        }
    }

    /// Starts the overlay; answers the time until the kernel has the routes of all peers.
    pub(crate) fn start(&mut self, peers: u32) -> Duration {
        self.start_with(peers, None)
    }

    /// The same with an interval of whole readings.
    pub(crate) fn start_with(&mut self, peers: u32, resync: Option<Duration>) -> Duration {
        let start = Instant::now();
        let mut builder = Overlay::builder(node())
            .manager(self.manager.clone())
            .backend(VxlanBackend::new())
            .backend(self.host_gw.clone())
            .kernel(NetlinkKernel::in_namespace(self.host.ns.path()).expect("a kernel"));
        if let Some(resync) = resync {
            builder = builder.resync_every(resync);
        }
        let overlay = self.runtime.block_on(builder.start());
        let overlay = overlay.expect("all parts");
        let all = self
            .ear
            .hears_routes(peers as usize, Duration::from_secs(300));
        let time = start.elapsed();
        assert!(all, "not all peers were programmed");
        self.runtime.block_on(overlay.ready()).expect("ready");
        self.overlay = Some(overlay);
        self.converged();
        time
    }

    pub(crate) fn converged(&mut self) {
        let overlay = self.overlay.as_ref().expect("it runs");
        self.runtime.block_on(overlay.converged()).expect("running");
        self.ear.forget();
    }

    pub(crate) fn ours(&self) -> Objects {
        let name = OverlayName::default();
        self.runtime
            .block_on(ours(&self.hand, &name, RouteProtocol::OURS))
    }

    /// A device as it is.
    pub(crate) fn link(&self, name: &str) -> Link {
        let observed = self.runtime.block_on(self.hand.observe(&Scope::default()));
        let objects = observed.expect("readable").objects;
        match objects.get(&ObjectKey::Link(dev(name))) {
            Some(Object::Link(link)) => link.clone(),
            _ => panic!("{name} is not there"),
        }
    }

    /// The index of a device.
    pub(crate) fn index(&self, name: IfName) -> u32 {
        let observed = self.runtime.block_on(self.hand.links());
        let links = observed.expect("readable").links;
        let link = links.iter().find(|link| link.name == name);
        link.expect("it is there").index
    }

    pub(crate) fn apply(&self, op: Op) {
        self.apply_all(&[op]);
    }

    pub(crate) fn apply_all(&self, ops: &[Op]) {
        for result in self.runtime.block_on(self.hand.apply(ops)) {
            result.expect("the kernel takes it");
        }
    }

    /// Times from writing a new peer's record to its route in the kernel.
    pub(crate) fn events(&mut self, first: u32) -> Times {
        let mut times = Vec::new();
        for n in first..first + EVENTS {
            // At any phase of what follows the event before.
            std::thread::sleep(Duration::from_millis(u64::from(n * 37 % 50)));
            let lease = GOOD.lease(n);
            let start = Instant::now();
            self.manager.put_raw(lease).expect("sound");
            let route = self.route_of(n);
            assert!(self.ear.hears(&route), "the route of peer {n} did not come");
            times.push(start.elapsed());
        }
        Times::new(times)
    }

    /// A route to listen for; only its destination counts.
    fn route_of(&self, n: u32) -> Object {
        Object::Route(flannel_core::Route {
            table: flannel_core::MAIN_TABLE,
            dst: GOOD.subnet(n),
            metric: flannel_core::Route::default_metric(Family::V4),
            target: flannel_core::RouteTarget::Blackhole,
            protocol: RouteProtocol::OURS,
            source: None,
        })
    }
}

pub(crate) fn node() -> NodeId {
    NodeId::new("node-1").expect("a node id")
}
