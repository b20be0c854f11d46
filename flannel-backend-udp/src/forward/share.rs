//! Who takes what comes in: a worker's lead, or its helper.
//!
//! One thread for both directions answers soonest, because no other has to wake up first; two move
//! more, where a second processor is idle. So there is one while little is to be done and two while
//! there is much.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::worker::Wake;
use crate::counters::Shard;

/// For so long a helper looks at what it has to do, in milliseconds.
pub(crate) const WINDOW_MS: u16 = 20;
/// With fewer packets in a window, it is little: 10,000 a second, a stream of 120 Mbit/s.
const LITTLE: u64 = 200;
/// With as many packets between two waits, it is much.
const MUCH: u64 = 24;
/// So often much must be, in a row with at most as many exceptions.
const TIMES: u32 = 4;

/// What comes in, and whose it is at the moment.
#[derive(Debug, Default)]
pub(crate) struct Share {
    is_lent: AtomicBool,
    lead: Mutex<Option<Arc<Wake>>>,
    helper: Mutex<Option<Arc<Wake>>>,
}

impl Share {
    /// From now on these threads are woken.
    pub(crate) fn set_lead(&self, wake: Arc<Wake>) {
        *self.lead.lock().unwrap_or_else(PoisonError::into_inner) = Some(wake);
    }

    /// See [`set_lead`](Self::set_lead).
    pub(crate) fn set_helper(&self, wake: Arc<Wake>) {
        *self.helper.lock().unwrap_or_else(PoisonError::into_inner) = Some(wake);
    }

    pub(crate) fn is_lent(&self) -> bool {
        self.is_lent.load(Ordering::Acquire)
    }

    /// The lead has done with what it received.
    pub(crate) fn lend(&self) {
        self.is_lent.store(true, Ordering::Release);
        nudge(&self.helper);
    }

    /// The helper has done with what it received.
    pub(crate) fn give_back(&self) {
        self.is_lent.store(false, Ordering::Release);
        nudge(&self.lead);
    }
}

fn nudge(whom: &Mutex<Option<Arc<Wake>>>) {
    if let Some(wake) = &*whom.lock().unwrap_or_else(PoisonError::into_inner) {
        wake.nudge();
    }
}

/// What a thread has had to do of late.
#[derive(Debug, Default)]
pub(crate) struct Load {
    own: Meter,
    lead: Meter,
    times: u32,
    since: Duration,
}

/// Tells how many packets came since it was last asked.
#[derive(Debug, Default)]
struct Meter(u64);

impl Meter {
    fn moved(&mut self, shard: &Shard) -> u64 {
        let packets = shard.sent_packets.value() + shard.received_packets.value();
        let moved = packets.wrapping_sub(self.0);
        self.0 = packets;
        moved
    }
}

impl Load {
    /// For a lead, between two waits.
    pub(crate) fn is_much(&mut self, shard: &Shard) -> bool {
        self.times = match self.own.moved(shard) >= MUCH {
            true => self.times + 1,
            false => self.times.saturating_sub(1),
        };
        let is_much = self.times >= TIMES;
        if is_much {
            self.times = 0;
        }
        is_much
    }

    /// For a helper, between two waits: whether both it and its lead have little to do. What comes
    /// in of a stream that goes out is little, and still in the way of it.
    pub(crate) fn is_little(&mut self, shard: &Shard, lead: &Shard, now: Duration) -> bool {
        let window = Duration::from_millis(WINDOW_MS.into());
        if now < self.since + window {
            return false;
        }
        // A look at a window that began long ago tells nothing: it was not this thread's turn.
        let is_old = now > self.since + window * 10;
        self.since = now;
        let (own, lead) = (self.own.moved(shard), self.lead.moved(lead));
        own < LITTLE && lead < LITTLE && !is_old
    }
}
