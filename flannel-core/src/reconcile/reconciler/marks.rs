//! Routes of ours whose protocol number somebody changed: ours no more by their mark, and ours by what
//! this run has seen.
//!
//! Such a route gets its number back as it is, whatever is wanted in its place by now; what follows from
//! that is planned as for any other route of ours.

use std::collections::BTreeSet;

use super::Reconciler;
use crate::kernel::Op;
use crate::object::{Object, ObjectKey, Route, RouteProtocol};
use crate::reconcile::desired::Desired;
use crate::reconcile::ownership::{Owner, Ownership};
use crate::reconcile::plan::{Blocked, Plan, Step, Why};

impl Reconciler {
    /// Remembers the routes that were ours, by their mark or because that had been changed before.
    pub(super) fn note_lost_numbers(
        &mut self,
        renumbered: Vec<(Route, Route)>,
        ownership: &Ownership,
    ) {
        let Some(observed) = self.copy.observed() else {
            return;
        };
        for (was, is) in renumbered {
            let was = Object::Route(was);
            let is = Object::Route(is);
            let key = is.key();
            let was_ours = self.unmarked.get(&key) == Some(&was)
                || ownership.owner(&was, observed) == Owner::Ours;
            if was_ours && ownership.owner(&is, observed) != Owner::Ours {
                self.unmarked.insert(key, is);
            }
        }
        // Once it was gone, what comes to its place is somebody's, be it alike.
        self.unmarked
            .retain(|key, route| observed.objects.get(key) == Some(route));
    }

    /// Has a route mended that was ours in this run and differs in nothing but its number. One that was
    /// there before ours is somebody else's.
    pub(super) fn with_lost_numbers(
        &mut self,
        mut plan: Plan,
        desired: &Desired,
        ownership: &Ownership,
        is_whole: bool,
    ) -> Plan {
        let keys = plan.foreign.iter().map(|blocked| blocked.wanted.key());
        let blocked: BTreeSet<ObjectKey> = keys.collect();
        if is_whole {
            self.strange.retain(|key| blocked.contains(key));
        }
        let never_ours = blocked
            .into_iter()
            .filter(|key| self.unsettled.contains(key) && !self.unmarked.contains_key(key));
        self.strange.extend(never_ours);
        let (mended, foreign): (Vec<_>, Vec<_>) = plan.foreign.into_iter().partition(|blocked| {
            let key = blocked.wanted.key();
            self.unmarked.get(&key) == Some(&blocked.found)
                || differs_in_number_only(blocked) && !self.strange.contains(&key)
        });
        plan.foreign = foreign;
        self.mending.clear();
        let number = ownership.protocol;
        for Blocked {
            wanted,
            found,
            peer,
        } in mended
        {
            let step = self.with_number(&found, number, Some(&wanted));
            plan.steps.extend(step.map(|step| Step { peer, ..step }));
        }
        // What nobody wants goes as ours does.
        let unwanted: Vec<Object> = self
            .unmarked
            .iter()
            .filter(|(key, _)| !desired.hold_orphans && !desired.objects.contains_key(*key))
            .filter(|(key, _)| is_whole || self.dirty.contains(*key))
            .map(|(_, found)| found.clone())
            .collect();
        for found in unwanted {
            plan.steps.extend(self.with_number(&found, number, None));
        }
        plan
    }

    /// The step that gives a route its number back.
    fn with_number(
        &mut self,
        found: &Object,
        number: RouteProtocol,
        wanted: Option<&Object>,
    ) -> Option<Step> {
        let Object::Route(route) = found else {
            return None;
        };
        let marked = Object::Route(route.with_number(number));
        if wanted != Some(&marked) {
            self.mending.insert(marked.key());
        }
        Some(Step {
            op: Op::Change(marked),
            why: Why::Drifted {
                field: "protocol".to_owned(),
            },
            peer: None,
            disrupts: Vec::new(),
        })
    }

    /// A step was taken: what got its number back and is to be another one is planned again.
    pub(super) fn is_marked(&mut self, key: &ObjectKey) {
        self.unmarked.remove(key);
        if self.mending.remove(key) {
            self.dirty.insert(key.clone());
        }
    }
}

fn differs_in_number_only(blocked: &Blocked) -> bool {
    let (Object::Route(wanted), Object::Route(found)) = (&blocked.wanted, &blocked.found) else {
        return false;
    };
    found.with_number(wanted.protocol) == *wanted
}
