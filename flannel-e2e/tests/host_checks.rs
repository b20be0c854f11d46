//! The things that keep packets from passing although every object is right: each is told with the
//! command that mends it, within seconds, and told no more once it is mended.
#![allow(
    clippy::print_stderr,
    missing_docs,
    reason = "tests; how long it took is printed"
)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::{ConditionStatus, ConditionType, Error, Family, Status};
use flannel_e2e::{Cluster, DUAL, Node, Setup, V4, V4_GW, V4_UDP, V6, run_in, within};
use flannel_testkit::require_tool;
use tokio::time::Instant;

/// A look takes place at most once a second; what began to be off is looked at twice.
const SOON: Duration = Duration::from_secs(3);

/// So long between two readings without a hint that whatever is told in time is hinted at.
fn by_hints_alone(nodes: usize, config: &'static str) -> Setup {
    const NEVER: Duration = Duration::from_secs(3600);
    Setup {
        tune: Arc::new(|builder| builder.resync_every(NEVER)),
        ..Setup::new(nodes, config)
    }
}

/// Something that is done to a host.
struct Spoilt<'a> {
    what: &'a str,
    /// Done before, and harmless.
    before: &'a [String],
    spoil: String,
    mend: String,
    kind: ConditionType,
    /// The parts that the message has to have.
    says: &'a [&'a str],
}

async fn is_told(node: &Node, what: &str, is: impl Fn(&Status) -> bool + Send + Sync) -> Duration {
    let start = Instant::now();
    let told = node.overlay().wait_for(is);
    within(what, SOON, told).await.expect("running");
    start.elapsed()
}

/// Spoils a node's host and mends it again.
async fn spoil(cluster: &Cluster, at: usize, case: &Spoilt<'_>) {
    let node = &cluster.nodes[at];
    let (what, ns) = (case.what, &node.host.ns);
    for command in case.before {
        run_in(ns, command);
    }
    cluster.assert_reachable(what);
    assert!(node.overlay().status().working, "before {what}");
    run_in(ns, &case.spoil);
    let stops = |status: &Status| {
        let kind = status.obstacle().map(|condition| condition.kind);
        !status.working && status.ready && kind == Some(case.kind)
    };
    let noticed = is_told(node, what, stops).await;
    let status = node.overlay().status();
    let message = &status.obstacle().expect("a reason").message;
    for part in case.says {
        assert!(message.contains(part), "{what}: {part}: {message}");
    }
    let lost = cluster
        .pings()
        .iter()
        .filter(|ping| ping.result.is_err())
        .count();
    assert!(lost > 0, "{what}: all pings pass, and it says {message}");
    run_in(ns, &case.mend);
    let cleared = is_told(node, what, |status| status.working).await;
    eprintln!("{what}: noticed after {noticed:?}, cleared after {cleared:?}: {message}");
    cluster.assert_reachable(what);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_packets_from_passing_is_told_and_mended_by_what_is_said() {
    let Some(cluster) = Cluster::start("host-checks", by_hints_alone(2, V4)).await else {
        return;
    };
    let peer = cluster.nodes[1].subnets.v4.expect("an IPv4 subnet");
    let half = peer.subnets(25).next().expect("a half");
    let public = cluster.nodes[1].host.ips.v4.expect("an IPv4 address");
    let set = |name: &str, value: u8| format!("sysctl -qw {name}={value}");
    let switch = |what, name: &str, kind| Spoilt {
        what,
        before: &[],
        spoil: set(name, 0),
        mend: set(name, 1),
        kind,
        says: &[],
    };
    let forwarding = ConditionType::Forwarding;
    let global = Spoilt {
        says: &["sysctl -w net.ipv4.ip_forward=1"],
        ..switch("forwarding off", "net.ipv4.ip_forward", forwarding)
    };
    let device = "net.ipv4.conf.flannel/1.forwarding";
    let of_device = Spoilt {
        says: &["sysctl -w net.ipv4.conf.flannel/1.forwarding=1"],
        ..switch("forwarding of our device off", device, forwarding)
    };
    let of_pods = Spoilt {
        says: &["sysctl -w net.ipv4.conf.cni0.forwarding=1"],
        ..switch(
            "forwarding of the pods' bridge off",
            "net.ipv4.conf.cni0.forwarding",
            forwarding,
        )
    };
    let rule = Spoilt {
        what: "a policy rule to another table",
        before: &["ip route add 10.42.0.0/16 dev eth0 table 100".to_owned()],
        spoil: "ip rule add to 10.42.0.0/16 pref 700 lookup 100".to_owned(),
        mend: "ip rule del pref 700".to_owned(),
        kind: ConditionType::Routes,
        says: &["through eth0", "table 100", "ip rule del pref 700"],
    };
    let hole = Spoilt {
        what: "a narrower black hole",
        before: &[],
        spoil: format!("ip route add blackhole {half}"),
        mend: format!("ip route del blackhole {half}"),
        kind: ConditionType::Routes,
        says: &["ip route del blackhole"],
    };
    let filter = Spoilt {
        what: "a strict filter by the way back",
        before: &[
            "ip link add name other type bridge".to_owned(),
            "ip link set other up".to_owned(),
            set("net.ipv4.conf.eth0.rp_filter", 1),
        ],
        spoil: format!("ip route add {public}/32 dev other"),
        mend: format!("ip route del {public}/32 dev other"),
        kind: ConditionType::ReversePath,
        says: &["sysctl -w net.ipv4.conf.eth0.rp_filter=2"],
    };
    for case in [global, of_device, of_pods, rule, hole, filter] {
        spoil(&cluster, 0, &case).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_forwarding_a_node_waits_and_says_why() {
    for (off, family, config) in [
        ("net.ipv4.ip_forward", Family::V4, V4),
        ("net.ipv6.conf.all.forwarding", Family::V6, V6),
    ] {
        let Some(mut cluster) = Cluster::start("host-start", Setup::new(2, config)).await else {
            return;
        };
        let node = &mut cluster.nodes[0];
        node.take_overlay().stop().await.expect("stopped");
        let ns = node.host.ns.clone();
        run_in(&ns, &format!("sysctl -qw {off}=0"));
        let node = &cluster.nodes[0];
        let builder = cluster.builder(0, &node.id, &node.host, &node.paths);
        let overlay = builder.start().await.expect("all parts are there");
        let condition = match overlay.ready_within(Duration::from_secs(2)).await {
            Err(Error::NotReady(condition)) => condition,
            other => panic!("{family}: {other:?}"),
        };
        assert_eq!(condition.kind, ConditionType::Forwarding, "{condition}");
        let command = format!("sysctl -w {off}=1");
        assert!(
            condition.message.contains(&command),
            "{}",
            condition.message
        );
        let start = Instant::now();
        run_in(&ns, &command);
        let ready = within("it is ready", SOON, overlay.ready()).await;
        ready.expect("ready");
        eprintln!("{family}: ready {:?} after it was mended", start.elapsed());
        overlay.stop().await.expect("stopped");
        cluster.restart(0).await;
        cluster.settle().await;
        cluster.assert_reachable("with forwarding");
    }
}

/// A family whose packets the host does not forward costs the other none.
#[tokio::test(flavor = "multi_thread")]
async fn without_forwarding_of_ipv6_a_node_of_both_families_works_in_ipv4() {
    let Some(mut cluster) = Cluster::start("host-one", Setup::new(2, DUAL)).await else {
        return;
    };
    let node = &mut cluster.nodes[0];
    node.take_overlay().stop().await.expect("stopped");
    run_in(&node.host.ns, "sysctl -qw net.ipv6.conf.all.forwarding=0");
    cluster.restart(0).await;
    cluster.settle().await;
    let status = cluster.nodes[0].overlay().status();
    let condition = status.condition(ConditionType::Forwarding).expect("one");
    assert_eq!(condition.reason, "ForwardingOffInOneFamily");
    assert!(status.working, "{condition}");
    let lost = cluster.pings();
    let lost = lost.iter().filter(|ping| ping.result.is_err());
    let families: BTreeSet<Family> = lost.map(|ping| ping.family).collect();
    assert_eq!(families, BTreeSet::from([Family::V6]));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_backend_knows_on_which_device_its_packets_come_in() {
    for (name, config, device) in [("host-gw", V4_GW, "eth0"), ("host-udp", V4_UDP, "flannel0")] {
        let Some(cluster) = Cluster::start(name, Setup::new(2, config)).await else {
            return;
        };
        let setting = format!("net.ipv4.conf.{device}.forwarding");
        let case = Spoilt {
            what: name,
            before: &[],
            spoil: format!("sysctl -qw {setting}=0"),
            mend: format!("sysctl -qw {setting}=1"),
            kind: ConditionType::Forwarding,
            says: &[&format!("sysctl -w {setting}=1")],
        };
        spoil(&cluster, 0, &case).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_drops_is_named_and_alone_says_nothing() {
    if !require_tool("host-firewall", "nft") {
        return;
    }
    let Some(mut cluster) = Cluster::start("host-firewall", by_hints_alone(2, V4)).await else {
        return;
    };
    let overlay = cluster.nodes[0].take_overlay();
    overlay.stop().await.expect("stopped");
    let ns = cluster.nodes[0].host.ns.clone();
    for command in [
        "nft add table inet guard",
        "nft add chain inet guard forward { type filter hook forward priority 0 ; policy drop ; }",
        "nft add rule inet guard forward ip saddr 10.42.0.0/16 accept",
    ] {
        run_in(&ns, command);
    }
    cluster.restart(0).await;
    cluster.settle().await;
    cluster.assert_reachable("with rules that accept");
    let status = cluster.nodes[0].overlay().status();
    let firewall = status
        .condition(ConditionType::Firewall)
        .expect("it is there");
    assert_eq!(firewall.status, ConditionStatus::Unknown);
    let named = "table inet guard, chain forward";
    assert!(firewall.message.contains(named), "{}", firewall.message);
    assert!(status.working, "packets do pass");
    run_in(&ns, "nft delete table inet guard");
    let node = &cluster.nodes[0];
    let is_clear = |status: &Status| status.is_true(ConditionType::Firewall);
    let cleared = is_told(node, "it is clear", is_clear).await;
    // While the node runs.
    for families in ["inet", "ip"] {
        run_in(&ns, &format!("nft add table {families} late"));
        let chain = "{ type filter hook forward priority 0 ; policy drop ; }";
        run_in(
            &ns,
            &format!("nft add chain {families} late forward {chain}"),
        );
        let accept = "ip saddr 10.42.0.0/16 accept";
        run_in(
            &ns,
            &format!("nft add rule {families} late forward {accept}"),
        );
        let named = format!("table {families} late, chain forward");
        let is_named = |status: &Status| {
            let firewall = status.condition(ConditionType::Firewall);
            firewall.is_some_and(|firewall| firewall.message.contains(&named))
        };
        let noticed = is_told(node, &named, is_named).await;
        assert!(node.overlay().status().working, "packets do pass");
        run_in(&ns, &format!("nft delete table {families} late"));
        let cleared = is_told(node, &named, is_clear).await;
        eprintln!("{named}: noticed after {noticed:?}, cleared after {cleared:?}");
    }
    eprintln!("a chain from before the start was cleared after {cleared:?}");
}
