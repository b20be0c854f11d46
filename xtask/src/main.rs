//! The project's own commands: `cargo xtask help` explains them.
#![forbid(unsafe_code)]
#![allow(
    clippy::disallowed_methods,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a program for the terminal that runs other programs and measures how long they take"
)]

mod api;
mod deny;
mod deps;
mod etcd;
mod examples;
mod kube_apiserver;
mod lint;
mod long;
mod metadata;
mod msrv;
mod mutants;
mod package;
mod run;
mod setup;
mod stage;
mod suite;

use std::env;
use std::process::ExitCode;

use run::Outcome;
use stage::Stage;

/// A command of `cargo xtask`.
struct Task {
    name: &'static str,
    args: &'static str,
    about: &'static str,
    run: fn(&[String]) -> Outcome,
}

const TASKS: &[Task] = &[
    Task {
        name: "test",
        args: "",
        about: "Everything that CI checks, in this order: setup, fmt, lint, features, doc, api,\n\
                deps, deny, msrv, package, examples, sim (4,000 seeds over all backends, each twice),\n\
                mutants, all tests, those of the documentation too; last a line that sums the tests up, as\n\
                cargo does.\n\
                As root it runs the tests and examples that need network namespaces; else it\n\
                skips and counts them. With CI=true a missing privilege or tool is a failure.",
        run: |_| test(),
    },
    Task {
        name: "setup",
        args: "",
        about: "Installs the Debian packages that the tests need and the machine lacks (apt-get,\n\
                as root; else it says what to install), rustfmt and clippy by rustup, and in a\n\
                cache of the user's etcd 3.5, by pip, and kube-apiserver, built from Debian's\n\
                sources (KUBEBUILDER_ASSETS names another).",
        run: |_| setup::run(),
    },
    Task {
        name: "fmt",
        args: "[--fix]",
        about: "Checks that the code is formatted by rustfmt; --fix formats it.",
        run: lint::fmt,
    },
    Task {
        name: "lint",
        args: "",
        about: "Clippy with warnings denied: every target of the workspace with all features,\n\
                and the binaries of the fuzzer.",
        run: |_| lint::clippy(),
    },
    Task {
        name: "features",
        args: "",
        about: "The same for each crate by itself: with no feature, and with each feature alone.",
        run: |_| lint::features(),
    },
    Task {
        name: "doc",
        args: "",
        about: "Builds the documentation of every crate, with warnings denied.",
        run: |_| lint::doc(),
    },
    Task {
        name: "api",
        args: "[--write]",
        about: "Compares the public API of each published crate with its listing in api/; --write\n\
                brings the listings up to date.",
        run: api::run,
    },
    Task {
        name: "deps",
        args: "",
        about: "Checks who may depend on whom: flannel-core stays small and free of kernel, store\n\
                and network crates; only flannel-netlink talks netlink; managers, backends and\n\
                the kernel crate do not know one another.",
        run: |_| deps::run(),
    },
    Task {
        name: "deny",
        args: "",
        about: "Checks licences, banned crates and sources against deny.toml: with cargo-deny if\n\
                it is installed (then known advisories too), else by itself.",
        run: |_| deny::run(),
    },
    Task {
        name: "msrv",
        args: "",
        about: "Checks that no dependency of a published crate states a newer Rust than we do;\n\
                if rustup has a toolchain of that version, also checks the code with it.",
        run: |_| msrv::run(),
    },
    Task {
        name: "package",
        args: "[--verify]",
        about: "Checks what the published crates show of themselves, and packs each as `cargo publish`\n\
                would, without sending it; --verify also builds each from what was packed, which is\n\
                `cargo publish --workspace --dry-run` whole and takes minutes.",
        run: package::run,
    },
    Task {
        name: "examples",
        args: "[NAME…]",
        about: "Runs the examples (all, or the named ones) and checks their exit codes.",
        run: examples::run,
    },
    Task {
        name: "sim",
        args: "[--seeds N] [--seed S] [ARG…]",
        about: "Runs the simulator (the example `sim`, optimised): so many seeds, with progress\n\
                and a summary; --complete fails if some kind of fault never took effect under the\n\
                backend, --large N adds N seeds of nine nodes.",
        run: long::sim,
    },
    Task {
        name: "mutants",
        args: "[--by TEST] [NAME…]",
        about: "Makes each of the deliberate defects of mutants/ (all, or the named ones) in a copy\n\
                of the sources, and fails if the test that is to catch it does not; with --by, if\n\
                that test does not, be it listed or not.",
        run: mutants::run,
    },
    Task {
        name: "bench",
        args: "[ARG…]",
        about: "Runs the benchmarks, `cargo bench --workspace --all-features ARG…`; as root those\n\
                of the kernel crate too.",
        run: long::bench,
    },
    Task {
        name: "throughput",
        args: "[--svg FILE]",
        about: "Measures what a tunnel costs: the same traffic between pods by bare routing, host-gw\n\
                and VXLAN, in turns, in namespaces of its own (root). Prints a table, and draws it.",
        run: long::throughput,
    },
    Task {
        name: "datapath",
        args: "[--rounds N] [--svg FILE] [--modes-only] [--quick]",
        about: "Measures the UDP backend against bare routing, kernel VXLAN and a proxy that moves one\n\
                packet per system call, in turns and in three modes of the underlay's devices, in\n\
                namespaces of its own (root). Prints tables and goals, and draws them.",
        run: long::datapath,
    },
    Task {
        name: "proptest-long",
        args: "[CASES]",
        about: "Runs all tests, optimised, with so many cases per property (default 20000).",
        run: long::proptest,
    },
];

fn main() -> ExitCode {
    if let Some(code) = api::as_rustdoc() {
        return code;
    }
    let mut args = env::args().skip(1);
    let name = args.next().unwrap_or_else(|| "help".to_owned());
    let args: Vec<String> = args.collect();
    if matches!(name.as_str(), "help" | "--help" | "-h") {
        help();
        return ExitCode::SUCCESS;
    }
    let Some(task) = TASKS.iter().find(|task| task.name == name) else {
        eprintln!("xtask: there is no command {name:?}; `cargo xtask help` lists them");
        return ExitCode::from(2);
    };
    if task.args.is_empty() && !args.is_empty() {
        eprintln!("xtask: {name} takes no arguments");
        return ExitCode::from(2);
    }
    match run::enter_workspace().and_then(|()| (task.run)(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("xtask: {name} failed: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn help() {
    println!("The project's own commands. Usage: cargo xtask COMMAND [ARG…]\n");
    for task in TASKS {
        println!("  {} {}", task.name, task.args);
        for line in task.about.lines() {
            println!("      {line}");
        }
    }
}

/// Runs every stage; the first that fails ends it.
fn test() -> Outcome {
    let skips = suite::Skips::new()?;
    let mut summary = None;
    let result = stage::run_all(vec![
        Stage::new("setup", setup::run),
        Stage::new("fmt", || lint::fmt(&[])),
        Stage::new("lint", lint::clippy),
        Stage::new("features", lint::features),
        Stage::new("doc", lint::doc),
        Stage::new("api", || api::check(Some(&skips))),
        Stage::new("deps", deps::run),
        Stage::new("deny", deny::run),
        Stage::new("msrv", msrv::run),
        Stage::new("package", || package::run(&[])),
        Stage::new("examples", || examples::run_all(Some(&skips))),
        Stage::new("sim", long::sim_stage),
        Stage::new("mutants", || mutants::run(&[])),
        Stage::new("tests", || {
            let run = suite::run(&skips)?;
            let passed = run.passed();
            summary = Some(run);
            passed
        }),
    ]);
    skips.print()?;
    if let Some(summary) = summary {
        println!("{summary}");
    }
    result
}
