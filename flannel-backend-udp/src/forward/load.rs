//! How much a thread has to do, and whether it has a processor to itself.

use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};

/// A thread looks at what it has to do so often while it has.
pub(super) const WINDOW: Duration = Duration::from_millis(10);
/// A thread that was made to give way more than once in so long has no processor to itself.
const CROWDED: Duration = Duration::from_millis(2);

/// What a thread has used since it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Usage {
    /// Time of a processor.
    pub(crate) time: Duration,
    /// How often it had to give way to another thread although it had more to do.
    pub(crate) preempted: u64,
}

impl Usage {
    /// This thread's; nothing where the kernel does not tell.
    pub(crate) fn of_this_thread() -> Self {
        let Ok(usage) = getrusage(UsageWho::RUSAGE_THREAD) else {
            return Self::default();
        };
        let micros = |time: nix::sys::time::TimeVal| {
            let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
            Duration::from_secs(seconds)
                + Duration::from_micros(u64::try_from(time.tv_usec()).unwrap_or(0))
        };
        Self {
            time: micros(usage.user_time()) + micros(usage.system_time()),
            preempted: u64::try_from(usage.involuntary_context_switches()).unwrap_or(0),
        }
    }
}

/// What a thread had to do in a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Load {
    /// The part of its time in which it worked, in thousandths.
    pub(super) busy: u64,
    /// Others want its processor.
    pub(super) is_crowded: bool,
}

impl Load {
    /// In 16 bits.
    pub(super) const fn encode(self) -> u64 {
        (self.busy << 1 | self.is_crowded as u64) & 0xffff
    }

    /// What was encoded in the lowest 16 bits.
    pub(super) const fn decode(told: u64) -> Self {
        let told = told & 0xffff;
        Self {
            busy: told >> 1,
            is_crowded: told & 1 == 1,
        }
    }
}

/// Tells a thread's load, window after window.
#[derive(Debug, Default)]
pub(super) struct Meter {
    since: Duration,
    before: Usage,
}

impl Meter {
    /// One that tells of what is from now on.
    pub(super) const fn new(now: Duration, usage: Usage) -> Self {
        Self {
            since: now,
            before: usage,
        }
    }

    /// The load since it was last told; `None` while that is too short ago.
    pub(super) fn look(&mut self, now: Duration, usage: impl FnOnce() -> Usage) -> Option<Load> {
        let window = now.saturating_sub(self.since);
        if window < WINDOW {
            return None;
        }
        let usage = usage();
        let worked = usage.time.saturating_sub(self.before.time);
        let preempted = usage.preempted.saturating_sub(self.before.preempted);
        *self = Self::new(now, usage);
        let busy = worked.as_micros() * 1_000 / window.as_micros().max(1);
        Some(Load {
            busy: busy.min(1_000) as u64,
            is_crowded: u128::from(preempted) * CROWDED.as_micros() > window.as_micros(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_works_has_used_its_processor() {
        let before = Usage::of_this_thread();
        let mut n = 0u64;
        while Usage::of_this_thread().time < before.time + Duration::from_millis(5) {
            n = std::hint::black_box(n + 1);
        }
        assert!(n > 0);
    }
}
