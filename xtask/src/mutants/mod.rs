//! Mutants: deliberate defects in the product, each of which a test must catch.
//!
//! `mutants/README.md` says what they are for and how one is written.

mod catcher;
mod list;
mod tree;

use std::fmt::Write as _;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use crate::metadata::Workspace;
use crate::run::Outcome;

use catcher::{Bench, Verdict};
use list::{List, Mutant};
use tree::Tree;

/// From so many mutants on, two at a time are done sooner than one after the other: the second of
/// two builds the workspace once more.
const ENOUGH: usize = 12;

/// What became of one mutant.
struct Result<'a> {
    mutant: &'a Mutant,
    verdict: Verdict,
    seconds: f64,
}

/// Tries the named mutants, or all: each must be caught by the test that its entry names, or by the
/// one after `--by`.
pub(crate) fn run(args: &[String]) -> Outcome {
    let mut list = List::load()?;
    let names = match args {
        [by, test, names @ ..] if by == "--by" => {
            list.are_to_be_caught_by(&test.parse()?);
            names
        }
        names => names,
    };
    let mutants = list.selected(names)?;
    let workspace = Workspace::load()?;
    let target = workspace.target_directory.join("mutants");
    let logs = target.join("logs");
    fs::create_dir_all(&logs).map_err(|error| format!("{}: {error}", logs.display()))?;
    let bench = |tree: &str, build: &str| -> Outcome<Bench> {
        Ok(Bench {
            tree: Tree::copy(target.join(tree))?,
            packages: list.packages(),
            features: list.features(&workspace),
            build: target.join(build),
            logs: logs.clone(),
        })
    };
    let start = Instant::now();
    eprintln!("building the catchers of {} mutants", mutants.len());
    let first = bench("tree", "build")?;
    first.accept_the_original(&mutants)?;
    eprintln!(
        "they pass on the code as it is ({:.0} s)",
        start.elapsed().as_secs_f64()
    );
    let mut benches = vec![first];
    if mutants.len() >= ENOUGH && thread::available_parallelism().is_ok_and(|n| n.get() > 1) {
        let second = bench("tree-2", "build-2")?;
        second.take_what_is_built(&benches[0])?;
        benches.push(second);
    }
    let results = try_all(&benches, &mutants)?;
    print!("{}", table(&results));
    let count = |wanted: fn(&Verdict) -> bool| {
        let of_kind = results.iter().filter(|result| wanted(&result.verdict));
        of_kind.count()
    };
    let caught = count(|verdict| matches!(verdict, Verdict::Caught));
    let survived = count(|verdict| matches!(verdict, Verdict::Survived));
    let unclear = results.len() - caught - survived;
    println!(
        "{caught} caught, {survived} survived, {unclear} without a verdict, in {:.0} s",
        start.elapsed().as_secs_f64()
    );
    for Result {
        mutant, verdict, ..
    } in &results
    {
        if let Some(advice) = verdict.advice(mutant) {
            println!("\n{advice}");
        }
    }
    if caught == results.len() {
        Ok(())
    } else {
        Err(format!(
            "{} mutants were not caught",
            results.len() - caught
        ))
    }
}

/// Tries mutants, as many at a time as there are benches; the results are in the order of the
/// mutants.
fn try_all<'a>(benches: &[Bench], mutants: &[&'a Mutant]) -> Outcome<Vec<Result<'a>>> {
    let next = AtomicUsize::new(0);
    let lane = |bench: &Bench| -> Outcome<Vec<(usize, Result<'a>)>> {
        let mut results = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(mutant) = mutants.get(at) else {
                return Ok(results);
            };
            let start = Instant::now();
            let verdict = bench.try_mutant(mutant).inspect_err(|_| {
                // The others need not go on either.
                next.store(mutants.len(), Ordering::Relaxed);
            })?;
            let seconds = start.elapsed().as_secs_f64();
            let (nth, of) = (at + 1, mutants.len());
            eprintln!("[{nth}/{of}] {}: {verdict} ({seconds:.1} s)", mutant.name);
            let result = Result {
                mutant,
                verdict,
                seconds,
            };
            results.push((at, result));
        }
    };
    let mut results = thread::scope(|scope| -> Outcome<Vec<(usize, Result<'a>)>> {
        let lanes: Vec<_> = benches
            .iter()
            .map(|bench| scope.spawn(|| lane(bench)))
            .collect();
        let mut results = Vec::new();
        for lane in lanes {
            let of_lane = lane.join().map_err(|_| "a lane panicked".to_owned())?;
            results.extend(of_lane?);
        }
        Ok(results)
    })?;
    results.sort_by_key(|(at, _)| *at);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

/// The results in columns.
fn table(results: &[Result<'_>]) -> String {
    let width = |column: fn(&Mutant) -> usize, least: usize| {
        let widths = results.iter().map(|result| column(result.mutant));
        widths.max().unwrap_or_default().max(least)
    };
    let name = width(|mutant| mutant.name.chars().count(), 6);
    let class = width(|mutant| mutant.class.chars().count(), 5);
    let by = width(|mutant| mutant.caught_by.to_string().chars().count(), 9);
    let mut text = format!(
        "\n{:<name$}  {:<class$}  {:<by$}  {:<8}  seconds\n",
        "mutant", "class", "caught by", "result"
    );
    for result in results {
        let Mutant {
            name: mutant,
            class: weakness,
            caught_by,
            ..
        } = result.mutant;
        let caught_by = caught_by.to_string();
        let (word, seconds) = (result.verdict.word(), result.seconds);
        // Writing to a text cannot fail.
        let _ = writeln!(
            text,
            "{mutant:<name$}  {weakness:<class$}  {caught_by:<by$}  {word:<8}  {seconds:>7.1}"
        );
    }
    text
}
