//! Numbers for flows.

use std::net::IpAddr;

use super::be32;
use super::ip::{Fragment, Ip, TCP, UDP};

/// The same number for both directions of a flow: what belongs together takes one queue.
pub fn symmetric_hash(ip: &Ip, packet: &[u8]) -> u32 {
    let ports = match (ip.protocol, ip.fragment) {
        (TCP | UDP, Fragment::Whole) => be32(packet, ip.header),
        _ => 0,
    };
    let ports = (ports >> 16) ^ (ports & 0xffff);
    mix(number(ip.src) ^ number(ip.dst) ^ (u64::from(ports) << 16) ^ u64::from(ip.protocol))
}

/// A number for one direction of a flow.
pub fn hash(ip: &Ip, packet: &[u8]) -> u32 {
    let ports = be32(packet, ip.header);
    mix(number(ip.src).rotate_left(17) ^ number(ip.dst) ^ (u64::from(ports) << 20))
}

fn number(ip: IpAddr) -> u64 {
    match ip {
        IpAddr::V4(ip) => u64::from(ip.to_bits()),
        IpAddr::V6(ip) => {
            let bits = ip.to_bits();
            (bits >> 64) as u64 ^ bits as u64
        }
    }
}

/// Spreads all bits over all (the finisher of SplitMix64).
fn mix(value: u64) -> u32 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (value ^ (value >> 31)) as u32
}
