//! Many seeds, and what came of them.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::Sim;
use super::run::Run;
use super::wall::Stopwatch;

/// What came of many seeds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Report {
    /// How many seeds were run.
    pub seeds: u64,
    /// How many steps these had in all.
    pub steps: u64,
    /// The seeds that broke something, in their order.
    pub failed: Vec<Failure>,
    /// How often each kind of event and fault took effect.
    pub counts: BTreeMap<String, u64>,
    /// The longest time that any cluster took to become right after the last fault.
    pub slowest: Duration,
    /// The seed whose run took longest, and how much wall time it took.
    pub costliest: Option<(u64, Duration)>,
    /// The kinds that apply to the clusters that were run.
    #[serde(skip)]
    kinds: Vec<&'static str>,
}

/// A seed that broke something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// How many nodes its cluster has.
    pub nodes: usize,
    /// How long histories are.
    pub steps: usize,
    /// What it broke, in words.
    pub what: String,
    /// The smallest history found that breaks it too; `None` for a seed that did not do the same
    /// twice, and for all but the first failures.
    pub minimal: Option<Box<Run>>,
    /// Making it smaller was ended by the bound of time ([`Sim::shrink_for`]): it may not be minimal.
    pub unfinished: bool,
}

/// How far a run of many seeds is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// How many seeds are done.
    pub done: u64,
    /// How many of these failed.
    pub failed: u64,
    /// How many seeds there are.
    pub of: u64,
}

/// How many failures are made small: more tell nothing new and take long.
const SHRUNK: usize = 3;

impl Sim {
    /// Runs seeds on so many threads, each seed twice: two runs that differ are a failure too. Tells
    /// after every seed how far it is.
    pub fn seeds(
        &self,
        seeds: Range<u64>,
        jobs: usize,
        tell: &(dyn Fn(Progress) + Sync),
    ) -> Report {
        self.run_seeds(seeds, jobs, 1, tell)
    }

    /// The same with every `nth` seed run twice and the others once.
    pub fn run_seeds(
        &self,
        seeds: Range<u64>,
        jobs: usize,
        nth: u64,
        tell: &(dyn Fn(Progress) + Sync),
    ) -> Report {
        let next = AtomicU64::new(seeds.start);
        let report = Mutex::new(Report {
            kinds: self.kinds(),
            ..Report::default()
        });
        let of = seeds.end.saturating_sub(seeds.start);
        thread::scope(|scope| {
            for _ in 0..jobs.max(1) {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= seeds.end {
                            return;
                        }
                        let (run, took, failure) =
                            self.run_checked(seed, seed.is_multiple_of(nth.max(1)));
                        let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
                        report.add(run, took, failure);
                        tell(Progress {
                            done: report.seeds,
                            failed: report.failed.len() as u64,
                            of,
                        });
                    }
                });
            }
        });
        let mut report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
        report.failed.sort_by_key(|failure| failure.seed);
        self.make_small(&mut report.failed);
        report
    }

    /// Makes the first failures small, each in its share of the time that there is.
    fn make_small(&self, failed: &mut [Failure]) {
        let watch = Stopwatch::start();
        let with_history = failed
            .iter_mut()
            .filter(|failure| failure.minimal.is_some());
        let mut left = with_history.count().min(SHRUNK);
        for failure in failed {
            let Some(run) = failure.minimal.take() else {
                continue;
            };
            if left == 0 {
                continue;
            }
            let time = self.setup.shrink_for.saturating_sub(watch.elapsed());
            let shrunk = self.shrink(*run, time / u32::try_from(left).unwrap_or(u32::MAX));
            failure.minimal = Some(Box::new(shrunk.run));
            failure.unfinished = !shrunk.is_minimal;
            left -= 1;
        }
    }

    fn run_checked(&self, seed: u64, twice: bool) -> (Run, Duration, Option<Failure>) {
        let watch = Stopwatch::start();
        let run = self.run(seed);
        let took = watch.elapsed();
        let again = twice.then(|| self.run(seed));
        let failure = |what, minimal| Failure {
            seed,
            nodes: self.setup.nodes,
            steps: self.setup.steps,
            what,
            minimal,
            unfinished: false,
        };
        let failure = match (&again, &run.violation) {
            (Some(again), _) if again.digest != run.digest => {
                let (a, b) = (run.digest, again.digest);
                let what = format!("two runs differ: digests {a:016x} and {b:016x}");
                Some(failure(what, None))
            }
            (_, Some(violation)) => {
                let history = Some(Box::new(run.clone()));
                Some(failure(violation.to_string(), history))
            }
            _ => None,
        };
        (run, took, failure)
    }
}

impl Report {
    fn add(&mut self, run: Run, took: Duration, failure: Option<Failure>) {
        if self.costliest.is_none_or(|(_, most)| took > most) {
            self.costliest = Some((run.history.seed, took));
        }
        self.seeds += 1;
        self.steps += run.history.actions.len() as u64;
        for (kind, times) in run.counts {
            *self.counts.entry(kind).or_default() += times;
        }
        self.slowest = self.slowest.max(run.settled.unwrap_or_default());
        self.failed.extend(failure);
    }

    /// What came of both: of other seeds, or of larger clusters.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.seeds += other.seeds;
        self.steps += other.steps;
        self.failed.extend(other.failed);
        for (kind, times) in other.counts {
            *self.counts.entry(kind).or_default() += times;
        }
        self.slowest = self.slowest.max(other.slowest);
        let took = |costliest: Option<(u64, Duration)>| costliest.map(|(_, took)| took);
        if took(other.costliest) > took(self.costliest) {
            self.costliest = other.costliest;
        }
        let more = other.kinds.into_iter();
        let more: Vec<&str> = more.filter(|kind| !self.kinds.contains(kind)).collect();
        self.kinds.extend(more);
        self
    }

    /// The kinds of things that never took effect though they apply ([`Sim::kinds`]): what was never
    /// tried proves nothing.
    pub fn missing(&self) -> Vec<&'static str> {
        let counted = |kind: &&&str| !self.counts.contains_key(**kind);
        self.kinds.iter().filter(counted).copied().collect()
    }
}

impl fmt::Display for Report {
    /// The failures with their minimal histories.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seeds, failed) = (self.seeds, self.failed.len());
        writeln!(f, "{seeds} seeds, {failed} failed")?;
        for failure in &self.failed {
            let Failure {
                seed, nodes, steps, ..
            } = failure;
            let what = &failure.what;
            writeln!(f, "seed {seed} (--nodes {nodes} --steps {steps}): {what}")?;
            if let Some(run) = &failure.minimal {
                if let Some(violation) = &run.violation {
                    let minimal = match failure.unfinished {
                        true => "smallest history found before the time for that was over",
                        false => "minimal history",
                    };
                    writeln!(f, "{minimal}, {violation}")?;
                }
                write!(f, "{}", run.history)?;
            }
        }
        Ok(())
    }
}
