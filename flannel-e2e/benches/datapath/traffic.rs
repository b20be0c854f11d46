//! Traffic between two namespaces, measured for a moment.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flannel_testkit::netns::Ns;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::congestion::Congestion;

/// The payload of a small packet, in bytes.
const SMALL: usize = 64;
/// Small packets go out so many in a system call.
const BURST: usize = 32;
/// What one write to a stream holds, in bytes.
const CHUNK: usize = 128 * 1024;

/// Where packets come from and go to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Between<'a> {
    pub(crate) from: &'a Ns,
    pub(crate) to: &'a Ns,
    /// The receiver's address.
    pub(crate) ip: IpAddr,
    /// The processors of the sender and of the receiver, where they have one each.
    pub(crate) processors: Option<[usize; 2]>,
    /// The congestion control of connections.
    pub(crate) congestion: Congestion,
}

/// Lets a thread run on some processors alone.
pub(crate) fn pin(thread: Pid, processors: impl IntoIterator<Item = usize>) {
    let mut set = CpuSet::new();
    for processor in processors {
        set.set(processor).expect("there are not so many");
    }
    sched_setaffinity(thread, &set).expect("it is there");
}

/// Gives the thread that calls it the processor of an end: 0, the sender; 1, the receiver.
fn take_processor(processors: Option<[usize; 2]>, end: usize) {
    if let Some(processors) = processors {
        pin(Pid::from_raw(0), [processors[end]]);
    }
}

fn bind<T: Send>(ns: &Ns, open: impl FnOnce() -> io::Result<T> + Send) -> T {
    let socket = ns.run(open).expect("it can be entered");
    socket.expect("a socket")
}

/// What some streams carried.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bulk {
    /// Bits that arrived in a second.
    pub(crate) rate: f64,
    /// Seconds of processor time, of the whole machine, for a gigabyte.
    pub(crate) cpu: f64,
}

/// So many TCP connections at once, as much as they take; counted after a while in which they get
/// up to speed.
pub(crate) fn streams(path: Between<'_>, count: usize, lead: Duration, time: Duration) -> Bulk {
    let received = Arc::new(AtomicU64::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let listener = bind(path.to, || TcpListener::bind((path.ip, 0)));
    let address = listener.local_addr().expect("bound");
    // All before the first sends: the others would have to get through what that sends.
    let connect = |_| {
        let client = bind(path.from, || TcpStream::connect(address));
        // Where that cannot be had, which is told at the start, the machine's own is as good.
        path.congestion.set(&client).ok();
        let (server, _) = listener.accept().expect("a connection");
        (client, server)
    };
    let connections: Vec<(TcpStream, TcpStream)> = (0..count).map(connect).collect();
    let mut threads = Vec::new();
    for (client, server) in connections {
        let (counter, done) = (Arc::clone(&received), Arc::clone(&over));
        let processors = path.processors;
        threads.push(thread::spawn(move || {
            take_processor(processors, 1);
            receive(server, &counter);
        }));
        threads.push(thread::spawn(move || {
            take_processor(processors, 0);
            send(client, &done);
        }));
    }
    thread::sleep(lead);
    let (bytes, busy, start) = (received.load(Ordering::Relaxed), busy(), Instant::now());
    thread::sleep(time);
    let bytes = received.load(Ordering::Relaxed) - bytes;
    let (busy, time) = (self::busy() - busy, start.elapsed());
    over.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().expect("no panic");
    }
    Bulk {
        rate: bytes as f64 * 8.0 / time.as_secs_f64(),
        cpu: busy / (bytes as f64 / 1e9),
    }
}

fn send(mut stream: TcpStream, over: &AtomicBool) {
    let chunk = vec![0; CHUNK];
    while !over.load(Ordering::Relaxed) && stream.write_all(&chunk).is_ok() {}
    // So that a stream that stalls does not hold up the rest.
    stream.shutdown(std::net::Shutdown::Both).ok();
}

fn receive(mut stream: TcpStream, bytes: &AtomicU64) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(len @ 1..) = stream.read(&mut buffer) {
        bytes.fetch_add(len as u64, Ordering::Relaxed);
    }
}

/// Seconds that all processors together have worked.
fn busy() -> f64 {
    let stat = fs::read_to_string("/proc/stat").expect("the kernel's counters");
    let first = stat.lines().next().expect("a line");
    let ticks: Vec<f64> = first
        .split_whitespace()
        .skip(1)
        .filter_map(|word| word.parse().ok())
        .collect();
    let hertz = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    // user, nice, system, idle, iowait, irq, softirq; what is stolen or a guest's is not ours.
    (ticks[..3].iter().sum::<f64>() + ticks[5] + ticks[6]) / hertz as f64
}

/// What became of a flood of small packets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flood {
    /// Packets that arrived in a second.
    pub(crate) arrived: f64,
    /// The part that did not arrive.
    pub(crate) loss: f64,
}

/// Small packets at a rate, packets a second, over so many flows in turn.
pub(crate) fn flood(path: Between<'_>, rate: f64, flows: usize, time: Duration) -> Flood {
    let receiver = bind(path.to, || UdpSocket::bind((path.ip, 0)));
    widen(&receiver);
    let address = receiver.local_addr().expect("bound");
    let over = Duration::from_millis(150);
    receiver.set_read_timeout(Some(over)).expect("not zero");
    let counting = thread::spawn(move || count(&receiver));
    let any: IpAddr = match address.ip() {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    // Connected, so that the sender, which takes a processor to itself, looks up the way once.
    let senders: Vec<UdpSocket> = (0..flows)
        .map(|_| {
            let socket = bind(path.from, || UdpSocket::bind((any, 0)));
            socket.connect(address).expect("a route");
            socket
        })
        .collect();
    let (sent, took) = paced(&senders, rate, time);
    let arrived = counting.join().expect("no panic").min(sent);
    let seconds = took.as_secs_f64();
    Flood {
        arrived: arrived as f64 / seconds,
        loss: 1.0 - arrived as f64 / sent as f64,
    }
}

/// Room in the queue, so that the receiving program's pauses are not taken for the network's.
fn widen(socket: &UdpSocket) {
    use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
    setsockopt(socket, RcvBufForce, &(8 << 20)).expect("root may");
}

/// Counts what arrives, many in a system call, until nothing has for a while.
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
        let received = recvmmsg(
            receiver.as_raw_fd(),
            &mut headers,
            parts.iter_mut(),
            flags,
            None,
        );
        match received {
            Ok(messages) => count += messages.count() as u64,
            Err(Errno::EAGAIN) if count == 0 => {}
            Err(_) => return count,
        }
    }
}

/// Sends bursts, each when its time has come; answers how many packets and how long it took.
fn paced(senders: &[UdpSocket], rate: f64, time: Duration) -> (u64, Duration) {
    let payload = [0; SMALL];
    let parts = [[IoSlice::new(&payload)]; BURST];
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BURST, None);
    let start = Instant::now();
    let mut sent = 0_u64;
    for turn in 0.. {
        let now = start.elapsed();
        if now >= time {
            break;
        }
        let due = Duration::from_secs_f64(sent as f64 / rate);
        if let Some(early) = due.checked_sub(now) {
            thread::sleep(early);
        }
        let socket = &senders[turn % senders.len()];
        let result = sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &parts,
            [None; BURST],
            [],
            MsgFlags::empty(),
        );
        // What does not fit the queue is not sent, and does not count.
        sent += result.map_or(0, |results| results.count() as u64);
    }
    (sent.max(1), start.elapsed())
}

/// The highest rate at which at most one packet in a hundred is lost, in packets a second, found by
/// halving an interval until its ends are 4 % apart.
pub(crate) fn highest_rate(path: Between<'_>, flows: usize, time: Duration) -> f64 {
    let good = |rate| {
        let flood = flood(path, rate, flows, time);
        // A sender that cannot keep up has found the limit too.
        (flood.loss <= 0.01).then_some(flood.arrived)
    };
    let (mut low, mut high, mut best) = (20_000.0, 600_000.0, 0.0);
    while high / low > 1.04 {
        let middle = f64::sqrt(low * high);
        match good(middle).or_else(|| good(middle)) {
            Some(arrived) => {
                best = f64::max(best, arrived);
                // It cannot send faster.
                if arrived < middle * 0.9 {
                    break;
                }
                low = middle;
            }
            None => high = middle,
        }
    }
    best
}

/// How long small packets take there and back, in microseconds: the median and the 99th of a
/// hundred.
pub(crate) fn round_trips(path: Between<'_>, time: Duration) -> (f64, f64) {
    let server = bind(path.to, || UdpSocket::bind((path.ip, 0)));
    let address = server.local_addr().expect("bound");
    let limit = Some(Duration::from_millis(200));
    server.set_read_timeout(limit).expect("not zero");
    let echo = thread::spawn(move || {
        let mut buffer = [0; SMALL];
        let mut heard = false;
        loop {
            match server.recv_from(&mut buffer) {
                Ok((len, from)) => {
                    heard = true;
                    server.send_to(&buffer[..len], from).ok();
                }
                Err(_) if heard => return,
                Err(_) => {}
            }
        }
    });
    let any: IpAddr = if address.is_ipv4() {
        IpAddr::from([0; 4])
    } else {
        IpAddr::from([0; 16])
    };
    let client = bind(path.from, || UdpSocket::bind((any, 0)));
    client.connect(address).expect("a route");
    client.set_read_timeout(limit).expect("not zero");
    let mut times = Vec::new();
    let start = Instant::now();
    let mut buffer = [0; SMALL];
    while start.elapsed() < time {
        let sent = Instant::now();
        client.send(&[0; SMALL]).expect("it can be sent");
        if client.recv(&mut buffer).is_ok() {
            times.push(sent.elapsed().as_secs_f64() * 1e6);
        }
    }
    echo.join().expect("no panic");
    times.sort_by(f64::total_cmp);
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    (at(0.5), at(0.99))
}
