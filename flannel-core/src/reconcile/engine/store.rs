//! The engine's dealings with the store: config and lease.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::config::Refusal;
use super::{Engine, PATIENCE};
use crate::clock::Moment;
use crate::condition::ConditionType;
use crate::config::{self, NetworkConfig};
use crate::error_chain::error_chain;
use crate::keeper::{Keeper, LossPolicy, Wish};
use crate::lease::Lease;
use crate::lease_set::Own;
use crate::manager::{self, LeaseRequest};
use crate::overlay::Error;
use crate::status::OverlayEvent;

/// Leases that are lost no further apart than this are lost for one reason. The double of the longest
/// wait between two tries, so that the waits themselves do not count as rest.
const LOSSES_APART: Duration = Duration::from_secs(120);

/// What we know of our lease.
#[derive(Debug)]
pub(super) enum LeaseState {
    /// None was ever had.
    None,
    /// Remembered from an earlier run; the store has not confirmed it.
    Saved(Lease),
    /// Held.
    Held { lease: Lease, keeper: Keeper },
    /// Had and lost. The data path goes on with it.
    Lost { lease: Lease },
    /// Given up on request.
    Released { lease: Lease },
}

impl LeaseState {
    pub(super) const fn lease(&self) -> Option<&Lease> {
        match self {
            Self::None => None,
            Self::Saved(lease)
            | Self::Held { lease, .. }
            | Self::Lost { lease }
            | Self::Released { lease } => Some(lease),
        }
    }

    pub(super) const fn held(&self) -> Option<&Lease> {
        match self {
            Self::Held { lease, .. } => Some(lease),
            _ => None,
        }
    }
}

/// An answer of the store.
#[derive(Debug)]
pub(super) enum Answer {
    Config(manager::Result<NetworkConfig>),
    Lease {
        asked: Moment,
        renewal: bool,
        result: manager::Result<Lease>,
    },
    Released(manager::Result<()>),
}

/// A call that is under way.
pub(super) struct Call(Pin<Box<dyn Future<Output = Answer> + Send>>);

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Call")
    }
}

pub(super) async fn answer_of(call: &mut Option<Call>) -> Answer {
    match call {
        Some(call) => call.0.as_mut().await,
        None => std::future::pending().await,
    }
}

impl Engine {
    /// Uses what is remembered, once the store has failed to answer.
    pub(super) async fn use_saved(&mut self) {
        if !self.store_is_down && self.now() < self.started + PATIENCE {
            return;
        }
        if self.config.is_none() {
            let Some(text) = self.saved.config.clone() else {
                return;
            };
            let mode = if self.parts.manager.capabilities().allocates {
                config::PoolMode::Allocated
            } else {
                config::PoolMode::Assigned
            };
            if let Ok(config) = NetworkConfig::from_json(&text, mode) {
                self.config_is_saved = true;
                self.set_config(config).await;
            }
        }
        // What another machine holds that lives is not ours to be used.
        let is_held = self.conditions.reason(ConditionType::Lease) == "NodeIdHeld";
        if let (LeaseState::None, Some(lease), false) =
            (&self.lease, self.saved.lease.clone(), is_held)
        {
            self.lease = LeaseState::Saved(lease);
            self.tell_own();
        }
    }

    /// Whether the store is to be asked for something, now or after a wait.
    pub(super) fn wants_call(&self) -> bool {
        self.release.is_some()
            || self.config.is_none()
            || self.config_is_saved
            || self.wants_acquire()
            || self.wants_renewal()
    }

    pub(super) fn wants_acquire(&self) -> bool {
        let open = match &self.lease {
            LeaseState::None | LeaseState::Saved(_) => true,
            LeaseState::Held { .. } | LeaseState::Lost { .. } => self.acquire,
            LeaseState::Released { .. } => false,
        };
        open && self.attrs.is_some() && !self.config_is_saved
    }

    pub(super) fn wants_renewal(&self) -> bool {
        match &self.lease {
            LeaseState::Held { lease, keeper } => {
                keeper.wish(self.now()) == Wish::Renew
                    || self
                        .attrs
                        .as_ref()
                        .is_some_and(|attrs| *attrs != lease.attrs)
            }
            _ => false,
        }
    }

    /// Notices that the lease has run out.
    pub(super) fn keep_lease(&mut self) {
        let LeaseState::Held { keeper, .. } = &self.lease else {
            return;
        };
        if keeper.wish(self.now()) == Wish::Expired {
            // An answer to a renewal that comes now is too late to be trusted.
            self.call = None;
            self.lose_lease("its time ran out before it could be renewed".to_owned());
        }
    }

    pub(super) fn lose_lease(&mut self, reason: String) {
        let Some(lease) = self.lease.held().cloned() else {
            return; // it is lost or given up already
        };
        self.lease = LeaseState::Lost { lease };
        self.doubting |= self.watch_broken;
        tracing::warn!(reason, "the lease is lost");
        self.emit(OverlayEvent::LeaseLost {
            reason: reason.clone(),
        });
        let policy = self.parts.options.on_lease_lost;
        let what = match policy {
            LossPolicy::Reacquire => "asking for it again",
            LossPolicy::Hold => "left as it is until the host program asks for it again",
            LossPolicy::Stop => "stopping",
        };
        let message = format!("{reason}; {what}");
        self.fails(
            ConditionType::Lease,
            "Lost",
            message,
            policy == LossPolicy::Hold,
        );
        match policy {
            LossPolicy::Reacquire => {
                self.acquire = true;
                self.call_at = self.now() + self.pace_of_losses();
                self.call_failures = 0;
            }
            LossPolicy::Hold => {}
            LossPolicy::Stop => self.stopping = Some(format!("the lease is lost: {reason}")),
        }
    }

    /// The wait before a lost lease is asked for again: none, unless one lease after the other is
    /// lost, as when somebody else takes every one of them.
    fn pace_of_losses(&mut self) -> Duration {
        let now = self.now();
        let losses = match self.lost {
            Some((at, losses)) if now.since(at) < LOSSES_APART => losses.saturating_add(1),
            _ => 0,
        };
        self.lost = Some((now, losses));
        self.retry.after(losses, &mut self.parts.rng)
    }

    /// Asks the store for what is wanted of it, one thing at a time.
    pub(super) fn start_call(&mut self) {
        if self.config_poll_at.is_some_and(|at| at <= self.now()) && self.call.is_none() {
            self.config_poll_at = None;
            let manager = Arc::clone(&self.parts.manager);
            self.call = Some(self.bounded(
                async move { Answer::Config(manager.network_config().await) },
                Answer::Config,
            ));
            return;
        }
        if self.call.is_some() || !self.wants_call() || self.now() < self.call_at {
            return;
        }
        let manager = Arc::clone(&self.parts.manager);
        let asked = self.now();
        if self.release.is_some() {
            let lease = self.lease.lease().cloned();
            self.call = Some(self.bounded(
                async move {
                    Answer::Released(match lease {
                        Some(lease) => manager.release_lease(&lease).await,
                        None => Ok(()),
                    })
                },
                Answer::Released,
            ));
        } else if self.config.is_none() || self.config_is_saved {
            self.call = Some(self.bounded(
                async move { Answer::Config(manager.network_config().await) },
                Answer::Config,
            ));
        } else if self.wants_acquire() {
            let request = LeaseRequest {
                node: self.parts.node.clone(),
                instance: Some(self.instance),
                take_over: self.parts.options.take_over,
                attrs: self.attrs.clone().unwrap_or_default(),
                previous: match self.lease.lease().or(self.saved.lease.as_ref()) {
                    Some(lease) => lease.subnet,
                    None => self.adopted_subnets(),
                },
            };
            self.call = Some(self.bounded(
                async move {
                    let result = manager.acquire_lease(&request).await;
                    Answer::Lease {
                        asked,
                        renewal: false,
                        result,
                    }
                },
                move |result| Answer::Lease {
                    asked,
                    renewal: false,
                    result,
                },
            ));
        } else if let Some(lease) = self.lease.held() {
            let mut lease = lease.clone();
            if let Some(attrs) = &self.attrs {
                lease.attrs = attrs.clone();
            }
            self.call = Some(self.bounded(
                async move {
                    let result = manager.renew_lease(&lease).await;
                    Answer::Lease {
                        asked,
                        renewal: true,
                        result,
                    }
                },
                move |result| Answer::Lease {
                    asked,
                    renewal: true,
                    result,
                },
            ));
        }
    }

    /// A call that ends in time, answered or not.
    pub(super) fn bounded<T: 'static>(
        &self,
        call: impl Future<Output = Answer> + Send + 'static,
        failed: impl FnOnce(manager::Result<T>) -> Answer + Send + 'static,
    ) -> Call {
        let limit = self.parts.options.call_timeout;
        Call(Box::pin(async move {
            match tokio::time::timeout(limit, call).await {
                Ok(answer) => answer,
                Err(_) => failed(Err(manager::Error::unavailable(format!(
                    "no answer within {limit:?}"
                )))),
            }
        }))
    }

    /// Takes an answer of the store.
    pub(super) async fn answered(&mut self, answer: Answer) {
        self.call = None;
        let now = self.now();
        match answer {
            Answer::Released(result) => {
                if result.is_ok() {
                    if let Some(lease) = self.lease.lease().cloned() {
                        self.lease = LeaseState::Released { lease };
                    }
                    let message = "the lease was given up on request";
                    self.fails(ConditionType::Lease, "Released", message, false);
                }
                if let Some(reply) = self.release.take() {
                    reply.send(result.map_err(Error::from)).ok();
                }
            }
            Answer::Config(Ok(config)) => {
                self.store_answered();
                self.config_is_saved = false;
                self.set_config(config).await;
                self.configured();
            }
            Answer::Config(Err(error)) => {
                self.config_refused |= !error.is_transient();
                if self.config.is_some() {
                    self.poll_config();
                }
                self.store_failed(&error, ConditionType::Config);
            }
            Answer::Lease {
                asked,
                renewal,
                result: Ok(lease),
            } => {
                self.store_answered();
                self.took_lease(lease, asked, renewal).await;
            }
            Answer::Lease {
                renewal,
                result: Err(error),
                ..
            } => {
                if let (true, manager::Error::LeaseLost { reason, .. }) = (renewal, &error) {
                    self.store_answered();
                    let reason = reason.clone();
                    self.lose_lease(reason);
                    return;
                }
                if let LeaseState::Held { keeper, .. } = &mut self.lease {
                    keeper.failed(now, &mut self.parts.rng);
                }
                self.store_failed(&error, ConditionType::Lease);
            }
        }
    }

    pub(super) fn store_answered(&mut self) {
        self.call_failures = 0;
        self.call_at = self.now();
        self.store_is_down = false;
        if !self.watch_broken {
            self.holds(ConditionType::Store, "Connected", self.parts.manager.name());
        }
    }

    pub(super) fn store_failed(&mut self, error: &manager::Error, kind: ConditionType) {
        self.call_failures = self.call_failures.saturating_add(1);
        let wait = self.retry.after(self.call_failures, &mut self.parts.rng);
        self.call_at = self.now() + wait;
        let mut message = error_chain(error);
        let (kind, reason, permanent) = match error {
            manager::Error::Unavailable { .. } => (ConditionType::Store, "Unavailable", false),
            manager::Error::Conflict { .. } => (kind, "Conflict", false),
            manager::Error::NotReady { .. } => (kind, "NotReady", false),
            manager::Error::Denied { .. } => (ConditionType::Store, "Denied", true),
            manager::Error::PoolExhausted { .. } => (ConditionType::Lease, "PoolExhausted", true),
            manager::Error::NoConfig { .. } => (ConditionType::Config, "NoConfig", true),
            manager::Error::Config(_) => (ConditionType::Config, "InvalidConfig", true),
            manager::Error::LeaseLost { .. } => (ConditionType::Lease, "Lost", false),
            manager::Error::Corrupt { .. } => (kind, "Corrupt", true),
            manager::Error::NodeIdHeld { .. } => (ConditionType::Lease, "NodeIdHeld", true),
            manager::Error::Invalid { .. } => (kind, "Refused", true),
        };
        if kind == ConditionType::Config {
            message = self.with_what_stays(message, Refusal::Unreadable);
        }
        // A lease that is held stays held while the store merely does not answer.
        let held = kind == ConditionType::Lease && self.lease.held().is_some();
        if !held {
            self.fails(kind, reason, message, permanent);
        }
        if error.is_transient() {
            self.store_is_down = true;
        }
    }

    pub(super) async fn took_lease(&mut self, lease: Lease, asked: Moment, renewal: bool) {
        self.follow_fit(&lease, renewal);
        // Once is enough: whom the other takes it from is to be told.
        self.parts.options.take_over &= renewal;
        let keeper = Keeper::new(self.parts.options.keeper, &lease, asked);
        let message = format!("{} by record {}", lease.subnet, lease.key);
        let subnet = lease.subnet;
        self.lease = LeaseState::Held { lease, keeper };
        if self.rejected_by_others().is_none() {
            self.holds(ConditionType::Lease, "Held", message);
        }
        self.emit(if renewal {
            OverlayEvent::LeaseRenewed
        } else {
            OverlayEvent::LeaseAcquired { subnet }
        });
        self.tell_own();
        self.save().await;
    }

    /// Sees to it that a lease which the config no longer allows is exchanged. The config may have
    /// changed while the store was asked, and a renewal changes no subnets.
    fn follow_fit(&mut self, lease: &Lease, renewal: bool) {
        let config = self.config.as_ref();
        if config.is_none_or(|config| config.fits(&lease.subnet)) {
            self.acquire &= renewal;
            self.misfits = 0;
            return;
        }
        self.acquire = true;
        if !renewal {
            // The store sees it otherwise, so far: to ask at once again would be to ask for ever.
            self.misfits = self.misfits.saturating_add(1);
            self.call_at = self.now() + self.retry.after(self.misfits, &mut self.parts.rng);
        }
    }

    /// Tells the set of peers who we are.
    pub(super) fn tell_own(&mut self) {
        let Some(lease) = self.lease.lease() else {
            return;
        };
        let own = Own {
            node: self.parts.node.clone(),
            key: Some(lease.key.clone()),
            subnets: lease.subnet,
            public_ip: lease.attrs.public_ip,
        };
        let delta = self.leases.set_own(own);
        self.peers_differ(&delta);
    }
}
