//! Time, for workers: how often errors may be sent, when something is tried again.

use std::time::{Duration, Instant};

/// Counts from when it was made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

#[allow(
    clippy::disallowed_methods,
    reason = "threads of their own, in which nothing else tells the time"
)]
impl Clock {
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(&self) -> Duration {
        self.0.elapsed()
    }
}
