//! Making a history that fails as small as it can be, within a bound of wall time.

use std::time::Duration;

use super::action::{Action, Step, StoreAction};
use super::judge::{Invariant, Violation};
use super::run::Run;
use super::wall::Deadline;
use super::{History, Sim};

/// A history that was made smaller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shrunk {
    /// The smallest run found that breaks the same invariant.
    pub run: Run,
    /// Nothing can be left out any more; `false`: the time was over before that was known.
    pub is_minimal: bool,
}

struct Shrinker<'a> {
    sim: &'a Sim,
    class: (Invariant, String),
    best: Run,
    deadline: Deadline,
}

impl Sim {
    /// Makes a history that broke an invariant smaller, as long as it still breaks the same one, and
    /// takes no longer than this in wall time. First goes what came after the break; then parts of
    /// the history, halves and then less (delta debugging); then nodes and Go peers; then single
    /// steps; then the pauses become shorter. What is left cannot lose any single step, unless the
    /// time was over. A run that broke nothing comes back as it is.
    pub fn shrink(&self, run: Run, within: Duration) -> Shrunk {
        let Some(violation) = &run.violation else {
            return Shrunk {
                run,
                is_minimal: true,
            };
        };
        let mut shrinker = Shrinker {
            sim: self,
            class: class(violation),
            best: run,
            deadline: Deadline::after(within),
        };
        shrinker.end_at_the_break();
        shrinker.leave_out(COARSE);
        shrinker.leave_out_nodes();
        shrinker.leave_out(1);
        shrinker.hurry();
        shrinker.leave_out(1);
        Shrunk {
            is_minimal: !shrinker.deadline.is_over(),
            run: shrinker.best,
        }
    }
}

/// The smallest parts that are left out before nodes are: with fewer nodes each run costs less.
const COARSE: usize = 8;

/// What breaks in one way: the invariant, and of a cluster that does not become right the words of
/// what is wrong, because so many things can be.
fn class(violation: &Violation) -> (Invariant, String) {
    let words = match violation.invariant {
        Invariant::Converges => {
            let is_word = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase());
            let words: Vec<&str> = violation.what.split_whitespace().filter(is_word).collect();
            words.into_iter().take(4).collect::<Vec<_>>().join(" ")
        }
        _ => String::new(),
    };
    (violation.invariant, words)
}

impl Shrinker<'_> {
    /// Takes a history if it fails in the same way.
    fn try_out(&mut self, history: &History) -> bool {
        let run = self.sim.replay_until(history, self.deadline);
        let fails = |run: &Run| run.violation.as_ref().map(class) == Some(self.class.clone());
        match run.filter(fails) {
            Some(run) => {
                self.best = run;
                true
            }
            None => false,
        }
    }

    fn try_actions(&mut self, actions: Vec<Step>) -> bool {
        self.try_out(&History {
            actions,
            ..self.best.history.clone()
        })
    }

    fn end_at_the_break(&mut self) {
        let actions = &self.best.history.actions;
        if self.best.steps < actions.len() {
            self.try_actions(actions[..self.best.steps].to_vec());
        }
    }

    /// Leaves parts of the history out: its halves first, of this size last.
    fn leave_out(&mut self, least: usize) {
        let mut size = self.best.history.actions.len().div_ceil(2);
        while size >= least {
            let mut from = 0;
            let mut smaller = false;
            while from < self.best.history.actions.len() {
                if self.deadline.is_over() {
                    return;
                }
                let actions = &self.best.history.actions;
                let to = (from + size).min(actions.len());
                let rest = [&actions[..from], &actions[to..]].concat();
                if self.try_actions(rest) {
                    smaller = true;
                } else {
                    from += size;
                }
            }
            if size == 1 && smaller {
                continue;
            }
            size /= 2;
        }
    }

    /// Leaves out Go peers, and then nodes with all that happens to them, the last first.
    fn leave_out_nodes(&mut self) {
        for gos in 0..self.best.history.gos {
            let history = History {
                gos,
                ..self.best.history.clone()
            };
            if self.try_out(&history) {
                break;
            }
        }
        for node in (0..self.best.history.nodes).rev() {
            if self.deadline.is_over() {
                return;
            }
            if self.best.history.nodes > 1 {
                self.try_out(&without_node(&self.best.history, node));
            }
        }
    }

    fn hurry(&mut self) {
        for at in 0..self.best.history.actions.len() {
            for then in [Duration::ZERO, Duration::from_secs(1)] {
                if self.deadline.is_over() {
                    return;
                }
                let mut actions = self.best.history.actions.clone();
                let Some(step) = actions.get_mut(at).filter(|step| step.then > then) else {
                    continue;
                };
                step.then = then;
                if self.try_actions(actions) {
                    break;
                }
            }
        }
    }
}

/// The same history without a node: what happens to it is left out, those behind it move up.
fn without_node(history: &History, node: usize) -> History {
    let move_up = |of: &mut usize| {
        let at = *of % history.nodes;
        *of = if at > node { at - 1 } else { at };
        at != node
    };
    let mut actions = history.actions.clone();
    actions.retain_mut(|step| match &mut step.action {
        Action::Node(at, _)
        | Action::Link(at, _)
        | Action::Kernel(at, _)
        | Action::Store(
            StoreAction::Put(_, at, _)
            | StoreAction::Debris(_, at, _)
            | StoreAction::Take(at)
            | StoreAction::RemoveOf(at)
            | StoreAction::Garble(at)
            | StoreAction::Reserve(at)
            | StoreAction::Unreserve(at),
        ) => move_up(at),
        Action::Wait | Action::Store(_) | Action::Go(..) => true,
    });
    History {
        nodes: history.nodes - 1,
        actions,
        ..history.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::action::NodeAction;
    use super::*;

    #[test]
    fn nodes_behind_one_that_is_left_out_move_up() {
        let step = |action| Step {
            action,
            then: Duration::ZERO,
        };
        let history = |nodes, actions: Vec<Action>| History {
            seed: 0,
            nodes,
            gos: 0,
            config: 0,
            ttl: None,
            actions: actions.into_iter().map(step).collect(),
        };
        let start = |node| Action::Node(node, NodeAction::Start);
        let before = history(
            3,
            vec![
                start(0),
                start(1),
                start(2),
                // The same node as 1.
                start(4),
                Action::Store(StoreAction::Take(5)),
                Action::Wait,
            ],
        );
        let after = history(
            2,
            vec![
                start(0),
                start(1),
                Action::Store(StoreAction::Take(1)),
                Action::Wait,
            ],
        );
        assert_eq!(without_node(&before, 1), after);
    }
}
