//! The engine and the network config: one that can be used is applied while it runs; of any other it
//! is said what stays in force instead, and what a restart would do.

use std::sync::Arc;
use std::time::Duration;

use super::{Engine, LINGER, NETWORKS};
use crate::backend::{self, Backend, NodeContext};
use crate::condition::ConditionType;
use crate::config::NetworkConfig;
use crate::error_chain::error_chain;
use crate::family::Family;
use crate::status::OverlayEvent;

/// How often the config is read from a store that does not tell of its changes.
const POLL: Duration = Duration::from_secs(300);

/// How often it is read while there is no lease: the watch, which would tell, is not open yet.
const POLL_AT_START: Duration = Duration::from_secs(10);

/// Why the store's config is not what the kernel is made after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is missing, or no config: the last good one stays in force.
    Unreadable,
    /// Nothing can be built of it, on no host like this: the last good one stays in force.
    Unusable,
    /// It is in force, and the host does not fit it yet: what was built last stays.
    Unfit,
}

impl Engine {
    /// Takes the store's config, or the saved one.
    pub(super) async fn set_config(&mut self, config: NetworkConfig) {
        self.poll_config();
        self.untried = None;
        if self.config.as_deref() == Some(&config) {
            self.config_refused = self.backend.is_none();
            return;
        }
        let backend = self.backend_of(&config);
        let in_force = self.config.is_some();
        self.config_refused = backend.is_none();
        match &backend {
            None => {
                let why = self.no_backend(&config);
                let message = self.with_what_stays(why, Refusal::Unusable);
                self.fails(ConditionType::Config, "UnknownBackend", message, true);
                if in_force {
                    return;
                }
            }
            Some(backend) => {
                if let Err(error) = self.try_config(&config, &**backend) {
                    self.config_refused = true;
                    self.backend_refused(&error, Refusal::Unusable);
                    self.untried = Some(config);
                    return;
                }
            }
        }
        for pool in config.pools().values() {
            let network = pool.network();
            self.networks.retain(|known| *known != network);
            self.networks.insert(0, network);
        }
        self.networks.truncate(NETWORKS);
        if let Some(backend) = &backend {
            let ours = backend.backend_type();
            if let Some(former) = &self.backend {
                let until = self.now() + LINGER;
                self.former.insert(former.backend_type(), until);
            }
            self.former.remove(&ours);
            let delta = self.leases.set_backends(ours, backend.reaches());
            self.peers_differ(&delta);
        }
        let delta = self.leases.set_pools(*config.pools());
        self.peers_differ(&delta);
        if let Some(lease) = self.lease.held() {
            self.acquire |= !config.fits(&lease.subnet);
        }
        let first = self.config.is_none();
        self.backend = backend;
        self.attrs = None;
        self.config = Some(Arc::new(config));
        // The device's neighbours and the external interface depend on the config.
        self.reconciler.read_now();
        if !first {
            tracing::info!("the network config changed");
            self.emit(OverlayEvent::ConfigApplied);
        }
        if !self.config_is_saved {
            self.save().await;
        }
    }

    /// Sees to it that the config is read again where nothing else tells of a change.
    pub(super) fn poll_config(&mut self) {
        let wait = if self.lease.lease().is_none() {
            POLL_AT_START
        } else if self.parts.manager.capabilities().watches_config {
            return;
        } else {
            POLL
        };
        if !self.config_is_saved {
            self.config_poll_at = Some(self.now() + wait);
        }
    }

    /// Tries a config again that the backend refused: what it refused may have to do with the host.
    pub(super) async fn retry_config(&mut self) {
        if let Some(config) = self.untried.take() {
            self.set_config(config).await;
        }
    }

    /// The store's config cannot be read, or is gone.
    pub(super) fn config_unreadable(&mut self, reason: String) {
        self.config_refused = true;
        self.untried = None;
        let message = self.with_what_stays(reason, Refusal::Unreadable);
        self.fails(ConditionType::Config, "Unreadable", message, false);
    }

    fn backend_of(&self, config: &NetworkConfig) -> Option<Arc<dyn Backend>> {
        let wanted = config.backend().backend_type();
        let mut backends = self.parts.backends.iter();
        backends.find(|b| b.backend_type() == *wanted).cloned()
    }

    fn no_backend(&self, config: &NetworkConfig) -> String {
        let have: Vec<String> = self
            .parts
            .backends
            .iter()
            .map(|b| b.backend_type().to_string())
            .collect();
        format!(
            "Backend.Type = {}: this program has no such backend, only {}",
            config.backend().backend_type(),
            have.join(", ")
        )
    }

    /// Whether the backend can work with a config, where another one is in force that it would take
    /// the place of: half of a config is never applied.
    fn try_config(&self, config: &NetworkConfig, backend: &dyn Backend) -> backend::Result<()> {
        let families: Vec<Family> = config.families().collect();
        let (Ok(external), Some(features), Some(observed), true) = (
            self.in_use.preview(&self.underlay, &families),
            &self.features,
            self.reconciler.observed(),
            self.network.is_some(),
        ) else {
            return Ok(());
        };
        let cx = NodeContext {
            overlay: &self.parts.name,
            node: &self.parts.node,
            config,
            external: &external,
            underlay: &self.underlay,
            features,
            observed,
            held: self.lease.held(),
            previous: self.lease.lease().or(self.saved.lease.as_ref()),
        };
        match backend.attrs(&cx) {
            // What else it lacks, the host may get; the kernel stays what it is.
            Err(error @ (backend::Error::Config(_) | backend::Error::Unsupported { .. })) => {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// A message about a config that is not followed, with what is in force instead and what a
    /// restart would do.
    pub(super) fn with_what_stays(&self, why: String, refusal: Refusal) -> String {
        if self.network.is_none() {
            return why;
        }
        let stays = match refusal {
            Refusal::Unreadable | Refusal::Unusable => "the last good config stays in force",
            Refusal::Unfit => "what was built last stays in force",
        };
        let restart = match refusal {
            Refusal::Unreadable if self.saved.config.is_some() => {
                "go on with that too, as it is in the saved state"
            }
            Refusal::Unreadable => {
                "wait for one that can be read, and leave the kernel as it is until then"
            }
            Refusal::Unusable | Refusal::Unfit => {
                "build nothing, and leave the kernel as it is until that is mended"
            }
        };
        format!("{why}; {stays}; a restart would {restart}")
    }

    /// The backend cannot work with a config, or with the host as it is.
    pub(super) fn backend_refused(&mut self, error: &backend::Error, refusal: Refusal) {
        let reason = match error {
            backend::Error::Config(_) => "InvalidConfig",
            backend::Error::Underlay { .. } => "UnderlayUnfit",
            backend::Error::Unsupported { .. } => "Unsupported",
            backend::Error::Lease { .. } => "LeaseUnfit",
            backend::Error::Other { .. } => "BackendFailed",
        };
        let why = error_chain(error);
        let message = match error {
            // Another one is asked for, as a restart would.
            backend::Error::Lease { .. } => why,
            _ => self.with_what_stays(why, refusal),
        };
        // One condition for all of these, so that nothing else says the opposite in between.
        // The host may get what its interface lacks.
        let permanent = !matches!(error, backend::Error::Underlay { .. });
        self.fails(ConditionType::Config, reason, message, permanent);
    }
}
