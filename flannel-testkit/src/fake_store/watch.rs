//! [`LinkWatch`]: a watch of the store, as the link delivers it.

use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::{Revision, stable_hash};
use flannel_subnet_kv::{KeyEvent, KeyRange, StoreError, StoreResult, StoreWatch, WatchAnswer};
use tokio::time::Instant;

use super::StoreLink;
use super::link::{Cut, Delivery, Place};

/// The longest a watch sleeps while leases can end: the store's clock may go on while tokio's
/// timers stand still.
const MAX_SLEEP: Duration = Duration::from_secs(5);

/// A watch of a [`StoreLink`]. It is a place in the store's history, which goes on when something is fetched: what is
/// compacted away before it was fetched is missed, and the watch says so.
#[derive(Debug)]
pub struct LinkWatch {
    link: StoreLink,
    number: u64,
    incarnation: u64,
    range: KeyRange,
    /// The revision at which it was opened.
    opened: Revision,
    /// The first revision that was not taken from the history.
    next: Revision,
    /// What was taken and not delivered yet, and when it arrives.
    queue: VecDeque<(Instant, WatchAnswer)>,
    progress_asked: bool,
}

/// What a look at the watch came to.
enum Look {
    Found(StoreResult<WatchAnswer>),
    /// Nothing, until something changes or this much time has passed.
    Nothing(Option<Instant>),
}

impl LinkWatch {
    pub(super) const fn new(
        link: StoreLink,
        number: u64,
        incarnation: u64,
        range: KeyRange,
        next: Revision,
        opened: Revision,
    ) -> Self {
        Self {
            link,
            number,
            incarnation,
            range,
            opened,
            next,
            queue: VecDeque::new(),
            progress_asked: false,
        }
    }

    /// The revision of the store when the watch was opened.
    pub const fn opened(&self) -> Revision {
        self.opened
    }

    /// Asks the store to say how far it is. A watch that lives answers with
    /// [`WatchAnswer::Progress`], after all that was written until then.
    pub const fn ask_progress(&mut self) {
        self.progress_asked = true;
    }

    /// Tells the link where the watch stands.
    fn tell(&self) {
        let place = Place {
            range: self.range.clone(),
            next: self.next,
            queued: self.queue.len(),
        };
        self.link.lock().places.insert(self.number, place);
    }

    /// The next that the watch delivers.
    ///
    /// # Errors
    /// The watch is over: [`StoreError::Unavailable`](super::StoreError::Unavailable) if it broke,
    /// [`StoreError::Compacted`](super::StoreError::Compacted) if it missed something.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn next(&mut self) -> StoreResult<WatchAnswer> {
        let (link, store) = (self.link.clone(), self.link.store().clone());
        loop {
            let mut link_changed = pin!(link.changed().notified());
            let mut store_changed = pin!(store.changed().notified());
            link_changed.as_mut().enable();
            store_changed.as_mut().enable();
            let until = match self.look() {
                Look::Found(result) => return result,
                Look::Nothing(until) => until,
            };
            let timer = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = link_changed => {}
                () = store_changed => {}
                () = timer => {}
            }
        }
    }

    /// The next that is there already, if anything is.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn try_next(&mut self) -> StoreResult<Option<WatchAnswer>> {
        match self.look() {
            Look::Found(result) => result.map(Some),
            Look::Nothing(_) => Ok(None),
        }
    }

    fn look(&mut self) -> Look {
        let look = self.look_on();
        self.tell();
        look
    }

    fn look_on(&mut self) -> Look {
        let (cut, delivery) = {
            let state = self.link.lock();
            if self.number <= state.deaf {
                return Look::Nothing(None);
            }
            if self.number <= state.broken {
                return Look::Found(Err(StoreError::unavailable("the watch broke")));
            }
            (state.cut, state.delivery)
        };
        let store = self.link.store().clone();
        if store.incarnation() != self.incarnation {
            return Look::Found(Err(StoreError::unavailable("the store was restored")));
        }
        match cut {
            Some(Cut::Fail | Cut::Deny) => {
                return Look::Found(Err(StoreError::unavailable("the link is cut")));
            }
            Some(Cut::Hang) => return Look::Nothing(None),
            None if delivery.hold => return Look::Nothing(None),
            None => {}
        }
        let now = Instant::now();
        let (events, revision, expiry) = store.with(|kv, moment| {
            let expiry = kv.next_expiry(moment);
            (kv.events(&self.range, self.next), kv.revision(), expiry)
        });
        match events {
            Err(error) => return Look::Found(Err(error)),
            Ok(events) => self.take(now, revision, events, &delivery),
        }
        match self.queue.front() {
            Some((at, _)) if *at > now => return Look::Nothing(Some(*at)),
            Some(_) => {}
            None if self.progress_asked => {
                self.progress_asked = false;
                return Look::Found(Ok(WatchAnswer::Progress { revision }));
            }
            None => return Look::Nothing(expiry.map(|wait| now + wait.min(MAX_SLEEP))),
        }
        match self.queue.pop_front() {
            Some((_, answer)) => Look::Found(Ok(answer)),
            None => Look::Nothing(None),
        }
    }

    /// Takes what was written, in the shape in which the link delivers it.
    fn take(
        &mut self,
        now: Instant,
        revision: Revision,
        mut events: Vec<KeyEvent>,
        delivery: &Delivery,
    ) {
        let Some(last) = events.last() else { return };
        self.next = Revision(last.revision().0 + 1);
        let mut used = Vec::new();
        if delivery.squash {
            let before = events.len();
            events = squashed(events);
            used.extend((events.len() < before).then_some("watch squashed"));
        }
        if let Some(order) = delivery.reorder {
            let before = events.clone();
            events = reordered(events, order);
            used.extend((events != before).then_some("watch reordered"));
        }
        let batches = if delivery.split {
            used.extend((events.len() > 1).then_some("watch split"));
            events.into_iter().map(|event| vec![event]).collect()
        } else {
            vec![events]
        };
        if delivery.repeat {
            used.push("watch repeated");
        }
        if !delivery.delay.is_zero() {
            used.push("watch delayed");
        }
        for events in batches {
            let answer = WatchAnswer::Events { revision, events };
            if delivery.repeat {
                self.queue.push_back((now + delivery.delay, answer.clone()));
            }
            self.queue.push_back((now + delivery.delay, answer));
        }
        let mut state = self.link.lock();
        used.into_iter().for_each(|what| state.count(what));
    }
}

impl Drop for LinkWatch {
    fn drop(&mut self) {
        self.link.lock().places.remove(&self.number);
    }
}

#[async_trait]
impl StoreWatch for LinkWatch {
    async fn ask_progress(&mut self) -> StoreResult<()> {
        Self::ask_progress(self);
        Ok(())
    }

    async fn next(&mut self) -> StoreResult<WatchAnswer> {
        Self::next(self).await
    }
}

/// The last write of each key, in the order of these.
fn squashed(events: Vec<KeyEvent>) -> Vec<KeyEvent> {
    let mut last = BTreeMap::new();
    for (n, event) in events.iter().enumerate() {
        last.insert(event.key().to_owned(), n);
    }
    let keep = |(n, event): (usize, KeyEvent)| (last.get(event.key()) == Some(&n)).then_some(event);
    events.into_iter().enumerate().filter_map(keep).collect()
}

/// The writes key by key, the keys in an order that a number decides.
fn reordered(mut events: Vec<KeyEvent>, order: u64) -> Vec<KeyEvent> {
    events.sort_by_cached_key(|event| {
        let mut text = order.to_be_bytes().to_vec();
        text.extend(event.key().as_bytes());
        (stable_hash(&text), event.key().to_owned())
    });
    events
}
