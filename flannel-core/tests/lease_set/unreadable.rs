//! Records that cannot be read.

use flannel_core::{
    DualStack, Event, Family, LeaseKey, LeaseSet, Rejection, Revision, Snapshot, Subnet,
    WithdrawalGuard,
};

use super::{delete, empty, key, keys, net, node, peer, peer_of, snapshot, unreadable};

#[test]
fn an_unreadable_record_keeps_its_last_good_value_until_it_is_deleted() {
    let mut set = empty(WithdrawalGuard::default());
    set.apply(Event::Snapshot(snapshot([peer(1, 1)], 1)));
    let good = peer_of(&set, &key("peer1"));
    assert!(
        set.apply(Event::Unreadable(unreadable("peer1", 2)))
            .delta
            .is_empty()
    );
    assert!(set.apply(Event::Put(peer(1, 1))).delta.is_empty());
    assert_eq!(set.unreadable().len(), 1);
    let again = Snapshot {
        unreadable: vec![unreadable("peer1", 2), unreadable("peer9", 2)],
        ..snapshot([], 3)
    };
    assert!(set.apply(Event::Snapshot(again)).delta.is_empty());
    assert_eq!(peer_of(&set, &key("peer1")), good);
    assert_eq!(set.unreadable().len(), 2);
    assert_eq!(set.apply(delete("peer1", 4)).delta.removed, [key("peer1")]);
    assert_eq!(set.unreadable().len(), 1);
    set.apply(Event::Put(peer(9, 5)));
    assert_eq!(set.unreadable().len(), 0);
}

#[test]
fn what_cannot_be_read_is_not_missing() {
    let mut set = empty(WithdrawalGuard::default());
    set.apply(Event::Snapshot(snapshot((1..=20).map(|n| peer(n, 1)), 1)));
    let spoilt = Snapshot {
        unreadable: (1..=20)
            .map(|n| unreadable(&format!("peer{n}"), 2))
            .collect(),
        ..snapshot([], 2)
    };
    let applied = set.apply(Event::Snapshot(spoilt));
    assert_eq!(applied.held, None);
    assert!(applied.delta.is_empty());
    assert_eq!(set.peers().len(), 20);
}

/// What replaces a peer's record, in the words of both its families.
fn replaced_by(set: &LeaseSet, name: &str) -> Option<LeaseKey> {
    let peer = peer_of(set, &key(name));
    let by = |family| match peer.rejected.get(family) {
        Some(Rejection::Replaced { by }) => Some(by.clone()),
        _ => None,
    };
    assert_eq!(by(Family::V4), by(Family::V6));
    assert_eq!(by(Family::V4).is_some(), peer.subnets.is_empty());
    by(Family::V4)
}

#[test]
fn what_cannot_be_read_gives_way_to_what_its_node_writes_next() {
    let old = peer(1, 1);
    let mut new = peer(2, 3);
    new.node = old.node.clone();
    // Whatever is heard of first, and however it is heard.
    let first = Event::Snapshot(snapshot([old.clone()], 1));
    let garbled = Event::Unreadable(unreadable("peer1", 2));
    let next = Event::Put(new.clone());
    let at_once = Event::Snapshot(Snapshot {
        unreadable: vec![unreadable("peer1", 2)],
        ..snapshot([new.clone()], 3)
    });
    for events in [
        vec![first.clone(), garbled.clone(), next.clone()],
        vec![first.clone(), next, garbled],
        vec![first, at_once],
    ] {
        let mut set = empty(WithdrawalGuard::default());
        for event in events {
            set.apply(event);
        }
        assert_eq!(replaced_by(&set, "peer1"), Some(new.key.clone()));
        assert_eq!(peer_of(&set, &new.key).subnets, new.subnet);
        let claims = |set: &LeaseSet| set.claims_of(&peer_of(set, &key("peer1")));
        assert!(claims(&set).is_empty(), "it is in nobody's way");

        // The new one goes, so the old one counts again; and it counts once it can be read.
        let mut without = set.clone();
        let delta = without.apply(delete("peer2", 4)).delta;
        assert_eq!(delta.changed, [key("peer1")]);
        assert_eq!(replaced_by(&without, "peer1"), None);
        assert_eq!(claims(&without), old.subnet);
        let mut mended = old.clone();
        mended.revision.0 = 4;
        set.apply(Event::Put(mended));
        assert_eq!(replaced_by(&set, "peer1"), None);
    }
}

#[test]
fn what_cannot_be_read_does_not_give_way_to_what_its_node_wrote_before() {
    let old = peer(1, 1);
    let mut new = peer(2, 2);
    new.node = old.node.clone();
    let mut set = empty(WithdrawalGuard::default());
    set.apply(Event::Snapshot(snapshot([old, new], 2)));
    set.apply(Event::Unreadable(unreadable("peer2", 3)));
    assert_eq!(replaced_by(&set, "peer2"), None);
    assert_eq!(replaced_by(&set, "peer1"), None, "this one can be read");
    set.apply(Event::Unreadable(unreadable("peer1", 4)));
    assert_eq!(
        replaced_by(&set, "peer1"),
        Some(key("peer2")),
        "of two, the newer"
    );
    assert_eq!(keys(&set), ["peer1", "peer2"]);
}

#[test]
fn after_a_restored_backup_what_cannot_be_read_gives_way_to_whatever_can() {
    let old = peer(1, 9);
    let mut new = peer(2, 6);
    new.node = old.node.clone();
    let mut set = empty(WithdrawalGuard::default());
    set.apply(Event::Snapshot(snapshot([old], 9)));
    // The history begins anew at revision 4, and the record is never read in it.
    let restored = set.apply(Event::Snapshot(Snapshot {
        unreadable: vec![unreadable("peer1", 4)],
        ..snapshot([], 4)
    }));
    assert!(restored.restored_from.is_some());
    assert_eq!(replaced_by(&set, "peer1"), None);
    set.apply(Event::Put(new));
    assert_eq!(replaced_by(&set, "peer1"), Some(key("peer2")));
    set.apply(Event::Put(peer(1, 7)));
    assert_eq!(replaced_by(&set, "peer1"), None);
    set.apply(Event::Unreadable(unreadable("peer1", 8)));
    assert_eq!(
        replaced_by(&set, "peer1"),
        None,
        "this one is the newer now"
    );
}

#[test]
fn a_record_that_is_older_than_it_was_tells_of_a_restored_backup() {
    // Nobody looked until the store was as far as before, and further.
    for later in [9, 20] {
        let old = peer(1, 9);
        let mut new = peer(2, later);
        new.node = old.node.clone();
        let mut set = empty(WithdrawalGuard::default());
        set.apply(Event::Snapshot(snapshot([old, peer(3, 2)], 9)));
        let again = Snapshot {
            unreadable: vec![unreadable("peer1", 8)],
            ..snapshot([peer(3, 2), new], later)
        };
        let restored = set.apply(Event::Snapshot(again.clone()));
        assert_eq!(restored.restored_from, Some(Revision(9)));
        assert_eq!(replaced_by(&set, "peer1"), Some(key("peer2")));
        // That is known now.
        assert_eq!(set.apply(Event::Snapshot(again)).restored_from, None);

        let one_older = set.apply(Event::Snapshot(snapshot([peer(3, 1)], later)));
        assert!(one_older.restored_from.is_some());
    }
}

#[test]
fn an_adopted_route_stays_while_the_record_of_its_subnet_cannot_be_read() {
    const RECORD: &str = "/coreos.com/network/subnets/10.5.1.0-24&fd00:5:0:1::-64";
    let ours = [net("10.5.1.0/24"), net("fd00:5:0:1::/64")];
    let mut whole = peer(9, 1);
    whole.subnet = DualStack::both(net("10.5.0.0/16"), net("fd00:5::/48"));
    let spared = |set: &LeaseSet| set.spared().copied().collect::<Vec<Subnet>>();
    let adopted = || {
        let mut set = empty(WithdrawalGuard::default());
        set.set_adopted([&ours[..], &[net("10.5.1.128/25")]].concat());
        // Somebody claims everything: that is not to be had, and no reason to let a route go.
        set.apply(Event::Snapshot(Snapshot {
            unreadable: vec![unreadable(RECORD, 1)],
            ..snapshot([whole.clone()], 1)
        }));
        assert_eq!(spared(&set), ours);
        assert!(!set.hold_orphans());
        set
    };
    adopted();

    let mut readable = adopted();
    let mut lease = peer(1, 2);
    lease.key = key(RECORD);
    readable.apply(Event::Put(lease));
    assert!(
        spared(&readable).is_empty(),
        "the route is the peer's from now on"
    );

    let mut deleted = adopted();
    deleted.apply(delete(RECORD, 2));
    assert!(spared(&deleted).is_empty());

    let mut gone = adopted();
    gone.apply(Event::Snapshot(snapshot([whole.clone()], 2)));
    assert!(spared(&gone).is_empty());
}

/// However many records of one node cannot be read, each is replaced by the next one that it wrote,
/// whatever the order in which that is heard of.
#[test]
fn of_many_that_cannot_be_read_each_gives_way_to_the_next() {
    let of_one = |n: u8| {
        let mut lease = peer(n, u64::from(n));
        lease.node = node("careless");
        lease
    };
    let mut set = empty(WithdrawalGuard::default());
    for n in [5, 1, 3, 2, 4] {
        set.apply(Event::Put(of_one(n)));
    }
    for n in [2, 4, 1, 3] {
        set.apply(Event::Unreadable(unreadable(&format!("peer{n}"), 9)));
    }
    let next = |n: u8| replaced_by(&set, &format!("peer{n}"));
    for n in 1..=4 {
        assert_eq!(next(n), Some(key(&format!("peer{}", n + 1))));
    }
    assert_eq!(next(5), None);
    set.apply(delete("peer3", 10));
    assert_eq!(replaced_by(&set, "peer2"), Some(key("peer4")));
    set.apply(delete("peer5", 11));
    assert_eq!(replaced_by(&set, "peer4"), None, "nothing newer is there");
}

/// As other nodes see it, what we wrote before and nobody can read any more claims nothing.
#[test]
fn a_record_of_ours_that_cannot_be_read_claims_nothing_once_we_have_another() {
    let mut set = empty(WithdrawalGuard::default());
    let mut former = peer(7, 1);
    (former.key, former.node) = (key("former"), node("node0"));
    let mut next = peer(0, 3);
    (next.key, next.node) = (key("key0"), node("node0"));
    let mut other = peer(1, 4);
    other.subnet = former.subnet;
    set.apply(Event::Snapshot(snapshot([former], 1)));
    set.apply(Event::Unreadable(unreadable("former", 2)));
    set.apply(Event::Put(other.clone()));
    assert!(peer_of(&set, &other.key).subnets.is_empty());
    set.apply(Event::Put(next));
    assert_eq!(peer_of(&set, &other.key).subnets, other.subnet);
}
