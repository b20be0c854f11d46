//! The process at the other end of a stream.

use std::os::unix::net::UnixStream;

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;

use super::HandoverError;

/// Sees that the other end is of a user who may do with the packet path as with his own: ours, or
/// root. Descriptors are given to nobody else, and taken from nobody else.
pub(super) fn check(stream: &UnixStream) -> Result<(), HandoverError> {
    let peer = getsockopt(stream, sockopt::PeerCredentials).map_err(|errno| {
        let what = "say whose it is";
        let source = errno.into();
        HandoverError::Stream { what, source }
    })?;
    let uid = peer.uid();
    match uid == 0 || uid == geteuid().as_raw() {
        true => Ok(()),
        false => Err(HandoverError::Stranger { uid }),
    }
}
