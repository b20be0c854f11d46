//! The manifests are good: a real API server would take them, and they say what the documentation
//! says.

use flannel_core::{NetworkConfig, PoolMode};
use flannel_testkit::servers::KubeApiServer;
use serde_json::{Value, json};

const MANIFESTS: &str = include_str!("../../deploy/kube-node.yaml");

/// The value of the first line of a document that begins so.
fn field<'a>(document: &'a str, begin: &str) -> Option<&'a str> {
    document.lines().find_map(|line| line.strip_prefix(begin))
}

/// Where an object of this kind is.
fn path(kind: &str, namespace: Option<&str>, name: &str) -> String {
    let (group, kinds) = match kind {
        "Namespace" => ("/api/v1", "namespaces"),
        "ServiceAccount" => ("/api/v1", "serviceaccounts"),
        "ConfigMap" => ("/api/v1", "configmaps"),
        "ClusterRole" => ("/apis/rbac.authorization.k8s.io/v1", "clusterroles"),
        "ClusterRoleBinding" => ("/apis/rbac.authorization.k8s.io/v1", "clusterrolebindings"),
        "DaemonSet" => ("/apis/apps/v1", "daemonsets"),
        other => panic!("a manifest of the kind {other}"),
    };
    let namespace = namespace.map_or_else(String::new, |name| format!("/namespaces/{name}"));
    format!("{group}{namespace}/{kinds}/{name}")
}

#[test]
fn the_manifests_are_taken_by_a_server_and_ask_for_the_documented_rights() {
    if !KubeApiServer::require("kube manifests") {
        return;
    }
    let server = KubeApiServer::start().expect("a server");
    let mut seen = Vec::new();
    for document in MANIFESTS.split("\n---\n").skip(1) {
        let kind = field(document, "kind: ").expect("a kind");
        let name = field(document, "  name: ").expect("a name");
        let namespace = field(document, "  namespace: ").filter(|_| !kind.starts_with("Cluster"));
        let path = path(kind, namespace, name);
        let apply = |query: &str| {
            let path = format!("{path}?fieldManager=test{query}");
            let reply = server.call("PATCH", &path, "application/apply-patch+yaml", document);
            let reply = reply.expect("an answer");
            assert!((200..300).contains(&reply.status), "{kind}: {}", reply.body);
            serde_json::from_str::<Value>(&reply.body).expect("JSON")
        };
        let taken = apply("&dryRun=All");
        match kind {
            // What is in it can be tried only where it is.
            "Namespace" => drop(apply("")),
            "ClusterRole" => assert_eq!(
                taken["rules"],
                json!([
                    {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
                    {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
                ])
            ),
            "ConfigMap" => {
                let text = taken["data"]["net-conf.json"].as_str().expect("a config");
                NetworkConfig::from_json(text, PoolMode::Assigned).expect("a sound one");
            }
            _ => {}
        }
        seen.push(kind);
    }
    let all = [
        "Namespace",
        "ServiceAccount",
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "DaemonSet",
    ];
    assert_eq!(seen, all);
    // A fault is seen: this is what the trial is worth.
    let bad = "apiVersion: apps/v1\nkind: DaemonSet\nmetadata:\n  name: bad\nspec: {}\n";
    let path = path("DaemonSet", Some("kube-flannel"), "bad");
    let path = format!("{path}?fieldManager=test&dryRun=All");
    let refused = server.call("PATCH", &path, "application/apply-patch+yaml", bad);
    assert_eq!(refused.expect("an answer").status, 422);
}
