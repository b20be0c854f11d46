//! A program of its own, because it looks at all threads that forward in this one.
#![allow(missing_docs, reason = "tests")]

#[allow(dead_code, reason = "shared with other tests")]
#[path = "netns/bed.rs"]
mod bed;

use std::fs;
use std::time::Duration;

use flannel_backend_udp::Options;
use flannel_core::Family;
use flannel_testkit::prober::{self, Prober};

use bed::{Bed, wait_until};

/// How often threads that forward have gone to sleep since they began.
fn sleeps() -> u64 {
    let tasks = fs::read_dir("/proc/self/task")
        .expect("the kernel tells")
        .flatten();
    let of_task = |path: std::path::PathBuf| {
        let name = fs::read_to_string(path.join("comm")).ok()?;
        let status = fs::read_to_string(path.join("status")).ok()?;
        let mut lines = status.lines();
        let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        name.starts_with("flannel-udp")
            .then(|| count.trim().parse::<u64>().expect("a number"))
    };
    let sleeps: Vec<u64> = tasks.filter_map(|task| of_task(task.path())).collect();
    assert!(sleeps.len() >= 4, "two forwarders: {sleeps:?}");
    sleeps.iter().sum()
}

/// Nothing wakes a forwarder that has nothing to do, also after it had much.
#[test]
#[allow(clippy::disallowed_methods, reason = "it watches real threads")]
fn a_forwarder_without_work_sleeps() {
    let Some(bed) = Bed::new("udp-idle", 2, Family::V4) else {
        return;
    };
    let _forwarders = [0, 1].map(|node| bed.start(node, Options::default()));
    bed.assert_reachable();
    let flow = prober::Options {
        packets: 20_000,
        rate: 40_000,
        ..prober::Options::default()
    };
    let ends = [0, 1].map(|node| (&bed.pods[node].ns, bed.pod_ip(node, Family::V4)));
    let prober = Prober::start(ends[0], ends[1], flow).expect("a prober");
    assert!(prober.finish().forth.received > 0);
    wait_until("nothing wakes it", || {
        let before = sleeps();
        std::thread::sleep(Duration::from_millis(300));
        sleeps() == before
    });
}
