//! A copy of the workspace's sources, in which mutants are made.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::run::Outcome;

use super::list::Mutant;

/// The copy.
pub(super) struct Tree {
    root: PathBuf,
}

impl Tree {
    /// Makes the copy, or brings it up to date. What is the same is not written, so that only what
    /// changed is built again.
    pub(super) fn copy(root: PathBuf) -> Outcome<Self> {
        let failed = |error: io::Error| format!("{}: {error}", root.display());
        fs::create_dir_all(&root).map_err(failed)?;
        let place = fs::canonicalize(&root).map_err(failed)?;
        copy(Path::new("."), &root, &place).map_err(failed)?;
        Ok(Self { root })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Makes a mutant; it lasts until what is returned is dropped.
    pub(super) fn mutate(&self, mutant: &Mutant) -> Outcome<Mutated> {
        let path = self.root.join(&mutant.file);
        let failed = |error: io::Error| format!("{}: {error}", path.display());
        let original = fs::read_to_string(&path).map_err(failed)?;
        let changed = original.replacen(&mutant.find, &mutant.replace, 1);
        fs::write(&path, changed).map_err(failed)?;
        Ok(Mutated { path, original })
    }
}

/// A file of the copy with a mutant in it.
pub(super) struct Mutated {
    path: PathBuf,
    original: String,
}

impl Drop for Mutated {
    /// Puts the file back. If that fails, the next copy does it.
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.path, &self.original) {
            eprintln!("{}: {error}", self.path.display());
        }
    }
}

/// Makes a directory the same as another, without what tools put there. `place` is where all of the
/// copy is.
fn copy(from: &Path, to: &Path, place: &Path) -> io::Result<()> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (name, kind) = (entry.file_name(), entry.file_type()?);
        let (source, copied) = (entry.path(), to.join(&name));
        if kind.is_dir() {
            if is_source(&source, place)? {
                fs::create_dir_all(&copied)?;
                copy(&source, &copied, place)?;
                names.insert(name);
            }
        } else if kind.is_file() {
            let text = fs::read(&source)?;
            if fs::read(&copied).ok().as_ref() != Some(&text) {
                fs::write(&copied, text)?;
            }
            names.insert(name);
        }
    }
    for entry in fs::read_dir(to)? {
        let entry = entry?;
        if !names.contains(&entry.file_name()) {
            let path = entry.path();
            let removed = if entry.file_type()?.is_dir() {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            };
            removed.or_else(|error| match error.kind() {
                ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            })?;
        }
    }
    Ok(())
}

/// Whether a directory is part of the sources: cargo marks those into which it builds, and one that
/// the copy lies in is not marked yet when the copy is the first thing in it.
fn is_source(directory: &Path, place: &Path) -> io::Result<bool> {
    Ok(directory.file_name().is_none_or(|name| name != ".git")
        && !directory.join("CACHEDIR.TAG").exists()
        && !place.starts_with(fs::canonicalize(directory)?))
}
