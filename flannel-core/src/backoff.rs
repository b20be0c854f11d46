//! [`Backoff`]: how long to wait before the next try.

use std::time::Duration;

use crate::clock::Rng;

/// Waits that double from `first` to `most`, each shortened at random by up to half, so that nodes
/// which failed together do not come back together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    first: Duration,
    most: Duration,
}

impl Backoff {
    /// Waits from `first` (at least a millisecond) to `most` (at least `first`).
    pub fn new(first: Duration, most: Duration) -> Self {
        let first = first.max(Duration::from_millis(1));
        Self {
            first,
            most: most.max(first),
        }
    }

    /// The wait after the given number of failures in a row; none for zero.
    pub fn after(&self, failures: u32, rng: &mut Rng) -> Duration {
        if failures == 0 {
            return Duration::ZERO;
        }
        let doubled = self
            .first
            .saturating_mul(1 << (failures - 1).min(30))
            .min(self.most);
        doubled - rng.below(doubled / 2)
    }
}
