//! TUN devices, which netlink shows, alters and removes but does not make: that is done with
//! `/dev/net/tun` (Documentation/networking/tuntap.rst of the Linux kernel).

use std::ffi::{c_int, c_short};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use flannel_core::kernel::{Error, Result};
use flannel_core::{IfName, Tun, TunFault};
use nix::errno::Errno;
use nix::unistd::geteuid;

use crate::wire::{Attributes, Malformed, read_u8};

/// The file that makes TUN devices, in the network namespace of the thread that opens it.
const PATH: &str = "/dev/net/tun";

const IFF_TUN: u16 = 0x0001;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
/// The name must be free: without it, who asks for a device that is there attaches to it.
const IFF_TUN_EXCL: u16 = 0x8000;

/// `struct ifreq`, as far as `TUNSETIFF` reads it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// The system calls, and the only unsafe code of this crate: nothing else makes a TUN device.
#[allow(unsafe_code, reason = "the kernel has no other interface for this")]
mod call {
    use super::{AsRawFd, File, Request, c_int, c_short};

    nix::ioctl_write_ptr_bad!(
        set_iff,
        nix::request_code_write!(b'T', 202, size_of::<c_int>()),
        Request
    );
    nix::ioctl_write_int_bad!(
        set_persist,
        nix::request_code_write!(b'T', 203, size_of::<c_int>())
    );
    nix::ioctl_write_int_bad!(
        set_owner,
        nix::request_code_write!(b'T', 204, size_of::<c_int>())
    );

    const _: () = assert!(size_of::<Request>() == 40 && size_of::<c_short>() == size_of::<u16>());

    pub(super) fn make(file: &File, request: &Request) -> nix::Result<()> {
        // SAFETY: the descriptor is open, and the kernel reads a `struct ifreq` of 40 bytes or (on
        // machines of 32 bits) less out of the request, which lives and is initialised throughout.
        unsafe { set_iff(file.as_raw_fd(), request) }.map(drop)
    }

    pub(super) fn own(file: &File, uid: c_int) -> nix::Result<()> {
        // SAFETY: the descriptor is open, and the argument is a number.
        unsafe { set_owner(file.as_raw_fd(), uid) }.map(drop)
    }

    pub(super) fn keep(file: &File) -> nix::Result<()> {
        // SAFETY: the descriptor is open, and the argument is a number.
        unsafe { set_persist(file.as_raw_fd(), 1) }.map(drop)
    }
}

fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(PATH)
}

/// Why no TUN devices can be made here; `None`: they can.
pub(crate) fn fault() -> Option<TunFault> {
    open().err().map(|error| TunFault::of(&error))
}

/// The meaning of an error on opening the file.
fn refused(error: &io::Error) -> Error {
    let fault = TunFault::of(error);
    if fault.is_permission() {
        Error::NotPermitted {
            message: format!("opening {PATH}: {fault}"),
        }
    } else if fault == TunFault::Other {
        Error::Busy {
            message: format!("opening {PATH}: {error}"),
        }
    } else {
        Error::Unsupported {
            what: format!("TUN devices: {fault}"),
        }
    }
}

/// Makes a device, down and without an alias. It stays while the answer is held, and beyond that
/// if it is persistent.
///
/// # Errors
/// [`Error::Exists`] if the name is taken, by a device of whatever kind.
pub(crate) fn make(name: IfName, tun: Tun) -> Result<File> {
    let file = open().map_err(|error| refused(&error))?;
    let mut request = Request {
        name: [0; 16],
        flags: IFF_TUN | IFF_NO_PI | IFF_TUN_EXCL,
        rest: [0; 22],
    };
    for (to, from) in request.name.iter_mut().zip(name.as_str().bytes()) {
        *to = from;
    }
    if tun.multi_queue {
        request.flags |= IFF_MULTI_QUEUE;
    }
    if tun.vnet_header {
        request.flags |= IFF_VNET_HDR;
    }
    let meaning = |errno| match errno {
        // The kernel's words for a TUN device of that name, and for another device.
        Errno::EBUSY | Errno::EINVAL | Errno::EEXIST => Error::Exists {
            message: name.to_string(),
        },
        Errno::EPERM | Errno::EACCES => {
            Error::lacks_net_admin(format_args!("making the TUN device {name}"))
        }
        errno => Error::Rejected {
            message: format!("TUN device {name}: {errno}"),
        },
    };
    call::make(&file, &request).map_err(meaning)?;
    // A device without an owner may be attached to by anybody who can open the file, which on most
    // systems is everybody.
    let uid = c_int::from_ne_bytes(geteuid().as_raw().to_ne_bytes());
    call::own(&file, uid).map_err(meaning)?;
    if tun.persistent {
        call::keep(&file).map_err(meaning)?;
    }
    Ok(file)
}

/// Reads `IFLA_INFO_DATA` of a device of kind `tun`; `None`: it is a TAP device.
///
/// # Errors
/// [`Malformed`] if it is cut or a field has another length than the kernel gives it.
pub(crate) fn decode(data: &[u8]) -> std::result::Result<Option<Tun>, Malformed> {
    const IFLA_TUN_TYPE: u16 = 3;
    const IFLA_TUN_VNET_HDR: u16 = 5;
    const IFLA_TUN_PERSIST: u16 = 6;
    const IFLA_TUN_MULTI_QUEUE: u16 = 7;
    // Linux before 4.17 tells nothing.
    let mut tun = Tun::FOR_TUNNEL;
    let mut is_tun = true;
    for attribute in Attributes(data) {
        let (kind, value) = attribute?;
        match kind {
            IFLA_TUN_TYPE => is_tun = u16::from(read_u8(value)?) == IFF_TUN,
            IFLA_TUN_VNET_HDR => tun.vnet_header = read_u8(value)? != 0,
            IFLA_TUN_PERSIST => tun.persistent = read_u8(value)? != 0,
            IFLA_TUN_MULTI_QUEUE => tun.multi_queue = read_u8(value)? != 0,
            _ => {}
        }
    }
    Ok(is_tun.then_some(tun))
}
