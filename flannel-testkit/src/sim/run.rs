//! One run of one history.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::judge::Violation;
use super::wall::Deadline;
use super::world::World;
use super::{History, Sim};

/// What came of a history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Run {
    /// The history.
    pub history: History,
    /// A digest of all that could be observed: what was asked of kernels and stores and what they
    /// answered, every record, event and status, each with its time.
    pub digest: u64,
    /// What did not hold, if anything: the first such thing.
    pub violation: Option<Violation>,
    /// How many of the history's steps were begun: all of them, unless something broke before.
    pub steps: usize,
    /// How often each kind of event and fault took effect.
    pub counts: BTreeMap<String, u64>,
    /// How long the cluster took to become right after the last fault.
    pub settled: Option<Duration>,
    /// All that could be observed, line by line, if that was asked for.
    #[serde(skip)]
    pub trace: Vec<String>,
}

impl Sim {
    /// Runs the history of a seed.
    pub fn run(&self, seed: u64) -> Run {
        self.replay(&self.history(seed))
    }

    /// Runs a history.
    pub fn replay(&self, history: &History) -> Run {
        self.run_history(history, false, Deadline::NEVER)
            .expect("it is never given up")
    }

    /// Runs a history and keeps all that can be observed.
    pub fn replay_in_full(&self, history: &History) -> Run {
        self.run_history(history, true, Deadline::NEVER)
            .expect("it is never given up")
    }

    /// Runs a history; `None` if it was given up because the time is over.
    pub(super) fn replay_until(&self, history: &History, deadline: Deadline) -> Option<Run> {
        self.run_history(history, false, deadline)
    }

    fn run_history(&self, history: &History, keep_trace: bool, deadline: Deadline) -> Option<Run> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime of one thread without I/O");
        runtime.block_on(async {
            let mut world = World::new(&self.setup, history, keep_trace, deadline);
            let mut steps = 0;
            for step in &history.actions {
                steps += 1;
                world.act(&step.action).await;
                world.pass(step.then).await;
                if world.is_over() {
                    break;
                }
                world.trust_who_knows();
            }
            let settled = match world.is_over() {
                true => None,
                false => world.settle().await,
            };
            if world.is_given_up() {
                return None;
            }
            let violation = world.judge.verdict();
            if let Some(violation) = &violation {
                world.trace.add(&violation.to_string());
            }
            let World { counts, trace, .. } = world;
            let (digest, trace) = trace.finish();
            Some(Run {
                history: history.clone(),
                digest,
                violation,
                steps,
                counts,
                settled,
                trace,
            })
        })
    }
}
