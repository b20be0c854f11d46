//! The kernel's half of the engine: follows the kernel, plans, applies, remembers what failed.
//!
//! It plans against the [`Copy`] and only the keys that something happened to; whole plans are made
//! after whole readings and where devices or the network changed.

mod basis;
mod marks;
mod reading;
mod repairs;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;

use self::basis::Basis;
pub(crate) use self::reading::Aside;
use self::reading::{DEBOUNCE, JustRead};
use self::repairs::Repairs;
use crate::backoff::Backoff;
use crate::clock::{Clock, Moment, Rng};
use crate::kernel::{self, Kernel, Observed, Op, Scope};
use crate::lease::LeaseKey;
use crate::object::{Object, ObjectKey};
use crate::reconcile::copy::{Copy, MANY};
use crate::reconcile::desired::Desired;
use crate::reconcile::ownership::Ownership;
use crate::reconcile::plan::{Blocked, Plan, Step, Why, plan, plan_keys, teardown};
use crate::status::{FailingObject, OverlayEvent};
use crate::subnet::Subnet;

/// The wait before everything is read back after very many changes at once.
const VERIFY: Duration = Duration::from_millis(100);

/// The longest wait between two tries of what failed.
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// An object that could not be made as it should be.
#[derive(Debug, Clone)]
struct Failure {
    op: Op,
    peer: Option<LeaseKey>,
    error: String,
    permanent: bool,
    attempts: u32,
    since: Moment,
    retry_at: Moment,
}

/// Makes the kernel have what is desired.
#[derive(Debug)]
pub(crate) struct Reconciler {
    kernel: Arc<dyn Kernel>,
    clock: Arc<dyn Clock>,
    rng: Rng,
    events: broadcast::Sender<OverlayEvent>,
    retry: Backoff,
    copy: Copy,
    scope: Scope,
    /// When everything is to be read; `None` while the copy is trusted.
    read_at: Option<Moment>,
    /// When links and addresses are to be read.
    links_at: Option<Moment>,
    /// When the doubtful keys are to be read.
    keys_at: Option<Moment>,
    last_links: Moment,
    links_cost: Duration,
    last_keys: Moment,
    keys_cost: Duration,
    settings_at: Moment,
    last_read: Moment,
    last_retry: Moment,
    read_cost: Duration,
    /// A reading of everything that nobody waits for.
    aside: Aside,
    read_failures: u32,
    read_error: Option<String>,
    /// Keys to be planned.
    dirty: BTreeSet<ObjectKey>,
    /// Keys that the kernel told news of, to be planned a little later.
    noticed: BTreeSet<ObjectKey>,
    noticed_at: Option<Moment>,
    /// Keys that are not right and wait for a failed one, or failed themselves.
    open: BTreeSet<ObjectKey>,
    /// The next plan is for everything.
    replan: bool,
    /// The basis of the last plan for everything.
    basis: Option<Basis>,
    /// Keys that were not yet seen as they should be: a step for any other key is a repair.
    unsettled: BTreeSet<ObjectKey>,
    failures: BTreeMap<ObjectKey, Failure>,
    blocked: Vec<Blocked>,
    repairs: u64,
    repairs_of: Repairs,
    /// What was read since the engine woke.
    just_read: JustRead,
    /// Everything was found right, and nothing failed since.
    converged: bool,
    /// Links or addresses changed, and whoever depends on them has not looked yet.
    host_changed: bool,
    /// Links were read, and whoever wants to know has not asked yet.
    links_read: bool,
    /// Keys in whose place somebody else's object was before ours.
    strange: BTreeSet<ObjectKey>,
    /// Routes that were ours in this run, as they are since somebody changed their number.
    unmarked: BTreeMap<ObjectKey, Object>,
    /// Those that get it back, and are to be other ones after that.
    mending: BTreeSet<ObjectKey>,
    /// Destinations of routes that changed since that was asked.
    routes_changed: BTreeSet<Subnet>,
    /// Those that did not matter when it was asked.
    routes_passed: BTreeSet<Subnet>,
}

impl Reconciler {
    pub(crate) fn new(
        kernel: Arc<dyn Kernel>,
        clock: Arc<dyn Clock>,
        rng: Rng,
        events: broadcast::Sender<OverlayEvent>,
    ) -> Self {
        let now = clock.now();
        Self {
            kernel,
            clock,
            rng,
            events,
            retry: Backoff::new(Duration::from_millis(100), LONGEST_RETRY),
            copy: Copy::default(),
            scope: Scope::default(),
            read_at: Some(now),
            links_at: None,
            keys_at: None,
            last_links: now,
            links_cost: Duration::ZERO,
            last_keys: now,
            keys_cost: Duration::ZERO,
            settings_at: now,
            last_read: now,
            last_retry: now,
            read_cost: Duration::ZERO,
            aside: Aside(None),
            read_failures: 0,
            read_error: None,
            dirty: BTreeSet::new(),
            noticed: BTreeSet::new(),
            noticed_at: None,
            open: BTreeSet::new(),
            replan: false,
            basis: None,
            unsettled: BTreeSet::new(),
            failures: BTreeMap::new(),
            blocked: Vec::new(),
            repairs: 0,
            repairs_of: Repairs::default(),
            just_read: JustRead::default(),
            converged: false,
            host_changed: false,
            links_read: false,
            strange: BTreeSet::new(),
            unmarked: BTreeMap::new(),
            mending: BTreeSet::new(),
            routes_changed: BTreeSet::new(),
            routes_passed: BTreeSet::new(),
        }
    }

    pub(crate) const fn observed(&self) -> Option<&Arc<Observed>> {
        self.copy.observed()
    }

    /// How long the last reading took.
    pub(crate) const fn read_cost(&self) -> Duration {
        self.read_cost
    }

    pub(crate) const fn converged(&self) -> bool {
        self.converged
    }

    pub(crate) const fn repairs(&self) -> u64 {
        self.repairs
    }

    pub(crate) fn blocked(&self) -> &[Blocked] {
        &self.blocked
    }

    pub(crate) fn read_error(&self) -> Option<&str> {
        self.read_error.as_deref()
    }

    pub(crate) fn failing(&self) -> Vec<FailingObject> {
        let failing = self.failures.values().map(|failure| FailingObject {
            object: failure.op.object().to_string(),
            op: failure.op.verb().to_owned(),
            peer: failure.peer.clone(),
            error: failure.error.clone(),
            attempts: failure.attempts,
            since: failure.since,
        });
        failing.collect()
    }

    /// Whether an object of the node itself fails for a reason that will not pass by itself.
    pub(crate) fn permanent_failure(&self) -> Option<String> {
        self.failures
            .values()
            .find(|failure| failure.permanent && failure.peer.is_none())
            .map(|failure| format!("{}: {}", failure.op.object(), failure.error))
    }

    /// The desired objects under these keys changed.
    pub(crate) fn desired_changed(&mut self, keys: BTreeSet<ObjectKey>) {
        self.unsettled.extend(keys.iter().cloned());
        if self.dirty.is_empty() {
            self.dirty = keys;
        } else {
            self.dirty.extend(keys);
        }
    }

    /// Everything is to be planned anew.
    pub(crate) const fn replan(&mut self) {
        self.replan = true;
    }

    /// What failed is tried again at once: something that it may have waited for has changed.
    pub(crate) fn retry_now(&mut self) {
        let now = self.clock.now();
        for failure in self.failures.values_mut() {
            failure.retry_at = now;
        }
    }

    /// When there is something to do next.
    pub(crate) fn next_wake(&self) -> Option<Moment> {
        if self.read_failures > 0 {
            return self.read_at;
        }
        let settings = (!self.scope.settings.is_empty()).then_some(self.settings_at);
        [
            self.read_at,
            self.links_at,
            self.keys_at,
            self.noticed_at,
            self.copy.deadline(),
            self.next_retry(),
            self.repairs_of.wake(self.clock.now()),
            settings,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// When something that failed is tried again. What it needs is read before each try, so tries of
    /// what has failed again and again are gathered.
    fn next_retry(&self) -> Option<Moment> {
        /// The wait between two rounds of tries of what keeps failing.
        const GATHER: Duration = Duration::from_secs(1);
        let wait = |failure: &Failure| match failure.attempts {
            ..=4 => failure.retry_at,
            _ => failure.retry_at.max(self.last_retry + GATHER),
        };
        self.failures.values().map(wait).min()
    }

    /// Has what failed planned again where that is due, and what waited for it, after a look at what
    /// they need.
    fn take_retries(&mut self, now: Moment) {
        self.dirty.extend(self.repairs_of.due(now).cloned());
        if self.next_retry().is_none_or(|at| at > now) {
            return;
        }
        self.last_retry = now;
        let due = self
            .failures
            .values()
            .filter(|failure| failure.retry_at <= now);
        let looked_at = due.flat_map(|failure| {
            let object = failure.op.object();
            object.needs().into_iter().chain([object.key()])
        });
        let looked_at: Vec<_> = looked_at.collect();
        self.copy.doubt(looked_at);
        self.dirty.extend(self.open.iter().cloned());
    }

    /// What would be done from a fresh reading.
    pub(crate) async fn dry_run(
        &self,
        desired: &Desired,
        ownership: &Ownership,
    ) -> Result<Plan, kernel::Error> {
        let observed = self.kernel.observe(&scope_of(desired)).await?;
        Ok(plan(&observed, desired, ownership))
    }

    /// What a teardown would do from a fresh reading.
    pub(crate) async fn dry_teardown(
        &self,
        desired: &Desired,
        ownership: &Ownership,
    ) -> Result<Plan, kernel::Error> {
        let observed = self.kernel.observe(&scope_of(desired)).await?;
        Ok(teardown(&observed, ownership))
    }

    /// Removes all that is ours; answers what could not be removed.
    pub(crate) async fn teardown(
        &self,
        desired: &Desired,
        ownership: &Ownership,
    ) -> Result<Vec<String>, kernel::Error> {
        let mut failed = Vec::new();
        for _ in 0..4 {
            let plan = self.dry_teardown(desired, ownership).await?;
            if plan.steps.is_empty() {
                return Ok(Vec::new());
            }
            let ops: Vec<Op> = plan.steps.into_iter().map(|step| step.op).collect();
            let results = self.kernel.apply(&ops).await;
            failed = ops
                .iter()
                .zip(results)
                .filter_map(|(op, result)| Some(format!("{}: {}", op.object(), result.err()?)))
                .collect();
        }
        Ok(failed)
    }

    /// Plans what is due and applies it. Answers whether another round is due at once.
    pub(crate) async fn round(&mut self, desired: &Desired, ownership: &Ownership) -> bool {
        let now = self.clock.now();
        let Some(observed) = self.copy.observed() else {
            return false;
        };
        if scope_of(desired) != self.scope {
            // What was read does not cover what is wanted.
            self.read_at.get_or_insert(now);
            return self.read_failures == 0;
        }
        if self.noticed_at.is_some_and(|at| at <= now) {
            self.noticed_at = None;
            self.dirty.append(&mut self.noticed);
        }
        let basis = self.basis.as_ref();
        let whole = self.replan
            || basis.is_none_or(|basis| !basis.is_of(desired, ownership))
            || self.is_held_back_by_others();
        let plan = if whole {
            plan(observed, desired, ownership)
        } else if self.dirty.is_empty() {
            self.rest();
            return false;
        } else {
            plan_keys(observed, desired, ownership, &self.dirty)
        };
        let plan = self.with_lost_numbers(plan, desired, ownership, whole);
        let unread = self.to_be_read(&plan);
        if !unread.is_empty() {
            self.copy.doubt(unread);
            self.serve_doubts(now, Duration::ZERO);
            return self.read_failures == 0;
        }
        let dirty = std::mem::take(&mut self.dirty);
        self.replan = false;
        let steps: BTreeSet<ObjectKey> = plan.steps.iter().map(|step| step.op.key()).collect();
        let planned = (!whole).then_some(&dirty);
        self.repairs_of.planned(&plan, &steps, planned, now);
        if whole {
            self.basis = Some(Basis::of(desired, ownership));
            self.open.clear();
            self.failures.retain(|key, _| steps.contains(key));
            let blocked: BTreeSet<ObjectKey> = plan
                .foreign
                .iter()
                .map(|blocked| blocked.wanted.key())
                .collect();
            self.unsettled
                .retain(|key| steps.contains(key) || blocked.contains(key));
            self.blocked = plan.foreign;
        } else {
            self.open.retain(|key| !dirty.contains(key));
            self.blocked
                .retain(|blocked| !dirty.contains(&blocked.wanted.key()));
            self.blocked.extend(plan.foreign);
            self.failures
                .retain(|key, _| steps.contains(key) || !dirty.contains(key));
        }
        let steps = self.due(plan.steps);
        if steps.is_empty() {
            self.rest();
            return self.free_the_open();
        }
        self.apply(steps, desired).await || self.free_the_open()
    }

    /// Tells if something is to be planned while somebody else's object is in the place of one that others
    /// need. What is there for these in the meantime is in no list, and must not be removed.
    fn is_held_back_by_others(&self) -> bool {
        let is_needed = |blocked: &Blocked| !matches!(blocked.wanted, Object::Route(_));
        !self.dirty.is_empty() && self.blocked.iter().any(is_needed)
    }

    /// Has what waited for a failed object planned when no failure is left, be it because that object is
    /// not wanted any more. Answers whether there is any.
    fn free_the_open(&mut self) -> bool {
        if self.failures.is_empty() {
            self.dirty.append(&mut self.open);
        }
        !self.dirty.is_empty()
    }

    /// Nothing is to be done now: draws the conclusion.
    fn rest(&mut self) {
        if !self.failures.is_empty() || self.contended_own().is_some() {
            self.converged = false;
        } else if self.read_failures == 0
            && self.read_at.is_none()
            && !self.replan
            && self.noticed.is_empty()
            && self.open.is_empty()
            && self.copy.is_settled()
        {
            self.converged = true;
        }
    }

    /// The keys that a plan would do harm to if they were not what they are believed to be: a replace
    /// does not ask whose the route is by then. And what is said to stand in the way must be there.
    fn to_be_read(&self, plan: &Plan) -> Vec<ObjectKey> {
        let replaced = plan.steps.iter().filter(|step| replaces_route(step));
        let replaced = replaced.map(|step| step.op.key());
        let blocked = plan
            .foreign
            .iter()
            .filter(|blocked| !self.blocked.contains(blocked));
        let blocked = blocked.map(|blocked| blocked.found.key());
        replaced
            .chain(blocked)
            .filter(|key| !self.just_read.holds(key))
            .collect()
    }

    /// The steps that are not waiting for another try, nor for another step that is. A stopgap is
    /// made for one step: without that it would only be made and removed, over and over again.
    ///
    /// What waits for another step has no try of its own, though it may have failed by itself before.
    fn due(&mut self, steps: Vec<Step>) -> Vec<Step> {
        let now = self.clock.now();
        let yielded: BTreeSet<ObjectKey> = steps
            .iter()
            .filter(|step| self.must_wait(step, now))
            .map(|step| step.op.key())
            .collect();
        if self.failures.is_empty() && yielded.is_empty() {
            return steps;
        }
        let (mut waiting, mut held) = (BTreeSet::new(), BTreeSet::new());
        for step in &steps {
            let key = step.op.key();
            let waits = self
                .failures
                .get(&key)
                .is_some_and(|failure| failure.op == step.op && now < failure.retry_at);
            let depends = !matches!(step.op, Op::Delete(_))
                && step
                    .op
                    .object()
                    .needs()
                    .iter()
                    .any(|need| held.contains(need));
            if waits {
                waiting.insert(key.clone());
            }
            if waits || depends || yielded.contains(&key) {
                held.insert(key);
            }
        }
        let (held_back, due): (Vec<_>, Vec<_>) = steps.into_iter().partition(|step| {
            let serves = match &step.why {
                Why::Stopgap { of } => held.contains(of),
                Why::InTheWay { of } => yielded.contains(of),
                _ => false,
            };
            serves || held.contains(&step.op.key())
        });
        for step in held_back {
            let key = step.op.key();
            if !waiting.contains(&key) {
                self.failures.remove(&key);
            }
            if !self.failures.is_empty() {
                self.open.insert(key.clone());
            }
            if !yielded.is_empty() {
                self.repairs_of.leave(key);
            }
        }
        due
    }

    /// Makes first and removes after. What could not be made may leave in use what it was to take
    /// the place of: that is not removed as unwanted before it is out of use.
    async fn apply(&mut self, steps: Vec<Step>, desired: &Desired) -> bool {
        let (mut orphans, makes): (Vec<_>, Vec<_>) =
            steps.into_iter().partition(|step| step.why == Why::Orphan);
        let mut doubt = self.carry_out(makes).await;
        let is_whole = self.failures.is_empty() && !self.repairs_of.yield_some();
        if !is_whole && !orphans.is_empty() {
            let used = self.used(desired);
            let kept: BTreeSet<ObjectKey> = orphans
                .iter()
                .map(|step| step.op.key())
                .filter(|key| used.contains(key) || self.stands_in(key, desired))
                .collect();
            self.failures.retain(|key, _| !kept.contains(key));
            orphans.retain(|step| !kept.contains(&step.op.key()));
            if self.repairs_of.yield_some() {
                kept.iter()
                    .cloned()
                    .for_each(|key| self.repairs_of.leave(key));
            }
            if !self.failures.is_empty() {
                self.open.extend(kept);
            }
        }
        doubt |= self.carry_out(orphans).await;
        doubt
    }

    /// What is there and needed by what is there under a wanted key, be it as it should or not.
    /// Devices are left out: on one that is to go, other things may be in the way of what is wanted.
    fn used(&self, desired: &Desired) -> BTreeSet<ObjectKey> {
        let mut used = BTreeSet::new();
        let Some(observed) = self.copy.observed() else {
            return used;
        };
        let wanted = desired.objects.keys();
        let mut open: Vec<&Object> = wanted.filter_map(|key| observed.objects.get(key)).collect();
        while let Some(object) = open.pop() {
            for key in object.needs() {
                if !matches!(key, ObjectKey::Link(_))
                    && let Some(object) = observed.objects.get(&key)
                    && used.insert(key)
                {
                    open.push(object);
                }
            }
        }
        used
    }

    /// Whether an address stands in for one of its device and family that is wanted and not there.
    /// Without any, the kernel drops the routes through the device.
    fn stands_in(&self, key: &ObjectKey, desired: &Desired) -> bool {
        let ObjectKey::Address { dev, ip, .. } = key else {
            return false;
        };
        let is_missing = |key: &ObjectKey| {
            self.copy
                .observed()
                .is_none_or(|observed| !observed.objects.contains_key(key))
        };
        desired.objects.keys().any(|key| {
            matches!(key, ObjectKey::Address { dev: on, ip: wanted, .. }
                if on == dev && wanted.is_ipv4() == ip.is_ipv4())
                && is_missing(key)
        })
    }

    async fn carry_out(&mut self, steps: Vec<Step>) -> bool {
        if steps.is_empty() {
            return false;
        }
        let ops: Vec<Op> = steps.iter().map(|step| step.op.clone()).collect();
        let results = self.kernel.apply(&ops).await;
        let now = self.clock.now();
        let mut doubt = results.len() != ops.len();
        let many = ops.len() > MANY;
        for (step, result) in steps.into_iter().zip(results) {
            let key = step.op.key();
            match result {
                Ok(()) => {
                    doubt |= matches!(key, ObjectKey::Link(_));
                    self.count_repair(&step, now);
                    if many {
                        self.copy.changed_among_many(&step.op);
                    } else {
                        self.copy.changed(&step.op, now);
                    }
                    self.failures.remove(&key);
                    self.open.remove(&key);
                    self.is_marked(&key);
                    let repair = !self.unsettled.contains(&key)
                        && !matches!(step.why, Why::Orphan | Why::InTheWay { .. });
                    if repair {
                        self.repairs += 1;
                        tracing::info!(object = %step.op.object(), why = ?step.why, "repaired");
                    } else {
                        tracing::debug!(op = step.op.verb(), object = %step.op.object(), "applied");
                    }
                    self.events.send(OverlayEvent::Step { step, repair }).ok();
                }
                Err(error) => {
                    self.open.insert(key.clone());
                    doubt |= self.fail(key, step, &error, now);
                }
            }
        }
        if doubt {
            self.converged = false;
            self.copy.doubt_all();
            self.read_at = Some(now);
        } else if many {
            self.read_by(now + VERIFY);
        }
        self.serve_doubts(now, DEBOUNCE);
        doubt
    }

    /// Remembers a failure. Answers whether it casts doubt on what was read: the same answer as
    /// the last time, after a fresh reading, does not.
    fn fail(&mut self, key: ObjectKey, step: Step, error: &kernel::Error, now: Moment) -> bool {
        if matches!(error, kernel::Error::Skipped { .. }) {
            return false; // the next plan has it again, held back by what failed
        }
        let before = self
            .failures
            .remove(&key)
            .filter(|failure| failure.op == step.op);
        let attempts = before
            .as_ref()
            .map_or(0, |failure| failure.attempts)
            .saturating_add(1);
        if before.is_none() {
            let (op, peer) = (step.op.verb(), step.peer.as_ref());
            tracing::warn!(op, object = %step.op.object(), ?peer, %error, "the kernel refused");
        }
        let message = error.to_string();
        let news = before.as_ref().is_none_or(|b| b.error != message);
        if matches!(
            error,
            kernel::Error::TimedOut | kernel::Error::Connection { .. }
        ) {
            // It may have been done all the same.
            self.copy.doubt([key.clone()]);
        }
        let failure = Failure {
            op: step.op.clone(),
            peer: step.peer.clone(),
            error: message.clone(),
            permanent: !error.is_transient(),
            attempts,
            since: before.map_or(now, |failure| failure.since),
            retry_at: now + self.retry.after(attempts, &mut self.rng),
        };
        self.failures.insert(key, failure);
        self.events
            .send(OverlayEvent::StepFailed {
                step,
                error: message,
            })
            .ok();
        news
    }
}

/// Whether a step replaces a route: the kernel does not ask whose it is by then.
const fn replaces_route(step: &Step) -> bool {
    matches!(step.op, Op::Change(Object::Route(_)))
}

/// What must be read to compare with what is desired.
fn scope_of(desired: &Desired) -> Scope {
    let mut scope = Scope::default();
    // Links, settings and offloads are the lowest ranks: they stand first.
    for (key, wanted) in &desired.objects {
        match (key, &wanted.object) {
            (ObjectKey::Link(_), Object::Link(link)) => {
                scope.devices.insert(link.name);
            }
            (ObjectKey::Sysctl { .. } | ObjectKey::Offload { .. }, _) => {
                scope.settings.insert(key.clone());
            }
            _ => break,
        }
    }
    scope
}
