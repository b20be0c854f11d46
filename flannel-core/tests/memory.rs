//! The manager in memory: the promises of every manager, with and without expiry, and its own.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::manager::Error;
use flannel_core::{
    BackendData, Clock, DualStack, Event, EventStream, Lease, LeaseAttrs, LeaseKey, LeaseRequest,
    Manager, MemoryManager, MemoryState, Moment, NetworkConfig, NodeId, PoolMode, PublicIp,
    Revision, Subnet, wire,
};
use flannel_testkit::conformance::manager::{ManagerFixture, StoreFixture};
use tokio::runtime::{Builder, Runtime};

const TTL: Duration = Duration::from_secs(24 * 3600);

struct Fixture {
    ttl: Option<Duration>,
}

#[async_trait]
impl ManagerFixture for Fixture {
    async fn store(&self, config: NetworkConfig) -> Box<dyn StoreFixture> {
        let manager = MemoryManager::new(config);
        Box::new(Store(match self.ttl {
            Some(ttl) => manager.with_ttl(ttl),
            None => manager,
        }))
    }
}

struct Store(MemoryManager);

#[async_trait]
impl StoreFixture for Store {
    async fn manager(&self) -> Arc<dyn Manager> {
        Arc::new(self.0.clone())
    }

    async fn advance(&self, time: Duration) -> bool {
        tokio::time::advance(time).await;
        true
    }

    async fn set_config(&self, config: NetworkConfig) -> bool {
        self.0.set_config(config);
        true
    }

    async fn write_raw(&self, lease: Lease) -> bool {
        self.0.put_raw(lease).is_ok()
    }

    async fn interrupt_watches(&self) -> bool {
        self.0.import(&self.0.export()).is_ok()
    }

    async fn reserve(&self, node: &NodeId, subnets: DualStack<Subnet>) -> bool {
        self.0.reserve(node, subnets).is_ok()
    }
}

fn paused() -> Runtime {
    Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
}

fn threads() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(4)
        .enable_time()
        .build()
        .expect("a runtime")
}

mod without_expiry {
    use super::*;
    flannel_testkit::manager_conformance!(Fixture { ttl: None }, paused());
}

mod with_expiry {
    use super::*;
    const TTL: Option<Duration> = Some(Duration::from_secs(10));
    flannel_testkit::manager_conformance!(Fixture { ttl: TTL }, paused());
}

mod on_threads {
    use super::*;
    flannel_testkit::manager_conformance!(Fixture { ttl: None }, threads());
}

fn config(text: &str) -> NetworkConfig {
    NetworkConfig::from_json(text, PoolMode::Allocated).expect("a valid config")
}

fn manager() -> MemoryManager {
    MemoryManager::new(config(r#"{"Network":"10.5.0.0/24","SubnetLen":26}"#))
}

fn node(id: &str) -> NodeId {
    NodeId::new(id).expect("a node id")
}

fn request(id: &str) -> LeaseRequest {
    LeaseRequest::new(node(id), LeaseAttrs::default())
}

fn v4(text: &str) -> DualStack<Subnet> {
    DualStack::v4(text.parse().expect("a subnet"))
}

fn lease(id: &str, subnet: DualStack<Subnet>) -> Lease {
    Lease {
        key: LeaseKey::new(id),
        node: node(id),
        instance: None,
        subnet,
        attrs: LeaseAttrs::default(),
        ttl: None,
        created: Revision(77),
        revision: Revision(78),
    }
}

async fn next(stream: &mut EventStream) -> Event {
    let next = poll_fn(|cx| stream.as_mut().poll_next(cx));
    let next = tokio::time::timeout(Duration::from_secs(3600), next).await;
    let item = next.expect("an event in time");
    item.expect("no end").expect("no error")
}

/// The events that are there already.
async fn pending(stream: &mut EventStream) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        let polled = poll_fn(|cx| Poll::Ready(stream.as_mut().poll_next(cx))).await;
        match polled {
            Poll::Ready(item) => events.push(item.expect("no end").expect("no error")),
            Poll::Pending => return events,
        }
    }
}

#[tokio::test]
async fn records_have_flannels_keys() {
    let manager = MemoryManager::new(config(
        r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#,
    ));
    let lease = manager.acquire_lease(&request("a")).await.expect("a lease");
    assert_eq!(
        lease.key.as_str(),
        wire::subnet_key(&lease.subnet).expect("a key")
    );
    assert_eq!(wire::parse_subnet_key(lease.key.as_str()), Ok(lease.subnet));
}

#[tokio::test]
async fn a_network_of_ipv6_alone_has_keys_too() {
    let manager = MemoryManager::new(config(
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#,
    ));
    let [a, b] = ["a", "b"].map(request);
    let a = manager.acquire_lease(&a).await.expect("a lease");
    let b = manager.acquire_lease(&b).await.expect("a lease");
    assert_eq!(a.subnet.v4, None);
    assert_ne!((a.key, a.subnet), (b.key, b.subnet));
}

#[tokio::test]
async fn what_waits_for_a_slow_watch_is_bounded_and_nothing_is_lost() {
    let manager = manager();
    let mut watch = manager.watch_leases();
    assert!(matches!(next(&mut watch).await, Event::Snapshot(_)));
    assert!(matches!(next(&mut watch).await, Event::Config(_)));
    let mut last = manager.acquire_lease(&request("a")).await.expect("a lease");
    for _ in 0..5000 {
        last = manager.renew_lease(&last).await.expect("renewed");
    }
    let other = config(r#"{"Network":"10.7.0.0/24","SubnetLen":26}"#);
    manager.set_config(other.clone());
    let events = pending(&mut watch).await;
    assert!(events.len() <= 1025, "{} events waited", events.len());
    let Some(Event::Snapshot(snapshot)) = events.first() else {
        panic!("after a gap comes {:?}", events.first());
    };
    assert_eq!(snapshot.leases, [last]);
    assert!(events.contains(&Event::Config(other)), "the config is lost");
    manager.remove(&snapshot.leases[0].key);
    assert!(matches!(next(&mut watch).await, Event::Delete { .. }));
}

#[tokio::test]
async fn a_snapshot_is_followed_by_the_config_that_holds_then() {
    let manager = manager();
    let mut watch = manager.watch_leases();
    let changed = config(r#"{"Network":"10.7.0.0/24","SubnetLen":26}"#);
    manager.set_config(changed.clone());
    assert!(matches!(next(&mut watch).await, Event::Snapshot(_)));
    assert_eq!(next(&mut watch).await, Event::Config(changed));
    assert_eq!(pending(&mut watch).await, []);
}

#[tokio::test(start_paused = true)]
async fn a_watch_tells_of_expiry_though_nobody_calls() {
    let manager = manager().with_ttl(TTL);
    let lease = manager.acquire_lease(&request("a")).await.expect("a lease");
    assert_eq!(lease.ttl, Some(TTL));
    let mut watch = manager.watch_leases();
    assert!(matches!(next(&mut watch).await, Event::Snapshot(_)));
    assert!(matches!(next(&mut watch).await, Event::Config(_)));
    let start = tokio::time::Instant::now();
    let deleted = poll_fn(|cx| watch.as_mut().poll_next(cx)).await;
    let deleted = deleted.expect("no end").expect("no error");
    assert!(matches!(deleted, Event::Delete { key, .. } if key == lease.key));
    let late = start.elapsed() - TTL;
    assert!(late < Duration::from_millis(10), "{late:?} late");
}

#[tokio::test(start_paused = true)]
async fn a_watch_is_woken_by_a_write() {
    let manager = manager();
    let mut watch = manager.watch_leases();
    pending(&mut watch).await;
    let writer = manager.clone();
    let task = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        writer.acquire_lease(&request("a")).await.expect("a lease")
    });
    let start = tokio::time::Instant::now();
    let Event::Put(shown) = next(&mut watch).await else {
        panic!("no put");
    };
    let waited = start.elapsed();
    assert!(
        waited < Duration::from_secs(61),
        "the watch slept for {waited:?}"
    );
    assert_eq!(shown, task.await.expect("no panic"));
}

/// A clock that the test sets, as one that goes on while the machine sleeps.
#[derive(Debug, Default)]
struct SetClock(Mutex<Moment>);

impl Clock for SetClock {
    fn now(&self) -> Moment {
        *self.0.lock().expect("no panic")
    }
}

#[tokio::test(start_paused = true)]
async fn time_asleep_counts() {
    let clock = Arc::new(SetClock::default());
    let shared: Arc<dyn Clock> = Arc::<SetClock>::clone(&clock);
    let manager = manager().with_ttl(TTL).with_clock(shared);
    let lease = manager.acquire_lease(&request("a")).await.expect("a lease");
    let mut watch = manager.watch_leases();
    pending(&mut watch).await;
    // The watch is asleep already when the machine falls asleep and wakes up.
    let watching = tokio::spawn(async move { next(&mut watch).await });
    tokio::task::yield_now().await;
    *clock.0.lock().expect("no panic") = Moment::from_duration(TTL);
    let start = tokio::time::Instant::now();
    let deleted = watching.await.expect("no panic");
    assert!(matches!(deleted, Event::Delete { .. }));
    assert!(start.elapsed() < Duration::from_secs(10));
    let renewed = manager.renew_lease(&lease).await;
    assert!(
        matches!(renewed, Err(Error::LeaseLost { .. })),
        "{renewed:?}"
    );
}

#[tokio::test]
async fn raw_records_are_stored_as_they_are() {
    let manager = manager();
    let mut raw = lease("peer", v4("192.168.0.0/16"));
    raw.attrs.public_ip = PublicIp::v4([192, 0, 2, 7].into());
    let first = manager.put_raw(raw.clone()).expect("stored");
    assert_eq!((first.created, first.revision), (Revision(1), Revision(1)));
    assert_eq!((&first.attrs, &first.subnet), (&raw.attrs, &raw.subnet));
    raw.node = node("another");
    let second = manager.put_raw(raw).expect("stored");
    assert_eq!(
        (second.created, second.revision),
        (Revision(1), Revision(2))
    );
    assert_eq!(manager.snapshot().leases, std::slice::from_ref(&second));
    assert!(manager.remove(&second.key));
    assert!(!manager.remove(&second.key));
    assert_eq!(manager.snapshot().revision, Revision(3));
    let swapped = DualStack::v4("fd00::/64".parse().expect("a subnet"));
    assert!(matches!(
        manager.put_raw(lease("x", swapped)),
        Err(Error::Invalid { .. })
    ));
}

#[tokio::test]
async fn the_lease_of_another_node_is_not_ours() {
    let manager = manager();
    let held = manager.acquire_lease(&request("a")).await.expect("a lease");
    let mut forged = held.clone();
    forged.node = node("b");
    let renewed = manager.renew_lease(&forged).await;
    assert!(
        matches!(renewed, Err(Error::LeaseLost { .. })),
        "{renewed:?}"
    );
    let released = manager.release_lease(&forged).await;
    assert!(
        matches!(released, Err(Error::LeaseLost { .. })),
        "{released:?}"
    );
    assert_eq!(manager.snapshot().leases, [held]);
}

#[tokio::test]
async fn a_raw_record_under_the_key_of_a_subnet_is_not_overwritten() {
    let manager = manager();
    for subnet in ["10.5.0.64/26", "10.5.0.128/26", "10.5.0.192/26"] {
        let mut raw = lease("peer", v4("192.168.0.0/16"));
        raw.key = LeaseKey::new(subnet.replace('/', "-"));
        manager.put_raw(raw).expect("stored");
    }
    let before = manager.snapshot();
    let refused = manager.acquire_lease(&request("a")).await;
    assert!(
        matches!(refused, Err(Error::Conflict { .. })),
        "{refused:?}"
    );
    assert_eq!(manager.snapshot(), before);
}

#[tokio::test]
async fn a_refused_move_leaves_the_old_lease() {
    let manager = manager();
    let lease = manager.acquire_lease(&request("a")).await.expect("a lease");
    manager.set_config(config(
        r#"{"Network":"10.7.0.0/24","SubnetLen":26,"SubnetMin":"10.7.0.64","SubnetMax":"10.7.0.64"}"#,
    ));
    manager.acquire_lease(&request("b")).await.expect("a lease");
    let refused = manager.acquire_lease(&request("a")).await;
    assert!(
        matches!(refused, Err(Error::PoolExhausted { .. })),
        "{refused:?}"
    );
    manager
        .renew_lease(&lease)
        .await
        .expect("the old lease is still there");
}

#[tokio::test]
async fn the_own_lease_is_not_in_the_way_of_a_move() {
    let manager = manager();
    let lease = manager.acquire_lease(&request("a")).await.expect("a lease");
    let inside = lease
        .subnet
        .v4
        .expect("IPv4")
        .subnets(27)
        .next()
        .expect("half of it");
    let ip = inside.address();
    manager.set_config(config(&format!(
        r#"{{"Network":"10.5.0.0/24","SubnetLen":27,"SubnetMin":"{ip}","SubnetMax":"{ip}"}}"#
    )));
    let moved = manager.acquire_lease(&request("a")).await.expect("a lease");
    assert_eq!(moved.subnet, DualStack::v4(inside));
}

#[tokio::test]
async fn reservations_outlive_a_change_of_config() {
    let manager = manager();
    for (id, subnet) in [("a", "10.5.0.64/26"), ("b", "10.5.0.192/26")] {
        manager.reserve(&node(id), v4(subnet)).expect("free");
    }
    manager.set_config(config(r#"{"Network":"10.5.0.0/24","SubnetLen":27}"#));
    let refused = manager.reserve(&node("c"), v4("10.5.0.96/27"));
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
    for id in ["c", "d", "e"] {
        let lease = manager
            .acquire_lease(&request(id))
            .await
            .expect("three are left");
        assert!(
            !lease.subnet.overlaps(&v4("10.5.0.64/26")),
            "{}",
            lease.subnet
        );
        assert!(
            !lease.subnet.overlaps(&v4("10.5.0.192/26")),
            "{}",
            lease.subnet
        );
    }
    assert!(manager.acquire_lease(&request("f")).await.is_err());
}

#[tokio::test]
async fn reservations_are_checked() {
    let manager = manager();
    let held = manager.acquire_lease(&request("a")).await.expect("a lease");
    let free: Vec<DualStack<Subnet>> = ["10.5.0.64/26", "10.5.0.128/26", "10.5.0.192/26"]
        .map(v4)
        .into_iter()
        .filter(|subnet| *subnet != held.subnet)
        .collect();
    for (id, subnets) in [
        ("b", held.subnet),
        ("a", free[0]),
        ("b", v4("10.5.0.0/26")),
        ("b", v4("10.5.0.64/27")),
        ("b", v4("10.6.0.64/26")),
        ("b", DualStack::default()),
        (
            "b",
            DualStack::both(
                "10.5.0.64/26".parse().unwrap(),
                "fd00::/64".parse().unwrap(),
            ),
        ),
    ] {
        let refused = manager.reserve(&node(id), subnets);
        assert!(
            matches!(refused, Err(Error::Invalid { .. })),
            "{id} {subnets}"
        );
    }
    manager.reserve(&node("a"), held.subnet).expect("its own");
    manager.reserve(&node("b"), free[0]).expect("free");
    assert!(manager.reserve(&node("c"), free[0]).is_err());
    manager.reserve(&node("b"), free[1]).expect("moved");
    manager.reserve(&node("c"), free[0]).expect("free again");
    assert!(manager.unreserve(&node("c")));
    assert!(!manager.unreserve(&node("c")));
    let lease = manager
        .acquire_lease(&request("d"))
        .await
        .expect("what is left");
    assert_eq!(lease.subnet, free[0]);
    assert!(manager.acquire_lease(&request("e")).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_reservation_outlives_its_lease() {
    let manager = manager().with_ttl(TTL);
    // Not where the node's hash would put it.
    let kept = v4("10.5.0.192/26");
    manager.reserve(&node("a"), kept).expect("free");
    let lease = manager.acquire_lease(&request("a")).await.expect("a lease");
    assert_eq!((lease.subnet, lease.ttl), (kept, None));
    tokio::time::advance(TTL * 10).await;
    let lease = manager.renew_lease(&lease).await.expect("renewed");
    manager.release_lease(&lease).await.expect("released");
    for id in ["b", "c"] {
        let other = manager.acquire_lease(&request(id)).await.expect("a lease");
        assert_ne!(other.subnet, kept);
    }
    assert!(manager.acquire_lease(&request("d")).await.is_err());
    let again = manager.acquire_lease(&request("a")).await.expect("a lease");
    assert_eq!(again.subnet, kept);
}

#[tokio::test]
async fn an_assigned_config_gives_nothing_out() {
    let config = NetworkConfig::from_json(r#"{"Network":"10.5.0.0/16"}"#, PoolMode::Assigned);
    let manager = MemoryManager::new(config.expect("valid"));
    let refused = manager.acquire_lease(&request("a")).await;
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
}

async fn filled(ttl: Duration) -> MemoryManager {
    let manager = MemoryManager::new(config(
        r#"{"Network":"10.5.0.0/24","SubnetLen":26,"Backend":{"Type":"vxlan"}}"#,
    ))
    .with_ttl(ttl);
    let mut raw = lease("peer", v4("10.5.0.64/26"));
    raw.node = NodeId::from_public_ip([192, 0, 2, 7].into());
    raw.attrs.public_ip = PublicIp::both([192, 0, 2, 7].into(), "2001:db8::7".parse().unwrap());
    raw.attrs.backend_data = DualStack::both(
        BackendData::from_json("null").expect("JSON"),
        BackendData::from_json(r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#).expect("JSON"),
    );
    manager.put_raw(raw).expect("stored");
    let kept = v4("10.5.0.192/26");
    manager.reserve(&node("b"), kept).expect("free");
    manager.acquire_lease(&request("a")).await.expect("a lease");
    manager
}

#[tokio::test(start_paused = true)]
async fn saved_state_has_a_stable_form() {
    let state = filled(TTL).await.export();
    let text = serde_json::to_string_pretty(&state).expect("JSON");
    assert_eq!(text, include_str!("golden/memory-state.json").trim_end());
}

#[tokio::test(start_paused = true)]
async fn what_is_saved_is_what_is_restored() {
    let old = filled(TTL).await;
    tokio::time::advance(TTL / 2).await;
    let before = old.snapshot();
    let ttls: Vec<_> = before.leases.iter().map(|lease| lease.ttl).collect();
    assert_eq!(ttls, [Some(TTL / 2), None]);
    let text = serde_json::to_string(&old.export()).expect("JSON");
    let state: MemoryState = serde_json::from_str(&text).expect("what was saved");

    let new = manager();
    let mut watch = new.watch_leases();
    pending(&mut watch).await;
    new.import(&state).expect("sound");
    let after = new.snapshot();
    assert_eq!(after.leases, before.leases);
    assert!(after.revision > before.revision);
    assert_eq!(next(&mut watch).await, Event::Snapshot(after.clone()));
    let config = old.network_config().await.expect("a config");
    assert_eq!(next(&mut watch).await, Event::Config(config));

    // The reservation and the taken subnets were restored too.
    assert!(new.acquire_lease(&request("c")).await.is_err());
    let lease = new
        .acquire_lease(&request("b"))
        .await
        .expect("its reservation");
    assert_eq!(lease.subnet, v4("10.5.0.192/26"));
    let held = after.leases.iter().find(|lease| lease.node == node("a"));
    let renewed = new.renew_lease(held.expect("a's lease")).await;
    assert!(renewed.is_ok(), "{renewed:?}");
    tokio::time::advance(TTL / 2).await;
    old.export();
    assert_eq!(
        old.snapshot().leases.len(),
        1,
        "only the raw record does not expire"
    );
}

#[tokio::test]
async fn unsound_state_is_refused_and_changes_nothing() {
    let manager = filled(TTL).await;
    let text = serde_json::to_string(&manager.export()).expect("JSON");
    let before = manager.snapshot();
    for (old, new) in [
        (r#""format":1"#, r#""format":2"#),
        ("10.5.0.0/24", "10.5.0.0/31"),
        (r#""v4":"10.5.0.64/26""#, r#""v4":"fd00::/64""#),
        (r#""v4":"10.5.0.192/26""#, r#""v6":"10.5.0.0/26""#),
        (r#""key":"10.5.0.128-26""#, r#""key":"peer""#),
    ] {
        assert!(text.contains(old), "{old} is not in {text}");
        let state: MemoryState = serde_json::from_str(&text.replace(old, new)).expect("JSON");
        assert!(manager.import(&state).is_err(), "{new}");
    }
    let after = manager.snapshot();
    assert_eq!(after.revision, before.revision);
    assert_eq!(after.leases.len(), before.leases.len());
}

#[test]
fn handles_and_streams_can_be_sent() {
    fn assert_send<T: Send>(_: &T) {}
    let manager = manager();
    assert_send(&manager.watch_leases());
    assert_send(&pin!(manager.clone().acquire_lease(&request("a"))));
}

/// The suite finds what it is there to find: each fault breaks the promise that names it.
mod faults {
    use super::*;
    use flannel_testkit::conformance::manager::{PROMISES, Verdict};

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Fault {
        None,
        /// Every node gets one and the same subnet.
        SharedSubnet,
        /// Acquiring is not idempotent: the old record is forgotten.
        ForgetsNodes,
        /// The previous subnet is ignored.
        IgnoresPrevious,
        /// Renewing does not look at the revision, and writes what is gone.
        RenewsBlindly,
        /// Renewing keeps the old attributes.
        KeepsAttributes,
        /// Releasing does not look at who holds the record.
        ReleasesBlindly,
        /// Releasing what is gone is an error.
        ReleaseFailsTwice,
        /// Releasing does nothing.
        NeverReleases,
        /// Deletes are not delivered.
        DropsDeletes,
        /// The watch begins with single records.
        NoSnapshot,
        /// Of a known record no change is delivered.
        DropsChanges,
        /// After a gap the watch goes on without a word.
        HidesGaps,
        /// The watch's revisions are not those of the store.
        Backwards,
        /// The config is read once.
        DropsConfigs,
    }

    #[derive(Debug)]
    struct Faulty {
        fault: Fault,
        inner: MemoryManager,
    }

    #[async_trait]
    impl Manager for Faulty {
        fn name(&self) -> &'static str {
            "faulty"
        }

        fn capabilities(&self) -> flannel_core::Capabilities {
            self.inner.capabilities()
        }

        async fn network_config(&self) -> Result<NetworkConfig, Error> {
            self.inner.network_config().await
        }

        async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease, Error> {
            let mut request = request.clone();
            match self.fault {
                Fault::SharedSubnet => {
                    let mut raw = lease("shared", v4("10.5.0.64/26"));
                    raw.node = request.node.clone();
                    raw.key = LeaseKey::new(format!("shared-{}", raw.node));
                    raw.attrs = request.attrs.clone();
                    return self.inner.put_raw(raw);
                }
                Fault::ForgetsNodes => {
                    let snapshot = self.inner.snapshot();
                    if let Some(own) = snapshot.leases.iter().find(|l| l.node == request.node) {
                        let mut disowned = own.clone();
                        disowned.node = node("nobody");
                        self.inner.put_raw(disowned)?;
                    }
                }
                Fault::IgnoresPrevious => request.previous = DualStack::default(),
                _ => {}
            }
            self.inner.acquire_lease(&request).await
        }

        async fn renew_lease(&self, lease: &Lease) -> Result<Lease, Error> {
            match self.fault {
                Fault::RenewsBlindly => self.inner.put_raw(lease.clone()),
                Fault::KeepsAttributes => {
                    let snapshot = self.inner.snapshot();
                    let old = snapshot.leases.iter().find(|old| old.key == lease.key);
                    let mut lease = lease.clone();
                    if let Some(old) = old {
                        lease.attrs = old.attrs.clone();
                    }
                    self.inner.renew_lease(&lease).await
                }
                _ => self.inner.renew_lease(lease).await,
            }
        }

        async fn release_lease(&self, lease: &Lease) -> Result<(), Error> {
            match self.fault {
                Fault::NeverReleases => Ok(()),
                Fault::ReleasesBlindly => {
                    self.inner.remove(&lease.key);
                    Ok(())
                }
                Fault::ReleaseFailsTwice if !self.inner.snapshot().leases.contains(lease) => {
                    Err(Error::LeaseLost {
                        key: lease.key.clone(),
                        reason: "gone".to_owned(),
                    })
                }
                _ => self.inner.release_lease(lease).await,
            }
        }

        fn watch_leases(&self) -> EventStream {
            Box::pin(FaultyWatch {
                fault: self.fault,
                inner: self.inner.watch_leases(),
                begun: false,
                seen: Vec::new(),
            })
        }
    }

    struct FaultyWatch {
        fault: Fault,
        inner: EventStream,
        begun: bool,
        seen: Vec<LeaseKey>,
    }

    impl futures_core::Stream for FaultyWatch {
        type Item = Result<Event, Error>;

        fn poll_next(
            mut self: std::pin::Pin<&mut Self>,
            cx: &mut std::task::Context<'_>,
        ) -> Poll<Option<Self::Item>> {
            loop {
                let event = match self.inner.as_mut().poll_next(cx) {
                    Poll::Ready(Some(Ok(event))) => event,
                    other => return other,
                };
                let event = match (self.fault, event) {
                    (Fault::DropsDeletes, Event::Delete { .. }) => continue,
                    (Fault::DropsConfigs, Event::Config(_)) => continue,
                    (Fault::NoSnapshot, Event::Snapshot(snapshot)) => {
                        match snapshot.leases.into_iter().next() {
                            Some(lease) => Event::Put(lease),
                            None => continue,
                        }
                    }
                    (Fault::HidesGaps, Event::Snapshot(_)) if self.begun => continue,
                    (Fault::HidesGaps, Event::Snapshot(snapshot)) => {
                        self.begun = true;
                        Event::Snapshot(snapshot)
                    }
                    (Fault::DropsChanges, Event::Snapshot(snapshot)) => {
                        let keys = snapshot.leases.iter().map(|lease| lease.key.clone());
                        self.seen.extend(keys);
                        Event::Snapshot(snapshot)
                    }
                    (Fault::DropsChanges, Event::Put(lease)) if self.seen.contains(&lease.key) => {
                        continue;
                    }
                    (Fault::Backwards, Event::Put(mut lease)) => {
                        lease.revision = Revision(1000 - lease.revision.0);
                        Event::Put(lease)
                    }
                    (_, event) => event,
                };
                return Poll::Ready(Some(Ok(event)));
            }
        }
    }

    struct FaultyFixture(Fault);

    #[async_trait]
    impl ManagerFixture for FaultyFixture {
        async fn store(&self, config: NetworkConfig) -> Box<dyn StoreFixture> {
            Box::new(FaultyStore(self.0, Store(MemoryManager::new(config))))
        }
    }

    struct FaultyStore(Fault, Store);

    #[async_trait]
    impl StoreFixture for FaultyStore {
        async fn manager(&self) -> Arc<dyn Manager> {
            Arc::new(Faulty {
                fault: self.0,
                inner: self.1.0.clone(),
            })
        }

        async fn set_config(&self, config: NetworkConfig) -> bool {
            self.1.set_config(config).await
        }

        async fn write_raw(&self, lease: Lease) -> bool {
            self.1.write_raw(lease).await
        }

        async fn interrupt_watches(&self) -> bool {
            self.1.interrupt_watches().await
        }

        async fn reserve(&self, node: &NodeId, subnets: DualStack<Subnet>) -> bool {
            self.1.reserve(node, subnets).await
        }
    }

    fn broken(fault: Fault) -> Vec<&'static str> {
        let broken = |promise: &flannel_testkit::conformance::manager::Promise| {
            let fixture = FaultyFixture(fault);
            let outcome = paused().block_on(promise.check(&fixture));
            outcome.is_err()
        };
        let broken = PROMISES.iter().filter(|promise| broken(promise));
        broken.map(|promise| promise.name).collect()
    }

    #[test]
    fn each_fault_breaks_the_promise_that_names_it() {
        assert_eq!(broken(Fault::None), Vec::<&str>::new());
        for (fault, promise) in [
            (Fault::SharedSubnet, "no_two_nodes_share_a_subnet"),
            (Fault::SharedSubnet, "pool_is_used_to_the_last_subnet"),
            (Fault::SharedSubnet, "both_families_or_none"),
            (
                Fault::SharedSubnet,
                "a_lease_that_no_longer_fits_is_replaced",
            ),
            (Fault::SharedSubnet, "records_of_any_length_are_respected"),
            (Fault::SharedSubnet, "taken_previous_subnet_is_not_given"),
            (Fault::SharedSubnet, "reserved_subnet_is_kept"),
            (Fault::ForgetsNodes, "acquire_is_idempotent_per_node"),
            (Fault::ForgetsNodes, "a_dropped_acquire_is_safe_to_repeat"),
            (Fault::IgnoresPrevious, "previous_subnet_is_honoured"),
            (Fault::RenewsBlindly, "renewal_never_revives_a_lost_lease"),
            (Fault::RenewsBlindly, "stale_renewal_is_refused"),
            (Fault::RenewsBlindly, "a_record_that_another_wrote_is_lost"),
            (Fault::KeepsAttributes, "renew_publishes_attributes"),
            (Fault::KeepsAttributes, "every_field_change_is_delivered"),
            (
                Fault::ReleasesBlindly,
                "release_of_anothers_lease_changes_nothing",
            ),
            (Fault::ReleaseFailsTwice, "release_is_idempotent"),
            (Fault::NeverReleases, "release_frees_the_subnet"),
            (Fault::DropsDeletes, "watch_delivers_puts_and_deletes"),
            (Fault::DropsDeletes, "watchers_are_independent"),
            (Fault::NoSnapshot, "watch_starts_with_a_snapshot"),
            (Fault::HidesGaps, "a_gap_is_followed_by_a_snapshot"),
            (Fault::DropsChanges, "every_field_change_is_delivered"),
            (Fault::Backwards, "revisions_never_go_back"),
            (Fault::DropsConfigs, "config_change_is_delivered"),
        ] {
            let broken = broken(fault);
            assert!(
                broken.contains(&promise),
                "{fault:?} breaks only {broken:?}"
            );
        }
    }

    #[test]
    fn the_documentation_names_every_promise() {
        let documentation = include_str!("../src/manager.rs");
        for promise in PROMISES {
            let name = format!("`{}`", promise.name);
            assert!(documentation.contains(&name), "{name}");
        }
    }

    #[test]
    fn a_report_shows_one_line_per_promise() {
        let fixture = FaultyFixture(Fault::IgnoresPrevious);
        let reports = paused().block_on(flannel_testkit::conformance::manager::all(&fixture));
        assert_eq!(reports.len(), PROMISES.len());
        let skipped = reports
            .iter()
            .find(|report| report.name == "expiry_is_delivered");
        let skipped = skipped.expect("a promise");
        assert!(matches!(skipped.outcome, Ok(Verdict::Skipped(_))));
        let line = "skipped  expiry_is_delivered: its leases do not expire";
        assert_eq!(skipped.to_string(), line);
        let broken = reports.iter().filter(|report| report.outcome.is_err());
        assert!(
            broken
                .into_iter()
                .all(|report| report.to_string().starts_with("BROKEN   "))
        );
    }
}
