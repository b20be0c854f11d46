//! Threads, sockets and queues: the packet path that runs.

mod clock;
mod inbound;
mod io;
mod load;
mod open;
mod outbound;
mod patience;
mod share;
mod slot;
mod state;
mod supervisor;
#[cfg(test)]
mod tests;
mod wake;
mod worker;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

pub use self::io::Failure;
pub use self::state::{Capabilities, Health};

pub(crate) use self::io::Socket;
use self::io::View;
pub(crate) use self::open::{Lent, Opened, Queues};

use flannel_core::{PeerTraffic, Tunnel};

use self::state::State;
use self::supervisor::{Command, Supervisor};
use crate::counters::Totals;
use crate::options::Options;
use crate::sockets::Sockets;
use crate::sys;
use crate::table::Table;

/// Why a forwarder does not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What was asked for cannot be.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field of [`Options`], or `tunnel`.
        field: &'static str,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// A queue of the TUN device could not be had.
    #[error("attaching to the TUN device {device}")]
    Device {
        /// The device.
        device: flannel_core::IfName,
        /// What the system said.
        source: std::io::Error,
    },
    /// A socket could not be had.
    #[error("opening a UDP socket on {listen}")]
    Socket {
        /// The address.
        listen: std::net::SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A thread, or a descriptor to wake one, could not be had.
    #[error("starting a thread")]
    Thread(#[source] std::io::Error),
    /// The forwarder is stopped, or its supervisor has died.
    #[error("the forwarder is stopped")]
    Stopped,
}

/// Is told of what happens to a forwarder, on one of its threads: it must not block.
pub type Watch = Arc<dyn Fn(&Report) + Send + Sync>;

/// Something happened to a forwarder.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Report {
    /// A worker cannot go on. It is replaced.
    Failed {
        /// Its number.
        worker: u16,
        /// Why.
        failure: Failure,
    },
    /// All workers run again.
    Recovered,
    /// What was lost could not be had again yet; it is tried on.
    Waiting {
        /// What the system said.
        reason: String,
    },
}

/// A packet path between a TUN device and UDP sockets, on threads of its own.
///
/// It runs until it is stopped or dropped. Threads that fail are replaced, and a device that was
/// made anew is attached to again.
pub struct Forwarder {
    state: Arc<State>,
    commands: SyncSender<Command>,
    supervisor: Option<JoinHandle<()>>,
}

impl Forwarder {
    /// Opens queues and sockets and begins to forward. The tunnel's device must be there, with
    /// several queues ([`Tun::FOR_TUNNEL`](flannel_core::Tun::FOR_TUNNEL)), and goes with the
    /// forwarder from then on: with this process, unless it is handed over. The first addresses of
    /// its own subnets are the source of ICMP errors. There are no peers until
    /// [`set_table`](Self::set_table).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for what cannot be; [`Error::Device`] and [`Error::Socket`] where the system
    /// refuses. Nothing is left behind then.
    pub fn start(
        tunnel: Tunnel,
        options: Options,
        sockets: Arc<dyn Sockets>,
        watch: Watch,
    ) -> Result<Self, Error> {
        check(&tunnel, &options)?;
        let home = sockets.namespace().ok();
        let state = State::new(tunnel, options, Arc::new(Table::default()), home);
        let state = Arc::new(state);
        Self::launch(state, sockets, watch, None)
    }

    fn launch(
        state: Arc<State>,
        sockets: Arc<dyn Sockets>,
        watch: Watch,
        opened: Option<Opened>,
    ) -> Result<Self, Error> {
        let (commands, receiver) = sync_channel(64);
        let (started, outcome) = sync_channel(1);
        let supervisor = {
            let (state, commands) = (Arc::clone(&state), commands.clone());
            std::thread::Builder::new()
                .name("flannel-udp".to_owned())
                .spawn(move || {
                    let built = Supervisor::start(state, sockets, watch, commands, opened);
                    match built {
                        Ok(supervisor) => {
                            let _ = started.send(Ok(()));
                            supervisor.run(&receiver);
                        }
                        Err(error) => {
                            let _ = started.send(Err(error));
                        }
                    }
                })
                .map_err(Error::Thread)?
        };
        match outcome.recv() {
            Ok(Ok(())) => Ok(Self {
                state,
                commands,
                supervisor: Some(supervisor),
            }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::Stopped),
        }
    }

    /// Becomes another tunnel. Queues stay when the device does; sockets stay when their address
    /// does. On an error it stays the old one, except for a socket whose port the new one could not
    /// have while the old one was open.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn alter(&self, tunnel: Tunnel) -> Result<(), Error> {
        check(&tunnel, &self.state.options)?;
        self.ask(|reply| Command::Alter(tunnel, reply))?
    }

    /// Attaches to the device again, whether or not it seems to be the same.
    ///
    /// # Errors
    ///
    /// [`Error::Device`]: it cannot be had; that is tried on until it can.
    pub fn reattach(&self) -> Result<(), Error> {
        self.ask(Command::Reattach)?
    }

    /// Goes over to another table of peers, between two batches of packets.
    pub fn set_table(&self, table: Table) {
        let table = Arc::new(table);
        self.state.view.change(|view| View {
            table: Arc::clone(&table),
            own: view.own,
            mtu: view.mtu,
        });
    }

    /// What it was last asked to be.
    pub fn tunnel(&self) -> Tunnel {
        self.state.tunnel()
    }

    /// How it works.
    pub fn options(&self) -> &Options {
        &self.state.options
    }

    /// The table it forwards by.
    pub fn table(&self) -> Arc<Table> {
        Arc::clone(&self.state.view.load().table)
    }

    /// What the kernel offers here, and what was done without.
    pub fn capabilities(&self) -> Capabilities {
        self.state.capabilities()
    }

    /// Tells if its queues are, at this moment, of a device that is there under its name, in the
    /// namespace that its sockets come from. A device that was renamed or moved takes its queues along.
    pub fn is_attached(&self) -> bool {
        let io = state::lock(&self.state.io).as_ref().map(|slot| slot.load());
        let dev = self.tunnel().dev;
        // To whom the kernel does not tell, every namespace is the right one.
        let is_at_home = |queue: BorrowedFd<'_>| {
            let home = self.state.home;
            home.is_none_or(|home| home.holds_device_of(queue).unwrap_or(true))
        };
        io.is_some_and(|io| {
            let mut queues = io.queues.iter().map(AsFd::as_fd);
            queues.all(|queue| sys::is_attached(queue, &dev) && is_at_home(queue))
        })
    }

    /// Tells if anybody looks after its threads. Who did may have died of a defect.
    pub fn is_alive(&self) -> bool {
        let supervisor = self.supervisor.as_ref();
        supervisor.is_some_and(|supervisor| !supervisor.is_finished())
    }

    /// Whether everything runs.
    pub fn health(&self) -> Health {
        self.state
            .health
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Counters of all threads together, since the start.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for shard in &self.state.shards {
            totals.add(shard);
        }
        totals
    }

    /// Counters of each thread: of each worker the outbound ones, then the inbound ones, where
    /// these are two.
    pub fn totals_by_thread(&self) -> Vec<Totals> {
        let shards = self.state.shards.iter();
        shards
            .map(|shard| {
                let mut totals = Totals::default();
                totals.add(shard);
                totals
            })
            .collect()
    }

    /// Counters of each peer of the table.
    pub fn peers(&self) -> Vec<PeerTraffic> {
        let table = self.table();
        let peers = table.peers().iter();
        peers
            .map(|peer| peer.counters().totals(peer.endpoint()))
            .collect()
    }

    /// Duplicates of everything that is open.
    pub(crate) fn lend(&self) -> Result<Lent, Error> {
        self.ask(Command::Lend)?.map_err(Error::Thread)
    }

    /// Ends the threads that forward, at a boundary between two batches; nothing is closed.
    pub(crate) fn pause(&self) -> Result<(), Error> {
        self.ask(Command::Pause)
    }

    /// Starts them again.
    pub(crate) fn resume(&self) -> Result<(), Error> {
        self.ask(Command::Resume)?
    }

    /// Begins to forward with what is open, and with a table.
    pub(crate) fn adopt(
        tunnel: Tunnel,
        options: Options,
        table: Table,
        opened: Opened,
        sockets: Arc<dyn Sockets>,
        watch: Watch,
    ) -> Result<Self, Error> {
        let home = sockets.namespace().ok();
        let state = Arc::new(State::new(tunnel, options, Arc::new(table), home));
        Self::launch(state, sockets, watch, Some(opened))
    }

    /// Ends all threads, at a boundary between two batches, and closes queues and sockets. The
    /// device goes with them, unless its queues were handed over.
    pub fn stop(mut self) {
        self.end();
    }

    /// The same, but the device stays, with its addresses and routes, until it is deleted or somebody
    /// else forwards its packets: whoever looks after it as after any other does not lose it with the
    /// packet path.
    pub fn leave(mut self) {
        self.end_by(Command::Leave);
    }

    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, Error> {
        let (reply, answer) = sync_channel(1);
        self.commands
            .send(command(reply))
            .map_err(|_| Error::Stopped)?;
        answer.recv().map_err(|_| Error::Stopped)
    }

    fn end(&mut self) {
        self.end_by(Command::Stop);
    }

    fn end_by(&mut self, command: Command) {
        if let Some(supervisor) = self.supervisor.take() {
            let _ = self.commands.send(command);
            let _ = supervisor.join();
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for Forwarder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Forwarder")
            .field("tunnel", &self.tunnel())
            .field("options", &self.state.options)
            .finish_non_exhaustive()
    }
}

pub(crate) fn check(tunnel: &Tunnel, options: &Options) -> Result<(), Error> {
    let wrong = |field, reason: &str| {
        Err(Error::Invalid {
            field,
            reason: reason.to_owned(),
        })
    };
    if let Some(fault) = tunnel.fault() {
        return wrong("tunnel", fault);
    }
    if !(1..=16).contains(&options.workers) {
        return wrong("workers", "not between 1 and 16");
    }
    Ok(())
}
