//! The packages for the registry: each published crate as a package, whole and in an order that
//! works.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::run::{self, Outcome, cargo, output};

/// The files that every package has beside its sources.
const FILES: &[&str] = &["LICENSE", "README.md"];

/// The fields without which a package's page says too little.
const FIELDS: &[&str] = &["description", "license", "repository", "documentation"];

/// Checks the manifests, and packs every published crate as `cargo publish` would; with `--verify`
/// each is also built from what was packed, which takes minutes.
pub(crate) fn run(args: &[String]) -> Outcome {
    match args {
        [] => pack(&["--no-verify"]),
        [verify] if verify == "--verify" => pack(&[]),
        _ => Err("the only argument is --verify".to_owned()),
    }
}

fn pack(how: &[&str]) -> Outcome {
    let metadata = output(&mut cargo(["metadata", "--format-version=1", "--no-deps"]))?;
    let metadata: Value =
        serde_json::from_str(&metadata).map_err(|error| format!("cargo metadata: {error}"))?;
    let manifests = Manifests::parse(&metadata);
    let wrong = manifests.check();
    for line in &wrong {
        println!("{line}");
    }
    if !wrong.is_empty() {
        return Err(format!("{} faults of manifests, named above", wrong.len()));
    }
    for name in &manifests.published {
        let listed = output(&mut cargo([
            "package",
            "--list",
            "--allow-dirty",
            "--package",
            name,
        ]))?;
        let missing = missing(&listed);
        if !missing.is_empty() {
            return Err(format!("the package {name} lacks {}", missing.join(", ")));
        }
    }
    let mut publish = cargo(["publish", "--workspace", "--dry-run", "--allow-dirty"]);
    run::run(publish.args(how))
}

/// The files that a package's list lacks.
fn missing(listed: &str) -> Vec<&'static str> {
    let has = |file: &&&str| listed.lines().any(|line| line == **file);
    FILES.iter().filter(|file| !has(file)).copied().collect()
}

/// The workspace's manifests, as `cargo metadata` tells them.
struct Manifests<'a> {
    members: Vec<&'a Value>,
    /// The names of those that go to the registry.
    published: BTreeSet<&'a str>,
}

impl<'a> Manifests<'a> {
    fn parse(metadata: &'a Value) -> Self {
        let members: Vec<&Value> = list(&metadata["packages"]).collect();
        let is_published = |package: &&&Value| {
            let to = package["publish"].as_array();
            to.is_none_or(|registries| !registries.is_empty())
        };
        let published = members.iter().filter(is_published);
        let published = published.filter_map(|package| package["name"].as_str());
        Self {
            published: published.collect(),
            members,
        }
    }

    /// A line for each fault.
    fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for package in &self.members {
            let name = package["name"].as_str().unwrap_or_default();
            if self.published.contains(name) {
                check_page(name, package, &mut wrong);
                self.check_siblings(name, package, &mut wrong);
            }
        }
        wrong
    }

    /// A dev-dependency with a version has to be in the registry before the crate that has it; the
    /// test kit needs the crates that are tested with it, so that would be a circle. One without a
    /// version is left out of the package.
    fn check_siblings(&self, name: &str, package: &Value, wrong: &mut Vec<String>) {
        for dependency in list(&package["dependencies"]) {
            let sibling = dependency["name"].as_str().unwrap_or_default();
            if dependency["path"].is_null() {
                continue;
            }
            let for_tests = dependency["kind"].as_str() == Some("dev");
            let has_version = dependency["req"].as_str() != Some("*");
            let fault = match (for_tests, has_version) {
                (true, true) => "has a version, and should have a path only",
                (false, false) => "has no version, and is needed to build the package",
                (false, true) if !self.published.contains(sibling) => "is not published",
                _ => continue,
            };
            wrong.push(format!("{name}: the dependency {sibling} {fault}"));
        }
    }
}

/// The parts of a manifest that the registry and docs.rs show.
fn check_page(name: &str, package: &Value, wrong: &mut Vec<String>) {
    let text = |field: &str| package[field].as_str().unwrap_or_default();
    for field in FIELDS.iter().filter(|field| text(field).is_empty()) {
        wrong.push(format!("{name}: the field {field} is missing"));
    }
    let readme = Path::new(text("manifest_path")).with_file_name("README.md");
    if text("readme") != "README.md" || !readme.is_file() {
        wrong.push(format!("{name}: it has no README.md of its own"));
    }
    if text("documentation") != format!("https://docs.rs/{name}") {
        wrong.push(format!("{name}: the documentation is that of another"));
    }
    let docs = &package["metadata"]["docs"]["rs"];
    let marks: Vec<&str> = list(&docs["rustdoc-args"])
        .filter_map(Value::as_str)
        .collect();
    if docs["all-features"].as_bool() != Some(true) || marks != ["--cfg", "docsrs"] {
        wrong.push(format!(
            "{name}: [package.metadata.docs.rs] shows not every feature, or does not mark them"
        ));
    }
    let marked = "#![cfg_attr(docsrs, feature(doc_cfg))]";
    let root = Path::new(text("manifest_path")).with_file_name("src/lib.rs");
    let source = std::fs::read_to_string(root).unwrap_or_default();
    if !source.lines().any(|line| line == marked) {
        wrong.push(format!("{name}: src/lib.rs has no {marked}"));
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The manifests of this workspace, which are right.
    fn ours() -> Value {
        let metadata = output(&mut cargo(["metadata", "--format-version=1", "--no-deps"]));
        serde_json::from_str(&metadata.expect("cargo tells")).expect("it is JSON")
    }

    /// The complaints after one change of the crate `flannel-core`.
    fn said(change: impl Fn(&mut Value)) -> Vec<String> {
        let mut metadata = ours();
        let packages = metadata["packages"].as_array_mut().expect("packages");
        let core = packages.iter_mut().find(|p| p["name"] == "flannel-core");
        change(core.expect("the crate"));
        Manifests::parse(&metadata).check()
    }

    fn dependency(name: &str, kind: &Value, req: &str) -> Value {
        json!({"name": name, "kind": kind, "req": req, "path": "/somewhere"})
    }

    #[test]
    fn our_manifests_are_right_and_ten_crates_are_published() {
        assert_eq!(said(|_| ()), Vec::<String>::new());
        let metadata = ours();
        let manifests = Manifests::parse(&metadata);
        assert_eq!(manifests.published.len(), 10);
        assert!(!manifests.published.contains("xtask"));
    }

    #[test]
    fn what_a_page_lacks_is_named() {
        for field in FIELDS {
            let said = said(|core| core[*field] = Value::Null);
            let first = said.first().expect("a fault");
            assert!(first.contains(field), "{said:?}");
        }
        let readme = said(|core| core["readme"] = Value::Null);
        assert!(readme[0].contains("README.md"), "{readme:?}");
        let docs = said(|core| core["metadata"]["docs"]["rs"]["all-features"] = json!(false));
        assert!(docs[0].contains("docs.rs"), "{docs:?}");
    }

    #[test]
    fn a_circle_of_dev_dependencies_with_versions_is_refused() {
        let add = |dependency: Value| {
            said(|core| {
                let all = core["dependencies"].as_array_mut().expect("a list");
                all.push(dependency.clone());
            })
        };
        let dev = json!("dev");
        let circle = add(dependency("flannel-testkit", &dev, "^0.1.0"));
        assert!(circle[0].contains("a path only"), "{circle:?}");
        assert!(add(dependency("flannel-testkit", &dev, "*")).is_empty());
        let unversioned = add(dependency("flannel-netlink", &Value::Null, "*"));
        assert!(unversioned[0].contains("no version"), "{unversioned:?}");
        let inner = add(dependency("flannel-fuzz", &Value::Null, "^0.1.0"));
        assert!(inner[0].contains("is not published"), "{inner:?}");
    }

    #[test]
    fn a_package_without_its_licence_is_found() {
        assert_eq!(missing("Cargo.toml\nREADME.md\nsrc/lib.rs"), ["LICENSE"]);
        assert!(missing("LICENSE\nREADME.md").is_empty());
    }
}
