//! Clusters in simulation.
#![allow(missing_docs, reason = "tests")]

use flannel_backend_vxlan::VxlanBackend;
use flannel_testkit::sim::Sim;

#[test]
fn clusters_keep_their_promises_under_every_history() {
    let report = Sim::new(VxlanBackend::new).seeds(0..20, 2, &|_| {});
    assert!(report.failed.is_empty(), "{report}");
}
