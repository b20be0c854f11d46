//! A lab that several processes share. Two `SharedLab`s in one process are as two processes to one
//! another: what tells them apart is a lock on an open file.
#![cfg(all(feature = "lab", target_os = "linux"))]

use std::net::IpAddr;
use std::path::Path;
use std::thread;
use std::time::Duration;

use flannel_core::{DualStack, Subnet};
use flannel_testkit::netns::{Error, Lab, SharedLab};
use flannel_testkit::prober::ping;

const SECOND: Duration = Duration::from_secs(1);

/// The prefix of a lab of this test's own; `None` if the process may not make namespaces.
fn prefix(test: &str) -> Option<String> {
    Lab::for_test(test)?;
    Some(format!("t{}-{test}", std::process::id()))
}

fn is_there(name: &str) -> bool {
    Path::new("/run/netns").join(name).exists()
}

fn reaches(from: &SharedLab, to: &SharedLab) -> bool {
    let mut ips = to.node().ips.ips();
    ips.all(|ip| ping(&from.node().ns, None, ip, SECOND).is_ok())
}

fn subnets(v4: &str) -> DualStack<Subnet> {
    DualStack::v4(v4.parse().expect("a subnet"))
}

#[test]
fn the_last_to_leave_removes_everything() {
    let Some(prefix) = prefix("last") else { return };
    let a = SharedLab::join(&prefix, "a").expect("the first makes the underlay");
    let b = SharedLab::join(&prefix, "b").expect("the second finds it");
    b.pod(&subnets("10.9.2.0/24"), 1400).expect("a pod");
    let names: Vec<String> = ["a", "b", "b-pod", "underlay"]
        .map(|name| format!("{prefix}-{name}"))
        .to_vec();
    assert_eq!(a.namespaces().expect("they can be read"), names);
    assert!(reaches(&a, &b) && reaches(&b, &a));

    assert!(!a.leave().expect("it can leave"), "b is still there");
    assert!(names.iter().all(|name| is_there(name)), "all of it stays");
    assert!(b.leave().expect("it can leave"), "nobody else is there");
    assert!(!names.iter().any(|name| is_there(name)), "nothing stays");
}

#[test]
fn a_node_is_one_process_s_at_a_time_and_can_be_taken_over() {
    let Some(prefix) = prefix("turns") else {
        return;
    };
    let a = SharedLab::join(&prefix, "a").expect("it can be made");
    let b = SharedLab::join(&prefix, "b").expect("it can be made");
    let again = SharedLab::join(&prefix, "a");
    assert!(matches!(again, Err(Error::InUse { .. })), "{again:?}");

    let ips = a.node().ips;
    let pod = a.pod(&subnets("10.9.1.0/24"), 1400).expect("a pod");
    let marked = "ipv4/conf/eth0/log_martians";
    pod.ns.set_sysctl(marked, "1").expect("a setting");
    drop(a); // as a process that is killed
    let a = SharedLab::join(&prefix, "a").expect("it can be taken over");
    assert_eq!(a.node().ips, ips);
    assert!(reaches(&b, &a));
    let same = a.pod(&subnets("10.9.1.0/24"), 1400).expect("the same pod");
    assert_eq!(same.ns.sysctl(marked).expect("a setting"), "1");

    let other = a.pod(&subnets("10.9.3.0/24"), 1400).expect("another pod");
    assert_eq!(other.ns.sysctl(marked).expect("a setting"), "0");
    let ip: IpAddr = [10, 9, 3, 2].into();
    assert!(ping(&a.node().ns, None, ip, SECOND).is_ok());

    a.remove_node().expect("it can be removed");
    assert!(!is_there(&format!("{prefix}-a")) && !is_there(&format!("{prefix}-a-pod")));
    assert!(!a.leave().expect("it can leave"));
    let c = SharedLab::join(&prefix, "c").expect("its address is free again");
    assert_eq!(c.node().ips, ips);
    assert!(!b.leave().expect("it can leave"));
    assert!(c.leave().expect("it can leave"));
    assert!(!is_there(&format!("{prefix}-underlay")));
}

#[test]
fn nodes_that_come_at_once_share_one_underlay() {
    let Some(prefix) = prefix("rush") else { return };
    let labs: Vec<SharedLab> = thread::scope(|scope| {
        let join = |name: String| {
            let prefix = &prefix;
            scope.spawn(move || SharedLab::join(prefix, &name))
        };
        let threads: Vec<_> = (0..4).map(|n| join(format!("n{n}"))).collect();
        let labs = threads.into_iter().map(|thread| thread.join());
        labs.map(|lab| lab.expect("no panic").expect("it can join"))
            .collect()
    });
    for from in &labs {
        for to in &labs {
            assert!(reaches(from, to));
        }
    }
    let last: Vec<bool> = thread::scope(|scope| {
        let threads: Vec<_> = labs
            .into_iter()
            .map(|lab| scope.spawn(move || lab.leave()))
            .collect();
        let left = threads.into_iter().map(|thread| thread.join());
        left.map(|left| left.expect("no panic").expect("it can leave"))
            .collect()
    });
    assert_eq!(last.iter().filter(|last| **last).count(), 1, "{last:?}");
    assert!(!is_there(&format!("{prefix}-underlay")));
}

#[test]
fn a_stranger_s_namespace_is_left_alone() {
    let Some(prefix) = prefix("strange") else {
        return;
    };
    let stranger = Lab::named(&prefix).expect("root");
    let ns = stranger.namespace("a").expect("it can be made");
    let a = SharedLab::join(&prefix, "a");
    assert!(matches!(a, Err(Error::NameTaken { .. })), "{a:?}");
    let b = SharedLab::join(&prefix, "b").expect("it can join");
    assert!(b.leave().expect("it can leave"));
    assert!(is_there(ns.name()), "it is no part of the lab");
}
