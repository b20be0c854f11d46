//! [`StoreLink`]: the way from one program to the store, and all that can go wrong on it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::{Moment, Revision};
use flannel_subnet_kv::{
    KeyRange, KeyValue, LeaseId, OpAnswer, Page, PageAnswer, RangeAnswer, Store, StoreError,
    StoreResult, Txn, TxnAnswer,
};
use tokio::sync::Notify;

use super::kv::Kv;
use super::{FakeStore, LinkWatch};

/// How a link is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Nothing comes through and nobody says so: calls wait, watches are silent. What waits goes
    /// on when the link is [healed](StoreLink::heal).
    Hang,
    /// Calls fail at once, watches break.
    Fail,
    /// The store denies every call. Watches break.
    Deny,
}

/// What a caller sees of a loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// Nothing, for ever: it must give up by itself.
    Hang,
    /// An error.
    Error,
}

/// What goes wrong with one coming call. Each comes once, in the order in which they were set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallFault {
    /// The call is lost on its way: nothing is done.
    LoseRequest(Silence),
    /// The call is done and its answer is lost.
    LoseAnswer(Silence),
    /// The call is held up, and done only by [`StoreLink::deliver_parked`], long after its caller
    /// has given up.
    Park(Silence),
}

impl CallFault {
    /// A short name, for counts.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LoseRequest(_) => "request lost",
            Self::LoseAnswer(_) => "answer lost",
            Self::Park(_) => "request parked",
        }
    }
}

/// How watches deliver what happened. All of it is lawful; the order of the writes to one key is
/// never touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// Nothing is delivered until this is off again; then it comes all at once.
    pub hold: bool,
    /// How late a batch comes.
    pub delay: Duration,
    /// Of each key in a batch only the last write comes.
    pub squash: bool,
    /// The keys of a batch come in an order that this number decides.
    pub reorder: Option<u64>,
    /// Each write comes in a batch of its own.
    pub split: bool,
    /// Each batch comes twice.
    pub repeat: bool,
}

impl Delivery {
    /// Everything at once and as it was written.
    pub const PLAIN: Self = Self {
        hold: false,
        delay: Duration::ZERO,
        squash: false,
        reorder: None,
        split: false,
        repeat: false,
    };
}

impl Default for Delivery {
    fn default() -> Self {
        Self::PLAIN
    }
}

/// A request that its caller no longer waits for.
type Parked = Box<dyn FnOnce(&mut Kv, Moment) + Send>;

#[derive(Default)]
pub(super) struct LinkState {
    pub(super) cut: Option<Cut>,
    latency: Duration,
    /// The largest answer that arrives, in bytes; zero: any.
    largest: usize,
    /// What goes wrong with each of the coming calls, as far as it is set.
    faults: VecDeque<Option<CallFault>>,
    parked: Vec<Parked>,
    pub(super) delivery: Delivery,
    /// How many watches were opened: they are numbered from 1.
    watches: u64,
    /// Watches up to this number are broken, or deaf.
    pub(super) broken: u64,
    pub(super) deaf: u64,
    /// Where the watches that are open stand.
    pub(super) places: BTreeMap<u64, Place>,
    counts: BTreeMap<&'static str, u64>,
}

/// Where a watch stands.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) range: KeyRange,
    /// The first revision that was not taken from the history.
    pub(super) next: Revision,
    /// How much was taken and not delivered yet.
    pub(super) queued: usize,
}

impl LinkState {
    pub(super) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }
}

struct Inner {
    name: String,
    state: Mutex<LinkState>,
    changed: Notify,
}

/// One program's way to a [`FakeStore`].
///
/// Clones are handles on one and the same link: the program makes its calls through one, the test
/// makes them fail through another. Every call yields to other tasks on its way to the store and
/// on its way back, so a program can be stopped (its future dropped) between any two steps.
#[derive(Clone)]
pub struct StoreLink {
    store: FakeStore,
    inner: Arc<Inner>,
}

impl StoreLink {
    pub(super) fn new(store: FakeStore, name: String) -> Self {
        let inner = Arc::new(Inner {
            name,
            state: Mutex::default(),
            changed: Notify::new(),
        });
        Self { store, inner }
    }

    /// The name that it was made with.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The store behind it.
    pub const fn store(&self) -> &FakeStore {
        &self.store
    }

    // What goes wrong

    /// Cuts the link, or cuts it in another way.
    pub fn cut(&self, cut: Cut) {
        self.change(|state| {
            state.cut = Some(cut);
            if cut != Cut::Hang {
                state.broken = state.watches;
            }
        });
    }

    /// Ends a cut.
    pub fn heal(&self) {
        self.change(|state| state.cut = None);
    }

    /// Whether the link is cut, and how.
    pub fn is_cut(&self) -> Option<Cut> {
        self.lock().cut
    }

    /// Sets the largest answer that arrives, in bytes of keys and values; zero: any.
    pub fn set_largest(&self, largest: usize) {
        self.change(|state| state.largest = largest);
    }

    /// How long a call takes each way, from the next one on.
    pub fn set_latency(&self, each_way: Duration) {
        self.change(|state| state.latency = each_way);
    }

    /// Lets the next call go wrong that no fault is set for yet.
    pub fn fail_next(&self, fault: CallFault) {
        self.fail_after(0, fault);
    }

    /// The same, after so many calls that go well.
    pub fn fail_after(&self, calls: usize, fault: CallFault) {
        self.change(|state| {
            let well = std::iter::repeat_n(None, calls);
            state.faults.extend(well.chain([Some(fault)]));
        });
    }

    /// The faults that no call has met yet.
    pub fn pending_faults(&self) -> usize {
        self.lock().faults.iter().flatten().count()
    }

    /// Forgets the faults that no call has met yet.
    pub fn clear_faults(&self) {
        self.change(|state| state.faults.clear());
    }

    /// Does the calls that were held up, in their order; says how many.
    pub fn deliver_parked(&self) -> usize {
        let parked = std::mem::take(&mut self.lock().parked);
        let count = parked.len();
        for request in parked {
            self.store.with(request);
        }
        count
    }

    /// How watches deliver from now on.
    pub fn deliver(&self, delivery: Delivery) {
        self.change(|state| state.delivery = delivery);
    }

    /// Breaks the watches that are open.
    pub fn break_watches(&self) {
        self.change(|state| {
            state.broken = state.watches;
            state.count("watch broken");
        });
    }

    /// Nothing will come from the watches that are open, not even an error; new ones work.
    pub fn deafen_watches(&self) {
        self.change(|state| {
            state.deaf = state.watches;
            state.count("watch deaf");
        });
    }

    /// Whether a watch of this key is open and has delivered all there is.
    pub fn is_caught_up(&self, key: &str) -> bool {
        let places: Vec<Place> = {
            let state = self.lock();
            let lives = |number: &u64| *number > state.deaf.max(state.broken);
            if state.cut.is_some() {
                return false;
            }
            let open = state.places.iter().filter(|(number, _)| lives(number));
            open.map(|(_, place)| place.clone()).collect()
        };
        let mut watches = places
            .into_iter()
            .filter(|place| place.range.contains(key))
            .peekable();
        watches.peek().is_some()
            && self.store.with(|kv, _| {
                watches.all(|place| {
                    let news = kv.events(&place.range, place.next);
                    place.queued == 0 && news.is_ok_and(|events| events.is_empty())
                })
            })
    }

    /// How often each thing happened: every kind of call, and every fault that one has met.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.lock().counts.clone()
    }

    // Calls

    /// Reads a range as it is.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] or [`StoreError::Denied`], by the link's faults.
    ///
    /// # Cancel safety
    /// Cancel safe: reads only.
    pub async fn range(&self, range: KeyRange) -> StoreResult<RangeAnswer> {
        self.call("range", move |kv, _| kv.range(&range, None))
            .await
    }

    /// Reads a range as it was at a revision.
    ///
    /// # Errors
    /// As [`range`](Self::range), and [`StoreError::Compacted`] or [`StoreError::FutureRevision`].
    ///
    /// # Cancel safety
    /// Cancel safe: reads only.
    pub async fn range_at(&self, range: KeyRange, at: Revision) -> StoreResult<RangeAnswer> {
        self.call("range", move |kv, _| kv.range(&range, Some(at)))
            .await
    }

    /// Reads one page of a range.
    ///
    /// # Errors
    /// As [`range_at`](Self::range_at), and [`StoreError::TooLarge`] beyond
    /// [`set_largest`](Self::set_largest).
    ///
    /// # Cancel safety
    /// Cancel safe: reads only.
    pub async fn page(&self, page: Page) -> StoreResult<PageAnswer> {
        let largest = self.lock().largest;
        self.call("range", move |kv, _| {
            let RangeAnswer {
                revision,
                mut entries,
            } = kv.range(&page.range, page.at)?;
            let more = entries.len() > page.limit;
            entries.truncate(page.limit);
            if page.keys_only {
                for entry in &mut entries {
                    entry.value = Vec::new();
                    entry.omitted = true;
                }
            }
            if largest > 0 && entries.iter().map(size).sum::<usize>() > largest {
                return Err(StoreError::TooLarge);
            }
            Ok(PageAnswer {
                revision: page.at.unwrap_or(revision),
                entries,
                more,
            })
        })
        .await
    }

    /// Does a transaction.
    ///
    /// # Errors
    /// As [`range`](Self::range), and [`StoreError::Refused`] or [`StoreError::LeaseNotFound`]; an
    /// answer beyond [`set_largest`](Self::set_largest) does not arrive.
    ///
    /// # Cancel safety
    /// The transaction may have been done, or be done later.
    pub async fn txn(&self, txn: Txn) -> StoreResult<TxnAnswer> {
        let largest = self.lock().largest;
        let answer = self.call("txn", move |kv, _| kv.txn(&txn)).await?;
        let found = answer.results.iter().map(|result| match result {
            OpAnswer::Range(entries) => entries.iter().map(size).sum(),
            OpAnswer::Put | OpAnswer::Deleted(_) => 0,
        });
        if largest > 0 && found.sum::<usize>() > largest {
            return Err(StoreError::unavailable("the answer is too large"));
        }
        Ok(answer)
    }

    /// Grants a lease of whole seconds, at least two; says for how long it was granted.
    ///
    /// # Errors
    /// As [`range`](Self::range).
    ///
    /// # Cancel safety
    /// A lease may have been granted that nobody uses.
    pub async fn grant(&self, ttl: Duration) -> StoreResult<(LeaseId, Duration)> {
        self.call("grant", move |kv, now| Ok(kv.grant(now, ttl)))
            .await
    }

    /// Gives a lease its full time again, and says how long that is.
    ///
    /// # Errors
    /// As [`range`](Self::range), and [`StoreError::LeaseNotFound`].
    ///
    /// # Cancel safety
    /// The lease may have been extended.
    pub async fn keep_alive(&self, lease: LeaseId) -> StoreResult<Duration> {
        self.call("keep_alive", move |kv, now| kv.keep_alive(now, lease))
            .await
    }

    /// The time that is left of a lease; `None` if there is no such lease.
    ///
    /// # Errors
    /// As [`range`](Self::range).
    ///
    /// # Cancel safety
    /// Cancel safe: reads only.
    pub async fn time_to_live(&self, lease: LeaseId) -> StoreResult<Option<Duration>> {
        self.call("time_to_live", move |kv, now| {
            Ok(kv.time_to_live(now, lease))
        })
        .await
    }

    /// Ends a lease and deletes its keys.
    ///
    /// # Errors
    /// As [`range`](Self::range), and [`StoreError::LeaseNotFound`].
    ///
    /// # Cancel safety
    /// The lease may have ended.
    pub async fn revoke(&self, lease: LeaseId) -> StoreResult<()> {
        self.call("revoke", move |kv, _| kv.revoke(lease)).await
    }

    /// Watches a range: what is written from a revision on, `None` for what is written from now
    /// on. Whether that revision was compacted away, the watch says itself. One in the future is
    /// waited for, as etcd does, even if the store was restored and will take years to get there.
    ///
    /// # Errors
    /// As [`range`](Self::range).
    ///
    /// # Cancel safety
    /// Cancel safe: a watch that nobody holds is none.
    pub async fn watch(&self, range: KeyRange, from: Option<Revision>) -> StoreResult<LinkWatch> {
        let store = self.store.clone();
        let opened = self.call("watch", |kv, _| Ok(kv.revision())).await?;
        let incarnation = store.incarnation();
        let number = self.change(|state| {
            state.watches += 1;
            state.watches
        });
        let next = from.unwrap_or(Revision(opened.0 + 1));
        let watch = LinkWatch::new(self.clone(), number, incarnation, range, next, opened);
        Ok(watch)
    }

    /// One call, there and back.
    async fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        act: impl FnOnce(&mut Kv, Moment) -> StoreResult<T> + Send + 'static,
    ) -> StoreResult<T> {
        let fault = self.change(|state| {
            state.count(what);
            let fault = state.faults.pop_front().flatten();
            fault
                .into_iter()
                .for_each(|fault| state.count(fault.name()));
            fault
        });
        self.travel().await?;
        match fault {
            Some(CallFault::LoseRequest(silence)) => return lost(silence).await,
            Some(CallFault::Park(silence)) => {
                let later: Parked = Box::new(move |kv, now| drop(act(kv, now)));
                self.lock().parked.push(later);
                return lost(silence).await;
            }
            Some(CallFault::LoseAnswer(silence)) => {
                self.store.with(act).ok();
                return lost(silence).await;
            }
            None => {}
        }
        let answer = self.store.with(act);
        self.travel().await?;
        answer
    }

    /// The way to the store, or back.
    async fn travel(&self) -> StoreResult<()> {
        tokio::task::yield_now().await;
        let latency = self.lock().latency;
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        loop {
            let mut changed = pin!(self.changed().notified());
            changed.as_mut().enable();
            match self.is_cut() {
                None => return Ok(()),
                Some(cut) => {
                    self.change_silently(|state| state.count(cut.name()));
                    match cut {
                        Cut::Hang => changed.await,
                        Cut::Fail => return Err(StoreError::unavailable("the link is cut")),
                        Cut::Deny => {
                            return Err(StoreError::Denied {
                                reason: "the link says so".to_owned(),
                            });
                        }
                    }
                }
            }
        }
    }

    // Inside

    pub(super) fn lock(&self) -> MutexGuard<'_, LinkState> {
        let state = self.inner.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changed(&self) -> &Notify {
        &self.inner.changed
    }

    fn change_silently<T>(&self, f: impl FnOnce(&mut LinkState) -> T) -> T {
        f(&mut self.lock())
    }

    fn change<T>(&self, f: impl FnOnce(&mut LinkState) -> T) -> T {
        let result = self.change_silently(f);
        self.inner.changed.notify_waiters();
        result
    }
}

impl Cut {
    /// A short name, for counts.
    const fn name(self) -> &'static str {
        match self {
            Self::Hang => "call held up",
            Self::Fail => "call failed",
            Self::Deny => "call denied",
        }
    }
}

async fn lost<T>(silence: Silence) -> StoreResult<T> {
    match silence {
        Silence::Hang => std::future::pending().await,
        Silence::Error => Err(StoreError::unavailable("the connection broke")),
    }
}

/// How much of an answer an entry is.
fn size(entry: &KeyValue) -> usize {
    entry.key.len() + entry.value.len()
}

/// The calls of the link itself.
#[async_trait]
impl Store for StoreLink {
    type Watch = LinkWatch;

    fn kind(&self) -> &'static str {
        "fake store"
    }

    fn name(&self) -> &str {
        Self::name(self)
    }

    async fn page(&self, page: Page) -> StoreResult<PageAnswer> {
        Self::page(self, page).await
    }

    async fn txn(&self, txn: Txn) -> StoreResult<TxnAnswer> {
        Self::txn(self, txn).await
    }

    async fn grant(&self, ttl: Duration) -> StoreResult<(LeaseId, Duration)> {
        Self::grant(self, ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> StoreResult<Duration> {
        Self::keep_alive(self, lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> StoreResult<()> {
        Self::revoke(self, lease).await
    }

    async fn watch(&self, range: KeyRange) -> StoreResult<LinkWatch> {
        Self::watch(self, range, None).await
    }
}

impl fmt::Debug for StoreLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cut = self.is_cut();
        f.debug_struct("StoreLink")
            .field("name", &self.inner.name)
            .field("cut", &cut)
            .finish_non_exhaustive()
    }
}
