//! Errors as a router sends them: RFC 1812 (4.3.2) for IPv4, RFC 4443 (2.4) for IPv6.

use std::net::IpAddr;

use super::checksum::Sum;
use super::ip::{self, Fragment, Ip};
use super::{put16, put32};

/// The most bytes of an error: what a router quotes of an IPv4 packet makes 576 of them, of an
/// IPv6 packet 1,280.
pub const MAX_LEN: usize = 1_280;
const MAX_V4: usize = 576;
const TTL: u8 = 64;
/// Internetwork control, as RFC 1812 (4.3.2.5) asks for.
const PRECEDENCE: u8 = 0xc0;

/// What is told to a sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// No peer has a subnet with the destination.
    NoRoute,
    /// The packet is larger than what may be sent, which is so many bytes.
    TooBig(u32),
    /// The packet may go no further.
    TimeExceeded,
}

/// Makes the error about a packet, from `source`, in `out`, and returns its length.
///
/// There is none about an ICMP error, a fragment other than the first, a packet to many or from
/// nobody in particular.
pub fn error(
    problem: Problem,
    about: &Ip,
    packet: &[u8],
    source: IpAddr,
    out: &mut [u8; MAX_LEN],
) -> Option<usize> {
    if !deserves_error(about, packet, problem) {
        return None;
    }
    match (source, about.src) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let (kind, code, mtu) = match problem {
                Problem::NoRoute => (3, 0, 0),
                Problem::TooBig(mtu) => (3, 4, mtu.min(0xffff)),
                Problem::TimeExceeded => (11, 0, 0),
            };
            let quoted = packet.get(..about.total.min(MAX_V4 - 28))?;
            let len = 28 + quoted.len();
            let out = &mut out[..len];
            out[..28].fill(0);
            out[0] = 0x45;
            out[1] = PRECEDENCE;
            put16(out, 2, len as u16);
            out[8] = TTL;
            out[9] = ip::ICMP;
            out[12..16].copy_from_slice(&from.octets());
            out[16..20].copy_from_slice(&to.octets());
            let sum = Sum::new().with(&out[..20]).checksum();
            put16(out, 10, sum);
            out[20] = kind;
            out[21] = code;
            put32(out, 24, mtu);
            out[28..].copy_from_slice(quoted);
            let sum = Sum::new().with(&out[20..]).checksum();
            put16(out, 22, sum);
            Some(len)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let (kind, mtu) = match problem {
                Problem::NoRoute => (1, 0),
                Problem::TooBig(mtu) => (2, mtu),
                Problem::TimeExceeded => (3, 0),
            };
            let quoted = packet.get(..about.total.min(MAX_LEN - 48))?;
            let len = 48 + quoted.len();
            let out = &mut out[..len];
            out[..48].fill(0);
            out[0] = 0x60;
            put16(out, 4, (len - 40) as u16);
            out[6] = ip::ICMPV6;
            out[7] = TTL;
            out[8..24].copy_from_slice(&from.octets());
            out[24..40].copy_from_slice(&to.octets());
            out[40] = kind;
            put32(out, 44, mtu);
            out[48..].copy_from_slice(quoted);
            let own = Ip::parse(out).ok()?;
            let sum = own.pseudo_header(out, len - 40).with(&out[40..]).checksum();
            put16(out, 42, sum);
            Some(len)
        }
        _ => None,
    }
}

fn deserves_error(about: &Ip, packet: &[u8], problem: Problem) -> bool {
    if about.fragment == Fragment::Later {
        return false;
    }
    let kind = packet.get(about.header).copied();
    match (about.src, about.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            // Of ICMP only questions and answers deserve one; types not known may be errors.
            let is_error =
                about.protocol == ip::ICMP && !matches!(kind, Some(0 | 8 | 9 | 10 | 13..=18));
            let from_nobody = src.is_unspecified()
                || src.is_multicast()
                || src.is_broadcast()
                || src.is_loopback()
                || src.octets()[0] >= 240
                || src.octets()[0] == 0;
            let to_many = dst.is_multicast() || dst.is_broadcast();
            !is_error && !from_nobody && !to_many
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let is_error = about.protocol == ip::ICMPV6 && kind.is_none_or(|kind| kind < 128);
            let from_nobody = src.is_unspecified() || src.is_multicast() || src.is_loopback();
            // Path MTU discovery works for multicast too (RFC 4443, 2.4 e.3).
            let to_many = dst.is_multicast() && !matches!(problem, Problem::TooBig(_));
            !is_error && !from_nobody && !to_many
        }
        _ => false,
    }
}
