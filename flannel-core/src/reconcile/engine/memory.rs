//! The engine's memory over restarts: read at the start, saved when it differs, and tried again
//! until it is saved. A place that does not answer costs the overlay a bounded time once, and
//! nothing after that.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::{Engine, NETWORKS};
use crate::backend::Note;
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::condition::ConditionType;
use crate::state::{SavedState, StateStore};

/// The time that a place is given for one answer.
const ANSWER: Duration = Duration::from_secs(10);

/// The waits before a state that could not be saved is saved again.
const FIRST: Duration = Duration::from_secs(1);
const MOST: Duration = Duration::from_secs(60);

/// The way of the state to its place.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Why the state of before could not be read, while it is not kept aside: until it is, nothing
    /// is written over it.
    unread: Option<String>,
    /// The number of failures in a row to save it, and the time to try again.
    failures: u32,
    pub(super) due: Option<Moment>,
    writing: Option<Writing>,
    /// The state is another than the one that is being written.
    is_stale: bool,
}

/// A try to save the state that nobody waits for.
struct Writing(Pin<Box<dyn Future<Output = Written> + Send>>);

impl fmt::Debug for Writing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writing")
    }
}

/// The outcome of a try.
#[derive(Debug)]
pub(super) struct Written {
    /// Where what could not be read is now, if that had to be kept aside and was.
    kept: Option<Option<String>>,
    result: Result<(), Failure>,
}

/// Why the state is not saved.
#[derive(Debug)]
enum Failure {
    /// The unreadable state of before cannot be kept aside.
    NotKept(io::Error),
    NotSaved(io::Error),
}

/// Waits for the try that is under way.
pub(super) async fn written(memory: &mut Memory) -> Written {
    match &mut memory.writing {
        Some(writing) => {
            let written = writing.0.as_mut().await;
            memory.writing = None;
            written
        }
        None => std::future::pending().await,
    }
}

impl Engine {
    /// Reads what was remembered of an earlier run.
    pub(super) async fn load(&mut self) {
        let Some(state) = &self.parts.state else {
            let message = "nothing is kept over a restart: the overlay was given no place for it";
            self.holds(ConditionType::State, "NoPlace", message);
            return;
        };
        match answer(state.load()).await {
            Ok(Some(saved)) => {
                self.networks = saved.networks.iter().copied().take(NETWORKS).collect();
                let given = self.parts.instance.or(saved.instance);
                self.instance = given.unwrap_or(self.instance);
                if let Some(interface) = &saved.interface {
                    self.in_use.remember(interface);
                }
                self.saved = saved;
            }
            Ok(None) => {}
            Err(error) => {
                let kept = answer(state.keep_aside()).await;
                self.state_note = Some(unread(&error.to_string(), kept.as_ref()));
                if let Err(kept) = kept {
                    self.memory.unread = Some(error.to_string());
                    self.not_saved(&Failure::NotKept(kept));
                }
            }
        }
    }

    /// Remembers lease and config, if they are other than what is remembered.
    pub(super) async fn save(&mut self) {
        let Some(state) = self.parts.state.clone() else {
            return;
        };
        // Before the kernel was asked, what an earlier run knew is neither confirmed nor wrong.
        let (devices, namespace) = match &self.features {
            Some(features) => (self.known.clone(), features.namespace.clone()),
            None => (self.saved.devices.clone(), self.saved.namespace.clone()),
        };
        let saved = SavedState {
            lease: self
                .lease
                .held()
                .cloned()
                .or_else(|| self.saved.lease.clone()),
            config: match &self.config {
                Some(config) => Some(config.text().to_owned()),
                None => self.saved.config.clone(),
            },
            networks: self.networks.clone(),
            interface: self.in_use.to_save(),
            instance: Some(self.instance),
            devices,
            namespace,
        };
        let differs = saved != self.saved;
        self.saved = saved;
        let memory = &mut self.memory;
        if memory.failures > 0 || memory.writing.is_some() {
            // The next try takes what is then to be remembered.
            memory.is_stale |= differs;
        } else if differs {
            let written = write(state, None, self.saved.clone()).await;
            self.written(written);
        } else {
            self.holds(ConditionType::State, "Saved", "");
        }
    }

    /// Begins to save what could not be saved, when its time has come.
    pub(super) fn save_again(&mut self) {
        let memory = &mut self.memory;
        let now = self.parts.clock.now();
        if let Some(state) = &self.parts.state
            && memory.due.is_some_and(|at| at <= now)
        {
            memory.due = None;
            memory.is_stale = false;
            let (state, unread) = (Arc::clone(state), memory.unread.clone());
            let write = write(state, unread, self.saved.clone());
            memory.writing = Some(Writing(Box::pin(write)));
        }
    }

    /// Tries to save what could not be saved a last time, before the engine ends.
    pub(super) async fn save_at_last(&mut self) {
        // What is under way may be an earlier state.
        if self.memory.writing.is_some() {
            let written = written(&mut self.memory).await;
            self.written(written);
        }
        if self.memory.due.is_some() {
            self.memory.due = Some(self.now());
            self.save_again();
            let written = written(&mut self.memory).await;
            self.written(written);
        }
    }

    /// Takes in what became of a try to save.
    pub(super) fn written(&mut self, written: Written) {
        let Written { kept, result } = written;
        if let Some(kept) = kept
            && let Some(error) = self.memory.unread.take()
        {
            self.state_note = Some(unread(&error, Ok(&kept)));
        }
        match result {
            Ok(()) => {
                let stale = std::mem::take(&mut self.memory.is_stale);
                self.memory.failures = 0;
                self.memory.due = stale.then(|| self.now());
                self.holds(ConditionType::State, "Saved", "");
            }
            Err(failure) => self.not_saved(&failure),
        }
    }

    fn not_saved(&mut self, failure: &Failure) {
        let memory = &mut self.memory;
        memory.failures = memory.failures.saturating_add(1);
        let wait = Backoff::new(FIRST, MOST).after(memory.failures, &mut self.parts.rng);
        memory.due = Some(self.parts.clock.now() + wait);
        let (reason, message) = match failure {
            Failure::NotKept(error) => (
                "NotKept",
                format!(
                    "what is there cannot be read and cannot be kept aside ({error}), so nothing is \
                     saved over it"
                ),
            ),
            Failure::NotSaved(error) if error.kind() == io::ErrorKind::TimedOut => {
                ("NoAnswer", format!("the place does not answer: {error}"))
            }
            Failure::NotSaved(error) => ("NotSaved", error.to_string()),
        };
        let message = format!("{message}; a restart would not know of now, and it is tried again");
        self.fails(ConditionType::State, reason, message, false);
    }
}

/// Keeps aside what could not be read, if that is still to be done, and saves.
async fn write(state: Arc<dyn StateStore>, unread: Option<String>, saved: SavedState) -> Written {
    let mut kept = None;
    if unread.is_some() {
        match answer(state.keep_aside()).await {
            Ok(place) => kept = Some(place),
            Err(error) if error.kind() == io::ErrorKind::NotFound => kept = Some(None),
            Err(error) => {
                let result = Err(Failure::NotKept(error));
                return Written { kept, result };
            }
        }
    }
    let result = answer(state.save(&saved)).await.map_err(Failure::NotSaved);
    Written { kept, result }
}

/// Waits for a place to answer, but not for ever.
async fn answer<T>(call: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let answer = tokio::time::timeout(ANSWER, call).await;
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer in {ANSWER:?}"));
    answer.unwrap_or_else(|_| Err(late()))
}

/// The note on a saved state that could not be read.
fn unread(error: &str, kept: Result<&Option<String>, &io::Error>) -> Note {
    let kept = match kept {
        Ok(Some(place)) => format!("it is kept as {place}"),
        Ok(None) => "it is written over".to_owned(),
        Err(error) => format!("it cannot be kept ({error}), and nothing is written over it"),
    };
    let text = format!(
        "the saved state cannot be read ({error}): this node starts without its memory, as a new \
         machine unless its instance id is given; {kept}"
    );
    tracing::warn!("{text}");
    let topic = "saved-state".to_owned();
    Note { topic, text }
}
