//! The reconciler's repairs, counted: those of what is undone again and again wait.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use super::Reconciler;
use crate::clock::Moment;
use crate::kernel::Op;
use crate::object::{IfName, Object, ObjectKey, RouteProtocol};
use crate::reconcile::contention::{Contention, EXPLAINED, Entry, FORGOTTEN};
use crate::reconcile::plan::{Plan, Step, Why};

/// The time for which a change of something explains that what needs it has to be made again.
const EXPLAINS: Duration = Duration::from_secs(1);

/// The interval at which repairs are forgotten.
const FORGET: Duration = Duration::from_secs(1);

/// The most places of foreign routes that are remembered.
const PLACES: usize = 1024;

/// The reconciler's knowledge of its repairs.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    contention: Contention,
    /// Keys that are not right because their repair waits, or that of what they need.
    yielded: BTreeSet<ObjectKey>,
    /// The keys that others need and that were changed or repaired, and when.
    changed: BTreeMap<ObjectKey, Moment>,
    /// The keys that were made, and when: earlier changes do not explain that these are to be made
    /// again.
    made: BTreeMap<ObjectKey, Moment>,
    /// Whose routes were seen in the places of ours.
    places: BTreeMap<ObjectKey, RouteProtocol>,
    forgotten: Moment,
}

impl Repairs {
    /// Something is not what it was: what needs it may have gone with it.
    pub(super) fn changed<'a>(&mut self, keys: impl Iterator<Item = &'a ObjectKey>, now: Moment) {
        let needed = keys.filter(|key| {
            !matches!(
                key,
                ObjectKey::Route { .. } | ObjectKey::Sysctl { .. } | ObjectKey::Offload { .. }
            )
        });
        self.changed.extend(needed.map(|key| (key.clone(), now)));
    }

    /// Forgets what says nothing any more.
    pub(super) fn pass(&mut self, now: Moment) {
        if now.since(self.forgotten) < FORGET {
            return;
        }
        self.forgotten = now;
        self.contention.pass(now);
        for all in [&mut self.changed, &mut self.made] {
            all.retain(|_, at| now.since(*at) < EXPLAINS);
        }
    }

    /// When there is something to do, or to tell.
    pub(super) fn wake(&self, now: Moment) -> Option<Moment> {
        self.contention.wake(now)
    }

    /// The keys that are to be planned, because a repair is due that they waited for.
    pub(super) fn due(&self, now: Moment) -> impl Iterator<Item = &ObjectKey> {
        let is_due = self.contention.next().is_some_and(|at| at <= now);
        self.yielded.iter().filter(move |_| is_due)
    }

    /// Tells if anything waits.
    pub(super) fn yield_some(&self) -> bool {
        !self.yielded.is_empty()
    }

    /// A key is not right, because a repair waits.
    pub(super) fn leave(&mut self, key: ObjectKey) {
        self.yielded.insert(key);
    }

    /// Learns what a plan says: of these keys, or of all.
    pub(super) fn planned(
        &mut self,
        plan: &Plan,
        steps: &BTreeSet<ObjectKey>,
        dirty: Option<&BTreeSet<ObjectKey>>,
        now: Moment,
    ) {
        match dirty {
            None => self.yielded.clear(),
            Some(dirty) => self.yielded.retain(|key| !dirty.contains(key)),
        }
        let foreign = plan.foreign.iter();
        let blocked: BTreeSet<ObjectKey> = foreign.map(|b| b.wanted.key()).collect();
        let is_blocked = |key: &ObjectKey| blocked.contains(key);
        self.contention.planned(dirty, steps, is_blocked, now);
        if plan.foreign.is_empty() {
            return;
        }
        if self.places.len() + plan.foreign.len() > PLACES {
            self.places.clear();
        }
        let places = plan.foreign.iter().take(PLACES);
        let places = places.filter_map(|blocked| match &blocked.found {
            Object::Route(route) => Some((blocked.wanted.key(), route.protocol)),
            _ => None,
        });
        self.places.extend(places);
    }

    /// Tells if something that an object needs changed, so that it is no wonder that this is not
    /// right.
    fn explain(&self, object: &Object, dev: Option<IfName>, now: Moment) -> bool {
        let made = self.made.get(&object.key());
        let is_new = |key: &ObjectKey| {
            let at = self.changed.get(key);
            at.is_some_and(|at| now.since(*at) < EXPLAINS && made.is_none_or(|made| made < at))
        };
        if object.needs().iter().any(is_new) {
            return true;
        }
        // Routes and neighbours go with the address of their device, and with the device.
        let Some(dev) = dev.filter(|_| !matches!(object, Object::Link(_) | Object::Address(_)))
        else {
            return false;
        };
        let first = ObjectKey::Address {
            dev,
            ip: Ipv4Addr::UNSPECIFIED.into(),
            prefix_len: 0,
        };
        let addresses = self.changed.range(first..ObjectKey::Tunnel(IfName::FIRST));
        let mut addresses = addresses
            .map(|(key, _)| key)
            .take_while(|key| key.dev() == Some(dev));
        is_new(&ObjectKey::Link(dev)) || addresses.any(is_new)
    }
}

impl Reconciler {
    /// The objects that are undone again and again: the node's own first.
    pub(crate) fn contended(&self) -> Vec<&Entry> {
        let now = self.clock.now();
        let mut all: Vec<_> = self.repairs_of.contention.contended(now).collect();
        all.sort_by_key(|entry| entry.peer.is_some());
        all
    }

    /// An object of the node itself that is undone again and again, and is not safe now.
    pub(crate) fn contended_own(&self) -> Option<&Entry> {
        let now = self.clock.now();
        let mut all = self.repairs_of.contention.contended(now);
        all.find(|entry| entry.peer.is_none() && entry.is_unsafe(now))
    }

    /// Tells if a step makes right what had been, or removes what had been removed.
    fn is_repair(&self, step: &Step) -> bool {
        let is_for_itself = match step.why {
            Why::Missing | Why::Drifted { .. } | Why::Orphan => true,
            // Of the two steps of a rebuild, one counts.
            Why::Rebuild { .. } => !matches!(step.op, Op::Delete(_)),
            Why::InTheWay { .. } | Why::Stopgap { .. } => false,
        };
        is_for_itself && !self.unsettled.contains(&step.op.key())
    }

    /// Tells if a step makes what went with something else. Nothing comes so.
    fn is_explained(&self, step: &Step, now: Moment) -> bool {
        let object = step.op.object();
        let makes = !matches!(step.op, Op::Delete(_));
        makes && self.repairs_of.explain(object, self.dev_of(object), now)
    }

    /// The device of an object; of a route through a nexthop object, that one's.
    fn dev_of(&self, object: &Object) -> Option<IfName> {
        object.dev().or_else(|| {
            let observed = self.copy.observed()?;
            let needs = object.needs();
            let needed = needs.iter().filter_map(|key| observed.objects.get(key));
            needed.filter_map(Object::dev).next()
        })
    }

    /// Tells if a step has to wait, because what it makes right is undone again and again.
    pub(super) fn must_wait(&mut self, step: &Step, now: Moment) -> bool {
        if self.repairs_of.contention.is_empty() {
            return false;
        }
        let is_repair = self.is_repair(step);
        let repairs = &mut self.repairs_of.contention;
        repairs.waits(&step.op.key(), is_repair, now)
    }

    /// A step was taken. What was in its place is what the copy still has.
    pub(super) fn count_repair(&mut self, step: &Step, now: Moment) {
        let (object, key) = (step.op.object(), step.op.key());
        if !self.is_repair(step) {
            if matches!(object, Object::Link(_) | Object::Address(_)) {
                self.repairs_of.changed(std::iter::once(&key), now);
            }
            self.repairs_of.contention.restored(&key, now);
            return;
        }
        let cost = match self.is_explained(step, now) {
            true => EXPLAINED,
            false => FORGOTTEN,
        };
        self.repairs_of.changed(std::iter::once(&key), now);
        self.repairs_of.made.insert(key.clone(), now);
        let found = self.copy.observed().and_then(|o| o.objects.get(&key));
        let in_place = match found {
            Some(Object::Route(route)) => Some(route.protocol),
            _ => None,
        };
        let by = in_place.or_else(|| self.repairs_of.places.get(&key).copied());
        let repairs = &mut self.repairs_of.contention;
        let peer = step.peer.as_ref();
        if repairs.repaired(object, peer, by, cost, now, &mut self.rng) {
            tracing::warn!(%object, ?peer, ?by, "undone again and again: its repairs wait from now on");
        }
    }
}
