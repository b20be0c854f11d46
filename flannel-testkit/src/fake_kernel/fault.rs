//! Faults: named, each comes once, each must come.
//!
//! Those that Linux has are promises of [`conformance::kernel`](crate::conformance::kernel), which
//! also runs on the real one: the classes of refusals, a device that goes in the middle of a call,
//! lost hints that are told, a reading that is disturbed. Some are harsher than Linux, so that what
//! passes with them passes there: [`FaultKind::ApplyTimesOut`] (Linux carries a request out while
//! it is sent), [`FaultKind::HintsLost`] (Linux tells when it lost some), [`FaultKind::HintsRepeated`]
//! and [`FaultKind::HintsReordered`] (Linux does neither).

use std::time::Duration;

use flannel_core::kernel::Error;
use flannel_core::{IfName, ObjectKey, Op};

/// What goes wrong in one coming call of a [`FakeKernel`](super::FakeKernel).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// The next op on an object of a kind ([`ObjectKey::kind`]) fails and changes nothing.
    Op {
        /// The kind.
        kind: &'static str,
        /// How.
        failure: Failure,
    },
    /// The next op on an object fails and changes nothing.
    Key {
        /// The object.
        key: ObjectKey,
        /// How.
        failure: Failure,
    },
    /// The next op on an object of a kind is answered as if it were made, and changes nothing.
    Ignored {
        /// The kind.
        kind: &'static str,
    },
    /// The next reading of the state fails.
    Observe {
        /// How.
        failure: Failure,
    },
    /// The next batch times out: `after` ops are made and answered, one more is made, the rest
    /// are not, and for none of them is there an answer.
    ApplyTimesOut {
        /// How many ops are answered.
        after: usize,
    },
    /// A device is deleted in the middle of the next batch that is longer than `after`.
    DeviceDeleted {
        /// The device.
        dev: IfName,
        /// After how many ops.
        after: usize,
    },
    /// The notifications of the next change are lost, and the watch knows it: it says `Change::All`.
    Overrun,
    /// The notifications of the next change are lost and nobody knows.
    HintsLost,
    /// Of the next notifications with contents the second half is lost, and the watch knows it.
    HintsTorn,
    /// The next notifications with contents come a second time, after those of a later change.
    HintsRepeated,
    /// The next notifications with contents, if there are several, come in the reverse order.
    HintsReordered,
    /// The next notifications with contents come late, and with them all that follow.
    HintsLate {
        /// By how much, on tokio's time.
        by: Duration,
    },
}

/// How a call fails: the classes of [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// [`Error::Busy`].
    Busy,
    /// [`Error::NotPermitted`].
    NotPermitted,
    /// [`Error::Unsupported`].
    Unsupported,
    /// [`Error::Exists`].
    Exists,
    /// [`Error::NotFound`].
    NotFound,
    /// [`Error::NoSuchDevice`].
    NoSuchDevice,
    /// [`Error::Rejected`].
    Rejected,
    /// [`Error::TimedOut`].
    TimedOut,
    /// [`Error::Interrupted`].
    Interrupted,
    /// [`Error::Connection`].
    Connection,
}

impl Failure {
    pub(super) fn error(self, op: &Op) -> Error {
        match self {
            Self::NoSuchDevice => Error::NoSuchDevice {
                dev: op
                    .object()
                    .dev()
                    .map_or_else(String::new, |dev| dev.to_string()),
            },
            other => other.describe(&format!("a fault was set for {}", op.key())),
        }
    }

    pub(super) fn bare(self) -> Error {
        self.describe("a fault was set")
    }

    fn describe(self, text: &str) -> Error {
        let message = text.to_owned();
        match self {
            Self::Busy => Error::Busy { message },
            Self::NotPermitted => Error::NotPermitted { message },
            Self::Unsupported => Error::Unsupported { what: message },
            Self::Exists => Error::Exists { message },
            Self::NotFound => Error::NotFound { message },
            Self::NoSuchDevice => Error::NoSuchDevice { dev: message },
            Self::Rejected => Error::Rejected { message },
            Self::TimedOut => Error::TimedOut,
            Self::Interrupted => Error::Interrupted,
            Self::Connection => Error::Connection {
                reason: message,
                source: None,
            },
        }
    }
}
