//! The whole SDK on fakes with the UDP backend: whose devices are left alone, what is lost with a
//! program, and a node that cannot follow its network; tokio's clock paused.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::time::Duration;

use common::FakePath;
use flannel_backend_udp::{UdpBackend, WithTunnels};
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    BackendType, ConditionType, IfName, Kernel, Link, LinkKind, MemoryManager, NetworkConfig,
    NodeId, Object, ObjectKey, Overlay, PoolMode, Tun,
};
use flannel_testkit::fake_kernel::FakeKernel;

const UDP: &str = r#"{"Network":"10.42.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:42::/48",
    "Backend":{"Type":"udp"}}"#;

fn config(text: &str) -> NetworkConfig {
    NetworkConfig::from_json(text, PoolMode::Allocated).expect("valid")
}

fn device() -> IfName {
    IfName::new("flannel0").expect("a name")
}

async fn start(name: &str, manager: &MemoryManager, kernel: &FakeKernel) -> Overlay {
    start_on(name, manager, kernel.clone()).await
}

async fn start_on(name: &str, manager: &MemoryManager, kernel: impl Kernel) -> Overlay {
    Overlay::builder(NodeId::new(name).expect("an id"))
        .manager(manager.clone())
        .backend(UdpBackend::new())
        .backend(VxlanBackend::new())
        .kernel(kernel)
        .start()
        .await
        .expect("all parts are there")
}

async fn settle(overlay: &Overlay) {
    tokio::time::sleep(Duration::from_secs(1)).await;
    overlay.converged().await.expect("running");
}

/// Go flannel's device, or a VPN's, keeps its name for as long as it is there.
#[tokio::test(start_paused = true)]
async fn a_device_of_somebody_else_is_left_alone_and_reported() {
    for tun in [
        // Go flannel's, OpenVPN's, and one made just as ours.
        (false, false),
        (true, false),
        (true, true),
    ] {
        let manager = MemoryManager::new(config(UDP));
        let kernel = FakeKernel::node(1);
        let theirs = Object::Link(Link {
            name: device(),
            kind: LinkKind::Tun(Tun {
                persistent: tun.0,
                multi_queue: tun.1,
                vnet_header: tun.1,
                queue: Some(500),
            }),
            mtu: Some(1472),
            mac: None,
            up: true,
            alias: None,
        });
        kernel.insert_foreign(theirs.clone()).expect("it fits");
        let a = start("a", &manager, &kernel).await;
        tokio::time::sleep(Duration::from_secs(120)).await;
        let key = ObjectKey::Link(device());
        assert_eq!(kernel.get(&key), Some(theirs), "{tun:?}");
        let ours = ["address", "tunnel", "tunnel-peer"];
        let objects = kernel.objects();
        let on_it = objects
            .values()
            .filter(|object| object.dev() == Some(device()));
        for object in on_it {
            assert!(!ours.contains(&object.key().kind()), "{object}");
        }
        let status = a.status();
        assert!(!status.foreign.is_empty(), "{status:?}");
        // Once it is gone, ours is made.
        kernel.delete_link(device());
        settle(&a).await;
        assert!(kernel.get(&ObjectKey::Tunnel(device())).is_some());
        assert!(a.status().foreign.is_empty());
        a.stop().await.expect("running");
    }
}

/// With its program a packet path is lost, with all that is on its device, and made again.
#[tokio::test(start_paused = true)]
async fn what_is_lost_with_a_program_is_made_again() {
    let manager = MemoryManager::new(config(UDP));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let a = start("a", &manager, &kernels[0]).await;
    let b = start("b", &manager, &kernels[1]).await;
    settle(&a).await;
    settle(&b).await;
    let before = kernels[0].objects();
    a.stop().await.expect("running");
    kernels[0].lose_tunnels();
    let left = kernels[0].objects();
    let is_on_it =
        |key: &&ObjectKey| **key == ObjectKey::Link(device()) || key.dev() == Some(device());
    assert_eq!(left.keys().find(is_on_it), None);
    let a = start("a", &manager, &kernels[0]).await;
    settle(&a).await;
    assert_eq!(kernels[0].objects(), before);
}

/// A network that goes over to this backend leaves a node as it is that has no packet paths.
#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_carry_packets_keeps_what_it_had() {
    let manager = MemoryManager::new(config(&UDP.replace("udp", "vxlan")));
    let kernel = FakeKernel::node(1);
    let mut features = kernel.features().await.expect("features");
    features.tunnels = false;
    kernel.set_features(features);
    let a = start("a", &manager, &kernel).await;
    settle(&a).await;
    let before = kernel.objects();
    manager.set_config(config(UDP));
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(kernel.objects(), before);
    let status = a.status();
    let condition = status.condition(ConditionType::Config).expect("it is told");
    assert!(condition.message.contains("WithTunnels"), "{condition:?}");
    assert_eq!(status.backend, Some(BackendType::vxlan()));
}

/// What carries the packets speaks for itself, whatever the backend knows of it.
#[tokio::test(start_paused = true)]
async fn what_a_packet_path_tells_and_counts_is_in_the_status() {
    let manager = MemoryManager::new(config(UDP));
    let fake = FakeKernel::node(1);
    let kernel = WithTunnels::new(fake.clone(), FakePath::new(fake));
    let a = start_on("a", &manager, kernel).await;
    settle(&a).await;
    let status = a.status();
    let is_told = |text: &str| status.notes.iter().any(|note| note.text == text);
    assert!(
        is_told("flannel0: it carries nothing"),
        "{:?}",
        status.notes
    );
    let [traffic] = &status.traffic[..] else {
        panic!("one packet path: {:?}", status.traffic);
    };
    assert_eq!(traffic.dev, device());
    assert_eq!(traffic.counts.get("spoofed"), Some(&7));
    let watched = a.watch_status().borrow().traffic.clone();
    assert_eq!(watched, [], "it would change with every packet");
}

/// The kernel has all that it should have, and yet no packet passes: that is no node at work.
#[tokio::test(start_paused = true)]
async fn a_node_whose_packet_path_carries_nothing_does_not_work_and_says_why() {
    let manager = MemoryManager::new(config(UDP));
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    settle(&a).await;
    assert!(a.status().working);
    // That of a device which is none of ours says nothing of us.
    let other = IfName::new("flannel7").expect("a name");
    kernel.set_path_fault(other, Some("it is somebody else's"));
    settle(&a).await;
    assert!(a.status().working);
    kernel.set_path_fault(device(), Some("a socket gave EIO"));
    settle(&a).await;
    let status = a.status();
    assert!(status.ready && !status.working, "{:?}", status.conditions);
    let condition = status.obstacle().expect("a reason");
    assert_eq!(condition.kind, ConditionType::DataPath);
    assert_eq!(condition.reason, "Broken");
    assert!(condition.message.contains("flannel0"), "{condition:?}");
    assert!(condition.message.contains("EIO"), "{condition:?}");
    kernel.set_path_fault(device(), None);
    settle(&a).await;
    assert!(a.status().working, "{:?}", a.status().conditions);
}
