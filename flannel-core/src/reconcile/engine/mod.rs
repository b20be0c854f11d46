//! The engine: one task that owns an overlay's state and drives it towards what is wanted.
//!
//! Level-triggered throughout: whatever happens only changes what is known, and [`Engine::drive`]
//! then does what follows from what is known. At most one call to the store is under way; calls to
//! the kernel are short and have deadlines of their own.

mod burst;
mod claim;
mod config;
mod data_path;
mod host_checks;
mod interface;
mod known;
mod lists;
mod local;
mod memory;
mod report;
mod store;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::net::IpAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot, watch as watch_channel};
use tokio::task::JoinHandle;

use self::burst::Burst;
use self::claim::asked_of;
use self::host_checks::HostChecks;
use self::lists::Lists;
use self::local::{Inputs, ended_of};
use self::memory::{Memory, written};
use self::store::{Call, LeaseState, answer_of};
use self::watch::Watch;
use crate::backend::{self, Backend, Network, Note};
use crate::backoff::Backoff;
use crate::claim::{Claim, Claimant};
use crate::clock::{Moment, Rng};
use crate::condition::{Condition, ConditionStatus, ConditionType, Conditions};
use crate::config::NetworkConfig;
use crate::family::Family;
use crate::farewell::Ended;
use crate::keeper::Wish;
use crate::kernel::{self, ChangeStream, Features};
use crate::lease::{BackendType, LeaseAttrs};
use crate::lease_set::LeaseSet;
use crate::node::InstanceId;
use crate::overlay::{Error, Parts};
use crate::reconcile::desired::Compiler;
use crate::reconcile::known::KnownLink;
use crate::reconcile::plan::Plan;
use crate::reconcile::reconciler::Reconciler;
use crate::state::SavedState;
use crate::status::{OverlayEvent, Status};
use crate::subnet::Subnet;
use crate::underlay::in_use::InUse;
use crate::underlay::{self, External, Underlay, UnderlayOptions};

/// How many rounds of read, plan and apply may follow one another before other things get a turn.
const ROUNDS: usize = 8;

/// How many events of the store, or notifications of the kernel, are taken together.
const BATCH: usize = 4096;

/// The longest sleep: tokio's clock stands still while the machine sleeps, so that what the
/// overlay's own clock says is looked at this often.
const LONGEST_SLEEP: Duration = Duration::from_secs(15);

/// The shortest sleep: what is due and cannot be done must not keep a processor busy.
const SHORTEST_SLEEP: Duration = Duration::from_millis(1);

/// How long the store is given to answer before a remembered lease is used.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long the devices of a former backend stay after the last peer has followed: it publishes the
/// new type when its own routes are right, but another program may do it before.
const LINGER: Duration = Duration::from_secs(30);

/// How many networks of earlier configs are remembered.
const NETWORKS: usize = 16;

/// What a host program asks.
#[derive(Debug)]
pub(crate) enum Command {
    Plan(oneshot::Sender<Result<Plan, Error>>),
    TeardownPlan(oneshot::Sender<Result<Plan, Error>>),
    Resync(oneshot::Sender<()>),
    Interface(UnderlayOptions, oneshot::Sender<underlay::Result<()>>),
    Reacquire(oneshot::Sender<()>),
    Release(oneshot::Sender<Result<(), Error>>),
    Stop(oneshot::Sender<()>),
    Teardown(oneshot::Sender<Result<(), Error>>),
}

/// One overlay's state.
#[derive(Debug)]
pub(crate) struct Engine {
    parts: Parts,
    status: watch_channel::Sender<Arc<Status>>,
    events: broadcast::Sender<OverlayEvent>,
    conditions: Conditions,
    retry: Backoff,
    /// The right to be this overlay. Without it nothing is changed.
    claim: Option<Claim>,
    /// Whom it was handed over to.
    handed_to: Option<Claimant>,

    saved: SavedState,
    memory: Memory,
    /// The note on a saved state that could not be read.
    state_note: Option<Note>,
    /// Whether the saved lease and config may be used: the store has failed to answer.
    store_is_down: bool,
    started: Moment,

    features: Option<Features>,
    /// Devices that are ours whatever becomes of their alias.
    known: Vec<KnownLink>,
    features_at: Moment,
    features_failures: u32,
    config: Option<Arc<NetworkConfig>>,
    /// The config is the saved one; the store's is still wanted.
    config_is_saved: bool,
    /// The store's config cannot be used; the last good one, if any, stays in force.
    config_refused: bool,
    /// A config of the store that the backend refused, to be tried again.
    untried: Option<NetworkConfig>,
    networks: Vec<Subnet>,
    external: Option<External>,
    in_use: InUse,
    /// The addresses of the host that connections to the store may be bound to.
    addresses: BTreeSet<IpAddr>,
    /// The families of those that have gone, until others come.
    gone: BTreeSet<Family>,
    /// The interface that was in use before, and why it is no more, in words.
    moved: String,
    /// The families without an address on the interface, and why.
    lacking: Vec<(Family, underlay::Error)>,
    underlay: Arc<Underlay>,
    backend: Option<Arc<dyn Backend>>,
    attrs: Option<LeaseAttrs>,
    /// The machine that we are.
    instance: InstanceId,
    lease: LeaseState,
    /// A lease is to be asked for, whatever is held.
    acquire: bool,
    /// When a lease was last lost, and how often in short succession.
    lost: Option<(Moment, u32)>,
    /// How often in a row the store gave a lease that the config does not allow.
    misfits: u32,
    network: Option<Arc<dyn Network>>,
    inputs: Option<Inputs>,
    /// The backend could not make a network the last time it was asked.
    register_failed: bool,

    leases: LeaseSet,
    compiler: Compiler,
    reconciler: Reconciler,
    host_checks: HostChecks,
    ready: bool,
    working: bool,
    lists: Lists,

    call: Option<Call>,
    call_at: Moment,
    call_failures: u32,
    release: Option<oneshot::Sender<Result<(), Error>>>,
    watch: Watch,
    watch_at: Moment,
    watch_failures: u32,
    /// The watch's last word was an error.
    watch_broken: bool,
    /// The next snapshot confirms or refutes one that was held.
    confirming: bool,
    confirm_at: Option<Moment>,
    /// Deletes of peers' records that are judged together.
    burst: Burst,
    /// Our lease ended while the store was not heard: those of others may have, too, and they will be
    /// back as we will.
    doubting: bool,
    adopted: bool,
    resync_at: Moment,
    resyncs: Vec<oneshot::Sender<()>>,
    /// Why the engine is to stop by itself.
    stopping: Option<String>,
    config_poll_at: Option<Moment>,

    /// The backends other than ours to whose devices peers may send, and until when.
    former: BTreeMap<BackendType, Moment>,

    /// The userspace data path, where the backend has one.
    data_path: Option<JoinHandle<backend::Result<()>>>,
    data_path_at: Option<Moment>,
    data_path_failures: u32,
    peers: watch_channel::Sender<Arc<LeaseSet>>,
    peers_changed: bool,
}

impl Engine {
    pub(crate) fn new(
        mut parts: Parts,
        status: watch_channel::Sender<Arc<Status>>,
        events: broadcast::Sender<OverlayEvent>,
    ) -> Self {
        let now = parts.clock.now();
        let options = parts.options.clone();
        let reconciler = Reconciler::new(
            Arc::clone(&parts.kernel),
            Arc::clone(&parts.clock),
            Rng::new(parts.rng.next_u64()),
            events.clone(),
        );
        let leases = LeaseSet::new(options.guard);
        Self {
            status,
            events,
            conditions: Conditions::new(now),
            retry: options.keeper.retry,
            claim: None,
            handed_to: None,
            saved: SavedState::default(),
            memory: Memory::default(),
            state_note: None,
            store_is_down: false,
            started: now,
            features: None,
            known: Vec::new(),
            features_at: now,
            features_failures: 0,
            config: None,
            config_is_saved: false,
            config_refused: false,
            untried: None,
            networks: Vec::new(),
            external: None,
            addresses: BTreeSet::new(),
            gone: BTreeSet::new(),
            in_use: InUse::new(options.underlay),
            moved: String::new(),
            lacking: Vec::new(),
            underlay: Arc::default(),
            backend: None,
            attrs: None,
            instance: parts.instance.unwrap_or(parts.fresh_instance),
            lease: LeaseState::None,
            acquire: false,
            lost: None,
            misfits: 0,
            network: None,
            inputs: None,
            register_failed: false,
            compiler: Compiler::new(parts.name.clone(), options.protocol),
            peers: watch_channel::Sender::new(Arc::new(LeaseSet::default())),
            leases,
            reconciler,
            host_checks: HostChecks::new(now),
            ready: false,
            working: false,
            lists: Lists::default(),
            call: None,
            call_at: now,
            call_failures: 0,
            release: None,
            watch: Watch(None),
            watch_at: now,
            watch_failures: 0,
            watch_broken: false,
            confirming: false,
            confirm_at: None,
            burst: Burst::default(),
            doubting: false,
            adopted: false,
            resync_at: now,
            resyncs: Vec::new(),
            stopping: None,
            config_poll_at: None,
            former: BTreeMap::new(),
            data_path: None,
            data_path_at: None,
            data_path_failures: 0,
            peers_changed: false,
            parts,
        }
    }

    /// Runs until told to stop; answers why it stopped.
    pub(crate) async fn run(&mut self, commands: mpsc::Receiver<Command>) -> Ended {
        let reason = self.work(commands).await;
        self.claim = None;
        Ended {
            reason,
            to: self.handed_to,
        }
    }

    async fn work(&mut self, mut commands: mpsc::Receiver<Command>) -> String {
        self.load().await;
        let early = match self.claim(&mut commands).await {
            Ok(early) => early,
            Err(reason) => return reason,
        };
        // Which machine this is, is kept before anybody hears of it.
        self.save().await;
        for command in early {
            if let Some(reason) = self.command(command).await {
                return reason;
            }
        }
        let mut changes = self.parts.kernel.changes();
        let mut is_idle = false;
        loop {
            if !std::mem::take(&mut is_idle)
                && let Some(reason) = self.drive().await
            {
                return reason;
            }
            let sleep = self
                .next_wake()
                .since(self.now())
                .clamp(SHORTEST_SLEEP, LONGEST_SLEEP);
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    None => return "its handle was dropped".to_owned(),
                    Some(command) => {
                        if let Some(reason) = self.command(command).await {
                            return reason;
                        }
                    }
                },
                by = asked_of(&mut self.claim) => return self.hand_over(by),
                answer = answer_of(&mut self.call) => self.answered(answer).await,
                written = written(&mut self.memory) => self.written(written),
                ended = ended_of(&mut self.data_path) => self.data_path_ended(ended),
                batch = self.watch.next() => is_idle = self.watched(batch).await,
                told = next_changes(&mut changes) => {
                    self.host_told(&told);
                    let (desired, ownership) = (self.compiler.desired(), self.ownership());
                    is_idle = !self.reconciler.told(told, desired, &ownership);
                }
                read = self.reconciler.aside().done() => {
                    let ownership = self.ownership();
                    self.reconciler.aside_done(read, self.compiler.desired(), &ownership);
                }
                () = tokio::time::sleep(sleep) => {}
            }
        }
    }

    fn now(&self) -> Moment {
        self.parts.clock.now()
    }

    fn emit(&self, event: OverlayEvent) {
        self.events.send(event).ok();
    }

    fn condition(
        &mut self,
        kind: ConditionType,
        status: ConditionStatus,
        reason: &str,
        message: impl Into<String>,
        permanent: bool,
    ) {
        let condition = Condition {
            kind,
            status,
            reason: reason.to_owned(),
            message: message.into(),
            permanent,
            since: self.now(),
        };
        if let Some(condition) = self.conditions.set(condition) {
            let message = &condition.message;
            tracing::info!(%kind, %status, reason, message, "condition");
            let condition = condition.clone();
            self.emit(OverlayEvent::Condition(condition));
        }
    }

    fn holds(&mut self, kind: ConditionType, reason: &str, message: impl Into<String>) {
        self.condition(kind, ConditionStatus::True, reason, message, false);
    }

    fn fails(
        &mut self,
        kind: ConditionType,
        reason: &str,
        message: impl Into<String>,
        permanent: bool,
    ) {
        self.condition(kind, ConditionStatus::False, reason, message, permanent);
    }

    /// Does what follows from what is known. Answers why to stop, if to stop.
    async fn drive(&mut self) -> Option<String> {
        self.probe().await;
        self.use_saved().await;
        self.end_burst();
        if self.now() >= self.resync_at {
            self.schedule_resync();
            self.retry_config().await;
            self.reconciler.read_aside();
            self.host_checks.hint(self.now());
        }
        self.reconciler.wake();
        let mut ownership = self.ownership();
        let desired = self.compiler.desired();
        self.reconciler.look_at_settings(desired, &ownership).await;
        for _ in 0..ROUNDS {
            let desired = self.compiler.desired();
            self.reconciler.read_if_due(desired, &ownership).await;
            self.know_devices();
            self.follow_host();
            if self.in_use.to_save() != self.saved.interface {
                self.save().await;
            }
            self.find_attrs();
            self.register().await;
            ownership = self.ownership();
            self.follow_hold();
            if !self
                .reconciler
                .round(self.compiler.desired(), &ownership)
                .await
            {
                break;
            }
        }
        self.keep_lease();
        self.start_call();
        self.open_watch();
        self.run_data_path();
        self.check_host().await;
        if self.known != self.saved.devices {
            self.save().await;
        }
        self.save_again();
        self.publish();
        for done in self.resyncs.drain(..) {
            done.send(()).ok();
        }
        self.stopping.take()
    }

    /// Hints can be lost, so everything is read now and then: more often where reading is cheap,
    /// and for half a percent of a processor at most.
    fn schedule_resync(&mut self) {
        let affordable = self.reconciler.read_cost() * 200;
        let adapted = affordable.clamp(Duration::from_secs(10), Duration::from_secs(60));
        let interval = self.parts.options.resync.unwrap_or(adapted);
        let jitter = self.parts.rng.below(interval / 5);
        self.resync_at = self.now() + (interval - interval / 10 + jitter);
    }

    fn next_wake(&self) -> Moment {
        let lease = match &self.lease {
            LeaseState::Held { keeper, .. } => match keeper.wish(self.now()) {
                Wish::Wait(until) => until,
                Wish::Renew | Wish::Expired if self.call.is_none() => Some(self.call_at),
                Wish::Renew | Wish::Expired => keeper.deadline(),
            },
            _ => None,
        };
        let call = (self.call.is_none() && self.wants_call()).then_some(self.call_at);
        let patience = (!self.store_is_down && self.lease.lease().is_none())
            .then_some(self.started + PATIENCE);
        let can_watch = self.lease.lease().is_some() && self.reconciler.observed().is_some();
        let watch = (self.watch.0.is_none() && can_watch).then_some(self.watch_at);
        let features = self.features.is_none().then_some(self.features_at);
        let now = self.now();
        [
            Some(self.resync_at),
            self.reconciler.next_wake(),
            lease,
            call,
            patience.filter(|at| *at > now),
            watch,
            features,
            self.confirm_at,
            self.burst.due(),
            self.in_use.look_at(),
            self.config_poll_at.filter(|_| self.call.is_none()),
            self.data_path_at,
            self.host_check_at(),
            self.lists.due,
            self.memory.due,
            self.former.values().min().copied(),
        ]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or(self.resync_at)
    }

    /// Does what the host program asks. Answers why to stop, if to stop.
    async fn command(&mut self, command: Command) -> Option<String> {
        let ownership = self.ownership();
        match command {
            Command::Plan(reply) => {
                let plan = self
                    .reconciler
                    .dry_run(self.compiler.desired(), &ownership)
                    .await;
                reply.send(plan.map_err(Error::from)).ok();
            }
            Command::TeardownPlan(reply) => {
                let plan = self
                    .reconciler
                    .dry_teardown(self.compiler.desired(), &ownership)
                    .await;
                reply.send(plan.map_err(Error::from)).ok();
            }
            Command::Resync(reply) => {
                self.reconciler.read_now();
                self.reconciler.retry_now();
                self.resyncs.push(reply);
            }
            Command::Interface(options, reply) => {
                reply.send(self.ask_for_interface(options)).ok();
            }
            Command::Reacquire(reply) => {
                self.acquire = true;
                self.call_at = self.now();
                if let LeaseState::Released { lease } = &self.lease {
                    self.lease = LeaseState::Lost {
                        lease: lease.clone(),
                    };
                }
                reply.send(()).ok();
            }
            Command::Release(reply) => {
                self.release = Some(reply);
                self.call = None;
                self.call_at = self.now();
            }
            Command::Stop(reply) => {
                self.stop_data_path();
                self.save_at_last().await;
                self.claim = None;
                reply.send(()).ok();
                return Some("it was asked to".to_owned());
            }
            Command::Teardown(reply) => {
                self.stop_data_path();
                let done = self
                    .reconciler
                    .teardown(self.compiler.desired(), &ownership)
                    .await;
                let done = match done {
                    Ok(failed) if failed.is_empty() => Ok(()),
                    Ok(failed) => Err(Error::Teardown { failed }),
                    Err(error) => Err(Error::Kernel(error)),
                };
                self.claim = None;
                reply.send(done).ok();
                return Some("it was torn down".to_owned());
            }
        }
        None
    }
}

/// Waits for a notification of the kernel, then takes all that are there.
async fn next_changes(changes: &mut ChangeStream) -> Vec<kernel::Change> {
    let mut all = Vec::new();
    poll_fn(|cx| {
        while all.len() < BATCH {
            match changes.as_mut().poll_next(cx) {
                Poll::Ready(Some(change)) => all.push(change),
                // A kernel that tells nothing any more leaves the timer.
                Poll::Ready(None) | Poll::Pending if all.is_empty() => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(())
    })
    .await;
    all
}
