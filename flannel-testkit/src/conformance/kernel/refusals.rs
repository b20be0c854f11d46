//! What the kernel refuses, and in which words: the class of an error decides whether it is tried
//! again.

use flannel_core::kernel::Error;
use flannel_core::{
    Address, Family, Fdb, IfName, Link, LinkKind, MacAddr, Neighbour, Nexthop, Object, Offload, Op,
    Route, RouteProtocol, RouteTarget, Sysctl, Vxlan,
};

use super::Outcome;
use super::fixture::{KernelFixture, address, ip, link, name, route, same};

/// A device that nobody has.
fn nowhere() -> IfName {
    name("fl.nowhere")
}

/// The class of an answer.
const fn class(result: &Result<(), Error>) -> &'static str {
    match result {
        Ok(()) => "success",
        Err(Error::NotPermitted { .. }) => "not permitted",
        Err(Error::Unsupported { .. }) => "unsupported",
        Err(Error::NoSuchDevice { .. }) => "no such device",
        Err(Error::NotFound { .. }) => "not found",
        Err(Error::Exists { .. }) => "exists",
        Err(Error::Busy { .. }) => "busy",
        Err(Error::Rejected { .. }) => "rejected",
        Err(Error::Skipped { .. }) => "skipped",
        Err(_) => "another error",
    }
}

/// Tries ops one by one and tells of each whose answer is of another class than expected; of what
/// is refused nothing may be left.
async fn answers(fixture: &KernelFixture, expected: Vec<(Op, &'static str)>) -> Outcome {
    let mut wrong = Vec::new();
    for (op, class_of) in expected {
        let before = fixture.observe(&[op.object().clone()]).await?.objects;
        let result = fixture.try_op(op.clone()).await?;
        if class(&result) != class_of {
            let (verb, object) = (op.verb(), op.object());
            wrong.push(format!("{verb} {object}: {result:?}, not {class_of}"));
        } else if result.is_err() {
            let after = fixture.observe(&[op.object().clone()]).await?.objects;
            same("state, after a refusal,", &before, &after)?;
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("\n"))
    }
}

fn creates(expected: Vec<(Object, &'static str)>) -> Vec<(Op, &'static str)> {
    expected
        .into_iter()
        .map(|(object, class)| (Op::Create(object), class))
        .collect()
}

fn through(gateway: &str, dev: IfName) -> RouteTarget {
    RouteTarget::Gateway {
        gateway: ip(gateway),
        dev,
        onlink: true,
    }
}

fn nexthop(id: u32, gateway: &str, dev: IfName) -> Object {
    Object::Nexthop(Nexthop {
        id,
        gateway: ip(gateway),
        dev,
        onlink: true,
        protocol: RouteProtocol::OURS,
    })
}

/// Whatever is to be made on a device that is not there, and the device that is to be bound to it,
/// is told so; what is to be removed from it is gone.
pub async fn a_missing_device_is_named(fixture: &KernelFixture) -> Outcome {
    let dev = nowhere();
    let mac = MacAddr([0x0e, 0, 0, 0, 9, 1]);
    let mut objects = vec![
        address(dev, "10.91.0.1", 32),
        Object::Fdb(Fdb {
            dev,
            mac,
            remote: ip("192.0.2.91"),
        }),
        Object::Neighbour(Neighbour {
            dev,
            ip: ip("10.91.0.2"),
            mac,
        }),
        route("10.92.0.0/16", through("10.92.0.1", dev)),
        route("10.93.0.0/16", RouteTarget::Device(dev)),
    ];
    if fixture.features.nexthops {
        objects.push(nexthop(91, "10.94.0.1", dev));
    }
    let mut ops: Vec<_> = objects
        .iter()
        .flat_map(|object| [Op::Create(object.clone()), Op::Change(object.clone())])
        .collect();
    ops.extend(settings_of(fixture, dev).into_iter().map(Op::Change));
    let bound = LinkKind::Vxlan(Vxlan {
        vni: 91,
        port: 8472,
        underlay: Some(dev),
        local: None,
        learning: false,
        gbp: false,
    });
    ops.push(Op::Create(Object::Link(link(name("fl.bound"), bound))));
    ops.push(Op::Change(Object::Link(link(dev, LinkKind::Bridge))));
    let mut expected: Vec<_> = ops.into_iter().map(|op| (op, "no such device")).collect();
    objects.push(Object::Link(link(dev, LinkKind::Bridge)));
    expected.extend(
        objects
            .into_iter()
            .map(|object| (Op::Delete(object), "success")),
    );
    answers(fixture, expected).await
}

/// A setting and an offload of a device, as far as the kernel has them.
fn settings_of(fixture: &KernelFixture, dev: IfName) -> Vec<Object> {
    let mut objects = Vec::new();
    if fixture.features.sysctls {
        objects.push(setting(dev, "rp_filter", "0"));
    }
    if fixture.features.offloads {
        objects.push(offload(dev, "tx-checksum-ip-generic", false));
    }
    objects
}

fn setting(dev: IfName, name: &str, value: &str) -> Object {
    Object::Sysctl(Sysctl {
        dev,
        family: Family::V4,
        name: name.to_owned(),
        value: value.to_owned(),
    })
}

fn offload(dev: IfName, feature: &str, on: bool) -> Object {
    Object::Offload(Offload {
        dev,
        feature: feature.to_owned(),
        on,
    })
}

/// A setting is changed, and neither made nor removed; a create of the value that it has is
/// success. One that the kernel does not have is unsupported, a value that it cannot have rejected.
pub async fn settings_are_changed_never_made(fixture: &KernelFixture) -> Outcome {
    let dev = KernelFixture::overlay(Family::V4);
    fixture.make(&[fixture.vxlan(Family::V4)]).await?;
    let mut expected = Vec::new();
    let mut pairs = Vec::new();
    if fixture.features.sysctls {
        pairs.push((
            setting(dev, "rp_filter", "2"),
            setting(dev, "rp_filter", "1"),
        ));
        expected.push((
            Op::Change(setting(dev, "no_such_setting", "0")),
            "unsupported",
        ));
        expected.push((
            Op::Change(setting(dev, "rp_filter", "nonsense")),
            "rejected",
        ));
        expected.push((Op::Change(setting(dev, "rp_filter", "")), "rejected"));
        expected.push((
            Op::Create(setting(dev, "no_such_setting", "0")),
            "unsupported",
        ));
    }
    if fixture.features.offloads {
        let checksum = "tx-checksum-ip-generic";
        pairs.push((offload(dev, checksum, false), offload(dev, checksum, true)));
        expected.push((
            Op::Change(offload(dev, "no-such-offload", true)),
            "unsupported",
        ));
    }
    for (one, other) in pairs {
        expected.push((Op::Change(one.clone()), "success"));
        expected.push((Op::Create(one.clone()), "success"));
        expected.push((Op::Create(other.clone()), "exists"));
        expected.push((Op::Change(other.clone()), "success"));
        expected.push((Op::Delete(other), "unsupported"));
        expected.push((Op::Delete(one), "unsupported"));
    }
    answers(fixture, expected).await
}

/// A device that the kernel cannot make as asked is not made at all.
pub async fn a_device_is_made_as_asked_or_not_at_all(fixture: &KernelFixture) -> Outcome {
    let bridge = |mtu, mac| {
        Object::Link(Link {
            mtu,
            mac,
            ..link(name("fl.odd"), LinkKind::Bridge)
        })
    };
    let mut expected = vec![
        (bridge(Some(67), None), "rejected"),
        (bridge(Some(65_536), None), "rejected"),
        (
            bridge(None, Some(MacAddr([1, 0, 0x5e, 0, 0, 1]))),
            "rejected",
        ),
        (bridge(None, Some(MacAddr([0; 6]))), "rejected"),
    ];
    for family in fixture.families() {
        let Object::Link(asked) = fixture.vxlan(family) else {
            continue;
        };
        let LinkKind::Vxlan(vxlan) = asked.kind.clone() else {
            continue;
        };
        let with = |change: &dyn Fn(&mut Link, &mut Vxlan)| {
            let (mut link, mut vxlan) = (asked.clone(), vxlan.clone());
            change(&mut link, &mut vxlan);
            link.kind = LinkKind::Vxlan(vxlan);
            Object::Link(link)
        };
        let room = asked.mtu.unwrap_or_default();
        expected.extend([
            (with(&|_, vxlan| vxlan.vni = 1 << 24), "rejected"),
            (with(&|_, vxlan| vxlan.port = 0), "rejected"),
            (with(&|link, _| link.mtu = Some(room + 1)), "rejected"),
            (with(&|link, _| link.mtu = Some(room)), "success"),
        ]);
    }
    answers(fixture, creates(expected)).await?;
    // Nor is it changed into what it cannot be.
    let mut expected = Vec::new();
    for family in fixture.families() {
        let Object::Link(link) = fixture.vxlan(family) else {
            continue;
        };
        let room = link.mtu.unwrap_or_default();
        let with = |mtu, mac| {
            Op::Change(Object::Link(Link {
                mtu: Some(mtu),
                mac: Some(mac),
                ..link.clone()
            }))
        };
        let mac = MacAddr([0x0e, 0, 0, 0, 0, 1]);
        expected.extend([
            (with(room + 1, mac), "rejected"),
            (with(67, mac), "rejected"),
            (with(room, MacAddr([1, 0, 0x5e, 0, 0, 1])), "rejected"),
            (with(1280, mac), "success"),
        ]);
    }
    answers(fixture, expected).await
}

/// An address is as long as its family's, and of IPv6 one that a host can have; of IPv4 any is
/// taken.
pub async fn an_address_must_be_fit(fixture: &KernelFixture) -> Outcome {
    let dev = fixture.underlay;
    let long = |ip, prefix_len| {
        Object::Address(Address {
            dev,
            ip,
            prefix_len,
        })
    };
    let mut expected = vec![
        (long(ip("10.95.0.1"), 33), "rejected"),
        (long(ip("224.0.0.95"), 32), "success"),
        (long(ip("10.95.0.1"), 32), "success"),
    ];
    if fixture.features.ipv6 {
        expected.extend([
            (long(ip("fd95::1"), 129), "rejected"),
            (long(ip("ff02::95"), 64), "rejected"),
            (long(ip("::"), 64), "rejected"),
            (long(ip("fd95::1"), 128), "success"),
        ]);
    }
    answers(fixture, creates(expected)).await
}

/// A forwarding entry's remote is of the family of its device.
pub async fn a_remote_is_of_the_devices_family(fixture: &KernelFixture) -> Outcome {
    let mut expected = Vec::new();
    for family in fixture.families() {
        fixture.make(&[fixture.vxlan(family)]).await?;
        for (remote, of) in [("192.0.2.9", Family::V4), ("2001:db8::9", Family::V6)] {
            let entry = Object::Fdb(Fdb {
                dev: KernelFixture::overlay(family),
                mac: MacAddr([0x0e, 0, 0, 0, 9, 9]),
                remote: ip(remote),
            });
            let class = if of == family {
                "success"
            } else {
                "unsupported"
            };
            expected.push((entry, class));
        }
    }
    answers(fixture, creates(expected)).await
}

/// A neighbour may have any address, also one that no host has: who makes it must know better.
pub async fn a_neighbour_is_taken_as_it_is(fixture: &KernelFixture) -> Outcome {
    let mut objects = Vec::new();
    for family in fixture.families() {
        fixture.make(&[fixture.vxlan(family)]).await?;
        let neighbour = |text| {
            Object::Neighbour(Neighbour {
                dev: KernelFixture::overlay(family),
                ip: ip(text),
                mac: MacAddr([0x0e, 0, 0, 0, 9, 9]),
            })
        };
        let (none, group) = match family {
            Family::V4 => ("0.0.0.0", "224.0.0.1"),
            Family::V6 => ("::", "ff02::1"),
        };
        objects.extend([neighbour(none), neighbour(group)]);
    }
    fixture.make(&objects).await?;
    fixture.expect(&objects).await
}

/// A hardware address of many is none that a forwarding entry leads to.
pub async fn a_forwarding_entry_is_of_one_device(fixture: &KernelFixture) -> Outcome {
    fixture.make(&[fixture.vxlan(Family::V4)]).await?;
    let entry = |mac| {
        Object::Fdb(Fdb {
            dev: KernelFixture::overlay(Family::V4),
            mac: MacAddr(mac),
            remote: ip("192.0.2.9"),
        })
    };
    let expected = vec![
        (entry([0; 6]), "rejected"),
        (entry([0xff; 6]), "rejected"),
        (entry([1, 0, 0x5e, 0, 0, 1]), "rejected"),
    ];
    answers(fixture, creates(expected)).await
}

/// Where a route may lead: to a gateway that is a host and not our own, of a family that the
/// destination's can be routed through, and through a nexthop object that is there. A device that
/// is down makes it wait.
pub async fn a_route_leads_somewhere(fixture: &KernelFixture) -> Outcome {
    let under = fixture.underlay;
    let Object::Link(vxlan) = fixture.vxlan(Family::V4) else {
        return Ok(());
    };
    let down = Object::Link(Link { up: false, ..vxlan });
    fixture.make(&[down]).await?;
    let dev = KernelFixture::overlay(Family::V4);
    let mut expected = vec![
        (
            route("10.96.0.0/16", through("224.0.0.1", under)),
            "rejected",
        ),
        (
            route("10.96.0.0/16", through("192.0.2.1", under)),
            "rejected",
        ),
        (
            route("10.96.0.0/16", RouteTarget::Nexthop(4711)),
            "rejected",
        ),
        (route("10.96.0.0/16", through("10.96.0.1", dev)), "busy"),
        (route("10.96.0.0/16", RouteTarget::Device(dev)), "busy"),
        (route("10.96.0.0/16", RouteTarget::Blackhole), "success"),
    ];
    if fixture.features.nexthops {
        expected.extend([
            (nexthop(0, "192.0.2.9", under), "rejected"),
            (nexthop(95, "192.0.2.1", under), "rejected"),
            (nexthop(95, "224.0.0.1", under), "rejected"),
            (nexthop(95, "10.96.0.1", dev), "busy"),
            (nexthop(96, "192.0.2.9", under), "success"),
        ]);
    }
    if fixture.features.ipv6 {
        expected.extend([
            (route("fd96::/64", through("ff02::1", under)), "rejected"),
            (
                route("fd96::/64", through("2001:db8::1", under)),
                "rejected",
            ),
            (route("fd96::/64", through("192.0.2.9", under)), "rejected"),
            (
                route("10.97.0.0/16", through("2001:db8::9", under)),
                "success",
            ),
        ]);
    }
    if fixture.features.ipv6 && fixture.features.nexthops {
        expected.extend([
            (nexthop(97, "2001:db8::1", under), "rejected"),
            (route("fd96::/64", RouteTarget::Nexthop(96)), "rejected"),
            (nexthop(97, "2001:db8::9", under), "success"),
            (route("10.98.0.0/16", RouteTarget::Nexthop(97)), "success"),
        ]);
    }
    answers(fixture, creates(expected)).await
}

/// A removal means the object that it describes: another remote, target, protocol, metric, alias,
/// VNI or kind under the same key is spared.
pub async fn delete_spares_what_differs(fixture: &KernelFixture) -> Outcome {
    let there = fixture.world();
    fixture.make(&there).await?;
    let mut expected = Vec::new();
    for object in &there {
        match object.clone() {
            Object::Link(link) => {
                let mut other = link.clone();
                if let LinkKind::Vxlan(vxlan) = &mut other.kind {
                    vxlan.vni += 1;
                }
                expected.push(Object::Link(other));
                expected.push(Object::Link(Link {
                    kind: LinkKind::Bridge,
                    ..link.clone()
                }));
                expected.push(Object::Link(Link {
                    alias: None,
                    ..link
                }));
            }
            Object::Fdb(mut fdb) => {
                fdb.remote = match Family::of(&fdb.remote) {
                    Family::V4 => ip("192.0.2.99"),
                    Family::V6 => ip("2001:db8::99"),
                };
                expected.push(Object::Fdb(fdb));
            }
            Object::Route(route) => {
                expected.push(Object::Route(Route {
                    target: RouteTarget::Blackhole,
                    ..route.clone()
                }));
                expected.push(Object::Route(Route {
                    target: RouteTarget::Device(KernelFixture::overlay(route.dst.family())),
                    ..route.clone()
                }));
                expected.push(Object::Route(Route {
                    protocol: RouteProtocol::UNSPEC,
                    ..route.clone()
                }));
                expected.push(Object::Route(Route {
                    metric: 4242,
                    ..route
                }));
            }
            Object::Nexthop(nexthop) => expected.push(Object::Nexthop(Nexthop {
                protocol: RouteProtocol::UNSPEC,
                ..nexthop
            })),
            _ => {}
        }
    }
    let expected = expected
        .into_iter()
        .map(|object| (Op::Delete(object), "success"));
    answers(fixture, expected.collect()).await?;
    fixture.expect(&there).await
}
