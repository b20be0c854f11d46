//! What of a peer's record may be used, as far as the record alone can tell.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::backend::Rejection;
use crate::config::Pool;
use crate::family::{DualStack, Family, PublicIp};
use crate::lease::{BackendType, Lease, LeaseKey};
use crate::node::NodeId;
use crate::subnet::Subnet;

/// Who we are: by this, records are told to be ours or a peer's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Own {
    /// Our node id. A record that bears it is ours, whatever its key.
    pub node: NodeId,
    /// The key of our lease's record; `None` while we hold no lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<LeaseKey>,
    /// Our subnets. What overlaps them is nobody else's.
    pub subnets: DualStack<Subnet>,
    /// Our addresses on the underlay. No peer is reached there.
    pub public_ip: PublicIp,
}

/// By what peers are judged. As long as any of it is not known, nobody is admitted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Admission {
    pub(crate) own: Option<Own>,
    pub(crate) pools: DualStack<Pool>,
    pub(crate) backend: Option<BackendType>,
    /// The types of other backends that ours reaches too.
    pub(crate) reaches: Vec<BackendType>,
}

impl Admission {
    /// Whether a record is one of our own.
    pub(crate) fn is_own(&self, lease: &Lease) -> bool {
        self.own.as_ref().is_some_and(|own| own.node == lease.node)
    }

    /// The backend of a record, if it is one that ours reaches and not ours.
    pub(crate) fn other_backend(&self, lease: &Lease) -> Option<BackendType> {
        let is = |backend: &&BackendType| lease.attrs.is_backend(backend);
        if self.backend.as_ref().is_some_and(|ours| is(&ours)) {
            return None;
        }
        self.reaches.iter().find(is).cloned()
    }

    /// The subnets of a peer that may be used, unless an older record has them, and why others may
    /// not. A family that this node does not run is neither.
    pub(crate) fn screen(&self, lease: &Lease) -> DualStack<Result<Subnet, Rejection>> {
        let (Some(own), Some(ours)) = (&self.own, &self.backend) else {
            return DualStack::default();
        };
        if !self.pools.families().any(|family| lease.subnet.has(family)) {
            return self.pools.map(|_, _| Err(Rejection::NoSubnet));
        }
        let mut reached = self.reaches.iter().chain([ours]);
        if !reached.any(|backend| lease.attrs.is_backend(backend)) {
            let found = lease.attrs.backend_type.as_ref();
            let rejection = Rejection::BackendType {
                found: found.map_or("none", BackendType::as_str).to_owned(),
                ours: ours.clone(),
            };
            return self.considered(lease, |_, _, _| Err(rejection.clone()));
        }
        self.considered(lease, |family, pool, subnet| {
            self.check(own, family, pool, subnet, &lease.attrs.public_ip)
        })
    }

    /// Each family that the record has and this node runs, turned into a verdict.
    fn considered<T>(
        &self,
        lease: &Lease,
        mut verdict: impl FnMut(Family, &Pool, Subnet) -> T,
    ) -> DualStack<T> {
        let mut all = DualStack::default();
        for (family, pool) in self.pools.iter() {
            if let Some(subnet) = lease.subnet.get(family) {
                all.set(family, Some(verdict(family, pool, *subnet)));
            }
        }
        all
    }

    fn check(
        &self,
        own: &Own,
        family: Family,
        pool: &Pool,
        subnet: Subnet,
        public_ip: &PublicIp,
    ) -> Result<Subnet, Rejection> {
        if subnet.family() != family {
            return Err(Rejection::WrongFamily { family, subnet });
        }
        if !pool.admits(&subnet) {
            return Err(Rejection::OutsideNetwork {
                subnet,
                network: pool.network(),
            });
        }
        if let Some(mine) = own.subnets.values().find(|mine| mine.overlaps(&subnet)) {
            return Err(Rejection::OverlapsOwn { subnet, own: *mine });
        }
        let found = public_ip.ip(family);
        match found.map_or(Some("missing"), |ip| self.fault(own, ip)) {
            None => Ok(subnet),
            Some(reason) => Err(Rejection::PublicIp {
                found: found.map_or_else(|| "none".to_owned(), |ip| ip.to_string()),
                reason: reason.to_owned(),
            }),
        }
    }

    /// Why no peer can be reached at an address.
    fn fault(&self, own: &Own, ip: IpAddr) -> Option<&'static str> {
        if let Some(fault) = not_a_host(ip) {
            Some(fault)
        } else if own.public_ip.ips().any(|mine| mine == ip) {
            Some("it is this node's own")
        } else if self.pools.values().any(|pool| pool.contains_ip(ip)) {
            Some("it lies in the overlay network itself")
        } else {
            None
        }
    }
}

/// Why an address is not that of one host of the underlay.
fn not_a_host(ip: IpAddr) -> Option<&'static str> {
    if ip.is_unspecified() {
        return Some("it is unspecified");
    }
    if ip.is_loopback() {
        return Some("it is a loopback address");
    }
    if ip.is_multicast() {
        return Some("it is a multicast address");
    }
    match ip {
        IpAddr::V4(ip) if ip.is_broadcast() => Some("it is the broadcast address"),
        IpAddr::V4(ip) if ip.octets()[0] == 0 => Some("it lies in 0.0.0.0/8"),
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) if ip.is_unicast_link_local() => Some("it is a link-local address"),
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => Some("it is a mapped IPv4 address"),
        IpAddr::V6(_) => None,
    }
}
