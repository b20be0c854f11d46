//! A [`KubeManager`](crate::KubeManager)'s watch: a list of all Nodes, then what changes, and the
//! list again after anything that may have lost a change.
//!
//! A watch that ends is gone on with from the version that it came to; the server says when it has
//! no history from there (410), and then, as after a long silence, everything is listed anew.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use flannel_core::manager::{Error, Result};
use flannel_core::{Backoff, Event, LeaseKey, Revision, Rng, Snapshot};
use futures_core::Stream;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::{Instant, sleep_until, timeout};

use crate::calls::Parts;
use crate::failure::{Failure, Refusal};
use crate::node::NodeView;
use crate::record::Network;
use crate::shared::Shared;

/// The waits between one failure and the next beginning.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const MOST_WAIT: Duration = Duration::from_secs(10);

/// The longest wait that a server can ask of us.
const MOST_PATIENCE: Duration = Duration::from_secs(60);

/// A watch that a server ends sooner than this, having said nothing, has failed.
const BRIEF: Duration = Duration::from_secs(1);

/// How long a server is asked to keep a watch open, in seconds: from this to twice this.
const WATCH_SECONDS: u64 = 300;

/// How many Nodes are taken together, as the API server tells them; of changes, the last of each Node
/// counts. A Node can have tens of kilobytes before it is decoded.
const BATCH: usize = 128;

/// How long to wait before a condition is restored another time.
const TEND_AGAIN: Duration = Duration::from_secs(5);

/// The watch as a stream: polls one step after the other.
pub(crate) struct ListWatch(Step);

/// A step under way: its item, and what comes after it.
type Step = Pin<Box<dyn Future<Output = (Result<Event>, Steps)> + Send>>;

impl ListWatch {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let rng = Rng::from_text(&shared.seed());
        let steps = Steps {
            shared,
            rng,
            failures: 0,
            in_trouble: false,
            wait: None,
            position: None,
            is_fresh: false,
            open: None,
            known: BTreeMap::new(),
            ready: VecDeque::new(),
            config: None,
            config_at: None,
            tend: None,
        };
        Self(Box::pin(steps.next()))
    }
}

impl Stream for ListWatch {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll(cx).map(|(item, steps)| {
            self.0 = Box::pin(steps.next());
            Some(item)
        })
    }
}

/// A watch that is open.
struct Open {
    parts: Parts,
    since: Instant,
    /// When anything came last, and whether anything has.
    heard: Instant,
    has_spoken: bool,
    /// When the server is asked whether it is there.
    probe_at: Instant,
}

struct Steps {
    shared: Arc<Shared>,
    rng: Rng,
    /// How many steps have failed since the watch last said something.
    failures: u32,
    /// Whether a failure was told, and nothing since.
    in_trouble: bool,
    /// The least that is to be waited before the next beginning, because the last step failed.
    wait: Option<Duration>,
    /// The version that we have come to; `None`: everything is to be listed.
    position: Option<u64>,
    /// Whether nothing has come since the list.
    is_fresh: bool,
    open: Option<Open>,
    /// Of each record, what it was made from: what else changes on a Node is nobody's business.
    known: BTreeMap<LeaseKey, NodeView>,
    ready: VecDeque<Event>,
    /// What was told of the config last.
    config: Option<Event>,
    config_at: Option<Instant>,
    /// A Node of ours whose condition is to be restored, and when.
    tend: Option<(LeaseKey, Instant)>,
}

impl Steps {
    /// The next item, and what comes after it.
    async fn next(mut self) -> (Result<Event>, Self) {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.in_trouble = false;
                return (Ok(event), self);
            }
            let step = match self.open.take() {
                None => self.begin().await,
                Some(open) => self.proceed(open).await,
            };
            if let Err(failure) = step {
                self.failures = self.failures.saturating_add(1);
                self.in_trouble = true;
                self.wait = Some(failure.retry_after().unwrap_or_default());
                return (Err(self.meaning(failure)), self);
            }
        }
    }

    fn meaning(&self, failure: Failure) -> Error {
        let verb = if self.position.is_some() {
            "watch"
        } else {
            "list"
        };
        failure.meaning(verb, "nodes")
    }

    /// Lists everything where that is to be done, and opens a watch.
    async fn begin(&mut self) -> Result<(), Failure> {
        if let Some(asked) = self.wait.take() {
            let backoff = Backoff::new(FIRST_WAIT, MOST_WAIT);
            let wait = backoff.after(self.failures, &mut self.rng);
            let asked = asked.min(MOST_PATIENCE);
            tokio::time::sleep(wait.max(asked + self.rng.below(asked / 4))).await;
        }
        let Some(position) = self.position else {
            self.list().await?;
            self.is_fresh = true;
            return Ok(());
        };
        let jitter = self.rng.next_u64() % WATCH_SECONDS;
        let seconds = WATCH_SECONDS + jitter;
        let parts = match self.shared.calls.watch(position, seconds).await {
            Err(failure) if failure.code() == 410 => return self.history_is_lost(failure),
            parts => parts?,
        };
        if self.in_trouble {
            // Whoever was told of it hears of its end.
            self.ready.push_back(Event::Progress(Revision(position)));
        }
        let now = Instant::now();
        self.open = Some(Open {
            parts,
            since: now,
            heard: now,
            has_spoken: false,
            probe_at: now + self.shared.options.probe_every,
        });
        Ok(())
    }

    /// The server does not remember what happened since our position.
    fn history_is_lost(&mut self, failure: Failure) -> Result<(), Failure> {
        self.position = None;
        // That of a list that was just made is not lost: something else is wrong.
        if self.is_fresh { Err(failure) } else { Ok(()) }
    }

    /// Reads everything.
    async fn list(&mut self) -> Result<(), Failure> {
        let shared = Arc::clone(&self.shared);
        let mut parts = match shared.calls.list(shared.floor()).await {
            Err(failure) if failure.is_too_new() => {
                // The store was restored from a backup, or this server is far behind: what the
                // store itself says is true.
                shared.forget_floor();
                shared.calls.list(None).await?
            }
            parts => parts?,
        };
        let mut snapshot = Snapshot::default();
        let mut known = BTreeMap::new();
        let limit = shared.options.call_timeout;
        loop {
            let next = timeout(limit, parts.next_alive(BATCH)).await;
            let Some(objects) = next.unwrap_or_else(|_| Err(Failure::silent(limit)))? else {
                break;
            };
            for object in objects {
                let node = shared.calls.decode(&object)?;
                shared.saw(&node);
                let key = LeaseKey::new(&node.name);
                self.look_after(&key, &node);
                match shared.shown(&node) {
                    None => continue,
                    Some(Ok(lease)) => snapshot.leases.push(lease),
                    Some(Err(unreadable)) => snapshot.unreadable.push(unreadable),
                }
                known.insert(key, node);
            }
        }
        let version = parts.version()?;
        snapshot.revision = Revision(version);
        self.known = known;
        self.position = Some(version);
        self.ready.push_back(Event::Snapshot(snapshot));
        self.config = None;
        self.look_at_config().await;
        Ok(())
    }

    /// Waits for what the watch says next, or for the time at which something is to be done.
    async fn proceed(&mut self, mut open: Open) -> Result<(), Failure> {
        let silent_at = open.heard + self.shared.options.silence;
        let tend_at = self.tend.as_ref().map(|(_, at)| *at);
        let wake = [
            Some(silent_at),
            Some(open.probe_at),
            self.config_at,
            tend_at,
        ];
        let wake = wake.into_iter().flatten().min().unwrap_or(silent_at);
        let said = tokio::select! {
            biased;
            said = open.parts.next_alive(BATCH) => Some(said?),
            () = sleep_until(wake) => None,
        };
        let now = Instant::now();
        match said {
            Some(Some(objects)) => {
                open.heard = now;
                open.has_spoken = true;
                open.probe_at = now + self.shared.options.probe_every;
                self.failures = 0;
                if !self.take(&objects)? {
                    return Ok(());
                }
            }
            Some(None) => {
                // The server has ended it, as it does from time to time.
                return if now < open.since + BRIEF && !open.has_spoken {
                    let problem = "the watch ended as soon as it began";
                    Err(Failure::NoAnswer(problem.to_owned()))
                } else {
                    Ok(())
                };
            }
            None if now >= silent_at => {
                // It may be a watch from a version that a restored store has not come to.
                self.position = None;
                return Err(Failure::NoAnswer(
                    "the watch was silent too long".to_owned(),
                ));
            }
            None => {
                if now >= open.probe_at {
                    self.shared.calls.probe().await?;
                    self.failures = 0;
                    open.probe_at = Instant::now() + self.shared.options.probe_every;
                }
                if self.config_at.is_some_and(|at| at <= now) {
                    self.look_at_config().await;
                }
                if tend_at.is_some_and(|at| at <= now) {
                    self.tend().await;
                }
            }
        }
        self.open = Some(open);
        Ok(())
    }

    /// Takes what the watch said: of each Node the last that it said. Answers whether the watch
    /// goes on.
    fn take(&mut self, objects: &[Vec<u8>]) -> Result<bool, Failure> {
        let mut changes = BTreeMap::new();
        let mut bookmark = None;
        let mut end = Ok(true);
        for object in objects {
            let line: Line<'_> = serde_json::from_slice(object)
                .map_err(|error| Failure::Strange(error.to_string()))?;
            let version = match &*line.kind {
                "ERROR" => {
                    end = self.ended(Refusal::read(0, line.object.get().as_bytes()));
                    break;
                }
                "BOOKMARK" => {
                    let bookmarked = version_of(line.object)?;
                    bookmark = Some(bookmarked);
                    bookmarked
                }
                kind => {
                    let node = self.shared.calls.decode(line.object.get().as_bytes())?;
                    self.shared.saw(&node);
                    let version = node.revision.0;
                    self.changed(node, kind == "DELETED", &mut changes);
                    version
                }
            };
            self.is_fresh = false;
            self.position = Some(self.position.unwrap_or(0).max(version));
        }
        let mut changes: Vec<(Revision, Event)> = changes.into_values().collect();
        changes.sort_by_key(|(revision, _)| *revision);
        self.ready
            .extend(changes.into_iter().map(|(_, event)| event));
        if let (Some(version), true) = (bookmark, self.ready.is_empty()) {
            self.ready.push_back(Event::Progress(Revision(version)));
        }
        end
    }

    /// The server ends the watch with a reason.
    fn ended(&mut self, refusal: Refusal) -> Result<bool, Failure> {
        let failure = Failure::Refused(refusal);
        if failure.code() == 410 {
            self.history_is_lost(failure)?;
            return Ok(false);
        }
        Err(failure)
    }

    /// Notes what a change of a Node means.
    fn changed(
        &mut self,
        node: NodeView,
        is_deleted: bool,
        changes: &mut BTreeMap<LeaseKey, (Revision, Event)>,
    ) {
        let key = LeaseKey::new(&node.name);
        let revision = node.revision;
        let shown = if is_deleted {
            None
        } else {
            self.look_after(&key, &node);
            self.shared.shown(&node)
        };
        let Some(shown) = shown else {
            if self.known.remove(&key).is_some() {
                let event = Event::Delete {
                    key: key.clone(),
                    revision,
                };
                changes.insert(key, (revision, event));
            }
            return;
        };
        if self
            .known
            .get(&key)
            .is_some_and(|it| it.same_content(&node))
        {
            return;
        }
        self.known.insert(key.clone(), node);
        let event = shown.map_or_else(Event::Unreadable, Event::Put);
        changes.insert(key, (revision, event));
    }

    /// Notes whether a Node is ours and has not the condition that it should.
    fn look_after(&mut self, key: &LeaseKey, node: &NodeView) {
        if self.shared.network(node) == Network::Unsaid {
            if self.tend.as_ref().is_some_and(|(ours, _)| ours == key) {
                self.tend = None;
            }
        } else if self.shared.own(key).is_some() && self.tend.is_none() {
            self.tend = Some((key.clone(), Instant::now()));
        }
    }

    async fn tend(&mut self) {
        let Some((key, _)) = self.tend.take() else {
            return;
        };
        if let Err(error) = self.shared.tend(&key).await {
            tracing::debug!(%key, %error, "the condition NetworkUnavailable is not restored yet");
            self.tend = Some((key, Instant::now() + TEND_AGAIN));
        }
    }

    /// Tells of the config, if it is another than was told.
    async fn look_at_config(&mut self) {
        let event = self.shared.config_event().await;
        if let Some(event) = event
            && self.config.as_ref() != Some(&event)
        {
            self.config = Some(event.clone());
            self.ready.push_back(event);
        }
        self.config_at = self.shared.options.config_interval().map(|interval| {
            // Nodes that started together do not ask together.
            Instant::now() + interval - self.rng.below(interval / 4)
        });
    }
}

/// A line of a watch.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

/// The version of an object of which nothing else counts.
fn version_of(object: &RawValue) -> Result<u64, Failure> {
    #[derive(Deserialize)]
    struct Object {
        metadata: Meta,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Meta {
        resource_version: String,
    }

    let strange = |reason: String| Failure::Strange(reason);
    let object: Object =
        serde_json::from_str(object.get()).map_err(|error| strange(error.to_string()))?;
    let version = object.metadata.resource_version.parse();
    version.map_err(|_| strange("a bookmark's resourceVersion is no number".to_owned()))
}
