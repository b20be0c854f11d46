//! What of a peer's record may be used, as far as the record and this host alone can tell.
//!
//! A record is refused for one of two kinds of reason. *Common* ones hold on every node: the subnet
//! is not one of the network, the type is unknown. Such a record claims nothing. *Local* ones hold
//! on this host alone: the subnet is this host's LAN, the public address is this host's own. Such a
//! record keeps its claim against younger ones, because the other nodes accept it: so every node
//! settles alike.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::backend::Rejection;
use crate::config::Pool;
use crate::family::{DualStack, Family, PublicIp};
use crate::lease::{BackendType, Lease, LeaseKey};
use crate::node::NodeId;
use crate::reserved;
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

/// The addresses of this host, each with its prefix. Those of the overlay's own devices, and of Go
/// flannel's, are not among them, nor those that hold on one link only.
///
/// No peer is reached at one of them, and none gets a subnet that covers one, or that overlaps the
/// prefix of one: that is this host's LAN. A prefix that holds a whole pool is left out, because
/// then the config itself puts the overlay inside of the LAN.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostAddresses(BTreeSet<(IpAddr, u8)>);

impl HostAddresses {
    /// The prefixes that overlap a subnet, and the addresses in it.
    fn overlapping(&self, subnet: Subnet, pool: &Pool) -> Option<Subnet> {
        let of_family = self
            .0
            .iter()
            .filter(|(ip, _)| Family::of(ip) == subnet.family());
        of_family
            .filter_map(|(ip, len)| {
                let prefix = Subnet::new(*ip, *len).ok()?;
                let host = Subnet::host(*ip);
                if subnet.contains(&host) {
                    return Some(host);
                }
                let is_lan = subnet.overlaps(&prefix) && !prefix.contains(&pool.network());
                is_lan.then_some(prefix)
            })
            .next()
    }

    /// Why no peer of this host has an address.
    fn fault(&self, ip: IpAddr) -> Option<&'static str> {
        self.0.iter().find_map(|(own, len)| {
            if *own == ip {
                return Some("it is an address of this node");
            }
            // Links of two hosts have no broadcast address (RFC 3021), nor has IPv6.
            let prefix = Subnet::new(*own, *len).ok()?;
            (ip.is_ipv4() && prefix.len() < 31 && ip == prefix.last_address())
                .then_some("it is the broadcast address of a link")
        })
    }
}

impl FromIterator<(IpAddr, u8)> for HostAddresses {
    /// Addresses, each with the length of its prefix in bits.
    fn from_iter<T: IntoIterator<Item = (IpAddr, u8)>>(addresses: T) -> Self {
        let lasting = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => !ip.is_link_local(),
            IpAddr::V6(ip) => !ip.is_unicast_link_local(),
        };
        Self(
            addresses
                .into_iter()
                .filter(|(ip, _)| lasting(ip))
                .collect(),
        )
    }
}

/// By what peers are judged. As long as any of it is not known, nobody is admitted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Admission {
    pub(crate) own: Option<Own>,
    pub(crate) host: HostAddresses,
    pub(crate) pools: DualStack<Pool>,
    pub(crate) backend: Option<BackendType>,
    /// The types of other backends that ours reaches too.
    pub(crate) reaches: Vec<BackendType>,
}

/// What was found of one family of a record, others' claims aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Screened {
    /// The subnet that it claims on every node that runs this network.
    pub(crate) claim: Option<Subnet>,
    /// The subnet to be used here, or why it is not.
    pub(crate) verdict: Result<Subnet, Rejection>,
}

impl Screened {
    /// Refused on every node.
    pub(crate) const fn refused(rejection: Rejection) -> Self {
        Self {
            claim: None,
            verdict: Err(rejection),
        }
    }
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

    /// The verdict on each family of a record that this node runs, unless an older record has its
    /// subnet.
    pub(crate) fn screen(&self, lease: &Lease) -> DualStack<Screened> {
        let (Some(own), Some(ours)) = (&self.own, &self.backend) else {
            return DualStack::default();
        };
        if !self.pools.families().any(|family| lease.subnet.has(family)) {
            return self
                .pools
                .map(|_, _| Screened::refused(Rejection::NoSubnet));
        }
        let mut reached = self.reaches.iter().chain([ours]);
        let is_reached = reached.any(|backend| lease.attrs.is_backend(backend));
        let mut all = DualStack::default();
        for (family, pool) in self.pools.iter() {
            let Some(subnet) = lease.subnet.get(family) else {
                continue;
            };
            let screened = if is_reached {
                self.screen_subnet(own, pool, family, *subnet, lease)
            } else {
                let found = lease.attrs.backend_type.as_ref();
                Screened::refused(Rejection::BackendType {
                    found: found.map_or("none", BackendType::as_str).to_owned(),
                    ours: ours.clone(),
                })
            };
            all.set(family, Some(screened));
        }
        all
    }

    fn screen_subnet(
        &self,
        own: &Own,
        pool: &Pool,
        family: Family,
        subnet: Subnet,
        lease: &Lease,
    ) -> Screened {
        if let Err(rejection) = self.common(pool, family, subnet, &lease.attrs.public_ip) {
            return Screened::refused(rejection);
        }
        let verdict = match self.local(own, pool, family, subnet, &lease.attrs.public_ip) {
            // A record of our own is no peer: what is ours stands in its way nowhere.
            Some(rejection) if !self.is_own(lease) => Err(rejection),
            _ => Ok(subnet),
        };
        Screened {
            claim: Some(subnet),
            verdict,
        }
    }

    /// The rules that every node applies alike.
    fn common(
        &self,
        pool: &Pool,
        family: Family,
        subnet: Subnet,
        public_ip: &PublicIp,
    ) -> Result<(), Rejection> {
        if subnet.family() != family {
            return Err(Rejection::WrongFamily { family, subnet });
        }
        if !pool.admits(&subnet) || reserved::touches(&subnet) {
            return Err(Rejection::OutsideNetwork {
                subnet,
                network: pool.network(),
            });
        }
        let found = public_ip.ip(family);
        let is_inner = |ip| self.pools.values().any(|pool| pool.contains_ip(ip));
        let fault = match found {
            None => Some("missing"),
            Some(ip) if is_inner(ip) => Some("it lies in the overlay network itself"),
            Some(ip) => no_address_of_a_node(ip),
        };
        fault.map_or(Ok(()), |reason| Err(bad_public_ip(found, reason)))
    }

    /// Why a record that other nodes accept is of no use on this host.
    fn local(
        &self,
        own: &Own,
        pool: &Pool,
        family: Family,
        subnet: Subnet,
        public_ip: &PublicIp,
    ) -> Option<Rejection> {
        if let Some(mine) = own.subnets.values().find(|mine| mine.overlaps(&subnet)) {
            return Some(Rejection::OverlapsOwn { subnet, own: *mine });
        }
        if let Some(host) = self.host.overlapping(subnet, pool) {
            return Some(Rejection::OverlapsHost { subnet, host });
        }
        let ip = public_ip.ip(family)?;
        let reason = if own.public_ip.ips().any(|mine| mine == ip) {
            Some("it is this node's own")
        } else {
            self.host.fault(ip)
        };
        reason.map(|reason| bad_public_ip(Some(ip), reason))
    }
}

fn bad_public_ip(found: Option<IpAddr>, reason: &str) -> Rejection {
    Rejection::PublicIp {
        found: found.map_or_else(|| "none".to_owned(), |ip| ip.to_string()),
        reason: reason.to_owned(),
    }
}

/// Why an address is not that of one host of the underlay, whoever asks.
pub fn no_address_of_a_node(ip: IpAddr) -> Option<&'static str> {
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
        IpAddr::V4(ip) if ip.is_link_local() => Some("it is a link-local address"),
        IpAddr::V4(ip) if ip.octets()[0] == 0 => Some("it lies in 0.0.0.0/8"),
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) if ip.is_unicast_link_local() => Some("it is a link-local address"),
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => Some("it is a mapped IPv4 address"),
        IpAddr::V6(_) => None,
    }
}
