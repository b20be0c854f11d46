//! From the kernel's answer to its meaning.

use flannel_core::kernel::Error;
use flannel_core::{IfName, Object};
use nix::errno::Errno;

use crate::wire::{Attributes, Malformed, read_text, read_u32};

/// Why a request has no good answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The kernel said no.
    Refused {
        /// Its number.
        errno: Errno,
        /// Its words (extended acknowledgement), if it had any.
        text: Option<String>,
    },
    /// No answer came within the deadline.
    TimedOut,
    /// A dump was disturbed by changes every time it was tried.
    Interrupted,
    /// The connection cannot be used any more.
    Broken(String),
}

impl From<Malformed> for Failure {
    fn from(malformed: Malformed) -> Self {
        Self::Broken(malformed.to_string())
    }
}

impl Failure {
    /// The kernel's number, if the kernel answered.
    pub(crate) const fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// The meaning of the failure of an operation on an object.
    pub(crate) fn about(self, object: &Object) -> Error {
        let dev = object.dev();
        self.meaning(dev, || object.to_string())
    }

    /// The meaning of a failure. `what` says what was tried.
    pub(crate) fn meaning(self, dev: Option<IfName>, what: impl FnOnce() -> String) -> Error {
        let (errno, text) = match self {
            Self::Refused { errno, text } => (errno, text),
            Self::TimedOut => return Error::TimedOut,
            Self::Interrupted => return Error::Interrupted,
            Self::Broken(reason) => {
                return Error::Connection {
                    reason,
                    source: None,
                };
            }
        };
        let explained = text.is_some();
        let message = match text {
            Some(text) => format!("{text} ({errno:?})"),
            None => format!("{} ({errno:?})", errno.desc()),
        };
        match errno {
            Errno::EPERM => Error::lacks_net_admin(message),
            // With words it is a setting that forbids, such as "IPv6 is disabled on this device".
            Errno::EACCES if !explained => Error::lacks_net_admin(message),
            Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT | Errno::EPROTONOSUPPORT => {
                Error::Unsupported {
                    what: format!("{}: {message}", what()),
                }
            }
            Errno::ENODEV | Errno::ENXIO => match dev {
                Some(dev) => Error::NoSuchDevice {
                    dev: dev.to_string(),
                },
                None => Error::NotFound { message },
            },
            Errno::ENOENT | Errno::ESRCH => Error::NotFound { message },
            Errno::EEXIST => Error::Exists { message },
            // ENETDOWN: the device was set down under our hands; that it is made up again is part
            // of what brings the object back.
            Errno::EBUSY
            | Errno::ENOMEM
            | Errno::ENOBUFS
            | Errno::EAGAIN
            | Errno::EINTR
            | Errno::EMFILE
            | Errno::ENFILE
            | Errno::ENOSPC
            | Errno::ENETDOWN => Error::Busy { message },
            Errno::ETIMEDOUT => Error::TimedOut,
            _ => Error::Rejected { message },
        }
    }
}

/// The device that an object needs is not there.
pub(crate) fn no_device(dev: IfName) -> Error {
    Error::NoSuchDevice {
        dev: dev.to_string(),
    }
}

/// Reads an `NLMSG_ERROR`: `None` is an acknowledgement.
///
/// Its body is the number, the header of the request and, unless the acknowledgement is capped
/// (`NLM_F_CAPPED`) or good news, the rest of the request; then, if `NLM_F_ACK_TLVS` says so, the
/// attributes of the extended acknowledgement, of which number 1 is the text.
pub(crate) fn read_answer(flags: u16, body: &[u8]) -> Result<Option<Failure>, Malformed> {
    const CAPPED: u16 = 0x100;
    const ACK_TLVS: u16 = 0x200;
    const TEXT: u16 = 1;
    const REQUEST: usize = 4;
    let number = body
        .get(..REQUEST)
        .ok_or(Malformed("an acknowledgement without a number"))?;
    let number = read_u32(number)?.cast_signed();
    if number == 0 {
        return Ok(None);
    }
    let mut text = None;
    if flags & ACK_TLVS != 0 {
        let request = body
            .get(REQUEST..REQUEST + 16)
            .ok_or(Malformed("an acknowledgement without its request"))?;
        let len = if flags & CAPPED != 0 {
            16
        } else {
            usize::try_from(read_u32(&request[..4])?).unwrap_or(usize::MAX)
        };
        let rest = REQUEST.saturating_add(len).saturating_add(3) & !3;
        for attribute in Attributes(body.get(rest..).unwrap_or_default()) {
            let (kind, value) = attribute?;
            if kind == TEXT {
                text = Some(read_text(value));
            }
        }
    }
    Ok(Some(Failure::Refused {
        errno: Errno::from_raw(number.wrapping_neg()),
        text,
    }))
}

/// The code at the end of a dump (`NLMSG_DONE`): `None` is a good end.
///
/// Its text, if any, follows the number at once.
pub(crate) fn read_done(flags: u16, body: &[u8]) -> Result<Option<Failure>, Malformed> {
    const ACK_TLVS: u16 = 0x200;
    const TEXT: u16 = 1;
    // An empty body ends a dump well: the number is left out by a few generic netlink families.
    let Some(number) = body.get(..4) else {
        return Ok(None);
    };
    let number = read_u32(number)?.cast_signed();
    if number >= 0 {
        return Ok(None);
    }
    let mut text = None;
    if flags & ACK_TLVS != 0 {
        for attribute in Attributes(body.get(4..).unwrap_or_default()) {
            let (kind, value) = attribute?;
            if kind == TEXT {
                text = Some(read_text(value));
            }
        }
    }
    Ok(Some(Failure::Refused {
        errno: Errno::from_raw(number.wrapping_neg()),
        text,
    }))
}
