//! [`HostGwBackend`]: what this node publishes, and how a network is made of its lease.

use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::backend::{Error, PerFamily, Result, check_lease};
use flannel_core::{
    Backend, BackendType, DualStack, Gateways, Lease, LeaseAttrs, Network, NodeContext,
};

use crate::network::HostGwNetwork;

/// The host-gw backend: compatible with flannel's in the lease and in its routes.
///
/// The network config has no keys for it but its type.
#[derive(Debug, Clone, Default)]
pub struct HostGwBackend {
    without_nexthops: bool,
}

impl HostGwBackend {
    /// The backend with its defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nexthop objects are used where the kernel has them; default yes. Without them the
    /// time to program peers grows with the square of their number.
    #[must_use]
    pub const fn with_nexthops(mut self, yes: bool) -> Self {
        self.without_nexthops = !yes;
        self
    }
}

#[async_trait]
impl Backend for HostGwBackend {
    fn backend_type(&self) -> BackendType {
        BackendType::host_gw()
    }

    fn reaches(&self) -> Vec<BackendType> {
        // A node of theirs forwards what reaches it without a tunnel, and answers the same way.
        vec![BackendType::vxlan(), BackendType::udp()]
    }

    fn attrs<'a>(&self, cx: &NodeContext<'a>) -> Result<LeaseAttrs> {
        families(cx)?;
        Ok(LeaseAttrs {
            public_ip: cx.external.public,
            backend_type: Some(self.backend_type()),
            backend_data: DualStack::default(),
        })
    }

    async fn register_network<'a>(
        &self,
        cx: &NodeContext<'a>,
        lease: Lease,
    ) -> Result<Arc<dyn Network>> {
        let ends = families(cx)?;
        check_lease(cx.config, &lease)?;
        let (gateways, note) = Gateways::new(cx, !self.without_nexthops);
        Ok(Arc::new(HostGwNetwork {
            gateways,
            underlay: Arc::clone(cx.underlay),
            mtu: cx.external.mtu,
            notes: note.into_iter().collect(),
            works: ends.works,
            lacks: ends.lacks,
            lease,
        }))
    }
}

/// The families whose published address peers can use as their gateway: one that the interface has.
///
/// # Errors
/// [`Error::Underlay`] if a public address is another than the interface's own.
fn families(cx: &NodeContext<'_>) -> Result<PerFamily<()>> {
    let (public, local) = (cx.external.public, cx.external.local);
    for family in cx.config.families() {
        if let (Some(public), Some(local)) = (public.ip(family), local.ip(family))
            && public != local
        {
            return Err(Error::Underlay {
                reason: format!(
                    "the public {family} address is {public}, that of interface {} {local}: they \
                     must be the same, because host-gw does not work through NAT; set no public \
                     address, or use vxlan",
                    cx.external.dev,
                ),
            });
        }
    }
    PerFamily::make(cx.config, |family| cx.source(family).map(drop))
}
