//! Where small packets are lost that are sent as fast as can be: the UDP backend, and a proxy that
//! moves a packet per system call, in turns. `cargo bench -p flannel-backend-udp --features baseline
//! --bench small_packets` (root; it works in namespaces of its own). Every place that may drop a packet
//! has a counter, and what is lost is laid at those that moved.
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    missing_docs,
    reason = "a program that measures real time"
)]

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flannel_backend_udp::table::TableBuilder;
use flannel_backend_udp::{Forwarder, InNamespace, Options, Sockets, UdpOptions, baseline};
use flannel_core::{DualStack, IfName, Object, Offload, Op, Subnet, Tunnel};
use flannel_testkit::netns::{Lab, Ns};
use nix::sys::socket::{
    MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg, setsockopt, sockopt::RcvBufForce,
};

/// The name of the simple proxies' threads.
const PROXY: &str = "simple-proxy";
/// So many packets may wait for the forwarder: what was, and what [`Tun::FOR_TUNNEL`] says.
///
/// [`Tun::FOR_TUNNEL`]: flannel_core::Tun::FOR_TUNNEL
const QUEUES: [u32; 2] = [2_000, 5_000];
const ROUNDS: usize = 9;
const TIME: Duration = Duration::from_millis(400);
const BURST: usize = 32;
const SMALL: usize = 64;
const PORT: u16 = 8285;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Nic,
    Wire,
}

impl Mode {
    fn features(self) -> Vec<(&'static str, bool)> {
        let mut features = vec![
            ("tx-tcp-segmentation", false),
            ("tx-tcp-ecn-segmentation", false),
            ("tx-tcp6-segmentation", false),
            ("tx-udp-segmentation", false),
            ("tx-generic-segmentation", false),
        ];
        match self {
            Self::Nic => features.push(("rx-gro", true)),
            Self::Wire => features.extend([
                ("tx-scatter-gather", false),
                ("rx-gro", false),
                ("tx-checksum-ip-generic", false),
                ("rx-checksum", false),
            ]),
        }
        features
    }
}

/// Two nodes on a cable, a pod behind each.
struct Ground {
    nodes: Vec<Ns>,
    pods: Vec<Ns>,
    _lab: Lab,
}

fn ip(ns: &Ns, text: &str) {
    let arguments: Vec<&str> = text.split(' ').collect();
    let status = ns.run(|| Command::new("ip").args(&arguments).status());
    assert!(
        status.expect("the namespace").expect("ip runs").success(),
        "{text}"
    );
}

impl Ground {
    fn new(name: &str) -> Option<Self> {
        let lab = Lab::for_test(name)?;
        let namespace = |name: String| lab.namespace(&name).expect("a namespace");
        let nodes: Vec<Ns> = (1..3).map(|n| namespace(format!("node-{n}"))).collect();
        let pods: Vec<Ns> = (1..3).map(|n| namespace(format!("pod-{n}"))).collect();
        nodes[0]
            .add_veth("eth0", &nodes[1], "eth0", 1500)
            .expect("a cable");
        for (index, (node, pod)) in nodes.iter().zip(&pods).enumerate() {
            let own = index + 1;
            node.add_veth("veth-pod", pod, "eth0", 1472)
                .expect("a cable");
            node.set_forwarding(true).expect("it forwards");
            ip(node, "link set eth0 up");
            ip(node, "link set veth-pod up");
            ip(node, &format!("address add 192.0.2.{own}/24 dev eth0"));
            ip(node, &format!("address add 10.42.{own}.1/24 dev veth-pod"));
            ip(pod, "link set eth0 up");
            ip(pod, &format!("address add 10.42.{own}.2/24 dev eth0"));
            ip(pod, &format!("route add default via 10.42.{own}.1"));
            ip(node, "tuntap add flannel0 mode tun multi_queue vnet_hdr");
            ip(node, "link set flannel0 mtu 1472 up");
            ip(
                node,
                &format!("route add 10.42.{}.0/24 dev flannel0", 3 - own),
            );
        }
        Some(Self {
            nodes,
            pods,
            _lab: lab,
        })
    }

    /// Lets so many packets wait for the forwarder.
    fn set_queue(&self, queue: u32) {
        for node in &self.nodes {
            ip(node, &format!("link set flannel0 txqueuelen {queue}"));
        }
    }

    fn set_mode(&self, mode: Mode) {
        for node in &self.nodes {
            for (feature, on) in mode.features() {
                let dev = "eth0".parse().expect("a name");
                let feature = feature.to_owned();
                let op = Op::Change(Object::Offload(Offload { dev, feature, on }));
                node.apply(&[op]).expect("it is switched");
            }
        }
    }

    fn endpoint(node: usize) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, node as u8 + 1], PORT))
    }

    fn sockets(&self, node: usize) -> InNamespace {
        InNamespace::fd(
            self.nodes[node]
                .fd()
                .try_clone_to_owned()
                .expect("a descriptor"),
        )
    }

    fn forwarder(&self, node: usize) -> Forwarder {
        let subnet = |node: usize| -> Subnet {
            format!("10.42.{}.0/24", node + 1)
                .parse()
                .expect("a subnet")
        };
        let tunnel = Tunnel {
            dev: "flannel0".parse::<IfName>().expect("a name"),
            listen: DualStack::v4(Self::endpoint(node)),
            own: DualStack::of_subnets([subnet(node)]),
            mtu: DualStack::both(1472, 1472),
        };
        let mut peers = TableBuilder::new();
        peers.insert(subnet(1 - node), Self::endpoint(1 - node));
        let sockets = Arc::new(self.sockets(node));
        let forwarder = Forwarder::start(tunnel, Options::default(), sockets, Arc::new(|_| {}));
        let forwarder = forwarder.expect("a forwarder");
        forwarder.set_table(peers.build());
        forwarder
    }

    fn proxy(&self, node: usize, over: &Arc<AtomicBool>) -> thread::JoinHandle<()> {
        let sockets = self.sockets(node);
        let dev = "flannel0".parse().expect("a name");
        let queue = sockets.tun_queue(&dev, false).expect("a queue");
        let options = UdpOptions {
            buffer: Options::default().socket_buffer,
            merge: false,
            shared: false,
        };
        let socket = sockets
            .udp(Self::endpoint(node), &options)
            .expect("a socket");
        let (peer, over) = (Self::endpoint(1 - node), Arc::clone(over));
        let proxy = thread::Builder::new().name(PROXY.to_owned());
        let run = move || {
            baseline::run(&queue, socket, peer, &over).expect("it runs until it is stopped");
        };
        proxy.spawn(run).expect("a thread")
    }

    /// Every counter of a drop, by place.
    fn drops(&self) -> BTreeMap<String, u64> {
        let mut drops = BTreeMap::new();
        let names = ["node A", "node B", "pod A", "pod B"];
        for (ns, name) in self.nodes.iter().chain(&self.pods).zip(names) {
            let (links, snmp) = ns
                .run(|| {
                    let links = Command::new("ip").args(["-s", "-j", "link"]).output();
                    let snmp = fs::read_to_string("/proc/thread-self/net/snmp");
                    (links.expect("ip runs").stdout, snmp.expect("readable"))
                })
                .expect("the namespace");
            let links: serde_json::Value = serde_json::from_slice(&links).expect("JSON");
            for link in links.as_array().expect("a list") {
                for way in ["rx", "tx"] {
                    let count = link["stats64"][way]["dropped"].as_u64().unwrap_or(0);
                    let dev = link["ifname"].as_str().unwrap_or("?");
                    drops.insert(format!("{name} {dev} {way}"), count);
                }
            }
            let mut lines = snmp.lines().filter(|line| line.starts_with("Udp:"));
            let (Some(head), Some(values)) = (lines.next(), lines.next()) else {
                continue;
            };
            for (key, value) in head.split(' ').zip(values.split(' ')) {
                if key == "RcvbufErrors" || key == "SndbufErrors" || key == "InCsumErrors" {
                    drops.insert(format!("{name} {key}"), value.parse().unwrap_or(0));
                }
            }
        }
        let softnet = fs::read_to_string("/proc/net/softnet_stat").expect("readable");
        let dropped = softnet
            .lines()
            .filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok());
        drops.insert("backlog of the machine".to_owned(), dropped.sum());
        drops
    }

    /// Sends for a while; answers what was sent and what arrived.
    fn flood(&self) -> (u64, u64) {
        let to = SocketAddr::from(([10, 42, 2, 2], 7_000));
        let open = |ns: &Ns, at: SocketAddr| -> UdpSocket {
            let socket = ns.run(|| -> io::Result<UdpSocket> { UdpSocket::bind(at) });
            socket.expect("the namespace").expect("a socket")
        };
        let receiver = open(&self.pods[1], to);
        setsockopt(&receiver, RcvBufForce, &(8 << 20)).expect("root may");
        let wait = Some(Duration::from_millis(300));
        receiver.set_read_timeout(wait).expect("a timeout");
        let counting = thread::spawn(move || count(&receiver));
        let any = SocketAddr::new(IpAddr::from([0; 4]), 0);
        let sender = open(&self.pods[0], any);
        sender.connect(to).expect("a route");
        let payload = [0; SMALL];
        let parts = [[IoSlice::new(&payload)]; BURST];
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BURST, None);
        let (start, mut sent) = (Instant::now(), 0);
        while start.elapsed() < TIME {
            let fd = sender.as_raw_fd();
            let flags = MsgFlags::empty();
            let done = sendmmsg(fd, &mut headers, &parts, [None; BURST], [], flags);
            sent += done.map_or(0, |results| results.count() as u64);
        }
        (sent, counting.join().expect("no panic"))
    }
}

fn count(receiver: &UdpSocket) -> u64 {
    let mut buffers = vec![[0; SMALL]; BURST * 2];
    let mut headers = MultiHeaders::<()>::preallocate(buffers.len(), None);
    let mut count = 0;
    loop {
        let mut parts: Vec<[IoSliceMut<'_>; 1]> = buffers
            .iter_mut()
            .map(|buffer| [IoSliceMut::new(buffer)])
            .collect();
        let flags = MsgFlags::MSG_WAITFORONE;
        match recvmmsg(
            receiver.as_raw_fd(),
            &mut headers,
            parts.iter_mut(),
            flags,
            None,
        ) {
            Ok(messages) => count += messages.count() as u64,
            Err(_) => return count,
        }
    }
}

/// The time that each forwarding thread has worked and waited for a processor, in seconds.
fn threads() -> BTreeMap<String, (f64, f64)> {
    let mut threads = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").expect("readable").flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let (name, times) = (read("comm"), read("schedstat"));
        let mut times = times
            .split_whitespace()
            .filter_map(|text| text.parse::<f64>().ok());
        if let (true, Some(ran), Some(waited)) = (
            name.starts_with("flannel-udp-") || name.starts_with(PROXY),
            times.next(),
            times.next(),
        ) {
            let id = task.file_name().to_string_lossy().into_owned();
            threads.insert(format!("{} {id}", name.trim()), (ran / 1e9, waited / 1e9));
        }
    }
    threads
}

/// The outcome of some floods.
#[derive(Debug, Default)]
struct Tally {
    sent: u64,
    /// The part of each that was lost, in per cent.
    losses: Vec<f64>,
    drops: BTreeMap<String, u64>,
    worked: f64,
    waited: f64,
}

impl Tally {
    fn measure(&mut self, ground: &Ground) {
        let (drops, times) = (ground.drops(), threads());
        let (sent, arrived) = ground.flood();
        self.sent += sent;
        self.losses
            .push(100.0 * (1.0 - arrived as f64 / sent as f64));
        for (thread, (ran, waited)) in threads() {
            let before = times.get(&thread).copied().unwrap_or_default();
            self.worked += ran - before.0;
            self.waited += waited - before.1;
        }
        for (place, count) in ground.drops() {
            let more = count.saturating_sub(drops.get(&place).copied().unwrap_or(0));
            *self.drops.entry(place).or_default() += more;
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut losses = self.losses.clone();
        losses.sort_by(f64::total_cmp);
        let time = TIME.as_secs_f64() * losses.len() as f64;
        write!(
            f,
            "{:.0} thousand/s, lost {:.1} % ({:.1} to {:.1}); its threads worked for {:.1} s and waited \
             for a processor for {:.1} s; dropped by",
            self.sent as f64 / time / 1e3,
            losses[losses.len() / 2],
            losses[0],
            losses[losses.len() - 1],
            self.worked,
            self.waited,
        )?;
        for (place, count) in self.drops.iter().filter(|(_, count)| **count > 0) {
            write!(
                f,
                " {place} {:.1} %",
                100.0 * *count as f64 / self.sent as f64
            )?;
        }
        Ok(())
    }
}

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let (Some(udp), Some(plain)) = (Ground::new("small-udp"), Ground::new("small-plain")) else {
        return;
    };
    let forwarders = [0, 1].map(|node| udp.forwarder(node));
    let over = Arc::new(AtomicBool::new(false));
    let proxies = [0, 1].map(|node| plain.proxy(node, &over));
    for mode in [Mode::Nic, Mode::Wire] {
        let ways = [("UDP", &udp), ("one packet a call", &plain)];
        let mut tallies = Vec::new();
        for (name, ground) in ways {
            ground.set_mode(mode);
            ground.flood();
            for queue in QUEUES {
                tallies.push((name, ground, queue, Tally::default()));
            }
        }
        for _ in 0..ROUNDS {
            for (_, ground, queue, tally) in &mut tallies {
                ground.set_queue(*queue);
                tally.measure(ground);
            }
        }
        for (name, _, queue, tally) in &tallies {
            println!("{mode:?}, {name}, {queue} packets may wait: {tally}");
        }
    }
    drop(forwarders);
    over.store(true, Ordering::Relaxed);
    for proxy in proxies {
        proxy.join().expect("no panic");
    }
}
