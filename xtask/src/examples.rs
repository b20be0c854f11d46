//! Runs every example as the README shows it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::metadata::{Target, Workspace};
use crate::run::{
    Outcome, cargo, find_program, in_ci, is_root, line, run as run_command, run_limited,
};
use crate::suite::Skips;

/// How an example is run.
struct Run {
    name: &'static str,
    args: &'static [&'static str],
    exit: i32,
    needs_root: bool,
    needs_tool: Option<&'static str>,
}

/// Every example of the workspace, once for each way it is run; one that is not here is an error.
const RUNS: &[Run] = &[
    Run {
        name: "mesh",
        args: &["--nodes", "3", "--json"],
        exit: 0,
        needs_root: true,
        needs_tool: None,
    },
    Run {
        name: "mesh",
        args: &["--nodes", "3", "--backend", "host-gw", "--json"],
        exit: 0,
        needs_root: true,
        needs_tool: None,
    },
    Run {
        name: "mesh",
        args: &["--nodes", "3", "--backend", "udp", "--json"],
        exit: 0,
        needs_root: true,
        needs_tool: None,
    },
    Run {
        name: "host",
        args: &[],
        exit: 0,
        needs_root: true,
        needs_tool: None,
    },
    Run {
        name: "plan",
        args: &[
            "--config",
            "examples/data/net.json",
            "--leases",
            "examples/data/leases.json",
            "--node",
            "node-1",
        ],
        exit: 0,
        needs_root: false,
        needs_tool: None,
    },
    Run {
        name: "custom_manager",
        args: &[],
        exit: 0,
        needs_root: false,
        needs_tool: None,
    },
    Run {
        name: "custom_backend",
        args: &[],
        exit: 0,
        needs_root: false,
        needs_tool: None,
    },
    Run {
        name: "sim",
        args: &["--seeds", "40", "--json"],
        exit: 0,
        needs_root: false,
        needs_tool: None,
    },
    // Without an etcd it says so; flannel-e2e runs it with one.
    Run {
        name: "etcd_node",
        args: &["--endpoints", "http://127.0.0.1:1", "--lab", "xtask"],
        exit: 1,
        needs_root: true,
        needs_tool: None,
    },
    // Without an API server it says so; flannel-e2e runs it with one.
    Run {
        name: "kube_node",
        args: &[
            "--kubeconfig",
            "/nonexistent",
            "--net-conf",
            "examples/data/net.json",
            "--lab",
            "xtask",
        ],
        exit: 1,
        needs_root: true,
        needs_tool: None,
    },
    Run {
        name: "join_storm",
        args: &["--nodes", "200", "--json"],
        exit: 0,
        needs_root: false,
        needs_tool: Some("etcd"),
    },
];

/// An example that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn run(names: &[String]) -> Outcome {
    if names.is_empty() {
        return run_all(None);
    }
    let unknown = names
        .iter()
        .find(|name| RUNS.iter().all(|run| run.name != **name));
    match unknown {
        Some(name) => Err(format!("there is no example {name}")),
        None => run_where(None, |run| names.iter().any(|name| name == run.name)),
    }
}

/// Runs all; what has to be skipped is counted if there is a count.
pub(crate) fn run_all(skips: Option<&Skips>) -> Outcome {
    run_where(skips, |_| true)
}

fn run_where(skips: Option<&Skips>, wanted: impl Fn(&Run) -> bool) -> Outcome {
    let workspace = Workspace::load()?;
    let examples: Vec<&Target> = workspace
        .members()
        .flat_map(|package| &package.examples)
        .collect();
    check_table(&examples)?;
    let logs = workspace.target_directory.join("example-logs");
    fs::create_dir_all(&logs).map_err(|error| format!("{}: {error}", logs.display()))?;
    for run in RUNS.iter().filter(|run| wanted(run)) {
        if let Some(reason) = what_is_missing(run) {
            match skips {
                _ if in_ci() => return Err(format!("example {}: {reason}", run.name)),
                Some(skips) => skips.add(&format!("example {}", run.name), &reason)?,
                None => println!("example {} skipped: {reason}", run.name),
            }
            continue;
        }
        let required = examples
            .iter()
            .find(|example| example.name == run.name)
            .map(|example| example.required_features.join(","))
            .unwrap_or_default();
        run_one(run, &required, &logs)?;
    }
    Ok(())
}

/// Why an example cannot be run here.
fn what_is_missing(run: &Run) -> Option<String> {
    if run.needs_root && !is_root() {
        return Some("it makes network namespaces and needs root (sudo)".to_owned());
    }
    let tool = run.needs_tool.filter(|tool| find_program(tool).is_none())?;
    Some(format!("the program {tool} is not installed"))
}

/// The table and the workspace must name the same examples, so that none goes untested.
fn check_table(examples: &[&Target]) -> Outcome {
    let untested = examples
        .iter()
        .find(|example| RUNS.iter().all(|run| run.name != example.name));
    if let Some(example) = untested {
        return Err(format!(
            "the example {} is not in the table of xtask/src/examples.rs",
            example.name
        ));
    }
    let gone = RUNS
        .iter()
        .find(|run| examples.iter().all(|example| example.name != run.name));
    match gone {
        Some(run) => Err(format!(
            "the example {} is in the table of xtask/src/examples.rs, but not in the workspace",
            run.name
        )),
        None => Ok(()),
    }
}

fn run_one(run: &Run, required: &str, logs: &Path) -> Outcome {
    let mut select = vec!["--quiet", "--example", run.name];
    if !required.is_empty() {
        select.extend(["--features", required]);
    }
    // First built, so that the limit is on the run alone.
    run_command(&mut cargo([&["build"], &select[..]].concat()))?;
    let mut command = cargo([&["run"], &select[..]].concat());
    if !run.args.is_empty() {
        command.arg("--").args(run.args);
    }
    println!("$ {}", line(&command));
    let log = logs.join(format!("{}.txt", run.name));
    let start = Instant::now();
    let problem = match run_limited(&mut command, &log, LIMIT)? {
        Some(code) if code == run.exit => None,
        Some(code) => Some(format!("exit code {code}, not {}", run.exit)),
        None => Some(format!(
            "no exit code after {:.0} s: killed",
            start.elapsed().as_secs_f64()
        )),
    };
    let Some(problem) = problem else {
        println!("  ok after {:.1} s", start.elapsed().as_secs_f64());
        return Ok(());
    };
    match fs::read(&log) {
        Ok(text) => println!("{}", String::from_utf8_lossy(&text)),
        Err(error) => println!("{}: {error}", log.display()),
    }
    Err(format!("`{}`: {problem}", line(&command)))
}
