//! Building and running the tests that are to catch mutants.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::run::{Outcome, cargo, line, run, run_limited};
use crate::suite::counts_of;

use super::list::{Catcher, Mutant};
use super::tree::Tree;

/// A test that takes longer hangs, which is no verdict.
const LIMIT: Duration = Duration::from_secs(240);

/// The tests are few and short: optimising what they depend on would take longer than they do.
const UNOPTIMISED: &str = r#"profile.dev.package."*".opt-level=0"#;

/// Where mutants are tried.
pub(super) struct Bench {
    pub(super) tree: Tree,
    /// What is built together.
    pub(super) packages: BTreeSet<String>,
    /// And with which features, as `package/feature`.
    pub(super) features: BTreeSet<String>,
    /// Cargo's target directory.
    pub(super) build: PathBuf,
    /// Where the output of each mutant's test is kept.
    pub(super) logs: PathBuf,
}

/// What became of a mutant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The test failed on an assertion.
    Caught,
    /// The test passed.
    Survived,
    /// Neither, for a reason that is a fault of the list.
    Unclear(String),
}

impl Verdict {
    /// For the table.
    pub(super) const fn word(&self) -> &'static str {
        match self {
            Self::Caught => "caught",
            Self::Survived => "SURVIVED",
            Self::Unclear(_) => "UNCLEAR",
        }
    }

    /// What to do about it, if anything.
    pub(super) fn advice(&self, mutant: &Mutant) -> Option<String> {
        let Mutant {
            name,
            file,
            caught_by,
            ..
        } = mutant;
        let source = mutant.source.display();
        match self {
            Self::Caught => None,
            Self::Survived => Some(format!(
                "{name} ({source}) survived: {caught_by} passes with this defect in {file}. The \
                 test has lost what it was there to see, or the code does the same in another \
                 place now: make a test that fails, and name it in `caught-by`"
            )),
            Self::Unclear(reason) => Some(format!("{name} ({source}): {reason}")),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unclear(reason) => write!(f, "{} {reason}", self.word()),
            _ => f.write_str(self.word()),
        }
    }
}

/// The test programs by their packages' folders and their own names.
type Programs = BTreeMap<(String, String), PathBuf>;

impl Bench {
    /// Begins with what another has built: of that, all but the workspace's own is good here too.
    pub(super) fn take_what_is_built(&self, other: &Self) -> Outcome {
        if self.build.exists() {
            return Ok(());
        }
        // A copy that was broken off is not taken for a whole one.
        let part = self.build.with_extension("part");
        let failed = |error: std::io::Error| format!("{}: {error}", part.display());
        if part.exists() {
            fs::remove_dir_all(&part).map_err(failed)?;
        }
        // With their times, by which cargo tells what is new.
        let mut copy = Command::new("cp");
        copy.args(["--archive", "--reflink=auto"]);
        run(copy.arg(&other.build).arg(&part))?;
        fs::rename(&part, &self.build).map_err(failed)
    }

    /// Builds the code as it is and checks that every catcher is there and passes: one that fails
    /// anyway shows nothing.
    pub(super) fn accept_the_original(&self, mutants: &[&Mutant]) -> Outcome {
        let mut catchers: BTreeMap<(&str, &str), BTreeSet<&Catcher>> = BTreeMap::new();
        for mutant in mutants {
            let Catcher {
                package, target, ..
            } = &mutant.caught_by;
            let of_target = catchers.entry((package, target)).or_default();
            of_target.insert(&mutant.caught_by);
        }
        let log = self.logs.join("original.txt");
        let programs = self
            .programs(catchers.keys().map(|(_, target)| *target), &log)?
            .ok_or_else(|| format!("the code does not compile: see {}", log.display()))?;
        for ((package, target), catchers) in catchers {
            let log = format!("original-{package}-{target}.txt");
            let log = self.logs.join(log);
            let tests: Vec<&str> = catchers.iter().map(|c| c.test.as_str()).collect();
            let Some(any) = catchers.first() else {
                continue;
            };
            let run = self.run(&programs, any, &tests, &log)?;
            let shown = log.display();
            match run.counts {
                Some([passed, 0, ..]) if passed == tests.len() as u64 => {}
                Some([passed, 0, ..]) => {
                    return Err(format!(
                        "{} tests of {package}/{target} are to catch mutants, but only {passed} of them are \
                         there: has one been renamed? They are {}",
                        tests.len(),
                        tests.join(", ")
                    ));
                }
                _ => {
                    return Err(format!(
                        "{package}/{target} fails without any mutant: see {shown}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Makes a mutant and runs its catcher.
    pub(super) fn try_mutant(&self, mutant: &Mutant) -> Outcome<Verdict> {
        let log = self.logs.join(format!("{}.txt", mutant.name));
        let catcher = &mutant.caught_by;
        let _mutated = self.tree.mutate(mutant)?;
        let Some(programs) = self.programs([catcher.target.as_str()], &log)? else {
            let shown = log.display();
            return Ok(Verdict::Unclear(format!(
                "it does not compile, so no test has seen it: correct its `replace` text, see \
                 {shown}"
            )));
        };
        let run = self.run(&programs, catcher, &[&catcher.test], &log)?;
        Ok(run.verdict(&log))
    }

    /// Builds test programs. `None` if they do not compile; why is in the log.
    fn programs<'t>(
        &self,
        targets: impl IntoIterator<Item = &'t str>,
        log: &Path,
    ) -> Outcome<Option<Programs>> {
        let mut command = cargo(["test", "--no-run", "--config", UNOPTIMISED]);
        command.arg("--message-format=json-render-diagnostics");
        for package in &self.packages {
            command.args(["--package", package]);
        }
        for feature in &self.features {
            command.args(["--features", feature]);
        }
        for target in targets {
            command.args(["--test", target]);
        }
        let failed = |error: std::io::Error| format!("{}: {error}", log.display());
        let diagnostics = fs::File::create(log).map_err(failed)?;
        let output = command
            .current_dir(self.tree.root())
            .env("CARGO_TARGET_DIR", &self.build)
            // Much is built, little is run, and nobody debugs it.
            .env("CARGO_INCREMENTAL", "1")
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .stdout(Stdio::piped())
            .stderr(diagnostics)
            .output()
            .map_err(|error| format!("{}: {error}", line(&command)))?;
        let messages = String::from_utf8_lossy(&output.stdout);
        let programs = messages.lines().filter_map(|message| {
            let message: Value = serde_json::from_str(message).ok()?;
            let package = Path::new(message["manifest_path"].as_str()?).parent()?;
            let package = package.file_name()?.to_str()?.to_owned();
            let name = message["target"]["name"].as_str()?.to_owned();
            let program = PathBuf::from(message["executable"].as_str()?);
            message["profile"]["test"]
                .as_bool()?
                .then_some(((package, name), program))
        });
        Ok(output.status.success().then(|| programs.collect()))
    }

    /// Runs some tests of the program that a catcher is in.
    fn run(
        &self,
        programs: &Programs,
        catcher: &Catcher,
        tests: &[&str],
        log: &Path,
    ) -> Outcome<Run> {
        let Catcher {
            package, target, ..
        } = catcher;
        let program = programs
            .get(&(package.clone(), target.clone()))
            .ok_or_else(|| format!("{package} has no test program {target}"))?;
        let directory = self.tree.root().join(package);
        let mut command = Command::new(program);
        command
            .arg("--exact")
            .args(tests)
            .current_dir(&directory)
            .env("CARGO_MANIFEST_DIR", &directory)
            .stdin(Stdio::null())
            // Unoptimised, strategies of proptest need more than a thread usually has.
            .env("RUST_MIN_STACK", (16 << 20).to_string())
            // The same cases every time, and no smaller ones looked for: it is known what is wrong.
            .env("PROPTEST_RNG_SEED", "4")
            .env("PROPTEST_MAX_SHRINK_ITERS", "0")
            .env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "true");
        let code = run_limited(&mut command, log, LIMIT)?;
        let output = fs::read(log).map_err(|error| format!("{}: {error}", log.display()))?;
        Ok(Run::of(code, &String::from_utf8_lossy(&output)))
    }
}

/// What a test program did.
struct Run {
    code: Option<i32>,
    /// As in the line that sums it up, if it came that far.
    counts: Option<[u64; 5]>,
    /// Where a test, not the product, panicked.
    has_failed_assertion: bool,
}

impl Run {
    fn of(code: Option<i32>, output: &str) -> Self {
        let panics = output
            .lines()
            .filter_map(|line| line.split_once(" panicked at ")?.1.split_once(':'))
            .map(|(file, _)| file);
        let is_of_tests = |file: &str| file.contains("/tests/") || file.contains("-testkit/");
        Self {
            code,
            counts: output.lines().rev().find_map(counts_of),
            has_failed_assertion: panics.into_iter().any(is_of_tests),
        }
    }

    fn verdict(&self, log: &Path) -> Verdict {
        let shown = log.display();
        match (self.code, self.counts) {
            (Some(0), Some([passed, 0, ..])) if passed > 0 => Verdict::Survived,
            (Some(_), Some([_, failed, ..])) if failed > 0 && self.has_failed_assertion => {
                Verdict::Caught
            }
            (None, _) => Verdict::Unclear(format!(
                "its test gave no verdict within {} s: a defect that hangs cannot be told from a \
                 slow machine, so it needs a test that fails, see {shown}",
                LIMIT.as_secs()
            )),
            _ => Verdict::Unclear(format!(
                "it crashes instead of failing an assertion of a test: see {shown}"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failed_assertion_counts_as_caught() {
        let verdict = |code, output: &str| Run::of(code, output).verdict(Path::new("log")).word();
        let failed = "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 9 filtered out; finished in 0.10s";
        let passed = "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out; finished in 0.10s";
        let nothing = "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out; finished in 0.10s";
        let in_test = "thread 'x' (7) panicked at flannel-core/tests/overlay.rs:5:6:\n";
        let in_product = "thread 'x' (7) panicked at flannel-core/src/overlay.rs:5:6:\n";
        assert_eq!(verdict(Some(0), passed), "SURVIVED");
        assert_eq!(verdict(Some(101), &format!("{in_test}{failed}")), "caught");
        assert_eq!(
            verdict(Some(101), &format!("{in_product}{failed}")),
            "UNCLEAR"
        );
        assert_eq!(verdict(Some(101), in_test), "UNCLEAR");
        assert_eq!(verdict(Some(0), nothing), "UNCLEAR");
        assert_eq!(verdict(None, in_test), "UNCLEAR");
    }
}
