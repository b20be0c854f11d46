//! The whole SDK on fakes: stores that answer late, with an error or never, a kernel that lies, an
//! underlay that changes its mind; tokio's clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::collections::{BTreeSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use common::*;
use flannel_backend_vxlan::{VxlanBackend, VxlanData};
use flannel_core::keeper::LossPolicy;
use flannel_core::kernel::Result as KernelResult;
use flannel_core::manager::{self, LeaseRequest};
use flannel_core::{
    Capabilities, ChangeStream, Clock, ConditionType, Event, EventStream, Family, Features, IfName,
    Kernel, Lease, MAIN_TABLE, MacAddr, Manager, MemoryManager, NetworkConfig, Object, ObjectKey,
    Objects, Observed, Op, Overlay, OverlayBuilder, Route, RouteProtocol, RouteTarget, Scope,
    Subnet,
};
use flannel_testkit::fake_kernel::{FakeKernel, FaultKind};
use futures_core::Stream;
use tokio::time::{Instant, sleep};

/// What goes wrong in one call of a store, or in one watch.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// Another node was faster.
    Conflict,
    /// The store does not answer, and says so.
    Down,
    /// The call reaches nobody and is never answered.
    NoAnswer,
    /// It is done at once and answered after this time.
    Late(Duration),
    /// The watch ends.
    Ends,
}

/// A store whose next calls go wrong as the test says, first to last; then all is well.
#[derive(Debug, Clone)]
struct Faulty {
    inner: MemoryManager,
    acquiring: Faults,
    renewing: Faults,
    watching: Faults,
}

type Faults = Arc<Mutex<VecDeque<Fault>>>;

impl Faulty {
    fn new(inner: &MemoryManager) -> Self {
        Self {
            inner: inner.clone(),
            acquiring: Faults::default(),
            renewing: Faults::default(),
            watching: Faults::default(),
        }
    }

    fn builder(&self, kernel: &FakeKernel) -> OverlayBuilder {
        Overlay::builder(node("a"))
            .manager(self.clone())
            .backend(VxlanBackend::new())
            .kernel(kernel.clone())
    }
}

fn plan(faults: &Faults, coming: impl IntoIterator<Item = Fault>) {
    faults.lock().expect("no panic inside").extend(coming);
}

fn next(faults: &Faults) -> Option<Fault> {
    faults.lock().expect("no panic inside").pop_front()
}

async fn suffer<T>(
    faults: &Faults,
    call: impl Future<Output = manager::Result<T>>,
) -> manager::Result<T> {
    match next(faults) {
        None => call.await,
        Some(Fault::Conflict) => Err(manager::Error::Conflict {
            reason: "another node was faster".to_owned(),
        }),
        Some(Fault::Down) => Err(manager::Error::unavailable("it is down")),
        Some(Fault::NoAnswer | Fault::Ends) => std::future::pending().await,
        Some(Fault::Late(time)) => {
            let result = call.await;
            sleep(time).await;
            result
        }
    }
}

#[async_trait]
impl Manager for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    async fn network_config(&self) -> manager::Result<NetworkConfig> {
        self.inner.network_config().await
    }
    async fn acquire_lease(&self, request: &LeaseRequest) -> manager::Result<Lease> {
        suffer(&self.acquiring, self.inner.acquire_lease(request)).await
    }
    async fn renew_lease(&self, lease: &Lease) -> manager::Result<Lease> {
        suffer(&self.renewing, self.inner.renew_lease(lease)).await
    }
    async fn release_lease(&self, lease: &Lease) -> manager::Result<()> {
        self.inner.release_lease(lease).await
    }
    fn watch_leases(&self) -> EventStream {
        Box::pin(Faltering {
            fault: next(&self.watching),
            inner: self.inner.watch_leases(),
        })
    }
}

/// A watch that begins with an error, or ends at once.
struct Faltering {
    fault: Option<Fault>,
    inner: EventStream,
}

impl Stream for Faltering {
    type Item = manager::Result<Event>;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.fault.take() {
            None => self.inner.as_mut().poll_next(cx),
            Some(Fault::Ends) => Poll::Ready(None),
            Some(_) => Poll::Ready(Some(Err(manager::Error::unavailable("wait a moment")))),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_race_for_a_subnet_is_run_again() {
    let (inner, kernel) = (MemoryManager::new(config(DUAL)), FakeKernel::node(1));
    let manager = Faulty::new(&inner);
    plan(&manager.acquiring, [Fault::Conflict; 8]);
    let a = manager.builder(&kernel).start().await.expect("parts");
    ready_within(Duration::from_secs(300), &a).await;
}

#[tokio::test(start_paused = true)]
async fn a_config_that_comes_back_before_another_fits_is_in_force_again() {
    let single = r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#;
    let (inner, kernel) = (MemoryManager::new(config(single)), FakeKernel::node(1));
    let manager = Faulty::new(&inner);
    let a = manager.builder(&kernel).start().await.expect("parts");
    ready_within(Duration::from_secs(10), &a).await;
    // The other family's subnet is long in coming.
    plan(&manager.acquiring, [Fault::NoAnswer]);
    inner.set_config(config(DUAL));
    until(Duration::from_secs(10), "our lease does not fit", || {
        !a.status().is_true(ConditionType::Config)
    })
    .await;
    inner.set_config(config(single));
    until(Duration::from_secs(10), "it fits again", || {
        a.status().is_true(ConditionType::Config)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_never_answered_is_made_again() {
    let (inner, kernel) = (MemoryManager::new(config(DUAL)), FakeKernel::node(1));
    let manager = Faulty::new(&inner);
    plan(&manager.acquiring, [Fault::NoAnswer; 2]);
    let a = manager.builder(&kernel).start().await.expect("parts");
    ready_within(Duration::from_secs(120), &a).await;
}

/// The store began to count when it wrote the record, not when we heard of it.
#[tokio::test(start_paused = true)]
async fn a_lease_ends_as_early_as_the_store_may_think() {
    let ttl = Duration::from_secs(40);
    let inner = MemoryManager::new(config(DUAL)).with_ttl(ttl);
    let kernel = FakeKernel::node(1);
    let manager = Faulty::new(&inner);
    plan(&manager.acquiring, [Fault::Late(Duration::from_secs(20))]);
    plan(&manager.renewing, [Fault::Down; 1000]);
    let asked = Instant::now();
    let builder = manager.builder(&kernel).on_lease_lost(LossPolicy::Hold);
    let a = builder.start().await.expect("parts");
    ready_within(ttl, &a).await;
    until(ttl * 2, "the lease is over", || {
        !a.status().is_true(ConditionType::Lease)
    })
    .await;
    assert!(asked.elapsed() <= ttl + Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_another_node_takes_is_lost() {
    let (manager, kernel) = (MemoryManager::new(config(DUAL)), FakeKernel::node(1));
    let a = start("a", &manager, &kernel).await;
    let ours = manager.snapshot().leases.remove(0);
    let thief = peer(9, "10.42.99.0/24");
    let taken = Lease {
        node: thief.node,
        attrs: thief.attrs,
        ..ours.clone()
    };
    manager.put_raw(taken).expect("stored");
    until(Duration::from_secs(60), "the node moves", || {
        let status = a.status();
        let lease = status.lease.as_ref().expect("a lease");
        lease.key != ours.key && status.is_true(ConditionType::Lease)
    })
    .await;
    settle(&a).await;
    let old = ours.subnet.v4.expect("dual stack");
    assert!(route_to(&kernel, old).is_some(), "it is a peer's now");
}

#[tokio::test(start_paused = true)]
async fn a_watch_goes_on_after_errors_and_ends() {
    let (inner, kernel) = (MemoryManager::new(config(DUAL)), FakeKernel::node(1));
    let manager = Faulty::new(&inner);
    plan(&manager.watching, [Fault::Ends, Fault::Ends, Fault::Down]);
    let a = manager.builder(&kernel).start().await.expect("parts");
    ready_within(Duration::from_secs(60), &a).await;
    inner.put_raw(peer(9, "10.42.99.0/24")).expect("stored");
    settle(&a).await;
    assert!(route_to(&kernel, "10.42.99.0/24".parse().expect("a subnet")).is_some());
    assert!(next(&manager.watching).is_none(), "all of them came");
}

#[tokio::test(start_paused = true)]
async fn a_bad_half_of_a_record_never_costs_the_other() {
    let (manager, kernel) = (MemoryManager::new(config(DUAL)), FakeKernel::node(1));
    let a = start("a", &manager, &kernel).await;
    let b = start("b", &manager, &FakeKernel::node(2)).await;
    let all = manager.snapshot().leases;
    let good = all.into_iter().find(|lease| lease.node == *b.node());
    let good = good.expect("it holds a lease");
    b.stop().await.expect("it was running");
    for family in Family::ALL {
        let mut spoilt = good.clone();
        let other_vni = VxlanData {
            vni: 7,
            vtep_mac: MacAddr([0x0e, 0, 0, 0, 1, 7]),
        };
        let data = other_vni.encode().expect("valid");
        spoilt.attrs.backend_data.set(family, Some(data));
        manager.put_raw(spoilt).expect("stored");
        settle(&a).await;
        for (half, subnet) in good.subnet.iter() {
            let is_there = route_to(&kernel, *subnet).is_some();
            assert_eq!(is_there, half != family, "{half} with a bad {family} half");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_reported_success_and_did_nothing_is_repeated() {
    let (_manager, [kernel, _other], [a, b]) = pair().await;
    let dst = subnet_of(&b, Family::V4);
    let route = route_to(&kernel, dst).expect("it is there");
    kernel.fail_next(FaultKind::Ignored { kind: "route" });
    kernel.delete(&route.key());
    until(Duration::from_secs(1), "the route is back", || {
        route_to(&kernel, dst).is_some()
    })
    .await;
    kernel.assert_faults_consumed();
    settle(&a).await;
}

#[tokio::test(start_paused = true)]
async fn direct_routing_follows_the_underlays_routes() {
    let direct = DUAL.replace(r#""vxlan""#, r#""vxlan", "DirectRouting": true"#);
    let (manager, kernel) = (MemoryManager::new(config(&direct)), FakeKernel::node(1));
    let a = start("a", &manager, &kernel).await;
    manager.put_raw(peer(9, "10.42.99.0/24")).expect("stored");
    settle(&a).await;
    let dst: Subnet = "10.42.99.0/24".parse().expect("a subnet");
    let through = |name: &str| hop(&kernel, dst) == Some(dev(name));
    assert!(through("eth0"), "both are on one link");

    let detour = Object::Route(Route {
        table: MAIN_TABLE,
        dst: "192.0.2.9/32".parse().expect("a subnet"),
        metric: 0,
        target: RouteTarget::Gateway {
            gateway: [192, 0, 2, 254].into(),
            dev: dev("eth0"),
            onlink: false,
        },
        protocol: RouteProtocol::BOOT,
        source: None,
    });
    kernel.insert_foreign(detour.clone()).expect("it fits");
    until(Duration::from_secs(1), "the tunnel is taken", || {
        through("flannel.1")
    })
    .await;
    kernel.delete(&detour.key());
    until(Duration::from_secs(1), "the direct way is back", || {
        through("eth0")
    })
    .await;
    settle(&a).await;
}

/// The device that packets to a subnet leave by.
fn hop(kernel: &FakeKernel, dst: Subnet) -> Option<IfName> {
    match route_to(kernel, dst)? {
        Object::Route(Route {
            target: RouteTarget::Nexthop(id),
            ..
        }) => kernel.get(&ObjectKey::Nexthop(id))?.dev(),
        route => route.dev(),
    }
}

/// A kernel that counts time asleep.
#[derive(Debug, Clone)]
struct Clocked {
    kernel: FakeKernel,
    clock: Sleepy,
}

#[async_trait]
impl Kernel for Clocked {
    async fn features(&self) -> KernelResult<Features> {
        self.kernel.features().await
    }
    async fn observe(&self, scope: &Scope) -> KernelResult<Observed> {
        self.kernel.observe(scope).await
    }
    async fn settings(&self, keys: &BTreeSet<ObjectKey>) -> KernelResult<Objects> {
        self.kernel.settings(keys).await
    }
    async fn apply(&self, ops: &[Op]) -> Vec<KernelResult<()>> {
        self.kernel.apply(ops).await
    }
    fn changes(&self) -> ChangeStream {
        self.kernel.changes()
    }
    fn clock(&self) -> Option<Arc<dyn Clock>> {
        Some(Arc::new(self.clock.clone()))
    }
}

#[tokio::test(start_paused = true)]
async fn the_kernels_clock_is_used_where_it_has_one() {
    let ttl = Duration::from_secs(86_400);
    let manager = MemoryManager::new(config(DUAL)).with_ttl(ttl);
    let clock = Sleepy::new();
    let a = Overlay::builder(node("a"))
        .manager(manager)
        .backend(VxlanBackend::new())
        .kernel(Clocked {
            kernel: FakeKernel::node(1),
            clock: clock.clone(),
        })
        .on_lease_lost(LossPolicy::Hold)
        .start()
        .await
        .expect("parts");
    ready_within(Duration::from_secs(60), &a).await;
    clock.sleep(ttl * 2);
    until(Duration::from_secs(60), "the lease is over", || {
        !a.status().is_true(ConditionType::Lease)
    })
    .await;
}
