//! Formatting, lints and documentation.

use std::io::IsTerminal;

use crate::metadata::Workspace;
use crate::run::{Outcome, cargo, run};

pub(crate) fn fmt(args: &[String]) -> Outcome {
    match args {
        [] => run(&mut cargo(["fmt", "--all", "--check", "--", colour()]))
            .map_err(|reason| format!("{reason}; `cargo xtask fmt --fix` formats the code")),
        [fix] if fix == "--fix" => run(&mut cargo(["fmt", "--all"])),
        _ => Err("the only argument is --fix".to_owned()),
    }
}

/// rustfmt colours its output wherever it goes, unless told otherwise.
fn colour() -> &'static str {
    if std::io::stdout().is_terminal() {
        "--color=auto"
    } else {
        "--color=never"
    }
}

pub(crate) fn clippy() -> Outcome {
    clippy_with(&["--workspace", "--all-targets", "--all-features"])
}

/// Every crate by itself, so that no sibling turns on what it forgot to ask for: without features,
/// and with each of its features alone.
pub(crate) fn features() -> Outcome {
    let workspace = Workspace::load()?;
    for package in workspace.members() {
        let alone = ["--package", &package.name, "--no-default-features"];
        clippy_with(&alone)?;
        for feature in package.features.iter().filter(|name| *name != "default") {
            clippy_with(&[&alone[..], &["--features", feature]].concat())?;
        }
    }
    Ok(())
}

fn clippy_with(args: &[&str]) -> Outcome {
    let before = ["clippy", "--quiet"];
    let after = ["--", "--deny", "warnings"];
    run(&mut cargo([&before, args, &after].concat()))
}

pub(crate) fn doc() -> Outcome {
    let args = [
        "doc",
        "--quiet",
        "--workspace",
        "--all-features",
        "--no-deps",
    ];
    run(cargo(args).env("RUSTDOCFLAGS", "--deny warnings"))
}
