//! Hints at changes: a socket of its own, read by a thread of its own.
//!
//! A thread and not a task, because it empties the socket even while nobody polls, needs no
//! runtime, and keeps what it read in a set that cannot grow.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use flannel_core::{Change, ChangeStream, IfName};
use futures_core::Stream;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use crate::connection::{Connection, Settings, open};
use crate::neighbour::{NUD_PERMANENT, RTM_DELNEIGH, RTM_NEWNEIGH};
use crate::wire::{Malformed, Message, Messages};
use crate::worker::{Handle, Worker};
use crate::{NetlinkOptions, address, link, neighbour, nexthop, route};

/// `RTNLGRP_*` of `linux/rtnetlink.h`: link, neigh, ipv4-ifaddr, ipv4-route, ipv6-ifaddr,
/// ipv6-route. Forwarding entries come with the neighbours.
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];
/// `RTNLGRP_NEXTHOP`, which an older kernel than 5.3 does not have.
const NEXTHOP_GROUP: u32 = 32;
/// More different hints than these are told as [`Change::All`].
const MOST_PENDING: usize = 256;
/// How long to wait before a socket that could not be had is tried again.
const RETRY: u16 = 1000;
/// The memory for one datagram. Events are one object each.
const DATAGRAM: usize = 64 * 1024;

/// What the thread and the stream share.
#[derive(Debug, Default)]
struct Shared(Mutex<Pending>);

#[derive(Debug, Default)]
struct Pending {
    hints: BTreeSet<Change>,
    waker: Option<Waker>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds hints and wakes who waits for them.
    fn tell(&self, hints: &mut BTreeSet<Change>) {
        if hints.is_empty() {
            return;
        }
        let waker = {
            let mut pending = self.lock();
            pending.hints.append(hints);
            if pending.hints.contains(&Change::All) || pending.hints.len() > MOST_PENDING {
                pending.hints = [Change::All].into();
            }
            pending.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn tell_all(&self) {
        self.tell(&mut [Change::All].into());
    }
}

/// The stream. When it is dropped its end of the pipe closes and the thread ends.
#[derive(Debug)]
struct Hints {
    shared: Arc<Shared>,
    _alive: Option<PipeWriter>,
}

impl Stream for Hints {
    type Item = Change;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        let mut pending = self.shared.lock();
        match pending.hints.pop_first() {
            Some(hint) => Poll::Ready(Some(hint)),
            None => {
                pending.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Starts to watch. The first hint comes when the watch is on, so that a reading that follows it
/// misses nothing.
pub(crate) fn watch(worker: &Handle) -> ChangeStream {
    let shared = Arc::new(Shared::default());
    let alive = match io::pipe() {
        Ok((reader, writer)) => {
            let of_thread = Arc::clone(&shared);
            let of_worker = Arc::clone(&shared);
            let sent = worker.send(move |worker| {
                // A thread starts in the namespace of the one that makes it.
                let watcher = Watcher::new(worker, of_thread, reader);
                let started = std::thread::Builder::new()
                    .name("netlink-watch".to_owned())
                    .spawn(move || watcher.run());
                if let Err(error) = started {
                    tracing::warn!(%error, "changes are not watched: no thread");
                    of_worker.tell_all();
                }
            });
            if let Err(error) = sent {
                tracing::warn!(%error, "changes are not watched");
                shared.tell_all();
            }
            Some(writer)
        }
        Err(error) => {
            tracing::warn!(%error, "changes are not watched: no pipe");
            shared.tell_all();
            None
        }
    };
    Box::pin(Hints {
        shared,
        _alive: alive,
    })
}

/// The thread.
struct Watcher {
    shared: Arc<Shared>,
    /// Closed by the stream when it is dropped.
    stop: PipeReader,
    options: NetlinkOptions,
    devices: Devices,
}

/// Why the thread leaves off.
enum End {
    /// The stream was dropped.
    Stopped,
    /// The socket is of no use any more.
    Broken(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

impl From<Errno> for End {
    fn from(errno: Errno) -> Self {
        Self::Broken(errno.into())
    }
}

impl Watcher {
    fn new(worker: &Worker, shared: Arc<Shared>, stop: PipeReader) -> Self {
        Self {
            shared,
            stop,
            options: worker.options.clone(),
            devices: Devices::default(),
        }
    }

    fn run(mut self) {
        let mut warned = false;
        loop {
            match self.watch() {
                End::Stopped => return,
                End::Broken(error) => {
                    // Once: it is tried every second from now on.
                    if !warned {
                        tracing::warn!(%error, "the watch for changes broke and is tried again");
                        self.shared.tell_all();
                    }
                    warned = true;
                }
            }
            if self.wait(None, PollTimeout::from(RETRY)).is_err() {
                return;
            }
        }
    }

    /// Watches until there is a reason to leave off.
    fn watch(&mut self) -> End {
        let socket = match subscribe(self.options.watch_buffer) {
            Ok(socket) => socket,
            Err(error) => return End::Broken(error),
        };
        self.devices = Devices::read(&self.options);
        self.shared.tell_all();
        let mut buffer = vec![0; DATAGRAM];
        loop {
            let result = self
                .wait(Some(&socket), PollTimeout::NONE)
                .and_then(|()| self.drain(&socket, &mut buffer));
            if let Err(end) = result {
                return end;
            }
        }
    }

    /// Waits for the socket, or for the time. The stream's end is an error.
    fn wait(&self, socket: Option<&Socket>, timeout: PollTimeout) -> Result<(), End> {
        let mut files = vec![PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
        files.extend(socket.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        match poll(&mut files, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let stopped = files.first().and_then(PollFd::any).unwrap_or(true);
        if stopped { Err(End::Stopped) } else { Ok(()) }
    }

    /// Reads what there is, then tells it all at once.
    fn drain(&mut self, socket: &Socket, buffer: &mut [u8]) -> Result<(), End> {
        /// After so many datagrams those who wait are told, even if there are more.
        const MOST: usize = 1024;
        let mut hints = BTreeSet::new();
        for _ in 0..MOST {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
            match recv(socket.as_raw_fd(), buffer, flags) {
                Ok(len) => {
                    let read = buffer
                        .get(..len)
                        .ok_or(Malformed("an event of more than 64 KiB"))
                        .and_then(|datagram| self.devices.read_events(datagram, &mut hints));
                    if read.is_err() {
                        hints.insert(Change::All);
                    }
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => {
                    // Events were lost, also those that tell of new names.
                    self.devices = Devices::read(&self.options);
                    hints.insert(Change::All);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        self.shared.tell(&mut hints);
        Ok(())
    }
}

fn subscribe(receive_buffer: usize) -> io::Result<Socket> {
    let mut socket = open(NETLINK_ROUTE, receive_buffer)?;
    socket.bind_auto()?;
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    drop(socket.add_membership(NEXTHOP_GROUP));
    Ok(socket)
}

/// The hints of a datagram for who knows no device yet.
pub(crate) fn hints(datagram: &[u8]) -> Result<BTreeSet<Change>, Malformed> {
    let mut hints = BTreeSet::new();
    Devices::default().read_events(datagram, &mut hints)?;
    Ok(hints)
}

/// The devices as the events tell of them: name, and whether it is a VXLAN device.
#[derive(Debug, Default)]
struct Devices(BTreeMap<u32, (Option<IfName>, bool)>);

impl Devices {
    /// The devices there are. Without them, hints name no device until it changes.
    fn read(options: &NetlinkOptions) -> Self {
        let mut connection = Connection::new(
            NETLINK_ROUTE,
            Settings {
                deadline: options.deadline,
                receive_buffer: options.receive_buffer,
                progress: Arc::default(),
            },
        );
        let devices = link::dump(&mut connection).unwrap_or_default();
        Self(
            devices
                .into_iter()
                .map(|device| (device.index, (device.name, device.is_vxlan())))
                .collect(),
        )
    }

    fn name(&self, index: u32) -> Option<IfName> {
        self.0.get(&index).and_then(|(name, _)| *name)
    }

    fn read_events(
        &mut self,
        datagram: &[u8],
        hints: &mut BTreeSet<Change>,
    ) -> Result<(), Malformed> {
        for message in Messages(datagram) {
            hints.extend(self.read_event(&message?)?);
        }
        Ok(())
    }

    /// What an event hints at; `None`: nothing that anybody waits for.
    fn read_event(&mut self, message: &Message<'_>) -> Result<Option<Change>, Malformed> {
        Ok(match message.kind {
            link::RTM_NEWLINK => {
                let device = link::decode(message.body)?;
                let bridge_port = message.body.first() == Some(&neighbour::AF_BRIDGE);
                if !bridge_port {
                    self.0
                        .insert(device.index, (device.name, device.is_vxlan()));
                }
                Some(Change::Link(device.name))
            }
            link::RTM_DELLINK => {
                let device = link::decode(message.body)?;
                // A port that leaves its bridge is told in the same words.
                if message.body.first() != Some(&neighbour::AF_BRIDGE) {
                    self.0.remove(&device.index);
                }
                Some(Change::Link(device.name))
            }
            address::RTM_NEWADDR | address::RTM_DELADDR => {
                let index = crate::wire::field_u32(message.body, 4)?;
                Some(Change::Address(self.name(index)))
            }
            RTM_NEWNEIGH | RTM_DELNEIGH => self.neighbour(message)?,
            route::RTM_NEWROUTE | route::RTM_DELROUTE => {
                (!route::is_cloned(message.body)?).then_some(Change::Route)
            }
            nexthop::RTM_NEWNEXTHOP | nexthop::RTM_DELNEXTHOP => Some(Change::Route),
            _ => None,
        })
    }

    /// Busy hosts resolve and forget neighbours all the time. Of interest is what somebody
    /// configured: permanent entries; entries that an administrator removed, which the kernel
    /// reports as failed and not as permanent; and on VXLAN devices, where nothing comes by
    /// itself, everything: an entry may have been made less than permanent.
    fn neighbour(&self, message: &Message<'_>) -> Result<Option<Change>, Malformed> {
        const NUD_FAILED: u16 = 0x20;
        let entry = neighbour::decode(message.body)?;
        let (name, vxlan) = self.0.get(&entry.index).copied().unwrap_or((None, true));
        let removed = message.kind == RTM_DELNEIGH && entry.state & NUD_FAILED != 0;
        let of_interest = vxlan || removed || entry.state & NUD_PERMANENT != 0;
        Ok(of_interest.then_some(Change::Neighbour(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hints(names: std::ops::Range<u32>) -> BTreeSet<Change> {
        names
            .map(|n| Change::Link(Some(IfName::new(format!("x{n}")).expect("a device name"))))
            .collect()
    }

    #[test]
    fn what_nobody_reads_does_not_grow() {
        let shared = Shared::default();
        shared.tell(&mut hints(0..200));
        shared.tell(&mut hints(100..250));
        assert_eq!(shared.lock().hints.len(), 250);
        shared.tell(&mut hints(250..260));
        assert_eq!(shared.lock().hints, [Change::All].into());
        shared.tell(&mut hints(0..10));
        assert_eq!(shared.lock().hints, [Change::All].into());
    }
}
