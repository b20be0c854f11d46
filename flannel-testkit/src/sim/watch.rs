//! A watch behind a link: late, repeated, reordered across records, interrupted.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use flannel_core::manager::{Error, Result};
use flannel_core::{Event, EventStream, LeaseKey, Manager};
use futures_core::Stream;
use tokio::time::{Instant, Sleep, sleep_until};

use super::action::{Delivery, LinkAction};
use super::link::{Interruption, Link, Weather};
use crate::permute::key_of;

/// How long a watch on a cut link is silent before it says so, as a manager's own check of progress
/// would.
const NOTICE: Duration = Duration::from_secs(10);

/// How many deliveries are remembered, to be repeated.
const REMEMBERED: usize = 8;

type Item = Result<Event>;

/// One watch of a node. Keeps what a [`Manager`] promises of one.
pub(super) struct Watch {
    manager: Arc<dyn Manager>,
    link: Arc<Link>,
    number: u64,
    interruptions: u64,
    inner: Option<EventStream>,
    /// The inner stream has ended.
    ended: bool,
    queue: VecDeque<(Instant, Item)>,
    /// What was given out since the last snapshot.
    given: VecDeque<Event>,
    cut_since: Option<Instant>,
    /// That the link is cut was told.
    told: bool,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Watch {
    pub(super) fn new(manager: Arc<dyn Manager>, link: Arc<Link>) -> Self {
        let (number, interruptions) = link.open();
        Self {
            manager,
            link,
            number,
            interruptions,
            inner: None,
            ended: false,
            queue: VecDeque::new(),
            given: VecDeque::new(),
            cut_since: None,
            told: false,
            timer: None,
        }
    }

    /// Everything that is under way is lost; the inner watch starts again.
    fn start_again(&mut self) {
        self.queue.clear();
        self.given.clear();
        self.inner = None;
        self.ended = false;
    }

    fn interrupted(&mut self, how: Interruption) -> Option<Poll<Option<Item>>> {
        self.start_again();
        match how {
            Interruption::Break => {
                self.link.felt(&LinkAction::Break);
                Some(Poll::Ready(Some(Err(Error::unavailable(
                    "the watch broke off",
                )))))
            }
            Interruption::End => {
                self.link.felt(&LinkAction::End);
                Some(Poll::Ready(None))
            }
            Interruption::Resnapshot => {
                self.link.felt(&LinkAction::Resnapshot);
                None
            }
        }
    }

    fn cut(&mut self, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        if self.told {
            return Poll::Pending;
        }
        let since = *self.cut_since.get_or_insert_with(Instant::now);
        if self.wait(cx, since + NOTICE).is_pending() {
            return Poll::Pending;
        }
        self.told = true;
        self.start_again();
        Poll::Ready(Some(Err(Error::unavailable("the watch is silent"))))
    }

    /// Takes in what the store has for us.
    fn pull(&mut self, cx: &mut Context<'_>, delay: Duration) {
        let due = Instant::now() + delay;
        let manager = &self.manager;
        let inner = self.inner.get_or_insert_with(|| manager.watch_leases());
        while !self.ended {
            match inner.as_mut().poll_next(cx) {
                Poll::Ready(Some(item)) => {
                    if matches!(item, Ok(Event::Snapshot(_))) {
                        // A snapshot stands for all before it.
                        self.queue.clear();
                        self.given.clear();
                    }
                    if !delay.is_zero() {
                        self.link.felt(&LinkAction::Delay(delay));
                    }
                    self.queue.push_back((due, item));
                }
                Poll::Ready(None) => self.ended = true,
                Poll::Pending => break,
            }
        }
    }

    fn wait(&mut self, cx: &mut Context<'_>, until: Instant) -> Poll<()> {
        let mut timer = Box::pin(sleep_until(until));
        let poll = timer.as_mut().poll(cx);
        self.timer = poll.is_pending().then_some(timer);
        poll
    }

    /// Gives what was held its order.
    fn arrange(&mut self, delivery: Delivery) {
        let was: Vec<Option<LeaseKey>> = self.keys();
        match delivery {
            Delivery::Late => {}
            Delivery::Reordered => self.reorder(),
            Delivery::Repeated => {
                let again: Vec<Event> = self.given.iter().cloned().collect();
                let now = Instant::now();
                self.queue
                    .extend(again.into_iter().map(|event| (now, Ok(event))));
            }
            Delivery::Squashed => self.squash(),
        }
        let felt = match delivery {
            Delivery::Late => !was.is_empty(),
            _ => was != self.keys(),
        };
        if felt {
            self.link.felt(&LinkAction::Hold(Duration::ZERO, delivery));
        }
    }

    fn keys(&self) -> Vec<Option<LeaseKey>> {
        let key = |(_, item): &(Instant, Item)| key_of(item.as_ref().ok()?).cloned();
        self.queue.iter().map(key).collect()
    }

    /// Turns the order of records round; of each record, the order stays. Only what is about a
    /// record moves, and not past anything else.
    fn reorder(&mut self) {
        let mut out = VecDeque::new();
        let mut run: Vec<(LeaseKey, (Instant, Item))> = Vec::new();
        for entry in self.queue.drain(..) {
            match entry.1.as_ref().ok().and_then(key_of).cloned() {
                Some(key) => run.push((key, entry)),
                None => {
                    turn(&mut run, &mut out);
                    out.push_back(entry);
                }
            }
        }
        turn(&mut run, &mut out);
        self.queue = out;
    }

    /// Leaves of each record the last word.
    fn squash(&mut self) {
        let mut last: BTreeMap<LeaseKey, usize> = BTreeMap::new();
        let keys = self.keys();
        for (at, key) in keys.iter().enumerate() {
            last.extend(key.clone().map(|key| (key, at)));
        }
        let mut at = 0;
        self.queue.retain(|_| {
            let stays = keys[at].as_ref().is_none_or(|key| last[key] == at);
            at += 1;
            stays
        });
    }

    fn give(&mut self, item: Item) -> Poll<Option<Item>> {
        if let Ok(event) = &item
            && key_of(event).is_some()
        {
            self.given.push_back(event.clone());
            if self.given.len() > REMEMBERED {
                self.given.pop_front();
            }
        }
        Poll::Ready(Some(item))
    }

    fn next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        let Weather {
            cut,
            frozen,
            delay,
            hold,
            interruptions: (interruptions, how),
        } = self.link.weather(cx);
        if frozen {
            return Poll::Pending;
        }
        if interruptions != self.interruptions {
            self.interruptions = interruptions;
            if let Some(poll) = self.interrupted(how) {
                return poll;
            }
        }
        if cut {
            return self.cut(cx);
        }
        self.cut_since = None;
        self.told = false;
        self.pull(cx, delay);
        if let Some(hold) = hold {
            if self.wait(cx, hold.until).is_pending() {
                return Poll::Pending;
            }
            self.link.release();
            self.arrange(hold.delivery);
        }
        match self.queue.front() {
            Some((due, _)) => {
                let due = *due;
                if due > Instant::now() && self.wait(cx, due).is_pending() {
                    return Poll::Pending;
                }
                match self.queue.pop_front() {
                    Some((_, item)) => self.give(item),
                    None => Poll::Pending,
                }
            }
            None if self.ended => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

/// Puts a run out, the records in the reverse order, each record's items in their order.
fn turn(run: &mut Vec<(LeaseKey, (Instant, Item))>, out: &mut VecDeque<(Instant, Item)>) {
    let mut keys: Vec<LeaseKey> = Vec::new();
    for (key, _) in run.iter() {
        if !keys.contains(key) {
            keys.push(key.clone());
        }
    }
    let mut rest = std::mem::take(run);
    for key in keys.into_iter().rev() {
        let (this, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(|(of, _)| *of == key);
        out.extend(this.into_iter().map(|(_, entry)| entry));
        rest = others;
    }
}

impl Stream for Watch {
    type Item = Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        let watch = self.get_mut();
        let poll = watch.next(cx);
        watch
            .link
            .note_under_way(watch.number, Some(watch.queue.len()));
        poll
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.link.note_under_way(self.number, None);
    }
}
