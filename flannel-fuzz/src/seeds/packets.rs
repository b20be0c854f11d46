//! Packets as a kernel and as peers give them.

use flannel_backend_udp::packet::checksum::Sum;
use flannel_backend_udp::packet::ip::Ip;

use crate::corpus::Entry;

use super::seed;

/// A TCP packet, right in every part.
fn tcp(v6: bool, seq: u32, payload: &[u8]) -> Vec<u8> {
    let header = if v6 { 40 } else { 20 };
    let mut packet = vec![0; header + 20];
    packet.extend(payload);
    let len = packet.len() as u16;
    if v6 {
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&(len - 40).to_be_bytes());
        packet[6] = 6;
        packet[7] = 64;
        packet[8] = 0xfd;
        packet[23] = 1;
        packet[24] = 0xfd;
        packet[39] = 2;
    } else {
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet[6] = 0x40;
        packet[8] = 64;
        packet[9] = 6;
        packet[12..20].copy_from_slice(&[10, 42, 1, 2, 10, 42, 2, 2]);
        let sum = Sum::new().with(&packet[..20]).checksum();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packet[header..header + 4].copy_from_slice(&[0x9c, 0x40, 0x14, 0x51]);
    packet[header + 4..header + 8].copy_from_slice(&seq.to_be_bytes());
    packet[header + 12] = 0x50;
    packet[header + 13] = 0x10;
    packet[header + 14] = 0x40;
    if let Ok(ip) = Ip::parse(&packet) {
        let segment = packet.len() - header;
        let sum = ip.pseudo_header(&packet, segment).with(&packet[header..]);
        let sum = sum.checksum().to_be_bytes();
        packet[header + 16..header + 18].copy_from_slice(&sum);
    }
    packet
}

/// Packets, each behind its length.
fn framed(packets: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for packet in packets {
        bytes.extend((packet.len() as u16).to_be_bytes());
        bytes.extend(packet);
    }
    bytes
}

pub(super) fn seeds() -> Vec<(&'static str, Entry)> {
    let plain = [0; 10];
    let mut seeds = Vec::new();
    for (name, v6) in [("v4", false), ("v6", true)] {
        let header: u16 = if v6 { 60 } else { 40 };
        let whole = tcp(v6, 7, &[1; 100]);
        seeds.push(seed(
            "tun_packet",
            format!("ok-{name}"),
            [&plain[..], &whole].concat(),
        ));
        // NEEDS_CSUM; TCPv4 or TCPv6; the length of the headers; 1,000 bytes a segment; where the
        // checksum begins and stands.
        let large = tcp(v6, 7, &[1; 3_500]);
        let mut vnet = [0; 10];
        vnet[0] = 1;
        vnet[1] = if v6 { 4 } else { 1 };
        vnet[2..4].copy_from_slice(&header.to_ne_bytes());
        vnet[4..6].copy_from_slice(&1_000_u16.to_ne_bytes());
        vnet[6..8].copy_from_slice(&(header - 20).to_ne_bytes());
        vnet[8..10].copy_from_slice(&16_u16.to_ne_bytes());
        seeds.push(seed(
            "tun_packet",
            format!("ok-{name}-large"),
            [&vnet[..], &large].concat(),
        ));
        vnet[4..6].fill(0);
        seeds.push(seed(
            "tun_packet",
            format!("bad-{name}-no-size"),
            [&vnet[..], &large].concat(),
        ));
        let cut = [&plain[..], &whole[..30]].concat();
        seeds.push(seed("tun_packet", format!("bad-{name}-cut"), cut));

        let next = tcp(v6, 107, &[2; 100]);
        let last = tcp(v6, 207, &[3; 50]);
        let stream = [whole.clone(), next.clone(), last.clone()];
        seeds.push(seed("datagrams", format!("ok-{name}"), framed(&stream)));
        let reordered = [whole.clone(), last, next.clone()];
        seeds.push(seed(
            "datagrams",
            format!("bad-{name}-order"),
            framed(&reordered),
        ));
        let mut damaged = next;
        damaged[usize::from(header)] ^= 1;
        seeds.push(seed(
            "datagrams",
            format!("bad-{name}-damaged"),
            framed(&[whole, damaged]),
        ));
    }
    let both = [false, true].map(|v6| tcp(v6, 7, &[4; 60]));
    let (again, next) = ([both[0].clone()], tcp(true, 67, &[5; 60]));
    seeds.push(seed(
        "datagrams",
        "bad-twice",
        framed(&[&both[..1], &again].concat()),
    ));
    seeds.push(seed(
        "datagrams",
        "ok-among-others",
        framed(&[&both[..2], &[next]].concat()),
    ));
    seeds.push(seed("datagrams", "bad-empty", []));
    seeds.push(seed("tun_packet", "bad-empty", []));
    seeds
}
