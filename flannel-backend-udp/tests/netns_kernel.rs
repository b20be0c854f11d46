//! The suite that every kernel passes, on the real one with forwarders around it.
#![allow(missing_docs, reason = "tests")]

use std::sync::Arc;

use flannel_backend_udp::{Forwarders, InNamespace, Options, PacketPath, WithTunnels};
use flannel_core::{Change, IfName, Object, Op};
use flannel_netlink::NetlinkKernel;
use flannel_testkit::conformance::kernel::{KernelFixture, Promise};
use flannel_testkit::netns::{Lab, Ns};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

fn kernel(ns: &Ns) -> NetlinkKernel {
    let fd = ns.fd().try_clone_to_owned().expect("a descriptor");
    NetlinkKernel::in_namespace_fd(fd).expect("a kernel")
}

fn forwarders(ns: &Ns) -> Forwarders {
    let fd = ns.fd().try_clone_to_owned().expect("a descriptor");
    Forwarders::new(Options::default(), Arc::new(InNamespace::fd(fd)))
}

async fn fixture(ns: &Ns, paths: Forwarders) -> KernelFixture {
    let tunnels = Arc::new(WithTunnels::new(kernel(ns), paths));
    let fixture = KernelFixture::prepare(tunnels, Arc::new(kernel(ns))).await;
    fixture.expect("a fixture")
}

fn run(promise: Promise) {
    let Some(lab) = Lab::for_test("udp-kernel") else {
        return;
    };
    let ns = lab.namespace("node").expect("a namespace");
    runtime().block_on(async {
        if let Err(found) = promise(&fixture(&ns, forwarders(&ns)).await).await {
            panic!("{found}");
        }
    });
}

flannel_testkit::kernel_conformance!(run);

/// When the device goes, the packet path hints at it by itself, whatever netlink says.
#[test]
fn a_forwarder_hints_at_the_loss_of_its_device() {
    let Some(lab) = Lab::for_test("udp-hints") else {
        return;
    };
    let ns = lab.namespace("node").expect("a namespace");
    runtime().block_on(async {
        let paths = forwarders(&ns);
        let fixture = fixture(&ns, paths.clone()).await;
        let is_tunnels = |object: &Object| {
            object.dev() == IfName::new("fl.tun0").ok() && object.key().kind() != "route"
        };
        let objects = fixture.samples().into_iter().filter(is_tunnels);
        let ops: Vec<Op> = objects.map(Op::Create).collect();
        for result in fixture.kernel.apply(&ops).await {
            result.expect("it can be made");
        }
        assert_eq!(paths.running().len(), 1);
        let mut hints = paths.hints();
        let delete = Op::Delete(ops[0].object().clone());
        for result in fixture.foreign.apply(&[delete]).await {
            result.expect("it can be removed");
        }
        let next = std::future::poll_fn(|cx| hints.as_mut().poll_next(cx));
        let next = tokio::time::timeout(std::time::Duration::from_secs(5), next).await;
        assert_eq!(next.expect("in time"), Some(Change::Link(None)));
        assert_eq!(paths.running(), []);
    });
}
