//! What this host has itself: no peer gets it.

use std::net::IpAddr;

use flannel_core::{
    DualStack, Event, Family, HostAddresses, Lease, LeaseSet, PublicIp, Rejection, WithdrawalGuard,
};

use super::{empty, key, net, node, own, peer, peer_of, snapshot};

/// The addresses of a host, each with its prefix.
fn host(addresses: &[(&str, u8)]) -> HostAddresses {
    let parsed = addresses
        .iter()
        .map(|(ip, len)| (ip.parse::<IpAddr>().expect("an address"), *len));
    parsed.collect()
}

fn on_host(addresses: &[(&str, u8)]) -> LeaseSet {
    let mut set = empty(WithdrawalGuard::default());
    set.set_host(host(addresses));
    set
}

fn with_v4(n: u8, revision: u64, subnet: &str) -> Lease {
    let mut lease = peer(n, revision);
    lease.subnet = DualStack::v4(net(subnet));
    lease.attrs.public_ip = PublicIp::v4([198, 51, 100, n].into());
    lease
}

#[test]
fn no_peer_gets_this_hosts_lan_nor_an_address_of_its_own() {
    let refused = |addresses: &[(&str, u8)], subnet: &str| {
        let mut set = on_host(addresses);
        set.apply(Event::Put(with_v4(1, 1, subnet)));
        peer_of(&set, &key("peer1")).rejected.v4.clone()
    };
    let overlaps = |subnet: &str, host: &str| {
        let (subnet, host) = (net(subnet), net(host));
        Some(Rejection::OverlapsHost { subnet, host })
    };
    // Half of the LAN, all of it, and more than it.
    let lan: &[(&str, u8)] = &[("10.5.240.7", 24)];
    for subnet in ["10.5.240.128/25", "10.5.240.64/26"] {
        assert_eq!(refused(lan, subnet), overlaps(subnet, "10.5.240.0/24"));
    }
    for subnet in ["10.5.240.0/25", "10.5.240.0/24", "10.5.240.0/20"] {
        assert_eq!(refused(lan, subnet), overlaps(subnet, "10.5.240.7/32"));
    }
    assert_eq!(refused(lan, "10.5.241.0/24"), None);
    // A LAN in which the config puts the whole overlay is not in its way; its own address is.
    let wide: &[(&str, u8)] = &[("10.5.9.9", 8)];
    assert_eq!(refused(wide, "10.5.240.0/24"), None);
    assert_eq!(
        refused(wide, "10.5.9.0/24"),
        overlaps("10.5.9.0/24", "10.5.9.9/32")
    );
    // What holds on one link only is no LAN.
    assert_eq!(
        host(&[("fe80::1", 64), ("169.254.3.3", 16)]),
        HostAddresses::default()
    );
}

#[test]
fn no_peer_is_reached_at_an_address_of_this_host_or_a_broadcast_address() {
    let found = |address: &str| {
        let mut set = on_host(&[
            ("203.0.113.7", 24),
            ("198.18.0.0", 31),
            ("2001:db8:9::7", 64),
        ]);
        let mut lease = peer(1, 1);
        let ip = address.parse().expect("an address");
        lease.attrs.public_ip.set_ip(ip);
        set.apply(Event::Put(lease));
        peer_of(&set, &key("peer1"))
            .rejected
            .get(Family::of(&ip))
            .cloned()
    };
    for nobodys in [
        "203.0.113.7",
        "203.0.113.255",
        "198.18.0.0",
        "2001:db8:9::7",
        "169.254.0.9",
    ] {
        let rejected = found(nobodys);
        assert!(
            matches!(rejected, Some(Rejection::PublicIp { .. })),
            "{nobodys}: {rejected:?}"
        );
    }
    // Of two hosts on a link each has one of the two addresses; IPv6 has no broadcast.
    for others in [
        "203.0.113.8",
        "203.0.113.0",
        "198.18.0.1",
        "2001:db8:9::ffff",
    ] {
        assert_eq!(found(others), None, "{others}");
    }
}

#[test]
fn what_is_refused_for_a_local_reason_keeps_its_claim() {
    let older = with_v4(1, 1, "10.5.240.0/24");
    let younger = with_v4(2, 2, "10.5.240.128/25");
    let taken = Some(Rejection::SubnetTaken {
        subnet: net("10.5.240.128/25"),
        other: net("10.5.240.0/24"),
        by: key("peer1"),
    });
    let verdict = |mut set: LeaseSet| {
        set.apply(Event::Snapshot(snapshot(
            [older.clone(), younger.clone()],
            2,
        )));
        peer_of(&set, &key("peer2")).rejected.v4.clone()
    };
    // Elsewhere, on the host whose LAN the older one is, and on the one whose address it has.
    assert_eq!(verdict(empty(WithdrawalGuard::default())), taken);
    assert!(verdict(on_host(&[("10.5.240.7", 26)])).is_some());
    assert_eq!(verdict(on_host(&[("198.51.100.1", 24)])), taken);
    // What is refused everywhere claims nothing.
    let mut nowhere = older.clone();
    nowhere.attrs.public_ip = PublicIp::default();
    let mut set = empty(WithdrawalGuard::default());
    set.apply(Event::Snapshot(snapshot([nowhere, younger.clone()], 2)));
    assert_eq!(peer_of(&set, &key("peer2")).rejected.v4, None);
}

#[test]
fn our_own_record_claims_as_any_other_and_says_when_others_reject_it() {
    let mine = Lease {
        key: key("key0"),
        node: node("node0"),
        subnet: own().subnets,
        ..peer(9, 5)
    };
    // A younger record that overlaps ours stands in nobody's way, an older one does.
    for (revision, free) in [(6, true), (4, false)] {
        let mut set = empty(WithdrawalGuard::default());
        let rival = with_v4(1, revision, "10.5.0.0/20");
        let third = with_v4(2, 7, "10.5.8.0/24");
        set.apply(Event::Snapshot(snapshot([mine.clone(), rival, third], 7)));
        let rejected = peer_of(&set, &key("peer1")).rejected.v4.clone();
        assert!(
            matches!(rejected, Some(Rejection::OverlapsOwn { .. })),
            "{rejected:?}"
        );
        assert_eq!(peer_of(&set, &key("peer2")).subnets.has(Family::V4), free);
        let told = set.own_rejected().v4;
        assert_eq!(told.is_none(), free, "{told:?}");
        assert!(matches!(told, None | Some(Rejection::SubnetTaken { .. })));
    }
}
