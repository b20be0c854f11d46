//! [`Prober`]: numbered packets in both directions at a steady rate.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::panic::resume_unwind;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt::RcvBufForce, sockopt::SndBufForce};
use socket2::{Domain, Socket, Type};

use crate::netns::{Error, Ns, Result};

/// What a [`Prober`] sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Packets per second in each direction, at least 1.
    pub rate: u32,
    /// Packets in each direction, at most [`Options::MAX_PACKETS`].
    pub packets: u32,
    /// How long packets that are late are waited for after the last one was sent.
    pub linger: Duration,
}

impl Options {
    /// The most packets in one direction.
    pub const MAX_PACKETS: u32 = 10_000_000;

    /// The time it takes to send everything at the rate.
    pub fn duration(&self) -> Duration {
        Duration::from_secs_f64(f64::from(self.packets) / f64::from(self.rate.max(1)))
    }
}

impl Default for Options {
    /// 10,000 packets at 2,000 per second.
    fn default() -> Self {
        Self {
            rate: 2_000,
            packets: 10_000,
            linger: Duration::from_millis(500),
        }
    }
}

/// A stream of numbered UDP packets between two addresses, in both directions at once, that runs
/// in the background while something is done to the path.
///
/// An outage shows as packets lost, except where the kernel holds them back meanwhile, as a sender
/// does whose own device lost its carrier: that shows as a gap ([`Flow::longest_gap`]).
///
/// Ends by itself, at the latest after three times the time that sending should take.
#[derive(Debug)]
pub struct Prober {
    directions: [Direction; 2],
    stop: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Direction {
    progress: Arc<Progress>,
    sender: JoinHandle<Sent>,
    receiver: JoinHandle<Received>,
}

/// What the threads of one direction tell each other and the handle.
#[derive(Debug, Default)]
struct Progress {
    /// The number of packets tried, which is also the next number.
    tried: AtomicU32,
    received: AtomicU32,
    /// Nothing will be sent any more.
    done: AtomicBool,
}

/// What both directions came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// From the first address to the second.
    pub forth: Flow,
    /// From the second address to the first.
    pub back: Flow,
}

/// What one direction came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// The packets tried, whether or not the kernel took them.
    pub sent: u32,
    /// How many of them the sending kernel refused, such as for want of a route.
    pub refused: u32,
    /// What it said the last time.
    pub refusal: Option<String>,
    /// The different packets that arrived.
    pub received: u32,
    /// The numbers of those that did not, in order.
    pub lost: Vec<RangeInclusive<u32>>,
    /// Packets that arrived again.
    pub duplicates: u32,
    /// Packets that arrived behind one with a higher number.
    pub reordered: u32,
    /// Packets that reached the receiving socket and found it full: lost by the machine that
    /// measures, not by the path. Anything but 0 makes the measurement useless.
    pub overflowed: u64,
    /// The longest time between two arrivals, counting the start and the end of sending as ones.
    pub longest_gap: Duration,
    /// The time from the first packet sent to the last.
    pub elapsed: Duration,
}

impl Flow {
    /// How many packets did not arrive.
    pub const fn lost_count(&self) -> u32 {
        self.sent.saturating_sub(self.received)
    }

    /// Packets sent per second.
    pub fn rate(&self) -> f64 {
        f64::from(self.sent) / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

impl Report {
    /// Packets sent in both directions.
    pub const fn sent(&self) -> u32 {
        self.forth.sent + self.back.sent
    }

    /// Different packets received in both directions.
    pub const fn received(&self) -> u32 {
        self.forth.received + self.back.received
    }

    /// Packets lost in both directions.
    pub const fn lost(&self) -> u32 {
        self.forth.lost_count() + self.back.lost_count()
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} sent at {:.0}/s, {} received, {} lost",
            self.sent,
            self.rate(),
            self.received,
            self.lost_count()
        )?;
        for (i, range) in self.lost.iter().take(8).enumerate() {
            f.write_str(if i == 0 { " (numbers " } else { ", " })?;
            let (first, last) = (range.start(), range.end());
            if first == last {
                write!(f, "{first}")?;
            } else {
                write!(f, "{first}-{last}")?;
            }
        }
        match self.lost.len() {
            0 => {}
            1..=8 => f.write_str(")")?,
            more => write!(f, " and {} more ranges)", more - 8)?,
        }
        if let Some(refusal) = &self.refusal {
            write!(f, ", {} refused ({refusal})", self.refused)?;
        }
        if self.overflowed > 0 {
            write!(f, ", {} dropped by a full receive buffer", self.overflowed)?;
        }
        write!(
            f,
            ", {} duplicates, {} reordered, longest gap {:.1} ms",
            self.duplicates,
            self.reordered,
            self.longest_gap.as_secs_f64() * 1e3
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "forth: {}; back: {}", self.forth, self.back)
    }
}

impl Prober {
    /// Starts sending between an address of one namespace and an address of another.
    ///
    /// # Errors
    /// If an address is not its namespace's, the two are of different families, or threads cannot
    /// be started.
    pub fn start(a: (&Ns, IpAddr), b: (&Ns, IpAddr), options: Options) -> Result<Self> {
        let options = Options {
            rate: options.rate.max(1),
            packets: options.packets.min(Options::MAX_PACKETS),
            ..options
        };
        if a.1.is_ipv4() != b.1.is_ipv4() {
            return Err(Error::Address {
                what: "the prober".to_owned(),
                reason: format!("{} and {} are of different families", a.1, b.1),
            });
        }
        let [from_a, from_b] = [open(a)?, open(b)?];
        let stop = Arc::new(AtomicBool::new(false));
        let forth = Direction::start(&from_a, &from_b, b.0, 0, options, &stop)?;
        let back =
            Direction::start(&from_b, &from_a, a.0, 1, options, &stop).inspect_err(|_| {
                // The threads of the other direction end soon, and nobody waits for them.
                stop.store(true, Ordering::Relaxed);
            })?;
        Ok(Self {
            directions: [forth, back],
            stop,
        })
    }

    /// How many packets have arrived in the slower direction.
    pub fn received(&self) -> u32 {
        self.directions
            .iter()
            .map(|direction| direction.progress.received.load(Ordering::Relaxed))
            .min()
            .unwrap_or(0)
    }

    /// How many packets have been sent in the slower direction.
    pub fn sent(&self) -> u32 {
        self.directions
            .iter()
            .map(|direction| direction.progress.tried.load(Ordering::Relaxed))
            .min()
            .unwrap_or(0)
    }

    /// Waits until so many packets have arrived in each direction: to do something to a path that
    /// is known to carry packets. Says whether they did within `timeout`.
    #[allow(
        clippy::disallowed_methods,
        reason = "a prober measures real time between real packets"
    )]
    pub fn wait_received(&self, packets: u32, timeout: Duration) -> bool {
        let start = Instant::now();
        while self.received() < packets {
            if start.elapsed() > timeout {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Sends no more. [`finish`](Self::finish) then returns early.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Waits until everything is sent (or [`stop`](Self::stop) was called) and late packets have
    /// had their time; says what was lost.
    pub fn finish(self) -> Report {
        let [forth, back] = self.directions.map(Direction::finish);
        Report { forth, back }
    }
}

/// What the sending thread knows at its end.
#[derive(Debug)]
struct Sent {
    first_at: Instant,
    last_at: Instant,
    refused: u32,
    refusal: Option<String>,
}

/// What the receiving thread knows at its end.
#[derive(Debug)]
struct Received {
    /// By number, whether it arrived.
    seen: Vec<bool>,
    /// How many different ones did.
    count: u32,
    highest: u32,
    duplicates: u32,
    reordered: u32,
    overflowed: u64,
    first_at: Option<Instant>,
    last_at: Option<Instant>,
    longest_gap: Duration,
}

impl Received {
    fn new(packets: u32) -> Self {
        Self {
            seen: vec![false; packets as usize],
            count: 0,
            highest: 0,
            duplicates: 0,
            reordered: 0,
            overflowed: 0,
            first_at: None,
            last_at: None,
            longest_gap: Duration::ZERO,
        }
    }

    /// Takes note of a packet.
    fn arrive(&mut self, number: u32, now: Instant) {
        let Some(seen) = self.seen.get_mut(number as usize) else {
            return;
        };
        if std::mem::replace(seen, true) {
            self.duplicates += 1;
            return;
        }
        self.count += 1;
        if number < self.highest {
            self.reordered += 1;
        }
        self.highest = self.highest.max(number);
        let gap = self.last_at.map_or(Duration::ZERO, |last| now - last);
        self.longest_gap = self.longest_gap.max(gap);
        self.first_at.get_or_insert(now);
        self.last_at = Some(now);
    }
}

impl Direction {
    fn start(
        from: &UdpSocket,
        to: &UdpSocket,
        to_ns: &Ns,
        number: u8,
        options: Options,
        stop: &Arc<AtomicBool>,
    ) -> Result<Self> {
        let failed = |source| Error::System {
            what: "starting a prober".to_owned(),
            ns: to_ns.name().to_owned(),
            source,
        };
        let progress = Arc::new(Progress::default());
        let stream = Stream {
            label: label(number),
            options,
            stop: Arc::clone(stop),
            progress: Arc::clone(&progress),
        };
        let (tx, rx) = (from.try_clone(), to.try_clone());
        let (tx, rx) = (tx.map_err(failed)?, rx.map_err(failed)?);
        let to = to.local_addr().map_err(failed)?;
        let (listening, ns) = (stream.clone(), to_ns.clone());
        let receiver = thread::Builder::new()
            .name("probe-rx".to_owned())
            .spawn(move || listening.receive(&rx, &ns))
            .map_err(failed)?;
        let sender = thread::Builder::new()
            .name("probe-tx".to_owned())
            .spawn(move || stream.send(&tx, to))
            .inspect_err(|_| progress.done.store(true, Ordering::Release))
            .map_err(failed)?;
        Ok(Self {
            progress,
            sender,
            receiver,
        })
    }

    fn finish(self) -> Flow {
        let sent = self
            .sender
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic));
        let got = self
            .receiver
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic));
        let tried = self.progress.tried.load(Ordering::Acquire);
        let edge = |from: Instant, to: Instant| to.saturating_duration_since(from);
        let longest_gap = got
            .longest_gap
            .max(edge(sent.first_at, got.first_at.unwrap_or(sent.last_at)))
            .max(edge(got.last_at.unwrap_or(sent.first_at), sent.last_at));
        let lost = lost(&got.seen, tried);
        let missing: u32 = lost
            .iter()
            .map(|range| range.end() - range.start() + 1)
            .sum();
        Flow {
            sent: tried,
            refused: sent.refused,
            refusal: sent.refusal,
            received: tried - missing,
            lost,
            duplicates: got.duplicates,
            reordered: got.reordered,
            overflowed: got.overflowed,
            longest_gap,
            elapsed: edge(sent.first_at, sent.last_at),
        }
    }
}

/// One direction's packets.
#[derive(Debug, Clone)]
struct Stream {
    /// What our packets begin with: process, prober, direction.
    label: [u8; 9],
    options: Options,
    stop: Arc<AtomicBool>,
    progress: Arc<Progress>,
}

#[allow(
    clippy::disallowed_methods,
    reason = "a prober measures real time between real packets"
)]
impl Stream {
    fn send(&self, socket: &UdpSocket, to: SocketAddr) -> Sent {
        let interval = Duration::from_secs(1) / self.options.rate;
        let bound = self.options.duration() * 3 + Duration::from_secs(1);
        let first_at = Instant::now();
        let mut sent = Sent {
            first_at,
            last_at: first_at,
            refused: 0,
            refusal: None,
        };
        let mut due = first_at;
        for number in 0..self.options.packets {
            let now = Instant::now();
            if self.stop.load(Ordering::Relaxed) || now.duration_since(first_at) > bound {
                break;
            }
            if due > now {
                thread::sleep(due - now);
            } else if now - due > Duration::from_millis(20) {
                // The machine was busy elsewhere. Making up for more than this would be a burst,
                // whose loss would say nothing about the path.
                due = now;
            }
            due += interval;
            let mut packet = [0; 64];
            packet[..9].copy_from_slice(&self.label);
            packet[9..13].copy_from_slice(&number.to_be_bytes());
            sent.last_at = Instant::now();
            if let Err(error) = socket.send_to(&packet, to) {
                sent.refused += 1;
                sent.refusal = Some(error.to_string());
            }
            self.progress.tried.store(number + 1, Ordering::Release);
        }
        self.progress.done.store(true, Ordering::Release);
        sent
    }

    fn receive(&self, socket: &UdpSocket, ns: &Ns) -> Received {
        let mut got = Received::new(self.options.packets);
        let mut done_at = None;
        let mut buffer = [0; 256];
        loop {
            if self.progress.done.load(Ordering::Acquire) {
                let all = got.count == self.progress.tried.load(Ordering::Acquire);
                let since = *done_at.get_or_insert_with(Instant::now);
                if all || since.elapsed() > self.options.linger {
                    break;
                }
            }
            let len = match socket.recv_from(&mut buffer) {
                Ok((len, _)) => len,
                Err(error) => {
                    if !is_timeout(&error) {
                        // Nothing that receiving on can help; and it must not spin.
                        thread::sleep(Duration::from_millis(1));
                    }
                    continue;
                }
            };
            if let Some(number) = self.number(&buffer[..len]) {
                got.arrive(number, Instant::now());
                self.progress.received.store(got.count, Ordering::Relaxed);
            }
        }
        got.overflowed = overflowed(socket, ns).unwrap_or(0);
        got
    }

    /// The number of a packet that is ours.
    fn number(&self, packet: &[u8]) -> Option<u32> {
        let (label, rest) = packet.split_at_checked(self.label.len())?;
        let number = rest.get(..4)?.try_into().ok()?;
        (label == self.label).then(|| u32::from_be_bytes(number))
    }
}

fn label(direction: u8) -> [u8; 9] {
    static PROBERS: AtomicU32 = AtomicU32::new(0);
    let mut label = [direction; 9];
    label[..4].copy_from_slice(&process::id().to_be_bytes());
    let number = PROBERS.fetch_add(1, Ordering::Relaxed);
    label[4..8].copy_from_slice(&number.to_be_bytes());
    label
}

/// The numbers below `sent` that were not seen, as ranges.
fn lost(seen: &[bool], sent: u32) -> Vec<RangeInclusive<u32>> {
    let mut ranges: Vec<RangeInclusive<u32>> = Vec::new();
    for (number, _) in (0..sent).zip(seen).filter(|(_, seen)| !**seen) {
        match ranges.last_mut() {
            Some(range) if *range.end() + 1 == number => *range = *range.start()..=number,
            _ => ranges.push(number..=number),
        }
    }
    ranges
}

/// A socket with room for seconds of packets: a busy machine must not look like a loss, and the
/// sender must not wait for packets that the kernel holds back, which would hide one.
fn open((ns, ip): (&Ns, IpAddr)) -> Result<UdpSocket> {
    const BUFFER: usize = 16 << 20;
    ns.run(|| -> io::Result<UdpSocket> {
        let address = SocketAddr::new(ip, 0);
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
        // Without CAP_NET_ADMIN on the host the usual buffer has to do; what it drops is counted.
        let _ = setsockopt(&socket, RcvBufForce, &BUFFER);
        let _ = setsockopt(&socket, SndBufForce, &BUFFER);
        socket.set_read_timeout(Some(Duration::from_millis(10)))?;
        socket.set_write_timeout(Some(Duration::from_millis(1)))?;
        socket.bind(&address.into())?;
        Ok(socket.into())
    })?
    .map_err(|source| Error::System {
        what: format!("opening a UDP socket on {ip}"),
        ns: ns.name().to_owned(),
        source,
    })
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

/// The packets that found the socket full: the last column of `/proc/net/udp`.
fn overflowed(socket: &UdpSocket, ns: &Ns) -> Option<u64> {
    let address = socket.local_addr().ok()?;
    let file = if address.is_ipv4() { "udp" } else { "udp6" };
    let table = ns
        .run(|| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")))
        .ok()?
        .ok()?;
    let port = format!(":{:04X}", address.port());
    table
        .lines()
        .map(|line| line.split_whitespace())
        .find_map(|mut fields| {
            fields.nth(1)?.ends_with(&port).then_some(())?;
            fields.last()?.parse().ok()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_numbers_are_ranges_below_what_was_sent() {
        let seen = [false, true, false, false, true, true, false, false];
        assert_eq!(lost(&seen, 7), [0..=0, 2..=3, 6..=6]);
        assert_eq!(lost(&seen, 0), []);
        assert_eq!(lost(&[true; 3], 3), []);
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "any instant does to count from")]
    fn arrivals_are_counted_once_and_their_order_is_seen() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut got = Received::new(5);
        for (number, millis) in [(0, 0), (2, 1), (1, 8), (2, 9), (4, 10), (77, 50)] {
            got.arrive(number, at(millis));
        }
        assert_eq!((got.count, got.duplicates, got.reordered), (4, 1, 1));
        assert_eq!(got.longest_gap, Duration::from_millis(7));
        assert_eq!((got.first_at, got.last_at), (Some(at(0)), Some(at(10))));
        assert_eq!(lost(&got.seen, 5), [3..=3]);
    }
}
