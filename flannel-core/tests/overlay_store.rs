//! The whole SDK on fakes: a store that is down, forgets, or loses our lease, tokio's clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use common::*;
use flannel_backend_vxlan::VxlanBackend;
use flannel_core::keeper::LossPolicy;
use flannel_core::manager::{self, LeaseRequest};
use flannel_core::{
    Address, Capabilities, ConditionType, Error, Event, EventStream, Family, Lease, Manager,
    MemoryManager, NetworkConfig, Object, ObjectKey, Overlay, OverlayEvent, Revision,
    RouteProtocol, Snapshot,
};
use flannel_testkit::fake_kernel::{Failure, FakeKernel, FaultKind};
use tokio::time::Instant;

/// A store that is down until told otherwise.
#[derive(Debug)]
struct Flaky {
    inner: MemoryManager,
    up: tokio::sync::watch::Receiver<bool>,
}

impl Flaky {
    fn check(&self) -> manager::Result<()> {
        if *self.up.borrow() {
            Ok(())
        } else {
            Err(manager::Error::unavailable("it is down"))
        }
    }
}

#[async_trait]
impl Manager for Flaky {
    fn name(&self) -> &'static str {
        "flaky"
    }
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    async fn network_config(&self) -> manager::Result<NetworkConfig> {
        self.check()?;
        self.inner.network_config().await
    }
    async fn acquire_lease(&self, request: &LeaseRequest) -> manager::Result<Lease> {
        self.check()?;
        self.inner.acquire_lease(request).await
    }
    async fn renew_lease(&self, lease: &Lease) -> manager::Result<Lease> {
        self.check()?;
        self.inner.renew_lease(lease).await
    }
    async fn release_lease(&self, lease: &Lease) -> manager::Result<()> {
        self.check()?;
        self.inner.release_lease(lease).await
    }
    fn watch_leases(&self) -> EventStream {
        if *self.up.borrow() {
            return self.inner.watch_leases();
        }
        // Ends at once, as after a permanent error: the overlay opens it again and again.
        Box::pin(Ended)
    }
}

struct Ended;

impl futures_core::Stream for Ended {
    type Item = manager::Result<Event>;
    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::task::Poll::Ready(None)
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_boots_while_the_store_is_down() {
    let inner = MemoryManager::new(config(DUAL));
    let state = Memory::default();
    let kernel = FakeKernel::node(1);
    let first = builder("a", &inner, &kernel)
        .state(state.clone())
        .start()
        .await
        .expect("parts");
    first.ready().await.expect("ready");
    let subnet = subnet_of(&first, Family::V4);
    first.stop().await.expect("it was running");

    // After a reboot the kernel is empty, and the store does not answer.
    let kernel = FakeKernel::node(1);
    let (up, rx) = tokio::sync::watch::channel(false);
    let manager = Flaky {
        inner: inner.clone(),
        up: rx,
    };
    let overlay = Overlay::builder(node("a"))
        .manager(manager)
        .backend(VxlanBackend::new())
        .kernel(kernel.clone())
        .state(state)
        .start()
        .await
        .expect("parts");
    ready_within(Duration::from_secs(60), &overlay).await; // the remembered lease is enough
    assert_eq!(subnet_of(&overlay, Family::V4), subnet);
    assert!(kernel.get(&ObjectKey::Link(dev("flannel.1"))).is_some());
    assert!(!overlay.status().is_true(ConditionType::Store));
    assert!(!overlay.status().lease.as_ref().expect("a lease").confirmed);

    up.send(true).expect("it listens");
    overlay
        .wait_for(|status| status.lease.as_ref().is_some_and(|lease| lease.confirmed))
        .await
        .expect("running");
    assert_eq!(subnet_of(&overlay, Family::V4), subnet);
    settle(&overlay).await;
    assert!(overlay.status().is_true(ConditionType::Store));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_down_withdraws_nothing() {
    let inner = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let (up, rx) = tokio::sync::watch::channel(true);
    let a = Overlay::builder(node("a"))
        .manager(Flaky {
            inner: inner.clone(),
            up: rx,
        })
        .backend(VxlanBackend::new())
        .kernel(kernel.clone())
        .start()
        .await
        .expect("parts");
    a.ready().await.expect("ready");
    inner.put_raw(peer(9, "10.42.99.0/24")).expect("stored");
    settle(&a).await;
    let before = kernel.objects();
    up.send(false).expect("it listens");
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(kernel.objects(), before);
}

#[tokio::test(start_paused = true)]
async fn a_restart_while_the_store_is_down_keeps_the_peers_routes() {
    let inner = MemoryManager::new(config(DUAL));
    let state = Memory::default();
    let kernel = FakeKernel::node(1);
    let (up, rx) = tokio::sync::watch::channel(true);
    let run = || {
        let manager = Flaky {
            inner: inner.clone(),
            up: rx.clone(),
        };
        Overlay::builder(node("a"))
            .manager(manager)
            .backend(VxlanBackend::new())
            .kernel(kernel.clone())
            .state(state.clone())
            .start()
    };
    let first = run().await.expect("parts");
    first.ready().await.expect("ready");
    inner.put_raw(peer(9, "10.42.99.0/24")).expect("stored");
    settle(&first).await;
    let before = kernel.objects();
    assert!(route_to(&kernel, "10.42.99.0/24".parse().expect("a subnet")).is_some());
    first.stop().await.expect("it was running");

    up.send(false).expect("it listens");
    let second = run().await.expect("parts");
    ready_within(Duration::from_secs(60), &second).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(kernel.objects(), before, "who the peers are is not known");
}

async fn lose_lease(policy: LossPolicy) -> (MemoryManager, FakeKernel, Overlay, Lease) {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let a = builder("a", &manager, &kernel)
        .on_lease_lost(policy)
        .start()
        .await
        .expect("parts");
    a.ready().await.expect("ready");
    let lease = manager.snapshot().leases.into_iter().next().expect("ours");
    let mut events = a.events();
    assert!(manager.remove(&lease.key));
    loop {
        if let OverlayEvent::LeaseLost { .. } = events.recv().await.expect("it goes on") {
            break;
        }
    }
    (manager, kernel, a, lease)
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_is_asked_for_again() {
    let (manager, _kernel, a, lease) = lose_lease(LossPolicy::Reacquire).await;
    until(Duration::from_secs(60), "it has a lease", || {
        a.status().is_true(ConditionType::Lease)
    })
    .await;
    let again = manager.snapshot().leases.into_iter().next().expect("ours");
    assert_eq!(
        again.subnet, lease.subnet,
        "the same subnet, as it was free"
    );
    assert!(
        again.created > lease.created,
        "a new record, not the old one revived"
    );
}

/// Somebody takes every lease away as soon as it is there.
#[tokio::test(start_paused = true)]
async fn leases_that_are_lost_one_after_the_other_are_asked_for_ever_more_rarely() {
    let (manager, _kernel, a, _) = lose_lease(LossPolicy::Reacquire).await;
    let mut at = Vec::new();
    for _ in 0..8 {
        until(Duration::from_secs(300), "it has a lease", || {
            a.status().is_true(ConditionType::Lease)
        })
        .await;
        at.push(Instant::now());
        let lease = manager.snapshot().leases.into_iter().next().expect("ours");
        assert!(manager.remove(&lease.key));
        until(Duration::from_secs(1), "it knows", || {
            !a.status().is_true(ConditionType::Lease)
        })
        .await;
    }
    let first = at[1] - at[0];
    let last = at[7] - at[6];
    assert!(first < Duration::from_secs(2), "{first:?}");
    assert!(
        last > 10 * first && last < Duration::from_secs(90),
        "{last:?}"
    );

    // After some rest the next loss is as good as the first.
    a.wait_for(|status| status.is_true(ConditionType::Lease))
        .await
        .expect("running");
    tokio::time::sleep(Duration::from_secs(600)).await;
    let lease = manager.snapshot().leases.into_iter().next().expect("ours");
    assert!(manager.remove(&lease.key));
    until(Duration::from_secs(2), "it has a lease", || {
        let records = manager.snapshot().leases;
        records.iter().any(|record| record.created > lease.created)
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_can_be_left_lost() {
    let (manager, kernel, a, _) = lose_lease(LossPolicy::Hold).await;
    let before = kernel.objects();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(
        manager.snapshot().leases.is_empty(),
        "nothing was asked for"
    );
    assert_eq!(kernel.objects(), before, "the data path stays");
    assert!(!a.status().is_true(ConditionType::Lease));
    a.reacquire().await.expect("running");
    a.wait_for(|status| status.is_true(ConditionType::Lease))
        .await
        .expect("running");
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_can_stop_the_overlay() {
    let (_, kernel, a, _) = lose_lease(LossPolicy::Stop).await;
    let error = a.stopped().await;
    assert!(
        matches!(&error, Error::Stopped { reason } if reason.contains("lost")),
        "{error}"
    );
    assert!(
        kernel.get(&ObjectKey::Link(dev("flannel.1"))).is_some(),
        "packets keep flowing"
    );
}

/// A restored backup sets back what we publish, at a revision older than our last write.
#[tokio::test(start_paused = true)]
async fn what_a_restored_backup_set_back_is_published_again() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    let backup = manager.export();
    let address = |n| {
        Object::Address(Address {
            dev: dev("eth0"),
            ip: [192, 0, 2, n].into(),
            prefix_len: 24,
        })
    };
    kernel.insert_foreign(address(77)).expect("it is free");
    kernel.delete(&address(1).key());
    settle(&a).await;
    let published = || {
        let leases = manager.snapshot().leases;
        let ours = leases.first().expect("our record");
        ours.attrs.public_ip(Family::V4)
    };
    let new = Some([192, 0, 2, 77].into());
    assert_eq!(published(), new);
    manager.import(&backup).expect("a sound backup");
    assert_ne!(published(), new);
    let limit = Duration::from_secs(5);
    until(limit, "the record says it again", || published() == new).await;
}

/// The config asks for more than the lease has, and before another can be asked for, the old one is
/// renewed.
#[tokio::test(start_paused = true)]
async fn a_renewal_does_not_make_an_unfit_lease_fit() {
    let v4 = r#"{"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}}"#;
    let ttl = Duration::from_secs(60);
    let manager = MemoryManager::new(config(v4)).with_ttl(ttl);
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    let v6 = Object::Address(Address {
        dev: dev("eth0"),
        ip: "2001:db8::1".parse().expect("an address"),
        prefix_len: 64,
    });
    kernel.delete(&v6.key());
    manager.set_config(config(DUAL));
    tokio::time::sleep(ttl * 3).await;
    kernel.insert_foreign(v6).expect("it is free");
    let has_both = || {
        a.status()
            .lease
            .as_ref()
            .is_some_and(|l| l.subnet.v6.is_some())
    };
    until(
        Duration::from_secs(90),
        "a lease of both families",
        has_both,
    )
    .await;
}

/// A store that gives what it gave before, whatever the config says.
#[tokio::test(start_paused = true)]
async fn a_lease_that_stays_unfit_is_asked_for_ever_more_rarely() {
    let inner = MemoryManager::new(config(DUAL));
    let other = r#"{"Network": "10.77.0.0/16", "Backend": {"Type": "vxlan"}}"#;
    let manager = Stubborn {
        inner,
        config: config(other),
        asked: Arc::default(),
    };
    let asked = Arc::clone(&manager.asked);
    let a = Overlay::builder(node("a"))
        .manager(manager)
        .backend(VxlanBackend::new())
        .kernel(FakeKernel::node(1))
        .start()
        .await
        .expect("parts");
    tokio::time::sleep(Duration::from_secs(600)).await;
    let asked = asked.load(Ordering::Relaxed);
    assert!((5..60).contains(&asked), "{asked} times in ten minutes");
    drop(a);
}

/// A store that says one config and gives leases of another.
#[derive(Debug)]
struct Stubborn {
    inner: MemoryManager,
    config: NetworkConfig,
    asked: Arc<AtomicU32>,
}

#[async_trait]
impl Manager for Stubborn {
    fn name(&self) -> &'static str {
        "stubborn"
    }
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    async fn network_config(&self) -> manager::Result<NetworkConfig> {
        Ok(self.config.clone())
    }
    async fn acquire_lease(&self, request: &LeaseRequest) -> manager::Result<Lease> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.inner.acquire_lease(request).await
    }
    async fn renew_lease(&self, lease: &Lease) -> manager::Result<Lease> {
        self.inner.renew_lease(lease).await
    }
    async fn release_lease(&self, lease: &Lease) -> manager::Result<()> {
        self.inner.release_lease(lease).await
    }
    fn watch_leases(&self) -> EventStream {
        Box::pin(Ended)
    }
}

#[tokio::test(start_paused = true)]
async fn a_suspended_node_wakes_to_a_lost_lease_not_to_a_revived_one() {
    let manager = MemoryManager::new(config(DUAL)).with_ttl(Duration::from_secs(86_400));
    let clock = Sleepy::new();
    let kernel = FakeKernel::node(1);
    let a = builder("a", &manager, &kernel)
        .clock(clock.clone())
        .on_lease_lost(LossPolicy::Hold)
        .start()
        .await
        .expect("parts");
    a.ready().await.expect("ready");
    clock.sleep(Duration::from_secs(2 * 86_400));
    until(Duration::from_secs(60), "it notices", || {
        let status = a.status();
        let lease = status.condition(ConditionType::Lease);
        lease.is_some_and(|condition| condition.reason == "Lost")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_renewed_for_as_long_as_it_is_wanted() {
    let ttl = Duration::from_secs(120);
    let manager = MemoryManager::new(config(DUAL)).with_ttl(ttl);
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    let subnet = subnet_of(&a, Family::V4);
    tokio::time::sleep(ttl * 50).await;
    assert_eq!(subnet_of(&a, Family::V4), subnet);
    assert!(a.status().is_true(ConditionType::Lease));
    a.stop().await.expect("it was running");
    tokio::time::sleep(ttl * 2).await;
    assert!(manager.snapshot().leases.is_empty(), "and no longer");
}

/// A store that tells what the test says.
#[derive(Debug)]
struct Script {
    inner: MemoryManager,
    snapshots: Mutex<std::collections::VecDeque<Vec<Lease>>>,
}

#[async_trait]
impl Manager for Script {
    fn name(&self) -> &'static str {
        "script"
    }
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    async fn network_config(&self) -> manager::Result<NetworkConfig> {
        self.inner.network_config().await
    }
    async fn acquire_lease(&self, request: &LeaseRequest) -> manager::Result<Lease> {
        self.inner.acquire_lease(request).await
    }
    async fn renew_lease(&self, lease: &Lease) -> manager::Result<Lease> {
        self.inner.renew_lease(lease).await
    }
    async fn release_lease(&self, lease: &Lease) -> manager::Result<()> {
        self.inner.release_lease(lease).await
    }
    /// The next snapshot of the script, then silence for a minute, then the end.
    fn watch_leases(&self) -> EventStream {
        let mut snapshots = self.snapshots.lock().expect("no panic inside");
        let leases = snapshots.pop_front().unwrap_or_default();
        let revision = Revision(100);
        let own = self.inner.snapshot().leases;
        let leases = leases.into_iter().chain(own).collect();
        let snapshot = Snapshot {
            leases,
            unreadable: Vec::new(),
            revision,
            unconfigured: false,
        };
        Box::pin(Once {
            event: Some(Event::Snapshot(snapshot)),
            end: Box::pin(tokio::time::sleep(Duration::from_secs(60))),
        })
    }
}

struct Once {
    event: Option<Event>,
    end: std::pin::Pin<Box<tokio::time::Sleep>>,
}

impl futures_core::Stream for Once {
    type Item = manager::Result<Event>;
    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        match self.event.take() {
            Some(event) => std::task::Poll::Ready(Some(Ok(event))),
            None => self.end.as_mut().poll(cx).map(|()| None),
        }
    }
}

use std::future::Future;

#[tokio::test(start_paused = true)]
async fn an_emptied_snapshot_is_confirmed_before_it_is_believed() {
    let peers: Vec<Lease> = (1..=6)
        .map(|n| peer(100 + n, &format!("10.42.{n}.0/24")))
        .collect();
    let script = |snapshots: Vec<Vec<Lease>>| Script {
        inner: MemoryManager::new(config(
            r#"{"Network":"10.42.0.0/16","SubnetMin":"10.42.200.0","Backend":{"Type":"vxlan"}}"#,
        )),
        snapshots: Mutex::new(snapshots.into()),
    };
    let routes = |kernel: &FakeKernel| {
        let all = kernel.objects();
        all.values()
            .filter(|o| matches!(o, Object::Route(r) if r.protocol == RouteProtocol::OURS))
            .count()
    };
    let run = |manager: Script, kernel: FakeKernel| async move {
        let overlay = Overlay::builder(node("a"))
            .manager(manager)
            .backend(VxlanBackend::new())
            .kernel(kernel)
            .start()
            .await
            .expect("parts");
        overlay
            .wait_for(|status| status.peers > 0)
            .await
            .expect("running");
        overlay
    };

    // All known peers vanish; the second reading has them again: no route ever goes.
    let kernel = FakeKernel::node(1);
    let a = run(
        script(vec![
            peers.clone(),
            Vec::new(),
            peers.clone(),
            peers.clone(),
        ]),
        kernel.clone(),
    )
    .await;
    settle(&a).await;
    assert_eq!(routes(&kernel), 6);
    let mut held = a.events();
    let held = async {
        loop {
            let event = held.recv().await.expect("more");
            if let OverlayEvent::WithdrawalHeld {
                withdrawn, known, ..
            } = event
            {
                return (withdrawn, known);
            }
        }
    };
    let held = tokio::time::timeout(Duration::from_secs(600), held).await;
    assert_eq!(held, Ok((6, 6)));
    for _ in 0..40 {
        assert_eq!(routes(&kernel), 6, "nothing is withdrawn");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(
        a.status().is_true(ConditionType::Peers),
        "{:?}",
        a.status().conditions
    );
    a.stop().await.expect("it was running");

    // A fresh process with the same kernel: the routes it finds count as known.
    let a = run(
        Script {
            snapshots: Mutex::new(vec![vec![peers[0].clone()]; 3].into()),
            ..script(vec![])
        },
        kernel.clone(),
    )
    .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(routes(&kernel), 6, "not yet");
    until(Duration::from_secs(30), "the confirmed withdrawal", || {
        routes(&kernel) == 1
    })
    .await;
    drop(a);
}

/// While a withdrawal waits for its confirmation nothing is removed, also what a peer no longer needs
/// that has changed meanwhile. All of that goes with the confirmation, not when everything is read next.
#[tokio::test(start_paused = true)]
async fn what_was_kept_by_a_withdrawal_that_waited_goes_when_that_is_confirmed() {
    let peers: Vec<Lease> = (1..=6)
        .map(|n| peer(100 + n, &format!("10.42.{n}.0/24")))
        .collect();
    let mut moved = peers[0].clone();
    moved.attrs = peer(50, "10.42.1.0/24").attrs;
    moved.revision = Revision(1);
    let snapshots = vec![peers.clone(), vec![moved.clone()], vec![moved]];
    let manager = Script {
        inner: MemoryManager::new(config(
            r#"{"Network":"10.42.0.0/16","SubnetMin":"10.42.200.0","Backend":{"Type":"vxlan"}}"#,
        )),
        snapshots: Mutex::new(snapshots.into()),
    };
    let kernel = FakeKernel::node(1);
    let a = Overlay::builder(node("a"))
        .manager(manager)
        .backend(VxlanBackend::new())
        .kernel(kernel.clone())
        .resync_every(Duration::from_secs(1_000_000))
        .start()
        .await
        .expect("parts");
    let count = |kind| {
        let all = kernel.objects();
        all.keys().filter(|key| key.kind() == kind).count()
    };
    let soon = Duration::from_secs(100);
    until(soon, "all are reached", || count("fdb") == 6).await;
    until(soon, "one has moved", || count("fdb") == 7).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!a.status().is_true(ConditionType::Peers), "not confirmed");
    assert_eq!((count("nexthop"), count("fdb")), (6, 7), "nothing goes");
    until(soon, "it is confirmed", || count("nexthop") == 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(count("fdb"), 1, "what it had before it moved has gone");
}

/// A node whose subnet was taken, and whose kernel refuses the address of the next one, keeps the
/// old address until it has the new one: without any the kernel would drop the peers' routes.
#[tokio::test(start_paused = true)]
async fn the_old_address_stays_until_the_new_one_is_there() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    manager.put_raw(peer(7, "10.42.77.0/24")).expect("sound");
    let a = Overlay::builder(node("a"))
        .manager(manager.clone())
        .backend(VxlanBackend::new().with_nexthops(false))
        .kernel(kernel.clone())
        .start()
        .await
        .expect("parts");
    a.ready().await.expect("ready");
    settle(&a).await;
    let theirs = "10.42.77.0/24".parse().expect("a subnet");
    let route = route_to(&kernel, theirs).expect("the peer is routed");
    let withdrawn = Arc::new(AtomicUsize::new(0));
    let (count, key) = (Arc::clone(&withdrawn), route.key());
    kernel.set_witness(move |objects, _| {
        count.fetch_add(usize::from(!objects.contains_key(&key)), Ordering::Relaxed);
    });
    let (kind, failure) = ("address", Failure::Busy);
    kernel.fail_next(FaultKind::Op { kind, failure });
    let own = subnet_of(&a, Family::V4);
    let lease = manager.snapshot().leases.into_iter();
    let lease = lease.into_iter().find(|lease| lease.node == node("a"));
    assert!(manager.remove(&lease.expect("ours").key));
    let thief = peer(8, &own.to_string());
    manager.put_raw(thief).expect("sound");
    until(Duration::from_secs(60), "it has another subnet", || {
        a.status().is_true(ConditionType::Lease) && subnet_of(&a, Family::V4) != own
    })
    .await;
    settle(&a).await;
    kernel.assert_faults_consumed();
    assert_eq!(withdrawn.load(Ordering::Relaxed), 0, "the route went");
    let old = ObjectKey::Address {
        dev: dev("flannel.1"),
        ip: own.address(),
        prefix_len: 32,
    };
    assert_eq!(kernel.get(&old), None, "the old address goes in the end");
}
