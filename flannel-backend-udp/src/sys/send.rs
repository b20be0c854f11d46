//! Many messages in one system call, each of many datagrams.

use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::address::Raw;
use crate::packet::group::Message;
use crate::table::Table;

/// Messages of one call.
const DEPTH: usize = 64;

/// Room for the headers of `DEPTH` messages.
pub(crate) struct SendBatch {
    names: Vec<Raw>,
    controls: Vec<Control>,
    iovecs: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

/// One control message of `UDP_SEGMENT`: the kernel reads 16 bits.
#[derive(Clone, Copy)]
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    segment: u16,
    /// What `CMSG_SPACE` adds.
    padding: [u16; 3],
}

impl SendBatch {
    pub(crate) fn new() -> Self {
        // SAFETY: both are plain C structures of numbers and pointers, for which zero is a value.
        let (header, mut control): (libc::mmsghdr, Control) =
            unsafe { (mem::zeroed(), mem::zeroed()) };
        control.header.cmsg_len = (size_of::<libc::cmsghdr>() + 2) as _;
        control.header.cmsg_level = libc::SOL_UDP;
        control.header.cmsg_type = libc::UDP_SEGMENT;
        let iovec = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            names: vec![Raw::EMPTY; DEPTH],
            controls: vec![control; DEPTH],
            iovecs: vec![iovec; DEPTH],
            headers: vec![header; DEPTH],
        }
    }

    /// Sends messages that stand in `arena`, without waiting, and returns how many of them: at
    /// least 1, or an error that is about the first.
    pub(crate) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        arena: &[u8],
        messages: &[Message],
        table: &Table,
    ) -> io::Result<usize> {
        let mut count = 0;
        for message in messages.iter().take(DEPTH) {
            let bytes = arena.get(message.start as usize..message.end as usize);
            let (Some(bytes), Some(peer)) = (bytes, table.peer(message.peer)) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            let (name, name_len) = Raw::new(peer.endpoint());
            self.names[count] = name;
            self.controls[count].segment = message.segment;
            let iovec = &mut self.iovecs[count];
            iovec.iov_base = bytes.as_ptr().cast_mut().cast();
            iovec.iov_len = bytes.len();
            let header = &mut self.headers[count].msg_hdr;
            header.msg_name = std::ptr::from_mut(&mut self.names[count]).cast();
            header.msg_namelen = name_len;
            header.msg_iov = iovec;
            header.msg_iovlen = 1;
            // A message of one datagram must not carry the option.
            let is_many = message.count > 1;
            header.msg_control = match is_many {
                true => std::ptr::from_mut(&mut self.controls[count]).cast(),
                false => std::ptr::null_mut(),
            };
            header.msg_controllen = match is_many {
                true => size_of::<Control>() as _,
                false => 0,
            };
            count += 1;
        }
        // SAFETY: the first `count` headers were just pointed at names and controls of `self` and
        // at parts of `arena`, all with the lengths they have; none is touched during the call,
        // and the kernel only reads what the parts hold.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT as _,
            )
        };
        match usize::try_from(sent) {
            Ok(sent) => Ok(sent),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

impl fmt::Debug for SendBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendBatch").finish_non_exhaustive()
    }
}
