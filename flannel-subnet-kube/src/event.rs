//! [`KubeEvent`]: what a manager did beside what it was asked for.

use flannel_core::{DualStack, LeaseKey, NodeId, Subnet};

use crate::record::Difference;

/// Something that somebody else did to our Node, and that was made good.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum KubeEvent {
    /// Our annotations were changed or removed by somebody else, and are restored.
    Restored {
        /// Our node.
        node: NodeId,
        /// What was found in the place of what.
        differences: Vec<Difference>,
    },
    /// The Node object was deleted and made again, and is a record again.
    NodeRecreated {
        /// Our node.
        node: NodeId,
        /// The subnets that it had.
        before: DualStack<Subnet>,
        /// The subnets that it has.
        after: DualStack<Subnet>,
    },
    /// The condition `NetworkUnavailable` was set or removed by somebody else, and is restored.
    ConditionRestored {
        /// Our Node.
        key: LeaseKey,
    },
}
