//! Descriptors through a Unix socket, and what they are when they arrive.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use flannel_core::IfName;
use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use socket2::SockRef;

use super::tun;

/// The most descriptors of one message: the kernel takes 253.
pub(crate) const MAX: usize = 64;

/// Sends bytes, not empty, with descriptors.
pub(crate) fn send(
    stream: &UnixStream,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let parts = [IoSlice::new(bytes)];
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &parts,
        &control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    match sent == bytes.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Receives exactly so many bytes, with the descriptors that came along.
pub(crate) fn receive(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    let mut space = cmsg_space!([RawFd; MAX]);
    let want = bytes.len();
    let mut parts = [IoSliceMut::new(bytes)];
    let received = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL,
    )?;
    let mut descriptors = Vec::new();
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            for fd in raw {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else knows
                // of it.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    if received.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    match received.bytes == want {
        true => Ok(descriptors),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Whether a descriptor is a queue of a device, with headers or without.
pub(crate) fn is_queue_of(queue: BorrowedFd<'_>, device: &IfName, vnet: bool) -> bool {
    tun::identity(queue).is_ok_and(|found| found == (device.as_str().to_owned(), vnet))
}

/// Whether a descriptor is a UDP socket that is bound to an address.
pub(crate) fn is_socket_on(socket: BorrowedFd<'_>, listen: SocketAddr) -> bool {
    let socket = SockRef::from(&socket);
    let is_udp = socket
        .r#type()
        .is_ok_and(|kind| kind == socket2::Type::DGRAM)
        && socket
            .protocol()
            .is_ok_and(|protocol| protocol == Some(socket2::Protocol::UDP));
    let local = socket.local_addr().ok().and_then(|local| local.as_socket());
    is_udp && local == Some(listen) && socket.set_nonblocking(true).is_ok()
}
