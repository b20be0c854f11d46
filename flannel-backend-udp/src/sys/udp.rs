//! Sockets: of UDP, and a raw one.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use socket2::{Domain, Protocol, Socket, Type};

use crate::sockets::UdpOptions;

/// Opens a socket in this thread's namespace.
pub(crate) fn open_udp(listen: SocketAddr, options: &UdpOptions) -> io::Result<OwnedFd> {
    let socket = Socket::new(
        Domain::for_address(listen),
        Type::DGRAM.nonblocking().cloexec(),
        Some(Protocol::UDP),
    )?;
    let fd = socket.as_fd();
    // A datagram is never cut on its way without a word: what is too long for the path is an error
    // here, which the sender of the inner packet is told.
    if listen.is_ipv6() {
        socket.set_only_v6(true)?;
        let discover = libc::IPV6_PMTUDISC_DO;
        set(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, discover)?;
    } else {
        let discover = libc::IP_PMTUDISC_DO;
        set(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, discover)?;
    }
    socket.set_reuse_port(options.shared)?;
    let size = libc::c_int::try_from(options.buffer).unwrap_or(libc::c_int::MAX);
    // The forced form needs CAP_NET_ADMIN and knows no limit; the other gives what the host allows.
    if set(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, size).is_err() {
        set(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, size)?;
    }
    if options.merge {
        // Without it each message is one datagram; the receiver does not care.
        let _ = set(fd, libc::SOL_UDP, libc::UDP_GRO, 1);
    }
    socket.bind(&listen.into())?;
    Ok(socket.into())
}

/// Bytes that may wait on a socket to be sent: those that the kernel keeps for two thousand
/// neighbours which do not answer (`unres_qlen_bytes`, 212,992 for each), twice as many as it knows
/// neighbours at once (`gc_thresh3`). It grants twice what it is asked for.
const SEND_BUFFER: libc::c_int = 256 << 20;

/// Gives a socket room for all that waits for neighbours. Says if it has it; else it has as much as
/// the host allows.
pub(crate) fn widen(socket: BorrowedFd<'_>) -> bool {
    let set = |name| set(socket, libc::SOL_SOCKET, name, SEND_BUFFER);
    if set(libc::SO_SNDBUFFORCE).is_err() {
        let _ = set(libc::SO_SNDBUF);
    }
    let has = read(socket, libc::SOL_SOCKET, libc::SO_SNDBUF);
    has.is_ok_and(|has| has >= SEND_BUFFER)
}

/// Whether a socket sends many datagrams as one message, and gives many as one.
pub(crate) fn can_segment(socket: BorrowedFd<'_>) -> (bool, bool) {
    let has = |name| read(socket, libc::SOL_UDP, name);
    (
        has(libc::UDP_SEGMENT).is_ok(),
        has(libc::UDP_GRO).is_ok_and(|on| on != 0),
    )
}

/// Opens a raw socket that only sends, in this thread's namespace.
pub(crate) fn open_raw() -> io::Result<OwnedFd> {
    let kind = Type::RAW.nonblocking().cloexec();
    // With this protocol each packet brings its header, and none is received.
    let protocol = Protocol::from(libc::IPPROTO_RAW);
    Ok(Socket::new(Domain::IPV4, kind, Some(protocol))?.into())
}

/// The most bytes of a packet on the way to an address, as far as the kernel of this thread's
/// namespace knows.
pub(crate) fn path_mtu(to: SocketAddr) -> io::Result<u32> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
    socket.connect(&to.into())?;
    let mtu = match to.is_ipv6() {
        true => read(socket.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_MTU)?,
        false => read(socket.as_fd(), libc::IPPROTO_IP, libc::IP_MTU)?,
    };
    u32::try_from(mtu).map_err(|_| io::ErrorKind::InvalidData.into())
}

fn set(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the option is an `int`, which lives during the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn read(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option is an `int`; the kernel writes at most `len` bytes of it.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}
