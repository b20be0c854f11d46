//! What Linux refuses of objects that are on a device.

use std::net::{IpAddr, Ipv6Addr};

use flannel_core::kernel::{Error, Result};
use flannel_core::{
    Address, Family, IfName, LinkKind, MAIN_TABLE, Object, ObjectKey, Route, RouteTarget, Subnet,
    Tun,
};

use super::{AFTER_NEXTHOPS, Host, links, rejected};

impl Host {
    /// Whether an object that is no link and no setting is one that could be made now.
    pub(super) fn check(&self, object: &Object, any_kind: bool) -> Result<()> {
        match object {
            Object::Address(address) => {
                self.need_device(address.dev)?;
                let is_hosts = match address.ip {
                    // Linux takes any.
                    IpAddr::V4(_) => true,
                    IpAddr::V6(ip) => !ip.is_unspecified() && !ip.is_multicast(),
                };
                if Subnet::new(address.ip, address.prefix_len).is_err() || !is_hosts {
                    return Err(rejected("no such address can be had", object));
                }
                let has_other_length = |other: &Address| {
                    other.ip == address.ip && other.prefix_len != address.prefix_len
                };
                if address.ip.is_ipv6() && self.addresses_of(address.dev).any(has_other_length) {
                    return Err(Error::Exists {
                        message: "ipv6: address already assigned".to_owned(),
                    });
                }
            }
            Object::Tunnel(tunnel) => {
                self.need_device(tunnel.dev)?;
                let fits = self.link(tunnel.dev).is_some_and(
                    |link| matches!(link.kind, LinkKind::Tun(tun) if tun.is_like(Tun::FOR_TUNNEL)),
                );
                if !fits {
                    return Err(rejected("no TUN device that a packet path takes", object));
                }
                if let Some(fault) = tunnel.fault() {
                    return Err(rejected(fault, object));
                }
            }
            Object::TunnelPeer(peer) => {
                let key = ObjectKey::Tunnel(peer.dev);
                let Some(Object::Tunnel(tunnel)) = self.objects.get(&key) else {
                    return Err(Error::NotFound {
                        message: key.to_string(),
                    });
                };
                if let Some(fault) = tunnel.fault_of(peer) {
                    return Err(rejected(fault, object));
                }
            }
            Object::Fdb(fdb) => {
                self.need_device(fdb.dev)?;
                let family = self.link(fdb.dev).and_then(|link| match &link.kind {
                    LinkKind::Vxlan(vxlan) => Some(links::vxlan_family(vxlan)),
                    _ => None,
                });
                if family != Some(Family::of(&fdb.remote)) {
                    return Err(Error::Unsupported {
                        what: format!("{object}: no such remote on this device"),
                    });
                }
                if !fdb.mac.is_unicast() {
                    return Err(rejected("no unicast hardware address", object));
                }
            }
            Object::Neighbour(neighbour) => self.need_device(neighbour.dev)?,
            Object::Nexthop(nexthop) => {
                if nexthop.id == 0 {
                    return Err(rejected("the number must not be zero", object));
                }
                self.check_gateway(nexthop.gateway, nexthop.dev, nexthop.onlink, object)?;
            }
            Object::Route(route) => self.check_route(route, object, any_kind)?,
            _ => {
                return Err(Error::Unsupported {
                    what: object.key().kind().to_owned(),
                });
            }
        }
        Ok(())
    }

    fn check_route(&self, route: &Route, object: &Object, any_kind: bool) -> Result<()> {
        match &route.target {
            RouteTarget::Gateway {
                gateway,
                dev,
                onlink,
            } => {
                // IPv4 goes through IPv6 gateways, but not the other way round.
                if gateway.is_ipv4() && route.dst.family() == Family::V6 {
                    return Err(rejected("IPv6 routes cannot use an IPv4 gateway", object));
                }
                self.check_gateway(*gateway, *dev, *onlink, object)
            }
            RouteTarget::Nexthop(id) => match self.objects.get(&ObjectKey::Nexthop(*id)) {
                Some(Object::Nexthop(nexthop))
                    if route.dst.family() == Family::V6
                        && Family::of(&nexthop.gateway) == Family::V4 =>
                {
                    Err(rejected("IPv6 routes cannot use an IPv4 nexthop", object))
                }
                Some(_) => Ok(()),
                None => Err(rejected("nexthop id does not exist", object)),
            },
            RouteTarget::Device(dev) => self.need_up(*dev, object),
            RouteTarget::Blackhole => Ok(()),
            _ if any_kind => Ok(()),
            other => Err(Error::Unsupported {
                what: format!("routes to {other:?}"),
            }),
        }
    }

    fn check_gateway(
        &self,
        gateway: IpAddr,
        dev: IfName,
        onlink: bool,
        object: &Object,
    ) -> Result<()> {
        self.need_up(dev, object)?;
        let is_own = self
            .objects
            .values()
            .any(|o| matches!(o, Object::Address(address) if address.ip == gateway));
        if gateway.is_multicast() || gateway.is_unspecified() || is_own {
            return Err(rejected("nexthop has invalid gateway", object));
        }
        let link_local = matches!(gateway, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let connected = || {
            self.addresses_of(dev).any(|a| {
                a.ip != gateway
                    && Subnet::new(a.ip, a.prefix_len).is_ok_and(|net| net.contains_ip(gateway))
            }) || self.objects.range(AFTER_NEXTHOPS..).any(|(_, o)| {
                matches!(o, Object::Route(Route { dst, target: RouteTarget::Device(d), .. })
                    if *d == dev && dst.contains_ip(gateway))
            })
        };
        let fits = match gateway {
            _ if link_local => true,
            IpAddr::V6(ip) if onlink => !self.is_routed_elsewhere(ip, dev),
            _ => onlink || connected(),
        };
        if fits {
            Ok(())
        } else {
            Err(rejected(
                "nexthop has invalid gateway or device mismatch",
                object,
            ))
        }
    }

    /// Whether the main table has a better route to an address than a default one, and that goes
    /// through another device: then IPv6 does not take the address for on-link.
    fn is_routed_elsewhere(&self, ip: Ipv6Addr, dev: IfName) -> bool {
        let best = (1..=128).rev().find_map(|len| {
            let dst = Subnet::new(ip, len).ok()?;
            let key = |metric| ObjectKey::Route {
                table: MAIN_TABLE,
                dst,
                metric,
            };
            let (_, route) = self.objects.range(key(0)..=key(u32::MAX)).next()?;
            Some((dst, route))
        });
        let Some((dst, Object::Route(route))) = best else {
            return false;
        };
        let through = match &route.target {
            RouteTarget::Nexthop(id) => self
                .objects
                .get(&ObjectKey::Nexthop(*id))
                .and_then(Object::dev),
            RouteTarget::Gateway { dev, .. } | RouteTarget::Device(dev) => Some(*dev),
            _ => None,
        };
        !dst.address().is_unspecified() && through.is_some_and(|through| through != dev)
    }
}
