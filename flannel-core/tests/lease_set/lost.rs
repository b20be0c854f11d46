//! A store that lost something: what is held, and what is told at once.

use flannel_core::{
    Deletes, Event, Held, HeldReason, Lease, LeaseSet, OwnChange, Revision, Snapshot,
    WithdrawalGuard,
};

use super::{delete, empty, key, keys, node, own, peer, peer_of, snapshot};

fn mine(revision: u64) -> Lease {
    Lease {
        key: key("key0"),
        node: node("node0"),
        subnet: own().subnets,
        ..peer(0, revision)
    }
}

/// A set that knows our record and four peers.
fn known() -> LeaseSet {
    let mut set = empty(WithdrawalGuard::default());
    let all = (1..=4).map(|n| peer(n, 1)).chain([mine(1)]);
    set.apply(Event::Snapshot(snapshot(all, 1)));
    set
}

fn is_deleted(own: Option<&OwnChange>) -> bool {
    matches!(own, Some(OwnChange::Deleted { .. }))
}

fn burst(names: &[&str], revision: u64) -> Deletes {
    let keys = names.iter().map(|name| (key(name), Revision(revision)));
    Deletes {
        keys: keys.collect(),
        came: names.len(),
        own: false,
    }
}

const ALL: [&str; 4] = ["peer1", "peer2", "peer3", "peer4"];

#[test]
fn that_our_own_record_is_gone_is_told_whatever_is_held() {
    let mut set = known();
    let applied = set.apply(Event::Snapshot(snapshot([], 2)));
    assert!(applied.held.is_some() && applied.delta.removed.is_empty());
    assert!(is_deleted(applied.own.as_ref()));
    assert_eq!(set.own_records().count(), 0);
    // So long as it is gone, one peer that is gone too is doubted as well.
    let mut few = empty(WithdrawalGuard::default());
    few.apply(Event::Snapshot(snapshot([peer(1, 1), mine(1)], 1)));
    let applied = few.apply(Event::Snapshot(snapshot([], 2)));
    assert!(applied.held.is_some() && is_deleted(applied.own.as_ref()));
    assert_eq!(
        few.apply_confirming(snapshot([], 3)).delta.removed,
        [key("peer1")]
    );
    // Back again, it is no reason any more.
    let mut back = known();
    back.apply(delete("key0", 2));
    back.apply(Event::Put(mine(3)));
    let applied = back.apply(Event::Snapshot(snapshot(
        (1..=3).map(|n| peer(n, 1)).chain([mine(3)]),
        4,
    )));
    assert_eq!(applied.held, None);
}

#[test]
fn a_store_without_a_config_makes_no_statement() {
    let unconfigured = |revision| Snapshot {
        unconfigured: true,
        ..snapshot([], revision)
    };
    for mut set in [known(), {
        let mut fresh = empty(WithdrawalGuard::default());
        fresh.set_adopted(peer(1, 1).subnet.values().copied().collect());
        fresh
    }] {
        let known = set.peers().len();
        for revision in [2, 3, 4] {
            let applied = set.apply_confirming(unconfigured(revision));
            let held = applied.held.expect("it is held");
            assert_eq!(held.reason, HeldReason::NoConfig);
            assert!(applied.delta.removed.is_empty() && set.hold_orphans());
            assert_eq!(set.peers().len(), known);
        }
        // With a config, the guard decides: by two readings, of which the former was none.
        let applied = set.apply_confirming(snapshot([], 5));
        if known > 0 {
            assert_eq!(
                applied.held.map(|held| held.reason),
                Some(HeldReason::Share)
            );
            assert_eq!(
                set.apply_confirming(snapshot([], 6)).delta.removed.len(),
                known
            );
        }
        assert!(!set.hold_orphans());
    }
    // What it does say holds.
    let mut set = known();
    let mut new = peer(7, 2);
    new.revision = Revision(3);
    let some = Snapshot {
        unconfigured: true,
        ..snapshot(
            [peer(1, 1), peer(2, 1), peer(3, 1), peer(4, 1), new, mine(1)],
            3,
        )
    };
    let applied = set.apply(Event::Snapshot(some));
    assert_eq!(
        (applied.held, applied.delta.added),
        (None, vec![key("peer7")])
    );
}

#[test]
fn an_empty_store_of_an_earlier_revision_is_doubted_even_for_one_peer() {
    let mut set = empty(WithdrawalGuard::default());
    set.apply(Event::Snapshot(snapshot([peer(1, 9)], 9)));
    let applied = set.apply(Event::Snapshot(snapshot([], 2)));
    assert!(applied.restored_from.is_some() && applied.held.is_some());
    assert_eq!(keys(&set), ["peer1"]);
    // At a later revision the guard has its usual floor.
    let mut set = empty(WithdrawalGuard::default());
    set.apply(Event::Snapshot(snapshot([peer(1, 9)], 9)));
    assert_eq!(set.apply(Event::Snapshot(snapshot([], 10))).held, None);
}

#[test]
fn deletes_that_come_together_are_held_as_a_snapshot_is() {
    let mut set = known();
    let applied = set.apply_burst(burst(&ALL, 5));
    let held = Held {
        withdrawn: 4,
        known: 4,
        reason: HeldReason::Share,
    };
    assert_eq!(applied.held, Some(held));
    assert!(applied.delta.removed.is_empty() && set.hold_orphans());
    assert_eq!(keys(&set), ALL);
    // Repeats and old writes change nothing.
    assert!(set.apply(delete("peer1", 5)).delta.is_empty());
    assert!(set.apply(Event::Put(peer(1, 1))).delta.is_empty());
    assert!(peer_of(&set, &key("peer1")).doubted);
    // Who writes is there; a later delete of one is believed; the second reading decides the rest.
    set.apply(Event::Put(peer(1, 6)));
    assert!(!peer_of(&set, &key("peer1")).doubted);
    assert_eq!(set.apply(delete("peer2", 7)).delta.removed, [key("peer2")]);
    let applied = set.apply_confirming(snapshot([peer(1, 6), mine(1)], 8));
    assert_eq!(applied.delta.removed, [key("peer3"), key("peer4")]);
    assert!(!set.hold_orphans());

    // All that were deleted have written again: nothing is left to be held.
    let mut set = known();
    set.apply_burst(burst(&ALL, 5));
    for n in 1..=4 {
        assert!(set.hold_orphans());
        set.apply(Event::Put(peer(n, 5 + u64::from(n))));
    }
    assert!(!set.hold_orphans() && set.held().is_none());
}

#[test]
fn a_few_deletes_together_are_believed_unless_our_own_record_went_too() {
    let mut set = known();
    let applied = set.apply_burst(burst(&["peer1", "peer2"], 5));
    assert_eq!(applied.held, None);
    assert_eq!(applied.delta.removed, [key("peer1"), key("peer2")]);

    // Whether it is back by then or not.
    for back in [false, true] {
        let mut set = known();
        let applied = set.apply(delete("key0", 5));
        assert!(is_deleted(applied.own.as_ref()));
        if back {
            set.apply(Event::Put(mine(6)));
        }
        let with_ours = Deletes {
            own: true,
            ..burst(&["peer1"], 5)
        };
        assert!(set.apply_burst(with_ours).held.is_some());
        assert_eq!(keys(&set), ALL);
    }

    // Three of four came, and two of these are back.
    let mut set = known();
    let rest = Deletes {
        came: 3,
        ..burst(&["peer1"], 5)
    };
    assert!(set.apply_burst(rest).held.is_some());
    assert_eq!(keys(&set), ALL);
}

#[test]
fn a_record_that_is_there_beats_one_that_is_held() {
    let mut moved = peer(1, 7);
    moved.key = key("new-node");
    moved.node = node("new-node");
    let mut set = known();
    set.apply_burst(burst(&ALL, 5));
    let delta = set.apply(Event::Put(moved.clone())).delta;
    assert_eq!(
        (delta.added, delta.changed),
        (vec![key("new-node")], vec![key("peer1")])
    );
    assert_eq!(peer_of(&set, &key("new-node")).subnets, moved.subnet);
    assert!(peer_of(&set, &key("peer1")).subnets.is_empty());
    // As long as the older one is not doubted, it wins.
    let mut set = known();
    set.apply(Event::Put(moved));
    assert!(peer_of(&set, &key("new-node")).subnets.is_empty());
}

#[test]
fn who_moved_to_another_record_has_lost_nothing() {
    let mut moved = mine(5);
    moved.key = key("key9");
    let deleted = |set: &mut LeaseSet| set.apply_burst(burst(&["peer1"], 5)).delta.removed.len();
    for told_first in [true, false] {
        let mut set = known();
        if told_first {
            set.set_own(flannel_core::Own {
                key: Some(key("key9")),
                ..own()
            });
            set.apply(delete("key0", 5));
        } else {
            set.apply(delete("key0", 5));
            set.apply(Event::Put(moved.clone()));
        }
        assert_eq!(deleted(&mut set), 1, "told first: {told_first}");
    }
}
