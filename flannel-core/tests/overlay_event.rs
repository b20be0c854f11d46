//! The line for people that each event is.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use common::*;
use flannel_core::reconcile::plan::{Step, Why};
use flannel_core::{
    Condition, ConditionType, DualStack, Family, HeldReason, LeaseKey, MAIN_TABLE, MemoryManager,
    Object, ObjectKey, Op, OverlayEvent, Route, RouteProtocol, RouteTarget, Subnet,
};
use flannel_testkit::fake_kernel::FakeKernel;

fn subnets() -> DualStack<Subnet> {
    let mut subnets = DualStack::v4("10.42.8.0/24".parse().expect("a subnet"));
    subnets.set(
        Family::V6,
        Some("fd00:42:0:8::/64".parse().expect("a subnet")),
    );
    subnets
}

fn route() -> Object {
    Object::Route(Route {
        table: MAIN_TABLE,
        dst: "10.42.9.0/24".parse().expect("a subnet"),
        metric: Route::default_metric(Family::V4),
        protocol: RouteProtocol::OURS,
        target: RouteTarget::Gateway {
            gateway: "192.0.2.9".parse().expect("an address"),
            dev: dev("eth0"),
            onlink: false,
        },
        source: None,
    })
}

fn step(op: Op, why: Why) -> Step {
    Step {
        op,
        why,
        peer: Some(LeaseKey::new("10.42.9.0-24")),
        disrupts: Vec::new(),
    }
}

/// A condition and an interface as a node has them.
async fn of_a_node() -> (Condition, flannel_core::External) {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let overlay = start("a", &manager, &kernel).await;
    let status = overlay.status();
    let condition = status.condition(ConditionType::Kernel).expect("there");
    let external = status.external.clone().expect("chosen");
    (condition.clone(), external)
}

#[tokio::test(start_paused = true)]
async fn each_event_is_one_line_in_these_words() {
    let key = || LeaseKey::new("10.42.8.0-24");
    let (condition, external) = of_a_node().await;
    let mut explained = condition.clone();
    explained.message = "route 10.42.9.0/24 is not ours".to_owned();
    let link = ObjectKey::Link(dev("flannel.1"));
    let events = [
        (
            OverlayEvent::LeaseAcquired { subnet: subnets() },
            "lease acquired: 10.42.8.0/24,fd00:42:0:8::/64",
        ),
        (OverlayEvent::LeaseRenewed, "lease renewed"),
        (
            OverlayEvent::LeaseLost {
                reason: "it was deleted".to_owned(),
            },
            "lease lost: it was deleted",
        ),
        (
            OverlayEvent::PeerAdded {
                key: key(),
                node: node("b"),
                subnet: subnets(),
            },
            "peer added: b by record 10.42.8.0-24, 10.42.8.0/24,fd00:42:0:8::/64",
        ),
        (
            OverlayEvent::PeerChanged {
                key: key(),
                node: node("b"),
                subnet: DualStack::default(),
            },
            "peer changed: b by record 10.42.8.0-24, no subnet",
        ),
        (
            OverlayEvent::PeerRemoved { key: key() },
            "peer removed: record 10.42.8.0-24",
        ),
        (
            OverlayEvent::Step {
                step: step(Op::Create(route()), Why::Missing),
                repair: false,
            },
            "step: create route 10.42.9.0/24 via 192.0.2.9 dev eth0 (missing) for record \
             10.42.9.0-24",
        ),
        (
            OverlayEvent::Step {
                step: step(
                    Op::Change(route()),
                    Why::Drifted {
                        field: "dev: eth1, should be eth0".to_owned(),
                    },
                ),
                repair: true,
            },
            "repair: change route 10.42.9.0/24 via 192.0.2.9 dev eth0 (drifted: dev: eth1, should \
             be eth0) for record 10.42.9.0-24",
        ),
        (
            OverlayEvent::Step {
                step: Step {
                    peer: None,
                    disrupts: vec![link.clone(), link.clone()],
                    ..step(Op::Delete(route()), Why::Orphan)
                },
                repair: false,
            },
            "step: delete route 10.42.9.0/24 (not wanted any more), which takes 2 objects with it",
        ),
        (
            OverlayEvent::Step {
                step: step(
                    Op::Delete(route()),
                    Why::Rebuild {
                        field: "kind".to_owned(),
                    },
                ),
                repair: false,
            },
            "step: delete route 10.42.9.0/24 (made anew: kind) for record 10.42.9.0-24",
        ),
        (
            OverlayEvent::Step {
                step: step(Op::Delete(route()), Why::InTheWay { of: link.clone() }),
                repair: false,
            },
            "step: delete route 10.42.9.0/24 (in the way of link flannel.1) for record \
             10.42.9.0-24",
        ),
        (
            OverlayEvent::StepFailed {
                step: step(Op::Delete(route()), Why::Stopgap { of: link }),
                error: "busy".to_owned(),
            },
            "step failed: delete route 10.42.9.0/24 (for the moment, for link flannel.1) for \
             record 10.42.9.0-24: busy",
        ),
        (
            OverlayEvent::Condition(condition),
            "condition: type=Kernel status=True reason=Converged",
        ),
        (
            OverlayEvent::Condition(explained),
            "condition: type=Kernel status=True reason=Converged: route 10.42.9.0/24 is not ours",
        ),
        (
            OverlayEvent::InterfaceChanged {
                from: external.clone(),
                to: external,
                why: "it was asked for".to_owned(),
            },
            "interface changed: eth0 (192.0.2.1, 2001:db8::1) to eth0 (192.0.2.1, 2001:db8::1): it \
             was asked for",
        ),
        (OverlayEvent::ConfigApplied, "config applied"),
        (
            OverlayEvent::WithdrawalHeld {
                withdrawn: 3,
                known: 5,
                reason: HeldReason::Share,
            },
            "withdrawal held: the store lacks 3 of 5 known peers: a second reading decides",
        ),
        (
            OverlayEvent::WithdrawalHeld {
                withdrawn: 5,
                known: 5,
                reason: HeldReason::NoConfig,
            },
            "withdrawal held: the store lacks 5 of 5 known peers: it has no network config",
        ),
    ];
    for (event, line) in events {
        assert_eq!(event.to_string(), line);
    }
}

#[test]
fn a_hostile_text_stays_in_its_line() {
    let told = |reason: &str| {
        OverlayEvent::LeaseLost {
            reason: reason.to_owned(),
        }
        .to_string()
    };
    assert_eq!(
        told("gone\nlease renewed\r\u{1b}[2J\u{202e}\u{2028}ü"),
        "lease lost: gone\\u{a}lease renewed\\u{d}\\u{1b}[2J\\u{202e}\\u{2028}ü"
    );
    let long = told(&"x".repeat(100_000));
    let end = "x… (98012 more characters)";
    assert!(long.ends_with(end), "{}", &long[long.len() - 60..]);
    assert_eq!(long.chars().count(), 2000 + end.chars().count() - 1);
    let worst = told(&"\n".repeat(100_000));
    assert!(worst.len() < 2000 * 10, "{}", worst.len());
}
