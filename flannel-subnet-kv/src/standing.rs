//! [`Standing`]: what another's record counts for when a node wants a subnet. Pure.
//!
//! Anyone who can write to the store can write anything. A record counts only if a node can have
//! written it: under flannel's own key, of a subnet that a config gives out, at an address where a
//! node can be, for the config's backend. Everything else is debris: it is reported as what it is,
//! joins go round it, and nobody loses a subnet for it.

use std::net::{IpAddr, Ipv4Addr};

use flannel_core::{BackendType, DualStack, NetworkConfig, Pool, Subnet, no_address_of_a_node};

use crate::layout::{Layout, Record};

/// How many configs are remembered.
const MOST: usize = 16;

/// What a config lets nodes write.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Terms {
    pools: DualStack<Pool>,
    backend: BackendType,
}

impl Terms {
    fn of(config: &NetworkConfig) -> Self {
        Self {
            pools: *config.pools(),
            backend: config.backend().backend_type().clone(),
        }
    }

    /// Whether a node can have these subnets. Where the config has both families, IPv4 alone too, if
    /// asked: a network has IPv4 before it has IPv6 as well.
    fn give_out(&self, subnets: &DualStack<Subnet>, or_v4_alone: bool) -> bool {
        let is_whole = subnets.same_families(&self.pools);
        let is_half = or_v4_alone && subnets.v6.is_none() && self.pools.v4.is_some();
        let fits = |(family, subnet): (_, &Subnet)| {
            let pool: Option<&Pool> = self.pools.get(family);
            pool.is_some_and(|pool| {
                pool.network().contains(subnet) && pool.subnet_len() == Some(subnet.len())
            })
        };
        (is_whole || is_half) && !subnets.is_empty() && subnets.iter().all(fits)
    }

    fn is_inner(&self, ip: IpAddr) -> bool {
        self.pools.values().any(|pool| pool.contains_ip(ip))
    }
}

/// The configs that this node has seen, the latest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen(Vec<Terms>);

impl Seen {
    /// Remembers one more.
    pub(super) fn add(&mut self, config: &NetworkConfig) {
        let terms = Terms::of(config);
        self.0.retain(|known| *known != terms);
        self.0.insert(0, terms);
        self.0.truncate(MOST);
    }
}

/// What a record counts for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Go flannel can have written it, which asks nobody and never gives way: ours does.
    Go,
    /// Another node of this SDK has written it: of two, the older one has the subnet.
    Node,
    /// It is kept for a node and does not expire, or it is one that peers accept although no config
    /// that was seen gives out such subnets: taken, but nobody gives way to it.
    Taken,
    /// No peer accepts it. Joins go round it where they can.
    Debris,
}

impl Standing {
    /// What a record counts for under the configs that were seen.
    pub(super) fn of(layout: &Layout, seen: &Seen, record: &Record) -> Self {
        Self::find(layout, seen, record, false)
    }

    /// Whether Go flannel can have written a record, be it before the network had both families.
    pub(super) fn is_gos_of_any_family(layout: &Layout, seen: &Seen, record: &Record) -> bool {
        Self::find(layout, seen, record, true) == Self::Go
    }

    fn find(layout: &Layout, seen: &Seen, record: &Record, or_v4_alone: bool) -> Self {
        let (Ok(subnets), Some(attrs)) = (&record.subnets, record.attrs()) else {
            return Self::Debris;
        };
        let is_flannels_key = layout
            .record(subnets)
            .is_ok_and(|key| key == record.entry.key);
        let can_write = |terms: &Terms| {
            let usable = |family| {
                let ip = attrs.public_ip(family);
                ip.is_some_and(|ip| no_address_of_a_node(ip).is_none() && !terms.is_inner(ip))
            };
            terms.give_out(subnets, or_v4_alone)
                && subnets.families().all(usable)
                && attrs.is_backend(&terms.backend)
        };
        // Of a reservation nobody knows yet what its node will publish.
        let can_reserve = |terms: &Terms| {
            let ip = attrs.public_ip.ips().next();
            terms.give_out(subnets, false) && ip.is_none_or(|ip| no_address_of_a_node(ip).is_none())
        };
        let accept = |terms: &Terms| {
            let is_accepted = |(family, subnet): (_, &Subnet)| {
                let ip = attrs.public_ip(family);
                let pool: Option<&Pool> = terms.pools.get(family);
                pool.is_some_and(|pool| pool.admits(subnet))
                    && ip
                        .is_some_and(|ip| no_address_of_a_node(ip).is_none() && !terms.is_inner(ip))
            };
            subnets.iter().any(is_accepted)
        };
        let any = |can: &dyn Fn(&Terms) -> bool| seen.0.iter().any(can);
        match record.entry.lease {
            Some(_) if is_flannels_key && any(&can_write) && record.is_gos() => Self::Go,
            Some(_) if is_flannels_key && any(&can_write) => Self::Node,
            None if is_flannels_key && any(&can_reserve) => Self::Taken,
            _ if any(&accept) => Self::Taken,
            _ => Self::Debris,
        }
    }
}

/// The subnet whose record cannot be made because a key is there that begins as its key does.
pub(super) fn blocked_by(layout: &Layout, pools: &DualStack<Pool>, key: &str) -> Option<Subnet> {
    let len = pools.v4?.subnet_len()?;
    let name = key.strip_prefix(&layout.subnets())?.strip_prefix('/')?;
    let (ip, rest) = name.split_once('-')?;
    let address: Ipv4Addr = ip.parse().ok()?;
    let begins_so = rest.starts_with(&len.to_string());
    let subnet = Subnet::strict(address, len).ok()?;
    begins_so.then_some(subnet)
}
