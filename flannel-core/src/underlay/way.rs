//! [`Way`]: a default route as far as it decides on interface and address.

use std::net::IpAddr;

use super::devices;
use crate::family::Family;
use crate::object::{IfName, Route, RouteTarget};

/// A default route as far as it decides on interface and address.
#[derive(Debug, Clone)]
pub(super) struct Way {
    /// The devices that it leads through; none if it does not say.
    pub(super) devs: Vec<IfName>,
    /// The routers on the way.
    pub(super) gateways: Vec<IpAddr>,
    /// The address that this host sends from.
    pub(super) source: Option<IpAddr>,
    /// Where it leads, in words.
    pub(super) text: String,
}

impl Way {
    /// The default routes of a family, the best first.
    pub(super) fn all(routes: &[Route], family: Family) -> Vec<Self> {
        let leads_out = |route: &&Route| match route.target {
            RouteTarget::Gateway { .. }
            | RouteTarget::Device(_)
            | RouteTarget::Paths(_)
            | RouteTarget::Nexthop(_) => route.dst.len() == 0 && route.dst.family() == family,
            RouteTarget::Blackhole | RouteTarget::Other(_) => false,
        };
        let mut defaults: Vec<&Route> = routes.iter().filter(leads_out).collect();
        defaults.sort_by_key(|route| route.metric);
        defaults.into_iter().map(Self::of).collect()
    }

    fn of(route: &Route) -> Self {
        let gateways = match &route.target {
            RouteTarget::Gateway { gateway, .. } => vec![*gateway],
            RouteTarget::Paths(paths) => paths.iter().filter_map(|path| path.gateway).collect(),
            RouteTarget::Device(_)
            | RouteTarget::Nexthop(_)
            | RouteTarget::Blackhole
            | RouteTarget::Other(_) => Vec::new(),
        };
        let mut devs: Vec<IfName> = Vec::new();
        for dev in devices(&route.target) {
            if !devs.contains(&dev) {
                devs.push(dev);
            }
        }
        Self {
            devs,
            gateways,
            source: route.source,
            text: route.target.to_string(),
        }
    }
}
