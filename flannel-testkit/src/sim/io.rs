//! The border of a simulated process: everything that it does outside of itself passes here, so
//! that it can be frozen and can die between any two such things.

use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::action::CrashPoint;

/// The border of one life of a process.
#[derive(Debug)]
pub(super) struct Io {
    state: Mutex<State>,
    changed: Notify,
    /// Told when the process has died at its crash point.
    died: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    frozen: bool,
    crash: Option<CrashPoint>,
    died_of: Option<CrashPoint>,
    dead: bool,
    calls: u64,
    /// How many more calls it may make before somebody looks again.
    allowed: u64,
    /// It waits for an answer.
    busy: u32,
}

/// How many calls a process may make between two looks at it. One that makes more runs in circles,
/// perhaps without any time passing, so that nobody would ever look again: it is stopped.
const ALLOWED: u64 = 2_000;

/// What becomes of a batch.
pub(super) enum Batch {
    /// It is made whole.
    Whole,
    /// So many ops of it are made; then the process is dead.
    Cut(usize),
}

impl Io {
    pub(super) fn new(frozen: bool, died: Arc<Notify>) -> Self {
        Self {
            state: Mutex::new(State {
                frozen,
                allowed: ALLOWED,
                ..State::default()
            }),
            changed: Notify::new(),
            died,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Freezes the process, or lets it go on.
    pub(super) fn freeze(&self, frozen: bool) {
        self.state().frozen = frozen;
        self.changed.notify_waiters();
    }

    /// Sets when the process dies.
    pub(super) fn crash_at(&self, point: CrashPoint) {
        self.state().crash = Some(point);
    }

    /// Forgets a crash that has not come; whether there was one.
    pub(super) fn spare(&self) -> bool {
        self.state().crash.take().is_some()
    }

    /// Whether the process has died.
    pub(super) fn is_dead(&self) -> bool {
        self.state().dead
    }

    /// At which point the process has died.
    pub(super) fn died_of(&self) -> Option<CrashPoint> {
        self.state().died_of
    }

    /// How often the process did something outside of itself; from now on it may do as much again.
    pub(super) fn look(&self) -> u64 {
        let mut state = self.state();
        state.allowed = ALLOWED;
        state.calls
    }

    /// Whether the process waits for an answer.
    pub(super) fn is_busy(&self) -> bool {
        self.state().busy > 0
    }

    /// Whether the process was stopped because it ran in circles.
    pub(super) fn ran_wild(&self) -> bool {
        self.state().allowed == 0
    }

    /// The process is about to do something outside of itself.
    pub(super) async fn before(&self) {
        self.thawed().await;
        let dies = {
            let mut state = self.state();
            state.calls += 1;
            state.busy += 1;
            state.allowed = state.allowed.saturating_sub(1);
            let ran_wild = state.allowed == 0;
            match &mut state.crash {
                Some(CrashPoint::Before(0)) => true,
                Some(CrashPoint::Before(left)) => {
                    *left -= 1;
                    ran_wild
                }
                _ => ran_wild,
            }
        };
        if dies {
            self.die().await;
        }
    }

    /// The process has done something outside of itself, and is about to learn so.
    pub(super) async fn after(&self) {
        let dies = {
            let mut state = self.state();
            state.busy = state.busy.saturating_sub(1);
            match &mut state.crash {
                Some(CrashPoint::After(0)) => true,
                Some(CrashPoint::After(left)) => {
                    *left -= 1;
                    false
                }
                _ => false,
            }
        };
        if dies {
            self.die().await;
        }
        self.thawed().await;
    }

    /// What becomes of a batch of ops.
    pub(super) fn batch(&self, len: usize) -> Batch {
        match self.state().crash {
            Some(CrashPoint::InBatch(ops)) if usize::from(ops) < len => Batch::Cut(ops.into()),
            _ => Batch::Whole,
        }
    }

    /// The end: nothing happens any more.
    pub(super) async fn die(&self) -> ! {
        {
            let mut state = self.state();
            state.dead = true;
            state.died_of = state.crash.take();
        }
        self.died.notify_one();
        match pending::<std::convert::Infallible>().await {}
    }

    async fn thawed(&self) {
        loop {
            let changed = self.changed.notified();
            {
                let state = self.state();
                if !state.frozen && !state.dead {
                    return;
                }
            }
            changed.await;
        }
    }
}
