//! A [`KvManager`]'s watch: a reading, then what is written after it; from the beginning again
//! after anything that may have lost a write.
//!
//! The watch is opened *before* the reading, for what is written from then on. So nothing is
//! missed between the two, no revision of an earlier time is ever asked for, and a store that was
//! restored meanwhile is noticed, as it breaks its watches.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::ops::Bound;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use flannel_core::manager::{Error, Result};
use flannel_core::{Backoff, Event, Revision, Rng, Snapshot};
use futures_core::Stream;
use tokio::time::Instant;

use crate::decide::parse_config;
use crate::former::Formers;
use crate::layout::{Record, lease_key};
use crate::manager::KvManager;
use crate::paging::read_all;
use crate::store::{KeyEvent, KeyValue, Store, StoreError, StoreResult, StoreWatch, WatchAnswer};

/// The waits between one failure and the next beginning.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const MOST_WAIT: Duration = Duration::from_secs(5);

/// How long after a write of ours it is put again, at most.
const ECHO_WITHIN: Duration = Duration::from_secs(30);

/// The least wait between two answers, and the most questions that wait for one: who asks too much
/// asks again.
const ANSWER_EVERY: Duration = Duration::from_millis(10);
const MOST_QUESTIONS: usize = 1024;

/// A task beside the watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Errand {
    /// Our record is put again.
    Echo,
    /// A question is answered.
    Answer,
    /// A record of our former name is looked at.
    Former,
}

/// The watch as a stream: polls one step after the other.
pub(super) struct ListWatch<S: Store>(Step<S>);

/// A step under way: its item, and what comes after it.
type Step<S> = Pin<Box<dyn Future<Output = (Result<Event>, Steps<S>)> + Send>>;

impl<S: Store> ListWatch<S> {
    pub(super) fn new(manager: KvManager<S>) -> Self {
        let rng = Rng::from_text(manager.store().name());
        Self(Box::pin(
            Steps {
                manager,
                rng,
                failures: 0,
                open: None,
                ready: VecDeque::new(),
                gos: BTreeSet::new(),
                echo_at: None,
                formers: Formers::default(),
                questions: BTreeMap::new(),
                answered: String::new(),
                answer_at: Instant::now(),
                seen: Revision::default(),
                ran_errand: false,
            }
            .next(),
        ))
    }
}

impl<S: Store> Stream for ListWatch<S> {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll(cx).map(|(item, steps)| {
            self.0 = Box::pin(steps.next());
            Some(item)
        })
    }
}

/// A watch that is open, and what was read when it was opened.
struct Open<W> {
    watch: W,
    /// The revision of the reading: what is older is known.
    since: Revision,
    /// When it is asked how far it is, or, once it was asked, given up.
    due: Instant,
    asked: bool,
}

struct Steps<S: Store> {
    manager: KvManager<S>,
    rng: Rng,
    failures: u32,
    open: Option<Open<S::Watch>>,
    ready: VecDeque<Event>,
    /// The keys of the records that Go flannel can have written.
    gos: BTreeSet<String>,
    /// When our own record is put again.
    echo_at: Option<Instant>,
    /// Records of our former name.
    formers: Formers,
    /// Questions that wait for an answer of ours, by key.
    questions: BTreeMap<String, KeyValue>,
    /// The key of the last one that was answered: each has its turn.
    answered: String,
    /// When the next of them is answered, at the earliest.
    answer_at: Instant,
    /// The revision of the last reading.
    seen: Revision,
    /// The last thing that was done is an errand: the watch comes first.
    ran_errand: bool,
}

impl<S: Store> Steps<S> {
    /// The next item, and what comes after it.
    async fn next(mut self) -> (Result<Event>, Self) {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return (Ok(event), self);
            }
            let step = match self.open.take() {
                None => self.begin().await,
                Some(open) => self.proceed(open).await,
            };
            if let Err(error) = step {
                self.failures = self.failures.saturating_add(1);
                return (Err(error), self);
            }
        }
    }

    /// Opens a watch and reads everything.
    async fn begin(&mut self) -> Result<()> {
        let backoff = Backoff::new(FIRST_WAIT, MOST_WAIT);
        let wait = backoff.after(self.failures, &mut self.rng);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        let manager = self.manager.clone();
        let options = manager.options();
        let range = options.layout.watched();
        let opening = tokio::time::timeout(options.patience, manager.store().watch(range));
        let watch = opening
            .await
            .map_err(|_| silent("the opening of the watch"))??;
        let answer = read_all(manager.store(), &options.layout, Some(options.patience)).await?;
        let mut snapshot = Snapshot {
            revision: answer.revision,
            ..Snapshot::default()
        };
        let (config, records): (Vec<_>, Vec<_>) = answer
            .entries
            .into_iter()
            .partition(|entry| entry.key == options.layout.config());
        // By what the config allows, others' records are judged.
        snapshot.unconfigured = config.is_empty();
        let config = self.config_event(config.into_iter().next());
        self.gos.clear();
        self.formers.clear();
        for entry in records {
            if options.layout.is_record(&entry.key) {
                let record = Record::parse(entry);
                self.note(&record);
                in_time(manager.options().patience, manager.yield_to(&record)).await?;
                match record.lease(options.ttl) {
                    Ok(lease) => snapshot.leases.push(lease),
                    Err(unreadable) => snapshot.unreadable.push(unreadable),
                }
            }
        }
        // Whoever followed a history that has ended may not hear of what is the same in this one.
        let restored = self.seen > answer.revision;
        self.seen = answer.revision;
        manager.known().unheard |= restored;
        self.failures = 0;
        self.ready.push_back(Event::Snapshot(snapshot));
        self.ready.push_back(config);
        self.open = Some(Open {
            watch,
            since: answer.revision,
            due: Instant::now() + options.progress_interval,
            asked: false,
        });
        Ok(())
    }

    /// Waits for what the watch says next, or for the time in which it should have.
    async fn proceed(&mut self, mut open: Open<S::Watch>) -> Result<()> {
        let errand = self.next_errand();
        let due = errand.map_or(open.due, |(at, _)| at.min(open.due));
        let time = tokio::time::sleep_until(due);
        // No flood of events keeps an errand waiting, and no errands keep the watch waiting.
        let answer = if std::mem::take(&mut self.ran_errand) {
            tokio::select! {
                biased;
                answer = open.watch.next() => Some(answer?),
                () = time => None,
            }
        } else {
            tokio::select! {
                biased;
                () = time => None,
                answer = open.watch.next() => Some(answer?),
            }
        };
        let now = Instant::now();
        match (answer, errand) {
            (None, Some((at, errand))) if at <= now && at <= open.due => {
                self.run(errand).await;
                self.ran_errand = true;
            }
            (answer, _) => self.heard(answer, &mut open, now).await?,
        }
        self.open = Some(open);
        Ok(())
    }

    /// Takes what the watch said, or that it said nothing in time.
    async fn heard(
        &mut self,
        answer: Option<WatchAnswer>,
        open: &mut Open<S::Watch>,
        now: Instant,
    ) -> Result<()> {
        let manager = self.manager.clone();
        let options = manager.options();
        match answer {
            None if open.asked => return Err(silent("the watch")),
            None => {
                open.watch.ask_progress().await?;
                open.asked = true;
                open.due = now + options.patience;
            }
            Some(answer) => {
                open.asked = false;
                open.due = now + options.progress_interval;
                self.take(answer, open.since).await?;
            }
        }
        Ok(())
    }

    /// The next task beside the watch, and its time.
    fn next_errand(&mut self) -> Option<(Instant, Errand)> {
        let found = std::mem::take(&mut self.manager.known().former);
        for record in &found {
            self.formers.note(&self.manager, record);
        }
        let echo = self.plan_echo().map(|at| (at, Errand::Echo));
        let former = self.formers.due().map(|at| (at, Errand::Former));
        let answer = (!self.questions.is_empty()).then_some((self.answer_at, Errand::Answer));
        let errands = [answer, former, echo];
        errands.into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    async fn run(&mut self, errand: Errand) {
        match errand {
            Errand::Echo => self.echo().await,
            Errand::Answer => self.answer().await,
            Errand::Former => {
                let manager = self.manager.clone();
                let look = self.formers.look(&manager);
                // What takes too long is tried again.
                tokio::time::timeout(manager.options().patience, look)
                    .await
                    .ok();
            }
        }
    }

    /// Answers the next question, or leaves it to its asker to put it again.
    async fn answer(&mut self) {
        self.answer_at = Instant::now() + ANSWER_EVERY;
        let behind = (Bound::Excluded(&self.answered), Bound::Unbounded);
        let next = self.questions.range::<String, _>(behind).next();
        let next = next.or_else(|| self.questions.first_key_value());
        let Some(key) = next.map(|(key, _)| key.clone()) else {
            return;
        };
        let Some(question) = self.questions.remove(&key) else {
            return;
        };
        self.answered = key;
        let manager = self.manager.clone();
        let done = in_time(manager.options().patience, manager.answer(&question)).await;
        if let Err(error) = done {
            tracing::debug!(%error, "a question could not be answered");
        }
    }

    async fn take(&mut self, answer: WatchAnswer, since: Revision) -> Result<()> {
        let events = match answer {
            WatchAnswer::Progress { revision } => {
                self.ready.push_back(Event::Progress(revision));
                return Ok(());
            }
            WatchAnswer::Events { events, .. } => events,
        };
        let manager = self.manager.clone();
        let layout = &manager.options().layout;
        for event in events {
            if event.revision() <= since {
                continue;
            }
            if layout.is_question(event.key()) {
                if let KeyEvent::Put(asked) = event {
                    self.asked(asked);
                }
                continue;
            }
            let is_config = event.key() == layout.config();
            if !is_config && !layout.is_record(event.key()) {
                continue;
            }
            let event = match event {
                KeyEvent::Put(entry) if is_config => self.config_event(Some(entry)),
                KeyEvent::Delete { .. } if is_config => self.config_event(None),
                KeyEvent::Put(entry) => {
                    let record = Record::parse(entry);
                    self.note(&record);
                    in_time(manager.options().patience, manager.yield_to(&record)).await?;
                    match record.lease(manager.options().ttl) {
                        Ok(lease) => Event::Put(lease),
                        Err(unreadable) => Event::Unreadable(unreadable),
                    }
                }
                KeyEvent::Delete { key, revision } => {
                    self.gos.remove(&key);
                    self.formers.forget(&key);
                    manager.known().has_gos = !self.gos.is_empty();
                    Event::Delete {
                        key: lease_key(&key),
                        revision,
                    }
                }
            };
            self.ready.push_back(event);
        }
        Ok(())
    }

    /// Notes a question that we are to answer. Its value is the asker's, and of any size.
    fn asked(&mut self, asked: KeyValue) {
        if self.manager.answer_to(&asked).is_none() {
            return;
        }
        let value = Vec::new();
        let asked = KeyValue { value, ..asked };
        if self.questions.len() < MOST_QUESTIONS || self.questions.contains_key(&asked.key) {
            self.questions.insert(asked.key.clone(), asked);
        }
    }

    /// Notes whether Go flannel can have written a record.
    fn note(&mut self, record: &Record) {
        self.formers.note(&self.manager, record);
        if self.manager.is_gos(record) {
            self.gos.insert(record.entry.key.clone());
        } else {
            self.gos.remove(&record.entry.key);
        }
        self.manager.known().has_gos = !self.gos.is_empty();
    }

    /// When our record is to be put again, for nodes of Go flannel's that missed the last write: they
    /// miss some that come close together, so this comes at a time of its own.
    fn plan_echo(&mut self) -> Option<Instant> {
        if self.gos.is_empty() || !self.manager.known().unheard {
            self.echo_at = None;
        } else if self.echo_at.is_none() {
            self.echo_at = Some(Instant::now() + self.rng.below(ECHO_WITHIN));
        }
        self.echo_at
    }

    /// Puts our record again, or tries it later.
    async fn echo(&mut self) {
        let done = in_time(self.manager.options().patience, self.manager.put_again()).await;
        if let Err(error) = &done {
            tracing::debug!(%error, "our record could not be put again");
        }
        self.echo_at = match done {
            Ok(true) => None,
            _ => Some(Instant::now() + ECHO_WITHIN),
        };
    }

    fn config_event(&self, entry: Option<KeyValue>) -> Event {
        let Some(entry) = entry else {
            return Event::ConfigUnreadable {
                reason: "there is no network config in the store".to_owned(),
            };
        };
        match parse_config(&entry.value) {
            Ok(config) => {
                self.manager.saw(&config);
                Event::Config(config)
            }
            Err(error) => Event::ConfigUnreadable {
                reason: flannel_core::error_chain(&error),
            },
        }
    }
}

/// A write that keeps the watch waiting no longer than that may be silent.
async fn in_time<T>(
    patience: Duration,
    call: impl Future<Output = StoreResult<T>> + Send,
) -> StoreResult<T> {
    let answer = tokio::time::timeout(patience, call).await;
    answer.unwrap_or_else(|_| Err(StoreError::unavailable("a write took too long")))
}

fn silent(what: &str) -> Error {
    Error::unavailable(format!("{what} was silent for too long"))
}
