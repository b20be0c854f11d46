//! The promises about watching.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use flannel_core::manager::Error;
use flannel_core::{BackendData, BackendType, Event, Lease, LeaseAttrs, LeaseKey, Manager};

use super::super::difference::difference;
use super::tools::*;
use super::{ManagerFixture, Outcome, StoreFixture, Verdict, Violation};

pub(super) async fn watch_starts_with_a_snapshot(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    let empty = records(&manager).await?;
    ensure!(empty.is_empty(), "an empty store is shown as {empty:?}");
    let mut leases = Vec::new();
    for n in 1..=10 {
        leases.push(acquire(&*store, &manager, &request(n)).await?);
    }
    leases.sort_by(|a, b| a.key.cmp(&b.key));
    // `Watched` refuses whatever comes before the first snapshot.
    let shown = records(&store.manager().await).await?;
    ensure!(
        shown.len() == 10,
        "the snapshot holds {} of 10 records",
        shown.len()
    );
    for (shown, lease) in shown.iter().zip(&leases) {
        let mut shown = shown.clone();
        // Time went on since the lease was written.
        ensure!(
            shown.ttl.is_some() == lease.ttl.is_some() && shown.ttl <= lease.ttl,
            "a time to live of {:?} is shown as {:?}",
            lease.ttl,
            shown.ttl
        );
        shown.ttl = lease.ttl;
        ensure!(
            shown == *lease,
            "the lease of node {} is shown otherwise than it was given:{}",
            lease.node,
            difference(&shown, lease)
        );
    }
    Ok(Verdict::Kept)
}

pub(super) async fn a_gap_is_followed_by_a_snapshot(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    let [gone, kept] = [1, 2].map(request);
    let gone = acquire(&*store, &manager, &gone).await?;
    let kept = acquire(&*store, &manager, &kept).await?;
    let mut watched = Watched::begin(&manager).await?;
    require!(
        store.interrupt_watches().await,
        "the fixture cannot break watches"
    );
    let elsewhere = store.manager().await;
    let released = elsewhere.release_lease(&gone).await;
    released.or_violation("releasing is refused")?;
    let new = acquire(&*store, &elsewhere, &request(3)).await?;
    while watched.snapshots < 2 {
        watched.next().await?;
    }
    watched
        .until("what happened in the gap", |leases| {
            leases
                .keys()
                .eq([&kept.key, &new.key].into_iter().collect::<BTreeSet<_>>())
        })
        .await?;
    Ok(Verdict::Kept)
}

pub(super) async fn watch_delivers_puts_and_deletes(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    let mut watched = Watched::begin(&manager).await?;
    let elsewhere = store.manager().await;
    for n in 1..=3 {
        let lease = acquire(&*store, &elsewhere, &request(n)).await?;
        watched
            .until("a new lease", |leases| {
                leases.get(&lease.key).is_some_and(|shown| {
                    (&shown.node, &shown.subnet, &shown.attrs, shown.revision)
                        == (&lease.node, &lease.subnet, &lease.attrs, lease.revision)
                })
            })
            .await?;
        if n != 2 {
            let released = elsewhere.release_lease(&lease).await;
            released.or_violation("releasing is refused")?;
            watched
                .until("a release", |leases| !leases.contains_key(&lease.key))
                .await?;
        }
    }
    ensure!(
        watched
            .leases
            .values()
            .map(|lease| &lease.node)
            .eq([&node(2)]),
        "the watch leaves {:?}",
        watched.leases
    );
    Ok(Verdict::Kept)
}

pub(super) async fn expiry_is_delivered(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    require!(manager.capabilities().expires, "its leases do not expire");
    let lease = acquire(&*store, &manager, &request(1)).await?;
    let mut watched = Watched::begin(&manager).await?;
    let ttl = lease.ttl.or_violation("a lease has no time to live")?;
    require!(
        store.advance(ttl + ttl / 5).await,
        "the fixture cannot let time pass"
    );
    watched
        .until("the expiry", |leases| leases.is_empty())
        .await?;
    // The subnet is free again, for its old holder too.
    let mut wants = request(2);
    wants.previous = lease.subnet;
    acquire(&*store, &manager, &wants).await?;
    Ok(Verdict::Kept)
}

/// Something that a node may come to publish.
type Change<'a> = &'a (dyn Fn(&mut LeaseAttrs) + Sync);

pub(super) async fn every_field_change_is_delivered(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, DUAL_POOL_OF_64).await?;
    let mut wants = request(1);
    wants.attrs = LeaseAttrs::default();
    wants.attrs.public_ip.v4 = Some([192, 0, 2, 1].into());
    let mut lease = acquire(&*store, &manager, &wants).await?;
    let mut watched = Watched::begin(&store.manager().await).await?;
    let data = |text| BackendData::from_json(text).or_violation("the suite's backend data");
    let (data4, data6) = (data(r#"{"VNI":1}"#)?, data(r#"{"VNI":2}"#)?);
    let changes: [(&str, Change<'_>); 8] = [
        ("the IPv4 address", &|a| {
            a.public_ip.v4 = Some([192, 0, 2, 2].into())
        }),
        ("the IPv6 address", &|a| {
            a.public_ip.v6 = Some([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into());
        }),
        ("the backend type", &|a| {
            a.backend_type = BackendType::new("other").ok()
        }),
        ("the backend data", &|a| {
            a.backend_data.v4 = Some(data4.clone())
        }),
        ("the IPv6 backend data", &|a| {
            a.backend_data.v6 = Some(data6.clone())
        }),
        ("other backend data", &|a| {
            a.backend_data.v4 = Some(data6.clone())
        }),
        ("the loss of backend data", &|a| a.backend_data.v6 = None),
        ("the loss of the IPv6 address", &|a| a.public_ip.v6 = None),
    ];
    for (what, change) in changes {
        change(&mut wants.attrs);
        lease.attrs = wants.attrs.clone();
        lease = manager
            .renew_lease(&lease)
            .await
            .or_violation("a renewal is refused")?;
        watched
            .until(what, |leases| {
                let shown = leases.get(&lease.key);
                shown.is_some_and(|shown| shown.attrs == wants.attrs)
            })
            .await?;
    }
    Ok(Verdict::Kept)
}

pub(super) async fn an_unreadable_record_hides_nobody(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_4).await?;
    let mut watched = Watched::begin(&manager).await?;
    let spoilt = acquire(&*store, &manager, &request(1)).await?;
    require!(
        store.spoil(&spoilt.key).await,
        "the fixture cannot spoil a record"
    );
    let mut held = Vec::new();
    for n in 2..=4 {
        held.push(acquire(&*store, &manager, &request(n)).await?);
    }
    held.sort_by(|a, b| a.key.cmp(&b.key));
    ensure!(
        held.iter()
            .all(|lease| !lease.subnet.overlaps(&spoilt.subnet)),
        "a subnet is given out whose record cannot be read"
    );
    if manager.capabilities().allocates {
        let fifth = try_acquire(&manager, &request(5)).await;
        ensure!(
            matches!(fifth, Err(Error::PoolExhausted { .. })),
            "a subnet is given out of a full pool: {fifth:?}"
        );
    }
    let all = |leases: &BTreeMap<LeaseKey, Lease>| held.iter().all(|l| leases.contains_key(&l.key));
    watched.until("what came behind it", all).await?;
    let fresh = Watched::begin(&manager).await?;
    for (what, watched) in [("the watch", watched), ("a snapshot", fresh)] {
        ensure!(
            watched.unreadable.iter().eq([&spoilt.key]),
            "{what} reports as unreadable {:?}",
            watched.unreadable
        );
        ensure!(all(&watched.leases), "{what} shows {:?}", watched.leases);
    }
    Ok(Verdict::Kept)
}

/// Leases come, change and go.
async fn churn(store: &dyn StoreFixture, manager: &Arc<dyn Manager>) -> Result<(), Violation> {
    for n in 1..=12 {
        let lease = acquire(store, manager, &request(n)).await?;
        let lease = manager.renew_lease(&lease).await;
        let lease = lease.or_violation("a renewal is refused")?;
        if n % 3 == 0 {
            let released = manager.release_lease(&lease).await;
            released.or_violation("releasing is refused")?;
        }
    }
    Ok(())
}

pub(super) async fn revisions_never_go_back(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    // `Watched` checks the order of all that it is told.
    let mut watched = Watched::begin(&manager).await?;
    churn(&*store, &manager).await?;
    let last = acquire(&*store, &manager, &request(13)).await?;
    watched
        .until("the last lease", |leases| leases.contains_key(&last.key))
        .await?;
    ensure!(
        watched.leases.len() == 9,
        "the watch leaves {} of 9 records",
        watched.leases.len()
    );
    ensure!(
        watched.revision >= last.revision,
        "the watch is at {} after an event of {}",
        watched.revision,
        last.revision
    );
    let mut later = Watched::begin(&manager).await?;
    ensure!(
        later.revision >= watched.revision,
        "a later snapshot is of revision {}, after {}",
        later.revision,
        watched.revision
    );
    let next = acquire(&*store, &manager, &request(14)).await?;
    later
        .until("a lease after the snapshot", |leases| {
            leases.contains_key(&next.key)
        })
        .await?;
    Ok(Verdict::Kept)
}

pub(super) async fn watchers_are_independent(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    let mut early = Watched::begin(&manager).await?;
    let mut slow = Watched::begin(&store.manager().await).await?;
    let never_polled = Watched::new(&manager);
    let dropped = Watched::begin(&manager).await?;
    churn(&*store, &manager).await?;
    drop(dropped);
    let mut late = Watched::begin(&manager).await?;
    let last = acquire(&*store, &manager, &request(20)).await?;
    for watched in [&mut early, &mut late, &mut slow] {
        watched
            .until("the last lease", |leases| leases.contains_key(&last.key))
            .await?;
    }
    drop(never_polled);
    let attrs = |watched: &Watched| {
        let leases = watched.leases.values();
        leases
            .map(|lease| (lease.key.clone(), lease.attrs.clone(), lease.revision))
            .collect::<Vec<_>>()
    };
    ensure!(
        attrs(&early).len() == 9,
        "a watch leaves {:?}",
        early.leases
    );
    for other in [&slow, &late] {
        ensure!(
            attrs(other) == attrs(&early),
            "one watch leaves {:?}, another {:?}",
            early.leases,
            other.leases
        );
    }
    Ok(Verdict::Kept)
}

pub(super) async fn config_change_is_delivered(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_4).await?;
    require!(
        manager.capabilities().watches_config,
        "it does not watch the config"
    );
    let before = manager.network_config().await;
    let before = before.or_violation("the config cannot be read")?;
    ensure!(
        before.pools() == config_for(&manager, POOL_OF_4)?.pools(),
        "the config is read as {before:?}"
    );
    let mut watched = Watched::begin(&manager).await?;
    let config = config_for(&manager, OTHER_POOL)?;
    require!(
        store.set_config(config.clone()).await,
        "the fixture cannot change the config"
    );
    loop {
        if let Event::Config(shown) = watched.next().await? {
            if shown == config {
                break;
            }
            ensure!(shown == before, "the config is shown as {shown:?}");
        }
    }
    let after = manager.network_config().await;
    let after = after.or_violation("the config cannot be read")?;
    ensure!(after == config, "the config is read as {after:?}");
    Ok(Verdict::Kept)
}
