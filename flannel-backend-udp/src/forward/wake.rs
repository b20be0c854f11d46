//! How a thread that waits is told to look up.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Ends a thread's wait.
#[derive(Debug)]
pub(crate) struct Wake {
    pub(super) event: EventFd,
    pub(super) stop: AtomicBool,
}

impl Wake {
    pub(crate) fn new() -> std::io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self {
            event: EventFd::from_value_and_flags(0, flags)?,
            stop: AtomicBool::new(false),
        })
    }

    /// The thread looks what has changed.
    pub(crate) fn nudge(&self) {
        // It fails only when the number is as large as it can be, and then the thread wakes too.
        let _ = self.event.write(1);
    }

    /// The thread ends at the next boundary between two batches.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.nudge();
    }
}
