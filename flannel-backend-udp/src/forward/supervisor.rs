//! The thread that starts the others, and starts them again.

use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use flannel_core::{DualStack, Family, Tunnel};

use super::clock::Clock;
use super::io::{Failure, Io, Socket};
use super::open::{Lent, Opened, Queues};
use super::share::Scale;
use super::slot::Slot;
use super::state::{Capabilities, State, lock};
use super::wake::Wake;
use super::worker::{Direction, Thread};
use super::{Error, Report, Watch};
use crate::packet::coalesce::Merge;
use crate::sockets::Sockets;
use crate::sys;

/// The first and the longest pause before something is tried again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// After so long without a failure the next is the first again.
const CALM: Duration = Duration::from_secs(10);
/// More failures than these without such a pause are no accidents: all is opened anew each time, and
/// what runs in between does not count as running.
const ACCIDENTS: u32 = 4;
/// How long threads may take to let go of a socket. They do it between two batches.
const LET_GO: Duration = Duration::from_secs(2);
/// And so long what they let go may still be held by a child that is just being made.
const FORKED: Duration = Duration::from_millis(100);

/// What a supervisor is told.
pub(crate) enum Command {
    Alter(Tunnel, SyncSender<Result<(), Error>>),
    Reattach(SyncSender<Result<(), Error>>),
    Ended {
        thread: usize,
        outcome: Result<(), Failure>,
    },
    Lend(SyncSender<std::io::Result<Lent>>),
    Pause(SyncSender<()>),
    Resume(SyncSender<Result<(), Error>>),
    /// Ends it, and leaves the device.
    Leave,
    Stop,
}

pub(crate) struct Supervisor {
    state: Arc<State>,
    opener: Arc<dyn Sockets>,
    watch: Watch,
    commands: SyncSender<Command>,
    queues: Queues,
    /// Of each worker.
    sockets: Vec<DualStack<Arc<Socket>>>,
    raw: Option<Arc<OwnedFd>>,
    /// Of each worker.
    ios: Vec<Arc<Slot<Io>>>,
    threads: Vec<Running>,
    /// The device is gone: the queues are of no use.
    is_detached: bool,
    /// A socket failed: all are opened anew.
    is_deaf: bool,
    /// No thread is to run: the forwarder is being handed over.
    is_paused: bool,
    clock: Clock,
    failures: u32,
    /// The number of times that a thread has failed in short succession.
    falls: u32,
    last_failure: Duration,
    retry: Option<Duration>,
    /// It runs again, and counts as running from then on unless it fails before.
    calm: Option<Duration>,
}

/// One thread, or the place of one.
struct Running {
    wake: Arc<Wake>,
    handle: Option<JoinHandle<()>>,
    starts: u64,
}

impl Supervisor {
    pub(crate) fn start(
        state: Arc<State>,
        opener: Arc<dyn Sockets>,
        watch: Watch,
        commands: SyncSender<Command>,
        opened: Option<Opened>,
    ) -> Result<Self, Error> {
        let opened = match opened {
            Some(opened) => opened,
            None => open(&state, &*opener)?,
        };
        let mut this = Self {
            queues: opened.queues,
            sockets: opened.sockets,
            raw: opener.raw().ok().map(Arc::new),
            ios: Vec::new(),
            threads: Vec::new(),
            is_detached: false,
            is_deaf: false,
            is_paused: false,
            clock: Clock::new(),
            failures: 0,
            falls: 0,
            last_failure: Duration::ZERO,
            retry: None,
            calm: None,
            state,
            opener,
            watch,
            commands,
        };
        this.install();
        for _ in 0..this.state.shards.len() {
            this.threads.push(Running {
                wake: Arc::new(Wake::new().map_err(Error::Thread)?),
                handle: None,
                starts: 0,
            });
        }
        if let Err(error) = this.spawn_missing() {
            this.stop_threads();
            return Err(Error::Thread(error));
        }
        lock(&this.state.health).is_running = true;
        Ok(this)
    }

    /// Works until it is told to stop.
    pub(crate) fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let due = [self.retry, self.calm].into_iter().flatten().min();
            let command = match due {
                None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => commands.recv_timeout(at.saturating_sub(self.clock.now())),
            };
            match command {
                Ok(Command::Leave) => {
                    if let Some(queue) = self.queues.fds.first() {
                        sys::leave(queue.as_fd());
                    }
                    break;
                }
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(Command::Alter(tunnel, reply)) => {
                    let result = self.alter(tunnel);
                    let _ = reply.send(result);
                }
                Ok(Command::Reattach(reply)) => {
                    self.is_detached = true;
                    let result = self.recover();
                    let _ = reply.send(result);
                }
                Ok(Command::Lend(reply)) => {
                    let _ = reply.send(self.lend());
                }
                Ok(Command::Pause(reply)) => {
                    self.is_paused = true;
                    self.stop_threads();
                    let _ = reply.send(());
                }
                Ok(Command::Resume(reply)) => {
                    self.is_paused = false;
                    let result = self.recover();
                    let _ = reply.send(result);
                }
                Ok(Command::Ended { thread, outcome }) => self.ended(thread, outcome),
                Err(RecvTimeoutError::Timeout) => self.pass(),
            }
        }
        self.stop_threads();
        lock(&self.state.health).is_running = false;
    }

    /// Becomes another tunnel: opens what is new, then lets go of what is not wanted.
    fn alter(&mut self, tunnel: Tunnel) -> Result<(), Error> {
        let before = self.state.tunnel();
        if tunnel.dev != before.dev {
            self.queues = Queues::open(&tunnel.dev, &self.state.options, &*self.opener)?;
            self.is_detached = false;
        }
        let mut changed = Vec::new();
        for family in [Family::V4, Family::V6] {
            let (old, new) = (
                before.listen.get(family).copied(),
                tunnel.listen.get(family).copied(),
            );
            if old == new {
                continue;
            }
            let opened = match new {
                Some(new) => {
                    let opened = self.open_instead(family, new)?;
                    opened.into_iter().map(Some).collect()
                }
                None => vec![None; self.sockets.len()],
            };
            changed.push((family, opened));
        }
        for (family, opened) in changed {
            for (sockets, opened) in self.sockets.iter_mut().zip(opened) {
                sockets.set(family, opened);
            }
        }
        self.install();
        self.state.set_tunnel(tunnel);
        // A thread may be waiting for a device of the old name.
        if self.threads.iter().any(|thread| thread.handle.is_none()) {
            let _ = self.recover();
        }
        Ok(())
    }

    /// Opens sockets on an address. The old ones may stand in the way, with the same port on an
    /// address that holds the new one or is held by it; then they are closed first.
    fn open_instead(
        &mut self,
        family: Family,
        listen: std::net::SocketAddr,
    ) -> Result<Vec<Arc<Socket>>, Error> {
        let options = &self.state.options;
        let error = match Socket::open(listen, options, &*self.opener) {
            Err(Error::Socket { source, .. }) if source.kind() == std::io::ErrorKind::AddrInUse => {
                source
            }
            result => return result,
        };
        let mut old = Vec::new();
        for sockets in &mut self.sockets {
            old.extend(sockets.get(family).map(Arc::clone));
            sockets.set(family, None);
        }
        if old.is_empty() {
            return Err(Error::Socket {
                listen,
                source: error,
            });
        }
        self.install();
        let until = self.clock.now() + LET_GO;
        while old.iter().any(|socket| Arc::strong_count(socket) > 1) && self.clock.now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(old);
        // A child of this program holds what is open too, from its fork until it runs another one.
        let until = self.clock.now() + FORKED;
        let opened = loop {
            match Socket::open(listen, &self.state.options, &*self.opener) {
                Err(Error::Socket { source, .. })
                    if source.kind() == std::io::ErrorKind::AddrInUse
                        && self.clock.now() < until =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                opened => break opened,
            }
        };
        if opened.is_err()
            && let Some(before) = self.state.tunnel().listen.get(family).copied()
            && let Ok(again) = Socket::open(before, &self.state.options, &*self.opener)
        {
            for (sockets, again) in self.sockets.iter_mut().zip(again) {
                sockets.set(family, Some(again));
            }
            self.install();
        }
        opened
    }

    fn lend(&self) -> std::io::Result<Lent> {
        let queues = self.queues.fds.iter().map(|queue| queue.try_clone());
        let sockets = self.sockets.iter().flat_map(|sockets| sockets.values());
        Ok(Lent {
            queues: queues.collect::<Result<_, _>>()?,
            sockets: sockets
                .map(|socket| socket.fd.try_clone())
                .collect::<Result<_, _>>()?,
            is_detached: self.is_detached,
        })
    }

    /// Gives the threads what there is now, and lets the device go with its queues: of a process
    /// that is killed no device is to stay behind that swallows packets. Before there is all that a
    /// packet path needs, it stays: who lacks the port still wants the device.
    fn install(&mut self) {
        if let Some(queue) = self.queues.fds.first() {
            // One that has gone already is told of by whoever reads it.
            sys::hold(queue.as_fd());
        }
        let merge = Merge {
            tcp: self.queues.offload.tcp,
            udp: self.queues.offload.udp,
            verify: self.state.options.verify,
        };
        for (index, sockets) in self.sockets.iter().enumerate() {
            let io = Io {
                queues: Arc::clone(&self.queues.fds),
                index,
                sockets: sockets.clone(),
                vnet: self.queues.vnet,
                merge,
                raw: self.raw.clone(),
                opener: Arc::clone(&self.opener),
            };
            match self.ios.get(index) {
                Some(slot) => slot.set(io),
                None => self.ios.push(Arc::new(Slot::new(io))),
            }
        }
        for thread in &self.threads {
            thread.wake.nudge();
        }
        *lock(&self.state.io) = self.ios.first().map(Arc::clone);
        self.tell_capabilities();
    }

    fn tell_capabilities(&self) {
        let all = |can: &dyn Fn(&Socket) -> bool| {
            let mut sockets = self.sockets.iter().flat_map(|sockets| sockets.values());
            sockets.all(|socket| can(socket))
        };
        let segment = all(&|socket| {
            socket
                .can_segment
                .load(std::sync::atomic::Ordering::Relaxed)
        });
        let mut capabilities = Capabilities {
            vnet: self.queues.vnet,
            tcp_segments: self.queues.offload.tcp,
            udp_segments: self.queues.offload.udp,
            udp_segment: segment,
            udp_gro: all(&|socket| socket.can_merge),
            threads: self.state.shards.len() as u16,
            notes: Vec::new(),
        };
        let missing = [
            (
                capabilities.vnet,
                "offload is off: each packet passes the TUN device alone, at about a fifth of the \
                 speed",
            ),
            (
                capabilities.tcp_segments || !capabilities.vnet,
                "the TUN device takes no large packets of TCP: each segment passes it alone",
            ),
            (
                capabilities.udp_segments || !capabilities.tcp_segments,
                "the TUN device takes no large packets of UDP (Linux 6.2 does): each datagram \
                 passes it alone",
            ),
            (
                segment,
                "no UDP_SEGMENT (Linux 4.18 has it): each datagram is a message",
            ),
            (
                capabilities.udp_gro,
                "no UDP_GRO (Linux 5.0 has it): each datagram comes alone",
            ),
            (
                all(&|socket| socket.is_wide),
                "the send buffers are small (CAP_NET_ADMIN in the first user namespace, or \
                 net.core.wmem_max, makes them large): what is for peers that do not answer can \
                 take the room of what is for others",
            ),
            (
                self.raw.is_some(),
                "no raw socket (CAP_NET_RAW): ICMP errors over IPv4 bear the address that the \
                 packet was for",
            ),
        ];
        let missing = missing.into_iter().filter(|(has, _)| !has);
        capabilities.notes = missing.map(|(_, note)| note.to_owned()).collect();
        self.state.set_capabilities(capabilities);
    }

    /// A thread has ended; it is asked about what it was.
    fn ended(&mut self, thread: usize, outcome: Result<(), Failure>) {
        if let Some(running) = self.threads.get_mut(thread)
            && let Some(handle) = running.handle.take()
        {
            let _ = handle.join();
        }
        let Err(failure) = outcome else {
            return;
        };
        tracing::warn!(thread, %failure, "a worker of the packet path has failed");
        self.is_detached |= matches!(failure, Failure::Device(_));
        self.is_deaf |= matches!(failure, Failure::Socket(_));
        {
            let mut health = lock(&self.state.health);
            health.is_running = false;
            health.problem = Some(failure.to_string());
        }
        let worker = (thread / self.state.directions.len()) as u16;
        (self.watch)(&Report::Failed { worker, failure });
        let now = self.clock.now();
        if now > self.last_failure + CALM {
            self.failures = 0;
            self.falls = 0;
        }
        self.last_failure = now;
        self.falls = self.falls.saturating_add(1);
        self.calm = None;
        if self.falls > ACCIDENTS {
            self.is_detached = true;
            self.is_deaf = true;
        }
        self.schedule();
    }

    /// Does what is due.
    fn pass(&mut self) {
        let now = self.clock.now();
        if self.retry.is_some_and(|at| at <= now) {
            let _ = self.recover();
        }
        if self.calm.is_some_and(|at| at <= now) {
            self.falls = 0;
            self.runs();
        }
    }

    /// All threads run; that counts unless they have failed too often.
    fn runs(&mut self) {
        if self.falls > ACCIDENTS {
            self.calm = Some(self.last_failure + CALM);
            return;
        }
        self.calm = None;
        let mut health = lock(&self.state.health);
        health.is_running = true;
        health.problem = None;
        drop(health);
        tracing::info!("the packet path runs again");
        (self.watch)(&Report::Recovered);
    }

    /// Tries again after a pause that grows.
    fn schedule(&mut self) {
        let pause = PAUSE.0 * 2u32.pow(self.failures.min(10));
        self.failures += 1;
        self.retry = Some(self.clock.now() + pause.min(PAUSE.1));
    }

    /// Gets back what was lost, and starts the threads that are missing.
    fn recover(&mut self) -> Result<(), Error> {
        self.retry = None;
        if self.is_paused {
            return Ok(());
        }
        let result = self.try_recover();
        match &result {
            Ok(()) => self.runs(),
            Err(error) => {
                let source = std::error::Error::source(error);
                let reason =
                    source.map_or_else(|| error.to_string(), |source| format!("{error}: {source}"));
                {
                    let mut health = lock(&self.state.health);
                    health.is_running = false;
                    if health.problem.as_ref() != Some(&reason) {
                        tracing::warn!(reason, "the packet path waits");
                    }
                    health.problem = Some(reason.clone());
                }
                (self.watch)(&Report::Waiting { reason });
                self.schedule();
            }
        }
        result
    }

    fn try_recover(&mut self) -> Result<(), Error> {
        if self.is_detached {
            let dev = self.state.tunnel().dev;
            self.queues = Queues::open(&dev, &self.state.options, &*self.opener)?;
            self.is_detached = false;
            self.install();
        }
        if self.is_deaf {
            for (family, listen) in self.state.tunnel().listen.iter() {
                let opened = self.open_instead(family, *listen)?;
                for (sockets, opened) in self.sockets.iter_mut().zip(opened) {
                    sockets.set(family, Some(opened));
                }
            }
            self.is_deaf = false;
            self.install();
        }
        self.spawn_missing().map_err(Error::Thread)
    }

    fn spawn_missing(&mut self) -> std::io::Result<()> {
        let per_worker = self.state.directions.len();
        for index in 0..self.threads.len() {
            if self.threads[index].handle.is_some() {
                continue;
            }
            let wake = Arc::new(Wake::new()?);
            let direction = self.state.directions[index % per_worker];
            let share = Arc::clone(&self.state.shares[index / per_worker]);
            match direction {
                Direction::Lead => share.set_lead(Arc::clone(&wake)),
                Direction::Helper => share.set_helper(Arc::clone(&wake)),
                _ => {}
            }
            let thread = Thread {
                direction,
                share,
                scale: Scale::default(),
                io: self.ios[index / per_worker].reader(),
                view: self.state.view.reader(),
                wake: Arc::clone(&wake),
                shard: Arc::clone(&self.state.shards[index]),
                icmp_rate: self.state.options.icmp_rate,
                clock: self.clock,
                #[cfg(test)]
                fault: Arc::clone(&self.state.fault),
            };
            let commands = self.commands.clone();
            let handle = std::thread::Builder::new()
                .name(format!("flannel-udp-{index}"))
                .spawn(move || {
                    let outcome = catch_unwind(AssertUnwindSafe(|| thread.run()));
                    let outcome = outcome.unwrap_or_else(|panic| Err(Failure::panic(&*panic)));
                    let _ = commands.send(Command::Ended {
                        thread: index,
                        outcome,
                    });
                })?;
            let running = &mut self.threads[index];
            running.wake = wake;
            running.handle = Some(handle);
            running.starts += 1;
            if running.starts > 1 {
                lock(&self.state.health).restarts += 1;
            }
        }
        Ok(())
    }

    fn stop_threads(&mut self) {
        for thread in &self.threads {
            thread.wake.stop();
        }
        for thread in &mut self.threads {
            if let Some(handle) = thread.handle.take() {
                let _ = handle.join();
            }
        }
    }
}

fn open(state: &State, opener: &dyn Sockets) -> Result<Opened, Error> {
    let tunnel = state.tunnel();
    let queues = Queues::open(&tunnel.dev, &state.options, opener)?;
    let mut sockets = vec![DualStack::default(); usize::from(state.options.workers)];
    for (family, listen) in tunnel.listen.iter() {
        let opened = Socket::open(*listen, &state.options, opener)?;
        for (sockets, opened) in sockets.iter_mut().zip(opened) {
            sockets.set(family, Some(opened));
        }
    }
    Ok(Opened { queues, sockets })
}
