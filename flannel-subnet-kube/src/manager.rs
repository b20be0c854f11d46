//! [`KubeManager`]: the subnet manager.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::manager::{Error, Result, check_runtime};
use flannel_core::{
    Capabilities, DualStack, EventStream, Family, Lease, LeaseAttrs, LeaseKey, LeaseRequest,
    Manager, NetworkConfig, NodeId, PublicIp, Revision, Subnet,
};
use tokio::sync::broadcast;

use crate::calls::Found;
use crate::event::KubeEvent;
use crate::list_watch::ListWatch;
use crate::node::NodeView;
use crate::options::{KubeOptions, OptionsError};
use crate::prefix::Annotation;
use crate::record::{self, Network, Wanted};
use crate::shared::{Own, Shared, Standing};

/// How often a write is tried anew that somebody else's write has come before.
const ATTEMPTS: usize = 32;

/// Leases on the Nodes of a Kubernetes cluster, in flannel's annotations, together with Go
/// flanneld.
///
/// - A node's lease is its Node object's pod CIDRs, which the cluster assigns, and flannel's
///   annotations, which the node writes. Its [`NodeId`] is the name of the Node. A Node without
///   pod CIDR, or one that is not there yet, is [`Error::NotReady`]; such a lease has no end.
/// - Writes are patches of `nodes/NAME/status` that name what they change, and are conditional on
///   the version of the Node that was read. Nobody else's annotation or condition is touched.
/// - A renewal finds the lease lost where somebody else has changed our annotations, or the Node
///   is another one of the same name; a following [`acquire_lease`](Manager::acquire_lease)
///   restores it, and [`events`](Self::events) tells what was found. That others write other
///   things to the Node, as the kubelet does all the time, makes no difference.
/// - Giving a lease up removes our annotations. Go flannel's nodes keep their routes to such a
///   node until its Node is deleted: they ignore one that is not managed any more.
/// - The watch decodes of each Node what concerns us, one Node at a time, and drops the rest.
///
/// Handles are cheap to clone and share everything.
#[derive(Clone)]
pub struct KubeManager(Arc<Shared>);

/// What an operator has set on a Node for the program that runs there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct NodeSettings {
    /// The addresses to use instead of those found on the host (`node-public-ip`,
    /// `node-public-ipv6`).
    pub public_ip: PublicIp,
}

impl KubeManager {
    /// A manager with these settings. Nothing is contacted yet, and no file is read: what is wrong
    /// with those comes with the calls.
    ///
    /// # Errors
    /// [`OptionsError`] says which setting is wrong.
    pub fn new(options: KubeOptions) -> std::result::Result<Self, OptionsError> {
        options.check()?;
        Ok(Self(Arc::new(Shared::new(options))))
    }

    /// What an operator has set on a node's Node for the program that runs there, to be asked at
    /// its start.
    ///
    /// # Errors
    /// [`Error::NotReady`] if there is no such Node yet, [`Error::Invalid`] if a setting is no
    /// address, or any error of the API server: an address that could not be read is not the same
    /// as none.
    ///
    /// # Cancel safety
    /// Cancel safe: reads only.
    pub async fn node_settings(&self, node: &NodeId) -> Result<NodeSettings> {
        let found = self.found(node).await?;
        let public_ip = record::node_public_ip(&found.node);
        let public_ip = public_ip.map_err(|reason| invalid(node, &reason))?;
        Ok(NodeSettings { public_ip })
    }

    /// What happens to our Node from now on that had to be made good. A listener that is slow by
    /// more than 64 events misses the oldest, and is told so.
    pub fn events(&self) -> broadcast::Receiver<KubeEvent> {
        self.0.events.subscribe()
    }

    /// A node's Node as it stands.
    async fn found(&self, node: &NodeId) -> Result<Found> {
        let found = self.0.node(node.as_str()).await?;
        found.ok_or_else(|| Error::NotReady {
            reason: format!(
                "there is no Node {node} yet; the name must be that by which the kubelet knows \
                 this host (`kubectl get nodes`)"
            ),
        })
    }

    /// Writes what is to be written, unless the Node has changed meanwhile. Answers the Node as it
    /// is then.
    async fn bring_about(
        &self,
        found: Found,
        wanted: &Wanted,
        network: Network,
    ) -> Result<Option<Found>> {
        let differences = record::differences(&found.node, wanted);
        if differences.is_empty() && network == Network::Unsaid {
            return Ok(Some(found));
        }
        let key = LeaseKey::new(&found.node.name);
        let standing = Standing::with(&found.node, wanted.clone());
        self.0.attempt(&key, standing);
        let after = self.0.write(&found, &differences, network).await?;
        match after {
            Some(after) if !record::differences(&after.node, wanted).is_empty() => {
                // Somebody (an admission webhook) makes something else of it.
                let name = &after.node.name;
                Err(Error::Invalid {
                    reason: format!("the API server does not keep our annotations of Node {name}"),
                })
            }
            after => Ok(after),
        }
    }

    /// Notes a lease that is held, and tells it.
    fn held(
        &self,
        node: &NodeView,
        id: &NodeId,
        subnet: DualStack<Subnet>,
        attrs: &LeaseAttrs,
    ) -> Lease {
        let lease = Lease {
            key: LeaseKey::new(&node.name),
            node: id.clone(),
            instance: None,
            subnet,
            attrs: attrs.clone(),
            ttl: None,
            created: Revision(node.created),
            revision: node.revision,
        };
        let own = Own {
            lease: lease.clone(),
            standing: Standing::of(node),
            attempted: None,
        };
        self.0.set_own(&lease.key, Some(own));
        lease
    }

    /// Tells what was found in the place of what we had written.
    fn report(&self, id: &NodeId, node: &NodeView, subnet: DualStack<Subnet>, own: Option<Own>) {
        let Some(own) = own else { return };
        if own.standing.uid != node.uid {
            self.0.emit(KubeEvent::NodeRecreated {
                node: id.clone(),
                before: own.lease.subnet,
                after: subnet,
            });
            return;
        }
        let attempted = own.attempted.map(|standing| standing.written);
        let written = own.standing.written;
        let differences = record::differences(node, &written);
        let is_attempt = attempted.is_some_and(|it| record::differences(node, &it).is_empty());
        if !differences.is_empty() && !is_attempt {
            let node = id.clone();
            self.0.emit(KubeEvent::Restored { node, differences });
        }
    }

    /// What must stand for a lease to be current, where the first reading of its Node says that it
    /// is.
    fn current(&self, lease: &Lease, node: &NodeView) -> Result<Vec<Standing>> {
        if node.revision == lease.revision {
            return if holds(node, &lease.subnet) {
                Ok(vec![Standing::of(node)])
            } else {
                Err(lost(lease, "its Node has other pod CIDRs"))
            };
        }
        match self.0.own(&lease.key) {
            Some(own) if lease.revision >= own.lease.revision => {
                Ok([Some(own.standing), own.attempted]
                    .into_iter()
                    .flatten()
                    .collect())
            }
            _ => Err(lost(lease, "its Node was written since")),
        }
    }
}

#[async_trait]
impl Manager for KubeManager {
    fn name(&self) -> &'static str {
        "kube"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::NONE.with_watches_config(true)
    }

    fn reconnect(&self) {
        self.0.calls.reconnect();
    }

    async fn network_config(&self) -> Result<NetworkConfig> {
        check_runtime()?;
        self.0.config().await
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease> {
        check_runtime()?;
        let config = self.0.config().await?;
        for _ in 0..ATTEMPTS {
            let found = self.found(&request.node).await?;
            let subnet = assigned(&request.node, &found.node, &config)?;
            let wanted = record::wanted(&found.node, &request.attrs)
                .map_err(|reason| invalid(&request.node, &reason))?;
            let own = self.0.own(&LeaseKey::new(&found.node.name));
            let before = found.node.clone();
            let network = self.0.network(&found.node);
            if let Some(after) = self.bring_about(found, &wanted, network).await? {
                self.report(&request.node, &before, subnet, own);
                return Ok(self.held(&after.node, &request.node, subnet, &request.attrs));
            }
        }
        Err(conflict(request.node.as_str()))
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease> {
        check_runtime()?;
        let mut standings: Option<Vec<Standing>> = None;
        for _ in 0..ATTEMPTS {
            let Some(found) = self.0.node(lease.key.as_str()).await? else {
                return Err(lost(lease, "its Node is gone"));
            };
            let expected = match standings {
                Some(standings) => standings,
                None => self.current(lease, &found.node)?,
            };
            check(lease, &found.node, &expected)?;
            standings = Some(expected);
            let wanted = record::wanted(&found.node, &lease.attrs)
                .map_err(|reason| invalid(&lease.node, &reason))?;
            let network = self.0.network(&found.node);
            if let Some(after) = self.bring_about(found, &wanted, network).await? {
                return Ok(self.held(&after.node, &lease.node, lease.subnet, &lease.attrs));
            }
        }
        Err(conflict(lease.key.as_str()))
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        check_runtime()?;
        let mut standings: Option<Vec<Standing>> = None;
        for _ in 0..ATTEMPTS {
            let found = self.0.node(lease.key.as_str()).await?;
            let is_record =
                |found: &Found| found.node.annotations.get(Annotation::Managed) == Some("true");
            let Some(found) = found.filter(is_record) else {
                self.0.set_own(&lease.key, None);
                return Ok(());
            };
            let expected = match standings {
                Some(standings) => standings,
                None => self.current(lease, &found.node)?,
            };
            check(lease, &found.node, &expected)?;
            standings = Some(expected);
            let network = if self.0.options.network_condition {
                Network::Down
            } else {
                Network::Unsaid
            };
            let done = self.bring_about(found, &record::absent(), network).await?;
            if done.is_some() {
                self.0.set_own(&lease.key, None);
                return Ok(());
            }
        }
        Err(conflict(lease.key.as_str()))
    }

    fn watch_leases(&self) -> EventStream {
        Box::pin(ListWatch::new(Arc::clone(&self.0)))
    }
}

impl fmt::Debug for KubeManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubeManager")
            .field("options", &self.0.options)
            .finish_non_exhaustive()
    }
}

/// The subnets that a Node was assigned, in the families of the network.
fn assigned(id: &NodeId, node: &NodeView, config: &NetworkConfig) -> Result<DualStack<Subnet>> {
    let subnets = node.subnets.clone();
    let subnets = subnets.map_err(|reason| invalid(id, &reason))?;
    let mut taken = DualStack::default();
    for (family, pool) in config.pools().iter() {
        let Some(subnet) = subnets.get(family) else {
            return Err(Error::NotReady {
                reason: format!(
                    "Node {id} has no {family} pod CIDR yet: it is assigned by the \
                     kube-controller-manager (--allocate-node-cidrs), or by hand as spec.podCIDRs"
                ),
            });
        };
        if !pool.fits(subnet) {
            let (network, name) = (pool.network(), network_key(family));
            let reason = format!(
                "Node {id} has the pod CIDR {subnet}, which is not inside of {name} = {network}: \
                 make that the cluster's --cluster-cidr"
            );
            return Err(Error::Invalid { reason });
        }
        taken.set(family, Some(*subnet));
    }
    Ok(taken)
}

const fn network_key(family: Family) -> &'static str {
    match family {
        Family::V4 => "Network",
        Family::V6 => "IPv6Network",
    }
}

/// Whether a Node has these subnets.
fn holds(node: &NodeView, subnets: &DualStack<Subnet>) -> bool {
    let assigned = node.subnets.as_ref().ok().copied().unwrap_or_default();
    subnets
        .iter()
        .all(|(family, subnet)| assigned.get(family) == Some(subnet))
}

/// Whether a lease is current: its Node stands as one of these.
fn check(lease: &Lease, node: &NodeView, expected: &[Standing]) -> Result<()> {
    let standing = Standing::of(node);
    if expected.contains(&standing) {
        return Ok(());
    }
    let Some(known) = expected.first() else {
        return Err(lost(lease, "its Node was written since"));
    };
    if known.uid != standing.uid {
        return Err(lost(lease, "its Node was deleted and made again"));
    }
    if known.subnets != standing.subnets {
        return Err(lost(lease, "its Node has other pod CIDRs"));
    }
    let differences = record::differences(node, &known.written);
    let names: Vec<&str> = differences.iter().map(|it| it.annotation.name()).collect();
    let reason = format!("somebody else has written {}", names.join(", "));
    Err(lost(lease, &reason))
}

fn lost(lease: &Lease, reason: &str) -> Error {
    Error::LeaseLost {
        key: lease.key.clone(),
        reason: reason.to_owned(),
    }
}

fn invalid(node: &NodeId, reason: &str) -> Error {
    Error::Invalid {
        reason: format!("Node {node}: {reason}"),
    }
}

fn conflict(node: &str) -> Error {
    Error::Conflict {
        reason: format!("{ATTEMPTS} writes in a row to Node {node} came after somebody else's"),
    }
}
