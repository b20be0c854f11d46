//! Typed health: [`Condition`]s with a reason and since when they hold.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::clock::Moment;
use crate::host_checks::{ALL_DROPPED, ALL_ELSEWHERE, FORWARDING_OFF};

/// What a [`Condition`] is about. Of each there is exactly one in a [`Status`](crate::Status).
///
/// Their meaning for [`Status::working`](crate::Status::working), and so for
/// [`Status::ready`](crate::Status::ready), which is set for good once a node has worked:
///
/// | condition | the node does not work while it is | it works all the same while it is |
/// |---|---|---|
/// | `Store` | – | false: the last known peers stay in force |
/// | `Config` | – | false: the last good config stays in force. Where there is none, nothing is built and `Kernel` is unknown |
/// | `Underlay` | false | – |
/// | `Families` | – | false: of a network of both families one does not work on this host, and the other does |
/// | `Lease` | false, whatever the reason; `Unknown` | `Unknown` with reason `Unconfirmed`, while the store is down |
/// | `Peers` | – | false: some peers are rejected, unreadable, or missing and not believed to be gone. At the start no snapshot may be held |
/// | `Kernel` | false or unknown. An object of the node itself that is blocked by somebody else's makes it false (`Blocked`), and one that is undone again and again, until it is left alone (`Contended`) | – |
/// | `Foreign` | – | false: what is blocked (`InTheWay`), or undone again and again (`Contended`), serves single peers |
/// | `DataPath` | false: the packets of a backend with a packet path in user space are lost until that runs again (`Ended`, `Broken`); it is started anew | – |
/// | `Forwarding` | false with reason `ForwardingOff` | false with reason `ForwardingOffInOneFamily`: of a network of both families, the packets of one are not forwarded, and those of the other are. `Unknown`: the kernel does not say, or a device of later containers is meant |
/// | `Routes` | false with reason `RoutedElsewhere`: the kernel's own answer is not ours for any peer of a family that it was asked about | false with another reason: single peers. `Unknown` |
/// | `ReversePath` | false with reason `ReversePathDrops`: the same of packets that come in | false with another reason: single peers. `Unknown` |
/// | `Firewall` | – | `Unknown`: nobody can judge its rules from outside. It is never false |
/// | `State` | – | false: what is to be remembered over a restart cannot be saved (`NotSaved`, `NoAnswer`), or what could not be read cannot be kept aside (`NotKept`); it is tried again |
///
/// The four before the last one are about the host around the overlay, which we do not change. Before a node is ready
/// they have been looked at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ConditionType {
    /// The store answers and its watch is alive. While false, the last known peers stay in force.
    Store,
    /// The network config is known, valid, fit for this host, and applied.
    Config,
    /// An external interface is chosen.
    Underlay,
    /// Each family of the network works on this host.
    Families,
    /// Our lease is held.
    Lease,
    /// Every peer that the store knows is accepted, and none was withdrawn unconfirmed.
    Peers,
    /// The kernel has what it should have.
    Kernel,
    /// Nobody else's objects stand in the way of ours, and nobody undoes them again and again.
    Foreign,
    /// The userspace data path runs, where the backend has one.
    DataPath,
    /// The host forwards packets between containers and peers.
    Forwarding,
    /// The kernel sends packets to peers where our routes say: no policy rule and no other route is in
    /// front of them.
    Routes,
    /// No reverse-path filter drops what comes from peers.
    ReversePath,
    /// No packet filter is known that drops forwarded packets unless a rule accepts them.
    Firewall,
    /// The memory of the node over restarts is saved, where it was given a place.
    State,
}

impl ConditionType {
    /// All of them, in the order in which they come about; the last one may come about at any time.
    pub const ALL: [Self; 14] = [
        Self::Store,
        Self::Config,
        Self::Underlay,
        Self::Families,
        Self::Lease,
        Self::Peers,
        Self::Kernel,
        Self::Foreign,
        Self::DataPath,
        Self::Forwarding,
        Self::Routes,
        Self::ReversePath,
        Self::Firewall,
        Self::State,
    ];
}

impl std::fmt::Display for ConditionType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// Whether a condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Not known yet.
    Unknown,
}

impl std::fmt::Display for ConditionStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// One aspect of an overlay's health.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: ConditionType,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// Why, as one word in CamelCase for programs.
    pub reason: String,
    /// Why, and what to do, for people.
    pub message: String,
    /// Whether nothing but a change from outside (of config, interfaces, permissions) can help.
    #[serde(default)]
    pub permanent: bool,
    /// When `status` or `reason` last changed, on the overlay's clock.
    pub since: Moment,
}

impl Condition {
    /// Tells if it keeps a node from working, by the table at [`ConditionType`].
    pub(crate) fn stops_work(&self) -> bool {
        let is_false = self.status == ConditionStatus::False;
        match self.kind {
            ConditionType::Underlay
            | ConditionType::Lease
            | ConditionType::Kernel
            | ConditionType::DataPath => {
                self.status != ConditionStatus::True && self.reason != "Unconfirmed"
            }
            ConditionType::Forwarding => is_false && self.reason == FORWARDING_OFF,
            ConditionType::Routes => is_false && self.reason == ALL_ELSEWHERE,
            ConditionType::ReversePath => is_false && self.reason == ALL_DROPPED,
            ConditionType::Store
            | ConditionType::Config
            | ConditionType::Families
            | ConditionType::Peers
            | ConditionType::Foreign
            | ConditionType::Firewall
            | ConditionType::State => false,
        }
    }
}

impl std::fmt::Display for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "type={} status={} reason={}",
            self.kind, self.status, self.reason
        )
    }
}

/// The conditions of one overlay, and what they were.
#[derive(Debug, Clone)]
pub(crate) struct Conditions {
    list: Arc<[Condition]>,
    /// Copied when one changes, shared by all that is told in between.
    history: Arc<[Condition]>,
}

impl Conditions {
    pub(crate) fn new(now: Moment) -> Self {
        let unknown = |kind| Condition {
            kind,
            status: ConditionStatus::Unknown,
            reason: "Starting".to_owned(),
            message: String::new(),
            permanent: false,
            since: now,
        };
        Self {
            list: ConditionType::ALL.into_iter().map(unknown).collect(),
            history: Arc::default(),
        }
    }

    pub(crate) const fn list(&self) -> &Arc<[Condition]> {
        &self.list
    }

    /// The last changes.
    pub(crate) const fn history(&self) -> &Arc<[Condition]> {
        &self.history
    }

    /// The condition of a type.
    pub(crate) fn get(&self, kind: ConditionType) -> Option<&Condition> {
        self.list.iter().find(|condition| condition.kind == kind)
    }

    /// The reason of a condition.
    pub(crate) fn reason(&self, kind: ConditionType) -> &str {
        let found = self.get(kind);
        found.map_or("", |condition| condition.reason.as_str())
    }

    /// Sets a condition; answers it if its status or reason is another than before.
    pub(crate) fn set(&mut self, mut condition: Condition) -> Option<&Condition> {
        /// The number of changes that are remembered.
        const CHANGES: usize = 32;
        let at = self
            .list
            .iter()
            .position(|old| old.kind == condition.kind)?;
        let old = self.list.get(at)?;
        let news = old.status != condition.status || old.reason != condition.reason;
        if !news {
            condition.since = old.since;
            if *old == condition {
                return None;
            }
        }
        // What was told before keeps its own copy.
        let slot = Arc::make_mut(&mut self.list).get_mut(at)?;
        *slot = condition;
        if !news {
            return None;
        }
        let too_many = (self.history.len() + 1).saturating_sub(CHANGES);
        let history = self.history.iter().skip(too_many).chain([&*slot]);
        self.history = history.cloned().collect();
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stops_work_is_as_the_table_says() {
        use ConditionStatus::{False, True, Unknown};
        let stops = |kind, status, reason: &str| {
            let condition = Condition {
                kind,
                status,
                reason: reason.to_owned(),
                message: String::new(),
                permanent: false,
                since: Moment::default(),
            };
            condition.stops_work()
        };
        for kind in ConditionType::ALL {
            let must_hold = matches!(
                kind,
                ConditionType::Underlay
                    | ConditionType::Lease
                    | ConditionType::Kernel
                    | ConditionType::DataPath
            );
            assert!(!stops(kind, True, "Fine"), "{kind}");
            assert_eq!(stops(kind, False, "Broken"), must_hold, "{kind}");
            assert_eq!(stops(kind, Unknown, "Starting"), must_hold, "{kind}");
        }
        assert!(!stops(ConditionType::Lease, Unknown, "Unconfirmed"));
        assert!(stops(ConditionType::Forwarding, False, FORWARDING_OFF));
        assert!(stops(ConditionType::Routes, False, ALL_ELSEWHERE));
        assert!(stops(ConditionType::ReversePath, False, ALL_DROPPED));
    }
}
