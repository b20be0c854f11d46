//! What is done to packets, as pure functions over bytes: no system call, no clock, no allocation
//! per packet, and no panic whatever the bytes are.
#![forbid(unsafe_code)]

pub mod checksum;
pub mod coalesce;
pub mod flow;
pub mod group;
pub mod icmp;
pub mod ip;
pub mod layout;
pub mod rate;
pub mod split;
pub mod vnet;

/// Why bytes are no packet that can be forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// Shorter than the headers it claims to have.
    #[error("the packet is shorter than its headers")]
    Short,
    /// Neither IPv4 nor IPv6.
    #[error("the version is neither 4 nor 6")]
    Version,
    /// A header length that cannot be.
    #[error("a header length is out of range")]
    HeaderLength,
    /// A total length that is shorter than the headers or longer than the packet.
    #[error("the total length does not fit the packet")]
    TotalLength,
    /// The offload header asks for what does not fit the packet.
    #[error("the offload header does not fit the packet")]
    Offload,
}

/// Two bytes in network order; 0 where there are none.
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    match bytes.get(at..at + 2) {
        Some(&[high, low]) => u16::from_be_bytes([high, low]),
        _ => 0,
    }
}

/// Four bytes in network order; 0 where there are none.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..at + 4) {
        Some(&[a, b, c, d]) => u32::from_be_bytes([a, b, c, d]),
        _ => 0,
    }
}

/// Writes two bytes in network order, where there is room for them.
pub(crate) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

/// Writes four bytes in network order, where there is room for them.
pub(crate) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(place) = bytes.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}
