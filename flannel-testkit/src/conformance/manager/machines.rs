//! Machines behind node ids: two of one id, and one of two.

use std::future::poll_fn;
use std::sync::Arc;

use flannel_core::manager::Error;
use flannel_core::{DualStack, InstanceId, Lease, LeaseRequest, Manager};
use tokio::task::JoinHandle;

use super::tools::{
    OrViolation, POOL_OF_64, Watched, acquire, attrs, ensure, node, records, request, store,
    try_acquire,
};
use super::{ManagerFixture, Outcome, StoreFixture, Verdict, Violation};

/// The request of the n-th machine under a node id: its address is its own.
fn of_machine(id: u8, n: u8) -> LeaseRequest {
    LeaseRequest {
        instance: Some(InstanceId::from_bits(u128::from(n))),
        attrs: attrs(n),
        ..request(id)
    }
}

/// The verdict on a store that sees to machines itself.
const NO_INSTANCES: Verdict = Verdict::Skipped("it knows no instances");

/// A fresh store, and the first machine with its lease under the first node id; `None` where the
/// manager knows no instances.
async fn first_machine(
    fixture: &dyn ManagerFixture,
) -> Result<Option<(Box<dyn StoreFixture>, Arc<dyn Manager>, Lease)>, Violation> {
    let (store, manager) = store(fixture, POOL_OF_64).await?;
    if !manager.capabilities().knows_instances {
        return Ok(None);
    }
    let lease = acquire(&*store, &manager, &of_machine(1, 1)).await?;
    Ok(Some((store, manager, lease)))
}

/// A machine that lives: it follows the store until this is dropped.
struct Living(JoinHandle<()>);

impl Living {
    /// Begins to follow, and has when this returns.
    async fn new(manager: &Arc<dyn Manager>) -> Result<Self, Violation> {
        let mut stream = Watched::begin(manager).await?.into_stream();
        Ok(Self(tokio::spawn(async move {
            while poll_fn(|cx| stream.as_mut().poll_next(cx)).await.is_some() {}
        })))
    }

    /// The machine dies.
    async fn die(self) {
        self.0.abort();
        self.0.await.ok();
    }
}

pub(super) async fn a_node_id_in_use_is_refused(fixture: &dyn ManagerFixture) -> Outcome {
    let Some((store, first, lease)) = first_machine(fixture).await? else {
        return Ok(NO_INSTANCES);
    };
    let living = Living::new(&first).await?;
    let second = store.manager().await;
    let refused = try_acquire(&second, &of_machine(1, 2)).await;
    ensure!(
        matches!(&refused, Err(Error::NodeIdHeld { node: held, public_ip })
            if *held == node(1) && *public_ip == attrs(1).public_ip),
        "the second machine of a node id is told {refused:?}"
    );
    let renewed = first.renew_lease(&lease).await;
    let renewed = renewed.or_violation("the lease of the first is lost")?;
    living.die().await;
    let taken = acquire(&*store, &second, &of_machine(1, 2)).await?;
    ensure!(
        taken.subnet == lease.subnet,
        "{} became {}",
        lease.subnet,
        taken.subnet
    );
    let lost = first.renew_lease(&renewed).await;
    ensure!(
        matches!(lost, Err(Error::LeaseLost { .. })),
        "the first machine renews what the second has: {lost:?}"
    );
    Ok(Verdict::Kept)
}

pub(super) async fn a_node_id_is_taken_over_on_request(fixture: &dyn ManagerFixture) -> Outcome {
    let Some((store, first, lease)) = first_machine(fixture).await? else {
        return Ok(NO_INSTANCES);
    };
    let first_lives = Living::new(&first).await?;
    let second = store.manager().await;
    let wants = LeaseRequest {
        take_over: true,
        ..of_machine(1, 2)
    };
    let taken = acquire(&*store, &second, &wants).await?;
    ensure!(taken.subnet == lease.subnet, "the subnet is another");
    let second_lives = Living::new(&second).await?;
    let lost = first.renew_lease(&lease).await;
    ensure!(
        matches!(lost, Err(Error::LeaseLost { .. })),
        "the first machine renews what the second has: {lost:?}"
    );
    // And does not take it back.
    let refused = try_acquire(&first, &of_machine(1, 1)).await;
    ensure!(
        matches!(&refused, Err(Error::NodeIdHeld { public_ip, .. })
            if *public_ip == attrs(2).public_ip),
        "the first machine is told {refused:?}"
    );
    first_lives.die().await;
    second_lives.die().await;
    Ok(Verdict::Kept)
}

pub(super) async fn the_same_machine_keeps_its_lease(fixture: &dyn ManagerFixture) -> Outcome {
    let Some((store, first, lease)) = first_machine(fixture).await? else {
        return Ok(NO_INSTANCES);
    };
    // An earlier run of it may still follow the store.
    let living = Living::new(&first).await?;
    let moved = LeaseRequest {
        attrs: attrs(2),
        ..of_machine(1, 1)
    };
    let forgetful = LeaseRequest {
        instance: Some(InstanceId::from_bits(3)),
        ..moved.clone()
    };
    for (what, wants) in [("at another address", moved), ("without state", forgetful)] {
        let again = acquire(&*store, &store.manager().await, &wants).await?;
        ensure!(
            again.key == lease.key && again.created == lease.created,
            "{what} it has {} instead of {}",
            again.key,
            lease.key
        );
    }
    living.die().await;
    Ok(Verdict::Kept)
}

pub(super) async fn a_renamed_machine_keeps_its_subnet(fixture: &dyn ManagerFixture) -> Outcome {
    let Some((store, manager, lease)) = first_machine(fixture).await? else {
        return Ok(NO_INSTANCES);
    };
    let forgetful = LeaseRequest {
        instance: Some(InstanceId::from_bits(9)),
        ..of_machine(3, 1)
    };
    for (what, wants) in [("with", of_machine(2, 1)), ("without", forgetful)] {
        let manager = store.manager().await;
        let renamed = acquire(&*store, &manager, &wants).await?;
        ensure!(
            renamed.key == lease.key && renamed.created == lease.created,
            "{what} its state it has {} instead of {}",
            renamed.key,
            lease.key
        );
        let records = records(&manager).await?;
        let nodes: Vec<_> = records.iter().map(|lease| &lease.node).collect();
        ensure!(nodes == [&wants.node], "there are records of {nodes:?}");
    }
    // The former name is free again.
    let other = acquire(&*store, &manager, &of_machine(1, 5)).await?;
    ensure!(
        !other.subnet.overlaps(&lease.subnet),
        "{} is given out twice",
        lease.subnet
    );
    Ok(Verdict::Kept)
}

pub(super) async fn a_copy_of_a_living_node_takes_nothing(fixture: &dyn ManagerFixture) -> Outcome {
    let Some((store, first, lease)) = first_machine(fixture).await? else {
        return Ok(NO_INSTANCES);
    };
    let living = Living::new(&first).await?;
    let copy = LeaseRequest {
        attrs: attrs(1),
        previous: DualStack::default(),
        ..of_machine(2, 2)
    };
    let other = acquire(&*store, &store.manager().await, &copy).await?;
    ensure!(
        !other.subnet.overlaps(&lease.subnet),
        "{} was taken by a copy",
        lease.subnet
    );
    let renewed = first.renew_lease(&lease).await;
    ensure!(renewed.is_ok(), "the lease is lost: {renewed:?}");
    living.die().await;
    Ok(Verdict::Kept)
}
