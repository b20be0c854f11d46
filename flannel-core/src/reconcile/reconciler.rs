//! The kernel's half of the engine: follows the kernel, plans, applies, remembers what failed.
//!
//! It plans against the [`Copy`] and only the keys that something happened to; whole plans are made
//! after whole readings and where devices or the network changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::broadcast;

use crate::backoff::Backoff;
use crate::clock::{Clock, Moment, Rng};
use crate::kernel::{self, Change, Kernel, Observed, Op, Scope};
use crate::lease::{BackendType, LeaseKey};
use crate::object::{LinkKind, Object, ObjectKey};
use crate::reconcile::copy::{Copy, MANY, News};
use crate::reconcile::desired::Desired;
use crate::reconcile::ownership::{Owner, Ownership};
use crate::reconcile::plan::{Blocked, Plan, Step, Why, plan, plan_keys, teardown};
use crate::status::{FailingObject, OverlayEvent};
use crate::subnet::Subnet;

/// The wait from a notification to what follows from it, so that what changes together is read and
/// repaired together, and that news which the next word takes back has no consequences.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// The least wait between two readings; a reading that takes long makes it longer.
const READ_GAP: Duration = Duration::from_millis(10);

/// The most that a reading puts off the next one. How long it took says little of its cost if the
/// machine slept or the process was stopped meanwhile, be it for a day.
const LONGEST_GAP: Duration = Duration::from_secs(2);

/// How often settings are looked at.
const SETTINGS: Duration = Duration::from_secs(2);

/// The wait before everything is read back after very many changes at once.
const VERIFY: Duration = Duration::from_millis(100);

/// How long a reading that nobody waits for may take before it is begun anew.
const ASIDE: Duration = Duration::from_secs(120);

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
    /// What was read since the engine woke.
    just_read: JustRead,
    /// Everything was found right, and nothing failed since.
    converged: bool,
    /// Links or addresses changed, and whoever depends on them has not looked yet.
    host_changed: bool,
    /// Destinations of routes that changed since that was asked.
    routes_changed: BTreeSet<Subnet>,
    /// Those that did not matter when it was asked.
    routes_passed: BTreeSet<Subnet>,
}

/// A reading of everything that goes on while other things are done, and when it began.
///
/// The lock is never taken: it makes what holds it shareable.
pub(crate) struct Aside(Option<(Moment, Mutex<Reading>)>);

type Reading = Pin<Box<dyn Future<Output = kernel::Result<Observed>> + Send>>;

impl fmt::Debug for Aside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Aside(reads: {})", self.0.is_some())
    }
}

impl Aside {
    /// What was read, and when that began. Cancel safe.
    pub(crate) async fn done(&mut self) -> (Moment, kernel::Result<Observed>) {
        let Some((start, reading)) = &mut self.0 else {
            return std::future::pending().await;
        };
        let reading = reading.get_mut().unwrap_or_else(PoisonError::into_inner);
        let (start, result) = (*start, reading.await);
        self.0 = None;
        (start, result)
    }
}

/// All that a plan depends on beside the objects that are wanted and there. Where it changes, other keys
/// than those that anything happened to are no longer right.
#[derive(Debug, PartialEq, Eq)]
struct Basis {
    hold_orphans: bool,
    held_backends: BTreeSet<BackendType>,
    spared: Vec<Subnet>,
    ownership: Ownership,
}

impl Basis {
    fn of(desired: &Desired, ownership: &Ownership) -> Self {
        let (hold_orphans, held_backends, spared) = beside_objects(desired);
        Self {
            hold_orphans,
            held_backends: held_backends.clone(),
            spared: spared.to_vec(),
            ownership: ownership.clone(),
        }
    }

    fn is_of(&self, desired: &Desired, ownership: &Ownership) -> bool {
        let basis = (self.hold_orphans, &self.held_backends, &*self.spared);
        basis == beside_objects(desired) && self.ownership == *ownership
    }
}

/// All that is desired beside the objects.
fn beside_objects(desired: &Desired) -> (bool, &BTreeSet<BackendType>, &[Subnet]) {
    let Desired {
        objects: _,
        hold_orphans,
        held_backends,
        spared,
    } = desired;
    (*hold_orphans, held_backends, spared)
}

/// The readings since the engine woke.
#[derive(Debug, Default)]
struct JustRead {
    all: bool,
    /// Links and addresses.
    links: bool,
    keys: BTreeSet<ObjectKey>,
}

impl JustRead {
    fn holds(&self, key: &ObjectKey) -> bool {
        let is_of_links = matches!(key, ObjectKey::Link(_) | ObjectKey::Address { .. });
        self.all || is_of_links && self.links || self.keys.contains(key)
    }
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
            just_read: JustRead::default(),
            converged: false,
            host_changed: false,
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

    /// Takes notifications in. Answers whether something follows from them at once.
    pub(crate) fn told(
        &mut self,
        changes: Vec<Change>,
        desired: &Desired,
        ownership: &Ownership,
    ) -> bool {
        let now = self.clock.now();
        let wanted = |key: &ObjectKey| Some(&desired.objects.get(key)?.object);
        self.copy.told(changes, now, wanted);
        let news = self.digest(desired, ownership);
        if !news.is_empty() {
            self.noticed.extend(news);
            self.noticed_at.get_or_insert(now + DEBOUNCE);
        }
        self.serve_doubts(now, DEBOUNCE);
        self.host_changed
            || !self.routes_changed.is_empty()
            || (!self.converged && self.copy.is_settled())
    }

    /// The keys to be planned after what the copy has learnt.
    fn digest(&mut self, desired: &Desired, ownership: &Ownership) -> BTreeSet<ObjectKey> {
        let News {
            mut touched,
            confirmed,
            routes,
            host,
        } = self.copy.take_news();
        self.host_changed |= host;
        self.routes_changed.extend(routes);
        for key in confirmed {
            self.unsettled.remove(&key);
        }
        if touched.is_empty() {
            return touched;
        }
        let Some(observed) = self.copy.observed() else {
            return touched;
        };
        // What somebody else's object kept from being made, with all that needs it, is in no list.
        let blocks = |blocked: &Blocked| touched.contains(&blocked.wanted.key());
        let mut replan = self.blocked.iter().any(blocks);
        touched.retain(|key| {
            let found = observed.objects.get(key);
            if let ObjectKey::Link(dev) = key {
                // A device decides what becomes of all on it, and of others that are like it.
                replan |= desired.objects.contains_key(key)
                    || self
                        .scope
                        .settings
                        .iter()
                        .any(|key| key.dev() == Some(*dev))
                    || found.is_some_and(|found| {
                        may_be_a_rival(found) || ownership.owner(found, observed) != Owner::Foreign
                    });
                return false;
            }
            desired.objects.contains_key(key)
                || found.is_some_and(|found| ownership.owner(found, observed) != Owner::Foreign)
        });
        self.replan |= replan;
        touched
    }

    /// Sees to it that what is in doubt is read, after a while in which more may come.
    fn serve_doubts(&mut self, now: Moment, delay: Duration) {
        let doubts = self.copy.doubts();
        let (all, links, keys) = (doubts.all, doubts.links, !doubts.keys.is_empty());
        if all {
            self.read_by(now + delay);
        }
        if links && self.links_at.is_none() {
            let earliest = self.last_links + READ_GAP.max(gap_after(self.links_cost));
            self.links_at = Some((now + delay).max(earliest));
        }
        if keys && self.keys_at.is_none() {
            // Cheap, unless a whole table has to be read for one key of it.
            let earliest = self.last_keys + gap_after(self.keys_cost);
            self.keys_at = Some((now + delay).max(earliest));
        }
    }

    /// Whether the host's own network is to be looked at: links or addresses changed, or a route that
    /// matters did. Each route is asked about once.
    pub(crate) fn host_changed(&mut self, matters: impl Fn(&Subnet) -> bool) -> bool {
        /// After so many changes of routes that did not matter all are looked at.
        const MOST: usize = 256;
        let mut new = std::mem::take(&mut self.routes_changed);
        self.host_changed |= new.iter().any(matters);
        self.routes_passed.append(&mut new);
        self.host_changed || self.routes_passed.len() > MOST
    }

    /// An address came to matter: whether routes to it have changed since they were looked at.
    pub(crate) fn now_matters(&mut self, ip: IpAddr) {
        self.host_changed |= self.routes_passed.iter().any(|dst| dst.contains_ip(ip));
    }

    /// The host's own network was looked at.
    pub(crate) fn host_seen(&mut self) {
        self.host_changed = false;
        self.routes_changed.clear();
        self.routes_passed.clear();
    }

    /// Reads the kernel no later than this moment, unless it was read a very short while ago.
    fn read_by(&mut self, at: Moment) {
        let at = at.max(self.last_read + READ_GAP.max(gap_after(self.read_cost)));
        self.read_at = Some(self.read_at.map_or(at, |before| before.min(at)));
    }

    /// Reads the kernel at the next opportunity, come what may.
    pub(crate) fn read_now(&mut self) {
        self.read_at = Some(self.clock.now());
    }

    /// Reads everything without keeping anybody waiting: with very many routes that takes a while.
    pub(crate) fn read_aside(&mut self) {
        if self.copy.observed().is_none() || self.read_at.is_some() || self.read_failures > 0 {
            self.read_now();
            return;
        }
        let now = self.clock.now();
        if matches!(&self.aside.0, Some((start, _)) if now.since(*start) < ASIDE) {
            return;
        }
        self.copy.begin_aside();
        let (kernel, scope) = (Arc::clone(&self.kernel), self.scope.clone());
        let reading = async move { kernel.observe(&scope).await };
        self.aside = Aside(Some((now, Mutex::new(Box::pin(reading)))));
    }

    pub(crate) const fn aside(&mut self) -> &mut Aside {
        &mut self.aside
    }

    /// Takes in what was read aside.
    pub(crate) fn aside_done(
        &mut self,
        (start, result): (Moment, kernel::Result<Observed>),
        desired: &Desired,
        ownership: &Ownership,
    ) {
        let now = self.clock.now();
        match result {
            Ok(observed) => {
                self.copy.read_aside(observed, now);
                self.last_read = now;
                self.read_cost = now.since(start);
                self.replan = true;
                let news = self.digest(desired, ownership);
                self.dirty.extend(news);
                self.serve_doubts(now, Duration::ZERO);
            }
            // It is done again, and waited for, with all that follows from a failure.
            Err(_) => self.read_now(),
        }
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
    pub(crate) fn wake(&mut self) {
        self.just_read = JustRead::default();
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

    /// Looks at the settings now and then: nobody tells of them.
    pub(crate) async fn look_at_settings(&mut self, desired: &Desired, ownership: &Ownership) {
        if self.scope.settings.is_empty() || self.clock.now() < self.settings_at {
            return;
        }
        self.settings_at = self.clock.now() + SETTINGS + self.rng.below(SETTINGS / 8);
        if self.copy.observed().is_none() {
            return;
        }
        // An error is left to the whole reading, which is due soon enough.
        if let Ok(found) = self.kernel.settings(&self.scope.settings).await {
            let now = self.clock.now();
            self.copy.read_keys(self.scope.settings.clone(), found, now);
            let news = self.digest(desired, ownership);
            self.dirty.extend(news);
        }
    }

    /// Reads of the kernel what is due.
    pub(crate) async fn read_if_due(&mut self, desired: &Desired, ownership: &Ownership) {
        let now = self.clock.now();
        if self.read_failures > 0 && self.read_at.is_some_and(|at| at > now) {
            return;
        }
        self.copy.pass(now);
        self.take_retries(now);
        self.serve_doubts(now, Duration::ZERO);
        let scope = scope_of(desired);
        let is_due = |at: Option<Moment>| at.is_some_and(|at| at <= now);
        let result = if is_due(self.read_at) || scope != self.scope {
            self.read_all(scope).await
        } else if is_due(self.links_at) || is_due(self.keys_at) {
            self.read_doubts(is_due(self.links_at), is_due(self.keys_at))
                .await
        } else {
            return;
        };
        match result {
            Ok(()) => {
                self.read_failures = 0;
                self.read_error = None;
                let news = self.digest(desired, ownership);
                self.dirty.extend(news);
                self.serve_doubts(self.clock.now(), Duration::ZERO);
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
            }
        }
    }

    async fn read_all(&mut self, scope: Scope) -> kernel::Result<()> {
        let start = self.clock.now();
        let observed = self.kernel.observe(&scope).await?;
        let done = self.clock.now();
        self.copy.read_all(observed, scope.devices.clone(), done);
        self.aside = Aside(None);
        self.scope = scope;
        (self.read_at, self.links_at, self.keys_at) = (None, None, None);
        (self.last_read, self.last_links) = (done, done);
        self.read_cost = done.since(start);
        self.replan = true;
        self.just_read.all = true;
        Ok(())
    }

    async fn read_doubts(&mut self, links: bool, keys: bool) -> kernel::Result<()> {
        if links {
            let start = self.clock.now();
            let found = self.kernel.links().await?;
            let done = self.clock.now();
            self.copy.read_links(found);
            self.just_read.links = true;
            self.links_at = None;
            self.last_links = done;
            self.links_cost = done.since(start);
        }
        let doubtful = self.copy.doubts().keys.clone();
        if keys && !doubtful.is_empty() {
            let start = self.clock.now();
            let found = self.kernel.read(&doubtful).await?;
            self.last_keys = self.clock.now();
            self.keys_cost = self.last_keys.since(start);
            self.just_read.keys.extend(doubtful.iter().cloned());
            self.copy.read_keys(doubtful, found, self.clock.now());
        }
        if keys {
            self.keys_at = None;
        }
        Ok(())
    }

    /// Has what failed planned again where that is due, and what waited for it, after a look at what
    /// they need.
    fn take_retries(&mut self, now: Moment) {
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
        let unread = self.to_be_read(&plan);
        if !unread.is_empty() {
            self.copy.doubt(unread);
            self.serve_doubts(now, Duration::ZERO);
            return self.read_failures == 0;
        }
        let dirty = std::mem::take(&mut self.dirty);
        self.replan = false;
        let steps: BTreeSet<ObjectKey> = plan.steps.iter().map(|step| step.op.key()).collect();
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
        if !self.failures.is_empty() {
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
            self.open.insert(key);
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
            self.open.extend(kept);
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
                    if many {
                        self.copy.changed_among_many(&step.op);
                    } else {
                        self.copy.changed(&step.op, now);
                    }
                    self.failures.remove(&key);
                    self.open.remove(&key);
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

/// The least wait after a reading that took so long: reading takes a fifth of the time at most.
fn gap_after(cost: Duration) -> Duration {
    cost.saturating_mul(4).min(LONGEST_GAP)
}

/// Whether a step replaces a route: the kernel does not ask whose it is by then.
const fn replaces_route(step: &Step) -> bool {
    matches!(step.op, Op::Change(Object::Route(_)))
}

/// Whether a device can keep another one from being made, or be bound to one.
const fn may_be_a_rival(object: &Object) -> bool {
    matches!(object, Object::Link(link) if matches!(link.kind, LinkKind::Vxlan(_)))
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
