//! The lab and the prober on plain routed namespaces, without any overlay.
#![cfg(all(feature = "lab", target_os = "linux"))]
#![allow(
    clippy::disallowed_methods,
    reason = "real namespaces live in real time, and `ip` is the independent observer"
)]

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{self, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use flannel_core::{DualStack, Family, Subnet};
use flannel_testkit::netns::{Error, Host, Kind, Lab, Ns, Underlay, kinds};
use flannel_testkit::prober::{self, Options, Prober, ping, ping_matrix};
use flannel_testkit::require_tool;

const TIMEOUT: Duration = Duration::from_secs(2);

/// One at a time: the prober's tests measure milliseconds.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The inode of the namespace that the calling thread is in.
fn current_namespace() -> u64 {
    fs::metadata("/proc/thread-self/ns/net").unwrap().ino()
}

/// Whether a thread or a descriptor of this process holds a namespace.
fn is_held(inode: u64) -> bool {
    let threads = fs::read_dir("/proc/self/task").unwrap().flatten();
    let threads = threads.map(|entry| entry.path().join("ns/net"));
    let files = fs::read_dir("/proc/self/fd").unwrap().flatten();
    threads
        .chain(files.map(|entry| entry.path()))
        // Sockets and pipes may share the number on another file system.
        .filter(|path| fs::read_link(path).is_ok_and(|to| to.starts_with(format!("net:[{inode}]"))))
        .count()
        > 0
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "not within 5 s: {what}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

fn assert_all_answer(hosts: &[Host], expected: usize) {
    let pings = ping_matrix(hosts, TIMEOUT);
    for ping in &pings {
        if let Err(error) = &ping.result {
            panic!("{} from {} to {}: {error}", ping.family, ping.from, ping.to);
        }
    }
    assert_eq!(pings.len(), expected);
}

/// Two nodes with a pod each and plain routes between the pods' subnets.
struct Routed {
    underlay: Underlay,
    pods: Vec<Host>,
}

fn subnets(node: usize) -> DualStack<Subnet> {
    DualStack::of_subnets([
        format!("10.42.{node}.0/24").parse().unwrap(),
        format!("fd00:42:{node}::/64").parse().unwrap(),
    ])
}

fn routed(lab: &Lab) -> Routed {
    let underlay = lab.underlay(2).unwrap();
    let mut pods = Vec::new();
    for (i, node) in underlay.nodes.iter().enumerate() {
        let pod = lab.pod(&format!("pod-{}", i + 1), &node.ns, &subnets(i + 1), 1400);
        pods.push(pod.unwrap());
        let other = 1 - i;
        for (family, subnet) in subnets(other + 1).iter() {
            let gateway = underlay.nodes[other].ips.ip(family).unwrap();
            node.ns.add_route(*subnet, gateway, "eth0").unwrap();
        }
    }
    Routed { underlay, pods }
}

#[test]
fn the_hosts_namespace_is_never_entered_or_changed() {
    let Some(lab) = Lab::for_test("host-untouched") else {
        return;
    };
    let before = current_namespace();
    let devices = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let names = |text: &str| -> Vec<String> {
        text.lines()
            .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
            .collect()
    };
    let ns = lab.namespace("a").unwrap();
    ns.add_bridge("br-of-the-lab", 1500).unwrap();
    assert_ne!(ns.run(current_namespace).unwrap(), before);
    assert_eq!(current_namespace(), before);
    let after = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    assert_eq!(names(&devices), names(&after));
    let inside = ns
        .run(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap())
        .unwrap();
    assert_eq!(names(&inside).len(), 2, "{inside}");
}

#[test]
fn a_closure_returns_its_value_and_passes_on_its_panic() {
    let Some(lab) = Lab::for_test("closures") else {
        return;
    };
    let ns = lab.namespace("a").unwrap();
    let borrowed = String::from("borrowed");
    assert_eq!(ns.run(|| borrowed.len()).unwrap(), 8);
    let panic = catch_unwind(AssertUnwindSafe(|| ns.run(|| panic!("inside")))).unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"inside"));
    let inside = ns.run(current_namespace).unwrap();
    let on_runtime = ns.block_on(|| async {
        tokio::time::sleep(Duration::from_millis(1)).await;
        current_namespace()
    });
    assert_eq!(on_runtime.unwrap(), inside);
    let by_path = fs::metadata(ns.path()).unwrap().ino();
    assert_eq!(by_path, inside);
}

#[tokio::test]
async fn the_lab_works_inside_an_async_runtime() {
    let Some(lab) = Lab::for_test("in-async") else {
        return;
    };
    let ns = lab.namespace("a").unwrap();
    ns.add_bridge("br0", 1500).unwrap();
    assert_eq!(ns.block_on(|| async { 7 }).unwrap(), 7);
}

#[test]
fn nodes_of_one_underlay_reach_one_another_in_both_families() {
    let Some(lab) = Lab::for_test("one-underlay") else {
        return;
    };
    let underlay = lab.underlay(3).unwrap();
    assert_all_answer(&underlay.nodes, 12);
    let first = &underlay.nodes[0];
    assert_eq!(
        first.ips.ips().map(|ip| ip.to_string()).collect::<Vec<_>>(),
        ["192.0.2.1", "2001:db8:1::1"]
    );
    for gateway in underlay.segments[0].gateways.ips() {
        ping(&first.ns, None, gateway, TIMEOUT).unwrap();
    }
}

#[test]
fn a_large_underlay_does_not_fill_the_kernels_neighbour_table() {
    let _alone = alone();
    let Some(lab) = Lab::for_test("large") else {
        return;
    };
    let underlay = lab.underlay(64).unwrap();
    assert_all_answer(&underlay.nodes, 64 * 63 * 2);
}

#[test]
fn a_router_connects_the_subnets_of_an_underlay() {
    let Some(lab) = Lab::for_test("two-underlays") else {
        return;
    };
    let underlay = lab.routed_underlay(&[2, 1]).unwrap();
    assert_all_answer(&underlay.nodes, 12);
    let far = underlay.nodes[2].ips.ip(Family::V4).unwrap();
    assert_eq!(far.to_string(), "198.51.100.1");
    // Without the router's forwarding there is no way: the packets do go through it.
    underlay.router.set_forwarding(false).unwrap();
    let near = &underlay.nodes[0].ns;
    let error = ping(near, None, far, Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error, prober::Error::NoAnswer { .. }), "{error}");
    ping(
        near,
        None,
        underlay.nodes[1].ips.ip(Family::V4).unwrap(),
        TIMEOUT,
    )
    .unwrap();
}

#[test]
fn pods_are_reached_through_their_nodes() {
    let Some(lab) = Lab::for_test("pods") else {
        return;
    };
    let Routed { underlay, pods } = routed(&lab);
    assert_all_answer(&pods, 4);
    let pod = &pods[0];
    assert_eq!(pod.ips.ip(Family::V4).unwrap().to_string(), "10.42.1.2");
    assert_eq!(pod.ips.ip(Family::V6).unwrap().to_string(), "fd00:42:1::2");
    for (node, dev) in [(&underlay.nodes[0].ns, "cni0"), (&pod.ns, "eth0")] {
        let mtu = node.run(|| {
            let list = Command::new("ip")
                .args(["-o", "link", "show", dev])
                .output();
            list.map(|list| String::from_utf8_lossy(&list.stdout).contains("mtu 1400 "))
        });
        if require_tool("pods_are_reached_through_their_nodes", "ip") {
            assert!(mtu.unwrap().unwrap(), "{dev}");
        }
    }
    let small = DualStack::new(Some("10.42.9.0/31".parse().unwrap()), None);
    let error = lab
        .pod("pod-x", &underlay.nodes[0].ns, &small, 1400)
        .unwrap_err();
    assert!(error.to_string().contains("10.42.9.0/31"), "{error}");
}

#[test]
fn cleanup_leaves_no_namespace_behind() {
    let _alone = alone();
    let Some(lab) = Lab::for_test("gone") else {
        return;
    };
    let Some(observer) = Lab::for_test("observer") else {
        return;
    };
    let watching = observer.namespace("a").unwrap();
    let inodes: Vec<u64> = {
        let ns = lab.namespace("b").unwrap();
        watching.add_veth("to-b", &ns, "eth0", 1500).unwrap();
        lab.underlay(2).unwrap();
        let all = lab.namespaces();
        all.iter()
            .map(|ns| ns.run(current_namespace).unwrap())
            .collect()
    };
    assert_eq!(inodes.len(), 4);
    assert!(inodes.iter().all(|inode| is_held(*inode)));
    watching.set_up("to-b").unwrap();
    drop(lab);
    wait_until("nothing holds the namespaces", || {
        !inodes.iter().any(|inode| is_held(*inode))
    });
    // The kernel removes a device whose other end was in a namespace that is gone.
    wait_until("the kernel dropped the namespace", || {
        matches!(watching.set_up("to-b"), Err(Error::NoSuchDevice { .. }))
    });
}

#[test]
fn a_panic_takes_named_namespaces_away() {
    let _alone = alone();
    if Lab::for_test("named").is_none() {
        return;
    }
    let prefix = format!("lab{}", process::id());
    let file = format!("/run/netns/{prefix}-a");
    let made = catch_unwind(|| {
        let lab = match Lab::named(&prefix) {
            Ok(lab) => lab,
            Err(error) => panic!("{error}"),
        };
        let ns = lab.namespace("a").unwrap();
        assert_eq!(ns.path(), Path::new(&file));
        assert_eq!(
            fs::metadata(&file).unwrap().ino(),
            ns.run(current_namespace).unwrap()
        );
        let taken = Lab::named(&prefix).unwrap().namespace("a").unwrap_err();
        assert!(matches!(taken, Error::NameTaken { .. }), "{taken}");
        assert!(Path::new(&file).exists(), "the name was another lab's");
        if require_tool("a_panic_takes_named_namespaces_away", "ip") {
            let name = ns.name();
            let list = Command::new("ip")
                .args(["netns", "exec", name, "ip", "-o", "link"])
                .output();
            let list = String::from_utf8(list.unwrap().stdout).unwrap();
            assert!(list.contains("lo: <LOOPBACK,UP"), "{list}");
        }
        panic!("on purpose");
    });
    let panic = made.unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose"));
    assert!(!Path::new(&file).exists());
}

#[test]
fn kept_namespaces_stay_and_a_second_cleanup_is_harmless() {
    let _alone = alone();
    if Lab::for_test("kept").is_none() {
        return;
    }
    let prefix = format!("kept{}", process::id());
    let lab = Lab::named(&prefix).unwrap();
    lab.namespace("a").unwrap();
    let names = lab.keep();
    assert_eq!(names, [format!("{prefix}-a")]);
    let file = Path::new("/run/netns").join(&names[0]);
    assert!(file.exists());
    if require_tool("kept_namespaces_stay", "ip") {
        let removed = Command::new("ip")
            .args(["netns", "del", &names[0]])
            .status();
        assert!(removed.unwrap().success());
    }
    assert!(!file.exists());

    let lab = Lab::named(&prefix).unwrap();
    lab.namespace("b").unwrap();
    lab.cleanup();
    lab.cleanup();
    assert!(!Path::new(&format!("/run/netns/{prefix}-b")).exists());
}

#[test]
fn bad_names_are_refused() {
    if Lab::for_test("names").is_none() {
        return;
    }
    let long = "x".repeat(65);
    for name in ["", "..", "a/b", "-a", "a b", &long] {
        assert!(
            matches!(Lab::new(name), Err(Error::Name { .. })),
            "{name:?}"
        );
    }
    let lab = Lab::new("names").unwrap();
    lab.namespace("a").unwrap();
    assert!(matches!(lab.namespace("a"), Err(Error::NameTaken { .. })));
    assert!(matches!(lab.namespace("a/b"), Err(Error::Name { .. })));
    let ns = lab.namespace("b").unwrap();
    assert!(ns.add_bridge("a-name-much-too-long", 1500).is_err());
}

#[test]
fn a_privilege_that_is_missing_is_named() {
    let Err(error) = Lab::new("privileges") else {
        return without_privileges("a_privilege_that_is_missing_is_named");
    };
    let text = error.to_string();
    assert!(matches!(error, Error::NotPermitted { .. }), "{text}");
    for word in ["CAP_SYS_ADMIN", "CAP_NET_ADMIN", "sudo"] {
        assert!(text.contains(word), "{text}");
    }
}

/// Runs a test of this program once more, by itself and without privileges.
fn without_privileges(test: &str) {
    if !require_tool(test, "setpriv") {
        return;
    }
    let output = Command::new("setpriv")
        .args(["--bounding-set=-all", "--inh-caps=-all", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

#[test]
fn this_kernel_has_what_the_lab_is_made_of() {
    if Lab::for_test("kinds").is_none() {
        return;
    }
    let kinds = kinds().unwrap();
    assert!(
        kinds.contains(&Kind::Bridge) && kinds.contains(&Kind::Veth),
        "{kinds:?}"
    );
}

#[test]
fn a_ping_without_a_way_says_why() {
    let Some(lab) = Lab::for_test("no-way") else {
        return;
    };
    let ns = lab.namespace("a").unwrap();
    let to: IpAddr = "192.0.2.77".parse().unwrap();
    let error = ping(&ns, None, to, TIMEOUT).unwrap_err();
    assert!(matches!(error, prober::Error::Send { .. }), "{error}");
    let error = ping(&ns, Some("::1".parse().unwrap()), to, TIMEOUT).unwrap_err();
    assert!(matches!(error, prober::Error::Families { .. }), "{error}");
    let error = ping(&ns, Some("192.0.2.5".parse().unwrap()), to, TIMEOUT).unwrap_err();
    assert!(matches!(error, prober::Error::Socket { .. }), "{error}");
    ping(&ns, None, "127.0.0.1".parse().unwrap(), TIMEOUT).unwrap();
    ping(&ns, None, "::1".parse().unwrap(), TIMEOUT).unwrap();
}

/// A prober between the two pods in a family.
fn probe(pods: &[Host], family: Family, options: Options) -> Prober {
    let end = |host: &'_ Host| host.ips.ip(family).unwrap();
    let (a, b) = (&pods[0], &pods[1]);
    Prober::start((&a.ns, end(a)), (&b.ns, end(b)), options).unwrap()
}

#[test]
fn an_undisturbed_path_loses_nothing() {
    let _alone = alone();
    let Some(lab) = Lab::for_test("undisturbed") else {
        return;
    };
    let Routed { pods, .. } = routed(&lab);
    let report = probe(&pods, Family::V4, Options::default()).finish();
    for flow in [&report.forth, &report.back] {
        assert_eq!(flow.sent, 10_000, "{report}");
        assert!(flow.rate() >= 1_000.0, "{report}");
        assert_eq!(
            (flow.lost_count(), flow.duplicates, flow.refused),
            (0, 0, 0),
            "{report}"
        );
        assert_eq!(flow.overflowed, 0, "{report}");
    }
}

/// The negative control of every test that says "no packet lost".
#[test]
fn an_outage_of_20_ms_is_seen() {
    let _alone = alone();
    let Some(lab) = Lab::for_test("outage") else {
        return;
    };
    let Routed { underlay, pods } = routed(&lab);
    let node = &underlay.nodes[0].ns;
    let options = Options {
        packets: 2_000,
        ..Options::default()
    };
    type Cut<'a> = &'a dyn Fn(&Ns, bool);
    let port: Cut<'_> = &|node, cut| {
        if cut {
            node.set_down("veth-pod").unwrap();
        } else {
            node.set_up("veth-pod").unwrap();
        }
    };
    let route: Cut<'_> = &|node, cut| {
        let dst = subnets(2).v6.unwrap();
        let gateway = underlay.nodes[1].ips.ip(Family::V6).unwrap();
        if cut {
            node.remove_route(dst, gateway, "eth0").unwrap();
        } else {
            node.add_route(dst, gateway, "eth0").unwrap();
        }
    };
    for (family, cut) in [(Family::V4, port), (Family::V6, route)] {
        let prober = probe(&pods, family, options);
        assert!(prober.wait_received(500, TIMEOUT), "no packets in {family}");
        cut(node, true);
        thread::sleep(Duration::from_millis(20));
        cut(node, false);
        let report = prober.finish();
        let (hit, other) = match family {
            // The pod that sends through the port sees its own device without a carrier, asks for
            // its gateway anew and holds packets back until that answers: late, but not lost.
            Family::V4 => (&report.back, &report.forth),
            Family::V6 => (&report.forth, &report.back),
        };
        // 40 packets are sent in 20 ms; half of them is certainly more than chance.
        assert!(hit.lost_count() >= 20, "{family}: {report}");
        assert!(hit.longest_gap >= Duration::from_millis(20), "{report}");
        let ranges = hit.lost.iter().map(|range| range.end() - range.start() + 1);
        assert_eq!(ranges.sum::<u32>(), hit.lost_count(), "{report}");
        assert!((500..1_000).contains(hit.lost[0].start()), "{report}");
        if family == Family::V6 {
            assert_eq!(other.lost_count(), 0, "{report}");
        } else {
            assert!(other.longest_gap >= Duration::from_millis(20), "{report}");
        }
        assert_eq!(hit.overflowed + other.overflowed, 0, "{report}");
    }
}

#[test]
fn a_prober_ends_by_itself_and_when_told() {
    let _alone = alone();
    let Some(lab) = Lab::for_test("prober-ends") else {
        return;
    };
    let Routed { pods, .. } = routed(&lab);
    let long = Options {
        packets: 20_000,
        rate: 1_000,
        ..Options::default()
    };
    let prober = probe(&pods, Family::V6, long);
    assert!(prober.wait_received(50, TIMEOUT));
    let start = Instant::now();
    prober.stop();
    let report = prober.finish();
    assert!(start.elapsed() < Duration::from_secs(2), "{report}");
    assert!(report.sent() >= 100 && report.lost() == 0, "{report}");

    // A path that is cut for good, at both ends.
    pods[0].ns.set_down("eth0").unwrap();
    let few = Options {
        packets: 100,
        ..Options::default()
    };
    let v4 = |host: &Host| host.ips.ip(Family::V4).unwrap();
    let cut = Prober::start(
        (&pods[0].ns, v4(&pods[0])),
        (&pods[1].ns, v4(&pods[1])),
        few,
    );
    let report = cut.unwrap().finish();
    assert_eq!((report.sent(), report.received()), (200, 0), "{report}");
    assert_eq!(report.forth.lost, [0..=99], "{report}");
    assert_eq!(report.forth.refused, 100, "{report}");

    let foreign: IpAddr = "192.0.2.200".parse().unwrap();
    let error = Prober::start((&pods[0].ns, foreign), (&pods[1].ns, v4(&pods[1])), few);
    assert!(error.unwrap_err().to_string().contains("192.0.2.200"));
}

#[test]
fn a_socket_stays_in_the_namespace_it_was_opened_in() {
    let Some(lab) = Lab::for_test("sockets") else {
        return;
    };
    let underlay = lab.underlay(2).unwrap();
    let [a, b] = &underlay.nodes[..] else {
        panic!("two nodes were asked for")
    };
    let ip = |host: &Host| host.ips.ip(Family::V4).unwrap();
    let (at_a, at_b) = (ip(a), ip(b));
    let a = a.ns.run(|| UdpSocket::bind((at_a, 0))).unwrap().unwrap();
    let b = b.ns.run(|| UdpSocket::bind((at_b, 0))).unwrap().unwrap();
    b.set_read_timeout(Some(TIMEOUT)).unwrap();
    a.send_to(b"hello", b.local_addr().unwrap()).unwrap();
    let mut buffer = [0; 16];
    let (len, from) = b.recv_from(&mut buffer).unwrap();
    assert_eq!(
        (&buffer[..len], from),
        (&b"hello"[..], a.local_addr().unwrap())
    );
    assert!(b.as_raw_fd() >= 0);
}
