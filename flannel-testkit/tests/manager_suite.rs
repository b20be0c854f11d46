//! The manager suite finds what it is for: a sound manager passes it however short its leases live,
//! each broken promise is told as that promise, and what cannot be tried is told too.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::manager::{Error, Result};
use flannel_core::{
    Capabilities, DualStack, Event, EventStream, Lease, LeaseRequest, Manager, MemoryManager,
    NetworkConfig, NodeId, Revision, Subnet,
};
use flannel_testkit::conformance::manager::{
    self, ManagerFixture, PROMISES, Report, StoreFixture, Verdict,
};
use futures_core::Stream;

/// One thing that is wrong with a manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    /// Watches say nothing at all.
    SilentWatch,
    /// Watches begin with a record.
    PutFirst,
    HidesPuts,
    HidesDeletes,
    HidesConfigs,
    RevisionsGoBack,
    IgnoresPrevious,
    KeepsReleased,
    ReleasesAnything,
    RevivesLost,
    KeepsAttributes,
    ShowsNoData,
}

/// Stores in memory, whose managers have a flaw, and answer only after a time.
struct Fixture {
    flaw: Flaw,
    ttl: Duration,
    latency: Duration,
}

impl Fixture {
    const fn quick(flaw: Flaw) -> Self {
        Self {
            flaw,
            ttl: Duration::from_secs(24 * 3600),
            latency: Duration::ZERO,
        }
    }
}

#[async_trait]
impl ManagerFixture for Fixture {
    async fn store(&self, config: NetworkConfig) -> Box<dyn StoreFixture> {
        Box::new(Store(Flawed {
            memory: MemoryManager::new(config).with_ttl(self.ttl),
            flaw: self.flaw,
            latency: self.latency,
            busy: Arc::default(),
        }))
    }
}

struct Store(Flawed);

#[async_trait]
impl StoreFixture for Store {
    async fn manager(&self) -> Arc<dyn Manager> {
        Arc::new(self.0.clone())
    }

    async fn advance(&self, time: Duration) -> bool {
        tokio::time::advance(time).await;
        true
    }

    async fn set_config(&self, config: NetworkConfig) -> bool {
        self.0.memory.set_config(config);
        true
    }

    async fn reserve(&self, node: &NodeId, subnets: DualStack<Subnet>) -> bool {
        self.0.memory.reserve(node, subnets).is_ok()
    }
}

#[derive(Debug, Clone)]
struct Flawed {
    memory: MemoryManager,
    flaw: Flaw,
    latency: Duration,
    /// Nodes are given their leases one after the other.
    busy: Arc<tokio::sync::Mutex<()>>,
}

impl Flawed {
    async fn work(&self) {
        if !self.latency.is_zero() {
            tokio::time::sleep(self.latency).await;
        }
    }
}

#[async_trait]
impl Manager for Flawed {
    fn name(&self) -> &'static str {
        "flawed"
    }

    fn capabilities(&self) -> Capabilities {
        self.memory.capabilities()
    }

    async fn network_config(&self) -> Result<NetworkConfig> {
        self.memory.network_config().await
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease> {
        let _turn = self.busy.lock().await;
        self.work().await;
        let mut request = request.clone();
        if self.flaw == Flaw::IgnoresPrevious {
            request.previous = DualStack::default();
        }
        self.memory.acquire_lease(&request).await
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease> {
        self.work().await;
        if self.flaw == Flaw::KeepsAttributes {
            let mut old = self.memory.renew_lease(lease).await?;
            old.attrs = Default::default();
            return self.memory.renew_lease(&old).await;
        }
        match self.memory.renew_lease(lease).await {
            Err(Error::LeaseLost { .. }) if self.flaw == Flaw::RevivesLost => Ok(lease.clone()),
            other => other,
        }
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        self.work().await;
        match self.flaw {
            Flaw::KeepsReleased => Ok(()),
            Flaw::ReleasesAnything => {
                self.memory.release_lease(lease).await.ok();
                Ok(())
            }
            _ => self.memory.release_lease(lease).await,
        }
    }

    fn watch_leases(&self) -> EventStream {
        Box::pin(Watch {
            stream: self.memory.watch_leases(),
            flaw: self.flaw,
            begun: false,
        })
    }
}

struct Watch {
    stream: EventStream,
    flaw: Flaw,
    begun: bool,
}

impl Watch {
    /// The event that comes through; none if it is hidden.
    fn spoil(&mut self, event: Event) -> Option<Event> {
        match (self.flaw, event) {
            (Flaw::HidesPuts, Event::Put(_))
            | (Flaw::HidesDeletes, Event::Delete { .. })
            | (Flaw::HidesConfigs, Event::Config(_)) => None,
            (Flaw::RevisionsGoBack, Event::Put(mut lease)) => {
                lease.revision = Revision(0);
                Some(Event::Put(lease))
            }
            (Flaw::ShowsNoData, Event::Snapshot(mut snapshot)) => {
                for lease in &mut snapshot.leases {
                    lease.attrs.backend_data = DualStack::default();
                }
                Some(Event::Snapshot(snapshot))
            }
            (Flaw::PutFirst, Event::Snapshot(snapshot)) if !self.begun => {
                self.begun = true;
                Some(Event::Delete {
                    key: flannel_core::LeaseKey::new("early"),
                    revision: snapshot.revision,
                })
            }
            (_, event) => Some(event),
        }
    }
}

impl Stream for Watch {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.flaw == Flaw::SilentWatch {
            return Poll::Pending;
        }
        loop {
            match self.stream.as_mut().poll_next(cx) {
                Poll::Ready(Some(Ok(event))) => {
                    if let Some(event) = self.spoil(event) {
                        return Poll::Ready(Some(Ok(event)));
                    }
                }
                other => return other,
            }
        }
    }
}

fn broken(reports: &[Report]) -> Vec<&'static str> {
    let broken = reports.iter().filter(|report| report.outcome.is_err());
    broken.map(|report| report.name).collect()
}

fn outcome<'a>(reports: &'a [Report], name: &str) -> &'a manager::Outcome {
    let report = reports.iter().find(|report| report.name == name);
    &report.expect("there is such a promise").outcome
}

#[tokio::test(start_paused = true)]
async fn a_sound_manager_breaks_nothing_and_what_was_not_tried_is_counted() {
    let reports = manager::all(&Fixture::quick(Flaw::None)).await;
    assert_eq!(broken(&reports), Vec::<&str>::new());
    let skipped = reports.iter().filter(
        |report| matches!(report.outcome, Ok(Verdict::Skipped(reason)) if !reason.is_empty()),
    );
    let skipped = skipped.count();
    assert!((1..10).contains(&skipped), "{skipped} are skipped");
    let kept = PROMISES.len() - skipped;
    assert_eq!(
        manager::summary(&reports),
        format!("{kept} promises kept, {skipped} skipped, 0 broken")
    );
}

#[tokio::test(start_paused = true)]
async fn every_flaw_breaks_its_promise_however_short_the_leases_live() {
    for ttl in [24 * 3600, 10, 2] {
        for (flaw, promise) in [
            (Flaw::HidesPuts, "watch_delivers_puts_and_deletes"),
            (Flaw::HidesDeletes, "watch_delivers_puts_and_deletes"),
            (Flaw::HidesDeletes, "expiry_is_delivered"),
            (Flaw::HidesConfigs, "config_change_is_delivered"),
            (Flaw::RevisionsGoBack, "revisions_never_go_back"),
            (Flaw::IgnoresPrevious, "previous_subnet_is_honoured"),
            (Flaw::KeepsReleased, "release_frees_the_subnet"),
            (
                Flaw::ReleasesAnything,
                "release_of_anothers_lease_changes_nothing",
            ),
            (Flaw::RevivesLost, "renewal_never_revives_a_lost_lease"),
            (Flaw::KeepsAttributes, "renew_publishes_attributes"),
            (Flaw::ShowsNoData, "watch_starts_with_a_snapshot"),
        ] {
            let fixture = Fixture {
                ttl: Duration::from_secs(ttl),
                ..Fixture::quick(flaw)
            };
            let promise = PROMISES.iter().find(|known| known.name == promise);
            let promise = promise.expect("there is such a promise");
            let outcome = promise.check(&fixture).await;
            assert!(
                outcome.is_err(),
                "{flaw:?} with leases of {ttl} s: {} is {outcome:?}",
                promise.name
            );
        }
    }
}

/// A right manager, whose leases live for a short time on a slow store.
const fn slow(ttl: Duration, latency: Duration) -> Fixture {
    Fixture {
        flaw: Flaw::None,
        ttl,
        latency,
    }
}

#[tokio::test(start_paused = true)]
async fn a_right_manager_is_not_accused_however_short_its_leases_live() {
    for (ttl, latency) in [(3000, 100), (1000, 300), (100, 30), (10, 20)] {
        let [ttl, latency] = [ttl, latency].map(Duration::from_millis);
        let reports = manager::all(&slow(ttl, latency)).await;
        let broken: Vec<String> = reports
            .iter()
            .filter(|report| report.outcome.is_err())
            .map(ToString::to_string)
            .collect();
        assert!(
            broken.is_empty(),
            "leases of {ttl:?}:\n{}",
            broken.join("\n")
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_crowd_that_comes_for_longer_than_a_lease_lives_renews_and_is_judged() {
    // 64 nodes take more than six seconds.
    let fixture = slow(Duration::from_secs(3), Duration::from_millis(100));
    let reports = manager::all(&fixture).await;
    for name in [
        "no_two_nodes_share_a_subnet",
        "pool_is_used_to_the_last_subnet",
        "a_dropped_acquire_is_safe_to_repeat",
    ] {
        assert_eq!(*outcome(&reports, name), Ok(Verdict::Kept), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn leases_that_end_within_a_trial_make_a_skip_that_says_so() {
    let fixture = Fixture {
        ttl: Duration::from_secs(1),
        latency: Duration::from_millis(300),
        ..Fixture::quick(Flaw::None)
    };
    let reports = manager::all(&fixture).await;
    let outcome = outcome(&reports, "watch_starts_with_a_snapshot");
    assert!(
        matches!(outcome, Ok(Verdict::Skipped(reason)) if reason.contains("live longer")),
        "{outcome:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_missing_first_snapshot_is_one_failure_that_says_so() {
    for (flaw, reason) in [
        (Flaw::SilentWatch, "no event arrives within 30s"),
        (Flaw::PutFirst, "a delete comes before the first snapshot"),
    ] {
        let reports = manager::all(&Fixture::quick(flaw)).await;
        let broken: Vec<String> = reports
            .iter()
            .filter(|report| report.outcome.is_err())
            .map(ToString::to_string)
            .collect();
        let line = format!(
            "BROKEN   watch_starts_with_a_snapshot: a watch does not begin with a snapshot: {reason}"
        );
        assert_eq!(broken, [line]);
        let pointed = reports.iter().filter(|report| {
            matches!(report.outcome, Ok(Verdict::Skipped(reason))
                if reason.contains("see watch_starts_with_a_snapshot"))
        });
        assert!(pointed.count() > 15, "{}", manager::summary(&reports));
        // Tried alone, as the tests that the macro makes are, it is no failure either.
        let alone = PROMISES.iter().find(|p| p.name == "release_is_idempotent");
        let outcome = alone.expect("a promise").check(&Fixture::quick(flaw)).await;
        assert!(matches!(outcome, Ok(Verdict::Skipped(_))), "{outcome:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_shown_otherwise_is_told_by_the_field() {
    let reports = manager::all(&Fixture::quick(Flaw::ShowsNoData)).await;
    let outcome = outcome(&reports, "watch_starts_with_a_snapshot");
    let Err(violation) = outcome else {
        panic!("{outcome:?}");
    };
    let said = violation.to_string();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 2, "{said}");
    let field = "  attrs.backend_data.v4: found None, wanted ";
    assert!(lines[1].starts_with(field), "{said}");
}
