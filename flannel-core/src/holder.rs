//! [`Holder`]: whose a record is, seen by a machine that asks for a lease. Pure.
//!
//! A node id is what a host program chose, often a host name, and two machines can have the same one;
//! a machine can also come back under another. The address and what the backend publishes (a MAC, a
//! key) are the machine's own, and so is its [`InstanceId`].

use crate::lease::LeaseAttrs;
use crate::manager::LeaseRequest;
use crate::node::{InstanceId, NodeId};

/// Whose a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// The asker's own.
    Own,
    /// It bears the asker's node id, and another machine wrote it: the asker's only if that one does
    /// not live.
    Twin(InstanceId),
    /// It bears another node id, and the asker's address and backend data: the asker's own of a
    /// former name, unless a machine lives that answers for it (a copy, or a clone).
    Former(Option<InstanceId>),
    /// Another node's.
    Other,
}

impl Holder {
    /// Whose a record of a node, a machine and attributes is. Where the asker does not say which
    /// machine it is, the node id alone decides.
    pub fn of(
        request: &LeaseRequest,
        node: &NodeId,
        instance: Option<InstanceId>,
        attrs: &LeaseAttrs,
    ) -> Self {
        let is_ours = instance.is_some() && instance == request.instance;
        if *node == request.node {
            return match (request.instance, instance) {
                (None, _) | (_, None) => Self::Own,
                (Some(_), Some(_)) if is_ours => Self::Own,
                (Some(_), Some(_)) if is_same_machine(&request.attrs, attrs) => Self::Own,
                (Some(_), Some(theirs)) => Self::Twin(theirs),
            };
        }
        // A derived id is the address itself, and whose that is its backend knows.
        if request.instance.is_none()
            || node.is_derived()
            || request.node.is_derived()
            || !is_same_machine(&request.attrs, attrs)
        {
            return Self::Other;
        }
        if is_ours {
            Self::Own
        } else {
            Self::Former(instance)
        }
    }
}

/// Tells if both are what one machine publishes: one address, and the same MAC or key where the backend
/// has one.
fn is_same_machine(ours: &LeaseAttrs, theirs: &LeaseAttrs) -> bool {
    !ours.public_ip.is_empty()
        && ours.public_ip == theirs.public_ip
        && ours.backend_type == theirs.backend_type
        && ours.backend_data == theirs.backend_data
}
