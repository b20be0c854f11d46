//! The namespace that a promise is tested in, and the objects that it is tested with.

use std::collections::BTreeSet;
use std::fmt::{Debug, Display};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use flannel_core::kernel::Error;
use flannel_core::reconcile::plan::difference;
use flannel_core::{
    Address, DualStack, Family, Fdb, Features, IfName, Kernel, Link, LinkKind, MAIN_TABLE, MacAddr,
    Neighbour, Nexthop, Object, Objects, Observed, Offload, Op, Route, RouteProtocol, RouteTarget,
    Scope, Subnet, Sysctl, Tun, Tunnel, TunnelPeer, Vxlan,
};

use super::Outcome;

/// A namespace to test in, with nothing in it but what [`KernelFixture::prepare`] made.
#[derive(Debug, Clone)]
pub struct KernelFixture {
    /// The kernel under test.
    pub kernel: Arc<dyn Kernel>,
    /// A second handle on the same namespace, by which others make their changes.
    pub foreign: Arc<dyn Kernel>,
    /// A device that is up and has [`UNDERLAY_V4`] and, with IPv6, [`UNDERLAY_V6`].
    pub underlay: IfName,
    /// What the kernel under test can do: what it cannot is left out.
    pub features: Features,
}

/// The address of the underlay device and its length.
pub const UNDERLAY_V4: (&str, u8) = ("192.0.2.1", 24);
/// The IPv6 address of the underlay device and its length.
pub const UNDERLAY_V6: (&str, u8) = ("2001:db8::1", 64);

/// The name of the device that [`KernelFixture::prepare`] makes for an underlay.
///
/// # Panics
/// Never: it is a device name.
pub fn underlay() -> IfName {
    name("br-under")
}

/// The device that most promises are about.
const DEV: &str = "fl.conf4";
/// The same with an IPv6 underlay.
const DEV6: &str = "fl.conf6";
/// The TUN device.
const TUN: &str = "fl.tun0";

impl KernelFixture {
    /// Makes a bridge with addresses for an underlay, by the kernel under test, in a namespace
    /// that has none of these.
    ///
    /// # Errors
    /// What the kernel would not do.
    pub async fn prepare(
        kernel: Arc<dyn Kernel>,
        foreign: Arc<dyn Kernel>,
    ) -> Result<Self, String> {
        let features = kernel.features().await.map_err(text)?;
        let underlay = underlay();
        let fixture = Self {
            kernel,
            foreign,
            underlay,
            features,
        };
        let mut objects = vec![
            Object::Link(Link {
                mtu: Some(1500),
                ..link(underlay, LinkKind::Bridge)
            }),
            address(underlay, UNDERLAY_V4.0, UNDERLAY_V4.1),
        ];
        if fixture.features.ipv6 {
            objects.push(address(underlay, UNDERLAY_V6.0, UNDERLAY_V6.1));
        }
        fixture.make(&objects).await?;
        Ok(fixture)
    }

    /// Applies ops that must all succeed.
    pub(super) async fn apply(&self, ops: &[Op]) -> Outcome {
        all_ok("kernel", ops, self.kernel.apply(ops).await)
    }

    /// Applies an op by the other handle; it must succeed.
    pub(super) async fn by_others(&self, op: Op) -> Outcome {
        let ops = [op];
        all_ok("foreign kernel", &ops, self.foreign.apply(&ops).await)
    }

    /// Makes objects; settings are changed, all others created.
    pub(super) async fn make(&self, objects: &[Object]) -> Outcome {
        let ops: Vec<_> = objects.iter().cloned().map(making).collect();
        self.apply(&ops).await
    }

    /// Applies one op and returns its result.
    pub(super) async fn try_op(&self, op: Op) -> Result<Result<(), Error>, String> {
        let mut results = self.kernel.apply(std::slice::from_ref(&op)).await;
        match (results.pop(), results.is_empty()) {
            (Some(result), true) => Ok(result),
            _ => Err(format!("apply of one op answered another count: {op:?}")),
        }
    }

    /// Reads all that concerns the fixture's devices and these objects.
    pub(super) async fn observe(&self, about: &[Object]) -> Result<Observed, String> {
        let mut scope = Scope {
            devices: [self.underlay, name(DEV), name(DEV6)].into(),
            settings: BTreeSet::new(),
        };
        for object in about {
            scope.devices.extend(object.dev());
            if matches!(object, Object::Sysctl(_) | Object::Offload(_)) {
                scope.settings.insert(object.key());
            }
        }
        self.kernel.observe(&scope).await.map_err(text)
    }

    pub(super) async fn objects(&self) -> Result<Objects, String> {
        Ok(self.observe(&[]).await?.objects)
    }

    /// Checks that all of these objects are there and as asked.
    pub(super) async fn expect(&self, asked: &[Object]) -> Outcome {
        let observed = self.observe(asked).await?;
        for object in asked {
            let found = observed.objects.get(&object.key());
            let found = found.ok_or_else(|| format!("not there: {object}"))?;
            if let Some(difference) = difference(object, found) {
                return Err(format!("{}: {}", object.key(), difference.field));
            }
        }
        Ok(())
    }

    /// Checks that there is nothing under these keys.
    pub(super) async fn expect_none(&self, gone: &[Object]) -> Outcome {
        let observed = self.observe(gone).await?;
        match gone
            .iter()
            .find_map(|object| observed.objects.get(&object.key()))
        {
            Some(found) => Err(format!("still there: {found}")),
            None => Ok(()),
        }
    }

    /// The families that the namespace has.
    pub(super) fn families(&self) -> impl Iterator<Item = Family> + use<> {
        let ipv6 = self.features.ipv6;
        Family::ALL
            .into_iter()
            .filter(move |family| *family == Family::V4 || ipv6)
    }

    /// The name of the VXLAN device of a family, which most promises make.
    ///
    /// # Panics
    /// Never: it is a device name.
    pub fn overlay(family: Family) -> IfName {
        name(match family {
            Family::V4 => DEV,
            Family::V6 => DEV6,
        })
    }

    /// The VXLAN device of a family, up.
    pub(super) fn vxlan(&self, family: Family) -> Object {
        let (local, mtu) = match family {
            Family::V4 => (UNDERLAY_V4.0, 1450),
            Family::V6 => (UNDERLAY_V6.0, 1430),
        };
        Object::Link(Link {
            name: Self::overlay(family),
            kind: LinkKind::Vxlan(Vxlan {
                vni: 77,
                port: 8472,
                underlay: Some(self.underlay),
                local: Some(ip(local)),
                learning: false,
                gbp: false,
            }),
            mtu: Some(mtu),
            mac: Some(MacAddr([0x0e, 0, 0, 0, 0, 1])),
            up: true,
            alias: Some("flannel:conformance".to_owned()),
        })
    }

    /// The path to peer `n` of a family: address of the device, forwarding entry, neighbour,
    /// nexthop and the route through it, and one route through the gateway itself.
    pub(super) fn path(&self, family: Family, n: u8) -> Vec<Object> {
        let (dev, own, len, gateway, remote, dst, other) = match family {
            Family::V4 => (
                name(DEV),
                "10.77.1.0".to_owned(),
                32,
                format!("10.77.{n}.0"),
                format!("192.0.2.{n}"),
                format!("10.77.{n}.0/24"),
                format!("10.78.{n}.0/24"),
            ),
            Family::V6 => (
                name(DEV6),
                "fd77:1::".to_owned(),
                128,
                format!("fd77:{n:x}::"),
                format!("2001:db8::{n:x}"),
                format!("fd77:{n:x}::/64"),
                format!("fd78:{n:x}::/64"),
            ),
        };
        let mac = MacAddr([0x0e, 0, 0, 0, 1, n]);
        let id = 77_000 + u32::from(n) + if family == Family::V6 { 1000 } else { 0 };
        let mut path = vec![address(dev, &own, len)];
        let (remote, gateway) = (ip(&remote), ip(&gateway));
        path.push(Object::Fdb(Fdb { dev, mac, remote }));
        path.push(Object::Neighbour(Neighbour {
            dev,
            ip: gateway,
            mac,
        }));
        let by_gateway = RouteTarget::Gateway {
            gateway,
            dev,
            onlink: true,
        };
        if self.features.nexthops {
            path.push(Object::Nexthop(Nexthop {
                id,
                gateway,
                dev,
                onlink: true,
                protocol: RouteProtocol::OURS,
            }));
            path.push(route(&dst, RouteTarget::Nexthop(id)));
        }
        path.push(route(&other, by_gateway));
        path
    }

    /// A VXLAN device and one path of each family.
    pub(super) fn world(&self) -> Vec<Object> {
        self.families()
            .flat_map(|family| {
                let mut objects = vec![self.vxlan(family)];
                objects.extend(self.path(family, 2));
                objects
            })
            .collect()
    }

    /// The TUN device, up; none where the kernel makes none.
    pub(super) fn tun(&self) -> Option<Link> {
        let tun = Link {
            mtu: Some(1400),
            alias: Some("flannel:conformance".to_owned()),
            ..link(name(TUN), LinkKind::Tun(Tun::FOR_TUNNEL))
        };
        self.features.tun.then_some(tun)
    }

    /// The packet path on that device.
    pub(super) fn tunnel(&self) -> Tunnel {
        let mut tunnel = Tunnel {
            dev: name(TUN),
            listen: DualStack::default(),
            own: DualStack::default(),
            mtu: DualStack::default(),
        };
        for family in self.families() {
            let (local, own, mtu) = match family {
                Family::V4 => (UNDERLAY_V4.0, "10.87.1.0/24", 1472),
                Family::V6 => (UNDERLAY_V6.0, "fd87:1::/64", 1452),
            };
            let listen = SocketAddr::new(ip(local), 8285);
            tunnel.listen.set(family, Some(listen));
            tunnel.own.set(family, Some(subnet(own)));
            tunnel.mtu.set(family, Some(mtu));
        }
        tunnel
    }

    /// Peer `n` of the packet path with its route, in each family.
    pub(super) fn tunnel_peers(&self, n: u8) -> Vec<Object> {
        let dev = name(TUN);
        let mut objects = Vec::new();
        for family in self.families() {
            let (remote, dst) = match family {
                Family::V4 => (format!("192.0.2.{n}"), format!("10.87.{n}.0/24")),
                Family::V6 => (format!("2001:db8::{n:x}"), format!("fd87:{n:x}::/64")),
            };
            objects.push(Object::TunnelPeer(TunnelPeer {
                dev,
                subnet: subnet(&dst),
                endpoint: SocketAddr::new(ip(&remote), 8285),
            }));
            objects.push(route(&dst, RouteTarget::Device(dev)));
        }
        objects.sort_by_key(Object::key);
        objects
    }

    /// The TUN device, the packet path and one peer, as far as the kernel has them.
    pub(super) fn tunnel_world(&self) -> Vec<Object> {
        let mut objects: Vec<_> = self.tun().map(Object::Link).into_iter().collect();
        if self.features.tun && self.features.tunnels {
            objects.push(Object::Tunnel(Box::new(self.tunnel())));
            objects.extend(self.tunnel_peers(2));
        }
        objects
    }

    /// Objects of every kind that this kernel has, in an order in which they can be made.
    pub fn samples(&self) -> Vec<Object> {
        let veth = LinkKind::Veth {
            peer: Some(name("fl.vb")),
        };
        let mut objects = vec![
            Object::Link(link(name("fl.br"), LinkKind::Bridge)),
            Object::Link(Link {
                mtu: Some(1280),
                alias: Some("an alias with spaces".to_owned()),
                up: false,
                ..link(name("fl.va"), veth)
            }),
        ];
        objects.extend(self.world());
        if self.features.vxlan {
            objects.push(Object::Link(Link {
                up: false,
                ..link(
                    name("fl.learn"),
                    LinkKind::Vxlan(Vxlan {
                        vni: (1 << 24) - 1,
                        port: 4789,
                        underlay: None,
                        local: None,
                        learning: true,
                        gbp: true,
                    }),
                )
            }));
        }
        objects.extend(self.tunnel_world());
        for family in self.families() {
            let (dev, net, len, via, behind, straight, nowhere, setting) = match family {
                Family::V4 => (
                    name(DEV),
                    "10.79.0.1",
                    24,
                    "192.0.2.77",
                    "198.51.100.0/24",
                    "203.0.113.0/24",
                    "10.80.0.0/16",
                    "rp_filter",
                ),
                Family::V6 => (
                    name(DEV6),
                    "fd79::1",
                    64,
                    "2001:db8::77",
                    "fd80:1::/64",
                    "fd80:2::/64",
                    "fd80:3::/48",
                    "accept_ra",
                ),
            };
            if self.features.sysctls {
                objects.push(Object::Sysctl(Sysctl {
                    dev,
                    family,
                    name: setting.to_owned(),
                    value: "0".to_owned(),
                }));
                objects.push(Object::Sysctl(Sysctl {
                    dev,
                    family,
                    name: "forwarding".to_owned(),
                    value: "1".to_owned(),
                }));
            }
            if self.features.offloads {
                objects.push(Object::Offload(Offload {
                    dev,
                    feature: "tx-checksum-ip-generic".to_owned(),
                    on: family == Family::V6,
                }));
            }
            objects.push(address(dev, net, len));
            objects.push(route(
                behind,
                RouteTarget::Gateway {
                    gateway: ip(via),
                    dev: self.underlay,
                    onlink: false,
                },
            ));
            objects.push(route(straight, RouteTarget::Device(dev)));
            objects.push(route(nowhere, RouteTarget::Blackhole));
            if let Object::Route(with_metric) = route(straight, RouteTarget::Device(dev)) {
                objects.push(Object::Route(Route {
                    metric: 7777,
                    protocol: RouteProtocol(99),
                    ..with_metric
                }));
            }
        }
        objects.sort_by_key(Object::key);
        objects
    }
}

pub(super) fn all_ok(who: &str, ops: &[Op], results: Vec<Result<(), Error>>) -> Outcome {
    if results.len() != ops.len() {
        return Err(format!(
            "{who}: {} results for {} ops",
            results.len(),
            ops.len()
        ));
    }
    match ops.iter().zip(results).find(|(_, result)| result.is_err()) {
        Some((op, result)) => Err(format!("{who}: {} {}: {result:?}", op.verb(), op.object())),
        None => Ok(()),
    }
}

/// The op that makes an object: settings are there already.
pub(super) fn making(object: Object) -> Op {
    match object {
        Object::Sysctl(_) | Object::Offload(_) => Op::Change(object),
        _ => Op::Create(object),
    }
}

pub(super) fn same<T: PartialEq + Debug>(what: &str, before: &T, after: &T) -> Outcome {
    if before == after {
        Ok(())
    } else {
        Err(format!("the {what} was {before:?} and is {after:?}"))
    }
}

pub(super) fn text(error: impl Display) -> String {
    error.to_string()
}

pub(super) fn name(name: &str) -> IfName {
    IfName::new(name).expect("the names of this suite are device names")
}

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse()
        .expect("the addresses of this suite are addresses")
}

pub(super) fn subnet(text: &str) -> Subnet {
    text.parse().expect("the subnets of this suite are subnets")
}

pub(super) fn link(name: IfName, kind: LinkKind) -> Link {
    Link {
        name,
        kind,
        mtu: None,
        mac: None,
        up: true,
        alias: None,
    }
}

pub(super) fn address(dev: IfName, ip: &str, prefix_len: u8) -> Object {
    Object::Address(Address {
        dev,
        ip: self::ip(ip),
        prefix_len,
    })
}

pub(super) fn route(dst: &str, target: RouteTarget) -> Object {
    let dst = subnet(dst);
    Object::Route(Route {
        table: MAIN_TABLE,
        dst,
        metric: Route::default_metric(dst.family()),
        target,
        protocol: RouteProtocol::OURS,
        source: None,
    })
}
