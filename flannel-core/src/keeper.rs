//! The lease keeper: when to renew, and when a lease is lost. A pure machine: it is told the time
//! and what happened, and says what to do.

use std::time::Duration;

use crate::backoff::Backoff;
use crate::clock::{Moment, Rng};
use crate::lease::Lease;

/// What to do when the lease is lost: deleted, expired, or taken by another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LossPolicy {
    /// Ask for a lease again, wanting the same subnet. If another is given, the node moves to it.
    #[default]
    Reacquire,
    /// Leave everything as it is and report it; the host program decides
    /// ([`Overlay::reacquire`](crate::Overlay::reacquire)). Peers drop a node without a record.
    Hold,
    /// Stop the overlay; packets keep flowing as far as the kernel knows the way.
    Stop,
}

/// When the keeper renews. Begin with the default and set what is to differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeeperOptions {
    /// How long before its end a lease is renewed; of a lease shorter than twice this, half its
    /// length. Default: one hour, as flannel does with its leases of 24 hours.
    pub margin: Duration,
    /// The wait after a failed renewal or acquisition.
    pub retry: Backoff,
}

impl Default for KeeperOptions {
    fn default() -> Self {
        Self {
            margin: Duration::from_secs(3600),
            retry: Backoff::new(Duration::from_millis(250), Duration::from_secs(60)),
        }
    }
}

/// What the keeper wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Nothing before this moment; nothing at all if `None`.
    Wait(Option<Moment>),
    /// Renew the lease now.
    Renew,
    /// The lease is over: whatever the store may say later, it must not be used as held.
    Expired,
}

/// Keeps one lease.
#[derive(Debug, Clone)]
pub struct Keeper {
    options: KeeperOptions,
    /// When the lease is over; `None` if the store never drops it.
    deadline: Option<Moment>,
    /// When the next renewal is due; `None` if none is needed.
    due: Option<Moment>,
    failures: u32,
}

impl Keeper {
    /// A keeper of a lease that was asked for (or renewed) at `asked`: before the request went
    /// out, so that its time is never overestimated.
    pub fn new(options: KeeperOptions, lease: &Lease, asked: Moment) -> Self {
        let deadline = lease.ttl.map(|ttl| asked + ttl);
        let due = lease
            .ttl
            .map(|ttl| asked + (ttl - options.margin.min(ttl / 2)));
        Self {
            options,
            deadline,
            due,
            failures: 0,
        }
    }

    /// When the lease is over.
    pub const fn deadline(&self) -> Option<Moment> {
        self.deadline
    }

    /// How many renewals have failed in a row.
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// What to do now.
    pub fn wish(&self, now: Moment) -> Wish {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            return Wish::Expired;
        }
        match self.due {
            Some(due) if now >= due => Wish::Renew,
            Some(due) => Wish::Wait(Some(due)),
            None => Wish::Wait(self.deadline),
        }
    }

    /// The attributes changed: they are to be published at once.
    pub fn publish(&mut self, now: Moment) {
        if self.failures == 0 {
            self.due = Some(now);
        }
    }

    /// A renewal failed for a reason that may pass.
    pub fn failed(&mut self, now: Moment, rng: &mut Rng) {
        self.failures = self.failures.saturating_add(1);
        let retry = now + self.options.retry.after(self.failures, rng);
        // The last try must come before the end, not behind it.
        let last = self
            .deadline
            .map(|deadline| deadline - Duration::from_millis(1));
        self.due = Some(last.map_or(retry, |last| retry.min(last.max(now))));
    }
}
