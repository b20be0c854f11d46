//! Queues of a TUN device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use flannel_core::{IfName, TunFault};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use crate::namespace::NamespaceId;

/// `struct ifreq`, of which the flags are used.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// How often an attach is tried that finds the device busy: an old queue is on its way out.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(5);

/// Attaches to a queue of a TUN device in this thread's namespace. The device must be there: none
/// is made.
pub(crate) fn attach(device: &IfName, vnet: bool) -> io::Result<OwnedFd> {
    let mut tries = 0;
    loop {
        match try_attach(device, vnet) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && tries < TRIES => {
                tries += 1;
                std::thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

fn try_attach(device: &IfName, vnet: bool) -> io::Result<OwnedFd> {
    // Where there is none the kernel would make one, if only for a moment, and whoever is about to
    // make the right one would find the name taken. A queue hears of the end of its device when the
    // name is free already.
    let before = index_of(device)?;
    let file: OwnedFd = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(|error| explained(&error))?
        .into();
    let mut flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE;
    if vnet {
        flags |= libc::IFF_VNET_HDR;
    }
    let mut request = Request::new(device, flags);
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which `Request` has the size of.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // It went in between, and the kernel has made one just now, which goes with the file.
    if index_of(device)? != before {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("{device} has just gone"),
        ));
    }
    if !vnet {
        // An earlier reader may have asked for large packets, which without headers nobody could
        // take apart.
        set_flags(file.as_fd(), 0);
    }
    Ok(file)
}

fn index_of(device: &IfName) -> io::Result<libc::c_uint> {
    if_nametoindex(device.as_str()).map_err(|error| match error {
        Errno::ENODEV => io::Error::new(io::ErrorKind::NotFound, format!("there is no {device}")),
        error => error.into(),
    })
}

/// Lets the device of a queue go with the last of its queues, and its addresses and routes with it.
/// It was made to stay because nobody held it yet.
pub(crate) fn hold(queue: BorrowedFd<'_>) -> bool {
    set_persistent(queue, 0)
}

/// Lets the device of a queue stay without any queue, until it is deleted.
pub(crate) fn leave(queue: BorrowedFd<'_>) -> bool {
    set_persistent(queue, 1)
}

fn set_persistent(queue: BorrowedFd<'_>, yes: libc::c_ulong) -> bool {
    // SAFETY: TUNSETPERSIST takes its argument as a number.
    unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETPERSIST as _, yes) == 0 }
}

/// That the file cannot be opened says nothing of the device: not that there is none, above all.
fn explained(error: &io::Error) -> io::Error {
    let fault = TunFault::of(error);
    let kind = match fault {
        fault if fault.is_permission() => io::ErrorKind::PermissionDenied,
        TunFault::NoFile | TunFault::NoDriver => io::ErrorKind::Unsupported,
        _ => error.kind(),
    };
    io::Error::new(kind, format!("{error}: {fault}"))
}

/// The device that a queue is of, and whether its packets have headers.
pub(super) fn identity(queue: BorrowedFd<'_>) -> io::Result<(String, bool)> {
    let request = attached(queue)?;
    let name = request.name.iter().take_while(|byte| **byte != 0);
    let name = name.map(|byte| char::from(*byte)).collect();
    Ok((name, i32::from(request.flags) & libc::IFF_VNET_HDR != 0))
}

fn attached(queue: BorrowedFd<'_>) -> io::Result<Request> {
    let mut request = Request {
        name: [0; libc::IFNAMSIZ],
        flags: 0,
        rest: [0; 22],
    };
    // SAFETY: TUNGETIFF writes a `struct ifreq`, which `Request` has the size of.
    if unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(request)
}

fn set_flags(queue: BorrowedFd<'_>, flags: libc::c_uint) -> bool {
    let flags = flags as libc::c_ulong;
    // SAFETY: TUNSETOFFLOAD takes its argument as a number.
    unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETOFFLOAD as _, flags) == 0 }
}

impl Request {
    fn new(device: &IfName, flags: libc::c_int) -> Self {
        let mut name = [0; libc::IFNAMSIZ];
        for (to, from) in name.iter_mut().zip(device.as_str().bytes()) {
            *to = from;
        }
        Self {
            name,
            flags: flags as libc::c_short,
            rest: [0; 22],
        }
    }
}

/// What a queue gives and takes in large packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offload {
    pub(crate) tcp: bool,
    pub(crate) udp: bool,
}

/// Asks for as much as the kernel has.
pub(crate) fn set_offload(queue: BorrowedFd<'_>) -> Offload {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    if set_flags(queue, tcp | udp) {
        return Offload {
            tcp: true,
            udp: true,
        };
    }
    Offload {
        tcp: set_flags(queue, tcp),
        udp: false,
    }
}

/// Tells if a queue is of a device that is there and has this name. When a device goes its queues stay
/// behind, of nothing; when it is renamed, they go on.
pub(crate) fn is_attached(queue: BorrowedFd<'_>, device: &IfName) -> bool {
    identity(queue).is_ok_and(|(name, _)| name == device.as_str())
}

/// `TUNGETDEVNETNS` (Linux 5.2), which libc does not have: `_IO('T', 227)` of `linux/if_tun.h`.
const TUNGETDEVNETNS: libc::c_ulong = 0x54e3;

/// The namespace that a queue's device is in, which need not be the one it was made in.
///
/// # Errors
///
/// `EPERM` without `CAP_NET_ADMIN` there; `EINVAL` or `ENOTTY` before Linux 5.2.
pub(crate) fn namespace_of(queue: BorrowedFd<'_>) -> io::Result<NamespaceId> {
    // SAFETY: TUNGETDEVNETNS takes no argument.
    let fd = unsafe { libc::ioctl(queue.as_raw_fd(), TUNGETDEVNETNS as _) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    let namespace = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(NamespaceId::of(&File::from(namespace).metadata()?))
}
