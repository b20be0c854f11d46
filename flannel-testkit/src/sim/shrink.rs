//! Making a history that fails as small as it can be.

use std::time::Duration;

use super::action::Step;
use super::judge::Invariant;
use super::run::Run;
use super::{History, Sim};

/// The most runs spent on one history.
const RUNS: usize = 600;

struct Shrinker<'a> {
    sim: &'a Sim,
    invariant: Invariant,
    best: Run,
    runs: usize,
}

impl Sim {
    /// Makes a history that broke an invariant smaller, as long as it still breaks the same one:
    /// first by leaving out parts of it, halves and then less down to single steps (delta debugging),
    /// then by shorter pauses. What is left cannot lose any single step. A run that broke nothing
    /// comes back as it is.
    pub fn shrink(&self, run: Run) -> Run {
        let Some(violation) = &run.violation else {
            return run;
        };
        let mut shrinker = Shrinker {
            sim: self,
            invariant: violation.invariant,
            best: run,
            runs: 0,
        };
        shrinker.leave_out();
        shrinker.hurry();
        shrinker.leave_out();
        shrinker.best
    }
}

impl Shrinker<'_> {
    /// Takes a history if it fails in the same way.
    fn try_out(&mut self, actions: Vec<Step>) -> bool {
        if self.runs >= RUNS {
            return false;
        }
        self.runs += 1;
        let history = History {
            actions,
            ..self.best.history.clone()
        };
        let run = self.sim.replay(&history);
        let fails = run
            .violation
            .as_ref()
            .is_some_and(|violation| violation.invariant == self.invariant);
        if fails {
            self.best = run;
        }
        fails
    }

    fn leave_out(&mut self) {
        let mut size = self.best.history.actions.len().div_ceil(2);
        while size > 0 {
            let mut from = 0;
            let mut smaller = false;
            while from < self.best.history.actions.len() {
                let actions = &self.best.history.actions;
                let to = (from + size).min(actions.len());
                let rest = [&actions[..from], &actions[to..]].concat();
                if self.try_out(rest) {
                    smaller = true;
                } else {
                    from += size;
                }
            }
            if size == 1 && smaller && self.runs < RUNS {
                continue;
            }
            size /= 2;
        }
    }

    fn hurry(&mut self) {
        for at in 0..self.best.history.actions.len() {
            for then in [Duration::ZERO, Duration::from_secs(1)] {
                let mut actions = self.best.history.actions.clone();
                let Some(step) = actions.get_mut(at).filter(|step| step.then > then) else {
                    continue;
                };
                step.then = then;
                if self.try_out(actions) {
                    break;
                }
            }
        }
    }
}
