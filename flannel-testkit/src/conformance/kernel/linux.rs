//! The rules of Linux on which the planner relies, beside what the trait promises.

use flannel_core::kernel::Error;
use flannel_core::{
    DualStack, Family, Link, MacAddr, Object, ObjectKey, Op, Route, RouteTarget, Subnet,
};

use super::Outcome;
use super::fixture::{KernelFixture, address, ip, name, route, same};

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
    routed_elsewhere(fixture, DualStack::both("10.77.2.0/24", "fd77:2::/64")).await
}

/// The same if the other route is to a wider network, of which the gateway is not the first address.
pub async fn a_wider_route_elsewhere_counts_for_an_on_link_gateway(
    fixture: &KernelFixture,
) -> Outcome {
    routed_elsewhere(fixture, DualStack::both("10.77.0.0/16", "fd77::/16")).await
}

async fn routed_elsewhere(fixture: &KernelFixture, nets: DualStack<&'static str>) -> Outcome {
    for family in fixture.families() {
        fixture.make(&[fixture.vxlan(family)]).await?;
        let gateway = match family {
            Family::V4 => ip("10.77.2.0"),
            Family::V6 => ip("fd77:2::"),
        };
        let Some(net) = nets.get(family) else {
            continue;
        };
        fixture
            .make(&[route(net, RouteTarget::Device(fixture.underlay))])
            .await?;
        let Object::Route(alone) = route(net, RouteTarget::Device(KernelFixture::overlay(family)))
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
