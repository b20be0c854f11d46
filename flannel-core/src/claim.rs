//! [`Claim`]: the right to be an overlay in a network namespace, which one process has at a time.

use std::fmt::{self, Debug};

use tokio::sync::mpsc;

use crate::backend::Note;

/// Somebody who has an overlay, or asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Claimant {
    /// Another overlay of this process, with the process's id.
    Own(u32),
    /// A process, by its id as this one sees it.
    Process(u32),
    /// A process that has no id here: it is in another pid namespace.
    Elsewhere,
    /// A process that does not answer, so that nothing is known of it.
    Silent,
}

impl fmt::Display for Claimant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own(pid) => write!(f, "another overlay of this process ({pid})"),
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::Elsewhere => f.write_str("a process of another pid namespace"),
            Self::Silent => f.write_str("a process that does not answer"),
        }
    }
}

/// The right to be an overlay in a network namespace; released when it is dropped, and when the
/// process ends, however it does. It is never lost before.
pub struct Claim {
    guard: Box<dyn Guard>,
    asked: Option<mpsc::Receiver<Claimant>>,
    notes: Vec<Note>,
}

/// A thing that ends with a claim.
trait Guard: Debug + Send + Sync {}

impl<T: Debug + Send + Sync> Guard for T {}

impl Claim {
    /// A claim that ends when the guard is dropped, and the stream of those who ask for a handover.
    pub fn new(guard: impl Debug + Send + Sync + 'static, asked: mpsc::Receiver<Claimant>) -> Self {
        Self {
            guard: Box::new(guard),
            asked: Some(asked),
            notes: Vec::new(),
        }
    }

    /// A claim that keeps nobody out, and that nobody asks for.
    pub fn free() -> Self {
        Self {
            guard: Box::new(()),
            asked: None,
            notes: Vec::new(),
        }
    }

    /// The same claim with something worth telling about it.
    #[must_use]
    pub fn with_note(mut self, note: Note) -> Self {
        self.notes.push(note);
        self
    }

    /// Waits until somebody asks for a handover: whoever has the claim is to stop and to drop it.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn asked(&mut self) -> Claimant {
        if let Some(asked) = &mut self.asked
            && let Some(by) = asked.recv().await
        {
            return by;
        }
        std::future::pending().await
    }

    /// The notes about it, such as who tried to keep us out and has no right to.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }
}

impl Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim")
            .field("guard", &self.guard)
            .field("notes", &self.notes)
            .finish_non_exhaustive()
    }
}
