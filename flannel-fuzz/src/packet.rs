//! What the packet path of the UDP backend reads: packets of a TUN device, and datagrams of peers.

use std::array;
use std::io::IoSliceMut;
use std::net::IpAddr;

use flannel_backend_udp::packet::coalesce::{Coalescer, Merge};
use flannel_backend_udp::packet::icmp::{self, Problem};
use flannel_backend_udp::packet::ip::{Ip, decrement_ttl};
use flannel_backend_udp::packet::layout::{Layout, MAX_PLACES};
use flannel_backend_udp::packet::split::{Splitter, complete};
use flannel_backend_udp::packet::vnet::{self, Vnet};

/// The most bytes that a segment can have.
const LARGEST: usize = 65_536;

/// A packet of a TUN device behind its header. Accepted is what can be sent to a peer, cut or whole;
/// each piece is a packet again, and together they hold as many bytes as the header promised.
pub(crate) fn tun_packet(bytes: &[u8]) -> bool {
    let Some((header, packet)) = bytes.split_first_chunk::<{ vnet::LEN }>() else {
        return false;
    };
    let (Some(vnet), Ok(ip)) = (Vnet::decode(header), Ip::parse(packet)) else {
        return false;
    };
    assert_eq!(Vnet::decode(&vnet.encode()), Some(vnet), "read back");
    assert!(ip.total <= packet.len(), "a packet longer than it is");
    answered(&ip, packet);
    let mut copy = packet.to_vec();
    decrement_ttl(&ip, &mut copy);
    assert_eq!(
        Ip::parse(&copy).map(|ip| ip.total),
        Ok(ip.total),
        "a hop makes it another packet"
    );
    if vnet.segments.is_none() {
        return vnet
            .checksum
            .is_none_or(|unfinished| complete(&mut copy, unfinished).is_ok());
    }
    let Ok(mut splitter) = Splitter::new(&vnet, &ip, packet) else {
        return false;
    };
    let mut out = vec![0; LARGEST];
    let (count, mut written) = (splitter.count(), 0);
    while let Some(len) = splitter.write_next(&mut out) {
        let piece = Ip::parse(&out[..len]).map(|ip| ip.total);
        assert_eq!(piece, Ok(len), "a piece is no packet");
        written += 1;
    }
    assert_eq!(written, count, "pieces are missing");
    read_apart(&vnet, &ip, &packet[..ip.total]);
    true
}

/// What is read to where its segments belong is cut as if it were whole.
fn read_apart(vnet: &Vnet, ip: &Ip, packet: &[u8]) {
    let Ok(mut whole) = Splitter::new(vnet, ip, packet) else {
        return;
    };
    let Some(layout) = Layout::of(&whole) else {
        return;
    };
    let mut room = vec![0; layout.room()];
    let mut parts: [IoSliceMut<'_>; MAX_PLACES] = array::from_fn(|_| IoSliceMut::new(&mut []));
    let count = layout.parts(&mut room, &mut parts);
    let mut rest = packet;
    for part in &mut parts[..count] {
        let (now, later) = rest.split_at(part.len().min(rest.len()));
        part[..now.len()].copy_from_slice(now);
        rest = later;
    }
    assert!(rest.is_empty(), "there is no room for a packet");
    let head = packet[..layout.headers()].to_vec();
    let mut apart = Splitter::in_place(vnet, ip, &head).expect("its headers are the same");
    assert!(layout.fits(&apart), "it is not like itself");
    let (mut out, mut at) = (vec![0; LARGEST], 0);
    while let Some(len) = whole.write_next(&mut out) {
        assert_eq!(apart.head_next(&mut room[at..]), Some(len));
        assert_eq!(room[at..at + len], out[..len], "another piece");
        at += len;
    }
}

/// An error about a packet is a packet, to where that came from.
fn answered(ip: &Ip, packet: &[u8]) {
    let source = match ip.src {
        IpAddr::V4(_) => IpAddr::from([10, 0, 0, 1]),
        IpAddr::V6(_) => IpAddr::from([0xfd; 16]),
    };
    let mut error = [0; icmp::MAX_LEN];
    for problem in [
        Problem::NoRoute,
        Problem::TooBig(1400),
        Problem::TimeExceeded,
    ] {
        let made = icmp::error(problem, ip, packet, source, &mut error);
        if let Some(len) = made {
            let answer = Ip::parse(&error[..len]);
            assert_eq!(
                answer.map(|answer| answer.dst),
                Ok(ip.src),
                "to somebody else"
            );
        }
    }
}

/// Datagrams, each behind its length in two bytes. Accepted is what is merged; nothing is lost by it
/// and nothing comes twice.
pub(crate) fn datagrams(bytes: &[u8]) -> bool {
    let mut coalescer = Coalescer::new(Merge {
        tcp: true,
        udp: true,
        verify: true,
    });
    let (mut at, mut packets, mut total) = (0, 0, 0);
    while packets < 64
        && let Some(len) = bytes.get(at..at + 2)
    {
        at += 2;
        let len = usize::from(u16::from_be_bytes([len[0], len[1]]));
        let end = (at + len).min(bytes.len());
        if coalescer.follow(bytes, at..end) {
            packets += 1;
            total += end - at;
        } else if let Ok(ip) = Ip::parse(&bytes[at..end]) {
            coalescer.push(bytes, at, &ip);
            packets += 1;
            total += ip.total;
        }
        at = end;
    }
    let (mut count, mut merged) = (0, false);
    for entry in coalescer.entries() {
        let mut head = [0; 128];
        let (vnet, headers) = entry.make_head(bytes, &mut head);
        assert_eq!(
            vnet.segments.is_some(),
            entry.count() > 1,
            "the header lies"
        );
        let (_, first) = entry.first();
        assert!(headers <= first, "headers beyond the packet");
        let rest: usize = coalescer.parts(entry).map(|(_, len)| len).sum();
        assert_eq!(first + rest, entry.total() as usize, "bytes are lost");
        assert!(entry.total() <= 65_535, "no packet is that long");
        count += usize::from(entry.count());
        merged |= entry.count() > 1;
        total -= entry.total() as usize + headers * (usize::from(entry.count()) - 1);
    }
    assert_eq!(count, packets, "a packet is lost");
    assert_eq!(total, 0, "bytes are lost");
    merged
}
