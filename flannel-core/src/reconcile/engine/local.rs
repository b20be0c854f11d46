//! The engine's view of its own host: kernel, underlay, backend, network.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::task::JoinHandle;
use tracing::Instrument;

use super::config::Refusal;
use super::{Engine, LINGER};
use crate::backend::{self, NodeContext};
use crate::condition::ConditionType;
use crate::config::NetworkConfig;
use crate::error_chain::error_chain;
use crate::family::{DualStack, Family};
use crate::kernel;
use crate::lease::{BackendType, Lease};
use crate::lease_set::LeaseDelta;
use crate::node::OverlayName;
use crate::object::{IfName, Object};
use crate::reconcile::ownership::{Owner, Ownership};
use crate::subnet::Subnet;
use crate::underlay::{External, Underlay};

/// What a network was made from: when any of it changes, it is made anew.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Inputs {
    pub(super) config: Arc<NetworkConfig>,
    pub(super) external: External,
    pub(super) underlay: Arc<Underlay>,
    pub(super) lease: Lease,
}

impl Inputs {
    fn is_of(
        &self,
        config: &Arc<NetworkConfig>,
        external: &External,
        underlay: &Arc<Underlay>,
        lease: &Lease,
    ) -> bool {
        let same_config = Arc::ptr_eq(&self.config, config) || self.config == *config;
        let same_underlay = Arc::ptr_eq(&self.underlay, underlay) || self.underlay == *underlay;
        same_config
            && same_underlay
            && self.external == *external
            && self.lease == settled(lease.clone())
    }
}

/// The part of a lease that a network is made from: renewals change the rest.
fn settled(lease: Lease) -> Lease {
    Lease {
        ttl: None,
        revision: lease.created,
        ..lease
    }
}

pub(super) async fn ended_of(task: &mut Option<JoinHandle<backend::Result<()>>>) -> String {
    match task {
        Some(task) => match task.await {
            Ok(Ok(())) => "it ended by itself".to_owned(),
            Ok(Err(error)) => error_chain(&error),
            Err(error) => error.to_string(),
        },
        None => std::future::pending().await,
    }
}

/// The devices that bear our alias.
pub(super) fn own_links<'a>(
    observed: &'a kernel::Observed,
    overlay: &OverlayName,
) -> impl Iterator<Item = IfName> + use<'a> {
    let alias = overlay.link_alias();
    observed
        .objects
        .values()
        .filter_map(move |object| match object {
            Object::Link(link) if link.alias.as_deref() == Some(alias.as_str()) => Some(link.name),
            _ => None,
        })
}

/// The devices that Go flannel left and that we take over.
pub(super) fn flannel_links<'a>(
    observed: &'a kernel::Observed,
    ownership: &Ownership,
) -> impl Iterator<Item = IfName> + use<'a> {
    let ownership = ownership.clone();
    observed
        .objects
        .values()
        .filter_map(move |object| match object {
            Object::Link(link) if ownership.owner(object, observed) == Owner::Flannel => {
                Some(link.name)
            }
            _ => None,
        })
}

/// The destinations of the routes of ours that an earlier run, or Go flannel, left.
pub(super) fn adopted_routes(observed: &kernel::Observed, ownership: &Ownership) -> Vec<Subnet> {
    let routes = observed.objects.values().filter_map(|object| match object {
        Object::Route(route) if ownership.owner(object, observed) != Owner::Foreign => {
            Some(route.dst)
        }
        _ => None,
    });
    routes.collect()
}

impl Engine {
    pub(super) async fn probe(&mut self) {
        if self.features.is_some() || self.now() < self.features_at {
            return;
        }
        match self.parts.kernel.features().await {
            Ok(features) => {
                self.features = Some(features);
                self.remember_devices();
            }
            Err(error) => {
                self.features_failures += 1;
                let wait = self
                    .retry
                    .after(self.features_failures, &mut self.parts.rng);
                self.features_at = self.now() + wait;
                let permanent = !error.is_transient();
                self.fails(
                    ConditionType::Kernel,
                    "NoKernel",
                    error.to_string(),
                    permanent,
                );
            }
        }
    }

    pub(super) fn ownership(&self) -> Ownership {
        Ownership {
            overlay: self.parts.name.clone(),
            protocol: self.parts.options.protocol,
            networks: self.networks.clone(),
            adopt_flannel: self.parts.options.adopt_flannel,
            known: self.known.clone(),
        }
    }

    /// Learns whether orphans may go now, and of which backends devices stay.
    pub(super) fn follow_hold(&mut self) {
        self.compiler.update(&LeaseDelta::default(), &self.leases);
        let backends = self.held_backends();
        self.compiler.hold_backends(backends);
    }

    /// The backends to whose devices peers may still send: those of peers that have not followed a
    /// change, for a while longer.
    fn held_backends(&mut self) -> BTreeSet<BackendType> {
        let now = self.now();
        self.former.retain(|_, until| *until > now);
        for backend in self.leases.of_other_backends().keys() {
            self.former.insert(backend.clone(), now + LINGER);
        }
        self.former.keys().cloned().collect()
    }

    /// Finds out what we are to publish.
    pub(super) fn find_attrs(&mut self) {
        let (Some(config), Some(external), Some(features), Some(backend), Some(observed)) = (
            &self.config,
            &self.external,
            &self.features,
            &self.backend,
            self.reconciler.observed(),
        ) else {
            return;
        };
        let cx = NodeContext {
            overlay: &self.parts.name,
            node: &self.parts.node,
            config,
            external,
            underlay: &self.underlay,
            features,
            observed,
            held: self.lease.held(),
            previous: self.lease.lease().or(self.saved.lease.as_ref()),
        };
        match backend.attrs(&cx) {
            Ok(attrs) => {
                self.attrs = Some(attrs);
                let message = format!("backend {}", backend.backend_type());
                if !self.register_failed && !self.config_refused {
                    self.holds(ConditionType::Config, "Applied", message);
                }
            }
            Err(error) => self.backend_refused(&error, Refusal::Unfit),
        }
    }

    /// Makes the network anew if anything it depends on is different.
    pub(super) async fn register(&mut self) {
        let (Some(config), Some(external), Some(lease)) =
            (&self.config, &self.external, self.lease.lease())
        else {
            return;
        };
        let (Some(features), Some(backend), Some(observed)) = (
            self.features.clone(),
            self.backend.clone(),
            self.reconciler.observed().cloned(),
        ) else {
            return;
        };
        let is_same = |inputs: &Inputs| inputs.is_of(config, external, &self.underlay, lease);
        if self.inputs.as_ref().is_some_and(is_same) {
            // Of what was refused in between nothing is left.
            if std::mem::take(&mut self.register_failed) {
                self.find_attrs();
            }
            return;
        }
        let inputs = Inputs {
            config: Arc::clone(config),
            external: external.clone(),
            underlay: Arc::clone(&self.underlay),
            lease: settled(lease.clone()),
        };
        let cx = NodeContext {
            overlay: &self.parts.name,
            node: &self.parts.node,
            config: &inputs.config,
            external: &inputs.external,
            underlay: &inputs.underlay,
            features: &features,
            observed: &observed,
            held: Some(&inputs.lease),
            previous: self.saved.lease.as_ref(),
        };
        match backend.register_network(&cx, inputs.lease.clone()).await {
            Ok(network) => {
                let changed = self
                    .compiler
                    .set_network(Arc::clone(&network), &self.leases);
                self.reconciler.desired_changed(changed);
                self.reconciler.replan();
                self.network = Some(network);
                if let Some(task) = self.data_path.take() {
                    task.abort();
                }
                self.data_path_at = None;
                self.inputs = Some(inputs);
                self.register_failed = false;
                self.host_checks.hint(self.now());
            }
            // The last one stays in force, and the next opportunity is another try.
            Err(error) => {
                self.register_failed = true;
                self.backend_refused(&error, Refusal::Unfit);
            }
        }
    }

    /// The subnets that our overlay devices have in the kernel, to be had again after everything
    /// else is forgotten.
    pub(super) fn adopted_subnets(&self) -> DualStack<Subnet> {
        let (Some(observed), Some(config)) = (self.reconciler.observed(), &self.config) else {
            return DualStack::default();
        };
        let ours: BTreeSet<IfName> = own_links(observed, &self.parts.name)
            .chain(flannel_links(observed, &self.ownership()))
            .collect();
        let addresses = observed.objects.values().filter_map(|object| match object {
            Object::Address(address) if ours.contains(&address.dev) => Some(address),
            _ => None,
        });
        DualStack::of_subnets(addresses.filter_map(|address| {
            let family = Family::of(&address.ip);
            let pool = config.pools().get(family)?;
            let subnet = Subnet::new(address.ip, pool.subnet_len()?).ok()?;
            (address.prefix_len == family.bits() && pool.fits(&subnet)).then_some(subnet)
        }))
    }

    /// Starts the userspace data path anew where it does not run.
    pub(super) fn run_data_path(&mut self) {
        if self.peers_changed && self.peers.receiver_count() > 0 {
            self.peers.send_replace(Arc::new(self.leases.clone()));
            self.peers_changed = false;
        }
        let due = self.data_path_at.is_none_or(|at| at <= self.now());
        if let (None, Some(network), true) = (&self.data_path, &self.network, due) {
            self.data_path_at = None;
            self.peers.send_replace(Arc::new(self.leases.clone()));
            self.peers_changed = false;
            let (network, peers) = (Arc::clone(network), self.peers.subscribe());
            self.data_path = Some(tokio::spawn(
                async move { network.run(peers).await }.in_current_span(),
            ));
        }
    }

    pub(super) fn data_path_ended(&mut self, ended: String) {
        self.data_path = None;
        self.data_path_failures = self.data_path_failures.saturating_add(1);
        let wait = self
            .retry
            .after(self.data_path_failures, &mut self.parts.rng);
        self.data_path_at = Some(self.now() + wait);
        self.fails(ConditionType::DataPath, "Ended", ended, false);
    }

    pub(super) fn stop_data_path(&mut self) {
        if let Some(task) = self.data_path.take() {
            task.abort();
        }
    }
}
