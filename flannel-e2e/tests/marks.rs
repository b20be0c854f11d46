//! Somebody takes the mark of our devices on a real kernel: no packet is lost, and they stay ours.
#![allow(missing_docs, reason = "tests")]

use std::sync::Arc;

use flannel_core::{Family, Kernel, Link, Object, ObjectKey, Scope};
use flannel_e2e::{Cluster, DUAL, DUAL_UDP, LIMIT, Node, Path, Setup, dev, no_loss, run_in, until};

async fn alias(node: &Node, name: &str) -> Option<String> {
    let observed = node.hand.observe(&Scope::default()).await;
    let objects = observed.expect("readable").objects;
    match objects.get(&ObjectKey::Link(dev(name))) {
        Some(Object::Link(Link { alias, .. })) => alias.clone(),
        other => panic!("{other:?}"),
    }
}

/// `''` takes it away.
fn set_alias(node: &Node, name: &str, alias: &str) {
    let command = format!("ip link set dev {name} alias {alias}");
    run_in(&node.host.ns, &command);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_without_its_mark_is_marked_again_and_loses_no_packet() {
    for (config, devices) in [
        (DUAL, &["flannel.1", "flannel-v6.1"][..]),
        (DUAL_UDP, &["flannel0"][..]),
    ] {
        let mut setup = Setup::new(2, config);
        // Nothing but what we know ourselves tells that a bare device is ours.
        setup.tune = Arc::new(|builder| builder.adopt_flannel(false));
        let Some(mut cluster) = Cluster::start("marks", setup).await else {
            return;
        };
        let pods = &cluster.pods;
        let path: Path<'_> = (&pods[0], &pods[1], Family::V4);
        let node = &cluster.nodes[0];
        let right = node.ours().await;
        no_loss("marks that are taken", &[path], async || {
            for taken in ["''", "somebody"] {
                for name in devices {
                    set_alias(node, name, taken);
                    until("it is marked again", LIMIT, async || {
                        alias(node, name).await.as_deref() == Some("flannel:flannel")
                    })
                    .await;
                }
            }
        })
        .await;
        node.repaired("nothing else was touched", &right).await;
        let status = node.overlay().status();
        assert!(status.working && status.foreign.is_empty(), "{status:?}");
        if config == DUAL_UDP {
            // While no overlay runs: who holds the queues knows whose the device is.
            let overlay = cluster.nodes[0].take_overlay();
            overlay.stop().await.expect("running");
            set_alias(&cluster.nodes[0], "flannel0", "''");
            cluster.restart(0).await;
            let node = &cluster.nodes[0];
            node.repaired("it is marked again", &right).await;
            cluster.assert_reachable("after the restart");
        }
    }
}
