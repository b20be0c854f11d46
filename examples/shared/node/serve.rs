//! The node at work: from the start of its overlay to its end.

use std::pin::pin;
use std::time::Duration;

use flannel::{
    ConditionStatus, Manager, NodeId, Overlay, OverlayEvent, Status, UnderlayOptions, VxlanBackend,
    error_chain,
};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};

use super::place::Place;
use super::tell::Teller;
use super::{Common, End, Error, Stop};

/// How long the store may take to release the lease at the end.
const RELEASE: Duration = Duration::from_secs(1);

/// How long peers are given to drop the node before what is ours goes.
const GRACE: Duration = Duration::from_millis(200);

/// Runs the node until it is to stop.
pub(crate) async fn serve(
    flags: &Common,
    node: NodeId,
    manager: impl Manager,
    underlay: UnderlayOptions,
    place: &mut Place,
    stop: &mut Stop,
) -> Result<(), End> {
    let failed = |error: Error| End::failed(error_chain(error.as_ref()));
    let overlay = Overlay::builder(node)
        .manager(manager)
        .backend(VxlanBackend::new())
        .kernel(place.kernel().map_err(failed)?)
        .underlay(underlay)
        .on_lease_lost(flags.loss_policy())
        .start()
        .await
        .map_err(|error| failed(error.into()))?;
    let was_ready = run(flags, &overlay, place, stop).await?;
    if !was_ready && stop.time_is_up() {
        let why = why_not_ready(&overlay.status());
        overlay.stop().await.ok();
        return Err(End::problem(format!("it did not get ready in time: {why}")));
    }
    if flags.teardown {
        return teardown(overlay).await.map_err(failed);
    }
    overlay.stop().await.map_err(|error| failed(error.into()))?;
    eprintln!("stopped; packets keep flowing");
    Ok(())
}

/// Tells what happens until it is to stop; answers whether the node was ready.
async fn run(
    flags: &Common,
    overlay: &Overlay,
    place: &mut Place,
    stop: &mut Stop,
) -> Result<bool, End> {
    let mut events = overlay.events();
    let mut teller = Teller::default();
    let mut ready = pin!(overlay.ready());
    let mut is_ready = false;
    let mut stopped = pin!(overlay.stopped());
    let mut asked = pin!(stop.asked());
    let mut tick = flags.status_every().map(|every| {
        let mut tick = interval_at(Instant::now() + every, every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick
    });
    let mut ticks = async || match &mut tick {
        Some(tick) => drop(tick.tick().await),
        None => std::future::pending().await,
    };
    loop {
        tokio::select! {
            biased;
            () = &mut asked => return Ok(is_ready),
            why = &mut stopped => return Err(End::failed(error_chain(&why))),
            event = events.recv() => {
                // One that was missed is not told.
                let Ok(event) = event else { continue };
                if is_ready && matches!(event, OverlayEvent::LeaseAcquired { .. }) {
                    make_pod(overlay, place)?;
                }
                if let Some(subnets) = teller.event(event) {
                    place.show_ping(&subnets);
                }
            }
            done = &mut ready, if !is_ready => {
                done.map_err(|error| End::failed(error_chain(&error)))?;
                is_ready = true;
                make_pod(overlay, place)?;
                teller.ready(overlay.node(), &overlay.status());
                for subnets in teller.peers() {
                    place.show_ping(subnets);
                }
            }
            () = ticks() => teller.status(&overlay.status()),
        }
    }
}

/// In a lab: a pod for the lease that is held now.
fn make_pod(overlay: &Overlay, place: &mut Place) -> Result<(), End> {
    let status = overlay.status();
    if let (Some(lease), Some(mtu)) = (&status.lease, status.mtu) {
        let made = place.make_pod(lease.subnet, mtu);
        made.map_err(|error| End::failed(error_chain(error.as_ref())))?;
    }
    Ok(())
}

/// Gives the lease up and removes what is ours; a store that does not answer does not keep the
/// rest from being removed.
async fn teardown(overlay: Overlay) -> Result<(), Error> {
    let released = match timeout(RELEASE, overlay.release()).await {
        Ok(released) => released.map_err(Error::from),
        Err(_) => Err(format!("the store did not answer within {RELEASE:?}").into()),
    };
    if released.is_ok() {
        sleep(GRACE).await;
    }
    overlay.teardown().await?;
    eprintln!("what was ours is removed");
    released.map_err(|error| {
        let why = error_chain(error.as_ref());
        format!("the lease is not released: {why}").into()
    })
}

/// The first condition that does not hold.
fn why_not_ready(status: &Status) -> String {
    let conditions = status.conditions.iter();
    let mut bad = conditions.filter(|condition| condition.status != ConditionStatus::True);
    bad.next().map_or_else(
        || "nothing is wrong yet".to_owned(),
        |condition| format!("{condition} {}", condition.message),
    )
}
