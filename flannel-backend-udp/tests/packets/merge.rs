//! Cutting and merging undo one another and keep what must be kept.

use flannel_backend_udp::packet::checksum::{Sum, replace};
use flannel_backend_udp::packet::coalesce::Merge;
use flannel_backend_udp::packet::group::{Grouper, MAX_SEGMENTS, max_bytes};
use flannel_backend_udp::packet::ip::{Ip, decrement_ttl, header_is_valid};
use flannel_backend_udp::packet::layout::Layout;
use flannel_backend_udp::packet::split::Splitter;
use flannel_backend_udp::packet::vnet::Vnet;
use flannel_core::Family;
use proptest::prelude::*;

use crate::make::{ALL, Shape, is_right, sent, sent_in_place, shape, slow_sum, written};

/// A stream: what its packets look like, its bytes, and how it is cut.
fn stream() -> impl Strategy<Value = (Shape, Vec<u8>, u16)> {
    (
        shape(),
        prop::collection::vec(any::<u8>(), 1..6000),
        1u16..1500,
    )
        .prop_map(|(shape, bytes, size)| (shape, bytes, size.max(100)))
}

proptest! {
    #[test]
    fn cutting_then_merging_is_the_identity((mut shape, bytes, size) in stream(), push: bool) {
        shape.flags = if push { 0x18 } else { 0x10 };
        let (vnet, large) = shape.large(&bytes, size);
        let segments = sent(&vnet, &large);
        for segment in &segments {
            prop_assert!(is_right(segment), "a segment's checksum is wrong");
        }
        let written = written(&segments, ALL);
        prop_assert_eq!(written.len(), 1);
        let (again, packet) = &written[0];
        if segments.len() == 1 {
            prop_assert_eq!(packet, &segments[0]);
            prop_assert_eq!(*again, Vnet::default());
        } else {
            prop_assert_eq!(packet, &large);
            prop_assert_eq!(again.checksum, vnet.checksum);
            let (before, after) = (vnet.segments.expect("given"), again.segments.expect("merged"));
            prop_assert_eq!((before.kind, before.size), (after.kind, after.size));
        }
    }

    /// A packet that is read to where its segments belong is cut as if it had been read whole; and
    /// whatever else comes there is put together again.
    #[test]
    fn payload_that_stands_in_its_place_is_left_there(
        shape in shape(),
        bytes in prop::collection::vec(any::<u8>(), 3_000..9_000),
        size in 1_050u16..1_500,
        mut others in prop::collection::vec(stream(), 1..4),
    ) {
        others.extend(others.clone().into_iter().map(|(like, bytes, _)| (like, bytes, size)));
        let (vnet, large) = shape.large(&bytes, size);
        let ip = Ip::parse(&large).expect("made whole");
        let layout = Splitter::new(&vnet, &ip, &large).ok().and_then(|cut| Layout::of(&cut));
        prop_assert_eq!(layout.is_some(), bytes.len() > 3 * usize::from(size));
        let Some(layout) = layout else {
            return Ok(());
        };
        prop_assert_eq!(sent_in_place(layout, &vnet, &large), Some(sent(&vnet, &large)));
        for (shape, bytes, size) in others {
            let (vnet, large) = shape.large(&bytes, size);
            // Those of the same size and headers are cut too, the others put together.
            if let Some(segments) = sent_in_place(layout, &vnet, &large) {
                prop_assert_eq!(segments, sent(&vnet, &large));
            }
        }
    }

    /// Whatever is merged, what comes out when it is cut again is what went in, flow by flow.
    #[test]
    fn merging_loses_changes_and_reorders_nothing_of_a_flow(
        streams in prop::collection::vec(stream(), 1..5),
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..120),
        damaged in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1u8..), 0..3),
    ) {
        let mut queues: Vec<Vec<Vec<u8>>> = streams
            .iter()
            .map(|(shape, bytes, size)| {
                let (vnet, large) = shape.large(bytes, *size);
                let mut segments = sent(&vnet, &large);
                segments.reverse();
                segments
            })
            .collect();
        let mut packets = Vec::new();
        for index in order {
            let at = index.index(queues.len());
            packets.extend(queues[at].pop());
        }
        for (packet, at, bits) in damaged {
            if packets.is_empty() {
                continue;
            }
            let index = packet.index(packets.len());
            let packet: &mut Vec<u8> = &mut packets[index];
            // Behind what says where the packet ends.
            let at = 20 + at.index(packet.len() - 20);
            packet[at] ^= bits;
        }
        packets.retain(|packet| Ip::parse(packet).is_ok());
        let written = written(&packets, ALL);
        let out: Vec<Vec<u8>> = written.iter().flat_map(|(vnet, packet)| sent(vnet, packet)).collect();
        prop_assert_eq!(out.len(), packets.len());
        for packet in &packets {
            let flow = |other: &&Vec<u8>| key(other) == key(packet);
            let before: Vec<_> = packets.iter().filter(flow).map(|packet| plain(packet)).collect();
            let after: Vec<_> = out.iter().filter(flow).map(|packet| plain(packet)).collect();
            prop_assert_eq!(before, after);
        }
    }

    #[test]
    fn nothing_is_merged_that_differs(
        (mut shape, bytes, size) in stream(),
        what in 0usize..9,
    ) {
        shape.flags = 0x10;
        shape.dont_fragment = false;
        shape.options = vec![7];
        prop_assume!(bytes.len() >= 4 && shape.ttl < 255);
        let (first, second) = bytes.split_at(bytes.len() / 2);
        let first = &first[..first.len().min(usize::from(size))];
        let second = &second[..second.len().min(first.len())];
        let mut next = shape.clone();
        next.seq = next.seq.wrapping_add(first.len() as u32);
        next.id = next.id.wrapping_add(1);
        let continued = written(&[shape.packet(first), next.packet(second)], ALL);
        prop_assert_eq!(continued.len(), 1, "what continues is merged");
        let tcp_only = match what {
            0 => { next.tos += 8; false }
            1 => { next.ttl += 1; false }
            2 => { next.host += 1; false }
            3 => { next.ports.0 += 9; false }
            4 => { next.window += 1; true }
            5 => { next.ack += 1; true }
            6 => { next.seq = next.seq.wrapping_add(1); true }
            7 => { next.options[0] += 1; true }
            _ => { next.flags |= 0x40; true }
        };
        if tcp_only && shape.udp {
            return Ok(());
        }
        let packets = [shape.packet(first), next.packet(second)];
        let apart = written(&packets, ALL);
        prop_assert_eq!(apart.len(), 2);
        prop_assert_eq!(&apart[0].1, &packets[0]);
        prop_assert_eq!(&apart[1].1, &packets[1]);
    }

    /// A segment that closed its packet, then one that may not join: the third must not pass it.
    #[test]
    fn a_closed_packet_is_not_passed((mut shape, bytes, _) in stream(), flags in prop_oneof![Just(0x11u8), Just(0x18), Just(0x14), Just(0x10)]) {
        shape.udp = false;
        shape.dont_fragment = true;
        let mut packets = Vec::new();
        for (index, chunk) in bytes.chunks(97).take(9).enumerate() {
            shape.flags = if index % 3 == 1 { flags } else { 0x10 };
            packets.push(shape.packet(chunk));
            shape.seq = shape.seq.wrapping_add(chunk.len() as u32);
            if index % 4 == 3 {
                // An acknowledgement alone: what follows it continues what went before it.
                shape.flags = 0x10;
                packets.push(shape.packet(&[]));
            }
            shape.window += u16::from(index % 4 == 2);
        }
        let out: Vec<_> = written(&packets, ALL)
            .iter()
            .flat_map(|(vnet, packet)| sent(vnet, packet))
            .map(|packet| plain(&packet))
            .collect();
        let packets: Vec<_> = packets.iter().map(|packet| plain(packet)).collect();
        prop_assert_eq!(out, packets);
    }

    #[test]
    fn a_damaged_packet_is_never_merged((mut shape, bytes, size) in stream(), at: prop::sample::Index, bits in 1u8..) {
        shape.flags = 0x10;
        let (vnet, large) = shape.large(&bytes, size);
        let mut packets = sent(&vnet, &large);
        prop_assume!(packets.len() > 1);
        let index = at.index(packets.len());
        let last = packets[index].len() - 1;
        packets[index][last] ^= bits;
        let written = written(&packets, ALL);
        let alone = |(vnet, packet): &(Vnet, Vec<u8>)| {
            *vnet == Vnet::default() && *packet == packets[index]
        };
        prop_assert!(written.iter().any(alone));

    }

    /// What stands behind a packet in its datagram is no part of it, merged or not.
    #[test]
    fn bytes_behind_a_packet_are_left_out((mut shape, bytes, size) in stream(), behind in 1usize..40) {
        shape.flags = 0x10;
        let (vnet, large) = shape.large(&bytes, size);
        let mut packets = sent(&vnet, &large);
        prop_assume!(packets.len() > 1);
        // The second is longer than it says.
        let len = packets[1].len();
        packets[1].resize(len + behind, 0xaa);
        let unverified = Merge { verify: false, ..ALL };
        let total: usize = written(&packets, unverified)
            .iter()
            .flat_map(|(vnet, packet)| sent(vnet, packet))
            .map(|segment| segment.len())
            .sum();
        prop_assert_eq!(total, packets.iter().map(Vec::len).sum::<usize>() - behind);
    }

    #[test]
    fn what_the_kernel_does_not_take_is_not_merged((shape, bytes, size) in stream()) {
        let (vnet, large) = shape.large(&bytes, size);
        let packets = sent(&vnet, &large);
        let none = Merge { tcp: shape.udp, udp: !shape.udp, verify: true };
        prop_assert_eq!(written(&packets, none).len(), packets.len());
    }

    #[test]
    fn sums_are_those_of_the_rfc(bytes in prop::collection::vec(any::<u8>(), 0..5000), old: u16, at: prop::sample::Index) {
        let sum = Sum::new().with(&bytes);
        prop_assert_eq!(sum.partial() % 0xffff, slow_sum(&[&bytes]) % 0xffff);
        prop_assert_eq!(sum.checksum(), !sum.partial());
        let cut = at.index(bytes.len() / 2 + 1) * 2;
        let (a, b) = bytes.split_at(cut.min(bytes.len()));
        prop_assert_eq!(Sum::new().with(a).with(b).checksum(), sum.checksum());
        // A header in which one word changes.
        let mut header = [old.to_be_bytes(), [1, 2], [3, 4]].concat();
        let before = Sum::new().with(&header).checksum();
        header[..2].copy_from_slice(&(at.index(65_536) as u16).to_be_bytes());
        let after = Sum::new().with(&header).checksum();
        prop_assert_eq!(replace(before, old, at.index(65_536) as u16), after);
    }

    #[test]
    fn a_hop_costs_one_and_keeps_the_checksum(shape in shape()) {
        let mut packet = shape.packet(b"x");
        let ip = Ip::parse(&packet).expect("made whole");
        let before = packet.clone();
        prop_assert_eq!(decrement_ttl(&ip, &mut packet), shape.ttl > 1);
        if shape.ttl <= 1 {
            prop_assert_eq!(packet, before);
        } else {
            let after = Ip::parse(&packet).expect("still whole");
            prop_assert_eq!(after.ttl, shape.ttl - 1);
            prop_assert!(header_is_valid(&after, &packet));
            prop_assert!(is_right(&packet));
        }
    }

    #[test]
    fn messages_hold_every_packet_once_in_order(
        packets in prop::collection::vec((0u32..3, 1u16..2000, 0u32..2), 0..300),
        v6: bool,
        segments in 0u16..80,
    ) {
        let family = if v6 { Family::V6 } else { Family::V4 };
        let mut grouper = Grouper::new(family, segments);
        let mut at = 0;
        let mut given = Vec::new();
        for (peer, len, gap) in packets {
            at += gap;
            let len = if len > 1000 { 1000 } else { len };
            grouper.push(peer, at, len);
            given.push((peer, at, len));
            at += u32::from(len);
        }
        let mut got = Vec::new();
        for message in grouper.messages() {
            prop_assert!(message.len() <= max_bytes(family));
            prop_assert!(message.count <= segments.clamp(1, MAX_SEGMENTS));
            for index in 0..u32::from(message.count) {
                let start = message.start + index * u32::from(message.segment);
                let end = (start + u32::from(message.segment)).min(message.end);
                got.push((message.peer, start, (end - start) as u16));
            }
        }
        prop_assert_eq!(got, given);
    }
}

#[test]
fn nothing_passes_a_fragment() {
    let mut shape = plain_shape();
    shape.udp = true;
    let whole = shape.packet(b"datagram");
    let mut fragment = whole.clone();
    fragment[6] = 0x20;
    let sum = !slow_sum(&[&fragment[..10], &[0, 0], &fragment[12..20]]);
    fragment[10..12].copy_from_slice(&sum.to_be_bytes());
    let packets = [whole.clone(), whole.clone(), fragment, whole.clone(), whole];
    let counts: Vec<usize> = written(&packets, ALL)
        .iter()
        .map(|(vnet, packet)| sent(vnet, packet).len())
        .collect();
    assert_eq!(counts, [2, 1, 2]);
}

#[test]
fn flags_that_are_told_once_are_in_one_segment() {
    let mut shape = plain_shape();
    shape.flags = 0x99; // CWR, ACK, PSH, FIN
    let (vnet, large) = shape.large(&[7; 350], 100);
    let flags: Vec<u8> = sent(&vnet, &large)
        .iter()
        .map(|packet| packet[33])
        .collect();
    assert_eq!(flags, [0x90, 0x10, 0x10, 0x19]);
}

fn plain_shape() -> Shape {
    Shape {
        v6: false,
        udp: false,
        host: 1,
        ports: (1, 2),
        tos: 0,
        ttl: 64,
        id: 1,
        dont_fragment: true,
        seq: 1,
        ack: 1,
        window: 1,
        flags: 0x10,
        options: Vec::new(),
        label: 0,
    }
}

#[test]
fn a_remainder_opens_the_next_message() {
    let mut grouper = Grouper::new(Family::V4, 64);
    for index in 0..46 {
        grouper.push(0, index * 1472, 1472);
    }
    grouper.push(0, 46 * 1472, 1472);
    let counts: Vec<u16> = grouper.messages().iter().map(|one| one.count).collect();
    assert_eq!(counts, [44, 3]);
}

/// Addresses, protocol and ports.
fn key(packet: &[u8]) -> Vec<u8> {
    let v6 = packet[0] >> 4 == 6;
    let (at, addresses, protocol) = if v6 { (40, 8..40, 6) } else { (20, 12..20, 9) };
    [
        &packet[addresses],
        &packet[protocol..=protocol],
        &packet[at..at + 4],
    ]
    .concat()
}

/// A packet without its identification, which a packet that must not be fragmented may lose, and
/// with the one form of a checksum that has two.
fn plain(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    let (at, protocol) = if packet[0] >> 4 == 6 {
        (40, packet[6])
    } else {
        (20, packet[9])
    };
    if protocol == 6 && packet[at + 16..at + 18] == [0xff, 0xff] {
        packet[at + 16..at + 18].fill(0);
    }
    packet
}
