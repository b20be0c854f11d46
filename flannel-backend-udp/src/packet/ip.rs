//! The IP header of a packet, read once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use flannel_core::Family;

use super::checksum::{Sum, replace};
use super::{Malformed, be16, put16};

/// Protocol number of ICMP.
pub const ICMP: u8 = 1;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;
/// Protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;

const IPV6_HEADER: usize = 40;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
/// More extension headers than this no sender makes; what follows them is not looked at.
const MAX_EXTENSIONS: usize = 8;

/// What the IP header of a packet says, checked against the packet's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ip {
    /// Where it comes from.
    pub src: IpAddr,
    /// Where it goes.
    pub dst: IpAddr,
    /// The protocol behind all IP headers.
    pub protocol: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Bytes before the header of `protocol`.
    pub header: usize,
    /// Bytes of the whole packet. There may be more in the buffer; they are not part of it.
    pub total: usize,
    /// Whether it is part of a larger packet.
    pub fragment: Fragment,
    /// Whether there are IPv4 options or IPv6 extension headers.
    pub options: bool,
}

/// Which part of a packet a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// The first part: the header of the protocol is there.
    First,
    /// A later part: no header of the protocol.
    Later,
}

impl Ip {
    /// Reads the header of a packet.
    ///
    /// # Errors
    ///
    /// [`Malformed`]: it is truncated, or its lengths cannot be.
    pub fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        match packet.first().map(|first| first >> 4) {
            Some(4) => Self::parse_v4(packet),
            Some(6) => Self::parse_v6(packet),
            Some(_) => Err(Malformed::Version),
            None => Err(Malformed::Short),
        }
    }

    /// The family of the packet.
    pub const fn family(&self) -> Family {
        match self.src {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// Where both addresses stand in the packet.
    pub const fn addresses(&self) -> Range<usize> {
        match self.src {
            IpAddr::V4(_) => 12..20,
            IpAddr::V6(_) => 8..40,
        }
    }

    /// The sum of the addresses, of the length of what follows the headers, and of its protocol, that
    /// TCP and UDP checksums include (RFC 9293, section 3.1; RFC 8200, section 8.1).
    pub fn pseudo_header(&self, packet: &[u8], len: usize) -> Sum {
        let addresses = packet.get(self.addresses()).unwrap_or_default();
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        Sum::new()
            .with(addresses)
            .with(&len.to_be_bytes())
            .with(&[0, self.protocol])
    }

    fn parse_v4(packet: &[u8]) -> Result<Self, Malformed> {
        let head: &[u8; 20] = packet.first_chunk().ok_or(Malformed::Short)?;
        let header = usize::from(head[0] & 0xf) * 4;
        let total = usize::from(be16(head, 2));
        if header < 20 {
            return Err(Malformed::HeaderLength);
        }
        if header > packet.len() {
            return Err(Malformed::Short);
        }
        if total < header || total > packet.len() {
            return Err(Malformed::TotalLength);
        }
        let place = be16(head, 6);
        let fragment = match (place & 0x1fff, place & 0x2000) {
            (0, 0) => Fragment::Whole,
            (0, _) => Fragment::First,
            _ => Fragment::Later,
        };
        Ok(Self {
            src: Ipv4Addr::new(head[12], head[13], head[14], head[15]).into(),
            dst: Ipv4Addr::new(head[16], head[17], head[18], head[19]).into(),
            protocol: head[9],
            ttl: head[8],
            header,
            total,
            fragment,
            options: header > 20,
        })
    }

    fn parse_v6(packet: &[u8]) -> Result<Self, Malformed> {
        let head: &[u8; IPV6_HEADER] = packet.first_chunk().ok_or(Malformed::Short)?;
        let total = IPV6_HEADER + usize::from(be16(head, 4));
        if total > packet.len() {
            return Err(Malformed::TotalLength);
        }
        let address = |at: usize| -> Ipv6Addr {
            let bytes: [u8; 16] = std::array::from_fn(|index| head[at + index]);
            bytes.into()
        };
        let mut this = Self {
            src: address(8).into(),
            dst: address(24).into(),
            protocol: head[6],
            ttl: head[7],
            header: IPV6_HEADER,
            total,
            fragment: Fragment::Whole,
            options: false,
        };
        this.walk_extensions(&packet[..total])?;
        Ok(this)
    }

    /// Finds the protocol behind the extension headers (RFC 8200, 4).
    fn walk_extensions(&mut self, packet: &[u8]) -> Result<(), Malformed> {
        for _ in 0..MAX_EXTENSIONS {
            if !matches!(self.protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
                return Ok(());
            }
            self.options = true;
            let rest = packet.get(self.header..).ok_or(Malformed::Short)?;
            let extension: &[u8; 8] = rest.first_chunk().ok_or(Malformed::Short)?;
            let len = match self.protocol {
                FRAGMENT => {
                    let place = be16(extension, 2);
                    self.fragment = match (place & 0xfff8, place & 1) {
                        (0, 0) => self.fragment,
                        (0, _) => Fragment::First,
                        _ => Fragment::Later,
                    };
                    8
                }
                _ => (usize::from(extension[1]) + 1) * 8,
            };
            if len > rest.len() {
                return Err(Malformed::HeaderLength);
            }
            self.protocol = extension[0];
            self.header += len;
            if self.fragment == Fragment::Later {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Whether the checksum of an IPv4 header is right; IPv6 has none.
pub fn header_is_valid(ip: &Ip, packet: &[u8]) -> bool {
    match ip.src {
        IpAddr::V4(_) => packet
            .get(..ip.header)
            .is_some_and(|header| Sum::new().with(header).is_valid()),
        IpAddr::V6(_) => true,
    }
}

/// Takes one from the TTL or hop limit of a packet and mends the checksum.
///
/// Returns `false`, and changes nothing, where there is none left for the way onward.
pub fn decrement_ttl(ip: &Ip, packet: &mut [u8]) -> bool {
    if ip.ttl <= 1 {
        return false;
    }
    match ip.src {
        IpAddr::V4(_) => {
            let old = be16(packet, 8);
            let new = old - 0x100;
            let checksum = replace(be16(packet, 10), old, new);
            put16(packet, 8, new);
            put16(packet, 10, checksum);
        }
        IpAddr::V6(_) => {
            if let Some(hops) = packet.get_mut(7) {
                *hops = ip.ttl - 1;
            }
        }
    }
    true
}
