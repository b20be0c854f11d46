//! The congestion control of the pods' TCP.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;

use clap::ValueEnum;
use nix::sys::socket::{setsockopt, sockopt};

/// The way in which the pods' TCP finds out how much it may send: with the one it sends what there
/// is room for, with the other as fast as it has seen packets arrive. One machine's kernel begins
/// with this one, another's with that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Congestion {
    Cubic,
    Bbr,
}

/// The end of the names of tables that were measured with BBR.
pub(crate) const BBR: &str = ", BBR";

impl Congestion {
    /// Its name in the kernel.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Cubic => "cubic",
            Self::Bbr => "bbr",
        }
    }

    /// The end of the name of a table.
    pub(crate) const fn suffix(self) -> &'static str {
        match self {
            Self::Cubic => "",
            Self::Bbr => BBR,
        }
    }

    /// Lets a connection go by it. A namespace other than the machine's own may begin only with
    /// what
    /// `tcp_allowed_congestion_control` lists; of a connection's own the kernel asks a right
    /// instead, and it loads what it has as a module.
    pub(crate) fn set(self, socket: &impl AsFd) -> io::Result<()> {
        let name = OsString::from(self.name());
        Ok(setsockopt(&socket.as_fd(), sockopt::TcpCongestion, &name)?)
    }

    /// Tries it.
    ///
    /// # Errors
    /// The kernel does not have it, or does not let us.
    pub(crate) fn check(self) -> io::Result<()> {
        self.set(&TcpListener::bind("127.0.0.1:0")?)
    }
}

/// The one that this machine's connections begin with.
pub(crate) fn machines_own() -> String {
    let name = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
    name.unwrap_or_default().trim().to_owned()
}
