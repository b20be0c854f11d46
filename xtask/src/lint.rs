//! Formatting, lints and documentation.

use std::io::IsTerminal;

use crate::metadata::Workspace;
use crate::run::{Outcome, cargo, run};

/// The fuzzer's binaries, a workspace of their own.
const FUZZ: [&str; 2] = ["--manifest-path", "fuzz/Cargo.toml"];

pub(crate) fn fmt(args: &[String]) -> Outcome {
    let (check, remedy) = match args {
        [] => (
            &["--check", "--", colour()][..],
            "; `cargo xtask fmt --fix` formats the code",
        ),
        [fix] if fix == "--fix" => (&[][..], ""),
        _ => return Err("the only argument is --fix".to_owned()),
    };
    for workspace in [&["--all"][..], &FUZZ] {
        run(&mut cargo([&["fmt"], workspace, check].concat()))
            .map_err(|reason| format!("{reason}{remedy}"))?;
    }
    Ok(())
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
    clippy_with(&["--workspace", "--all-targets", "--all-features"])?;
    // Without the fuzzer itself, which takes a C++ compiler and a nightly Rust.
    clippy_with(&[&FUZZ[..], &["--no-default-features"]].concat())
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
