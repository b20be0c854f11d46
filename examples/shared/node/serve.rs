//! The node at work: from the start of its overlay to its end.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::pin::pin;
use std::time::Duration;

use flannel::{
    HostGwBackend, Manager, NodeId, Overlay, OverlayEvent, Status, UdpBackend, UnderlayOptions,
    VxlanBackend, WithTunnels, error_chain,
};
use tokio::net::UnixListener;
use tokio::task::block_in_place;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};

use super::place::Place;
use super::tell::Teller;
use super::{Common, End, Error, Stop};

/// How long the store may take to release the lease at the end.
const RELEASE: Duration = Duration::from_secs(1);

/// How long peers are given to drop the node before what is ours goes.
const GRACE: Duration = Duration::from_millis(200);

/// Why the node no longer runs.
enum Over {
    /// It was asked to stop.
    Asked { was_ready: bool },
    /// Another process is to be the node.
    Another(UnixStream),
    /// Another process is the node.
    Replaced,
}

/// Runs the node until it is to stop.
pub(crate) async fn serve<M: Manager + Clone>(
    flags: &Common,
    node: NodeId,
    manager: M,
    underlay: UnderlayOptions,
    place: &mut Place,
    stop: &mut Stop,
) -> Result<(), End> {
    let failed = |error: Error| End::failed(error_chain(error.as_ref()));
    let mut listener = None;
    loop {
        let kernel = place.kernel().map_err(failed)?;
        let overlay = Overlay::builder(node.clone())
            .manager(manager.clone())
            .backend(VxlanBackend::new())
            .backend(HostGwBackend::new())
            .backend(UdpBackend::new())
            .kernel(WithTunnels::new(kernel, place.paths.forwarders.clone()))
            .underlay(underlay.clone())
            .on_lease_lost(flags.loss_policy())
            .take_over(flags.take_over)
            .replace_running(place.paths.replaces)
            .start()
            .await
            .map_err(|error| failed(error.into()))?;
        match run(flags, &overlay, place, stop, &mut listener).await {
            Ok(Over::Another(stream)) => {
                overlay.stop().await.map_err(|error| failed(error.into()))?;
                match block_in_place(|| place.paths.hand_over(&stream)) {
                    Ok(()) => {
                        place.let_go();
                        eprintln!("stopped; another process is the node now");
                        return Ok(());
                    }
                    Err(error) => eprintln!("not handed over: {}", error_chain(&error)),
                }
            }
            Ok(Over::Replaced) => {
                // Nobody keeps a packet path of ours: that process makes its own.
                place.let_go();
                eprintln!("stopped; another process is the node now");
                return Ok(());
            }
            Ok(Over::Asked { was_ready }) => {
                if !was_ready && stop.time_is_up() {
                    let why = why_not_ready(&overlay.status());
                    overlay.stop().await.ok();
                    return Err(End::problem(format!("it did not get ready in time: {why}")));
                }
                if flags.teardown {
                    let removed = teardown(overlay).await.map_err(failed);
                    place.paths.forget();
                    return removed;
                }
                return leave(flags, overlay, place).await.map_err(failed);
            }
            Err(end) => {
                // What it ended of is what is told.
                leave(flags, overlay, place).await.ok();
                return Err(end);
            }
        }
    }
}

/// Sees that packets flow when this process has ended, or that nothing is left of their path.
async fn leave(flags: &Common, overlay: Overlay, place: &mut Place) -> Result<(), Error> {
    if flags.release_path {
        let removed = overlay.teardown().await;
        place.paths.forget();
        removed?;
        eprintln!("stopped; nothing of the packet path is left, and the lease is kept");
        return Ok(());
    }
    let stopped = overlay.stop().await;
    if place.paths.are_needed() {
        match block_in_place(|| place.paths.leave_to_keeper()) {
            Ok(id) => eprintln!(
                "stopped; packets keep flowing: process {id} carries them for {:?} at most, and \
                 `kill {id}` ends it",
                flags.hold_for()
            ),
            Err(error) => eprintln!(
                "stopped, and so are the packets: {}",
                error_chain(error.as_ref())
            ),
        }
    } else {
        place.paths.leave();
        eprintln!("stopped; packets keep flowing");
    }
    Ok(stopped?)
}

/// Tells what happens until it is to stop.
async fn run(
    flags: &Common,
    overlay: &Overlay,
    place: &mut Place,
    stop: &mut Stop,
    listener: &mut Option<UnixListener>,
) -> Result<Over, End> {
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
    let limit = flags.ready_within();
    let mut late = pin!(async {
        match limit {
            Some(limit) => sleep(limit).await,
            None => std::future::pending().await,
        }
    });
    let mut ticks = async || match &mut tick {
        Some(tick) => drop(tick.tick().await),
        None => std::future::pending().await,
    };
    loop {
        tokio::select! {
            biased;
            () = &mut asked => return Ok(Over::Asked { was_ready: is_ready }),
            why = &mut stopped => return match why {
                flannel::Error::HandedOver { .. } => Ok(Over::Replaced),
                why => Err(End::failed(error_chain(&why))),
            },
            stream = accept(listener.as_ref()) => {
                // Where there is neither, the next process asks our overlay.
                if place.paths.are_needed() || place.is_held() && is_waiting(&stream) {
                    return Ok(Over::Another(stream));
                }
            }
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
            () = &mut late, if !is_ready => {
                let why = why_not_ready(&overlay.status());
                return Err(End::problem(format!("it did not get ready in time: {why}")));
            }
            done = &mut ready, if !is_ready => {
                done.map_err(|error| End::failed(error_chain(&error)))?;
                is_ready = true;
                make_pod(overlay, place)?;
                listen(place, listener);
                teller.ready(overlay.node(), &overlay.status());
                for subnets in teller.peers() {
                    place.show_ping(subnets);
                }
            }
            () = ticks() => teller.status(&overlay.status()),
        }
        listen(place, listener);
    }
}

/// Listens for the next process, if there is a packet path now that there was not before.
fn listen(place: &mut Place, listener: &mut Option<UnixListener>) {
    match place.paths.listen() {
        Ok(Some(new)) => *listener = Some(new),
        Ok(None) => {}
        Err(error) => tracing::error!("the packet path cannot be handed over: {error}"),
    }
}

/// The next process that asks to be the node.
async fn accept(listener: Option<&UnixListener>) -> UnixStream {
    if let Some(listener) = listener
        && let Ok((stream, _)) = listener.accept().await
        && let Ok(stream) = stream.into_std()
    {
        return stream;
    }
    // It is heard of by the next that asks, if at all.
    std::future::pending().await
}

/// Tells if the other end is still there: who only looks if anybody listens is not to be the node.
fn is_waiting(mut stream: &UnixStream) -> bool {
    let read = stream.read(&mut [0]);
    read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
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
    status.obstacle().map_or_else(
        || "nothing is wrong yet".to_owned(),
        |condition| format!("{condition} {}", condition.message),
    )
}
