//! [`Overlay`]: the parts put together, and the handle by which a host program holds them.

use std::fmt::Debug;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tracing::Instrument;

use crate::backend::Backend;
use crate::claim::Claimant;
use crate::clock::{Clock, Moment, Rng, TokioClock};
use crate::condition::{Condition, ConditionStatus, ConditionType};
use crate::family::Family;
use crate::farewell::{Ended, Farewell};
use crate::host_facts::{HostFacts, Questions};
use crate::keeper::{KeeperOptions, LossPolicy};
use crate::kernel::{self, Features, Kernel};
use crate::lease_set::WithdrawalGuard;
use crate::manager::{self, Manager};
use crate::node::{InstanceId, NodeId, OverlayName};
use crate::object::RouteProtocol;
use crate::reconcile::engine::{Command, Engine};
use crate::reconcile::plan::Plan;
use crate::runtime::runtime_fault;
use crate::state::StateStore;
use crate::status::{OverlayEvent, Status};
use crate::tun_fault::TunFault;
use crate::underlay::{self, UnderlayOptions};

/// Why an overlay cannot be started, or did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A part was not given to the builder.
    #[error("the overlay has no {part}: call Overlay::builder(..).{part}(..)")]
    Missing {
        /// The part.
        part: &'static str,
    },
    /// Two backends of one type were given.
    #[error("there are two backends of type {backend_type}")]
    Duplicate {
        /// Their type.
        backend_type: String,
    },
    /// The overlay does not work, and says why: nothing but a change from outside can help, or the
    /// time for it is over. It goes on trying.
    #[error("{}: {}", .0.reason, .0.message)]
    NotReady(Condition),
    /// The overlay has stopped.
    #[error("the overlay has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
    /// Another process has asked for the overlay and is it now.
    #[error("the overlay was handed over to {to}")]
    HandedOver {
        /// The one that asked.
        to: Claimant,
    },
    /// The kernel refused.
    #[error("the kernel refused")]
    Kernel(#[from] kernel::Error),
    /// The store refused.
    #[error("the store refused")]
    Manager(#[from] manager::Error),
    /// The tokio runtime lacks what an overlay needs, or there is none.
    #[error("{reason}")]
    Runtime {
        /// The thing that is missing, and the way to have it.
        reason: &'static str,
    },
    /// No interface of the host is the one that was asked for; the one in use stays.
    #[error("the interface in use stays")]
    Interface(#[from] underlay::Error),
    /// Some objects could not be removed.
    #[error("{} objects could not be removed, the first: {}", .failed.len(), .failed.first().map_or("", String::as_str))]
    Teardown {
        /// What could not be removed, and what the kernel said.
        failed: Vec<String>,
    },
}

/// Everything an [`Engine`] needs.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) name: OverlayName,
    pub(crate) node: NodeId,
    pub(crate) manager: Arc<dyn Manager>,
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) backends: Vec<Arc<dyn Backend>>,
    pub(crate) state: Option<Arc<dyn StateStore>>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) rng: Rng,
    /// The machine, if the host program says which it is.
    pub(crate) instance: Option<InstanceId>,
    /// An instance that nothing else has, for a machine that has none yet, or another's.
    pub(crate) fresh_instance: InstanceId,
    pub(crate) options: Options,
}

/// The settings of an overlay.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) underlay: UnderlayOptions,
    pub(crate) protocol: RouteProtocol,
    pub(crate) adopt_flannel: bool,
    pub(crate) on_lease_lost: LossPolicy,
    pub(crate) keeper: KeeperOptions,
    pub(crate) guard: WithdrawalGuard,
    pub(crate) withdrawal_grace: Duration,
    pub(crate) resync: Option<Duration>,
    pub(crate) take_over: bool,
    pub(crate) replace_running: bool,
    pub(crate) call_timeout: Duration,
}

/// Assembles an [`Overlay`]. Nothing happens before [`start`](Self::start).
#[derive(Debug)]
pub struct OverlayBuilder {
    name: OverlayName,
    node: NodeId,
    manager: Option<Arc<dyn Manager>>,
    kernel: Option<Arc<dyn Kernel>>,
    backends: Vec<Arc<dyn Backend>>,
    state: Option<Arc<dyn StateStore>>,
    clock: Option<Arc<dyn Clock>>,
    seed: Option<u64>,
    instance: Option<InstanceId>,
    options: Options,
}

impl OverlayBuilder {
    fn new(node: NodeId) -> Self {
        Self {
            name: OverlayName::default(),
            node,
            manager: None,
            kernel: None,
            backends: Vec::new(),
            state: None,
            clock: None,
            seed: None,
            instance: None,
            options: Options {
                underlay: UnderlayOptions::default(),
                protocol: RouteProtocol::OURS,
                adopt_flannel: true,
                on_lease_lost: LossPolicy::default(),
                keeper: KeeperOptions::default(),
                guard: WithdrawalGuard::default(),
                withdrawal_grace: Duration::from_secs(10),
                resync: None,
                take_over: false,
                replace_running: false,
                call_timeout: Duration::from_secs(30),
            },
        }
    }

    /// The subnet manager.
    #[must_use]
    pub fn manager(self, manager: impl Manager) -> Self {
        self.shared_manager(Arc::new(manager))
    }

    /// The subnet manager, shared with others.
    #[must_use]
    pub fn shared_manager(mut self, manager: Arc<dyn Manager>) -> Self {
        self.manager = Some(manager);
        self
    }

    /// A backend; the network config selects one by type. At least one is needed.
    #[must_use]
    pub fn backend(mut self, backend: impl Backend) -> Self {
        self.backends.push(Arc::new(backend));
        self
    }

    /// The kernel, in the namespace where the overlay is to be.
    #[must_use]
    pub fn kernel(self, kernel: impl Kernel) -> Self {
        self.shared_kernel(Arc::new(kernel))
    }

    /// The kernel, shared with others.
    #[must_use]
    pub fn shared_kernel(mut self, kernel: Arc<dyn Kernel>) -> Self {
        self.kernel = Some(kernel);
        self
    }

    /// Where the node remembers its lease and config, so that it boots while the store is down.
    #[must_use]
    pub fn state(mut self, state: impl StateStore) -> Self {
        self.state = Some(Arc::new(state));
        self
    }

    /// The name of the overlay, where there are several on one host. Give each its own
    /// [`route_protocol`](Self::route_protocol) too if they share a namespace.
    #[must_use]
    pub fn name(mut self, name: OverlayName) -> Self {
        self.name = name;
        self
    }

    /// How the external interface is chosen; by default by the default route.
    #[must_use]
    pub fn underlay(mut self, options: UnderlayOptions) -> Self {
        self.options.underlay = options;
        self
    }

    /// The protocol number that marks our routes; default [`RouteProtocol::OURS`].
    #[must_use]
    pub const fn route_protocol(mut self, protocol: RouteProtocol) -> Self {
        self.options.protocol = protocol;
        self
    }

    /// Whether devices and routes that Go flannel left are taken over; default yes.
    #[must_use]
    pub const fn adopt_flannel(mut self, yes: bool) -> Self {
        self.options.adopt_flannel = yes;
        self
    }

    /// What to do when the lease is lost; default [`LossPolicy::Reacquire`].
    #[must_use]
    pub const fn on_lease_lost(mut self, policy: LossPolicy) -> Self {
        self.options.on_lease_lost = policy;
        self
    }

    /// When the lease is renewed.
    #[must_use]
    pub const fn keeper(mut self, options: KeeperOptions) -> Self {
        self.options.keeper = options;
        self
    }

    /// When a snapshot that withdraws many peers at once is doubted, and how long until it is read
    /// a second time (default 10 s).
    #[must_use]
    pub const fn withdrawal_guard(mut self, guard: WithdrawalGuard, grace: Duration) -> Self {
        self.options.guard = guard;
        self.options.withdrawal_grace = grace;
        self
    }

    /// How often the kernel is read and compared without any hint, give or take a tenth; at least
    /// 1 s. By default 200 times as long as a reading takes, within 10 and 60 s.
    #[must_use]
    pub fn resync_every(mut self, interval: Duration) -> Self {
        self.options.resync = Some(interval.max(Duration::from_secs(1)));
        self
    }

    /// How long a call to the store may take before it counts as unanswered; default 30 s.
    #[must_use]
    pub const fn store_timeout(mut self, timeout: Duration) -> Self {
        self.options.call_timeout = timeout;
        self
    }

    /// The clock; by default the kernel's own ([`Kernel::clock`]), else tokio's.
    #[must_use]
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.clock = Some(Arc::new(clock));
        self
    }

    /// The seed of all jitter, by default derived from the node id, and of a new instance, by default
    /// random. For simulations.
    #[must_use]
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Which machine this is, where the host program knows (a machine id); by default made at random
    /// and kept in the saved state. By it, two machines of one node id are told apart, and a renamed
    /// one is known again. No other machine may have the same: beware of images that were cloned.
    #[must_use]
    pub const fn instance(mut self, instance: InstanceId) -> Self {
        self.instance = Some(instance);
        self
    }

    /// Takes the node id, once, even if another machine that lives holds it; default no: then
    /// [`Overlay::ready`] fails and names that one.
    #[must_use]
    pub const fn take_over(mut self, yes: bool) -> Self {
        self.options.take_over = yes;
        self
    }

    /// Replaces the process that runs this overlay in this network namespace: it is asked to stop, and
    /// this one goes on with all that is in the kernel, untouched; default no: then
    /// [`Overlay::ready`] fails and names that one. Give both the same node id and route protocol.
    /// A packet path in user space is handed over by itself, before; else its packets wait until this
    /// one has made another.
    #[must_use]
    pub const fn replace_running(mut self, yes: bool) -> Self {
        self.options.replace_running = yes;
        self
    }

    /// What is missing for an overlay to work here, without starting one: rights, kinds of devices,
    /// forwarding.
    ///
    /// # Errors
    /// [`Error::Missing`] without a kernel, [`Error::Kernel`] if it cannot be talked to,
    /// [`Error::Runtime`] on a tokio runtime without timers.
    pub async fn preflight(&self) -> Result<Preflight, Error> {
        check_runtime()?;
        let kernel = self
            .kernel
            .as_ref()
            .ok_or(Error::Missing { part: "kernel" })?;
        let mut questions = Questions::default();
        questions.families.extend(Family::ALL);
        let facts = kernel.host_facts(&questions).await?;
        Ok(Preflight::of(&kernel.features().await?, &facts))
    }

    /// Starts the overlay's task on the current tokio runtime.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Duplicate`]: a part is missing or there twice.
    /// [`Error::Runtime`]: tokio's timers are off here, or there is no tokio runtime. All that
    /// depends on store and kernel comes later, as conditions, and from [`Overlay::ready`].
    ///
    /// # Cancel safety
    /// Cancel safe: nothing was started.
    #[allow(
        clippy::unused_async,
        reason = "a host program must be inside of a runtime to call it"
    )]
    pub async fn start(self) -> Result<Overlay, Error> {
        check_runtime()?;
        let manager = self.manager.ok_or(Error::Missing { part: "manager" })?;
        let kernel = self.kernel.ok_or(Error::Missing { part: "kernel" })?;
        if self.backends.is_empty() {
            return Err(Error::Missing { part: "backend" });
        }
        for (i, backend) in self.backends.iter().enumerate() {
            let kind = backend.backend_type();
            if self.backends[..i]
                .iter()
                .any(|other| other.backend_type() == kind)
            {
                return Err(Error::Duplicate {
                    backend_type: kind.to_string(),
                });
            }
        }
        let clock = self
            .clock
            .or_else(|| kernel.clock())
            .unwrap_or_else(|| Arc::new(TokioClock::new()));
        let rng = self
            .seed
            .map_or_else(|| Rng::from_text(self.node.as_str()), Rng::new);
        let (commands, command_rx) = mpsc::channel(16);
        let (status, status_rx) = watch::channel(Arc::new(Status::default()));
        let (events, _) = broadcast::channel(4096);
        // Of the highest level, so that no filter takes the names from lines that it lets pass.
        let span = tracing::error_span!("overlay", name = %self.name, node = %self.node);
        let parts = Parts {
            name: self.name,
            node: self.node.clone(),
            manager,
            kernel: Arc::clone(&kernel),
            backends: self.backends,
            state: self.state,
            clock: Arc::clone(&clock),
            rng,
            instance: self.instance,
            fresh_instance: self.seed.map_or_else(InstanceId::random, |seed| {
                // Another history than that of the jitter.
                let mut rng = Rng::new(!seed);
                InstanceId::from_halves(|| rng.next_u64())
            }),
            options: self.options,
        };
        let ended = Arc::new(OnceLock::new());
        let farewell = Farewell::new(status.clone(), Arc::clone(&ended));
        let mut engine = Engine::new(parts, status, events.clone());
        let run = async move {
            // Dropped with the task, whatever becomes of that.
            let farewell = farewell;
            let end = engine.run(command_rx).await;
            farewell.end(end);
        };
        let task = tokio::spawn(run.instrument(span));
        Ok(Overlay {
            node: self.node,
            kernel,
            clock,
            commands,
            status: status_rx,
            events,
            ended,
            _task: Arc::new(Running(task)),
        })
    }
}

/// Refuses a runtime that an overlay cannot run on.
fn check_runtime() -> Result<(), Error> {
    match runtime_fault() {
        None => Ok(()),
        Some(reason) => Err(Error::Runtime { reason }),
    }
}

/// One thing that an overlay needs of the host.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Check {
    /// What is needed, in one word.
    pub name: &'static str,
    /// Whether it is there; `None`: not known.
    pub ok: Option<bool>,
    /// Whether an overlay cannot work without.
    pub required: bool,
    /// What to do if it is not there.
    pub fix: &'static str,
}

/// What is there and what is missing for an overlay to work.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Preflight {
    /// The single checks.
    pub checks: Vec<Check>,
}

impl Preflight {
    fn of(features: &Features, facts: &HostFacts) -> Self {
        let check = |name, ok, required, fix| Check {
            name,
            ok,
            required,
            fix,
        };
        Self {
            checks: vec![
                check(
                    "net-admin",
                    Some(features.net_admin),
                    true,
                    "run with CAP_NET_ADMIN in the network namespace (as root: sudo)",
                ),
                check(
                    "vxlan",
                    Some(features.vxlan),
                    false,
                    match features.net_admin {
                        true => "load the module: modprobe vxlan",
                        false => "without CAP_NET_ADMIN no module is loaded, and none is asked for",
                    },
                ),
                check(
                    "tun",
                    Some(features.tun),
                    false,
                    features.tun_fault.unwrap_or(TunFault::Other).fix(),
                ),
                check(
                    "ipv6",
                    Some(features.ipv6),
                    false,
                    "boot without ipv6.disable=1",
                ),
                check(
                    "nexthops",
                    Some(features.nexthops),
                    false,
                    "Linux 5.3 or later programs thousands of peers many times faster",
                ),
                check(
                    "sysctls",
                    Some(features.sysctls),
                    false,
                    "mount /proc/sys writable in this container",
                ),
                check(
                    "offloads",
                    Some(features.offloads),
                    false,
                    "Linux 5.6 or later, if a checksum-offload policy is to be set",
                ),
                check(
                    "forwarding-v4",
                    facts.setting(Family::V4, None).forwarding,
                    false,
                    "sysctl -w net.ipv4.ip_forward=1, else containers do not reach other nodes",
                ),
                check(
                    "forwarding-v6",
                    facts.setting(Family::V6, None).forwarding,
                    false,
                    "sysctl -w net.ipv6.conf.all.forwarding=1, for an IPv6 overlay",
                ),
            ],
        }
    }

    /// Whether all that is required is there.
    pub fn ok(&self) -> bool {
        self.checks
            .iter()
            .all(|check| !check.required || check.ok != Some(false))
    }
}

/// A running overlay, as a handle that may be cloned: all clones are handles of one overlay, and
/// what one of them asks for holds for all. Dropping the last one stops its task and touches
/// nothing: packets keep flowing.
///
/// One overlay of each name runs in a network namespace at a time ([`Kernel::claim`]). Another one
/// waits, says whom for, and goes on when that one has ended or hands over.
#[derive(Debug, Clone)]
#[must_use = "an overlay stops when its last handle is dropped"]
pub struct Overlay {
    node: NodeId,
    kernel: Arc<dyn Kernel>,
    clock: Arc<dyn Clock>,
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Arc<Status>>,
    events: broadcast::Sender<OverlayEvent>,
    /// Why the task ended, once it has.
    ended: Arc<OnceLock<Ended>>,
    /// The task, which ends with the last handle.
    _task: Arc<Running>,
}

impl Overlay {
    /// Begins to assemble the overlay of a node.
    pub fn builder(node: NodeId) -> OverlayBuilder {
        OverlayBuilder::new(node)
    }

    /// The node.
    pub const fn node(&self) -> &NodeId {
        &self.node
    }

    /// The present moment on the overlay's clock, to make times of day of the moments in its status
    /// ([`Moment::wall_time`]).
    pub fn now(&self) -> Moment {
        self.clock.now()
    }

    /// The overlay's present state; that it has stopped ([`Status::stopped`]) also after its
    /// runtime has ended.
    pub fn status(&self) -> Arc<Status> {
        let status = Arc::clone(&self.status.borrow());
        let traffic = self.kernel.traffic();
        if traffic.is_empty() {
            return status;
        }
        Arc::new(Status {
            traffic,
            ..Status::clone(&status)
        })
    }

    /// How the overlay is, as it changes.
    pub fn watch_status(&self) -> watch::Receiver<Arc<Status>> {
        self.status.clone()
    }

    /// What happens from now on. A receiver that falls 4,096 events behind is told how many it
    /// missed and goes on.
    pub fn events(&self) -> broadcast::Receiver<OverlayEvent> {
        self.events.subscribe()
    }

    /// Waits until the overlay has worked once ([`Status::ready`]). While the store is down and a lease
    /// is remembered, that is enough.
    ///
    /// # Errors
    /// [`Error::NotReady`] as soon as it is certain that nothing but a change from outside can
    /// help (the overlay goes on trying); [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn ready(&self) -> Result<(), Error> {
        let mut failed = None;
        self.wait_for(|status| {
            failed = status
                .conditions
                .iter()
                .find(|condition| condition.permanent && condition.status == ConditionStatus::False)
                .cloned();
            status.ready || failed.is_some()
        })
        .await?;
        match failed {
            Some(condition) if !self.status.borrow().ready => Err(Error::NotReady(condition)),
            _ => Ok(()),
        }
    }

    /// Waits until the overlay has worked once, no longer than this.
    ///
    /// # Errors
    /// As [`ready`](Self::ready), and [`Error::NotReady`] with what is in the way when the time is over.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn ready_within(&self, limit: Duration) -> Result<(), Error> {
        if let Ok(ready) = tokio::time::timeout(limit, self.ready()).await {
            return ready;
        }
        let obstacle = self.status.borrow().obstacle().cloned();
        match obstacle {
            Some(condition) => Err(Error::NotReady(condition)),
            None => self.ready().await,
        }
    }

    /// Waits until the kernel has all that it should have at this moment.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn converged(&self) -> Result<(), Error> {
        self.resync().await?;
        self.wait_for(|status| status.is_true(ConditionType::Kernel))
            .await
    }

    /// Waits until the status is as wanted.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn wait_for(&self, mut wanted: impl FnMut(&Status) -> bool) -> Result<(), Error> {
        let mut status = self.status.clone();
        match status.wait_for(|status| wanted(status)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(self.why_stopped()),
        }
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(command(reply))
            .await
            .map_err(|_| self.why_stopped())?;
        answer.await.map_err(|_| self.why_stopped())
    }

    /// What would be changed in the kernel now, from a fresh reading: a dry run.
    ///
    /// # Errors
    /// [`Error::Kernel`] if it cannot be read, [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn plan(&self) -> Result<Plan, Error> {
        self.ask(Command::Plan).await?
    }

    /// What [`teardown`](Self::teardown) would remove.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the kernel cannot be read, [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn teardown_plan(&self) -> Result<Plan, Error> {
        self.ask(Command::TeardownPlan).await?
    }

    /// Reads the kernel and repairs what differs, now; returns when that has been tried.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Cancel safe: it is done all the same.
    pub async fn resync(&self) -> Result<(), Error> {
        self.ask(Command::Resync).await
    }

    /// Chooses the external interface by these options from now on, at once: the new one is used
    /// before the former one is left. Without it, the interface in use is kept as long as it can carry
    /// the overlay, whatever looks better.
    ///
    /// # Errors
    /// [`Error::Interface`] if nothing of the host fits: then all stays as it was. [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Cancel safe: it is done all the same.
    pub async fn use_interface(&self, options: UnderlayOptions) -> Result<(), Error> {
        Ok(self
            .ask(|reply| Command::Interface(options, reply))
            .await??)
    }

    /// Asks for a lease again after it was lost under [`LossPolicy::Hold`].
    ///
    /// # Errors
    /// [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Cancel safe: it is done all the same.
    pub async fn reacquire(&self) -> Result<(), Error> {
        self.ask(Command::Reacquire).await
    }

    /// Gives the lease up and keeps it so: peers drop this node. The data path stays until
    /// [`teardown`](Self::teardown).
    ///
    /// # Errors
    /// [`Error::Manager`] if the store refused, [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// The lease may or may not be released.
    pub async fn release(&self) -> Result<(), Error> {
        self.ask(Command::Release).await?
    }

    /// Leaves the overlay in good order: gives the lease up, waits `grace` while peers drop this
    /// node, then removes what is ours and stops.
    ///
    /// # Errors
    /// As [`release`](Self::release) and [`teardown`](Self::teardown); a store that does not
    /// answer does not keep the rest from being removed, but is reported.
    ///
    /// # Cancel safety
    /// The lease may be released and nothing removed yet.
    pub async fn drain(&self, grace: Duration) -> Result<(), Error> {
        let released = self.release().await;
        if released.is_ok() {
            tokio::time::sleep(grace).await;
        }
        self.teardown().await?;
        released
    }

    /// Stops and leaves the kernel as it is: packets keep flowing. It has ended when this returns.
    ///
    /// # Errors
    /// [`Error::Stopped`] if it had stopped already, by itself or by another handle, with the
    /// reason.
    ///
    /// # Cancel safety
    /// Cancel safe: once asked it stops.
    pub async fn stop(&self) -> Result<(), Error> {
        self.ask(Command::Stop).await?;
        self.end().await;
        Ok(())
    }

    /// Removes from the kernel what is ours, and stops. The lease is kept in the store. It has
    /// ended when this returns.
    ///
    /// # Errors
    /// [`Error::Teardown`] lists what could not be removed; everything else was.
    /// [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Cancel safe: once asked it is torn down.
    pub async fn teardown(&self) -> Result<(), Error> {
        let done = self.ask(Command::Teardown).await?;
        // Where the overlay is not ours yet, nothing was done, and it goes on waiting for it.
        if matches!(done, Ok(()) | Err(Error::Teardown { .. })) {
            self.end().await;
        }
        done
    }

    /// Waits until the overlay stops by itself, which it does under [`LossPolicy::Stop`] and when
    /// another process replaces it ([`OverlayBuilder::replace_running`]); returns the reason.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn stopped(&self) -> Error {
        self.end().await;
        self.why_stopped()
    }

    /// Waits until the task has ended and all that it had is dropped.
    async fn end(&self) {
        let mut status = self.status.clone();
        while status.changed().await.is_ok() {}
    }

    fn why_stopped(&self) -> Error {
        match self.ended.get() {
            Some(Ended { to: Some(to), .. }) => Error::HandedOver { to: *to },
            Some(Ended { reason, .. }) => Error::Stopped {
                reason: reason.clone(),
            },
            None => Error::Stopped {
                reason: "its task has ended".to_owned(),
            },
        }
    }
}

/// An overlay's task, which ends with it.
#[derive(Debug)]
struct Running(JoinHandle<()>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}
