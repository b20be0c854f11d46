//! Socket addresses as the kernel reads and writes them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes of `sockaddr_in6`, the longer one.
pub(super) const LEN: usize = 28;

/// `sockaddr_in` or `sockaddr_in6`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(8))]
pub(super) struct Raw {
    pub(super) bytes: [u8; LEN],
}

impl Raw {
    pub(super) const EMPTY: Self = Self { bytes: [0; LEN] };

    /// The address and how many of its bytes count.
    pub(super) fn new(address: SocketAddr) -> (Self, u32) {
        let mut bytes = [0; LEN];
        bytes[2..4].copy_from_slice(&address.port().to_be_bytes());
        let (family, len) = match address.ip() {
            IpAddr::V4(ip) => {
                bytes[4..8].copy_from_slice(&ip.octets());
                (libc::AF_INET, 16)
            }
            IpAddr::V6(ip) => {
                bytes[8..24].copy_from_slice(&ip.octets());
                (libc::AF_INET6, LEN as u32)
            }
        };
        bytes[..2].copy_from_slice(&(family as u16).to_ne_bytes());
        (Self { bytes }, len)
    }

    pub(super) fn address(&self) -> Option<SocketAddr> {
        let bytes = &self.bytes;
        let port = u16::from_be_bytes([bytes[2], bytes[3]]);
        let family = i32::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        let ip: IpAddr = match family {
            libc::AF_INET => Ipv4Addr::new(bytes[4], bytes[5], bytes[6], bytes[7]).into(),
            libc::AF_INET6 => {
                let octets: [u8; 16] = std::array::from_fn(|at| bytes[8 + at]);
                Ipv6Addr::from(octets).into()
            }
            _ => return None,
        };
        Some(SocketAddr::new(ip, port))
    }
}
