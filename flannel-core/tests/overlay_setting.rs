//! The whole SDK on fakes: what an overlay is given, and what it says of it. Configs, the underlay, parts
//! that are missing.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::net::IpAddr;
use std::time::Duration;

use common::*;
use flannel_core::{
    Address, ConditionStatus, ConditionType, Error, Family, Link, MAIN_TABLE, MemoryManager,
    NetworkConfig, Object, ObjectKey, Op, Overlay, PoolMode, Route, RouteProtocol, RouteTarget,
    UnderlayOptions,
};
use flannel_testkit::fake_kernel::FakeKernel;

#[tokio::test(start_paused = true)]
async fn underlay_changes_are_followed_and_published() {
    let (_, kernels, [a, b]) = pair().await;
    let eth0 = dev("eth0");
    let Some(Object::Link(link)) = kernels[0].get(&ObjectKey::Link(eth0)) else {
        panic!("eth0 is there");
    };
    kernels[0]
        .external(&Op::Change(Object::Link(Link {
            mtu: Some(9000),
            ..link
        })))
        .expect("ok");
    a.wait_for(|status| status.mtu == Some(8930))
        .await
        .expect("running");
    settle(&a).await;
    assert!(matches!(
        kernels[0].get(&ObjectKey::Link(dev("flannel.1"))),
        Some(Object::Link(Link {
            mtu: Some(8950),
            ..
        }))
    ));

    let new: IpAddr = [192, 0, 2, 201].into();
    let add = Address {
        dev: eth0,
        ip: new,
        prefix_len: 24,
    };
    let old = Address {
        dev: eth0,
        ip: [192, 0, 2, 1].into(),
        prefix_len: 24,
    };
    kernels[0]
        .external(&Op::Create(Object::Address(add)))
        .expect("ok");
    kernels[0]
        .external(&Op::Delete(Object::Address(old)))
        .expect("ok");
    // The default route went with the address; someone puts it back, as a DHCP client would.
    let route = Route {
        table: MAIN_TABLE,
        dst: "0.0.0.0/0".parse().expect("a subnet"),
        metric: 0,
        target: RouteTarget::Gateway {
            gateway: [192, 0, 2, 254].into(),
            dev: eth0,
            onlink: false,
        },
        protocol: RouteProtocol::BOOT,
        source: None,
    };
    kernels[0].external(&Op::Create(Object::Route(route))).ok();
    a.wait_for(|status| {
        status
            .lease
            .as_ref()
            .is_some_and(|l| l.public_ip.ip(Family::V4) == Some(new))
    })
    .await
    .expect("running");
    settle(&b).await;
    let remotes: Vec<IpAddr> = kernels[1]
        .objects()
        .into_values()
        .filter_map(|object| match object {
            Object::Fdb(fdb) if fdb.remote.is_ipv4() => Some(fdb.remote),
            _ => None,
        })
        .collect();
    assert_eq!(remotes, [new], "peers follow");
}

#[tokio::test(start_paused = true)]
async fn wrong_configs_are_clear_errors_and_leave_nothing() {
    let cases = [
        (
            r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#,
            "Backend.VNI",
        ),
        (
            r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan","MTU":500}}"#,
            "Backend.MTU",
        ),
        (
            r#"{"Network":"10.42.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48",
                "Backend":{"Type":"vxlan","VNI":10000}}"#,
            "at most 9999",
        ),
        (
            r#"{"Network":"10.42.0.0/16","Backend":{"Type":"wireguard"}}"#,
            "no such backend",
        ),
    ];
    for (text, expected) in cases {
        let kernel = FakeKernel::node(1);
        let before = kernel.objects();
        let manager = MemoryManager::new(config(text));
        let overlay = builder("a", &manager, &kernel)
            .start()
            .await
            .expect("all parts are there");
        let error = overlay
            .ready()
            .await
            .expect_err("it cannot work")
            .to_string();
        assert!(error.contains(expected), "{error}");
        drop(overlay);
        assert_eq!(kernel.objects(), before, "{text}");
        assert!(
            manager.snapshot().leases.is_empty(),
            "no lease was taken: {text}"
        );
    }
    let small = NetworkConfig::from_json(r#"{"Network":"10.42.0.0/29"}"#, PoolMode::Allocated);
    assert!(
        small
            .expect_err("too small")
            .to_string()
            .contains("Network")
    );
}

#[tokio::test(start_paused = true)]
async fn no_interface_is_waited_for_and_said_clearly() {
    let kernel = FakeKernel::empty();
    let manager = MemoryManager::new(config(
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#,
    ));
    let overlay = builder("a", &manager, &kernel)
        .start()
        .await
        .expect("all parts are there");
    let error = overlay
        .ready_within(Duration::from_secs(60))
        .await
        .expect_err("there is no default route")
        .to_string();
    assert!(error.contains("default route"), "{error}");
    let _ = kernel
        .clone()
        .with_link("eth0", 1500, &[([192, 0, 2, 1].into(), 24)])
        .with_default_route("eth0", [192, 0, 2, 254].into());
    overlay
        .wait_for(|status| status.ready)
        .await
        .expect("it goes on trying");
}

#[tokio::test(start_paused = true)]
async fn a_config_change_is_applied_while_running() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    let text = DUAL.replace(r#""Type": "vxlan""#, r#""Type": "vxlan", "VNI": 7"#);
    manager.set_config(config(&text));
    until(Duration::from_secs(2), "the device of the new VNI", || {
        kernel.get(&ObjectKey::Link(dev("flannel.7"))).is_some()
            && kernel.get(&ObjectKey::Link(dev("flannel.1"))).is_none()
    })
    .await;
    let before = subnet_of(&a, Family::V4);
    assert!(before.to_string().starts_with("10.42."));
    manager.set_config(config(&text.replace("10.42.0.0/16", "10.43.0.0/16")));
    a.wait_for(|status| {
        status.lease.as_ref().is_some_and(|lease| {
            lease
                .subnet
                .v4
                .is_some_and(|subnet| subnet.to_string().starts_with("10.43."))
        })
    })
    .await
    .expect("a lease of the new network");
    settle(&a).await;
    let stale = kernel
        .objects()
        .into_keys()
        .filter(|key| key.to_string().contains("10.42."));
    assert_eq!(stale.count(), 0, "nothing of the old network is left");
}

#[tokio::test(start_paused = true)]
async fn an_underlay_that_is_named_is_used() {
    let manager = MemoryManager::new(config(
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#,
    ));
    let kernel = FakeKernel::node(1).with_link("eth1", 9000, &[([198, 51, 100, 7].into(), 24)]);
    let options = UnderlayOptions::of([flannel_core::Interface::Name(dev("eth1"))]);
    let a = builder("a", &manager, &kernel)
        .underlay(options)
        .start()
        .await
        .expect("parts");
    a.ready().await.expect("ready");
    let external = a.status().external.clone().expect("chosen");
    assert_eq!((external.dev, a.status().mtu), (dev("eth1"), Some(8950)));
}

#[tokio::test(start_paused = true)]
async fn preflight_says_what_is_missing_and_how_to_mend_it() {
    let kernel = FakeKernel::node(1);
    let manager = MemoryManager::new(config(DUAL));
    let report = builder("a", &manager, &kernel)
        .preflight()
        .await
        .expect("a report");
    assert!(report.ok());
    let mut features = flannel_core::Features::all();
    features.net_admin = false;
    (features.vxlan, features.tun) = (false, false);
    features.tun_fault = Some(flannel_core::TunFault::NoRight);
    kernel.set_features(features);
    kernel.set_forwarding(Family::V4, false);
    let report = builder("a", &manager, &kernel)
        .preflight()
        .await
        .expect("a report");
    assert!(!report.ok());
    let missing: Vec<&str> = report
        .checks
        .iter()
        .filter(|c| c.ok == Some(false))
        .map(|c| c.name)
        .collect();
    assert_eq!(missing, ["net-admin", "vxlan", "tun", "forwarding-v4"]);
    // Where the right is missing, no module is to blame.
    let blamed = report.checks.iter().filter(|c| c.ok == Some(false));
    let blamed = blamed.filter(|c| c.fix.contains("modprobe")).count();
    assert_eq!(blamed, 0, "{report:?}");
    let fix = report
        .checks
        .iter()
        .find(|c| c.name == "net-admin")
        .map(|c| c.fix);
    assert!(fix.is_some_and(|fix| fix.contains("CAP_NET_ADMIN")));
}

#[tokio::test(start_paused = true)]
async fn a_config_that_cannot_be_used_leaves_the_last_good_one_in_force() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let a = start("a", &manager, &kernel).await;
    let before = kernel.objects();
    manager.set_config(config(&DUAL.replace("vxlan", "wireguard")));
    settle(&a).await;
    let status = a.status();
    let condition = status
        .condition(ConditionType::Config)
        .expect("it is there");
    assert_eq!(
        (condition.status, condition.reason.as_str()),
        (ConditionStatus::False, "UnknownBackend")
    );
    assert_eq!(kernel.objects(), before);
    manager.set_config(config(DUAL));
    settle(&a).await;
    assert!(a.status().is_true(ConditionType::Config));
}

#[tokio::test(start_paused = true)]
async fn a_builder_without_a_part_says_which() {
    let manager = MemoryManager::new(config(DUAL));
    let error = Overlay::builder(node("a"))
        .start()
        .await
        .expect_err("nothing is there");
    assert!(matches!(error, Error::Missing { part: "manager" }));
    let error = Overlay::builder(node("a"))
        .manager(manager)
        .kernel(FakeKernel::node(1))
        .start()
        .await
        .expect_err("no backend");
    assert!(matches!(error, Error::Missing { part: "backend" }));
}
