//! [`EtcdWatch`]: a watch of a range of keys.

use async_trait::async_trait;
use etcd_client::{WatchResponse, WatchStream};
use flannel_core::{Dead, Revision};
use flannel_subnet_kv::{LeaseId, StoreError, StoreResult, StoreWatch, WatchAnswer};

use crate::codec;
use crate::error::{Fault, fault};

/// A watch of a range of keys of etcd.
#[derive(Debug)]
pub struct EtcdWatch {
    stream: WatchStream,
    dead: Dead,
}

impl EtcdWatch {
    /// Waits until the server says that it watches: from then on nothing is missed.
    pub(crate) async fn begin(stream: WatchStream, dead: Dead) -> StoreResult<Self> {
        let mut watch = Self { stream, dead };
        let first = watch.message().await?;
        if first.canceled() {
            return Err(canceled(&first));
        }
        if !first.created() {
            return Err(StoreError::unavailable(
                "the watch began with something else",
            ));
        }
        Ok(watch)
    }

    async fn message(&mut self) -> StoreResult<WatchResponse> {
        let message = tokio::select! {
            biased;
            message = self.stream.message() => message,
            () = self.dead.told() => {
                let reason = "the watch was bound to an address that is gone";
                return Err(StoreError::unavailable(reason));
            }
        };
        match message {
            Ok(Some(message)) => Ok(message),
            Ok(None) => Err(StoreError::unavailable("the watch ended")),
            Err(error) => Err(broken(&error)),
        }
    }
}

/// A watch that broke has lost nothing but itself.
fn broken(error: &etcd_client::Error) -> StoreError {
    match fault(error, LeaseId(0)) {
        Fault::Answer(error) => error,
        Fault::NotDone(reason) | Fault::Unknown(reason) | Fault::Stranger(reason) => {
            StoreError::unavailable(format!("the watch broke: {reason}"))
        }
        Fault::Dead => StoreError::unavailable("the watch broke"),
    }
}

/// Why the server ended a watch. It says nothing more on it, and does not close it either.
fn canceled(message: &WatchResponse) -> StoreError {
    let reason = message.cancel_reason();
    match u64::try_from(message.compact_revision()) {
        Ok(revision) if revision > 0 => StoreError::Compacted {
            revision: Revision(revision),
        },
        _ if reason.contains("permission denied") => StoreError::Denied {
            reason: reason.to_owned(),
        },
        _ => StoreError::unavailable(format!("the server ended the watch: {reason}")),
    }
}

#[async_trait]
impl StoreWatch for EtcdWatch {
    async fn ask_progress(&mut self) -> StoreResult<()> {
        let asked = self.stream.request_progress().await;
        asked.map_err(|error| broken(&error))
    }

    async fn next(&mut self) -> StoreResult<WatchAnswer> {
        let message = self.message().await?;
        if message.canceled() {
            return Err(canceled(&message));
        }
        let revision = codec::answered(message.header())?;
        if message.events().is_empty() {
            return Ok(WatchAnswer::Progress { revision });
        }
        let events = message.events().iter();
        let events = events.filter_map(|event| event.kv().map(codec::event));
        Ok(WatchAnswer::Events {
            revision,
            events: events.collect(),
        })
    }
}
