//! A fake store with flannel's config, nodes of ours, and the records of Go flannel.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::manager::Error;
use flannel_core::{
    Event, EventStream, Lease, LeaseAttrs, LeaseRequest, Manager, NodeId, PublicIp, Revision,
    TokioClock, wire,
};
use flannel_testkit::fake_store::{FakeStore, KeyRange, Layout, StoreManager, StoreOptions};
use tokio::time::timeout;

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const V4: &str = r#"{"Network":"10.5.0.0/20","SubnetLen":24}"#;

pub(crate) struct World {
    pub(crate) store: FakeStore,
    pub(crate) layout: Layout,
}

impl World {
    pub(crate) fn new(config: &str) -> Self {
        let store = FakeStore::new(Arc::new(TokioClock::new()));
        let layout = Layout::default();
        store.put(layout.config(), config);
        Self { store, layout }
    }

    pub(crate) fn node(&self, name: &str) -> StoreManager {
        StoreManager::new(self.store.link(name), StoreOptions::default())
    }

    /// A record as Go flannel writes it.
    pub(crate) fn go(&self, key: &str, ip: [u8; 4]) -> Revision {
        let mut attrs = LeaseAttrs {
            public_ip: PublicIp::v4(ip.into()),
            ..LeaseAttrs::default()
        };
        if key.contains('&') {
            let v6 = [0x2001, 0xdb8, 1, 0, 0, 0, 0, u16::from(ip[3])];
            attrs.public_ip.v6 = Some(v6.into());
        }
        let node = NodeId::from_public_ip(ip.into());
        let value = wire::lease_value(&node, None, &attrs).expect("a value");
        let key = format!("{}/{key}", self.layout.subnets());
        self.store.put_for(key, value, 24 * 3600 * SECOND)
    }

    /// The ends of all keys but that of the config.
    pub(crate) fn keys(&self) -> Vec<String> {
        let entries = self
            .store
            .entries(&KeyRange::prefix(Layout::DEFAULT_PREFIX));
        let keys = entries.iter().filter_map(|entry| {
            let key = entry.key.strip_prefix(Layout::DEFAULT_PREFIX)?;
            (key != "/config").then(|| key.to_owned())
        });
        keys.collect()
    }
}

pub(crate) fn request(name: &str) -> LeaseRequest {
    let n = name
        .bytes()
        .fold(0, |n: u8, b| n.wrapping_mul(31).wrapping_add(b));
    LeaseRequest::new(
        NodeId::new(name).expect("a node id"),
        LeaseAttrs {
            public_ip: PublicIp::both(
                [192, 0, 2, n].into(),
                [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(n)].into(),
            ),
            ..LeaseAttrs::default()
        },
    )
}

pub(crate) async fn acquire(manager: &StoreManager, request: &LeaseRequest) -> Lease {
    manager.acquire_lease(request).await.expect("a lease")
}

pub(crate) type Item = Result<Event, Error>;

pub(crate) async fn next(watch: &mut EventStream) -> Item {
    let next = poll_fn(|cx| watch.as_mut().poll_next(cx));
    let item = timeout(60 * SECOND, next).await.expect("an item in time");
    item.expect("no end")
}

/// Follows the watch to an event.
pub(crate) async fn until(
    watch: &mut EventStream,
    is: impl Fn(&Event) -> bool + Send + Sync,
) -> Event {
    let found = async {
        loop {
            if let Ok(event) = next(watch).await
                && is(&event)
            {
                return event;
            }
        }
    };
    let found = timeout(600 * SECOND, found).await;
    found.expect("the event within ten minutes")
}

/// Follows the watch to the next snapshot: its revision, and the keys of its records.
pub(crate) async fn snapshot(watch: &mut EventStream) -> (Revision, Vec<String>) {
    let event = until(watch, |event| matches!(event, Event::Snapshot(_))).await;
    let Event::Snapshot(snapshot) = event else {
        unreachable!("it is one");
    };
    let keys = snapshot.leases.iter().map(|lease| lease.key.to_string());
    (snapshot.revision, keys.collect())
}
