//! A network lab on one machine: real Linux network namespaces, the links between them, and
//! ready-made topologies.
//!
//! A [`Lab`] makes namespaces ([`Ns`]) and takes them away when it is dropped, also by a panic.
//! They are anonymous (they live as long as something holds them open, so nothing can be left
//! behind, however the process ends) or named, so that `ip netns exec NAME …` works. A
//! [`SharedLab`] is one that several processes make together. The namespace that the process runs
//! in is never changed.
//!
//! ```no_run
//! use std::time::Duration;
//! use flannel_testkit::{netns::Lab, prober};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let lab = Lab::new("demo")?;
//! let underlay = lab.underlay(2)?;
//! let (a, b) = (&underlay.nodes[0], &underlay.nodes[1]);
//! for to in b.ips.ips() {
//!     prober::ping(&a.ns, None, to, Duration::from_secs(1))?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Everything here blocks the calling thread, for milliseconds: it works on threads of its own,
//! each inside one namespace, and may be called from async code that can bear that (a test).
//!
//! Needs Linux and the capabilities CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_RAW (root, or root of
//! a user namespace).

mod lab;
mod links;
mod ns;
mod shared;
mod topology;

use std::io;

use flannel_core::{IfName, kernel};

pub use lab::Lab;
pub use links::{Kind, kinds};
pub use ns::Ns;
pub use shared::SharedLab;
pub use topology::{Host, Segment, Underlay};

/// The result of a lab call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the lab could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The process may not make namespaces.
    #[error(
        "network namespaces need the capabilities CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_RAW \
         ({missing} missing): run the command with sudo"
    )]
    NotPermitted {
        /// The capabilities that the process lacks.
        missing: String,
    },
    /// A name that cannot be one.
    #[error(
        "{name:?} cannot name a namespace: use 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first"
    )]
    Name {
        /// The name given.
        name: String,
    },
    /// A device name that the kernel would not take.
    #[error("{reason}")]
    Device {
        /// What is wrong with it.
        reason: String,
    },
    /// A namespace of this name exists already.
    #[error(
        "the namespace {name} exists already: remove it with `ip netns del {name}`, or choose another name"
    )]
    NameTaken {
        /// The whole name.
        name: String,
    },
    /// Another process runs the node of this namespace.
    #[error("{name} is run by another process: stop that, or choose another name for the node")]
    InUse {
        /// The whole name.
        name: String,
    },
    /// An address that the topology needs does not exist.
    #[error("{what}: {reason}")]
    Address {
        /// What needs the address.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// The system refused a call.
    #[error("{what} in namespace {ns} failed")]
    System {
        /// What was tried.
        what: String,
        /// The namespace it was for.
        ns: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused to make or change a network object.
    #[error("{what} in namespace {ns} failed")]
    Kernel {
        /// What was tried.
        what: String,
        /// The namespace it was for.
        ns: String,
        /// What the kernel said.
        #[source]
        source: kernel::Error,
    },
    /// The topology is made, but packets do not pass.
    #[error("packets from namespace {ns} do not pass: {reason}")]
    NotReady {
        /// The namespace.
        ns: String,
        /// The last thing that went wrong.
        reason: String,
    },
    /// A device that should be there is not.
    #[error("there is no device {dev} in namespace {ns}")]
    NoSuchDevice {
        /// The device.
        dev: IfName,
        /// The namespace.
        ns: String,
    },
}
