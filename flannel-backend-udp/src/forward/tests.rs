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

use flannel_core::{DualStack, IfName};
use flannel_testkit::netns::Lab;

use super::{Failure, Forwarder, Report};
use crate::{InNamespace, Options, Sockets, Threads, TunnelSpec, UdpOptions};

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

/// Makes a forwarder fail three times; answers what it reported, and how many sockets it opened
/// thereby.
fn suffer(test: &str, fault: u8) -> Option<(Vec<Report>, usize)> {
    let lab = Lab::for_test(test)?;
    let ns = lab.namespace("node").expect("a namespace");
    let made = ns.run(|| {
        let device = [
            "tuntap",
            "add",
            "flannel0",
            "mode",
            "tun",
            "multi_queue",
            "vnet_hdr",
        ];
        Command::new("ip").args(device).status()
    });
    assert!(made.expect("the namespace").expect("ip runs").success());
    let spec = TunnelSpec {
        device: "flannel0".parse().expect("a name"),
        listen: vec!["127.0.0.1:8285".parse().expect("an address")],
        own: DualStack::default(),
        mtu: DualStack::default(),
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
    let forwarder = Forwarder::start(spec.clone(), options, shared, Arc::new(watch));
    let forwarder = forwarder.expect("a forwarder");
    let before = sockets.1.load(Ordering::Relaxed);
    for round in 1..=3 {
        forwarder.state.fault.store(fault, Ordering::Release);
        // What makes every thread wake: the one that is first fails.
        forwarder.alter(spec.clone()).expect("the same spec");
        wait_until("it is replaced", || {
            let health = forwarder.health();
            health.is_running && health.restarts == round
        });
    }
    let opened = sockets.1.load(Ordering::Relaxed) - before;
    drop(forwarder);
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
