//! Which peer has which subnet: a table that is made once and then only read.
//!
//! A lookup asks one hash table for each length of prefix that occurs, longest first. In an overlay
//! that is one or two, so a lookup costs the same for ten peers and for fifty thousand. The control
//! plane makes a new table for each batch of changes ([`TableBuilder`]), and the forwarder goes over
//! to it between two batches of packets.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use flannel_core::Subnet;

use crate::counters::PeerCounters;

/// Marks a slot without an entry.
const EMPTY: u32 = u32::MAX;

/// The peers of an overlay, by subnet and by endpoint.
#[derive(Debug, Default)]
pub struct Table {
    v4: Vec<Level<u32>>,
    /// IPv6 prefixes that go beyond the first half of an address.
    v6_long: Vec<Level<u128>>,
    /// Those that do not, by that half: the usual ones, in half the memory.
    v6: Vec<Level<u64>>,
    peers: Vec<Peer>,
    endpoints: Slots<Endpoint>,
    routes: Vec<(Subnet, SocketAddr)>,
}

/// One peer: an endpoint and what was exchanged with it.
#[derive(Debug, Clone)]
pub struct Peer {
    endpoint: SocketAddr,
    counters: Arc<PeerCounters>,
}

impl Table {
    /// The peer whose subnet holds an address; of several subnets the longest counts.
    pub fn lookup(&self, ip: IpAddr) -> Option<u32> {
        match ip {
            IpAddr::V4(ip) => lookup(&self.v4, ip.to_bits()),
            IpAddr::V6(ip) => {
                let bits = ip.to_bits();
                let long = lookup(&self.v6_long, bits);
                long.or_else(|| lookup(&self.v6, (bits >> 64) as u64))
            }
        }
    }

    /// The peer that sends from an endpoint.
    pub fn peer_at(&self, endpoint: SocketAddr) -> Option<u32> {
        self.endpoints.find(endpoint_key(endpoint))
    }

    /// A peer by its number.
    pub fn peer(&self, index: u32) -> Option<&Peer> {
        self.peers.get(index as usize)
    }

    /// All peers.
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// All subnets with their endpoints, in the order of subnets.
    pub fn routes(&self) -> &[(Subnet, SocketAddr)] {
        &self.routes
    }
}

impl Peer {
    /// Where its datagrams go to and come from.
    pub const fn endpoint(&self) -> SocketAddr {
        self.endpoint
    }

    /// What was exchanged with it, since it was first known to the builder.
    pub fn counters(&self) -> &PeerCounters {
        &self.counters
    }
}

/// Makes tables. It remembers the peers, so that their counters live on from table to table.
#[derive(Debug, Default)]
pub struct TableBuilder {
    routes: BTreeMap<Subnet, SocketAddr>,
    counters: BTreeMap<SocketAddr, (Arc<PeerCounters>, usize)>,
}

impl TableBuilder {
    /// Without a peer.
    pub fn new() -> Self {
        Self::default()
    }

    /// A peer's subnet is behind an endpoint from now on, whatever it was behind before.
    pub fn insert(&mut self, subnet: Subnet, endpoint: SocketAddr) {
        let endpoint = plain(endpoint);
        self.counters.entry(endpoint).or_default().1 += 1;
        if let Some(before) = self.routes.insert(subnet, endpoint) {
            self.release(before);
        }
    }

    /// A subnet is behind no endpoint from now on. Says what it was behind.
    pub fn remove(&mut self, subnet: Subnet) -> Option<SocketAddr> {
        let before = self.routes.remove(&subnet)?;
        self.release(before);
        Some(before)
    }

    /// Forgets all peers.
    pub fn clear(&mut self) {
        self.routes.clear();
        self.counters.clear();
    }

    /// What a subnet is behind.
    pub fn endpoint(&self, subnet: Subnet) -> Option<SocketAddr> {
        self.routes.get(&subnet).copied()
    }

    /// All subnets with their endpoints.
    pub fn routes(&self) -> impl Iterator<Item = (Subnet, SocketAddr)> {
        self.routes.iter().map(|(subnet, at)| (*subnet, *at))
    }

    /// The table of all peers. It costs time for all of them: change many, then build once.
    pub fn build(&self) -> Table {
        let mut numbers = BTreeMap::new();
        let mut peers = Vec::with_capacity(self.counters.len());
        for (endpoint, (counters, _)) in &self.counters {
            numbers.insert(*endpoint, peers.len() as u32);
            peers.push(Peer {
                endpoint: *endpoint,
                counters: Arc::clone(counters),
            });
        }
        let mut v4: BTreeMap<u8, Vec<(u32, u32)>> = BTreeMap::new();
        let mut v6_long: BTreeMap<u8, Vec<(u128, u32)>> = BTreeMap::new();
        let mut v6: BTreeMap<u8, Vec<(u64, u32)>> = BTreeMap::new();
        for (subnet, endpoint) in &self.routes {
            let peer = numbers.get(endpoint).copied().unwrap_or(EMPTY);
            match subnet.address() {
                IpAddr::V4(ip) => v4
                    .entry(subnet.len())
                    .or_default()
                    .push((ip.to_bits(), peer)),
                IpAddr::V6(ip) if subnet.len() <= 64 => v6
                    .entry(subnet.len())
                    .or_default()
                    .push(((ip.to_bits() >> 64) as u64, peer)),
                IpAddr::V6(ip) => v6_long
                    .entry(subnet.len())
                    .or_default()
                    .push((ip.to_bits(), peer)),
            }
        }
        let endpoints = numbers
            .iter()
            .map(|(endpoint, number)| (endpoint_key(*endpoint), *number));
        Table {
            v4: levels(v4),
            v6_long: levels(v6_long),
            v6: levels(v6),
            endpoints: Slots::new(numbers.len(), endpoints),
            peers,
            routes: self.routes().collect(),
        }
    }

    fn release(&mut self, endpoint: SocketAddr) {
        if let Some((_, uses)) = self.counters.get_mut(&endpoint) {
            *uses -= 1;
            if *uses == 0 {
                self.counters.remove(&endpoint);
            }
        }
    }
}

/// The same endpoint, without what a socket may say beyond address and port.
pub(crate) fn plain(endpoint: SocketAddr) -> SocketAddr {
    SocketAddr::new(endpoint.ip(), endpoint.port())
}

/// Address and port; IPv4 as IPv6 writes it.
type Endpoint = (u128, u16);

fn endpoint_key(endpoint: SocketAddr) -> Endpoint {
    let ip = match endpoint.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    (ip.to_bits(), endpoint.port())
}

/// What a hash table finds things by.
trait Key: Copy + PartialEq + Default + std::fmt::Debug {
    fn spread(self) -> u64;
}

impl Key for u32 {
    fn spread(self) -> u64 {
        spread(u64::from(self))
    }
}

impl Key for u64 {
    fn spread(self) -> u64 {
        spread(self)
    }
}

impl Key for u128 {
    fn spread(self) -> u64 {
        spread(spread((self >> 64) as u64) ^ self as u64)
    }
}

impl Key for Endpoint {
    fn spread(self) -> u64 {
        spread(self.0.spread() ^ u64::from(self.1))
    }
}

/// An address that prefixes are cut from.
trait Bits: Key {
    fn masked(self, len: u8) -> Self;
}

impl Bits for u32 {
    fn masked(self, len: u8) -> Self {
        match len {
            0 => 0,
            len => self & (Self::MAX << (32 - Self::from(len.min(32)))),
        }
    }
}

impl Bits for u64 {
    fn masked(self, len: u8) -> Self {
        match len {
            0 => 0,
            len => self & (Self::MAX << (64 - u32::from(len.min(64)))),
        }
    }
}

impl Bits for u128 {
    fn masked(self, len: u8) -> Self {
        match len {
            0 => 0,
            len => self & (Self::MAX << (128 - u32::from(len.min(128)))),
        }
    }
}

/// The finisher of SplitMix64: neighbouring subnets come to lie far from one another.
fn spread(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// All subnets of one length.
#[derive(Debug)]
struct Level<K> {
    len: u8,
    slots: Slots<K>,
}

fn levels<K: Bits>(by_len: BTreeMap<u8, Vec<(K, u32)>>) -> Vec<Level<K>> {
    let longest_first = by_len.into_iter().rev();
    longest_first
        .map(|(len, entries)| Level {
            len,
            slots: Slots::new(entries.len(), entries.into_iter()),
        })
        .collect()
}

fn lookup<K: Bits>(levels: &[Level<K>], key: K) -> Option<u32> {
    levels
        .iter()
        .find_map(|level| level.slots.find(key.masked(level.len)))
}

/// A hash table of at most half its slots, searched in a straight line from where a key belongs.
#[derive(Debug, Default)]
struct Slots<K> {
    slots: Vec<(K, u32)>,
}

impl<K: Key> Slots<K> {
    fn new(count: usize, entries: impl Iterator<Item = (K, u32)>) -> Self {
        let mut this = Self {
            slots: vec![(K::default(), EMPTY); (count * 2).next_power_of_two().max(2)],
        };
        let mask = this.slots.len() - 1;
        for (key, value) in entries {
            let mut at = key.spread() as usize & mask;
            while this.slots[at].1 != EMPTY && this.slots[at].0 != key {
                at = (at + 1) & mask;
            }
            this.slots[at] = (key, value);
        }
        this
    }

    fn find(&self, key: K) -> Option<u32> {
        let mask = self.slots.len().checked_sub(1)?;
        let mut at = key.spread() as usize & mask;
        loop {
            let (found, value) = self.slots[at];
            if value == EMPTY {
                return None;
            }
            if found == key {
                return Some(value);
            }
            at = (at + 1) & mask;
        }
    }
}
