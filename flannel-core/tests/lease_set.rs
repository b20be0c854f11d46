//! The laws of [`LeaseSet`], over whole histories and against a plain model.

#[path = "lease_set/host.rs"]
mod host;
#[path = "lease_set/lost.rs"]
mod lost;
#[path = "lease_set/unreadable.rs"]
mod unreadable_records;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use flannel_core::{
    Applied, BackendType, DualStack, Event, Family, Held, HeldReason, Lease, LeaseAttrs,
    LeaseDelta, LeaseKey, LeaseSet, NetworkConfig, NodeId, Own, OwnChange, Peer, Pool, PoolMode,
    PublicIp, Rejection, Revision, Rng, Snapshot, Subnet, Unreadable, WithdrawalGuard,
};
use flannel_testkit::permute::{History, Permutation};
use flannel_testkit::strategies::leases;
use proptest::prelude::*;

const CONFIG: &str = r#"{"Network":"10.5.0.0/16","SubnetLen":24,"EnableIPv6":true,
    "IPv6Network":"fd00:5::/48","IPv6SubnetLen":64,"Backend":{"Type":"vxlan"}}"#;

fn pools() -> DualStack<Pool> {
    *NetworkConfig::from_json(CONFIG, PoolMode::Allocated)
        .expect("a valid config")
        .pools()
}

fn net(text: &str) -> Subnet {
    text.parse().expect("a subnet")
}

fn node(name: &str) -> NodeId {
    NodeId::new(name).expect("a node id")
}

fn key(name: &str) -> LeaseKey {
    LeaseKey::new(name)
}

fn networks() -> DualStack<Subnet> {
    pools().map(|_, pool| pool.network())
}

fn own() -> Own {
    Own {
        node: node("node0"),
        key: Some(key("key0")),
        subnets: DualStack::both(net("10.5.0.0/24"), net("fd00:5::/64")),
        public_ip: DualStack::both(
            Ipv4Addr::new(192, 0, 2, 1),
            "2001:db8::1".parse().expect("ip"),
        ),
    }
}

fn empty(guard: WithdrawalGuard) -> LeaseSet {
    let mut set = LeaseSet::new(guard);
    set.set_own(own());
    set.set_pools(pools());
    set.set_backend(BackendType::vxlan());
    set
}

/// Takes an event in, as an engine would: what is held is read again and confirmed.
fn take(set: &mut LeaseSet, event: Event) -> Vec<Applied> {
    let first = set.apply(event.clone());
    match event {
        Event::Snapshot(snapshot) if first.held.is_some() => {
            vec![first, set.apply_confirming(snapshot)]
        }
        _ => vec![first],
    }
}

fn fold(events: Vec<Event>) -> LeaseSet {
    let mut set = empty(WithdrawalGuard::default());
    for event in events {
        take(&mut set, event);
    }
    set
}

/// An honest peer: the n-th node with the n-th subnet.
fn peer(n: u8, revision: u64) -> Lease {
    Lease {
        key: key(&format!("peer{n}")),
        node: node(&format!("peer{n}")),
        instance: None,
        subnet: DualStack::both(
            net(&format!("10.5.{n}.0/24")),
            net(&format!("fd00:5:0:{n}::/64")),
        ),
        attrs: LeaseAttrs {
            public_ip: DualStack::both(
                Ipv4Addr::new(198, 51, 100, n),
                Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, n.into()),
            ),
            backend_type: Some(BackendType::vxlan()),
            backend_data: DualStack::default(),
        },
        ttl: None,
        created: Revision(revision),
        revision: Revision(revision),
    }
}

fn snapshot(leases: impl IntoIterator<Item = Lease>, revision: u64) -> Snapshot {
    Snapshot {
        leases: leases.into_iter().collect(),
        revision: Revision(revision),
        ..Snapshot::default()
    }
}

fn unreadable(name: &str, revision: u64) -> Unreadable {
    Unreadable {
        key: key(name),
        revision: Revision(revision),
        reason: "junk".to_owned(),
    }
}

fn keys(set: &LeaseSet) -> Vec<&str> {
    set.peers().keys().map(LeaseKey::as_str).collect()
}

fn delete(name: &str, revision: u64) -> Event {
    Event::Delete {
        key: key(name),
        revision: Revision(revision),
    }
}

fn peer_of(set: &LeaseSet, key: &LeaseKey) -> Arc<Peer> {
    Arc::clone(set.peer(key).expect("a known peer"))
}

mod model {
    //! What a set should hold, written down without any thought of speed.

    use super::*;

    /// The last good value of every record that is there, and whether it can be read now.
    pub(super) fn records(history: &History) -> BTreeMap<LeaseKey, (Option<Lease>, bool)> {
        let mut records: BTreeMap<LeaseKey, (Option<Lease>, bool)> = BTreeMap::new();
        for event in history.writes() {
            match event {
                Event::Put(lease) => {
                    records.insert(lease.key.clone(), (Some(lease.clone()), true));
                }
                Event::Delete { key, .. } => {
                    records.remove(key);
                }
                Event::Unreadable(record) => {
                    records.entry(record.key.clone()).or_default().1 = false;
                }
                _ => {}
            }
        }
        records
    }

    fn is_in_one_of(ranges: &[&str], ip: IpAddr) -> bool {
        ranges.iter().any(|range| net(range).contains_ip(ip))
    }

    /// What a record claims on every node.
    fn claims(lease: &Lease, family: Family) -> Option<Subnet> {
        const NOWHERE: [&str; 11] = [
            "0.0.0.0/8",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "224.0.0.0/4",
            "255.255.255.255/32",
            "10.5.0.0/16",
            "::/127",
            "fe80::/10",
            "ff00::/8",
            "::ffff:0:0/96",
            "fd00:5::/48",
        ];
        let subnet = *lease.subnet.get(family)?;
        let network = *networks().get(family)?;
        let ip = lease.attrs.public_ip.ip(family);
        let ok = lease.attrs.backend_type == Some(BackendType::vxlan())
            && network.contains(&subnet)
            && subnet.len() >= network.len() + 2
            && ip.is_some_and(|ip| !is_in_one_of(&NOWHERE, ip));
        ok.then_some(subnet)
    }

    /// Whether a claim is of use to this node.
    fn is_for_us(lease: &Lease, family: Family, subnet: &Subnet) -> bool {
        let mine = ["192.0.2.1/32", "2001:db8::1/128"];
        let ip = lease.attrs.public_ip.ip(family);
        lease.node != own().node
            && !own().subnets.values().any(|own| own.overlaps(subnet))
            && ip.is_some_and(|ip| !is_in_one_of(&mine, ip))
    }

    /// Whether a record cannot be read and its node has a newer one that can.
    pub(super) fn is_replaced(lease: &Lease, set: &LeaseSet) -> bool {
        let spoilt = |key: &LeaseKey| set.unreadable().any(|record| record.key == *key);
        let mut others = set.peers().values().map(|peer| &peer.lease);
        spoilt(&lease.key)
            && others.any(|other| {
                other.node == lease.node && other.revision > lease.revision && !spoilt(&other.key)
            })
    }

    /// The subnets that are admitted of each record, our own among those that claim.
    pub(super) fn admitted<'a>(
        records: impl IntoIterator<Item = &'a Lease>,
    ) -> BTreeMap<LeaseKey, DualStack<Subnet>> {
        let mut records: Vec<_> = records.into_iter().collect();
        records.sort_by_key(|lease| lease.seniority());
        let mut taken: Vec<(&LeaseKey, Subnet)> = Vec::new();
        let mut admitted = BTreeMap::new();
        for lease in records {
            let mut subnets = DualStack::default();
            for family in Family::ALL {
                let free = claims(lease, family).filter(|subnet| {
                    let mut others = taken.iter().filter(|(key, _)| **key != lease.key);
                    !others.any(|(_, other)| subnet.overlaps(other))
                });
                taken.extend(free.map(|subnet| (&lease.key, subnet)));
                subnets.set(
                    family,
                    free.filter(|subnet| is_for_us(lease, family, subnet)),
                );
            }
            admitted.insert(lease.key.clone(), subnets);
        }
        admitted
    }
}

/// Checks a set against the model, and that nothing is left out without a reason.
fn check_admission(set: &LeaseSet) -> Result<(), TestCaseError> {
    let leases = set.peers().values().map(|peer| &peer.lease);
    let mut replaced = BTreeMap::new();
    for (key, peer) in set.peers() {
        let by = peer
            .rejected
            .values()
            .find_map(|rejection| match rejection {
                Rejection::Replaced { by } => Some(by),
                _ => None,
            });
        if let Some(by) = by {
            prop_assert!(set.unreadable().any(|record| record.key == *key) && by != key);
            prop_assert_eq!(&peer_of(set, by).lease.node, &peer.lease.node);
            replaced.insert(key.clone(), by.clone());
        }
        prop_assert_eq!(
            by.is_some(),
            by.is_some() || model::is_replaced(&peer.lease, set)
        );
    }
    // Whether one of ours that cannot be read still claims, `unreadable.rs` tells.
    let mut ours = set.own_records();
    if ours.any(|own| set.unreadable().any(|record| record.key == own.key)) {
        return Ok(());
    }
    let counting = leases.filter(|lease| !replaced.contains_key(&lease.key));
    let expected = model::admitted(counting.chain(set.own_records()));
    for (key, peer) in set.peers() {
        if let Some(by) = replaced.get(key) {
            let rejected: Vec<_> = peer.rejected.values().collect();
            prop_assert!(!rejected.is_empty());
            for rejection in rejected {
                prop_assert_eq!(rejection, &Rejection::Replaced { by: by.clone() });
            }
            prop_assert!(peer.subnets.is_empty());
            continue;
        }
        prop_assert_eq!(key, &peer.lease.key);
        prop_assert!(peer.lease.node != own().node);
        prop_assert_eq!(&peer.subnets, &expected[key], "{:?}", peer);
        let mut considered = 0;
        for family in Family::ALL {
            let has = peer.lease.subnet.has(family);
            considered += usize::from(has);
            if has {
                prop_assert!(
                    peer.subnets.has(family) != peer.rejected.has(family),
                    "{:?}",
                    peer
                );
            }
            if let Some(Rejection::SubnetTaken { subnet, other, by }) = peer.rejected.get(family) {
                let of_ours = set.own_records().find(|lease| lease.key == *by);
                let winner = of_ours
                    .cloned()
                    .unwrap_or_else(|| peer_of(set, by).lease.clone());
                prop_assert_eq!(winner.subnet.get(family), Some(other));
                prop_assert!(subnet.overlaps(other));
                prop_assert!(winner.seniority() < peer.lease.seniority());
            }
        }
        if considered == 0 {
            prop_assert_eq!(peer.rejected.get(Family::V4), Some(&Rejection::NoSubnet));
        }
    }
    Ok(())
}

fn honest() -> impl Strategy<Value = Lease> {
    leases::honest_lease(DualStack::both(
        (net("10.5.0.0/16"), 24),
        (net("fd00:5::/48"), 64),
    ))
}

/// Much is claimed of the whole network, and much around our own subnets.
fn any_lease() -> impl Strategy<Value = Lease> {
    let around_ours = DualStack::both(net("10.5.0.0/22"), net("fd00:5::/62"));
    prop_oneof![
        3 => honest(),
        2 => leases::hostile_lease(networks()),
        1 => leases::hostile_lease(around_ours),
    ]
}

/// Events without any order or reason, as no store would send them.
fn nonsense() -> impl Strategy<Value = Event> {
    let leases = || prop::collection::vec(any_lease(), 0..8);
    let junk = || {
        (leases::lease_key(), 0..40_u64).prop_map(|(key, revision)| Unreadable {
            key,
            revision: Revision(revision),
            reason: "junk".to_owned(),
        })
    };
    let junks = prop::collection::vec(junk(), 0..4);
    prop_oneof![
        4 => any_lease().prop_map(Event::Put),
        2 => (leases::lease_key(), 0..40_u64)
            .prop_map(|(key, revision)| Event::Delete { key, revision: Revision(revision) }),
        1 => junk().prop_map(Event::Unreadable),
        1 => (0..40_u64).prop_map(|revision| Event::Progress(Revision(revision))),
        2 => (leases(), junks, 0..40_u64).prop_map(|(leases, unreadable, revision)| {
            let revision = Revision(revision);
            Event::Snapshot(Snapshot { leases, unreadable, revision, ..Snapshot::default() })
        }),
    ]
}

/// Changes a copy of the peers as a delta says.
fn follow(
    shadow: &mut BTreeMap<LeaseKey, Arc<Peer>>,
    delta: &LeaseDelta,
    set: &LeaseSet,
) -> Result<(), TestCaseError> {
    for key in &delta.added {
        let old = shadow.insert(key.clone(), peer_of(set, key));
        prop_assert!(old.is_none(), "{key} was there");
    }
    for key in &delta.changed {
        let new = peer_of(set, key);
        let old = shadow.insert(key.clone(), Arc::clone(&new));
        prop_assert!(old.is_some_and(|old| old != new), "{key} did not change");
    }
    for key in &delta.removed {
        prop_assert!(shadow.remove(key).is_some(), "{key} was not there");
    }
    prop_assert!(shadow.iter().eq(set.peers()));
    Ok(())
}

proptest! {
    #[test]
    fn every_delivery_of_a_history_leads_to_the_same_set(
        history in leases::history(any_lease(), 0..40),
        seed in any::<u64>(),
    ) {
        let records = model::records(&history);
        for permutation in Permutation::ALL {
            let set = fold(permutation.deliver(&history, &mut Rng::new(seed)));
            let mut known = BTreeMap::new();
            known.extend(set.own_records().map(|lease| (lease.key.clone(), lease.clone())));
            known.extend(set.peers().iter().map(|(k, peer)| (k.clone(), peer.lease.clone())));
            let expected: BTreeMap<_, _> = records
                .iter()
                .filter_map(|(key, (lease, _))| Some((key.clone(), lease.clone()?)))
                .collect();
            prop_assert_eq!(known, expected, "{:?}", permutation);
            let spoilt: Vec<_> = set.unreadable().map(|record| &record.key).collect();
            let expected: Vec<_> =
                records.iter().filter(|(_, (_, good))| !good).map(|(key, _)| key).collect();
            prop_assert_eq!(spoilt, expected, "{:?}", permutation);
            prop_assert!(set.own_records().all(|lease| lease.node == own().node));
            prop_assert_eq!(set.revision(), Revision(history.writes().len() as u64));
            check_admission(&set)?;
        }
    }

    #[test]
    fn deltas_lead_from_one_set_of_peers_to_the_next(
        events in prop::collection::vec(nonsense(), 0..30),
        configured_at in 0..30_usize,
    ) {
        let mut set = LeaseSet::default();
        let mut shadow = BTreeMap::new();
        for (i, event) in events.into_iter().enumerate() {
            if i == configured_at {
                let delta = set.set_pools(pools());
                follow(&mut shadow, &delta, &set)?;
                let delta = set.set_backend(BackendType::vxlan());
                follow(&mut shadow, &delta, &set)?;
                let delta = set.set_own(own());
                follow(&mut shadow, &delta, &set)?;
            }
            let first = set.apply(event.clone());
            follow(&mut shadow, &first.delta, &set)?;
            if let Event::Snapshot(snapshot) = event && first.held.is_some() {
                let second = set.apply_confirming(snapshot.clone());
                follow(&mut shadow, &second.delta, &set)?;
                prop_assert_eq!(second.held, None);
                let there: BTreeSet<_> = snapshot.leases.iter().map(|lease| &lease.key)
                    .chain(snapshot.unreadable.iter().map(|record| &record.key))
                    .collect();
                prop_assert!(set.peers().keys().all(|key| there.contains(key)));
            }
        }
    }

    #[test]
    fn nothing_hostile_is_admitted(events in prop::collection::vec(nonsense(), 0..40)) {
        let mut set = empty(WithdrawalGuard::default());
        for event in events {
            take(&mut set, event);
            check_admission(&set)?;
        }
    }

    #[test]
    fn it_does_not_matter_when_the_set_learns_who_we_are(
        history in leases::history(any_lease(), 0..40),
        at in any::<prop::sample::Index>(),
    ) {
        let events = Permutation::Identity.deliver(&history, &mut Rng::new(0));
        let at = at.index(events.len());
        let mut late = LeaseSet::default();
        for (i, event) in events.iter().enumerate() {
            if i == at {
                // First somebody else, on another network.
                late.set_own(Own { node: node("node3"), ..own() });
                late.set_pools(DualStack::new(None, pools().v6));
                late.set_backend(BackendType::host_gw());
                late.set_own(own());
                late.set_pools(pools());
                late.set_backend(BackendType::vxlan());
            }
            take(&mut late, event.clone());
        }
        let set = fold(events);
        prop_assert_eq!(set.peers(), late.peers());
        prop_assert!(set.own_records().eq(late.own_records()));
    }

    #[test]
    fn peers_of_a_backend_that_ours_reaches_are_admitted_and_told(
        history in leases::history(any_lease(), 0..40),
        at in any::<prop::sample::Index>(),
    ) {
        let events = Permutation::Identity.deliver(&history, &mut Rng::new(0));
        let at = at.index(events.len());
        let (vxlan, host_gw) = (BackendType::vxlan(), BackendType::host_gw());
        let mut set = empty(WithdrawalGuard::default());
        for (i, event) in events.into_iter().enumerate() {
            if i == at {
                set.set_backends(host_gw.clone(), vec![vxlan.clone()]);
            }
            take(&mut set, event);
            let mut others = BTreeSet::new();
            for (key, peer) in set.peers() {
                let is = |backend| peer.lease.attrs.is_backend(backend);
                let is_admitted = !peer.subnets.is_empty();
                prop_assert!(!is_admitted || is(&vxlan) || i >= at && is(&host_gw), "{:?}", peer);
                if is_admitted && i >= at && !is(&host_gw) {
                    others.insert(key.clone());
                }
                for rejection in peer.rejected.values() {
                    let by_type = matches!(rejection, Rejection::BackendType { .. });
                    prop_assert!(!by_type || !is(&vxlan), "{:?}", peer);
                }
            }
            let mut expected = BTreeMap::from([(vxlan.clone(), others)]);
            expected.retain(|_, keys| !keys.is_empty());
            prop_assert_eq!(set.of_other_backends(), &expected);
        }
    }

    /// Whatever a store says, one snapshot never takes more than the guarded share away.
    #[test]
    fn one_snapshot_never_withdraws_more_than_the_share(
        before in prop::collection::btree_set(1..30_u8, 0..20),
        first in prop::collection::btree_set(1..30_u8, 0..20),
        second in prop::collection::btree_set(1..30_u8, 0..20),
        confirm in any::<bool>(),
    ) {
        let all = |which: &BTreeSet<u8>, at| snapshot(which.iter().map(|n| peer(*n, 1)), at);
        let mut set = empty(WithdrawalGuard::default());
        set.apply(Event::Snapshot(all(&before, 1)));
        let gone = before.difference(&first).count();
        let applied = set.apply(Event::Snapshot(all(&first, 2)));
        let too_many = before.len() >= 3 && gone * 2 > before.len();
        let held = Held { withdrawn: gone, known: before.len(), reason: HeldReason::Share };
        prop_assert_eq!(applied.held, too_many.then_some(held));
        prop_assert_eq!(set.hold_orphans(), too_many);
        let kept: BTreeSet<u8> =
            if too_many { before.union(&first).copied().collect() } else { first.clone() };
        prop_assert_eq!(set.peers().len(), kept.len());
        prop_assert_eq!(applied.delta.removed.len(), if too_many { 0 } else { gone });

        let snapshot = all(&second, 3);
        let applied =
            if confirm { set.apply_confirming(snapshot) } else { set.apply(Event::Snapshot(snapshot)) };
        let sure: BTreeSet<u8> = if confirm && too_many {
            before.iter().filter(|n| !first.contains(n) && !second.contains(n)).copied().collect()
        } else {
            BTreeSet::new()
        };
        let doubtful = kept.difference(&second).filter(|n| !sure.contains(n)).count();
        let too_many = kept.len() >= 3 && doubtful * 2 > kept.len();
        prop_assert_eq!(applied.held.is_some(), too_many);
        let removed = if too_many { sure.len() } else { sure.len() + doubtful };
        prop_assert_eq!(applied.delta.removed.len(), removed);
        prop_assert_eq!(set.hold_orphans(), too_many);
    }
}

#[test]
fn a_late_delete_does_not_remove_a_subnet_that_moved() {
    let mut set = empty(WithdrawalGuard::default());
    set.apply(Event::Snapshot(snapshot([peer(1, 1)], 1)));
    let mut moved = peer(2, 2);
    moved.subnet = peer(1, 1).subnet;
    let applied = set.apply(Event::Put(moved.clone()));
    assert_eq!(applied.delta.added, [key("peer2")]);
    assert!(peer_of(&set, &key("peer2")).subnets.is_empty());
    let applied = set.apply(delete("peer1", 3));
    assert_eq!(applied.delta.removed, [key("peer1")]);
    assert_eq!(applied.delta.changed, [key("peer2")]);
    assert_eq!(peer_of(&set, &key("peer2")).subnets, moved.subnet);
}

#[test]
fn one_family_never_spoils_the_other() {
    let mut set = empty(WithdrawalGuard::default());
    let mut lease = peer(1, 1);
    lease.attrs.public_ip.v6 = None;
    set.apply(Event::Put(lease));
    let peer = peer_of(&set, &key("peer1"));
    assert_eq!(peer.subnets, DualStack::v4(net("10.5.1.0/24")));
    assert!(matches!(peer.rejected.v6, Some(Rejection::PublicIp { .. })));
}

#[test]
fn a_family_that_we_do_not_run_is_not_considered() {
    let mut set = empty(WithdrawalGuard::default());
    set.set_pools(DualStack::new(pools().v4, None));
    set.apply(Event::Put(peer(1, 1)));
    let mut v6_only = peer(2, 2);
    v6_only.subnet.v4 = None;
    set.apply(Event::Put(v6_only));
    let both = peer_of(&set, &key("peer1"));
    assert!(both.subnets.has(Family::V4) && both.rejected.is_empty());
    let v6_only = peer_of(&set, &key("peer2"));
    assert_eq!(v6_only.rejected, DualStack::v4(Rejection::NoSubnet));
}

#[test]
fn a_subnet_that_is_not_the_peers_to_have_is_refused_with_the_reason() {
    let refused = |v4: &str| {
        let mut set = empty(WithdrawalGuard::default());
        let mut lease = peer(1, 1);
        lease.subnet.v4 = Some(net(v4));
        set.apply(Event::Put(lease));
        let peer = peer_of(&set, &key("peer1"));
        assert!(peer.subnets.has(Family::V6));
        peer.rejected.v4.clone()
    };
    let (network, own) = (net("10.5.0.0/16"), net("10.5.0.0/24"));
    for ours in ["10.5.0.0/24", "10.5.0.128/25", "10.5.0.7/32", "10.5.0.0/18"] {
        let subnet = net(ours);
        assert_eq!(refused(ours), Some(Rejection::OverlapsOwn { subnet, own }));
    }
    for outside in [
        "0.0.0.0/0",
        "10.5.0.0/16",
        "10.5.128.0/17",
        "10.6.0.0/24",
        "192.0.2.0/24",
    ] {
        let subnet = net(outside);
        assert_eq!(
            refused(outside),
            Some(Rejection::OutsideNetwork { subnet, network })
        );
    }
    let (family, subnet) = (Family::V4, net("fd00:5:0:9::/64"));
    assert_eq!(
        refused("fd00:5:0:9::/64"),
        Some(Rejection::WrongFamily { family, subnet })
    );
    assert_eq!(refused("10.5.64.0/18"), None);
}

#[test]
fn time_left_alone_is_no_change() {
    let mut set = empty(WithdrawalGuard::default());
    let with_ttl = |secs| Lease {
        ttl: Some(Duration::from_secs(secs)),
        ..peer(1, 1)
    };
    set.apply(Event::Snapshot(snapshot([with_ttl(100)], 1)));
    assert!(
        set.apply(Event::Snapshot(snapshot([with_ttl(50)], 2)))
            .delta
            .is_empty()
    );
    assert!(set.apply(Event::Put(with_ttl(40))).delta.is_empty());
    let mut other = with_ttl(40);
    other.attrs.public_ip.v4 = Some(Ipv4Addr::new(198, 51, 100, 99));
    let applied = set.apply(Event::Snapshot(snapshot([other], 3)));
    assert_eq!(applied.delta.changed, [key("peer1")]);
}

#[test]
fn a_deleted_record_is_not_brought_back_by_an_old_write() {
    let mut set = empty(WithdrawalGuard::default());
    set.apply(Event::Snapshot(snapshot([peer(1, 1), peer(2, 2)], 2)));
    set.apply(delete("peer1", 3));
    assert!(set.apply(Event::Put(peer(1, 1))).delta.is_empty());
    set.apply(Event::Snapshot(snapshot([peer(2, 2)], 4)));
    assert!(set.apply(Event::Put(peer(1, 1))).delta.is_empty());
    assert!(
        set.apply(Event::Unreadable(unreadable("peer1", 1)))
            .delta
            .is_empty()
    );
    assert_eq!(set.unreadable().len(), 0);
    assert_eq!(
        set.apply(Event::Put(peer(1, 5))).delta.added,
        [key("peer1")]
    );
    assert!(set.apply(delete("peer1", 3)).delta.is_empty());
    // One that was written since the last snapshot.
    set.apply(Event::Put(peer(3, 6)));
    assert_eq!(set.apply(delete("peer3", 7)).delta.removed, [key("peer3")]);
    assert!(set.apply(Event::Put(peer(3, 6))).delta.is_empty());
}

#[test]
fn our_own_record_is_never_a_peer_and_its_changes_are_told() {
    let mut set = empty(WithdrawalGuard::default());
    let mut mine = peer(0, 1);
    (mine.key, mine.node) = (key("key0"), node("node0"));
    let mut stale = peer(7, 1);
    stale.node = node("node0");
    let applied = set.apply(Event::Snapshot(snapshot(
        [mine.clone(), stale, peer(1, 1)],
        1,
    )));
    assert_eq!(applied.own, Some(OwnChange::Written(mine.clone())));
    assert_eq!(keys(&set), ["peer1"]);
    assert_eq!(set.own_records().count(), 2);

    let again = set.apply(Event::Snapshot(snapshot([mine.clone(), peer(1, 1)], 2)));
    assert_eq!(
        again.own,
        Some(OwnChange::Written(mine.clone())),
        "it may be older than our last write"
    );
    assert!(again.delta.is_empty());
    assert_eq!(set.own_records().count(), 1);
    assert_eq!(set.apply(Event::Put(mine.clone())).own, None);

    let mut taken = mine.clone();
    (taken.node, taken.revision) = (node("thief"), Revision(3));
    let applied = set.apply(Event::Put(taken.clone()));
    assert_eq!(applied.own, Some(OwnChange::Taken(taken)));
    let thief = peer_of(&set, &key("key0"));
    assert!(matches!(
        thief.rejected.v4,
        Some(Rejection::OverlapsOwn { .. })
    ));

    mine.revision = Revision(4);
    let applied = set.apply(Event::Put(mine.clone()));
    assert_eq!(applied.own, Some(OwnChange::Written(mine)));
    assert_eq!(applied.delta.removed, [key("key0")]);
    let applied = set.apply(Event::Unreadable(unreadable("key0", 5)));
    assert_eq!(
        applied.own,
        Some(OwnChange::Unreadable(unreadable("key0", 5)))
    );
    let gone = |revision| {
        Some(OwnChange::Deleted {
            key: key("key0"),
            revision: Revision(revision),
        })
    };
    assert_eq!(set.apply(delete("key0", 6)).own, gone(6));
    assert_eq!(set.apply(delete("key0", 6)).own, None);
    assert_eq!(
        set.apply(Event::Snapshot(snapshot([peer(1, 1)], 7))).own,
        gone(7)
    );
}

#[test]
fn a_restored_store_is_the_truth() {
    let mut set = empty(WithdrawalGuard::default());
    set.apply(Event::Snapshot(snapshot(
        (1..=4).map(|n| peer(n, 100)),
        100,
    )));
    set.apply(delete("peer4", 101));
    let applied = set.apply(Event::Snapshot(snapshot([peer(1, 10), peer(4, 10)], 50)));
    assert_eq!(applied.restored_from, Some(Revision(101)));
    assert_eq!(set.revision(), Revision(50));
    // Two of three are gone.
    assert!(applied.held.is_some());
    assert_eq!(keys(&set), ["peer1", "peer2", "peer3", "peer4"]);
    // One of them writes its record anew, in the restored store's count.
    assert_eq!(
        set.apply(Event::Put(peer(2, 51))).delta.changed,
        [key("peer2")]
    );
    assert_eq!(set.apply(delete("peer3", 52)).delta.removed, [key("peer3")]);
    assert_eq!(set.held(), None);
    assert_eq!(
        set.apply(Event::Put(peer(1, 53))).delta.changed,
        [key("peer1")]
    );
}

#[test]
fn of_two_records_with_one_key_the_newer_counts() {
    let mut set = empty(WithdrawalGuard::default());
    let mut old = peer(1, 1);
    old.subnet = peer(9, 1).subnet;
    let snapshot = Snapshot {
        unreadable: vec![unreadable("peer1", 1), unreadable("peer2", 9)],
        ..snapshot([old, peer(1, 2), peer(2, 2)], 9)
    };
    set.apply(Event::Snapshot(snapshot));
    assert_eq!(peer_of(&set, &key("peer1")).lease, peer(1, 2));
    assert_eq!(set.unreadable().len(), 1);
}

#[test]
fn adopted_routes_count_as_peers_until_a_snapshot_is_believed() {
    let adopted = || {
        (1..=4)
            .map(|n| net(&format!("10.5.{n}.0/24")))
            .collect::<Vec<_>>()
    };
    let mut set = empty(WithdrawalGuard::default());
    set.set_adopted(adopted());
    assert!(set.hold_orphans() && !set.synced());
    let held = set.apply(Event::Snapshot(snapshot([peer(1, 1)], 1))).held;
    assert_eq!(
        held,
        Some(Held {
            withdrawn: 3,
            known: 4,
            reason: HeldReason::Share,
        })
    );
    assert!(set.hold_orphans() && set.synced());
    set.apply(Event::Put(peer(2, 2)));
    assert!(set.hold_orphans());
    let applied = set.apply_confirming(snapshot([peer(1, 1), peer(2, 2)], 3));
    assert_eq!(applied.held, None);
    assert!(!set.hold_orphans());

    // An emptied store.
    let mut set = empty(WithdrawalGuard::default());
    set.set_adopted(adopted());
    set.apply(Event::Snapshot(snapshot([], 1)));
    assert!(set.hold_orphans());
    set.apply_confirming(snapshot([], 1));
    assert!(!set.hold_orphans());

    // Every one of them turns up, one by one.
    let mut set = empty(WithdrawalGuard::default());
    set.set_adopted(adopted());
    set.apply(Event::Snapshot(snapshot([], 1)));
    for n in 1..=4 {
        assert!(set.hold_orphans());
        set.apply(Event::Put(peer(n, 1 + u64::from(n))));
    }
    assert!(!set.hold_orphans() && set.held().is_none());

    // A confirming snapshot without an earlier one confirms nothing.
    let mut set = empty(WithdrawalGuard::default());
    set.set_adopted(adopted());
    assert!(set.apply_confirming(snapshot([], 1)).held.is_some());

    // One record may cover several.
    let mut set = empty(WithdrawalGuard::default());
    set.set_adopted(adopted());
    let mut wide = peer(1, 1);
    wide.subnet.v4 = Some(net("10.5.0.0/21"));
    assert_eq!(set.apply(Event::Snapshot(snapshot([wide], 1))).held, None);
    assert!(!set.hold_orphans());
}

#[test]
fn deletes_one_by_one_are_believed() {
    let mut set = empty(WithdrawalGuard::default());
    set.apply(Event::Snapshot(snapshot((1..=9).map(|n| peer(n, 1)), 1)));
    for n in 1..=9 {
        let applied = set.apply(delete(&format!("peer{n}"), 2));
        assert_eq!(applied.delta.removed.len(), 1);
        assert_eq!(applied.held, None);
    }
    assert!(set.peers().is_empty());
}

#[test]
fn a_flood_of_records_is_cut_and_told() {
    let mut set = empty(WithdrawalGuard::default()).with_max_records(3);
    let flood = (1..=5).map(|n| peer(n, u64::from(10 - n)));
    let applied = set.apply(Event::Snapshot(snapshot(flood, 10)));
    assert_eq!(applied.refused, 2);
    assert_eq!(keys(&set), ["peer3", "peer4", "peer5"]);
    let applied = set.apply(Event::Put(peer(6, 11)));
    assert_eq!(applied.refused, 1);
    assert_eq!(set.apply(Event::Unreadable(unreadable("x", 11))).refused, 1);
    // Known records, and our own, are always followed.
    assert_eq!(
        set.apply(Event::Put(peer(3, 12))).delta.changed,
        [key("peer3")]
    );
    let mut mine = peer(0, 13);
    (mine.key, mine.node) = (key("key0"), node("node0"));
    assert!(set.apply(Event::Put(mine)).own.is_some());
    // What is known is not taken for deleted because junk crowds it out.
    let junk = (0..20).map(|n| unreadable(&format!("junk{n}"), 14));
    let crowded = Snapshot {
        unreadable: junk.chain([unreadable("peer5", 14)]).collect(),
        ..snapshot([peer(3, 12), peer(4, 6)], 14)
    };
    let applied = set.apply(Event::Snapshot(crowded));
    assert_eq!(applied.refused, 19);
    assert_eq!(keys(&set), ["peer3", "peer4", "peer5"]);
}

#[test]
fn nobody_is_admitted_before_we_know_who_we_are() {
    let mut set = LeaseSet::default();
    set.set_pools(pools());
    set.set_backend(BackendType::vxlan());
    set.apply(Event::Put(peer(1, 1)));
    assert!(peer_of(&set, &key("peer1")).subnets.is_empty());
    assert_eq!(set.set_own(own()).changed, [key("peer1")]);
    assert_eq!(set.set_own(own()), LeaseDelta::default());
    assert_eq!(peer_of(&set, &key("peer1")).subnets, peer(1, 1).subnet);
}

#[test]
fn a_public_ip_that_is_nobodys_is_refused() {
    let found = |v4: [u8; 4]| {
        let mut set = empty(WithdrawalGuard::default());
        let mut lease = peer(1, 1);
        lease.attrs.public_ip = PublicIp::v4(v4.into());
        set.apply(Event::Put(lease));
        peer_of(&set, &key("peer1")).subnets.has(Family::V4)
    };
    assert!(found([198, 51, 100, 1]));
    for odd in [
        [0, 0, 0, 0],
        [127, 0, 0, 1],
        [169, 254, 7, 7],
        [224, 0, 0, 1],
        [255, 255, 255, 255],
        [10, 5, 3, 1],
        [192, 0, 2, 1],
    ] {
        assert!(!found(odd), "{odd:?}");
    }
}
