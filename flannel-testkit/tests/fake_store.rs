//! The fake store does what etcd does, and its links do to calls and watches what they say.

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use flannel_core::{Revision, TokioClock};
use flannel_testkit::fake_store::{
    CallFault, Compare, Cut, Delivery, Expectation, FakeStore, KeyEvent, KeyRange, LinkWatch, Op,
    OpAnswer, Silence, StoreError, StoreLink, Txn, WatchAnswer,
};
use tokio::time::{Instant, advance, timeout};

const SECOND: Duration = Duration::from_secs(1);

fn store() -> FakeStore {
    FakeStore::new(Arc::new(TokioClock::new()))
}

fn all() -> KeyRange {
    KeyRange::prefix("")
}

fn keys(store: &FakeStore, range: &KeyRange) -> Vec<String> {
    let entries = store.entries(range);
    entries.into_iter().map(|entry| entry.key).collect()
}

/// What a watch tells, one word a write: `a=1` or `a-`.
fn words(events: &[KeyEvent]) -> Vec<String> {
    let word = |event: &KeyEvent| match event {
        KeyEvent::Put(entry) => {
            format!("{}={}", entry.key, String::from_utf8_lossy(&entry.value))
        }
        KeyEvent::Delete { key, .. } => format!("{key}-"),
    };
    events.iter().map(word).collect()
}

async fn said(watch: &mut LinkWatch) -> Result<WatchAnswer, StoreError> {
    let said = timeout(3600 * SECOND, watch.next()).await;
    said.expect("something within an hour")
}

async fn next(watch: &mut LinkWatch) -> Vec<String> {
    match said(watch).await {
        Ok(WatchAnswer::Events { events, .. }) => words(&events),
        other => vec![format!("{other:?}")],
    }
}

/// Whether nothing comes for an hour.
async fn is_silent(watch: &mut LinkWatch) -> bool {
    timeout(3600 * SECOND, watch.next()).await.is_err()
}

// The store

#[tokio::test(start_paused = true)]
async fn revisions_count_writes_and_versions_count_those_of_a_key() {
    let store = store();
    assert_eq!(store.revision(), Revision(1), "an empty store");
    assert_eq!(store.put("a", "1"), Revision(2));
    assert_eq!(store.put("b", "1"), Revision(3));
    assert_eq!(store.put("a", "2"), Revision(4));
    let entries = store.entries(&all());
    let a = &entries[0];
    let seen = (a.created, a.modified, a.version, a.value.as_slice());
    assert_eq!(seen, (Revision(2), Revision(4), 2, b"2".as_slice()));
    assert!(store.delete("a"));
    assert!(!store.delete("a"), "it is gone");
    assert_eq!(
        store.revision(),
        Revision(5),
        "nothing deleted is nothing written"
    );
    store.put("a", "3");
    let a = &store.entries(&KeyRange::key("a"))[0];
    assert_eq!((a.created, a.version), (Revision(6), 1), "a new life");
}

#[tokio::test(start_paused = true)]
async fn ranges_are_what_they_say() {
    let store = store();
    for key in [
        "net/config",
        "net/subnets",
        "net/subnets-old/x",
        "net/subnets/1",
        "net/taken/1",
    ] {
        store.put(key, "");
    }
    let between = KeyRange::Between("net/config".into(), "net/subnett".into());
    assert_eq!(keys(&store, &between).len(), 4);
    let prefix = KeyRange::prefix("net/subnets");
    assert_eq!(
        keys(&store, &prefix),
        ["net/subnets", "net/subnets-old/x", "net/subnets/1"]
    );
    assert_eq!(keys(&store, &KeyRange::key("net/subnets")), ["net/subnets"]);
    let backwards = KeyRange::Between("b".into(), "a".into());
    assert!(keys(&store, &backwards).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_transaction_is_one_revision_and_one_decision() {
    let store = store();
    store.put("a", "1");
    let txn = |compares: Vec<Compare>| Txn {
        compares,
        then: vec![Op::put("b", "2", None), Op::delete("a"), Op::Range(all())],
        or_else: vec![Op::Range(KeyRange::key("a"))],
    };
    let a = store.entries(&KeyRange::key("a"))[0].clone();
    let is = |key: &str, expected| Compare {
        range: KeyRange::key(key),
        expected,
    };
    // One condition that does not hold is enough.
    for wrong in [
        Compare::unchanged("a", Revision(1)),
        Compare::absent(KeyRange::prefix("")),
        is("a", Expectation::Created(Revision(3))),
        is("a", Expectation::Value(b"2".to_vec())),
        is("nobody", Expectation::Value(Vec::new())),
    ] {
        let answer = store.txn(&txn(vec![Compare::unchanged("a", Revision(2)), wrong]));
        let answer = answer.expect("answered");
        assert!(!answer.succeeded);
        assert_eq!(answer.revision, Revision(2), "nothing is written");
        assert_eq!(answer.results, [OpAnswer::Range(vec![a.clone()])]);
    }
    let answer = store.txn(&txn(vec![
        Compare::unchanged("a", Revision(2)),
        is("a", Expectation::Created(Revision(2))),
        is("a", Expectation::Value(b"1".to_vec())),
        is("a", Expectation::Lease(None)),
        Compare::absent(KeyRange::prefix("b")),
        is("nobody", Expectation::Modified(Revision(0))),
    ]));
    let answer = answer.expect("answered");
    assert!(answer.succeeded);
    assert_eq!(answer.revision, Revision(3));
    assert_eq!(answer.results[1], OpAnswer::Deleted(1));
    let OpAnswer::Range(left) = &answer.results[2] else {
        panic!("a range was read");
    };
    assert_eq!(
        left.iter().map(|e| e.key.as_str()).collect::<Vec<_>>(),
        ["b"]
    );
    let history = store.history(&all());
    assert_eq!(words(&history), ["a=1", "b=2", "a-"]);
    assert!(history[1..].iter().all(|e| e.revision() == Revision(3)));
}

#[tokio::test(start_paused = true)]
async fn what_etcd_refuses_is_refused_and_changes_nothing() {
    let store = store();
    let put = || Op::put("a", "1", None);
    let twice = vec![put(), put()];
    let both = vec![put(), Op::Delete(KeyRange::prefix("a"))];
    let many = (0..129)
        .map(|n| Op::put(format!("{n}"), "", None))
        .collect();
    for then in [twice, both, many] {
        let refused = store.txn(&Txn {
            then,
            ..Txn::default()
        });
        assert!(
            matches!(refused, Err(StoreError::Refused { .. })),
            "{refused:?}"
        );
    }
    let (lease, _) = store.link("x").grant(SECOND).await.expect("a lease");
    let link = store.link("x");
    link.revoke(lease).await.expect("revoked");
    let orphan = Txn {
        then: vec![put(), Op::put("b", "1", Some(lease))],
        ..Txn::default()
    };
    let refused = store.txn(&orphan);
    assert_eq!(refused, Err(StoreError::LeaseNotFound { lease }));
    assert_eq!(store.revision(), Revision(1));
}

#[tokio::test(start_paused = true)]
async fn a_lease_takes_its_keys_along() {
    let store = store();
    let link = store.link("x");
    let (lease, ttl) = link
        .grant(Duration::from_millis(9_001))
        .await
        .expect("a lease");
    assert_eq!(ttl, 10 * SECOND, "whole seconds");
    let short = link.grant(Duration::ZERO).await.expect("a lease");
    assert_eq!(short.1, 2 * SECOND, "etcd's least");
    let put = |key: &str| {
        let then = vec![Op::put(key, "1", Some(lease))];
        store
            .txn(&Txn {
                then,
                ..Txn::default()
            })
            .expect("written")
    };
    for key in ["a", "b", "c"] {
        put(key);
    }
    store.put("c", "2"); // no longer attached
    let mut watch = link.watch(all(), None).await.expect("a watch");
    advance(6 * SECOND).await;
    assert_eq!(link.keep_alive(lease).await, Ok(10 * SECOND));
    advance(9 * SECOND).await;
    assert_eq!(link.time_to_live(lease).await, Ok(Some(SECOND)));
    let start = Instant::now();
    assert_eq!(next(&mut watch).await, ["a-", "b-"]);
    assert_eq!(start.elapsed(), SECOND, "nobody else called the store");
    assert_eq!(keys(&store, &all()), ["c"]);
    assert_eq!(link.time_to_live(lease).await, Ok(None));
    assert_eq!(
        link.keep_alive(lease).await,
        Err(StoreError::LeaseNotFound { lease })
    );
    let deletions = store.history(&all());
    let deletions: Vec<Revision> = deletions[4..].iter().map(KeyEvent::revision).collect();
    assert_eq!(deletions, [Revision(6), Revision(6)]);
}

#[tokio::test(start_paused = true)]
async fn the_past_can_be_read_until_it_is_compacted() {
    let store = store();
    for n in 1..=4 {
        store.put("a", format!("{n}"));
    }
    store.delete("a"); // revision 6
    let at = |n| {
        store
            .entries_at(&all(), Revision(n))
            .map(|answer| answer.entries)
    };
    assert_eq!(at(1), Ok(vec![]));
    assert_eq!(at(3).expect("there")[0].value, b"2");
    assert_eq!(at(6), Ok(vec![]));
    let current = Revision(6);
    assert_eq!(
        at(7),
        Err(StoreError::FutureRevision {
            asked: Revision(7),
            current
        })
    );
    store.compact(Revision(4)).expect("compacted");
    let gone = StoreError::Compacted {
        revision: Revision(4),
    };
    assert_eq!(at(3), Err(gone.clone()));
    assert_eq!(at(4).expect("there")[0].value, b"3");
    assert_eq!(store.compact(Revision(4)), Err(gone.clone()));
    assert!(store.compact(Revision(9)).is_err());

    let link = store.link("x");
    let mut late = link.watch(all(), Some(Revision(3))).await.expect("a watch");
    assert_eq!(said(&mut late).await, Err(gone));
    let mut in_time = link.watch(all(), Some(Revision(4))).await.expect("a watch");
    assert_eq!(next(&mut in_time).await, ["a=3", "a=4", "a-"]);
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_has_not_come_so_far_loses_what_is_compacted() {
    let store = store();
    let link = store.link("x");
    let mut watch = link.watch(all(), None).await.expect("a watch");
    store.put("a", "1");
    assert_eq!(next(&mut watch).await, ["a=1"]);
    store.put("a", "2");
    store.put("a", "3");
    store.compact(Revision(4)).expect("compacted");
    let gone = StoreError::Compacted {
        revision: Revision(4),
    };
    assert_eq!(said(&mut watch).await, Err(gone));
}

#[tokio::test(start_paused = true)]
async fn a_restored_backup_takes_the_revision_back() {
    let store = store();
    let link = store.link("x");
    store.put_for("a", "1", 10 * SECOND);
    advance(8 * SECOND).await;
    let backup = store.backup();
    store.put("b", "1");
    store.put("a", "2");
    let mut watch = link.watch(all(), Some(Revision(2))).await.expect("a watch");
    assert_eq!(next(&mut watch).await, ["a=1", "b=1", "a=2"]);
    store.restore(&backup);
    assert_eq!(store.revision(), Revision(2));
    assert_eq!(keys(&store, &all()), ["a"]);
    assert!(
        matches!(said(&mut watch).await, Err(StoreError::Unavailable { .. })),
        "it broke"
    );
    // Someone who goes on where he was waits for revisions that are years away.
    let mut deaf = link.watch(all(), Some(Revision(5))).await.expect("a watch");
    store.put("c", "1");
    assert_eq!(store.revision(), Revision(3), "used a second time");
    assert!(deaf.try_next().expect("no error").is_none());
    deaf.ask_progress();
    let progress = WatchAnswer::Progress {
        revision: Revision(3),
    };
    assert_eq!(said(&mut deaf).await, Ok(progress), "it can be found out");
    advance(9 * SECOND).await;
    assert_eq!(keys(&store, &all()), ["a", "c"], "the lease began anew");
    advance(2 * SECOND).await;
    assert_eq!(keys(&store, &all()), ["c"]);
}

// The link: calls

/// A call by which something can be seen to be done.
async fn put(link: &StoreLink, key: &str) -> Result<Revision, StoreError> {
    let then = vec![Op::put(key, "1", None)];
    let answer = link
        .txn(Txn {
            then,
            ..Txn::default()
        })
        .await;
    answer.map(|answer| answer.revision)
}

fn broke() -> Result<Revision, StoreError> {
    Err(StoreError::unavailable("the connection broke"))
}

#[tokio::test(start_paused = true)]
async fn a_lost_request_is_not_done_and_a_lost_answer_is() {
    let store = store();
    let link = store.link("x");
    link.fail_next(CallFault::LoseRequest(Silence::Error));
    link.fail_next(CallFault::LoseAnswer(Silence::Error));
    link.fail_next(CallFault::LoseRequest(Silence::Hang));
    link.fail_next(CallFault::LoseAnswer(Silence::Hang));
    assert_eq!(put(&link, "a").await, broke());
    assert_eq!(put(&link, "b").await, broke());
    for key in ["c", "d"] {
        let hangs = timeout(3600 * SECOND, put(&link, key)).await;
        assert!(hangs.is_err(), "{key} is answered");
    }
    assert_eq!(link.pending_faults(), 0);
    assert_eq!(put(&link, "e").await, Ok(Revision(4)));
    assert_eq!(keys(&store, &all()), ["b", "d", "e"]);
    let counts = link.counts();
    assert_eq!(
        (counts["request lost"], counts["answer lost"], counts["txn"]),
        (2, 2, 5)
    );
}

#[tokio::test(start_paused = true)]
async fn a_parked_request_is_done_when_nobody_waits_any_more() {
    let store = store();
    let link = store.link("x");
    link.fail_next(CallFault::Park(Silence::Error));
    assert_eq!(put(&link, "a").await, broke());
    assert_eq!(put(&link, "b").await, Ok(Revision(2)));
    let mut watch = link.watch(all(), None).await.expect("a watch");
    assert_eq!(link.deliver_parked(), 1);
    assert_eq!(next(&mut watch).await, ["a=1"]);
    assert_eq!(link.deliver_parked(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_cut_link_fails_or_hangs_and_others_do_not_notice() {
    let store = store();
    let (link, other) = (store.link("x"), store.link("y"));
    link.cut(Cut::Fail);
    assert!(matches!(
        put(&link, "a").await,
        Err(StoreError::Unavailable { .. })
    ));
    link.cut(Cut::Deny);
    assert!(matches!(
        put(&link, "a").await,
        Err(StoreError::Denied { .. })
    ));
    assert_eq!(store.revision(), Revision(1));
    link.cut(Cut::Hang);
    {
        let mut call = pin!(put(&link, "a"));
        assert!(timeout(60 * SECOND, call.as_mut()).await.is_err());
        assert_eq!(put(&other, "b").await, Ok(Revision(2)));
        link.heal();
        assert_eq!(call.await, Ok(Revision(3)), "what waited goes on");
    }
    assert_eq!(link.is_cut(), None);
    let mut lost = pin!(put(&link, "c"));
    // On its way back: the call is done and its caller does not know.
    link.set_latency(SECOND);
    assert!(timeout(SECOND + SECOND / 2, lost.as_mut()).await.is_err());
    link.cut(Cut::Fail);
    assert!(lost.await.is_err());
    assert_eq!(keys(&store, &all()), ["a", "b", "c"]);
}

#[tokio::test(start_paused = true)]
async fn a_caller_can_stop_before_and_after_a_call_is_done() {
    let store = store();
    let link = store.link("x");
    let mut done = Vec::new();
    for polls in 1..=3 {
        let key = format!("{polls}");
        let mut call = pin!(put(&link, &key));
        for _ in 0..polls {
            std::future::poll_fn(|cx| Poll::Ready(call.as_mut().poll(cx).is_ready())).await;
        }
        done.push(keys(&store, &KeyRange::key(&key)).len());
    }
    assert_eq!(
        done,
        [0, 1, 1],
        "dropped on the way, on the way back, with the answer"
    );
}

#[tokio::test(start_paused = true)]
async fn latency_is_the_time_each_way() {
    let store = store();
    let link = store.link("x");
    link.set_latency(3 * SECOND);
    let start = Instant::now();
    put(&link, "a").await.expect("done");
    assert_eq!(start.elapsed(), 6 * SECOND);
}

// The link: watches

/// A watch, and the writes `a=1 b=1 a=2 c=1 b-` that it has not fetched.
async fn watched(delivery: Delivery) -> (FakeStore, StoreLink, LinkWatch) {
    let store = store();
    let link = store.link("x");
    link.deliver(delivery);
    let watch = link.watch(all(), None).await.expect("a watch");
    store.put("a", "1");
    store.put("b", "1");
    store.put("a", "2");
    store.put("c", "1");
    store.delete("b");
    (store, link, watch)
}

const WRITES: [&str; 5] = ["a=1", "b=1", "a=2", "c=1", "b-"];

#[tokio::test(start_paused = true)]
async fn a_watch_delivers_what_was_written_in_its_order() {
    let (store, _, mut watch) = watched(Delivery::PLAIN).await;
    assert_eq!(next(&mut watch).await, WRITES);
    watch.ask_progress();
    let progress = WatchAnswer::Progress {
        revision: Revision(6),
    };
    assert_eq!(said(&mut watch).await, Ok(progress));
    assert!(is_silent(&mut watch).await);
    store.put("d", "1");
    assert_eq!(next(&mut watch).await, ["d=1"]);
}

#[tokio::test(start_paused = true)]
async fn progress_is_told_after_all_that_came_before() {
    let (_, _, mut watch) = watched(Delivery {
        delay: SECOND,
        ..Delivery::PLAIN
    })
    .await;
    watch.ask_progress();
    assert_eq!(next(&mut watch).await, WRITES);
    assert!(matches!(
        said(&mut watch).await,
        Ok(WatchAnswer::Progress { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn deliveries_may_be_split_repeated_squashed_and_late() {
    let split = Delivery {
        split: true,
        repeat: true,
        ..Delivery::PLAIN
    };
    let (_, link, mut watch) = watched(split).await;
    for write in WRITES {
        for _ in 0..2 {
            assert_eq!(next(&mut watch).await, [write]);
        }
    }
    let counts = link.counts();
    assert_eq!((counts["watch split"], counts["watch repeated"]), (1, 1));

    let squash = Delivery {
        squash: true,
        delay: 5 * SECOND,
        ..Delivery::PLAIN
    };
    let (_, link, mut watch) = watched(squash).await;
    let start = Instant::now();
    assert_eq!(next(&mut watch).await, ["a=2", "c=1", "b-"]);
    assert_eq!(start.elapsed(), 5 * SECOND);
    let counts = link.counts();
    assert_eq!((counts["watch squashed"], counts["watch delayed"]), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn the_order_of_one_keys_writes_is_never_touched() {
    let mut seen = std::collections::BTreeSet::new();
    for order in 0..40 {
        let (_, _, mut watch) = watched(Delivery {
            reorder: Some(order),
            ..Delivery::PLAIN
        })
        .await;
        let words = next(&mut watch).await;
        for (key, order) in [("a", ["a=1", "a=2"]), ("b", ["b=1", "b-"])] {
            let written = words.iter().filter(|word| word.starts_with(key));
            assert!(written.eq(order.iter()), "{words:?}");
        }
        assert_eq!(words.len(), 5);
        seen.insert(words);
    }
    assert_eq!(seen.len(), 6, "every order of three keys");
}

#[tokio::test(start_paused = true)]
async fn what_is_held_comes_at_once_when_it_is_let_go() {
    let hold = Delivery {
        hold: true,
        ..Delivery::PLAIN
    };
    let (_, link, mut watch) = watched(hold).await;
    watch.ask_progress();
    assert!(is_silent(&mut watch).await);
    link.deliver(Delivery::PLAIN);
    assert_eq!(next(&mut watch).await, WRITES);
}

#[tokio::test(start_paused = true)]
async fn a_hanging_link_silences_a_watch_and_a_failing_one_breaks_it() {
    let (_, link, mut watch) = watched(Delivery::PLAIN).await;
    link.cut(Cut::Hang);
    assert!(is_silent(&mut watch).await);
    link.heal();
    assert_eq!(next(&mut watch).await, WRITES);
    link.cut(Cut::Fail);
    link.heal();
    assert!(said(&mut watch).await.is_err(), "it does not come back");
    let mut watch = link.watch(all(), None).await.expect("a new one");
    link.break_watches();
    assert!(said(&mut watch).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_deaf_watch_tells_nothing_and_a_new_one_hears() {
    let (store, link, mut watch) = watched(Delivery::PLAIN).await;
    link.deafen_watches();
    watch.ask_progress();
    link.break_watches();
    assert!(is_silent(&mut watch).await, "not even that it broke");
    let mut fresh = link.watch(all(), None).await.expect("a watch");
    store.put("d", "1");
    assert_eq!(next(&mut fresh).await, ["d=1"]);
}
