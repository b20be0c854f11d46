//! Programming peers: what [`NetlinkKernel`] takes beyond the kernel's own time.
//!
//! `cargo bench -p flannel-netlink` (root; it works in a namespace of its own). Each peer of VXLAN is a
//! forwarding entry, a neighbour, a nexthop object and a route; of host-gw, the last two. The yardstick is the identical
//! messages, built beforehand and sent raw in batches of 256, each acknowledged. Both are measured
//! in turns in one run, and the best of each is taken, so that only ratios are told. Fails if a ratio is above its
//! limit.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a program that prints a table"
)]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use flannel_core::{
    Address, Fdb, IfName, Kernel, Link, LinkKind, MAIN_TABLE, MacAddr, Neighbour, Nexthop, Object,
    Op, Route, RouteProtocol, RouteTarget, Scope, Subnet, Vxlan,
};
use flannel_netlink::NetlinkKernel;
use flannel_netlink::codec::{Batch, encode};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};

/// The yardstick's messages in a datagram.
const BATCH: usize = 256;
/// Measurements of which the best is taken.
const ROUNDS: usize = 7;
/// The most that we may take, as a multiple of the raw messages.
const OVERHEAD_LIMIT: f64 = 1.3;
/// The most that a peer of many may take, as a multiple of a peer of few.
const GROWTH_LIMIT: f64 = 1.5;

fn dev() -> IfName {
    IfName::new("flannel.1").expect("a device name")
}

/// The objects of a number of peers in the order of making.
fn objects(peers: u32) -> Vec<Object> {
    let ip = |n: u32| IpAddr::V4(Ipv4Addr::from(n));
    let gateway = |n: u32| ip((10 << 24) + ((n + 1) << 8));
    let mac = |n: u32| MacAddr::local((0x0e11_0000_0000 + u64::from(n)) << 16);
    let each = |make: fn(u32, IpAddr, MacAddr) -> Object| {
        (0..peers).map(move |n| make(n, gateway(n), mac(n)))
    };
    let fdb = each(|n, _, mac| {
        Object::Fdb(Fdb {
            dev: dev(),
            mac,
            remote: IpAddr::V4(Ipv4Addr::from((172 << 24) + (16 << 16) + n)),
        })
    });
    let neighbours = each(|_, ip, mac| {
        Object::Neighbour(Neighbour {
            dev: dev(),
            ip,
            mac,
        })
    });
    let nexthops = each(|n, gateway, _| {
        Object::Nexthop(Nexthop {
            id: n + 1,
            gateway,
            dev: dev(),
            onlink: true,
            protocol: RouteProtocol::OURS,
        })
    });
    let routes = each(|n, gateway, _| {
        Object::Route(Route {
            table: MAIN_TABLE,
            dst: Subnet::new(gateway, 24).expect("24 bits are not too many"),
            metric: 0,
            target: RouteTarget::Nexthop(n + 1),
            protocol: RouteProtocol::OURS,
            source: None,
        })
    });
    fdb.chain(neighbours)
        .chain(nexthops)
        .chain(routes)
        .collect()
}

/// The device of the link that host-gw's peers are on.
fn link() -> IfName {
    IfName::new("br0").expect("a device name")
}

/// The objects of a number of host-gw's peers in the order of making.
fn host_gw(peers: u32) -> Vec<Object> {
    const FIRST: u32 = 0x4000_0000;
    let gateway = |n: u32| IpAddr::V4(Ipv4Addr::from((172 << 24) + (16 << 16) + n + 1));
    let nexthops = (0..peers).map(|n| {
        Object::Nexthop(Nexthop {
            id: FIRST + n,
            gateway: gateway(n),
            dev: link(),
            onlink: false,
            protocol: RouteProtocol::OURS,
        })
    });
    let routes = (0..peers).map(|n| {
        let dst = Ipv4Addr::from((11 << 24) + ((n + 1) << 8));
        Object::Route(Route {
            table: MAIN_TABLE,
            dst: Subnet::new(dst, 24).expect("24 bits are not too many"),
            metric: 0,
            target: RouteTarget::Nexthop(FIRST + n),
            protocol: RouteProtocol::OURS,
            source: None,
        })
    });
    nexthops.chain(routes).collect()
}

/// The raw messages of ops, ready to be sent.
fn batches(ops: &[Op], indexes: &BTreeMap<IfName, u32>) -> Vec<Batch> {
    ops.chunks(BATCH)
        .map(|ops| {
            let mut batch = Batch::default();
            for op in ops {
                encode(op, None, |dev| Ok(indexes[&dev]), &mut batch).expect("a message");
            }
            batch.acknowledge(true);
            batch
        })
        .collect()
}

/// Sends batches and waits for each acknowledgement.
fn send_raw(socket: &Socket, batches: &mut [Batch], seq: &mut u32) -> Duration {
    let mut buffer = vec![0; 64 * 1024];
    let start = Instant::now();
    for batch in batches {
        batch.number(*seq);
        *seq = seq.wrapping_add(1000);
        send(socket.as_raw_fd(), batch.bytes(), MsgFlags::empty()).expect("sent");
        let mut left = batch.len();
        while left > 0 {
            let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).expect("an answer");
            let mut at = 0;
            while at + 20 <= len {
                let size = u32::from_ne_bytes(buffer[at..at + 4].try_into().expect("four bytes"));
                let code = i32::from_ne_bytes(buffer[at + 16..at + 20].try_into().expect("four"));
                assert_eq!(code, 0, "the kernel refused a raw message");
                left -= 1;
                at += (usize::try_from(size).expect("small") + 3) & !3;
            }
        }
    }
    start.elapsed()
}

struct Lab {
    kernel: NetlinkKernel,
    runtime: tokio::runtime::Runtime,
    socket: Socket,
    indexes: BTreeMap<IfName, u32>,
    seq: u32,
}

impl Lab {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        let kernel = NetlinkKernel::new().expect("a kernel");
        let link = Object::Link(Link {
            name: dev(),
            kind: LinkKind::Vxlan(Vxlan {
                vni: 1,
                port: 8472,
                underlay: None,
                local: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
                learning: false,
                gbp: false,
            }),
            mtu: None,
            mac: None,
            up: true,
            alias: None,
        });
        // In a namespace that never had an IPv4 address the kernel takes no IPv4 gateway.
        let address = Object::Address(Address {
            dev: dev(),
            ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)),
            prefix_len: 32,
        });
        let bridge = Object::Link(Link {
            name: self::link(),
            kind: LinkKind::Bridge,
            mtu: None,
            mac: None,
            up: true,
            alias: None,
        });
        let on_link = Object::Address(Address {
            dev: self::link(),
            ip: IpAddr::V4(Ipv4Addr::new(172, 31, 255, 254)),
            prefix_len: 12,
        });
        let ops = [link, bridge, address, on_link].map(Op::Create);
        let results = runtime.block_on(kernel.apply(&ops));
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        let observed = runtime
            .block_on(kernel.observe(&Scope::default()))
            .expect("the state");
        let links = observed.links.iter();
        let indexes = links.map(|link| (link.name, link.index)).collect();
        let mut socket = Socket::new(NETLINK_ROUTE).expect("a socket");
        setsockopt(&socket, sockopt::RcvBufForce, &(4 * 1024 * 1024)).expect("root");
        socket.bind_auto().expect("bound");
        socket.connect(&SocketAddr::new(0, 0)).expect("connected");
        socket.set_ext_ack(true).expect("an option");
        socket.set_cap_ack(true).expect("an option");
        Self {
            kernel,
            runtime,
            socket,
            indexes,
            seq: 1,
        }
    }

    fn raw(&mut self, ops: &[Op]) -> Duration {
        let mut batches = batches(ops, &self.indexes);
        send_raw(&self.socket, &mut batches, &mut self.seq)
    }

    fn ours(&self, ops: &[Op]) -> Duration {
        let start = Instant::now();
        let results = self.runtime.block_on(self.kernel.apply(ops));
        let elapsed = start.elapsed();
        assert_eq!(results.len(), ops.len());
        if let Some(error) = results.into_iter().find_map(Result::err) {
            panic!("{error}");
        }
        elapsed
    }

    fn observe(&self) -> (Duration, usize) {
        let scope = Scope {
            devices: [dev()].into(),
            ..Scope::default()
        };
        let start = Instant::now();
        let observed = self.runtime.block_on(self.kernel.observe(&scope));
        (start.elapsed(), observed.expect("the state").objects.len())
    }
}

/// The least of several measurements: what others do on the machine can only add to it.
fn best(times: Vec<Duration>) -> Duration {
    times.into_iter().min().unwrap_or_default()
}

fn ratio(a: Duration, b: Duration) -> f64 {
    a.as_secs_f64() / b.as_secs_f64()
}

fn micros_per(time: Duration, count: u32) -> f64 {
    time.as_secs_f64() * 1e6 / f64::from(count)
}

/// A line of the table; answers whether it is within its limit.
fn line(what: &str, value: f64, limit: f64) -> bool {
    let good = value <= limit;
    let verdict = if good { "ok" } else { "TOO MUCH" };
    println!("{what:<58} {value:>7.2} {limit:>7.2}  {verdict}");
    good
}

fn run() -> bool {
    let mut lab = Lab::new();
    let creates = |peers| -> Vec<Op> { objects(peers).into_iter().map(Op::Create).collect() };
    let deletes = |peers| -> Vec<Op> { objects(peers).into_iter().rev().map(Op::Delete).collect() };

    let (ops, undo) = (creates(10_000), deletes(10_000));
    let (mut raw, mut ours, mut raw_undo, mut ours_undo) = (vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        raw.push(lab.raw(&ops));
        ours_undo.push(lab.ours(&undo));
        ours.push(lab.ours(&ops));
        raw_undo.push(lab.raw(&undo));
    }
    let (raw, ours) = (best(raw), best(ours));
    let (raw_undo, ours_undo) = (best(raw_undo), best(ours_undo));

    let gw_ops: Vec<Op> = host_gw(10_000).into_iter().map(Op::Create).collect();
    let gw_undo: Vec<Op> = host_gw(10_000).into_iter().rev().map(Op::Delete).collect();
    let (mut gw_raw, mut gw_ours) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        gw_raw.push(lab.raw(&gw_ops));
        lab.ours(&gw_undo);
        gw_ours.push(lab.ours(&gw_ops));
        lab.raw(&gw_undo);
    }
    let (gw_raw, gw_ours) = (best(gw_raw), best(gw_ours));

    let mut grown = Vec::new();
    for peers in [5_000, 50_000] {
        let (ops, undo) = (creates(peers), deletes(peers));
        let mut made = Vec::new();
        let mut seen = Vec::new();
        for _ in 0..3 {
            made.push(lab.ours(&ops));
            let (time, count) = lab.observe();
            assert!(count >= ops.len(), "{count} of {} objects seen", ops.len());
            seen.push(time);
            lab.raw(&undo);
        }
        grown.push((micros_per(best(made), peers), micros_per(best(seen), peers)));
    }

    println!("10,000 peers (40,000 objects): raw {raw:.1?}, ours {ours:.1?}");
    println!("removing them:                 raw {raw_undo:.1?}, ours {ours_undo:.1?}");
    println!("host-gw, 10,000 peers (20,000): raw {gw_raw:.1?}, ours {gw_ours:.1?}");
    for (peers, (made, seen)) in ["5,000", "50,000"].iter().zip(&grown) {
        println!("{peers} peers: {made:.1} us a peer to make, {seen:.1} us a peer to observe");
    }
    println!();
    println!("{:<58} {:>7} {:>7}", "ratio", "is", "limit");
    let mut good = line(
        "programming 10,000 peers, to raw",
        ratio(ours, raw),
        OVERHEAD_LIMIT,
    );
    good &= line(
        "programming 10,000 peers of host-gw, to raw",
        ratio(gw_ours, gw_raw),
        OVERHEAD_LIMIT,
    );
    if let [(few, few_seen), (many, many_seen)] = grown[..] {
        good &= line(
            "a peer of 50,000, to one of 5,000",
            many / few,
            GROWTH_LIMIT,
        );
        // Not held against a limit: the answer is sorted, and too large for the caches.
        println!(
            "{:<58} {:>7.2}",
            "observing a peer of 50,000, to one of 5,000",
            many_seen / few_seen
        );
    }
    good
}

fn main() -> ExitCode {
    // `cargo test --benches` runs it too, and wants no measurement.
    if !std::env::args().any(|arg| arg == "--bench") {
        return ExitCode::SUCCESS;
    }
    let thread = std::thread::spawn(|| match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => run(),
        Err(errno) => {
            eprintln!("SKIPPED: no network namespace can be made: {errno}");
            true
        }
    });
    match thread.join() {
        Ok(true) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
