//! From one large packet of the kernel to the packets that are sent: what a network card does for
//! a kernel that leaves segmentation to it.

use flannel_core::Family;

use super::checksum::Sum;
use super::ip::{self, Fragment, Ip};
use super::vnet::{Kind, Unfinished, Vnet};
use super::{Malformed, be16, be32, put16, put32};

pub(super) const FIN: u8 = 0x01;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;
const CWR: u8 = 0x80;
/// The most bytes of headers: IP with options or extensions, and TCP with options.
pub const MAX_HEADERS: usize = 256;

/// Finishes the checksum of a packet that is not cut.
///
/// # Errors
///
/// [`Malformed::Offload`]: the place of the checksum is not in the packet.
pub fn complete(packet: &mut [u8], unfinished: Unfinished) -> Result<(), Malformed> {
    let start = usize::from(unfinished.start);
    let place = start + usize::from(unfinished.offset);
    if place + 2 > packet.len() {
        return Err(Malformed::Offload);
    }
    let sum = Sum::new().with(&packet[start..]).checksum();
    // UDP says "no checksum" with 0, and has 0xffff for the sum that is 0. TCP does not mind.
    put16(packet, place, if sum == 0 { 0xffff } else { sum });
    Ok(())
}

/// The segments of one packet, written one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Splitter<'a> {
    /// All headers.
    head: &'a [u8],
    /// What follows them, unless it stands in its place already.
    payload: &'a [u8],
    ip: Ip,
    kind: Kind,
    /// Bytes of all payload.
    len: usize,
    /// Bytes of payload per segment.
    size: usize,
    /// Segments written so far.
    next: usize,
    count: usize,
    same: Same,
}

/// The sums of what all segments' headers have in common.
#[derive(Debug, Clone, Copy)]
struct Same {
    /// Of the IPv4 header, without length, identification and checksum.
    ip: Sum,
    /// Of what the transport's checksum covers, without lengths, sequence number, flags, checksum
    /// and payload.
    transport: Sum,
}

impl Same {
    fn of(head: &[u8], ip: &Ip, kind: Kind) -> Self {
        let (addresses, transport) = (&head[ip.addresses()], &head[ip.header..]);
        let both = Sum::new().with(addresses);
        Self {
            ip: match ip.family() {
                Family::V4 => both
                    .with(&head[..2])
                    .with(&head[6..10])
                    .with(&head[20..ip.header]),
                Family::V6 => Sum::new(),
            },
            transport: match kind {
                Kind::Udp => both.with(&[0, ip::UDP]).with(&transport[..4]),
                Kind::Tcp4 | Kind::Tcp6 => both
                    .with(&[0, ip::TCP])
                    .with(&transport[..4])
                    .with(&transport[8..12])
                    .with(&transport[14..16])
                    .with(&transport[18..]),
            },
        }
    }
}

impl<'a> Splitter<'a> {
    /// Prepares to cut a packet.
    ///
    /// # Errors
    ///
    /// [`Malformed::Offload`]: the header asks for something that does not fit the packet.
    pub fn new(vnet: &Vnet, ip: &Ip, packet: &'a [u8]) -> Result<Self, Malformed> {
        let packet = packet.get(..ip.total).ok_or(Malformed::TotalLength)?;
        let this = Self::in_place(vnet, ip, packet)?;
        Ok(Self {
            payload: &packet[this.head.len()..],
            ..this
        })
    }

    /// Prepares to cut a packet of which no more is at hand than its headers: the payload of each
    /// segment stands where it belongs already ([`Layout`](super::layout::Layout)), so only
    /// [`head_next`](Self::head_next) is of use.
    ///
    /// # Errors
    ///
    /// [`Malformed::Offload`]: the header asks for something that does not fit the packet.
    pub fn in_place(vnet: &Vnet, ip: &Ip, packet: &'a [u8]) -> Result<Self, Malformed> {
        let segments = vnet.segments.ok_or(Malformed::Offload)?;
        let (protocol, family) = match segments.kind {
            Kind::Tcp4 => (ip::TCP, Family::V4),
            Kind::Tcp6 => (ip::TCP, Family::V6),
            Kind::Udp => (ip::UDP, ip.family()),
        };
        if ip.protocol != protocol || ip.family() != family || ip.fragment != Fragment::Whole {
            return Err(Malformed::Offload);
        }
        let transport = match segments.kind {
            Kind::Udp => 8,
            Kind::Tcp4 | Kind::Tcp6 => {
                let offset = packet.get(ip.header + 12).ok_or(Malformed::Short)?;
                let len = usize::from(offset >> 4) * 4;
                if len < 20 {
                    return Err(Malformed::HeaderLength);
                }
                len
            }
        };
        let headers = ip.header + transport;
        let size = usize::from(segments.size);
        if headers > ip.total || headers > MAX_HEADERS || size == 0 {
            return Err(Malformed::Offload);
        }
        if headers + size > usize::from(u16::MAX) {
            return Err(Malformed::Offload);
        }
        let len = ip.total - headers;
        let head = packet.get(..headers).ok_or(Malformed::Offload)?;
        Ok(Self {
            same: Same::of(head, ip, segments.kind),
            head,
            payload: &[],
            ip: *ip,
            kind: segments.kind,
            len,
            size,
            next: 0,
            count: len.div_ceil(size).max(1),
        })
    }

    /// How many segments there are; at least 1.
    pub const fn count(&self) -> usize {
        self.count
    }

    /// Bytes of the headers of each segment.
    pub const fn headers(&self) -> usize {
        self.head.len()
    }

    /// Bytes of payload of each segment but the last.
    pub const fn size(&self) -> usize {
        self.size
    }

    /// Bytes of the largest segment.
    pub const fn largest(&self) -> usize {
        self.head.len()
            + if self.len < self.size {
                self.len
            } else {
                self.size
            }
    }

    /// Bytes of all segments together.
    pub const fn total(&self) -> usize {
        self.len + self.count * self.head.len()
    }

    /// Writes the next segment to the beginning of `out` and returns its length; `None` when all
    /// are written or there is no room.
    pub fn write_next(&mut self, out: &mut [u8]) -> Option<usize> {
        let from = self.next * self.size;
        let to = (from + self.size).min(self.len);
        let payload = self.payload.get(from..to)?;
        let place = self.head.len()..self.head.len() + payload.len();
        out.get_mut(place)?.copy_from_slice(payload);
        self.head_next(out)
    }

    /// Writes the headers of the next segment to the beginning of `out`, where its payload stands
    /// behind them already, and returns the segment's length; `None` when all are written or there
    /// is no room.
    pub fn head_next(&mut self, out: &mut [u8]) -> Option<usize> {
        if self.next == self.count {
            return None;
        }
        let len = self.head.len() + (self.len - self.next * self.size).min(self.size);
        let (head, body) = out.get_mut(..len)?.split_at_mut(self.head.len());
        head.copy_from_slice(self.head);
        self.write_ip(head, len);
        let (first, last) = (self.next == 0, self.next + 1 == self.count);
        match self.kind {
            Kind::Udp => self.write_udp(head, body),
            Kind::Tcp4 | Kind::Tcp6 => self.write_tcp(head, body, first, last),
        }
        self.next += 1;
        Some(len)
    }

    fn write_ip(&self, head: &mut [u8], len: usize) {
        match self.ip.family() {
            Family::V4 => {
                let len = len as u16;
                let id = be16(head, 4).wrapping_add(self.next as u16);
                put16(head, 2, len);
                put16(head, 4, id);
                put16(head, 10, self.same.ip.with_u16(len).with_u16(id).checksum());
            }
            Family::V6 => put16(head, 4, (len - 40) as u16),
        }
    }

    fn write_udp(&self, head: &mut [u8], body: &[u8]) {
        let at = self.ip.header;
        let len = (8 + body.len()) as u16;
        put16(head, at + 4, len);
        // The length counts twice: in the header, and beside the addresses.
        let sum = self.same.transport.with_u16(len).with_u16(len);
        let sum = sum.with(body).checksum();
        put16(head, at + 6, if sum == 0 { 0xffff } else { sum });
    }

    fn write_tcp(&self, head: &mut [u8], body: &[u8], first: bool, last: bool) {
        let at = self.ip.header;
        let seq = be32(head, at + 4).wrapping_add((self.next * self.size) as u32);
        put32(head, at + 4, seq);
        if !first {
            head[at + 13] &= !CWR;
        }
        if !last {
            head[at + 13] &= !(FIN | PSH);
        }
        let len = head.len() - at + body.len();
        let sum = self.same.transport.with_u32(len as u32).with_u32(seq);
        let sum = sum.with_u16(be16(head, at + 12)).with(body).checksum();
        put16(head, at + 16, sum);
    }
}
