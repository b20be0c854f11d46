//! What the tests on a real etcd share.
#![allow(
    dead_code,
    unused_macros,
    unused_imports,
    reason = "each test binary uses a part of it"
)]

use std::future::poll_fn;
use std::time::Duration;

use etcd_client::Client;
use flannel_core::manager::Error;
use flannel_core::{
    BackendData, BackendType, DualStack, Event, EventStream, Lease, LeaseAttrs, LeaseRequest,
    Manager, NodeId, PublicIp, Subnet,
};
use flannel_subnet_etcd::{EtcdManager, EtcdOptions};
use flannel_testkit::servers::{Etcd, EtcdVersion};
use tokio::time::{sleep, timeout};

/// The longest that anything may take that must happen.
pub(crate) const SOON: Duration = Duration::from_secs(30);

pub(crate) const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

pub(crate) const DUAL_CONFIG: &str = r#"{"EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}"#;

pub(crate) fn options(endpoint: impl AsRef<str>) -> EtcdOptions {
    EtcdOptions::new([endpoint]).expect("an endpoint")
}

pub(crate) fn manager(options: EtcdOptions) -> EtcdManager {
    EtcdManager::new(options).expect("sound settings")
}

/// A client that is not ours, as `etcdctl` is one.
pub(crate) async fn hand(etcd: &Etcd) -> Client {
    let client = Client::connect([etcd.endpoint()], None).await;
    client.expect("a client")
}

/// Writes a key as another program does.
pub(crate) async fn put(client: &mut Client, key: &str, value: &str) {
    client.put(key, value, None).await.expect("etcd answers");
}

/// Makes a test of each function on each etcd that there are tests on: `in_path::NAME` and
/// `v3_5::NAME`. One whose etcd is not there is skipped.
macro_rules! on_each_etcd {
    (@ $module:ident $version:ident $($name:ident)+) => {
        mod $module {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let version = flannel_testkit::servers::EtcdVersion::$version;
                if version.require(stringify!($name)) {
                    super::$name(version).await;
                }
            })+
        }
    };
    ($($name:ident)+) => {
        common::on_each_etcd!(@ in_path InPath $($name)+);
        common::on_each_etcd!(@ v3_5 V3_5 $($name)+);
    };
}
pub(crate) use on_each_etcd;

/// A server with a network config.
pub(crate) async fn server(version: EtcdVersion, config: &str) -> (Etcd, Client) {
    let etcd = Etcd::of(version).expect("etcd starts");
    let mut client = hand(&etcd).await;
    put(&mut client, "/coreos.com/network/config", config).await;
    (etcd, client)
}

pub(crate) fn request(node: &str, last: u8) -> LeaseRequest {
    let data = r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#;
    let data = BackendData::from_json(data).expect("JSON");
    LeaseRequest::new(
        NodeId::new(node).expect("a name"),
        LeaseAttrs {
            public_ip: PublicIp::v4([192, 0, 2, last].into()),
            backend_type: Some(BackendType::vxlan()),
            backend_data: DualStack::v4(data),
        },
    )
}

pub(crate) fn subnet(text: &str) -> Subnet {
    text.parse().expect("a subnet")
}

pub(crate) async fn acquire(manager: &EtcdManager, request: &LeaseRequest) -> Lease {
    let lease = manager.acquire_lease(request).await;
    lease.expect("a lease")
}

/// Asks until the store answers.
pub(crate) async fn until_answered<T, F>(mut ask: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, Error>>,
{
    let answered = async {
        loop {
            match ask().await {
                Ok(answer) => return answer,
                Err(error) => assert!(error.is_transient(), "{error:?}"),
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(SOON, answered).await.expect("an answer, soon")
}

/// The next item of a watch.
pub(crate) async fn item(watch: &mut EventStream) -> Result<Event, Error> {
    let next = timeout(SOON, poll_fn(|cx| watch.as_mut().poll_next(cx))).await;
    next.expect("something, soon").expect("the watch goes on")
}

/// The first item that is as wanted; others are passed over.
pub(crate) async fn until<T>(
    watch: &mut EventStream,
    mut wanted: impl FnMut(Result<Event, Error>) -> Option<T>,
) -> T {
    let found = async {
        loop {
            if let Some(found) = wanted(item(watch).await) {
                return found;
            }
        }
    };
    timeout(SOON, found).await.expect("what was wanted, soon")
}

/// A watch that has seen its first snapshot.
pub(crate) async fn begun(manager: &EtcdManager) -> EventStream {
    let mut watch = manager.watch_leases();
    until(&mut watch, |item| {
        matches!(item, Ok(Event::Snapshot(_))).then_some(())
    })
    .await;
    watch
}
