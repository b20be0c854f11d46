//! What [`NetlinkKernel`] promises, on the real kernel.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "tests live in real time, run other tools, and say why they are skipped"
)]

mod common;
mod strategies;

use std::collections::BTreeSet;

use common::*;
use flannel_core::kernel::Error;
use flannel_core::{
    Address, Family, Fdb, Kernel, Link, LinkKind, MacAddr, Nexthop, Object, ObjectKey, Offload, Op,
    Route, RoutePath, RouteProtocol, RouteTarget, Sysctl, Tun,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

/// Runs a property on the kernel of one namespace.
fn property<S: Strategy + Send + 'static>(
    cases: u32,
    strategy: S,
    law: impl AsyncFn(&Net, S::Value) -> Result<(), TestCaseError> + Send + 'static,
) {
    netns_blocking(move |runtime, net| {
        runtime.block_on(net.with_vxlan());
        let before = runtime.block_on(net.observe()).objects;
        let config = Config {
            failure_persistence: None,
            max_shrink_iters: 200,
            ..Config::with_cases(cases)
        };
        let result = TestRunner::new(config).run(&strategy, |value| {
            // A case that failed leaves things behind.
            let mut left = runtime.block_on(net.observe()).objects;
            left.retain(|key, _| !before.contains_key(key));
            let left: Vec<_> = left.into_values().collect();
            runtime.block_on(net.kernel.apply(&deletes(&left)));
            runtime.block_on(law(&net, value))
        });
        result.unwrap_or_else(|error| panic!("{error}"));
    });
}

/// What this kernel takes of the objects in general: a forwarding entry's remote is of the family
/// of the device, a gateway need not be reachable, a route through a nexthop object comes with it.
///
/// All of IPv6 is on one device: an on-link gateway is refused if the main table has a route to it,
/// other than the default route, through another device.
fn taken(object: Object, mut nexthop: Nexthop) -> Vec<Object> {
    let on = |v6: bool| dev(strategies::DEVICES[usize::from(v6)]);
    nexthop.dev = on(nexthop.gateway.is_ipv6());
    match object {
        Object::Fdb(fdb) => {
            let v6 = fdb.remote.is_ipv6();
            vec![Object::Fdb(Fdb { dev: on(v6), ..fdb })]
        }
        Object::Address(address) => vec![Object::Address(Address {
            dev: on(address.ip.is_ipv6()),
            ..address
        })],
        Object::Nexthop(nexthop) => vec![Object::Nexthop(Nexthop {
            onlink: true,
            dev: on(nexthop.gateway.is_ipv6()),
            ..nexthop
        })],
        Object::Route(route) => {
            let mut route = Route {
                table: flannel_core::MAIN_TABLE,
                ..route
            };
            let mut objects = Vec::new();
            match &mut route.target {
                RouteTarget::Gateway {
                    gateway,
                    dev,
                    onlink,
                } => {
                    *onlink = true;
                    *dev = on(gateway.is_ipv6());
                }
                RouteTarget::Device(dev) => *dev = on(route.dst.family() == Family::V6),
                RouteTarget::Nexthop(id) if route.dst.family() == Family::of(&nexthop.gateway) => {
                    *id = nexthop.id;
                    objects.push(Object::Nexthop(Nexthop {
                        onlink: true,
                        ..nexthop
                    }));
                }
                RouteTarget::Nexthop(_) => route.target = RouteTarget::Blackhole,
                _ => {}
            }
            objects.push(Object::Route(route));
            objects
        }
        other => vec![other],
    }
}

fn any_taken() -> impl Strategy<Value = Vec<Object>> {
    let nexthop = strategies::nexthop().prop_map(|object| match object {
        Object::Nexthop(nexthop) => nexthop,
        other => panic!("{other} is no nexthop"),
    });
    (strategies::other_than_link(), nexthop).prop_map(|(object, nexthop)| taken(object, nexthop))
}

#[test]
fn apply_then_observe_returns_what_was_asked() {
    property(400, any_taken(), async |net, objects| {
        net.ok(&creates(&objects)).await;
        // To make it again is no error and changes nothing.
        net.ok(&creates(&objects)).await;
        let observed = net.observe().await.objects;
        for object in &objects {
            prop_assert_eq!(observed.get(&object.key()), Some(object));
        }
        net.ok(&deletes(&objects)).await;
        net.ok(&deletes(&objects)).await;
        let observed = net.observe().await.objects;
        for object in &objects {
            prop_assert_eq!(observed.get(&object.key()), None);
        }
        Ok(())
    });
}

#[test]
fn many_at_once_are_all_there() {
    let many = prop::collection::vec(any_taken(), 1..40);
    property(24, many, async |net, objects| {
        let mut objects: Vec<_> = objects.into_iter().flatten().collect();
        objects.sort_by_key(Object::key);
        objects.dedup_by_key(|object| object.key());
        net.ok(&creates(&objects)).await;
        let observed = net.observe().await.objects;
        for object in &objects {
            prop_assert_eq!(observed.get(&object.key()), Some(object));
        }
        net.ok(&deletes(&objects)).await;
        Ok(())
    });
}

/// Two objects of one key.
fn twins() -> impl Strategy<Value = (Object, Object)> {
    (strategies::other_than_link(), strategies::other_than_link())
        .prop_flat_map(|(one, two)| {
            let gateways = (strategies::ip(Family::V4), strategies::ip(Family::V6));
            (Just(one), Just(two), strategies::mac(), gateways)
        })
        .prop_map(|(one, _, mac, (v4, v6))| {
            let of = |v6_wanted: bool| if v6_wanted { v6 } else { v4 };
            let mut two = one.clone();
            match &mut two {
                Object::Fdb(o) => o.remote = of(o.remote.is_ipv6()),
                Object::Neighbour(o) => o.mac = mac,
                Object::Nexthop(o) => {
                    o.gateway = of(o.gateway.is_ipv6());
                    o.protocol = RouteProtocol(o.protocol.0 ^ 0x55);
                }
                Object::Route(o) => {
                    o.target = RouteTarget::Gateway {
                        gateway: of(o.dst.family() == Family::V6),
                        dev: dev("flannel.1"),
                        onlink: true,
                    };
                    o.protocol = RouteProtocol((o.protocol.0 ^ 0x55).max(1));
                }
                _ => {}
            }
            (one, two)
        })
}

#[test]
fn change_makes_it_as_given() {
    let twins = (twins(), strategies::nexthop());
    property(400, twins, async |net, ((one, two), nexthop)| {
        let Object::Nexthop(nexthop) = nexthop else {
            return Ok(());
        };
        let first = taken(one, nexthop.clone());
        let Some(second) = taken(two, nexthop).pop() else {
            return Ok(());
        };
        net.ok(&creates(&first)).await;
        for object in [second.clone(), first[first.len() - 1].clone(), second] {
            net.ok(&[Op::Change(object.clone())]).await;
            let found = net.find(&object.key()).await;
            prop_assert_eq!(found.as_ref(), Some(&object));
            if let Some(Err(error)) = net.kernel.apply(&[Op::Create(object)]).await.pop() {
                prop_assert!(false, "it is there and so, but: {}", error);
            }
        }
        let there: Vec<_> = net.observe().await.objects.into_values().collect();
        let ours: Vec<_> = there
            .into_iter()
            .filter(|object| first.iter().any(|o| o.key() == object.key()))
            .collect();
        net.ok(&deletes(&ours)).await;
        Ok(())
    });
}

#[test]
fn a_device_is_made_as_asked_and_changed_in_place() {
    let numbers = (strategies::link(), strategies::link());
    property(150, numbers, async |net, (asked, other)| {
        let underlay = |mut link: Link| {
            if let LinkKind::Vxlan(vxlan) = &mut link.kind {
                vxlan.underlay = vxlan.underlay.map(|_| dev("u0"));
            }
            link.name = dev("x0");
            link
        };
        let asked = underlay(asked);
        net.ok(&[Op::Create(Object::Link(asked.clone()))]).await;
        net.ok(&[Op::Create(Object::Link(asked.clone()))]).await;
        let found = found_link(net).await?;
        assert_as_asked(&found, &asked)?;

        let mut changed = Link {
            kind: asked.kind.clone(),
            ..underlay(other.clone())
        };
        if let (LinkKind::Vxlan(vxlan), LinkKind::Vxlan(new)) = (&mut changed.kind, other.kind) {
            vxlan.learning = new.learning;
            if vxlan.local.map(|ip| ip.is_ipv6()) == new.local.map(|ip| ip.is_ipv6()) {
                vxlan.local = new.local;
            }
        }
        net.ok(&[Op::Change(Object::Link(changed.clone()))]).await;
        let found = found_link(net).await?;
        assert_as_asked(&found, &changed)?;
        net.ok(&[Op::Delete(Object::Link(found))]).await;
        prop_assert!(found_link(net).await.is_err());
        Ok(())
    });
}

async fn found_link(net: &Net) -> Result<Link, TestCaseError> {
    match net.find(&ObjectKey::Link(dev("x0"))).await {
        Some(Object::Link(link)) => Ok(link),
        other => Err(TestCaseError::fail(format!("no device but {other:?}"))),
    }
}

fn assert_as_asked(found: &Link, asked: &Link) -> Result<(), TestCaseError> {
    prop_assert_eq!(&found.kind, &asked.kind);
    prop_assert_eq!(found.up, asked.up);
    prop_assert!(asked.mtu.is_none() || found.mtu == asked.mtu);
    prop_assert!(asked.mac.is_none() || found.mac == asked.mac);
    prop_assert!(asked.alias.is_none() || found.alias == asked.alias);
    Ok(())
}

/// An overlay device has no IPv6 address that nobody asked for, and ours are usable at once.
#[test]
fn addresses_are_those_asked_for_and_usable_at_once() {
    netns(async |net| {
        net.with_vxlan().await;
        net.ok(&[Op::Create(address("flannel.1", "fd00:5::", 128))])
            .await;
        let observed = net.observe().await;
        let on: Vec<_> = observed
            .addresses
            .iter()
            .filter(|address| address.dev == dev("flannel.1"))
            .collect();
        let ips: BTreeSet<_> = on.iter().map(|address| address.ip).collect();
        assert_eq!(ips, [ip("10.5.0.0"), ip("fd00:5::")].into());
        assert!(
            on.iter()
                .all(|address| !address.tentative && address.permanent)
        );
        let under = observed
            .addresses
            .iter()
            .find(|a| a.ip == ip("2001:db8::1"));
        assert!(under.is_some_and(|address| !address.tentative));
    });
}

/// What `ip` and `bridge` say of the same objects.
#[test]
fn other_programs_see_the_same() {
    netns(async |net| {
        net.with_vxlan().await;
        let mut objects = peer(1, Family::V4).to_vec();
        objects.extend(peer(2, Family::V6));
        objects.push(Object::Route(route("10.9.0.0/16", via("10.9.0.1"))));
        objects.push(Object::Route(route("10.8.0.0/16", RouteTarget::Blackhole)));
        net.ok(&creates(&objects)).await;
        for (command, lines) in [
            (
                "ip -d link show dev flannel.1",
                &["vxlan id 1 local 192.0.2.1 dev u0 srcport 0 0 dstport 8472 nolearning"][..],
            ),
            (
                "ip route show",
                &[
                    "10.128.1.0/24 nhid 2 via 10.128.1.0 dev flannel.1 proto 241 onlink",
                    "10.9.0.0/16 via 10.9.0.1 dev flannel.1 proto 241 onlink",
                    "blackhole 10.8.0.0/16 proto 241",
                ],
            ),
            (
                "ip -6 route show",
                &["fd00:5:2::/64 nhid 100003 via fd00:5:2:: dev flannel.1 proto 241 metric 1024"],
            ),
            (
                "ip nexthop show",
                &[
                    "id 2 via 10.128.1.0 dev flannel.1 scope link proto 241 onlink",
                    "id 100003 via fd00:5:2:: dev flannel.1 scope link proto 241 onlink",
                ],
            ),
            (
                "ip neigh show dev flannel.1",
                &["10.128.1.0 lladdr 0e:11:22:33:00:03 PERMANENT"],
            ),
            (
                "ip -6 neigh show dev flannel.1",
                &["fd00:5:2:: lladdr 0e:11:22:33:00:04 PERMANENT"],
            ),
            (
                "bridge fdb show dev flannel.1",
                &["0e:11:22:33:00:03 dst 192.0.3.1 self permanent"],
            ),
        ] {
            let Some(output) = run(command) else { continue };
            for line in lines {
                assert!(output.contains(line), "{command} lacks {line:?}:\n{output}");
            }
        }
    });
}

/// What others made with `ip` and `bridge` is seen, also what we have no word for.
#[test]
fn what_other_programs_made_is_seen() {
    netns(async |net| {
        net.with_vxlan().await;
        for line in [
            "ip link set lo up",
            "ip route add 10.6.0.0/16 via 192.0.2.9 dev u0 metric 50 proto static",
            "ip route add 10.7.0.0/16 nexthop via 192.0.2.8 dev u0 nexthop via 192.0.2.9 dev u0",
            "ip -6 route add fd06::/64 nexthop via 2001:db8::8 dev u0 nexthop via 2001:db8::9 dev u0",
            "ip route add unreachable 10.8.0.0/16 metric 9",
            "ip nexthop add id 7 blackhole",
            "ip nexthop add id 8 via 192.0.2.9 dev u0",
            "ip nexthop add id 9 group 8",
            "ip route add 10.9.0.0/16 nhid 9",
            "ip nexthop add id 10 via 192.0.2.8 dev u0",
            "ip nexthop add id 11 group 8/10",
            "ip route add 10.11.0.0/16 nhid 11",
            "ip route add 10.12.0.0/16 via 192.0.2.9 dev u0 src 192.0.2.1",
            "ip neigh add 192.0.2.66 lladdr 0e:00:00:00:00:66 dev u0 nud permanent",
            "ip neigh add 192.0.2.67 lladdr 0e:00:00:00:00:67 dev u0 nud stale",
            "ip neigh add proxy 192.0.2.68 dev u0",
            "bridge fdb append 00:00:00:00:00:00 dst 192.0.2.70 dev flannel.1",
            "bridge fdb add 0e:00:00:00:00:71 dst 192.0.2.71 port 4789 dev flannel.1",
            "bridge fdb add 0e:00:00:00:00:72 dst 192.0.2.72 dev flannel.1",
            "ip addr add 192.0.2.80 peer 192.0.2.81/32 dev u0",
        ] {
            if run(line).is_none() {
                return;
            }
        }
        let observed = net.observe().await;
        let target = |dst: &str, metric: u32| {
            let key = ObjectKey::Route {
                table: 254,
                dst: common::net(dst),
                metric,
            };
            match observed.objects.get(&key) {
                Some(Object::Route(route)) => Some(route.target.clone()),
                _ => None,
            }
        };
        let u0 = dev("u0");
        assert_eq!(
            target("10.6.0.0/16", 50),
            Some(RouteTarget::Gateway {
                gateway: ip("192.0.2.9"),
                dev: u0,
                onlink: false
            })
        );
        let paths = |gateways: [&str; 2]| {
            let path = |gateway| RoutePath {
                gateway: Some(ip(gateway)),
                dev: u0,
            };
            Some(RouteTarget::Paths(gateways.map(path).to_vec()))
        };
        let v4 = ["192.0.2.8", "192.0.2.9"];
        assert_eq!(target("10.7.0.0/16", 0), paths(v4));
        let v6 = ["2001:db8::8", "2001:db8::9"];
        assert_eq!(target("fd06::/64", 1024), paths(v6));
        let of_group = target("10.11.0.0/16", 0);
        let [b, a] = v4;
        assert!(
            of_group == paths(v4) || of_group == paths([a, b]),
            "{of_group:?}"
        );
        let unreachable = target("10.8.0.0/16", 9);
        assert!(
            matches!(unreachable, Some(RouteTarget::Other(_))),
            "{unreachable:?}"
        );
        let source = |dst| {
            observed.objects.values().find_map(|object| match object {
                Object::Route(route) if route.dst == common::net(dst) => route.source,
                _ => None,
            })
        };
        assert_eq!(source("10.12.0.0/16"), Some(ip("192.0.2.1")));
        assert_eq!(source("10.6.0.0/16"), None);
        assert_eq!(target("10.9.0.0/16", 0), Some(RouteTarget::Nexthop(9)));
        let has = |key: ObjectKey| observed.objects.contains_key(&key);
        assert!(has(ObjectKey::Nexthop(8)));
        assert!(!has(ObjectKey::Nexthop(7)) && !has(ObjectKey::Nexthop(9)));
        let neighbour = |last: u8| ObjectKey::Neighbour {
            dev: u0,
            ip: ip(&format!("192.0.2.{last}")),
        };
        assert!(has(neighbour(66)), "permanent");
        assert!(!has(neighbour(67)) && !has(neighbour(68)), "stale, proxy");
        let fdb = |last: u8| ObjectKey::Fdb {
            dev: dev("flannel.1"),
            mac: MacAddr([0x0e, 0, 0, 0, 0, last]),
        };
        assert!(has(fdb(0x72)), "plain");
        assert!(!has(fdb(0x71)), "one with a port of its own cannot be told");
        let addresses: Vec<_> = observed.addresses.iter().map(|a| a.ip).collect();
        assert!(addresses.contains(&ip("192.0.2.80")) && !addresses.contains(&ip("192.0.2.81")));
        // In the place of what cannot be told nothing is made.
        for object in [
            Object::Nexthop(Nexthop {
                id: 9,
                gateway: ip("192.0.2.9"),
                dev: u0,
                onlink: false,
                protocol: RouteProtocol::OURS,
            }),
            Object::Fdb(Fdb {
                dev: dev("flannel.1"),
                mac: MacAddr([0x0e, 0, 0, 0, 0, 0x71]),
                remote: ip("192.0.2.71"),
            }),
            Object::Route(route("10.7.0.0/16", RouteTarget::Blackhole)),
        ] {
            let result = net.one(Op::Create(object.clone())).await;
            assert!(
                matches!(result, Err(Error::Exists { .. })),
                "{object}: {result:?}"
            );
        }
        // Nor is it removed for what it is not.
        let group = Object::Nexthop(Nexthop {
            id: 9,
            gateway: ip("192.0.2.9"),
            dev: u0,
            onlink: false,
            protocol: RouteProtocol::UNSPEC,
        });
        net.ok(&[Op::Delete(group)]).await;
        assert!(run("ip nexthop show id 9").is_some_and(|text| text.contains("group 8")));
    });
}

/// What came by itself is no configuration and gives way to it.
#[test]
fn entries_that_came_by_themselves_give_way() {
    netns(async |net| {
        net.with_vxlan().await;
        for line in [
            "ip neigh add 10.128.1.0 lladdr 0e:00:00:00:00:99 dev flannel.1 nud stale",
            "ip neigh add fd00:5:1:: lladdr 0e:00:00:00:00:99 dev flannel.1 nud reachable",
            "bridge fdb add 0e:11:22:33:00:03 dst 192.0.2.99 dev flannel.1 dynamic",
        ] {
            if run(line).is_none() {
                return;
            }
        }
        let mut objects = peer(1, Family::V4).to_vec();
        objects.extend(peer(1, Family::V6).into_iter().skip(1));
        net.ok(&creates(&objects)).await;
        for object in &objects {
            assert!(net.has(object).await, "{object}");
        }
    });
}

/// A metric or protocol of 0 means any to the kernel; to us it means 0.
#[test]
fn delete_with_zeros_spares_others() {
    netns(async |net| {
        net.with_vxlan().await;
        let ours = route("10.6.0.0/16", via("10.6.0.1"));
        let spared = [
            Route {
                metric: 100,
                ..ours.clone()
            },
            Route {
                metric: 101,
                protocol: RouteProtocol::UNSPEC,
                ..ours.clone()
            },
            Route {
                protocol: RouteProtocol::BOOT,
                ..route("fd06::/64", via("fd06::1"))
            },
        ]
        .map(Object::Route);
        net.ok(&creates(&spared)).await;
        let unspecified = Route {
            metric: 100,
            protocol: RouteProtocol::UNSPEC,
            ..ours.clone()
        };
        let v6 = Route {
            protocol: RouteProtocol::UNSPEC,
            ..route("fd06::/64", via("fd06::1"))
        };
        for meant in [ours.clone(), unspecified, v6] {
            net.ok(&[Op::Delete(Object::Route(meant))]).await;
        }
        for object in &spared {
            assert!(net.has(object).await, "{object}");
        }
        // Also when what is meant goes in the same call, twice.
        let ours = Object::Route(ours);
        let twice = [
            Op::Create(ours.clone()),
            Op::Delete(ours.clone()),
            Op::Delete(ours.clone()),
        ];
        net.ok(&twice).await;
        net.ok(&creates(std::slice::from_ref(&ours))).await;
        net.ok(&twice[1..]).await;
        let again = [&twice[1..], &twice[..2]].concat();
        net.ok(&again).await;
        assert_eq!(net.find(&ours.key()).await, None);
        for object in &spared {
            assert!(net.has(object).await, "{object}");
        }
        // What is meant goes, also several in one call.
        let mut both = spared.to_vec();
        both.push(ours);
        net.ok(&creates(&both)).await;
        net.ok(&deletes(&both)).await;
        for object in &both {
            assert_eq!(net.find(&object.key()).await, None);
        }
    });
}

/// The removal of a route that leads elsewhere spares the one that is there: to the kernel an IPv6
/// route through a nexthop object is one to any gateway, device or black hole.
#[test]
fn a_route_is_told_from_those_that_lead_elsewhere() {
    netns(async |net| {
        net.with_vxlan().await;
        for (family, other) in [(Family::V4, "10.6.0.1"), (Family::V6, "fd06::1")] {
            let [.., nexthop, through] = peer(1, family);
            net.ok(&creates(std::slice::from_ref(&nexthop))).await;
            let Object::Route(route) = &through else {
                panic!("{through} is no route");
            };
            let to = |target| {
                let metric = if family == Family::V6 {
                    0
                } else {
                    route.metric
                };
                Object::Route(Route {
                    target,
                    metric,
                    ..route.clone()
                })
            };
            let straight = to(via(other));
            let elsewhere = [
                to(RouteTarget::Blackhole),
                to(RouteTarget::Device(dev("flannel.1"))),
                to(RouteTarget::Nexthop(4711)),
            ];
            for (there, wrong) in [(&through, &straight), (&straight, &through)] {
                net.ok(&creates(std::slice::from_ref(there))).await;
                net.ok(&deletes(&elsewhere)).await;
                net.ok(&deletes(std::slice::from_ref(wrong))).await;
                assert!(net.find(&through.key()).await.is_some(), "{there}");
                net.ok(&deletes(std::slice::from_ref(there))).await;
                assert_eq!(net.find(&through.key()).await, None, "{there}");
            }
        }
    });
}

/// A device that could not be made in full leaves nothing, and what is on it is not tried.
#[test]
fn a_device_made_half_is_unmade() {
    netns(async |net| {
        net.with_underlay().await;
        let too_big = Object::Link(Link {
            mtu: Some(9000),
            ..vxlan("flannel.1")
        });
        let ops = [
            Op::Create(too_big.clone()),
            Op::Create(address("flannel.1", "10.5.0.0", 32)),
            Op::Create(address("u0", "10.6.0.1", 32)),
        ];
        let results = net.kernel.apply(&ops).await;
        let Err(Error::Rejected { message }) = &results[0] else {
            panic!("{results:?}");
        };
        assert!(
            message.contains("MTU") && message.contains("1450"),
            "{message}"
        );
        assert!(
            matches!(&results[1], Err(Error::Skipped { key }) if *key == too_big.key()),
            "{results:?}"
        );
        assert!(results[2].is_ok(), "{results:?}");
        assert_eq!(net.find(&too_big.key()).await, None);
    });
}

#[test]
fn errors_have_the_kernels_words() {
    netns(async |net| {
        net.with_vxlan().await;
        let second = Op::Create(Object::Link(Link {
            name: dev("flannel.x"),
            ..vxlan("flannel.1")
        }));
        let Err(Error::Exists { message }) = net.one(second).await else {
            panic!("two devices of one VNI");
        };
        assert!(message.contains("VNI already exists"), "{message}");
        let unreachable = Op::Create(Object::Route(route(
            "10.6.0.0/16",
            RouteTarget::Gateway {
                gateway: ip("10.6.0.1"),
                dev: dev("u0"),
                onlink: false,
            },
        )));
        let Err(Error::Rejected { message }) = net.one(unreachable).await else {
            panic!("a gateway out of reach");
        };
        assert!(message.contains("invalid gateway"), "{message}");
        let dangling = Op::Create(Object::Route(route(
            "10.6.0.0/16",
            RouteTarget::Nexthop(4711),
        )));
        let Err(Error::Rejected { message }) = net.one(dangling).await else {
            panic!("a route through no nexthop");
        };
        assert!(message.contains("Nexthop id does not exist"), "{message}");
    });
}

#[test]
fn settings_are_changed_and_never_made() {
    netns(async |net| {
        net.with_vxlan().await;
        let sysctl = |device: &str, name: &str, value: &str| {
            Object::Sysctl(Sysctl {
                dev: dev(device),
                family: Family::V6,
                name: name.to_owned(),
                value: value.to_owned(),
            })
        };
        let offload = |feature: &str, on| {
            Object::Offload(Offload {
                dev: dev("flannel.1"),
                feature: feature.to_owned(),
                on,
            })
        };
        let checksum = "tx-checksum-ip-generic";
        for (is, other) in [
            (
                sysctl("flannel.1", "accept_ra", "0"),
                sysctl("flannel.1", "accept_ra", "2"),
            ),
            (offload(checksum, false), offload(checksum, true)),
        ] {
            net.ok(&[Op::Change(is.clone())]).await;
            assert!(net.has(&is).await, "{is}");
            net.ok(&[Op::Create(is.clone())]).await;
            let result = net.one(Op::Create(other.clone())).await;
            assert!(matches!(result, Err(Error::Exists { .. })), "{result:?}");
            net.ok(&[Op::Change(other.clone())]).await;
            assert!(net.has(&other).await, "{other}");
            let result = net.one(Op::Delete(other)).await;
            assert!(
                matches!(result, Err(Error::Unsupported { .. })),
                "{result:?}"
            );
        }
        for (object, fits) in [
            (sysctl("flannel.1", "no_such_setting", "0"), "unsupported"),
            (sysctl("flannel.1", "../all/accept_ra", "0"), "rejected"),
            (sysctl("flannel.1", "accept_ra", "two words\n"), "rejected"),
            (sysctl("flannel.1", "accept_ra", "nonsense"), "rejected"),
            (sysctl("all", "accept_ra", "0"), "no device"),
            (sysctl("nowhere", "accept_ra", "0"), "no device"),
            (offload("no-such-offload", true), "unsupported"),
            // The kernel demands it of every virtual device without a queue.
            (offload("netns-local", false), "rejected or unsupported"),
        ] {
            let result = net.one(Op::Change(object.clone())).await;
            let is = match result {
                Err(Error::Unsupported { .. }) => "unsupported",
                Err(Error::Rejected { .. }) => "rejected",
                Err(Error::NoSuchDevice { .. }) => "no device",
                other => panic!("{object}: {other:?}"),
            };
            assert!(fits.contains(is), "{object}: {is}");
        }
    });
}

/// Anybody who can open `/dev/net/tun` may attach to a device that is nobody's.
#[test]
fn a_tun_device_belongs_to_the_user_of_the_process() {
    netns(async |net| {
        let features = net.kernel.features().await.expect("features");
        if !features.tun {
            flannel_testkit::skip("a TUN device's owner", "there is no /dev/net/tun");
            return;
        }
        let link = Link {
            name: dev("fl.owned"),
            kind: LinkKind::Tun(Tun::FOR_TUNNEL),
            mtu: None,
            mac: None,
            up: true,
            alias: None,
        };
        let made = net.kernel.apply(&[Op::Create(Object::Link(link))]).await;
        for result in made {
            result.expect("it can be made");
        }
        let Some(shown) = run("ip -details link show dev fl.owned") else {
            return;
        };
        let uid = nix::unistd::geteuid();
        let name = run("id -un").unwrap_or_default();
        let is_ours = [format!(" user {uid} "), format!(" user {} ", name.trim())];
        assert!(is_ours.iter().any(|owner| shown.contains(owner)), "{shown}");
    });
}

/// The port of a device is there once: who has it is named, and once it is free all is well.
#[test]
fn who_has_the_port_of_a_device_is_named() {
    netns(async |net| {
        net.with_underlay().await;
        if run("ip link add other type vxlan external dstport 8472").is_none() {
            return;
        }
        let refused_for = async |who: &str| {
            match net.one(Op::Create(Object::Link(vxlan("flannel.1")))).await {
                Err(Error::InUse { what, by }) => {
                    assert_eq!(what, "UDP port 8472");
                    assert!(by.contains(who), "{by}");
                }
                result => panic!("with {who}: {result:?}"),
            }
            let gone = ObjectKey::Link(dev("flannel.1"));
            assert_eq!(net.find(&gone).await, None, "nothing stays behind");
        };
        run("ip link set other up").expect("it is there");
        refused_for("the VXLAN device other").await;
        run("ip link del other").expect("it is there");
        // The socket is of this thread's namespace.
        let socket = std::net::UdpSocket::bind("0.0.0.0:8472").expect("it is free");
        refused_for(&format!("process {} (", std::process::id())).await;
        drop(socket);
        net.ok(&[Op::Create(Object::Link(vxlan("flannel.1")))])
            .await;
    });
}
