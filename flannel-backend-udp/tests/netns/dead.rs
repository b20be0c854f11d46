//! Peers that do not answer cost the others nothing.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use flannel_backend_udp::Options;
use flannel_backend_udp::table::TableBuilder;
use flannel_core::Family;
use flannel_testkit::prober::ping;

use crate::bed::{Bed, PORT, TIMEOUT, ip, output, subnets, wait_until};

/// Peers whose addresses nobody has.
const DEAD: u8 = 60;
/// Bytes that wait for them: more than a socket has room for that got the buffer of
/// [`Options::socket_buffer`], of which the kernel makes twice as much.
const WAITING: u64 = 9 << 20;

/// The bytes that wait on the forwarder's socket to be sent, as the kernel counts them.
fn waiting(bed: &Bed) -> u64 {
    let table = bed
        .ns(0)
        .run(|| fs::read_to_string("/proc/thread-self/net/udp"));
    let table = table.expect("the namespace").expect("it is readable");
    let port = format!(":{PORT:04X}");
    let sockets = table.lines().filter_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let local = words.next()?;
        let queues = words.nth(2)?;
        let queue = local.ends_with(&port).then(|| queues.split(':').next());
        u64::from_str_radix(queue??, 16).ok()
    });
    sockets.sum()
}

/// Sends to the pods of all of them until it is over.
#[allow(clippy::disallowed_methods, reason = "real packets take real time")]
fn flood(bed: &Bed, over: &AtomicBool) {
    let socket = bed.pods[0].ns.run(|| UdpSocket::bind("0.0.0.0:0"));
    let socket = socket.expect("the namespace").expect("a socket");
    while !over.load(Ordering::Relaxed) {
        for number in 0..DEAD {
            let to = SocketAddr::from(([10, 42, 100 + number, 2], 9));
            // What the pod's own device does not take is no matter.
            let _ = socket.send_to(&[0; 1_000], to);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn what_waits_for_dead_peers_takes_no_room_of_the_living() {
    let Some(bed) = Bed::new("udp-dead", 2, Family::V4) else {
        return;
    };
    // They are given up, with all that waits for them, after three questions: not before all wait.
    let patient = bed
        .ns(0)
        .set_sysctl("ipv4/neigh/eth0/retrans_time_ms", "10000");
    patient.expect("it is set");
    let forwarders = [0, 1].map(|node| bed.start(node, Options::default()));
    let mut table = TableBuilder::new();
    for subnet in subnets(1).values() {
        table.insert(*subnet, bed.endpoint(1));
    }
    for number in 0..DEAD {
        let subnet = format!("10.42.{}.0/24", 100 + number);
        ip(bed.ns(0), &["route", "add", &subnet, "dev", "flannel0"]);
        let endpoint = Ipv4Addr::new(192, 0, 2, 100 + number);
        let subnet = subnet.parse().expect("a subnet");
        table.insert(subnet, SocketAddr::new(endpoint.into(), PORT));
    }
    forwarders[0].set_table(table.build());
    bed.assert_reachable();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let flooding = scope.spawn(|| flood(&bed, &over));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until("their packets wait", || waiting(&bed) > WAITING);
            let pod = bed.pod_ip(1, Family::V4);
            let pings = (0..50).map(|_| ping(&bed.pods[0].ns, None, pod, TIMEOUT));
            pings.filter(Result::is_err).count()
        }));
        over.store(true, Ordering::Relaxed);
        flooding.join().expect("no panic");
        match outcome {
            Ok(lost) => assert_eq!(lost, 0, "pings of the peer that lives"),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    let totals = forwarders[0].totals();
    assert_eq!((totals.send_full, totals.send_failed), (0, 0), "{totals:?}");
    let (_, neighbours) = output(bed.ns(0), "ip", &["neigh", "show", "dev", "eth0"]);
    let unknown = neighbours.lines().filter(|line| !line.contains("lladdr"));
    assert!(unknown.count() >= usize::from(DEAD), "{neighbours}");
}
