//! The choice of the external interface, as a pure function over observed links.
#![allow(missing_docs, reason = "tests")]

use std::net::IpAddr;

use flannel_core::underlay::{AddressInfo, Error, Interface, LinkInfo, UnderlayOptions};
use flannel_core::{
    Family, IfName, MAIN_TABLE, Object, Observed, PublicIp, Reach, Route, RoutePath, RouteProtocol,
    RouteTarget, Underlay,
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
    UnderlayOptions::of([interface])
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
    let told = PublicIp::v4("203.0.113.5".parse().expect("an address"));
    let options = UnderlayOptions::of([Interface::Name(name("eth1"))]).public_ip(told);
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
fn addresses_that_cannot_be_used_are_passed_over() {
    let mut node = node();
    for address in node.addresses.iter_mut().filter(|a| a.dev == name("eth1")) {
        address.deprecated = true;
    }
    let choose = |node: &Underlay| node.choose(&by(Interface::Name(name("eth1"))), &[Family::V4]);
    let (dev, family) = (name("eth1"), Family::V4);
    assert_eq!(choose(&node), Err(Error::NoAddress { dev, family }));
    // One that has not passed duplicate detection is waited for, unless there is another.
    let second = ip("192.0.2.8");
    let found = node.addresses.iter_mut().find(|a| a.ip == second);
    let found = found.expect("it is there");
    (found.deprecated, found.tentative) = (false, true);
    assert_eq!(choose(&node), Err(Error::Tentative { dev, ip: second }));
    node.addresses.push(address("eth1", "192.0.2.9/24"));
    let external = choose(&node).expect("the third");
    assert_eq!(external.local.ip(family), Some(ip("192.0.2.9")));
}

/// A node whose only interface has these addresses, and a default route from `source`.
fn with_addresses(addresses: &[AddressInfo], source: Option<&str>) -> Underlay {
    let mut default = route("0.0.0.0/0", via("192.0.2.254", "eth0"), 100);
    default.source = source.map(ip);
    Underlay {
        links: vec![link("lo", 1), link("eth0", 2)],
        addresses: addresses.to_vec(),
        routes: vec![default],
        ..Underlay::default()
    }
}

fn local(underlay: &Underlay) -> Result<String, Error> {
    let external = underlay.choose(&UnderlayOptions::default(), &[Family::V4])?;
    let ip = external.local.ip(Family::V4).expect("it has one");
    Ok(ip.to_string())
}

#[test]
fn a_virtual_address_is_no_better_than_the_hosts_own() {
    let of_dhcp = AddressInfo {
        permanent: false,
        ..address("eth0", "192.0.2.1/24")
    };
    let vip = address("eth0", "192.0.2.100/32");
    let second = AddressInfo {
        temporary: true,
        ..address("eth0", "192.0.2.101/24")
    };
    let other = address("eth0", "198.51.100.1/24");
    for virtual_one in [vip, second, other] {
        for addresses in [
            [of_dhcp.clone(), virtual_one.clone()],
            [virtual_one.clone(), of_dhcp.clone()],
        ] {
            let found = local(&with_addresses(&addresses, None));
            assert_eq!(found.as_deref(), Ok("192.0.2.1"), "beside {virtual_one:?}");
        }
    }
}

#[test]
fn the_source_of_the_default_route_is_the_address() {
    let addresses = [
        address("eth0", "192.0.2.1/24"),
        address("eth0", "192.0.2.2/24"),
        address("lo", "203.0.113.9/32"),
    ];
    for source in ["192.0.2.1", "192.0.2.2", "203.0.113.9"] {
        let found = local(&with_addresses(&addresses, Some(source)));
        assert_eq!(found.as_deref(), Ok(source));
    }
    // One that the host does not have cannot be it.
    let found = local(&with_addresses(&addresses, Some("192.0.2.77")));
    assert_eq!(found.as_deref(), Ok("192.0.2.1"));
}

#[test]
fn a_default_route_with_several_paths_is_one() {
    let path = |gateway, dev| RoutePath {
        gateway: Some(ip(gateway)),
        dev: name(dev),
    };
    let choose = |paths: Vec<RoutePath>| {
        let mut node = node();
        node.links[2].mtu = 1400;
        node.routes[0].target = RouteTarget::Paths(paths);
        node.choose(&UnderlayOptions::default(), &[Family::V4])
    };
    let one = choose(vec![path("10.0.2.2", "eth0"), path("10.0.2.3", "eth0")]);
    let one = one.expect("both lead through eth0");
    assert_eq!(
        (one.dev, one.others, one.mtu),
        (name("eth0"), Vec::new(), 1500)
    );
    let two = choose(vec![path("10.0.2.2", "eth0"), path("192.0.2.1", "eth1")]);
    let two = two.expect("over both");
    let others = vec![name("eth1")];
    assert_eq!((two.dev, two.others, two.mtu), (name("eth0"), others, 1400));
    assert_eq!(two.local.ip(Family::V4), Some(ip("10.0.2.15")));
}

#[test]
fn a_default_route_that_leads_nowhere_is_none_and_one_that_is_unclear_is_named() {
    let mut node = node();
    node.routes[0].target = RouteTarget::Other("unreachable".to_owned());
    let family = Family::V4;
    let choose = |node: &Underlay| node.choose(&UnderlayOptions::default(), &[family]);
    assert_eq!(choose(&node), Err(Error::NoDefaultRoute { family }));
    node.routes[0].target = RouteTarget::Nexthop(7);
    let error = choose(&node).expect_err("a group that does not tell its paths");
    assert!(error.to_string().contains("nhid 7"), "{error}");
}

/// The view of the host of `node`, with more on it.
fn observed(node: Underlay, more: Vec<Object>) -> Underlay {
    let routes = node.routes.into_iter().map(Object::Route);
    let observed = Observed {
        objects: routes.chain(more).map(|o| (o.key(), o)).collect(),
        links: node.links,
        addresses: node.addresses,
    };
    let networks = ["10.5.0.0/16".parse().expect("a subnet")];
    Underlay::from_observed(&observed, &networks, &[], |_| false)
}

#[test]
fn a_link_of_containers_is_chosen_only_if_it_is_named() {
    let to_v0 = Object::Route(route("0.0.0.0/0", RouteTarget::Device(name("v0")), 5));
    let to_one = Object::Route(route("10.5.1.7/32", RouteTarget::Device(name("v0")), 0));
    let of_docker = (
        "172.17.0.1/16",
        vec![to_v0.clone()],
        "no container of ours is there",
    );
    let cases = [
        (
            "10.5.1.1/24",
            vec![to_v0.clone()],
            "its address is a container's",
        ),
        (
            "172.17.0.1/16",
            vec![to_v0.clone(), to_one],
            "a route to a container leads to it",
        ),
    ];
    let with = |text: &str, more| {
        let mut node = node();
        node.links.push(link("v0", 9));
        node.addresses.push(address("v0", text));
        observed(node, more)
    };
    for (text, more, why) in cases {
        let underlay = with(text, more);
        let chosen = underlay.choose(&UnderlayOptions::default(), &[Family::V4]);
        assert_eq!(chosen.expect(why).dev, name("eth0"), "{why}");
        let named = underlay.choose(&by(Interface::Name(name("v0"))), &[Family::V4]);
        assert_eq!(named.expect(why).dev, name("v0"), "{why}");
        let alone = Underlay {
            routes: underlay
                .routes
                .iter()
                .filter(|r| r.metric == 5)
                .cloned()
                .collect(),
            ..underlay
        };
        let error = alone.choose(&UnderlayOptions::default(), &[Family::V4]);
        let error = error.expect_err(why);
        assert!(
            matches!(error, Error::Inward { dev, .. } if dev == name("v0")),
            "{error}"
        );
        assert!(error.can_pass());
    }
    // A veth as such may be the uplink of a node that is itself a container.
    let (text, more, why) = of_docker;
    let chosen = with(text, more).choose(&UnderlayOptions::default(), &[Family::V4]);
    assert_eq!(chosen.expect(why).dev, name("v0"));
}

#[test]
fn a_port_of_a_containers_bridge_is_a_link_of_containers() {
    let mut node = node();
    node.links.extend([link("cni0", 8), link("v0", 9)]);
    node.links[4].master = Some(name("cni0"));
    node.addresses.push(address("cni0", "10.5.1.1/24"));
    node.addresses.push(address("v0", "198.18.0.1/24"));
    let to_v0 = Object::Route(route("0.0.0.0/0", RouteTarget::Device(name("v0")), 5));
    let underlay = observed(node, vec![to_v0]);
    let chosen = underlay.choose(&UnderlayOptions::default(), &[Family::V4]);
    assert_eq!(chosen.expect("the other default route").dev, name("eth0"));
}

#[test]
fn an_address_that_means_nothing_elsewhere_is_chosen_only_if_it_is_named() {
    for text in ["169.254.17.3/16", "10.5.7.7/24"] {
        let mut node = node();
        node.addresses.retain(|a| a.dev != name("eth0"));
        node.addresses.push(address("eth0", text));
        node.routes
            .push(route("0.0.0.0/0", via("192.0.2.1", "eth1"), 500));
        let underlay = observed(node, Vec::new());
        let chosen = underlay.choose(&UnderlayOptions::default(), &[Family::V4]);
        assert_eq!(
            chosen.expect("the other default route").dev,
            name("eth1"),
            "{text}"
        );
        let named = underlay.choose(&by(Interface::Name(name("eth0"))), &[Family::V4]);
        let (ip_text, _) = text.split_once('/').expect("address/length");
        assert_eq!(
            named.expect("it was named").local.ip(Family::V4),
            Some(ip(ip_text))
        );
    }
    // Where there is nothing else, the reason is told.
    let found = local(&with_addresses(&[address("eth0", "169.254.17.3/16")], None));
    let error = found.expect_err("it is link-local");
    assert!(
        error.to_string().contains("link-local") && error.can_pass(),
        "{error}"
    );
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
