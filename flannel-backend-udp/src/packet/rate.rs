//! A limit on how often something is done.

use std::time::Duration;

/// A bucket of tokens that fills with time; the time is told to it.
#[derive(Debug, Clone, Copy)]
pub struct TokenBucket {
    per_second: u32,
    /// Tokens in billionths.
    level: u64,
    /// When the level was true, since some fixed moment.
    at: Duration,
}

const TOKEN: u64 = 1_000_000_000;

impl TokenBucket {
    /// A full bucket: a second's worth of tokens, and so many more each second.
    pub const fn new(per_second: u32) -> Self {
        Self {
            per_second,
            level: per_second as u64 * TOKEN,
            at: Duration::ZERO,
        }
    }

    /// Takes a token, if there is one. `now` is counted from any fixed moment; what goes back in
    /// time counts as no time at all.
    pub fn take(&mut self, now: Duration) -> bool {
        let passed = now.saturating_sub(self.at).min(Duration::from_secs(1));
        let full = u64::from(self.per_second) * TOKEN;
        let gained = u64::from(self.per_second) * passed.as_nanos() as u64;
        self.level = self.level.saturating_add(gained).min(full);
        self.at = self.at.max(now);
        if self.level < TOKEN {
            return false;
        }
        self.level -= TOKEN;
        true
    }
}
