//! ICMP echoes (RFC 792, RFC 4443) through raw sockets.

use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, SocketAddr};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flannel_core::Family;
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::{self, Host, Ns};

/// Why there was no answer to an echo request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The namespace could not be entered.
    #[error(transparent)]
    Ns(#[from] netns::Error),
    /// There is no socket to send from.
    #[error("opening a raw socket{} failed", .from.map(|ip| format!(" on {ip}")).unwrap_or_default())]
    Socket {
        /// The source address asked for.
        from: Option<IpAddr>,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Source and destination are of different families.
    #[error("{from} and {to} are of different families")]
    Families {
        /// The source.
        from: IpAddr,
        /// The destination.
        to: IpAddr,
    },
    /// The kernel refused to send, such as for want of a route.
    #[error("sending to {to} failed")]
    Send {
        /// The destination.
        to: IpAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Nothing came back in time.
    #[error("no answer from {to} within {timeout:?}")]
    NoAnswer {
        /// The destination.
        to: IpAddr,
        /// How long it was waited for.
        timeout: Duration,
    },
}

/// The time until the answer, or why there was none.
type Result<T = Duration> = std::result::Result<T, Error>;

/// Sends one echo request from a namespace and waits for the answer. Without `from` the kernel
/// chooses the source address.
///
/// # Errors
/// [`Error::NoAnswer`], or why nothing could be sent.
pub fn ping(ns: &Ns, from: Option<IpAddr>, to: IpAddr, timeout: Duration) -> Result {
    ping_each(ns, from, &[to], timeout).pop().unwrap_or({
        // One destination has one result.
        Err(Error::NoAnswer { to, timeout })
    })
}

/// Sends an echo request to each destination at once; the results are in the same order. Takes no
/// longer than `timeout`, however many do not answer.
pub fn ping_each(ns: &Ns, from: Option<IpAddr>, to: &[IpAddr], timeout: Duration) -> Vec<Result> {
    let mut results: Vec<Result> = to
        .iter()
        .map(|&to| Err(Error::NoAnswer { to, timeout }))
        .collect();
    for family in Family::ALL {
        let mut round: Vec<(IpAddr, &mut Result)> = to
            .iter()
            .copied()
            .zip(&mut results)
            .filter(|(to, _)| Family::of(to) == family)
            .collect();
        if round.is_empty() {
            continue;
        }
        if let Some(from) = from.filter(|from| Family::of(from) != family) {
            for (to, result) in round {
                *result = Err(Error::Families { from, to });
            }
            continue;
        }
        let socket = ns
            .run(|| open(family, from))
            .map_err(Error::from)
            .and_then(|socket| socket.map_err(|source| Error::Socket { from, source }));
        match socket {
            Ok(socket) => echo(&socket, family, &mut round, timeout),
            Err(error) => fail_all(round, error),
        }
    }
    results
}

/// One cell of [`ping_matrix`].
#[derive(Debug)]
pub struct Pinged {
    /// The index of the host that sent.
    pub from: usize,
    /// The index of the host that was to answer.
    pub to: usize,
    /// The family of the echo.
    pub family: Family,
    /// The time until the answer, or what went wrong.
    pub result: Result,
}

/// Pings every host from every other in every family that both have, all hosts at once.
pub fn ping_matrix(hosts: &[Host], timeout: Duration) -> Vec<Pinged> {
    thread::scope(|scope| {
        let rows: Vec<_> = (0..hosts.len())
            .map(|from| scope.spawn(move || ping_row(hosts, from, timeout)))
            .collect();
        rows.into_iter()
            .flat_map(|row| match row.join() {
                Ok(row) => row,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    })
}

fn ping_row(hosts: &[Host], from: usize, timeout: Duration) -> Vec<Pinged> {
    let source = &hosts[from];
    let mut row = Vec::new();
    for family in Family::ALL {
        let Some(ip) = source.ips.ip(family) else {
            continue;
        };
        let (indices, targets): (Vec<usize>, Vec<IpAddr>) = hosts
            .iter()
            .enumerate()
            .filter(|(to, _)| *to != from)
            .filter_map(|(to, host)| Some((to, host.ips.ip(family)?)))
            .unzip();
        let results = ping_each(&source.ns, Some(ip), &targets, timeout);
        row.extend(indices.into_iter().zip(results).map(|(to, result)| Pinged {
            from,
            to,
            family,
            result,
        }));
    }
    row
}

fn open(family: Family, from: Option<IpAddr>) -> io::Result<Socket> {
    let (domain, protocol) = match family {
        Family::V4 => (Domain::IPV4, Protocol::ICMPV4),
        Family::V6 => (Domain::IPV6, Protocol::ICMPV6),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    if let Some(from) = from {
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    Ok(socket)
}

/// The first destination gets the error itself, the others its text.
fn fail_all(round: Vec<(IpAddr, &mut Result)>, error: Error) {
    let text = error.to_string();
    let mut first = Some(error);
    for (to, result) in round {
        *result = Err(first.take().unwrap_or_else(|| Error::Send {
            to,
            source: io::Error::other(text.clone()),
        }));
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "a prober measures real time between real packets"
)]
fn echo(socket: &Socket, family: Family, round: &mut [(IpAddr, &mut Result)], timeout: Duration) {
    let token = token();
    let start = Instant::now();
    let mut waiting = 0_usize;
    let mut sent_at = Vec::with_capacity(round.len());
    for (index, (to, result)) in round.iter_mut().enumerate() {
        sent_at.push(Instant::now());
        let packet = request(family, token, index);
        match socket.send_to(&packet, &SocketAddr::new(*to, 0).into()) {
            Ok(_) => waiting += 1,
            Err(source) => **result = Err(Error::Send { to: *to, source }),
        }
    }
    let mut buffer = [0; 2048];
    while waiting > 0 {
        let Some(left) = timeout
            .checked_sub(start.elapsed())
            .filter(|left| !left.is_zero())
        else {
            return;
        };
        let mut reader = socket;
        let len = match socket
            .set_read_timeout(Some(left))
            .and_then(|()| reader.read(&mut buffer))
        {
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let answered = reply(family, token, &buffer[..len])
            .and_then(|index| Some((sent_at.get(index)?, round.get_mut(index)?)));
        // Anything else is another's answer, or the same one twice.
        if let Some((at, (_, result))) = answered
            && matches!(result, Err(Error::NoAnswer { .. }))
        {
            **result = Ok(at.elapsed());
            waiting -= 1;
        }
    }
}

/// A number that no other call of this or another process uses at the same time.
fn token() -> u64 {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    u64::from(process::id()) << 32 | u64::from(CALLS.fetch_add(1, Ordering::Relaxed))
}

/// An echo request: type, code, checksum, identifier, sequence number, then the token and the
/// index, because the sequence number is only 16 bits.
fn request(family: Family, token: u64, index: usize) -> Vec<u8> {
    let kind = match family {
        Family::V4 => 8,
        Family::V6 => 128,
    };
    let [.., id_high, id_low] = token.to_be_bytes();
    let index = index as u64;
    let [.., seq_high, seq_low] = index.to_be_bytes();
    let mut packet = vec![kind, 0, 0, 0, id_high, id_low, seq_high, seq_low];
    packet.extend(token.to_be_bytes());
    packet.extend(index.to_be_bytes());
    if family == Family::V4 {
        // The kernel fills in the checksum of ICMPv6, which covers addresses it chooses.
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// The index in an echo reply that carries the token.
fn reply(family: Family, token: u64, packet: &[u8]) -> Option<usize> {
    let (kind, message) = match family {
        Family::V4 => {
            // A raw IPv4 socket delivers the IP header, whose length is in 32-bit words.
            let words = packet.first()? & 0x0f;
            (0, packet.get(usize::from(words) * 4..)?)
        }
        Family::V6 => (129, packet),
    };
    let payload = message.get(8..)?;
    if message.first() != Some(&kind) || payload.get(..8)? != token.to_be_bytes() {
        return None;
    }
    let index = payload.get(8..16)?.try_into().ok()?;
    usize::try_from(u64::from_be_bytes(index)).ok()
}

/// The Internet checksum (RFC 1071) of a message whose checksum field is zero.
fn checksum(message: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in message.chunks(2) {
        let high = pair.first().copied().unwrap_or(0);
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u32::from(u16::from_be_bytes([high, low]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[allow(
        clippy::cast_possible_truncation,
        reason = "the carry was folded into 16 bits above"
    )]
    let folded = sum as u16;
    !folded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_that_of_rfc_1071() {
        // The example of section 3 of the RFC: the sum is ddf2.
        let message = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(&message), !0xddf2);
        assert_eq!(checksum(&[0xff]), !0xff00);
        assert_eq!(checksum(&[]), 0xffff);
    }

    #[test]
    fn a_message_with_its_checksum_sums_to_zero() {
        let packet = request(Family::V4, 0x1234_5678_9abc_def0, 77);
        assert_eq!(checksum(&packet), 0);
    }

    #[test]
    fn only_the_reply_to_the_request_is_taken() {
        let mut packet = request(Family::V6, 5, 70_000);
        assert_eq!(reply(Family::V6, 5, &packet), None, "a request is no reply");
        packet[0] = 129;
        assert_eq!(reply(Family::V6, 5, &packet), Some(70_000));
        assert_eq!(reply(Family::V6, 6, &packet), None);
        for len in 0..packet.len() {
            assert_eq!(reply(Family::V6, 5, &packet[..len]), None);
            assert_eq!(reply(Family::V4, 5, &packet[..len]), None);
        }
    }
}
