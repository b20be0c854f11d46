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
