//! [`TunFault`]: why no TUN device can be had, and what to do.

use std::io;

use serde::{Deserialize, Serialize};

/// Why `/dev/net/tun` cannot be opened or used. Each cause has a remedy of its own: what is forbidden is
/// not mended by a module, and what is missing not by a right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum TunFault {
    /// The process may not change the namespace at all.
    NoRight,
    /// The mode of the file, or of the mount that it is on (`EACCES`).
    Mode,
    /// A container's list of devices, or a security module (`EPERM`).
    Forbidden,
    /// There is no such file (`ENOENT`, `ENOTDIR`).
    NoFile,
    /// There is a file and no driver behind it (`ENODEV`, `ENXIO`).
    NoDriver,
    /// Something else.
    Other,
}

impl TunFault {
    /// The cause of an error on opening the file. The numbers are those of `errno(3)` on Linux.
    pub fn of(error: &io::Error) -> Self {
        const EPERM: i32 = 1;
        const ENXIO: i32 = 6;
        const ENODEV: i32 = 19;
        const ENOTDIR: i32 = 20;
        match (error.raw_os_error(), error.kind()) {
            (Some(EPERM), _) => Self::Forbidden,
            (Some(ENXIO | ENODEV), _) => Self::NoDriver,
            (Some(ENOTDIR), _) | (_, io::ErrorKind::NotFound) => Self::NoFile,
            (_, io::ErrorKind::PermissionDenied) => Self::Mode,
            _ => Self::Other,
        }
    }

    /// Tells if somebody forbids it: what is there is not for this process.
    pub const fn is_permission(self) -> bool {
        matches!(self, Self::NoRight | Self::Mode | Self::Forbidden)
    }

    /// The problem.
    pub const fn problem(self) -> &'static str {
        match self {
            Self::NoRight => "the process lacks CAP_NET_ADMIN in the network namespace",
            Self::Mode => {
                "the file's mode, or a mount with nodev, keeps this process from /dev/net/tun (EACCES)"
            }
            Self::Forbidden => {
                "the container's list of devices, or a security module, forbids /dev/net/tun (EPERM)"
            }
            Self::NoFile => "there is no /dev/net/tun",
            Self::NoDriver => "/dev/net/tun is there and the kernel has no driver for it",
            Self::Other => "/dev/net/tun cannot be opened",
        }
    }

    /// The remedy.
    pub const fn fix(self) -> &'static str {
        match self {
            Self::NoRight => "run with CAP_NET_ADMIN in the network namespace (as root: sudo)",
            Self::Mode => "run as root, or chmod 666 /dev/net/tun (or give its group the right)",
            Self::Forbidden => {
                "allow the device c 10:200 rw (docker: --device /dev/net/tun; systemd: \
                 DeviceAllow=/dev/net/tun rw)"
            }
            Self::NoFile => {
                "on a host load the module: modprobe tun; in a container give it the device \
                 (docker: --device /dev/net/tun; by hand: mknod /dev/net/tun c 10 200)"
            }
            Self::NoDriver => "load the module: modprobe tun (the kernel needs CONFIG_TUN)",
            Self::Other => "see that /dev/net/tun can be opened for reading and writing",
        }
    }
}

impl std::fmt::Display for TunFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.problem(), self.fix())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_permission_is_never_a_missing_module() {
        for (errno, fault) in [
            (1, TunFault::Forbidden),
            (13, TunFault::Mode),
            (2, TunFault::NoFile),
            (20, TunFault::NoFile),
            (19, TunFault::NoDriver),
            (6, TunFault::NoDriver),
            (24, TunFault::Other),
        ] {
            let found = TunFault::of(&io::Error::from_raw_os_error(errno));
            assert_eq!(found, fault, "{errno}");
            let speaks_of_module = found.to_string().contains("modprobe");
            assert!(!(found.is_permission() && speaks_of_module), "{found}");
            let is_absent = matches!(found, TunFault::NoFile | TunFault::NoDriver);
            assert_eq!(speaks_of_module, is_absent, "{found}");
        }
    }
}
