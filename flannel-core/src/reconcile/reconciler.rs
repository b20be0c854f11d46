//! The kernel's half of the engine: reads, plans, applies, remembers what failed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;

use crate::backoff::Backoff;
use crate::clock::{Clock, Moment, Rng};
use crate::kernel::{self, Change, Kernel, Observed, Op, Scope};
use crate::lease::LeaseKey;
use crate::object::{Object, ObjectKey, Objects};
use crate::reconcile::desired::Desired;
use crate::reconcile::ownership::Ownership;
use crate::reconcile::plan::{Blocked, Plan, Step, Why, plan, plan_keys, teardown};
use crate::status::{FailingObject, OverlayEvent};

/// The wait from a hint to the reading, so that what changes together is read together.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// The least wait between two readings; a reading that takes long makes it longer.
const READ_GAP: Duration = Duration::from_millis(10);

/// How often settings are looked at.
const SETTINGS: Duration = Duration::from_secs(2);

/// The wait before what was applied is read back, if no hint asks for it before.
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
    /// What the kernel had when last read, and what was successfully changed since.
    observed: Option<Arc<Observed>>,
    scope: Scope,
    /// When the kernel is to be read; `None` while what was read last is trusted.
    read_at: Option<Moment>,
    settings_at: Moment,
    last_read: Moment,
    read_cost: Duration,
    read_failures: u32,
    read_error: Option<String>,
    /// Keys whose desired object changed since the last plan.
    dirty: BTreeSet<ObjectKey>,
    /// The next plan is for everything.
    replan: bool,
    /// Keys that were not yet seen as they should be: a step for any other key is a repair.
    unsettled: BTreeSet<ObjectKey>,
    failures: BTreeMap<ObjectKey, Failure>,
    blocked: Vec<Blocked>,
    repairs: u64,
    /// The kernel was read since the engine woke.
    just_read: bool,
    /// A whole plan from a fresh reading had no steps, and nothing failed since.
    converged: bool,
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
            observed: None,
            scope: Scope::default(),
            read_at: Some(now),
            settings_at: now,
            last_read: now,
            read_cost: Duration::ZERO,
            read_failures: 0,
            read_error: None,
            dirty: BTreeSet::new(),
            replan: false,
            unsettled: BTreeSet::new(),
            failures: BTreeMap::new(),
            blocked: Vec::new(),
            repairs: 0,
            just_read: false,
            converged: false,
        }
    }

    pub(crate) const fn observed(&self) -> Option<&Arc<Observed>> {
        self.observed.as_ref()
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

    /// Something may have changed in the kernel.
    pub(crate) fn hint(&mut self, change: Change) {
        if let Change::Neighbour(Some(dev)) = change
            && !self.scope.devices.contains(&dev)
        {
            return;
        }
        self.read_by(self.clock.now() + DEBOUNCE);
    }

    /// Reads the kernel no later than this moment, unless it was read a very short while ago.
    fn read_by(&mut self, at: Moment) {
        let at = at.max(self.last_read + READ_GAP.max(self.read_cost * 4));
        self.read_at = Some(self.read_at.map_or(at, |before| before.min(at)));
    }

    /// Reads the kernel at the next opportunity, come what may.
    pub(crate) fn read_now(&mut self) {
        self.read_at = Some(self.clock.now());
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

    /// The engine woke: what was read before may be old.
    pub(crate) const fn wake(&mut self) {
        self.just_read = false;
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
        [self.read_at, self.next_retry(), settings]
            .into_iter()
            .flatten()
            .min()
    }

    /// When something that failed is tried again. The kernel is read before each try, so tries are
    /// gathered where reading is dear: it takes a twentieth of the time at most, and far less for
    /// what has failed again and again, so that it delays nobody.
    fn next_retry(&self) -> Option<Moment> {
        let wait = |failure: &Failure| {
            let gap = match failure.attempts {
                ..=4 => self.read_cost * 20,
                _ => (self.read_cost * 250).min(LONGEST_RETRY),
            };
            failure.retry_at.max(self.last_read + gap)
        };
        self.failures.values().map(wait).min()
    }

    /// Looks at the settings now and then: nobody hints at them.
    pub(crate) async fn look_at_settings(&mut self) {
        if self.scope.settings.is_empty() || self.clock.now() < self.settings_at {
            return;
        }
        self.settings_at = self.clock.now() + SETTINGS + self.rng.below(SETTINGS / 8);
        let Some(observed) = self.observed.clone() else {
            return;
        };
        // An error is left to the whole reading, which is due soon enough.
        if let Ok(found) = self.kernel.settings(&self.scope.settings).await {
            let same = |key| observed.objects.get(key) == found.get(key);
            if !self.scope.settings.iter().all(same) {
                self.read_at = Some(self.clock.now());
            }
        }
    }

    /// Reads the kernel if that is due. Answers whether there is a new reading.
    pub(crate) async fn read_if_due(&mut self, desired: &Desired) -> bool {
        let now = self.clock.now();
        let scope = scope_of(desired);
        let retry = self.next_retry().is_some_and(|at| at <= now);
        let due = self.read_at.is_some_and(|at| at <= now) || scope != self.scope || retry;
        if !due || (self.read_failures > 0 && self.read_at.is_some_and(|at| at > now)) {
            return false;
        }
        match self.kernel.observe(&scope).await {
            Ok(observed) => {
                let done = self.clock.now();
                self.observed = Some(Arc::new(observed));
                self.scope = scope;
                self.read_at = None;
                self.last_read = done;
                self.read_cost = done.since(now);
                self.read_failures = 0;
                self.read_error = None;
                self.replan = true;
                self.just_read = true;
                true
            }
            Err(error) => {
                self.read_failures = self.read_failures.saturating_add(1);
                self.read_at =
                    Some(self.clock.now() + self.retry.after(self.read_failures, &mut self.rng));
                if self.read_error.is_none() {
                    tracing::warn!(%error, "the kernel cannot be read");
                }
                self.read_error = Some(error.to_string());
                self.converged = false;
                false
            }
        }
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
        let Some(observed) = &self.observed else {
            return false;
        };
        if scope_of(desired) != self.scope {
            // What was read does not cover what is wanted.
            self.read_at.get_or_insert(self.clock.now());
            return self.read_failures == 0;
        }
        let whole = self.replan;
        let plan = if whole {
            plan(observed, desired, ownership)
        } else if self.dirty.is_empty() {
            return false;
        } else {
            plan_keys(observed, desired, ownership, &self.dirty)
        };
        if !self.just_read && plan.steps.iter().any(replaces_route) {
            // What is in the place of the route by now may be another's, and hints can be lost.
            self.read_at = Some(self.clock.now());
            return self.read_failures == 0;
        }
        let dirty = std::mem::take(&mut self.dirty);
        self.replan = false;
        let fresh = whole && self.read_at.is_none();
        let steps: BTreeSet<ObjectKey> = plan.steps.iter().map(|step| step.op.key()).collect();
        if whole {
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
            self.blocked
                .retain(|blocked| !dirty.contains(&blocked.wanted.key()));
            self.blocked.extend(plan.foreign);
            self.failures
                .retain(|key, _| steps.contains(key) || !dirty.contains(key));
        }
        let steps = self.due(plan.steps);
        if steps.is_empty() {
            self.converged = self.failures.is_empty() && (fresh || self.converged);
            return false;
        }
        self.apply(steps, desired).await
    }

    /// The steps that are not waiting for another try, nor for another step that is. A stopgap is
    /// made for one step: without that it would only be made and removed, over and over again.
    ///
    /// What waits for another step has no try of its own, though it may have failed by itself before.
    fn due(&mut self, steps: Vec<Step>) -> Vec<Step> {
        if self.failures.is_empty() {
            return steps;
        }
        let now = self.clock.now();
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
            if waits || depends {
                held.insert(key);
            }
        }
        let (held_back, due): (Vec<_>, Vec<_>) = steps.into_iter().partition(|step| {
            let serves = match &step.why {
                Why::Stopgap { of } => held.contains(of),
                _ => false,
            };
            serves || held.contains(&step.op.key())
        });
        for step in held_back {
            let key = step.op.key();
            if !waiting.contains(&key) {
                self.failures.remove(&key);
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
        if !self.failures.is_empty() && !orphans.is_empty() {
            let used = self.used(desired);
            let kept: BTreeSet<ObjectKey> = orphans
                .iter()
                .map(|step| step.op.key())
                .filter(|key| used.contains(key) || self.stands_in(key, desired))
                .collect();
            self.failures.retain(|key, _| !kept.contains(key));
            orphans.retain(|step| !kept.contains(&step.op.key()));
        }
        doubt |= self.carry_out(orphans).await;
        doubt
    }

    /// What is there and needed by what is there under a wanted key, be it as it should or not.
    /// Devices are left out: on one that is to go, other things may be in the way of what is wanted.
    fn used(&self, desired: &Desired) -> BTreeSet<ObjectKey> {
        let mut used = BTreeSet::new();
        let Some(observed) = &self.observed else {
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
            self.observed
                .as_ref()
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
        let mut observed = self.observed.take().unwrap_or_default();
        let objects = &mut Arc::make_mut(&mut observed).objects;
        for (step, result) in steps.into_iter().zip(results) {
            let key = step.op.key();
            match result {
                Ok(()) => {
                    doubt |= matches!(key, ObjectKey::Link(_));
                    record(objects, &step.op);
                    self.failures.remove(&key);
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
                Err(error) => doubt |= self.fail(key, step, &error, now),
            }
        }
        self.observed = Some(observed);
        if doubt {
            self.converged = false;
            self.read_at = Some(now);
        } else {
            self.read_by(now + VERIFY);
        }
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

/// Notes a change that succeeded in what was read.
fn record(objects: &mut Objects, op: &Op) {
    match op {
        Op::Create(object) | Op::Change(object) => {
            objects.insert(object.key(), object.clone());
        }
        Op::Delete(object) => {
            objects.remove(&object.key());
        }
    }
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
