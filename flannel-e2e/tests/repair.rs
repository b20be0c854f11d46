//! Whatever is deleted or altered comes back, and packets pass again.
#![allow(missing_docs, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use flannel_backend_vxlan::{ChecksumOffload, VxlanBackend};
use flannel_core::{
    Family, Fdb, Link, MAIN_TABLE, MacAddr, Neighbour, Nexthop, Object, ObjectKey, Objects,
    Offload, Op, Route, RouteProtocol, RouteTarget, Sysctl,
};
use flannel_e2e::{Cluster, DUAL, DUAL_GW, DUAL_UDP, Node, Setup, dev, run_in};

/// So long between two readings without a hint that whatever is repaired in time is hinted at.
const NEVER: Duration = Duration::from_secs(3600);

/// Two nodes that look at the kernel when it hints at a change, never by the clock.
fn on_hints(config: &'static str) -> Setup {
    Setup {
        tune: Arc::new(|builder| builder.resync_every(NEVER)),
        ..Setup::new(2, config)
    }
}

const fn is_v6(object: &Object) -> bool {
    match object {
        Object::Route(route) => matches!(route.dst.family(), Family::V6),
        Object::Nexthop(nexthop) => nexthop.gateway.is_ipv6(),
        Object::Address(address) => address.ip.is_ipv6(),
        Object::Neighbour(neighbour) => neighbour.ip.is_ipv6(),
        Object::Fdb(fdb) => fdb.remote.is_ipv6(),
        _ => false,
    }
}

/// One object of each kind and family.
fn one_of_each(right: &Objects) -> Vec<&Object> {
    let mut firsts: BTreeMap<(u8, bool, bool), &Object> = BTreeMap::new();
    for (key, object) in right {
        let v6_link = matches!(key, ObjectKey::Link(name) if name.as_str().contains("v6"));
        firsts
            .entry((key.rank(), is_v6(object), v6_link))
            .or_insert(object);
    }
    firsts.into_values().collect()
}

/// Breaks a node, and waits until it is as before and every pod reaches every other.
async fn heals(cluster: &Cluster, right: &Objects, what: &str, ops: &[Op]) {
    let node = &cluster.nodes[0];
    node.break_by(ops).await;
    node.repaired(what, right).await;
    cluster.assert_reachable(what);
    node.converged().await;
    node.repaired(&format!("{what}, later"), right).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_object_that_is_deleted_comes_back() {
    let all = ["address", "fdb", "link", "neighbour", "nexthop", "route"];
    deleted("deleted", DUAL, &all).await;
    deleted("deleted-gw", DUAL_GW, &["nexthop", "route"]).await;
    deleted("deleted-udp", DUAL_UDP, &["address", "link", "route"]).await;
}

async fn deleted(test: &str, config: &'static str, all: &[&str]) {
    let Some(cluster) = Cluster::start(test, on_hints(config)).await else {
        return;
    };
    let right = cluster.nodes[0].ours().await;
    let objects = one_of_each(&right);
    let mut kinds: BTreeSet<&str> = objects.iter().map(|object| object.key().kind()).collect();
    for object in objects {
        if !matches!(object, Object::Sysctl(_) | Object::Offload(_)) {
            let ops = [Op::Delete(object.clone())];
            heals(&cluster, &right, &format!("{object} deleted"), &ops).await;
        }
    }
    kinds.retain(|kind| !["sysctl", "offload"].contains(kind));
    assert!(kinds.iter().eq(all), "{kinds:?}");
}

/// The ways to alter an object in place.
fn alterations(object: &Object) -> Vec<Object> {
    let other_mac = MacAddr([0x0e, 9, 9, 9, 9, 9]);
    match object.clone() {
        Object::Link(link) => {
            let mtu = link.mtu.map(|mtu| mtu - 100);
            let mut changed = vec![
                Link {
                    mtu,
                    ..link.clone()
                },
                Link {
                    up: false,
                    ..link.clone()
                },
            ];
            // A TUN device has none.
            changed.extend(link.mac.map(|_| Link {
                mac: Some(other_mac),
                ..link.clone()
            }));
            changed.into_iter().map(Object::Link).collect()
        }
        Object::Fdb(fdb) => {
            let remote: IpAddr = match fdb.remote {
                IpAddr::V4(_) => [192, 0, 2, 200].into(),
                IpAddr::V6(_) => "2001:db8:1::200".parse().expect("an address"),
            };
            vec![Object::Fdb(Fdb { remote, ..fdb })]
        }
        Object::Neighbour(neighbour) => vec![Object::Neighbour(Neighbour {
            mac: other_mac,
            ..neighbour
        })],
        Object::Nexthop(nexthop) => {
            let gateway: IpAddr = match (nexthop.gateway, nexthop.onlink) {
                (IpAddr::V4(_), true) => [10, 42, 99, 0].into(),
                (IpAddr::V6(_), true) => "fd00:42:99::".parse().expect("an address"),
                (IpAddr::V4(_), false) => [192, 0, 2, 200].into(),
                (IpAddr::V6(_), false) => "2001:db8:1::200".parse().expect("an address"),
            };
            vec![Object::Nexthop(Nexthop { gateway, ..nexthop })]
        }
        Object::Route(route) => vec![
            Object::Route(Route {
                target: RouteTarget::Device(dev("eth0")),
                ..route.clone()
            }),
            Object::Route(Route {
                target: RouteTarget::Blackhole,
                ..route
            }),
        ],
        _ => Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_object_that_is_altered_is_put_right() {
    altered("altered", DUAL).await;
    altered("altered-gw", DUAL_GW).await;
    altered("altered-udp", DUAL_UDP).await;
}

async fn altered(test: &str, config: &'static str) {
    let Some(cluster) = Cluster::start(test, on_hints(config)).await else {
        return;
    };
    let right = cluster.nodes[0].ours().await;
    for object in one_of_each(&right) {
        for altered in alterations(object) {
            let what = format!("{object:?} altered to {altered:?}");
            heals(&cluster, &right, &what, &[Op::Change(altered)]).await;
        }
    }
}

/// Deletes of all objects that a condition holds for, in an order that works.
fn deletes(right: &Objects, condition: impl Fn(&Object) -> bool) -> Vec<Op> {
    let objects = right.values().rev().filter(|object| condition(object));
    objects.cloned().map(Op::Delete).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_flushed_at_once_comes_back() {
    let vxlan = [
        &["address"][..],
        &["route"],
        &["nexthop"],
        &["neighbour", "fdb"],
        &["fdb", "neighbour", "nexthop", "route", "address"],
        &["link"],
        &["link", "route", "nexthop"],
    ];
    flushed("flushed", DUAL, &vxlan).await;
    let host_gw = [&["route"][..], &["nexthop"], &["route", "nexthop"]];
    flushed("flushed-gw", DUAL_GW, &host_gw).await;
    let udp = [&["address"][..], &["route"], &["address", "route"]];
    flushed("flushed-udp", DUAL_UDP, &udp).await;
}

async fn flushed(test: &str, config: &'static str, flushes: &[&[&str]]) {
    let Some(cluster) = Cluster::start(test, on_hints(config)).await else {
        return;
    };
    let right = cluster.nodes[0].ours().await;
    let is_kind = |object: &Object, kinds: &[&str]| kinds.contains(&object.key().kind());
    for kinds in flushes {
        let ops = deletes(&right, |object| is_kind(object, kinds));
        assert!(ops.len() >= 2, "{kinds:?}");
        heals(&cluster, &right, &format!("{kinds:?} flushed"), &ops).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_are_altered_are_put_right() {
    // The kernel does not hint at every one of them: the timer finds them.
    let setup = Setup {
        tune: Arc::new(|builder| builder.resync_every(Duration::from_secs(1))),
        backend: VxlanBackend::new().with_checksum_offload(ChecksumOffload::Off),
        ..Setup::new(2, DUAL)
    };
    let Some(cluster) = Cluster::start("settings", setup).await else {
        return;
    };
    let right = cluster.nodes[0].ours().await;
    let mut kinds = BTreeSet::new();
    for object in right.values() {
        let altered = match object.clone() {
            Object::Sysctl(sysctl) => Object::Sysctl(Sysctl {
                value: "2".to_owned(),
                ..sysctl
            }),
            Object::Offload(offload) => Object::Offload(Offload {
                on: !offload.on,
                ..offload
            }),
            _ => continue,
        };
        kinds.insert(object.key().kind());
        let what = format!("{object} altered");
        heals(&cluster, &right, &what, &[Op::Change(altered)]).await;
    }
    assert!(kinds.into_iter().eq(["offload", "sysctl"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_lost_our_mark_gets_it_back() {
    let Some(cluster) = Cluster::start("unmarked", on_hints(DUAL)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let right = node.ours().await;
    for device in ["flannel.1", "flannel-v6.1"] {
        run_in(&node.host.ns, &format!("ip link set {device} alias ''"));
        heals(&cluster, &right, &format!("{device} unmarked"), &[]).await;
    }
}

/// A route that another has put in the place of ours is left, and what is ours comes back when it
/// goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_route_that_is_replaced_by_another_comes_back_after_that_is_gone() {
    replaced("replaced", DUAL).await;
    replaced("replaced-gw", DUAL_GW).await;
}

async fn replaced(test: &str, config: &'static str) {
    let Some(cluster) = Cluster::start(test, on_hints(config)).await else {
        return;
    };
    let node = &cluster.nodes[0];
    let right = node.ours().await;
    let mut routes = right.values().filter_map(|object| match object {
        Object::Route(route) => Some(route.clone()),
        _ => None,
    });
    let route = routes.next().expect("there is a peer");
    let theirs = Object::Route(Route {
        table: MAIN_TABLE,
        target: RouteTarget::Device(dev("eth0")),
        protocol: RouteProtocol(4),
        ..route
    });
    node.break_by(&[Op::Change(theirs.clone())]).await;
    let seen = node
        .overlay()
        .wait_for(|status| status.foreign.iter().any(|blocked| blocked.found == theirs));
    flannel_e2e::within("it is reported", flannel_e2e::LIMIT, seen)
        .await
        .expect("running");
    node.overlay().resync().await.expect("running");
    let now = node.objects().await;
    assert_eq!(now.get(&theirs.key()), Some(&theirs));
    heals(&cluster, &right, "theirs removed", &[Op::Delete(theirs)]).await;
    assert_eq!(node.overlay().status().foreign, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn repairs_are_counted_and_told() {
    let Some(cluster) = Cluster::start("told", on_hints(DUAL)).await else {
        return;
    };
    let node: &Node = &cluster.nodes[0];
    let right = node.ours().await;
    let mut events = node.overlay().events();
    let gone = right.values().next_back().expect("routes come last");
    node.break_by(&[Op::Delete(gone.clone())]).await;
    node.repaired("a route", &right).await;
    node.converged().await;
    assert_eq!(node.overlay().status().repairs, 1);
    let mut told = 0;
    while let Ok(event) = events.try_recv() {
        if let flannel_core::OverlayEvent::Step { step, repair: true } = event {
            assert_eq!(step.op.object(), gone);
            told += 1;
        }
    }
    assert_eq!(told, 1);
}
