//! [`HostGwNetwork`]: from leases to routes.

use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::{
    DualStack, Gateways, Lease, Network, Note, Object, Rejection, Subnet, Underlay,
};

/// The network of one lease over plain routes.
#[derive(Debug)]
pub(crate) struct HostGwNetwork {
    pub(crate) gateways: Gateways,
    pub(crate) underlay: Arc<Underlay>,
    pub(crate) mtu: u32,
    pub(crate) notes: Vec<Note>,
    /// The families that work here.
    pub(crate) works: DualStack<()>,
    pub(crate) lacks: DualStack<String>,
    pub(crate) lease: Lease,
}

#[async_trait]
impl Network for HostGwNetwork {
    fn lease(&self) -> &Lease {
        &self.lease
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn local(&self) -> Vec<Object> {
        Vec::new()
    }

    fn peer(
        &self,
        peer: &Lease,
        subnets: &DualStack<Subnet>,
    ) -> DualStack<Result<Vec<Object>, Rejection>> {
        subnets.map(|family, subnet| {
            if !self.works.has(family) {
                return Err(Rejection::NoSubnet);
            }
            let public_ip = peer.attrs.public_ip(family);
            self.gateways.direct(&self.underlay, *subnet, public_ip)
        })
    }

    fn notes(&self) -> Vec<Note> {
        self.notes.clone()
    }

    fn lacks(&self) -> DualStack<String> {
        self.lacks.clone()
    }
}
