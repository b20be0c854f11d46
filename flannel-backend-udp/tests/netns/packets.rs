//! Packets arrive, as they were sent.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use flannel_backend_udp::{Options, Threads};
use flannel_core::Family;

use crate::bed::{Bed, wait_until};

#[test]
fn pods_reach_one_another_over_either_family() {
    for outside in [Family::V4, Family::V6] {
        let Some(bed) = Bed::new("udp-reach", 2, outside) else {
            return;
        };
        for threads in [Threads::One, Threads::PerDirection] {
            let options = Options {
                threads,
                ..Options::default()
            };
            let forwarders = [0, 1].map(|node| bed.start(node, options.clone()));
            bed.assert_reachable();
            for forwarder in &forwarders {
                assert!(forwarder.health().is_running);
                assert_eq!(forwarder.peers().len(), 1);
                wait_until("all is counted", || {
                    let peer = forwarder.peers()[0];
                    peer.received_packets >= 4 && peer.sent_packets >= 4
                });
            }
        }
    }
}

/// Bytes that are the same for the same seed.
struct Bytes(u64);

impl Bytes {
    fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let word = (self.0 ^ (self.0 >> 29)).to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// Sends bytes through a stream in odd pieces, and reads the other side's; all must be right.
fn exchange(mut stream: TcpStream, mine: u64, theirs: u64, len: usize) {
    let mut writer = stream.try_clone().expect("a descriptor");
    let sending = thread::spawn(move || {
        let mut bytes = Bytes(mine);
        let mut buffer = vec![0; 70_000];
        let mut left = len;
        let mut piece = 1;
        while left > 0 {
            piece = (piece * 7 + 13) % 69_000 / 8 * 8 + 8;
            let now = piece.min(left);
            bytes.fill(&mut buffer[..now]);
            writer
                .write_all(&buffer[..now])
                .expect("the stream takes it");
            left -= now;
        }
    });
    let mut bytes = Bytes(theirs);
    let (mut got, mut want) = (vec![0; 64_000], vec![0; 64_000]);
    let mut left = len;
    while left > 0 {
        let now = left.min(64_000);
        stream
            .read_exact(&mut got[..now])
            .expect("the stream gives it");
        bytes.fill(&mut want[..now]);
        assert!(got[..now] == want[..now], "bytes were changed on the way");
        left -= now;
    }
    sending.join().expect("all was sent");
}

/// A stream each way at once between the pods.
fn streams_arrive_whole(bed: &Bed, family: Family, len: usize) {
    let listen = SocketAddr::new(bed.pod_ip(1, family), 7000);
    let listener = bed.pods[1].ns.run(|| TcpListener::bind(listen));
    let listener = listener.expect("the namespace").expect("a listener");
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a client");
        exchange(stream, 2, 1, len);
    });
    let stream = bed.pods[0].ns.run(|| TcpStream::connect(listen));
    let stream = stream.expect("the namespace").expect("a server");
    exchange(stream, 1, 2, len);
    server.join().expect("all arrived");
}

#[test]
fn streams_arrive_whole_with_offload_and_without() {
    let Some(bed) = Bed::new("udp-streams", 2, Family::V4) else {
        return;
    };
    for offload in [[true, true], [true, false], [false, false]] {
        let forwarders = [0, 1].map(|node| {
            let options = Options {
                offload: offload[node],
                ..Options::default()
            };
            bed.start(node, options)
        });
        bed.assert_reachable();
        for family in [Family::V4, Family::V6] {
            streams_arrive_whole(&bed, family, 8 << 20);
        }
        for (forwarder, offload) in forwarders.iter().zip(offload) {
            let (totals, can) = (forwarder.totals(), forwarder.capabilities());
            assert_eq!(
                (totals.spoofed, totals.malformed, totals.not_ours),
                (0, 0, 0)
            );
            assert_eq!(can.notes.is_empty(), offload, "{can:?}");
            // The large packets are what makes it fast: were they lost, nothing else would tell.
            let merged = totals.delivered_packets > totals.tun_writes * 3 / 2;
            assert_eq!(merged, offload, "{totals:?}");
        }
    }
}

#[test]
fn streams_arrive_whole_over_ipv6_and_several_workers() {
    let Some(bed) = Bed::new("udp-streams6", 2, Family::V6) else {
        return;
    };
    let options = Options {
        workers: 3,
        ..Options::default()
    };
    let _forwarders = [0, 1].map(|node| bed.start(node, options.clone()));
    bed.assert_reachable();
    for family in [Family::V4, Family::V6] {
        streams_arrive_whole(&bed, family, 4 << 20);
    }
}

#[cfg(feature = "baseline")]
#[test]
fn a_plain_proxy_understands_it() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use flannel_backend_udp::{Sockets, UdpOptions, baseline};

    let Some(bed) = Bed::new("udp-plain", 2, Family::V4) else {
        return;
    };
    let _forwarder = bed.start(0, Options::default());
    let sockets = bed.sockets(1);
    let options = UdpOptions {
        buffer: 1 << 20,
        merge: false,
        shared: false,
    };
    let queue = sockets
        .tun_queue(&bed.tunnel(1).dev, false)
        .expect("a queue");
    let socket = sockets.udp(bed.endpoint(1), &options).expect("a socket");
    let stop = Arc::new(AtomicBool::new(false));
    let proxy = {
        let (stop, peer) = (Arc::clone(&stop), bed.endpoint(0));
        thread::spawn(move || baseline::run(&queue, socket, peer, &stop))
    };
    bed.assert_reachable();
    streams_arrive_whole(&bed, Family::V4, 2 << 20);
    streams_arrive_whole(&bed, Family::V6, 2 << 20);
    stop.store(true, Ordering::Relaxed);
    proxy.join().expect("no panic").expect("no error");
}

/// Datagrams of all sizes, each with its number: none changed, none twice, none out of order, in
/// bursts and pauses.
#[test]
fn datagrams_arrive_as_they_were_sent() {
    let Some(bed) = Bed::new("udp-datagrams", 2, Family::V4) else {
        return;
    };
    let forwarders = [0, 1].map(|node| bed.start(node, Options::default()));
    bed.assert_reachable();
    for family in [Family::V4, Family::V6] {
        let to = SocketAddr::new(bed.pod_ip(1, family), 7001);
        let from = SocketAddr::new(bed.pod_ip(0, family), 0);
        let receiver = bed.pods[1].ns.run(|| UdpSocket::bind(to));
        let receiver = receiver.expect("the namespace").expect("a socket");
        let timeout = Some(Duration::from_secs(5));
        receiver.set_read_timeout(timeout).expect("a timeout");
        let sender = bed.pods[0].ns.run(|| UdpSocket::bind(from));
        let sender = sender.expect("the namespace").expect("a socket");
        let mut buffer = [0; 2048];
        for round in 0u32..300 {
            let sizes = (0..80).map(|n| 8 + ((round + n / 5) * 97 % 1400) as usize);
            for (n, size) in sizes.clone().enumerate() {
                let mut packet = vec![round as u8; size];
                packet[..4].copy_from_slice(&round.to_be_bytes());
                packet[4..8].copy_from_slice(&(n as u32).to_be_bytes());
                sender.send_to(&packet, to).expect("sent");
            }
            for (n, size) in sizes.enumerate() {
                let len = receiver.recv(&mut buffer).expect("it arrives");
                assert_eq!(len, size);
                assert_eq!(buffer[..4], round.to_be_bytes());
                assert_eq!(buffer[4..8], (n as u32).to_be_bytes());
                assert!(buffer[8..len].iter().all(|byte| *byte == round as u8));
            }
            if round % 60 == 59 {
                thread::sleep(Duration::from_millis(70));
            }
        }
    }
    let totals = forwarders[0].totals();
    assert!(totals.sent_messages < totals.sent_packets, "{totals:?}");
}
