//! The loss and the round trips of a peer that lives, while others that do not answer are flooded:
//! the UDP backend, and the kernel's VXLAN beside it. `cargo bench -p flannel-backend-udp --bench
//! dead_peers` (root; it works in namespaces of its own).
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::print_stderr,
    missing_docs,
    dead_code,
    reason = "a program that measures real time and shares its ground with tests"
)]

#[path = "../tests/netns/bed.rs"]
mod bed;

use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flannel_backend_udp::Options;
use flannel_backend_udp::table::TableBuilder;
use flannel_core::{Family, Tun};
use flannel_testkit::prober::{self, Prober};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg};

use bed::{Bed, PORT, ip, output, subnets, wait_until};

/// Peers whose addresses nobody has.
const DEAD: u8 = 60;
/// Packets of the flood in a system call.
const BURST: usize = 32;
/// Packets of the flood in a second: what a worker can do well, what it can just do, and more.
const RATES: [f64; 3] = [20_000.0, 50_000.0, f64::INFINITY];
/// Bytes of a packet of the flood, and of one of the pings.
const PAYLOADS: [usize; 2] = [64, 1_000];
const PING: usize = 64;
/// The length of each situation.
const TIME: Duration = Duration::from_secs(5);
/// Between two pings.
const PAUSE: Duration = Duration::from_millis(5);
/// A ping that takes longer is lost.
const LIMIT: Duration = Duration::from_secs(1);

fn dead(number: u8) -> (String, Ipv4Addr) {
    let endpoint = Ipv4Addr::new(192, 0, 2, 100 + number);
    (format!("10.42.{}.0/24", 100 + number), endpoint)
}

/// Routes over the kernel's VXLAN on a bed that has no forwarders.
fn vxlan(bed: &Bed) {
    let mac = |number: usize| format!("02:00:00:00:00:{number:02x}");
    for node in 0..2 {
        let (ns, own) = (bed.ns(node), bed.endpoint(node).ip());
        let run = |text: String| ip(ns, &text.split(' ').collect::<Vec<_>>());
        run("link delete flannel0".to_owned());
        run(format!(
            "link add flannel.1 type vxlan id 1 local {own} dstport 8472 nolearning"
        ));
        let own_mac = mac(node + 1);
        run(format!("link set flannel.1 address {own_mac} mtu 1450 up"));
        run(format!("address add 10.42.{}.0/32 dev flannel.1", node + 1));
        let other = 1 - node;
        let mut peers = vec![(
            format!("10.42.{}.0", other + 1),
            bed.endpoint(other).ip(),
            mac(other + 1),
        )];
        for number in (0..DEAD).filter(|_| node == 0) {
            let at = IpAddr::V4(dead(number).1);
            let name = format!("10.42.{}.0", 100 + number);
            peers.push((name, at, mac(100 + usize::from(number))));
        }
        for (name, at, mac) in peers {
            run(format!(
                "neigh add {name} lladdr {mac} dev flannel.1 nud permanent"
            ));
            let text = format!("fdb append {mac} dev flannel.1 dst {at}");
            let (ok, said) = output(ns, "bridge", &text.split(' ').collect::<Vec<_>>());
            assert!(ok, "{said}");
            run(format!(
                "route add {name}/24 via {name} dev flannel.1 onlink"
            ));
        }
    }
}

/// Sends to all dead peers in turn until it is over.
fn flood(bed: &Bed, payload: usize, rate: f64, over: &AtomicBool) -> f64 {
    let socket = bed.pods[0].ns.run(|| UdpSocket::bind("0.0.0.0:0"));
    let socket = socket.expect("the namespace").expect("a socket");
    let payload = vec![0; payload];
    let parts = [[IoSlice::new(&payload)]; BURST];
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BURST, None);
    let (start, mut sent) = (Instant::now(), 0_u64);
    while !over.load(Ordering::Relaxed) {
        let due = Duration::from_secs_f64(sent as f64 / rate);
        if let Some(early) = due.checked_sub(start.elapsed()) {
            thread::sleep(early);
        }
        let to: [Option<SockaddrIn>; BURST] = std::array::from_fn(|n| {
            let number = ((sent as usize + n) % usize::from(DEAD)) as u8;
            let ip = Ipv4Addr::new(10, 42, 100 + number, 2);
            Some(SocketAddrV4::new(ip, 9).into())
        });
        let flags = MsgFlags::empty();
        let done = sendmmsg(socket.as_raw_fd(), &mut headers, &parts, to, [], flags);
        sent += done.map_or(0, |results| results.count() as u64);
    }
    sent as f64 / start.elapsed().as_secs_f64()
}

/// Pings the pod of the peer that lives; answers how many, and the times of those that came back.
fn pings(bed: &Bed) -> (usize, Vec<f64>) {
    let to = SocketAddr::new(bed.pod_ip(1, Family::V4), 7_777);
    let server = bed.pods[1].ns.run(|| UdpSocket::bind(to));
    let server = server.expect("the namespace").expect("a socket");
    server.set_read_timeout(Some(LIMIT * 2)).expect("a timeout");
    let echo = thread::spawn(move || {
        let mut buffer = [0; PING];
        while let Ok((len, from)) = server.recv_from(&mut buffer) {
            server.send_to(&buffer[..len], from).ok();
        }
    });
    let client = bed.pods[0].ns.run(|| UdpSocket::bind("0.0.0.0:0"));
    let client = client.expect("the namespace").expect("a socket");
    client.connect(to).expect("a route");
    client.set_read_timeout(Some(LIMIT)).expect("a timeout");
    let (mut count, mut times, start) = (0_u32, Vec::new(), Instant::now());
    let mut buffer = [0; PING];
    while start.elapsed() < TIME {
        let mut ping = [0; PING];
        ping[..4].copy_from_slice(&count.to_be_bytes());
        let sent = Instant::now();
        client.send(&ping).expect("it is sent");
        count += 1;
        loop {
            match client.recv(&mut buffer) {
                Ok(_) if buffer[..4] == ping[..4] => {
                    times.push(sent.elapsed().as_secs_f64() * 1e3);
                    break;
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        thread::sleep(PAUSE);
    }
    echo.join().expect("no panic");
    times.sort_by(f64::total_cmp);
    (count as usize, times)
}

/// Packets that the queue of a device had no room for.
fn dropped_by(bed: &Bed, dev: &str) -> u64 {
    let arguments = ["-s", "-j", "link", "show", "dev", dev];
    let (_, text) = output(bed.ns(0), "ip", &arguments);
    let links: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    links[0]["stats64"]["tx"]["dropped"].as_u64().unwrap_or(0)
}

fn measure(name: &str, bed: &Bed, dev: &str, payload: usize, rate: Option<f64>) {
    let over = AtomicBool::new(false);
    let before = dropped_by(bed, dev);
    let (sent, (count, times), stream) = thread::scope(|scope| {
        let flooding = rate.map(|rate| {
            scope.spawn({
                let over = &over;
                move || flood(bed, payload, rate, over)
            })
        });
        let ends = [0, 1].map(|pod| (&bed.pods[pod].ns, bed.pod_ip(pod, Family::V4)));
        let options = prober::Options {
            rate: 1_000,
            packets: (TIME.as_secs() * 1_000) as u32,
            ..prober::Options::default()
        };
        let stream = Prober::start(ends[0], ends[1], options).expect("a prober");
        let pings = pings(bed);
        let stream = stream.finish();
        over.store(true, Ordering::Relaxed);
        let sent = flooding.map_or(0.0, |thread| thread.join().expect("no panic"));
        (sent, pings, stream)
    });
    let at = |part: f64| times.get((times.len().saturating_sub(1) as f64 * part) as usize);
    let lost = 100.0 * (1.0 - times.len() as f64 / count as f64);
    let flow = &stream.forth;
    println!(
        "| {name} | {} | {:.0} | {lost:.1} | {:.2} | {:.2} | {:.0} | {:.2} | {:.2} | {} |",
        if rate.is_some() {
            payload.to_string()
        } else {
            "no flood".to_owned()
        },
        sent / 1e3,
        at(0.5).unwrap_or(&f64::NAN),
        at(0.99).unwrap_or(&f64::NAN),
        at(1.0).unwrap_or(&f64::NAN),
        100.0 * f64::from(flow.lost_count()) / f64::from(flow.sent.max(1)),
        100.0 * f64::from(stream.back.lost_count()) / f64::from(stream.back.sent.max(1)),
        dropped_by(bed, dev) - before,
    );
}

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let Some(udp) = Bed::new("dead-udp", 2, Family::V4) else {
        return;
    };
    let Some(kernel) = Bed::new("dead-vxlan", 2, Family::V4) else {
        return;
    };
    vxlan(&kernel);
    let queue = Tun::FOR_TUNNEL.queue.expect("it says").to_string();
    for node in 0..2 {
        ip(
            udp.ns(node),
            &["link", "set", "flannel0", "txqueuelen", &queue],
        );
    }
    let forwarders = [0, 1].map(|node| udp.start(node, Options::default()));
    let mut table = TableBuilder::new();
    for subnet in subnets(1).values() {
        table.insert(*subnet, udp.endpoint(1));
    }
    for number in 0..DEAD {
        let (subnet, endpoint) = dead(number);
        ip(udp.ns(0), &["route", "add", &subnet, "dev", "flannel0"]);
        let subnet = subnet.parse().expect("a subnet");
        table.insert(subnet, SocketAddr::new(endpoint.into(), PORT));
    }
    forwarders[0].set_table(table.build());
    udp.assert_reachable();
    let pod = kernel.pod_ip(1, Family::V4);
    wait_until("VXLAN carries", || {
        let wait = Duration::from_millis(500);
        prober::ping(&kernel.pods[0].ns, None, pod, wait).is_ok()
    });
    println!(
        "| way | flood, bytes | flood, thousand/s | pings lost, % | median, ms | 99 of 100, ms | longest, ms | stream lost forth, % | back, % | queue full |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let ways = [("UDP", &udp, "flannel0"), ("VXLAN", &kernel, "flannel.1")];
    for (name, bed, dev) in ways {
        measure(name, bed, dev, 0, None);
    }
    for payload in PAYLOADS {
        for rate in RATES {
            for (name, bed, dev) in ways {
                let totals = forwarders[0].totals();
                measure(name, bed, dev, payload, Some(rate));
                if name == "UDP" {
                    let now = forwarders[0].totals();
                    let counts: Vec<String> = now
                        .iter()
                        .zip(totals.iter())
                        .filter(|((_, now), (_, before))| now != before)
                        .map(|((name, now), (_, before))| format!("{name} {}", now - before))
                        .collect();
                    eprintln!("    {}", counts.join(", "));
                }
            }
        }
    }
}
