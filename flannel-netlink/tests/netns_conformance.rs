//! The suite that every kernel passes, on the real one.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::Arc;

use common::{netns, netns_with};
use flannel_netlink::{NetlinkKernel, NetlinkOptions};
use flannel_testkit::conformance::kernel::{self, KernelFixture, Promise};
use flannel_testkit::kernel_conformance;

async fn fixture(kernel: NetlinkKernel) -> KernelFixture {
    let foreign = NetlinkKernel::new().expect("a second kernel");
    KernelFixture::prepare(Arc::new(kernel), Arc::new(foreign))
        .await
        .expect("a fixture")
}

fn run(promise: Promise) {
    netns(async move |net| {
        if let Err(found) = promise(&fixture(net.kernel).await).await {
            panic!("{found}");
        }
    });
}

kernel_conformance!(run);

/// Events that did not fit into the socket's buffer are told as such, and the watch goes on.
#[test]
fn lost_hints_are_told() {
    netns_with(NetlinkOptions::new().watch_buffer(1), async |net| {
        let fixture = fixture(net.kernel).await;
        let outcome = kernel::lost_hints_are_told(&fixture, || {}).await;
        outcome.unwrap_or_else(|found| panic!("{found}"));
    });
}

/// Tried until a call is met in its middle, which takes a few tries at most.
#[test]
fn a_device_deleted_by_others_meanwhile_is_missing_from_then_on() {
    netns(async |net| {
        let fixture = fixture(net.kernel).await;
        for _ in 0..200 {
            match kernel::a_device_deleted_by_others_meanwhile(&fixture).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(found) => panic!("{found}"),
            }
        }
        panic!("no call was met in its middle");
    });
}
