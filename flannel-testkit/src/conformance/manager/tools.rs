//! What the trials are written with.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::manager::Error;
use flannel_core::{
    BackendData, BackendType, DualStack, Event, EventStream, Lease, LeaseAttrs, LeaseKey,
    LeaseRequest, Manager, NetworkConfig, NodeId, PoolMode, PublicIp, Revision, Subnet,
};

use super::{ManagerFixture, StoreFixture, Violation};

/// Ends the trial with a violation unless something holds.
macro_rules! ensure {
    ($holds:expr, $($message:tt)+) => {
        if !$holds {
            return Err(Violation(format!($($message)+)));
        }
    };
}
pub(super) use ensure;

/// Ends the trial as skipped unless there is the means for it.
macro_rules! require {
    ($has:expr, $reason:literal) => {
        if !$has {
            return Ok(Verdict::Skipped($reason));
        }
    };
}
pub(super) use require;

/// The longest that an event may take to arrive.
const EVENT_DEADLINE: Duration = Duration::from_secs(30);

/// The network config of most trials: 64 subnets, the first of the network among them.
pub(super) const POOL_OF_64: &str =
    r#"{"Network":"10.5.0.0/20","SubnetLen":26,"SubnetMin":"10.5.0.0"}"#;

/// Four subnets.
pub(super) const POOL_OF_4: &str =
    r#"{"Network":"10.5.0.0/24","SubnetLen":26,"SubnetMin":"10.5.0.0"}"#;

/// Four other subnets.
pub(super) const OTHER_POOL: &str =
    r#"{"Network":"10.6.0.0/24","SubnetLen":26,"SubnetMin":"10.6.0.0"}"#;

/// 64 subnets of each family.
pub(super) const DUAL_POOL_OF_64: &str = r#"{"Network":"10.5.0.0/20","SubnetLen":26,
    "SubnetMin":"10.5.0.0","EnableIPv6":true,"IPv6Network":"fd00:5::/58","IPv6SubnetMin":"fd00:5::"}"#;

/// 64 IPv4 subnets and three IPv6 ones: the first of the network is left out.
pub(super) const LOPSIDED_POOL: &str = r#"{"Network":"10.5.0.0/20","SubnetLen":26,
    "SubnetMin":"10.5.0.0","EnableIPv6":true,"IPv6Network":"fd00:5::/62","IPv6SubnetLen":64}"#;

pub(super) fn config(text: &str) -> Result<NetworkConfig, Violation> {
    NetworkConfig::from_json(text, PoolMode::Allocated).or_violation("the suite's config")
}

/// A config as a manager reads it.
pub(super) fn config_for(
    manager: &Arc<dyn Manager>,
    text: &str,
) -> Result<NetworkConfig, Violation> {
    let mode = if manager.capabilities().allocates {
        PoolMode::Allocated
    } else {
        PoolMode::Assigned
    };
    NetworkConfig::from_json(text, mode).or_violation("the suite's config")
}

/// A fresh store with a config, and the handle of the first node.
pub(super) async fn store(
    fixture: &dyn ManagerFixture,
    text: &str,
) -> Result<(Box<dyn StoreFixture>, Arc<dyn Manager>), Violation> {
    let store = fixture.store(config(text)?).await;
    let manager = store.manager().await;
    Ok((store, manager))
}

pub(super) trait OrViolation<T> {
    /// Turns an error into a violation that says what was tried.
    fn or_violation(self, what: &str) -> Result<T, Violation>;
}

impl<T, E: std::fmt::Display> OrViolation<T> for Result<T, E> {
    fn or_violation(self, what: &str) -> Result<T, Violation> {
        self.map_err(|error| Violation(format!("{what}: {error}")))
    }
}

impl<T> OrViolation<T> for Option<T> {
    fn or_violation(self, what: &str) -> Result<T, Violation> {
        self.ok_or_else(|| Violation(what.to_owned()))
    }
}

pub(super) fn subnet(text: &str) -> Result<Subnet, Violation> {
    text.parse().or_violation("the suite's subnet")
}

/// The n-th node.
pub(super) fn node(n: u8) -> NodeId {
    // 192.0.2.0/24 is set aside for documentation, so the id cannot be that of a real node.
    NodeId::new(format!("node-{n}"))
        .unwrap_or_else(|_| NodeId::from_public_ip([192, 0, 2, n].into()))
}

/// What the n-th node publishes.
pub(super) fn attrs(n: u8) -> LeaseAttrs {
    let data = BackendData::encode(&BTreeMap::from([("VNI", u64::from(n))])).ok();
    LeaseAttrs {
        public_ip: PublicIp::v4([192, 0, 2, n].into()),
        backend_type: Some(BackendType::vxlan()),
        backend_data: DualStack::new(data, None),
    }
}

pub(super) fn request(n: u8) -> LeaseRequest {
    LeaseRequest::new(node(n), attrs(n))
}

/// How often a call is repeated that the store may answer later.
const ATTEMPTS: u32 = 100;

/// Acquires as a host program does: what may succeed later is asked again.
pub(super) async fn try_acquire(
    manager: &Arc<dyn Manager>,
    request: &LeaseRequest,
) -> Result<Lease, Error> {
    let mut attempt = 0;
    loop {
        match manager.acquire_lease(request).await {
            Err(error) if error.is_transient() && attempt < ATTEMPTS => {
                attempt += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            result => return result,
        }
    }
}

/// A lease for a request that must succeed.
pub(super) async fn acquire(
    store: &dyn StoreFixture,
    manager: &Arc<dyn Manager>,
    request: &LeaseRequest,
) -> Result<Lease, Violation> {
    store.add_node(&request.node).await;
    let lease = try_acquire(manager, request)
        .await
        .or_violation("a lease is refused")?;
    ensure!(
        lease.node == request.node && lease.attrs == request.attrs,
        "the lease is not what was asked for: {lease:?}"
    );
    Ok(lease)
}

/// Whether two leases share an address.
pub(super) fn overlap<L: Borrow<Lease>>(leases: &[L]) -> Option<(&Lease, &Lease)> {
    leases.iter().enumerate().find_map(|(n, a)| {
        let (a, mut others) = (a.borrow(), leases.iter().skip(n + 1).map(Borrow::borrow));
        let other = others.find(|b: &&Lease| a.subnet.overlaps(&b.subnet))?;
        Some((a, other))
    })
}

/// A watch, with everything that it told so far folded into the records it leaves.
pub(super) struct Watched {
    stream: EventStream,
    pub(super) leases: BTreeMap<LeaseKey, Lease>,
    /// The highest revision seen.
    pub(super) revision: Revision,
    /// How many snapshots were seen.
    pub(super) snapshots: usize,
    /// The records that are there and cannot be read.
    pub(super) unreadable: BTreeSet<LeaseKey>,
}

impl Watched {
    pub(super) fn new(manager: &Arc<dyn Manager>) -> Self {
        Self {
            stream: manager.watch_leases(),
            leases: BTreeMap::new(),
            revision: Revision::default(),
            snapshots: 0,
            unreadable: BTreeSet::new(),
        }
    }

    /// A watch that has seen its first snapshot.
    pub(super) async fn begin(manager: &Arc<dyn Manager>) -> Result<Self, Violation> {
        let mut watched = Self::new(manager);
        while watched.snapshots == 0 {
            if let Err(Violation(reason)) = watched.next().await {
                return Err(Violation(format!(
                    "a watch does not begin with a snapshot: {reason}"
                )));
            }
        }
        Ok(watched)
    }

    /// The watch itself, where it is.
    pub(super) fn into_stream(self) -> EventStream {
        self.stream
    }

    /// The next event, folded; errors that the stream reports on its way are passed over.
    pub(super) async fn next(&mut self) -> Result<Event, Violation> {
        loop {
            let next = poll_fn(|cx| self.stream.as_mut().poll_next(cx));
            let next = tokio::time::timeout(EVENT_DEADLINE, next).await;
            let item = next.map_err(|_| {
                let patience = EVENT_DEADLINE;
                Violation(format!("no event arrives within {patience:?}"))
            })?;
            match item.or_violation("the watch ended")? {
                Err(error) if error.is_transient() => {}
                Err(error) => return Err(Violation(format!("the watch failed: {error}"))),
                Ok(event) => {
                    self.fold(&event)?;
                    return Ok(event);
                }
            }
        }
    }

    /// Follows the watch until what it told so far satisfies a condition.
    pub(super) async fn until(
        &mut self,
        what: &str,
        holds: impl Fn(&BTreeMap<LeaseKey, Lease>) -> bool + Send,
    ) -> Result<(), Violation> {
        while !holds(&self.leases) {
            if let Err(Violation(reason)) = self.next().await {
                return Err(Violation(format!("{what} is not delivered: {reason}")));
            }
        }
        Ok(())
    }

    fn fold(&mut self, event: &Event) -> Result<(), Violation> {
        let revision = match event {
            Event::Snapshot(snapshot) => {
                self.snapshots += 1;
                self.leases.clear();
                let unreadable = snapshot.unreadable.iter();
                self.unreadable = unreadable.map(|record| record.key.clone()).collect();
                for lease in &snapshot.leases {
                    ensure!(
                        lease.revision <= snapshot.revision,
                        "a snapshot of revision {} holds a record of revision {}",
                        snapshot.revision,
                        lease.revision
                    );
                    self.leases.insert(lease.key.clone(), lease.clone());
                }
                snapshot.revision
            }
            Event::Put(lease) => {
                ensure!(self.snapshots > 0, "a put comes before the first snapshot");
                self.unreadable.remove(&lease.key);
                self.leases.insert(lease.key.clone(), lease.clone());
                lease.revision
            }
            Event::Delete { key, revision } => {
                ensure!(
                    self.snapshots > 0,
                    "a delete comes before the first snapshot"
                );
                self.unreadable.remove(key);
                self.leases.remove(key);
                *revision
            }
            Event::Unreadable(record) => {
                self.unreadable.insert(record.key.clone());
                record.revision
            }
            Event::Progress(revision) => *revision,
            _ => self.revision,
        };
        ensure!(
            revision >= self.revision,
            "revision {revision} follows {}",
            self.revision
        );
        self.revision = revision;
        Ok(())
    }
}

/// Tells if a watch of a new store begins with a snapshot, as everything that is looked at through
/// a watch needs.
pub(super) async fn begins(fixture: &dyn ManagerFixture) -> bool {
    match store(fixture, POOL_OF_64).await {
        Ok((_store, manager)) => Watched::begin(&manager).await.is_ok(),
        Err(_) => false,
    }
}

/// Renews a lease in time, until this is dropped or the lease is lost: what the store shows then is
/// for the trial to judge.
pub(super) async fn keep(manager: Arc<dyn Manager>, mut lease: Lease) {
    while let Some(ttl) = lease.ttl {
        tokio::time::sleep(ttl / 3).await;
        match manager.renew_lease(&lease).await {
            Ok(renewed) => lease = renewed,
            Err(error) if error.is_transient() => {}
            Err(_) => return,
        }
    }
}

/// Every record that the store holds now, as a fresh watch sees it.
pub(super) async fn records(manager: &Arc<dyn Manager>) -> Result<Vec<Lease>, Violation> {
    let watched = Watched::begin(manager).await?;
    Ok(watched.leases.into_values().collect())
}
