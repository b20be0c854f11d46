//! What every [`Manager`] promises, as tests that any implementation can run.
//!
//! Bring a [`ManagerFixture`] that makes fresh stores, then either show what holds, one line per
//! promise:
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use flannel_core::{Manager, MemoryManager, NetworkConfig};
//! use flannel_testkit::conformance::manager::{self, ManagerFixture, StoreFixture};
//!
//! struct Fixture;
//!
//! #[async_trait::async_trait]
//! impl ManagerFixture for Fixture {
//!     async fn store(&self, config: NetworkConfig) -> Box<dyn StoreFixture> {
//!         Box::new(Store(MemoryManager::new(config)))
//!     }
//! }
//!
//! struct Store(MemoryManager);
//!
//! #[async_trait::async_trait]
//! impl StoreFixture for Store {
//!     async fn manager(&self) -> Arc<dyn Manager> {
//!         Arc::new(self.0.clone())
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! for report in manager::all(&Fixture).await {
//!     println!("{report}");
//! }
//! # }
//! ```
//!
//! or get one `#[test]` per promise with `manager_conformance!(Fixture, runtime())`, where the
//! second is a tokio runtime.
//!
//! The manager's own [`Capabilities`](flannel_core::Capabilities) and the fixture's hooks decide
//! which promises can be tried; the others are reported as skipped, with the reason, and counted.
//!
//! # Leases that live for a short time
//!
//! Trials of many nodes renew their leases. One that none the less takes longer than a lease that
//! it relies on is not judged by what it finds: the promise is reported as skipped, and wants a
//! faster store or a longer time to live.

mod leases;
mod machines;
mod timers;
mod tools;
mod trial;
mod watch;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::{DualStack, Lease, LeaseKey, Manager, NetworkConfig, NodeId, Subnet};

pub use timers::assert_timers_are_asked_for;

use leases::*;
use machines::*;
use trial::Observed;
use watch::*;

/// Makes stores for the suite: one per promise.
#[async_trait]
pub trait ManagerFixture: Send + Sync {
    /// A new store without leases that holds this network config.
    async fn store(&self, config: NetworkConfig) -> Box<dyn StoreFixture>;
}

/// One store under test, and what a test does to it beside using it.
///
/// A hook that says `false` is not supported by the fixture; promises that need it are skipped.
#[async_trait]
pub trait StoreFixture: Send + Sync {
    /// A handle onto the store, as another process would have its own.
    async fn manager(&self) -> Arc<dyn Manager>;

    /// Prepares the store for a node, where it must know its nodes (Kubernetes).
    async fn add_node(&self, node: &NodeId) {
        let _ = node;
    }

    /// Lets this much time pass for the leases: up to three times to live in one trial, so those of
    /// a store that has to be waited for should be short, some seconds.
    async fn advance(&self, time: Duration) -> bool {
        let _ = time;
        false
    }

    /// Writes the network config.
    async fn set_config(&self, config: NetworkConfig) -> bool {
        let _ = config;
        false
    }

    /// Writes a record of a node that asks nobody: as a faulty or foreign program would.
    async fn write_raw(&self, lease: Lease) -> bool {
        let _ = lease;
        false
    }

    /// Overwrites a record with something that cannot be read.
    async fn spoil(&self, key: &LeaseKey) -> bool {
        let _ = key;
        false
    }

    /// Breaks every watch that is open, so that what is written before they are open again is
    /// missed by them.
    async fn interrupt_watches(&self) -> bool {
        false
    }

    /// Reserves subnets for a node.
    async fn reserve(&self, node: &NodeId, subnets: DualStack<Subnet>) -> bool {
        let _ = (node, subnets);
        false
    }
}

/// How the trial of a promise ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The manager does as promised.
    Kept,
    /// The manager or its fixture has no means for it.
    Skipped(&'static str),
}

/// How a promise was broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Violation(pub String);

/// The result of a promise's trial.
pub type Outcome = Result<Verdict, Violation>;

type Trial<'a> = Pin<Box<dyn Future<Output = Outcome> + Send + 'a>>;

/// One promise that a manager makes.
#[derive(Debug, Clone, Copy)]
pub struct Promise {
    /// What is promised, as the documentation of [`Manager`] names it.
    pub name: &'static str,
    run: for<'a> fn(&'a dyn ManagerFixture) -> Trial<'a>,
}

impl Promise {
    /// The longest that one promise may take to try, beside the time that the trial lets pass.
    const DEADLINE: Duration = Duration::from_secs(120);

    /// Tries the promise on a fresh store.
    ///
    /// # Errors
    /// The [`Violation`] that was found.
    pub async fn check(&self, fixture: &dyn ManagerFixture) -> Outcome {
        self.check_where(fixture, None).await
    }

    /// Tries it, where it may be known already whether a watch begins with a snapshot.
    async fn check_where(&self, fixture: &dyn ManagerFixture, begins: Option<bool>) -> Outcome {
        let is_first = self.name == THE_FIRST_SNAPSHOT;
        let observed = Observed::new(fixture, begins == Some(false) && !is_first);
        let outcome = self.in_time(&observed).await;
        if outcome.is_ok() {
            return outcome;
        }
        if observed.no_watch_began() && !is_first {
            let begins = match begins {
                Some(begins) => begins,
                None => tools::begins(fixture).await,
            };
            if !begins {
                return Ok(Verdict::Skipped(NO_SNAPSHOT));
            }
        }
        if observed.outlived_its_leases() {
            return Ok(Verdict::Skipped(OUTLIVED));
        }
        outcome
    }

    async fn in_time(&self, observed: &Observed<'_>) -> Outcome {
        let mut trial = (self.run)(observed);
        let begun = tokio::time::Instant::now();
        loop {
            let deadline = Self::DEADLINE + observed.advanced();
            if let Ok(outcome) = tokio::time::timeout_at(begun + deadline, &mut trial).await {
                return outcome;
            }
            if begun.elapsed() >= Self::DEADLINE + observed.advanced() {
                let deadline = Self::DEADLINE;
                let reason = format!("no end within {deadline:?}: a call hangs");
                return Err(Violation(reason));
            }
        }
    }
}

/// The promise that everything which is looked at through a watch builds on.
const THE_FIRST_SNAPSHOT: &str = "watch_starts_with_a_snapshot";

/// The reason of all promises but that one, where it is broken.
const NO_SNAPSHOT: &str = "a watch of an empty store begins with no snapshot, and this is looked \
                           at through one: see watch_starts_with_a_snapshot";

/// The reason where a trial cannot judge.
const OUTLIVED: &str = "it takes longer than a lease lives that it relies on: the stores under \
                        test have to be faster, or their leases to live longer";

/// A promise and what came of it; shown as one line.
#[derive(Debug, Clone)]
pub struct Report {
    /// The promise.
    pub name: &'static str,
    /// What came of it.
    pub outcome: Outcome,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            Ok(Verdict::Kept) => write!(f, "kept     {}", self.name),
            Ok(Verdict::Skipped(reason)) => write!(f, "skipped  {}: {reason}", self.name),
            Err(violation) => write!(f, "BROKEN   {}: {violation}", self.name),
        }
    }
}

/// Tries every promise, each on a store of its own.
pub async fn all(fixture: &dyn ManagerFixture) -> Vec<Report> {
    let begins = Some(tools::begins(fixture).await);
    let mut reports = Vec::new();
    for promise in PROMISES {
        let outcome = promise.check_where(fixture, begins).await;
        let name = promise.name;
        reports.push(Report { name, outcome });
    }
    reports
}

/// The numbers of promises that are kept, skipped and broken, as one line.
pub fn summary(reports: &[Report]) -> String {
    let (mut kept, mut skipped, mut broken) = (0, 0, 0);
    for report in reports {
        match &report.outcome {
            Ok(Verdict::Kept) => kept += 1,
            Ok(Verdict::Skipped(_)) => skipped += 1,
            Err(_) => broken += 1,
        }
    }
    format!("{kept} promises kept, {skipped} skipped, {broken} broken")
}

/// Tries one promise and panics if it is broken: the body of the tests that
/// [`manager_conformance!`](crate::manager_conformance) makes. A promise that cannot be tried is
/// [skipped](crate::skip), which is shown and counted.
///
/// # Panics
/// If the promise is broken, or there is none of this name.
pub async fn assert_kept(name: &str, fixture: &dyn ManagerFixture) {
    let Some(promise) = PROMISES.iter().find(|promise| promise.name == name) else {
        panic!("there is no promise {name}");
    };
    match promise.check(fixture).await {
        Ok(Verdict::Kept) => {}
        Ok(Verdict::Skipped(reason)) => {
            // The test's own name, which says of which manager.
            let test = std::thread::current();
            crate::skip(test.name().unwrap_or(name), reason);
        }
        Err(violation) => panic!("{violation}"),
    }
}

/// The list of promises, and the macro that makes a test of each.
macro_rules! promises {
    ($d:tt $($name:ident)+) => {
        /// Every promise, in the order of the documentation of [`Manager`].
        pub const PROMISES: &[Promise] = &[$(Promise {
            name: stringify!($name),
            run: |fixture| Box::pin($name(fixture)),
        }),+];

        /// Makes one `#[test]` per promise of a manager: of a fixture, and of a tokio runtime to
        /// run each in.
        #[macro_export]
        macro_rules! manager_conformance {
            ($d fixture:expr, $d runtime:expr) => {
                $(#[test]
                fn $name() {
                    let fixture = $d fixture;
                    let trial = $d crate::conformance::manager::assert_kept(
                        stringify!($name),
                        &fixture,
                    );
                    $d runtime.block_on(trial);
                })+
            };
        }
    };
}

promises! { $
    acquire_is_idempotent_per_node
    a_dropped_acquire_is_safe_to_repeat
    a_lease_that_no_longer_fits_is_replaced
    no_two_nodes_share_a_subnet
    pool_is_used_to_the_last_subnet
    records_of_any_length_are_respected
    what_no_peer_accepts_is_in_nobodys_way
    previous_subnet_is_honoured
    taken_previous_subnet_is_not_given
    reserved_subnet_is_kept
    renew_publishes_attributes
    renewal_extends_the_lease
    renewal_never_revives_a_lost_lease
    stale_renewal_is_refused
    a_record_that_another_wrote_is_lost
    release_frees_the_subnet
    release_is_idempotent
    release_of_anothers_lease_changes_nothing
    a_node_id_in_use_is_refused
    a_node_id_is_taken_over_on_request
    the_same_machine_keeps_its_lease
    a_renamed_machine_keeps_its_subnet
    a_copy_of_a_living_node_takes_nothing
    both_families_or_none
    watch_starts_with_a_snapshot
    a_gap_is_followed_by_a_snapshot
    watch_delivers_puts_and_deletes
    expiry_is_delivered
    every_field_change_is_delivered
    an_unreadable_record_hides_nobody
    revisions_never_go_back
    watchers_are_independent
    config_change_is_delivered
}
