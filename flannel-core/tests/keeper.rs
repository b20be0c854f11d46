//! The lease keeper as a pure machine.
#![allow(missing_docs, reason = "tests")]

use std::time::Duration;

use flannel_core::keeper::{Keeper, KeeperOptions, Wish};
use flannel_core::{
    Backoff, DualStack, Lease, LeaseAttrs, LeaseKey, Moment, NodeId, Revision, Rng,
};
use proptest::prelude::*;

fn lease(ttl: Option<Duration>) -> Lease {
    Lease {
        key: LeaseKey::new("10.42.1.0-24"),
        node: NodeId::new("a").expect("a node id"),
        instance: None,
        subnet: DualStack::v4("10.42.1.0/24".parse().expect("a subnet")),
        attrs: LeaseAttrs::default(),
        ttl,
        created: Revision(1),
        revision: Revision(1),
    }
}

fn at(seconds: u64) -> Moment {
    Moment::from_duration(Duration::from_secs(seconds))
}

const DAY: u64 = 86_400;

#[test]
fn a_day_is_renewed_an_hour_before_its_end() {
    let keeper = Keeper::new(
        KeeperOptions::default(),
        &lease(Some(Duration::from_secs(DAY))),
        at(100),
    );
    assert_eq!(keeper.wish(at(100)), Wish::Wait(Some(at(100 + DAY - 3600))));
    assert_eq!(keeper.wish(at(100 + DAY - 3600)), Wish::Renew);
    assert_eq!(keeper.wish(at(100 + DAY)), Wish::Expired);
}

#[test]
fn a_short_lease_is_renewed_at_half_time() {
    let keeper = Keeper::new(
        KeeperOptions::default(),
        &lease(Some(Duration::from_secs(60))),
        at(0),
    );
    assert_eq!(keeper.wish(at(29)), Wish::Wait(Some(at(30))));
    assert_eq!(keeper.wish(at(30)), Wish::Renew);
}

#[test]
fn a_lease_without_end_is_left_alone_until_there_is_something_to_publish() {
    let mut keeper = Keeper::new(KeeperOptions::default(), &lease(None), at(0));
    assert_eq!(keeper.wish(at(u64::from(u32::MAX))), Wish::Wait(None));
    keeper.publish(at(7));
    assert_eq!(keeper.wish(at(7)), Wish::Renew);
}

#[test]
fn a_suspended_machine_wakes_to_an_expired_lease() {
    // The clock counts time asleep; the timers did not fire.
    let keeper = Keeper::new(
        KeeperOptions::default(),
        &lease(Some(Duration::from_secs(DAY))),
        at(0),
    );
    assert_eq!(keeper.wish(at(3 * DAY)), Wish::Expired);
}

proptest! {
    #[test]
    fn there_is_always_a_try_before_the_end(
        ttl in 1_u64..200_000,
        margin in 0_u64..100_000,
        failures in 0_usize..40,
        seed in any::<u64>(),
    ) {
        let mut options = KeeperOptions::default();
        options.margin = Duration::from_secs(margin);
        options.retry = Backoff::new(Duration::from_millis(250), Duration::from_secs(60));
        let ttl = Duration::from_secs(ttl);
        let mut keeper = Keeper::new(options, &lease(Some(ttl)), at(0));
        let mut rng = Rng::new(seed);
        let mut now = at(0);
        for _ in 0..failures {
            match keeper.wish(now) {
                Wish::Wait(Some(until)) => {
                    prop_assert!(until > now, "never waits for the past");
                    prop_assert!(until < at(0) + ttl, "never waits past the end");
                    now = until;
                }
                Wish::Wait(None) => prop_assert!(false, "a lease with an end is never left alone"),
                Wish::Renew => keeper.failed(now, &mut rng),
                Wish::Expired => break,
            }
        }
        // However the tries went: at the end it is over, and no success can be claimed any more.
        prop_assert_eq!(keeper.wish(at(0) + ttl), Wish::Expired);
    }

    #[test]
    fn waits_grow_stay_bounded_and_are_never_zero(failures in 1_u32..100, seed in any::<u64>()) {
        let backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
        let wait = backoff.after(failures, &mut Rng::new(seed));
        let full = Duration::from_millis(100)
            .saturating_mul(1 << (failures - 1).min(20))
            .min(Duration::from_secs(30));
        prop_assert!(wait <= full && wait >= full / 2, "{wait:?} of {full:?}");
    }
}
