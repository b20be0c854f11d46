//! What the trait promises.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use flannel_core::kernel::Error;
use flannel_core::{
    Change, ChangeStream, Family, Link, LinkKind, MacAddr, Nexthop, Object, Op, Route,
    RouteProtocol, RouteTarget, Sysctl, Vxlan,
};

use super::Outcome;
use super::fixture::{KernelFixture, ip, making, name, route, same, text};

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
    match next_fitting(&mut hints, |_| true).await {
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
            (Change::Set(told), about) => *about == *told && !matches!(op, Op::Delete(_)),
            (Change::Gone(key), about) => about.key() == *key && matches!(op, Op::Delete(_)),
            (Change::All, _) | (Change::Route, Object::Nexthop(_) | Object::Route(_)) => true,
            (Change::Link(dev), Object::Link(_))
            | (Change::Address(dev), Object::Address(_))
            | (Change::Neighbour(dev), Object::Fdb(_) | Object::Neighbour(_)) => {
                dev.is_none() || *dev == about.dev()
            }
            _ => false,
        };
        if next_fitting(&mut hints, fits).await.is_none() {
            return Err(format!("no hint at {} {about}", op.verb()));
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

/// The first hint that fits and comes as soon as is promised.
pub(super) async fn next_fitting(
    hints: &mut ChangeStream,
    fits: impl Fn(&Change) -> bool + Send + Sync,
) -> Option<Change> {
    within(Duration::from_secs(1), hints, fits).await
}

/// Takes the hints that are under way already.
pub(super) async fn drain(hints: &mut ChangeStream) {
    while within(Duration::from_millis(20), hints, |_| true)
        .await
        .is_some()
    {}
}
