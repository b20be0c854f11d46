//! One run of one history.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::judge::Violation;
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
        self.run_history(history, false)
    }

    /// Runs a history and keeps all that can be observed.
    pub fn replay_in_full(&self, history: &History) -> Run {
        self.run_history(history, true)
    }

    fn run_history(&self, history: &History, keep_trace: bool) -> Run {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime of one thread without I/O");
        runtime.block_on(async {
            let mut world = World::new(&self.setup, history, keep_trace);
            for step in &history.actions {
                world.act(&step.action).await;
                world.pass(step.then).await;
                if world.judge.verdict().is_some() {
                    break;
                }
                world.trust_who_knows();
            }
            let settled = match world.judge.verdict() {
                Some(_) => None,
                None => world.settle().await,
            };
            let violation = world.judge.verdict();
            if let Some(violation) = &violation {
                world.trace.add(&violation.to_string());
            }
            let World { counts, trace, .. } = world;
            let (digest, trace) = trace.finish();
            Run {
                history: history.clone(),
                digest,
                violation,
                counts,
                settled,
                trace,
            }
        })
    }
}
