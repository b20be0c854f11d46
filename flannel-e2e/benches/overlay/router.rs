//! A node that is a router: 200,000 routes of others, and a routing daemon that changes them.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use flannel_core::{Kernel, MAIN_TABLE, Object, Op, Route, RouteProtocol, RouteTarget, Subnet};
use flannel_e2e::dev;
use flannel_netlink::NetlinkOptions;

use crate::bed::Bed;
use crate::{Table, Times, ms, progress};

/// The routes of others.
const FOREIGN: u32 = 200_000;
/// Our peers.
const PEERS: u32 = 1_000;
/// How often a route of ours is deleted.
const REPAIRS: usize = 40;
/// A routing daemon changes a route this often.
const BETWEEN: Duration = Duration::from_millis(100);
/// The longest until a route of ours is back.
const GOAL: Duration = Duration::from_millis(100);

pub(crate) fn measure(table: &mut Table) {
    progress(&format!("{FOREIGN} routes of others"));
    let mut bed = Bed::new("router", PEERS);
    let foreign: Vec<_> = (0..FOREIGN).map(|n| Op::Create(route(n, 254))).collect();
    bed.apply_all(&foreign);
    bed.start(PEERS);
    repairs(table, &mut bed, "idle");
    let stop = AtomicBool::new(false);
    let namespace = bed.host.ns.path().to_owned();
    std::thread::scope(|scope| {
        scope.spawn(|| churn(&namespace, &stop));
        repairs(table, &mut bed, "ten routes a second change");
        stop.store(true, Ordering::Relaxed);
    });
    bed.converged();
}

fn repairs(table: &mut Table, bed: &mut Bed, when: &str) {
    progress(&format!("repair of a route, {when}"));
    let right = bed.ours();
    let routes = right
        .values()
        .filter(|object| object.key().kind() == "route");
    let mut times = Vec::new();
    // Long enough for some of the timer's whole readings to be met.
    for object in routes.step_by(PEERS as usize / REPAIRS).take(REPAIRS) {
        std::thread::sleep(Duration::from_millis(700));
        bed.ear.forget();
        let start = Instant::now();
        bed.apply(Op::Delete(object.clone()));
        assert!(bed.ear.hears(object), "{object} did not come back");
        times.push(start.elapsed());
    }
    let times = Times::new(times);
    let (half, slowest) = (times.quantile(50), times.quantile(100));
    table.line(
        &format!("a route deleted until it is back, {FOREIGN} of others, {when}"),
        &format!("median {}, slowest {}", ms(half), ms(slowest)),
        &format!("<= {}", ms(GOAL)),
        slowest <= GOAL,
    );
}

/// Changes ten routes a second, as a routing daemon does.
fn churn(namespace: &std::path::Path, stop: &AtomicBool) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    let kernel = NetlinkOptions::new().open_in(namespace).expect("a kernel");
    let changed = (0..FOREIGN).step_by(997);
    let gateways = [253, 254].into_iter().cycle();
    for (n, gateway) in gateways.flat_map(|gateway| changed.clone().map(move |n| (n, gateway))) {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        for result in runtime.block_on(kernel.apply(&[Op::Change(route(n, gateway))])) {
            result.expect("the kernel takes it");
        }
        std::thread::sleep(BETWEEN);
    }
}

/// A route of somebody else, outside of the overlay's network.
fn route(n: u32, gateway: u8) -> Object {
    let dst = IpAddr::V4(Ipv4Addr::from((20 << 24) + (n << 8)));
    Object::Route(Route {
        table: MAIN_TABLE,
        dst: Subnet::new(dst, 24).expect("24 bits"),
        metric: 0,
        target: RouteTarget::Gateway {
            gateway: [192, 0, 2, gateway].into(),
            dev: dev("eth0"),
            onlink: true,
        },
        protocol: RouteProtocol(186),
        source: None,
    })
}
