//! The kernel's word on packets: the answers of Linux and the notifications that make one ask
//! again.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "tests live in real time, run other tools, and say why they are skipped"
)]

mod common;
mod strategies;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::*;
use flannel_core::{
    Change, ChangeStream, Family, FilterChain, FilterFamily, HostFacts, Kernel, Lookup, PolicyRule,
    Questions, Refused, ReversePath, Routed,
};

/// Runs a tool in the namespace of the test.
fn run(command: &str) {
    let mut words = command.split(' ');
    let program = words.next().expect("a program");
    let output = std::process::Command::new(program)
        .args(words)
        .output()
        .expect("it runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {error}");
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Two devices with addresses, as the lab of each test.
fn two_devices() {
    for command in [
        "ip link add u0 type bridge",
        "ip link add u1 type bridge",
        "ip link set u0 up",
        "ip link set u1 up",
        "ip addr add 192.0.2.1/24 dev u0",
        "ip addr add 198.51.100.1/24 dev u1",
    ] {
        run(command);
    }
}

async fn ask(net: &Net, lookups: &[Lookup]) -> HostFacts {
    let mut questions = Questions::default();
    questions.families.extend(Family::ALL);
    questions.devices.extend([dev("u0"), dev("u1")]);
    questions.lookups.extend_from_slice(lookups);
    questions.firewall = true;
    let facts = net.kernel.host_facts(&questions).await.expect("an answer");
    assert_eq!(facts.routed.len(), lookups.len());
    facts
}

/// Runs a tool and waits for the hint at what it did; answers how long that took.
async fn hinted(hints: &mut ChangeStream, command: &str) -> Duration {
    let quiet = Duration::from_millis(50);
    while tokio::time::timeout(quiet, next(hints)).await.is_ok() {}
    run(command);
    let start = Instant::now();
    while next(hints).await != Change::Policy {}
    let took = start.elapsed();
    assert!(took < Duration::from_secs(1), "{command}: {took:?}");
    took
}

#[test]
fn every_refusal_has_its_meaning() {
    netns(async |net| {
        two_devices();
        run("ip route add unreachable 10.1.0.0/16");
        run("ip route add prohibit 10.2.0.0/16");
        run("ip route add blackhole 10.3.0.0/16");
        run("ip route add throw 10.4.0.0/16");
        run("ip -6 route add prohibit fd02::/16");
        let lookups = [
            "10.1.0.1", "10.2.0.1", "10.3.0.1", "10.4.0.1", "10.5.0.1", "fd02::1", "fd05::1",
        ];
        let lookups = lookups.map(|dst| Lookup::to(ip(dst), None));
        let facts = ask(&net, &lookups).await;
        let expected = [
            Refused::Unreachable,
            Refused::Prohibited,
            Refused::Dropped,
            Refused::NoRoute,
            Refused::NoRoute,
            Refused::Prohibited,
            Refused::NoRoute,
        ];
        assert_eq!(facts.routed, expected.map(|why| Some(Routed::Refused(why))));
        assert_eq!(facts.rules, [], "none is in front of the main table");
        // A device that does not exist is no answer, and costs the others none.
        let lookups = [
            Lookup::from(ip("192.0.2.7"), ip("192.0.2.1"), dev("gone")),
            Lookup::to(ip("192.0.2.1"), None),
        ];
        let facts = ask(&net, &lookups).await;
        assert_eq!(facts.routed, [None, Some(Routed::Local)]);
    });
}

#[test]
fn a_rule_in_front_of_the_main_table_is_told_named_and_hinted() {
    netns(async |net| {
        two_devices();
        let mut hints = net.kernel.changes();
        run("ip route add 10.5.0.0/16 via 192.0.2.9");
        run("ip route add 10.5.0.0/16 dev u1 table 300");
        let lookup = [Lookup::to(ip("10.5.2.1"), Some(ip("192.0.2.1")))];
        let way = |name: &str, gateway: Option<&str>, table| {
            Some(Routed::Through {
                dev: dev(name),
                gateway: gateway.map(ip),
                table,
            })
        };
        let facts = ask(&net, &lookup).await;
        assert_eq!(facts.routed, [way("u0", Some("192.0.2.9"), 254)]);
        let took = hinted(&mut hints, "ip rule add to 10.5.0.0/16 pref 900 lookup 300").await;
        eprintln!("a rule is hinted within {took:?}");
        let facts = ask(&net, &lookup).await;
        assert_eq!(facts.routed, [way("u1", None, 300)]);
        let rule = |priority, table| PolicyRule {
            family: Family::V4,
            priority,
            table,
        };
        assert_eq!(facts.rules, [rule(900, Some(300))]);
        hinted(&mut hints, "ip rule add to 10.5.2.0/24 pref 800 blackhole").await;
        let facts = ask(&net, &lookup).await;
        assert_eq!(facts.routed, [Some(Routed::Refused(Refused::Dropped))]);
        assert_eq!(facts.rules, [rule(800, None), rule(900, Some(300))]);
        for command in [
            "ip rule del pref 900",
            "ip -6 rule add pref 9 lookup 9",
            "ip route add 10.6.0.0/16 dev u0 table 300",
            "ip route del 10.6.0.0/16 table 300",
        ] {
            hinted(&mut hints, command).await;
        }
    });
}

#[test]
fn a_strict_filter_drops_what_the_way_back_of_is_another() {
    netns(async |net| {
        two_devices();
        let mut hints = net.kernel.changes();
        let lookups = [
            Lookup::from(ip("192.0.2.7"), ip("192.0.2.1"), dev("u0")),
            Lookup::from(ip("198.51.100.7"), ip("192.0.2.1"), dev("u0")),
        ];
        let local = Some(Routed::Local);
        assert_eq!(
            ask(&net, &lookups).await.routed,
            [local.clone(), local.clone()]
        );
        hinted(&mut hints, "sysctl -qw net.ipv4.conf.u0.rp_filter=1").await;
        let facts = ask(&net, &lookups).await;
        let dropped = Some(Routed::Refused(Refused::Dropped));
        assert_eq!(facts.routed, [local.clone(), dropped]);
        let filter = |dev| facts.setting(Family::V4, dev).reverse_path;
        assert_eq!(filter(Some(dev("u0"))), Some(ReversePath::Strict));
        assert_eq!(filter(None), Some(ReversePath::Off));
        hinted(&mut hints, "sysctl -qw net.ipv4.conf.all.rp_filter=2").await;
        assert_eq!(ask(&net, &lookups).await.routed, [local.clone(), local]);
    });
}

#[test]
fn forwarding_is_told_of_each_device_and_globally() {
    netns(async |net| {
        two_devices();
        let on = |facts: &HostFacts, family, dev| facts.setting(family, dev).forwarding;
        run("sysctl -qw net.ipv4.ip_forward=1");
        run("sysctl -qw net.ipv4.conf.u1.forwarding=0");
        run("sysctl -qw net.ipv6.conf.all.forwarding=1");
        let facts = ask(&net, &[]).await;
        assert_eq!(on(&facts, Family::V4, None), Some(true));
        assert_eq!(on(&facts, Family::V4, Some(dev("u0"))), Some(true));
        assert_eq!(on(&facts, Family::V4, Some(dev("u1"))), Some(false));
        assert_eq!(on(&facts, Family::V6, None), Some(true));
        let mut hints = net.kernel.changes();
        for command in [
            "sysctl -qw net.ipv4.ip_forward=0",
            "sysctl -qw net.ipv6.conf.all.forwarding=0",
        ] {
            hinted(&mut hints, command).await;
        }
        let facts = ask(&net, &[]).await;
        assert_eq!(on(&facts, Family::V4, Some(dev("u0"))), Some(false));
        assert_eq!(on(&facts, Family::V6, None), Some(false));
    });
}

#[test]
fn chains_that_drop_what_is_forwarded_are_read_and_no_others() {
    let test = "chains_that_drop_what_is_forwarded_are_read_and_no_others";
    if !flannel_testkit::require_tool(test, "nft") {
        return;
    }
    netns(async |net| {
        two_devices();
        let facts = ask(&net, &[]).await;
        let firewall = facts.firewall.expect("known");
        assert_eq!((firewall.dropping, firewall.unread), (vec![], None));
        for command in [
            "nft add table inet filter",
            "nft add table ip old",
            "nft add table bridge br",
            "nft add chain inet filter fw { type filter hook forward priority 0 ; policy drop ; }",
            "nft add chain inet filter in { type filter hook input priority 0 ; policy drop ; }",
            "nft add chain inet filter plain",
            "nft add chain ip old FORWARD { type filter hook forward priority 5 ; policy drop ; }",
            "nft add chain ip old open { type filter hook forward priority 6 ; policy accept ; }",
            "nft add chain bridge br fw { type filter hook forward priority 0 ; policy drop ; }",
        ] {
            run(command);
        }
        let chain = |families, table: &str, chain: &str| FilterChain {
            families,
            table: table.to_owned(),
            chain: chain.to_owned(),
        };
        let facts = ask(&net, &[]).await;
        let expected = [
            chain(FilterFamily::Ip, "old", "FORWARD"),
            chain(FilterFamily::Inet, "filter", "fw"),
        ];
        assert_eq!(facts.firewall.expect("known").dropping, expected);
    });
}
