//! Who may depend on whom.

use std::collections::{BTreeMap, BTreeSet};

use crate::metadata::{Package, Workspace};
use crate::run::{Outcome, cargo, output};

/// The most packages in flannel-core's whole tree, itself included.
const CORE_PACKAGES: usize = 25;

/// What flannel-core must not link, by the beginning of the name: kernel, stores, network, TLS.
const NOT_IN_CORE: &[&str] = &[
    "etcd",
    "h2",
    "hyper",
    "kube",
    "k8s-openapi",
    "mio",
    "netlink",
    "nix",
    "openssl",
    "rtnetlink",
    "rustls",
    "socket2",
    "tonic",
];

/// Crates, by the beginning of the name, that only one member may depend on directly.
const OWNED: &[(&str, &str)] = &[
    ("netlink-", "flannel-netlink"),
    ("rtnetlink", "flannel-netlink"),
    ("etcd-client", "flannel-subnet-etcd"),
    ("kube", "flannel-subnet-kube"),
];

pub(crate) fn run() -> Outcome {
    let workspace = Workspace::load()?;
    let members: BTreeMap<&str, &Package> = workspace
        .members()
        .map(|package| (package.name.as_str(), package))
        .collect();
    let mut wrong = Vec::new();
    for package in workspace.members() {
        check_siblings(package, &members, &mut wrong);
        check_owned(package, &mut wrong);
    }
    check_core(&mut wrong)?;
    for line in &wrong {
        println!("{line}");
    }
    match wrong.len() {
        0 => Ok(()),
        n => Err(format!("{n} forbidden dependencies, named above")),
    }
}

/// The siblings that a published member may depend on; `None`: nobody has decided yet.
fn allowed_siblings(name: &str) -> Option<&'static [&'static str]> {
    match name {
        "flannel-core" => Some(&[]),
        "flannel-testkit" => Some(&["flannel-core", "flannel-netlink", "flannel-subnet-kv"]),
        "flannel-netlink" => Some(&["flannel-core"]),
        "flannel-subnet-etcd" => Some(&["flannel-core", "flannel-subnet-kv"]),
        _ if name.starts_with("flannel-backend-") => Some(&["flannel-core"]),
        _ if name.starts_with("flannel-subnet-") => Some(&["flannel-core"]),
        _ => None,
    }
}

/// A member that is not published (tests, tools) may use all; nobody may use it. The facade may
/// use everything else.
fn check_siblings(package: &Package, members: &BTreeMap<&str, &Package>, wrong: &mut Vec<String>) {
    let name = &package.name;
    let siblings = package
        .dependencies
        .iter()
        .filter_map(|dependency| members.get(dependency.as_str()));
    let allowed = allowed_siblings(name);
    if allowed.is_none() && package.published && name != "flannel" {
        wrong.push(format!(
            "{name} is new: say in xtask/src/deps.rs which siblings it may depend on"
        ));
    }
    for sibling in siblings {
        if !sibling.published {
            wrong.push(format!(
                "{name} depends on {}, which is not published",
                sibling.name
            ));
        } else if allowed.is_some_and(|allowed| !allowed.contains(&sibling.name.as_str())) {
            wrong.push(format!("{name} depends on its sibling {}", sibling.name));
        }
    }
}

fn check_owned(package: &Package, wrong: &mut Vec<String>) {
    for dependency in &package.dependencies {
        let owner = OWNED
            .iter()
            .find(|(prefix, owner)| dependency.starts_with(prefix) && package.name != *owner);
        if let Some((_, owner)) = owner {
            wrong.push(format!(
                "{} depends on {dependency}, which is for {owner} only",
                package.name
            ));
        }
    }
}

/// Asks `cargo tree`, which knows the features that core has when it is built alone.
fn check_core(wrong: &mut Vec<String>) -> Outcome {
    let tree = output(&mut cargo([
        "tree",
        "--package=flannel-core",
        "--all-features",
        "--edges=normal,build",
        "--prefix=none",
        "--format={p}",
    ]))?;
    let packages: BTreeSet<(&str, &str)> = tree
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.next()?))
        })
        .collect();
    println!(
        "flannel-core links {} packages of {CORE_PACKAGES} allowed",
        packages.len()
    );
    if packages.len() > CORE_PACKAGES {
        wrong.push(format!(
            "flannel-core links {} packages, more than {CORE_PACKAGES}",
            packages.len()
        ));
    }
    for (name, _) in packages {
        if NOT_IN_CORE.iter().any(|prefix| name.starts_with(prefix)) {
            wrong.push(format!("flannel-core links {name}"));
        }
    }
    Ok(())
}
