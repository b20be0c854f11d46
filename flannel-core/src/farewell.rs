//! [`Farewell`]: what an overlay tells at last, however its task ends.

use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

use crate::claim::Claimant;
use crate::status::Status;

/// The end of an overlay.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) reason: String,
    /// The claimant that is the overlay now, if it was asked for.
    pub(crate) to: Option<Claimant>,
}

/// Tells that the overlay has stopped when it is dropped: with the task that owns it, be it that this
/// came to its end, was aborted, or went with its runtime.
#[derive(Debug)]
pub(crate) struct Farewell {
    status: watch::Sender<Arc<Status>>,
    ended: Arc<OnceLock<Ended>>,
}

impl Farewell {
    pub(crate) const fn new(
        status: watch::Sender<Arc<Status>>,
        ended: Arc<OnceLock<Ended>>,
    ) -> Self {
        Self { status, ended }
    }

    /// The task came to its end.
    pub(crate) fn end(self, end: Ended) {
        self.ended.set(end).ok();
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        let end = self.ended.get_or_init(|| Ended {
            reason: "its handle was dropped, or its runtime has ended".to_owned(),
            to: None,
        });
        self.status.send_modify(|status| {
            let status = Arc::make_mut(status);
            status.stopped = Some(end.reason.clone());
            status.working = false;
        });
    }
}
