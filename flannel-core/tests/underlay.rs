//! The choice of the external interface, as a pure function over observed links.
#![allow(missing_docs, reason = "tests")]

use std::net::IpAddr;

use flannel_core::underlay::{AddressInfo, Error, Interface, LinkInfo, UnderlayOptions};
use flannel_core::{
    Family, IfName, MAIN_TABLE, PublicIp, Reach, Route, RouteProtocol, RouteTarget, Underlay,
};

fn name(text: &str) -> IfName {
    IfName::new(text).expect("a device name")
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn link(text: &str, index: u32) -> LinkInfo {
    LinkInfo {
        name: name(text),
        index,
        mtu: 1500,
        up: true,
        running: true,
        loopback: text == "lo",
        mac: None,
        master: None,
    }
}

fn address(dev: &str, text: &str) -> AddressInfo {
    let (ip_text, len) = text.split_once('/').expect("address/length");
    AddressInfo {
        dev: name(dev),
        ip: ip(ip_text),
        prefix_len: len.parse().expect("a length"),
        link_scope: false,
        deprecated: false,
        permanent: true,
        temporary: false,
        tentative: false,
    }
}

fn route(dst: &str, target: RouteTarget, metric: u32) -> Route {
    Route {
        table: MAIN_TABLE,
        dst: dst.parse().expect("a subnet"),
        metric,
        target,
        protocol: RouteProtocol::BOOT,
        source: None,
    }
}

fn via(gateway: &str, dev: &str) -> RouteTarget {
    RouteTarget::Gateway {
        gateway: ip(gateway),
        dev: name(dev),
        onlink: false,
    }
}

/// A node with two interfaces: NAT on eth0 (default route), the cluster's network on eth1.
fn node() -> Underlay {
    Underlay {
        links: vec![link("lo", 1), link("eth0", 2), link("eth1", 3)],
        addresses: vec![
            address("lo", "127.0.0.1/8"),
            address("eth0", "10.0.2.15/24"),
            address("eth0", "fe80::1/64"),
            address("eth1", "192.0.2.7/24"),
            address("eth1", "192.0.2.8/24"),
            address("eth1", "2001:db8::7/64"),
        ],
        routes: vec![
            route("0.0.0.0/0", via("10.0.2.2", "eth0"), 100),
            route("10.0.2.0/24", RouteTarget::Device(name("eth0")), 0),
            route("192.0.2.0/24", RouteTarget::Device(name("eth1")), 0),
            route("198.51.100.0/24", via("192.0.2.1", "eth1"), 0),
            route("2001:db8::/64", RouteTarget::Device(name("eth1")), 256),
        ],
        ..Underlay::default()
    }
}

fn choose(options: &UnderlayOptions, families: &[Family]) -> Result<(String, PublicIp), Error> {
    node()
        .choose(options, families)
        .map(|external| (external.dev.to_string(), external.public))
}

fn by(interface: Interface) -> UnderlayOptions {
    UnderlayOptions {
        interfaces: vec![interface],
        public_ip: PublicIp::default(),
    }
}

#[test]
fn without_options_the_default_route_decides() {
    let (dev, public) = choose(&UnderlayOptions::default(), &[Family::V4]).expect("eth0");
    assert_eq!(
        (dev.as_str(), public.ip(Family::V4)),
        ("eth0", Some(ip("10.0.2.15")))
    );
}

#[test]
fn the_default_route_of_the_lowest_metric_wins() {
    let mut node = node();
    node.routes
        .push(route("0.0.0.0/0", via("192.0.2.1", "eth1"), 50));
    let external = node
        .choose(&UnderlayOptions::default(), &[Family::V4])
        .expect("eth1");
    assert_eq!(external.dev, name("eth1"));
}

#[test]
fn a_name_an_address_a_pattern_or_a_target_leads_to_the_interface() {
    for interface in [
        Interface::Name(name("eth1")),
        Interface::Address(ip("192.0.2.7")),
        Interface::Matching("^192\\.0\\.2\\.7$".to_owned()),
        Interface::Matching("eth1|nothing".to_owned()),
        Interface::Reaching(ip("198.51.100.9")),
    ] {
        let (dev, public) = choose(&by(interface.clone()), &[Family::V4]).expect("eth1");
        assert_eq!(dev, "eth1", "{interface:?}");
        assert_eq!(
            public.ip(Family::V4),
            Some(ip("192.0.2.7")),
            "{interface:?}"
        );
    }
}

#[test]
fn an_address_given_is_the_address_used() {
    let (_, public) = choose(&by(Interface::Address(ip("192.0.2.8"))), &[Family::V4]).expect("it");
    assert_eq!(public.ip(Family::V4), Some(ip("192.0.2.8")));
}

#[test]
fn a_public_address_alone_must_be_one_of_an_interface() {
    let mut options = UnderlayOptions::default();
    options.public_ip.set_ip(ip("192.0.2.8"));
    let (dev, public) = choose(&options, &[Family::V4]).expect("eth1");
    assert_eq!(
        (dev.as_str(), public.ip(Family::V4)),
        ("eth1", Some(ip("192.0.2.8")))
    );

    options.public_ip = PublicIp::v4("203.0.113.5".parse().expect("an address"));
    let error = choose(&options, &[Family::V4]).expect_err("nobody has it");
    assert_eq!(
        error,
        Error::NoSuchAddress {
            ip: ip("203.0.113.5")
        }
    );
}

#[test]
fn behind_nat_the_public_address_is_told_and_the_own_one_sends() {
    let options = UnderlayOptions {
        interfaces: vec![Interface::Name(name("eth1"))],
        public_ip: PublicIp::v4("203.0.113.5".parse().expect("an address")),
    };
    let external = node().choose(&options, &[Family::V4]).expect("eth1");
    assert_eq!(external.public.ip(Family::V4), Some(ip("203.0.113.5")));
    assert_eq!(external.local.ip(Family::V4), Some(ip("192.0.2.7")));
}

#[test]
fn dual_stack_needs_both_addresses_and_never_a_link_local_one() {
    let both = [Family::V4, Family::V6];
    let (_, public) = choose(&by(Interface::Name(name("eth1"))), &both).expect("eth1");
    assert_eq!(public.ip(Family::V6), Some(ip("2001:db8::7")));
    let error = choose(&by(Interface::Name(name("eth0"))), &both).expect_err("only fe80::1");
    assert_eq!(
        error,
        Error::NoAddress {
            dev: name("eth0"),
            family: Family::V6
        }
    );
}

#[test]
fn a_dual_stack_pattern_never_mixes_two_interfaces() {
    let pattern = "^(10\\.0\\.2\\.15|2001:db8::7)$".to_owned();
    let error = choose(&by(Interface::Matching(pattern)), &[Family::V4, Family::V6]);
    assert!(matches!(error, Err(Error::NoMatch { .. })), "{error:?}");
}

#[test]
fn unusable_addresses_are_passed_over() {
    let mut node = node();
    for (text, spoil) in [("192.0.2.7", 0), ("192.0.2.8", 1)] {
        let found = node
            .addresses
            .iter_mut()
            .find(|a| a.ip == ip(text))
            .expect("it is there");
        match spoil {
            0 => found.deprecated = true,
            _ => found.tentative = true,
        }
    }
    let error = node.choose(&by(Interface::Name(name("eth1"))), &[Family::V4]);
    assert_eq!(
        error,
        Err(Error::NoAddress {
            dev: name("eth1"),
            family: Family::V4
        })
    );
}

#[test]
fn lasting_addresses_come_before_passing_ones() {
    let mut node = node();
    node.addresses[3].permanent = false;
    let external = node
        .choose(&by(Interface::Name(name("eth1"))), &[Family::V4])
        .expect("eth1");
    assert_eq!(external.local.ip(Family::V4), Some(ip("192.0.2.8")));
}

#[test]
fn the_first_interface_that_fits_wins_and_all_failures_are_told() {
    let mut options = by(Interface::Name(name("wlan0")));
    options.interfaces.push(Interface::Name(name("eth1")));
    assert_eq!(choose(&options, &[Family::V4]).expect("eth1").0, "eth1");
    options.interfaces[1] = Interface::Matching("(".to_owned());
    let error = choose(&options, &[Family::V4]).expect_err("neither fits");
    let text = error.to_string();
    assert!(
        text.contains("wlan0") && text.contains("no regular expression"),
        "{text}"
    );
}

#[test]
fn disagreeing_default_routes_ask_for_a_name() {
    let mut node = node();
    node.routes
        .push(route("::/0", via("2001:db8::1", "eth1"), 1024));
    let error = node.choose(&UnderlayOptions::default(), &[Family::V4, Family::V6]);
    assert_eq!(
        error,
        Err(Error::Disagree {
            v4: name("eth0"),
            v6: name("eth1")
        })
    );
}

#[test]
fn no_default_route_and_no_mtu_are_clear_errors() {
    let mut node = node();
    node.routes.remove(0);
    let error = node.choose(&UnderlayOptions::default(), &[Family::V4]);
    assert_eq!(error, Err(Error::NoDefaultRoute { family: Family::V4 }));
    node.links[2].mtu = 0;
    let error = node.choose(&by(Interface::Name(name("eth1"))), &[Family::V4]);
    assert_eq!(error, Err(Error::NoMtu { dev: name("eth1") }));
}

#[test]
fn reach_follows_the_longest_prefix() {
    let node = node();
    assert_eq!(node.reach(ip("192.0.2.99")), Reach::OnLink(name("eth1")));
    assert_eq!(
        node.reach(ip("198.51.100.1")),
        Reach::Router(ip("192.0.2.1"))
    );
    assert_eq!(node.reach(ip("203.0.113.1")), Reach::Router(ip("10.0.2.2")));
    assert_eq!(node.reach(ip("2001:db8:1::1")), Reach::None);
}
