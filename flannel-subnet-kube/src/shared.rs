//! [`Shared`]: what a manager and its watches have in common.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use flannel_core::manager::{Error, Result};
use flannel_core::{
    DualStack, Event, Lease, LeaseKey, NetworkConfig, PoolMode, Subnet, Unreadable, error_chain,
};
use tokio::sync::broadcast;

use crate::calls::{Calls, Found};
use crate::event::KubeEvent;
use crate::failure::Failure;
use crate::node::NodeView;
use crate::options::{ConfigSource, KubeOptions};
use crate::prefix::Annotation;
use crate::record::{self, Network, Wanted};

/// The longest network config, in bytes: that of a ConfigMap.
const LONGEST_CONFIG: u64 = 1 << 20;

/// How many events wait for a slow listener.
const EVENTS: usize = 64;

pub(crate) struct Shared {
    pub(crate) options: KubeOptions,
    pub(crate) calls: Calls,
    pub(crate) events: broadcast::Sender<KubeEvent>,
    /// By the name of a Node, the lease that we hold.
    own: Mutex<BTreeMap<LeaseKey, Own>>,
    /// The latest version of any Node that we have seen, so that no older list is taken.
    floor: AtomicU64,
}

/// A lease that we hold.
#[derive(Debug, Clone)]
pub(crate) struct Own {
    /// As it was told.
    pub(crate) lease: Lease,
    /// What of the Node makes it up, as it was when the lease was told.
    pub(crate) standing: Standing,
    /// What it is if a write has been done whose answer never came.
    pub(crate) attempted: Option<Standing>,
}

/// What of a Node makes up its lease. Everything else of it may change without our losing it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) uid: Box<str>,
    pub(crate) subnets: std::result::Result<DualStack<Subnet>, String>,
    pub(crate) written: Wanted,
}

impl Standing {
    pub(crate) fn of(node: &NodeView) -> Self {
        let written = Annotation::WRITTEN.map(|annotation| {
            let value = node.annotations.get(annotation);
            (annotation, value.map(str::to_owned))
        });
        Self {
            uid: node.uid.clone(),
            subnets: node.subnets.clone(),
            written: written.into(),
        }
    }

    /// What a node comes to when its annotations are written.
    pub(crate) fn with(node: &NodeView, written: Wanted) -> Self {
        Self {
            written,
            ..Self::of(node)
        }
    }
}

impl Shared {
    pub(crate) fn new(options: KubeOptions) -> Self {
        Self {
            calls: Calls::new(&options),
            options,
            events: broadcast::Sender::new(EVENTS),
            own: Mutex::default(),
            floor: AtomicU64::new(0),
        }
    }

    pub(crate) fn emit(&self, event: KubeEvent) {
        self.events.send(event).ok();
    }

    pub(crate) fn own(&self, key: &LeaseKey) -> Option<Own> {
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        own.get(key).cloned()
    }

    pub(crate) fn set_own(&self, key: &LeaseKey, new: Option<Own>) {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        match new {
            Some(new) => own.insert(key.clone(), new),
            None => own.remove(key),
        };
    }

    /// Notes a write that is about to be tried.
    pub(crate) fn attempt(&self, key: &LeaseKey, standing: Standing) {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = own.get_mut(key) {
            own.attempted = Some(standing);
        }
    }

    /// A text by which the waits of nodes differ.
    pub(crate) fn seed(&self) -> String {
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let names: Vec<&str> = own.keys().map(LeaseKey::as_str).collect();
        format!("{} {}", self.options.access.name(), names.join(" "))
    }

    /// The version that a list must have come to; `None` if none is known.
    pub(crate) fn floor(&self) -> Option<u64> {
        Some(self.floor.load(Ordering::Relaxed)).filter(|version| *version > 0)
    }

    /// Forgets what versions were seen: the store was restored from a backup.
    pub(crate) fn forget_floor(&self) {
        self.floor.store(0, Ordering::Relaxed);
    }

    pub(crate) fn saw(&self, node: &NodeView) {
        self.floor.fetch_max(node.revision.0, Ordering::Relaxed);
    }

    /// Reads a Node; nothing if there is none.
    pub(crate) async fn node(&self, name: &str) -> Result<Option<Found>> {
        match self.calls.node(name).await {
            Ok(found) => {
                self.saw(&found.node);
                Ok(Some(found))
            }
            Err(failure) if failure.code() == 404 => Ok(None),
            Err(failure) => Err(failure.meaning("get", "nodes")),
        }
    }

    /// Writes differences, if the Node is still as it was found; nothing if it is not.
    pub(crate) async fn write(
        &self,
        found: &Found,
        differences: &[record::Difference],
        network: Network,
    ) -> Result<Option<Found>> {
        let Found { node, now } = found;
        let prefix = &self.options.prefix;
        let patch = record::patch(node, prefix, differences, network, now.as_deref());
        match self.calls.patch_status(&node.name, &patch).await {
            Ok(after) => {
                self.saw(&after.node);
                Ok(Some(after))
            }
            // Somebody wrote in between, or the Node is gone.
            Err(failure) if matches!(failure.code(), 404 | 409) => Ok(None),
            Err(failure) => Err(failure.meaning("patch", "nodes/status")),
        }
    }

    /// What the condition of one of our Nodes is to become.
    pub(crate) fn network(&self, node: &NodeView) -> Network {
        if self.options.network_condition && node.network_unavailable != Some(false) {
            Network::Up
        } else {
            Network::Unsaid
        }
    }

    /// Restores the condition of one of our Nodes.
    pub(crate) async fn tend(&self, key: &LeaseKey) -> Result<()> {
        let Some(found) = self.node(key.as_str()).await? else {
            return Ok(());
        };
        let network = self.network(&found.node);
        let is_ours = |own: Own| own.standing == Standing::of(&found.node);
        if network == Network::Unsaid || !self.own(key).is_some_and(is_ours) {
            return Ok(()); // the rest is restored with the annotations
        }
        match self.write(&found, &[], network).await? {
            Some(_) => {
                self.emit(KubeEvent::ConditionRestored { key: key.clone() });
                Ok(())
            }
            None => Err(Error::Conflict {
                reason: format!("somebody else writes the Node {key}"),
            }),
        }
    }

    /// What a watch shows of a Node: our own as it was told to us, while it stands so.
    pub(crate) fn shown(&self, node: &NodeView) -> Option<std::result::Result<Lease, Unreadable>> {
        let own = self.own(&LeaseKey::new(&node.name));
        match own {
            Some(own) if own.standing == Standing::of(node) => Some(Ok(Lease {
                revision: node.revision,
                ..own.lease
            })),
            _ => record::lease(node),
        }
    }

    pub(crate) async fn config(&self) -> Result<NetworkConfig> {
        let (text, place) = (self.config_text().await?, &self.options.config);
        let text = text.ok_or_else(|| Error::NoConfig {
            hint: match place {
                ConfigSource::ConfigMap {
                    namespace,
                    name,
                    key,
                } => format!(
                    "kubectl create configmap --namespace {namespace} {name} --from-literal \
                     '{key}={{\"Network\": \"10.244.0.0/16\", \"Backend\": {{\"Type\": \
                     \"vxlan\"}}}}'"
                ),
                place => format!(
                    "write one to {place}, such as {{\"Network\": \"10.244.0.0/16\", \
                     \"Backend\": {{\"Type\": \"vxlan\"}}}}"
                ),
            },
        })?;
        Ok(NetworkConfig::from_json(&text, PoolMode::Assigned)?)
    }

    async fn config_text(&self) -> Result<Option<String>> {
        match &self.options.config {
            ConfigSource::Text(text) => Ok(Some(text.clone())),
            ConfigSource::ConfigMap {
                namespace,
                name,
                key,
            } => {
                let read = self.calls.config_map(namespace, name, key).await;
                read.map_err(|failure: Failure| failure.meaning("get", "configmaps"))
            }
            ConfigSource::File(path) => {
                let shown = path.display().to_string();
                let path = path.clone();
                let read = tokio::task::spawn_blocking(move || {
                    let file = std::fs::File::open(path)?;
                    let mut text = String::new();
                    std::io::Read::read_to_string(
                        &mut std::io::Read::take(file, LONGEST_CONFIG),
                        &mut text,
                    )?;
                    Ok::<_, std::io::Error>(text)
                });
                match read.await {
                    Ok(Ok(text)) => Ok(Some(text)),
                    Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Ok(Err(error)) => Err(Error::unavailable(format!("{shown}: {error}"))),
                    Err(error) => Err(Error::unavailable(format!("{shown}: {error}"))),
                }
            }
        }
    }

    /// The config as a watch tells it; nothing where it is not known for now.
    pub(crate) async fn config_event(&self) -> Option<Event> {
        match self.config().await {
            Ok(config) => Some(Event::Config(config)),
            Err(error) if error.is_transient() => None,
            Err(error) => Some(Event::ConfigUnreadable {
                reason: error_chain(&error),
            }),
        }
    }
}
