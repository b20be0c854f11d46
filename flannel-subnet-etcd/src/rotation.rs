//! Which endpoint is asked: pure.

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

#[cfg(test)]
mod tests {
    use super::*;

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
