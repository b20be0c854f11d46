//! What the engine tells of itself.

use std::sync::Arc;

use super::Engine;
use super::store::LeaseState;
use crate::backend::{Note, Rejection};
use crate::claim::Claim;
use crate::condition::{Condition, ConditionStatus, ConditionType};
use crate::holder::Holder;
use crate::lease::LeaseKey;
use crate::lease_set::{Held, HeldReason};
use crate::manager::LeaseRequest;
use crate::status::{LeaseStatus, Status};

/// The most of each kind of refusal that a condition names.
const NAMED: usize = 3;

impl Engine {
    /// Tells the world how we are.
    pub(super) fn publish(&mut self) {
        self.conclude();
        self.make_lists();
        let lease = self.lease.lease().map(|lease| LeaseStatus {
            key: lease.key.clone(),
            subnet: lease.subnet,
            public_ip: lease.attrs.public_ip,
            confirmed: self.lease.held().is_some(),
            expires: match &self.lease {
                LeaseState::Held { keeper, .. } => keeper.deadline(),
                _ => None,
            },
        });
        let status = Status {
            conditions: Arc::clone(self.conditions.list()),
            history: Arc::clone(self.conditions.history()),
            ready: self.ready,
            working: self.working,
            stopped: None,
            lease,
            backend: self.backend.as_ref().map(|backend| backend.backend_type()),
            external: self.external.clone(),
            mtu: self.network.as_ref().map(|network| network.mtu()),
            peers: self.leases.peers().len(),
            rejected: self.lists.rejected.clone(),
            unreadable: self.lists.unreadable.clone(),
            foreign: self.reconciler.blocked().to_vec(),
            failing: self.reconciler.failing(),
            objects: self.compiler.desired().objects.len(),
            repairs: self.reconciler.repairs(),
            notes: self.notes(),
            // Counted while it is read: see `Overlay::status`.
            traffic: Vec::new(),
        };
        self.status.send_if_modified(|old| {
            let news = **old != status;
            if news {
                *old = Arc::new(status);
            }
            news
        });
    }

    /// What the network and the kernel tell, and which peers are of another backend.
    fn notes(&self) -> Vec<Note> {
        let network = self.network.as_ref();
        let mut notes = network.map(|network| network.notes()).unwrap_or_default();
        notes.extend(self.parts.kernel.notes());
        notes.extend(self.claim.iter().flat_map(Claim::notes).cloned());
        notes.extend(self.state_note.clone());
        for (backend, keys) in self.leases.of_other_backends() {
            let text = format!(
                "{} peers are of {backend}, among them {}: they are reached without a tunnel, and \
                 devices of {backend} stay until they have followed",
                keys.len(),
                keys.first().map(LeaseKey::as_str).unwrap_or_default()
            );
            let topic = "backend-change".to_owned();
            notes.push(Note { topic, text });
        }
        notes
    }

    /// Why other nodes do not accept our record, by a rule that all apply.
    pub(super) fn rejected_by_others(&self) -> Option<Rejection> {
        let by_core = self.leases.own_rejected().values().next().cloned();
        by_core.or_else(|| self.compiler.own_rejected(&self.leases))
    }

    /// Tells if the record that ours is rejected for is one that our machine wrote under another name, by
    /// what it says: the manager sees to it.
    fn is_our_former(&self, rejection: &Rejection) -> bool {
        let Rejection::KeyTaken { by, .. } = rejection else {
            return false;
        };
        let (Some(own), Some(peer)) = (self.lease.held(), self.leases.peer(by)) else {
            return false;
        };
        let request = LeaseRequest {
            instance: own.instance,
            ..LeaseRequest::new(own.node.clone(), own.attrs.clone())
        };
        let theirs = &peer.lease;
        let holder = Holder::of(&request, &theirs.node, theirs.instance, &theirs.attrs);
        self.parts.manager.capabilities().knows_instances
            && matches!(holder, Holder::Own | Holder::Former(_))
    }

    /// Whether other nodes accept the record of the lease that is held.
    fn conclude_lease(&mut self) {
        let LeaseState::Held { lease, .. } = &self.lease else {
            return;
        };
        if let Some(rejection) = self.rejected_by_others() {
            let goes = self.is_our_former(&rejection);
            let remedy = match goes {
                true => "it is our own under a former name, and goes once nobody answers for it",
                false => "delete the other record, or release this lease for another one",
            };
            let message = format!(
                "other nodes reject our record {}: {rejection}; {remedy}",
                lease.key
            );
            self.fails(ConditionType::Lease, "Rejected", message, !goes);
        } else if self.conditions.reason(ConditionType::Lease) == "Rejected" {
            let message = format!("{} by record {}", lease.subnet, lease.key);
            self.holds(ConditionType::Lease, "Held", message);
        }
    }

    /// Tells which families of the config do not work here.
    fn conclude_families(&mut self) {
        let Some(network) = &self.network else {
            return;
        };
        let by_interface = self.lacking.iter();
        let by_interface = by_interface.map(|(family, why)| (*family, why.to_string()));
        let by_backend = network.lacks();
        let by_backend = by_backend.iter().map(|(family, why)| (family, why.clone()));
        let mut all: Vec<_> = by_interface.chain(by_backend).collect();
        all.dedup_by_key(|(family, _)| *family);
        match all.first() {
            None => self.holds(ConditionType::Families, "All", ""),
            Some((family, why)) => {
                let message = format!("{family} does not work on this host: {why}");
                self.fails(ConditionType::Families, "Lacking", message, false);
            }
        }
    }

    /// Counts rejected peers and unreadable records, and gives the reasons of the first of each.
    fn what_is_refused(&self, rejected: usize, unreadable: usize) -> String {
        let mut message =
            format!("{rejected} peers are rejected, {unreadable} records are unreadable");
        let peers = self.compiler.rejected().iter();
        let peers = peers.filter_map(|(key, reasons)| Some((key, reasons.first()?.1.to_string())));
        let records = self.leases.unreadable();
        let records = records.map(|record| (&record.key, record.reason.clone()));
        for (key, reason) in peers.take(NAMED).chain(records.take(NAMED)) {
            message += &format!("; {key}: {reason}");
        }
        message
    }

    /// Tells if the store answered that there is no lease for us, for a reason that does not pass.
    fn lease_is_refused(&self) -> bool {
        let lease = self.conditions.get(ConditionType::Lease);
        lease.is_some_and(|lease| lease.status == ConditionStatus::False && lease.permanent)
    }

    /// Draws the conditions that follow from the rest.
    pub(super) fn conclude(&mut self) {
        if let (LeaseState::Saved(lease), false) = (&self.lease, self.lease_is_refused()) {
            let message = format!(
                "{} is remembered; the store has not confirmed it",
                lease.subnet
            );
            self.condition(
                ConditionType::Lease,
                ConditionStatus::Unknown,
                "Unconfirmed",
                message,
                false,
            );
        }
        self.conclude_lease();
        self.conclude_data_path();
        if self.network.is_some() {
            let own = self.reconciler.blocked().iter();
            let own = own.filter(|blocked| blocked.peer.is_none());
            let own: Vec<String> = own.map(ToString::to_string).collect();
            if let Some(error) = self.reconciler.read_error() {
                let message = error.to_owned();
                self.fails(ConditionType::Kernel, "CannotBeRead", message, false);
            } else if let [first, rest @ ..] = own.as_slice() {
                let message = format!("{first}: remove or rename that{}", more(rest.len()));
                self.fails(ConditionType::Kernel, "Blocked", message, false);
            } else if let Some(entry) = self.reconciler.contended_own() {
                let message = entry.to_string();
                self.fails(ConditionType::Kernel, "Contended", message, false);
            } else if let Some(error) = self.reconciler.permanent_failure() {
                self.fails(ConditionType::Kernel, "Refused", error, true);
            } else if self.reconciler.converged() {
                self.holds(ConditionType::Kernel, "Converged", "");
            } else {
                let failing = self.reconciler.failing();
                let message = match failing.first() {
                    Some(first) => format!(
                        "{} objects are not right, among them {}: {}",
                        failing.len(),
                        first.object,
                        first.error
                    ),
                    None => "changes are being made".to_owned(),
                };
                let reason = if failing.is_empty() {
                    "Converging"
                } else {
                    "Failing"
                };
                self.fails(ConditionType::Kernel, reason, message, false);
            }
            let fought_for = match self.reconciler.contended().as_slice() {
                [] => String::new(),
                [first, rest @ ..] => format!("{first}{}", more(rest.len())),
            };
            match self.reconciler.blocked() {
                [] if fought_for.is_empty() => self.holds(ConditionType::Foreign, "Clear", ""),
                [] => self.fails(ConditionType::Foreign, "Contended", fought_for, false),
                [first, rest @ ..] => {
                    let mut message = format!("{first}{}", more(rest.len()));
                    if !fought_for.is_empty() {
                        message += &format!("; and {fought_for}");
                    }
                    self.fails(ConditionType::Foreign, "InTheWay", message, false);
                }
            }
        }
        self.conclude_families();
        if let Some(held) = self.leases.held() {
            let Held {
                withdrawn, known, ..
            } = *held;
            let lacks = format!("the store lacks {withdrawn} of {known} known peers");
            let (reason, message) = match held.reason {
                HeldReason::Share => (
                    "WithdrawalUnconfirmed",
                    format!("{lacks}; they stay until a second reading confirms it"),
                ),
                HeldReason::NoConfig => (
                    "StoreUnconfigured",
                    format!(
                        "{lacks}, and it has no network config, so it may have lost everything; \
                         they stay: put the config back, then a second reading decides"
                    ),
                ),
            };
            self.fails(ConditionType::Peers, reason, message, false);
        } else if self.leases.synced() {
            let (rejected, unreadable) = (
                self.compiler.rejected().len(),
                self.leases.unreadable().len(),
            );
            if rejected + unreadable == 0 {
                self.holds(ConditionType::Peers, "Accepted", "");
            } else {
                let message = self.what_is_refused(rejected, unreadable);
                self.fails(ConditionType::Peers, "Rejected", message, false);
            }
        }
        let is_in = match self.lease {
            LeaseState::Held { .. } => {
                self.ready || self.leases.synced() && self.leases.held().is_none()
            }
            LeaseState::Saved(_) => self.store_is_down,
            LeaseState::None | LeaseState::Lost { .. } | LeaseState::Released { .. } => false,
        };
        let is_stopped = self.conditions.list().iter().any(Condition::stops_work);
        let has_all =
            self.network.is_some() && self.reconciler.converged() && self.host_checks.done;
        self.working = is_in && has_all && !is_stopped;
        self.ready |= self.working;
    }
}

/// That there are more of them.
fn more(n: usize) -> String {
    match n {
        0 => String::new(),
        n => format!("; {n} more"),
    }
}
