//! What one lease event costs in processor time, by the number of peers there are.
//!
//! Counted are all threads of this process but the one that measures; of the store, which is in memory,
//! that leaves what the overlay hears of it. The yardstick is the identical messages, sent raw and
//! acknowledged one by one, in the same namespace and at the same pace: what runs once in a while finds
//! nothing of its own in the processor's caches. In one go they cost a fraction, which is told, too. The
//! timer's whole readings are left out: they take half a percent of a processor, however many events there
//! are.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd;
use std::thread::sleep;
use std::time::Duration;

use flannel_core::{IfName, Object, Op};
use flannel_e2e::route_key;
use flannel_netlink::codec::{Batch, encode};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::bed::Bed;
use crate::{GOOD, Table, progress};

/// The numbers of peers.
const SIZES: [u32; 5] = [10, 100, 1_000, 5_000, 20_000];
/// New peers in a round, each of which goes again.
const EVENTS: u32 = 50;
/// Rounds of which the best is taken: a machine that is shared is slow at times.
const ROUNDS: usize = 4;
/// The wait between two events: none has to do with the one before.
const PAUSE: Duration = Duration::from_millis(60);
/// The most that an event among many peers may cost, as a multiple of one among few.
const FLAT: f64 = 1.2;
/// The most that an event may cost, as a multiple of its messages.
const OVERHEAD: f64 = 10.0;

pub(crate) fn measure(table: &mut Table) {
    let mut costs = Vec::new();
    for peers in SIZES {
        progress(&format!("cost of an event, {peers} peers"));
        let (event, raw, at_once) = of(peers);
        let ratio = event / raw;
        table.line(
            &format!("processor time of a lease event, {peers} peers"),
            &format!("{event:.0} us, {ratio:.1} times its messages ({raw:.0} us; {at_once:.0})"),
            &format!("<= {OVERHEAD} times"),
            ratio <= OVERHEAD,
        );
        costs.push(event);
    }
    let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let most = costs.iter().copied().fold(0.0, f64::max);
    table.line(
        &format!("the dearest of these to the cheapest, {SIZES:?} peers"),
        &format!("{:.2}", most / least),
        &format!("<= {FLAT}"),
        most / least <= FLAT,
    );
}

/// The processor time of an event, of its messages alone, and of these without a pause, in
/// microseconds.
fn of(peers: u32) -> (f64, f64, f64) {
    let mut bed = Bed::new("cost", peers);
    bed.start_with(peers, Some(Duration::from_secs(3600)));
    bed.converged();
    sleep(Duration::from_secs(1));
    let new = peers..peers + EVENTS;
    let keys: Vec<_> = new.clone().map(|n| route_key(GOOD.subnet(n))).collect();
    let mut objects = Vec::new();
    let events = best(|| {
        let others = Others::new();
        for n in new.clone() {
            bed.manager.put_raw(GOOD.lease(n)).expect("sound");
            sleep(PAUSE);
        }
        let made = others.spent();
        let there = bed.ours();
        for key in &keys {
            assert!(there.contains_key(key), "{key} was not made");
        }
        objects = there.into_values().collect();
        let others = Others::new();
        for n in new.clone() {
            assert!(bed.manager.remove(&GOOD.lease(n).key), "peer {n} is there");
            sleep(PAUSE);
        }
        made + others.spent()
    });
    let left = bed.ours();
    for key in &keys {
        assert!(!left.contains_key(key), "{key} is still there");
    }
    // It would take away again what nobody wants.
    let overlay = bed.overlay.take().expect("it runs");
    bed.runtime.block_on(overlay.stop()).expect("it runs");
    let mut raw = Raw::new(&bed, &objects, new);
    let paced = best(|| raw.send(PAUSE)).saturating_sub(best(Raw::pauses));
    let at_once = best(|| raw.send(Duration::ZERO));
    [events, paced, at_once]
        .map(|time| time.as_secs_f64() * 1e6 / f64::from(2 * EVENTS))
        .into()
}

fn best(mut measure: impl FnMut() -> Duration) -> Duration {
    let rounds = (0..ROUNDS).map(|_| measure());
    rounds.min().unwrap_or_default()
}

/// The objects of peers as raw messages: for each event what it makes or removes.
struct Raw {
    socket: Socket,
    events: Vec<Vec<Batch>>,
}

impl Raw {
    fn new(bed: &Bed, objects: &[Object], peers: std::ops::Range<u32>) -> Self {
        let dev = flannel_e2e::dev("flannel.1");
        let names = BTreeMap::from([(dev, bed.index(dev))]);
        let mut events = Vec::new();
        for n in peers {
            let mac = GOOD.mac(n);
            let subnet = GOOD.subnet(n);
            let is_its = |object: &&Object| match object {
                Object::Fdb(fdb) => fdb.mac == mac,
                Object::Neighbour(neighbour) => neighbour.mac == mac,
                Object::Nexthop(nexthop) => nexthop.gateway == subnet.address(),
                Object::Route(route) => route.dst == subnet,
                _ => false,
            };
            let its: Vec<_> = objects.iter().filter(is_its).cloned().collect();
            assert_eq!(its.len(), 4, "peer {n}");
            let creates = its.iter().cloned().map(Op::Create);
            events.push(creates.map(|op| message(&op, &names)).collect());
            let deletes = its.iter().rev().cloned().map(Op::Delete);
            events.push(deletes.map(|op| message(&op, &names)).collect());
        }
        let socket = bed.host.ns.run(|| {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            std::io::Result::Ok(socket)
        });
        let socket = socket.expect("it can be entered").expect("a socket");
        Self { socket, events }
    }

    /// The processor time of pauses without messages.
    fn pauses() -> Duration {
        let start = own();
        for _ in 0..2 * EVENTS {
            sleep(PAUSE);
        }
        own() - start
    }

    /// Sends all, each acknowledged before the next, with a pause after each event; answers the
    /// processor time.
    fn send(&mut self, pause: Duration) -> Duration {
        let mut buffer = vec![0; 64 * 1024];
        sleep(PAUSE);
        let start = own();
        for (seq, batch) in (1..).zip(self.events.iter_mut().flatten()) {
            let fd = self.socket.as_raw_fd();
            batch.number(seq);
            send(fd, batch.bytes(), MsgFlags::empty()).expect("sent");
            let len = recv(fd, &mut buffer, MsgFlags::empty()).expect("an answer");
            let is_ack = len >= 20 && buffer.get(16..20) == Some(&[0; 4]);
            assert!(is_ack, "the kernel refused a raw message");
            if seq % 4 == 0 && !pause.is_zero() {
                sleep(pause);
            }
        }
        // What a thread spent is counted when it leaves the processor.
        sleep(PAUSE);
        own() - start
    }
}

fn message(op: &Op, names: &BTreeMap<IfName, u32>) -> Batch {
    let mut batch = Batch::default();
    encode(op, None, |dev| Ok(names[&dev]), &mut batch).expect("a message");
    batch.acknowledge(true);
    batch
}

/// The processor time of this process's other threads.
struct Others(Duration);

impl Others {
    fn new() -> Self {
        Self(Self::all())
    }

    fn spent(&self) -> Duration {
        Self::all() - self.0
    }

    fn all() -> Duration {
        let own = fs::read_link("/proc/thread-self").expect("it is there");
        let own = own.file_name().expect("a number").to_owned();
        let tasks = fs::read_dir("/proc/self/task").expect("it is there");
        let others = tasks.flatten().filter(|task| task.file_name() != own);
        others
            .map(|task| on_processor(&task.path().join("schedstat")))
            .sum()
    }
}

/// The processor time of this thread.
fn own() -> Duration {
    on_processor("/proc/thread-self/schedstat".as_ref())
}

fn on_processor(path: &std::path::Path) -> Duration {
    // A thread that has ended since spends nothing any more.
    let text = fs::read_to_string(path).unwrap_or_default();
    let nanos = text
        .split_whitespace()
        .next()
        .and_then(|first| first.parse().ok());
    Duration::from_nanos(nanos.unwrap_or_default())
}
