//! Nodes on fakes, as several test files need them.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "shared by several test files"
)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use flannel_backend_vxlan::{VxlanBackend, VxlanData};
use flannel_core::{
    BackendType, Clock, DualStack, Family, IfName, Lease, LeaseAttrs, LeaseKey, MAIN_TABLE,
    MacAddr, MemoryManager, Moment, NetworkConfig, NodeId, Object, ObjectKey, Overlay,
    OverlayBuilder, PoolMode, PublicIp, Revision, Route, SavedState, StateStore, Subnet,
    TokioClock,
};
use flannel_testkit::fake_kernel::FakeKernel;

pub const DUAL: &str = r#"{
    "Network": "10.42.0.0/16",
    "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
    "Backend": { "Type": "vxlan" }
}"#;

pub fn config(text: &str) -> NetworkConfig {
    NetworkConfig::from_json(text, PoolMode::Allocated).expect("a valid config")
}

pub fn node(name: &str) -> NodeId {
    NodeId::new(name).expect("a node id")
}

pub fn dev(name: &str) -> IfName {
    IfName::new(name).expect("a device name")
}

pub fn builder(name: &str, manager: &MemoryManager, kernel: &FakeKernel) -> OverlayBuilder {
    Overlay::builder(node(name))
        .manager(manager.clone())
        .backend(VxlanBackend::new())
        .kernel(kernel.clone())
}

pub async fn start(name: &str, manager: &MemoryManager, kernel: &FakeKernel) -> Overlay {
    let overlay = builder(name, manager, kernel)
        .start()
        .await
        .expect("all parts are there");
    overlay.ready().await.expect("ready");
    overlay
}

/// Two nodes on one store that have converged.
pub async fn pair() -> (MemoryManager, [FakeKernel; 2], [Overlay; 2]) {
    let manager = MemoryManager::new(config(DUAL));
    let kernels = [FakeKernel::node(1), FakeKernel::node(2)];
    let a = start("a", &manager, &kernels[0]).await;
    let b = start("b", &manager, &kernels[1]).await;
    settle(&a).await;
    settle(&b).await;
    (manager, kernels, [a, b])
}

/// Waits until an overlay is ready, but not for ever.
pub async fn ready_within(limit: Duration, overlay: &Overlay) {
    let ready = tokio::time::timeout(limit, overlay.ready()).await;
    ready.expect("in time").expect("ready");
}

/// Waits until the overlay has taken in what happened.
pub async fn settle(overlay: &Overlay) {
    tokio::time::sleep(Duration::from_millis(500)).await;
    overlay.converged().await.expect("running");
}

/// Waits for something to hold, in virtual time.
pub async fn until(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let start = tokio::time::Instant::now();
    while !holds() {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

pub fn subnet_of(overlay: &Overlay, family: Family) -> Subnet {
    let status = overlay.status();
    let lease = status.lease.as_ref().expect("a lease");
    *lease.subnet.get(family).expect("a subnet of the family")
}

pub fn route_to(kernel: &FakeKernel, dst: Subnet) -> Option<Object> {
    let metric = Route::default_metric(dst.family());
    kernel.get(&ObjectKey::Route {
        table: MAIN_TABLE,
        dst,
        metric,
    })
}

/// A record as a peer of another host would write it.
pub fn peer(n: u8, subnet: &str) -> Lease {
    let data = VxlanData {
        vni: 1,
        vtep_mac: MacAddr([0x0e, 0, 0, 0, 1, n]),
    };
    let subnet: Subnet = subnet.parse().expect("a subnet");
    Lease {
        key: LeaseKey::new(format!("{}-{}", subnet.address(), subnet.len())),
        instance: None,
        node: node(&format!("peer-{n}")),
        subnet: DualStack::v4(subnet),
        attrs: LeaseAttrs {
            public_ip: PublicIp::v4([192, 0, 2, n].into()),
            backend_type: Some(BackendType::vxlan()),
            backend_data: DualStack::v4(data.encode().expect("valid")),
        },
        ttl: None,
        created: Revision(0),
        revision: Revision(0),
    }
}

/// A saved state in memory.
#[derive(Debug, Clone, Default)]
pub struct Memory(Arc<Mutex<Option<SavedState>>>);

#[async_trait]
impl StateStore for Memory {
    async fn load(&self) -> std::io::Result<Option<SavedState>> {
        Ok(self.0.lock().expect("no panic inside").clone())
    }
    async fn save(&self, state: &SavedState) -> std::io::Result<()> {
        *self.0.lock().expect("no panic inside") = Some(state.clone());
        Ok(())
    }
}

/// A clock that can jump ahead, as that of a machine that slept.
#[derive(Debug, Clone)]
pub struct Sleepy {
    tokio: TokioClock,
    asleep: Arc<Mutex<Duration>>,
}

impl Sleepy {
    pub fn new() -> Self {
        Self {
            tokio: TokioClock::new(),
            asleep: Arc::default(),
        }
    }

    pub fn sleep(&self, time: Duration) {
        *self.asleep.lock().expect("no panic inside") += time;
    }
}

impl Clock for Sleepy {
    fn now(&self) -> Moment {
        self.tokio.now() + *self.asleep.lock().expect("no panic inside")
    }
}
