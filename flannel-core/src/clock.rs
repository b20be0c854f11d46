//! Time as a parameter: [`Clock`], [`Moment`] and a small seeded [`Rng`].
//!
//! Core reads neither the wall clock nor entropy. Waiting is done with tokio's timers, which a
//! test pauses; how late it is comes from a [`Clock`], because a lease goes on ageing while the
//! machine sleeps and tokio's clock does not.

use std::fmt::Debug;
use std::ops::{Add, Sub};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// A point on a [`Clock`]: the time since that clock's own fixed beginning.
///
/// Its time of day is [`wall_time`](Self::wall_time).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Moment(Duration);

impl Moment {
    /// The moment a given time after the clock's beginning.
    pub const fn from_duration(since_start: Duration) -> Self {
        Self(since_start)
    }

    /// The time since the clock's beginning.
    pub const fn as_duration(self) -> Duration {
        self.0
    }

    /// The time of day of this moment, given another moment of the same clock and the time of day
    /// that it was then. Take both anew when you tell a time: the time of day may be set, a
    /// [`Clock`] is not. `None` if no system has that time.
    ///
    /// ```no_run
    /// # fn tell(overlay: &flannel_core::Overlay, condition: &flannel_core::Condition) {
    /// let since = condition.since.wall_time(overlay.now(), std::time::SystemTime::now());
    /// # }
    /// ```
    pub fn wall_time(self, now: Self, wall: SystemTime) -> Option<SystemTime> {
        match self.0.checked_sub(now.0) {
            Some(later) => wall.checked_add(later),
            None => wall.checked_sub(now.since(self)),
        }
    }

    /// The time from `earlier` to this moment; zero if it is not earlier.
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Moment {
    type Output = Self;
    fn add(self, rhs: Duration) -> Self {
        Self(self.0.saturating_add(rhs))
    }
}

impl Sub<Duration> for Moment {
    type Output = Self;
    fn sub(self, rhs: Duration) -> Self {
        Self(self.0.saturating_sub(rhs))
    }
}

/// How late it is. Never goes back, and goes on while the machine is suspended.
pub trait Clock: Debug + Send + Sync + 'static {
    /// The present moment.
    fn now(&self) -> Moment;
}

/// A [`Clock`] on tokio's time: follows a paused clock in tests.
///
/// On Linux it does **not** count time asleep; `flannel-netlink` has a boot-time clock that does,
/// and a [`crate::Kernel`] may bring its own ([`crate::Kernel::clock`]).
#[derive(Debug, Clone, Copy)]
pub struct TokioClock {
    start: tokio::time::Instant,
}

impl TokioClock {
    /// A clock that begins now.
    pub fn new() -> Self {
        Self {
            start: tokio::time::Instant::now(),
        }
    }
}

impl Default for TokioClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for TokioClock {
    fn now(&self) -> Moment {
        Moment(self.start.elapsed())
    }
}

/// A small seeded generator (SplitMix64) for jitter: one seed, one history.
///
/// Not for secrets.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator that starts from a seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A generator seeded from a text, such as a node id: nodes differ, a node repeats itself.
    pub fn from_text(text: &str) -> Self {
        Self(stable_hash(text.as_bytes()))
    }

    /// The next 64 bits.
    pub const fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A duration from zero up to, but not including, `limit`.
    pub fn below(&mut self, limit: Duration) -> Duration {
        let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        if nanos == 0 {
            Duration::ZERO
        } else {
            Duration::from_nanos(self.next_u64() % nanos)
        }
    }
}

/// The finaliser of SplitMix64: every input bit changes about half of the output bits.
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A hash that is the same on every machine, version and run (FNV-1a, then mixed).
///
/// Used where nodes must agree or a node must find its old choice again: the first slot to try in
/// a pool, a derived VTEP MAC, a nexthop id. Not for secrets.
pub fn stable_hash(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    mix(fnv)
}
