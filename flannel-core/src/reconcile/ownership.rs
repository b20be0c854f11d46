//! [`Ownership`]: which of the kernel's objects are ours.

use serde::{Deserialize, Serialize};

use crate::node::OverlayName;
use crate::object::RouteProtocol;
use crate::subnet::Subnet;

/// Whose an observed object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// Bears our mark: we keep it right and remove it when it is no longer wanted.
    Ours,
    /// Go flannel's: taken over where it is wanted, removed where it is not.
    Flannel,
    /// Anybody else's: reported when it stands in the way, never touched.
    Foreign,
}

/// By what a fresh process knows its own objects again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ownership {
    /// The overlay's name: in the alias of our devices and in the ids of our nexthops.
    pub overlay: OverlayName,
    /// The protocol number of our routes, nexthops and neighbours.
    pub protocol: RouteProtocol,
    /// The networks of the overlay, past and present: a route of ours has its destination here.
    pub networks: Vec<Subnet>,
    /// Whether what Go flannel left is taken over.
    pub adopt_flannel: bool,
}
