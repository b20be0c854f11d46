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
    clippy_with(&["--workspace", "--all-targets", "--all-features"])?;
    clippy_with(&["--package", "flannel-core", "--no-default-features"])?;
    let facade = ["--package", "flannel", "--lib", "--no-default-features"];
    clippy_with(&facade)?;
    let workspace = Workspace::load()?;
    let features = workspace
        .members()
        .filter(|package| package.name == "flannel")
        .flat_map(|package| &package.features)
        .filter(|feature| *feature != "default");
    for feature in features {
        clippy_with(&[&facade[..], &["--features", feature]].concat())?;
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
