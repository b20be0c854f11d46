//! What cargo knows about the workspace and its dependencies.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::Value;

use crate::run::{Outcome, cargo, output};

/// The workspace as `cargo metadata` tells it, for the platform we run on.
pub(crate) struct Workspace {
    pub(crate) target_directory: PathBuf,
    /// Every package by id: members and everything they depend on.
    pub(crate) packages: BTreeMap<String, Package>,
    /// By id, the ids of what a package needs to be built by others (no dev-dependencies).
    needs: BTreeMap<String, Vec<String>>,
}

pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) licence: Option<String>,
    pub(crate) rust_version: Option<String>,
    /// The registry it is from; `None` for a path.
    pub(crate) source: Option<String>,
    pub(crate) member: bool,
    pub(crate) published: bool,
    pub(crate) features: Vec<String>,
    /// The direct dependencies that are no dev-dependencies, optional ones too.
    pub(crate) dependencies: BTreeSet<String>,
    pub(crate) examples: Vec<Target>,
    /// The test programs.
    pub(crate) tests: Vec<Target>,
}

/// An example or a test program as the manifest has it.
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) required_features: Vec<String>,
}

impl Workspace {
    pub(crate) fn load() -> Outcome<Self> {
        let version = output(std::process::Command::new("rustc").arg("-vV"))?;
        let host = version
            .lines()
            .find_map(|line| line.strip_prefix("host: "))
            .ok_or("`rustc -vV` names no host")?;
        let text = output(&mut cargo([
            "metadata",
            "--format-version=1",
            "--all-features",
            "--filter-platform",
            host,
        ]))?;
        let value: Value =
            serde_json::from_str(&text).map_err(|error| format!("cargo metadata: {error}"))?;
        Self::parse(&value).ok_or_else(|| "cargo metadata has not the form expected".to_owned())
    }

    fn parse(value: &Value) -> Option<Self> {
        let members: BTreeSet<String> = texts(&value["workspace_members"]).collect();
        let mut packages = BTreeMap::new();
        for package in value["packages"].as_array()? {
            let id = text(&package["id"])?;
            let parsed = Package::parse(package, members.contains(&id))?;
            packages.insert(id, parsed);
        }
        let mut needs = BTreeMap::new();
        for node in value["resolve"]["nodes"].as_array()? {
            let deps = node["deps"].as_array()?.iter().filter(|dep| {
                list(&dep["dep_kinds"]).any(|kind| kind["kind"].as_str() != Some("dev"))
            });
            let deps = deps.filter_map(|dep| text(&dep["pkg"])).collect();
            needs.insert(text(&node["id"])?, deps);
        }
        Some(Self {
            target_directory: value["target_directory"].as_str()?.into(),
            packages,
            needs,
        })
    }

    /// The packages of the workspace itself.
    pub(crate) fn members(&self) -> impl Iterator<Item = &Package> {
        self.packages.values().filter(|package| package.member)
    }

    /// What users of the published crates build: those crates and all they need.
    pub(crate) fn shipped(&self) -> impl Iterator<Item = &Package> {
        let mut reached = BTreeSet::new();
        let mut todo: Vec<&String> = self
            .packages
            .iter()
            .filter(|(_, package)| package.member && package.published)
            .map(|(id, _)| id)
            .collect();
        while let Some(id) = todo.pop() {
            if reached.insert(id) {
                todo.extend(self.needs.get(id).into_iter().flatten());
            }
        }
        reached.into_iter().filter_map(|id| self.packages.get(id))
    }
}

impl Package {
    fn parse(value: &Value, member: bool) -> Option<Self> {
        let dependencies = list(&value["dependencies"])
            .filter(|dependency| dependency["kind"].as_str() != Some("dev"))
            .filter_map(|dependency| text(&dependency["name"]))
            .collect();
        let targets = |wanted: &str| {
            list(&value["targets"])
                .filter(|target| texts(&target["kind"]).any(|kind| kind == wanted))
                .filter_map(|target| {
                    Some(Target {
                        name: text(&target["name"])?,
                        required_features: texts(&target["required-features"]).collect(),
                    })
                })
                .collect()
        };
        Some(Self {
            name: text(&value["name"])?,
            version: text(&value["version"])?,
            licence: text(&value["license"]),
            rust_version: text(&value["rust_version"]),
            source: text(&value["source"]),
            member,
            published: value["publish"].as_array().is_none_or(|to| !to.is_empty()),
            features: value["features"].as_object()?.keys().cloned().collect(),
            dependencies,
            examples: targets("example"),
            tests: targets("test"),
        })
    }
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn texts(value: &Value) -> impl Iterator<Item = String> {
    list(value).filter_map(text)
}
