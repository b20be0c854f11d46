//! [`BootClock`]: a clock that counts time asleep.

use std::time::Duration;

use flannel_core::{Clock, Moment};
use nix::time::{ClockId, clock_gettime};

/// A [`Clock`] on `CLOCK_BOOTTIME`: the time since the machine started, including the time it was
/// suspended. The same in every process of the machine, unless a time namespace shifts it.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct BootClock;

impl BootClock {
    /// The clock.
    pub const fn new() -> Self {
        Self
    }
}

impl Clock for BootClock {
    fn now(&self) -> Moment {
        // CLOCK_BOOTTIME exists since Linux 2.6.39 and cannot fail after that; the beginning of
        // the clock is the answer that lets nothing expire early.
        let since_boot =
            clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
        Moment::from_duration(since_boot)
    }
}
