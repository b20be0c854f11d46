//! Packets to test with, and a plain reading of them that shares no code with the crate's.

use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_backend_udp::packet::coalesce::{Coalescer, Merge};
use flannel_backend_udp::packet::ip::Ip;
use flannel_backend_udp::packet::layout::{Layout, MAX_PLACES};
use flannel_backend_udp::packet::split::{Splitter, complete};
use flannel_backend_udp::packet::vnet::{Kind, Segments, Unfinished, Vnet};
use proptest::prelude::*;

pub(crate) const ALL: Merge = Merge {
    tcp: true,
    udp: true,
    verify: true,
};

/// The sum of RFC 1071, as the RFC writes it.
pub(crate) fn slow_sum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum = 0u32;
    for word in bytes.chunks(2) {
        let low = word.get(1).copied().unwrap_or(0);
        sum += u32::from(word[0]) << 8 | u32::from(low);
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A flow's header fields.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) v6: bool,
    pub(crate) udp: bool,
    pub(crate) host: u8,
    pub(crate) ports: (u16, u16),
    pub(crate) tos: u8,
    pub(crate) ttl: u8,
    pub(crate) id: u16,
    pub(crate) dont_fragment: bool,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) window: u16,
    pub(crate) flags: u8,
    /// Words of TCP options.
    pub(crate) options: Vec<u32>,
    pub(crate) label: u16,
}

pub(crate) fn shape() -> impl Strategy<Value = Shape> {
    (
        (any::<bool>(), any::<bool>(), 1u8..4, (1u16..5, 1u16..5)),
        (0u8..3, 1u8..=255, any::<u16>(), any::<bool>()),
        (any::<u32>(), 0u32..3, 0u16..3),
        prop_oneof![8 => Just(0x10u8), 1 => Just(0x18u8), 1 => any::<u8>()],
        prop::collection::vec(any::<u32>(), 0..4),
        0u16..2,
    )
        .prop_map(|(a, b, c, flags, options, label)| Shape {
            v6: a.0,
            udp: a.1,
            host: a.2,
            ports: a.3,
            tos: b.0,
            ttl: b.1,
            id: b.2,
            dont_fragment: b.3,
            seq: c.0,
            ack: c.1,
            window: c.2,
            flags,
            options,
            label,
        })
}

impl Shape {
    pub(crate) fn addresses(&self) -> (IpAddr, IpAddr) {
        if self.v6 {
            let ip = |last| Ipv6Addr::new(0xfd00, 0, 0, last, 0, 0, 0, u16::from(self.host));
            (ip(1).into(), ip(2).into())
        } else {
            let ip = |third| Ipv4Addr::new(10, 42, third, self.host);
            (ip(1).into(), ip(2).into())
        }
    }

    pub(crate) fn transport_header(&self) -> usize {
        if self.udp {
            8
        } else {
            20 + self.options.len() * 4
        }
    }

    pub(crate) fn headers(&self) -> usize {
        (if self.v6 { 40 } else { 20 }) + self.transport_header()
    }

    /// A whole packet with right checksums.
    pub(crate) fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = self.unsummed(payload);
        let at = self.headers() - self.transport_header();
        let place = at + if self.udp { 6 } else { 16 };
        let sum = !slow_sum(&[&self.pseudo(packet.len() - at), &packet[at..]]);
        let sum = if sum == 0 && self.udp { 0xffff } else { sum };
        packet[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    /// A packet as the kernel gives it to be cut.
    pub(crate) fn large(&self, payload: &[u8], size: u16) -> (Vnet, Vec<u8>) {
        let mut packet = self.unsummed(payload);
        let at = self.headers() - self.transport_header();
        let offset = if self.udp { 6 } else { 16 };
        let sum = slow_sum(&[&self.pseudo(packet.len() - at)]);
        packet[at + offset..at + offset + 2].copy_from_slice(&sum.to_be_bytes());
        let kind = match (self.udp, self.v6) {
            (true, _) => Kind::Udp,
            (_, false) => Kind::Tcp4,
            (_, true) => Kind::Tcp6,
        };
        let vnet = Vnet {
            checksum: Some(Unfinished {
                start: at as u16,
                offset: offset as u16,
            }),
            segments: Some(Segments {
                kind,
                size,
                headers: 0,
            }),
        };
        (vnet, packet)
    }

    fn pseudo(&self, len: usize) -> Vec<u8> {
        let protocol = if self.udp { 17 } else { 6 };
        let mut bytes = Vec::new();
        match self.addresses() {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                bytes.extend(src.octets());
                bytes.extend(dst.octets());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                bytes.extend(src.octets());
                bytes.extend(dst.octets());
            }
            _ => unreachable!("both are of one family"),
        }
        bytes.extend((len as u32).to_be_bytes());
        bytes.extend([0, protocol]);
        bytes
    }

    fn unsummed(&self, payload: &[u8]) -> Vec<u8> {
        let protocol = if self.udp { 17 } else { 6 };
        let len = self.transport_header() + payload.len();
        let mut packet = Vec::new();
        match self.addresses() {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                packet.extend([0x45, self.tos]);
                packet.extend(((len + 20) as u16).to_be_bytes());
                packet.extend(self.id.to_be_bytes());
                packet.extend([u8::from(self.dont_fragment) << 6, 0]);
                packet.extend([self.ttl, protocol, 0, 0]);
                packet.extend(src.octets());
                packet.extend(dst.octets());
                let sum = !slow_sum(&[&packet]);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                packet.extend([0x60 | self.tos >> 4, self.tos << 4]);
                packet.extend(self.label.to_be_bytes());
                packet.extend((len as u16).to_be_bytes());
                packet.extend([protocol, self.ttl]);
                packet.extend(src.octets());
                packet.extend(dst.octets());
            }
            _ => unreachable!("both are of one family"),
        }
        packet.extend(self.ports.0.to_be_bytes());
        packet.extend(self.ports.1.to_be_bytes());
        if self.udp {
            packet.extend((len as u16).to_be_bytes());
            packet.extend([0, 0]);
        } else {
            packet.extend(self.seq.to_be_bytes());
            packet.extend(self.ack.to_be_bytes());
            packet.extend([((self.transport_header() / 4) as u8) << 4, self.flags]);
            packet.extend(self.window.to_be_bytes());
            packet.extend([0, 0, 0, 0]);
            for option in &self.options {
                packet.extend(option.to_be_bytes());
            }
        }
        packet.extend(payload);
        packet
    }
}

/// What is sent for a packet that was read.
pub(crate) fn sent(vnet: &Vnet, packet: &[u8]) -> Vec<Vec<u8>> {
    let ip = Ip::parse(packet).expect("made whole");
    if vnet.segments.is_none() {
        let mut packet = packet.to_vec();
        if let Some(unfinished) = vnet.checksum {
            complete(&mut packet, unfinished).expect("made whole");
        }
        return vec![packet];
    }
    let mut splitter = Splitter::new(vnet, &ip, packet).expect("made whole");
    let mut segments = Vec::new();
    let mut out = vec![0; 65_536];
    let (count, total, largest) = (splitter.count(), splitter.total(), splitter.largest());
    while let Some(len) = splitter.write_next(&mut out) {
        segments.push(out[..len].to_vec());
    }
    assert_eq!(segments.len(), count);
    assert_eq!(segments.iter().map(Vec::len).sum::<usize>(), total);
    assert_eq!(segments.iter().map(Vec::len).max(), Some(largest));
    segments
}

/// The same for a packet that is read to where the segments of one like it would stand; `None` if
/// its own do not.
pub(crate) fn sent_in_place(layout: Layout, vnet: &Vnet, packet: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut room = vec![0xa5; layout.room() + 7];
    let mut parts: Vec<IoSliceMut<'_>> =
        (0..MAX_PLACES).map(|_| IoSliceMut::new(&mut [])).collect();
    let count = layout.parts(&mut room, &mut parts);
    let mut rest = packet;
    for part in &mut parts[..count] {
        let (now, later) = rest.split_at(part.len().min(rest.len()));
        part[..now.len()].copy_from_slice(now);
        rest = later;
    }
    assert!(rest.is_empty(), "the largest packet has room");
    let mut whole = vec![0; 65_536];
    layout.gather(&room, packet.len(), &mut whole);
    assert_eq!(&whole[..packet.len()], packet, "put together again");
    let ip = Ip::parse(&room).expect("its headers are in one piece");
    let head = room[..layout.headers()].to_vec();
    let mut splitter = Splitter::in_place(vnet, &ip, &head).ok()?;
    if !layout.fits(&splitter) {
        return None;
    }
    let (mut segments, mut at) = (Vec::new(), 0);
    while let Some(len) = splitter.head_next(&mut room[at..]) {
        segments.push(room[at..at + len].to_vec());
        at += len;
    }
    Some(segments)
}

/// What is written for packets that came: with the offload header, in order. It is the same whether
/// or not it is asked first whether a packet follows the one before.
pub(crate) fn written(packets: &[Vec<u8>], merge: Merge) -> Vec<(Vnet, Vec<u8>)> {
    let pushed = coalesced(packets, merge, false);
    assert!(
        coalesced(packets, merge, true) == pushed,
        "a short cut led elsewhere"
    );
    pushed
}

fn coalesced(packets: &[Vec<u8>], merge: Merge, follow: bool) -> Vec<(Vnet, Vec<u8>)> {
    let mut buffer = Vec::new();
    let mut coalescer = Coalescer::new(merge);
    let mut places = Vec::new();
    for packet in packets {
        places.push(buffer.len());
        buffer.extend(packet);
    }
    for (packet, start) in packets.iter().zip(places) {
        if follow && coalescer.follow(&buffer, start..start + packet.len()) {
            continue;
        }
        let ip = Ip::parse(packet).expect("made whole");
        coalescer.push(&buffer, start, &ip);
    }
    let entries = coalescer.entries().iter();
    entries
        .map(|entry| {
            let mut head = [0; 128];
            let (vnet, headers) = entry.make_head(&buffer, &mut head);
            let (start, len) = entry.first();
            let mut packet = head[..headers].to_vec();
            packet.extend(&buffer[start + headers..start + len]);
            for (start, len) in coalescer.parts(entry) {
                packet.extend(&buffer[start..start + len]);
            }
            assert_eq!(packet.len(), entry.total() as usize);
            (vnet, packet)
        })
        .collect()
}

/// Whether all checksums of a packet are right.
pub(crate) fn is_right(packet: &[u8]) -> bool {
    let v6 = packet[0] >> 4 == 6;
    let at = if v6 { 40 } else { 20 };
    let protocol = packet[if v6 { 6 } else { 9 }];
    let len = ((packet.len() - at) as u32).to_be_bytes();
    let addresses = if v6 { &packet[8..40] } else { &packet[12..20] };
    let header = v6 || slow_sum(&[&packet[..20]]) == 0xffff;
    let pseudo = [addresses, &len, &[0, protocol]].concat();
    header && slow_sum(&[&pseudo, &packet[at..]]) == 0xffff
}
