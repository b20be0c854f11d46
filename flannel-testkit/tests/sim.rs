//! Clusters in simulation.
#![allow(missing_docs, reason = "tests")]

use flannel_backend_hostgw::HostGwBackend;
use flannel_backend_vxlan::VxlanBackend;
use flannel_testkit::sim::Sim;

#[test]
fn clusters_keep_their_promises_under_every_history() {
    let report = Sim::new(VxlanBackend::new).seeds(0..20, 2, &|_| {});
    assert!(report.failed.is_empty(), "{report}");
}

#[test]
fn clusters_of_host_gw_keep_them_too() {
    let sim = Sim::new(HostGwBackend::new).of_host_gw();
    let report = sim.seeds(0..30, 2, &|_| {});
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
