//! The promises about acquiring, renewing and releasing.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use flannel_core::manager::Error;
use flannel_core::{DualStack, Family, Lease, LeaseKey, Manager, Revision};
use tokio::task::JoinSet;

use super::tools::*;
use super::{ManagerFixture, Outcome, Verdict, Violation};

pub(super) async fn acquire_is_idempotent_per_node(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    let first = acquire(&*store, &manager, &request(1)).await?;
    // A program that starts again has another handle, and may have another address.
    let mut again = request(1);
    again.attrs = attrs(2);
    let second = acquire(&*store, &store.manager().await, &again).await?;
    ensure!(
        (&first.subnet, &first.key) == (&second.subnet, &second.key),
        "the node got {} and then {}",
        first.subnet,
        second.subnet
    );
    let records = records(&manager).await?;
    ensure!(
        records.len() == 1,
        "one node holds {} records",
        records.len()
    );
    Ok(Verdict::Kept)
}

/// How often the call is polled, at the most, before it is dropped.
const POLLS: u8 = 16;

pub(super) async fn a_dropped_acquire_is_safe_to_repeat(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, DUAL_POOL_OF_64).await?;
    let mut kept = JoinSet::new();
    for polls in 0..=POLLS {
        let wants = request(polls);
        store.add_node(&wants.node).await;
        {
            let mut call = pin!(manager.acquire_lease(&wants));
            for _ in 0..polls {
                let poll = poll_fn(|cx| Poll::Ready(call.as_mut().poll(cx)));
                if poll.await.is_ready() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let lease = acquire(&*store, &manager, &wants).await?;
        let stored = records(&manager).await?;
        let own = stored.iter().filter(|record| record.node == wants.node);
        ensure!(
            own.map(|record| &record.key).eq([&lease.key])
                && stored.len() == usize::from(polls) + 1,
            "an acquire that was dropped at poll {polls} and repeated left {stored:?}"
        );
        ensure!(overlap(&stored).is_none(), "records in the store overlap");
        kept.spawn(keep(Arc::clone(&manager), lease));
    }
    Ok(Verdict::Kept)
}

pub(super) async fn a_lease_that_no_longer_fits_is_replaced(
    fixture: &dyn ManagerFixture,
) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_4).await?;
    require!(manager.capabilities().allocates, "it does not allocate");
    let old = acquire(&*store, &manager, &request(1)).await?;
    let config = config(OTHER_POOL)?;
    require!(
        store.set_config(config.clone()).await,
        "the fixture cannot change the config"
    );
    let new = acquire(&*store, &manager, &request(1)).await?;
    let pool = config
        .pools()
        .v4
        .or_violation("the suite's config has IPv4")?;
    ensure!(
        new.subnet.v4.is_some_and(|subnet| pool.fits(&subnet)),
        "{} is given out, which the config does not allow",
        new.subnet
    );
    let records = records(&manager).await?;
    ensure!(
        records.iter().map(|lease| &lease.key).eq([&new.key]),
        "the record of {} stays beside that of {}",
        old.subnet,
        new.subnet
    );
    Ok(Verdict::Kept)
}

/// Nodes that asked at once, and keep what they got until this is dropped.
struct Crowd {
    manager: Arc<dyn Manager>,
    results: Vec<Result<Lease, Error>>,
    _nodes: JoinSet<()>,
}

/// As many nodes as the pool has subnets ask at once, over several handles.
async fn race(fixture: &dyn ManagerFixture, text: &str) -> Result<Crowd, Violation> {
    let (store, manager) = store(fixture, text).await?;
    let mut nodes = JoinSet::new();
    let start = Arc::new(tokio::sync::Barrier::new(64));
    let (answers, mut answered) = tokio::sync::mpsc::channel(64);
    for n in 0..64 {
        store.add_node(&node(n)).await;
        let (manager, start) = (store.manager().await, Arc::clone(&start));
        let answers = answers.clone();
        nodes.spawn(async move {
            start.wait().await;
            let result = try_acquire(&manager, &request(n)).await;
            let lease = result.as_ref().ok().cloned();
            answers.send(result).await.ok();
            drop(answers);
            if let Some(lease) = lease {
                keep(manager, lease).await;
            }
        });
    }
    drop(answers);
    let mut results = Vec::new();
    while let Some(result) = answered.recv().await {
        results.push(result);
    }
    ensure!(results.len() == 64, "acquiring panicked");
    Ok(Crowd {
        manager,
        results,
        _nodes: nodes,
    })
}

pub(super) async fn no_two_nodes_share_a_subnet(fixture: &dyn ManagerFixture) -> Outcome {
    for text in [POOL_OF_64, DUAL_POOL_OF_64] {
        let crowd = race(fixture, text).await?;
        let leases: Vec<&Lease> = crowd.results.iter().flatten().collect();
        if let Some((a, b)) = overlap(&leases) {
            return Err(Violation(format!(
                "node {} was given {} and node {} {}",
                a.node, a.subnet, b.node, b.subnet
            )));
        }
        let stored = records(&crowd.manager).await?;
        ensure!(overlap(&stored).is_none(), "records in the store overlap");
        for lease in leases {
            ensure!(
                stored.iter().any(|record| record.node == lease.node
                    && record.subnet == lease.subnet
                    && record.key == lease.key),
                "the lease of node {} is not in the store",
                lease.node
            );
        }
    }
    Ok(Verdict::Kept)
}

pub(super) async fn pool_is_used_to_the_last_subnet(fixture: &dyn ManagerFixture) -> Outcome {
    {
        let (_, manager) = store(fixture, POOL_OF_64).await?;
        require!(manager.capabilities().allocates, "it does not allocate");
    }
    for text in [POOL_OF_64, DUAL_POOL_OF_64] {
        let crowd = race(fixture, text).await?;
        for result in &crowd.results {
            let result = result.as_ref();
            result.or_violation("a pool of 64 does not serve 64 nodes")?;
        }
        match try_acquire(&crowd.manager, &request(64)).await {
            Err(Error::PoolExhausted { family: Family::V4 }) => {}
            other => {
                let said = other.map(|lease| lease.subnet.to_string());
                return Err(Violation(format!("the 65th node of 64 is told {said:?}")));
            }
        }
        let stored = records(&crowd.manager).await?.len();
        ensure!(stored == 64, "the store holds {stored} records of 64 nodes");
    }
    Ok(Verdict::Kept)
}

pub(super) async fn records_of_any_length_are_respected(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_4).await?;
    require!(manager.capabilities().allocates, "it does not allocate");
    // A subnet, a half of the next, and a part of the one behind.
    for (n, text) in [
        (100, "10.5.0.0/26"),
        (101, "10.5.0.96/27"),
        (102, "10.5.0.144/28"),
    ] {
        require!(
            store.write_raw(foreign(n, text)?).await,
            "the fixture cannot write records of others"
        );
    }
    let lease = acquire(&*store, &manager, &request(1)).await?;
    ensure!(
        lease.subnet == DualStack::v4(subnet("10.5.0.192/26")?),
        "{} is given out, and only 10.5.0.192/26 is free",
        lease.subnet
    );
    let next = try_acquire(&manager, &request(2)).await;
    ensure!(
        matches!(next, Err(Error::PoolExhausted { .. })),
        "a subnet is given out of a full pool: {next:?}"
    );
    Ok(Verdict::Kept)
}

/// A record of a node that asks nobody.
fn foreign(n: u8, subnet: &str) -> Result<Lease, Violation> {
    Ok(Lease {
        key: LeaseKey::new(subnet.replace('/', "-")),
        node: node(n),
        instance: None,
        subnet: DualStack::v4(self::subnet(subnet)?),
        attrs: attrs(n),
        ttl: None,
        created: Revision::default(),
        revision: Revision::default(),
    })
}

pub(super) async fn what_no_peer_accepts_is_in_nobodys_way(
    fixture: &dyn ManagerFixture,
) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_4).await?;
    require!(manager.capabilities().allocates, "it does not allocate");
    let first = acquire(&*store, &manager, &request(1)).await?;
    // Both halves of the pool, all of it, and more than it.
    for (n, text) in [
        (100, "10.5.0.0/25"),
        (101, "10.5.0.128/25"),
        (102, "10.5.0.0/24"),
        (103, "10.0.0.0/8"),
    ] {
        require!(
            store.write_raw(foreign(n, text)?).await,
            "the fixture cannot write records of others"
        );
    }
    let renewed = manager.renew_lease(&first).await;
    ensure!(renewed.is_ok(), "the lease is lost: {renewed:?}");
    let again = acquire(&*store, &manager, &request(1)).await?;
    ensure!(
        again.subnet == first.subnet,
        "{} became {}",
        first.subnet,
        again.subnet
    );
    let next = acquire(&*store, &manager, &request(2)).await?;
    ensure!(
        !next.subnet.overlaps(&first.subnet),
        "{} and {} are given out",
        first.subnet,
        next.subnet
    );
    Ok(Verdict::Kept)
}

pub(super) async fn previous_subnet_is_honoured(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_4).await?;
    require!(manager.capabilities().allocates, "it does not allocate");
    // All of them in turn, so that none is met by chance.
    for (n, text) in [
        (1, "10.5.0.0/26"),
        (2, "10.5.0.192/26"),
        (3, "10.5.0.64/26"),
    ] {
        let mut wants = request(n);
        wants.previous = DualStack::v4(subnet(text)?);
        let lease = acquire(&*store, &manager, &wants).await?;
        ensure!(
            lease.subnet == wants.previous,
            "{} is given out although {text} is free and wanted again",
            lease.subnet
        );
    }
    let mut wants = request(4);
    wants.previous = DualStack::v4(subnet("10.6.0.0/26")?);
    let lease = acquire(&*store, &manager, &wants).await?;
    ensure!(
        lease.subnet == DualStack::v4(subnet("10.5.0.128/26")?),
        "{} is given out, which the config does not allow",
        lease.subnet
    );
    Ok(Verdict::Kept)
}

pub(super) async fn taken_previous_subnet_is_not_given(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    require!(manager.capabilities().allocates, "it does not allocate");
    let held = acquire(&*store, &manager, &request(1)).await?;
    let mut wants = request(2);
    wants.previous = held.subnet;
    let lease = acquire(&*store, &manager, &wants).await?;
    ensure!(
        !lease.subnet.overlaps(&held.subnet),
        "{} is given to a second node",
        lease.subnet
    );
    Ok(Verdict::Kept)
}

pub(super) async fn reserved_subnet_is_kept(fixture: &dyn ManagerFixture) -> Outcome {
    // Two of them, as one may be what the node would get anyway.
    for text in ["10.5.0.64/26", "10.5.0.192/26"] {
        let (store, manager) = store(fixture, POOL_OF_4).await?;
        require!(manager.capabilities().reserves, "it has no reservations");
        let kept = DualStack::v4(subnet(text)?);
        store.add_node(&node(9)).await;
        require!(
            store.reserve(&node(9), kept).await,
            "the fixture cannot reserve"
        );
        for n in [1, 9, 2, 9, 3] {
            let mut wants = request(n);
            wants.previous = if n == 9 { DualStack::default() } else { kept };
            let lease = acquire(&*store, &manager, &wants).await?;
            ensure!(
                (n == 9) == (lease.subnet == kept),
                "{text} is reserved for node 9, and node {n} gets {}",
                lease.subnet
            );
            let renewed = manager.renew_lease(&lease).await;
            let renewed = renewed.or_violation("a renewal is refused")?;
            ensure!(
                n != 9 || (lease.ttl, renewed.ttl) == (None, None),
                "the lease of a reservation expires"
            );
        }
        let fifth = try_acquire(&manager, &request(4)).await;
        ensure!(
            matches!(fifth, Err(Error::PoolExhausted { .. })),
            "a subnet is given out of a full pool: {fifth:?}"
        );
    }
    Ok(Verdict::Kept)
}

pub(super) async fn renew_publishes_attributes(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    let lease = acquire(&*store, &manager, &request(1)).await?;
    let mut changed = lease.clone();
    changed.attrs = attrs(2);
    let renewed = manager.renew_lease(&changed).await;
    let renewed = renewed.or_violation("a renewal is refused")?;
    ensure!(
        renewed.attrs == attrs(2),
        "renewing did not take the attributes"
    );
    ensure!(
        renewed.revision > lease.revision && renewed.created == lease.created,
        "renewing made of {lease:?} {renewed:?}"
    );
    let stored = records(&manager).await?;
    ensure!(
        stored.len() == 1 && stored.iter().all(|record| record.attrs == attrs(2)),
        "the store holds {stored:?}"
    );
    let again = manager.renew_lease(&renewed).await;
    again.or_violation("a second renewal is refused")?;
    Ok(Verdict::Kept)
}

pub(super) async fn renewal_extends_the_lease(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    require!(manager.capabilities().expires, "its leases do not expire");
    let mut lease = acquire(&*store, &manager, &request(1)).await?;
    let ttl = lease.ttl.or_violation("a lease has no time to live")?;
    for _ in 0..3 {
        require!(
            store.advance(ttl * 3 / 5).await,
            "the fixture cannot let time pass"
        );
        lease = manager
            .renew_lease(&lease)
            .await
            .or_violation("a renewal in time is refused")?;
    }
    store.advance(ttl * 3 / 5).await;
    let stored = records(&manager).await?;
    ensure!(
        stored.len() == 1,
        "the lease expired although it was renewed"
    );
    Ok(Verdict::Kept)
}

fn is_lost(result: &Result<Lease, Error>) -> bool {
    matches!(result, Err(Error::LeaseLost { .. }))
}

pub(super) async fn renewal_never_revives_a_lost_lease(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    let lease = acquire(&*store, &manager, &request(1)).await?;
    let released = manager.release_lease(&lease).await;
    released.or_violation("releasing is refused")?;
    let renewed = manager.renew_lease(&lease).await;
    ensure!(
        is_lost(&renewed),
        "a released lease is renewed: {renewed:?}"
    );
    let stored = records(&manager).await?;
    ensure!(stored.is_empty(), "a refused renewal left {stored:?}");

    // The subnet has another holder now, perhaps under the same key.
    let mut wants = request(2);
    wants.previous = lease.subnet;
    let other = acquire(&*store, &manager, &wants).await?;
    let renewed = manager.renew_lease(&lease).await;
    ensure!(is_lost(&renewed), "another's lease is renewed: {renewed:?}");
    let stored = records(&manager).await?;
    ensure!(
        stored
            .iter()
            .map(|record| (&record.node, &record.attrs))
            .eq([(&other.node, &other.attrs)]),
        "a refused renewal left {stored:?}"
    );

    if manager.capabilities().expires {
        let ttl = other.ttl.or_violation("a lease has no time to live")?;
        if store.advance(ttl + ttl / 5).await {
            let renewed = manager.renew_lease(&other).await;
            ensure!(
                is_lost(&renewed),
                "an expired lease is renewed: {renewed:?}"
            );
        }
    }
    Ok(Verdict::Kept)
}

pub(super) async fn stale_renewal_is_refused(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    let old = acquire(&*store, &manager, &request(1)).await?;
    let mut changed = old.clone();
    changed.attrs = attrs(2);
    let elsewhere = store.manager().await;
    let current = elsewhere.renew_lease(&changed).await;
    let current = current.or_violation("a renewal is refused")?;
    let renewed = manager.renew_lease(&old).await;
    ensure!(is_lost(&renewed), "a stale lease is renewed: {renewed:?}");
    let stored = records(&manager).await?;
    ensure!(
        stored
            .iter()
            .map(|record| (&record.attrs, record.revision))
            .eq([(&changed.attrs, current.revision)]),
        "a refused renewal left {stored:?}"
    );
    Ok(Verdict::Kept)
}

pub(super) async fn a_record_that_another_wrote_is_lost(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    let lease = acquire(&*store, &manager, &request(1)).await?;
    // As Go flannel renews: whatever is there, whosever it is.
    let mut others = lease.clone();
    (others.node, others.attrs) = (node(2), attrs(2));
    require!(
        store.write_raw(others).await,
        "the fixture cannot write records of others"
    );
    let renewed = manager.renew_lease(&lease).await;
    ensure!(is_lost(&renewed), "another's lease is renewed: {renewed:?}");
    let released = manager.release_lease(&lease).await;
    ensure!(
        matches!(released, Err(Error::LeaseLost { .. })),
        "releasing another's lease is answered {released:?}"
    );
    let stored = records(&manager).await?;
    ensure!(
        stored
            .iter()
            .map(|r| (&r.node, &r.attrs))
            .eq([(&node(2), &attrs(2))]),
        "what another wrote became {stored:?}"
    );
    let next = acquire(&*store, &manager, &request(1)).await?;
    ensure!(
        !next.subnet.overlaps(&lease.subnet),
        "{} is given out, which another holds now",
        next.subnet
    );
    Ok(Verdict::Kept)
}

pub(super) async fn release_frees_the_subnet(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_4).await?;
    require!(manager.capabilities().allocates, "it does not allocate");
    let mut leases = Vec::new();
    for n in 1..=4 {
        leases.push(acquire(&*store, &manager, &request(n)).await?);
    }
    for (n, lease) in (5..).zip(&leases) {
        let released = manager.release_lease(lease).await;
        released.or_violation("releasing is refused")?;
        let next = acquire(&*store, &manager, &request(n)).await?;
        ensure!(
            next.subnet == lease.subnet,
            "{} is given out, and only {} is free",
            next.subnet,
            lease.subnet
        );
    }
    Ok(Verdict::Kept)
}

pub(super) async fn release_is_idempotent(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    let lease = acquire(&*store, &manager, &request(1)).await?;
    let other = acquire(&*store, &manager, &request(2)).await?;
    for manager in [&manager, &manager, &store.manager().await] {
        let released = manager.release_lease(&lease).await;
        released.or_violation("releasing a lease, or one that is gone, is refused")?;
        let stored = records(manager).await?;
        ensure!(
            stored.iter().map(|record| &record.key).eq([&other.key]),
            "releasing left {stored:?}"
        );
    }
    Ok(Verdict::Kept)
}

pub(super) async fn release_of_anothers_lease_changes_nothing(
    fixture: &dyn ManagerFixture,
) -> Outcome {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    let old = acquire(&*store, &manager, &request(1)).await?;
    let mut changed = old.clone();
    changed.attrs = attrs(2);
    let current = manager.renew_lease(&changed).await;
    let current = current.or_violation("a renewal is refused")?;
    let released = manager.release_lease(&old).await;
    ensure!(
        matches!(released, Err(Error::LeaseLost { .. })),
        "releasing a lease that was written since is answered {released:?}"
    );
    let stored = records(&manager).await?;
    ensure!(
        stored
            .iter()
            .map(|record| record.revision)
            .eq([current.revision]),
        "a refused release left {stored:?}"
    );

    let released = manager.release_lease(&current).await;
    released.or_violation("releasing is refused")?;
    let mut wants = request(2);
    wants.previous = current.subnet;
    let other = acquire(&*store, &manager, &wants).await?;
    match manager.release_lease(&current).await {
        // The store may have another record for each node: then ours is gone.
        Ok(()) if other.key != current.key => {}
        Err(Error::LeaseLost { .. }) => {}
        other => {
            let reason = format!("releasing another's lease is answered {other:?}");
            return Err(Violation(reason));
        }
    }
    let renewed = manager.renew_lease(&other).await;
    renewed.or_violation("the new holder cannot renew after the old one's release")?;
    Ok(Verdict::Kept)
}

pub(super) async fn both_families_or_none(fixture: &dyn ManagerFixture) -> Outcome {
    let (store, manager) = store(fixture, LOPSIDED_POOL).await?;
    require!(manager.capabilities().allocates, "it does not allocate");
    let mut leases = Vec::new();
    for n in 1..=3 {
        let lease = acquire(&*store, &manager, &request(n)).await?;
        ensure!(
            lease.subnet.v4.is_some() && lease.subnet.v6.is_some(),
            "a dual-stack node got {}",
            lease.subnet
        );
        leases.push(lease);
    }
    ensure!(overlap(&leases).is_none(), "two nodes share a subnet");
    let fourth = try_acquire(&manager, &request(4)).await;
    ensure!(
        matches!(fourth, Err(Error::PoolExhausted { family: Family::V6 })),
        "a node is told {fourth:?} when only IPv4 is free"
    );
    let stored = records(&manager).await?;
    ensure!(
        stored.len() == 3 && stored.iter().all(|lease| lease.subnet.v6.is_some()),
        "a refused node left {stored:?}"
    );
    Ok(Verdict::Kept)
}
