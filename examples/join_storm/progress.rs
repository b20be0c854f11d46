//! One line on stderr that says how far it is, if somebody is looking.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

/// The width of the bar, in characters.
const WIDTH: usize = 40;

pub(crate) struct Progress {
    nodes: u32,
    is_shown: bool,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    done: u32,
    failed: u32,
    /// How much of the bar was drawn.
    drawn: Option<usize>,
}

impl Progress {
    pub(crate) fn new(nodes: u32) -> Self {
        Self {
            nodes,
            is_shown: std::io::stderr().is_terminal(),
            counts: Mutex::default(),
        }
    }

    pub(crate) fn joined(&self, is_good: bool) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.done += 1;
        counts.failed += u32::from(!is_good);
        let full = WIDTH * counts.done as usize / self.nodes as usize;
        let is_news = counts.drawn != Some(full) || counts.done == self.nodes;
        if self.is_shown && is_news {
            let bar = format!("{}{}", "#".repeat(full), ".".repeat(WIDTH - full));
            let Counts { done, failed, .. } = *counts;
            let nodes = self.nodes;
            let line = format!("\r[{bar}] {done} of {nodes} nodes, {failed} failed");
            std::io::stderr().write_all(line.as_bytes()).ok();
            counts.drawn = Some(full);
        }
    }

    /// Ends the line.
    pub(crate) fn end(&self) {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.drawn.is_some() {
            std::io::stderr().write_all(b"\n").ok();
        }
    }
}
