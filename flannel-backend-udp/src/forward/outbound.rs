//! From the TUN device to the peers.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use flannel_core::Family;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockaddrIn, sendto};
use nix::sys::uio::readv;
use nix::unistd::read;

use super::io::{Failure, Io, View};
use super::patience::Patience;
use crate::counters::Shard;
use crate::packet::group::{Grouper, Message};
use crate::packet::icmp::{self, Problem};
use crate::packet::ip::{Ip, decrement_ttl};
use crate::packet::layout::{self, Layout};
use crate::packet::rate::TokenBucket;
use crate::packet::split::{MAX_HEADERS, Splitter, complete};
use crate::packet::vnet::{self, Vnet};
use crate::packet::{Malformed, flow};
use crate::sys::SendBatch;

/// Bytes of packets that are gathered before they are sent.
const ARENA: usize = 200 << 10;
/// Packets that are gathered before they are sent.
const BATCH: usize = 64;
/// The largest packet that a queue gives.
const INBOX: usize = 65_536;
/// So far in begins the header, and the packet behind it stands at a round address.
const SKEW: usize = 16 - vnet::LEN;
/// After so many packets in a row that are not like the last large one, the next is not expected to
/// be.
const UNLIKE: u32 = 4;
/// Sizes of links (RFC 1191, 7), for where the kernel does not know the path's.
const PLATEAUS: [u32; 10] = [
    32_000, 17_914, 8_166, 4_352, 2_002, 1_492, 1_280, 1_006, 508, 296,
];

/// Reads packets, cuts them, looks up whom they are for, and sends them.
#[derive(Debug)]
pub(crate) struct Outbound {
    inbox: Vec<u8>,
    arena: Vec<u8>,
    used: usize,
    /// How the segments of the last large packet stood, if the next is likely to be its like.
    layout: Option<Layout>,
    /// Packets in a row that were not.
    unlike: u32,
    groups: [Grouper; 2],
    sender: SendBatch,
    patience: [Patience; 2],
    last: Option<(IpAddr, u32)>,
    icmp: Icmp,
}

/// Whether there may be more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Everything that was there is done.
    Dry,
    /// A batch was full.
    More,
}

impl Outbound {
    pub(crate) fn new(icmp_rate: u32) -> Self {
        Self {
            inbox: vec![0; SKEW + vnet::LEN + INBOX],
            arena: vec![0; ARENA],
            used: 0,
            layout: None,
            unlike: 0,
            groups: [Grouper::new(Family::V4, 1), Grouper::new(Family::V6, 1)],
            sender: SendBatch::new(),
            patience: Default::default(),
            last: None,
            icmp: Icmp {
                bucket: TokenBucket::new(icmp_rate),
                buffer: Box::new([0; icmp::MAX_LEN]),
            },
        }
    }

    /// The descriptors are others now.
    pub(crate) fn set_io(&mut self, io: &Io) {
        for family in [Family::V4, Family::V6] {
            self.groups[class(family)].set_segments(io.segments(family));
        }
    }

    /// The table is another now.
    pub(crate) fn forget_peers(&mut self) {
        self.last = None;
    }

    /// Forwards one batch.
    pub(crate) fn run(
        &mut self,
        io: &Io,
        view: &View,
        shard: &Shard,
        now: Duration,
    ) -> Result<Progress, Failure> {
        let mut progress = Progress::More;
        for _ in 0..BATCH {
            let layout = self.layout.filter(|_| io.vnet);
            let read = match layout {
                Some(layout) => {
                    self.make_room(layout.room(), io, view, shard, now);
                    self.read_apart(layout, io)
                }
                None => self.read_whole(io),
            };
            match read {
                Ok(len) => {
                    shard.tun_reads.add(1);
                    let is_sent = match layout {
                        Some(layout) => self.take_apart(layout, len, view),
                        None => false,
                    };
                    if !is_sent {
                        self.take(len, io, view, shard, now);
                    }
                }
                Err(Errno::ENODATA) => {
                    return Err(Failure::device(&io::ErrorKind::UnexpectedEof.into()));
                }
                Err(Errno::EAGAIN) => {
                    progress = Progress::Dry;
                    break;
                }
                Err(Errno::EINTR) => {}
                // This one packet it could not describe.
                Err(Errno::EINVAL) => shard.tun_malformed.add(1),
                Err(error) => {
                    self.flush(io, view, shard, now);
                    return Err(Failure::device(&error.into()));
                }
            }
        }
        self.flush(io, view, shard, now);
        Ok(progress)
    }

    /// Reads a packet into the inbox and returns its length.
    fn read_whole(&mut self, io: &Io) -> Result<usize, Errno> {
        let from = if io.vnet { SKEW } else { SKEW + vnet::LEN };
        let len = read(io.queue(), &mut self.inbox[from..])?;
        let behind = (from + len).checked_sub(SKEW + vnet::LEN);
        behind.filter(|len| *len > 0).ok_or(Errno::ENODATA)
    }

    /// Reads a packet to where its segments will be sent from, if it is like the last, and returns
    /// its length.
    fn read_apart(&mut self, layout: Layout, io: &Io) -> Result<usize, Errno> {
        let mut parts: [IoSliceMut<'_>; 1 + layout::MAX_PLACES] =
            std::array::from_fn(|_| IoSliceMut::new(&mut []));
        let head = &mut self.inbox[SKEW..SKEW + vnet::LEN];
        parts[0] = IoSliceMut::new(head);
        let count = layout.parts(&mut self.arena[self.used..], &mut parts[1..]);
        let len = readv(io.queue(), &mut parts[..1 + count])?;
        let behind = len.checked_sub(vnet::LEN);
        behind.filter(|len| *len > 0).ok_or(Errno::ENODATA)
    }

    /// Takes the packet of so many bytes that stands in the arena in pieces. If it is not what it
    /// was thought to be, or cannot be sent on as it is, it is put together in the inbox, and
    /// `false` returned.
    fn take_apart(&mut self, layout: Layout, len: usize, view: &View) -> bool {
        if self.cut_in_place(layout, len, view).is_some() {
            self.unlike = 0;
            return true;
        }
        self.unlike += 1;
        if self.unlike >= UNLIKE {
            self.layout = None;
            self.unlike = 0;
        }
        let whole = &mut self.inbox[SKEW + vnet::LEN..];
        layout.gather(&self.arena[self.used..], len, whole);
        false
    }

    /// Cuts the packet that stands in the arena in pieces; `None`, and nothing is changed, if that
    /// is not all there is to do.
    fn cut_in_place(&mut self, layout: Layout, len: usize, view: &View) -> Option<()> {
        let vnet = Vnet::decode(self.inbox[SKEW..].first_chunk()?)?;
        vnet.segments?;
        let place = &self.arena[self.used..];
        // Headers that go on where others of the last packet ended are not read to their end, and
        // do not fit.
        let ip = Ip::parse(place).ok().filter(|ip| ip.total == len)?;
        let mut head = [0; MAX_HEADERS];
        let head = head.get_mut(..layout.headers())?;
        head.copy_from_slice(place.get(..layout.headers())?);
        decrement_ttl(&ip, head).then_some(())?;
        let mut splitter = Splitter::in_place(&vnet, &ip, head).ok()?;
        let limit = view.mtu.get(ip.family()).copied().unwrap_or(u32::MAX);
        if !layout.fits(&splitter) || splitter.largest() as u32 > limit {
            return None;
        }
        let peer = self.route(&ip, view)?;
        let family = Family::of(&view.table.peer(peer)?.endpoint().ip());
        while let Some(len) = splitter.head_next(&mut self.arena[self.used..]) {
            self.groups[class(family)].push(peer, self.used as u32, len as u16);
            self.used += len;
        }
        Some(())
    }

    /// Takes the packet of so many bytes that stands in the inbox.
    fn take(&mut self, len: usize, io: &Io, view: &View, shard: &Shard, now: Duration) {
        // The inbox is moved out of the way of the arena; nothing is copied.
        let mut inbox = std::mem::take(&mut self.inbox);
        let (head, packet) = inbox[SKEW..].split_at_mut(vnet::LEN);
        let head = head.first_chunk::<{ vnet::LEN }>();
        let vnet = match head {
            Some(head) if io.vnet => Vnet::decode(head),
            _ => Some(Vnet::default()),
        };
        let forwarded = match vnet {
            Some(vnet) => self.forward(&vnet, &mut packet[..len], io, view, shard, now),
            None => Err(Malformed::Offload),
        };
        if forwarded.is_err() {
            shard.tun_malformed.add(1);
        }
        self.inbox = inbox;
    }

    fn forward(
        &mut self,
        vnet: &Vnet,
        packet: &mut [u8],
        io: &Io,
        view: &View,
        shard: &Shard,
        now: Duration,
    ) -> Result<(), Malformed> {
        let ip = Ip::parse(packet)?;
        let Some(peer) = self.route(&ip, view) else {
            shard.no_route.add(1);
            self.icmp
                .answer(Problem::NoRoute, &ip, packet, io, view, shard, now);
            return Ok(());
        };
        if ip.ttl <= 1 {
            shard.ttl_exceeded.add(1);
            self.icmp
                .answer(Problem::TimeExceeded, &ip, packet, io, view, shard, now);
            return Ok(());
        }
        let limit = view.mtu.get(ip.family()).copied().unwrap_or(u32::MAX);
        let family = match view.table.peer(peer).map(|peer| peer.endpoint()) {
            Some(endpoint) => Family::of(&endpoint.ip()),
            None => return Ok(()),
        };
        if vnet.segments.is_none() {
            if ip.total as u32 > limit {
                self.refuse_size(&ip, packet, limit, io, view, shard, now);
                return Ok(());
            }
            self.make_room(ip.total, io, view, shard, now);
            decrement_ttl(&ip, packet);
            let place = &mut self.arena[self.used..self.used + ip.total];
            place.copy_from_slice(&packet[..ip.total]);
            if let Some(unfinished) = vnet.checksum {
                complete(place, unfinished)?;
            }
            self.groups[class(family)].push(peer, self.used as u32, ip.total as u16);
            self.used += ip.total;
            return Ok(());
        }
        let splitter = Splitter::new(vnet, &ip, packet)?;
        self.layout = Layout::of(&splitter);
        let largest = splitter.largest();
        if largest as u32 > limit {
            self.refuse_size(&ip, packet, limit, io, view, shard, now);
            return Ok(());
        }
        decrement_ttl(&ip, packet);
        let mut splitter = Splitter::new(vnet, &ip, packet)?;
        for _ in 0..splitter.count() {
            self.make_room(largest, io, view, shard, now);
            let Some(len) = splitter.write_next(&mut self.arena[self.used..]) else {
                break;
            };
            self.groups[class(family)].push(peer, self.used as u32, len as u16);
            self.used += len;
        }
        Ok(())
    }

    fn route(&mut self, ip: &Ip, view: &View) -> Option<u32> {
        match self.last {
            Some((dst, peer)) if dst == ip.dst => Some(peer),
            _ => {
                let peer = view.table.lookup(ip.dst)?;
                self.last = Some((ip.dst, peer));
                Some(peer)
            }
        }
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "what every step of a packet needs"
    )]
    fn refuse_size(
        &mut self,
        ip: &Ip,
        packet: &[u8],
        limit: u32,
        io: &Io,
        view: &View,
        shard: &Shard,
        now: Duration,
    ) {
        shard.too_big.add(1);
        let problem = Problem::TooBig(limit);
        self.icmp.answer(problem, ip, packet, io, view, shard, now);
    }

    /// Sends what was gathered if so many bytes more do not fit.
    fn make_room(&mut self, len: usize, io: &Io, view: &View, shard: &Shard, now: Duration) {
        if self.used + len > self.arena.len() {
            self.flush(io, view, shard, now);
        }
    }

    /// Sends what was gathered.
    fn flush(&mut self, io: &Io, view: &View, shard: &Shard, now: Duration) {
        for family in [Family::V4, Family::V6] {
            let group = &mut self.groups[class(family)];
            if group.messages().is_empty() {
                continue;
            }
            let mut sending = Sending {
                sender: &mut self.sender,
                patience: &mut self.patience[class(family)],
                arena: &self.arena,
                icmp: &mut self.icmp,
                io,
                view,
                shard,
                now,
                family,
            };
            sending.all(group.messages());
            group.clear();
            // A device below may have turned out to take no segments.
            group.set_segments(io.segments(family));
        }
        self.used = 0;
    }
}

/// Which of the two groupers.
const fn class(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

/// What sends to one family.
struct Sending<'a> {
    sender: &'a mut SendBatch,
    patience: &'a mut Patience,
    arena: &'a [u8],
    icmp: &'a mut Icmp,
    io: &'a Io,
    view: &'a View,
    shard: &'a Shard,
    now: Duration,
    family: Family,
}

impl Sending<'_> {
    fn all(&mut self, mut messages: &[Message]) {
        let Some(socket) = self.io.socket(self.family) else {
            let packets = messages.iter().map(|message| u64::from(message.count));
            self.shard.no_socket.add(packets.sum());
            return;
        };
        while let Some(first) = messages.first() {
            let table = &self.view.table;
            let sent = self
                .sender
                .send(socket.fd.as_fd(), self.arena, messages, table);
            match sent {
                Ok(sent) => {
                    self.count(&messages[..sent]);
                    messages = &messages[sent..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let socket = socket.fd.as_fd();
                    let has_room = |wait| wait_writable(socket, wait);
                    if !self.patience.wait(self.now, has_room) {
                        self.shard.send_full.add(first.count.into());
                        messages = &messages[1..];
                    }
                }
                Err(error) => {
                    self.refused(first, &error);
                    messages = &messages[1..];
                }
            }
        }
    }

    fn count(&self, sent: &[Message]) {
        let (mut packets, mut bytes) = (0, 0);
        for message in sent {
            packets += u64::from(message.count);
            bytes += u64::from(message.len());
            if let Some(peer) = self.view.table.peer(message.peer) {
                peer.counters()
                    .sent(message.count.into(), message.len().into());
            }
        }
        self.shard.sent_packets.add(packets);
        self.shard.sent_bytes.add(bytes);
        self.shard.sent_messages.add(sent.len() as u64);
    }

    /// The kernel took a message not.
    fn refused(&mut self, message: &Message, error: &io::Error) {
        match error.raw_os_error() {
            // Not with segments; which of its packets is at fault, if any, each tells alone.
            Some(libc::EIO | libc::EINVAL | libc::EOPNOTSUPP) if message.count > 1 => {
                if let Some(socket) = self.io.socket(self.family) {
                    socket.can_segment.store(false, Ordering::Relaxed);
                }
                self.one_by_one(message);
            }
            Some(libc::EMSGSIZE) if message.count > 1 => self.one_by_one(message),
            Some(libc::EMSGSIZE) => self.too_long_for_path(message),
            _ => self.shard.send_failed.add(message.count.into()),
        }
    }

    fn one_by_one(&mut self, message: &Message) {
        let mut start = message.start;
        while start < message.end {
            let end = (start + u32::from(message.segment)).min(message.end);
            self.all(&[Message {
                start,
                end,
                segment: (end - start) as u16,
                count: 1,
                peer: message.peer,
            }]);
            start = end;
        }
    }

    /// The path to a peer takes less than its MTU promised: the sender is told.
    fn too_long_for_path(&mut self, message: &Message) {
        self.shard.too_big.add(1);
        let packet = &self.arena[message.start as usize..message.end as usize];
        let (Ok(ip), Some(peer)) = (Ip::parse(packet), self.view.table.peer(message.peer)) else {
            return;
        };
        let headers = match self.family {
            Family::V4 => 28,
            Family::V6 => 48,
        };
        let known = self.io.opener.path_mtu(peer.endpoint());
        let lower = PLATEAUS.into_iter().find(|size| *size < ip.total as u32);
        let mtu = match known.map(|mtu| mtu.saturating_sub(headers)) {
            Ok(mtu) if mtu < ip.total as u32 => mtu,
            _ => lower.unwrap_or(68),
        };
        self.icmp.answer(
            Problem::TooBig(mtu),
            &ip,
            packet,
            self.io,
            self.view,
            self.shard,
            self.now,
        );
    }
}

fn wait_writable(socket: std::os::fd::BorrowedFd<'_>, wait_ms: u16) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::POLLOUT)];
    match poll(&mut fds, PollTimeout::from(wait_ms)) {
        Ok(ready) => ready > 0,
        Err(error) => error == Errno::EINTR,
    }
}

/// Tells senders what became of their packets, not too often.
#[derive(Debug)]
struct Icmp {
    bucket: TokenBucket,
    buffer: Box<[u8; icmp::MAX_LEN]>,
}

impl Icmp {
    #[allow(
        clippy::too_many_arguments,
        reason = "what every step of a packet needs"
    )]
    fn answer(
        &mut self,
        problem: Problem,
        ip: &Ip,
        packet: &[u8],
        io: &Io,
        view: &View,
        shard: &Shard,
        now: Duration,
    ) {
        let own = view.own.get(ip.family()).map(|own| own.address());
        let (source, raw) = match (own, &io.raw) {
            (Some(source @ IpAddr::V4(_)), Some(raw)) => (source, Some(raw)),
            (Some(source @ IpAddr::V6(_)), _) => (source, None),
            // An own address from the device would be a lie to the kernel.
            _ => (ip.dst, None),
        };
        let Some(len) = icmp::error(problem, ip, packet, source, &mut self.buffer) else {
            return;
        };
        if !self.bucket.take(now) {
            shard.icmp_suppressed.add(1);
            return;
        }
        let error = &self.buffer[..len];
        let sent = match (raw, ip.src) {
            (Some(raw), IpAddr::V4(to)) => {
                let to = SockaddrIn::from(SocketAddrV4::new(to, 0));
                sendto(raw.as_raw_fd(), error, &to, MsgFlags::MSG_DONTWAIT).is_ok()
            }
            _ => io
                .write_plain(flow::symmetric_hash(ip, packet), error)
                .is_ok(),
        };
        match sent {
            true => shard.icmp_sent.add(1),
            false => shard.write_failed.add(1),
        }
    }
}
