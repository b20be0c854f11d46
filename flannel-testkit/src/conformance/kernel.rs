//! What every [`Kernel`] promises, and the rules of Linux on which the planner relies.
//!
//! The suite runs on the fake kernel and on the real one: the first shows that a test on the fake
//! says something about Linux, the second that the codec does what the trait says. Each promise is
//! a function on a fresh [`KernelFixture`]; [`PROMISES`] lists them, [`all`] runs them and
//! [`kernel_conformance!`](crate::kernel_conformance!) makes a test of each.

use std::collections::BTreeSet;
use std::fmt::{Debug, Display};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::kernel::Error;
use flannel_core::reconcile::plan::difference;
use flannel_core::{
    Address, Change, ChangeStream, Family, Fdb, Features, IfName, Kernel, Link, LinkKind,
    MAIN_TABLE, MacAddr, Neighbour, Nexthop, Object, ObjectKey, Objects, Observed, Offload, Op,
    Route, RouteProtocol, RouteTarget, Scope, Subnet, Sysctl, Vxlan,
};

/// The outcome of a promise; the text says what was found instead.
pub type Outcome = Result<(), String>;

/// A promise: a function on a fresh fixture.
pub type Promise =
    for<'a> fn(&'a KernelFixture) -> Pin<Box<dyn Future<Output = Outcome> + Send + 'a>>;

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

/// The device that most promises are about.
const DEV: &str = "fl.conf4";
/// The same with an IPv6 underlay.
const DEV6: &str = "fl.conf6";

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
        let underlay = name("br-under");
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
    async fn apply(&self, ops: &[Op]) -> Outcome {
        all_ok("kernel", ops, self.kernel.apply(ops).await)
    }

    /// Applies an op by the other handle; it must succeed.
    async fn by_others(&self, op: Op) -> Outcome {
        let ops = [op];
        all_ok("foreign kernel", &ops, self.foreign.apply(&ops).await)
    }

    /// Makes objects; settings are changed, all others created.
    async fn make(&self, objects: &[Object]) -> Outcome {
        let ops: Vec<_> = objects.iter().cloned().map(making).collect();
        self.apply(&ops).await
    }

    /// Applies one op and returns its result.
    async fn try_op(&self, op: Op) -> Result<Result<(), Error>, String> {
        let mut results = self.kernel.apply(std::slice::from_ref(&op)).await;
        match (results.pop(), results.is_empty()) {
            (Some(result), true) => Ok(result),
            _ => Err(format!("apply of one op answered another count: {op:?}")),
        }
    }

    /// Reads all that concerns the fixture's devices and these objects.
    async fn observe(&self, about: &[Object]) -> Result<Observed, String> {
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

    async fn objects(&self) -> Result<Objects, String> {
        Ok(self.observe(&[]).await?.objects)
    }

    /// Checks that all of these objects are there and as asked.
    async fn expect(&self, asked: &[Object]) -> Outcome {
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
    async fn expect_none(&self, gone: &[Object]) -> Outcome {
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
    fn families(&self) -> impl Iterator<Item = Family> + use<> {
        let ipv6 = self.features.ipv6;
        Family::ALL
            .into_iter()
            .filter(move |family| *family == Family::V4 || ipv6)
    }

    /// The name of the VXLAN device of a family.
    fn dev(family: Family) -> IfName {
        name(match family {
            Family::V4 => DEV,
            Family::V6 => DEV6,
        })
    }

    /// The VXLAN device of a family, up.
    fn vxlan(&self, family: Family) -> Object {
        let (local, mtu) = match family {
            Family::V4 => (UNDERLAY_V4.0, 1450),
            Family::V6 => (UNDERLAY_V6.0, 1430),
        };
        Object::Link(Link {
            name: Self::dev(family),
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
    fn path(&self, family: Family, n: u8) -> Vec<Object> {
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
    fn world(&self) -> Vec<Object> {
        self.families()
            .flat_map(|family| {
                let mut objects = vec![self.vxlan(family)];
                objects.extend(self.path(family, 2));
                objects
            })
            .collect()
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

/// Makes a test of every promise of [`conformance::kernel`](crate::conformance::kernel).
///
/// Takes a function `fn(Promise)` that makes a fixture, runs the promise on it and panics if it is
/// broken.
#[macro_export]
macro_rules! kernel_conformance {
    (@list $($form:tt)*) => {
        $crate::kernel_conformance! { @as $($form)*;
            apply_then_observe_returns_what_was_asked
            create_never_overwrites
            create_is_idempotent
            delete_is_idempotent
            delete_spares_what_is_not_meant
            change_keeps_dependants
            change_moves_a_route_between_gateway_and_nexthop
            what_cannot_change_in_place_is_unsupported
            one_bad_op_does_not_stop_the_others
            a_missing_device_is_named
            observe_shows_foreign_objects
            observe_is_complete
            observing_a_missing_device_is_no_error
            probing_changes_nothing
            foreign_changes_are_hinted
            link_down_drops_routes_and_neighbours
            deleting_a_link_drops_what_is_on_it
            deleting_an_underlay_deletes_what_is_bound_to_it
            an_underlay_down_spares_the_overlay
            deleting_a_nexthop_drops_its_routes
            a_new_mac_drops_neighbours
            the_last_ipv4_address_takes_routes_along
            two_vxlan_devices_cannot_share_vni_and_port
            an_ipv6_address_has_one_length
            routes_need_a_device_that_is_up
            a_gateway_must_be_reachable
            an_on_link_gateway_must_not_be_routed_elsewhere
        }
    };
    (@as tests $run:path; $($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                $run(|fixture| Box::pin($crate::conformance::kernel::$name(fixture)));
            }
        )*
    };
    (@as table; $($name:ident)*) => {
        &[$((stringify!($name), |fixture| Box::pin($crate::conformance::kernel::$name(fixture)))),*]
    };
    ($run:path) => {
        $crate::kernel_conformance! { @list tests $run }
    };
}

/// Every promise with its name, which is that of the function.
pub const PROMISES: &[(&str, Promise)] = kernel_conformance!(@list table);

/// Runs every promise on a fixture of its own and returns its name with the outcome, in order.
pub async fn all<F, Fut>(fixture: F) -> Vec<(&'static str, Outcome)>
where
    F: Fn() -> Fut + Send + Sync,
    Fut: Future<Output = Result<KernelFixture, String>> + Send,
{
    let mut outcomes = Vec::with_capacity(PROMISES.len());
    for (name, promise) in PROMISES {
        let outcome = match fixture().await {
            Ok(fixture) => promise(&fixture).await,
            Err(reason) => Err(format!("no fixture: {reason}")),
        };
        outcomes.push((*name, outcome));
    }
    outcomes
}

/// What was asked for is there when it is read, for an object of every kind, and gone when removed.
pub async fn apply_then_observe_returns_what_was_asked(fixture: &KernelFixture) -> Outcome {
    returns_what_was_asked(fixture, &fixture.samples()).await
}

/// What was asked for is there when it is read, for objects of any choice: they must be fit to be
/// made in the order of their keys on a fixture that has none of them. Removes them again.
///
/// # Errors
/// What was found instead.
pub async fn returns_what_was_asked(fixture: &KernelFixture, objects: &[Object]) -> Outcome {
    let mut objects = objects.to_vec();
    objects.sort_by_key(Object::key);
    fixture.make(&objects).await?;
    fixture.expect(&objects).await?;
    objects.retain(|object| !matches!(object, Object::Sysctl(_) | Object::Offload(_)));
    let observed = fixture.observe(&objects).await?;
    let deletes: Vec<_> = objects
        .iter()
        .rev()
        .filter_map(|object| observed.objects.get(&object.key()).cloned())
        .map(Op::Delete)
        .collect();
    fixture.apply(&deletes).await?;
    fixture.expect_none(&objects).await
}

/// A create never takes the place of something else, whoever made that.
pub async fn create_never_overwrites(fixture: &KernelFixture) -> Outcome {
    let there = fixture.world();
    fixture.make(&there).await?;
    for object in &there {
        let other = match object.clone() {
            Object::Link(mut o) => {
                if let LinkKind::Vxlan(vxlan) = &mut o.kind {
                    vxlan.vni += 1;
                }
                Object::Link(o)
            }
            Object::Fdb(mut o) => {
                o.remote = match o.remote {
                    IpAddr::V4(_) => IpAddr::from([192, 0, 2, 99]),
                    IpAddr::V6(_) => ip("2001:db8::99"),
                };
                Object::Fdb(o)
            }
            Object::Neighbour(mut o) => {
                o.mac = MacAddr([0x0e, 9, 9, 9, 9, 9]);
                Object::Neighbour(o)
            }
            Object::Nexthop(mut o) => {
                o.protocol = RouteProtocol(99);
                Object::Nexthop(o)
            }
            Object::Route(mut o) => {
                o.protocol = RouteProtocol(99);
                Object::Route(o)
            }
            _ => continue,
        };
        match fixture.try_op(Op::Create(other.clone())).await? {
            Err(Error::Exists { .. }) => {}
            result => return Err(format!("create {other} over {object}: {result:?}")),
        }
    }
    fixture.expect(&there).await
}

/// A create of what is there already is success and changes nothing.
pub async fn create_is_idempotent(fixture: &KernelFixture) -> Outcome {
    let objects = fixture.world();
    fixture.make(&objects).await?;
    let before = fixture.objects().await?;
    fixture.make(&objects).await?;
    same("state", &before, &fixture.objects().await?)
}

/// A delete of what is gone already is success.
pub async fn delete_is_idempotent(fixture: &KernelFixture) -> Outcome {
    let mut objects = fixture.world();
    fixture.make(&objects).await?;
    objects.reverse();
    let deletes: Vec<_> = objects.iter().cloned().map(Op::Delete).collect();
    fixture.apply(&deletes).await?;
    fixture.apply(&deletes).await?;
    fixture.expect_none(&objects).await
}

/// A delete spares what has another owner: protocol of a route or nexthop, alias of a device.
pub async fn delete_spares_what_is_not_meant(fixture: &KernelFixture) -> Outcome {
    let there = fixture.world();
    fixture.make(&there).await?;
    for object in &there {
        let meant = match object.clone() {
            Object::Link(o) => Object::Link(Link {
                alias: Some("flannel:another".to_owned()),
                ..o
            }),
            Object::Nexthop(o) => Object::Nexthop(Nexthop {
                protocol: RouteProtocol(99),
                ..o
            }),
            Object::Route(o) => Object::Route(Route {
                protocol: RouteProtocol(99),
                ..o
            }),
            _ => continue,
        };
        fixture.apply(&[Op::Delete(meant)]).await?;
    }
    fixture.expect(&there).await
}

/// A change alters in place: routes, neighbours and forwarding entries stay.
pub async fn change_keeps_dependants(fixture: &KernelFixture) -> Outcome {
    let mut objects = fixture.world();
    fixture.make(&objects).await?;
    for at in 0..objects.len() {
        let Some(object) = objects.get_mut(at) else {
            continue;
        };
        match object {
            Object::Link(o) => {
                o.mtu = Some(1400);
                o.alias = Some("flannel:renamed".to_owned());
                if let LinkKind::Vxlan(vxlan) = &mut o.kind {
                    vxlan.learning = true;
                    vxlan.local = Some(match vxlan.local {
                        Some(IpAddr::V6(_)) => ip("2001:db8::2"),
                        _ => ip("192.0.2.2"),
                    });
                }
            }
            Object::Fdb(o) => {
                o.remote = match o.remote {
                    IpAddr::V4(_) => IpAddr::from([192, 0, 2, 99]),
                    IpAddr::V6(_) => ip("2001:db8::99"),
                };
            }
            Object::Neighbour(o) => o.mac = MacAddr([0x0e, 0, 0, 0, 0, 0x99]),
            Object::Nexthop(o) => {
                o.gateway = match o.gateway {
                    IpAddr::V4(_) => IpAddr::from([10, 77, 99, 0]),
                    IpAddr::V6(_) => ip("fd77:99::"),
                };
            }
            Object::Route(o) => o.protocol = RouteProtocol(99),
            _ => continue,
        }
        let change = Op::Change(object.clone());
        fixture.apply(&[change]).await?;
        fixture.expect(&objects).await?;
    }
    Ok(())
}

/// A route goes from a gateway to a nexthop object and back in place.
pub async fn change_moves_a_route_between_gateway_and_nexthop(fixture: &KernelFixture) -> Outcome {
    if !fixture.features.nexthops {
        return Ok(());
    }
    let objects = fixture.world();
    fixture.make(&objects).await?;
    for family in fixture.families() {
        for object in fixture.path(family, 2) {
            let Object::Route(route) = object else {
                continue;
            };
            let other = fixture
                .path(family, 2)
                .into_iter()
                .filter_map(|object| match object {
                    Object::Route(other) => Some(other.target),
                    _ => None,
                })
                .find(|target| *target != route.target);
            let Some(target) = other else { continue };
            let moved = Object::Route(Route {
                target,
                ..route.clone()
            });
            let back = Object::Route(route);
            fixture.apply(&[Op::Change(moved.clone())]).await?;
            fixture.expect(&[moved]).await?;
            fixture.apply(&[Op::Change(back.clone())]).await?;
            fixture.expect(&[back]).await?;
        }
    }
    Ok(())
}

/// What cannot be changed in place is said to be so, and stays as it is.
pub async fn what_cannot_change_in_place_is_unsupported(fixture: &KernelFixture) -> Outcome {
    let device = fixture.vxlan(Family::V4);
    fixture.make(std::slice::from_ref(&device)).await?;
    let Object::Link(Link {
        kind: LinkKind::Vxlan(is),
        ..
    }) = &device
    else {
        return Ok(());
    };
    let others = [
        Vxlan {
            vni: is.vni + 1,
            ..is.clone()
        },
        Vxlan {
            port: is.port + 1,
            ..is.clone()
        },
        Vxlan {
            gbp: !is.gbp,
            ..is.clone()
        },
    ];
    for vxlan in others {
        let Object::Link(link) = device.clone() else {
            continue;
        };
        let other = Object::Link(Link {
            kind: LinkKind::Vxlan(vxlan),
            ..link
        });
        match fixture.try_op(Op::Change(other.clone())).await? {
            Err(Error::Unsupported { .. }) => {}
            result => return Err(format!("change to {other}: {result:?}")),
        }
    }
    fixture.expect(&[device]).await
}

/// A bad op does not stop those that do not need it; there is one result per op, in order.
pub async fn one_bad_op_does_not_stop_the_others(fixture: &KernelFixture) -> Outcome {
    let mut good = vec![fixture.vxlan(Family::V4)];
    good.extend(fixture.path(Family::V4, 2));
    good.extend(fixture.path(Family::V4, 3).into_iter().skip(1));
    let nowhere = name("fl.nowhere");
    let bad = |n: u8| {
        let gateway = IpAddr::from([10, 90, n, 0]);
        route(
            &format!("10.90.{n}.0/24"),
            RouteTarget::Gateway {
                gateway,
                dev: nowhere,
                onlink: true,
            },
        )
    };
    let mut ops = Vec::new();
    let mut is_good = Vec::new();
    for (n, object) in (0..).zip(&good) {
        ops.push(Op::Create(object.clone()));
        is_good.push(true);
        ops.push(Op::Create(bad(n)));
        is_good.push(false);
    }
    let results = fixture.kernel.apply(&ops).await;
    if results.len() != ops.len() {
        return Err(format!("{} results for {} ops", results.len(), ops.len()));
    }
    for ((op, result), good) in ops.iter().zip(&results).zip(is_good) {
        if result.is_ok() != good {
            return Err(format!("{} {}: {result:?}", op.verb(), op.object()));
        }
    }
    fixture.expect(&good).await
}

/// An op on a device that does not exist says so.
pub async fn a_missing_device_is_named(fixture: &KernelFixture) -> Outcome {
    let object = address(name("fl.nowhere"), "10.91.0.1", 32);
    match fixture.try_op(Op::Create(object)).await? {
        Err(Error::NoSuchDevice { .. }) => Ok(()),
        result => Err(format!("an address on no device: {result:?}")),
    }
}

/// What others made is seen.
pub async fn observe_shows_foreign_objects(fixture: &KernelFixture) -> Outcome {
    let objects = fixture.world();
    for object in &objects {
        fixture.by_others(making(object.clone())).await?;
    }
    fixture.expect(&objects).await?;
    let observed = fixture.observe(&[]).await?;
    let infos: Vec<_> = observed.links.iter().map(|link| link.name).collect();
    let links: Vec<_> = observed
        .objects
        .values()
        .filter_map(|object| match object {
            Object::Link(link) => Some(link.name),
            _ => None,
        })
        .collect();
    if infos.iter().collect::<BTreeSet<_>>() != links.iter().collect() {
        return Err(format!("links {infos:?} but objects {links:?}"));
    }
    Ok(())
}

/// A long list is read whole.
pub async fn observe_is_complete(fixture: &KernelFixture) -> Outcome {
    let mut objects = fixture.world();
    for family in fixture.families() {
        for n in 3..=250 {
            objects.extend(fixture.path(family, n).into_iter().skip(1));
        }
    }
    objects.sort_by_key(Object::key);
    fixture.make(&objects).await?;
    fixture.expect(&objects).await
}

/// A device of the scope that does not exist is no error.
pub async fn observing_a_missing_device_is_no_error(fixture: &KernelFixture) -> Outcome {
    let nowhere = name("fl.nowhere");
    let setting = Object::Sysctl(Sysctl {
        dev: nowhere,
        family: Family::V4,
        name: "rp_filter".to_owned(),
        value: "0".to_owned(),
    });
    let observed = fixture.observe(std::slice::from_ref(&setting)).await?;
    match observed.objects.get(&setting.key()) {
        None => Ok(()),
        Some(found) => Err(format!("a setting of no device: {found}")),
    }
}

/// Probing and reading change nothing.
pub async fn probing_changes_nothing(fixture: &KernelFixture) -> Outcome {
    fixture.make(&fixture.world()).await?;
    let before = fixture.objects().await?;
    fixture.kernel.features().await.map_err(text)?;
    same("state", &before, &fixture.objects().await?)
}

/// Every change made by others is hinted at within a second.
pub async fn foreign_changes_are_hinted(fixture: &KernelFixture) -> Outcome {
    let mut hints = fixture.kernel.changes();
    match within(Duration::from_secs(1), &mut hints, |_| true).await {
        Some(Change::All) => {}
        first => return Err(format!("the first hint is {first:?}, not All")),
    }
    let mut ops: Vec<_> = fixture.world().into_iter().map(making).collect();
    let deletes: Vec<_> = ops
        .iter()
        .rev()
        .map(|op| Op::Delete(op.object().clone()))
        .collect();
    ops.extend(deletes);
    for op in ops {
        drain(&mut hints).await;
        let about = op.object().clone();
        fixture.by_others(op.clone()).await?;
        let fits = |hint: &Change| match (hint, &about) {
            (Change::All, _) | (Change::Route, Object::Nexthop(_) | Object::Route(_)) => true,
            (Change::Link(dev), Object::Link(_))
            | (Change::Address(dev), Object::Address(_))
            | (Change::Neighbour(dev), Object::Fdb(_) | Object::Neighbour(_)) => {
                dev.is_none() || *dev == about.dev()
            }
            _ => false,
        };
        if within(Duration::from_secs(1), &mut hints, fits)
            .await
            .is_none()
        {
            return Err(format!("no hint at {} {about}", op.verb()));
        }
    }
    Ok(())
}

/// A device set down loses its routes, nexthops, neighbours and IPv6 addresses; it keeps its
/// forwarding entries and IPv4 addresses, and nothing comes back by itself when it is up again.
pub async fn link_down_drops_routes_and_neighbours(fixture: &KernelFixture) -> Outcome {
    let objects = fixture.world();
    fixture.make(&objects).await?;
    let set = |up: bool| -> Vec<Op> {
        objects
            .iter()
            .filter_map(|object| match object {
                Object::Link(link) => Some(Op::Change(Object::Link(Link { up, ..link.clone() }))),
                _ => None,
            })
            .collect()
    };
    let (kept, lost): (Vec<_>, Vec<_>) = objects
        .iter()
        .filter(|object| !matches!(object, Object::Link(_)))
        .cloned()
        .partition(|object| match object {
            Object::Address(address) => address.ip.is_ipv4(),
            Object::Fdb(_) => true,
            _ => false,
        });
    fixture.apply(&set(false)).await?;
    fixture.expect_none(&lost).await?;
    fixture.expect(&kept).await?;
    fixture.apply(&set(true)).await?;
    fixture.expect_none(&lost).await?;
    fixture.make(&lost).await?;
    fixture.expect(&objects).await
}

/// A device that is deleted takes all on it along.
pub async fn deleting_a_link_drops_what_is_on_it(fixture: &KernelFixture) -> Outcome {
    let before = fixture.objects().await?;
    let objects = fixture.world();
    fixture.make(&objects).await?;
    for family in fixture.families() {
        fixture.apply(&[Op::Delete(fixture.vxlan(family))]).await?;
    }
    same("state", &before, &fixture.objects().await?)
}

/// A device that is deleted takes the VXLAN devices bound to it along.
pub async fn deleting_an_underlay_deletes_what_is_bound_to_it(fixture: &KernelFixture) -> Outcome {
    let objects = fixture.world();
    fixture.make(&objects).await?;
    let underlay = fixture.objects().await?;
    let underlay = underlay
        .get(&ObjectKey::Link(fixture.underlay))
        .ok_or("there is no underlay")?;
    fixture.apply(&[Op::Delete(underlay.clone())]).await?;
    fixture.expect_none(&objects).await
}

/// An underlay that goes down and up leaves the VXLAN device's objects alone.
pub async fn an_underlay_down_spares_the_overlay(fixture: &KernelFixture) -> Outcome {
    let objects = fixture.world();
    fixture.make(&objects).await?;
    let observed = fixture.objects().await?;
    let Some(Object::Link(underlay)) = observed.get(&ObjectKey::Link(fixture.underlay)) else {
        return Err("there is no underlay".to_owned());
    };
    for up in [false, true] {
        let link = Link {
            up,
            ..underlay.clone()
        };
        fixture.apply(&[Op::Change(Object::Link(link))]).await?;
        fixture.expect(&objects).await?;
    }
    Ok(())
}

/// A nexthop that is deleted takes its routes along.
pub async fn deleting_a_nexthop_drops_its_routes(fixture: &KernelFixture) -> Outcome {
    let (lost, kept): (Vec<_>, Vec<_>) = fixture.world().into_iter().partition(|object| {
        matches!(
            object,
            Object::Nexthop(_)
                | Object::Route(Route {
                    target: RouteTarget::Nexthop(_),
                    ..
                })
        )
    });
    fixture.make(&kept).await?;
    fixture.make(&lost).await?;
    let deletes: Vec<_> = lost
        .iter()
        .filter(|object| matches!(object, Object::Nexthop(_)))
        .cloned()
        .map(Op::Delete)
        .collect();
    fixture.apply(&deletes).await?;
    fixture.expect_none(&lost).await?;
    fixture.expect(&kept).await
}

/// A new hardware address costs a device its neighbours and nothing else.
pub async fn a_new_mac_drops_neighbours(fixture: &KernelFixture) -> Outcome {
    let mut objects = fixture.world();
    fixture.make(&objects).await?;
    for object in &mut objects {
        if let Object::Link(link) = object {
            link.mac = Some(MacAddr([0x0e, 0, 0, 0, 0, 0xee]));
            let link = link.clone();
            fixture.apply(&[Op::Change(Object::Link(link))]).await?;
        }
    }
    let (lost, kept): (Vec<_>, Vec<_>) = objects
        .into_iter()
        .partition(|object| matches!(object, Object::Neighbour(_)));
    fixture.expect_none(&lost).await?;
    fixture.expect(&kept).await
}

/// A device without its last IPv4 address loses its IPv4 neighbours and the IPv4 routes through
/// it; those through nexthop objects and all of IPv6 stay.
pub async fn the_last_ipv4_address_takes_routes_along(fixture: &KernelFixture) -> Outcome {
    let objects = fixture.world();
    fixture.make(&objects).await?;
    let (lost, kept): (Vec<_>, Vec<_>) = objects.into_iter().partition(|object| match object {
        Object::Address(o) => o.ip.is_ipv4(),
        Object::Neighbour(o) => o.ip.is_ipv4(),
        Object::Route(Route {
            target: RouteTarget::Gateway { gateway, .. },
            ..
        }) => gateway.is_ipv4(),
        _ => false,
    });
    let own: Vec<_> = lost
        .iter()
        .filter(|object| matches!(object, Object::Address(_)))
        .cloned()
        .map(Op::Delete)
        .collect();
    fixture.apply(&own).await?;
    fixture.expect_none(&lost).await?;
    fixture.expect(&kept).await
}

/// Two VXLAN devices of one family cannot share VNI and port; of two families they can.
pub async fn two_vxlan_devices_cannot_share_vni_and_port(fixture: &KernelFixture) -> Outcome {
    for family in fixture.families() {
        fixture.make(&[fixture.vxlan(family)]).await?;
        let Object::Link(link) = fixture.vxlan(family) else {
            continue;
        };
        let second = Object::Link(Link {
            name: name("fl.second"),
            ..link
        });
        match fixture.try_op(Op::Create(second)).await? {
            Err(Error::Exists { .. }) => {}
            result => return Err(format!("a second device: {result:?}")),
        }
    }
    Ok(())
}

/// A device has an IPv6 address with one prefix length only; an IPv4 address with any.
pub async fn an_ipv6_address_has_one_length(fixture: &KernelFixture) -> Outcome {
    let dev = fixture.underlay;
    fixture.make(&[address(dev, "10.81.0.1", 32)]).await?;
    fixture.make(&[address(dev, "10.81.0.1", 24)]).await?;
    if !fixture.features.ipv6 {
        return Ok(());
    }
    fixture.make(&[address(dev, "fd81::1", 64)]).await?;
    let second = address(dev, "fd81::1", 128);
    match fixture.try_op(Op::Create(second)).await? {
        Err(Error::Exists { .. }) => Ok(()),
        result => Err(format!("an IPv6 address with a second length: {result:?}")),
    }
}

/// A route or nexthop is refused while its device is down; neighbours and forwarding entries are
/// taken.
pub async fn routes_need_a_device_that_is_up(fixture: &KernelFixture) -> Outcome {
    for family in fixture.families() {
        let Object::Link(link) = fixture.vxlan(family) else {
            continue;
        };
        fixture
            .make(&[Object::Link(Link { up: false, ..link })])
            .await?;
        for object in fixture.path(family, 2) {
            let fits = !matches!(object, Object::Nexthop(_) | Object::Route(_));
            let result = fixture.try_op(Op::Create(object.clone())).await?;
            if result.is_ok() != fits {
                return Err(format!("create {object} on a device down: {result:?}"));
            }
        }
    }
    Ok(())
}

/// A gateway must be on a connected network unless it is taken as on-link.
pub async fn a_gateway_must_be_reachable(fixture: &KernelFixture) -> Outcome {
    for (dst, far) in [
        ("198.51.100.0/24", "203.0.113.9"),
        ("fd80:1::/64", "2001:db8:ffff::9"),
    ] {
        let gateway = ip(far);
        if gateway.is_ipv6() && !fixture.features.ipv6 {
            continue;
        }
        let through = |onlink| RouteTarget::Gateway {
            gateway,
            dev: fixture.underlay,
            onlink,
        };
        let refused = fixture
            .try_op(Op::Create(route(dst, through(false))))
            .await?;
        if refused.is_ok() {
            return Err(format!(
                "a route through {far}, which no network has, was taken"
            ));
        }
        fixture.make(&[route(dst, through(true))]).await?;
    }
    Ok(())
}

/// An IPv6 gateway is not taken as on-link while a route other than the default one leads to it
/// through another device; a route to the gateway alone overrules that one. IPv4 takes it.
pub async fn an_on_link_gateway_must_not_be_routed_elsewhere(fixture: &KernelFixture) -> Outcome {
    for family in fixture.families() {
        fixture.make(&[fixture.vxlan(family)]).await?;
        let (net, gateway) = match family {
            Family::V4 => ("10.77.2.0/24", ip("10.77.2.0")),
            Family::V6 => ("fd77:2::/64", ip("fd77:2::")),
        };
        fixture
            .make(&[route(net, RouteTarget::Device(fixture.underlay))])
            .await?;
        let Object::Route(alone) = route(net, RouteTarget::Device(KernelFixture::dev(family)))
        else {
            continue;
        };
        let alone = Object::Route(Route {
            dst: Subnet::host(gateway),
            metric: 1,
            ..alone
        });
        let tunnelled = fixture.path(family, 2).into_iter().filter(|object| {
            matches!(
                object,
                Object::Nexthop(_)
                    | Object::Route(Route {
                        target: RouteTarget::Gateway { .. },
                        ..
                    })
            )
        });
        for object in tunnelled {
            if family == Family::V6 {
                match fixture.try_op(Op::Create(object.clone())).await? {
                    Err(Error::Rejected { .. }) => {}
                    result => return Err(format!("create {object}: {result:?}")),
                }
                fixture.make(std::slice::from_ref(&alone)).await?;
            }
            fixture.make(std::slice::from_ref(&object)).await?;
            fixture.apply(&[Op::Delete(alone.clone())]).await?;
            fixture.expect(&[object]).await?;
        }
    }
    Ok(())
}

async fn next(hints: &mut ChangeStream) -> Option<Change> {
    std::future::poll_fn(|cx| hints.as_mut().poll_next(cx)).await
}

/// The first hint that fits and comes within a time.
async fn within(
    limit: Duration,
    hints: &mut ChangeStream,
    fits: impl Fn(&Change) -> bool + Send + Sync,
) -> Option<Change> {
    let first = async {
        loop {
            match next(hints).await {
                Some(hint) if fits(&hint) => return Some(hint),
                Some(_) => {}
                None => return None,
            }
        }
    };
    tokio::time::timeout(limit, first).await.ok().flatten()
}

/// Takes the hints that are under way already.
async fn drain(hints: &mut ChangeStream) {
    while within(Duration::from_millis(20), hints, |_| true)
        .await
        .is_some()
    {}
}

fn all_ok(who: &str, ops: &[Op], results: Vec<Result<(), Error>>) -> Outcome {
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
fn making(object: Object) -> Op {
    match object {
        Object::Sysctl(_) | Object::Offload(_) => Op::Change(object),
        _ => Op::Create(object),
    }
}

fn same<T: PartialEq + Debug>(what: &str, before: &T, after: &T) -> Outcome {
    if before == after {
        Ok(())
    } else {
        Err(format!("the {what} was {before:?} and is {after:?}"))
    }
}

fn text(error: impl Display) -> String {
    error.to_string()
}

fn name(name: &str) -> IfName {
    IfName::new(name).expect("the names of this suite are device names")
}

fn ip(text: &str) -> IpAddr {
    text.parse()
        .expect("the addresses of this suite are addresses")
}

fn link(name: IfName, kind: LinkKind) -> Link {
    Link {
        name,
        kind,
        mtu: None,
        mac: None,
        up: true,
        alias: None,
    }
}

fn address(dev: IfName, ip: &str, prefix_len: u8) -> Object {
    Object::Address(Address {
        dev,
        ip: self::ip(ip),
        prefix_len,
    })
}

fn route(dst: &str, target: RouteTarget) -> Object {
    let dst: Subnet = dst.parse().expect("the subnets of this suite are subnets");
    Object::Route(Route {
        table: MAIN_TABLE,
        dst,
        metric: Route::default_metric(dst.family()),
        target,
        protocol: RouteProtocol::OURS,
    })
}
