//! What every node should have in its kernel, said a second time: straight from the records and the
//! config, without any of the SDK's own logic.
//!
//! [`peers`] says who of the records may be used, by the rules of the documentation. What a backend
//! makes of these is a [`Model`]'s to say; [`VxlanModel`] is the one of VXLAN, [`HostGwModel`] that
//! of host-gw, [`UdpModel`] that of UDP, [`ChangingModel`] that of nodes which have them all.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::net::IpAddr;

use flannel_core::{
    BackendData, BackendType, DualStack, Family, IfName, Lease, LeaseKey, MacAddr, NetworkConfig,
    NodeId, Objects, PublicIp, Subnet,
};

pub use super::model_hostgw::{ChangingModel, HostGwModel};
pub use super::model_udp::UdpModel;
pub use super::model_vxlan::VxlanModel;

/// A node as a model sees it.
#[derive(Debug, Clone, Copy)]
pub struct Me<'a> {
    /// Who it is.
    pub node: &'a NodeId,
    /// The network config.
    pub config: &'a NetworkConfig,
    /// The record of its lease.
    pub lease: &'a Lease,
    /// The addresses of its external interface.
    pub public_ip: &'a PublicIp,
    /// All addresses of the machine that are not the overlay's, each with the length of its prefix.
    pub addresses: &'a [(IpAddr, u8)],
    /// The external interface.
    pub external: IfName,
    /// The interfaces by which hosts are reached without a router, each with the prefix of these.
    pub links: &'a [(IfName, Subnet)],
    /// The MTU of the external interface.
    pub mtu: u32,
}

impl Me<'_> {
    /// The interface on whose link an address is.
    pub fn on_link(&self, ip: IpAddr) -> Option<IfName> {
        let mut links = self.links.iter();
        links.find_map(|(dev, prefix)| prefix.contains_ip(ip).then_some(*dev))
    }

    /// What is wrong with the address that it publishes of a family; `None`: nothing.
    pub fn fault_of_address(&self, family: Family) -> Option<String> {
        let (published, has) = (
            self.lease.attrs.public_ip(family),
            self.public_ip.ip(family),
        );
        (published != has).then(|| format!("it names {published:?}, the node has {has:?}"))
    }
}

/// One family of another node's record that may be used.
#[derive(Debug, Clone, Copy)]
pub struct Usable<'a> {
    /// The record.
    pub lease: &'a Lease,
    /// The family.
    pub family: Family,
    /// Its subnet.
    pub subnet: Subnet,
}

/// Where packets to a subnet are to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// The device.
    pub dev: IfName,
    /// The next node on the way.
    pub gateway: IpAddr,
}

/// What a node's kernel should have.
#[derive(Debug, Clone, Default)]
pub struct Expected {
    /// All that bears the overlay's marks, but for routes and nexthop objects; `None`: not said.
    pub objects: Option<Objects>,
    /// The routes to peers; `None`: there is to be one, wherever it leads.
    pub routes: BTreeMap<Subnet, Option<Hop>>,
    /// Backends whose devices may be there, with what is on them, although nobody wants them.
    pub may_stay: BTreeSet<BackendType>,
    /// The records that are to be reported as rejected, wholly or in part.
    pub rejected: BTreeSet<LeaseKey>,
}

/// What one backend should make of a node and its peers.
pub trait Model: Debug + Send + Sync + 'static {
    /// The type of the backend that a config names.
    fn backend_type(&self, config: &NetworkConfig) -> BackendType;

    /// The types of other backends whose records may be used too. By default none.
    fn reaches(&self, config: &NetworkConfig) -> Vec<BackendType> {
        let _ = config;
        Vec::new()
    }

    /// What the kernel should have for peers that may be used, the oldest claim first.
    fn expect(&self, me: &Me<'_>, peers: &[Usable<'_>]) -> Expected;

    /// What is wrong with what a node publishes; `None`: nothing.
    fn fault_of_own(&self, me: &Me<'_>) -> Option<String>;

    /// Backend data of a node with a number of its own, in a network of this config; `None`: the
    /// backend needs none.
    fn data(&self, config: &NetworkConfig, number: u64) -> Option<BackendData>;

    /// Backend data that is wrong in a way of its own: by number, taken modulo how many there are.
    fn wrong_data(&self, config: &NetworkConfig, number: u64) -> Option<BackendData>;
}

/// A model for any backend: that every peer's subnet is routed, wherever to.
#[derive(Debug, Clone)]
pub struct RoutesModel {
    backend_type: BackendType,
}

impl RoutesModel {
    /// The model of a backend of this type.
    pub const fn new(backend_type: BackendType) -> Self {
        Self { backend_type }
    }
}

impl Model for RoutesModel {
    fn backend_type(&self, _: &NetworkConfig) -> BackendType {
        self.backend_type.clone()
    }

    fn expect(&self, _: &Me<'_>, peers: &[Usable<'_>]) -> Expected {
        Expected {
            routes: peers.iter().map(|peer| (peer.subnet, None)).collect(),
            ..Expected::default()
        }
    }

    fn fault_of_own(&self, _: &Me<'_>) -> Option<String> {
        None
    }

    fn data(&self, _: &NetworkConfig, _: u64) -> Option<BackendData> {
        None
    }

    fn wrong_data(&self, _: &NetworkConfig, _: u64) -> Option<BackendData> {
        None
    }
}

/// Who of all records may be used by a node, the oldest claim first, and who is to be rejected.
///
/// A family of a record claims its subnet if the record is of one of these backends, the subnet lies
/// inside of the network and is no larger than a quarter of it, and the public address can be that of
/// one host of an underlay. Of those that overlap, the oldest has it, the node's own among them. Of
/// these the node uses what is a peer's, overlaps neither its own subnets nor its LANs, and is not
/// reached at an address of its own.
pub fn peers<'a>(
    me: &Me<'_>,
    backends: &[BackendType],
    records: &'a [Lease],
) -> (Vec<Usable<'a>>, BTreeSet<LeaseKey>) {
    let mut all: Vec<&Lease> = records.iter().collect();
    all.sort_by(|a, b| (a.created, &a.key).cmp(&(b.created, &b.key)));
    let mut claimed: Vec<Usable<'_>> = Vec::new();
    let mut usable: Vec<Usable<'_>> = Vec::new();
    let mut rejected = BTreeSet::new();
    for lease in all {
        let is_peers = lease.node != *me.node;
        let mut fits = 0;
        for (family, pool) in me.config.pools().iter() {
            let Some(subnet) = lease.subnet.get(family).copied() else {
                continue;
            };
            let network = pool.network();
            let taken = claimed
                .iter()
                .any(|older| older.lease.key != lease.key && overlap(&older.subnet, &subnet));
            let ip = lease.attrs.public_ip(family);
            let claims = backends
                .iter()
                .any(|backend| lease.attrs.is_backend(backend))
                && network.contains(&subnet)
                && subnet.len() >= network.len() + 2
                && ip.is_some_and(|ip| is_host(ip) && !is_inner(me, ip));
            let this = Usable {
                lease,
                family,
                subnet,
            };
            if claims && !taken {
                claimed.push(this);
            }
            let is_ours = me.lease.subnet.values().any(|own| overlap(own, &subnet))
                || is_lan(me, &network, &subnet)
                || ip.is_some_and(|ip| is_mine(me, ip));
            if claims && !taken && is_peers && !is_ours {
                fits += 1;
                usable.push(this);
            } else if is_peers {
                rejected.insert(lease.key.clone());
            }
        }
        if fits == 0 && is_peers {
            rejected.insert(lease.key.clone());
        }
    }
    (usable, rejected)
}

/// The one record of a node that holds its lease: of several, the one whose subnets the config
/// allows.
pub fn own_record<'a>(
    node: &NodeId,
    config: &NetworkConfig,
    records: &'a [Lease],
) -> Option<&'a Lease> {
    records
        .iter()
        .filter(|record| record.node == *node)
        .find(|record| fits(config, &record.subnet))
}

fn fits(config: &NetworkConfig, subnets: &DualStack<Subnet>) -> bool {
    Family::ALL.into_iter().all(
        |family| match (config.pools().get(family), subnets.get(family)) {
            (None, None) => true,
            (Some(pool), Some(subnet)) => {
                pool.network().contains(subnet)
                    && pool.subnet_len().is_none_or(|len| len == subnet.len())
            }
            _ => false,
        },
    )
}

fn overlap(a: &Subnet, b: &Subnet) -> bool {
    a.contains(b) || b.contains(a)
}

/// Whether an address is the node's own, or the broadcast address of one of its links.
fn is_mine(me: &Me<'_>, ip: IpAddr) -> bool {
    let broadcast = |own: IpAddr, len: u8| {
        let link = Subnet::new(own, len).ok();
        link.filter(|_| own.is_ipv4() && len < 31)
            .map(|link| link.last_address())
    };
    let mut addresses = me.addresses.iter();
    me.public_ip.ips().any(|mine| mine == ip)
        || addresses.any(|(own, len)| *own == ip || broadcast(*own, *len) == Some(ip))
}

/// Whether a subnet covers an address of the node, or overlaps the prefix of one that is not wider
/// than the network.
fn is_lan(me: &Me<'_>, network: &Subnet, subnet: &Subnet) -> bool {
    let mut addresses = me.addresses.iter();
    addresses.any(|(own, len)| {
        let prefix = Subnet::new(*own, *len).expect("a prefix");
        subnet.contains_ip(*own) || overlap(subnet, &prefix) && !prefix.contains(network)
    })
}

fn is_inner(me: &Me<'_>, ip: IpAddr) -> bool {
    me.config
        .pools()
        .values()
        .any(|pool| pool.network().contains_ip(ip))
}

/// Whether an address can be one host of an underlay.
pub fn is_host(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [first, second, ..] = ip.octets();
            first != 0 && first != 127 && first < 224 && (first, second) != (169, 254)
                // Addresses of class E are nobody's business, but for the last.
                || (240..=255).contains(&first) && !ip.is_broadcast()
        }
        IpAddr::V6(ip) => {
            !ip.is_unspecified()
                && !ip.is_loopback()
                && ip.segments()[0] & 0xff00 != 0xff00
                && ip.segments()[0] & 0xffc0 != 0xfe80
                && ip.to_ipv4_mapped().is_none()
        }
    }
}

/// The MAC address that a text of six pairs says.
pub(super) fn mac(text: &str) -> Option<MacAddr> {
    text.parse().ok().filter(MacAddr::is_unicast)
}
