//! What the tests on a real API server share.
#![allow(dead_code, reason = "not every test uses everything")]

use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use flannel_core::manager::Error;
use flannel_core::{
    BackendData, BackendType, DualStack, Event, EventStream, Lease, LeaseAttrs, LeaseRequest,
    Manager, NodeId, PublicIp,
};
use flannel_subnet_kube::{Access, AnnotationPrefix, ConfigSource, KubeManager, KubeOptions};
use flannel_testkit::servers::KubeApiServer;
use serde_json::{Value, json};

/// The network config of most tests.
pub(crate) const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// The prefix of flannel's annotations.
pub(crate) const PREFIX: &str = "flannel.alpha.coreos.com";

/// Settings for an administrator at this URL.
pub(crate) fn admin(server: &KubeApiServer, url: &str, config: ConfigSource) -> KubeOptions {
    let token = write(server.folder(), "admin.token", server.admin_token());
    let access = Access::token(url, server.ca(), token);
    KubeOptions::new(access, config, AnnotationPrefix::default())
        .call_timeout(Duration::from_secs(4))
        .probe_every(Duration::from_secs(1))
}

/// An administrator's manager with the usual config.
pub(crate) fn manager(server: &KubeApiServer) -> KubeManager {
    let config = ConfigSource::Text(CONFIG.to_owned());
    KubeManager::new(admin(server, &server.url(), config)).expect("sound settings")
}

/// Writes a small file into a folder, whole or not at all; tests that run at once may write the same.
pub(crate) fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let path = folder.join(name);
    let nth = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let beside = folder.join(format!("{name}.{nth}.new"));
    std::fs::write(&beside, text).expect("the folder can be written");
    std::fs::rename(&beside, &path).expect("the folder can be written");
    path
}

pub(crate) fn node(name: &str) -> NodeId {
    NodeId::new(name).expect("a node id")
}

/// What a node with this number publishes.
pub(crate) fn attrs(n: u8) -> LeaseAttrs {
    let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:00:{n:02x}"}}"#);
    let data = BackendData::from_json(&data).expect("JSON");
    LeaseAttrs {
        public_ip: PublicIp::v4([192, 0, 2, n].into()),
        backend_type: Some(BackendType::vxlan()),
        backend_data: DualStack::v4(data),
    }
}

pub(crate) fn request(name: &str, n: u8) -> LeaseRequest {
    LeaseRequest::new(node(name), attrs(n))
}

/// The next event of a watch; what it reports as failed is passed over.
pub(crate) async fn next(watch: &mut EventStream) -> Event {
    let event = async {
        loop {
            match poll_fn(|cx| watch.as_mut().poll_next(cx)).await {
                Some(Ok(event)) => return event,
                Some(Err(_)) => {}
                None => panic!("a watch does not end"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), event)
        .await
        .expect("an event in time")
}

/// The next failure that a watch reports.
pub(crate) async fn failure(watch: &mut EventStream) -> Error {
    let failure = async {
        loop {
            if let Some(Err(error)) = poll_fn(|cx| watch.as_mut().poll_next(cx)).await {
                return error;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), failure)
        .await
        .expect("a failure in time")
}

/// Follows a watch until an event is this. What else is told does not make it wait longer.
pub(crate) async fn until(
    watch: &mut EventStream,
    what: &str,
    is: impl Fn(&Event) -> bool + Send + Sync,
) -> Event {
    let wanted = async {
        loop {
            let event = next(watch).await;
            if is(&event) {
                return event;
            }
        }
    };
    let event = tokio::time::timeout(Duration::from_secs(60), wanted).await;
    event.unwrap_or_else(|_| panic!("{what}: not told in time"))
}

/// Follows a watch until it tells of a node's lease that is as wanted.
pub(crate) async fn put(
    watch: &mut EventStream,
    name: &str,
    is: impl Fn(&Lease) -> bool + Send + Sync,
) -> Lease {
    let wanted = |event: &Event| match event {
        Event::Put(lease) => lease.key.as_str() == name && is(lease),
        Event::Snapshot(snapshot) => snapshot
            .leases
            .iter()
            .any(|lease| lease.key.as_str() == name && is(lease)),
        _ => false,
    };
    match until(watch, name, wanted).await {
        Event::Put(lease) => lease,
        Event::Snapshot(snapshot) => snapshot
            .leases
            .into_iter()
            .find(|lease| lease.key.as_str() == name)
            .expect("it was just found"),
        other => panic!("not a lease: {other:?}"),
    }
}

/// Acquires as an overlay does: what may succeed later is asked again.
pub(crate) async fn acquire(manager: &KubeManager, request: &LeaseRequest) -> Lease {
    for _ in 0..400 {
        match manager.acquire_lease(request).await {
            Ok(lease) => return lease,
            Err(error) if error.is_transient() => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => panic!("refused: {error}"),
        }
    }
    panic!("no lease in time");
}

/// Writes annotations of a Node as anybody may; `null` removes one.
pub(crate) fn annotate(server: &KubeApiServer, name: &str, annotations: &[(&str, Value)]) {
    let named: serde_json::Map<String, Value> = annotations
        .iter()
        .map(|(key, value)| (format!("{PREFIX}/{key}"), value.clone()))
        .collect();
    let patch = json!({"metadata": {"annotations": named}});
    let path = format!("/api/v1/nodes/{name}");
    server.merge(&path, &patch).expect("the Node is there");
}

/// A Node as it stands.
pub(crate) fn stored(server: &KubeApiServer, name: &str) -> Value {
    let node = server.node(name).expect("an answer");
    node.expect("the Node is there")
}

/// The value of one of flannel's annotations as it stands.
pub(crate) fn annotation(server: &KubeApiServer, name: &str, key: &str) -> Option<String> {
    let node = stored(server, name);
    let value = &node["metadata"]["annotations"][format!("{PREFIX}/{key}")];
    value.as_str().map(str::to_owned)
}

/// A condition of a Node as it stands.
pub(crate) fn condition(server: &KubeApiServer, name: &str, kind: &str) -> Option<Value> {
    let node = stored(server, name);
    let conditions = node["status"]["conditions"].as_array()?;
    conditions.iter().find(|one| one["type"] == kind).cloned()
}

/// Ends a server and starts it again, so that no watch can be gone on with: a server remembers what
/// came after its start, and before that something is written that no watch of Nodes tells.
pub(crate) fn lose_history(server: &mut KubeApiServer) {
    let path = "/api/v1/namespaces/default";
    let counted = server
        .object(path)
        .expect("an answer")
        .expect("a namespace");
    let version = &counted["metadata"]["resourceVersion"];
    let patch = json!({"metadata": {"annotations": {"flannel.test/seen": version}}});
    server.merge(path, &patch).expect("the namespace is there");
    server.restart().expect("it starts again");
}
