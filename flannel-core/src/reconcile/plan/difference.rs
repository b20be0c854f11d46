//! [`difference`]: whether an object that is there is as it was asked for.

use std::fmt::Display;
use std::net::IpAddr;

use crate::family::{DualStack, Family};
use crate::object::{Link, LinkKind, Object, Vxlan};

/// How an object that is there differs from what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The first field that differs, with what it is and what it should be.
    pub field: String,
    /// Whether the kernel can change it in place; else the object must be removed and made anew.
    pub in_place: bool,
}

/// The first difference between what was asked for and what is there; `None`: it is as asked.
///
/// Looks only at what the asked object says: the MTU, hardware address and alias of a device that
/// leaves them open are right whatever they are. Settings are compared without white space at the
/// ends. Both must have the same key.
pub fn difference(asked: &Object, found: &Object) -> Option<Difference> {
    let mut fields = Fields(None);
    match (asked, found) {
        (Object::Link(asked), Object::Link(found)) => link_difference(asked, found, &mut fields),
        (Object::Sysctl(asked), Object::Sysctl(found)) => {
            fields.compare("value", asked.value.trim(), found.value.trim());
        }
        (Object::Offload(asked), Object::Offload(found)) => {
            fields.compare("on", &asked.on, &found.on);
        }
        (Object::Address(_), Object::Address(_)) => {}
        (Object::Tunnel(asked), Object::Tunnel(found)) => {
            fields.per_family("listen", &asked.listen, &found.listen);
            fields.per_family("own", &asked.own, &found.own);
            fields.per_family("mtu", &asked.mtu, &found.mtu);
        }
        (Object::TunnelPeer(asked), Object::TunnelPeer(found)) => {
            fields.compare("endpoint", &asked.endpoint, &found.endpoint);
        }
        (Object::Fdb(asked), Object::Fdb(found)) => {
            fields.compare("remote", &asked.remote, &found.remote);
        }
        (Object::Neighbour(asked), Object::Neighbour(found)) => {
            fields.compare("mac", &asked.mac, &found.mac);
        }
        (Object::Nexthop(asked), Object::Nexthop(found)) => {
            fields.compare("gateway", &asked.gateway, &found.gateway);
            fields.compare("dev", &asked.dev, &found.dev);
            fields.compare("onlink", &asked.onlink, &found.onlink);
            fields.compare("protocol", &asked.protocol.0, &found.protocol.0);
        }
        (Object::Route(asked), Object::Route(found)) => {
            fields.compare("target", &asked.target, &found.target);
            fields.compare("protocol", &asked.protocol.0, &found.protocol.0);
            let (asked, found) = (asked.source.as_ref(), found.source.as_ref());
            fields.compare("source", &named(asked), &named(found));
        }
        _ => fields.add("key", asked.key(), found.key(), false),
    }
    fields.0
}

fn link_difference(asked: &Link, found: &Link, fields: &mut Fields) {
    match (&asked.kind, &found.kind) {
        (LinkKind::Vxlan(asked), LinkKind::Vxlan(found)) => {
            fields.fixed("vni", &asked.vni, &found.vni);
            fields.fixed("port", &asked.port, &found.port);
            if asked.underlay.is_none() {
                // The kernel keeps a device that it was bound to.
                fields.fixed("underlay", "none", &named(found.underlay.as_ref()));
            }
            fields.fixed("gbp", &asked.gbp, &found.gbp);
            fields.fixed("family", &vxlan_family(asked), &vxlan_family(found));
            fields.compare(
                "underlay",
                &named(asked.underlay.as_ref()),
                &named(found.underlay.as_ref()),
            );
            fields.compare(
                "local",
                &named(asked.local.as_ref()),
                &named(found.local.as_ref()),
            );
            fields.compare("learning", &asked.learning, &found.learning);
        }
        (LinkKind::Tun(asked), LinkKind::Tun(found)) if asked.is_like(*found) => {
            if let Some(queue) = &asked.queue {
                fields.compare("queue", &named(Some(queue)), &named(found.queue.as_ref()));
            }
        }
        (LinkKind::Tun(asked), LinkKind::Tun(found)) => fields.fixed("kind", asked, found),
        (LinkKind::Veth { peer: None }, LinkKind::Veth { .. }) => {}
        (asked, found) if asked == found => {}
        _ => fields.add(
            "kind",
            kind_name(&asked.kind),
            kind_name(&found.kind),
            false,
        ),
    }
    if let Some(mac) = &asked.mac {
        fields.compare("mac", &named(Some(mac)), &named(found.mac.as_ref()));
    }
    if let Some(mtu) = &asked.mtu {
        fields.compare("mtu", &named(Some(mtu)), &named(found.mtu.as_ref()));
    }
    if let Some(alias) = &asked.alias {
        fields.compare("alias", &named(Some(alias)), &named(found.alias.as_ref()));
    }
    fields.compare("up", &asked.up, &found.up);
}

/// The family of a VXLAN device's outer packets. The kernel takes IPv4 where no local address
/// says otherwise, and lets two devices share VNI and port if their families differ.
pub(crate) const fn vxlan_family(vxlan: &Vxlan) -> Family {
    match vxlan.local {
        Some(IpAddr::V6(_)) => Family::V6,
        _ => Family::V4,
    }
}

fn kind_name(kind: &LinkKind) -> &str {
    match kind {
        LinkKind::Vxlan(_) => "vxlan",
        LinkKind::Bridge => "bridge",
        LinkKind::Veth { .. } => "veth",
        LinkKind::Tun(_) => "tun",
        LinkKind::Loopback => "loopback",
        LinkKind::Other(kind) => kind,
    }
}

fn named(value: Option<&impl Display>) -> String {
    value.map_or_else(|| "none".to_owned(), ToString::to_string)
}

/// Collects the first field that differs. Fields that cannot change in place are compared first.
struct Fields(Option<Difference>);

impl Fields {
    /// Compares a field that can be changed in place.
    fn compare<T: PartialEq + Display + ?Sized>(&mut self, name: &str, asked: &T, found: &T) {
        if asked != found {
            self.add(name, asked, found, true);
        }
    }

    /// Compares a field that cannot.
    fn fixed<T: PartialEq + Display + ?Sized>(&mut self, name: &str, asked: &T, found: &T) {
        if asked != found {
            self.add(name, asked, found, false);
        }
    }

    /// Compares what there may be once per family.
    fn per_family<T: PartialEq + Display>(
        &mut self,
        name: &str,
        asked: &DualStack<T>,
        found: &DualStack<T>,
    ) {
        for family in Family::ALL {
            let (asked, found) = (named(asked.get(family)), named(found.get(family)));
            self.compare(&format!("{name} of {family}"), &asked, &found);
        }
    }

    fn add(&mut self, name: &str, asked: impl Display, found: impl Display, in_place: bool) {
        if self.0.is_none() {
            self.0 = Some(Difference {
                field: format!("{name} is {found}, should be {asked}"),
                in_place,
            });
        }
    }
}
