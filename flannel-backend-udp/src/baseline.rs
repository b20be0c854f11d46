//! What there is to be faster than: a proxy that moves one packet per system call, as flannel's
//! own does.
//!
//! It stands in for flannel's C proxy: poll, then in turn one `read` of the device and one `sendto`,
//! one `recv` and one `write`, until both sides are dry. It knows one peer, looks nothing up, checks
//! nothing and lets the TTL be, so it is a little faster than what it stands for.
#![forbid(unsafe_code)]

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};

/// The largest packet it moves.
const LARGEST: usize = 65_536;
/// How soon it hears that it is to stop, in milliseconds.
const TICK_MS: u16 = 100;

/// Moves packets between a TUN queue without headers and one peer, until `stop` is true.
///
/// # Errors
///
/// The device is gone, or polling failed.
pub fn run(
    queue: &OwnedFd,
    socket: OwnedFd,
    peer: SocketAddr,
    stop: &AtomicBool,
) -> io::Result<()> {
    let socket = UdpSocket::from(socket);
    let mut buffer = vec![0; LARGEST];
    while !stop.load(Ordering::Relaxed) {
        let mut fds = [
            PollFd::new(queue.as_fd(), PollFlags::POLLIN),
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::from(TICK_MS)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let (mut from_queue, mut from_socket) = (true, true);
        while from_queue || from_socket {
            if from_queue {
                match read(queue, &mut buffer) {
                    Ok(len) => {
                        let _ = socket.send_to(&buffer[..len], peer);
                    }
                    Err(Errno::EAGAIN | Errno::EINTR) => from_queue = false,
                    Err(error) => return Err(error.into()),
                }
            }
            if from_socket {
                match socket.recv(&mut buffer) {
                    Ok(len) => {
                        let _ = write(queue, &buffer[..len]);
                    }
                    Err(_) => from_socket = false,
                }
            }
        }
    }
    Ok(())
}
