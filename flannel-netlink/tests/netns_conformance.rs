//! The suite that every kernel passes, on the real one.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::Arc;

use common::netns;
use flannel_netlink::NetlinkKernel;
use flannel_testkit::conformance::kernel::{KernelFixture, Promise};
use flannel_testkit::kernel_conformance;

fn run(promise: Promise) {
    netns(async move |net| {
        let foreign = NetlinkKernel::new().expect("a second kernel");
        let fixture = KernelFixture::prepare(Arc::new(net.kernel), Arc::new(foreign))
            .await
            .expect("a fixture");
        if let Err(found) = promise(&fixture).await {
            panic!("{found}");
        }
    });
}

kernel_conformance!(run);
