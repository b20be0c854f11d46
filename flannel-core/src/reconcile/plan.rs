//! [`plan`]: the pure way from what the kernel has to what it should have.

use serde::{Deserialize, Serialize};

use crate::kernel::Op;
use crate::lease::LeaseKey;
use crate::object::{Object, ObjectKey};

/// Why a step is taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Why {
    /// It is wanted and not there.
    Missing,
    /// It is there and differs.
    Drifted {
        /// The first field that differs, with what it is and what it should be.
        field: String,
    },
    /// It is ours and no longer wanted.
    Orphan,
    /// It differs in what the kernel cannot change: it is removed and made anew.
    Rebuild {
        /// The field, with what it is and what it should be.
        field: String,
    },
    /// It is ours or Go flannel's and keeps the kernel from making what is wanted.
    InTheWay {
        /// What it keeps from being made.
        of: ObjectKey,
    },
}

/// One change with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The change.
    pub op: Op,
    /// Why it is made.
    pub why: Why,
    /// The peer that it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<LeaseKey>,
    /// What stops working between this step and those that follow: keys of objects that go with
    /// the one removed. Empty for all but the removal of a device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disrupts: Vec<ObjectKey>,
}

/// A wanted object whose place is taken by somebody else's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocked {
    /// What is wanted.
    pub wanted: Object,
    /// What is there.
    pub found: Object,
    /// The peer it would serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<LeaseKey>,
}

/// What to do, in order, and what cannot be done.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Plan {
    /// The changes in their order.
    pub steps: Vec<Step>,
    /// What is wanted and blocked by foreign objects. Nothing that needs it is in the steps.
    pub foreign: Vec<Blocked>,
}
