//! Wall time: what a run costs, and when no more may be spent. Nothing that a run comes to depends
//! on it but that it may be given up.

use std::time::{Duration, Instant};

/// Counts the time since it was started.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stopwatch(Instant);

impl Stopwatch {
    #[allow(
        clippy::disallowed_methods,
        reason = "it measures the machine, not the simulated one"
    )]
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

/// The moment from which on nothing more is spent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Option<(Stopwatch, Duration)>);

impl Deadline {
    /// Takes as long as it takes.
    pub(super) const NEVER: Self = Self(None);

    /// So long from now.
    pub(super) fn after(time: Duration) -> Self {
        Self(Some((Stopwatch::start(), time)))
    }

    pub(super) fn is_over(&self) -> bool {
        self.0.is_some_and(|(watch, time)| watch.elapsed() >= time)
    }
}
