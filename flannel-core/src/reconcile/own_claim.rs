//! [`OwnClaim`]: our own record as other nodes see it, and the older records that want the same.

use std::collections::BTreeSet;

use crate::backend::Network;
use crate::family::DualStack;
use crate::lease::{Lease, Seniority};
use crate::lease_set::Peer;
use crate::object::{Object, ObjectKey};
use crate::subnet::Subnet;

/// The objects that our own record makes other nodes want.
#[derive(Debug, Clone)]
pub(super) struct OwnClaim {
    pub(super) seniority: Seniority,
    keys: BTreeSet<ObjectKey>,
}

/// The most older records of the same wants that are looked at: those of one machine are few.
pub(super) const RIVALS: usize = 16;

impl OwnClaim {
    /// Finds an object that others want both for us and for these subnets of a peer.
    pub(super) fn shared(
        &self,
        network: &dyn Network,
        peer: &Peer,
        subnets: &DualStack<Subnet>,
    ) -> Option<ObjectKey> {
        if subnets.is_empty() {
            return None;
        }
        let theirs = keys_of(network, &peer.lease, subnets);
        theirs.intersection(&self.keys).next().cloned()
    }

    pub(super) fn of(network: &dyn Network) -> Self {
        let lease = network.lease();
        let mut reached = lease.subnet;
        for (family, _) in lease.subnet.iter() {
            if lease.attrs.public_ip(family).is_none() {
                reached.set(family, None);
            }
        }
        Self {
            seniority: lease.seniority(),
            keys: keys_of(network, lease, &reached),
        }
    }
}

/// The keys that nodes of a network want for the subnets of a record.
fn keys_of(
    network: &dyn Network,
    lease: &Lease,
    subnets: &DualStack<Subnet>,
) -> BTreeSet<ObjectKey> {
    let answers = network.peer(lease, subnets);
    let units = answers.values().filter_map(|answer| answer.as_ref().ok());
    units.flatten().map(Object::key).collect()
}
