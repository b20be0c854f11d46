//! The owner of a Unix socket by its abstract name: for sockets that nobody can connect to, because
//! they are not listened on or their queue is full (`linux/unix_diag.h`, `linux/sock_diag.h`).

use std::sync::Arc;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use crate::connection::{Connection, Settings};
use crate::error::Failure;
use crate::wire::{Attributes, Body, Malformed, Message, read_u32};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const AF_UNIX: u8 = 1;
/// Bound (`TCP_CLOSE`) and listening (`TCP_LISTEN`), one bit each.
const STATES: u32 = 1 << 7 | 1 << 10;
const UDIAG_SHOW_NAME: u32 = 0x01;
const UDIAG_SHOW_UID: u32 = 0x40;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_UID: u16 = 7;
/// The length of `struct unix_diag_msg`.
const HEADER: usize = 16;

/// The user whose socket has an abstract name, in the namespace of the calling thread; `None`: nobody
/// has it, or this kernel (before Linux 5.3, or without `unix_diag`) does not tell.
pub(super) fn of(name: &[u8]) -> Option<u32> {
    let settings = Settings {
        deadline: Duration::from_secs(1),
        receive_buffer: 256 * 1024,
        progress: Arc::default(),
    };
    let mut connection = Connection::new(NETLINK_SOCK_DIAG, settings);
    let found = connection.dump(SOCK_DIAG_BY_FAMILY, &question(), |message| {
        decode(message, name)
    });
    found.ok()?.into_iter().next()
}

/// `struct unix_diag_req`: the sockets in some states, with their names and owners.
fn question() -> Body {
    let mut request = [0; 24];
    request[0] = AF_UNIX;
    request[4..8].copy_from_slice(&STATES.to_ne_bytes());
    request[12..16].copy_from_slice(&(UDIAG_SHOW_NAME | UDIAG_SHOW_UID).to_ne_bytes());
    Body::new(&request)
}

fn decode(message: &Message<'_>, name: &[u8]) -> Result<Option<u32>, Failure> {
    if message.kind != SOCK_DIAG_BY_FAMILY {
        return Ok(None);
    }
    Ok(owner(message.body, name)?)
}

/// The owner in an answer, if it is about this name.
fn owner(body: &[u8], name: &[u8]) -> Result<Option<u32>, Malformed> {
    let (mut is_it, mut uid) = (false, None);
    for attribute in Attributes::after(body, HEADER)? {
        let (kind, value) = attribute?;
        match kind {
            UNIX_DIAG_NAME => is_it = value.split_first() == Some((&0, name)),
            UNIX_DIAG_UID => uid = Some(read_u32(value)?),
            _ => {}
        }
    }
    Ok(uid.filter(|_| is_it))
}
