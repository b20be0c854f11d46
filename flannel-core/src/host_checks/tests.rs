//! Laws of the judge.

use super::*;
use crate::host_facts::PacketSettings;

fn dev(name: &str) -> IfName {
    IfName::new(name).expect("a device name")
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn way(n: u8, kind: WayKind) -> Way {
    let about = ip(&format!("10.5.{n}.1"));
    let lookup = match kind {
        WayKind::Out { .. } => Lookup::to(about, None),
        WayKind::In { .. } => Lookup::from(about, ip("10.5.1.0"), dev("flannel.1")),
    };
    Way {
        peer: LeaseKey::new(format!("10.5.{n}.0-24")),
        about,
        lookup,
        kind,
    }
}

fn out(n: u8) -> Way {
    let dst = format!("10.5.{n}.0/24").parse().expect("a subnet");
    let kind = WayKind::Out {
        route: ObjectKey::Route {
            table: MAIN_TABLE,
            dst,
            metric: 0,
        },
        dev: dev("flannel.1"),
        gateway: Some(ip(&format!("10.5.{n}.0"))),
    };
    way(n, kind)
}

fn through(name: &str, gateway: Option<&str>) -> Option<Routed> {
    Some(Routed::Through {
        dev: dev(name),
        gateway: gateway.map(ip),
        table: MAIN_TABLE,
    })
}

fn plan(ways: Vec<Way>) -> HostPlan {
    HostPlan {
        networks: vec!["10.5.0.0/16".parse().expect("a subnet")],
        inputs: BTreeSet::from([(Family::V4, dev("flannel.1"))]),
        ways,
    }
}

fn find(plan: &HostPlan, facts: &HostFacts, kind: ConditionType) -> Finding {
    let findings = judge(plan, facts, &Objects::new());
    let found = findings.into_iter().find(|finding| finding.kind == kind);
    found.expect("one of each")
}

#[test]
fn a_kernel_that_cannot_say_anything_is_never_said_to_be_off() {
    let plan = plan(vec![out(2), way(2, WayKind::In { carries: false })]);
    for finding in judge(&plan, &HostFacts::default(), &Objects::new()) {
        assert_eq!(finding.status, ConditionStatus::Unknown, "{finding:?}");
        assert!(!finding.message.is_empty());
    }
}

#[test]
fn ipv4_forwarding_is_the_devices_own_where_that_is_known_and_ipv6_is_the_global_one() {
    let (on, off) = (Some(true), Some(false));
    for (family, own, global, expected) in [
        (Family::V4, on, off, on),
        (Family::V4, off, on, off),
        (Family::V4, None, off, off),
        (Family::V4, None, on, on),
        (Family::V4, None, None, None),
        (Family::V6, off, on, on),
        (Family::V6, off, off, off),
        (Family::V6, on, off, on),
        (Family::V6, None, off, off),
        (Family::V6, on, None, None),
    ] {
        let mut facts = HostFacts::default();
        let flannel = dev("flannel.1");
        for (dev, forwarding) in [(Some(flannel), own), (None, global)] {
            let settings = PacketSettings {
                forwarding,
                ..PacketSettings::default()
            };
            facts.settings.insert((family, dev), settings);
        }
        let found = forwards(&facts, family, flannel);
        assert_eq!(found, expected, "{family} {own:?} {global:?}");
    }
}

#[test]
fn only_what_concerns_every_peer_asked_about_stops_work() {
    let plan = plan(vec![out(2), out(3), out(4)]);
    let right = |n| through("flannel.1", Some(&format!("10.5.{n}.0")));
    let wrong = through("eth0", None);
    let mut facts = HostFacts {
        routed: vec![right(2), wrong.clone(), right(4)],
        ..HostFacts::default()
    };
    let found = find(&plan, &facts, ConditionType::Routes);
    assert_eq!(
        (found.is_off(), found.reason),
        (true, "SomeRoutedElsewhere")
    );
    assert!(found.message.contains("10.5.3.0-24") && !found.message.contains("10.5.2.0-24"));
    assert_eq!(suspects(&plan, &facts), [ip("10.5.3.1")].into());
    // Of whom nothing is known says nothing.
    facts.routed = vec![wrong.clone(), wrong, None];
    let found = find(&plan, &facts, ConditionType::Routes);
    assert_eq!((found.is_off(), found.reason), (true, ALL_ELSEWHERE));
}

#[test]
fn another_gateway_on_the_same_device_is_another_way() {
    let plan = plan(vec![out(2)]);
    for (answer, is_off) in [
        (through("flannel.1", Some("10.5.2.0")), false),
        (through("flannel.1", Some("10.5.3.0")), true),
        (through("flannel.1", None), true),
        (Some(Routed::Local), true),
        (Some(Routed::Refused(Refused::NoRoute)), true),
    ] {
        let facts = HostFacts {
            routed: vec![answer.clone()],
            ..HostFacts::default()
        };
        let found = find(&plan, &facts, ConditionType::Routes);
        assert_eq!(found.is_off(), is_off, "{answer:?}");
    }
}

#[test]
fn a_packet_is_dropped_by_a_filter_only_where_there_is_one() {
    let plan = plan(vec![way(2, WayKind::In { carries: false })]);
    let dropped = Routed::Refused(Refused::Dropped);
    for (filter, answer, is_off) in [
        (ReversePath::Off, dropped.clone(), false),
        (ReversePath::Strict, dropped.clone(), true),
        (ReversePath::Loose, dropped, true),
        (ReversePath::Strict, Routed::Local, false),
        (
            ReversePath::Strict,
            Routed::Refused(Refused::Unreachable),
            false,
        ),
    ] {
        let mut facts = HostFacts {
            routed: vec![Some(answer.clone())],
            ..HostFacts::default()
        };
        let settings = PacketSettings {
            reverse_path: Some(filter),
            ..PacketSettings::default()
        };
        // The higher one is in force, whichever that is.
        for dev in [None, Some(dev("flannel.1"))] {
            facts.settings.clear();
            facts.settings.insert((Family::V4, dev), settings);
            let found = find(&plan, &facts, ConditionType::ReversePath);
            assert_eq!(found.is_off(), is_off, "{filter:?} {answer:?}");
        }
    }
}
