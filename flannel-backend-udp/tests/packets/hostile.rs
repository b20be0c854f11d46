//! No bytes make the packet code panic, and nothing is counted twice or lost on the way.
//!
//! This crate is optimised in tests too, so that ten million packets take seconds.

use flannel_backend_udp::packet::coalesce::{Coalescer, Merge};
use flannel_backend_udp::packet::icmp::{self, Problem};
use flannel_backend_udp::packet::ip::{Ip, decrement_ttl};
use flannel_backend_udp::packet::split::{Splitter, complete};
use flannel_backend_udp::packet::vnet::{self, Vnet};

const PACKETS: u32 = 10_000_000;

/// SplitMix64: one seed, one sequence.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Good packets to damage: TCP, UDP and ICMP, with options, extensions and fragments.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (protocol, at) in [(6u8, 20usize), (17, 20), (1, 20), (6, 60), (17, 24)] {
        let mut packet = vec![0; at + 60];
        packet[0] = 0x40 | (at / 4) as u8;
        packet[3] = packet.len() as u8;
        packet[6] = 0x40;
        packet[8] = 64;
        packet[9] = protocol;
        packet[12..20].copy_from_slice(&[10, 1, 1, 1, 10, 2, 2, 2]);
        packet[at + 12] = 0x80;
        packet[at + 13] = 0x10;
        if protocol == 17 {
            packet[at + 5] = 60;
            packet[at + 7] = 1;
        }
        seeds.push(packet);
    }
    for (next, protocol) in [
        (6u8, 6u8),
        (17, 17),
        (58, 58),
        (0, 6),
        (44, 17),
        (43, 44),
        (60, 58),
    ] {
        let mut packet = vec![0; 40 + 16 + 60];
        packet[0] = 0x60;
        packet[5] = 76;
        packet[6] = next;
        packet[7] = 64;
        packet[8..40].copy_from_slice(&[0xfd; 32]);
        packet[40] = protocol;
        packet[48] = protocol;
        seeds.push(packet);
    }
    seeds
}

#[test]
fn no_bytes_panic() {
    let seeds = seeds();
    let mut random = Random(1);
    let mut packet = Vec::new();
    let mut out = vec![0; 65_536];
    let mut error = [0; icmp::MAX_LEN];
    let mut batch = Vec::new();
    let mut places = Vec::new();
    let mut coalescer = Coalescer::new(Merge {
        tcp: true,
        udp: true,
        verify: false,
    });
    let mut seq = 0u32;
    let (mut whole, mut merged, mut followed, mut cut) = (0u64, 0u64, 0u64, 0u64);
    for n in 0..PACKETS {
        packet.clear();
        if random.below(8) == 0 {
            let len = random.below(120);
            packet.extend((0..len).map(|_| random.next() as u8));
        } else {
            packet.extend(&seeds[random.below(seeds.len())]);
            if packet[0] == 0x45 && packet[9] == 6 {
                packet[24..28].copy_from_slice(&seq.to_be_bytes());
                seq = seq.wrapping_add(28);
            }
            for _ in 0..random.below(4) {
                let at = random.below(packet.len());
                packet[at] = random.next() as u8;
            }
            if random.below(4) == 0 {
                packet.truncate(random.below(packet.len()));
            }
        }
        let mut header = [0; vnet::LEN];
        for byte in &mut header {
            *byte = if random.below(2) == 0 {
                random.below(64) as u8
            } else {
                0
            };
        }
        header[1] = [0, 1, 4, 5, 0x81, header[1]][random.below(6)];
        let Ok(ip) = Ip::parse(&packet) else {
            continue;
        };
        whole += 1;
        assert!(ip.total <= packet.len());
        for problem in [Problem::NoRoute, Problem::TooBig(n), Problem::TimeExceeded] {
            let source = if ip.src.is_ipv4() {
                [10, 0, 0, 1].into()
            } else {
                [0xfdu8; 16].into()
            };
            let made = icmp::error(problem, &ip, &packet, source, &mut error);
            assert!(made.is_none_or(|len| Ip::parse(&error[..len]).is_ok()));
        }
        if let Some(vnet) = Vnet::decode(&header) {
            assert_eq!(Vnet::decode(&vnet.encode()), Some(vnet));
            if let Ok(mut splitter) = Splitter::new(&vnet, &ip, &packet) {
                let (count, mut written) = (splitter.count(), 0);
                while let Some(len) = splitter.write_next(&mut out) {
                    assert_eq!(Ip::parse(&out[..len]).map(|ip| ip.total), Ok(len));
                    written += 1;
                }
                assert_eq!(written, count);
                cut += 1;
            } else if let Some(unfinished) = vnet.checksum {
                let _ = complete(&mut packet, unfinished);
            }
        }
        // The checksum may have been written over the lengths.
        let Ok(ip) = Ip::parse(&packet) else {
            continue;
        };
        decrement_ttl(&ip, &mut packet);
        places.push((batch.len()..batch.len() + packet.len(), ip));
        batch.extend(&packet);
        if places.len() == 64 {
            for (place, ip) in places.drain(..) {
                let start = place.start;
                if coalescer.follow(&batch, place) {
                    followed += 1;
                } else {
                    coalescer.push(&batch, start, &ip);
                }
            }
            let mut count = 0;
            for entry in coalescer.entries() {
                let mut head = [0; 128];
                let (vnet, headers) = entry.make_head(&batch, &mut head);
                let (_, first) = entry.first();
                let rest: usize = coalescer.parts(entry).map(|(_, len)| len).sum();
                assert_eq!(first + rest, entry.total() as usize);
                assert!(headers <= first);
                assert_eq!(vnet.segments.is_some(), entry.count() > 1);
                merged += u64::from(entry.count() > 1);
                count += usize::from(entry.count());
            }
            assert_eq!(count, 64);
            coalescer.clear();
            batch.clear();
        }
    }
    // The test would prove nothing if all were thrown away at the door.
    let part = u64::from(PACKETS);
    assert!(whole > part / 2, "{whole} of {part} were packets");
    assert!(cut > part / 50, "{cut} of {part} were cut");
    assert!(followed > part / 1000, "{followed} of {part} followed");
    assert!(merged > part / 1000, "{merged} of {part} were merged");
}
