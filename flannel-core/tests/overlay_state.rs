//! The whole SDK on fakes, with a place for the saved state that fails: tokio's clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use common::*;
use flannel_core::{
    Condition, ConditionStatus, ConditionType, MemoryManager, Overlay, SavedState, StateStore,
};
use flannel_testkit::fake_kernel::FakeKernel;
use tokio::time::Instant;

const MINUTE: Duration = Duration::from_secs(60);

/// A place that answers as it is told to.
#[derive(Debug, Clone, Default)]
struct Place(Arc<Mutex<Inside>>);

#[derive(Debug, Default)]
struct Inside {
    saved: Option<SavedState>,
    is_torn: bool,
    kept: bool,
    /// The number of calls that are still to fail, or to hang.
    save_fails: usize,
    keep_fails: usize,
    hangs: bool,
    tries: Vec<Instant>,
}

impl Place {
    fn with<T>(&self, f: impl FnOnce(&mut Inside) -> T) -> T {
        f(&mut self.0.lock().expect("no panic inside"))
    }

    async fn answer(&self) {
        if self.with(|inside| inside.hangs) {
            std::future::pending::<()>().await;
        }
    }
}

fn fault(left: &mut usize) -> io::Result<()> {
    match left.checked_sub(1) {
        Some(rest) => {
            *left = rest;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        }
        None => Ok(()),
    }
}

#[async_trait]
impl StateStore for Place {
    async fn load(&self) -> io::Result<Option<SavedState>> {
        self.answer().await;
        self.with(|inside| match inside.is_torn {
            true => Err(io::Error::from(io::ErrorKind::InvalidData)),
            false => Ok(inside.saved.clone()),
        })
    }

    async fn keep_aside(&self) -> io::Result<Option<String>> {
        self.answer().await;
        self.with(|inside| {
            fault(&mut inside.keep_fails)?;
            inside.kept = true;
            Ok(Some("the attic".to_owned()))
        })
    }

    async fn save(&self, state: &SavedState) -> io::Result<()> {
        self.with(|inside| inside.tries.push(Instant::now()));
        self.answer().await;
        self.with(|inside| {
            assert!(
                inside.kept || !inside.is_torn,
                "what is torn is not kept yet"
            );
            fault(&mut inside.save_fails)?;
            inside.saved = Some(state.clone());
            Ok(())
        })
    }
}

fn told(overlay: &Overlay) -> Condition {
    let status = overlay.status();
    let condition = status.condition(ConditionType::State);
    condition.expect("there is one of each").clone()
}

async fn node(place: &Place) -> (MemoryManager, Overlay) {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let overlay = builder("a", &manager, &kernel).state(place.clone());
    let overlay = overlay.start().await.expect("all parts");
    (manager, overlay)
}

#[tokio::test(start_paused = true)]
async fn a_state_that_is_not_saved_is_told_of_and_saved_again_until_it_is() {
    let place = Place::default();
    place.with(|inside| inside.save_fails = 12);
    let (_manager, overlay) = node(&place).await;
    ready_within(MINUTE, &overlay).await;
    let condition = told(&overlay);
    assert_eq!(condition.status, ConditionStatus::False);
    assert_eq!(condition.reason, "NotSaved");
    assert!(!condition.permanent, "room on the disk helps");
    assert!(overlay.status().working, "the overlay works without");
    let saved = overlay.wait_for(|status| status.is_true(ConditionType::State));
    tokio::time::timeout(MINUTE * 12, saved)
        .await
        .expect("it is tried again")
        .expect("running");
    let (saved, tries) = place.with(|inside| (inside.saved.clone(), inside.tries.clone()));
    assert!(saved.expect("saved").lease.is_some(), "the latest state");
    assert_eq!(tries.len(), 13, "nothing but back-off tries again");
    let waits: Vec<_> = tries.windows(2).map(|w| w[1] - w[0]).collect();
    assert!(
        waits.iter().all(|wait| *wait >= Duration::from_millis(500)),
        "{waits:?}"
    );
    assert!(
        waits
            .iter()
            .all(|wait| *wait <= MINUTE + Duration::from_secs(1)),
        "{waits:?}"
    );
    assert!(
        waits.last().is_some_and(|wait| *wait >= MINUTE / 2),
        "{waits:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_place_that_never_answers_delays_start_and_stop_but_ends_neither() {
    let place = Place::default();
    place.with(|inside| inside.hangs = true);
    let (_manager, overlay) = node(&place).await;
    ready_within(MINUTE, &overlay).await;
    assert_eq!(told(&overlay).reason, "NotKept");
    let before = Instant::now();
    overlay.resync().await.expect("running");
    assert!(
        before.elapsed() < Duration::from_secs(1),
        "nobody waits for it"
    );
    let stop = tokio::time::timeout(MINUTE, overlay.stop()).await;
    stop.expect("in time").expect("running");
}

#[tokio::test(start_paused = true)]
async fn a_save_without_an_answer_is_a_failed_one() {
    let place = Place::default();
    let (_manager, overlay) = node(&place).await;
    ready_within(MINUTE, &overlay).await;
    assert_eq!(told(&overlay).reason, "Saved");
    place.with(|inside| inside.hangs = true);
    overlay.release().await.expect("released");
    overlay.reacquire().await.expect("running");
    let late = |status: &flannel_core::Status| {
        let condition = status.condition(ConditionType::State);
        condition.is_some_and(|condition| condition.reason == "NoAnswer")
    };
    let told_of = tokio::time::timeout(MINUTE, overlay.wait_for(late)).await;
    told_of.expect("it is told").expect("running");
    place.with(|inside| inside.hangs = false);
    let saved = overlay.wait_for(|status| status.is_true(ConditionType::State));
    let saved = tokio::time::timeout(MINUTE * 2, saved).await;
    saved.expect("it is tried again").expect("running");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_saved_over_what_is_not_kept_aside() {
    let place = Place::default();
    place.with(|inside| {
        inside.is_torn = true;
        inside.keep_fails = 3;
    });
    let (_manager, overlay) = node(&place).await;
    ready_within(MINUTE, &overlay).await;
    assert_eq!(told(&overlay).reason, "NotKept");
    assert_eq!(place.with(|inside| inside.saved.clone()), None);
    let saved = overlay.wait_for(|status| status.is_true(ConditionType::State));
    let saved = tokio::time::timeout(MINUTE * 2, saved).await;
    saved.expect("it is tried again").expect("running");
    let note = overlay.status().notes.clone();
    let note = note.iter().find(|note| note.topic == "saved-state");
    let text = &note.expect("it is told").text;
    assert!(text.contains("kept as the attic"), "{text}");
    assert!(place.with(|inside| inside.saved.is_some() && inside.kept));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_saved_is_saved_at_the_stop_if_that_works_then() {
    let place = Place::default();
    place.with(|inside| inside.save_fails = usize::MAX);
    let (_manager, overlay) = node(&place).await;
    ready_within(MINUTE, &overlay).await;
    place.with(|inside| inside.save_fails = 0);
    overlay.stop().await.expect("running");
    let saved = place.with(|inside| inside.saved.clone());
    assert!(saved.is_some_and(|saved| saved.lease.is_some()));
}

#[tokio::test(start_paused = true)]
async fn a_restart_with_nothing_new_is_saved_and_one_without_a_place_says_so() {
    let place = Place::default();
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    for _ in 0..2 {
        let overlay = builder("a", &manager, &kernel).state(place.clone());
        let overlay = overlay.start().await.expect("all parts");
        ready_within(MINUTE, &overlay).await;
        assert_eq!(told(&overlay).reason, "Saved");
        overlay.stop().await.expect("running");
    }
    let overlay = start("a", &manager, &kernel).await;
    let condition = told(&overlay);
    assert_eq!(condition.reason, "NoPlace");
    assert_eq!(condition.status, ConditionStatus::True);
}
