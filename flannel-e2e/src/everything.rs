//! The whole network configuration of a namespace as lines of text.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use flannel_core::{Object, Scope};
use flannel_testkit::netns::Ns;

/// What a namespace has, as lines: what our kernel crate reads, what `ip` and `bridge` say, and
/// every setting of every device.
///
/// What comes and goes by itself (operational states, counters, timers, learned neighbours and forwarding entries) is
/// left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Everything {
    lines: BTreeSet<String>,
}

impl Everything {
    /// Reads a namespace.
    pub fn of(ns: &Ns) -> Self {
        let mut lines = BTreeSet::new();
        let mut add = |section: &str, line: &str| {
            lines.insert(format!("{section}: {}", line.trim_end()));
        };
        let first = ns.observe(&Scope::default()).expect("readable");
        let devices = first.objects.values().filter_map(|object| match object {
            Object::Link(link) => Some(link.name),
            _ => None,
        });
        let scope = Scope {
            devices: devices.collect(),
            ..Scope::default()
        };
        let observed = ns.observe(&scope).expect("readable");
        for object in observed.objects.values() {
            add("object", &format!("{object:?}"));
        }
        for (section, command) in [
            ("link", "ip -o link"),
            ("address", "ip -o addr"),
            ("route", "ip route show table all"),
            ("route6", "ip -6 route show table all"),
            ("rule", "ip rule"),
            ("rule6", "ip -6 rule"),
            ("nexthop", "ip nexthop"),
            ("neighbour", "ip neigh show nud permanent"),
            ("fdb", "bridge fdb show"),
        ] {
            for line in run_in(ns, command).lines() {
                if section == "link" {
                    add(section, &without_operational_state(line));
                } else if section != "fdb" || line.contains("permanent") {
                    add(section, line);
                }
            }
        }
        for (path, value) in settings(ns) {
            add("setting", &format!("{path} = {value}"));
        }
        Self { lines }
    }

    /// The lines that contain a text.
    pub fn about(&self, text: &str) -> Vec<&str> {
        let lines = self.lines.iter().map(String::as_str);
        lines.filter(|line| line.contains(text)).collect()
    }

    /// Only the lines that a condition holds for.
    #[must_use]
    pub fn only(&self, keep: impl Fn(&str) -> bool) -> Self {
        let lines = self.lines.iter().filter(|line| keep(line));
        Self {
            lines: lines.cloned().collect(),
        }
    }

    /// Compares with a later reading.
    ///
    /// # Panics
    /// If they differ, with the differences.
    pub fn assert_same(&self, later: &Self, when: &str) {
        let list = |lines: Vec<&String>| {
            let lines = lines.into_iter().map(|line| format!("\n    {line}"));
            lines.collect::<String>()
        };
        let gone = list(self.lines.difference(&later.lines).collect());
        let came = list(later.lines.difference(&self.lines).collect());
        assert!(
            gone.is_empty() && came.is_empty(),
            "{when}\n  gone:{gone}\n  came:{came}"
        );
    }
}

/// A line of `ip link` without the operational state, which the kernel brings up to date when it
/// gets round to it.
fn without_operational_state(line: &str) -> String {
    let mut words: Vec<&str> = line.split(' ').collect();
    if let Some(at) = words.iter().position(|word| *word == "state") {
        words.drain(at..(at + 2).min(words.len()));
    }
    words.join(" ")
}

/// Runs a command in a namespace; answers what it prints. There is no quoting, but `''` is an
/// empty word.
///
/// # Panics
/// If it fails.
#[allow(
    clippy::disallowed_methods,
    reason = "the tools of the system are the independent observer"
)]
pub fn run_in(ns: &Ns, command: &str) -> String {
    let output = ns
        .run(|| {
            let mut words = command
                .split_whitespace()
                .map(|word| if word == "''" { "" } else { word });
            Command::new(words.next().unwrap_or_default())
                .args(words)
                .output()
        })
        .expect("the namespace can be entered")
        .unwrap_or_else(|error| panic!("{command}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Every setting of every device that can be read.
fn settings(ns: &Ns) -> Vec<(String, String)> {
    let read = || {
        let mut all = Vec::new();
        for tree in ["ipv4", "ipv6"] {
            let conf = Path::new("/proc/sys/net").join(tree).join("conf");
            for dev in fs::read_dir(conf).into_iter().flatten().flatten() {
                for file in fs::read_dir(dev.path()).into_iter().flatten().flatten() {
                    if let Ok(value) = fs::read_to_string(file.path()) {
                        all.push((file.path().display().to_string(), value));
                    }
                }
            }
        }
        all
    };
    ns.run(read).expect("the namespace can be entered")
}
