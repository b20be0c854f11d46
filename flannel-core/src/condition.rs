//! Typed health: [`Condition`]s with a reason and since when they hold.

use serde::{Deserialize, Serialize};

use crate::clock::Moment;

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
/// | `Lease` | false, whatever the reason; `Unknown` | `Unknown` with reason `Unconfirmed`, while the store is down |
/// | `Peers` | – | false: some peers are rejected, unreadable, or missing and not believed to be gone. At the start no snapshot may be held |
/// | `Kernel` | false or unknown. An object of the node itself that is blocked by somebody else's makes it false (`Blocked`) | – |
/// | `Foreign` | – | false: what is blocked serves single peers |
/// | `DataPath` | false: the packets of a backend with a packet path in user space are lost until that runs again (`Ended`, `Broken`); it is started anew | – |
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ConditionType {
    /// The store answers and its watch is alive. While false, the last known peers stay in force.
    Store,
    /// The network config is known, valid, fit for this host, and applied.
    Config,
    /// An external interface is chosen.
    Underlay,
    /// Our lease is held.
    Lease,
    /// Every peer that the store knows is accepted, and none was withdrawn unconfirmed.
    Peers,
    /// The kernel has what it should have.
    Kernel,
    /// Nobody else's objects stand in the way of ours.
    Foreign,
    /// The userspace data path runs, where the backend has one.
    DataPath,
}

impl ConditionType {
    /// All of them, in the order in which they come about.
    pub const ALL: [Self; 8] = [
        Self::Store,
        Self::Config,
        Self::Underlay,
        Self::Lease,
        Self::Peers,
        Self::Kernel,
        Self::Foreign,
        Self::DataPath,
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
        let is_relevant = match self.kind {
            ConditionType::Underlay
            | ConditionType::Lease
            | ConditionType::Kernel
            | ConditionType::DataPath => true,
            ConditionType::Store
            | ConditionType::Config
            | ConditionType::Peers
            | ConditionType::Foreign => false,
        };
        is_relevant && self.status != ConditionStatus::True && self.reason != "Unconfirmed"
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

/// The conditions of one overlay.
#[derive(Debug, Clone)]
pub(crate) struct Conditions(Vec<Condition>);

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
        Self(ConditionType::ALL.into_iter().map(unknown).collect())
    }

    pub(crate) fn list(&self) -> &[Condition] {
        &self.0
    }

    /// The condition of a type.
    pub(crate) fn get(&self, kind: ConditionType) -> Option<&Condition> {
        self.0.iter().find(|condition| condition.kind == kind)
    }

    /// The reason of a condition.
    pub(crate) fn reason(&self, kind: ConditionType) -> &str {
        let found = self.get(kind);
        found.map_or("", |condition| condition.reason.as_str())
    }

    /// Sets a condition; answers it if its status or reason is another than before.
    pub(crate) fn set(&mut self, mut condition: Condition) -> Option<&Condition> {
        let slot = self.0.iter_mut().find(|old| old.kind == condition.kind)?;
        let news = slot.status != condition.status || slot.reason != condition.reason;
        if !news {
            condition.since = slot.since;
        }
        *slot = condition;
        news.then_some(slot)
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
    }
}
