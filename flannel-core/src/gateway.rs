//! [`Gateways`]: the routes of peers' subnets through gateways, in the form that suits the kernel.

use std::net::IpAddr;

use crate::backend::{NodeContext, Note, Rejection};
use crate::family::Family;
use crate::node::OverlayName;
use crate::object::{IfName, MAIN_TABLE, Nexthop, Object, Route, RouteProtocol, RouteTarget};
use crate::reconcile::ownership::nexthop_id;
use crate::subnet::Subnet;
use crate::underlay::{Reach, Underlay};

/// How a backend routes peers' subnets through gateways: through nexthop objects where the kernel
/// has them, else by gateways of the routes' own.
///
/// The kernel inserts routes with gateways of their own in quadratic time, those through nexthop
/// objects in linear time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateways {
    overlay: OverlayName,
    nexthops: bool,
}

/// The next node on the way to a subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// Its address.
    pub gateway: IpAddr,
    /// The device it is behind.
    pub dev: IfName,
    /// Take it as reachable on the device whatever the addresses say.
    pub onlink: bool,
}

impl Gateways {
    /// The form for a node; `nexthops`: whether nexthop objects may be used. Where they are not,
    /// the note says why.
    pub fn new(cx: &NodeContext<'_>, nexthops: bool) -> (Self, Option<Note>) {
        let gateways = Self {
            overlay: cx.overlay.clone(),
            nexthops: cx.features.nexthops && nexthops,
        };
        let text = if !nexthops {
            "not used: switched off by the host program"
        } else if !cx.features.nexthops {
            "not used: the kernel has none (they came with Linux 5.3)"
        } else {
            return (gateways, None);
        };
        let note = Note {
            topic: "nexthops".to_owned(),
            text: text.to_owned(),
        };
        (gateways, Some(note))
    }

    /// The objects that lead to a subnet: a route, and the nexthop object where these are used.
    pub fn route(&self, dst: Subnet, hop: Hop) -> Vec<Object> {
        let Hop {
            gateway,
            dev,
            onlink,
        } = hop;
        let mut objects = Vec::with_capacity(2);
        let target = if self.nexthops {
            let id = nexthop_id(&self.overlay, gateway, dev, onlink);
            let protocol = RouteProtocol::UNSPEC;
            objects.push(Object::Nexthop(Nexthop {
                id,
                gateway,
                dev,
                onlink,
                protocol,
            }));
            RouteTarget::Nexthop(id)
        } else {
            RouteTarget::Gateway {
                gateway,
                dev,
                onlink,
            }
        };
        objects.push(Object::Route(Route {
            table: MAIN_TABLE,
            dst,
            metric: Route::default_metric(dst.family()),
            target,
            protocol: RouteProtocol::UNSPEC,
            source: None,
        }));
        objects
    }

    /// The objects that lead to a subnet straight through its node's public address, without a
    /// tunnel. The other node needs nothing for it: to forward what arrives is all it has to do.
    ///
    /// # Errors
    /// [`Rejection::NotOnLink`] if there is a router in between or no way at all. That another host
    /// can have the address has been found before ([`HostAddresses`](crate::HostAddresses)).
    pub fn direct(
        &self,
        underlay: &Underlay,
        dst: Subnet,
        public_ip: Option<IpAddr>,
    ) -> Result<Vec<Object>, Rejection> {
        let gateway = public_ip.ok_or_else(|| no_public_ip(dst.family()))?;
        let not_on_link = |reason: String| Rejection::NotOnLink {
            public_ip: gateway.to_string(),
            reason,
        };
        match underlay.reach(gateway) {
            Reach::OnLink(dev) => Ok(self.route(
                dst,
                Hop {
                    gateway,
                    dev,
                    onlink: false,
                },
            )),
            Reach::Router(router) => Err(not_on_link(format!("{router} is the way to it"))),
            Reach::None => Err(not_on_link("no route leads to it".to_owned())),
        }
    }
}

/// A peer names no address of the family that carries its subnet.
pub fn no_public_ip(family: Family) -> Rejection {
    Rejection::PublicIp {
        found: "missing".to_owned(),
        reason: format!("the {family} overlay is carried over {family}"),
    }
}
