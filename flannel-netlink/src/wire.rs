//! The frame of netlink: messages in a datagram, attributes in a message, batches of requests.
//!
//! Reading goes attribute by attribute and looks only at those a codec asks for: an attribute of a
//! newer kernel, or one that this kernel fills in an odd way, never makes a dump fail. Writing is
//! done with the message types of `netlink-packet-route`; [`Body`] writes what they lack.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::MacAddr;
use netlink_packet_core::Emitable;

/// The length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// What the kernel sent is no netlink message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed netlink message: {0}")]
pub struct Malformed(pub(crate) &'static str);

/// Both message lengths and attribute lengths are padded to four bytes.
const fn align(len: usize) -> usize {
    len.saturating_add(3) & !3
}

/// The two bytes of a number in the machine's order.
pub(crate) fn read_u16(bytes: &[u8]) -> Result<u16, Malformed> {
    let bytes = bytes.try_into();
    bytes
        .map(u16::from_ne_bytes)
        .map_err(|_| Malformed("a 16-bit number of another length"))
}

/// The four bytes of a number in the machine's order.
pub(crate) fn read_u32(bytes: &[u8]) -> Result<u32, Malformed> {
    let bytes = bytes.try_into();
    bytes
        .map(u32::from_ne_bytes)
        .map_err(|_| Malformed("a 32-bit number of another length"))
}

/// A field of two bytes in a fixed header.
pub(crate) fn field_u16(body: &[u8], at: usize) -> Result<u16, Malformed> {
    read_u16(
        body.get(at..at + 2)
            .ok_or(Malformed("a message shorter than its header"))?,
    )
}

/// A field of four bytes in a fixed header.
pub(crate) fn field_u32(body: &[u8], at: usize) -> Result<u32, Malformed> {
    read_u32(
        body.get(at..at + 4)
            .ok_or(Malformed("a message shorter than its header"))?,
    )
}

/// A field of one byte in a fixed header.
pub(crate) fn field_u8(body: &[u8], at: usize) -> Result<u8, Malformed> {
    body.get(at)
        .copied()
        .ok_or(Malformed("a message shorter than its header"))
}

/// One byte.
pub(crate) fn read_u8(bytes: &[u8]) -> Result<u8, Malformed> {
    match bytes {
        [byte] => Ok(*byte),
        _ => Err(Malformed("a byte of another length")),
    }
}

/// An address by its length; `None`: neither 4 nor 16 bytes.
pub(crate) fn read_ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        Some(IpAddr::V4(Ipv4Addr::from(bytes)))
    } else if let Ok(bytes) = <[u8; 16]>::try_from(bytes) {
        Some(IpAddr::V6(Ipv6Addr::from(bytes)))
    } else {
        None
    }
}

/// A hardware address of six bytes; `None`: of another length.
pub(crate) fn read_mac(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr)
}

/// A text up to its closing zero; bytes that are no UTF-8 are replaced.
pub(crate) fn read_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

/// A message in a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    /// What it is (`RTM_*`, `NLMSG_*`).
    pub(crate) kind: u16,
    /// `NLM_F_*`.
    pub(crate) flags: u16,
    /// The number of the request it answers; zero if it answers none.
    pub(crate) seq: u32,
    /// What follows the header.
    pub(crate) body: &'a [u8],
}

/// The messages of a datagram. After the first malformed one there are no more.
#[derive(Debug, Clone)]
pub(crate) struct Messages<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = std::mem::take(&mut self.0);
        if rest.is_empty() {
            return None;
        }
        let parsed = (|| {
            let len = usize::try_from(read_u32(rest.get(..4)?).ok()?).ok()?;
            let message = Message {
                kind: read_u16(rest.get(4..6)?).ok()?,
                flags: read_u16(rest.get(6..8)?).ok()?,
                seq: read_u32(rest.get(8..12)?).ok()?,
                body: rest.get(HEADER..len)?,
            };
            self.0 = rest.get(align(len)..).unwrap_or_default();
            Some(message)
        })();
        Some(parsed.ok_or(Malformed("a message longer than its datagram")))
    }
}

/// The attributes of a message, or those nested in an attribute: kind (less its flag bits) and
/// value. After the first malformed one there are no more.
#[derive(Debug, Clone)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Attributes<'a> {
    /// The attributes behind a fixed header of a message.
    pub(crate) fn after(body: &'a [u8], header: usize) -> Result<Self, Malformed> {
        body.get(header..)
            .map(Self)
            .ok_or(Malformed("a message shorter than its header"))
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        /// `NLA_TYPE_MASK`: less the bits for nested and for network byte order.
        const KIND: u16 = 0x3fff;
        let rest = std::mem::take(&mut self.0);
        // Fewer bytes than a header are padding, as in the kernel's own nla_ok().
        if rest.len() < 4 {
            return None;
        }
        let parsed = (|| {
            let len = usize::from(read_u16(rest.get(..2)?).ok()?);
            let kind = read_u16(rest.get(2..4)?).ok()? & KIND;
            let value = rest.get(4..len)?;
            self.0 = rest.get(align(len)..).unwrap_or_default();
            Some((kind, value))
        })();
        Some(parsed.ok_or(Malformed("an attribute longer than its message")))
    }
}

/// A message body that `netlink-packet-route` has no type for: a fixed header and attributes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Body(Vec<u8>);

impl Body {
    /// A body that starts with a fixed header, which must be a multiple of four bytes.
    pub(crate) fn new(header: &[u8]) -> Self {
        debug_assert!(
            header.len().is_multiple_of(4),
            "headers of netlink are aligned"
        );
        let mut bytes = Vec::with_capacity(64);
        bytes.extend_from_slice(header);
        Self(bytes)
    }

    /// Appends an attribute. Its value must be shorter than 64 KiB, as all of ours are.
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(align(self.0.len()), 0);
    }

    /// Appends an address.
    pub(crate) fn ip(&mut self, kind: u16, ip: IpAddr) {
        match ip {
            IpAddr::V4(ip) => self.attribute(kind, &ip.octets()),
            IpAddr::V6(ip) => self.attribute(kind, &ip.octets()),
        }
    }

    /// Appends an attribute that holds others.
    pub(crate) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        /// `NLA_F_NESTED`.
        const NESTED: u16 = 0x8000;
        let mut inner = Self::default();
        fill(&mut inner);
        self.attribute(kind | NESTED, &inner.0);
    }
}

impl Emitable for Body {
    fn buffer_len(&self) -> usize {
        self.0.len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0);
    }
}

/// Requests that go out in one datagram, each of which the kernel answers by itself.
///
/// Public for the crate's own tests and benchmarks only.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl Batch {
    /// Appends a request. `NLM_F_REQUEST` is set by itself.
    pub(crate) fn push(&mut self, kind: u16, flags: u16, body: &impl Emitable) {
        /// `NLM_F_REQUEST`.
        const REQUEST: u16 = 0x01;
        let start = self.bytes.len();
        let len = HEADER + body.buffer_len();
        self.bytes.resize(start + align(len), 0);
        self.starts.push(start);
        let message = &mut self.bytes[start..start + len];
        let (header, payload) = message.split_at_mut(HEADER);
        header[0..4].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_ne_bytes());
        header[4..6].copy_from_slice(&kind.to_ne_bytes());
        header[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
        body.emit(payload);
    }

    /// How many requests there are.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The datagram.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.starts.clear();
    }

    /// Numbers the requests from a first sequence number on.
    pub fn number(&mut self, first: u32) {
        let mut seq = first;
        for start in &self.starts {
            self.bytes[start + 8..start + 12].copy_from_slice(&seq.to_ne_bytes());
            seq = seq.wrapping_add(1);
        }
    }

    /// Asks for an acknowledgement of each request, or of the last one only: refusals are told
    /// in any case.
    pub fn acknowledge(&mut self, each: bool) {
        const NLM_F_ACK: u16 = 0x04;
        let last = self.starts.last().copied();
        for start in &self.starts {
            if each || Some(*start) == last {
                let flags = u16::from_ne_bytes([self.bytes[start + 6], self.bytes[start + 7]]);
                self.bytes[start + 6..start + 8]
                    .copy_from_slice(&(flags | NLM_F_ACK).to_ne_bytes());
            }
        }
    }
}
