//! [`Reconnect`]: tells a store's client that its connections are dead.

use std::sync::Arc;

use tokio::sync::watch;

/// Tells all that use a client's connections that these are dead, because the host has lost an
/// address: no answer and no error would ever come on them. Clones tell the same ones.
#[derive(Debug, Clone, Default)]
pub struct Reconnect(Arc<watch::Sender<u64>>);

/// Hears of a [`Reconnect`] since it was made.
#[derive(Debug, Clone)]
pub struct Dead(watch::Receiver<u64>);

impl Reconnect {
    /// Tells that what is connected until now is dead.
    pub fn tell(&self) {
        self.0.send_modify(|times| *times = times.wrapping_add(1));
    }

    /// A number that is another one for connections of before and after.
    pub fn generation(&self) -> u64 {
        *self.0.borrow()
    }

    /// Hears of what is told from now on.
    pub fn listen(&self) -> Dead {
        Dead(self.0.subscribe())
    }
}

impl Dead {
    /// Waits until it was told.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn told(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}
