//! Clusters in simulation.
#![allow(missing_docs, reason = "tests")]

use std::collections::BTreeSet;
use std::time::Duration;

use flannel_backend_hostgw::HostGwBackend;
use flannel_backend_udp::UdpBackend;
use flannel_backend_vxlan::VxlanBackend;
use flannel_testkit::sim::{
    Action, CrashPoint, History, Hostile, KINDS, KernelAction, Kind, MemoryCluster, NodeAction,
    Report, Sim, StateFault, Step, StoreAction,
};

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

/// The node of a record that cannot be read has written another one, while a withdrawal is held: the
/// route of the old one goes only at the end of that.
#[test]
fn a_replaced_record_holds_no_route() {
    let sim = Sim::new(UdpBackend::new).of_udp();
    holds(
        &sim,
        &History {
            seed: 2_000_087,
            nodes: 5,
            gos: 0,
            config: 0,
            ttl: None,
            actions: vec![
                at_once(start(0)),
                at_once(start(1)),
                at_once(Action::Store(StoreAction::Backup)),
                at_once(Action::Store(StoreAction::Config(1))),
                at_once(Action::Store(StoreAction::Restore)),
                at_once(start(2)),
                then(76, Action::Store(StoreAction::Backup)),
                at_once(Action::Store(StoreAction::Garble(2))),
                then(10_340, Action::Wait),
            ],
        },
    );
}

/// Who has forgotten that a network was its own finds its routes there when a held withdrawal ends.
#[test]
fn a_network_of_earlier_holds_no_route() {
    let sim = Sim::new(VxlanBackend::new)
        .with(HostGwBackend::new)
        .with(UdpBackend::new)
        .of_all();
    let put = |hostile, of, n| Action::Store(StoreAction::Put(hostile, of, n));
    holds(
        &sim,
        &History {
            seed: 2_000_224,
            nodes: 7,
            gos: 0,
            config: 16,
            ttl: Some(Duration::from_secs(60)),
            actions: vec![
                at_once(start(1)),
                at_once(start(2)),
                at_once(start(3)),
                at_once(put(Hostile::InnerPublicIp, 0, 40)),
                at_once(Action::Node(3, NodeAction::Crash(CrashPoint::Before(0)))),
                at_once(Action::Node(2, NodeAction::State(StateFault::WriteTorn))),
                at_once(Action::Store(StoreAction::Config(9))),
                at_once(Action::Store(StoreAction::Backup)),
                at_once(Action::Store(StoreAction::Config(7))),
                at_once(put(Hostile::DuplicateMac, 1, 0)),
                at_once(Action::Store(StoreAction::Restore)),
                then(
                    597,
                    Action::Kernel(1, KernelAction::Delete(Kind::Sysctl, 2)),
                ),
                then(1_422, put(Hostile::Underlay, 6, 34)),
                then(7_958, Action::Wait),
                then(170, Action::Wait),
            ],
        },
    );
}

/// A node that forgot its lease takes the subnets that its devices' addresses are in, under a config
/// with larger ones: these overlap a record that cannot be read and has been replaced.
#[test]
fn a_replaced_record_is_in_nobodys_way() {
    let sim = Sim::new(VxlanBackend::new)
        .with(HostGwBackend::new)
        .with(UdpBackend::new)
        .of_all();
    holds(
        &sim,
        &History {
            seed: 3_000_029,
            nodes: 3,
            gos: 0,
            config: 14,
            ttl: None,
            actions: vec![
                at_once(start(0)),
                at_once(start(1)),
                then(882, start(2)),
                at_once(Action::Store(StoreAction::Garble(0))),
                at_once(Action::Node(1, NodeAction::Crash(CrashPoint::After(5)))),
                at_once(Action::Node(1, NodeAction::State(StateFault::Old))),
                then(1_000, Action::Node(2, NodeAction::Leave)),
                at_once(Action::Store(StoreAction::Config(17))),
            ],
        },
    );
}

/// A backup is restored while a node sleeps, and the store is as far as before when it wakes: by the
/// revisions of single records it knows that their last values are of a history that has ended.
#[test]
fn who_sleeps_through_a_restore_knows_what_is_replaced() {
    let sim = Sim::new(VxlanBackend::new)
        .with(HostGwBackend::new)
        .of_both();
    holds(
        &sim,
        &History {
            seed: 3_000_089,
            nodes: 4,
            gos: 0,
            config: 0,
            ttl: Some(Duration::from_secs(30)),
            actions: vec![
                at_once(start(3)),
                then(4, start(1)),
                at_once(Action::Store(StoreAction::Backup)),
                at_once(Action::Store(StoreAction::Config(4))),
                at_once(Action::Node(3, NodeAction::Suspend)),
                then(25, Action::Store(StoreAction::Restore)),
                at_once(Action::Store(StoreAction::Garble(1))),
            ],
        },
    );
}

fn holds(sim: &Sim, history: &History) {
    let run = sim.replay(history);
    assert!(run.violation.is_none(), "{:?}", run.violation);
}

fn start(node: usize) -> Action {
    Action::Node(node, NodeAction::Start)
}

fn at_once(action: Action) -> Step {
    then(0, action)
}

/// What happens, and for how many milliseconds nothing else does.
fn then(millis: u64, action: Action) -> Step {
    Step {
        action,
        then: Duration::from_millis(millis),
    }
}
