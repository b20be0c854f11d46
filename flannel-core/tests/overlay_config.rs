//! The whole SDK on fakes: a config that changes in the store is applied while the overlay runs, or
//! it is said why not, what stays, and what a restart would do. Tokio's clock is paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    Condition, ConditionStatus, ConditionType, Family, Link, Object, ObjectKey, Objects, Op,
    Overlay, OverlayEvent, TokioClock,
};
use flannel_testkit::fake_kernel::FakeKernel;
use flannel_testkit::fake_store::{FakeStore, Layout, StoreManager, StoreOptions};

const V4: &str = r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// One node whose config and lease are in a store of flannel's layout.
struct World {
    store: FakeStore,
    kernel: FakeKernel,
    state: Option<Memory>,
}

impl World {
    fn new(config: &str) -> Self {
        let world = Self {
            store: FakeStore::new(Arc::new(TokioClock::new())),
            kernel: FakeKernel::node(1),
            state: None,
        };
        world.set_config(config);
        world
    }

    fn set_config(&self, text: &str) {
        self.store.put(Layout::default().config(), text);
    }

    /// A record of another node.
    fn peer(&self, n: u8) {
        let lease = peer(n, &format!("10.42.{n}.0/24"));
        let value =
            flannel_core::wire::lease_value(&lease.node, None, &lease.attrs).expect("a value");
        let key = format!("{}/{}", Layout::default().subnets(), lease.key);
        self.store.put(key, value);
    }

    /// Starts the node, as a fresh process does.
    async fn start(&self) -> Overlay {
        let manager = StoreManager::new(self.store.link("a"), StoreOptions::default());
        let mut builder = Overlay::builder(node("a"))
            .manager(manager)
            .backend(VxlanBackend::new())
            .kernel(self.kernel.clone());
        if let Some(state) = &self.state {
            builder = builder.state(state.clone());
        }
        builder.start().await.expect("all parts are there")
    }

    async fn ready(&self) -> Overlay {
        let overlay = self.start().await;
        overlay.ready().await.expect("ready");
        settle(&overlay).await;
        overlay
    }

    fn has_route_to(&self, n: u8) -> bool {
        let subnet = format!("10.42.{n}.0/24").parse().expect("a subnet");
        route_to(&self.kernel, subnet).is_some()
    }
}

fn config_condition(overlay: &Overlay) -> Condition {
    let status = overlay.status();
    let condition = status.condition(ConditionType::Config);
    condition.expect("it is there").clone()
}

/// Whatever is applied while it runs is what a restart would have made of it.
#[tokio::test(start_paused = true)]
async fn a_config_that_can_be_used_is_applied_at_once_as_a_restart_would() {
    let changes = [
        ("Network", V4.replace("10.42.", "10.77.")),
        ("SubnetLen", V4.replace("/16\"", "/16\",\"SubnetLen\":26")),
        (
            "SubnetMin",
            V4.replace(
                "/16\"",
                "/16\",\"SubnetMin\":\"10.42.200.0\",\"SubnetMax\":\"10.42.201.0\"",
            ),
        ),
        ("VNI", V4.replace("vxlan\"", "vxlan\",\"VNI\":7")),
        ("Port", V4.replace("vxlan\"", "vxlan\",\"Port\":4789")),
        ("EnableIPv6", DUAL.to_owned()),
    ];
    for (what, new) in changes {
        // There, and back again.
        for (from, to) in [(V4, new.as_str()), (new.as_str(), V4)] {
            let world = World::new(from);
            let overlay = world.ready().await;
            let mut events = overlay.events();
            world.set_config(to);
            let applied = async {
                while events.recv().await.expect("more") != OverlayEvent::ConfigApplied {}
            };
            let applied = tokio::time::timeout(Duration::from_secs(2), applied).await;
            applied.unwrap_or_else(|_| panic!("{what}: it is delivered at once"));
            until(Duration::from_secs(60), what, || {
                let status = overlay.status();
                let lease = status.lease.as_ref();
                lease.is_some_and(|lease| config(to).fits(&lease.subnet))
            })
            .await;
            settle(&overlay).await;
            let condition = config_condition(&overlay);
            assert_eq!(
                condition.status,
                ConditionStatus::True,
                "{what}: {condition:?}"
            );
            assert_eq!(condition.reason, "Applied", "{what}");
            let now = world.kernel.objects();
            overlay.stop().await.expect("it was running");
            drop(world.ready().await);
            assert_eq!(world.kernel.objects(), now, "{what}: {from} to {to}");
        }
    }
}

/// What cannot be used, the reason in the condition, and a part of its message.
const UNUSABLE: [(&str, &str, &str); 7] = [
    // The pool of the new config holds none of the peers: half of a config must not be applied.
    (
        r#"{"Network":"10.77.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#,
        "InvalidConfig",
        "Backend.VNI",
    ),
    (
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan","MTU":500}}"#,
        "InvalidConfig",
        "Backend.MTU",
    ),
    (
        r#"{"Network":"10.77.0.0/16","Backend":{"Type":"wireguard"}}"#,
        "UnknownBackend",
        "no such backend, only vxlan",
    ),
    ("{", "Unreadable", "JSON"),
    (r#"{"Network":"10.42.0.0/29"}"#, "Unreadable", "Network"),
    (
        r#"{"Network":"10.42.0.0/16","SubnetLen":31}"#,
        "Unreadable",
        "SubnetLen",
    ),
    (
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:42::/48","Backend":{"Type":"vxlan"}}"#,
        "Unreadable",
        "IPv6 alone",
    ),
];

/// The overlay goes on for ten minutes as if nothing had been written, and follows its peers.
async fn goes_on(world: &World, overlay: &Overlay, n: u8) {
    let before = world.kernel.objects();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(world.kernel.objects(), before);
    assert!(overlay.status().is_true(ConditionType::Lease));
    world.peer(n);
    settle(overlay).await;
    assert!(world.has_route_to(n), "new peers are followed");
}

/// Ten minutes in which nothing at all is done to the kernel.
async fn is_left_alone(world: &World, before: &Objects) {
    world.kernel.take_log();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(world.kernel.take_log(), []);
    assert_eq!(world.kernel.objects(), *before);
}

#[tokio::test(start_paused = true)]
async fn a_config_that_cannot_be_used_changes_nothing_and_it_is_said_what_a_restart_would_do() {
    for (bad, reason, part) in UNUSABLE {
        for state in [None, Some(Memory::default())] {
            let is_saved = state.is_some();
            let world = World {
                state,
                ..World::new(V4)
            };
            world.peer(90);
            let overlay = world.ready().await;
            world.set_config(bad);
            settle(&overlay).await;
            let condition = config_condition(&overlay);
            let said = (condition.status, condition.reason.as_str());
            assert_eq!(said, (ConditionStatus::False, reason), "{bad}");
            let message = &condition.message;
            assert!(message.contains(part), "{bad}: {message}");
            let stays = "the last good config stays in force";
            assert!(message.contains(stays), "{bad}: {message}");
            goes_on(&world, &overlay, 91).await;

            // What it says of a restart is so.
            let before = world.kernel.objects();
            overlay.stop().await.expect("it was running");
            let restarted = world.start().await;
            let restart = if reason != "Unreadable" {
                is_left_alone(&world, &before).await;
                "a restart would build nothing, and leave the kernel as it is until that is mended"
            } else if is_saved {
                tokio::time::sleep(Duration::from_secs(10)).await;
                world.peer(92);
                settle(&restarted).await;
                assert!(
                    world.has_route_to(92),
                    "{bad}: it goes on with the saved one"
                );
                "a restart would go on with that too, as it is in the saved state"
            } else {
                is_left_alone(&world, &before).await;
                "a restart would wait for one that can be read, and leave the kernel as it is"
            };
            assert!(message.contains(restart), "{bad}: {message}");

            world.set_config(V4);
            let limit = Duration::from_secs(120);
            until(limit, "a good one is taken", || {
                let status = restarted.status();
                status.ready && status.is_true(ConditionType::Config)
            })
            .await;
            settle(&restarted).await;
            assert!(world.has_route_to(90) && world.has_route_to(91));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_config_that_is_gone_changes_nothing() {
    let world = World::new(V4);
    world.peer(90);
    let overlay = world.ready().await;
    assert!(world.store.delete(Layout::default().config()));
    settle(&overlay).await;
    let condition = config_condition(&overlay);
    assert_eq!(condition.reason, "Unreadable");
    let message = &condition.message;
    assert!(
        message.contains("no network config in the store") && message.contains("a restart would"),
        "{message}"
    );
    goes_on(&world, &overlay, 91).await;
    world.set_config(V4);
    settle(&overlay).await;
    assert_eq!(config_condition(&overlay).reason, "Applied");
}

/// The host can change, too.
#[tokio::test(start_paused = true)]
async fn a_config_that_the_host_does_not_fit_is_applied_once_it_does() {
    let world = World::new(V4);
    let eth0 = dev("eth0");
    let set_mtu = |mtu| {
        let Some(Object::Link(link)) = world.kernel.get(&ObjectKey::Link(eth0)) else {
            panic!("eth0 is there");
        };
        let link = Link {
            mtu: Some(mtu),
            ..link
        };
        let change = Op::Change(Object::Link(link));
        world.kernel.external(&change).expect("it is lawful");
    };
    // Enough for IPv4 in a tunnel, and too little for IPv6.
    set_mtu(1300);
    let overlay = world.ready().await;
    world.set_config(DUAL);
    settle(&overlay).await;
    let status = overlay.status();
    let families = status.condition(ConditionType::Families).expect("told");
    assert_eq!(families.status, ConditionStatus::False);
    assert!(families.message.contains("1350"), "{families:?}");
    assert!(status.working && status.is_true(ConditionType::Config));
    let v6 = ObjectKey::Link(dev("flannel-v6.1"));
    assert_eq!(world.kernel.get(&v6), None);
    set_mtu(1500);
    until(Duration::from_secs(120), "both families", || {
        overlay.status().is_true(ConditionType::Families)
    })
    .await;
    settle(&overlay).await;
    assert!(world.kernel.get(&v6).is_some());
}

/// A family that the host cannot carry costs the other nothing, and is told.
#[tokio::test(start_paused = true)]
async fn a_host_without_an_address_of_a_new_family_keeps_the_other() {
    let world = World {
        kernel: FakeKernel::empty()
            .with_link("eth0", 1500, &[([192, 0, 2, 1].into(), 24)])
            .with_default_route("eth0", [192, 0, 2, 254].into()),
        ..World::new(V4)
    };
    world.peer(90);
    let overlay = world.ready().await;
    let before = world.kernel.objects();
    world.set_config(DUAL);
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(world.kernel.objects(), before);
    let status = overlay.status();
    assert!(status.working, "{status:?}");
    let families = status.condition(ConditionType::Families).expect("told");
    assert_eq!(families.status, ConditionStatus::False);
    assert!(
        families.message.contains("no usable IPv6 address"),
        "{families:?}"
    );
    let lease = status.lease.as_ref().expect("it is held");
    assert!(
        lease.subnet.has(Family::V6) && !lease.public_ip.has(Family::V6),
        "{lease:?}"
    );
}
