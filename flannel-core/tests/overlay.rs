//! The whole SDK on fakes: store and kernel in memory, tokio's clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use common::*;
use flannel_backend_vxlan::VxlanData;
use flannel_core::reconcile::ownership::nexthop_id;
use flannel_core::{
    ConditionStatus, ConditionType, DualStack, Family, IfName, LeaseKey, Link, LinkKind,
    MAIN_TABLE, MacAddr, MemoryManager, Object, ObjectKey, Objects, Op, OverlayName, PublicIp,
    Route, RouteProtocol, RouteTarget, Subnet,
};
use flannel_testkit::fake_kernel::{Failure, FakeKernel, FaultKind};

#[tokio::test(start_paused = true)]
async fn a_node_gets_a_lease_and_its_device() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let overlay = start("a", &manager, &kernel).await;
    let status = overlay.status();
    for kind in ConditionType::ALL {
        let condition = status.condition(kind).expect("each type is there");
        assert_eq!(
            condition.status,
            ConditionStatus::True,
            "{condition} {}",
            condition.message
        );
    }
    assert_eq!(
        status.mtu,
        Some(1430),
        "VXLAN over IPv6 takes 70 bytes of 1500"
    );
    for (name, family) in [("flannel.1", Family::V4), ("flannel-v6.1", Family::V6)] {
        let Some(Object::Link(link)) = kernel.get(&ObjectKey::Link(dev(name))) else {
            panic!("{name} is not there");
        };
        assert!(link.up);
        let own = subnet_of(&overlay, family);
        let address = ObjectKey::Address {
            dev: dev(name),
            ip: own.address(),
            prefix_len: family.bits(),
        };
        assert!(kernel.get(&address).is_some(), "{address}");
    }
}

#[tokio::test(start_paused = true)]
async fn two_nodes_have_whole_paths_to_each_other() {
    let (_, kernels, overlays) = pair().await;
    for (kernel, other) in kernels.iter().zip(overlays.iter().rev()) {
        for family in Family::ALL {
            let dst = subnet_of(other, family);
            let Some(Object::Route(route)) = route_to(kernel, dst) else {
                panic!("no route to {dst}");
            };
            let mut needs = Object::Route(route).needs();
            let mut seen = 0;
            while let Some(key) = needs.pop() {
                let object = kernel
                    .get(&key)
                    .unwrap_or_else(|| panic!("{key} is missing"));
                seen += 1;
                needs.extend(object.needs());
            }
            assert!(seen >= 4, "nexthop, link, neighbour, forwarding entry");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_kind_of_object_that_is_deleted_comes_back() {
    let (_, kernels, overlays) = pair().await;
    let (kernel, overlay) = (&kernels[0], &overlays[0]);
    let ours: Objects = kernel
        .objects()
        .into_iter()
        .filter(|(_, object)| match object {
            Object::Route(route) => route.protocol == RouteProtocol::OURS,
            other => other
                .dev()
                .is_some_and(|dev| dev.as_str().starts_with("flannel")),
        })
        .collect();
    let kinds: BTreeSet<&str> = ours.keys().map(ObjectKey::kind).collect();
    let all = ["link", "address", "fdb", "neighbour", "nexthop", "route"];
    assert!(all.iter().all(|kind| kinds.contains(kind)), "{kinds:?}");
    for (key, object) in &ours {
        let kernels_own = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        match key {
            ObjectKey::Sysctl { .. } | ObjectKey::Offload { .. } => continue,
            ObjectKey::Address { ip, .. } if kernels_own(ip) => continue,
            _ => {}
        }
        kernel.delete(key);
        until(Duration::from_secs(1), &format!("{key} is back"), || {
            kernel.get(key).as_ref() == Some(object)
        })
        .await;
        settle(overlay).await;
        let now = kernel.objects();
        assert!(
            ours.iter()
                .all(|(key, object)| now.get(key) == Some(object)),
            "after {key}"
        );
    }
    assert!(overlay.status().repairs >= ours.len() as u64 - 4);
}

#[tokio::test(start_paused = true)]
async fn every_kind_of_object_that_is_altered_is_put_right() {
    let (_, kernels, overlays) = pair().await;
    let (kernel, overlay) = (&kernels[0], &overlays[0]);
    let before = kernel.objects();
    let mut altered = 0;
    for (key, object) in &before {
        let Some(other) = alter(object) else { continue };
        kernel
            .external(&Op::Change(other))
            .unwrap_or_else(|error| panic!("{key}: {error}"));
        // Of a setting there is no hint: it waits for the timer.
        until(Duration::from_secs(3), &format!("{key} is right"), || {
            kernel.get(key).as_ref() == Some(object)
        })
        .await;
        settle(overlay).await;
        assert_eq!(kernel.objects(), before, "after {key}");
        altered += 1;
    }
    assert!(altered >= 10, "{altered}");
}

/// The object with something else in it that a stranger might put there.
fn alter(object: &Object) -> Option<Object> {
    let ours = |dev: IfName| dev.as_str().starts_with("flannel");
    match object.clone() {
        Object::Link(link) if ours(link.name) => Some(Object::Link(Link {
            mtu: Some(1300),
            up: link.name.as_str() == "flannel.1",
            ..link
        })),
        Object::Fdb(mut fdb) if ours(fdb.dev) => {
            fdb.remote = match fdb.remote {
                IpAddr::V4(_) => "192.0.2.99".parse().ok()?,
                IpAddr::V6(_) => "2001:db8::99".parse().ok()?,
            };
            Some(Object::Fdb(fdb))
        }
        Object::Neighbour(mut neighbour) if ours(neighbour.dev) => {
            neighbour.mac = MacAddr([2, 0, 0, 0, 0, 9]);
            Some(Object::Neighbour(neighbour))
        }
        Object::Nexthop(mut nexthop) if nexthop.protocol == RouteProtocol::OURS => {
            nexthop.gateway = match nexthop.gateway {
                IpAddr::V4(_) => "10.42.99.0".parse().ok()?,
                IpAddr::V6(_) => "fd00:42:99::".parse().ok()?,
            };
            Some(Object::Nexthop(nexthop))
        }
        Object::Sysctl(mut sysctl) if ours(sysctl.dev) => {
            "1".clone_into(&mut sysctl.value);
            Some(Object::Sysctl(sysctl))
        }
        Object::Route(mut route) if route.protocol == RouteProtocol::OURS => {
            route.target = RouteTarget::Device(dev("eth0"));
            Some(Object::Route(route))
        }
        _ => None,
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_changes_nothing_that_is_right() {
    let (manager, kernels, [a, b]) = pair().await;
    let before = kernels[0].objects();
    let lease = a.status().lease.clone();
    a.stop().await.expect("it was running");
    kernels[0].take_log();
    let a = start("a", &manager, &kernels[0]).await;
    settle(&a).await;
    assert_eq!(kernels[0].take_log(), [], "no op at all");
    assert_eq!(kernels[0].objects(), before);
    assert_eq!(
        a.status().lease.as_ref().map(|l| l.subnet),
        lease.map(|l| l.subnet)
    );
    drop(b);
}

#[tokio::test(start_paused = true)]
async fn dropping_the_handle_touches_nothing() {
    let (_, kernels, [a, b]) = pair().await;
    let before = kernels[0].objects();
    drop(a);
    drop(b);
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(kernels[0].objects(), before);
}

#[tokio::test(start_paused = true)]
async fn teardown_leaves_the_namespace_as_it_was() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let before = kernel.objects();
    let a = start("a", &manager, &kernel).await;
    manager.put_raw(peer(9, "10.42.99.0/24")).expect("stored");
    settle(&a).await;
    assert!(kernel.objects().len() > before.len() + 6);
    let preview = a.teardown_plan().await.expect("a plan");
    assert!(!preview.steps.is_empty());
    a.teardown().await.expect("all removed");
    assert_eq!(kernel.objects(), before);
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_of_a_converged_overlay_is_empty() {
    let (_, kernels, overlays) = pair().await;
    let plan = overlays[0].plan().await.expect("a plan");
    assert_eq!((plan.steps.len(), plan.foreign.len()), (0, 0));
    kernels[0].fail_next(FaultKind::HintsLost);
    let dst = subnet_of(&overlays[1], Family::V4);
    kernels[0].delete(&route_to(&kernels[0], dst).expect("it is there").key());
    let plan = overlays[0].plan().await.expect("a plan");
    assert_eq!(plan.steps.len(), 1, "{plan:?}");
    assert!(
        route_to(&kernels[0], dst).is_none(),
        "a dry run changes nothing"
    );
}

#[tokio::test(start_paused = true)]
async fn lost_hints_are_made_good_by_the_timer() {
    let (_, kernels, overlays) = pair().await;
    let dst = subnet_of(&overlays[1], Family::V4);
    kernels[0].fail_next(FaultKind::HintsLost);
    kernels[0].delete(&route_to(&kernels[0], dst).expect("it is there").key());
    kernels[0].assert_faults_consumed();
    until(Duration::from_secs(70), "the route is back", || {
        route_to(&kernels[0], dst).is_some()
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_leaves_is_removed_and_one_that_moves_is_followed() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    let first = peer(9, "10.42.99.0/24");
    manager.put_raw(first.clone()).expect("stored");
    settle(&a).await;
    let dst = "10.42.99.0/24".parse().expect("a subnet");
    assert!(route_to(&kernel, dst).is_some());

    let mut moved = first.clone();
    moved.attrs.public_ip = PublicIp::v4([192, 0, 2, 77].into());
    let data = VxlanData {
        vni: 1,
        vtep_mac: MacAddr([0x0e, 0, 0, 0, 2, 7]),
    };
    moved.attrs.backend_data = DualStack::v4(data.encode().expect("valid"));
    manager.put_raw(moved).expect("stored");
    settle(&a).await;
    let fdbs: Vec<_> = kernel
        .objects()
        .into_values()
        .filter_map(|object| match object {
            Object::Fdb(fdb) => Some((fdb.mac, fdb.remote)),
            _ => None,
        })
        .collect();
    assert_eq!(
        fdbs,
        [(data.vtep_mac, IpAddr::from([192, 0, 2, 77]))],
        "no stale entry"
    );

    assert!(manager.remove(&first.key));
    settle(&a).await;
    assert!(route_to(&kernel, dst).is_none());
    let mut left = kernel.objects().into_keys().filter(|key| key.rank() >= 4);
    assert!(!left.any(|key| key.to_string().contains("10.42.99")));
}

#[tokio::test(start_paused = true)]
async fn hostile_records_harm_nobody_and_are_reported() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    let own = subnet_of(&a, Family::V4).to_string();
    let foreign_before = kernel.objects();
    let mut bad = vec![
        peer(20, "0.0.0.0/1"),
        peer(21, "192.0.2.0/24"),
        peer(22, &own),
        peer(23, "10.42.0.0/16"),
        peer(24, "127.0.0.0/8"),
    ];
    let mut multicast = peer(25, "10.42.25.0/24");
    multicast.attrs.public_ip = PublicIp::v4([224, 0, 0, 1].into());
    bad.push(multicast);
    let mut ours = peer(26, "10.42.26.0/24");
    ours.attrs.public_ip = PublicIp::v4([192, 0, 2, 1].into());
    bad.push(ours);
    let mut no_mac = peer(27, "10.42.27.0/24");
    no_mac.attrs.backend_data = DualStack::default();
    bad.push(no_mac);
    let mut other_vni = peer(28, "10.42.28.0/24");
    let data = VxlanData {
        vni: 7,
        vtep_mac: MacAddr([0x0e, 0, 0, 0, 1, 28]),
    };
    other_vni.attrs.backend_data = DualStack::v4(data.encode().expect("valid"));
    bad.push(other_vni);
    let good = peer(30, "10.42.30.0/24");
    let mut same_mac = peer(31, "10.42.31.0/24");
    same_mac.attrs.backend_data = good.attrs.backend_data.clone();
    manager.put_raw(good).expect("stored");
    bad.push(same_mac);
    for lease in &bad {
        let mut lease = lease.clone();
        lease.key = LeaseKey::new(format!("bad-{}", lease.node));
        manager.put_raw(lease).expect("stored");
    }
    settle(&a).await;
    assert!(route_to(&kernel, "10.42.30.0/24".parse().expect("a subnet")).is_some());
    let status = a.status();
    let reported: BTreeSet<&str> = status.rejected.iter().map(|r| r.key.as_str()).collect();
    assert_eq!(reported.len(), bad.len(), "{:?}", status.rejected);
    let routes = kernel.objects().into_values().filter(
        |object| matches!(object, Object::Route(route) if route.protocol == RouteProtocol::OURS),
    );
    assert_eq!(routes.count(), 1, "only the good one");
    let now = kernel.objects();
    assert!(
        foreign_before
            .iter()
            .all(|(key, object)| now.get(key) == Some(object))
    );
}

#[tokio::test(start_paused = true)]
async fn a_refused_object_never_delays_other_peers() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    let bad = MacAddr([0x0e, 0, 0, 0, 1, 40]);
    let key = ObjectKey::Fdb {
        dev: dev("flannel.1"),
        mac: bad,
    };
    kernel.refuse(key.clone(), Failure::Rejected);
    manager.put_raw(peer(40, "10.42.40.0/24")).expect("stored");
    manager.put_raw(peer(41, "10.42.41.0/24")).expect("stored");
    let (bad, good) = (
        "10.42.40.0/24".parse().expect("a subnet"),
        "10.42.41.0/24".parse().expect("a subnet"),
    );
    until(Duration::from_millis(50), "the good peer is there", || {
        route_to(&kernel, good).is_some()
    })
    .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(
        route_to(&kernel, bad).is_none(),
        "no route without its forwarding entry"
    );
    let failing = a.status().failing.clone();
    assert_eq!(failing.len(), 1, "{failing:?}");
    assert!(
        failing[0].attempts < 20,
        "tries are spaced: {}",
        failing[0].attempts
    );
    manager.put_raw(peer(42, "10.42.42.0/24")).expect("stored");
    let late = "10.42.42.0/24".parse().expect("a subnet");
    until(Duration::from_millis(50), "one that came later too", || {
        route_to(&kernel, late).is_some()
    })
    .await;
    kernel.accept(&key);
    until(Duration::from_secs(31), "the bad peer heals", || {
        route_to(&kernel, bad).is_some()
    })
    .await;
    settle(&a).await;
    assert!(a.status().failing.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_foreign_route_is_reported_and_left_alone() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let dst: Subnet = "10.42.50.0/24".parse().expect("a subnet");
    let foreign = Object::Route(Route {
        table: MAIN_TABLE,
        dst,
        metric: 0,
        target: RouteTarget::Device(dev("eth0")),
        protocol: RouteProtocol(4),
        source: None,
    });
    kernel.insert_foreign(foreign.clone()).expect("it fits");
    let a = start("a", &manager, &kernel).await;
    manager.put_raw(peer(50, "10.42.50.0/24")).expect("stored");
    settle(&a).await;
    let status = a.status();
    assert_eq!(status.foreign.len(), 1);
    assert_eq!(status.foreign[0].found, foreign);
    assert_eq!(
        status.condition(ConditionType::Foreign).map(|c| c.status),
        Some(ConditionStatus::False)
    );
    assert_eq!(kernel.get(&foreign.key()), Some(foreign.clone()));
    kernel.delete(&foreign.key());
    until(Duration::from_secs(1), "ours takes the free place", || {
        matches!(route_to(&kernel, dst), Some(Object::Route(r)) if r.protocol == RouteProtocol::OURS)
    })
    .await;
}

/// An IPv6 route moves from direct routing into the tunnel by way of a stopgap. While that fails, the
/// stopgap alone would be made and removed without end, each time with a hint to look again.
#[tokio::test(start_paused = true)]
async fn a_stopgap_waits_with_what_it_is_made_for() {
    let direct = DUAL.replace(r#""vxlan""#, r#""vxlan", "DirectRouting": true"#);
    let manager = MemoryManager::new(config(&direct));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let a = start("a", &manager, &kernels[0]).await;
    let b = start("b", &manager, &kernels[1]).await;
    settle(&a).await;
    let through = subnet_of(&b, Family::V6).address();
    let id = nexthop_id(&OverlayName::default(), through, dev("flannel-v6.1"), true);
    kernels[0].refuse(ObjectKey::Nexthop(id), Failure::Busy);
    // So that time passes even if it turns in circles.
    kernels[0].set_latency(Duration::from_millis(1));
    kernels[0].take_log();
    manager.set_config(config(DUAL));
    tokio::time::sleep(Duration::from_secs(20)).await;
    let tries = kernels[0].log().len();
    assert!(tries < 200, "{tries} ops in 20 s");
    let old = route_to(&kernels[0], subnet_of(&b, Family::V6));
    assert!(old.is_some(), "the old way stays until there is a new one");
    kernels[0].accept(&ObjectKey::Nexthop(id));
    a.wait_for(|status| status.is_true(ConditionType::Kernel))
        .await
        .expect("running");
    assert!(kernels[0].get(&ObjectKey::Nexthop(id)).is_some());
}

/// IPv6 takes no gateway in a tunnel while a route of the administrator's leads to it elsewhere.
#[tokio::test(start_paused = true)]
async fn a_wider_route_of_others_keeps_no_peer_out() {
    let manager = MemoryManager::new(config(DUAL));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let theirs = Object::Route(Route {
        table: MAIN_TABLE,
        dst: "fd00::/8".parse().expect("a subnet"),
        metric: 1024,
        target: RouteTarget::Gateway {
            gateway: "2001:db8::fe".parse().expect("an address"),
            dev: dev("eth0"),
            onlink: false,
        },
        protocol: RouteProtocol(4),
        source: None,
    });
    kernels[0]
        .insert_foreign(theirs.clone())
        .expect("its key is free");
    let a = start("a", &manager, &kernels[0]).await;
    let b = start("b", &manager, &kernels[1]).await;
    settle(&a).await;
    for family in Family::ALL {
        assert!(
            route_to(&kernels[0], subnet_of(&b, family)).is_some(),
            "{family}"
        );
    }
    assert_eq!(kernels[0].get(&theirs.key()), Some(theirs));
}

/// Neither what is refused, nor what timed out while it waits for that, is looked at all the time.
#[tokio::test(start_paused = true)]
async fn what_waits_for_something_refused_has_no_tries_of_its_own() {
    let manager = MemoryManager::new(config(DUAL));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let a = start("a", &manager, &kernels[0]).await;
    settle(&a).await;
    // The batch for the peer ends with both nexthops and both routes, which then have failed.
    kernels[0].fail_next(FaultKind::ApplyTimesOut { after: 3 });
    let b = start("b", &manager, &kernels[1]).await;
    let gateway = subnet_of(&b, Family::V6).address();
    let neighbour = ObjectKey::Neighbour {
        dev: dev("flannel-v6.1"),
        ip: gateway,
    };
    kernels[0].refuse(neighbour.clone(), Failure::Unsupported);
    kernels[0].delete(&neighbour);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let before = kernels[0].observations();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let looks = kernels[0].observations() - before;
    assert!(looks < 100, "{looks} readings in a minute");
    kernels[0].assert_faults_consumed();
}

#[tokio::test(start_paused = true)]
async fn draining_releases_first_and_removes_after_the_grace() {
    let (manager, kernels, [a, b]) = pair().await;
    let dst = subnet_of(&a, Family::V4);
    let drain = tokio::spawn(async move { a.drain(Duration::from_secs(5)).await });
    until(Duration::from_secs(1), "the peer drops it", || {
        route_to(&kernels[1], dst).is_none()
    })
    .await;
    assert!(
        kernels[0].get(&ObjectKey::Link(dev("flannel.1"))).is_some(),
        "still forwarding"
    );
    drain.await.expect("no panic").expect("drained");
    assert!(kernels[0].get(&ObjectKey::Link(dev("flannel.1"))).is_none());
    assert_eq!(manager.snapshot().leases.len(), 1);
    drop(b);
}

#[tokio::test(start_paused = true)]
async fn what_go_flannel_left_is_adopted_without_a_gap() {
    let manager = MemoryManager::new(config(
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#,
    ));
    manager.put_raw(peer(9, "10.42.99.0/24")).expect("stored");
    // Run once to see what is right, then put it there as Go flannel would have.
    let model = FakeKernel::node(1);
    let a = start("a", &manager, &model).await;
    settle(&a).await;
    a.stop().await.expect("it was running");
    let kernel = FakeKernel::node(1);
    for object in model.objects().into_values() {
        let object = match object {
            Object::Link(Link {
                kind: LinkKind::Vxlan(vxlan),
                name,
                mtu,
                mac,
                up,
                ..
            }) => {
                let kind = LinkKind::Vxlan(vxlan);
                Object::Link(Link {
                    name,
                    kind,
                    mtu,
                    mac,
                    up,
                    alias: None,
                })
            }
            Object::Route(route) if route.protocol == RouteProtocol::OURS => Object::Route(Route {
                target: RouteTarget::Gateway {
                    gateway: route.dst.address(),
                    dev: dev("flannel.1"),
                    onlink: true,
                },
                protocol: RouteProtocol::BOOT,
                ..route
            }),
            Object::Nexthop(_) => continue,
            other => other,
        };
        if kernel.get(&object.key()).is_none() {
            kernel.insert_foreign(object).expect("it fits");
        }
    }
    kernel.take_log();
    let route = route_to(&kernel, "10.42.99.0/24".parse().expect("a subnet"));
    let a = start("a", &manager, &kernel).await;
    settle(&a).await;
    assert_eq!(
        route_to(&kernel, "10.42.99.0/24".parse().expect("a subnet")),
        route,
        "untouched"
    );
    for entry in kernel.take_log() {
        let harmless = match &entry.op {
            Op::Change(Object::Link(_)) => true, // the alias: our mark
            Op::Create(Object::Nexthop(_)) => true,
            Op::Change(Object::Sysctl(_)) => true,
            _ => false,
        };
        assert!(harmless, "{entry:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn one_seed_replays_one_history() {
    let run = || async {
        let manager = MemoryManager::new(config(DUAL));
        let kernel = FakeKernel::node(1);
        kernel.refuse(
            ObjectKey::Fdb {
                dev: dev("flannel.1"),
                mac: MacAddr([0x0e, 0, 0, 0, 1, 40]),
            },
            Failure::Busy,
        );
        let a = start("a", &manager, &kernel).await;
        manager.put_raw(peer(40, "10.42.40.0/24")).expect("stored");
        tokio::time::sleep(Duration::from_secs(200)).await;
        let status = serde_json::to_string(&*a.status()).expect("it serialises");
        (status, format!("{:?}", kernel.take_log()))
    };
    assert_eq!(run().await, run().await);
}

#[tokio::test(start_paused = true)]
async fn it_stays_right_when_readings_are_disturbed_and_hints_overrun() {
    let (_, kernels, overlays) = pair().await;
    let (kernel, overlay) = (&kernels[0], &overlays[0]);
    let before = kernel.objects();
    let dst = subnet_of(&overlays[1], Family::V4);
    let route = route_to(kernel, dst).expect("it is there");
    for fault in [
        FaultKind::Observe {
            failure: Failure::Interrupted,
        },
        FaultKind::Observe {
            failure: Failure::TimedOut,
        },
        FaultKind::Overrun,
        FaultKind::ApplyTimesOut { after: 0 },
        FaultKind::Op {
            kind: "route",
            failure: Failure::Busy,
        },
    ] {
        let what = format!("{fault:?}");
        kernel.fail_next(fault);
        kernel.delete(&route.key());
        until(Duration::from_secs(2), &what, || {
            route_to(kernel, dst).is_some()
        })
        .await;
        settle(overlay).await;
        assert_eq!(kernel.objects(), before, "{what}");
        kernel.assert_faults_consumed();
    }
}

/// What programs read must not change its form unnoticed.
#[tokio::test(start_paused = true)]
async fn status_is_stable_json() {
    let manager = MemoryManager::new(config(
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#,
    ));
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    let mut bad = peer(9, "10.43.0.0/24");
    bad.key = LeaseKey::new("bad");
    manager.put_raw(bad).expect("stored");
    settle(&a).await;
    let mut status = serde_json::to_value(&*a.status()).expect("it serialises");
    // Of what was before, one has the form of all.
    let history = status["history"].as_array_mut().expect("a list");
    history.truncate(1);
    for list in ["conditions", "history"] {
        for condition in status[list].as_array_mut().expect("a list") {
            condition["since"] = "…".into();
        }
    }
    let text = serde_json::to_string_pretty(&status).expect("it serialises") + "\n";
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/status.json");
    let expected = std::fs::read_to_string(golden).unwrap_or_default();
    assert_eq!(
        text, expected,
        "if the change is meant, write this to tests/golden/status.json"
    );
    let back: flannel_core::Status =
        serde_json::from_value(serde_json::to_value(&*a.status()).expect("it serialises"))
            .expect("and comes back");
    assert_eq!(back, *a.status());
}
