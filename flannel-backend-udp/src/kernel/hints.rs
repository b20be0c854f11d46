//! Two streams of hints as one.

use std::pin::Pin;
use std::task::{Context, Poll};

use flannel_core::{Change, ChangeStream};
use futures_core::Stream;

/// The hints of a kernel and of its packet path. It ends with the kernel's.
pub(super) struct Both {
    kernel: ChangeStream,
    /// `None`: it has ended.
    path: Option<ChangeStream>,
    /// Whose turn it is: neither keeps the other from being heard.
    path_first: bool,
    started: bool,
}

impl Both {
    pub(super) const fn new(kernel: ChangeStream, path: ChangeStream) -> Self {
        Self {
            kernel,
            path: Some(path),
            path_first: false,
            started: false,
        }
    }

    fn poll_path(&mut self, cx: &mut Context<'_>) -> Poll<Change> {
        let Some(path) = &mut self.path else {
            return Poll::Pending;
        };
        match path.as_mut().poll_next(cx) {
            Poll::Ready(Some(change)) => Poll::Ready(change),
            Poll::Ready(None) => {
                self.path = None;
                Poll::Pending
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Stream for Both {
    type Item = Change;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        let this = &mut *self;
        if this.started && this.path_first {
            this.path_first = false;
            if let Poll::Ready(change) = this.poll_path(cx) {
                return Poll::Ready(Some(change));
            }
        }
        if let Poll::Ready(change) = this.kernel.as_mut().poll_next(cx) {
            // The kernel's first item comes first: it says that the watch starts.
            this.started = true;
            this.path_first = true;
            return Poll::Ready(change);
        }
        if !this.started {
            return Poll::Pending;
        }
        this.poll_path(cx).map(Some)
    }
}
