//! A node's life on a real API server, and what others do to its Node meanwhile.

mod common;

use std::sync::OnceLock;
use std::time::Duration;

use common::{
    acquire, admin, annotate, annotation, attrs, condition, manager, next, node, put, request,
    stored, until,
};
use flannel_core::manager::Error;
use flannel_core::{DualStack, Event, Lease, Manager};
use flannel_subnet_kube::{Annotation, AnnotationPrefix, ConfigSource, KubeEvent, KubeManager};
use flannel_testkit::servers::KubeApiServer;
use serde_json::{Value, json};

/// One server for all tests of this binary, each of which has Nodes of its own.
fn server() -> Option<&'static KubeApiServer> {
    static SERVER: OnceLock<KubeApiServer> = OnceLock::new();
    KubeApiServer::require("kube server")
        .then(|| SERVER.get_or_init(|| KubeApiServer::start().expect("it starts")))
}

fn version(server: &KubeApiServer, name: &str) -> Value {
    stored(server, name)["metadata"]["resourceVersion"].clone()
}

fn lost(result: &Result<Lease, Error>) -> &str {
    match result {
        Err(Error::LeaseLost { reason, .. }) => reason,
        other => panic!("not lost: {other:?}"),
    }
}

/// Something that other components write to a Node all the time.
fn heartbeat(server: &KubeApiServer, name: &str, n: u32) {
    let patch = json!({"status": {"nodeInfo": {"kernelVersion": format!("6.{n}")}}});
    let path = format!("/api/v1/nodes/{name}/status");
    server.merge(&path, &patch).expect("the Node is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_starts_again_writes_nothing() {
    let Some(server) = server() else { return };
    server.add_node("start-1", &["10.5.1.0/24"]).expect("made");
    let first = acquire(&manager(server), &request("start-1", 1)).await;
    assert_eq!(first.subnet.to_string(), "10.5.1.0/24");
    assert_eq!(first.ttl, None);
    let before = version(server, "start-1");
    let again = manager(server);
    let second = acquire(&again, &request("start-1", 1)).await;
    assert_eq!(second, first);
    let renewed = again.renew_lease(&second).await.expect("it is current");
    assert_eq!(renewed, first);
    assert_eq!(version(server, "start-1"), before, "something was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_elses_annotations_and_conditions_are_touched() {
    let Some(server) = server() else { return };
    server.add_node("tact-1", &["10.5.2.0/24"]).expect("made");
    let others = json!({
        "metadata": {"annotations": {"example.org/a": "b"}, "labels": {"x": "y"}},
        "status": {"conditions": [
            {"type": "Ready", "status": "True", "reason": "KubeletReady"},
            {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"},
        ]},
    });
    let path = "/api/v1/nodes/tact-1/status";
    server.merge(path, &others).expect("the Node is there");
    annotate(server, "tact-1", &[("public-ip-overwrite", json!(""))]);
    let manager = manager(server);
    let mut lease = acquire(&manager, &request("tact-1", 1)).await;
    let up = condition(server, "tact-1", "NetworkUnavailable").expect("set");
    assert_eq!(
        (&up["status"], &up["reason"]),
        (&json!("False"), &json!("FlannelIsUp"))
    );
    assert!(up["lastTransitionTime"].is_string(), "{up}");
    lease.attrs = attrs(2);
    let lease = manager.renew_lease(&lease).await.expect("it is current");
    manager.release_lease(&lease).await.expect("it is ours");
    let down = condition(server, "tact-1", "NetworkUnavailable").expect("set");
    assert_eq!(down["status"], "True");
    let node = stored(server, "tact-1");
    let annotations =
        json!({"example.org/a": "b", "flannel.alpha.coreos.com/public-ip-overwrite": ""});
    assert_eq!(node["metadata"]["annotations"], annotations);
    assert_eq!(node["metadata"]["labels"], json!({"x": "y"}));
    let ready = condition(server, "tact-1", "Ready").expect("it stays");
    assert_eq!(ready["reason"], "KubeletReady");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_pod_cidr_waits_until_it_has_one() {
    let Some(server) = server() else { return };
    let manager = manager(server);
    let request = request("late-1", 1);
    let mut watch = manager.watch_leases();
    until(&mut watch, "a snapshot", |event| {
        matches!(event, Event::Snapshot(_))
    })
    .await;
    for part in ["there is no Node late-1", "no IPv4 pod CIDR"] {
        let error = manager.acquire_lease(&request).await.expect_err("not yet");
        assert!(matches!(&error, Error::NotReady { .. }), "{error}");
        assert!(
            error.is_transient() && error.to_string().contains(part),
            "{error}"
        );
        if server.node("late-1").expect("an answer").is_none() {
            server.add_node("late-1", &[]).expect("made");
        }
    }
    // Of a peer too: its annotations may be there before its pod CIDR.
    let early = [
        ("kube-subnet-manager", json!("true")),
        ("public-ip", json!("192.0.2.7")),
        ("backend-type", json!("vxlan")),
    ];
    annotate(server, "late-1", &early);
    let is_unreadable = |event: &Event| matches!(event, Event::Unreadable(record) if record.key.as_str() == "late-1");
    until(&mut watch, "a record without subnet", is_unreadable).await;
    let cidr = json!({"spec": {"podCIDR": "10.5.3.0/24", "podCIDRs": ["10.5.3.0/24"]}});
    server
        .merge("/api/v1/nodes/late-1", &cidr)
        .expect("assigned");
    let told = put(&mut watch, "late-1", |_| true).await;
    assert_eq!(told.subnet.to_string(), "10.5.3.0/24");
    acquire(&manager, &request).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_made_again_with_another_pod_cidr_moves_to_it() {
    let Some(server) = server() else { return };
    server.add_node("again-1", &["10.5.4.0/24"]).expect("made");
    let ours = manager(server);
    let mut events = ours.events();
    let lease = acquire(&ours, &request("again-1", 1)).await;
    let mut watch = manager(server).watch_leases();
    put(&mut watch, "again-1", |_| true).await;

    server.remove_node("again-1").expect("removed");
    let is_gone =
        |event: &Event| matches!(event, Event::Delete { key, .. } if key.as_str() == "again-1");
    until(&mut watch, "the Node's end", is_gone).await;
    assert!(lost(&ours.renew_lease(&lease).await).contains("gone"));
    server.add_node("again-1", &["10.5.5.0/24"]).expect("made");
    let renewed = ours.renew_lease(&lease).await;
    lost(&renewed);
    assert_eq!(
        annotation(server, "again-1", "public-ip"),
        None,
        "a renewal made a record"
    );
    let new = acquire(&ours, &request("again-1", 1)).await;
    assert_eq!(new.subnet.to_string(), "10.5.5.0/24");
    let told = put(&mut watch, "again-1", |_| true).await;
    assert_eq!((told.subnet, told.attrs), (new.subnet, new.attrs));
    assert_eq!(
        events.try_recv().expect("it is reported"),
        KubeEvent::NodeRecreated {
            node: node("again-1"),
            before: lease.subnet,
            after: new.subnet,
        }
    );

    // Another node gets what the first one had.
    server.add_node("again-2", &["10.5.4.0/24"]).expect("made");
    acquire(&manager(server), &request("again-2", 2)).await;
    let told = put(&mut watch, "again-2", |_| true).await;
    assert_eq!(told.subnet, lease.subnet);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_our_node_is_not_ours() {
    let Some(server) = server() else { return };
    server.add_node("copy-1", &["10.5.12.0/24"]).expect("made");
    let manager = manager(server);
    let lease = acquire(&manager, &request("copy-1", 1)).await;
    let node = stored(server, "copy-1");
    let copy = json!({
        "metadata": {"name": "copy-1", "annotations": node["metadata"]["annotations"]},
        "spec": node["spec"],
    });
    server.remove_node("copy-1").expect("removed");
    server.create("/api/v1/nodes", &copy).expect("made");
    let renewed = manager.renew_lease(&lease).await;
    assert!(lost(&renewed).contains("made again"), "{renewed:?}");
    let new = acquire(&manager, &request("copy-1", 1)).await;
    manager.renew_lease(&new).await.expect("it is current");
}

#[tokio::test(flavor = "multi_thread")]
async fn annotations_that_somebody_changes_are_found_lost_and_restored() {
    let Some(server) = server() else { return };
    server.add_node("tamper-1", &["10.5.6.0/24"]).expect("made");
    let manager = manager(server);
    let mut events = manager.events();
    let request = request("tamper-1", 1);
    let mut lease = acquire(&manager, &request).await;
    for (key, value) in [
        ("public-ip", json!("192.0.2.66")),
        ("backend-data", json!("{")),
        ("backend-type", Value::Null),
        ("kube-subnet-manager", json!("false")),
        ("kube-subnet-manager", Value::Null),
    ] {
        let before = annotation(server, "tamper-1", key);
        annotate(server, "tamper-1", &[(key, value.clone())]);
        let renewed = manager.renew_lease(&lease).await;
        assert!(lost(&renewed).contains(key), "{renewed:?}");
        let released = manager.release_lease(&lease).await;
        let managed = key != "kube-subnet-manager";
        assert_eq!(released.is_err(), managed, "{released:?}");
        if !managed {
            // To give up what is no record any more forgets it.
            annotate(server, "tamper-1", &[(key, json!("true"))]);
            lease = acquire(&manager, &request).await;
            continue;
        }
        assert_eq!(
            annotation(server, "tamper-1", key),
            value.as_str().map(str::to_owned)
        );
        lease = acquire(&manager, &request).await;
        assert_eq!(annotation(server, "tamper-1", key), before);
        let KubeEvent::Restored { differences, .. } = events.try_recv().expect("reported") else {
            panic!("not a restoration");
        };
        let found: Vec<&str> = differences
            .iter()
            .map(|one| one.annotation.name())
            .collect();
        assert_eq!(found, [key]);
        assert_eq!(differences[0].found.as_deref(), value.as_str());
        assert_eq!(differences[0].wanted, before);
    }
    assert!(events.try_recv().is_err(), "something is reported twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_condition_is_restored_while_the_watch_is_followed() {
    let Some(server) = server() else { return };
    server.add_node("cond-1", &["10.5.7.0/24"]).expect("made");
    let manager = manager(server);
    let mut events = manager.events();
    let mut watch = manager.watch_leases();
    acquire(&manager, &request("cond-1", 1)).await;
    put(&mut watch, "cond-1", |_| true).await;
    let unavailable = json!({"status": {"conditions": [
        {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"},
    ]}});
    server
        .merge("/api/v1/nodes/cond-1/status", &unavailable)
        .expect("written");
    let following = tokio::spawn(async move {
        loop {
            next(&mut watch).await;
        }
    });
    let event = tokio::time::timeout(Duration::from_secs(30), events.recv()).await;
    let event = event.expect("in time").expect("an event");
    assert!(matches!(event, KubeEvent::ConditionRestored { key } if key.as_str() == "cond-1"));
    let now = condition(server, "cond-1", "NetworkUnavailable").expect("set");
    assert_eq!(now["status"], "False");
    following.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kubelet_writes_neither_costs_the_lease_nor_is_told() {
    let Some(server) = server() else { return };
    server.add_node("beat-1", &["10.5.8.0/24"]).expect("made");
    let manager = manager(server);
    let mut lease = acquire(&manager, &request("beat-1", 1)).await;
    let mut watch = manager.watch_leases();
    put(&mut watch, "beat-1", |_| true).await;
    let beating = std::thread::spawn(|| {
        let server = self::server().expect("it runs");
        (0..100).for_each(|n| heartbeat(server, "beat-1", n));
    });
    let mut n = 2;
    while !beating.is_finished() {
        lease.attrs = attrs(n);
        lease = manager.renew_lease(&lease).await.expect("nobody took it");
        n = n % 200 + 1;
    }
    beating.join().expect("it beats");
    lease.attrs = attrs(250);
    let last = manager.renew_lease(&lease).await.expect("nobody took it");
    heartbeat(server, "beat-1", 1000);
    lease = manager.renew_lease(&last).await.expect("nobody took it");
    lease.attrs = attrs(251);
    let last = manager.renew_lease(&lease).await.expect("nobody took it");
    // Every event about it has something that the one before had not.
    let mut seen = None;
    loop {
        if let Event::Put(lease) = next(&mut watch).await
            && lease.key == last.key
        {
            assert_ne!(seen.as_ref(), Some(&lease.attrs), "a heartbeat is told");
            seen = Some(lease.attrs.clone());
            if lease.attrs == last.attrs {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_one_family_is_told() {
    let Some(server) = server() else { return };
    let cidrs = ["10.5.9.0/24", "fd00:5:9::/64"];
    server.add_node("dual-1", &cidrs).expect("made");
    let config = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/32"}"#;
    let options = admin(server, &server.url(), ConfigSource::Text(config.to_owned()));
    let manager = KubeManager::new(options).expect("sound settings");
    let mut request = request("dual-1", 1);
    request.attrs.public_ip.v6 = Some("2001:db8::1".parse().expect("an address"));
    request.attrs.backend_data.v6 = request.attrs.backend_data.v4.clone();
    let mut lease = acquire(&manager, &request).await;
    assert_eq!(lease.subnet.to_string(), "10.5.9.0/24,fd00:5:9::/64");
    let mut watch = manager.watch_leases();
    put(&mut watch, "dual-1", |_| true).await;
    for n in 2..5 {
        let data = attrs(n).backend_data.v4;
        if n % 2 == 0 {
            lease.attrs.backend_data.v4 = data;
        } else {
            lease.attrs.backend_data.v6 = data;
        }
        lease = manager.renew_lease(&lease).await.expect("it is current");
        let told = put(&mut watch, "dual-1", |told| told.attrs == lease.attrs).await;
        assert_eq!(told.revision, lease.revision);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_cidr_outside_of_the_network_is_refused_before_anything_is_written() {
    let Some(server) = server() else { return };
    server.add_node("out-1", &["10.99.1.0/24"]).expect("made");
    let error = manager(server).acquire_lease(&request("out-1", 1)).await;
    let error = error.expect_err("it does not fit").to_string();
    assert!(
        error.contains("10.99.1.0/24") && error.contains("Network = 10.5.0.0/16"),
        "{error}"
    );
    let node = stored(server, "out-1");
    assert_eq!(node["metadata"]["annotations"], Value::Null);
    assert_eq!(condition(server, "out-1", "NetworkUnavailable"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_settings_are_read_and_an_overwrite_is_published() {
    let Some(server) = server() else { return };
    server.add_node("op-1", &["10.5.10.0/24"]).expect("made");
    let manager = manager(server);
    let settings = manager.node_settings(&node("op-1")).await.expect("read");
    assert!(settings.public_ip.is_empty());
    let set = [
        ("node-public-ip", json!("198.51.100.1")),
        ("node-public-ipv6", json!("2001:db8::5")),
        ("public-ip-overwrite", json!("203.0.113.5")),
    ];
    annotate(server, "op-1", &set);
    let settings = manager.node_settings(&node("op-1")).await.expect("read");
    let ips: Vec<String> = settings.public_ip.ips().map(|ip| ip.to_string()).collect();
    assert_eq!(ips, ["198.51.100.1", "2001:db8::5"]);

    let request = request("op-1", 1);
    let lease = acquire(&manager, &request).await;
    assert_eq!(lease.attrs, request.attrs, "ours is what we asked for");
    assert_eq!(
        annotation(server, "op-1", "public-ip").as_deref(),
        Some("203.0.113.5")
    );
    let mut watch = manager.watch_leases();
    let own = put(&mut watch, "op-1", |_| true).await;
    assert_eq!(
        own.attrs, request.attrs,
        "our own watch shows it as it was told"
    );
    let mut watch = common::manager(server).watch_leases();
    let peer = put(&mut watch, "op-1", |_| true).await;
    assert_eq!(peer.attrs.public_ip.v4, Some([203, 0, 113, 5].into()));
    assert_eq!(peer.attrs.backend_data, request.attrs.backend_data);
    let settings = manager.node_settings(&node("op-unknown")).await;
    assert!(
        matches!(settings, Err(Error::NotReady { .. })),
        "{settings:?}"
    );
    annotate(server, "op-1", &[("node-public-ip", json!("here"))]);
    let settings = manager.node_settings(&node("op-1")).await;
    assert!(
        matches!(settings, Err(Error::Invalid { .. })),
        "{settings:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_of_its_own_keeps_two_networks_apart() {
    let Some(server) = server() else { return };
    server.add_node("two-1", &["10.5.11.0/24"]).expect("made");
    let token = common::write(server.folder(), "two.token", server.admin_token());
    let access = flannel_subnet_kube::Access::token(server.url(), server.ca(), token);
    let config = ConfigSource::Text(common::CONFIG.to_owned());
    let prefix = AnnotationPrefix::new("net.example.org/two").expect("a prefix");
    let options = flannel_subnet_kube::KubeOptions::new(access, config, prefix.clone());
    let other = KubeManager::new(options.network_condition(false)).expect("sound settings");
    acquire(&other, &request("two-1", 1)).await;
    let node = stored(server, "two-1");
    let key = prefix.key(Annotation::PublicIp(flannel_core::Family::V4));
    assert_eq!(key, "net.example.org/two-public-ip");
    assert_eq!(node["metadata"]["annotations"][key], "192.0.2.1");
    assert_eq!(condition(server, "two-1", "NetworkUnavailable"), None);
    let mut watch = manager(server).watch_leases();
    let Event::Snapshot(snapshot) = next(&mut watch).await else {
        panic!("not a snapshot");
    };
    assert!(
        snapshot
            .leases
            .iter()
            .all(|lease| lease.key.as_str() != "two-1")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_config_is_followed_in_a_file_and_in_a_config_map() {
    let Some(server) = server() else { return };
    let path = server.folder().join("followed.json");
    let every = Duration::from_millis(100);
    let from_file = admin(server, &server.url(), ConfigSource::file(&path)).config_every(every);
    let map = ConfigSource::config_map("default", "followed", "net-conf.json");
    let from_map = admin(server, &server.url(), map).config_every(every);
    let collection = "/api/v1/namespaces/default/configmaps";
    let first = r#"{"Network":"10.5.0.0/16"}"#;
    let second = r#"{"Network":"10.6.0.0/16"}"#;
    for (options, is_file) in [(from_file, true), (from_map, false)] {
        let manager = KubeManager::new(options).expect("sound settings");
        let error = manager.network_config().await.expect_err("there is none");
        assert!(matches!(&error, Error::NoConfig { .. }), "{error}");
        let mut watch = manager.watch_leases();
        let unreadable = |event: &Event| matches!(event, Event::ConfigUnreadable { .. });
        until(&mut watch, "no config", unreadable).await;
        let data = json!({"metadata": {"name": "followed"}, "data": {"net-conf.json": first}});
        if is_file {
            std::fs::write(&path, first).expect("written");
        } else {
            server.create(collection, &data).expect("made");
        }
        let is = |text: &'static str| move |event: &Event| matches!(event, Event::Config(config) if config.text() == text);
        until(&mut watch, "the first config", is(first)).await;
        if is_file {
            std::fs::write(&path, second).expect("written");
        } else {
            let data = json!({"data": {"net-conf.json": second}});
            let path = format!("{collection}/followed");
            server.merge(&path, &data).expect("written");
        }
        until(&mut watch, "the second config", is(second)).await;
        let read = manager.network_config().await.expect("there is one");
        assert_eq!(read.text(), second);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_nodes_harm_nobody_and_are_told_once() {
    let Some(server) = server() else { return };
    let huge = "x".repeat(200_000);
    for (name, cidr, values) in [
        ("evil-1", "10.5.20.0/24", vec![("public-ip", json!("::1"))]),
        ("evil-2", "10.5.21.0/24", vec![("backend-data", json!("{"))]),
        (
            "evil-3",
            "10.5.22.0/24",
            vec![("backend-data", json!(huge))],
        ),
        (
            "evil-4",
            "10.5.23.0/24",
            vec![("backend-type", json!("../.."))],
        ),
    ] {
        server.add_node(name, &[cidr]).expect("made");
        let managed = [("kube-subnet-manager", json!("true"))];
        annotate(server, name, &managed);
        annotate(server, name, &values);
    }
    server.add_node("good-1", &["10.5.24.0/24"]).expect("made");
    let manager = manager(server);
    acquire(&manager, &request("good-1", 1)).await;
    let mut watch = manager.watch_leases();
    let Event::Snapshot(snapshot) = next(&mut watch).await else {
        panic!("not a snapshot");
    };
    let evil = |key: &str| key.starts_with("evil-");
    let mut unreadable: Vec<&str> = snapshot
        .unreadable
        .iter()
        .map(|record| record.key.as_str())
        .filter(|key| evil(key))
        .collect();
    unreadable.sort_unstable();
    assert_eq!(unreadable, ["evil-1", "evil-2", "evil-3", "evil-4"]);
    assert!(
        snapshot
            .leases
            .iter()
            .any(|lease| lease.key.as_str() == "good-1")
    );
    // Their kubelets write on, and nobody hears of it again.
    for n in 0..5 {
        for name in ["evil-1", "evil-2", "evil-3", "evil-4"] {
            heartbeat(server, name, n);
        }
    }
    let mut changed = request("good-1", 9);
    changed.previous = DualStack::default();
    acquire(&manager, &changed).await;
    loop {
        match next(&mut watch).await {
            Event::Unreadable(record) => assert!(!evil(record.key.as_str()), "{record:?}"),
            Event::Put(lease) if lease.key.as_str() == "good-1" => break,
            _ => {}
        }
    }
}
