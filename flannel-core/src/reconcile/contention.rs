//! [`Contention`]: objects of ours that are undone again and again, and how long each repair waits.
//!
//! Pure: time and chance are parameters. Each repair costs an object three seconds of being left alone, a
//! tenth of that where it went with something else; what owes a minute is fought for, and its repairs
//! wait ever longer, up to half a minute. So whatever is undone now and then is repaired at once for
//! ever, and two that undo each other come to rest.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use crate::backoff::Backoff;
use crate::clock::{Moment, Rng};
use crate::lease::LeaseKey;
use crate::object::{Object, ObjectKey, RouteProtocol};

/// The time for which an object is left alone until one repair of it is forgotten: a program that
/// renews something every few seconds is borne with.
pub(super) const FORGOTTEN: Duration = Duration::from_secs(3);

/// The same for a repair of what went with something that it needs, as routes do with their interface.
pub(super) const EXPLAINED: Duration = Duration::from_millis(300);

/// The most that an object may owe before its repairs wait: twenty of them at once.
pub(super) const MOST: Duration = Duration::from_secs(60);

/// The first wait, and the longest. Each is shortened at random by up to half, so that two of a kind
/// do not meet again and again.
const WAITS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// An object that was repaired so lately may not last.
const CALM: Duration = Duration::from_secs(5);

/// The objects that were repaired lately.
#[derive(Debug)]
pub(super) struct Contention {
    entries: BTreeMap<ObjectKey, Entry>,
    waits: Backoff,
}

/// The repairs of one object that are not forgotten.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) object: Object,
    /// The peer that it serves.
    pub(crate) peer: Option<LeaseKey>,
    /// The number of its repairs.
    pub(crate) times: u64,
    /// When it was repaired first.
    pub(crate) since: Moment,
    /// Whose route stood in its place last.
    pub(crate) by: Option<RouteProtocol>,
    /// When it may be repaired next.
    pub(crate) until: Moment,
    /// When it was repaired last, or became right by itself.
    right: Moment,
    /// It is not right now.
    is_undone: bool,
    /// It is not right, and its repair waits.
    waits: bool,
    owed: Duration,
    /// The number of repairs that have waited.
    level: u32,
}

impl Default for Contention {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            waits: Backoff::new(WAITS.0, WAITS.1),
        }
    }
}

impl Contention {
    /// Tells if the repair of an object that is not right has to wait; what is no repair does not.
    pub(super) fn waits(&mut self, key: &ObjectKey, is_repair: bool, now: Moment) -> bool {
        let Some(entry) = self.entries.get_mut(key) else {
            return false;
        };
        if !entry.is_undone {
            entry.owed = entry.owes(now);
            entry.is_undone = true;
        }
        if entry.owed.is_zero() {
            self.entries.remove(key);
            return false;
        }
        entry.waits = is_repair && entry.level > 0 && now < entry.until;
        entry.waits
    }

    /// An object was repaired at a cost, in whose place a route of somebody's stood. Answers whether it
    /// is fought for from now on.
    pub(super) fn repaired(
        &mut self,
        object: &Object,
        peer: Option<&LeaseKey>,
        by: Option<RouteProtocol>,
        cost: Duration,
        now: Moment,
        rng: &mut Rng,
    ) -> bool {
        let entry = self.entries.entry(object.key()).or_insert_with(|| Entry {
            object: object.clone(),
            peer: peer.cloned(),
            times: 0,
            since: now,
            by: None,
            until: now,
            right: now,
            is_undone: true,
            waits: false,
            owed: Duration::ZERO,
            level: 0,
        });
        entry.owed = (entry.owes(now) + cost).min(MOST);
        entry.object = object.clone();
        entry.peer = peer.cloned();
        entry.by = by.or(entry.by);
        entry.times += 1;
        entry.right = now;
        (entry.is_undone, entry.waits) = (false, false);
        if entry.owed == MOST {
            entry.level = entry.level.saturating_add(1);
            entry.until = now + self.waits.after(entry.level, rng);
        }
        entry.owed == MOST && entry.level == 1
    }

    /// An object is right again, and that does not count.
    pub(super) fn restored(&mut self, key: &ObjectKey, now: Moment) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.became_right(now);
        }
    }

    /// Takes the keys without a step, of all or of those that were planned, to be right, unless
    /// somebody else's object is in their place.
    pub(super) fn planned(
        &mut self,
        planned: Option<&BTreeSet<ObjectKey>>,
        steps: &BTreeSet<ObjectKey>,
        is_blocked: impl Fn(&ObjectKey) -> bool,
        now: Moment,
    ) {
        let settle = |key: &ObjectKey, entry: &mut Entry| {
            entry.waits = false;
            if !is_blocked(key) {
                entry.became_right(now);
            }
        };
        match planned {
            None => {
                let entries = self.entries.iter_mut();
                let others = entries.filter(|(key, _)| !steps.contains(key));
                others.for_each(|(key, entry)| settle(key, entry));
            }
            Some(_) if self.entries.is_empty() => {}
            Some(planned) => {
                for key in planned.difference(steps) {
                    if let Some(entry) = self.entries.get_mut(key) {
                        settle(key, entry);
                    }
                }
            }
        }
    }

    /// Forgets what has been left alone for long enough.
    pub(super) fn pass(&mut self, now: Moment) {
        self.entries.retain(|_, entry| !entry.owes(now).is_zero());
    }

    /// When the first repair that waits may be made.
    pub(super) fn next(&self) -> Option<Moment> {
        let waiting = self.entries.values().filter(|entry| entry.waits);
        waiting.map(|entry| entry.until).min()
    }

    /// When there is something to do, or to tell.
    pub(super) fn wake(&self, now: Moment) -> Option<Moment> {
        let calm = self.contended(now).filter(|entry| !entry.is_undone);
        let calm = calm.flat_map(|entry| [entry.right + CALM, entry.right + entry.owed]);
        calm.filter(|at| *at > now).chain(self.next()).min()
    }

    /// The objects that are fought for, or were a short while ago.
    pub(super) fn contended(&self, now: Moment) -> impl Iterator<Item = &Entry> {
        let entries = self.entries.values();
        entries.filter(move |entry| entry.level > 0 && !entry.owes(now).is_zero())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl Entry {
    /// The time owed now: less and less while it is right.
    fn owes(&self, now: Moment) -> Duration {
        match self.is_undone {
            true => self.owed,
            false => self.owed.saturating_sub(now.since(self.right)),
        }
    }

    fn became_right(&mut self, now: Moment) {
        if self.is_undone {
            (self.is_undone, self.waits) = (false, false);
            self.right = now;
        }
    }

    /// Tells if it is not right, or may not be for long.
    pub(crate) fn is_unsafe(&self, now: Moment) -> bool {
        self.is_undone || now.since(self.right) < CALM
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            object,
            times,
            by,
            since,
            right,
            until,
            ..
        } = self;
        let span = right.since(*since).as_secs_f64();
        write!(f, "{object} was undone {times} times in {span:.1} s")?;
        match by {
            Some(by) => write!(f, ", by a program that makes routes of protocol {}", by.0)?,
            None => f.write_str(", by whom the kernel does not tell")?,
        }
        let wait = until.since(*right).as_secs_f64();
        write!(
            f,
            "; its repair waits for {wait:.1} s now: stop that program"
        )
    }
}

#[cfg(test)]
mod tests;
