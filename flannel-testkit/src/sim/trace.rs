//! A digest of everything that can be observed of a run: two runs of one history have the same.

use flannel_core::stable_hash;
use tokio::time::Instant;

/// The lines of a run, folded into one number; kept as text on demand.
#[derive(Debug)]
pub(super) struct Trace {
    start: Instant,
    digest: u64,
    lines: Option<Vec<String>>,
}

impl Trace {
    /// A trace that keeps its lines or only their digest.
    pub(super) fn new(keep: bool) -> Self {
        Self {
            start: Instant::now(),
            digest: 0,
            lines: keep.then(Vec::new),
        }
    }

    /// Takes a line in, with the time since the beginning.
    pub(super) fn add(&mut self, line: &str) {
        let mut bytes = format!("{:?} {line}", self.start.elapsed()).into_bytes();
        bytes.extend_from_slice(&self.digest.to_le_bytes());
        self.digest = stable_hash(&bytes);
        if let Some(lines) = &mut self.lines {
            bytes.truncate(bytes.len() - 8);
            lines.push(String::from_utf8(bytes).unwrap_or_default());
        }
    }

    pub(super) fn finish(self) -> (u64, Vec<String>) {
        (self.digest, self.lines.unwrap_or_default())
    }
}
