//! Every seam can be mocked by a downstream crate, and each trait works behind an `Arc<dyn _>`.
#![allow(missing_docs, reason = "tests")]

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::backend::{self, NodeContext};
use flannel_core::kernel::{self, ChangeStream, Features, Observed, Op, Scope};
use flannel_core::manager::{self, LeaseRequest};
use flannel_core::{
    Backend, BackendType, Capabilities, ConditionType, DualStack, EventStream, Kernel, Lease,
    LeaseAttrs, Manager, Network, NetworkConfig, NodeId, Object, Overlay, Rejection, Subnet,
};
use flannel_testkit::fake_kernel::FakeKernel;
use mockall::mock;

mock! {
    #[derive(Debug)]
    Store {}

    #[async_trait]
    impl Manager for Store {
        fn name(&self) -> &'static str;
        fn capabilities(&self) -> Capabilities;
        async fn network_config(&self) -> manager::Result<NetworkConfig>;
        async fn acquire_lease(&self, request: &LeaseRequest) -> manager::Result<Lease>;
        async fn renew_lease(&self, lease: &Lease) -> manager::Result<Lease>;
        async fn release_lease(&self, lease: &Lease) -> manager::Result<()>;
        fn watch_leases(&self) -> EventStream;
    }
}

mock! {
    #[derive(Debug)]
    Carrier {}

    #[async_trait]
    impl Backend for Carrier {
        fn backend_type(&self) -> BackendType;
        fn attrs<'a>(&self, cx: &NodeContext<'a>) -> backend::Result<LeaseAttrs>;
        async fn register_network<'a>(
            &self,
            cx: &NodeContext<'a>,
            lease: Lease,
        ) -> backend::Result<Arc<dyn Network>>;
    }
}

mock! {
    #[derive(Debug)]
    Net {}

    #[async_trait]
    impl Network for Net {
        fn lease(&self) -> &Lease;
        fn mtu(&self) -> u32;
        fn local(&self) -> Vec<Object>;
        fn peer(
            &self,
            peer: &Lease,
            subnets: &DualStack<Subnet>,
        ) -> DualStack<Result<Vec<Object>, Rejection>>;
    }
}

mock! {
    #[derive(Debug)]
    System {}

    #[async_trait]
    impl Kernel for System {
        async fn features(&self) -> kernel::Result<Features>;
        async fn observe(&self, scope: &Scope) -> kernel::Result<Observed>;
        async fn apply(&self, ops: &[Op]) -> Vec<kernel::Result<()>>;
        fn changes(&self) -> ChangeStream;
    }
}

#[tokio::test(start_paused = true)]
async fn a_mocked_store_drives_the_error_paths() {
    let mut store = MockStore::new();
    store.expect_name().return_const("mock");
    store.expect_capabilities().return_const(Capabilities::NONE);
    let mut calls = 0;
    store.expect_network_config().times(3..).returning(move || {
        calls += 1;
        Err(if calls < 3 {
            manager::Error::unavailable("not yet")
        } else {
            manager::Error::NoConfig {
                hint: "write one".to_owned(),
            }
        })
    });
    let mut carrier = MockCarrier::new();
    carrier.expect_backend_type().returning(BackendType::vxlan);
    let overlay = Overlay::builder(NodeId::new("a").expect("a node id"))
        .manager(store)
        .backend(carrier)
        .kernel(FakeKernel::node(1))
        .start()
        .await
        .expect("all parts are there");
    let error = overlay
        .ready()
        .await
        .expect_err("there is no config")
        .to_string();
    assert!(error.contains("write one"), "{error}");
    assert!(!overlay.status().is_true(ConditionType::Store));
}

#[tokio::test(start_paused = true)]
async fn a_mocked_kernel_that_cannot_be_probed_is_reported() {
    let mut system = MockSystem::new();
    system
        .expect_features()
        .returning(|| Err(kernel::Error::lacks_net_admin("socket")));
    system
        .expect_observe()
        .returning(|_| Err(kernel::Error::TimedOut));
    system.expect_changes().returning(|| Box::pin(Silence));
    let mut store = MockStore::new();
    store.expect_name().return_const("mock");
    store.expect_capabilities().return_const(Capabilities::NONE);
    store
        .expect_network_config()
        .returning(|| Err(manager::Error::unavailable("down")));
    let mut carrier = MockCarrier::new();
    carrier.expect_backend_type().returning(BackendType::vxlan);
    let overlay = Overlay::builder(NodeId::new("a").expect("a node id"))
        .manager(store)
        .backend(carrier)
        .kernel(system)
        .start()
        .await
        .expect("all parts are there");
    let error = overlay
        .ready()
        .await
        .expect_err("it cannot work")
        .to_string();
    assert!(error.contains("CAP_NET_ADMIN"), "{error}");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!overlay.status().ready);
    overlay.resync().await.expect("it goes on trying");
}

struct Silence;

impl futures_core::Stream for Silence {
    type Item = flannel_core::Change;
    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::task::Poll::Pending
    }
}

#[test]
fn networks_are_mocked_as_values() {
    let mut net = MockNet::new();
    net.expect_mtu().return_const(1450_u32);
    let net: Arc<dyn Network> = Arc::new(net);
    assert_eq!(net.mtu(), 1450);
}
