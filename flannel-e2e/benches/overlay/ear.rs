//! [`Ear`]: hears what the kernel tells of routes and neighbours, as an outsider would.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use flannel_core::{Object, RouteProtocol};
use flannel_testkit::netns::Ns;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

/// Hears what the kernel of a namespace tells of routes and neighbours.
pub(crate) struct Ear {
    socket: Socket,
    buffer: Vec<u8>,
}

/// `RTM_NEWNEIGH` and `RTM_NEWROUTE`.
const NEW_NEIGHBOUR: u16 = 28;
const NEW_ROUTE: u16 = 24;

/// `NUD_PERMANENT` in the low byte of `ndm_state`, and `NUD_NOARP` with which the kernel tells of
/// forwarding entries.
const PERMANENT: u8 = 0x80 | 0x40;

impl Ear {
    pub(crate) fn new(ns: &Ns) -> Self {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            setsockopt(&socket, sockopt::RcvBufForce, &(512 << 20))?;
            setsockopt(
                &socket,
                sockopt::ReceiveTimeout,
                &TimeVal::milliseconds(200),
            )?;
            socket.bind_auto()?;
            // `RTNLGRP_NEIGH` and `RTNLGRP_IPV4_ROUTE`.
            socket.add_membership(3)?;
            socket.add_membership(7)?;
            std::io::Result::Ok(socket)
        };
        let socket = ns.run(open).expect("it can be entered");
        Self {
            socket: socket.expect("a socket"),
            buffer: Vec::with_capacity(1 << 16),
        }
    }

    /// Hands each message that comes until `deadline` to `wanted`, until that says it is enough.
    /// Answers whether it did.
    fn listen(&mut self, deadline: Duration, mut wanted: impl FnMut(u16, &[u8]) -> bool) -> bool {
        let start = Instant::now();
        while start.elapsed() < deadline {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(error) => panic!("what the kernel told is lost: {error}"),
            }
            let mut rest = &self.buffer[..];
            while let Some(header) = rest.first_chunk::<16>() {
                let [a, b, c, d, e, f, ..] = *header;
                let len = u32::from_ne_bytes([a, b, c, d]) as usize;
                let Some(message) = rest.get(..len).filter(|_| len >= 16) else {
                    break;
                };
                if wanted(u16::from_ne_bytes([e, f]), message) {
                    return true;
                }
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
            }
        }
        false
    }

    /// Waits until the kernel tells that an object was made.
    pub(crate) fn hears(&mut self, object: &Object) -> bool {
        let v4 = |kind: u16, ip: IpAddr| {
            let IpAddr::V4(ip) = ip else {
                panic!("these are IPv4 overlays");
            };
            attribute(kind, &ip.octets())
        };
        // RTA_DST and NDA_DST are 1, NDA_LLADDR is 2.
        let (kind, needle) = match object {
            Object::Route(route) => (NEW_ROUTE, v4(1, route.dst.address())),
            Object::Neighbour(neighbour) => (NEW_NEIGHBOUR, v4(1, neighbour.ip)),
            Object::Fdb(fdb) => (NEW_NEIGHBOUR, attribute(2, &fdb.mac.0)),
            _ => panic!("not listened for: {object}"),
        };
        self.listen(Duration::from_secs(10), |found, message| {
            // What the kernel tells of a neighbour that is being deleted is a change, too.
            let made =
                found != NEW_NEIGHBOUR || message.get(24).is_some_and(|s| s & PERMANENT != 0);
            found == kind && made && message.windows(needle.len()).any(|part| part == needle)
        })
    }

    /// Waits until so many different routes of ours were made.
    pub(crate) fn hears_routes(&mut self, count: usize, deadline: Duration) -> bool {
        let mut seen: HashSet<[u8; 4]> = HashSet::with_capacity(count);
        self.listen(deadline, |kind, message| {
            // `rtm_protocol` and the first attribute behind `struct rtmsg`.
            if kind == NEW_ROUTE && message.get(21) == Some(&RouteProtocol::OURS.0) {
                let attributes = message.get(28..).unwrap_or_default();
                let at = attributes.windows(4).position(|part| part == [8, 0, 1, 0]);
                if let Some(dst) = at.and_then(|at| attributes.get(at + 4..at + 8)) {
                    seen.extend(<[u8; 4]>::try_from(dst));
                }
            }
            seen.len() == count
        })
    }

    /// Forgets what was told so far.
    pub(crate) fn forget(&mut self) {
        self.listen(Duration::from_millis(1), |_, _| false);
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(value.len() + 4).expect("it is short");
    [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
}
