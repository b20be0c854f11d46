//! From the peers to the TUN device.

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use super::io::{Failure, Io, Socket, View, is_detached};
use super::outbound::Progress;
use crate::counters::Shard;
use crate::packet::coalesce::{Coalescer, Entry};
use crate::packet::ip::Ip;
use crate::sys::{Datagrams, ReceiveBatch};

/// Parts of one write: `writev` takes no more.
const MANY: usize = 1_024;
/// So many errors of a socket in a row, without a datagram, are no longer those of datagrams.
const ERRORS: u32 = 1_000;
/// Packets of most writes.
const FEW: u16 = 70;

/// Receives datagrams, checks whose they are, and writes them as large packets.
#[derive(Debug)]
pub(crate) struct Inbound {
    batch: ReceiveBatch,
    coalescer: Coalescer,
    checks: Checks,
    /// Errors since the last datagram.
    errors: u32,
}

/// Whether datagrams are what they should be.
#[derive(Debug, Default)]
struct Checks {
    /// The last sender and its number.
    sender: Option<(SocketAddr, u32)>,
    /// The last inner source, and whose it is.
    source: Option<(IpAddr, Option<u32>)>,
    /// The peer that sent the last good packet.
    good: Option<u32>,
}

/// What became of a datagram.
enum Verdict {
    Good(Ip),
    Malformed,
    Spoofed,
    NotOurs,
}

impl Inbound {
    pub(crate) fn new(io: &Io) -> Self {
        Self {
            batch: ReceiveBatch::new(),
            coalescer: Coalescer::new(io.merge),
            checks: Checks::default(),
            errors: 0,
        }
    }

    /// The descriptors are others now.
    pub(crate) fn set_io(&mut self, io: &Io) {
        self.coalescer.set_merge(io.merge);
        self.errors = 0;
    }

    /// The table is another now.
    pub(crate) fn forget_peers(&mut self) {
        self.checks = Checks::default();
    }

    /// Forwards one batch.
    pub(crate) fn run(
        &mut self,
        socket: &Socket,
        io: &Io,
        view: &View,
        shard: &Shard,
    ) -> Result<Progress, Failure> {
        match self.batch.receive(socket.fd.as_fd()) {
            Ok(_) => {}
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::EBADF | libc::ENOTSOCK | libc::EFAULT) => {
                        Err(Failure::socket(&error))
                    }
                    Some(libc::EAGAIN | libc::EINTR) => Ok(Progress::Dry),
                    // One of some earlier datagram is read once; what is read for ever is the socket's.
                    _ if self.errors < ERRORS => {
                        self.errors += 1;
                        Ok(Progress::Dry)
                    }
                    _ => Err(Failure::socket(&error)),
                };
            }
        }
        self.errors = 0;
        let mut messages = 0;
        for datagrams in self.batch.messages() {
            messages += 1;
            let buffer = self.batch.buffer();
            self.checks
                .take(&datagrams, buffer, &mut self.coalescer, view, shard);
        }
        shard.received_messages.add(messages);
        let written = self.write(io, shard);
        self.coalescer.clear();
        written?;
        Ok(match self.batch.was_full() {
            true => Progress::More,
            false => Progress::Dry,
        })
    }

    fn write(&self, io: &Io, shard: &Shard) -> Result<(), Failure> {
        let buffer = self.batch.buffer();
        for entry in self.coalescer.entries() {
            let written = match entry.count() {
                1 => {
                    let (start, len) = entry.first();
                    io.write_plain(entry.steer(), &buffer[start..start + len])
                }
                2..FEW => self.write_merged::<{ FEW as usize + 2 }>(entry, io),
                _ => self.write_merged::<MANY>(entry, io),
            };
            match written {
                Ok(()) => {
                    shard.tun_writes.add(1);
                    shard.delivered_packets.add(entry.count().into());
                }
                Err(error) if is_detached(&error) => return Err(Failure::device(&error)),
                Err(error) if entry.count() > 1 && error.raw_os_error() == Some(libc::EINVAL) => {
                    self.write_apart(entry, io, shard);
                }
                Err(_) => shard.write_failed.add(entry.count().into()),
            }
        }
        Ok(())
    }

    /// Writes a packet of several, from `N` parts at most.
    fn write_merged<const N: usize>(&self, entry: &Entry, io: &Io) -> io::Result<()> {
        let buffer = self.batch.buffer();
        let mut head = [0; 128];
        let (vnet, headers) = entry.make_head(buffer, &mut head);
        let vnet = vnet.encode();
        let (start, len) = entry.first();
        let mut parts = [IoSlice::new(&[]); N];
        parts[0] = IoSlice::new(&vnet);
        parts[1] = IoSlice::new(&head[..headers]);
        parts[2] = IoSlice::new(&buffer[start + headers..start + len]);
        let mut count = 3;
        for (place, (start, len)) in parts[3..].iter_mut().zip(self.coalescer.parts(entry)) {
            *place = IoSlice::new(&buffer[start..start + len]);
            count += 1;
        }
        io.write(entry.steer(), &parts[..count])
    }

    /// Writes the packets of an entry as they came: the kernel did not take them as one.
    fn write_apart(&self, entry: &Entry, io: &Io, shard: &Shard) {
        let buffer = self.batch.buffer();
        let headers = entry.headers();
        let first = std::iter::once(entry.first());
        let rest = self.coalescer.parts(entry);
        // In front of each part's payload stand its headers, as long as the first packet's.
        let rest = rest.map(|(start, len)| (start - headers, len + headers));
        for (start, len) in first.chain(rest) {
            match io.write_plain(entry.steer(), &buffer[start..start + len]) {
                Ok(()) => {
                    shard.tun_writes.add(1);
                    shard.delivered_packets.add(1);
                }
                Err(_) => shard.write_failed.add(1),
            }
        }
    }
}

impl Checks {
    fn take(
        &mut self,
        datagrams: &Datagrams,
        buffer: &[u8],
        coalescer: &mut Coalescer,
        view: &View,
        shard: &Shard,
    ) {
        let count = datagrams.len.div_ceil(datagrams.segment).max(1) as u64;
        shard.received_packets.add(count);
        shard.received_bytes.add(datagrams.len as u64);
        if datagrams.is_truncated {
            shard.truncated.add(count);
            return;
        }
        let Some(peer) = self.sender(datagrams.from, view) else {
            shard.stranger.add(count);
            return;
        };
        let end = datagrams.start + datagrams.len;
        let mut start = datagrams.start;
        let (mut good, mut good_bytes, mut bad) = (0, 0, 0);
        while start < end {
            let next = (start + datagrams.segment).min(end);
            // What continues this peer's last packet is as good as that.
            if self.good == Some(peer) && coalescer.follow(buffer, start..next) {
                good += 1;
                good_bytes += (next - start) as u64;
                start = next;
                continue;
            }
            match self.judge(&buffer[start..next], peer, view) {
                Verdict::Good(ip) => {
                    good += 1;
                    good_bytes += ip.total as u64;
                    coalescer.push(buffer, start, &ip);
                    self.good = Some(peer);
                }
                verdict => {
                    bad += 1;
                    match verdict {
                        Verdict::Spoofed => shard.spoofed.add(1),
                        Verdict::NotOurs => shard.not_ours.add(1),
                        _ => shard.malformed.add(1),
                    }
                }
            }
            start = next;
        }
        if datagrams.len == 0 {
            shard.malformed.add(1);
            bad += 1;
        }
        if let Some(peer) = view.table.peer(peer) {
            if good > 0 {
                peer.counters().received(good, good_bytes);
            }
            if bad > 0 {
                peer.counters().dropped(bad);
            }
        }
    }

    fn sender(&mut self, from: Option<SocketAddr>, view: &View) -> Option<u32> {
        let from = from?;
        match self.sender {
            Some((last, peer)) if last == from => Some(peer),
            _ => {
                let peer = view.table.peer_at(from)?;
                self.sender = Some((from, peer));
                Some(peer)
            }
        }
    }

    fn judge(&mut self, packet: &[u8], peer: u32, view: &View) -> Verdict {
        let Ok(ip) = Ip::parse(packet) else {
            return Verdict::Malformed;
        };
        let owner = match self.source {
            Some((last, owner)) if last == ip.src => owner,
            _ => {
                let owner = view.table.lookup(ip.src);
                self.source = Some((ip.src, owner));
                owner
            }
        };
        if owner != Some(peer) {
            return Verdict::Spoofed;
        }
        let is_ours = view
            .own
            .get(ip.family())
            .is_some_and(|own| own.contains_ip(ip.dst));
        if !is_ours {
            return Verdict::NotOurs;
        }
        Verdict::Good(ip)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use flannel_core::DualStack;

    use super::*;
    use crate::packet::coalesce::Merge;
    use crate::table::TableBuilder;

    /// A segment of TCP from 10.42.2.2 to 10.42.1.2 with ten bytes of payload.
    fn segment(seq: u32) -> [u8; 50] {
        let mut packet = [0; 50];
        packet[..4].copy_from_slice(&[0x45, 0, 0, 50]);
        // Not to be fragmented, so its identification means nothing.
        packet[6..10].copy_from_slice(&[0x40, 0, 64, 6]);
        packet[12..20].copy_from_slice(&[10, 42, 2, 2, 10, 42, 1, 2]);
        packet[24..28].copy_from_slice(&seq.to_be_bytes());
        packet[32..34].copy_from_slice(&[0x50, 0x10]);
        packet
    }

    /// What continues a peer's stream is taken from that peer alone, although it came in one batch.
    #[test]
    fn a_peer_does_not_continue_the_stream_of_another() {
        let endpoint = |node: u8| SocketAddr::from(([192, 0, 2, node], 8285));
        let subnet = |text: &str| text.parse().expect("a subnet");
        let mut peers = TableBuilder::new();
        peers.insert(subnet("10.42.2.0/24"), endpoint(2));
        peers.insert(subnet("10.42.3.0/24"), endpoint(3));
        let view = View {
            table: Arc::new(peers.build()),
            own: DualStack::of_subnets([subnet("10.42.1.0/24")]),
            mtu: DualStack::default(),
        };
        let (mut checks, shard) = (Checks::default(), Shard::default());
        let mut coalescer = Coalescer::new(Merge {
            tcp: true,
            udp: true,
            verify: false,
        });
        let buffer = [segment(0), segment(10), segment(20), segment(20)].concat();
        let senders = [2, 2, 3, 2];
        for (index, node) in senders.into_iter().enumerate() {
            let datagrams = Datagrams {
                from: Some(endpoint(node)),
                start: index * 50,
                len: 50,
                segment: 50,
                is_truncated: false,
            };
            checks.take(&datagrams, &buffer, &mut coalescer, &view, &shard);
        }
        assert_eq!(shard.spoofed.value(), 1);
        let [entry] = coalescer.entries() else {
            panic!("one stream: {:?}", coalescer.entries());
        };
        assert_eq!((entry.count(), entry.total()), (3, 70));
        let places: Vec<_> = coalescer.parts(entry).collect();
        assert_eq!(places, [(90, 10), (190, 10)], "the third is not among them");
    }
}
