//! Nodes with a forwarder each, and a pod behind each.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use flannel_backend_udp::table::{Table, TableBuilder};
use flannel_backend_udp::{Forwarder, InNamespace, Options, Report, Watch};
use flannel_core::{DualStack, Family, IfName, Subnet, Tunnel};
use flannel_testkit::netns::{Host, Lab, Ns, Underlay};
use flannel_testkit::prober::ping;

pub(crate) const DEVICE: &str = "flannel0";
pub(crate) const PORT: u16 = 8285;
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct Bed {
    pub(crate) underlay: Underlay,
    pub(crate) pods: Vec<Host>,
    /// The family of the underlay that the overlay uses.
    pub(crate) outside: Family,
    pub(crate) mtu: u32,
    _lab: Lab,
}

impl Bed {
    /// Nodes with TUN devices and pods, without forwarders.
    pub(crate) fn new(test: &str, nodes: usize, outside: Family) -> Option<Self> {
        if !flannel_testkit::require_tool(test, "ip") {
            return None;
        }
        let lab = Lab::for_test(test)?;
        let underlay = lab.underlay(nodes).expect("an underlay");
        let mtu = match outside {
            Family::V4 => 1472,
            Family::V6 => 1452,
        };
        let mut pods = Vec::new();
        for (index, node) in underlay.nodes.iter().enumerate() {
            let name = format!("pod-{}", index + 1);
            let pod = lab.pod(&name, &node.ns, &subnets(index), mtu);
            pods.push(pod.expect("a pod"));
        }
        let bed = Self {
            underlay,
            pods,
            outside,
            mtu,
            _lab: lab,
        };
        for index in 0..nodes {
            bed.add_device(index);
        }
        Some(bed)
    }

    pub(crate) fn ns(&self, node: usize) -> &Ns {
        &self.underlay.nodes[node].ns
    }

    /// What the kernel crate makes for an overlay: the device, its addresses, the routes.
    pub(crate) fn add_device(&self, node: usize) {
        let ns = self.ns(node);
        ip(
            ns,
            &[
                "tuntap",
                "add",
                DEVICE,
                "mode",
                "tun",
                "multi_queue",
                "vnet_hdr",
            ],
        );
        let mtu = self.mtu.to_string();
        ip(ns, &["link", "set", DEVICE, "mtu", &mtu, "up"]);
        for subnet in subnets(node).values() {
            let len = if subnet.address().is_ipv4() { 32 } else { 128 };
            let address = format!("{}/{len}", subnet.address());
            ip(ns, &["address", "add", &address, "dev", DEVICE]);
        }
        for other in (0..9).filter(|other| *other != node) {
            for subnet in subnets(other).values() {
                ip(ns, &["route", "add", &subnet.to_string(), "dev", DEVICE]);
            }
        }
    }

    pub(crate) fn endpoint(&self, node: usize) -> SocketAddr {
        let ip = self.underlay.nodes[node].ips.ip(self.outside);
        SocketAddr::new(ip.expect("both families"), PORT)
    }

    pub(crate) fn tunnel(&self, node: usize) -> Tunnel {
        let mut listen = DualStack::default();
        listen.set(self.outside, Some(self.endpoint(node)));
        Tunnel {
            dev: DEVICE.parse::<IfName>().expect("a name"),
            listen,
            own: subnets(node),
            mtu: DualStack::both(self.mtu, self.mtu),
        }
    }

    pub(crate) fn sockets(&self, node: usize) -> Arc<InNamespace> {
        let fd = self.ns(node).fd().try_clone_to_owned();
        Arc::new(InNamespace::fd(fd.expect("a descriptor")))
    }

    pub(crate) fn start(&self, node: usize, options: Options) -> Forwarder {
        self.start_watched(node, options, Arc::new(|_| {}))
    }

    pub(crate) fn start_watched(&self, node: usize, options: Options, watch: Watch) -> Forwarder {
        // The one before has taken its device along.
        if !output(self.ns(node), "ip", &["link", "show", DEVICE]).0 {
            self.add_device(node);
        }
        let forwarder = Forwarder::start(self.tunnel(node), options, self.sockets(node), watch)
            .expect("a forwarder");
        forwarder.set_table(self.table(node));
        forwarder
    }

    /// Hands the forwarder of a node over, as to another process; answers the one that took it.
    ///
    /// # Panics
    /// If it is not taken.
    pub(crate) fn hand_over(&self, node: usize, forwarder: Forwarder) -> Forwarder {
        self.hand_over_after(node, forwarder, |_| {})
    }

    /// The same, once the taker has said something of its own.
    pub(crate) fn hand_over_after(
        &self,
        node: usize,
        forwarder: Forwarder,
        before: impl FnOnce(&UnixStream) + Send + 'static,
    ) -> Forwarder {
        let (old, new) = UnixStream::pair().expect("a pair");
        let sockets = self.sockets(node);
        let taking = thread::spawn(move || {
            before(&new);
            Forwarder::take_over(&new, sockets, Arc::new(|_| {}))
        });
        if let Err((_, error)) = forwarder.hand_over(&old) {
            panic!("not handed over: {error}");
        }
        taking.join().expect("no panic").expect("taken over")
    }

    /// The peers of a node: all others.
    pub(crate) fn table(&self, node: usize) -> Table {
        let mut peers = TableBuilder::new();
        for other in (0..self.pods.len()).filter(|other| *other != node) {
            for subnet in subnets(other).values() {
                peers.insert(*subnet, self.endpoint(other));
            }
        }
        peers.build()
    }

    pub(crate) fn pod_ip(&self, node: usize, family: Family) -> IpAddr {
        self.pods[node].ips.ip(family).expect("both families")
    }

    /// Pods 1 and 2 reach one another, in both families, both ways.
    pub(crate) fn assert_reachable(&self) {
        for family in [Family::V4, Family::V6] {
            for (from, to) in [(0, 1), (1, 0)] {
                let to = self.pod_ip(to, family);
                wait_until(&format!("{to} answers"), || {
                    ping(&self.pods[from].ns, None, to, Duration::from_millis(500)).is_ok()
                });
            }
        }
    }
}

pub(crate) fn subnets(node: usize) -> DualStack<Subnet> {
    DualStack::of_subnets([
        format!("10.42.{}.0/24", node + 1)
            .parse()
            .expect("a subnet"),
        format!("fd00:42:{}::/64", node + 1)
            .parse()
            .expect("a subnet"),
    ])
}

#[allow(clippy::disallowed_methods, reason = "an observer of its own")]
pub(crate) fn output(ns: &Ns, program: &str, arguments: &[&str]) -> (bool, String) {
    let output = ns.run(|| Command::new(program).args(arguments).output());
    let output = output.expect("the namespace").expect("the program runs");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text.into_owned())
}

pub(crate) fn ip(ns: &Ns, arguments: &[&str]) {
    let (ok, text) = output(ns, "ip", arguments);
    assert!(ok, "ip {arguments:?}: {text}");
}

#[allow(clippy::disallowed_methods, reason = "real packets take real time")]
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < TIMEOUT, "not within {TIMEOUT:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A watch that remembers.
pub(crate) fn remember() -> (Watch, Arc<Mutex<Vec<Report>>>) {
    let reports = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&reports);
    let watch = move |report: &Report| into.lock().expect("no panic").push(report.clone());
    (Arc::new(watch), reports)
}
