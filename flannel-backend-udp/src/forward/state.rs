//! What a forwarder's threads and its handle share.

use std::sync::{Arc, Mutex, PoisonError};

use flannel_core::Tunnel;

use super::io::{Io, View};
use super::share::Share;
use super::slot::Slot;
use super::worker::Direction;
use crate::counters::{Shard, Totals};
use crate::namespace::NamespaceId;
use crate::options::{Options, Threads};
use crate::table::Table;

/// Messages that tell how datagrams come.
const ENOUGH: u64 = 100_000;

/// All that outlives a thread.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) options: Options,
    tunnel: Mutex<Tunnel>,
    pub(crate) view: Arc<Slot<View>>,
    /// One for each thread, in the order of `directions`, worker after worker.
    pub(crate) shards: Vec<Arc<Shard>>,
    pub(crate) directions: &'static [Direction],
    /// One for each worker.
    pub(crate) shares: Vec<Arc<Share>>,
    pub(crate) health: Mutex<Health>,
    /// Of the first worker, for what can be told of its sockets.
    pub(crate) io: Mutex<Option<Arc<Slot<Io>>>>,
    capabilities: Mutex<Capabilities>,
    /// The namespace that the device is to be in, where that is known.
    pub(crate) home: Option<NamespaceId>,
    /// What the next thread that wakes is to suffer: 1, a panic; 2, the failure of a socket.
    #[cfg(test)]
    pub(crate) fault: Arc<std::sync::atomic::AtomicU8>,
}

impl State {
    pub(crate) fn new(
        tunnel: Tunnel,
        options: Options,
        table: Arc<Table>,
        home: Option<NamespaceId>,
    ) -> Self {
        let directions: &[Direction] = match options.threads {
            Threads::One => &[Direction::Both],
            Threads::PerDirection => &[Direction::Outbound, Direction::Inbound],
            Threads::Auto if processors() < 2 => &[Direction::Both],
            Threads::Auto => &[Direction::Lead, Direction::Helper],
        };
        let threads = directions.len() * usize::from(options.workers);
        let view = View {
            table,
            own: tunnel.own,
            mtu: tunnel.mtu,
        };
        Self {
            tunnel: Mutex::new(tunnel),
            view: Arc::new(Slot::new(view)),
            shards: (0..threads).map(|_| Arc::default()).collect(),
            directions,
            shares: (0..options.workers).map(|_| Arc::default()).collect(),
            health: Mutex::default(),
            io: Mutex::default(),
            capabilities: Mutex::default(),
            home,
            #[cfg(test)]
            fault: Arc::default(),
            options,
        }
    }

    pub(crate) fn tunnel(&self) -> Tunnel {
        lock(&self.tunnel).clone()
    }

    /// It is another tunnel now: what packets are judged by follows.
    pub(crate) fn set_tunnel(&self, tunnel: Tunnel) {
        self.view.change(|view| View {
            table: Arc::clone(&view.table),
            own: tunnel.own,
            mtu: tunnel.mtu,
        });
        *lock(&self.tunnel) = tunnel;
    }

    pub(crate) fn set_capabilities(&self, capabilities: Capabilities) {
        *lock(&self.capabilities) = capabilities;
    }

    pub(crate) fn capabilities(&self) -> Capabilities {
        let mut capabilities = lock(&self.capabilities).clone();
        let io = lock(&self.io).as_ref().map(|slot| slot.load());
        // A socket may have turned out to take no segments since it was asked.
        if let Some(io) = io
            && capabilities.udp_segment
            && !io.sockets.values().all(|socket| {
                socket
                    .can_segment
                    .load(std::sync::atomic::Ordering::Relaxed)
            })
        {
            capabilities.udp_segment = false;
            let note = "the underlay's device refused a message of many datagrams: one datagram a \
                        message from now on";
            capabilities.notes.push(note.to_owned());
        }
        if capabilities.udp_gro && self.comes_apart() {
            let note = "large datagrams come one at a time: it seems that the underlay's device does \
                        not merge them (`ethtool -K DEVICE gro on`), which costs about a quarter \
                        of the speed";
            capabilities.notes.push(note.to_owned());
        }
        capabilities
    }

    /// Whether many datagrams came that were large and alone. With merging below, bulk comes in
    /// messages of dozens.
    fn comes_apart(&self) -> bool {
        let mut totals = Totals::default();
        for shard in &self.shards {
            totals.add(shard);
        }
        let (packets, messages) = (totals.received_packets, totals.received_messages);
        let are_large = totals.received_bytes > packets.saturating_mul(1_000);
        messages > ENOUGH && are_large && packets < messages.saturating_mul(3) / 2
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// What the kernel offers a forwarder.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Capabilities {
    /// Packets from and to the device have headers: the ground for the rest.
    pub vnet: bool,
    /// Streams of TCP pass the device as packets of up to 64 KiB.
    pub tcp_segments: bool,
    /// So do datagrams of UDP.
    pub udp_segments: bool,
    /// Many datagrams are sent as one message.
    pub udp_segment: bool,
    /// Many datagrams come up as one message.
    pub udp_gro: bool,
    /// Threads that forward.
    pub threads: u16,
    /// What is missing, and what it costs. Empty when nothing is.
    pub notes: Vec<String>,
}

/// Whether a forwarder runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Health {
    /// All its threads run, on queues of a device that is there, and none has failed again and again
    /// in the last seconds.
    pub is_running: bool,
    /// How often threads were replaced.
    pub restarts: u64,
    /// What last went wrong, while it is not mended.
    pub problem: Option<String>,
}
