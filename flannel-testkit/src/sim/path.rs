//! The way of a packet through a node's kernel objects, looked up as the kernel would.

use std::collections::BTreeMap;
use std::net::IpAddr;

use flannel_core::{
    IfName, Link, LinkKind, MAIN_TABLE, MacAddr, Object, ObjectKey, Objects, Route, RouteProtocol,
    RouteTarget, Subnet,
};

/// Where a packet leaves the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// The device.
    pub dev: IfName,
    /// The next node on the way, or the destination itself where it is on the link; of a packet path
    /// in userspace the node at its other end.
    pub gateway: IpAddr,
    /// Where the outer packet goes if the device is a tunnel, and to which hardware address the
    /// inner one is addressed.
    pub tunnel: Option<(MacAddr, IpAddr)>,
}

/// The way by the very route to a subnet, whatever more special routes there are.
///
/// # Errors
/// Says where the way ends.
pub fn route_to(objects: &Objects, subnet: &Subnet) -> Result<Way, String> {
    let key = ObjectKey::Route {
        table: MAIN_TABLE,
        dst: *subnet,
        metric: Route::default_metric(subnet.family()),
    };
    match objects.get(&key) {
        Some(Object::Route(route)) => through(objects, route, inside(subnet)),
        _ => Err("there is no route".to_owned()),
    }
}

/// Every subnet with a route that bears a protocol number and leads somewhere whole.
pub fn whole(objects: &Objects, protocol: RouteProtocol) -> BTreeMap<Subnet, Way> {
    routes(objects)
        .filter(|route| route.protocol == protocol)
        .filter_map(|route| Some((route.dst, through(objects, route, inside(&route.dst)).ok()?)))
        .collect()
}

/// Whether a route to a subnet bears a protocol number and leads somewhere whole.
pub fn is_whole(objects: &Objects, protocol: RouteProtocol, subnet: &Subnet) -> bool {
    routes_to(objects, subnet)
        .filter(|route| route.protocol == protocol)
        .any(|route| through(objects, route, inside(subnet)).is_ok())
}

/// An address in a subnet that is not the first one.
fn inside(subnet: &Subnet) -> IpAddr {
    subnet.last_address()
}

/// The routes, whichever table they are in.
pub fn routes(objects: &Objects) -> impl Iterator<Item = &Route> {
    objects
        .range(ObjectKey::Nexthop(u32::MAX)..)
        .filter_map(|(_, object)| match object {
            Object::Route(route) => Some(route),
            _ => None,
        })
}

/// The routes to a subnet in the main table, whatever their metric.
pub fn routes_to<'a>(objects: &'a Objects, subnet: &Subnet) -> impl Iterator<Item = &'a Route> {
    let key = |metric| ObjectKey::Route {
        table: MAIN_TABLE,
        dst: *subnet,
        metric,
    };
    objects
        .range(key(0)..=key(u32::MAX))
        .filter_map(|(_, object)| match object {
            Object::Route(route) => Some(route),
            _ => None,
        })
}

fn through(objects: &Objects, route: &Route, to: IpAddr) -> Result<Way, String> {
    let (gateway, dev) = match &route.target {
        RouteTarget::Gateway { gateway, dev, .. } => (*gateway, *dev),
        RouteTarget::Device(dev) => (to, *dev),
        RouteTarget::Nexthop(id) => match objects.get(&ObjectKey::Nexthop(*id)) {
            Some(Object::Nexthop(nexthop)) => (nexthop.gateway, nexthop.dev),
            _ => {
                return Err(format!(
                    "{} names nexthop {id}, which is not there",
                    route.dst
                ));
            }
        },
        other => return Err(format!("{} leads to {other}", route.dst)),
    };
    let link = link(objects, dev).ok_or_else(|| format!("there is no device {dev}"))?;
    if !link.up {
        return Err(format!("device {dev} is down"));
    }
    if let LinkKind::Tun(_) = link.kind {
        return datagrams(objects, dev, route.dst);
    }
    if !matches!(link.kind, LinkKind::Vxlan(_)) {
        return Ok(Way {
            dev,
            gateway,
            tunnel: None,
        });
    }
    let mac = match objects.get(&ObjectKey::Neighbour { dev, ip: gateway }) {
        Some(Object::Neighbour(neighbour)) => neighbour.mac,
        _ => return Err(format!("{gateway} is no neighbour on {dev}")),
    };
    match objects.get(&ObjectKey::Fdb { dev, mac }) {
        Some(Object::Fdb(fdb)) => Ok(Way {
            dev,
            gateway,
            tunnel: Some((mac, fdb.remote)),
        }),
        _ => Err(format!("{mac} has no forwarding entry on {dev}")),
    }
}

/// The way through a packet path in userspace, which knows a peer by its very subnet.
fn datagrams(objects: &Objects, dev: IfName, subnet: Subnet) -> Result<Way, String> {
    if !objects.contains_key(&ObjectKey::Tunnel(dev)) {
        return Err(format!("no packet path runs on {dev}"));
    }
    match objects.get(&ObjectKey::TunnelPeer { dev, subnet }) {
        Some(Object::TunnelPeer(peer)) => Ok(Way {
            dev,
            gateway: peer.endpoint.ip(),
            tunnel: None,
        }),
        _ => Err(format!("the packet path on {dev} does not know {subnet}")),
    }
}

/// The device of a name.
pub fn link(objects: &Objects, dev: IfName) -> Option<&Link> {
    match objects.get(&ObjectKey::Link(dev)) {
        Some(Object::Link(link)) => Some(link),
        _ => None,
    }
}
