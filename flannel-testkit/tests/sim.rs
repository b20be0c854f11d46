//! Clusters in simulation.
#![allow(missing_docs, reason = "tests")]

use std::collections::BTreeSet;

use flannel_backend_hostgw::HostGwBackend;
use flannel_backend_udp::UdpBackend;
use flannel_backend_vxlan::VxlanBackend;
use flannel_testkit::sim::{KINDS, MemoryCluster, Sim};

#[test]
fn clusters_keep_their_promises_under_every_history() {
    let report = Sim::new(VxlanBackend::new).seeds(0..20, 2, &|_| {});
    assert!(report.failed.is_empty(), "{report}");
    // What is not on the list would never be missed.
    let listed: BTreeSet<&str> = KINDS.iter().copied().collect();
    let calls = ["grant", "keep_alive", "range", "revoke", "txn", "watch"];
    let is_call = |kind: &str| {
        kind.strip_prefix("wire ")
            .is_some_and(|k| calls.contains(&k))
    };
    for kind in report.counts.keys().map(String::as_str) {
        assert!(
            listed.contains(kind) || kind == "wait" || is_call(kind),
            "{kind}"
        );
    }
    let missing = report.missing();
    assert!(missing.len() < KINDS.len() / 2, "{missing:?}");
    assert!(
        missing
            .iter()
            .all(|kind| !report.counts.contains_key(*kind))
    );
}

#[test]
fn so_do_clusters_on_the_manager_in_memory() {
    let sim = Sim::new(VxlanBackend::new).cluster(MemoryCluster::new);
    let report = sim.seeds(0..20, 2, &|_| {});
    assert!(report.failed.is_empty(), "{report}");
}

#[test]
fn clusters_of_host_gw_keep_them_too() {
    let sim = Sim::new(HostGwBackend::new).of_host_gw();
    let report = sim.seeds(0..30, 2, &|_| {});
    assert!(report.failed.is_empty(), "{report}");
}

#[test]
fn clusters_of_udp_keep_them_too() {
    let sim = Sim::new(UdpBackend::new).of_udp();
    let report = sim.seeds(0..30, 2, &|_| {});
    assert!(report.failed.is_empty(), "{report}");
}

#[test]
fn clusters_that_change_between_all_backends_keep_them_too() {
    let sim = Sim::new(VxlanBackend::new)
        .with(HostGwBackend::new)
        .with(UdpBackend::new)
        .of_all();
    // In the last one a subnet of ours becomes a peer's while its address is held on a device.
    for seeds in [0..30, 5033..5034] {
        let report = sim.seeds(seeds, 2, &|_| {});
        assert!(report.failed.is_empty(), "{report}");
    }
}

#[test]
fn clusters_that_change_their_backend_keep_them_too() {
    let sim = Sim::new(VxlanBackend::new)
        .with(HostGwBackend::new)
        .of_both();
    let report = sim.seeds(0..30, 2, &|_| {});
    assert!(report.failed.is_empty(), "{report}");
}
