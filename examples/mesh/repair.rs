//! Breaking a node's kernel objects behind its back, and timing until they are right again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use flannel::{
    Family, Kernel, Link, NetlinkKernel, Object, ObjectKey, Objects, Op, OverlayName,
    RouteProtocol, Scope,
};
use serde::Serialize;

use crate::Error;
use crate::cluster::{Cluster, Node};

/// After this long an object counts as not repaired.
const LIMIT: Duration = Duration::from_secs(5);

/// What was broken and how long it stayed so.
#[derive(Debug, Serialize)]
pub(crate) struct Repair {
    pub(crate) node: String,
    pub(crate) object: String,
    pub(crate) action: &'static str,
    pub(crate) repaired_ms: Option<f64>,
}

/// Breaks one object of each kind that the backend uses on the first node, and its devices in more
/// ways.
pub(crate) async fn demonstrate(cluster: &Cluster) -> Result<Vec<Repair>, Error> {
    let node = &cluster.nodes[0];
    // A hand of its own in the node's namespace: the overlay learns of nothing but by itself.
    let hand = NetlinkKernel::in_namespace_fd(node.ns.fd().try_clone_to_owned()?)?;
    let scope = scope(&hand).await?;
    let right = ours(&hand, &scope).await?;
    let mut firsts: BTreeMap<(u8, bool), &Object> = BTreeMap::new();
    for (key, object) in &right {
        firsts.entry((key.rank(), is_v6(object))).or_insert(object);
    }
    let mut repairs = Vec::new();
    // From the top down: a device takes all that is on it along, so it comes last.
    for object in firsts.into_values().rev() {
        for (op, action) in breakages(object) {
            let repaired_ms = time(&hand, &scope, &right, &op).await?;
            repairs.push(Repair {
                node: node.name.clone(),
                object: object.key().to_string(),
                action,
                repaired_ms,
            });
            settle(node).await?;
        }
    }
    Ok(repairs)
}

/// Whether an object serves the IPv6 overlay.
fn is_v6(object: &Object) -> bool {
    match object {
        Object::Route(route) => route.dst.family() == Family::V6,
        Object::Nexthop(nexthop) => nexthop.gateway.is_ipv6(),
        other => other
            .dev()
            .is_some_and(|dev| dev.as_str().starts_with("flannel-v6")),
    }
}

/// The ways to break an object.
fn breakages(object: &Object) -> Vec<(Op, &'static str)> {
    match object {
        Object::Sysctl(sysctl) => {
            let mut other = sysctl.clone();
            other.value = if sysctl.value == "0" { "1" } else { "0" }.to_owned();
            vec![(Op::Change(Object::Sysctl(other)), "changed")]
        }
        Object::Offload(offload) => {
            let mut other = offload.clone();
            other.on = !offload.on;
            vec![(Op::Change(Object::Offload(other)), "changed")]
        }
        Object::Link(link) => {
            let mtu = link.mtu.map(|mtu| mtu - 100);
            vec![
                (
                    Op::Change(Object::Link(Link {
                        mtu,
                        ..link.clone()
                    })),
                    "mtu changed",
                ),
                (
                    Op::Change(Object::Link(Link {
                        up: false,
                        ..link.clone()
                    })),
                    "set down",
                ),
                (Op::Delete(object.clone()), "deleted"),
            ]
        }
        _ => vec![(Op::Delete(object.clone()), "deleted")],
    }
}

/// Breaks something and waits until all is right again.
async fn time(
    hand: &NetlinkKernel,
    scope: &Scope,
    right: &Objects,
    op: &Op,
) -> Result<Option<f64>, Error> {
    // Removing a device takes the kernel a while, and others see it gone before the call returns.
    let start = Instant::now();
    for result in hand.apply(std::slice::from_ref(op)).await {
        result?;
    }
    while start.elapsed() < LIMIT {
        let now = ours(hand, scope).await?;
        if right
            .iter()
            .all(|(key, object)| now.get(key) == Some(object))
        {
            return Ok(Some(start.elapsed().as_secs_f64() * 1000.0));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(None)
}

async fn settle(node: &Node) -> Result<(), Error> {
    tokio::time::timeout(LIMIT, node.overlay.converged())
        .await
        .map_or(Ok(()), |done| done)?;
    Ok(())
}

/// The overlay's devices and their settings.
async fn scope(hand: &NetlinkKernel) -> Result<Scope, Error> {
    let alias = OverlayName::default().link_alias();
    let mut scope = Scope::default();
    for object in hand.observe(&Scope::default()).await?.objects.into_values() {
        if let Object::Link(link) = object
            && link.alias.as_ref() == Some(&alias)
        {
            scope.devices.insert(link.name);
            scope.settings.insert(ObjectKey::Sysctl {
                dev: link.name,
                family: Family::V6,
                name: "accept_ra".to_owned(),
            });
        }
    }
    Ok(scope)
}

/// What bears the overlay's marks.
async fn ours(hand: &NetlinkKernel, scope: &Scope) -> Result<Objects, Error> {
    let mut objects = hand.observe(scope).await?.objects;
    objects.retain(|_, object| match object {
        Object::Route(route) => route.protocol == RouteProtocol::OURS,
        Object::Nexthop(nexthop) => nexthop.protocol == RouteProtocol::OURS,
        // The kernel gives IPv6 devices a link-local address of its own.
        Object::Address(address) => {
            scope.devices.contains(&address.dev)
                && !matches!(address.ip, std::net::IpAddr::V6(ip) if ip.is_unicast_link_local())
        }
        other => other.dev().is_some_and(|dev| scope.devices.contains(&dev)),
    });
    Ok(objects)
}
