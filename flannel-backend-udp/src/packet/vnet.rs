//! The ten bytes before each packet of a TUN queue, of which the kernel and a program tell one
//! another what is left to be done (`struct virtio_net_hdr`).

/// Bytes of the header.
pub const LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// Says that CWR stands in the first segment only; on its own it means nothing.
const GSO_ECN: u8 = 0x80;

/// What is left to be done to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Vnet {
    /// The checksum holds the sum of the pseudo header alone and is to be finished.
    pub checksum: Option<Unfinished>,
    /// The packet is to be cut.
    pub segments: Option<Segments>,
}

/// Where a checksum is that is not finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unfinished {
    /// From where on the packet is summed: the header of TCP or UDP.
    pub start: u16,
    /// Where behind that the checksum stands.
    pub offset: u16,
}

/// How a packet is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segments {
    /// What is cut.
    pub kind: Kind,
    /// Bytes of payload of each segment but the last; not 0.
    pub size: u16,
    /// Bytes of all headers, as the kernel wants to hear it. Not to be believed when read.
    pub headers: u16,
}

/// What protocol is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// Datagrams of UDP, over either.
    Udp,
}

impl Vnet {
    /// Reads a header; `None` for a kind that was not asked for, or a size of 0.
    pub fn decode(bytes: &[u8; LEN]) -> Option<Self> {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let kind = match bytes[1] & !GSO_ECN {
            0 => None,
            GSO_TCPV4 => Some(Kind::Tcp4),
            GSO_TCPV6 => Some(Kind::Tcp6),
            GSO_UDP_L4 => Some(Kind::Udp),
            _ => return None,
        };
        let segments = kind.map(|kind| Segments {
            kind,
            size: word(4),
            headers: word(2),
        });
        if segments.is_some_and(|segments| segments.size == 0) {
            return None;
        }
        let checksum = (bytes[0] & NEEDS_CSUM != 0).then(|| Unfinished {
            start: word(6),
            offset: word(8),
        });
        Some(Self { checksum, segments })
    }

    /// The header as bytes.
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut put = |at: usize, value: u16| {
            let [a, b] = value.to_ne_bytes();
            bytes[at] = a;
            bytes[at + 1] = b;
        };
        if let Some(checksum) = self.checksum {
            put(6, checksum.start);
            put(8, checksum.offset);
        }
        if let Some(segments) = self.segments {
            put(2, segments.headers);
            put(4, segments.size);
        }
        bytes[0] = u8::from(self.checksum.is_some()) * NEEDS_CSUM;
        bytes[1] = match self.segments.map(|segments| segments.kind) {
            None => 0,
            Some(Kind::Tcp4) => GSO_TCPV4,
            Some(Kind::Tcp6) => GSO_TCPV6,
            Some(Kind::Udp) => GSO_UDP_L4,
        };
        bytes
    }
}
