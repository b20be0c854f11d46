//! Host-gw: with nexthop objects or without, by how the time grows with the number of peers.

use std::time::{Duration, Instant};

use flannel_backend_hostgw::HostGwBackend;
use flannel_core::{Object, Op};
use flannel_e2e::route_key;

use crate::bed::Bed;
use crate::{GOOD, GROWTH, Table, ms, progress};

/// Peers of which one form is measured with few and with many.
const FEW: u32 = 2_500;
const MANY: u32 = 10_000;
const MOST: u32 = 50_000;

/// What a number of peers takes.
struct Taken {
    first: Duration,
    down: Duration,
    back: Duration,
}

impl Taken {
    /// The time of each phase that is ours, for one peer, in microseconds.
    fn each(&self, peers: u32) -> [f64; 2] {
        [self.first, self.back].map(|time| time.as_secs_f64() * 1e6 / f64::from(peers))
    }
}

pub(crate) fn measure(table: &mut Table) {
    let nexthops = HostGwBackend::new();
    let gateways = HostGwBackend::new().with_nexthops(false);
    for (form, backend, most) in [("nexthops", nexthops, MOST), ("gateways", gateways, MANY)] {
        let mut each = Vec::new();
        for peers in [FEW, MANY, MOST].into_iter().filter(|peers| *peers <= most) {
            progress(&format!("host-gw by {form}, {peers} peers"));
            let taken = flap(peers, backend.clone());
            for (what, time) in [
                ("first sync", taken.first),
                ("eth0 set down (the kernel alone)", taken.down),
                ("eth0 up until all is back", taken.back),
            ] {
                let micros = time.as_secs_f64() * 1e6 / f64::from(peers);
                let measured = format!("{}, {micros:.1} us a peer", ms(time));
                let what = format!("host-gw by {form}: {what}, {peers} peers");
                table.line(&what, &measured, "", true);
            }
            each.push((peers, taken.each(peers)));
        }
        for (i, what) in ["first sync", "back after a flap"].into_iter().enumerate() {
            let (few, many) = (&each[each.len() - 2], &each[each.len() - 1]);
            let ratio = many.1[i] / few.1[i];
            // The form that is not used is shown for comparison.
            let is_ours = form == "nexthops";
            let goal = if is_ours {
                format!("<= {GROWTH}")
            } else {
                String::new()
            };
            table.line(
                &format!(
                    "host-gw by {form}, {what}: a peer of {} to one of {}",
                    many.0, few.0
                ),
                &format!("{ratio:.2}"),
                &goal,
                !is_ours || ratio <= GROWTH,
            );
        }
    }
}

/// Starts a node among so many peers; then its interface goes down and comes up again.
fn flap(peers: u32, backend: HostGwBackend) -> Taken {
    let mut bed = Bed::host_gw("host-gw", peers, backend);
    let first = bed.start(peers);
    let mut link = bed.link("eth0");
    link.up = false;
    let start = Instant::now();
    bed.apply(Op::Change(Object::Link(link.clone())));
    let down = start.elapsed();
    bed.ear.forget();
    let start = Instant::now();
    // Set down, it keeps its IPv4 addresses and loses the default route, by which it was chosen.
    link.up = true;
    bed.apply(Op::Change(Object::Link(link)));
    let everything = "0.0.0.0/0".parse().expect("a subnet");
    let gateway = [192, 0, 2, 254].into();
    let added = bed.host.ns.add_route(everything, gateway, "eth0");
    added.expect("a route");
    let all = bed
        .ear
        .hears_routes(peers as usize, Duration::from_secs(300));
    let back = start.elapsed();
    assert!(all, "not all routes came back");
    bed.converged();
    let objects = bed.ours();
    for n in 0..peers {
        assert!(objects.contains_key(&route_key(GOOD.subnet(n))), "peer {n}");
    }
    Taken { first, down, back }
}
