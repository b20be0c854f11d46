//! A wrong config, or a host that does not fit: a clear error, and nothing left behind.
#![allow(missing_docs, reason = "tests")]

use std::time::Duration;

use flannel_backend_vxlan::VxlanBackend;
use flannel_core::{
    Error, Interface, MemoryManager, NetworkConfig, NodeId, Overlay, PoolMode, UnderlayOptions,
};
use flannel_e2e::{Everything, LIMIT, config, dev, within};
use flannel_netlink::NetlinkKernel;
use flannel_testkit::netns::{Lab, Ns};
use flannel_testkit::require_tool;

#[test]
fn a_config_that_cannot_work_is_refused_when_it_is_read() {
    for (text, words) in [
        (
            r#"{"Network": "10.42.0.0/29"}"#,
            &["Network", "10.42.0.0/29", "too small"][..],
        ),
        (
            r#"{"Network": "10.42.0.0/16", "SubnetLen": 17}"#,
            &["SubnetLen", "17", "at least 18"],
        ),
        (
            r#"{"Network": "10.42.0.0/16", "SubnetMin": "10.41.0.0"}"#,
            &["SubnetMin", "10.41.0.0", "10.42.0.0/16"],
        ),
        (
            r#"{"EnableIPv6": true, "Network": "10.42.0.0/16"}"#,
            &["IPv6Network", "missing"],
        ),
        (r#"{"EnableIPv4": false}"#, &["EnableIPv4", "EnableIPv6"]),
    ] {
        let error = NetworkConfig::from_json(text, PoolMode::Allocated);
        let error = error.expect_err(text).to_string();
        for word in words {
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}

/// Starts an overlay that cannot become ready; answers what it says.
async fn refused(ns: &Ns, text: &str, underlay: UnderlayOptions) -> String {
    let before = Everything::of(ns);
    let overlay = Overlay::builder(NodeId::new("node-1").expect("a node id"))
        .manager(MemoryManager::new(config(text)))
        .backend(VxlanBackend::new())
        .kernel(NetlinkKernel::in_namespace(ns.path()).expect("a kernel"))
        .underlay(underlay)
        .start()
        .await
        .expect("all parts");
    let soon = Duration::from_secs(2);
    let error = within("it is refused", LIMIT, overlay.ready_within(soon)).await;
    let error = error.expect_err("it cannot work");
    assert!(matches!(error, Error::NotReady(_)), "{error}");
    overlay.resync().await.expect("it goes on trying");
    before.assert_same(&Everything::of(ns), &format!("while refused: {error}"));
    let failed = within("a teardown", Duration::from_secs(5), overlay.teardown()).await;
    failed.expect("there is nothing to remove");
    before.assert_same(&Everything::of(ns), &format!("after: {error}"));
    error.to_string()
}

fn assert_names(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "{word:?} is not in: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_that_the_backend_cannot_use_is_refused_with_key_and_rule() {
    let Some(lab) = Lab::for_test("refused-config") else {
        return;
    };
    if !require_tool("refused-config", "ip") {
        return;
    }
    let underlay = lab.underlay(1).expect("an underlay");
    let ns = &underlay.nodes[0].ns;
    let with = |keys: &str| {
        format!(r#"{{"Network": "10.42.0.0/16", "Backend": {{"Type": "vxlan", {keys}}}}}"#)
    };
    let v6 = r#"{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
        "Backend": {"Type": "vxlan", "VNI": 10000}}"#;
    let wire = r#"{"Network": "10.42.0.0/16", "Backend": {"Type": "carrier-pigeon"}}"#;
    for (text, words) in [
        (with(r#""VNI": 0"#), &["Backend.VNI", "0", "1"][..]),
        (
            with(r#""VNI": 16777216"#),
            &["Backend.VNI", "16777216", "16777215"],
        ),
        (with(r#""VNI": "one""#), &["Backend.VNI", "one"]),
        (with(r#""MTU": 600"#), &["Backend.MTU", "600", "626"]),
        (
            with(r#""Port": 70000"#),
            &["Backend.Port", "70000", "65535"],
        ),
        (
            with(r#""DirectRouting": "yes""#),
            &["Backend.DirectRouting", "yes"],
        ),
        (v6.to_owned(), &["Backend.VNI", "10000", "9999", "IPv6"]),
        (
            wire.to_owned(),
            &["Backend.Type", "carrier-pigeon", "vxlan"],
        ),
    ] {
        let error = refused(ns, &text, UnderlayOptions::default()).await;
        assert_names(&error, words);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_the_interface_is_refused_with_what_was_looked_for() {
    let Some(lab) = Lab::for_test("refused-host") else {
        return;
    };
    if !require_tool("refused-host", "ip") {
        return;
    }
    let lonely = lab.namespace("lonely").expect("a namespace");
    let text = flannel_e2e::DUAL;
    let error = refused(&lonely, text, UnderlayOptions::default()).await;
    assert_names(&error, &["no IPv4 default route", "name the interface"]);

    let underlay = lab.underlay(1).expect("an underlay");
    let ns = &underlay.nodes[0].ns;
    for (interface, words) in [
        (Interface::Name(dev("eth7")), &["eth7", "no interface"][..]),
        (
            Interface::Address([203, 0, 113, 7].into()),
            &["203.0.113.7", "no interface"],
        ),
        (
            Interface::Matching("^10\\.".to_owned()),
            &["^10", "matches"],
        ),
        (
            Interface::Matching("(".to_owned()),
            &["(", "regular expression"],
        ),
    ] {
        let options = UnderlayOptions::of([interface]);
        assert_names(&refused(ns, text, options).await, words);
    }

    // An underlay too narrow for the overlay.
    ns.set_mtu("eth0", 1300).expect("it is there");
    let v6 = r#"{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:42::/48",
        "Backend": {"Type": "vxlan"}}"#;
    let error = refused(ns, v6, UnderlayOptions::default()).await;
    assert_names(&error, &["interface", "1300", "IPv6", "1280", "1350"]);
}
