use proptest::prelude::*;

use super::*;
use crate::clock::Rng;
use crate::object::{Address, IfName};

const SECOND: Duration = Duration::from_secs(1);

fn object(n: u8) -> Object {
    Object::Address(Address {
        dev: IfName::FIRST,
        ip: [10, 0, 0, n].into(),
        prefix_len: 32,
    })
}

/// Repairs an object each time it is undone, so long after each repair; answers when it was undone and
/// when repaired.
fn fight(delays: impl IntoIterator<Item = Duration>) -> (Contention, Vec<(Moment, Moment)>) {
    let (mut all, mut rng) = (Contention::default(), Rng::new(1));
    let mut now = Moment::default();
    let mut repairs = Vec::new();
    for delay in delays {
        let undone = now + delay;
        now = undone;
        if all.waits(&object(1).key(), true, now) {
            now = all.next().expect("it waits");
            assert!(!all.waits(&object(1).key(), true, now));
        }
        all.repaired(&object(1), None, None, FORGOTTEN, now, &mut rng);
        repairs.push((undone, now));
    }
    (all, repairs)
}

proptest! {
    /// Whatever is undone no more often than it may be is repaired at once, for ever.
    #[test]
    fn what_is_undone_now_and_then_is_repaired_at_once(
        delays in prop::collection::vec(3_000_u64..30_000, 1..300),
    ) {
        let (all, repairs) = fight(delays.into_iter().map(Duration::from_millis));
        prop_assert!(repairs.iter().all(|(undone, repaired)| undone == repaired));
        let now = repairs.last().map_or(Moment::default(), |(_, at)| *at);
        prop_assert_eq!(all.contended(now).count(), 0);
    }

    /// A few repairs at once do not wait either, however they come.
    #[test]
    fn the_first_repairs_are_made_at_once(
        delays in prop::collection::vec(0_u64..5_000, 0..=20),
    ) {
        let (_, repairs) = fight(delays.into_iter().map(Duration::from_millis));
        prop_assert!(repairs.iter().all(|(undone, repaired)| undone == repaired));
    }

    /// No adversary has more repairs than its patience is worth.
    #[test]
    fn repairs_are_bounded_whoever_undoes_them(
        delays in prop::collection::vec(prop_oneof![Just(0_u64), 0_u64..100, 0_u64..8_000], 100..600),
    ) {
        let (_, repairs) = fight(delays.into_iter().map(Duration::from_millis));
        for (from, (_, first)) in repairs.iter().enumerate() {
            for (to, (_, last)) in repairs.iter().enumerate().skip(from) {
                let (count, time) = (to - from + 1, last.since(*first));
                let bound = 26.0 + time.as_secs_f64() / FORGOTTEN.as_secs_f64();
                prop_assert!(count as f64 <= bound, "{count} repairs in {time:?}");
            }
        }
    }

    /// A fight without a pause ends at two repairs a minute, or four.
    #[test]
    fn a_fight_comes_to_rest(delays in prop::collection::vec(0_u64..100, 100)) {
        let (all, repairs) = fight(delays.into_iter().map(Duration::from_millis));
        let waits: Vec<Duration> = repairs.iter().map(|(undone, done)| done.since(*undone)).collect();
        prop_assert!(waits.iter().all(|wait| *wait <= WAITS.1));
        prop_assert!(waits[40..].iter().all(|wait| *wait >= WAITS.1 / 2 - SECOND), "{waits:?}");
        // Left alone for as long as it owes, it is as if nothing had been.
        let last = repairs[99].1;
        prop_assert_eq!(all.contended(last + MOST - SECOND).count(), 1);
        prop_assert_eq!(all.contended(last + MOST).count(), 0);
    }
}

#[test]
fn an_object_that_is_fought_for_delays_no_other_and_is_forgotten() {
    let (mut all, repairs) = fight([Duration::ZERO; 30]);
    let now = repairs[29].1;
    let (fought, other) = (object(1).key(), object(2).key());
    assert!(all.waits(&fought, true, now) && !all.waits(&other, true, now));
    assert!(!all.waits(&fought, false, now), "something else is wanted");
    assert_eq!(all.next(), None);
    assert!(all.waits(&fought, true, now));
    assert!(
        all.contended(now)
            .next()
            .is_some_and(|entry| entry.is_unsafe(now))
    );
    // Time that it is not right is no rest.
    let later = now + 10 * MOST;
    all.pass(later);
    assert_eq!(all.contended(later).count(), 1);
    // By itself it became right.
    let (planned, none) = ([fought].into(), BTreeSet::new());
    all.planned(Some(&planned), &none, |_| true, later);
    assert_eq!(all.next(), None, "nothing can be done");
    assert_eq!(
        all.contended(later + MOST).count(),
        1,
        "nor is it left alone"
    );
    all.planned(Some(&planned), &none, |_| false, later);
    assert_eq!(all.next(), None);
    assert!(
        all.contended(later)
            .next()
            .is_some_and(|entry| entry.is_unsafe(later))
    );
    assert!(
        all.contended(later + CALM)
            .next()
            .is_some_and(|entry| !entry.is_unsafe(later + CALM))
    );
    all.pass(later + MOST);
    assert!(all.is_empty());
}

#[test]
fn it_is_told_what_how_often_and_by_whom() {
    let (mut all, _) = fight([Duration::from_millis(100); 21]);
    let (mut now, mut rng) = (Moment::default() + 3 * SECOND, Rng::new(2));
    let told = |all: &Contention, now| all.contended(now).next().expect("a fight").to_string();
    let text = told(&all, now);
    assert!(text.starts_with("address 10.0.0.1/32 dev"), "{text}");
    assert!(
        text.contains("21 times in 2.0 s, by whom the kernel does not tell"),
        "{text}"
    );
    now = now + SECOND;
    all.repaired(
        &object(1),
        None,
        Some(RouteProtocol(99)),
        FORGOTTEN,
        now,
        &mut rng,
    );
    all.repaired(&object(1), None, None, FORGOTTEN, now, &mut rng);
    let text = told(&all, now);
    assert!(
        text.contains("23 times") && text.contains("protocol 99"),
        "{text}"
    );
}
