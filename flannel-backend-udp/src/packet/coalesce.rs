//! From the packets that came to the packets that are written: consecutive segments of one stream
//! become one large packet, which the kernel handles at the price of one.
//!
//! # Why a flow's packets stay in order
//!
//! What is to be written is a list in the order of its beginnings. A packet either joins the *last*
//! entry of its own flow or becomes a new entry at the list's end; it never joins an older one. So
//! within a flow the list is in the order of arrival. What has no ports to tell its flow by (a
//! fragment) ends all flows' entries.
//!
//! # What is merged
//!
//! Two segments of TCP that continue one another and agree in everything else that their headers
//! say: addresses, ports, type of service, TTL, flow label, acknowledgement, window, all options.
//! Only ACK and PSH may be set; IP options and fragments are left alone. A shorter segment or PSH
//! is the last of its packet. Datagrams of UDP: of one flow, equally long, the last may be shorter.
//! The checksums are verified first, because a merged packet is one that the kernel believes.

use std::net::IpAddr;
use std::ops::Range;

use super::checksum::Sum;
use super::ip::{self, Fragment, Ip};
use super::split::{ACK, PSH};
use super::vnet::{Kind, Segments, Unfinished, Vnet};
use super::{be16, be32, flow, put16};

/// The most bytes of a merged packet.
const MAX_TOTAL: u32 = 65_535;
/// The most parts of one packet: `writev` takes 1,024, two of which are headers.
const MAX_PARTS: u16 = 1_000;
/// The most datagrams of one packet that every kernel takes.
const MAX_DATAGRAMS: u16 = 64;
/// IPv6 and the longest header of TCP.
const MAX_HEADERS: usize = 100;
/// Slots for flows; a flow that loses its slot to another begins a new entry.
const SLOTS: usize = 256;
const NONE: u32 = u32::MAX;

/// What the kernel takes merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merge {
    /// Streams of TCP.
    pub tcp: bool,
    /// Datagrams of UDP.
    pub udp: bool,
    /// Checksums are verified before.
    pub verify: bool,
}

/// One packet to be written.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    kind: Option<Kind>,
    open: bool,
    /// The first packet: where it stands, with its header.
    start: u32,
    len: u32,
    headers: u16,
    transport: u16,
    /// Bytes of payload of the first.
    size: u16,
    /// Packets merged.
    count: u16,
    /// Bytes of the merged packet.
    total: u32,
    next_seq: u32,
    next_id: u16,
    push: bool,
    /// Parts behind the first packet, as a list.
    first_part: u32,
    last_part: u32,
    steer: u32,
}

#[derive(Debug, Clone, Copy)]
struct Part {
    start: u32,
    len: u32,
    next: u32,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    generation: u32,
    entry: u32,
}

/// Makes large packets of small ones. The packets themselves stay where they are, in one buffer,
/// and are named by their place in it.
#[derive(Debug)]
pub struct Coalescer {
    merge: Merge,
    entries: Vec<Entry>,
    parts: Vec<Part>,
    slots: Box<[Slot]>,
    generation: u32,
    /// The entry that the last packet is part of, if others may be.
    trail: Option<Trail>,
}

/// Where the packet that comes next is likely to belong.
#[derive(Debug, Clone, Copy)]
struct Trail {
    entry: u32,
    /// Made when it is first needed.
    same: Option<Same>,
}

/// The sums of what the headers of an entry's packets have in common.
#[derive(Debug, Clone, Copy)]
struct Same {
    /// Of the IPv4 header, without length, identification and checksum.
    ip: Sum,
    /// Of addresses and protocol.
    pseudo: Sum,
}

/// What makes a packet one that can be merged.
struct Candidate {
    kind: Kind,
    headers: usize,
    /// Nothing may follow it.
    last: bool,
}

impl Coalescer {
    /// One that merges what is named.
    pub fn new(merge: Merge) -> Self {
        let slot = Slot {
            generation: 0,
            entry: 0,
        };
        Self {
            merge,
            entries: Vec::with_capacity(4096),
            parts: Vec::with_capacity(4096),
            slots: vec![slot; SLOTS].into_boxed_slice(),
            generation: 1,
            trail: None,
        }
    }

    /// From now on merges what is named.
    pub fn set_merge(&mut self, merge: Merge) {
        self.merge = merge;
    }

    /// Adds a packet that stands at `start` in `buffer` and whose header is `ip`.
    pub fn push(&mut self, buffer: &[u8], start: usize, ip: &Ip) {
        let Some(packet) = buffer.get(start..start + ip.total) else {
            return;
        };
        self.trail = None;
        let steer = flow::symmetric_hash(ip, packet);
        if !matches!(ip.protocol, ip::TCP | ip::UDP) {
            self.begin(start, ip, steer, None, packet);
            return;
        }
        if ip.options || ip.fragment != Fragment::Whole || packet.len() < ip.header + 8 {
            self.end_all_flows();
            self.begin(start, ip, steer, None, packet);
            return;
        }
        let slot = flow::hash(ip, packet) as usize % SLOTS;
        let candidate = self.candidate(ip, packet);
        if let Some(candidate) = &candidate
            && self.slots[slot].generation == self.generation
            && self.join(self.slots[slot].entry, buffer, start, ip, candidate)
        {
            self.set_trail(self.slots[slot].entry);
            return;
        }
        self.slots[slot] = Slot {
            generation: self.generation,
            entry: self.entries.len() as u32,
        };
        self.begin(start, ip, steer, candidate, packet);
        self.set_trail(self.slots[slot].entry);
    }

    /// Adds the packet that stands at `place` in `buffer` if its headers say that it continues the
    /// packet that was added last: then it has the same source and destination. Otherwise it is not
    /// added and `false` returned. What is added is what [`push`](Self::push) would make of it.
    pub fn follow(&mut self, buffer: &[u8], place: Range<usize>) -> bool {
        let Some(Trail { entry: index, same }) = self.trail else {
            return false;
        };
        let (Some(entry), Some(packet)) =
            (self.entries.get(index as usize), buffer.get(place.clone()))
        else {
            return false;
        };
        let (at, headers) = (usize::from(entry.transport), usize::from(entry.headers));
        let start = entry.start as usize;
        let (Some(kind), Some(first), Some(head)) = (
            entry.kind,
            buffer.get(start..start + headers),
            packet.get(..headers),
        ) else {
            return false;
        };
        let is_v4 = first[0] >> 4 == 4;
        let len = match is_v4 {
            true => usize::from(be16(head, 2)),
            false => 40 + usize::from(be16(head, 4)),
        };
        let payload = packet.len() - headers;
        let (is_plain, last) = match kind {
            Kind::Udp => {
                let whole = usize::from(be16(head, at + 4)) == packet.len() - at;
                (whole && be16(head, at + 6) != 0, false)
            }
            Kind::Tcp4 | Kind::Tcp6 => (head[at + 13] & !PSH == ACK, head[at + 13] & PSH != 0),
        };
        let continues = len == packet.len()
            && payload > 0
            && is_plain
            && entry.takes(kind, headers, payload)
            && same_flow(is_v4, at, kind, first, head, entry);
        if !continues {
            return false;
        }
        if self.merge.verify {
            let same = same.unwrap_or_else(|| Same::of(is_v4, kind, first));
            self.trail = Some(Trail {
                entry: index,
                same: Some(same),
            });
            if !same.is_valid(is_v4, at, packet) {
                return false;
            }
        }
        self.append(index, place.start + headers, payload, be16(packet, 4), last);
        true
    }

    /// What is to be written, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The places of what follows an entry's first packet: payload alone.
    pub fn parts(&self, entry: &Entry) -> impl Iterator<Item = (usize, usize)> + Clone {
        let mut next = entry.first_part;
        std::iter::from_fn(move || {
            let part = self.parts.get(next as usize)?;
            next = part.next;
            Some((part.start as usize, part.len as usize))
        })
    }

    /// Forgets all packets.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.parts.clear();
        self.trail = None;
        self.end_all_flows();
    }

    fn set_trail(&mut self, entry: u32) {
        self.trail = Some(Trail { entry, same: None });
    }

    fn end_all_flows(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if self.generation == 0 {
            // After four billion batches a slot could look as if it were of this one.
            self.generation = 1;
            for slot in &mut self.slots {
                slot.generation = 0;
            }
        }
    }

    fn begin(
        &mut self,
        start: usize,
        ip: &Ip,
        steer: u32,
        candidate: Option<Candidate>,
        packet: &[u8],
    ) {
        let mut entry = Entry {
            kind: None,
            open: false,
            start: start as u32,
            len: ip.total as u32,
            headers: 0,
            transport: ip.header as u16,
            size: 0,
            count: 1,
            total: ip.total as u32,
            next_seq: 0,
            next_id: 0,
            push: false,
            first_part: NONE,
            last_part: NONE,
            steer,
        };
        if let Some(candidate) = candidate {
            let payload = ip.total - candidate.headers;
            entry.kind = Some(candidate.kind);
            entry.open = !candidate.last;
            entry.headers = candidate.headers as u16;
            entry.size = payload as u16;
            entry.next_seq = be32(packet, ip.header + 4).wrapping_add(payload as u32);
            entry.next_id = be16(packet, 4).wrapping_add(1);
        }
        self.entries.push(entry);
    }

    /// Whether a packet can be part of a merged one. Everything that is cheap is asked first.
    fn candidate(&self, ip: &Ip, packet: &[u8]) -> Option<Candidate> {
        let at = ip.header;
        let (kind, headers, last) = if ip.protocol == ip::TCP {
            if !self.merge.tcp || packet.len() < at + 20 {
                return None;
            }
            let headers = at + usize::from(packet[at + 12] >> 4) * 4;
            let flags = packet[at + 13];
            let reserved = packet[at + 12] & 0xf;
            if headers < at + 20 || flags & !PSH != ACK || reserved != 0 {
                return None;
            }
            let kind = match ip.src {
                IpAddr::V4(_) => Kind::Tcp4,
                IpAddr::V6(_) => Kind::Tcp6,
            };
            (kind, headers, flags & PSH != 0)
        } else {
            let whole = usize::from(be16(packet, at + 4)) == packet.len() - at;
            if !self.merge.udp || !whole || be16(packet, at + 6) == 0 {
                return None;
            }
            (Kind::Udp, at + 8, false)
        };
        if headers >= packet.len() || headers > MAX_HEADERS {
            return None;
        }
        let valid = !self.merge.verify
            || (ip::header_is_valid(ip, packet) && transport_is_valid(ip, packet));
        valid.then_some(Candidate {
            kind,
            headers,
            last,
        })
    }

    fn join(
        &mut self,
        index: u32,
        buffer: &[u8],
        start: usize,
        ip: &Ip,
        candidate: &Candidate,
    ) -> bool {
        let Some(entry) = self.entries.get(index as usize) else {
            return false;
        };
        let headers = candidate.headers;
        let payload = ip.total - headers;
        if !entry.takes(candidate.kind, headers, payload) {
            return false;
        }
        let is_v4 = matches!(ip.src, IpAddr::V4(_));
        let first = &buffer[entry.start as usize..entry.start as usize + headers];
        let packet = &buffer[start..start + headers];
        if !same_flow(is_v4, ip.header, candidate.kind, first, packet, entry) {
            return false;
        }
        let id = be16(packet, 4);
        self.append(index, start + headers, payload, id, candidate.last);
        true
    }

    /// Makes a payload part of an entry.
    fn append(&mut self, index: u32, start: usize, payload: usize, id: u16, last: bool) {
        let Some(entry) = self.entries.get_mut(index as usize) else {
            return;
        };
        let part = self.parts.len() as u32;
        self.parts.push(Part {
            start: start as u32,
            len: payload as u32,
            next: NONE,
        });
        match self.parts.get_mut(entry.last_part as usize) {
            Some(last) => last.next = part,
            None => entry.first_part = part,
        }
        entry.last_part = part;
        entry.count += 1;
        entry.total += payload as u32;
        entry.next_seq = entry.next_seq.wrapping_add(payload as u32);
        entry.next_id = id.wrapping_add(1);
        entry.push = last;
        entry.open = !last && payload == usize::from(entry.size);
    }
}

impl Entry {
    /// Whether it takes so much payload more, as far as its form goes.
    fn takes(&self, kind: Kind, headers: usize, payload: usize) -> bool {
        let most = match kind {
            Kind::Udp => MAX_DATAGRAMS,
            Kind::Tcp4 | Kind::Tcp6 => MAX_PARTS,
        };
        self.open
            && self.kind == Some(kind)
            && usize::from(self.headers) == headers
            && payload <= usize::from(self.size)
            && self.count < most
            && self.total + payload as u32 <= MAX_TOTAL
    }

    /// How many packets it is made of.
    pub const fn count(&self) -> u16 {
        self.count
    }

    /// Bytes of the packet.
    pub const fn total(&self) -> u32 {
        self.total
    }

    /// Bytes before the payload of each of its packets; 0 if it can only be single.
    pub const fn headers(&self) -> usize {
        self.headers as usize
    }

    /// Where its first packet stands in the buffer.
    pub const fn first(&self) -> (usize, usize) {
        (self.start as usize, self.len as usize)
    }

    /// A number that both directions of its flow share.
    pub const fn steer(&self) -> u32 {
        self.steer
    }

    /// Makes the headers of the packet: of a single one there is nothing to make, and it is written
    /// as it came. Else the headers are put into `head`, and the packet is these, then the first
    /// packet's payload, then the parts.
    pub fn make_head(&self, buffer: &[u8], head: &mut [u8; 128]) -> (Vnet, usize) {
        let headers = usize::from(self.headers);
        let start = self.start as usize;
        let (Some(kind), true, Some(first)) = (
            self.kind,
            self.count > 1 && headers <= MAX_HEADERS,
            buffer.get(start..start + headers),
        ) else {
            return (Vnet::default(), 0);
        };
        let at = usize::from(self.transport);
        let head = &mut head[..headers];
        head.copy_from_slice(first);
        let family_is_v4 = head[0] >> 4 == 4;
        if family_is_v4 {
            put16(head, 2, self.total as u16);
            put16(head, 10, 0);
            let sum = Sum::new().with(&head[..at]).checksum();
            put16(head, 10, sum);
        } else {
            put16(head, 4, (self.total - 40) as u16);
        }
        let (protocol, place) = match kind {
            Kind::Udp => {
                put16(head, at + 4, (self.total as usize - at) as u16);
                (ip::UDP, 6)
            }
            Kind::Tcp4 | Kind::Tcp6 => {
                if self.push {
                    head[at + 13] |= PSH;
                }
                (ip::TCP, 16)
            }
        };
        let addresses = if family_is_v4 { 12..20 } else { 8..40 };
        let len = self.total - at as u32;
        let partial = Sum::new()
            .with(&head[addresses])
            .with(&len.to_be_bytes())
            .with(&[0, protocol])
            .partial();
        put16(head, at + place, partial);
        let vnet = Vnet {
            checksum: Some(Unfinished {
                start: at as u16,
                offset: place as u16,
            }),
            segments: Some(Segments {
                kind,
                size: self.size,
                headers: self.headers,
            }),
        };
        (vnet, headers)
    }
}

impl Same {
    fn of(is_v4: bool, kind: Kind, first: &[u8]) -> Self {
        let protocol = match kind {
            Kind::Udp => ip::UDP,
            Kind::Tcp4 | Kind::Tcp6 => ip::TCP,
        };
        let addresses = Sum::new().with(&first[if is_v4 { 12..20 } else { 8..40 }]);
        Self {
            ip: addresses.with(&first[..2]).with(&first[6..10]),
            pseudo: addresses.with(&[0, protocol]),
        }
    }

    /// Whether the checksums of a packet with headers like these are right.
    fn is_valid(&self, is_v4: bool, at: usize, packet: &[u8]) -> bool {
        let len = (packet.len() - at) as u32;
        let of_ip = || {
            let sum = self.ip.with(&packet[2..6]).with(&packet[10..12]);
            !is_v4 || sum.is_valid()
        };
        of_ip() && self.pseudo.with_u32(len).with(&packet[at..]).is_valid()
    }
}

/// Whether a packet continues the entry that `first` begins. Both are headers of the same length,
/// the transport's at `at`.
fn same_flow(
    is_v4: bool,
    at: usize,
    kind: Kind,
    first: &[u8],
    packet: &[u8],
    entry: &Entry,
) -> bool {
    let same_ip = match is_v4 {
        true => {
            // Version, type of service; flags; TTL, protocol; addresses. The identification counts
            // up as it does in segments that a kernel cut, or means nothing (RFC 6864).
            let whole = packet[6] & 0x40 != 0;
            first[..2] == packet[..2]
                && first[6..10] == packet[6..10]
                && first[12..20] == packet[12..20]
                && (whole || be16(packet, 4) == entry.next_id)
        }
        // Version, class, flow label; next header, hop limit, addresses.
        false => first[..4] == packet[..4] && first[6..40] == packet[6..40],
    };
    if !same_ip || first[at..at + 4] != packet[at..at + 4] {
        return false;
    }
    match kind {
        Kind::Udp => true,
        Kind::Tcp4 | Kind::Tcp6 => {
            // Acknowledgement and length of the header; window; options.
            be32(packet, at + 4) == entry.next_seq
                && first[at + 8..at + 13] == packet[at + 8..at + 13]
                && first[at + 14..at + 16] == packet[at + 14..at + 16]
                && first[at + 18..] == packet[at + 18..]
        }
    }
}

fn transport_is_valid(ip: &Ip, packet: &[u8]) -> bool {
    let transport = &packet[ip.header..];
    ip.pseudo_header(packet, transport.len())
        .with(transport)
        .is_valid()
}
