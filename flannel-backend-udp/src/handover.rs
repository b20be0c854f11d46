//! A forwarder goes from one process to another without losing a packet.
//!
//! The old process offers its descriptors, its tunnel and its table through a Unix socket. The new
//! one looks at all of it and says that it is ready; the old one stops between two batches and says
//! so; the new one begins. In between packets wait: outbound in the device, inbound in the sockets'
//! buffers. Whichever process fails, the other goes on: the old one takes up its work again unless
//! the new one has said that it runs, and the new one begins when the old one is gone. What is not
//! what it should be, or is of another network namespace, the new one refuses, with the reason.
//!
//! ```text
//! old                                    new
//!  | -- head, descriptors, body ---------> |   looks at them
//!  | <------------------------------ READY |
//!  |    stops its threads                  |
//!  | -- GO ------------------------------> |   starts its threads
//!  | <---------------------------- RUNNING |
//!  |    closes its descriptors             |
//! ```
//!
//! Both sides may be of different versions. The head, which has the same form in all of them, names
//! the versions that the old one writes, and the new one asks for the highest that it reads:
//!
//! ```text
//! old                                    new
//!  | -- head 4 (2 to 4), ... ------------> |   reads 2 to 3
//!  | <---------------------------- ASK, 3  |
//!  | -- head 3 (2 to 4), ... ------------> |   as above
//! ```
//!
//! Where there is none that both know the new one has nothing but the word that [`dismiss`] sends:
//! `END`, upon which the old one ends its forwarder and says `ENDED`. Packets are lost then, but no
//! program is kept from starting.
//!
//! Descriptors are given to nobody, and taken from nobody, but processes of the same user and of
//! root.
//!
//! A process that is killed outright hands over nothing, and its device goes with it, with
//! addresses and routes: nothing is in the way of whoever comes next.
#![forbid(unsafe_code)]

mod head;
mod peer;

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::{DualStack, Family, IfName, Subnet, Tunnel};
use serde::{Deserialize, Serialize};

pub use self::head::Versions;

use self::head::Head;
use crate::forward::{Error, Forwarder, Lent, Opened, Queues, Socket, Watch, check};
use crate::options::Options;
use crate::sockets::Sockets;
use crate::sys::descriptors;
use crate::table::TableBuilder;

/// The most bytes of a reason.
const REASON: usize = 1024;
/// How long one side waits for the other.
const PATIENCE: Duration = Duration::from_secs(10);

const READY: u8 = 1;
const GO: u8 = 2;
const RUNNING: u8 = 3;
/// In the place of `READY`: two bytes of length and the reason follow.
const REFUSED: u8 = 4;
/// In the place of `READY`: two bytes of the version follow that is asked for.
const ASK: u8 = 5;
/// In the place of `READY`: the forwarder is to end.
const END: u8 = 6;
/// It has ended.
const ENDED: u8 = 7;

/// Why a forwarder did not go from one process to another.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandoverError {
    /// The stream failed, or the other side took too long.
    #[error("the other process did not {what}")]
    Stream {
        /// What it should have done.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The other process is of another user, who may not have what is ours nor give us what is his.
    #[error("the other process is of the user {uid}, which is neither ours nor root")]
    Stranger {
        /// Its user.
        uid: u32,
    },
    /// There is no version of the handover that both processes know. The other one goes on until it
    /// is [dismissed](crate::Forwarders::dismiss), or ended.
    #[error(
        "the other process offers {theirs} of the handover, and this is {}",
        Versions::OURS
    )]
    Version {
        /// The ones that it knows.
        theirs: Versions,
    },
    /// What was offered is not what it says it is.
    #[error("what was offered is wrong: {reason}")]
    Offer {
        /// What is wrong.
        reason: String,
    },
    /// The device that was offered is in another network namespace than the one that is served here: a
    /// node was started anew in another one, say.
    #[error(
        "the TUN device {dev} that was offered is in another network namespace than this process \
         serves: it stays with the other process"
    )]
    Namespace {
        /// The device.
        dev: IfName,
    },
    /// The other process does not take what was offered.
    #[error("the other process refuses: {reason}")]
    Refused {
        /// Why, in its words.
        reason: String,
    },
    /// The device is gone, so there is nothing to hand over.
    #[error("the TUN device is gone: start a forwarder anew")]
    Detached,
    /// The forwarder itself failed.
    #[error("the forwarder failed")]
    Forwarder(#[source] Error),
}

/// All but the descriptors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    tunnel: Tunnel,
    options: Options,
    peers: Vec<(Subnet, SocketAddr)>,
}

impl Forwarder {
    /// Hands everything over to the process at the other end, which calls
    /// [`take_over`](Self::take_over), and ends. No packet is lost. It also ends, and all is lost,
    /// if the other process cannot take it over and asks for the end
    /// ([`dismiss`](crate::Forwarders::dismiss)).
    ///
    /// # Errors
    ///
    /// The forwarder is given back, running as before, with the reason.
    pub fn hand_over(self, stream: &UnixStream) -> Result<(), (Self, HandoverError)> {
        match self.try_hand_over(stream) {
            Ok(Outcome::Taken) => {
                self.stop();
                Ok(())
            }
            Ok(Outcome::Dismissed) => {
                self.stop();
                // Whoever does not hear it sees the stream end.
                let mut stream = stream;
                let _ = stream.write_all(&[ENDED]);
                Ok(())
            }
            Err(error) => {
                // What runs is not started a second time.
                let _ = self.resume();
                Err((self, error))
            }
        }
    }

    fn try_hand_over(&self, mut stream: &UnixStream) -> Result<Outcome, HandoverError> {
        peer::check(stream)?;
        set_patience(stream)?;
        let lent = self.lend().map_err(HandoverError::Forwarder)?;
        if lent.is_detached {
            return Err(HandoverError::Detached);
        }
        let mut version = Versions::OURS.highest();
        let mut asked = 0;
        loop {
            self.offer(stream, version, &lent)?;
            match answer(stream)? {
                Answer::Ready => break,
                Answer::End => return Ok(Outcome::Dismissed),
                Answer::Ask(other) if Versions::OURS.has(other) && asked < ASKS => version = other,
                Answer::Ask(_) => return Err(wrong("it asks for what was not offered")),
            }
            asked += 1;
        }
        self.pause().map_err(HandoverError::Forwarder)?;
        stream
            .write_all(&[GO])
            .map_err(failed("hear that it may begin"))?;
        expect(stream, RUNNING, "say that it runs")?;
        Ok(Outcome::Taken)
    }

    /// Offers everything, described in a version that is one of ours.
    fn offer(
        &self,
        mut stream: &UnixStream,
        version: u16,
        lent: &Lent,
    ) -> Result<(), HandoverError> {
        // So far there is one description.
        let body = Body {
            tunnel: self.tunnel(),
            options: self.options().clone(),
            peers: self.table().routes().to_vec(),
        };
        let body = serde_json::to_vec(&body).map_err(|error| wrong(&error.to_string()))?;
        let fds = lent.queues.iter().chain(&lent.sockets);
        let fds: Vec<_> = fds.map(AsFd::as_fd).collect();
        let head = Head {
            version,
            descriptors: fds.len() as u16,
            versions: Some(Versions::OURS),
            body: body.len() as u32,
        };
        descriptors::send(stream, &head.encode(), &fds).map_err(failed("take the descriptors"))?;
        stream
            .write_all(&body)
            .map_err(failed("take the description"))
    }

    /// Takes over from the process at the other end, which calls [`hand_over`](Self::hand_over).
    /// Counters begin at 0.
    ///
    /// # Errors
    ///
    /// Nothing is taken over then, and the other process goes on.
    pub fn take_over(
        mut stream: &UnixStream,
        sockets: Arc<dyn Sockets>,
        watch: Watch,
    ) -> Result<Self, HandoverError> {
        peer::check(stream)?;
        set_patience(stream)?;
        let (body, fds) = read_offer(stream)?;
        let opened = match judge(&body, fds, &*sockets) {
            Ok(opened) => opened,
            Err(error) => {
                refuse(stream, &error);
                return Err(error);
            }
        };
        let mut peers = TableBuilder::new();
        for (subnet, endpoint) in body.peers {
            peers.insert(subnet, endpoint);
        }
        let table = peers.build();
        stream
            .write_all(&[READY])
            .map_err(failed("hear that this one is ready"))?;
        match expect(stream, GO, "stop") {
            Ok(()) => {}
            // It is gone, and what it held is here.
            Err(HandoverError::Stream { source, .. })
                if source.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(error),
        }
        let this = Self::adopt(body.tunnel, body.options, table, opened, sockets, watch)
            .map_err(HandoverError::Forwarder)?;
        // If nobody hears it any more, nobody is there to forward in our place.
        let _ = stream.write_all(&[RUNNING]);
        Ok(this)
    }
}

/// Tells if the descriptors are those of the description, and of the namespace that we serve.
fn judge(body: &Body, fds: Vec<OwnedFd>, here: &dyn Sockets) -> Result<Opened, HandoverError> {
    check(&body.tunnel, &body.options).map_err(HandoverError::Forwarder)?;
    let workers = usize::from(body.options.workers);
    let mut fds = fds.into_iter();
    let queues: Vec<OwnedFd> = fds.by_ref().take(workers).collect();
    let vnet = body.options.offload;
    let are_queues = queues
        .iter()
        .all(|queue| descriptors::is_queue_of(queue.as_fd(), &body.tunnel.dev, vnet));
    if queues.len() != workers || !are_queues {
        return Err(wrong("a descriptor is no queue of the device"));
    }
    if let Ok(here) = here.namespace() {
        let is_elsewhere = |queue: &OwnedFd| match here.holds_device_of(queue.as_fd()) {
            Ok(is_here) => !is_here,
            // Who may change this namespace is told of what is in it. Other errors: before Linux 5.2.
            Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
        };
        if queues.iter().any(is_elsewhere) {
            let dev = body.tunnel.dev;
            return Err(HandoverError::Namespace { dev });
        }
    }
    let mut sockets = Vec::new();
    for _ in 0..workers {
        let mut of_worker = DualStack::default();
        for family in [Family::V4, Family::V6] {
            let Some(listen) = body.tunnel.listen.get(family).copied() else {
                continue;
            };
            let socket = fds.next().ok_or_else(|| wrong("a socket is missing"))?;
            if !descriptors::is_socket_on(socket.as_fd(), listen) {
                return Err(wrong(
                    "a descriptor is no socket on the address it should be",
                ));
            }
            of_worker.set(family, Some(Arc::new(Socket::new(socket, &body.options))));
        }
        sockets.push(of_worker);
    }
    if fds.next().is_some() {
        return Err(wrong(
            "there are more descriptors than the description speaks of",
        ));
    }
    Ok(Opened {
        queues: Queues::new(queues, vnet),
        sockets,
    })
}

/// Reads what is offered; of another version, asks for one that this program reads.
fn read_offer(mut stream: &UnixStream) -> Result<(Body, Vec<OwnedFd>), HandoverError> {
    for _ in 0..=ASKS {
        let mut head = [0; head::LEN];
        let fds = descriptors::receive(stream, &mut head).map_err(failed("offer anything"))?;
        let head = Head::decode(&head)?;
        let mut body = Vec::new();
        // Memory grows with what comes, not with what is announced.
        let mut rest = Read::take(stream, head.body.into());
        rest.read_to_end(&mut body)
            .map_err(failed("describe its offer"))?;
        if body.len() != head.body as usize {
            return Err(wrong("the description ends early"));
        }
        if fds.len() != usize::from(head.descriptors) {
            return Err(wrong("descriptors are missing"));
        }
        let ours = Versions::OURS;
        let common = head.versions.and_then(|theirs| theirs.common(ours));
        if ours.has(head.version) {
            let body = serde_json::from_slice(&body).map_err(|error| wrong(&error.to_string()))?;
            return Ok((body, fds));
        }
        let Some(common) = common else {
            let theirs = head.versions.unwrap_or(Versions::only(head.version));
            return Err(HandoverError::Version { theirs });
        };
        let [high, low] = common.to_be_bytes();
        stream
            .write_all(&[ASK, high, low])
            .map_err(failed("hear what is asked of it"))?;
    }
    Err(wrong("it is not what was asked for"))
}

/// Asks the process at the other end, whose offer was of no version that is known here, to end what
/// it offered; answers when it has.
pub(crate) fn dismiss(mut stream: &UnixStream) -> Result<(), HandoverError> {
    peer::check(stream)?;
    set_patience(stream)?;
    let what = "end what it offered";
    stream.write_all(&[END]).map_err(failed(what))?;
    expect(stream, ENDED, what)
}

/// The times that another version is asked for.
const ASKS: u32 = 1;

/// The end of an offer.
enum Outcome {
    Taken,
    Dismissed,
}

/// An answer to an offer.
enum Answer {
    Ready,
    End,
    /// In this version, please.
    Ask(u16),
}

fn answer(mut stream: &UnixStream) -> Result<Answer, HandoverError> {
    let what = "say that it is ready";
    let mut word = [0];
    stream.read_exact(&mut word).map_err(failed(what))?;
    match word[0] {
        READY => Ok(Answer::Ready),
        END => Ok(Answer::End),
        REFUSED => Err(refusal(stream)),
        ASK => {
            let mut version = [0; 2];
            stream.read_exact(&mut version).map_err(failed(what))?;
            Ok(Answer::Ask(u16::from_be_bytes(version)))
        }
        _ => Err(wrong("a word out of turn")),
    }
}

fn set_patience(stream: &UnixStream) -> Result<(), HandoverError> {
    stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
        .map_err(failed("wait"))
}

fn expect(mut stream: &UnixStream, word: u8, what: &'static str) -> Result<(), HandoverError> {
    let mut heard = [0];
    stream.read_exact(&mut heard).map_err(failed(what))?;
    match heard[0] {
        heard if heard == word => Ok(()),
        _ => Err(wrong("a word out of turn")),
    }
}

/// Says why an offer is not taken. Whoever does not hear it sees the stream end.
fn refuse(mut stream: &UnixStream, error: &HandoverError) {
    let mut reason = flannel_core::error_chain(error);
    while reason.len() > REASON {
        reason.pop();
    }
    let mut said = vec![REFUSED];
    said.extend((reason.len() as u16).to_be_bytes());
    said.extend(reason.into_bytes());
    let _ = stream.write_all(&said);
}

/// Hears why an offer is not taken.
fn refusal(mut stream: &UnixStream) -> HandoverError {
    let mut len = [0; 2];
    let mut reason = Vec::new();
    let heard = stream.read_exact(&mut len).and_then(|()| {
        let len = usize::from(u16::from_be_bytes(len)).min(REASON);
        Read::take(stream, len as u64).read_to_end(&mut reason)
    });
    let reason = match heard {
        Ok(_) => String::from_utf8_lossy(&reason).into_owned(),
        Err(_) => "it does not say why".to_owned(),
    };
    HandoverError::Refused { reason }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> HandoverError {
    move |source| HandoverError::Stream { what, source }
}

fn wrong(reason: &str) -> HandoverError {
    HandoverError::Offer {
        reason: reason.to_owned(),
    }
}
