//! The lock of an overlay: an abstract Unix socket with its name.
//!
//! Such names belong to a network namespace, are had by one socket at a time, and vanish with the
//! last descriptor, so with the process, however it ends. The kernel tells everybody who connects
//! which process listens. Nothing is written for it, so nothing is left behind.
//!
//! Every process of the namespace may take a name, be it without any rights there. So there are
//! several names, and who is found under one and has no rights over the namespace (another user than
//! ours, and not root) is told of and passed over. Where all of them are taken so, the overlay is had
//! without a lock.
//!
//! A thread answers, not a task: it needs no runtime, and nobody who connects keeps the overlay from
//! its work. Whoever has the right asks for a handover with one octet and waits for the end of the
//! stream, which comes when the name is free.

use std::collections::VecDeque;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use flannel_core::kernel::{Error, Result};
use flannel_core::{Claim, Claimant, Note, OverlayName};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, UnixCredentials, connect, getsockopt, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::geteuid;
use tokio::sync::{mpsc, oneshot};

use crate::worker::Handle;

mod owner;

/// The number of names that a lock has.
const NAMES: u8 = 4;
/// The octet that asks for a handover.
const ASK: u8 = b'r';
/// The time that whoever was asked for a handover may take, in milliseconds.
const HANDOVER: u16 = 10_000;
/// The time that there may be no room in a holder's queue, in seconds.
const FULL: i64 = 1;
/// The number of tries of a name that is taken and not listened on: a holder binds first and
/// listens then, and one that ends does so in between.
const TRIES: u32 = 4;
/// The wait between two of these tries.
const RETRY: Duration = Duration::from_millis(5);
/// The number of connections that are kept. One that has not asked makes room for the next.
const CALLERS: usize = 16;
/// The wait after a connection that leads to nothing: so many of them a second cost nothing.
const REST: Duration = Duration::from_millis(1);

/// Claims an overlay in the namespace of a thread.
pub(crate) async fn claim(worker: &Handle, name: &OverlayName, replace: bool) -> Result<Claim> {
    let names = Names::of(name)?;
    let (stop, alive) = io::pipe().map_err(|error| failed("a pipe", error))?;
    let (reply, answer) = oneshot::channel();
    let started = worker
        .call(move |_, _| {
            // A thread starts in the namespace of the one that makes it.
            thread::Builder::new()
                .name("netlink-claim".to_owned())
                .spawn(move || run(&names, replace, stop, reply))
        })
        .await?;
    let thread = started.map_err(|error| failed("a thread", error))?;
    let ended = || Error::Connection {
        reason: "the thread that claims the overlay has ended".to_owned(),
        source: None,
    };
    let granted = answer.await.map_err(|_| ended())??;
    let claim = match granted.socket {
        Some((listener, asked)) => {
            let guard = Guard {
                listener: Some(listener),
                alive: Some(alive),
                thread: Some(thread),
            };
            Claim::new(guard, asked)
        }
        None => Claim::free(),
    };
    Ok(granted.strangers.into_iter().fold(claim, Claim::with_note))
}

fn failed(what: &str, source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Connection {
        reason: format!("{what} for the lock of the overlay"),
        source: Some(Box::new(source)),
    }
}

/// The socket, which keeps others out. It is held here too, so that the claim outlives the thread.
#[derive(Debug)]
struct Guard {
    listener: Option<Arc<UnixListener>>,
    alive: Option<PipeWriter>,
    thread: Option<JoinHandle<VecDeque<Caller>>>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.alive = None;
        // It never waits for anybody, so it ends at once.
        let callers = self.thread.take().map(JoinHandle::join);
        self.listener = None;
        // Who has asked hears of it when the name is free.
        drop(callers);
    }
}

/// A lock that was had, or that nobody can have.
struct Granted {
    socket: Option<(Arc<UnixListener>, mpsc::Receiver<Claimant>)>,
    strangers: Vec<Note>,
}

/// Runs the thread: takes the lock, tells so, and answers until it is let go.
fn run(
    names: &Names,
    replace: bool,
    stop: PipeReader,
    reply: oneshot::Sender<Result<Granted>>,
) -> VecDeque<Caller> {
    let found = match names.take(replace, &stop) {
        Ok(found) => found,
        Err(error) => {
            // Nobody waits for it: the claim was given up.
            drop(reply.send(Err(error)));
            return VecDeque::new();
        }
    };
    let Some(listener) = found.listener else {
        let granted = Granted {
            socket: None,
            strangers: found.strangers,
        };
        drop(reply.send(Ok(granted)));
        return VecDeque::new();
    };
    let (ask, asked) = mpsc::channel(1);
    let listener = Arc::new(listener);
    let granted = Granted {
        socket: Some((Arc::clone(&listener), asked)),
        strangers: found.strangers,
    };
    if reply.send(Ok(granted)).is_err() {
        return VecDeque::new();
    }
    let porter = Porter {
        listener,
        stop,
        ask,
        callers: VecDeque::new(),
    };
    porter.serve()
}

/// The names of a lock.
#[derive(Debug)]
struct Names(Vec<Vec<u8>>);

/// The thing that stands under a name.
enum Found {
    Nothing,
    /// Whoever has the overlay. The stream leads there, if there was room.
    Holder(Claimant, Option<UnixStream>),
    /// Somebody without rights over the namespace.
    Stranger(Note),
}

/// A lock that was taken, or none if strangers have all its names.
struct Taken {
    listener: Option<UnixListener>,
    strangers: Vec<Note>,
}

impl Names {
    fn of(name: &OverlayName) -> Result<Self> {
        let names = (0..NAMES).map(|n| match n {
            0 => format!("flannel-overlay/{name}").into_bytes(),
            n => format!("flannel-overlay/{name}/{n}").into_bytes(),
        });
        let names: Vec<_> = names.collect();
        for name in &names {
            SocketAddr::from_abstract_name(name).map_err(|error| failed("a name", error))?;
        }
        Ok(Self(names))
    }

    /// Takes the lock, if need be after whoever has it has handed over.
    fn take(&self, replace: bool, stop: &PipeReader) -> Result<Taken> {
        /// After so many handovers to others in between it is theirs.
        const ROUNDS: usize = 3;
        let mut round = 0;
        loop {
            let (by, stream) = match self.look()? {
                Ok(taken) => return Ok(taken),
                Err(holder) => holder,
            };
            round += 1;
            let is_left = match stream {
                Some(stream) if replace && round <= ROUNDS => is_left_to_us(stream, stop),
                _ => false,
            };
            if !is_left {
                return Err(Error::Held { by });
            }
        }
    }

    /// Takes the first name that is free, if nobody with rights has another one.
    fn look(&self) -> Result<std::result::Result<Taken, (Claimant, Option<UnixStream>)>> {
        let mut taken = Taken {
            listener: None,
            strangers: Vec::new(),
        };
        for name in &self.0 {
            let found = match taken.listener {
                Some(_) => dial(name)?,
                None => match take(name)? {
                    Ok(listener) => {
                        taken.listener = Some(listener);
                        continue;
                    }
                    Err(found) => found,
                },
            };
            match found {
                Found::Nothing => {}
                Found::Stranger(note) => taken.strangers.push(note),
                Found::Holder(by, stream) => return Ok(Err((by, stream))),
            }
        }
        Ok(Ok(taken))
    }
}

/// Takes a name, or answers who has it.
fn take(name: &[u8]) -> Result<std::result::Result<UnixListener, Found>> {
    let address = SocketAddr::from_abstract_name(name).map_err(|error| failed("a name", error))?;
    for _ in 0..TRIES {
        match UnixListener::bind_addr(&address) {
            Ok(listener) => {
                let quick = listener.set_nonblocking(true);
                quick.map_err(|error| failed("a socket", error))?;
                return Ok(Ok(listener));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(failed("a socket", error)),
        }
        match dial(name)? {
            Found::Nothing => thread::sleep(RETRY),
            found => return Ok(Err(found)),
        }
    }
    Ok(Err(judge_by_owner(name)))
}

/// Looks who listens on a name.
fn dial(name: &[u8]) -> Result<Found> {
    let stream = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(|errno| failed("a socket", errno))?;
    let limit = TimeVal::seconds(FULL);
    setsockopt(&stream, sockopt::SendTimeout, &limit).map_err(|errno| failed("a socket", errno))?;
    let address = UnixAddr::new_abstract(name).map_err(|errno| failed("a name", errno))?;
    match connect(stream.as_raw_fd(), &address) {
        Ok(()) => {}
        Err(Errno::ECONNREFUSED) => return Ok(Found::Nothing),
        // Its queue is full, be it that it does not answer or that others fill it.
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(judge_by_owner(name)),
        Err(errno) => return Err(failed("a connection", errno)),
    }
    let who = Who::at(&stream).map_err(|errno| failed("a connection", errno))?;
    Ok(match who.has_rights() {
        true => Found::Holder(who.claimant(), Some(stream.into())),
        false => Found::Stranger(stranger(&who.to_string())),
    })
}

/// Judges who has a name and cannot be asked: by the owner of the socket.
fn judge_by_owner(name: &[u8]) -> Found {
    match owner::of(name) {
        Some(uid) if !has_rights(uid) => Found::Stranger(stranger(&format!("user {uid}"))),
        _ => Found::Holder(Claimant::Silent, None),
    }
}

fn stranger(who: &str) -> Note {
    Note {
        topic: "lock".to_owned(),
        text: format!(
            "{who} has taken a name of the overlay's lock, without rights over this network \
             namespace: that keeps nobody out"
        ),
    }
}

/// Asks whoever has the lock for it, and waits. Answers whether it was let go.
fn is_left_to_us(mut stream: UnixStream, stop: &PipeReader) -> bool {
    if stream.write_all(&[ASK]).is_err() {
        // It has just ended.
        return true;
    }
    let mut files = [
        PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        PollFd::new(stream.as_fd(), PollFlags::POLLIN),
    ];
    while let Err(Errno::EINTR) = poll(&mut files, PollTimeout::from(HANDOVER)) {}
    let [given_up, ended] = files.map(|file| file.any().unwrap_or(true));
    ended && !given_up
}

/// The process at the other end of a connection, by the kernel's word.
struct Who {
    pid: i32,
    uid: u32,
}

impl Who {
    fn at(stream: &impl AsFd) -> nix::Result<Self> {
        let credentials: UnixCredentials = getsockopt(stream, sockopt::PeerCredentials)?;
        Ok(Self {
            pid: credentials.pid(),
            uid: credentials.uid(),
        })
    }

    fn has_rights(&self) -> bool {
        has_rights(self.uid)
    }

    fn claimant(&self) -> Claimant {
        match u32::try_from(self.pid) {
            Ok(0) | Err(_) => Claimant::Elsewhere,
            Ok(pid) if pid == std::process::id() => Claimant::Own(pid),
            Ok(pid) => Claimant::Process(pid),
        }
    }
}

impl std::fmt::Display for Who {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of user {}", self.claimant(), self.uid)
    }
}

/// Tells if a user may be taken to have rights over the namespace: ours, and root of our user
/// namespace.
fn has_rights(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// Somebody who has connected.
#[derive(Debug)]
struct Caller {
    stream: UnixStream,
    who: Claimant,
    has_asked: bool,
}

/// The things that the thread answers with.
struct Porter {
    listener: Arc<UnixListener>,
    stop: PipeReader,
    ask: mpsc::Sender<Claimant>,
    callers: VecDeque<Caller>,
}

impl Porter {
    /// Answers until the claim is dropped; leaves those who wait for that.
    fn serve(mut self) -> VecDeque<Caller> {
        while let Ok((is_called, heard)) = self.wait() {
            for at in heard.into_iter().rev() {
                self.hear(at);
            }
            if is_called {
                self.admit();
            }
        }
        self.callers
    }

    /// Waits for somebody. The end of the claim is an error.
    fn wait(&self) -> std::result::Result<(bool, Vec<usize>), ()> {
        let callers = self.callers.iter().map(|caller| caller.stream.as_fd());
        let fixed = [self.stop.as_fd(), self.listener.as_fd()];
        let mut files: Vec<PollFd<'_>> = fixed
            .into_iter()
            .chain(callers)
            .map(|file| PollFd::new(file, PollFlags::POLLIN))
            .collect();
        match poll(&mut files, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::warn!(%error, "nobody can ask for a handover of the overlay");
                return Err(());
            }
        }
        let mut is_ready = files.iter().map(|file| file.any().unwrap_or(true));
        if is_ready.next() != Some(false) {
            return Err(());
        }
        let is_called = is_ready.next() == Some(true);
        let heard = is_ready.enumerate().filter(|(_, ready)| *ready);
        Ok((is_called, heard.map(|(at, _)| at).collect()))
    }

    /// Takes a connection, if it is of somebody who may ask for something.
    fn admit(&mut self) {
        let caller = self.listener.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            let who = Who::at(&stream)?;
            Ok(who.has_rights().then(|| Caller {
                stream,
                who: who.claimant(),
                has_asked: false,
            }))
        });
        let Ok(Some(caller)) = caller else {
            thread::sleep(REST);
            return;
        };
        if self.callers.len() >= CALLERS {
            let idle = self.callers.iter().position(|caller| !caller.has_asked);
            self.callers.remove(idle.unwrap_or(0));
        }
        self.callers.push_back(caller);
    }

    /// Hears what a caller says; who says nothing that means anything is let go.
    fn hear(&mut self, at: usize) {
        let Some(caller) = self.callers.get_mut(at) else {
            return;
        };
        let mut word = [0];
        match caller.stream.read(&mut word) {
            Ok(1) if word == [ASK] && !caller.has_asked => {
                caller.has_asked = true;
                // One that waits is enough.
                self.ask.try_send(caller.who).ok();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => {
                self.callers.remove(at);
            }
        }
    }
}
