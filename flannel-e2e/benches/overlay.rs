//! What the whole SDK takes on a real kernel: from a lease to its route, repairs, and scale.
//!
//! `cargo bench -p flannel-e2e` (root; it works in namespaces of its own). Arguments choose parts:
//! `events`, `repair`, `rebuild`, `scale`. Times are taken by a socket that hears what the kernel
//! tells of its routes and neighbours. Fails if a goal is missed.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a program that measures real time and prints a table"
)]

use std::collections::HashSet;
use std::env;
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    DualStack, Family, Kernel, MemoryManager, NodeId, Object, ObjectKey, Objects, Op, Overlay,
    OverlayName, RouteProtocol,
};
use flannel_e2e::{Peers, config, dev, ours, route_key};
use flannel_netlink::{NetlinkKernel, NetlinkOptions};
use flannel_testkit::netns::{Host, Lab, Ns};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use tokio::runtime::Runtime;

/// The goals.
const EVENT_P99: Duration = Duration::from_millis(20);
const REPAIR_P99: Duration = Duration::from_millis(50);
const REBUILD: Duration = Duration::from_secs(1);
/// The most that bad peers may slow good ones down.
const BAD_PEERS: f64 = 1.5;
/// The most that a peer of 50,000 may take, as a multiple of one of 5,000: 10 would be quadratic.
const GROWTH: f64 = 2.0;

/// Peers while events and repairs are measured.
const PEERS: u32 = 1_000;
const EVENTS: u32 = 1_000;
const REPAIRS: usize = 100;

const CONFIG: &str =
    r#"{ "Network": "10.0.0.0/8", "SubnetLen": 24, "Backend": { "Type": "vxlan" } }"#;

/// The subnets of good peers; the node's own is the last of the pool, bad ones stand before it.
const GOOD: Peers = Peers {
    first: std::net::Ipv4Addr::new(10, 1, 0, 0),
    vni: 1,
};
const BAD: Peers = Peers {
    first: std::net::Ipv4Addr::new(10, 250, 0, 0),
    vni: 1,
};

/// Hears what the kernel of a namespace tells of routes and neighbours.
struct Ear {
    socket: Socket,
    buffer: Vec<u8>,
}

/// `RTM_NEWNEIGH` and `RTM_NEWROUTE`.
const NEW_NEIGHBOUR: u16 = 28;
const NEW_ROUTE: u16 = 24;

/// `NUD_PERMANENT` in the low byte of `ndm_state`, and `NUD_NOARP` with which the kernel tells of
/// forwarding entries.
const PERMANENT: u8 = 0x80 | 0x40;

impl Ear {
    fn new(ns: &Ns) -> Self {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            setsockopt(&socket, sockopt::RcvBufForce, &(512 << 20))?;
            setsockopt(
                &socket,
                sockopt::ReceiveTimeout,
                &TimeVal::milliseconds(200),
            )?;
            socket.bind_auto()?;
            // `RTNLGRP_NEIGH` and `RTNLGRP_IPV4_ROUTE`.
            socket.add_membership(3)?;
            socket.add_membership(7)?;
            std::io::Result::Ok(socket)
        };
        let socket = ns.run(open).expect("it can be entered");
        Self {
            socket: socket.expect("a socket"),
            buffer: Vec::with_capacity(1 << 16),
        }
    }

    /// Hands each message that comes until `deadline` to `wanted`, until that says it is enough.
    /// Answers whether it did.
    fn listen(&mut self, deadline: Duration, mut wanted: impl FnMut(u16, &[u8]) -> bool) -> bool {
        let start = Instant::now();
        while start.elapsed() < deadline {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(error) => panic!("what the kernel told is lost: {error}"),
            }
            let mut rest = &self.buffer[..];
            while let Some(header) = rest.first_chunk::<16>() {
                let [a, b, c, d, e, f, ..] = *header;
                let len = u32::from_ne_bytes([a, b, c, d]) as usize;
                let Some(message) = rest.get(..len).filter(|_| len >= 16) else {
                    break;
                };
                if wanted(u16::from_ne_bytes([e, f]), message) {
                    return true;
                }
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
            }
        }
        false
    }

    /// Waits until the kernel tells that an object was made.
    fn hears(&mut self, object: &Object) -> bool {
        let v4 = |kind: u16, ip: IpAddr| {
            let IpAddr::V4(ip) = ip else {
                panic!("these are IPv4 overlays");
            };
            attribute(kind, &ip.octets())
        };
        // RTA_DST and NDA_DST are 1, NDA_LLADDR is 2.
        let (kind, needle) = match object {
            Object::Route(route) => (NEW_ROUTE, v4(1, route.dst.address())),
            Object::Neighbour(neighbour) => (NEW_NEIGHBOUR, v4(1, neighbour.ip)),
            Object::Fdb(fdb) => (NEW_NEIGHBOUR, attribute(2, &fdb.mac.0)),
            _ => panic!("not listened for: {object}"),
        };
        self.listen(Duration::from_secs(10), |found, message| {
            // What the kernel tells of a neighbour that is being deleted is a change, too.
            let made =
                found != NEW_NEIGHBOUR || message.get(24).is_some_and(|s| s & PERMANENT != 0);
            found == kind && made && message.windows(needle.len()).any(|part| part == needle)
        })
    }

    /// Waits until so many different routes of ours were made.
    fn hears_routes(&mut self, count: usize, deadline: Duration) -> bool {
        let mut seen: HashSet<[u8; 4]> = HashSet::with_capacity(count);
        self.listen(deadline, |kind, message| {
            // `rtm_protocol` and the first attribute behind `struct rtmsg`.
            if kind == NEW_ROUTE && message.get(21) == Some(&RouteProtocol::OURS.0) {
                let attributes = message.get(28..).unwrap_or_default();
                let at = attributes.windows(4).position(|part| part == [8, 0, 1, 0]);
                if let Some(dst) = at.and_then(|at| attributes.get(at + 4..at + 8)) {
                    seen.extend(<[u8; 4]>::try_from(dst));
                }
            }
            seen.len() == count
        })
    }

    /// Forgets what was told so far.
    fn forget(&mut self) {
        self.listen(Duration::from_millis(1), |_, _| false);
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(value.len() + 4).expect("it is short");
    [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
}

/// One node with a store full of peers.
struct Bed {
    runtime: Runtime,
    _lab: Lab,
    host: Host,
    manager: MemoryManager,
    hand: NetlinkKernel,
    ear: Ear,
    overlay: Option<Overlay>,
}

impl Bed {
    fn new(name: &str, peers: u32) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let lab = Lab::new(name).unwrap_or_else(|error| panic!("{error}"));
        let underlay = lab.underlay(1).expect("an underlay");
        let host = underlay.nodes[0].clone();
        let manager = MemoryManager::new(config(CONFIG));
        let own = "10.255.255.0/24".parse().expect("a subnet");
        manager
            .reserve(&node(), DualStack::v4(own))
            .expect("it is free");
        for n in 0..peers {
            manager.put_raw(GOOD.lease(n)).expect("sound");
        }
        // The kernel itself takes long to set a device with very many nexthop objects down.
        let hand = NetlinkOptions::new()
            .deadline(Duration::from_secs(120))
            .open_in(host.ns.path())
            .expect("a kernel");
        let ear = Ear::new(&host.ns);
        Self {
            runtime,
            _lab: lab,
            host,
            manager,
            hand,
            ear,
            overlay: None,
        }
    }

    /// Starts the overlay; answers the time until the kernel has the routes of all peers.
    fn start(&mut self, peers: u32) -> Duration {
        let start = Instant::now();
        let overlay = self.runtime.block_on(
            Overlay::builder(node())
                .manager(self.manager.clone())
                .backend(VxlanBackend::new())
                .kernel(NetlinkKernel::in_namespace(self.host.ns.path()).expect("a kernel"))
                .start(),
        );
        let overlay = overlay.expect("all parts");
        let all = self
            .ear
            .hears_routes(peers as usize, Duration::from_secs(300));
        let time = start.elapsed();
        assert!(all, "not all peers were programmed");
        self.runtime.block_on(overlay.ready()).expect("ready");
        self.overlay = Some(overlay);
        self.converged();
        time
    }

    fn converged(&mut self) {
        let overlay = self.overlay.as_ref().expect("it runs");
        self.runtime.block_on(overlay.converged()).expect("running");
        self.ear.forget();
    }

    fn ours(&self) -> Objects {
        let name = OverlayName::default();
        self.runtime
            .block_on(ours(&self.hand, &name, RouteProtocol::OURS))
    }

    fn apply(&self, op: Op) {
        for result in self.runtime.block_on(self.hand.apply(&[op])) {
            result.expect("the kernel takes it");
        }
    }

    /// Times from writing a new peer's record to its route in the kernel.
    fn events(&mut self, first: u32) -> Times {
        let mut times = Vec::new();
        for n in first..first + EVENTS {
            // At any phase of what follows the event before.
            std::thread::sleep(Duration::from_millis(u64::from(n * 37 % 50)));
            let lease = GOOD.lease(n);
            let start = Instant::now();
            self.manager.put_raw(lease).expect("sound");
            let route = self.route_of(n);
            assert!(self.ear.hears(&route), "the route of peer {n} did not come");
            times.push(start.elapsed());
        }
        Times::new(times)
    }

    /// A route to listen for; only its destination counts.
    fn route_of(&self, n: u32) -> Object {
        Object::Route(flannel_core::Route {
            table: flannel_core::MAIN_TABLE,
            dst: GOOD.subnet(n),
            metric: flannel_core::Route::default_metric(Family::V4),
            target: flannel_core::RouteTarget::Blackhole,
            protocol: RouteProtocol::OURS,
        })
    }
}

fn node() -> NodeId {
    NodeId::new("node-1").expect("a node id")
}

struct Times(Vec<Duration>);

impl Times {
    fn new(mut times: Vec<Duration>) -> Self {
        times.sort();
        Self(times)
    }

    fn quantile(&self, percent: usize) -> Duration {
        let last = self.0.len().saturating_sub(1);
        self.0[(self.0.len() * percent / 100).min(last)]
    }
}

/// The table.
#[derive(Default)]
struct Table {
    missed: usize,
}

impl Table {
    fn line(&mut self, what: &str, measured: &str, goal: &str, reached: bool) {
        let verdict = if reached { "" } else { "MISSED" };
        println!("{what:<52} {measured:<34} {goal:<14} {verdict}");
        self.missed += usize::from(!reached);
    }

    fn times(&mut self, what: &str, times: &Times, goal: Duration) {
        let p99 = times.quantile(99);
        let (p50, n) = (times.quantile(50), times.0.len());
        let measured = format!("p50 {}, p99 {}, {n} times", ms(p50), ms(p99));
        let goal_text = format!("p99 <= {}", ms(goal));
        self.line(what, &measured, &goal_text, p99 <= goal);
    }
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

fn progress(what: &str) {
    eprintln!("... {what}");
}

fn events(table: &mut Table) {
    progress("events");
    let mut bed = Bed::new("events", PEERS);
    bed.start(PEERS);
    let good = bed.events(PEERS);
    let what = format!("lease event to kernel, {PEERS} peers");
    table.times(&what, &good, EVENT_P99);

    progress("events among bad peers");
    // A peer's gateway that is an address of this very host: the kernel refuses the nexthop.
    let mut bed = Bed::new("bad-events", PEERS);
    bed.start(PEERS);
    let ns = &bed.host.ns;
    ns.add_bridge("docker0", 1500).expect("a free name");
    for n in 0..100 {
        let ip = BAD.subnet(n).address();
        ns.add_address("docker0", ip, 32).expect("a free address");
    }
    for n in 0..100 {
        let mut lease = BAD.lease(n);
        let data = format!(r#"{{"VNI":1,"VtepMAC":"0e:88:00:00:00:{n:02x}"}}"#);
        let data = flannel_core::BackendData::from_json(&data).expect("JSON");
        lease.attrs.backend_data = DualStack::v4(data);
        lease.node = NodeId::new(format!("bad-{n}")).expect("a node id");
        bed.manager.put_raw(lease).expect("sound");
    }
    let overlay = bed.overlay.as_ref().expect("it runs");
    let refused = overlay.wait_for(|status| status.failing.len() >= 100);
    bed.runtime.block_on(refused).expect("running");
    let bad = bed.events(PEERS);
    table.times("the same, 100 bad peers among them", &bad, EVENT_P99);
    let failing = bed.overlay.as_ref().expect("it runs").status();
    assert!(
        failing.failing.len() >= 100,
        "the bad peers are not refused"
    );
    let ratio = bad.quantile(99).as_secs_f64() / good.quantile(99).as_secs_f64();
    table.line(
        "p99 with bad peers to p99 without",
        &format!("{ratio:.2}"),
        &format!("<= {BAD_PEERS}"),
        ratio <= BAD_PEERS,
    );
}

fn repair(table: &mut Table) {
    let mut bed = Bed::new("repair", PEERS);
    bed.start(PEERS);
    let right = bed.ours();
    for kind in ["route", "neighbour", "fdb"] {
        progress(&format!("repair of a {kind}"));
        let objects = right.values().filter(|object| object.key().kind() == kind);
        let mut times = Vec::new();
        for (i, object) in objects.step_by(7).take(REPAIRS).enumerate() {
            std::thread::sleep(Duration::from_millis((i * 37 % 50) as u64 + 20));
            bed.ear.forget();
            let start = Instant::now();
            bed.apply(Op::Delete(object.clone()));
            assert!(bed.ear.hears(object), "{object} did not come back");
            times.push(start.elapsed());
        }
        let what = format!("a {kind} deleted until it is back, {PEERS} peers");
        table.times(&what, &Times::new(times), REPAIR_P99);
    }
    bed.converged();
    assert_eq!(bed.ours(), right);
}

/// The overlay's device.
fn device(bed: &Bed) -> Object {
    let objects = bed.ours();
    let link = objects.get(&ObjectKey::Link(dev("flannel.1")));
    link.expect("the device is there").clone()
}

fn rebuild(table: &mut Table) {
    progress("rebuild of a device");
    let mut bed = Bed::new("rebuild", PEERS);
    bed.start(PEERS);
    let right = bed.ours();
    let mut times = Vec::new();
    for _ in 0..10 {
        let link = device(&bed);
        bed.converged();
        let start = Instant::now();
        bed.apply(Op::Delete(link));
        let all = bed
            .ear
            .hears_routes(PEERS as usize, Duration::from_secs(30));
        times.push(start.elapsed());
        assert!(all, "not all routes came back");
        bed.converged();
        assert_eq!(bed.ours(), right);
    }
    let times = Times::new(times);
    let slowest = times.quantile(100);
    let measured = format!("median {}, slowest {}", ms(times.quantile(50)), ms(slowest));
    let goal = format!("<= {}", ms(REBUILD));
    let what = format!("a deleted device until all is back, {PEERS} peers");
    table.line(&what, &measured, &goal, slowest <= REBUILD);
}

fn scale(table: &mut Table) {
    let mut per_peer = Vec::new();
    for peers in [5_000_u32, 50_000] {
        progress(&format!("{peers} peers"));
        let mut bed = Bed::new("scale", peers);
        let first = bed.start(peers);
        progress(&format!("{peers} peers, flap"));
        let Object::Link(mut link) = device(&bed) else {
            panic!("a link");
        };
        link.up = false;
        bed.converged();
        let start = Instant::now();
        bed.apply(Op::Change(Object::Link(link)));
        let down = start.elapsed();
        let all = bed
            .ear
            .hears_routes(peers as usize, Duration::from_secs(300));
        let flap = start.elapsed() - down;
        assert!(all, "not all routes came back");
        bed.converged();
        let objects = bed.ours();
        for n in 0..peers {
            assert!(objects.contains_key(&route_key(GOOD.subnet(n))), "peer {n}");
        }
        for (what, time) in [
            ("first sync", first),
            ("link set down (the kernel alone)", down),
            ("from then until all is back", flap),
        ] {
            let each = time.as_secs_f64() * 1e6 / f64::from(peers);
            let measured = format!("{}, {each:.1} us a peer", ms(time));
            table.line(&format!("{what}, {peers} peers"), &measured, "", true);
        }
        per_peer.push([first, flap].map(|time| time.as_secs_f64() / f64::from(peers)));
    }
    for (i, what) in ["first sync", "back after a flap"].into_iter().enumerate() {
        let ratio = per_peer[1][i] / per_peer[0][i];
        table.line(
            &format!("{what}: a peer of 50,000 to one of 5,000"),
            &format!("{ratio:.2}"),
            &format!("<= {GROWTH}"),
            ratio <= GROWTH,
        );
    }
}

fn main() -> ExitCode {
    let wanted: Vec<String> = env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let mut table = Table::default();
    for (name, part) in [
        ("events", events as fn(&mut Table)),
        ("repair", repair),
        ("rebuild", rebuild),
        ("scale", scale),
    ] {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            part(&mut table);
        }
    }
    if table.missed == 0 {
        ExitCode::SUCCESS
    } else {
        eprintln!("{} goals are missed", table.missed);
        ExitCode::FAILURE
    }
}
