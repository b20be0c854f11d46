//! Notifications of changes: a socket of its own, read by a thread of its own.
//!
//! A thread and not a task, because it empties the socket even while nobody polls, needs no
//! runtime, and keeps what it read in a queue that cannot grow.
//!
//! Of devices and addresses it remembers what it was told last: the kernel repeats itself often, and
//! which change takes along what is on a device shows only in what the device was before.

mod filters;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, PipeReader, PipeWriter};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use flannel_core::{Change, ChangeStream, MAIN_TABLE, Object, ObjectKey};
use futures_core::Stream;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use self::filters::FilterWatch;
use crate::connection::{Connection, Settings, open};
use crate::link::Device;
use crate::names::{Named, Names};
use crate::neighbour::{NUD_PERMANENT, RTM_DELNEIGH, RTM_NEWNEIGH};
use crate::wire::{Malformed, Message, Messages};
use crate::worker::{Handle, Worker};
use crate::{NetlinkOptions, address, link, lookup, neighbour, nexthop, route};

/// `RTNLGRP_*` of `linux/rtnetlink.h`: link, neigh, ipv4-ifaddr, ipv4-route, ipv6-ifaddr,
/// ipv6-route. Forwarding entries come with the neighbours.
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];
/// `RTNLGRP_NEXTHOP`, which an older kernel than 5.3 does not have; and the groups of rules and of
/// settings (`RTNLGRP_IPV4_RULE`, `_IPV6_RULE`, `_IPV4_NETCONF`, `_IPV6_NETCONF`), without which the
/// timer is left.
const OPTIONAL_GROUPS: [u32; 5] = [32, 8, 19, 24, 25];
const RTM_NEWNETCONF: u16 = 80;
const RTM_DELNETCONF: u16 = 81;
/// More notifications than these, if nobody takes them, are told as [`Change::All`].
const MOST_PENDING: usize = 4096;
/// How long what is told is gathered: a peer is four notifications, and to wake for each of them would
/// cost more than to carry them out.
const GATHER: Duration = Duration::from_millis(1);
/// How long to wait before a socket that could not be had is tried again.
const RETRY: u16 = 1000;
/// The memory for one datagram. Events are one object each.
const DATAGRAM: usize = 64 * 1024;

/// What the thread and the stream share.
#[derive(Debug, Default)]
struct Shared(Mutex<Pending>);

#[derive(Debug, Default)]
struct Pending {
    changes: VecDeque<Change>,
    waker: Option<Waker>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds notifications in their order and wakes who waits for them.
    fn tell(&self, changes: &mut Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        let waker = {
            let mut pending = self.lock();
            let mut all = pending.changes.front() == Some(&Change::All);
            for change in changes.drain(..) {
                all |= change == Change::All || pending.changes.len() >= MOST_PENDING;
                if all {
                    // Whoever takes it reads everything: what comes before that is no news.
                    pending.changes.clear();
                    pending.changes.push_back(Change::All);
                } else if pending.changes.back() != Some(&change) {
                    pending.changes.push_back(change);
                }
            }
            pending.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn tell_all(&self) {
        self.tell(&mut vec![Change::All]);
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
        match pending.changes.pop_front() {
            Some(change) => Poll::Ready(Some(change)),
            None => {
                pending.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Starts to watch. The first notification comes when the watch is on, so that a reading that follows it
/// misses nothing.
pub(crate) fn watch(worker: &Handle) -> ChangeStream {
    let shared = Arc::new(Shared::default());
    let alive = match io::pipe() {
        Ok((reader, writer)) => {
            let of_thread = Arc::clone(&shared);
            let of_worker = Arc::clone(&shared);
            let sent = worker.send(move |worker| {
                // A thread starts in the namespace of the one that makes it.
                if let Some(filters) = FilterWatch::new(&of_thread, &reader) {
                    let thread = std::thread::Builder::new().name("netlink-filters".to_owned());
                    if let Err(error) = thread.spawn(move || filters.run()) {
                        tracing::debug!(%error, "packet filters are not watched: no thread");
                    }
                }
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
            if wait(&self.stop, None, PollTimeout::from(RETRY)).is_err() {
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
            let told = wait(&self.stop, Some(&socket), PollTimeout::NONE);
            let result = told.and_then(|()| {
                std::thread::sleep(GATHER);
                self.drain(&socket, &mut buffer)
            });
            if let Err(end) = result {
                return end;
            }
        }
    }

    /// Reads what there is, then tells it all at once.
    fn drain(&mut self, socket: &Socket, buffer: &mut [u8]) -> Result<(), End> {
        /// After so many datagrams those who wait are told, even if there are more.
        const MOST: usize = 1024;
        let mut changes = Vec::new();
        for _ in 0..MOST {
            match receive(socket, buffer)? {
                Received::Datagram(datagram) => {
                    let read = datagram
                        .ok_or(Malformed("an event of more than 64 KiB"))
                        .and_then(|datagram| self.devices.read_events(datagram, &mut changes));
                    if read.is_err() {
                        changes.push(Change::All);
                    }
                }
                Received::Nothing => break,
                Received::Lost => {
                    // What is in the queue still is older than what was lost: believed after the
                    // reading that follows, it would undo that.
                    while !matches!(receive(socket, buffer)?, Received::Nothing) {}
                    self.devices = Devices::read(&self.options);
                    changes.push(Change::All);
                }
            }
        }
        self.shared.tell(&mut changes);
        Ok(())
    }
}

/// Waits for the socket, or for the time. The stream's end is an error.
fn wait(stop: &PipeReader, socket: Option<&Socket>, timeout: PollTimeout) -> Result<(), End> {
    let mut files = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    files.extend(socket.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
    match poll(&mut files, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let stopped = files.first().and_then(PollFd::any).unwrap_or(true);
    if stopped { Err(End::Stopped) } else { Ok(()) }
}

/// What was in a socket.
enum Received<'a> {
    /// `None`: one that was too long.
    Datagram(Option<&'a [u8]>),
    Nothing,
    /// Events were lost.
    Lost,
}

fn receive<'a>(socket: &Socket, buffer: &'a mut [u8]) -> Result<Received<'a>, Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
    loop {
        match recv(socket.as_raw_fd(), buffer, flags) {
            Ok(len) => return Ok(Received::Datagram(buffer.get(..len))),
            Err(Errno::EAGAIN) => return Ok(Received::Nothing),
            Err(Errno::EINTR) => {}
            Err(Errno::ENOBUFS) => return Ok(Received::Lost),
            Err(errno) => return Err(errno),
        }
    }
}

fn subscribe(receive_buffer: usize) -> io::Result<Socket> {
    let mut socket = open(NETLINK_ROUTE, receive_buffer)?;
    socket.bind_auto()?;
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    for group in OPTIONAL_GROUPS {
        drop(socket.add_membership(group));
    }
    Ok(socket)
}

/// What the events of a datagram tell whoever knows no device yet.
pub(crate) fn hints(datagram: &[u8]) -> Result<Vec<Change>, Malformed> {
    let mut changes = Vec::new();
    Devices::default().read_events(datagram, &mut changes)?;
    Ok(changes)
}

/// The devices and addresses as the events tell of them.
#[derive(Debug, Default)]
struct Devices {
    devices: BTreeMap<u32, Device>,
    names: Names,
    addresses: BTreeMap<(u32, IpAddr, u8), address::Entry>,
}

impl Devices {
    /// The devices there are. Without them, notifications name no device until it changes.
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
        let addresses = address::dump(&mut connection).unwrap_or_default();
        Self {
            names: Names::of(&devices),
            devices: devices
                .into_iter()
                .map(|device| (device.index, device))
                .collect(),
            addresses: addresses
                .into_iter()
                .map(|entry| (entry.key(), entry))
                .collect(),
        }
    }

    fn read_events(&mut self, datagram: &[u8], changes: &mut Vec<Change>) -> Result<(), Malformed> {
        for message in Messages(datagram) {
            self.read_event(&message?, changes)?;
        }
        Ok(())
    }

    fn read_event(
        &mut self,
        message: &Message<'_>,
        changes: &mut Vec<Change>,
    ) -> Result<(), Malformed> {
        match message.kind {
            link::RTM_NEWLINK | link::RTM_DELLINK => self.link(message, changes)?,
            address::RTM_NEWADDR | address::RTM_DELADDR => {
                changes.extend(self.address(message)?);
            }
            RTM_NEWNEIGH | RTM_DELNEIGH => changes.extend(self.neighbour(message)?),
            route::RTM_NEWROUTE | route::RTM_DELROUTE => changes.extend(self.route(message)?),
            nexthop::RTM_NEWNEXTHOP | nexthop::RTM_DELNEXTHOP => {
                changes.extend(self.nexthop(message)?);
            }
            lookup::RTM_NEWRULE | lookup::RTM_DELRULE | RTM_NEWNETCONF | RTM_DELNETCONF => {
                changes.push(Change::Policy);
            }
            _ => {}
        }
        Ok(())
    }

    /// IPv6 and bridges tell of devices in messages of their own, which say less. Of these only a
    /// bridge's are of interest: a port came or went.
    fn link(&mut self, message: &Message<'_>, changes: &mut Vec<Change>) -> Result<(), Malformed> {
        const AF_UNSPEC: u8 = 0;
        let device = link::decode(message.body)?;
        match message.body.first() {
            Some(&AF_UNSPEC) => {}
            Some(&neighbour::AF_BRIDGE) => {
                changes.push(Change::Link(device.name));
                return Ok(());
            }
            _ => return Ok(()),
        }
        if message.kind == link::RTM_DELLINK {
            self.devices.remove(&device.index);
            self.addresses
                .retain(|(index, ..), _| *index != device.index);
            self.names = Names::of(self.devices.values());
            changes.extend(device.name.map(|name| Change::Link(Some(name))));
            return Ok(());
        }
        let before = self.devices.insert(device.index, device.clone());
        if before.as_ref() == Some(&device) {
            return Ok(());
        }
        let renamed = before.as_ref().map(|before| before.name) != Some(device.name);
        if renamed {
            self.names = Names::of(self.devices.values());
        }
        let Some(before) = before else {
            changes.extend(self.is_now(&device));
            return Ok(());
        };
        if device.name != before.name || before.loses_to(&device) {
            let names = [before.name, device.name.filter(|_| renamed)];
            let names = names.into_iter().flatten();
            changes.extend(names.map(|name| Change::Link(Some(name))));
        } else {
            changes.extend(self.is_now(&device));
        }
        Ok(())
    }

    fn is_now(&self, device: &Device) -> Option<Change> {
        let object = device.object(&self.names)?;
        Some(Change::Set(Object::Link(object)))
    }

    fn address(&mut self, message: &Message<'_>) -> Result<Option<Change>, Malformed> {
        let Some(entry) = address::decode(message.body)? else {
            return Ok(None);
        };
        let is_news = if message.kind == address::RTM_NEWADDR {
            self.addresses.insert(entry.key(), entry) != Some(entry)
        } else {
            self.addresses.remove(&entry.key());
            true
        };
        Ok(match self.names.name(entry.index) {
            _ if !is_news => None,
            Named::Device(dev) if message.kind == address::RTM_NEWADDR => {
                Some(Change::Set(Object::Address(entry.object(dev))))
            }
            Named::Device(dev) => Some(Change::Address(Some(dev))),
            Named::Unspeakable => None,
            Named::Unknown => Some(Change::Address(None)),
        })
    }

    /// Busy hosts resolve and forget neighbours all the time. Of interest is what somebody
    /// configured: permanent entries; entries that an administrator removed, which the kernel
    /// reports as failed and not as permanent; and on VXLAN devices, where nothing comes by
    /// itself, everything: an entry may have been made less than permanent.
    fn neighbour(&self, message: &Message<'_>) -> Result<Option<Change>, Malformed> {
        const NUD_FAILED: u16 = 0x20;
        let entry = neighbour::decode(message.body)?;
        let device = self.devices.get(&entry.index);
        let vxlan = device.is_none_or(Device::is_vxlan);
        let removed = message.kind == RTM_DELNEIGH && entry.state & NUD_FAILED != 0;
        let of_interest = vxlan || removed || entry.state & NUD_PERMANENT != 0;
        if !of_interest || !entry.is_of_device() {
            return Ok(None);
        }
        let dev = match self.names.name(entry.index) {
            Named::Device(dev) => dev,
            Named::Unspeakable => return Ok(None),
            Named::Unknown => return Ok(Some(Change::Neighbour(None))),
        };
        let object = entry
            .fdb(dev)
            .map(Object::Fdb)
            .or_else(|| entry.neighbour(dev).map(Object::Neighbour))
            .filter(|_| message.kind == RTM_NEWNEIGH);
        Ok(match object {
            Some(object) => Some(Change::Set(object)),
            None => entry.key(dev).map(Change::Gone),
        })
    }

    fn route(&self, message: &Message<'_>) -> Result<Option<Change>, Malformed> {
        const NLM_F_APPEND: u16 = 0x800;
        let Some(entry) = route::decode(message.body)? else {
            return Ok(None);
        };
        if entry.table != MAIN_TABLE {
            // A rule may lead there.
            return Ok(Some(Change::Policy));
        }
        let key = ObjectKey::Route {
            table: entry.table,
            dst: entry.dst,
            metric: entry.metric,
        };
        if message.kind == route::RTM_DELROUTE {
            return Ok(Some(Change::Gone(key)));
        }
        if message.flags & NLM_F_APPEND != 0 {
            // It is not the first of its key.
            return Ok(Some(Change::Key(key)));
        }
        Ok(Some(match entry.object(&self.names) {
            Ok(route) => Change::Set(Object::Route(route)),
            Err(_) => Change::Key(key),
        }))
    }

    fn nexthop(&self, message: &Message<'_>) -> Result<Option<Change>, Malformed> {
        let Some(entry) = nexthop::decode(message.body)? else {
            return Ok(None);
        };
        let path = entry
            .path
            .filter(|_| message.kind == nexthop::RTM_NEWNEXTHOP);
        let key = ObjectKey::Nexthop(entry.id);
        let object = match path.map(|(index, _)| self.names.name(index)) {
            Some(Named::Device(dev)) => entry.object(dev),
            Some(Named::Unknown) => return Ok(Some(Change::Key(key))),
            Some(Named::Unspeakable) | None => None,
        };
        Ok(Some(match object {
            Some(nexthop) => Change::Set(Object::Nexthop(nexthop)),
            None => Change::Gone(key),
        }))
    }
}

#[cfg(test)]
mod tests {
    use flannel_core::IfName;

    use super::*;

    fn changes(names: std::ops::Range<u32>) -> Vec<Change> {
        names
            .map(|n| Change::Link(Some(IfName::new(format!("x{n}")).expect("a device name"))))
            .collect()
    }

    #[test]
    fn what_nobody_reads_does_not_grow() {
        let shared = Shared::default();
        shared.tell(&mut changes(0..4000));
        assert_eq!(shared.lock().changes.len(), 4000);
        shared.tell(&mut changes(4000..5000));
        assert_eq!(shared.lock().changes, [Change::All]);
        shared.tell(&mut changes(0..10));
        assert_eq!(shared.lock().changes, [Change::All]);
    }
}
