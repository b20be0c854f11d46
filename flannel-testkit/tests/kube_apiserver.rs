//! The kube-apiserver that tests start is one.

use std::time::Duration;

use flannel_testkit::servers::KubeApiServer;
use serde_json::json;

#[test]
fn a_server_keeps_its_objects_over_a_power_cut_and_shares_them_with_another() {
    if !KubeApiServer::require("kube_apiserver") {
        return;
    }
    let mut first = KubeApiServer::start().expect("it starts");
    let made = first.add_node("a", &["10.5.1.0/24", "fd00:5:1::/64"]);
    let made = made.expect("a Node can be made");
    let cidrs = json!(["10.5.1.0/24", "fd00:5:1::/64"]);
    assert_eq!(made["spec"]["podCIDRs"], cidrs);
    let second = KubeApiServer::beside(&first).expect("another starts");
    let patch = json!({"metadata": {"annotations": {"x": "y"}}});
    second.merge("/api/v1/nodes/a", &patch).expect("changed");
    first.kill();
    assert!(first.get("/readyz").is_err(), "a killed server answers");
    first.restart().expect("it starts again");
    let node = first.node("a").expect("an answer").expect("a Node");
    assert_eq!(node["metadata"]["annotations"]["x"], "y");
    assert_eq!(node["metadata"]["uid"], made["metadata"]["uid"]);

    // A service account may do nothing yet, and is unknown once it is gone.
    let token = first.service_account("default", "tester").expect("a token");
    let asked = |token: &str| {
        let reply = first.call_as(token, "GET", "/api/v1/nodes", "application/json", "");
        reply.expect("an answer").status
    };
    assert_eq!(asked(&token), 403);
    assert_eq!(asked("nobody's"), 401);
    let account = "/api/v1/namespaces/default/serviceaccounts/tester";
    first.delete(account).expect("removed");
    // What a token is good for is remembered for some seconds.
    for _ in 0..300 {
        if asked(&token) == 401 {
            return;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    panic!("the token of an account that is gone is still good");
}

/// The servers of Kubernetes before 1.22, built with Go from 1.18 on as they are, work on wild
/// pointers here: they close the connection, answer nothing made as JSON any more, or die.
#[test]
fn a_server_takes_maps_as_json_and_tells_them_and_goes_on() {
    if !KubeApiServer::require("kube_apiserver") {
        return;
    }
    let server = KubeApiServer::start().expect("it starts");
    let default = "/api/v1/namespaces/default";
    let account = json!({"metadata": {"name": "default"}});
    let accounts = format!("{default}/serviceaccounts");
    server.create(&accounts, &account).expect("an account");
    let pid = server.pid();
    for n in 0..20 {
        let labels = json!({"a": "1", "b": "2", "n": n.to_string()});
        let config = json!({
            "metadata": {"name": format!("config-{n}"), "labels": labels},
            "data": {"x": "y", "net-conf.json": "{}"},
            "binaryData": {"z": "AAEC"},
        });
        let made = server.create(&format!("{default}/configmaps"), &config);
        let made = made.unwrap_or_else(|error| panic!("ConfigMap {n}: {error}"));
        assert_eq!(made["data"], config["data"]);
        assert_eq!(made["metadata"]["labels"], labels);
        let pod = json!({
            "metadata": {"name": format!("pod-{n}"), "labels": labels, "annotations": labels},
            "spec": {
                "nodeName": "a",
                "automountServiceAccountToken": false,
                "containers": [{"name": "c", "image": "i"}],
            },
        });
        let made = server.create(&format!("{default}/pods"), &pod);
        let made = made.unwrap_or_else(|error| panic!("Pod {n}: {error}"));
        assert_eq!(made["metadata"]["annotations"], labels);
        for kind in ["configmaps", "pods"] {
            let list = server.object(&format!("{default}/{kind}"));
            let list = list.unwrap_or_else(|error| panic!("{kind} after {n}: {error}"));
            let items = list.expect("a list")["items"].as_array().map(Vec::len);
            // Newer servers have a ConfigMap of their own in each namespace.
            assert!(
                items.is_some_and(|items| items > n),
                "{items:?} {kind} after {n}"
            );
        }
    }
    server.add_node("late", &["10.5.1.0/24"]).expect("a Node");
    assert_eq!(server.pid(), pid, "it was started anew");
}
