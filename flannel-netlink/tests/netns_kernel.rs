//! What [`NetlinkKernel`] promises, on the real kernel.
#![allow(clippy::print_stderr, reason = "a skipped test says why")]

mod common;

use common::*;
use flannel_core::{Family, Kernel, Object, Op};

#[test]
fn what_is_made_is_seen() {
    netns(async |net| {
        net.with_vxlan().await;
        let mut objects = vec![
            Object::Link(vxlan("flannel.1")),
            address("flannel.1", "10.5.0.0", 32),
            address("flannel.1", "fd00:5::", 128),
        ];
        objects.extend(peer(1, Family::V4));
        objects.extend(peer(2, Family::V6));
        let ops: Vec<_> = objects.iter().cloned().map(Op::Create).collect();
        net.ok(&ops).await;
        for object in &objects {
            assert_eq!(net.find(&object.key()).await.as_ref(), Some(object));
        }
        net.ok(&ops).await;
        eprintln!("{:?}", net.kernel.features().await);
        eprintln!("{}", run("ip -d link show dev flannel.1").unwrap_or_default());
        eprintln!("{}", run("ip addr show dev flannel.1").unwrap_or_default());
        let deletes: Vec<_> = objects.iter().rev().cloned().map(Op::Delete).collect();
        net.ok(&deletes).await;
        for object in &objects {
            assert_eq!(net.find(&object.key()).await, None);
        }
        net.ok(&deletes).await;
    });
}
