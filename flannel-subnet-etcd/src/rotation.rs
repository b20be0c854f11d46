//! Which endpoint is asked, and how long: pure.

use std::time::Duration;

/// Sticks to an endpoint that answers, and goes on to the next when it does not.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rotation {
    current: usize,
}

impl Rotation {
    /// Begins with the endpoint of this number.
    pub(crate) const fn new(first: usize) -> Self {
        Self { current: first }
    }

    /// The number of the endpoint to ask.
    pub(crate) const fn current(&self) -> usize {
        self.current
    }

    /// An endpoint of so many has failed. Says whether another one is asked from now on.
    pub(crate) const fn failed(&mut self, endpoint: usize, of: usize) -> bool {
        // Another call may have gone on already.
        if endpoint == self.current && of > 1 {
            self.current = (endpoint + 1) % of;
            return true;
        }
        false
    }
}

/// Whether a call that was tried so often, in so much time, is to be tried again, where each of the
/// endpoints may take `limit` to answer.
pub(crate) fn may_try(endpoints: usize, tried: u32, elapsed: Duration, limit: Duration) -> bool {
    match u32::try_from(endpoints).unwrap_or(u32::MAX) {
        // A server that was restarted is noticed by a call that fails.
        0 | 1 => tried < 2,
        // While one is away, the others may need a while to agree on who leads them.
        count => tried < count || elapsed < limit.saturating_mul(count.saturating_add(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_endpoints_are_given_the_time_to_choose_a_leader() {
        let [brief, limit] = [100, 2_000].map(Duration::from_millis);
        // However long each took, every one of them is asked.
        assert!(may_try(3, 2, limit * 2, limit) && may_try(9, 8, limit * 100, limit));
        // All have refused at once, or two of three were silent.
        assert!(may_try(3, 3, brief, limit) && may_try(3, 40, limit * 3, limit));
        assert!(!may_try(3, 4, limit * 4, limit));
        assert!(may_try(1, 1, limit, limit) && !may_try(1, 2, brief, limit));
    }

    #[test]
    fn an_endpoint_that_answers_is_kept_and_one_that_fails_is_left_once() {
        let mut rotation = Rotation::new(2);
        assert_eq!(rotation.current(), 2);
        assert!(rotation.failed(2, 3));
        assert_eq!(rotation.current(), 0);
        assert!(!rotation.failed(2, 3), "a late failure of the one left");
        assert_eq!(rotation.current(), 0);
        assert!(rotation.failed(0, 3));
        assert_eq!(rotation.current(), 1);
    }

    #[test]
    fn the_only_endpoint_is_kept() {
        let mut rotation = Rotation::new(0);
        assert!(!rotation.failed(0, 1));
        assert_eq!(rotation.current(), 0);
    }
}
