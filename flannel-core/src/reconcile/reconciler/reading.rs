//! The reconciler's readings of the kernel: what is read when, and the keys to be planned after it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{Reconciler, scope_of};
use crate::clock::Moment;
use crate::kernel::{self, Change, Observed, Scope};
use crate::object::{IfName, LinkKind, Object, ObjectKey};
use crate::reconcile::copy::News;
use crate::reconcile::desired::Desired;
use crate::reconcile::ownership::{Owner, Ownership};
use crate::reconcile::plan::Blocked;
use crate::subnet::Subnet;

/// The wait from a notification to what follows from it, so that what changes together is read and
/// repaired together, and that news which the next word takes back has no consequences.
pub(super) const DEBOUNCE: Duration = Duration::from_millis(5);

/// The least wait between two readings; a reading that takes long makes it longer.
const READ_GAP: Duration = Duration::from_millis(10);

/// The most that a reading puts off the next one. How long it took says little of its cost if the
/// machine slept or the process was stopped meanwhile, be it for a day.
const LONGEST_GAP: Duration = Duration::from_secs(2);

/// How often settings are looked at.
const SETTINGS: Duration = Duration::from_secs(2);

/// How long a reading that nobody waits for may take before it is begun anew.
const ASIDE: Duration = Duration::from_secs(120);

/// A reading of everything that goes on while other things are done, and when it began.
///
/// The lock is never taken: it makes what holds it shareable.
pub(crate) struct Aside(pub(super) Option<(Moment, Mutex<Reading>)>);

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

/// The readings since the engine woke.
#[derive(Debug, Default)]
pub(super) struct JustRead {
    pub(super) all: bool,
    /// Links and addresses.
    pub(super) links: bool,
    pub(super) keys: BTreeSet<ObjectKey>,
}

impl JustRead {
    pub(super) fn holds(&self, key: &ObjectKey) -> bool {
        let is_of_links = matches!(key, ObjectKey::Link(_) | ObjectKey::Address { .. });
        self.all || is_of_links && self.links || self.keys.contains(key)
    }
}

impl Reconciler {
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
    pub(super) fn digest(
        &mut self,
        desired: &Desired,
        ownership: &Ownership,
    ) -> BTreeSet<ObjectKey> {
        let News {
            mut touched,
            confirmed,
            routes,
            renumbered,
            host,
            links,
        } = self.copy.take_news();
        self.host_changed |= host;
        self.links_read |= links;
        self.routes_changed.extend(routes);
        for key in confirmed {
            self.unsettled.remove(&key);
        }
        if !renumbered.is_empty() || !self.unmarked.is_empty() {
            self.note_lost_numbers(renumbered, ownership);
        }
        if touched.is_empty() {
            return touched;
        }
        self.repairs_of.changed(touched.iter(), self.clock.now());
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
    pub(super) fn serve_doubts(&mut self, now: Moment, delay: Duration) {
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

    /// Tells if links were read since that was asked.
    pub(crate) const fn links_were_read(&mut self) -> bool {
        std::mem::replace(&mut self.links_read, false)
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
    pub(super) fn read_by(&mut self, at: Moment) {
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

    /// The engine woke: what was read before may be old.
    pub(crate) fn wake(&mut self) {
        self.just_read = JustRead::default();
        self.repairs_of.pass(self.clock.now());
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

    pub(super) async fn read_all(&mut self, scope: Scope) -> kernel::Result<()> {
        let start = self.clock.now();
        let observed = self.kernel.observe(&scope).await?;
        let done = self.clock.now();
        if let Some(before) = self.copy.observed() {
            let moved = moved(before, &observed);
            self.repairs_of.changed(moved.iter(), done);
        }
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

    pub(super) async fn read_doubts(&mut self, links: bool, keys: bool) -> kernel::Result<()> {
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
}

/// The links and addresses that are not what they were.
fn moved(before: &Observed, after: &Observed) -> Vec<ObjectKey> {
    let host = |observed: &Observed| {
        let objects = observed.objects.range(..ObjectKey::Tunnel(IfName::FIRST));
        let keys = objects.map(|(key, _)| key);
        let keys = keys.filter(|key| matches!(key, ObjectKey::Link(_) | ObjectKey::Address { .. }));
        keys.cloned().collect::<BTreeSet<_>>()
    };
    let index = |observed: &Observed| -> BTreeMap<IfName, u32> {
        let links = observed.links.iter();
        links.map(|link| (link.name, link.index)).collect()
    };
    let (was, is) = (index(before), index(after));
    let is_another = |key: &ObjectKey| {
        let link = matches!(key, ObjectKey::Link(dev) if was.get(dev) != is.get(dev));
        link || before.objects.get(key) != after.objects.get(key)
    };
    let mut all = host(before);
    all.append(&mut host(after));
    all.retain(is_another);
    all.into_iter().collect()
}

/// The least wait after a reading that took so long: reading takes a fifth of the time at most.
fn gap_after(cost: Duration) -> Duration {
    cost.saturating_mul(4).min(LONGEST_GAP)
}

/// Whether a device can keep another one from being made, or be bound to one.
const fn may_be_a_rival(object: &Object) -> bool {
    matches!(object, Object::Link(link) if matches!(link.kind, LinkKind::Vxlan(_)))
}
