//! Clusters in simulation.
#![allow(missing_docs, reason = "tests")]

use std::collections::BTreeSet;

use flannel_backend_hostgw::HostGwBackend;
use flannel_backend_udp::UdpBackend;
use flannel_backend_vxlan::VxlanBackend;
use flannel_testkit::sim::{KINDS, MemoryCluster, Report, Sim};

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
    let other = Sim::new(VxlanBackend::new)
        .nodes(6)
        .seeds(20..22, 2, &|_| {});
    let both = report.clone().and(other);
    assert_eq!(both.seeds, 22);
    assert!(both.missing().iter().all(|kind| missing.contains(kind)));
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
    // In the last one the nexthop of a route in whose place a stranger's is drifts.
    for seeds in [0..30, 1_003_989_228_032..1_003_989_228_033] {
        let report = sim.seeds(seeds, 2, &|_| {});
        assert!(report.failed.is_empty(), "{report}");
        only_what_applies(&sim, &report);
    }
}

#[test]
fn clusters_of_udp_keep_them_too() {
    let sim = Sim::new(UdpBackend::new).of_udp();
    let report = sim.seeds(0..30, 2, &|_| {});
    assert!(report.failed.is_empty(), "{report}");
    only_what_applies(&sim, &report);
}

/// What took effect is not on the list of what does not apply.
fn only_what_applies(sim: &Sim, report: &Report) {
    let kinds = sim.kinds();
    assert!(kinds.len() < KINDS.len());
    let mut others = KINDS.iter().filter(|kind| !kinds.contains(kind));
    assert!(others.all(|kind| !report.counts.contains_key(*kind)));
}

#[test]
fn clusters_that_change_between_all_backends_keep_them_too() {
    let sim = Sim::new(VxlanBackend::new)
        .with(HostGwBackend::new)
        .with(UdpBackend::new)
        .of_all();
    // In one a subnet of ours becomes a peer's while its address is held on a device; in the other
    // routes of an earlier network lead to a device that stays for others.
    for seeds in [0..30, 5033..5034, 2_000_749..2_000_750] {
        let report = sim.seeds(seeds, 2, &|_| {});
        assert!(report.failed.is_empty(), "{report}");
    }
}

/// A node finds its last but one saved state while its last subnet is another's, and records that
/// nobody can read fill the pool.
#[test]
fn so_do_large_ones() {
    let sim = Sim::new(VxlanBackend::new)
        .with(HostGwBackend::new)
        .with(UdpBackend::new)
        .of_all();
    let seed = 1_004_009_571_162;
    let report = sim.nodes(9).steps(120).seeds(seed..seed + 1, 1, &|_| {});
    assert!(report.failed.is_empty(), "{report}");
}

#[test]
fn clusters_that_change_their_backend_keep_them_too() {
    let sim = Sim::new(VxlanBackend::new)
        .with(HostGwBackend::new)
        .of_both();
    let report = sim.seeds(0..30, 2, &|_| {});
    assert!(report.failed.is_empty(), "{report}");
}
