//! Many messages in one system call, each of many datagrams.

use std::fmt;
use std::io;
use std::mem;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::address::Raw;

/// Messages of one call. Without GRO below, one 64 KiB packet is 46 of them.
const DEPTH: usize = 64;
/// The most bytes of one message: UDP's length field allows no more.
const SIZE: usize = 65_536;
/// Neighbouring buffers begin at different places of the processor's caches.
const STRIDE: usize = SIZE + 1_088;

/// Room for `DEPTH` messages.
pub(crate) struct ReceiveBatch {
    buffer: Vec<u8>,
    froms: Vec<Raw>,
    controls: Vec<Control>,
    iovecs: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
    received: usize,
}

/// One control message of `UDP_GRO`: the kernel writes an `int`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    segment: libc::c_int,
    /// What `CMSG_SPACE` adds.
    padding: libc::c_int,
}

/// The datagrams of one message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Datagrams {
    /// Who sent them.
    pub(crate) from: Option<SocketAddr>,
    /// Where the first begins in the buffer.
    pub(crate) start: usize,
    /// Bytes of all.
    pub(crate) len: usize,
    /// Bytes of each but the last.
    pub(crate) segment: usize,
    /// There was more than the buffer holds.
    pub(crate) is_truncated: bool,
}

impl ReceiveBatch {
    pub(crate) fn new() -> Self {
        // SAFETY: both are plain C structures of numbers and pointers, for which zero is a value.
        let (header, control) = unsafe { (mem::zeroed(), mem::zeroed()) };
        let iovec = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            // Zeroed memory that nobody has touched costs nothing yet.
            buffer: vec![0; DEPTH * STRIDE],
            froms: vec![Raw::EMPTY; DEPTH],
            controls: vec![control; DEPTH],
            iovecs: vec![iovec; DEPTH],
            headers: vec![header; DEPTH],
            received: 0,
        }
    }

    /// Receives what is there, without waiting, and returns how many messages.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.received = 0;
        let buffers = self.buffer.chunks_exact_mut(STRIDE);
        let names = self.froms.iter_mut().zip(self.controls.iter_mut());
        let places = self.iovecs.iter_mut().zip(self.headers.iter_mut());
        for ((buffer, (from, control)), (iovec, header)) in buffers.zip(names).zip(places) {
            iovec.iov_base = buffer.as_mut_ptr().cast();
            iovec.iov_len = SIZE;
            header.msg_len = 0;
            let header = &mut header.msg_hdr;
            header.msg_name = std::ptr::from_mut(from).cast();
            header.msg_namelen = size_of::<Raw>() as libc::socklen_t;
            header.msg_iov = iovec;
            header.msg_iovlen = 1;
            header.msg_control = std::ptr::from_mut(control).cast();
            header.msg_controllen = size_of::<Control>() as _;
            header.msg_flags = 0;
        }
        // SAFETY: each header was just pointed at a name, a control buffer and one part, all of
        // them elements of vectors of `self` that nothing else touches during the call, with the
        // lengths they have. The kernel writes no more than these lengths.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                DEPTH as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        if received < 0 {
            return Err(io::Error::last_os_error());
        }
        self.received = (received as usize).min(DEPTH);
        Ok(self.received)
    }

    /// Whether the last call may have left messages behind.
    pub(crate) const fn was_full(&self) -> bool {
        self.received == DEPTH
    }

    /// What the messages of the last call hold.
    pub(crate) fn messages(&self) -> impl Iterator<Item = Datagrams> {
        (0..self.received).map(|index| {
            let header = &self.headers[index];
            let len = (header.msg_len as usize).min(SIZE);
            let control = &self.controls[index];
            // Its type differs between C libraries.
            #[allow(clippy::unnecessary_cast, reason = "not everywhere")]
            let control_len = header.msg_hdr.msg_controllen as usize;
            let has_control = control_len >= size_of::<libc::cmsghdr>() + 4
                && control.header.cmsg_level == libc::SOL_UDP
                && control.header.cmsg_type == libc::UDP_GRO;
            let segment = if has_control { control.segment } else { 0 };
            Datagrams {
                from: self.froms[index].address(),
                start: index * STRIDE,
                len,
                segment: match usize::try_from(segment) {
                    Ok(segment) if segment > 0 => segment,
                    _ => len.max(1),
                },
                is_truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            }
        })
    }

    /// Where the datagrams are.
    pub(crate) fn buffer(&self) -> &[u8] {
        &self.buffer
    }
}

impl fmt::Debug for ReceiveBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceiveBatch")
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}
