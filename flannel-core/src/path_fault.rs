//! [`PathFault`]: why a packet path in user space carries nothing.

use serde::{Deserialize, Serialize};

use crate::object::IfName;

/// A packet path that is there and carries nothing at the moment.
///
/// It is mended by itself, so it is no difference from what is desired. But while it lasts the packets of
/// the node are lost, which [`ConditionType::DataPath`](crate::ConditionType::DataPath) says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathFault {
    /// The TUN device.
    pub dev: IfName,
    /// The fault, in the packet path's words.
    pub problem: String,
}
