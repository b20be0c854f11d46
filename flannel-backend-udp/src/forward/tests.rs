//! A thread that panics, or whose socket fails: from outside nothing can make one do that.
#![allow(
    clippy::disallowed_methods,
    reason = "tests run in real time, with real tools"
)]

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flannel_core::{DualStack, Family, IfName, Tunnel};
use flannel_testkit::netns::{Host, Lab, Ns};
use flannel_testkit::prober::{self, Prober};

use super::{Failure, Forwarder, Report};
use crate::table::TableBuilder;
use crate::{InNamespace, Options, Sockets, Threads, UdpOptions};

/// Makes a device as a forwarder takes it.
fn add_device(ns: &Ns) {
    ip(ns, "tuntap add flannel0 mode tun multi_queue vnet_hdr");
}

fn ip(ns: &Ns, arguments: &str) {
    let made = ns.run(|| Command::new("ip").args(arguments.split(' ')).status());
    assert!(made.expect("the namespace").expect("ip runs").success());
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "not within 5 s: {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Counts the sockets that it opens.
#[derive(Debug)]
struct Counting(InNamespace, AtomicUsize);

impl Sockets for Counting {
    fn tun_queue(&self, device: &IfName, vnet: bool) -> io::Result<OwnedFd> {
        self.0.tun_queue(device, vnet)
    }

    fn udp(&self, listen: SocketAddr, options: &UdpOptions) -> io::Result<OwnedFd> {
        let socket = self.0.udp(listen, options)?;
        self.1.fetch_add(1, Ordering::Relaxed);
        Ok(socket)
    }

    fn path_mtu(&self, to: SocketAddr) -> io::Result<u32> {
        self.0.path_mtu(to)
    }
}

/// A forwarder to be made suffer.
struct Suffering {
    forwarder: Forwarder,
    tunnel: Tunnel,
    sockets: Arc<Counting>,
    reports: Arc<Mutex<Vec<Report>>>,
    _lab: Lab,
}

impl Suffering {
    fn begin(test: &str) -> Option<Self> {
        let lab = Lab::for_test(test)?;
        let ns = lab.namespace("node").expect("a namespace");
        add_device(&ns);
        let tunnel = Tunnel {
            dev: "flannel0".parse().expect("a name"),
            listen: DualStack::v4("127.0.0.1:8285".parse().expect("an address")),
            own: DualStack::default(),
            mtu: DualStack::both(1472, 1472),
        };
        let options = Options {
            threads: Threads::PerDirection,
            ..Options::default()
        };
        let fd = ns.fd().try_clone_to_owned().expect("a descriptor");
        let reports = Arc::new(Mutex::new(Vec::new()));
        let watch = {
            let reports = Arc::clone(&reports);
            move |report: &Report| reports.lock().expect("no panic").push(report.clone())
        };
        let sockets = Arc::new(Counting(InNamespace::fd(fd), AtomicUsize::new(0)));
        let shared: Arc<dyn Sockets> = Arc::<Counting>::clone(&sockets);
        let forwarder = Forwarder::start(tunnel.clone(), options, shared, Arc::new(watch));
        Some(Self {
            forwarder: forwarder.expect("a forwarder"),
            tunnel,
            sockets,
            reports,
            _lab: lab,
        })
    }

    /// Makes a thread fail.
    fn fail(&self, fault: u8) {
        let Self {
            forwarder, tunnel, ..
        } = self;
        forwarder.state.fault.store(fault, Ordering::Release);
        // What makes every thread wake: the one that is first fails.
        forwarder.alter(tunnel.clone()).expect("the same");
    }
}

/// Makes a forwarder fail three times; answers what it reported, and how many sockets it opened
/// thereby.
fn suffer(test: &str, fault: u8) -> Option<(Vec<Report>, usize)> {
    let suffering = Suffering::begin(test)?;
    let Suffering {
        forwarder, sockets, ..
    } = &suffering;
    let before = sockets.1.load(Ordering::Relaxed);
    for round in 1..=3 {
        suffering.fail(fault);
        wait_until("it is replaced", || {
            let health = forwarder.health();
            health.is_running && health.restarts == round
        });
    }
    let opened = sockets.1.load(Ordering::Relaxed) - before;
    let reports = Arc::clone(&suffering.reports);
    drop(suffering);
    let reports = reports.lock().expect("no panic").clone();
    assert_eq!(reports.last(), Some(&Report::Recovered));
    Some((reports, opened))
}

#[test]
fn a_worker_that_panics_is_reported_and_replaced() {
    let Some((reports, opened)) = suffer("udp-panic", 1) else {
        return;
    };
    let failed = reports.iter().filter(|report| {
        matches!(report, Report::Failed { worker: 0, failure: Failure::Panic(why) } if why.contains("a fault of a test"))
    });
    assert_eq!(failed.count(), 3, "{reports:?}");
    assert_eq!(opened, 0, "the sockets were well");
}

#[test]
fn a_socket_that_fails_is_opened_again() {
    let Some((reports, opened)) = suffer("udp-deaf", 2) else {
        return;
    };
    let failed = reports.iter().filter(|report| {
        matches!(report, Report::Failed { worker: 0, failure: Failure::Socket(why) } if why.contains("a fault of a test"))
    });
    assert_eq!(failed.count(), 3, "{reports:?}");
    assert_eq!(opened, 3, "one each time");
}

/// A thread that is replaced again and again runs for moments only: until it has been calm for a
/// while it does not count as running, and says why.
#[test]
fn a_thread_that_fails_again_and_again_does_not_count_as_running() {
    let Some(suffering) = Suffering::begin("udp-again") else {
        return;
    };
    let Suffering {
        forwarder, sockets, ..
    } = &suffering;
    let before = sockets.1.load(Ordering::Relaxed);
    for round in 1..=6 {
        suffering.fail(1);
        wait_until("it is replaced", || forwarder.health().restarts == round);
    }
    let health = forwarder.health();
    assert!(!health.is_running, "{health:?}");
    let problem = health.problem.expect("a reason");
    assert!(problem.contains("a fault of a test"), "{problem}");
    let opened = sockets.1.load(Ordering::Relaxed) - before;
    assert_eq!(opened, 2, "after four accidents all is opened anew");
    let start = Instant::now();
    while !forwarder.health().is_running {
        assert!(start.elapsed() < Duration::from_secs(20), "it stays calm");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(start.elapsed() > Duration::from_secs(5), "{start:?}");
    assert_eq!(forwarder.health().problem, None);
    let reports = suffering.reports.lock().expect("no panic");
    assert_eq!(reports.last(), Some(&Report::Recovered));
}

/// A forwarder of a node, for one other node and pod.
fn between(node: &Host, number: usize, other: &Host) -> Forwarder {
    let subnet = |number: usize| format!("10.42.{number}.0/24").parse().expect("a subnet");
    let endpoint = |host: &Host| {
        let ip = host.ips.ip(Family::V4).expect("both families");
        SocketAddr::new(ip, 8285)
    };
    add_device(&node.ns);
    ip(&node.ns, "link set flannel0 mtu 1472 up");
    let (own, others) = (number, 3 - number);
    ip(
        &node.ns,
        &format!("route add 10.42.{others}.0/24 dev flannel0"),
    );
    let tunnel = Tunnel {
        dev: "flannel0".parse().expect("a name"),
        listen: DualStack::v4(endpoint(node)),
        own: DualStack::of_subnets([subnet(own)]),
        mtu: DualStack::both(1472, 1472),
    };
    let options = Options {
        threads: Threads::Auto,
        ..Options::default()
    };
    let fd = node.ns.fd().try_clone_to_owned().expect("a descriptor");
    let sockets = Arc::new(InNamespace::fd(fd));
    let forwarder = Forwarder::start(tunnel, options, sockets, Arc::new(|_| {}));
    let forwarder = forwarder.expect("a forwarder");
    let mut peers = TableBuilder::new();
    peers.insert(subnet(others), endpoint(other));
    forwarder.set_table(peers.build());
    forwarder
}

/// What comes in changes hands all the time, and no packet is lost, passes another or comes twice.
#[test]
fn packets_keep_their_order_while_what_comes_in_changes_hands() {
    let Some(lab) = Lab::for_test("udp-hands") else {
        return;
    };
    let underlay = lab.underlay(2).expect("an underlay");
    let nodes = &underlay.nodes;
    let pods: Vec<Host> = (1..=2)
        .map(|number| {
            let subnet = format!("10.42.{number}.0/24").parse().expect("a subnet");
            let subnets = DualStack::of_subnets([subnet]);
            let node = &nodes[number - 1].ns;
            lab.pod(&format!("pod-{number}"), node, &subnets, 1472)
                .expect("a pod")
        })
        .collect();
    let forwarders = [
        between(&nodes[0], 1, &nodes[1]),
        between(&nodes[1], 2, &nodes[0]),
    ];
    let is_shared = forwarders[0].state.directions.len() == 2;
    if !is_shared {
        flannel_testkit::skip(
            "udp-hands",
            "there is one processor, so no thread is helped",
        );
        return;
    }
    for forwarder in &forwarders {
        let restless = &forwarder.state.shares[0].is_restless;
        restless.store(true, Ordering::Relaxed);
    }
    let ends = [0, 1].map(|pod| {
        let host: &Host = &pods[pod];
        (&host.ns, host.ips.ip(Family::V4).expect("it has one"))
    });
    let flow = prober::Options {
        packets: 30_000,
        rate: 10_000,
        ..prober::Options::default()
    };
    let report = Prober::start(ends[0], ends[1], flow)
        .expect("a prober")
        .finish();
    assert_eq!(report.lost(), 0, "{report}");
    for direction in [&report.forth, &report.back] {
        assert_eq!(direction.reordered, 0, "{report}");
    }
    for forwarder in &forwarders {
        let shared = forwarder.totals_by_thread();
        let parts: Vec<u64> = shared
            .iter()
            .map(|thread| thread.received_packets)
            .collect();
        assert!(
            parts.iter().all(|part| *part > 1_000),
            "each thread has had its part: {parts:?}"
        );
        let restless = &forwarder.state.shares[0].is_restless;
        restless.store(false, Ordering::Relaxed);
        forwarder.state.shares[0].lend();
    }
    wait_until("what little there is to do is given back", || {
        forwarders
            .iter()
            .all(|forwarder| !forwarder.state.shares[0].is_lent())
    });
}
