//! The holder of each overlay in the namespace, as processes on one host tell among themselves.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flannel_core::kernel::{Error, Result};
use flannel_core::{Claim, Claimant, OverlayName};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// The time that whoever is asked for a handover may take, as on Linux.
const HANDOVER: Duration = Duration::from_secs(10);

/// The claims of a namespace.
#[derive(Debug, Clone, Default)]
pub(super) struct Claims(Arc<Mutex<BTreeMap<OverlayName, Held>>>);

/// A claim that is held.
#[derive(Debug)]
struct Held {
    pid: u32,
    ask: mpsc::Sender<Claimant>,
    /// Closed when the claim is released.
    released: watch::Sender<()>,
}

/// A thing that ends with a claim.
#[derive(Debug)]
struct Guard {
    claims: Claims,
    name: OverlayName,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.claims.all(|held| held.remove(&self.name));
    }
}

impl Claims {
    fn all<T>(&self, look: impl FnOnce(&mut BTreeMap<OverlayName, Held>) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Claims an overlay for a process.
    pub(super) async fn claim(&self, name: &OverlayName, replace: bool, pid: u32) -> Result<Claim> {
        let mut is_over = !replace;
        loop {
            let (by, ask, mut released) = match self.take(name, pid) {
                Ok(claim) => return Ok(claim),
                Err(holder) => holder,
            };
            if is_over {
                return Err(Error::Held {
                    by: seen_from(pid, by),
                });
            }
            // One that waits is enough.
            ask.try_send(seen_from(by, pid)).ok();
            is_over = timeout(HANDOVER, released.changed()).await.is_err();
        }
    }

    fn take(
        &self,
        name: &OverlayName,
        pid: u32,
    ) -> std::result::Result<Claim, (u32, mpsc::Sender<Claimant>, watch::Receiver<()>)> {
        self.all(|all| {
            if let Some(held) = all.get(name) {
                return Err((held.pid, held.ask.clone(), held.released.subscribe()));
            }
            let (ask, asked) = mpsc::channel(1);
            let held = Held {
                pid,
                ask,
                released: watch::Sender::new(()),
            };
            all.insert(name.clone(), held);
            let guard = Guard {
                claims: self.clone(),
                name: name.clone(),
            };
            Ok(Claim::new(guard, asked))
        })
    }
}

/// A process as another one sees it.
fn seen_from(pid: u32, other: u32) -> Claimant {
    if pid == other {
        Claimant::Own(pid)
    } else {
        Claimant::Process(other)
    }
}
