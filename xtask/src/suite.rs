//! All tests, their sum, and the tests that were skipped.

use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::metadata::Workspace;
use crate::run::{Outcome, cargo, line};

/// The file in which skipped tests are counted, and the variable that names it; the test kit's
/// `skip` writes to it.
pub(crate) struct Skips {
    path: PathBuf,
}

impl Skips {
    pub(crate) const VARIABLE: &'static str = "FLANNEL_TEST_SKIPS";

    /// An empty count.
    pub(crate) fn new() -> Outcome<Self> {
        let path = Workspace::load()?
            .target_directory
            .join("skipped-tests.txt");
        fs::create_dir_all(path.parent().unwrap_or(&path))
            .and_then(|()| fs::write(&path, ""))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Counts something that was not run by us.
    pub(crate) fn add(&self, what: &str, reason: &str) -> Outcome {
        eprintln!("SKIPPED {what}: {reason}");
        fs::OpenOptions::new()
            .append(true)
            .open(&self.path)
            .and_then(|mut file| writeln!(file, "SKIPPED {what}: {reason}"))
            .map_err(|error| format!("{}: {error}", self.path.display()))
    }

    /// Prints how many there are, and which.
    pub(crate) fn print(&self) -> Outcome {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            Err(error) => return Err(format!("{}: {error}", self.path.display())),
        };
        println!();
        for line in text.lines() {
            println!("{line}");
        }
        println!("{} tests and examples skipped", text.lines().count());
        Ok(())
    }
}

/// The sum of the results of many test programs. Displays as cargo shows the result of one.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Passed, failed, ignored, measured, filtered out.
    counts: [u64; 5],
    programs: u64,
    failure: Option<String>,
    took: Duration,
}

/// The words after the numbers of a result line.
const WORDS: [&str; 5] = ["passed", "failed", "ignored", "measured", "filtered out"];

impl Summary {
    /// Adds a line if it is a result line.
    fn add(&mut self, line: &str) {
        let Some(counts) = counts_of(line) else {
            return;
        };
        self.programs += 1;
        for (sum, count) in self.counts.iter_mut().zip(counts) {
            *sum += count;
        }
    }

    /// Fails if a test did, or cargo, or if there was no test at all.
    pub(crate) fn passed(&self) -> Outcome {
        let [passed, failed, ..] = self.counts;
        match &self.failure {
            _ if failed > 0 => Err(format!("{failed} tests failed")),
            Some(reason) => Err(reason.clone()),
            None if passed == 0 => Err("no test ran".to_owned()),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.passed().is_ok() {
            "ok"
        } else {
            "FAILED"
        };
        write!(f, "test result: {word}.")?;
        for (count, word) in self.counts.iter().zip(WORDS) {
            write!(f, " {count} {word};")?;
        }
        write!(f, " finished in {:.2}s", self.took.as_secs_f64())
    }
}

/// The counts of a line such as
/// `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s`.
pub(crate) fn counts_of(line: &str) -> Option<[u64; 5]> {
    let (_, rest) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut parts = rest.split("; ");
    let mut counts = [0; 5];
    for (count, word) in counts.iter_mut().zip(WORDS) {
        let (number, found) = parts.next()?.split_once(' ')?;
        *count = number.parse().ok().filter(|_| found == word)?;
    }
    Some(counts)
}

/// Runs every test of the workspace, documentation tests too, and passes on what cargo prints.
/// Goes on after a failure, to show all of them.
pub(crate) fn run(skips: &Skips) -> Outcome<Summary> {
    let mut command = cargo(["test", "--workspace", "--all-features", "--no-fail-fast"]);
    command
        .env(Skips::VARIABLE, skips.path())
        .env("CARGO_TERM_COLOR", "never")
        .stdout(Stdio::piped());
    let shown = line(&command);
    println!("$ {shown}");
    let failed = |error: io::Error| format!("{shown}: {error}");
    let start = Instant::now();
    let mut child = command.spawn().map_err(failed)?;
    let stdout = child.stdout.take().ok_or("cargo has no output")?;
    let mut summary = Summary::default();
    for line in BufReader::new(stdout).split(b'\n') {
        // A test may print anything.
        let line = line.map_err(failed)?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        summary.add(&line);
    }
    let status = child.wait().map_err(failed)?;
    if !status.success() {
        summary.failure = Some(format!("`{shown}`: {status}"));
    }
    summary.took = start.elapsed();
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_summed_and_shown_as_cargo_does() {
        let mut summary = Summary::default();
        let line = "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s";
        summary.add(line);
        summary.add("test result: something that a test printed");
        summary.add("running 5 tests");
        assert_eq!(summary.to_string(), line);
        summary.add(line);
        assert_eq!(summary.counts, [10, 0, 2, 0, 4]);
        assert_eq!(summary.passed(), Ok(()));
    }

    #[test]
    fn a_failure_is_never_summed_up_as_ok() {
        let mut summary = Summary::default();
        assert!(summary.passed().is_err(), "no test at all");
        summary.add("test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s");
        assert!(
            summary
                .to_string()
                .starts_with("test result: FAILED. 1 passed; 1 failed;")
        );
        let compiling = Summary {
            counts: [1, 0, 0, 0, 0],
            failure: Some("exit status: 101".to_owned()),
            ..Summary::default()
        };
        assert!(compiling.to_string().starts_with("test result: FAILED."));
    }
}
