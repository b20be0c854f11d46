//! [`Status`] and [`OverlayEvent`]: what an overlay tells about itself.

mod line;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::{Note, Rejection};
use crate::clock::Moment;
use crate::condition::{Condition, ConditionStatus, ConditionType};
use crate::family::{DualStack, Family, PublicIp};
use crate::lease::{BackendType, LeaseKey};
use crate::lease_set::HeldReason;
use crate::listed::Listed;
use crate::node::NodeId;
use crate::reconcile::plan::{Blocked, Step};
use crate::subnet::Subnet;
use crate::traffic::Traffic;
use crate::underlay::External;

/// How an overlay is. Serialises to stable JSON.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Status {
    /// One of each [`ConditionType`].
    pub conditions: Arc<[Condition]>,
    /// The conditions as they became at their last 32 changes of status or reason, the latest last.
    #[serde(default, skip_serializing_if = "<[_]>::is_empty")]
    pub history: Arc<[Condition]>,
    /// The latch that start-up waits for: this node has worked at least once.
    pub ready: bool,
    /// The truth of now: this node works, as far as it can tell: the lease is held (or remembered, while the
    /// store is down) and other nodes accept its record, the interface is there, and the kernel has all
    /// that the node itself needs and all that peers need, but for what is blocked for single peers, and
    /// the host lets packets pass, as far as the kernel says. A
    /// store that does not answer, a config that cannot be used while the last one stays in force, and
    /// peers that are rejected leave it true. The documentation of [`ConditionType`] says which reasons
    /// make it false.
    #[serde(default)]
    pub working: bool,
    /// Why the overlay has stopped, once it has, however it did: it does nothing any more. The rest is
    /// what was true before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// Our lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseStatus>,
    /// The backend in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<BackendType>,
    /// The external interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<External>,
    /// The largest packet containers may send, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// How many other nodes' records are known.
    pub peers: usize,
    /// Peers that are not programmed, or not in every family, and why. While thousands of them change, this
    /// list and the next follow a little later, the counts in the conditions at once.
    pub rejected: Listed<Vec<RejectedPeer>>,
    /// Records in the store that cannot be read, and why.
    pub unreadable: Listed<BTreeMap<LeaseKey, String>>,
    /// Foreign objects in the place of ours.
    pub foreign: Vec<Blocked>,
    /// Objects that could not be made as they should be.
    pub failing: Vec<FailingObject>,
    /// How many objects the kernel should have.
    pub objects: usize,
    /// How many repairs were made: steps for objects that had been right before.
    pub repairs: u64,
    /// What else is worth telling, of the backend and of the choice of interface.
    pub notes: Vec<Note>,
    /// What packet paths in user space have counted up to the call of
    /// [`Overlay::status`](crate::Overlay::status). It changes with every packet, so a watched status
    /// is without it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub traffic: Vec<Traffic>,
}

impl Status {
    /// The condition of a type.
    pub fn condition(&self, kind: ConditionType) -> Option<&Condition> {
        self.conditions
            .iter()
            .find(|condition| condition.kind == kind)
    }

    /// Why the node does not work, or not yet: the condition that is in the way.
    pub fn obstacle(&self) -> Option<&Condition> {
        if self.working {
            return None;
        }
        let told = |condition: &&Condition| condition.status == ConditionStatus::False;
        let in_the_way = |condition: &&Condition| condition.stops_work();
        let mut all = self.conditions.iter().filter(told);
        let stops = all.clone().find(in_the_way);
        let any = stops.or_else(|| all.next());
        any.or_else(|| {
            let mut all = self.conditions.iter();
            all.find(|condition| condition.status == ConditionStatus::Unknown)
        })
    }

    /// Whether a condition holds.
    pub fn is_true(&self, kind: ConditionType) -> bool {
        self.condition(kind)
            .is_some_and(|c| c.status == ConditionStatus::True)
    }
}

/// Our lease in a [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LeaseStatus {
    /// The record in the store.
    pub key: LeaseKey,
    /// The node's subnets.
    pub subnet: DualStack<Subnet>,
    /// The addresses published.
    pub public_ip: PublicIp,
    /// Whether the store has confirmed it in this run.
    pub confirmed: bool,
    /// When it ends unless renewed, on the overlay's clock; `None`: it does not end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Moment>,
}

/// A peer that is not, or not wholly, programmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RejectedPeer {
    /// Its record.
    pub key: LeaseKey,
    /// The family concerned; `None`: all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<Family>,
    /// Why.
    pub reason: Rejection,
}

/// An object that could not be made as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FailingObject {
    /// The object, in words.
    pub object: String,
    /// What was tried.
    pub op: String,
    /// The peer that it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<LeaseKey>,
    /// What the kernel said.
    pub error: String,
    /// How often it failed in a row.
    pub attempts: u32,
    /// When it failed first, on the overlay's clock.
    pub since: Moment,
}

/// Something that happened; as text, one line for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum OverlayEvent {
    /// A lease was given to us, or the one we had was confirmed.
    LeaseAcquired {
        /// Our subnets.
        subnet: DualStack<Subnet>,
    },
    /// Our lease was extended, or new attributes were published.
    LeaseRenewed,
    /// Our lease is gone.
    LeaseLost {
        /// How it was lost.
        reason: String,
    },
    /// A peer came.
    PeerAdded {
        /// Its record.
        key: LeaseKey,
        /// The node.
        node: NodeId,
        /// Its subnets, as far as they were found admissible.
        subnet: DualStack<Subnet>,
    },
    /// Something about a peer is different.
    PeerChanged {
        /// Its record.
        key: LeaseKey,
        /// The node.
        node: NodeId,
        /// Its subnets, as far as they were found admissible.
        subnet: DualStack<Subnet>,
    },
    /// A peer went.
    PeerRemoved {
        /// Its record.
        key: LeaseKey,
    },
    /// A change to the kernel was made.
    Step {
        /// The change and why.
        step: Step,
        /// Whether the object had been right before: a repair.
        repair: bool,
    },
    /// A change to the kernel failed; it is tried again.
    StepFailed {
        /// The change and why.
        step: Step,
        /// What the kernel said.
        error: String,
    },
    /// A condition's status or reason changed.
    Condition(Condition),
    /// The overlay is carried by another external interface, or from another address.
    InterfaceChanged {
        /// The interface as it was.
        from: External,
        /// The interface as it is.
        to: External,
        /// The reason, in words.
        why: String,
    },
    /// The network config changed and was applied.
    ConfigApplied,
    /// The store withdrew too many peers at once, or has lost its config: that is not believed yet.
    WithdrawalHeld {
        /// How many peers the store lacks.
        withdrawn: usize,
        /// How many were known.
        known: usize,
        /// Why it is not believed.
        reason: HeldReason,
    },
}
