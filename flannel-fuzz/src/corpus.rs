//! The committed corpus: files that targets are fed with as they are, and mutated.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::Target;

/// A file of a corpus.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Its name: `ok-…` is accepted, `bad-…` is refused, of `found-…` nothing is said.
    pub name: String,
    /// What it holds.
    pub bytes: Vec<u8>,
}

impl Entry {
    /// Whether it is to be accepted; `None`: nothing is said of it.
    pub fn accepted(&self) -> Option<bool> {
        if self.name.starts_with("ok-") {
            Some(true)
        } else if self.name.starts_with("bad-") {
            Some(false)
        } else {
            None
        }
    }
}

/// The folder of all corpora.
pub fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus")
}

/// The committed corpus of a target, sorted by name. A fuzzer's own additions are left out.
///
/// # Errors
/// Those of reading files.
pub fn of(target: &Target) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for file in fs::read_dir(folder().join(target.name))? {
        let file = file?;
        let name = file.file_name().to_string_lossy().into_owned();
        if ["bad-", "found-", "ok-"]
            .iter()
            .any(|start| name.starts_with(start))
        {
            let bytes = fs::read(file.path())?;
            entries.push(Entry { name, bytes });
        }
    }
    entries.sort();
    Ok(entries)
}
