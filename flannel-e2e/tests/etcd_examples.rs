//! The examples on etcd, run as users run them: two terminals that make a cluster, and a storm.
#![allow(missing_docs, reason = "tests")]

#[path = "etcd/bench.rs"]
#[allow(dead_code, reason = "another test's needs")]
mod bench;

use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use bench::{Bench, CONFIG, send, subnet};
use flannel_e2e::{LIMIT, Program, V4, V4_GW, V4_UDP, until};
use flannel_testkit::netns::Ns;
use flannel_testkit::prober::{self, Prober};
use flannel_testkit::require_tool;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::time::Instant;

const STORM: &str = env!("CARGO_BIN_EXE_flannel-e2e-join-storm");

/// Packets between two pods, for a minute at most.
fn flow(a: &(Ns, IpAddr), b: &(Ns, IpAddr)) -> Prober {
    let options = prober::Options {
        packets: 60_000,
        rate: 1_000,
        ..prober::Options::default()
    };
    Prober::start((&a.0, a.1), (&b.0, b.1), options).expect("a prober")
}

/// Waits for packets to come.
fn more(prober: &Prober) {
    let enough = prober.received() + 500;
    assert!(prober.wait_received(enough, LIMIT), "packets flow");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_terminals_make_a_cluster_and_leave_nothing_behind() {
    let Some(bench) = Bench::new("two").await else {
        return;
    };
    let (a, b) = (bench.node("a", &[]), bench.node("b", &[]));
    let (ready_a, ready_b) = (a.line("ready node=a "), b.line("ready node=b "));
    assert!(ready_a.contains(" mtu=1450 backend=vxlan"), "{ready_a}");
    let (subnet_a, subnet_b) = (subnet(&ready_a), subnet(&ready_b));
    // Whoever was first hears of the other after its own line.
    let c = bench.node("c", &["--status-every", "1"]);
    let subnet_c = subnet(&c.line("ready node=c "));
    let line = format!("peer added node=c subnet={subnet_c}");
    assert_eq!(a.line("peer added node=c"), line);
    assert_eq!(b.line("peer added node=c"), line);
    let has_both = |line: &str| line.contains(" peers=2 rejected=0 failing=0 foreign=0 ");
    while !has_both(&c.line("status ready=true working=true iface=")) {}
    for (from, to) in [("a", &subnet_b), ("b", &subnet_c), ("c", &subnet_a)] {
        assert!(bench.pings(from, to), "from {from} to {to}");
    }

    // Stopped in good order, and killed: both ways the packets flow on, and the node comes back.
    send(&b, Signal::SIGTERM);
    assert_eq!(b.end().0, 0);
    c.kill();
    assert!(bench.pings("a", &subnet_b) && bench.pings("b", &subnet_c));
    let (b, c) = (bench.node("b", &[]), bench.node("c", &["--teardown"]));
    assert_eq!(subnet(&b.line("ready node=b ")), subnet_b);
    assert_eq!(subnet(&c.line("ready node=c ")), subnet_c);
    let (code, _, why) = bench.node("b", &[]).end();
    assert_eq!(code, 1);
    assert!(why.contains("run by another process"), "{why}");

    // Torn down: the others hear of it, and its namespaces go.
    send(&c, Signal::SIGTERM);
    assert_eq!(c.end().0, 0);
    assert_eq!(
        a.line("peer removed"),
        format!("peer removed node=c subnet={subnet_c}")
    );
    assert_eq!(
        bench.namespaces(),
        ["-a", "-a-pod", "-b", "-b-pod", "-underlay"]
    );

    send(&a, Signal::SIGINT);
    send(&b, Signal::SIGTERM);
    assert_eq!((a.end().0, b.end().0), (0, 0));
    assert_eq!(bench.namespaces(), [""; 0]);
}

/// Packets pass through the program itself; it comes and goes, and they flow on. Only SIGKILL is felt.
#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stdout, reason = "a measured outage is worth a line")]
async fn packets_of_the_udp_backend_flow_on_while_programs_come_and_go() {
    let Some(bench) = Bench::new("keep").await else {
        return;
    };
    bench
        .client()
        .await
        .put(CONFIG, V4_UDP, None)
        .await
        .expect("an answer");
    let socket_b = format!("/run/flannel/{}-elsewhere.sock", bench.lab);
    let (mut a, b) = (
        bench.node("a", &[]),
        bench.node("b", &["--handover", &socket_b]),
    );
    let (ready_a, ready_b) = (a.line("ready node=a "), b.line("ready node=b "));
    assert!(ready_a.contains(" mtu=1472 backend=udp"), "{ready_a}");
    let (pod_a, pod_b) = (
        bench.pod("a", &subnet(&ready_a)),
        bench.pod("b", &subnet(&ready_b)),
    );
    until("they reach one another", LIMIT, async || {
        bench.pings("a", &subnet(&ready_b)) && bench.pings("b", &subnet(&ready_a))
    })
    .await;
    let flow = || flow(&pod_a, &pod_b);

    let prober = flow();
    for _ in 0..2 {
        more(&prober);
        // The next one is started before the first has ended.
        let next = bench.node("a", &[]);
        assert_eq!(a.end().0, 0);
        assert_eq!(next.line("ready node=a "), ready_a);
        more(&prober);
        // And the other way round.
        send(&next, Signal::SIGTERM);
        let stopping = Instant::now();
        assert_eq!(next.end().0, 0);
        assert!(stopping.elapsed() < Duration::from_secs(2), "it ends soon");
        more(&prober);
        a = bench.node("a", &[]);
        assert_eq!(a.line("ready node=a "), ready_a);
        more(&prober);
    }
    prober.stop();
    let report = prober.finish();
    assert_eq!(report.lost(), 0, "{report}");

    let prober = flow();
    more(&prober);
    a.kill();
    a = bench.node("a", &[]);
    assert_eq!(a.line("ready node=a "), ready_a);
    more(&prober);
    prober.stop();
    let report = prober.finish();
    println!("killed outright and started again: {report}");
    assert!(report.lost() > 0, "nobody carried them: {report}");

    send(&a, Signal::SIGTERM);
    assert_eq!(a.end().0, 0);
    assert!(bench.is_kept("a"), "nobody keeps the packets");
    assert!(Path::new(&socket_b).exists());
    send(&b, Signal::SIGTERM);
    assert_eq!(b.end().0, 0);
    assert_eq!(bench.namespaces(), [""; 0]);
    until("nobody keeps anything", LIMIT, async || {
        !bench.is_kept("a") && !Path::new(&socket_b).exists()
    })
    .await;
}

/// A node of a lab whose packets the kernel carries is replaced as well: the second process waits until
/// the first has let go of the namespace, and who only looks if anybody listens replaces nothing.
#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stdout, reason = "a measured outage is worth a line")]
async fn a_node_of_a_lab_is_replaced_with_every_backend() {
    for (test, config) in [("repl-vx", V4), ("repl-gw", V4_GW)] {
        let Some(bench) = Bench::new(test).await else {
            return;
        };
        let mut client = bench.client().await;
        client.put(CONFIG, config, None).await.expect("an answer");
        let socket = format!("/run/flannel/{}-b.asked", bench.lab);
        let asks = ["--handover", socket.as_str()];
        let (a, b) = (bench.node("a", &[]), bench.node("b", &asks));
        let (of_a, of_b) = (subnet(&a.line("ready")), subnet(&b.line("ready")));
        until("they reach one another", LIMIT, async || {
            bench.pings("a", &of_b) && bench.pings("b", &of_a)
        })
        .await;
        let pods = (bench.pod("a", &of_a), bench.pod("b", &of_b));
        drop(UnixStream::connect(&socket).expect("it listens"));
        let prober = flow(&pods.0, &pods.1);
        more(&prober);
        let start = Instant::now();
        let next = bench.node("b", &asks);
        assert_eq!(subnet(&next.line("ready")), of_b, "it keeps its lease");
        let took = start.elapsed();
        let (code, _, said) = b.end();
        assert_eq!(code, 0, "{said}");
        assert!(said.contains("another process is the node now"), "{said}");
        more(&prober);
        prober.stop();
        let report = prober.finish();
        assert_eq!(report.lost(), 0, "{test}: {report}");
        println!("{test}: replaced after {took:?}, {report}");
        for node in [&a, &next] {
            send(node, Signal::SIGTERM);
        }
        for node in [a, next] {
            let (code, _, said) = node.end();
            assert_eq!(code, 0, "{said}");
        }
        assert_eq!(bench.namespaces(), [""; 0], "nothing stays behind");
        assert!(!Path::new(&socket).exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_etcd_is_said_with_the_remedy() {
    let Some(mut bench) = Bench::new("wrong").await else {
        return;
    };
    let mut client = bench.client().await;
    client.delete(CONFIG, None).await.expect("an answer");
    let (code, out, why) = bench.node("a", &[]).end();
    assert_eq!((code, out.as_str()), (1, ""));
    let line = format!("--endpoints {} put {CONFIG} '{{", bench.etcd.endpoint());
    assert!(why.contains(&line), "{why}");

    client.put(CONFIG, "{", None).await.expect("an answer");
    let (code, _, why) = bench.node("a", &[]).end();
    assert_eq!(code, 1);
    assert_eq!(why.matches("cannot be used").count(), 1, "{why}");

    let other = r#"{ "Network": "10.5.0.0/16", "Backend": { "Type": "extension" } }"#;
    client.put(CONFIG, other, None).await.expect("an answer");
    let (code, _, why) = bench.node("a", &[]).end();
    assert_eq!(code, 1);
    assert!(why.contains("extension"), "{why}");
    assert_eq!(
        bench.namespaces(),
        [""; 0],
        "it leaves nothing when it fails"
    );

    // What may come later is waited for, no longer than is asked for.
    client.put(CONFIG, V4, None).await.expect("an answer");
    let late = ["--iface", "eth7", "--ready-within", "2"];
    let (code, _, why) = bench.node("a", &late).end();
    assert_eq!(code, 3, "{why}");
    assert!(why.contains("in time") && why.contains("eth7"), "{why}");

    bench.etcd.kill();
    let (code, _, why) = bench.node("a", &[]).end();
    assert_eq!(code, 1);
    assert!(why.contains("apt-get install etcd-server"), "{why}");
    assert_eq!(why.lines().count(), 1, "{why}");
}

/// What a storm says, and its exit code.
fn storm(args: &[&str]) -> (i32, Value) {
    let (code, out, why) = Program::start(STORM, &[args, &["--json"]].concat()).end();
    let told = serde_json::from_str(&out);
    let told = told.unwrap_or_else(|error| panic!("{error}: {out} {why}"));
    (code, told)
}

#[test]
fn nodes_that_join_at_once_all_get_a_subnet_of_their_own() {
    if !require_tool("join-storm", "etcd") {
        return;
    }
    for (nodes, pool) in [("64", "64"), ("300", "512")] {
        let (code, told) = storm(&["--nodes", nodes, "--pool", pool]);
        assert_eq!(code, 0, "{told}");
        assert_eq!(
            (&told["failures"], &told["duplicate_subnets"]),
            (&0.into(), &0.into())
        );
        assert!(told["txns_per_node"]["p50"].as_u64() <= Some(2), "{told}");
    }
    let (code, told) = storm(&["--nodes", "10", "--pool", "9"]);
    assert_eq!((code, &told["failures"]), (3, &1.into()), "{told}");
}
