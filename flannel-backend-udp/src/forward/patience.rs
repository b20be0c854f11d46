//! The wait for a socket without room.
//!
//! All peers share a socket. What waits for a neighbour that does not answer takes up its room for
//! seconds, but little for each neighbour: the kernel drops what is more. So the sockets have room for
//! all of it ([`Socket::new`](super::Socket)) where the host allows that. Where it does not, what
//! takes up the room is either on its way out of a device, which makes room within milliseconds, or
//! waits for such neighbours. It is waited for as if it were the first; in vain only now and then.

use std::time::Duration;

/// A device that is slow makes room for more within so many milliseconds.
const WAIT_MS: u16 = 5;
/// After a wait in vain nobody waits for so long.
const HASTE: Duration = Duration::from_secs(1);

/// One thread's, with one socket.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    /// There is none until then.
    until: Duration,
}

impl Patience {
    /// Waits for room, if that is worth it. Says if there is any; else the packet is to be dropped.
    pub(crate) fn wait(&mut self, now: Duration, has_room: impl FnOnce(u16) -> bool) -> bool {
        if now < self.until {
            return false;
        }
        let is_room = has_room(WAIT_MS);
        if !is_room {
            self.until = now + HASTE;
        }
        is_room
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Packets that find no room: the microseconds since the one before, and whether there is room
    /// for each in time.
    fn packets() -> impl Strategy<Value = Vec<(u64, bool)>> {
        let pause = prop_oneof![Just(0), 0_u64..2_000_000];
        proptest::collection::vec((pause, proptest::bool::weighted(0.3)), 1..400)
    }

    proptest! {
        /// Those that do not answer cost the others next to nothing: of any second at most the
        /// hundredth part passes with waits in vain.
        #[test]
        fn waits_in_vain_take_a_hundredth_of_the_time(packets in packets()) {
            let (mut patience, mut now) = (Patience::default(), Duration::ZERO);
            let mut vain: Vec<Duration> = Vec::new();
            for (pause, is_room) in packets {
                now += Duration::from_micros(pause);
                let mut waited = None;
                patience.wait(now, |wait| {
                    waited = Some(Duration::from_millis(wait.into()));
                    is_room
                });
                if let (Some(waited), false) = (waited, is_room) {
                    prop_assert!(waited * 100 <= Duration::from_secs(1));
                    vain.push(now);
                    now += waited;
                }
            }
            for two in vain.windows(2) {
                prop_assert!(two[1] - two[0] >= Duration::from_secs(1), "{vain:?}");
            }
        }

        /// A device that is slow, and no more than that, loses nothing.
        #[test]
        fn a_device_that_makes_room_is_always_waited_for(packets in packets()) {
            let (mut patience, mut now) = (Patience::default(), Duration::ZERO);
            for (pause, _) in packets {
                now += Duration::from_micros(pause);
                prop_assert!(patience.wait(now, |_| true));
            }
        }
    }
}
