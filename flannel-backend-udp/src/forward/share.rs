//! Who takes what comes in: a worker's lead, or its helper.
//!
//! One thread for both directions answers soonest and costs least, because no other has to wake up
//! for what it does. A second one moves more only where the first has a processor to itself and uses
//! all of it: then another processor may be idle. So there is one thread until that is so, and two
//! for as long.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::load::{Load, Meter, Usage};
use super::wake::Wake;
use crate::counters::Shard;

/// For so long at most a helper waits for packets before it looks, in milliseconds.
pub(crate) const LOOK_MS: u16 = 20;
/// What was told so long ago says nothing of now.
const OLD: Duration = Duration::from_millis(100);
/// A thread that works for such a part of its time has a processor full, in thousandths.
const FULL: u64 = 900;
/// Together two threads work for so little that one could do it, in thousandths.
const LITTLE: u64 = 800;
/// So many looks in a row must say the same before a helper is called.
const TIMES: u32 = 3;

/// What comes in, and whose it is at the moment.
#[derive(Debug, Default)]
pub(crate) struct Share {
    is_lent: AtomicBool,
    lead: Mutex<Option<Arc<Wake>>>,
    helper: Mutex<Option<Arc<Wake>>>,
    /// What the lead last told: when, in milliseconds, and its load.
    told: AtomicU64,
    /// Whether it changes hands after every batch.
    #[cfg(test)]
    pub(crate) is_restless: AtomicBool,
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

    /// The lead says what it has to do.
    fn tell(&self, load: Load, now: Duration) {
        let told = (now.as_millis() as u64) << 16 | load.encode();
        self.told.store(told, Ordering::Relaxed);
    }

    /// What the lead has to do: nothing, if it has not said so for a while, since then it waits.
    fn lead_load(&self, now: Duration) -> Load {
        let told = self.told.load(Ordering::Relaxed);
        let at = Duration::from_millis(told >> 16);
        match now.saturating_sub(at) < OLD {
            true => Load::decode(told),
            false => Load::default(),
        }
    }
}

fn nudge(whom: &Mutex<Option<Arc<Wake>>>) {
    if let Some(wake) = &*whom.lock().unwrap_or_else(PoisonError::into_inner) {
        wake.nudge();
    }
}

/// When what comes in changes hands, as one of the two threads sees it.
#[derive(Debug, Default)]
pub(crate) struct Scale {
    meter: Meter,
    times: u32,
    had: bool,
    #[cfg(test)]
    received: u64,
}

impl Scale {
    /// Whether it is to let go of what it receives because a test wants it to after every batch.
    #[cfg(test)]
    pub(super) fn is_restless(&mut self, share: &Share, shard: &Shard) -> bool {
        let received = shard.received_packets.value();
        let before = std::mem::replace(&mut self.received, received);
        share.is_restless.load(Ordering::Relaxed) && before != received
    }

    #[cfg(not(test))]
    pub(super) const fn is_restless(&self, _: &Share, _: &Shard) -> bool {
        false
    }

    /// For a lead, between two waits: whether it is to lend.
    pub(crate) fn is_to_lend(
        &mut self,
        share: &Share,
        now: Duration,
        usage: impl FnOnce() -> Usage,
    ) -> bool {
        let Some(load) = self.meter.look(now, usage) else {
            return false;
        };
        share.tell(load, now);
        self.times = match load.busy >= FULL && !load.is_crowded && !share.is_lent() {
            true => self.times + 1,
            false => 0,
        };
        let is_full = self.times >= TIMES;
        if is_full {
            self.times = 0;
        }
        is_full
    }

    /// For a helper, between two waits: whether it is to give back. Both threads count: what comes in
    /// of a stream that goes out is little, and still in the way of it.
    pub(crate) fn is_to_give_back(
        &mut self,
        share: &Share,
        now: Duration,
        usage: impl FnOnce() -> Usage,
    ) -> bool {
        let is_new = !std::mem::replace(&mut self.had, share.is_lent());
        if !share.is_lent() {
            return false;
        }
        if is_new {
            // It begins now: what was before was not its turn.
            self.meter = Meter::new(now, usage());
            return false;
        }
        let Some(own) = self.meter.look(now, usage) else {
            return false;
        };
        let lead = share.lead_load(now);
        own.busy + lead.busy < LITTLE || own.is_crowded || lead.is_crowded
    }
}

#[cfg(test)]
mod tests {
    use super::super::load::WINDOW;
    use super::*;

    /// A thread that works for a part of its time, in thousandths, and gives way so often in each
    /// hundred milliseconds.
    fn usage(now: Duration, busy: u32, preempted: u64) -> Usage {
        Usage {
            time: now * busy / 1_000,
            preempted: now.as_millis() as u64 * preempted / 100,
        }
    }

    const TICK: Duration = Duration::from_millis(1);

    /// How long a lead works until it lends.
    fn lends(busy: u32, preempted: u64) -> Option<Duration> {
        let (share, mut scale) = (Share::default(), Scale::default());
        let mut times = (1..500).map(|tick| TICK * tick);
        times.find(|now| scale.is_to_lend(&share, *now, || usage(*now, busy, preempted)))
    }

    #[test]
    fn a_lead_lends_when_it_fills_a_processor_that_nobody_else_wants() {
        assert_eq!(lends(1_000, 0), Some(Duration::from_millis(30)));
        assert_eq!(lends(950, 10), Some(Duration::from_millis(30)));
        assert_eq!(lends(850, 0), None, "it waits at times");
        assert_eq!(lends(950, 200), None, "others take its place");
        assert_eq!(lends(0, 0), None);
    }

    #[test]
    fn one_full_window_is_not_enough() {
        let (share, mut scale) = (Share::default(), Scale::default());
        let mut worked = Duration::ZERO;
        for tick in 1..500u32 {
            // Full for two windows of three.
            if tick % 30 < 20 {
                worked += TICK;
            }
            let time = worked;
            let usage = || Usage { time, preempted: 0 };
            assert!(!scale.is_to_lend(&share, TICK * tick, usage));
        }
    }

    /// How long a helper keeps what was lent, while its lead works so much or has fallen asleep.
    fn keeps(own: u32, preempted: u64, lead: Option<Load>) -> Option<Duration> {
        let (share, mut scale) = (Share::default(), Scale::default());
        assert!(
            !scale.is_to_give_back(&share, TICK, Usage::default),
            "it has nothing"
        );
        share.lend();
        let mut times = (1..500).map(|tick| TICK * (1_000 + tick));
        let until = times.find(|now| {
            if let Some(lead) = lead {
                share.tell(lead, *now);
            }
            scale.is_to_give_back(&share, *now, || usage(*now, own, preempted))
        });
        until.map(|until| until - TICK * 1_001)
    }

    #[test]
    fn a_helper_gives_back_what_one_thread_can_do() {
        let lead = |busy, is_crowded| Some(Load { busy, is_crowded });
        assert_eq!(keeps(100, 0, lead(950, false)), None, "its lead is full");
        assert_eq!(keeps(950, 0, lead(50, false)), None, "it is full itself");
        assert_eq!(keeps(950, 0, None), None, "and its lead sleeps");
        assert_eq!(keeps(300, 0, lead(400, false)), Some(WINDOW));
        assert_eq!(keeps(300, 0, None), Some(WINDOW));
        assert_eq!(keeps(500, 200, lead(900, false)), Some(WINDOW), "crowded");
        assert_eq!(keeps(500, 0, lead(900, true)), Some(WINDOW), "crowded");
    }

    #[test]
    fn what_a_lead_tells_is_what_is_heard() {
        let share = Share::default();
        for busy in [0, 1, 999, 1_000] {
            for is_crowded in [false, true] {
                let (load, now) = (Load { busy, is_crowded }, Duration::from_secs(86_400 * 365));
                share.tell(load, now);
                assert_eq!(share.lead_load(now + OLD / 2), load);
                assert_eq!(share.lead_load(now + OLD * 2), Load::default());
            }
        }
    }
}
