//! Routes of ours whose protocol number somebody changed: ours no more by their mark, and ours by what
//! this run has seen.

use std::collections::BTreeSet;

use super::Reconciler;
use crate::kernel::Op;
use crate::object::{Object, ObjectKey, Route};
use crate::reconcile::plan::{Blocked, Plan, Step, Why};

impl Reconciler {
    /// Has a route mended that was ours in this run and differs in nothing but its number. One that was
    /// there before ours is somebody else's.
    pub(super) fn with_lost_numbers(&mut self, mut plan: Plan, is_whole: bool) -> Plan {
        let keys = plan.foreign.iter().map(|blocked| blocked.wanted.key());
        let blocked: BTreeSet<ObjectKey> = keys.collect();
        if is_whole {
            self.strange.retain(|key| blocked.contains(key));
        }
        let never_ours = blocked
            .into_iter()
            .filter(|key| self.unsettled.contains(key));
        self.strange.extend(never_ours);
        let (mended, foreign): (Vec<_>, Vec<_>) = plan.foreign.into_iter().partition(|blocked| {
            differs_in_number_only(blocked) && !self.strange.contains(&blocked.wanted.key())
        });
        plan.foreign = foreign;
        plan.steps.extend(mended.into_iter().map(|blocked| Step {
            op: Op::Change(blocked.wanted),
            why: Why::Drifted {
                field: "protocol".to_owned(),
            },
            peer: blocked.peer,
            disrupts: Vec::new(),
        }));
        plan
    }
}

fn differs_in_number_only(blocked: &Blocked) -> bool {
    let (Object::Route(wanted), Object::Route(found)) = (&blocked.wanted, &blocked.found) else {
        return false;
    };
    let with_number = Route {
        protocol: wanted.protocol,
        ..found.clone()
    };
    with_number == *wanted
}
