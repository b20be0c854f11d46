//! The public API of each published crate, as a file in `api/`: who changes it sees what changes.
//!
//! rustdoc tells it as JSON, the `public-api` crate turns that into lines. The JSON is unstable:
//! rustdoc wants to be told that this is meant, and each of its versions is read by one version of
//! `public-api` only.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use public_api::{Builder, PublicApi};
use serde_json::Value;

use crate::metadata::Workspace;
use crate::run::{self, Outcome, cargo, in_ci};
use crate::suite::Skips;

/// The Rust that made the listings; another may tell the same API in other words.
const MADE_WITH: &str = "1.95";
/// The format of rustdoc's JSON that our version of `public-api` reads.
const FORMAT: u64 = 57;
/// Where the listings are.
const FOLDER: &str = "api";

pub(crate) fn run(args: &[String]) -> Outcome {
    match args {
        [] => check(None),
        [write] if write == "--write" => {
            let listings = listings()?.ok_or_else(unreadable)?;
            fs::create_dir_all(FOLDER).map_err(|error| format!("{FOLDER}: {error}"))?;
            for (file, text) in &listings {
                fs::write(file, text).map_err(|error| format!("{}: {error}", file.display()))?;
            }
            for file in strays(&listings)? {
                fs::remove_file(&file).map_err(|error| format!("{}: {error}", file.display()))?;
            }
            Ok(())
        }
        _ => Err("the only argument is --write".to_owned()),
    }
}

/// Compares the listings with the code. Counted as skipped, if there is a count, where this Rust
/// speaks another format; in CI that is an error.
pub(crate) fn check(skips: Option<&Skips>) -> Outcome {
    let Some(listings) = listings()? else {
        let reason = unreadable();
        return match skips {
            _ if in_ci() => Err(reason),
            Some(skips) => skips.add("public API", &reason),
            None => {
                println!("skipped: {reason}");
                Ok(())
            }
        };
    };
    let mut changed = 0;
    for (file, now) in &listings {
        let before = fs::read_to_string(file).unwrap_or_default();
        let differences = differences(&before, now);
        if !differences.is_empty() {
            println!("{}:", file.display());
            changed += 1;
        }
        for line in differences {
            println!("{line}");
        }
    }
    for file in strays(&listings)? {
        println!("{} is of no published crate", file.display());
        changed += 1;
    }
    if changed > 0 {
        return Err(format!(
            "the public API is not that of the listings (made with Rust {MADE_WITH}); \
             if that is meant: `cargo xtask api --write`"
        ));
    }
    println!("{} listings are those of the code", listings.len());
    Ok(())
}

fn unreadable() -> String {
    format!(
        "this rustdoc does not write the format {FORMAT} of JSON; Rust {MADE_WITH} does \
         (`cargo +{MADE_WITH} xtask api`)"
    )
}

/// The listing of each published crate and the file it belongs into; `None`: this rustdoc writes
/// another format.
fn listings() -> Outcome<Option<Vec<(PathBuf, String)>>> {
    let workspace = Workspace::load()?;
    let names: Vec<&str> = workspace
        .members()
        .filter(|package| package.published)
        .map(|package| package.name.as_str())
        .collect();
    document(&names)?;
    let mut listings = Vec::with_capacity(names.len());
    for name in names {
        let json = workspace
            .target_directory
            .join("doc")
            .join(name.replace('-', "_"))
            .with_extension("json");
        let Some(lines) = listing(&json)? else {
            return Ok(None);
        };
        listings.push((Path::new(FOLDER).join(name).with_extension("txt"), lines));
    }
    Ok(Some(listings))
}

/// Lets rustdoc write the JSON of these crates. What they depend on is not built anew after `doc`.
fn document(names: &[&str]) -> Outcome {
    let us = env::current_exe().map_err(|error| format!("xtask does not find itself: {error}"))?;
    let mut command = cargo(["doc", "--quiet", "--lib", "--no-deps", "--all-features"]);
    for name in names {
        command.args(["--package", name]);
    }
    command
        .env(
            "RUSTDOCFLAGS",
            "-Z unstable-options --output-format json --cap-lints allow",
        )
        .env("RUSTDOC", us)
        .env(AS_RUSTDOC, "1");
    run::run(&mut command)
}

/// Set for [`as_rustdoc`].
const AS_RUSTDOC: &str = "FLANNEL_XTASK_AS_RUSTDOC";

/// If cargo calls us in the place of rustdoc, which we then run with its unstable options allowed.
/// Were they allowed to all that cargo runs, it would build the dependencies once more.
pub(crate) fn as_rustdoc() -> Option<ExitCode> {
    env::var_os(AS_RUSTDOC)?;
    let mut rustdoc = Command::new("rustdoc");
    rustdoc.args(env::args_os().skip(1));
    let status = rustdoc.env("RUSTC_BOOTSTRAP", "1").status();
    Some(match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("rustdoc: {error}");
            ExitCode::FAILURE
        }
    })
}

/// The lines of a crate; `None`: its JSON has another format.
fn listing(json: &Path) -> Outcome<Option<String>> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", json.display());
    let text = fs::read_to_string(json).map_err(|error| failed(&error))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| failed(&error))?;
    if value["format_version"].as_u64() != Some(FORMAT) {
        return Ok(None);
    }
    let builder = Builder::from_rustdoc_json(json).omit_blanket_impls(true);
    let written = builder
        .clone()
        .omit_auto_trait_impls(true)
        .omit_auto_derived_impls(true);
    let lines = |api: PublicApi| -> Vec<String> { api.items().map(ToString::to_string).collect() };
    let all = lines(builder.build().map_err(|error| failed(&error))?);
    let written = lines(written.build().map_err(|error| failed(&error))?);
    let written: BTreeSet<&str> = written.iter().map(String::as_str).collect();
    let mut listing = String::new();
    for line in &all {
        if written.contains(line.as_str()) || tells(line) {
            listing.push_str(line);
            listing.push('\n');
        }
    }
    Ok(Some(listing))
}

/// Whether a line that nobody wrote is worth one: that a trait is derived, but not each of its
/// functions, and that a type may **not** go to another thread.
fn tells(line: &str) -> bool {
    let Some((head, _)) = line.split_once(" for ") else {
        return false;
    };
    let no_news = [
        "Freeze",
        "RefUnwindSafe",
        "StructuralPartialEq",
        "Unpin",
        "UnsafeUnpin",
        "UnwindSafe",
    ];
    let of_threads = ["Send", "Sync"];
    let path = head.rsplit(' ').next().unwrap_or(head);
    let name = path.rsplit("::").next().unwrap_or(path);
    head.starts_with("impl")
        && !no_news.contains(&name)
        && (path.starts_with('!') || !of_threads.contains(&name))
}

/// Listings in the folder that belong to none of these.
fn strays(listings: &[(PathBuf, String)]) -> Outcome<Vec<PathBuf>> {
    let failed = |error: std::io::Error| format!("{FOLDER}: {error}");
    let mut strays = Vec::new();
    for entry in fs::read_dir(FOLDER).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if listings.iter().all(|(file, _)| *file != path) {
            strays.push(path);
        }
    }
    Ok(strays)
}

/// The lines that are in one text only.
fn differences(before: &str, now: &str) -> Vec<String> {
    let (old, new): (BTreeSet<&str>, BTreeSet<&str>) =
        (before.lines().collect(), now.lines().collect());
    let gone = old.difference(&new).map(|line| format!("- {line}"));
    let come = new.difference(&old).map(|line| format!("+ {line}"));
    gone.chain(come).collect()
}

#[cfg(test)]
mod tests {
    use super::{differences, tells};

    #[test]
    fn a_change_is_told_by_its_lines() {
        assert_eq!(differences("a\nb\n", "a\nb\n"), [""; 0]);
        assert_eq!(differences("a\nb\n", "b\nc\n"), ["- a", "+ c"]);
    }

    #[test]
    fn of_derived_traits_the_news_are_kept() {
        for (line, kept) in [
            ("impl core::clone::Clone for x::A", true),
            (
                "impl<T: core::clone::Clone> core::clone::Clone for x::A<T>",
                true,
            ),
            ("impl !core::marker::Send for x::A", true),
            ("impl core::marker::Send for x::A", false),
            (
                "impl<T> core::marker::Sync for x::A<T> where T: core::marker::Sync",
                false,
            ),
            ("impl core::marker::Unpin for x::A", false),
            ("impl !core::panic::unwind_safe::UnwindSafe for x::A", false),
            ("impl core::marker::StructuralPartialEq for x::A", false),
            ("pub fn x::A::clone(&self) -> x::A", false),
        ] {
            assert_eq!(tells(line), kept, "{line}");
        }
    }
}
