//! [`Connection`]: requests, their answers and dumps, on a socket that is replaced when it breaks.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use netlink_packet_core::Emitable;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};
use nix::sys::time::TimeVal;

use crate::error::{Failure, read_answer, read_done};
use crate::wire::{Batch, Message, Messages};

/// How often a dump that changes disturbed is tried.
const DUMP_TRIES: usize = 5;
/// The most requests in a datagram: the answers to these fit into the default receive buffer of
/// 208 KiB, of which each takes about 770 bytes.
pub(crate) const BATCH_REQUESTS: usize = 256;
/// The most bytes in a datagram: less than the default send buffer.
pub(crate) const BATCH_BYTES: usize = 64 * 1024;
/// The memory for one datagram from the kernel. It sends dumps in pieces of at most 32 KiB; only a
/// single object could be longer.
const DATAGRAM: usize = 256 * 1024;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;

/// What a connection is told.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The longest silence of the kernel.
    pub deadline: Duration,
    /// The receive buffer in bytes.
    pub receive_buffer: usize,
    /// Counts datagrams, so that somebody who waits can see that work goes on.
    pub progress: Arc<AtomicU64>,
}

/// A connection to one netlink family in the namespace of the thread that uses it.
#[derive(Debug)]
pub(crate) struct Connection {
    protocol: isize,
    settings: Settings,
    socket: Option<Socket>,
    seq: u32,
    buffer: Vec<u8>,
}

/// Opens a socket in the namespace of the calling thread and raises its receive buffer as far as
/// the process may.
pub(crate) fn open(protocol: isize, receive_buffer: usize) -> io::Result<Socket> {
    let socket = Socket::new(protocol)?;
    if setsockopt(&socket, sockopt::RcvBufForce, &receive_buffer).is_err() {
        // Without the right to go beyond it the kernel cuts the size to net.core.rmem_max.
        setsockopt(&socket, sockopt::RcvBuf, &receive_buffer)?;
    }
    Ok(socket)
}

impl Connection {
    pub(crate) fn new(protocol: isize, settings: Settings) -> Self {
        Self {
            protocol,
            settings,
            socket: None,
            seq: 0,
            buffer: Vec::new(),
        }
    }

    fn connect(&mut self) -> io::Result<()> {
        let mut socket = open(self.protocol, self.settings.receive_buffer)?;
        socket.bind_auto()?;
        // Only the kernel may talk to a socket that is connected to it.
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        // Older kernels than 4.20 lack it; what a filter would have left out is then sorted out
        // by the codecs, which look at every field again.
        drop(socket.set_netlink_get_strict_chk(true));
        let timeout = TimeVal::new(
            self.settings
                .deadline
                .as_secs()
                .try_into()
                .unwrap_or(i64::MAX),
            self.settings.deadline.subsec_micros().into(),
        );
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
        self.buffer.resize(DATAGRAM, 0);
        self.socket = Some(socket);
        Ok(())
    }

    /// Opens the socket, to find out early that it cannot be opened.
    pub(crate) fn check(&mut self) -> Result<(), Failure> {
        if self.socket.is_none() {
            self.connect()
                .map_err(|error| Failure::Broken(format!("no netlink socket: {error}")))?;
        }
        Ok(())
    }

    fn send(&mut self, batch: &mut Batch) -> Result<u32, Failure> {
        self.check()?;
        let first = self.seq.wrapping_add(1);
        self.seq = self
            .seq
            .wrapping_add(u32::try_from(batch.len()).unwrap_or(u32::MAX));
        batch.number(first);
        let Some(socket) = &self.socket else {
            return Err(Failure::Broken("no netlink socket".to_owned()));
        };
        loop {
            match send(socket.as_raw_fd(), batch.bytes(), MsgFlags::empty()) {
                Ok(sent) if sent == batch.bytes().len() => break,
                Ok(_) => return Err(Failure::Broken("a request was sent in part".to_owned())),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Failure::Broken(format!("sending: {errno}"))),
            }
        }
        self.settings.progress.fetch_add(1, Ordering::Relaxed);
        Ok(first)
    }

    /// Receives a datagram; returns its length.
    fn receive(&mut self) -> Result<usize, Failure> {
        let Some(socket) = &self.socket else {
            return Err(Failure::Broken("no netlink socket".to_owned()));
        };
        let len = loop {
            // MSG_TRUNC: the answer is the length of the datagram, even if it was cut.
            match recv(socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_TRUNC) {
                Ok(len) => break len,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(Failure::TimedOut),
                Err(Errno::ENOBUFS) => {
                    return Err(Failure::Broken("answers were lost (ENOBUFS)".to_owned()));
                }
                Err(errno) => return Err(Failure::Broken(format!("receiving: {errno}"))),
            }
        };
        if len > self.buffer.len() {
            return Err(Failure::Broken(format!("an answer of {len} bytes was cut")));
        }
        self.settings.progress.fetch_add(1, Ordering::Relaxed);
        Ok(len)
    }

    /// Sends requests in one datagram and collects one answer for each, in their order. What a
    /// request asked for goes to `data` with the place of the request.
    ///
    /// The kernel carries them out one after the other, whatever becomes of the earlier ones, and
    /// is done with all of them when the send returns. It tells every refusal; acknowledged is only
    /// the last request, which proves that those before it without an answer were carried out. An
    /// answer for which there was no room breaks the connection (`ENOBUFS`); it never passes for
    /// silence. That saves a third of the time that acknowledging each would take.
    ///
    /// If the connection breaks, those not answered yet fail with it.
    pub(crate) fn transact(
        &mut self,
        batch: &mut Batch,
        mut data: impl FnMut(usize, &Message<'_>) -> Result<(), Failure>,
    ) -> Vec<Result<(), Failure>> {
        if batch.is_empty() {
            return Vec::new();
        }
        let mut answers: Vec<Option<Result<(), Failure>>> = vec![None; batch.len()];
        batch.acknowledge(false);
        let result = self
            .send(batch)
            .and_then(|first| self.collect(first, &mut answers, &mut data));
        if result.is_err() {
            self.socket = None;
        }
        answers
            .into_iter()
            .map(|answer| answer.unwrap_or_else(|| result.clone()))
            .collect()
    }

    fn collect(
        &mut self,
        first: u32,
        answers: &mut [Option<Result<(), Failure>>],
        data: &mut impl FnMut(usize, &Message<'_>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let last = answers.len().saturating_sub(1);
        loop {
            let len = self.receive()?;
            for message in Messages(&self.buffer[..len]) {
                let message = message?;
                let at = usize::try_from(message.seq.wrapping_sub(first)).unwrap_or(usize::MAX);
                let Some(slot) = answers.get_mut(at).filter(|slot| slot.is_none()) else {
                    return Err(Failure::Broken("an answer to no request".to_owned()));
                };
                if message.kind != NLMSG_ERROR {
                    data(at, &message)?;
                    continue;
                }
                *slot = Some(match read_answer(message.flags, message.body)? {
                    None => Ok(()),
                    Some(failure) => Err(failure),
                });
                if at == last {
                    return Ok(());
                }
            }
        }
    }

    /// Sends one request and waits for its answer.
    pub(crate) fn request(
        &mut self,
        kind: u16,
        flags: u16,
        body: &impl Emitable,
    ) -> Result<(), Failure> {
        self.get(kind, flags, body, |_| Ok(None::<()>)).map(drop)
    }

    /// Sends one request for one object and decodes the answer.
    pub(crate) fn get<T>(
        &mut self,
        kind: u16,
        flags: u16,
        body: &impl Emitable,
        mut decode: impl FnMut(&Message<'_>) -> Result<Option<T>, Failure>,
    ) -> Result<Option<T>, Failure> {
        let mut batch = Batch::default();
        batch.push(kind, flags, body);
        let mut found = None;
        let answers = self.transact(&mut batch, |_, message| {
            found = decode(message)?;
            Ok(())
        });
        answers.into_iter().collect::<Result<Vec<()>, Failure>>()?;
        Ok(found)
    }

    /// Reads all objects of a kind. `decode` says `None` to what is left out.
    ///
    /// The list is complete and was not disturbed by changes, or there is an error.
    pub(crate) fn dump<T>(
        &mut self,
        kind: u16,
        body: &impl Emitable,
        mut decode: impl FnMut(&Message<'_>) -> Result<Option<T>, Failure>,
    ) -> Result<Vec<T>, Failure> {
        for _ in 0..DUMP_TRIES {
            let mut found = Vec::new();
            match self.dump_once(kind, body, &mut found, &mut decode) {
                Ok(false) => return Ok(found),
                Ok(true) => {}
                Err(failure) => {
                    if !matches!(failure, Failure::Refused { .. }) {
                        self.socket = None;
                    }
                    return Err(failure);
                }
            }
        }
        Err(Failure::Interrupted)
    }

    /// One try at a dump; answers whether it was interrupted.
    fn dump_once<T>(
        &mut self,
        kind: u16,
        body: &impl Emitable,
        found: &mut Vec<T>,
        decode: &mut impl FnMut(&Message<'_>) -> Result<Option<T>, Failure>,
    ) -> Result<bool, Failure> {
        let mut batch = Batch::default();
        batch.push(kind, NLM_F_DUMP, body);
        let seq = self.send(&mut batch)?;
        let mut reader = DumpReader {
            seq,
            interrupted: false,
        };
        loop {
            let len = self.receive()?;
            if reader.read(&self.buffer[..len], found, decode)? {
                return Ok(reader.interrupted);
            }
        }
    }
}

/// Reads the datagrams of a dump.
struct DumpReader {
    seq: u32,
    interrupted: bool,
}

impl DumpReader {
    /// Reads one datagram; answers whether it was the last.
    fn read<T>(
        &mut self,
        datagram: &[u8],
        found: &mut Vec<T>,
        decode: &mut impl FnMut(&Message<'_>) -> Result<Option<T>, Failure>,
    ) -> Result<bool, Failure> {
        for message in Messages(datagram) {
            let message = message?;
            if message.seq != self.seq {
                return Err(Failure::Broken("an answer to no request".to_owned()));
            }
            self.interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
            match message.kind {
                NLMSG_DONE => {
                    return match read_done(message.flags, message.body)? {
                        None => Ok(true),
                        Some(failure) => Err(failure),
                    };
                }
                NLMSG_ERROR => {
                    return Err(match read_answer(message.flags, message.body)? {
                        Some(failure) => failure,
                        None => Failure::Broken("a dump was acknowledged and not sent".to_owned()),
                    });
                }
                _ => found.extend(decode(&message)?),
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, seq: u32, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(16 + body.len()).expect("short");
        let mut bytes = len.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(seq.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes
    }

    /// Whether a dump was at its end, whether it was interrupted, and how many objects it has.
    fn read(datagrams: &[Vec<u8>]) -> Result<(bool, bool, usize), Failure> {
        let mut reader = DumpReader {
            seq: 7,
            interrupted: false,
        };
        let mut found = Vec::new();
        let mut ended = false;
        for datagram in datagrams {
            ended = reader.read(datagram, &mut found, &mut |_| Ok(Some(())))?;
        }
        Ok((ended, reader.interrupted, found.len()))
    }

    #[test]
    fn an_interruption_is_seen_wherever_it_is_told() {
        let object = message(16, 2, 7, &[0; 4]);
        let torn = message(16, 2 | NLM_F_DUMP_INTR, 7, &[0; 4]);
        let done = message(NLMSG_DONE, 2, 7, &[0; 4]);
        let torn_done = message(NLMSG_DONE, 2 | NLM_F_DUMP_INTR, 7, &[0; 4]);
        assert_eq!(read(&[object.clone(), done.clone()]), Ok((true, false, 1)));
        assert_eq!(read(&[torn, object.clone(), done]), Ok((true, true, 2)));
        assert_eq!(read(&[object.clone(), torn_done]), Ok((true, true, 1)));
        assert_eq!(read(&[object]), Ok((false, false, 1)));
    }

    #[test]
    fn a_dump_that_failed_is_no_short_list() {
        let object = message(16, 2, 7, &[0; 4]);
        let number = (-5_i32).to_ne_bytes();
        let failed = message(NLMSG_DONE, 2, 7, &number);
        let refused = message(NLMSG_ERROR, 0, 7, &[&number[..], &[0; 16]].concat());
        for end in [failed, refused] {
            let result = read(&[[object.clone(), end].concat()]);
            assert!(
                matches!(
                    result,
                    Err(Failure::Refused {
                        errno: Errno::EIO,
                        ..
                    })
                ),
                "{result:?}"
            );
        }
        for odd in [
            message(NLMSG_ERROR, 0, 7, &[0; 20]),
            message(16, 2, 8, &[]),
            vec![1, 2, 3],
        ] {
            assert!(matches!(read(&[odd]), Err(Failure::Broken(_))));
        }
    }
}
