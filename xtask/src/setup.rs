//! What a machine needs before the tests can run.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::etcd;
use crate::kube_apiserver;
use crate::run::{self, Outcome, cargo, find_program, in_ci, is_root, succeeds};

/// How to see that a package is there.
enum Sign {
    Program(&'static str),
    File(&'static str),
}

/// The Debian packages that building or testing needs, each with a sign that it is there.
const PACKAGES: &[(&str, Sign)] = &[
    ("protobuf-compiler", Sign::Program("protoc")),
    // Only recommended by the compiler, but the etcd client's build includes its files.
    (
        "libprotobuf-dev",
        Sign::File("/usr/include/google/protobuf/descriptor.proto"),
    ),
    ("etcd-server", Sign::Program("etcd")),
    // For etcd 3.5, which Debian 12 does not have.
    ("python3-pip", Sign::Program("pip3")),
    ("nftables", Sign::Program("nft")),
    ("iproute2", Sign::Program("ip")),
    ("iputils-ping", Sign::Program("ping")),
    ("ethtool", Sign::Program("ethtool")),
];

pub(crate) fn run() -> Outcome {
    components()?;
    packages()?;
    etcd::install()?;
    kube_apiserver::provide()
}

/// rustfmt and clippy, which rustup's minimal profile leaves out.
fn components() -> Outcome {
    for (command, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if succeeds(&mut cargo([command, "--version"])) {
            continue;
        }
        println!("{component} is missing");
        run::run(
            Command::new("rustup")
                .args(["component", "add", component])
                .stdin(Stdio::null()),
        )?;
    }
    Ok(())
}

fn packages() -> Outcome {
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|(_, sign)| match sign {
            Sign::Program(name) => find_program(name).is_none(),
            Sign::File(path) => !Path::new(path).exists(),
        })
        .map(|(package, _)| *package)
        .collect();
    if missing.is_empty() {
        println!("every package that the tests need is installed");
        return Ok(());
    }
    let missing_list = missing.join(" ");
    if find_program("apt-get").is_none() || !is_root() {
        println!("missing: {missing_list}");
        println!("to install: sudo apt-get install --no-install-recommends {missing_list}");
        return if in_ci() {
            Err("packages are missing, and only root can install them with apt-get".to_owned())
        } else {
            println!("going on without; tests that need them are skipped");
            Ok(())
        };
    }
    println!("missing, to be installed with apt-get: {missing_list}");
    run::run(&mut apt_get(&["update", "--quiet"]))?;
    let mut install = apt_get(&["install", "--quiet", "--yes", "--no-install-recommends"]);
    run::run(install.args(missing))
}

pub(crate) fn apt_get(args: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    command
}
