//! The kube-apiserver that the tests of the Kubernetes manager start.
//!
//! Debian has no package of it, but the source of one. It is built once and kept outside of the
//! clone, where `flannel-testkit` looks for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, process};

use crate::etcd::cache;
use crate::run::{self, Outcome, find_program, in_ci, is_root, output};
use crate::setup::apt_get;

/// The environment variable that names a folder with the program, as other projects use it.
const ASSETS: &str = "KUBEBUILDER_ASSETS";

/// The folder in the user's cache; `flannel_testkit::servers::KubeApiServer` has the same.
///
/// Its name says what the program was made of, so that a machine that has an older one builds it.
const CACHE: &str = "flannel-test/kube-apiserver-1.20-reflect2-1.0.2";

/// The version whose sources can be built as below: that of Debian 12.
const VERSION: &str = "1.20.2";

/// The source package of the library that is put in the place of the one that Kubernetes 1.20
/// brings, which is wrong for Go since 1.18: it works on wild pointers when it reads or writes a
/// map as JSON, and a Pod or a `ConfigMap` that is made ends the server.
const REFLECT: &str = "golang-github-modern-go-reflect2";

/// The library's folder in the sources of Kubernetes.
const VENDORED: &str = "vendor/github.com/modern-go/reflect2";

/// The library's file that a version fit for this Go has, and an older one has not.
const FIT: &str = "go_above_118.go";

/// What the build needs: a program, and the package it is in.
const TOOLS: &[(&str, &str)] = &[
    ("go", "golang-go"),
    ("dpkg-source", "dpkg-dev"),
    ("make", "make"),
    ("rsync", "rsync"),
    ("jq", "jq"),
];

/// Sees to it that there is one.
///
/// It takes minutes where it has to be built; in CI it is a failure if it cannot be.
pub(crate) fn provide() -> Outcome {
    if let Some(assets) = env::var_os(ASSETS).filter(|assets| !assets.is_empty()) {
        let program = Path::new(&assets).join("kube-apiserver");
        return if program.is_file() {
            println!("kube-apiserver is that of {ASSETS}");
            Ok(())
        } else {
            Err(format!("{ASSETS} is set, but there is no kube-apiserver"))
        };
    }
    let folder = cache()?.join(CACHE);
    let program = folder.join("kube-apiserver");
    if program.is_file() {
        println!("kube-apiserver is in the cache");
        return Ok(());
    }
    let missing: Vec<&str> = TOOLS
        .iter()
        .filter(|(tool, _)| find_program(tool).is_none())
        .map(|(_, package)| *package)
        .collect();
    if find_program("apt-get").is_none() || !(missing.is_empty() || is_root()) {
        println!(
            "kube-apiserver is missing: set {ASSETS}, or on Debian 12 install {} and run \
             `cargo xtask setup` again",
            missing.join(" ")
        );
        return if in_ci() {
            Err("kube-apiserver is missing, and cannot be built here".to_owned())
        } else {
            println!("going on without; tests that need it are skipped");
            Ok(())
        };
    }
    if !missing.is_empty() {
        run::run(&mut apt_get(&["update", "--quiet"]))?;
        let mut install = apt_get(&["install", "--quiet", "--yes", "--no-install-recommends"]);
        run::run(install.args(missing))?;
    }
    println!("kube-apiserver is missing; it is built once, which takes some minutes");
    let work = folder.join(format!("build-{}", process::id()));
    let built = build(&work, &program);
    fs::remove_dir_all(&work).ok();
    built
}

/// Builds it in a folder that may be removed afterwards, and puts it in its place.
fn build(work: &Path, program: &Path) -> Outcome {
    let failed = |error: std::io::Error| format!("{}: {error}", work.display());
    let parent = work.join("go/src/k8s.io");
    fs::create_dir_all(&parent).map_err(failed)?;
    unpack(work)?;
    let source = kubernetes(work)?;
    replace(&source.join(VENDORED), &reflect(work)?)?;
    // Without modules the folder's place says which package it is.
    let place = parent.join("kubernetes");
    fs::rename(source, &place).map_err(failed)?;
    // The sources of a package know no git that could tell the version.
    let version = work.join("version");
    let lines = format!(
        "KUBE_GIT_COMMIT='debian'\nKUBE_GIT_TREE_STATE='archive'\nKUBE_GIT_VERSION='v{VERSION}'\n\
         KUBE_GIT_MAJOR='1'\nKUBE_GIT_MINOR='20'\n"
    );
    fs::write(&version, lines).map_err(failed)?;
    let mut make = Command::new("make");
    make.args(["WHAT=cmd/kube-apiserver", "GOLDFLAGS=-s -w"])
        .current_dir(&place)
        .env("CGO_ENABLED", "0")
        .env("GO111MODULE", "off")
        .env("GOPATH", work.join("go"))
        .env("GOCACHE", work.join("cache"))
        .env("KUBE_GIT_VERSION_FILE", version)
        // Makefiles of ours, if make runs us, are none of its business.
        .env_remove("MAKEFLAGS")
        .stdin(Stdio::null());
    run::run(&mut make)?;
    // A rename is at once, so that nobody finds half a program.
    fs::rename(place.join("_output/bin/kube-apiserver"), program).map_err(failed)
}

/// Fetches the sources of both packages and unpacks them, with Debian's patches.
///
/// The machine's own list of sources may name binary packages only, and stays as it is: the
/// places of its binary packages, which apt tells, have the sources too.
fn unpack(work: &Path) -> Outcome {
    let failed = |error: std::io::Error| format!("{}: {error}", work.display());
    let targets = output(Command::new("apt-get").args([
        "indextargets",
        "--format=$(CREATED_BY) $(ORIGIN) $(REPO_URI) $(RELEASE) $(COMPONENT)",
    ]))?;
    let mut list = String::new();
    for line in targets.lines() {
        if let Some(place) = line.strip_prefix("Packages Debian ") {
            list.push_str(&format!("deb-src {place}\n"));
        }
    }
    let sources = work.join("sources.list");
    fs::write(&sources, list).map_err(failed)?;
    fs::create_dir_all(work.join("lists/partial")).map_err(failed)?;
    let apt = |args: &[&str]| {
        let mut command = apt_get(&["--quiet"]);
        command
            .arg("--option=Dir::Etc::sourceparts=-")
            .arg(format!(
                "--option=Dir::Etc::sourcelist={}",
                sources.display()
            ))
            .arg(format!(
                "--option=Dir::State::lists={}",
                work.join("lists").display()
            ))
            // It would give up root's rights for a folder that is root's.
            .arg("--option=APT::Sandbox::User=root")
            .args(args)
            .current_dir(work);
        command
    };
    run::run(&mut apt(&["update"]))?;
    run::run(&mut apt(&["source", "kubernetes", REFLECT]))
}

/// The unpacked sources of Kubernetes.
fn kubernetes(work: &Path) -> Outcome<PathBuf> {
    let unpacked = folder_with(work, "cmd/kube-apiserver")?;
    let name = unpacked.to_string_lossy();
    if name.contains(VERSION.trim_end_matches(".2")) {
        Ok(unpacked)
    } else {
        Err(format!(
            "this system's sources of kubernetes are not those of {VERSION}: set {ASSETS}"
        ))
    }
}

/// The unpacked sources of the library.
fn reflect(work: &Path) -> Outcome<PathBuf> {
    folder_with(work, FIT).map_err(|reason| format!("{REFLECT}: {reason}: set {ASSETS}"))
}

/// The unpacked package that has a path.
fn folder_with(work: &Path, inside: &str) -> Outcome<PathBuf> {
    fs::read_dir(work)
        .map_err(|error| format!("{}: {error}", work.display()))?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.join(inside).exists())
        .ok_or_else(|| format!("no source package here has {inside}"))
}

/// Puts a folder in the place of another, which has to be there.
fn replace(old: &Path, new: &Path) -> Outcome {
    let failed = |error: std::io::Error| format!("{}: {error}", old.display());
    fs::remove_dir_all(old).map_err(failed)?;
    fs::rename(new, old).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vendored_library_is_the_new_one_and_has_nothing_of_the_old() {
        let work = env::temp_dir().join(format!("xtask-kube-{}", process::id()));
        let (source, new) = (work.join("kubernetes-1.20.2"), work.join("reflect2-1.0.2"));
        let vendored = source.join(VENDORED);
        fs::create_dir_all(&vendored).expect("a folder");
        fs::create_dir_all(&new).expect("a folder");
        fs::write(vendored.join("old.go"), "old").expect("a file");
        assert!(reflect(&work).is_err(), "a library without {FIT} is taken");
        fs::write(new.join(FIT), "new").expect("a file");
        let found = reflect(&work).expect("the library");
        replace(&vendored, &found).expect("replaced");
        let names = fs::read_dir(&vendored).expect("a folder");
        let names: Vec<_> = names
            .filter_map(Result::ok)
            .map(|e| e.file_name())
            .collect();
        assert_eq!(names, [FIT]);
        let gone = source.join("vendor/github.com/modern-go/elsewhere");
        assert!(
            replace(&gone, &vendored).is_err(),
            "nothing was there to replace"
        );
        fs::remove_dir_all(&work).expect("removed");
    }
}
