//! Licences, banned crates and sources, as `deny.toml` has them.

use std::fs;

use crate::metadata::{Package, Workspace};
use crate::run::{self, Outcome, cargo, succeeds};

/// Where packages may come from if nothing else is said.
const CRATES_IO: &str = "https://github.com/rust-lang/crates.io-index";

pub(crate) fn run() -> Outcome {
    if succeeds(&mut cargo(["deny", "--version"])) {
        return run::run(&mut cargo(["deny", "--all-features", "check"]));
    }
    println!("cargo-deny is not installed; checking licences, bans and sources without it");
    let text = fs::read_to_string("deny.toml").map_err(|error| format!("deny.toml: {error}"))?;
    let rules = Rules::parse(&text);
    if rules.licences.is_empty() || rules.banned.is_empty() {
        return Err("deny.toml has no [licenses] allow or no [bans] deny".to_owned());
    }
    let workspace = Workspace::load()?;
    let packages: Vec<&Package> = workspace.packages.values().collect();
    let wrong: Vec<String> = packages
        .iter()
        .filter_map(|package| Some((package, rules.problem(package, &packages)?)))
        .map(|(package, problem)| format!("{} {}: {problem}", package.name, package.version))
        .collect();
    for line in &wrong {
        println!("{line}");
    }
    if wrong.is_empty() {
        println!("{} packages keep to deny.toml", workspace.packages.len());
        Ok(())
    } else {
        Err(format!("{} packages break deny.toml", wrong.len()))
    }
}

/// The part of `deny.toml` that is checked without cargo-deny.
#[derive(Debug, Default, PartialEq, Eq)]
struct Rules {
    licences: Vec<String>,
    /// What nobody may depend on, and those who may all the same.
    banned: Vec<(String, Vec<String>)>,
}

impl Rules {
    /// Reads the two lists, each written with one entry a line.
    fn parse(text: &str) -> Self {
        let mut rules = Self::default();
        let mut section = "";
        let mut in_list = "";
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                section = name;
            } else if let Some((key, "[")) = line.split_once('=').map(|(k, v)| (k, v.trim())) {
                in_list = key.trim();
            } else if line == "]" {
                in_list = "";
            } else if let Some(entry) = line.split('"').nth(1) {
                match (section, in_list) {
                    ("licenses", "allow") => rules.licences.push(entry.to_owned()),
                    ("bans", "deny") => {
                        let wrappers = line.split_once("wrappers = [");
                        let wrappers = wrappers.and_then(|(_, rest)| rest.split_once(']'));
                        let names = wrappers.map_or("", |(names, _)| names);
                        let names = names.split('"').skip(1).step_by(2);
                        let names = names.map(ToOwned::to_owned).collect();
                        rules.banned.push((entry.to_owned(), names));
                    }
                    _ => {}
                }
            }
        }
        rules
    }

    fn problem(&self, package: &Package, all: &[&Package]) -> Option<String> {
        if let Some((name, wrappers)) = self.banned.iter().find(|(name, _)| *name == package.name) {
            let depends = |other: &&&Package| other.dependencies.contains(name);
            let mut users = all.iter().filter(depends);
            let user = users.find(|user| !wrappers.contains(&user.name));
            if wrappers.is_empty() || user.is_some() {
                let user = user.map_or("nobody", |user| &user.name);
                return Some(format!("banned, and used by {user}"));
            }
        }
        if let Some(source) = &package.source
            && source.strip_prefix("registry+") != Some(CRATES_IO)
        {
            return Some(format!("from {source}, not from crates.io"));
        }
        match &package.licence {
            None => Some("states no licence".to_owned()),
            Some(licence) if self.allows(licence) => None,
            Some(licence) => Some(format!("licence {licence} is not allowed")),
        }
    }

    /// Whether an SPDX expression can be met with the licences allowed.
    fn allows(&self, expression: &str) -> bool {
        let spaced = expression
            .replace('(', " ( ")
            .replace(')', " ) ")
            // The old way of writing OR.
            .replace('/', " OR ");
        let mut words = spaced.split_whitespace().peekable();
        let allowed = self.any_of(&mut words);
        allowed && words.next().is_none()
    }

    fn any_of<'a>(&self, words: &mut Words<'a, impl Iterator<Item = &'a str>>) -> bool {
        let mut allowed = self.all_of(words);
        while words.next_if_eq(&"OR").is_some() {
            allowed |= self.all_of(words);
        }
        allowed
    }

    fn all_of<'a>(&self, words: &mut Words<'a, impl Iterator<Item = &'a str>>) -> bool {
        let mut allowed = self.one(words);
        while words.next_if_eq(&"AND").is_some() {
            allowed &= self.one(words);
        }
        allowed
    }

    fn one<'a>(&self, words: &mut Words<'a, impl Iterator<Item = &'a str>>) -> bool {
        match words.next() {
            Some("(") => {
                let allowed = self.any_of(words);
                words.next() == Some(")") && allowed
            }
            Some(licence) => {
                let exception = words.next_if_eq(&"WITH").and_then(|_| words.next());
                let whole = exception
                    .map(|exception| format!("{licence} WITH {exception}"))
                    .unwrap_or_else(|| licence.to_owned());
                // An exception only adds permissions.
                self.licences.iter().any(|l| *l == whole || l == licence)
            }
            None => false,
        }
    }
}

type Words<'a, I> = std::iter::Peekable<I>;

#[cfg(test)]
mod tests {
    use super::Rules;

    fn rules() -> Rules {
        Rules::parse(
            "[licenses]\nallow = [\n    \"MIT\", # fine\n    \"ISC\",\n]\n\
             [bans]\ndeny = [\n    { crate = \"openssl\", reason = \"x\" },\n    \
             { crate = \"anyhow\", wrappers = [\"a\", \"b\"], reason = \"x\" },\n]\n",
        )
    }

    #[test]
    fn lists_are_read_by_section() {
        assert_eq!(rules().licences, ["MIT", "ISC"]);
        let banned = rules().banned;
        assert_eq!(banned[0], ("openssl".to_owned(), Vec::new()));
        assert_eq!(banned[1].1, ["a", "b"]);
    }

    #[test]
    fn expressions_are_met_or_not() {
        let rules = rules();
        for yes in [
            "MIT",
            "GPL-3.0 OR MIT",
            "GPL-3.0/MIT",
            "(GPL-3.0 OR MIT) AND ISC",
            "GPL-3.0 AND GPL-2.0 OR ISC",
            "MIT WITH some-exception",
        ] {
            assert!(rules.allows(yes), "{yes}");
        }
        for no in [
            "",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(MIT OR ISC",
            "MIT ISC",
            "MIT AND (GPL-3.0 OR GPL-2.0)",
        ] {
            assert!(!rules.allows(no), "{no}");
        }
    }
}
