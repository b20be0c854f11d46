//! A sequence of named steps with their times.

use std::time::{Duration, Instant};

use crate::run::Outcome;

/// A named step.
pub(crate) struct Stage<'a> {
    name: &'static str,
    run: Box<dyn FnOnce() -> Outcome + 'a>,
}

impl<'a> Stage<'a> {
    pub(crate) fn new(name: &'static str, run: impl FnOnce() -> Outcome + 'a) -> Self {
        Self {
            name,
            run: Box::new(run),
        }
    }
}

/// Runs the steps in order up to the first that fails; prints a table of them at the end.
pub(crate) fn run_all(stages: Vec<Stage<'_>>) -> Outcome {
    let mut table: Vec<(&str, &str, Option<Duration>)> = Vec::new();
    let mut result = Ok(());
    for stage in stages {
        if result.is_err() {
            table.push((stage.name, "not run", None));
            continue;
        }
        println!("\n==> {}", stage.name);
        let start = Instant::now();
        let outcome = (stage.run)();
        let took = start.elapsed();
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!(
            "==> {}: {word} after {:.1} s",
            stage.name,
            took.as_secs_f64()
        );
        table.push((stage.name, word, Some(took)));
        result = outcome.map_err(|reason| format!("stage {}: {reason}", stage.name));
    }
    println!("\nstage        result   seconds");
    let mut total = Duration::ZERO;
    for (name, word, took) in table {
        total += took.unwrap_or_default();
        let seconds = took.map_or_else(String::new, |took| format!("{:.1}", took.as_secs_f64()));
        println!("{name:<12} {word:<7} {seconds:>8}");
    }
    println!("{:<12} {:<7} {:>8.1}", "all", "", total.as_secs_f64());
    result
}
