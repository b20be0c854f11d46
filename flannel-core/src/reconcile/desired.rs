//! [`Desired`]: what the kernel should have, compiled from a network and its peers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::lease::LeaseKey;
use crate::object::{Object, ObjectKey};

/// An object that is wanted, and for whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The object.
    pub object: Object,
    /// The peer that it serves; `None`: the node itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<LeaseKey>,
}

/// What the kernel should have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Desired {
    /// The objects by the kernel's key.
    pub objects: BTreeMap<ObjectKey, Wanted>,
    /// Nothing is removed for being unwanted, because it is not yet certain what is wanted: the
    /// first snapshot has not come, or it withdraws too much at once.
    pub hold_orphans: bool,
}
