//! API servers that die, freeze, forget and are replaced; tokens and certificates that expire; and
//! rights that are missing. Each on servers of its own.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{
    acquire, admin, attrs, failure, lose_history, manager, next, node, put, request, stored, until,
    write,
};
use flannel_core::manager::Error;
use flannel_core::{Event, EventStream, Manager, NodeId};
use flannel_subnet_kube::{Access, AnnotationPrefix, ConfigSource, KubeManager, KubeOptions};
use flannel_testkit::servers::{KubeApiServer, TcpSwitch};
use serde_json::{Value, json};

fn server(test: &str) -> Option<KubeApiServer> {
    KubeApiServer::require(test).then(|| KubeApiServer::start().expect("a server"))
}

/// A manager whose way to a server leads over a switch.
fn over(switch: &TcpSwitch, server: &KubeApiServer) -> KubeManager {
    let url = format!("https://{}", switch.address());
    let config = ConfigSource::Text(common::CONFIG.to_owned());
    KubeManager::new(admin(server, &url, config)).expect("sound settings")
}

async fn begun(manager: &KubeManager) -> EventStream {
    let mut watch = manager.watch_leases();
    let is_whole = |event: &Event| matches!(event, Event::Snapshot(_));
    until(&mut watch, "a snapshot", is_whole).await;
    watch
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_killed_and_started_again_costs_no_event() {
    let Some(mut server) = server("kube killed") else {
        return;
    };
    server.add_node("a", &["10.5.1.0/24"]).expect("made");
    server.add_node("b", &["10.5.2.0/24"]).expect("made");
    let manager = manager(&server);
    let lease = acquire(&manager, &request("a", 1)).await;
    let mut watch = begun(&manager).await;
    server.kill();
    failure(&mut watch).await;
    let renewed = manager.renew_lease(&lease).await;
    assert!(
        matches!(renewed, Err(Error::Unavailable { .. })),
        "{renewed:?}"
    );
    server.restart().expect("it starts again");
    let after = common::manager(&server);
    acquire(&after, &request("b", 2)).await;
    put(&mut watch, "b", |lease| lease.attrs == attrs(2)).await;
    let renewed = manager.renew_lease(&lease).await.expect("it is still ours");
    assert_eq!(renewed, lease);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_went_while_history_was_lost_is_missing_from_the_next_snapshot() {
    let Some(mut server) = server("kube history") else {
        return;
    };
    for (name, cidr) in [("a", "10.5.1.0/24"), ("b", "10.5.2.0/24")] {
        server.add_node(name, &[cidr]).expect("made");
        acquire(&manager(&server), &request(name, 1)).await;
    }
    let switch = TcpSwitch::new(server.address()).await.expect("a port");
    let manager = over(&switch, &server);
    let mut watch = begun(&manager).await;
    switch.turn(None);
    server.remove_node("a").expect("removed");
    lose_history(&mut server);
    switch.turn(Some(server.address()));
    let is_whole = |event: &Event| matches!(event, Event::Snapshot(_));
    let Event::Snapshot(snapshot) = until(&mut watch, "a snapshot", is_whole).await else {
        panic!("not a snapshot");
    };
    let names: Vec<&str> = snapshot.leases.iter().map(|one| one.key.as_str()).collect();
    assert_eq!(names, ["b"]);
}

/// What a watch told so far: of each node the last address.
#[derive(Default)]
struct Followed(BTreeMap<String, Option<u8>>);

impl Followed {
    fn take(&mut self, event: &Event) {
        match event {
            Event::Snapshot(snapshot) => {
                self.0.clear();
                for lease in &snapshot.leases {
                    self.put(lease);
                }
            }
            Event::Put(lease) => self.put(lease),
            Event::Delete { key, .. } => {
                self.0.remove(key.as_str());
            }
            _ => {}
        }
    }

    fn put(&mut self, lease: &flannel_core::Lease) {
        let ip = lease.attrs.public_ip.v4.map(|ip| ip.octets()[3]);
        self.0.insert(lease.key.as_str().to_owned(), ip);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_between_two_api_servers_costs_no_event() {
    let Some(mut first) = server("kube failover") else {
        return;
    };
    let mut second = KubeApiServer::beside(&first).expect("another");
    let switch = TcpSwitch::new(first.address()).await.expect("a port");
    let watcher = over(&switch, &first);
    let mut watch = watcher.watch_leases();
    let mut wanted = BTreeMap::new();
    for n in 1..=30_u8 {
        let name = format!("n-{n}");
        // Written where the watch is not, too.
        let (here, elsewhere) = (&first, &second);
        let writer = if n % 2 == 0 { here } else { elsewhere };
        writer
            .add_node(&name, &[&format!("10.5.{n}.0/24")])
            .expect("made");
        acquire(&manager(writer), &request(&name, n)).await;
        wanted.insert(name.clone(), Some(n));
        if n % 5 == 0 {
            let gone = format!("n-{}", n - 2);
            writer.remove_node(&gone).expect("removed");
            wanted.remove(&gone);
        }
        match n {
            10 => switch.turn(Some(second.address())),
            // The one that is in use dies.
            20 => {
                switch.turn(Some(first.address()));
                second.kill();
                second.restart().expect("it starts again");
            }
            25 => switch.turn(Some(second.address())),
            _ => {}
        }
    }
    first.kill();
    let mut followed = Followed::default();
    while followed.0 != wanted {
        followed.take(&next(&mut watch).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_api_server_is_left_as_soon_as_another_can_be_had() {
    let Some(first) = server("kube frozen") else {
        return;
    };
    let second = KubeApiServer::beside(&first).expect("another");
    let switch = TcpSwitch::new(first.address()).await.expect("a port");
    let manager = over(&switch, &first);
    first.add_node("a", &["10.5.1.0/24"]).expect("made");
    let mut watch = begun(&manager).await;
    first.freeze();
    let error = failure(&mut watch).await;
    assert!(error.is_transient(), "{error}");
    switch.turn(Some(second.address()));
    acquire(&manager, &request("a", 1)).await;
    put(&mut watch, "a", |_| true).await;
    first.thaw();
}

/// The rules that a README shows, and what is needed for a config in a ConfigMap.
fn allow(server: &KubeApiServer, account: &str, rules: &Value) {
    let group = "/apis/rbac.authorization.k8s.io/v1";
    let path = format!("{group}/clusterroles/{account}");
    if server.object(&path).expect("an answer").is_some() {
        server
            .merge(&path, &json!({ "rules": rules }))
            .expect("changed");
        return;
    }
    let role = json!({"metadata": {"name": account}, "rules": rules});
    server
        .create(&format!("{group}/clusterroles"), &role)
        .expect("made");
    let binding = json!({
        "metadata": {"name": account},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": account},
        "subjects": [{"kind": "ServiceAccount", "namespace": "default", "name": account}],
    });
    let bindings = format!("{group}/clusterrolebindings");
    server.create(&bindings, &binding).expect("made");
}

fn rules() -> Value {
    json!([
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
    ])
}

/// A manager that is a service account.
fn account(server: &KubeApiServer, name: &str, config: ConfigSource) -> KubeManager {
    let token = server.service_account("default", name).expect("a token");
    let token = write(server.folder(), &format!("{name}.token"), &token);
    let access = Access::token(server.url(), server.ca(), token);
    let options = KubeOptions::new(access, config, AnnotationPrefix::default());
    KubeManager::new(options.probe_every(Duration::from_secs(1))).expect("sound settings")
}

#[tokio::test(flavor = "multi_thread")]
async fn exactly_the_documented_rights_suffice_and_a_missing_one_is_named() {
    let Some(server) = server("kube rbac") else {
        return;
    };
    server.add_node("a", &["10.5.1.0/24"]).expect("made");
    allow(&server, "flannel", &rules());
    let config = ConfigSource::Text(common::CONFIG.to_owned());
    let manager = account(&server, "flannel", config);
    let mut lease = acquire(&manager, &request("a", 1)).await;
    let mut watch = begun(&manager).await;
    lease.attrs = attrs(2);
    let lease = manager.renew_lease(&lease).await.expect("it is current");
    put(&mut watch, "a", |told| told.attrs == attrs(2)).await;
    manager.node_settings(&node("a")).await.expect("read");
    manager.release_lease(&lease).await.expect("it is ours");

    for (missing, rules) in [
        (
            ("nodes", "get"),
            json!([
                {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch"]},
                {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
            ]),
        ),
        (
            ("nodes/status", "patch"),
            json!([{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]}]),
        ),
        (
            ("nodes", "list"),
            json!([
                {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "watch"]},
                {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
            ]),
        ),
        (
            ("nodes", "watch"),
            json!([
                {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list"]},
                {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
            ]),
        ),
    ] {
        allow(&server, "flannel", &rules);
        let (resource, verb) = missing;
        let rule = format!("resources: [\"{resource}\"], verbs: [\"{verb}\"]");
        // A server notices a change of roles after a moment.
        let mut said = String::new();
        for _ in 0..100 {
            let error = if matches!(verb, "list" | "watch") {
                let mut watch = manager.watch_leases();
                let first = tokio::time::timeout(Duration::from_secs(1), failure(&mut watch));
                first.await.ok()
            } else {
                // The right may go between the two; what is then left needs no writing again.
                match manager.acquire_lease(&request("a", 1)).await {
                    Ok(lease) => manager.release_lease(&lease).await.err(),
                    Err(error) => Some(error),
                }
            };
            said = error.map_or_else(String::new, |error| error.to_string());
            if said.contains(&rule) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(
            said.contains(&rule) && said.contains("denied"),
            "{rule}: {said}"
        );
    }

    let map = ConfigSource::config_map("default", "cfg", "net-conf.json");
    let manager = account(&server, "flannel", map);
    let error = manager.network_config().await.expect_err("no right");
    let rule = "resources: [\"configmaps\"], verbs: [\"get\"]";
    assert!(error.to_string().contains(rule), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_void_is_replaced_on_disk_and_the_watch_goes_on() {
    let Some(server) = server("kube token") else {
        return;
    };
    server.add_node("a", &["10.5.1.0/24"]).expect("made");
    server.add_node("b", &["10.5.2.0/24"]).expect("made");
    allow(&server, "short", &rules());
    let switch = TcpSwitch::new(server.address()).await.expect("a port");
    let token = server.service_account("default", "short").expect("a token");
    let file = write(server.folder(), "short.token", &token);
    let url = format!("https://{}", switch.address());
    let config = ConfigSource::Text(common::CONFIG.to_owned());
    let access = Access::token(url, server.ca(), file);
    let options = KubeOptions::new(access, config, AnnotationPrefix::default());
    let manager = KubeManager::new(options).expect("sound settings");
    let lease = acquire(&manager, &request("a", 1)).await;
    let mut watch = begun(&manager).await;
    // An account that is gone has no good token any more; nor is that of one made again the same.
    let path = "/api/v1/namespaces/default/serviceaccounts/short";
    server.delete(path).expect("removed");
    let mut denied = manager.renew_lease(&lease).await;
    for _ in 0..400 {
        if denied.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        denied = manager.renew_lease(&lease).await;
    }
    assert!(
        matches!(&denied, Err(Error::Denied { reason }) if reason.contains("token")),
        "{denied:?}"
    );
    switch.interrupt();
    let is_denied = |error: &Error| matches!(error, Error::Denied { .. });
    while !is_denied(&failure(&mut watch).await) {}
    let token = server.service_account("default", "short").expect("a token");
    write(server.folder(), "short.token", &token);
    manager.renew_lease(&lease).await.expect("known again");
    acquire(&common::manager(&server), &request("b", 2)).await;
    put(&mut watch, "b", |_| true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_expires_is_replaced_on_disk() {
    let Some(server) = server("kube certificate") else {
        return;
    };
    server.add_node("a", &["10.5.1.0/24"]).expect("made");
    let authority = server.authority();
    let issue = |seconds| {
        let valid = Duration::from_secs(seconds);
        let issued = authority.client("node-agent", &["system:masters"], valid);
        issued.expect("a certificate")
    };
    let (certificate, key) = issue(4);
    let config = ConfigSource::Text(common::CONFIG.to_owned());
    let access = Access::certificate(server.url(), server.ca(), certificate, key);
    let options = KubeOptions::new(access, config, AnnotationPrefix::default());
    let manager = KubeManager::new(options).expect("sound settings");
    let lease = acquire(&manager, &request("a", 1)).await;
    let mut expired = manager.renew_lease(&lease).await;
    for _ in 0..400 {
        if expired.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        expired = manager.renew_lease(&lease).await;
    }
    expired.expect_err("it has expired");
    // The same files, as a rotation leaves them.
    issue(3600);
    let renewed = manager.renew_lease(&lease).await;
    assert_eq!(renewed.expect("known again"), lease);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubeconfig_says_where_and_who() {
    let Some(server) = server("kube config") else {
        return;
    };
    server.add_node("a", &["10.5.1.0/24"]).expect("made");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         contexts:\n- name: c\n  context: {{cluster: c, user: u}}\n\
         clusters:\n- name: c\n  cluster:\n    server: {}\n    certificate-authority: {}\n\
         users:\n- name: u\n  user:\n    token: {}\n",
        server.url(),
        server.ca().display(),
        server.admin_token(),
    );
    let file = write(server.folder(), "kubeconfig", &text);
    let with = |file: &std::path::Path, context: Option<&str>| {
        let access = Access::kubeconfig(file, context);
        let config = ConfigSource::Text(common::CONFIG.to_owned());
        let options = KubeOptions::new(access, config, AnnotationPrefix::default());
        KubeManager::new(options).expect("sound settings")
    };
    let id: NodeId = node("a");
    with(&file, None).node_settings(&id).await.expect("read");
    with(&file, Some("c"))
        .node_settings(&id)
        .await
        .expect("read");
    for (file, context) in [(file.as_path(), Some("other")), (server.folder(), None)] {
        let error = with(file, context).node_settings(&id).await;
        let error = error.expect_err("there is none");
        assert!(error.is_transient(), "a file may come: {error}");
    }
    let node = stored(&server, "a");
    assert_eq!(node["metadata"]["annotations"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_an_address_that_is_gone_are_left_at_once() {
    let Some(server) = server("kube address gone") else {
        return;
    };
    for (name, subnet) in [("a", "10.5.1.0/24"), ("b", "10.5.2.0/24")] {
        server.add_node(name, &[subnet]).expect("made");
    }
    let switch = TcpSwitch::new(server.address()).await.expect("a port");
    // Nothing else would notice within the time of this test.
    let long = Duration::from_secs(60);
    let url = format!("https://{}", switch.address());
    let config = ConfigSource::Text(common::CONFIG.to_owned());
    let options = admin(&server, &url, config);
    let options = options.call_timeout(long).probe_every(long);
    let ours = KubeManager::new(options).expect("sound settings");
    let lease = acquire(&ours, &request("a", 1)).await;
    let mut watch = begun(&ours).await;
    switch.strand();
    let asking = ours.renew_lease(&lease);
    let told = async {
        tokio::task::yield_now().await;
        ours.reconnect();
    };
    let (answer, ()) = tokio::join!(asking, told);
    assert!(answer.is_ok() || answer.is_err_and(|error| error.is_transient()));
    acquire(&manager(&server), &request("b", 2)).await;
    put(&mut watch, "b", |lease| lease.attrs == attrs(2)).await;
}
