//! The list of mutants: read from `mutants/*.toml`, and checked against the code.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

use crate::metadata::{Target, Workspace};
use crate::run::Outcome;

/// Where the list is, below the workspace's root.
const DIRECTORY: &str = "mutants";

/// A deliberate defect.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Mutant {
    /// Words with hyphens: what the defect does.
    pub(super) name: String,
    /// The kind of weakness: its number in the list of `mutants/README.md`, and its name.
    pub(super) class: String,
    /// The file that is changed, below the workspace's root.
    pub(super) file: String,
    /// The text that is replaced. Occurs in the file exactly once.
    pub(super) find: String,
    /// What takes its place.
    pub(super) replace: String,
    /// The test that must fail.
    pub(super) caught_by: Catcher,
    /// The file of the list that it is in.
    #[serde(skip)]
    pub(super) source: PathBuf,
}

/// One test, as it is written in the list: `package/target::name`, the target being a file of the
/// package's `tests/`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Catcher {
    pub(super) package: String,
    pub(super) target: String,
    pub(super) test: String,
}

impl FromStr for Catcher {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parts = || {
            let (package, rest) = text.split_once('/')?;
            let (target, test) = rest.split_once("::")?;
            let all = [package, target, test];
            let is_whole = all.iter().all(|part| !part.is_empty());
            is_whole.then(|| all.map(str::to_owned))
        };
        let [package, target, test] =
            parts().ok_or_else(|| format!("{text:?} is not of the form package/target::test"))?;
        Ok(Self {
            package,
            target,
            test,
        })
    }
}

impl TryFrom<String> for Catcher {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Catcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            package,
            target,
            test,
        } = self;
        write!(f, "{package}/{target}::{test}")
    }
}

/// One file of the list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    mutant: Vec<Mutant>,
}

/// All mutants, those with one catcher side by side.
pub(super) struct List(Vec<Mutant>);

impl List {
    /// Reads the list and checks that each of its mutants can be made.
    pub(super) fn load() -> Outcome<Self> {
        Self::of(Path::new(""))
    }

    fn of(root: &Path) -> Outcome<Self> {
        let directory = root.join(DIRECTORY);
        let failed = |error: std::io::Error| format!("{}: {error}", directory.display());
        let mut files = Vec::new();
        for entry in fs::read_dir(&directory).map_err(failed)? {
            files.push(entry.map_err(failed)?.path());
        }
        files.retain(|path| {
            path.extension()
                .is_some_and(|extension| extension == "toml")
        });
        files.sort();
        let mut all = Vec::new();
        for path in files {
            all.extend(read(&path)?);
        }
        let problems = problems(&all, root);
        if !problems.is_empty() {
            return Err(format!(
                "the list of mutants is wrong:\n{}",
                problems.join("\n")
            ));
        }
        // Few changes of test program and of file: little to build between two mutants.
        all.sort_by(|a, b| {
            let order = |mutant: &Mutant| (mutant.caught_by.target.clone(), mutant.file.clone());
            order(a).cmp(&order(b))
        });
        Ok(Self(all))
    }

    /// The mutants of these names; all if there are none.
    pub(super) fn selected(&self, names: &[String]) -> Outcome<Vec<&Mutant>> {
        let unknown = names
            .iter()
            .find(|name| self.0.iter().all(|mutant| mutant.name != **name));
        if let Some(name) = unknown {
            return Err(format!("there is no mutant {name} in {DIRECTORY}/"));
        }
        let wanted = |mutant: &&Mutant| names.is_empty() || names.contains(&mutant.name);
        Ok(self.0.iter().filter(wanted).collect())
    }

    /// Lets one test catch all of them, whatever the list says.
    pub(super) fn are_to_be_caught_by(&mut self, catcher: &Catcher) {
        for mutant in &mut self.0 {
            mutant.caught_by = catcher.clone();
        }
    }

    /// The packages whose tests catch something. They are always built together, so that what they
    /// share is built once.
    pub(super) fn packages(&self) -> BTreeSet<String> {
        let catchers = self.0.iter().map(|mutant| &mutant.caught_by);
        catchers.map(|catcher| catcher.package.clone()).collect()
    }

    /// The features that the test programs need, as `package/feature`.
    pub(super) fn features(&self, workspace: &Workspace) -> BTreeSet<String> {
        let mut features = BTreeSet::new();
        for package in workspace.members() {
            let is_used = |target: &&Target| {
                self.0.iter().any(|Mutant { caught_by, .. }| {
                    caught_by.package == package.name && caught_by.target == target.name
                })
            };
            for target in package.tests.iter().filter(is_used) {
                let needed = target.required_features.iter();
                features.extend(needed.map(|feature| format!("{}/{feature}", package.name)));
            }
        }
        features
    }
}

fn read(path: &Path) -> Outcome<Vec<Mutant>> {
    let shown = path.display();
    let text = fs::read_to_string(path).map_err(|error| format!("{shown}: {error}"))?;
    let file: File = toml::from_str(&text).map_err(|error| format!("{shown}: {error}"))?;
    let source = path.to_owned();
    let with_source = |mutant| Mutant {
        source: source.clone(),
        ..mutant
    };
    Ok(file.mutant.into_iter().map(with_source).collect())
}

/// What is wrong with the list, each with the remedy.
fn problems(mutants: &[Mutant], root: &Path) -> Vec<String> {
    let mut names = BTreeSet::new();
    let mut problems = Vec::new();
    for mutant in mutants {
        let mut say = |problem: String| {
            let (source, name) = (mutant.source.display(), &mutant.name);
            problems.push(format!("{source}: mutant {name}: {problem}"));
        };
        if !names.insert(&mutant.name) {
            say("there is another one of this name".to_owned());
        }
        if mutant.find == mutant.replace {
            say("find and replace are the same: nothing would change".to_owned());
        }
        let file = &mutant.file;
        match fs::read_to_string(root.join(file)) {
            Err(error) => say(format!(
                "{file}: {error}; name the file that has the code now"
            )),
            Ok(text) => match text.matches(&mutant.find).count() {
                1 => {}
                0 => say(format!(
                    "its `find` text is not in {file}: the code has changed. Put there what does \
                     the same now; drop the mutant only if the defect cannot be made any more"
                )),
                n => say(format!(
                    "its `find` text is in {file} {n} times: add lines until it is unique"
                )),
            },
        }
        let Catcher {
            package, target, ..
        } = &mutant.caught_by;
        let tests = root.join(package).join("tests");
        let is_there = [format!("{target}.rs"), format!("{target}/main.rs")]
            .iter()
            .any(|file| tests.join(file).is_file());
        if !is_there {
            say(format!(
                "it is to be caught by {}, but {package} has no tests/{target}.rs",
                mutant.caught_by
            ));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> &'static Path {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        manifest.parent().expect("xtask is in the workspace")
    }

    fn mutant() -> Mutant {
        Mutant {
            name: "none".to_owned(),
            class: "C4 deaf watch".to_owned(),
            file: "xtask/src/mutants/list.rs".to_owned(),
            find: "a text that stands here only".to_owned(),
            replace: String::new(),
            caught_by: "flannel-core/overlay::a_test".parse().expect("a catcher"),
            source: "mutants/x.toml".into(),
        }
    }

    /// The cheap half of `cargo xtask mutants`: a change of the code shows at once which entries
    /// of the list have to follow it.
    #[test]
    fn every_mutant_of_the_list_can_be_made() {
        let list = List::of(root()).unwrap_or_else(|problems| panic!("{problems}"));
        assert!(list.selected(&[]).is_ok_and(|all| all.len() >= 24));
        assert!(list.selected(&["no-such-mutant".to_owned()]).is_err());
    }

    /// Every weakness is either in the list of mutants or named, with the reason, as one that this
    /// code cannot have.
    #[test]
    fn every_weakness_has_a_mutant_or_a_reason() {
        let list = List::of(root()).unwrap_or_else(|problems| panic!("{problems}"));
        let readme = fs::read_to_string(root().join(DIRECTORY).join("README.md"))
            .expect("the list has a README");
        let reasons: BTreeSet<&str> = readme
            .lines()
            .filter_map(|line| line.strip_prefix("| ")?.split_once(' '))
            .map(|(weakness, _)| weakness)
            .collect();
        let mutated: BTreeSet<&str> = list
            .0
            .iter()
            .filter_map(|mutant| mutant.class.split(' ').next())
            .collect();
        for (section, last) in [("A", 11), ("B", 8), ("C", 11), ("D", 12), ("E", 6)] {
            for number in 1..=last {
                let weakness = format!("{section}{number}");
                assert!(
                    mutated.contains(&*weakness) != reasons.contains(&*weakness),
                    "{weakness} must have a mutant or a reason in mutants/README.md, not both"
                );
            }
        }
    }

    #[test]
    fn a_wrong_entry_says_what_to_do() {
        let said = |mutant: Mutant| problems(&[mutant], root()).join("\n");
        assert_eq!(said(mutant()), "");
        let gone = said(Mutant {
            find: ["not", "there"].join(" "),
            ..mutant()
        });
        assert!(gone.contains("mutants/x.toml: mutant none:"), "{gone}");
        assert!(gone.contains("the code has changed"), "{gone}");
        let often = said(Mutant {
            find: "fn ".to_owned(),
            ..mutant()
        });
        assert!(often.contains("until it is unique"), "{often}");
        let same = said(Mutant {
            replace: mutant().find,
            ..mutant()
        });
        assert!(same.contains("nothing would change"), "{same}");
        let no_file = said(Mutant {
            file: "no/such/file.rs".to_owned(),
            ..mutant()
        });
        assert!(no_file.contains("no/such/file.rs"), "{no_file}");
        let no_test = said(Mutant {
            caught_by: "flannel-core/no_such::test".parse().expect("a catcher"),
            ..mutant()
        });
        assert!(no_test.contains("tests/no_such.rs"), "{no_test}");
        let twice = problems(&[mutant(), mutant()], root());
        assert_eq!(twice.len(), 1, "{twice:?}");
        for text in ["", "a", "a/b", "/b::c", "a/::c", "a/b::"] {
            assert!(text.parse::<Catcher>().is_err(), "{text}");
        }
    }
}
