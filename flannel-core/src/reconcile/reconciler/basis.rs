//! [`Basis`]: what a plan for everything stands on beside the objects.

use std::collections::BTreeSet;

use crate::lease::BackendType;
use crate::reconcile::desired::Desired;
use crate::reconcile::ownership::Ownership;
use crate::subnet::Subnet;

/// All that a plan depends on beside the objects that are wanted and there. Where it changes, other keys
/// than those that anything happened to are no longer right.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Basis {
    hold_orphans: bool,
    held_backends: BTreeSet<BackendType>,
    spared: Vec<Subnet>,
    ownership: Ownership,
}

impl Basis {
    pub(super) fn of(desired: &Desired, ownership: &Ownership) -> Self {
        let (hold_orphans, held_backends, spared) = beside_objects(desired);
        Self {
            hold_orphans,
            held_backends: held_backends.clone(),
            spared: spared.to_vec(),
            ownership: ownership.clone(),
        }
    }

    pub(super) fn is_of(&self, desired: &Desired, ownership: &Ownership) -> bool {
        let basis = (self.hold_orphans, &self.held_backends, &*self.spared);
        basis == beside_objects(desired) && self.ownership == *ownership
    }
}

/// All that is desired beside the objects.
fn beside_objects(desired: &Desired) -> (bool, &BTreeSet<BackendType>, &[Subnet]) {
    let Desired {
        objects: _,
        hold_orphans,
        held_backends,
        spared,
    } = desired;
    (*hold_orphans, held_backends, spared)
}
