//! Tests that cannot run here: they say why and are counted, and in CI most of them fail instead.

use std::env;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

/// The environment variable that names the file to which every skipped test adds a line;
/// `cargo xtask test` sets it, and reads the file at the end.
pub const SKIPS_VARIABLE: &str = "FLANNEL_TEST_SKIPS";

/// Notes that a test does not run, and why: a line on stderr, and one in the file named by
/// [`SKIPS_VARIABLE`].
///
/// # Panics
/// If that file cannot be written: a skip that is not counted would pass for a test that ran.
pub fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED {}: {}\n", one_line(test), one_line(reason));
    // Straight to the process's stderr: the test harness swallows what a passing test prints.
    let _ = io::stderr().lock().write_all(line.as_bytes());
    if let Some(path) = variable(SKIPS_VARIABLE)
        && let Err(error) = count(Path::new(&path), &line)
    {
        panic!("the skipped test {test} could not be counted in {path}: {error}");
    }
}

/// Appends a line in one write, so that the lines of several processes do not mix.
fn count(path: &Path, line: &str) -> io::Result<()> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)?
        .write_all(line.as_bytes())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether this is CI (`CI=true`), where a missing privilege or tool is a failure: a test that
/// never ran anywhere proves nothing.
pub fn in_ci() -> bool {
    variable("CI").is_some_and(|value| value == "true" || value == "1")
}

/// Whether a test may go on: skips it if `problem` says what is missing.
///
/// For privileges and tools, which CI has to have; a feature that this kernel does not have is for
/// [`skip`].
///
/// # Panics
/// In CI ([`in_ci`]) if there is a problem.
pub fn require(test: &str, problem: Option<&str>) -> bool {
    let Some(problem) = problem else {
        return true;
    };
    assert!(
        !in_ci(),
        "{test} cannot run, and in CI it must: {}",
        one_line(problem)
    );
    skip(test, problem);
    false
}

/// Whether a program is on the path; skips the test if not.
///
/// # Panics
/// As [`require`].
pub fn require_tool(test: &str, tool: &str) -> bool {
    let problem = format!("the program {tool} is not installed");
    require(test, (!is_installed(tool)).then_some(problem.as_str()))
}

/// Whether a program is on the path, or there where a path says.
pub(crate) fn is_installed(program: &str) -> bool {
    if program.contains('/') {
        return Path::new(program).is_file();
    }
    let path = variable("PATH").unwrap_or_default();
    env::split_paths(&path)
        // An ordinary user's path may lack the directories of the network tools.
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(program).is_file())
}

#[allow(
    clippy::disallowed_methods,
    reason = "tests are told by their environment where and how they run"
)]
pub(crate) fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_skip_is_one_line() {
        let dir = env::temp_dir().join(format!("flannel-skips-{}", std::process::id()));
        let line = format!(
            "SKIPPED {}: {}\n",
            one_line("a test"),
            one_line("no\n root")
        );
        count(&dir, &line).expect("the temporary directory is writable");
        count(&dir, &line).expect("the temporary directory is writable");
        let text = std::fs::read_to_string(&dir).expect("the file was just written");
        std::fs::remove_file(&dir).expect("the file was just read");
        assert_eq!(text, "SKIPPED a test: no root\nSKIPPED a test: no root\n");
    }
}
