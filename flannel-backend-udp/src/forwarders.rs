//! [`Forwarders`]: the packet paths of this process.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use async_trait::async_trait;
use flannel_core::kernel::{self, Result};
use flannel_core::{Change, ChangeStream, IfName, Note, PathFault, Traffic, Tunnel};
use futures_core::Stream;
use tokio::sync::mpsc;

use crate::forward::{Error, Failure, Forwarder, Report, Watch};
use crate::handover::{self, HandoverError};
use crate::kernel::{PacketPath, Peers, Running};
use crate::options::Options;
use crate::sockets::{InNamespace, Sockets};
use crate::table::TableBuilder;

/// Hints that are not read yet: more of them say nothing more.
const HINTS: usize = 16;

/// Forwarders in this process, one for each TUN device that was asked for: the [`PacketPath`] that
/// carries packets.
///
/// Clones are handles on the same forwarders. They run until they are closed, handed over, or the
/// last handle is dropped: a program that replaces its overlay keeps a handle meanwhile.
#[derive(Debug, Clone)]
pub struct Forwarders {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: Options,
    sockets: Arc<dyn Sockets>,
    all: Mutex<BTreeMap<IfName, Entry>>,
    listeners: Mutex<Vec<mpsc::Sender<Change>>>,
    /// Threads that end forwarders which lost their device.
    ending: Mutex<Vec<JoinHandle<()>>>,
}

/// A forwarder with what it was asked.
#[derive(Debug)]
struct Entry {
    forwarder: Forwarder,
    peers: Arc<Peers>,
    builder: TableBuilder,
    /// Its device has gone: whatever has that name now is another one, and maybe a stranger's.
    lost: Arc<AtomicBool>,
}

impl Default for Forwarders {
    fn default() -> Self {
        Self::new(Options::default(), Arc::new(InNamespace::current()))
    }
}

impl Forwarders {
    /// No forwarder yet; those to come work like this, with queues and sockets from there: the
    /// network namespace of the overlay's kernel.
    pub fn new(options: Options, sockets: Arc<dyn Sockets>) -> Self {
        Self {
            shared: Arc::new(Shared {
                options,
                sockets,
                all: Mutex::default(),
                listeners: Mutex::default(),
                ending: Mutex::default(),
            }),
        }
    }

    /// Hands the forwarder of a device over to the process at the other end of a stream, which calls
    /// [`take_over`](Self::take_over). No packet is lost. End the overlay before, without a
    /// teardown: it would make a new forwarder. Blocks until the other process runs it.
    ///
    /// # Errors
    /// [`HandoverError`]; the forwarder goes on here then. [`HandoverError::Detached`] also if there
    /// is none.
    pub fn hand_over(&self, dev: IfName, stream: &UnixStream) -> Result<(), HandoverError> {
        let Some(entry) = self.shared.all().remove(&dev) else {
            return Err(HandoverError::Detached);
        };
        let Entry {
            forwarder,
            peers,
            builder,
            lost,
        } = entry;
        forwarder.hand_over(stream).map_err(|(forwarder, error)| {
            let entry = Entry {
                forwarder,
                peers,
                builder,
                lost,
            };
            self.shared.all().insert(dev, entry);
            error
        })
    }

    /// Takes a forwarder over from the process at the other end of a stream. Begin the overlay
    /// after that: it finds the packet path there. Answers its device. Blocks until it runs.
    ///
    /// # Errors
    /// [`HandoverError`]; the other process goes on then.
    pub fn take_over(&self, stream: &UnixStream) -> Result<IfName, HandoverError> {
        let lost = Arc::new(AtomicBool::new(false));
        let sockets = Arc::clone(&self.shared.sockets);
        let forwarder = Forwarder::take_over(stream, sockets, self.watch(&lost))?;
        let dev = forwarder.tunnel().dev;
        let mut builder = TableBuilder::new();
        let table = forwarder.table();
        for (subnet, endpoint) in table.routes() {
            builder.insert(*subnet, *endpoint);
        }
        let peers = Arc::new(table.routes().iter().copied().collect());
        // By this table their counters live on.
        forwarder.set_table(builder.build());
        let entry = Entry {
            forwarder,
            peers,
            builder,
            lost,
        };
        let before = self.shared.all().insert(dev, entry);
        drop(before);
        Ok(dev)
    }

    /// Asks the process at the other end of a stream, whose offer [`take_over`](Self::take_over)
    /// has just answered with [`HandoverError::Version`], to end what it offered: its packets are
    /// lost, and device and port are free. It answers to [`hand_over`](Self::hand_over) as if it
    /// had been taken. Blocks until it has ended.
    ///
    /// # Errors
    /// [`HandoverError`]: it goes on, for it does not know the word or does not answer.
    pub fn dismiss(stream: &UnixStream) -> Result<(), HandoverError> {
        handover::dismiss(stream)
    }

    /// Hears of what happens to a forwarder. It is on a thread of the forwarder's own, so nothing is
    /// ended here.
    fn watch(&self, lost: &Arc<AtomicBool>) -> Watch {
        let (shared, lost) = (Arc::downgrade(&self.shared), Arc::clone(lost));
        Arc::new(move |report| {
            if let Report::Failed {
                failure: Failure::Device(_),
                ..
            } = report
            {
                lost.store(true, Ordering::Release);
            }
            if let Some(shared) = shared.upgrade() {
                shared.hint();
            }
        })
    }

    /// Does what may block for some milliseconds, on a thread where that is no harm.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let this = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&this)).await;
        done.unwrap_or_else(|error| {
            Err(kernel::Error::Connection {
                reason: format!("a thread ended: {error}"),
                source: None,
            })
        })
    }

    fn open_now(&self, tunnel: &Tunnel) -> Result<()> {
        // Its port may be that of the one to come.
        let before = self.shared.all().remove(&tunnel.dev);
        if let Some(before) = before {
            before.forwarder.leave();
        }
        self.shared.wait_for_ended();
        let lost = Arc::new(AtomicBool::new(false));
        let forwarder = Forwarder::start(
            tunnel.clone(),
            self.shared.options.clone(),
            Arc::clone(&self.shared.sockets),
            self.watch(&lost),
        )
        .map_err(|error| self.shared.meaning(error))?;
        let entry = Entry {
            forwarder,
            peers: Arc::default(),
            builder: TableBuilder::new(),
            lost,
        };
        let other = self.shared.all().insert(tunnel.dev, entry);
        drop(other);
        Ok(())
    }

    fn set_peers_now(&self, dev: IfName, peers: Arc<Peers>) -> Result<()> {
        let mut all = self.shared.all();
        let entry = all.get_mut(&dev).ok_or_else(|| nowhere(dev))?;
        let gone = entry
            .peers
            .keys()
            .filter(|subnet| !peers.contains_key(subnet));
        for subnet in gone {
            entry.builder.remove(*subnet);
        }
        for (subnet, endpoint) in &*peers {
            if entry.peers.get(subnet) != Some(endpoint) {
                entry.builder.insert(*subnet, *endpoint);
            }
        }
        entry.peers = peers;
        entry.forwarder.set_table(entry.builder.build());
        Ok(())
    }
}

impl Shared {
    fn all(&self) -> MutexGuard<'_, BTreeMap<IfName, Entry>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<mpsc::Sender<Change>>> {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn ending(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The meaning of a forwarder's error to who asks a kernel; who has a port is named.
    fn meaning(&self, error: Error) -> kernel::Error {
        match &error {
            Error::Socket { listen, source } if source.kind() == io::ErrorKind::AddrInUse => {
                kernel::Error::InUse {
                    what: format!("UDP port {} on {}", listen.port(), listen.ip()),
                    by: self
                        .sockets
                        .holder(*listen)
                        .unwrap_or_else(|| "something that cannot be told".to_owned()),
                }
            }
            _ => meaning(error),
        }
    }

    fn end(&self, ended: Vec<Entry>) {
        let name = "flannel-udp-end".to_owned();
        let thread = std::thread::Builder::new().name(name);
        let leave = move || ended.into_iter().for_each(|entry| entry.forwarder.leave());
        // Without a thread they are ended here and now, and take their devices along.
        if let Ok(thread) = thread.spawn(leave) {
            self.ending().push(thread);
        }
    }

    fn wait_for_ended(&self) {
        let ending = std::mem::take(&mut *self.ending());
        for thread in ending {
            // One that panicked has let go of everything, too.
            drop(thread.join());
        }
    }

    /// Whoever listens is to look. Who has not read the last hints yet will look anyway.
    fn hint(&self) {
        self.listeners().retain(|listener| {
            listener.try_send(Change::Link(None)).ok();
            !listener.is_closed()
        });
    }
}

impl Entry {
    fn runs(&self) -> bool {
        // In this order: a loss is told before the forwarder takes the device that came instead.
        self.forwarder.is_alive()
            && self.forwarder.is_attached()
            && !self.lost.load(Ordering::Acquire)
    }
}

#[async_trait]
impl PacketPath for Forwarders {
    fn running(&self) -> Vec<Running> {
        let mut all = self.shared.all();
        let lost: Vec<IfName> = all
            .iter()
            .filter_map(|(dev, entry)| (!entry.runs()).then_some(*dev))
            .collect();
        let ended: Vec<Entry> = lost.iter().filter_map(|dev| all.remove(dev)).collect();
        let running = all.values().map(|entry| Running {
            tunnel: entry.forwarder.tunnel(),
            peers: Arc::clone(&entry.peers),
        });
        let running = running.collect();
        drop(all);
        if !ended.is_empty() {
            // Their threads are waited for, some milliseconds: by who needs their ports.
            self.shared.end(ended);
        }
        running
    }

    async fn open(&self, tunnel: &Tunnel) -> Result<()> {
        let tunnel = tunnel.clone();
        self.blocking(move |this| this.open_now(&tunnel)).await
    }

    async fn alter(&self, tunnel: &Tunnel) -> Result<()> {
        let tunnel = tunnel.clone();
        self.blocking(move |this| {
            let all = this.shared.all();
            let entry = all.get(&tunnel.dev).ok_or_else(|| nowhere(tunnel.dev))?;
            let altered = entry.forwarder.alter(tunnel.clone());
            altered.map_err(|error| this.shared.meaning(error))
        })
        .await
    }

    async fn set_peers(&self, dev: IfName, peers: Arc<Peers>) -> Result<()> {
        self.blocking(move |this| this.set_peers_now(dev, peers))
            .await
    }

    async fn close(&self, dev: IfName) {
        let closed = self.blocking(move |this| {
            let entry = this.shared.all().remove(&dev);
            if let Some(entry) = entry {
                entry.forwarder.leave();
            }
            Ok(())
        });
        // Nobody can tell more of a thread that ended than that the forwarder ended with it.
        drop(closed.await);
    }

    fn hints(&self) -> ChangeStream {
        let (sender, receiver) = mpsc::channel(HINTS);
        self.shared.listeners().push(sender);
        Box::pin(Hints {
            receiver,
            _shared: Arc::clone(&self.shared),
        })
    }

    fn traffic(&self) -> Vec<Traffic> {
        let all = self.shared.all();
        let traffic = all.iter().map(|(dev, entry)| {
            let counts = entry.forwarder.totals();
            let counts = counts.iter().map(|(name, n)| (name.to_owned(), n));
            let mut traffic = Traffic::new(*dev, counts);
            traffic.peers = entry.forwarder.peers();
            traffic
        });
        traffic.collect()
    }

    fn faults(&self) -> Vec<PathFault> {
        let all = self.shared.all();
        let faults = all.iter().filter_map(|(dev, entry)| {
            let health = entry.forwarder.health();
            let problem = health.problem.unwrap_or_default();
            (!health.is_running).then_some(PathFault { dev: *dev, problem })
        });
        faults.collect()
    }

    fn notes(&self) -> Vec<Note> {
        let mut notes = Vec::new();
        let mut note = |text: String| {
            notes.push(Note {
                topic: "packet-path".to_owned(),
                text,
            });
        };
        for (dev, entry) in &*self.shared.all() {
            for text in entry.forwarder.capabilities().notes {
                note(format!("{dev}: {text}"));
            }
            let health = entry.forwarder.health();
            if health.restarts > 0 {
                note(format!(
                    "{dev}: threads were replaced {} times",
                    health.restarts
                ));
            }
        }
        notes
    }
}

/// Hints; holds the forwarders so that the stream does not end with the last other handle.
struct Hints {
    receiver: mpsc::Receiver<Change>,
    _shared: Arc<Shared>,
}

impl Stream for Hints {
    type Item = Change;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        self.receiver.poll_recv(cx)
    }
}

fn nowhere(dev: IfName) -> kernel::Error {
    kernel::Error::NotFound {
        message: format!("a packet path on {dev}"),
    }
}

/// What a forwarder's error means to who asks a kernel.
fn meaning(error: Error) -> kernel::Error {
    let text = flannel_core::error_chain(&error);
    let of_system = |source: &io::Error| match source.kind() {
        // What is ours is explained; what the system says is about the device or the port.
        io::ErrorKind::PermissionDenied if source.raw_os_error().is_none() => {
            kernel::Error::NotPermitted {
                message: text.clone(),
            }
        }
        io::ErrorKind::PermissionDenied => kernel::Error::lacks_net_admin(&text),
        io::ErrorKind::Unsupported => kernel::Error::Unsupported { what: text.clone() },
        io::ErrorKind::AddrNotAvailable
        | io::ErrorKind::ResourceBusy
        | io::ErrorKind::OutOfMemory
        | io::ErrorKind::Interrupted => kernel::Error::Busy {
            message: text.clone(),
        },
        _ => kernel::Error::Rejected {
            message: text.clone(),
        },
    };
    match &error {
        Error::Device { device, source } if source.kind() == io::ErrorKind::NotFound => {
            kernel::Error::NoSuchDevice {
                dev: device.to_string(),
            }
        }
        Error::Device { source, .. } | Error::Socket { source, .. } => of_system(source),
        Error::Thread(_) => kernel::Error::Busy { message: text },
        Error::Stopped => kernel::Error::Connection {
            reason: text,
            source: None,
        },
        Error::Invalid { .. } => kernel::Error::Rejected { message: text },
    }
}
