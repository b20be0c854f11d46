//! Writes the files of the corpus that are made from values: `cargo run -p flannel-fuzz`.
#![forbid(unsafe_code)]

use std::fs;
use std::io;

use flannel_fuzz::{corpus, seeds};

fn main() -> io::Result<()> {
    for (target, entry) in seeds::all() {
        let folder = corpus::folder().join(target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(entry.name), entry.bytes)?;
    }
    Ok(())
}
