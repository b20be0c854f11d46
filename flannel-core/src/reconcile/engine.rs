//! The engine: one task that owns an overlay's state and drives it towards what is wanted.
//!
//! Level-triggered throughout: whatever happens only changes what is known, and [`Engine::drive`]
//! then does what follows from what is known. At most one call to the store is under way; calls to
//! the kernel are short and have deadlines of their own.

use std::collections::BTreeSet;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::backend::{self, Backend, Network, NodeContext};
use crate::backoff::Backoff;
use crate::clock::{Moment, Rng};
use crate::condition::{Condition, ConditionStatus, ConditionType, Conditions};
use crate::config::{self, NetworkConfig};
use crate::event::{Event, EventStream};
use crate::family::{DualStack, Family};
use crate::keeper::{Keeper, LossPolicy, Wish};
use crate::kernel::{self, ChangeStream, Features};
use crate::lease::{Lease, LeaseAttrs};
use crate::lease_set::{Applied, LeaseDelta, LeaseSet, Own, OwnChange};
use crate::manager::{self, LeaseRequest};
use crate::node::OverlayName;
use crate::object::{IfName, Object};
use crate::overlay::{Error, Parts};
use crate::reconcile::desired::Compiler;
use crate::reconcile::ownership::{Owner, Ownership};
use crate::reconcile::plan::Plan;
use crate::reconcile::reconciler::Reconciler;
use crate::state::SavedState;
use crate::status::{LeaseStatus, OverlayEvent, RejectedPeer, Status};
use crate::subnet::Subnet;
use crate::underlay::{External, Underlay};

/// How many rounds of read, plan and apply may follow one another before other things get a turn.
const ROUNDS: usize = 8;

/// How many events of the store are taken together.
const BATCH: usize = 4096;

/// The longest sleep: tokio's clock stands still while the machine sleeps, so that what the
/// overlay's own clock says is looked at this often.
const LONGEST_SLEEP: Duration = Duration::from_secs(15);

/// How long the store is given to answer before a remembered lease is used.
const PATIENCE: Duration = Duration::from_secs(3);

/// How many networks of earlier configs are remembered.
const NETWORKS: usize = 16;

/// What a host program asks.
#[derive(Debug)]
pub(crate) enum Command {
    Plan(oneshot::Sender<Result<Plan, Error>>),
    TeardownPlan(oneshot::Sender<Result<Plan, Error>>),
    Resync(oneshot::Sender<()>),
    Reacquire(oneshot::Sender<()>),
    Release(oneshot::Sender<manager::Result<()>>),
    Stop(oneshot::Sender<()>),
    Teardown(oneshot::Sender<Result<(), Error>>),
}

/// What we know of our lease.
#[derive(Debug)]
enum LeaseState {
    /// None was ever had.
    None,
    /// Remembered from an earlier run; the store has not confirmed it.
    Saved(Lease),
    /// Held.
    Held { lease: Lease, keeper: Keeper },
    /// Had and lost. The data path goes on with it.
    Lost { lease: Lease },
    /// Given up on request.
    Released { lease: Lease },
}

impl LeaseState {
    const fn lease(&self) -> Option<&Lease> {
        match self {
            Self::None => None,
            Self::Saved(lease)
            | Self::Held { lease, .. }
            | Self::Lost { lease }
            | Self::Released { lease } => Some(lease),
        }
    }

    const fn held(&self) -> Option<&Lease> {
        match self {
            Self::Held { lease, .. } => Some(lease),
            _ => None,
        }
    }
}

/// An answer of the store.
#[derive(Debug)]
enum Answer {
    Config(manager::Result<NetworkConfig>),
    Lease { asked: Moment, renewal: bool, result: manager::Result<Lease> },
    Released(manager::Result<()>),
}

type Call = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// The watch of the store: waits until the stream has something, then takes all that is ready.
struct Watch(Option<EventStream>);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Watch(open: {})", self.0.is_some())
    }
}

/// What a network was made from: when any of it changes, it is made anew.
#[derive(Debug, Clone, PartialEq)]
struct Inputs {
    config: Arc<NetworkConfig>,
    external: External,
    underlay: Arc<Underlay>,
    lease: Lease,
}

/// One overlay's state.
#[derive(Debug)]
pub(crate) struct Engine {
    parts: Parts,
    status: watch::Sender<Arc<Status>>,
    events: broadcast::Sender<OverlayEvent>,
    conditions: Conditions,
    retry: Backoff,

    saved: SavedState,
    /// Whether the saved lease and config may be used: the store has failed to answer.
    store_is_down: bool,
    started: Moment,

    features: Option<Features>,
    features_at: Moment,
    features_failures: u32,
    config: Option<Arc<NetworkConfig>>,
    /// The config is the saved one; the store's is still wanted.
    config_is_saved: bool,
    networks: Vec<Subnet>,
    external: Option<External>,
    underlay: Arc<Underlay>,
    backend: Option<Arc<dyn Backend>>,
    attrs: Option<LeaseAttrs>,
    lease: LeaseState,
    /// A lease is to be asked for, whatever is held.
    acquire: bool,
    network: Option<Arc<dyn Network>>,
    inputs: Option<Inputs>,

    leases: LeaseSet,
    compiler: Compiler,
    reconciler: Reconciler,
    ready: bool,

    call: Option<Call>,
    call_at: Moment,
    call_failures: u32,
    release: Option<oneshot::Sender<manager::Result<()>>>,
    watch: Watch,
    watch_at: Moment,
    watch_failures: u32,
    /// The next snapshot confirms or refutes one that was held.
    confirming: bool,
    confirm_at: Option<Moment>,
    adopted: bool,
    resync_at: Moment,
    resyncs: Vec<oneshot::Sender<()>>,
    config_poll_at: Option<Moment>,

    /// The userspace data path, where the backend has one.
    data_path: Option<JoinHandle<backend::Result<()>>>,
    data_path_at: Option<Moment>,
    data_path_failures: u32,
    peers: watch::Sender<Arc<LeaseSet>>,
    peers_changed: bool,
}

impl Engine {
    pub(crate) fn new(
        mut parts: Parts,
        status: watch::Sender<Arc<Status>>,
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
            saved: SavedState::default(),
            store_is_down: false,
            started: now,
            features: None,
            features_at: now,
            features_failures: 0,
            config: None,
            config_is_saved: false,
            networks: Vec::new(),
            external: None,
            underlay: Arc::default(),
            backend: None,
            attrs: None,
            lease: LeaseState::None,
            acquire: false,
            network: None,
            inputs: None,
            compiler: Compiler::new(parts.name.clone(), options.protocol),
            peers: watch::Sender::new(Arc::new(LeaseSet::default())),
            leases,
            reconciler,
            ready: false,
            call: None,
            call_at: now,
            call_failures: 0,
            release: None,
            watch: Watch(None),
            watch_at: now,
            watch_failures: 0,
            confirming: false,
            confirm_at: None,
            adopted: false,
            resync_at: now + options.resync,
            resyncs: Vec::new(),
            config_poll_at: None,
            data_path: None,
            data_path_at: None,
            data_path_failures: 0,
            peers_changed: false,
            parts,
        }
    }

    /// Runs until told to stop; answers why it stopped.
    pub(crate) async fn run(&mut self, mut commands: mpsc::Receiver<Command>) -> String {
        self.load().await;
        let mut changes = self.parts.kernel.changes();
        loop {
            if let Some(reason) = self.drive().await {
                return reason;
            }
            let sleep = self.next_wake().since(self.now()).min(LONGEST_SLEEP);
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
                answer = answer_of(&mut self.call) => self.answered(answer).await,
                ended = ended_of(&mut self.data_path) => self.data_path_ended(ended),
                batch = self.watch.next() => self.watched(batch).await,
                change = next_change(&mut changes) => self.reconciler.hint(change),
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

    /// Reads what was remembered of an earlier run.
    async fn load(&mut self) {
        let Some(state) = &self.parts.state else {
            return;
        };
        match state.load().await {
            Ok(Some(saved)) => {
                self.networks = saved.networks.iter().copied().take(NETWORKS).collect();
                self.saved = saved;
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "the saved state cannot be read"),
        }
    }

    /// Remembers lease and config, if they are other than what is remembered.
    async fn save(&mut self) {
        let Some(state) = &self.parts.state else {
            return;
        };
        let saved = SavedState {
            lease: self.lease.held().cloned().or_else(|| self.saved.lease.clone()),
            config: match &self.config {
                Some(config) => Some(config.text().to_owned()),
                None => self.saved.config.clone(),
            },
            networks: self.networks.clone(),
        };
        if saved != self.saved {
            if let Err(error) = state.save(&saved).await {
                tracing::warn!(%error, "the state cannot be saved");
            }
            self.saved = saved;
        }
    }

    /// Does what follows from what is known. Answers why to stop, if to stop.
    async fn drive(&mut self) -> Option<String> {
        self.probe().await;
        self.use_saved().await;
        if self.now() >= self.resync_at {
            self.schedule_resync();
            self.reconciler.read_now();
        }
        for _ in 0..ROUNDS {
            if self.reconciler.read_if_due(self.compiler.desired()).await {
                self.look_at_underlay();
            }
            self.find_attrs();
            self.register().await;
            let ownership = self.ownership();
            self.follow_hold();
            if !self.reconciler.round(self.compiler.desired(), &ownership).await {
                break;
            }
        }
        if let Some(reason) = self.keep_lease() {
            self.publish();
            return Some(reason);
        }
        self.start_call();
        self.open_watch();
        self.run_data_path();
        self.publish();
        for done in self.resyncs.drain(..) {
            done.send(()).ok();
        }
        None
    }

    fn schedule_resync(&mut self) {
        let interval = self.parts.options.resync;
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
        let watch =
            (self.watch.0.is_none() && self.lease.lease().is_some()).then_some(self.watch_at);
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
            self.config_poll_at,
            self.data_path_at,
        ]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or(self.resync_at)
    }

    async fn probe(&mut self) {
        if self.features.is_some() || self.now() < self.features_at {
            return;
        }
        match self.parts.kernel.features().await {
            Ok(features) => self.features = Some(features),
            Err(error) => {
                self.features_failures += 1;
                let wait = self.retry.after(self.features_failures, &mut self.parts.rng);
                self.features_at = self.now() + wait;
                let permanent = !error.is_transient();
                self.fails(ConditionType::Kernel, "NoKernel", error.to_string(), permanent);
            }
        }
    }

    /// Uses what is remembered, once the store has failed to answer.
    async fn use_saved(&mut self) {
        if !self.store_is_down && self.now() < self.started + PATIENCE {
            return;
        }
        if self.config.is_none() {
            let Some(text) = self.saved.config.clone() else {
                return;
            };
            let mode = if self.parts.manager.capabilities().allocates {
                config::PoolMode::Allocated
            } else {
                config::PoolMode::Assigned
            };
            if let Ok(config) = NetworkConfig::from_json(&text, mode) {
                self.config_is_saved = true;
                self.set_config(config).await;
            }
        }
        if let (LeaseState::None, Some(lease)) = (&self.lease, self.saved.lease.clone()) {
            self.lease = LeaseState::Saved(lease);
            self.tell_own();
        }
    }

    fn ownership(&self) -> Ownership {
        Ownership {
            overlay: self.parts.name.clone(),
            protocol: self.parts.options.protocol,
            networks: self.networks.clone(),
            adopt_flannel: self.parts.options.adopt_flannel,
        }
    }

    /// Lets orphans go, or keeps them, as soon as that is decided otherwise.
    fn follow_hold(&mut self) {
        let before = self.compiler.desired().hold_orphans;
        self.compiler.update(&LeaseDelta::default(), &self.leases);
        if self.compiler.desired().hold_orphans != before {
            self.reconciler.replan();
        }
    }

    /// Follows the host's own network after a reading of the kernel.
    fn look_at_underlay(&mut self) {
        let (Some(observed), Some(config)) = (self.reconciler.observed(), &self.config) else {
            return;
        };
        let ours: BTreeSet<IfName> = self
            .compiler
            .desired()
            .objects
            .values()
            .map_while(|wanted| match &wanted.object {
                Object::Link(link) => Some(link.name),
                _ => None,
            })
            .chain(own_links(observed, &self.parts.name))
            .collect();
        let underlay =
            Underlay::from_observed(observed, &self.networks, |dev| ours.contains(&dev));
        let families: Vec<Family> = config.families().collect();
        match underlay.choose(&self.parts.options.underlay, &families) {
            Ok(external) => {
                let message = format!("{}: {}", external.dev, external.reason);
                self.holds(ConditionType::Underlay, "Chosen", message);
                let links_changed = link_ids(&underlay) != link_ids(&self.underlay);
                let external_changed = self.external.as_ref() != Some(&external);
                if links_changed || external_changed {
                    self.reconciler.retry_now();
                }
                // Links of containers come and go: only what a network depends on makes it new.
                if external_changed || underlay.routes != self.underlay.routes {
                    self.underlay = Arc::new(underlay);
                } else if links_changed {
                    Arc::make_mut(&mut self.underlay).links = underlay.links;
                }
                self.external = Some(external);
            }
            // The last one stays in force: it may only be gone for a moment.
            Err(error) => {
                self.fails(ConditionType::Underlay, "NoInterface", error.to_string(), true);
            }
        }
    }

    /// Finds out what we are to publish.
    fn find_attrs(&mut self) {
        let (Some(config), Some(external), Some(features), Some(backend), Some(observed)) = (
            &self.config,
            &self.external,
            &self.features,
            &self.backend,
            self.reconciler.observed(),
        ) else {
            return;
        };
        let cx = NodeContext {
            overlay: &self.parts.name,
            node: &self.parts.node,
            config,
            external,
            underlay: &self.underlay,
            features,
            observed,
            held: self.lease.held(),
            previous: self.lease.lease().or(self.saved.lease.as_ref()),
        };
        match backend.attrs(&cx) {
            Ok(attrs) => {
                self.attrs = Some(attrs);
                let message = format!("backend {}", backend.backend_type());
                self.holds(ConditionType::Config, "Applied", message);
            }
            Err(error) => self.backend_refused(&error),
        }
    }

    fn backend_refused(&mut self, error: &backend::Error) {
        let (kind, reason) = match error {
            backend::Error::Config(_) => (ConditionType::Config, "InvalidConfig"),
            backend::Error::Underlay { .. } => (ConditionType::Underlay, "Unfit"),
            backend::Error::Unsupported { .. } => (ConditionType::Kernel, "Unsupported"),
            backend::Error::Lease { .. } => (ConditionType::Lease, "Unfit"),
            backend::Error::Other { .. } => (ConditionType::Config, "BackendFailed"),
        };
        self.fails(kind, reason, with_source(error), true);
    }

    /// Makes the network anew if anything it depends on is different.
    async fn register(&mut self) {
        let (Some(config), Some(external), Some(features), Some(backend), Some(lease)) = (
            self.config.clone(),
            self.external.clone(),
            self.features.clone(),
            self.backend.clone(),
            self.lease.lease().cloned(),
        ) else {
            return;
        };
        let Some(observed) = self.reconciler.observed().cloned() else {
            return;
        };
        let lease = Lease { ttl: None, revision: lease.created, ..lease };
        let inputs = Inputs { config, external, underlay: Arc::clone(&self.underlay), lease };
        if self.inputs.as_ref() == Some(&inputs) {
            return;
        }
        let cx = NodeContext {
            overlay: &self.parts.name,
            node: &self.parts.node,
            config: &inputs.config,
            external: &inputs.external,
            underlay: &inputs.underlay,
            features: &features,
            observed: &observed,
            held: Some(&inputs.lease),
            previous: self.saved.lease.as_ref(),
        };
        match backend.register_network(&cx, inputs.lease.clone()).await {
            Ok(network) => {
                let changed = self.compiler.set_network(Arc::clone(&network), &self.leases);
                self.reconciler.desired_changed(changed);
                self.reconciler.replan();
                self.network = Some(network);
                if let Some(task) = self.data_path.take() {
                    task.abort();
                }
                self.data_path_at = None;
            }
            Err(error) => self.backend_refused(&error),
        }
        self.inputs = Some(inputs);
    }

    /// Whether the store is to be asked for something, now or after a wait.
    fn wants_call(&self) -> bool {
        self.release.is_some()
            || self.config.is_none()
            || self.config_is_saved
            || self.wants_acquire()
            || self.wants_renewal()
    }

    fn wants_acquire(&self) -> bool {
        let open = match &self.lease {
            LeaseState::None | LeaseState::Saved(_) => true,
            LeaseState::Held { .. } | LeaseState::Lost { .. } => self.acquire,
            LeaseState::Released { .. } => false,
        };
        open && self.attrs.is_some() && !self.config_is_saved
    }

    fn wants_renewal(&self) -> bool {
        match &self.lease {
            LeaseState::Held { lease, keeper } => {
                keeper.wish(self.now()) == Wish::Renew
                    || self.attrs.as_ref().is_some_and(|attrs| *attrs != lease.attrs)
            }
            _ => false,
        }
    }

    /// Notices that the lease has run out.
    fn keep_lease(&mut self) -> Option<String> {
        let LeaseState::Held { keeper, .. } = &self.lease else {
            return None;
        };
        if keeper.wish(self.now()) != Wish::Expired {
            return None;
        }
        // An answer to a renewal that comes now is too late to be trusted.
        self.call = None;
        self.lose_lease("its time ran out before it could be renewed".to_owned())
    }

    fn lose_lease(&mut self, reason: String) -> Option<String> {
        let LeaseState::Held { lease, .. } = std::mem::replace(&mut self.lease, LeaseState::None)
        else {
            return None;
        };
        self.lease = LeaseState::Lost { lease };
        tracing::warn!(reason, "the lease is lost");
        self.emit(OverlayEvent::LeaseLost { reason: reason.clone() });
        let policy = self.parts.options.on_lease_lost;
        let what = match policy {
            LossPolicy::Reacquire => "asking for it again",
            LossPolicy::Hold => "left as it is until the host program asks for it again",
            LossPolicy::Stop => "stopping",
        };
        let message = format!("{reason}; {what}");
        self.fails(ConditionType::Lease, "Lost", message, policy == LossPolicy::Hold);
        match policy {
            LossPolicy::Reacquire => {
                self.acquire = true;
                self.call_at = self.now();
                self.call_failures = 0;
                None
            }
            LossPolicy::Hold => None,
            LossPolicy::Stop => Some(format!("the lease is lost: {reason}")),
        }
    }

    /// Asks the store for what is wanted of it, one thing at a time.
    fn start_call(&mut self) {
        if self.config_poll_at.is_some_and(|at| at <= self.now()) && self.call.is_none() {
            self.config_poll_at = None;
            let manager = Arc::clone(&self.parts.manager);
            self.call = Some(self.bounded(async move {
                Answer::Config(manager.network_config().await)
            }, Answer::Config));
            return;
        }
        if self.call.is_some() || !self.wants_call() || self.now() < self.call_at {
            return;
        }
        let manager = Arc::clone(&self.parts.manager);
        let asked = self.now();
        if self.release.is_some() {
            let lease = self.lease.lease().cloned();
            self.call = Some(self.bounded(
                async move {
                    Answer::Released(match lease {
                        Some(lease) => manager.release_lease(&lease).await,
                        None => Ok(()),
                    })
                },
                Answer::Released,
            ));
        } else if self.config.is_none() || self.config_is_saved {
            self.call = Some(self.bounded(
                async move { Answer::Config(manager.network_config().await) },
                Answer::Config,
            ));
        } else if self.wants_acquire() {
            let request = LeaseRequest {
                node: self.parts.node.clone(),
                attrs: self.attrs.clone().unwrap_or_default(),
                previous: match self.lease.lease().or(self.saved.lease.as_ref()) {
                    Some(lease) => lease.subnet,
                    None => self.adopted_subnets(),
                },
            };
            self.call = Some(self.bounded(
                async move {
                    let result = manager.acquire_lease(&request).await;
                    Answer::Lease { asked, renewal: false, result }
                },
                move |result| Answer::Lease { asked, renewal: false, result },
            ));
        } else if let Some(lease) = self.lease.held() {
            let mut lease = lease.clone();
            if let Some(attrs) = &self.attrs {
                lease.attrs = attrs.clone();
            }
            self.call = Some(self.bounded(
                async move {
                    let result = manager.renew_lease(&lease).await;
                    Answer::Lease { asked, renewal: true, result }
                },
                move |result| Answer::Lease { asked, renewal: true, result },
            ));
        }
    }

    /// A call that ends in time, answered or not.
    fn bounded<T: 'static>(
        &self,
        call: impl Future<Output = Answer> + Send + 'static,
        failed: impl FnOnce(manager::Result<T>) -> Answer + Send + 'static,
    ) -> Call {
        let limit = self.parts.options.call_timeout;
        Box::pin(async move {
            match tokio::time::timeout(limit, call).await {
                Ok(answer) => answer,
                Err(_) => failed(Err(manager::Error::unavailable(format!(
                    "no answer within {limit:?}"
                )))),
            }
        })
    }

    /// The subnets that our overlay devices have in the kernel, to be had again after everything
    /// else is forgotten.
    fn adopted_subnets(&self) -> DualStack<Subnet> {
        let (Some(observed), Some(config)) = (self.reconciler.observed(), &self.config) else {
            return DualStack::default();
        };
        let ours: BTreeSet<IfName> = own_links(observed, &self.parts.name)
            .chain(flannel_links(observed, &self.ownership()))
            .collect();
        let addresses = observed.objects.values().filter_map(|object| match object {
            Object::Address(address) if ours.contains(&address.dev) => Some(address),
            _ => None,
        });
        DualStack::of_subnets(addresses.filter_map(|address| {
            let family = Family::of(&address.ip);
            let pool = config.pools().get(family)?;
            let subnet = Subnet::new(address.ip, pool.subnet_len()?).ok()?;
            (address.prefix_len == family.bits() && pool.fits(&subnet)).then_some(subnet)
        }))
    }

    /// Takes an answer of the store.
    async fn answered(&mut self, answer: Answer) {
        self.call = None;
        let now = self.now();
        match answer {
            Answer::Released(result) => {
                if result.is_ok() {
                    if let Some(lease) = self.lease.lease().cloned() {
                        self.lease = LeaseState::Released { lease };
                    }
                    let message = "the lease was given up on request";
                    self.fails(ConditionType::Lease, "Released", message, false);
                }
                if let Some(reply) = self.release.take() {
                    reply.send(result).ok();
                }
            }
            Answer::Config(Ok(config)) => {
                self.store_answered();
                self.config_is_saved = false;
                self.set_config(config).await;
            }
            Answer::Config(Err(error)) => self.store_failed(&error, ConditionType::Config),
            Answer::Lease { asked, renewal, result: Ok(lease) } => {
                self.store_answered();
                self.took_lease(lease, asked, renewal).await;
            }
            Answer::Lease { renewal, result: Err(error), .. } => {
                if let (true, manager::Error::LeaseLost { reason, .. }) = (renewal, &error) {
                    self.store_answered();
                    let reason = reason.clone();
                    if self.lose_lease(reason).is_some() {
                        // Told again by `drive`, which then stops.
                        self.stop_on_lost();
                    }
                    return;
                }
                if let LeaseState::Held { keeper, .. } = &mut self.lease {
                    keeper.failed(now, &mut self.parts.rng);
                }
                self.store_failed(&error, ConditionType::Lease);
            }
        }
    }

    /// Lets the next [`drive`](Self::drive) end the engine.
    fn stop_on_lost(&mut self) {
        if let LeaseState::Lost { lease } = &self.lease {
            // A keeper whose deadline is past makes `keep_lease` say so.
            let lease = Lease { ttl: Some(Duration::ZERO), ..lease.clone() };
            let keeper = Keeper::new(self.parts.options.keeper, &lease, Moment::default());
            self.lease = LeaseState::Held { lease, keeper };
        }
    }

    fn store_answered(&mut self) {
        self.call_failures = 0;
        self.call_at = self.now();
        self.store_is_down = false;
        self.holds(ConditionType::Store, "Connected", self.parts.manager.name());
    }

    fn store_failed(&mut self, error: &manager::Error, kind: ConditionType) {
        self.call_failures = self.call_failures.saturating_add(1);
        let wait = self.retry.after(self.call_failures, &mut self.parts.rng);
        self.call_at = self.now() + wait;
        let message = with_source(error);
        let (kind, reason, permanent) = match error {
            manager::Error::Unavailable { .. } => (ConditionType::Store, "Unavailable", false),
            manager::Error::Conflict { .. } => (kind, "Conflict", false),
            manager::Error::NotReady { .. } => (kind, "NotReady", false),
            manager::Error::Denied { .. } => (ConditionType::Store, "Denied", true),
            manager::Error::PoolExhausted { .. } => (ConditionType::Lease, "PoolExhausted", true),
            manager::Error::NoConfig { .. } => (ConditionType::Config, "NoConfig", true),
            manager::Error::Config(_) => (ConditionType::Config, "InvalidConfig", true),
            manager::Error::LeaseLost { .. } => (ConditionType::Lease, "Lost", false),
            manager::Error::Corrupt { .. } => (kind, "Corrupt", true),
            manager::Error::Invalid { .. } => (kind, "Refused", true),
        };
        // A lease that is held stays held while the store merely does not answer.
        let held = kind == ConditionType::Lease && self.lease.held().is_some();
        if !held {
            self.fails(kind, reason, message, permanent);
        }
        if error.is_transient() {
            self.store_is_down = true;
        }
    }

    async fn took_lease(&mut self, lease: Lease, asked: Moment, renewal: bool) {
        self.acquire = false;
        let keeper = Keeper::new(self.parts.options.keeper, &lease, asked);
        let message = format!("{} by record {}", lease.subnet, lease.key);
        let subnet = lease.subnet;
        self.lease = LeaseState::Held { lease, keeper };
        self.holds(ConditionType::Lease, "Held", message);
        self.emit(if renewal {
            OverlayEvent::LeaseRenewed
        } else {
            OverlayEvent::LeaseAcquired { subnet }
        });
        self.tell_own();
        self.save().await;
    }

    /// Tells the set of peers who we are.
    fn tell_own(&mut self) {
        let Some(lease) = self.lease.lease() else {
            return;
        };
        let own = Own {
            node: self.parts.node.clone(),
            key: Some(lease.key.clone()),
            subnets: lease.subnet,
            public_ip: lease.attrs.public_ip,
        };
        let delta = self.leases.set_own(own);
        self.peers_differ(&delta);
    }

    async fn set_config(&mut self, config: NetworkConfig) {
        if !self.config_is_saved && !self.parts.manager.capabilities().watches_config {
            self.config_poll_at = Some(self.now() + Duration::from_secs(300));
        }
        if self.config.as_deref() == Some(&config) {
            return;
        }
        let wanted = config.backend().backend_type();
        let backend = self.parts.backends.iter().find(|b| b.backend_type() == *wanted).cloned();
        if backend.is_none() {
            let have: Vec<String> =
                self.parts.backends.iter().map(|b| b.backend_type().to_string()).collect();
            let message = format!(
                "Backend.Type = {wanted}: this program has no such backend, only {}",
                have.join(", ")
            );
            self.fails(ConditionType::Config, "UnknownBackend", message, true);
            if self.config.is_some() {
                return; // the last good config stays in force
            }
        }
        for pool in config.pools().values() {
            let network = pool.network();
            self.networks.retain(|known| *known != network);
            self.networks.insert(0, network);
        }
        self.networks.truncate(NETWORKS);
        if let Some(backend) = &backend {
            let delta = self.leases.set_backend(backend.backend_type());
            self.peers_differ(&delta);
        }
        let delta = self.leases.set_pools(*config.pools());
        self.peers_differ(&delta);
        if let Some(lease) = self.lease.held() {
            let fits = config.pools().same_families(&lease.subnet)
                && lease.subnet.iter().all(|(family, subnet)| {
                    config.pools().get(family).is_some_and(|pool| pool.fits(subnet))
                });
            self.acquire |= !fits;
        }
        let first = self.config.is_none();
        self.backend = backend;
        self.attrs = None;
        self.config = Some(Arc::new(config));
        // The device's neighbours and the external interface depend on the config.
        self.reconciler.read_now();
        if !first {
            tracing::info!("the network config changed");
            self.emit(OverlayEvent::ConfigApplied);
        }
        if !self.config_is_saved {
            self.save().await;
        }
    }

    /// Opens the watch of the store once we know who we are in it.
    fn open_watch(&mut self) {
        let now = self.now();
        if self.confirm_at.is_some_and(|at| at <= now) {
            self.confirm_at = None;
            self.confirming = true;
            self.watch.0 = None;
            self.watch_at = now;
        }
        if self.watch.0.is_some() || now < self.watch_at || self.lease.lease().is_none() {
            return;
        }
        if !self.adopted {
            let Some(observed) = self.reconciler.observed() else {
                return;
            };
            self.adopted = true;
            let adopted = adopted_routes(observed, &self.ownership());
            self.leases.set_adopted(adopted);
        }
        self.watch.0 = Some(self.parts.manager.watch_leases());
    }

    /// Takes what the watch delivered.
    async fn watched(&mut self, batch: Vec<Option<manager::Result<Event>>>) {
        for item in batch {
            match item {
                Some(Ok(event)) => {
                    self.watch_failures = 0;
                    self.holds(ConditionType::Store, "Connected", self.parts.manager.name());
                    self.event(event).await;
                }
                Some(Err(error)) => {
                    let permanent = matches!(error, manager::Error::Denied { .. });
                    let message = format!(
                        "{}; the last known peers stay in force",
                        with_source(&error)
                    );
                    self.fails(ConditionType::Store, "WatchFailed", message, permanent);
                }
                None => {
                    self.watch.0 = None;
                    self.watch_failures = self.watch_failures.saturating_add(1);
                    let wait = self.retry.after(self.watch_failures, &mut self.parts.rng);
                    self.watch_at = self.now() + wait;
                }
            }
        }
    }

    async fn event(&mut self, event: Event) {
        let applied = match event {
            Event::Config(config) => {
                self.config_is_saved = false;
                self.set_config(config).await;
                return;
            }
            Event::ConfigUnreadable { reason } => {
                let message = format!("{reason}; the last good config stays in force");
                self.fails(ConditionType::Config, "Unreadable", message, false);
                return;
            }
            Event::Snapshot(snapshot) if self.confirming => {
                self.confirming = false;
                self.leases.apply_confirming(snapshot)
            }
            event => self.leases.apply(event),
        };
        let Applied { delta, own, held, .. } = applied;
        self.peers_differ(&delta);
        if let Some(held) = held {
            self.confirm_at = Some(self.now() + self.parts.options.withdrawal_grace);
            let (withdrawn, known) = (held.withdrawn, held.known);
            tracing::warn!(withdrawn, known, "a snapshot withdraws too many peers to be believed");
            self.emit(OverlayEvent::WithdrawalHeld { withdrawn, known });
        }
        if let Some(own) = own {
            self.own_record(own);
        }
    }

    /// Something happened to our own record. What is certain is found out by a renewal, whose
    /// condition the store checks.
    fn own_record(&mut self, change: OwnChange) {
        let now = self.now();
        let LeaseState::Held { lease, keeper } = &mut self.lease else {
            return;
        };
        match change {
            // The echo of a write of ours, perhaps of one whose answer was lost.
            OwnChange::Written(record)
                if record.key == lease.key
                    && record.subnet == lease.subnet
                    && record.attrs == lease.attrs =>
            {
                lease.revision = lease.revision.max(record.revision);
            }
            OwnChange::Written(record) if record.revision <= lease.revision => {}
            _ => keeper.publish(now),
        }
    }

    fn peers_differ(&mut self, delta: &LeaseDelta) {
        if delta.is_empty() {
            return;
        }
        self.peers_changed = true;
        let changed = self.compiler.update(delta, &self.leases);
        self.reconciler.desired_changed(changed);
        if self.events.receiver_count() == 0 {
            return;
        }
        let peer = |key| self.leases.peers().get(key);
        for key in &delta.removed {
            self.emit(OverlayEvent::PeerRemoved { key: key.clone() });
        }
        for found in delta.changed.iter().filter_map(peer) {
            let (key, node) = (found.lease.key.clone(), found.lease.node.clone());
            self.emit(OverlayEvent::PeerChanged { key, node, subnet: found.subnets });
        }
        for found in delta.added.iter().filter_map(peer) {
            let (key, node) = (found.lease.key.clone(), found.lease.node.clone());
            self.emit(OverlayEvent::PeerAdded { key, node, subnet: found.subnets });
        }
    }

    /// Starts the userspace data path anew where it does not run.
    fn run_data_path(&mut self) {
        if self.peers_changed && self.peers.receiver_count() > 0 {
            self.peers.send_replace(Arc::new(self.leases.clone()));
            self.peers_changed = false;
        }
        let due = self.data_path_at.is_none_or(|at| at <= self.now());
        if let (None, Some(network), true) = (&self.data_path, &self.network, due) {
            self.data_path_at = None;
            self.peers.send_replace(Arc::new(self.leases.clone()));
            self.peers_changed = false;
            let (network, peers) = (Arc::clone(network), self.peers.subscribe());
            self.data_path = Some(tokio::spawn(async move { network.run(peers).await }));
            self.holds(ConditionType::DataPath, "Running", "");
        }
    }

    fn data_path_ended(&mut self, ended: String) {
        self.data_path = None;
        self.data_path_failures = self.data_path_failures.saturating_add(1);
        let wait = self.retry.after(self.data_path_failures, &mut self.parts.rng);
        self.data_path_at = Some(self.now() + wait);
        self.fails(ConditionType::DataPath, "Ended", ended, false);
    }

    /// Does what the host program asks. Answers why to stop, if to stop.
    async fn command(&mut self, command: Command) -> Option<String> {
        let ownership = self.ownership();
        match command {
            Command::Plan(reply) => {
                let plan = self.reconciler.dry_run(self.compiler.desired(), &ownership).await;
                reply.send(plan.map_err(Error::from)).ok();
            }
            Command::TeardownPlan(reply) => {
                let plan = self.reconciler.dry_teardown(self.compiler.desired(), &ownership).await;
                reply.send(plan.map_err(Error::from)).ok();
            }
            Command::Resync(reply) => {
                self.reconciler.read_now();
                self.reconciler.retry_now();
                self.resyncs.push(reply);
            }
            Command::Reacquire(reply) => {
                self.acquire = true;
                self.call_at = self.now();
                if let LeaseState::Released { lease } = &self.lease {
                    self.lease = LeaseState::Lost { lease: lease.clone() };
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
                reply.send(()).ok();
                return Some("it was asked to".to_owned());
            }
            Command::Teardown(reply) => {
                self.stop_data_path();
                let done = self.reconciler.teardown(self.compiler.desired(), &ownership).await;
                let done = match done {
                    Ok(failed) if failed.is_empty() => Ok(()),
                    Ok(failed) => Err(Error::Teardown { failed }),
                    Err(error) => Err(Error::Kernel(error)),
                };
                reply.send(done).ok();
                return Some("it was torn down".to_owned());
            }
        }
        None
    }

    fn stop_data_path(&mut self) {
        if let Some(task) = self.data_path.take() {
            task.abort();
        }
    }

    /// Tells the world how we are.
    fn publish(&mut self) {
        self.conclude();
        let lease = self.lease.lease().map(|lease| LeaseStatus {
            key: lease.key.clone(),
            subnet: lease.subnet,
            public_ip: lease.attrs.public_ip,
            confirmed: self.lease.held().is_some(),
            expires: match &self.lease {
                LeaseState::Held { keeper, .. } => keeper.deadline(),
                _ => None,
            },
        });
        let rejected = self.compiler.rejected().iter().flat_map(|(key, reasons)| {
            reasons.iter().map(|(family, reason)| RejectedPeer {
                key: key.clone(),
                family: *family,
                reason: reason.clone(),
            })
        });
        let status = Status {
            conditions: self.conditions.list().to_vec(),
            ready: self.ready,
            lease,
            backend: self.backend.as_ref().map(|backend| backend.backend_type()),
            external: self.external.clone(),
            mtu: self.network.as_ref().map(|network| network.mtu()),
            peers: self.leases.peers().len(),
            rejected: rejected.collect(),
            unreadable: self
                .leases
                .unreadable()
                .values()
                .map(|record| (record.key.clone(), record.reason.clone()))
                .collect(),
            foreign: self.reconciler.blocked().to_vec(),
            failing: self.reconciler.failing(),
            objects: self.compiler.desired().objects.len(),
            repairs: self.reconciler.repairs(),
            notes: self.network.as_ref().map(|network| network.notes()).unwrap_or_default(),
        };
        self.status.send_if_modified(|old| {
            let news = **old != status;
            if news {
                *old = Arc::new(status);
            }
            news
        });
    }

    /// Draws the conditions that follow from the rest.
    fn conclude(&mut self) {
        if let LeaseState::Saved(lease) = &self.lease {
            let message = format!("{} is remembered; the store has not confirmed it", lease.subnet);
            self.condition(
                ConditionType::Lease,
                ConditionStatus::Unknown,
                "Unconfirmed",
                message,
                false,
            );
        }
        if self.network.is_some() {
            if let Some(error) = self.reconciler.read_error() {
                let message = error.to_owned();
                self.fails(ConditionType::Kernel, "CannotBeRead", message, false);
            } else if let Some(error) = self.reconciler.permanent_failure() {
                self.fails(ConditionType::Kernel, "Refused", error, true);
            } else if self.reconciler.converged() {
                self.holds(ConditionType::Kernel, "Converged", "");
            } else {
                let failing = self.reconciler.failing();
                let message = match failing.first() {
                    Some(first) => format!(
                        "{} objects are not right, among them {}: {}",
                        failing.len(),
                        first.object,
                        first.error
                    ),
                    None => "changes are being made".to_owned(),
                };
                let reason = if failing.is_empty() { "Converging" } else { "Failing" };
                self.fails(ConditionType::Kernel, reason, message, false);
            }
            match self.reconciler.blocked() {
                [] => self.holds(ConditionType::Foreign, "Clear", ""),
                [first, rest @ ..] => {
                    let message = format!(
                        "{} is wanted, but {} is there and not ours{}",
                        first.wanted,
                        first.found,
                        if rest.is_empty() { String::new() } else { format!("; {} more", rest.len()) }
                    );
                    self.fails(ConditionType::Foreign, "InTheWay", message, false);
                }
            }
        }
        if let Some(held) = self.leases.held() {
            let message = format!(
                "the store's last answer lacks {} of {} known peers; they stay until it is confirmed",
                held.withdrawn, held.known
            );
            self.fails(ConditionType::Peers, "WithdrawalUnconfirmed", message, false);
        } else if self.leases.synced() {
            let (rejected, unreadable) =
                (self.compiler.rejected().len(), self.leases.unreadable().len());
            if rejected + unreadable == 0 {
                self.holds(ConditionType::Peers, "Accepted", "");
            } else {
                let message =
                    format!("{rejected} peers are rejected, {unreadable} records are unreadable");
                self.fails(ConditionType::Peers, "Rejected", message, false);
            }
        }
        let known = match self.lease {
            LeaseState::Held { .. } => self.leases.synced() && self.leases.held().is_none(),
            LeaseState::Saved(_) => self.store_is_down,
            _ => false,
        };
        self.ready |= known && self.network.is_some() && self.reconciler.converged();
    }
}

impl Watch {
    async fn next(&mut self) -> Vec<Option<manager::Result<Event>>> {
        let Some(stream) = &mut self.0 else {
            return std::future::pending().await;
        };
        let mut batch = Vec::new();
        poll_fn(|cx| {
            while batch.len() < BATCH {
                match stream.as_mut().poll_next(cx) {
                    Poll::Ready(item) => {
                        let end = item.is_none();
                        batch.push(item);
                        if end {
                            break;
                        }
                    }
                    Poll::Pending if batch.is_empty() => return Poll::Pending,
                    Poll::Pending => break,
                }
            }
            Poll::Ready(())
        })
        .await;
        batch
    }
}

async fn answer_of(call: &mut Option<Call>) -> Answer {
    match call {
        Some(call) => call.await,
        None => std::future::pending().await,
    }
}

async fn ended_of(task: &mut Option<JoinHandle<backend::Result<()>>>) -> String {
    match task {
        Some(task) => match task.await {
            Ok(Ok(())) => "it ended by itself".to_owned(),
            Ok(Err(error)) => with_source(&error),
            Err(error) => error.to_string(),
        },
        None => std::future::pending().await,
    }
}

async fn next_change(changes: &mut ChangeStream) -> kernel::Change {
    match poll_fn(|cx| changes.as_mut().poll_next(cx)).await {
        Some(change) => change,
        // A kernel whose hints have ended leaves the timer.
        None => std::future::pending().await,
    }
}

/// An error with what caused it, in one line.
fn with_source(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

fn link_ids(underlay: &Underlay) -> BTreeSet<(IfName, u32, bool, bool)> {
    let links = underlay.links.iter();
    links.map(|link| (link.name, link.index, link.up, link.running)).collect()
}

/// The devices that bear our alias.
fn own_links<'a>(
    observed: &'a kernel::Observed,
    overlay: &OverlayName,
) -> impl Iterator<Item = IfName> + use<'a> {
    let alias = overlay.link_alias();
    observed.objects.values().filter_map(move |object| match object {
        Object::Link(link) if link.alias.as_deref() == Some(alias.as_str()) => Some(link.name),
        _ => None,
    })
}

/// The devices that Go flannel left and that we take over.
fn flannel_links<'a>(
    observed: &'a kernel::Observed,
    ownership: &Ownership,
) -> impl Iterator<Item = IfName> + use<'a> {
    let ownership = ownership.clone();
    observed.objects.values().filter_map(move |object| match object {
        Object::Link(link) if ownership.owner(object, observed) == Owner::Flannel => {
            Some(link.name)
        }
        _ => None,
    })
}

/// The destinations of the routes of ours that an earlier run, or Go flannel, left.
fn adopted_routes(observed: &kernel::Observed, ownership: &Ownership) -> Vec<Subnet> {
    let routes = observed.objects.values().filter_map(|object| match object {
        Object::Route(route) if ownership.owner(object, observed) != Owner::Foreign => {
            Some(route.dst)
        }
        _ => None,
    });
    routes.collect()
}
