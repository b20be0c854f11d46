//! A thread that panics: from outside nothing can make one do that.
#![allow(
    clippy::disallowed_methods,
    reason = "tests run in real time, with real tools"
)]

use std::process::Command;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flannel_core::DualStack;
use flannel_testkit::netns::Lab;

use super::{Failure, Forwarder, Report};
use crate::{InNamespace, Options, Threads, TunnelSpec};

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

#[test]
fn a_worker_that_panics_is_reported_and_replaced() {
    let Some(lab) = Lab::for_test("udp-panic") else {
        return;
    };
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
    let sockets = Arc::new(InNamespace::fd(fd));
    let forwarder = Forwarder::start(spec.clone(), options, sockets, Arc::new(watch));
    let forwarder = forwarder.expect("a forwarder");
    for round in 1..=3 {
        forwarder.state.fault.store(true, Ordering::Release);
        // What makes every thread wake: the one that is first panics.
        forwarder.alter(spec.clone()).expect("the same spec");
        wait_until("it is replaced", || {
            let health = forwarder.health();
            health.is_running && health.restarts == round
        });
    }
    let reports = reports.lock().expect("no panic");
    let failed = reports.iter().filter(|report| {
        matches!(report, Report::Failed { worker: 0, failure: Failure::Panic(why) } if why.contains("a fault of a test"))
    });
    assert_eq!(failed.count(), 3, "{reports:?}");
    assert_eq!(reports.last(), Some(&Report::Recovered));
}
