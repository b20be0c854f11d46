//! The oldest Rust that our crates promise to build with.

use std::process::Command;

use crate::metadata::Workspace;
use crate::run::{self, Outcome, output, succeeds};

pub(crate) fn run() -> Outcome {
    let workspace = Workspace::load()?;
    let ours = workspace
        .members()
        .find(|package| package.name == "flannel-core")
        .and_then(|package| package.rust_version.clone())
        .ok_or("flannel-core states no rust-version")?;
    let limit = version(&ours).ok_or("flannel-core's rust-version is no version")?;
    let mut count = 0;
    let mut newer = 0;
    for package in workspace.shipped() {
        count += 1;
        let stated = package.rust_version.as_deref();
        if stated
            .and_then(version)
            .is_some_and(|theirs| theirs > limit)
        {
            newer += 1;
            let stated = stated.unwrap_or_default();
            println!("{} {} needs Rust {stated}", package.name, package.version);
        }
    }
    if newer > 0 {
        return Err(format!(
            "{newer} of {count} packages need a Rust newer than our {ours}"
        ));
    }
    println!("none of {count} packages states a Rust newer than our {ours}");
    check_with(&ours)
}

/// Checks the libraries with the toolchain itself, if it is there.
fn check_with(ours: &str) -> Outcome {
    let toolchains = if succeeds(Command::new("rustup").arg("--version")) {
        output(Command::new("rustup").args(["toolchain", "list"]))?
    } else {
        String::new()
    };
    let installed = toolchains.lines().any(|line| {
        line.strip_prefix(ours)
            .is_some_and(|rest| rest.starts_with(['.', '-']))
    });
    if !installed {
        println!(
            "no toolchain {ours} is installed, so the code is not built with it \
             (`rustup toolchain install {ours}`)"
        );
        return Ok(());
    }
    let toolchain = format!("+{ours}");
    run::run(
        Command::new("cargo")
            .args([
                &toolchain,
                "check",
                "--quiet",
                "--workspace",
                "--all-features",
            ])
            // Set by the cargo that runs us; they would bring its own compiler.
            .env_remove("CARGO")
            .env_remove("RUSTC")
            .env_remove("RUSTUP_TOOLCHAIN"),
    )
}

/// A version of two or three numbers, to compare.
fn version(text: &str) -> Option<[u32; 3]> {
    let mut numbers = [0; 3];
    let mut parts = text.split('.');
    for number in &mut numbers {
        let Some(part) = parts.next() else { break };
        *number = part.split(['-', '+']).next()?.parse().ok()?;
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(version("1.100") > version("1.88.2"));
        assert!(version("1.88") < version("1.88.1"));
        assert_eq!(version("1.88"), version("1.88.0"));
        assert_eq!(version("new"), None);
    }
}
