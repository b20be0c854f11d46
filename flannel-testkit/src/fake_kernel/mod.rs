//! [`FakeKernel`]: a network namespace in memory, for tests without privileges.
//!
//! It keeps the rules of Linux that a reconciler trips over, each measured on a real kernel and
//! checked on both by [`conformance::kernel`](crate::conformance::kernel): a device that goes down
//! takes its routes, nexthops, neighbours and IPv6 addresses along and keeps its forwarding
//! entries; a new MAC address costs it its neighbours; a nexthop that is deleted takes its routes
//! along; two VXLAN devices cannot share VNI, port and family. Where the kernel crate does more than
//! Linux (it unmakes a device that did not become what was asked for, and keeps VXLAN devices from
//! giving themselves addresses), so does [`Kernel::apply`] here.
//!
//! It runs packet paths ([`Tunnel`](flannel_core::Tunnel)) as a kernel with a packet path around it
//! does: they go with their device, and with the program ([`FakeKernel::lose_tunnels`]).
//!
//! It finds what it would do with packets ([`Kernel::host_facts`]) in its own routes, policy rules
//! and settings; its packet filters are what a test says.
//!
//! It is simpler than Linux in what no overlay does: it has no secondary addresses, no carrier, and
//! no settings with consequences but `addr_gen_mode`, `forwarding` and `rp_filter`.

mod claims;
mod fault;
mod host;
mod moves;
mod packets;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::kernel::{Error, Result};
use flannel_core::{
    Change, ChangeStream, Claim, Family, Features, HostFacts, IfName, Kernel, Link, LinkInfo,
    LinkKind, MAIN_TABLE, Object, ObjectKey, Objects, Observed, Op, OverlayName, PathFault,
    Questions, Route, RouteProtocol, RouteTarget, Scope, Subnet,
};
use futures_core::Stream;
use tokio::sync::mpsc;
use tokio::time::Sleep;

use claims::Claims;
pub use fault::{Failure, FaultKind};
use host::Host;

/// A network namespace in memory.
///
/// Clones are handles on one and the same namespace: give one to the code under test and keep one
/// to look inside, to edit as a stranger would and to make things fail. Nothing it is given makes
/// it panic, except [`assert_faults_consumed`](Self::assert_faults_consumed), which is meant to.
#[derive(Debug, Clone)]
pub struct FakeKernel {
    state: Arc<Mutex<State>>,
    claims: Claims,
    /// The process that has this handle.
    pid: u32,
}

/// One op that was applied or refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// The op.
    pub op: Op,
    /// What was answered: the error as text.
    pub result: std::result::Result<(), String>,
}

#[derive(Debug)]
struct State {
    host: Host,
    features: Features,
    faults: VecDeque<FaultKind>,
    refused: BTreeMap<ObjectKey, Failure>,
    log: Vec<LogEntry>,
    observations: usize,
    /// The number of times that it was asked what becomes of packets.
    looks: usize,
    latency: Duration,
    path_faults: BTreeMap<IfName, String>,
    /// With each notification how late it is to come.
    watchers: Vec<mpsc::UnboundedSender<(Duration, Change)>>,
    /// Notifications that come once more, after the next ones.
    held: Vec<Change>,
    witness: Witness,
}

/// What is done at every op.
type Watcher = dyn Fn(&Objects, &LogEntry) + Send + Sync;

/// Whom to tell of every op.
#[derive(Clone, Default)]
struct Witness(Option<Arc<Watcher>>);

impl fmt::Debug for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Witness(set: {})", self.0.is_some())
    }
}

impl Default for FakeKernel {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeKernel {
    /// The namespace of [`FakeKernel::node`] 1.
    pub fn new() -> Self {
        Self::node(1)
    }

    /// A namespace with a loopback device and `eth0`: MTU 1500, up, `192.0.2.<n>/24` and
    /// `2001:db8::<n>/64`, default routes through `.254` and `::fe`.
    pub fn node(n: u8) -> Self {
        let eth0 = [
            (IpAddr::V4(Ipv4Addr::new(192, 0, 2, n)), 24),
            (
                IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into())),
                64,
            ),
        ];
        let kernel = Self::empty().with_link("eth0", 1500, &eth0);
        kernel
            .with_default_route("eth0", IpAddr::V4(Ipv4Addr::new(192, 0, 2, 254)))
            .with_default_route(
                "eth0",
                IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xfe)),
            )
    }

    /// A namespace with nothing but its loopback device.
    pub fn empty() -> Self {
        let kernel = Self {
            state: Arc::new(Mutex::new(State {
                host: Host::default(),
                features: Features::all(),
                faults: VecDeque::new(),
                refused: BTreeMap::new(),
                log: Vec::new(),
                observations: 0,
                looks: 0,
                latency: Duration::ZERO,
                path_faults: BTreeMap::new(),
                watchers: Vec::new(),
                held: Vec::new(),
                witness: Witness::default(),
            })),
            claims: Claims::default(),
            pid: 1,
        };
        kernel.with_hardware("lo", LinkKind::Loopback, 65_536)
    }

    /// The same namespace with one more hardware link that is up and has these addresses. A name
    /// that is none, or is taken, and an address that cannot be had change nothing.
    #[must_use]
    pub fn with_link(self, name: &str, mtu: u32, addresses: &[(IpAddr, u8)]) -> Self {
        let kernel = self.with_hardware(name, LinkKind::Other(String::new()), mtu);
        if let Ok(dev) = IfName::new(name) {
            for (ip, prefix_len) in addresses {
                let address = flannel_core::Address {
                    dev,
                    ip: *ip,
                    prefix_len: *prefix_len,
                };
                let _ = kernel.insert_foreign(Object::Address(address));
            }
        }
        kernel
    }

    /// The same namespace with a default route through a gateway.
    #[must_use]
    pub fn with_default_route(self, dev: &str, gateway: IpAddr) -> Self {
        if let Ok(dev) = IfName::new(dev) {
            let metric = Route::default_metric(Family::of(&gateway));
            let _ = self.insert_foreign(default_route(dev, gateway, metric));
        }
        self
    }

    /// The same namespace as another process has it: of those that claim an overlay, one at a time has
    /// it. All handles are of process 1 unless told otherwise.
    #[must_use]
    pub fn as_process(&self, pid: u32) -> Self {
        Self {
            pid,
            ..self.clone()
        }
    }

    /// The same namespace as a program has it that knows nothing of claims: it keeps nobody out, and
    /// nobody keeps it out.
    #[must_use]
    pub fn without_lock(&self) -> Self {
        Self {
            claims: Claims::default(),
            ..self.clone()
        }
    }

    fn with_hardware(self, name: &str, kind: LinkKind, mtu: u32) -> Self {
        if let Ok(name) = IfName::new(name) {
            let _ = self.insert_foreign(Object::Link(Link {
                name,
                kind,
                mtu: Some(mtu),
                mac: None,
                up: true,
                alias: None,
            }));
        }
        self
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts in an object of somebody else, of any kind, also of those that only hardware or other
    /// programs bring. Hints at it.
    ///
    /// # Errors
    /// What the kernel would answer to its maker: the device is missing or down, the key taken.
    pub fn insert_foreign(&self, object: Object) -> Result<()> {
        let mut state = self.state();
        let result = state.host.insert(&object);
        state.tell();
        result
    }

    /// Does what another program does. Hints at it.
    ///
    /// # Errors
    /// As [`Kernel::apply`], without faults.
    pub fn external(&self, op: &Op) -> Result<()> {
        let mut state = self.state();
        let result = state.host.apply(op);
        state.tell();
        result
    }

    /// Sets a device up or down, as `ip link set` does. No such device: changes nothing.
    pub fn set_link_up(&self, dev: IfName, up: bool) {
        let mut state = self.state();
        state.host.set_up(dev, up);
        state.tell();
    }

    /// Sets a device down, as `ip link set` does. No such device: changes nothing.
    pub fn set_link_down(&self, dev: IfName) {
        self.set_link_up(dev, false);
    }

    /// Gives a device another alias or none, as `ip link set DEV alias` does. No such device: changes
    /// nothing.
    pub fn set_alias(&self, dev: IfName, alias: Option<&str>) {
        let mut state = self.state();
        state.host.set_alias(dev, alias);
        state.tell();
    }

    /// Deletes a device with all on it. No such device: changes nothing.
    pub fn delete_link(&self, dev: IfName) {
        let mut state = self.state();
        state.host.delete_link(dev);
        state.tell();
    }

    /// Ends the packet paths, and with them their devices, as the end of the program does that they ran
    /// in and that left them to nobody. Hints at it.
    pub fn lose_tunnels(&self) {
        let mut state = self.state();
        state.host.lose_tunnels();
        state.tell();
    }

    /// Lets the packet path on a device carry nothing, for a reason, until it is told `None`. Hints at it.
    pub fn set_path_fault(&self, dev: IfName, problem: Option<&str>) {
        let mut state = self.state();
        match problem {
            Some(problem) => state.path_faults.insert(dev, problem.to_owned()),
            None => state.path_faults.remove(&dev),
        };
        let hint = (Duration::ZERO, Change::Link(None));
        state
            .watchers
            .retain(|watcher| watcher.send(hint.clone()).is_ok());
    }

    /// Deletes what is under a key, whosever it is. Nothing there: changes nothing.
    pub fn delete(&self, key: &ObjectKey) {
        let mut state = self.state();
        state.host.delete_key(key);
        state.tell();
    }

    /// Everything in the namespace, settings that were never written excepted.
    pub fn objects(&self) -> Objects {
        self.state().host.objects().clone()
    }

    /// What is under a key, settings with their default included.
    pub fn get(&self, key: &ObjectKey) -> Option<Object> {
        self.state().host.get(key)
    }

    /// Makes one coming call go wrong. Faults of one kind come in the order in which they were
    /// given; each comes once.
    pub fn fail_next(&self, fault: FaultKind) {
        self.state().faults.push_back(fault);
    }

    /// Makes every op on an object fail until [`FakeKernel::accept`].
    pub fn refuse(&self, key: ObjectKey, failure: Failure) {
        self.state().refused.insert(key, failure);
    }

    /// Ends what [`FakeKernel::refuse`] began.
    pub fn accept(&self, key: &ObjectKey) {
        self.state().refused.remove(key);
    }

    /// The faults that have not come yet.
    pub fn pending_faults(&self) -> Vec<FaultKind> {
        self.state().faults.iter().cloned().collect()
    }

    /// Checks that every fault came: a test whose fault never came has shown nothing.
    ///
    /// # Panics
    /// If one did not, naming it.
    pub fn assert_faults_consumed(&self) {
        let pending = self.pending_faults();
        assert!(
            pending.is_empty(),
            "faults that never came, so the test has not shown what it claims: {pending:?}"
        );
    }

    /// Takes back the faults that have not come yet.
    pub fn take_pending_faults(&self) -> Vec<FaultKind> {
        std::mem::take(&mut self.state().faults).into()
    }

    /// Tells a witness of every op given to [`Kernel::apply`], directly after it: what is in the
    /// namespace then, and the op with its answer. So a state that lasts for one op only can be seen.
    /// The witness must not call this kernel. Replaces an earlier one.
    pub fn set_witness(&self, witness: impl Fn(&Objects, &LogEntry) + Send + Sync + 'static) {
        self.state().witness = Witness(Some(Arc::new(witness)));
    }

    /// The ops given to [`Kernel::apply`] since the last [`FakeKernel::take_log`], with the answers.
    pub fn log(&self) -> Vec<LogEntry> {
        self.state().log.clone()
    }

    /// Takes the log, leaving it empty.
    pub fn take_log(&self) -> Vec<LogEntry> {
        std::mem::take(&mut self.state().log)
    }

    /// How often the state was read.
    pub fn observations(&self) -> usize {
        self.state().observations
    }

    /// The number of times that it was asked what becomes of packets.
    pub fn looks(&self) -> usize {
        self.state().looks
    }

    /// Sets what [`Kernel::features`] answers.
    pub fn set_features(&self, features: Features) {
        self.state().features = features;
    }

    /// Lets every call take this long, on tokio's time.
    pub fn set_latency(&self, latency: Duration) {
        self.state().latency = latency;
    }

    async fn wait(&self) {
        let latency = self.state().latency;
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
    }
}

impl State {
    /// Takes the first fault that a function picks.
    fn take_fault<T>(&mut self, pick: impl Fn(&FaultKind) -> Option<T>) -> Option<T> {
        let (at, picked) = self
            .faults
            .iter()
            .enumerate()
            .find_map(|(at, fault)| pick(fault).map(|picked| (at, picked)))?;
        self.faults.remove(at);
        Some(picked)
    }

    /// Tells of what was just done.
    fn tell(&mut self) {
        let mut told = self.host.take_told();
        if told.is_empty() {
            return;
        }
        let held = std::mem::take(&mut self.held);
        let has_contents = told
            .iter()
            .any(|change| matches!(change, Change::Set(_) | Change::Gone(_)));
        let mut late = Duration::ZERO;
        let fault = self.take_fault(|fault| match fault {
            FaultKind::HintsLost | FaultKind::Overrun => Some(fault.clone()),
            FaultKind::HintsTorn | FaultKind::HintsRepeated | FaultKind::HintsLate { .. }
                if has_contents =>
            {
                Some(fault.clone())
            }
            FaultKind::HintsReordered if has_contents && told.len() > 1 => Some(fault.clone()),
            _ => None,
        });
        match fault {
            Some(FaultKind::HintsLost) => told.clear(),
            Some(FaultKind::Overrun) => told = vec![Change::All],
            Some(FaultKind::HintsTorn) => {
                told.truncate(told.len() / 2);
                told.push(Change::All);
            }
            Some(FaultKind::HintsRepeated) => self.held = told.clone(),
            Some(FaultKind::HintsReordered) => told.reverse(),
            Some(FaultKind::HintsLate { by }) => late = by,
            _ => {}
        }
        told.extend(held);
        self.watchers.retain(|watcher| {
            told.iter()
                .all(|change| watcher.send((late, change.clone())).is_ok())
        });
    }

    fn apply(&mut self, ops: &[Op]) -> Vec<Result<()>> {
        let timed_out = self.take_fault(|f| match f {
            FaultKind::ApplyTimesOut { after } => Some(*after),
            _ => None,
        });
        let vanishing = self.take_fault(|f| match f {
            FaultKind::DeviceDeleted { dev, after } if *after < ops.len() => Some((*dev, *after)),
            _ => None,
        });
        // What was not made, with the first failure that it comes from.
        let mut failed = BTreeMap::new();
        let mut results = Vec::with_capacity(ops.len());
        for (at, op) in ops.iter().enumerate() {
            if let Some((dev, _)) = vanishing.filter(|(_, after)| *after == at) {
                self.host.delete_link(dev);
            }
            let result = match timed_out {
                Some(after) if at > after => Err(Error::TimedOut),
                _ => self.apply_one(op, &failed),
            };
            if !matches!(op, Op::Delete(_)) {
                match &result {
                    Ok(()) => failed.remove(&op.key()),
                    Err(Error::Skipped { key }) => failed.insert(op.key(), key.clone()),
                    Err(_) => failed.insert(op.key(), op.key()),
                };
            }
            let result = match timed_out {
                Some(after) if at == after => Err(Error::TimedOut),
                _ => result,
            };
            let entry = LogEntry {
                op: op.clone(),
                result: result.as_ref().copied().map_err(ToString::to_string),
            };
            if let Some(witness) = &self.witness.0 {
                witness(self.host.objects(), &entry);
            }
            self.log.push(entry);
            results.push(result);
        }
        self.tell();
        results
    }

    fn apply_one(&mut self, op: &Op, failed: &BTreeMap<ObjectKey, ObjectKey>) -> Result<()> {
        if !self.features.net_admin {
            return Err(Error::lacks_net_admin(format_args!(
                "{} {}",
                op.verb(),
                op.key()
            )));
        }
        if !matches!(op, Op::Delete(_))
            && let Some(cause) = op.object().needs().iter().find_map(|key| failed.get(key))
        {
            let key = cause.clone();
            return Err(Error::Skipped { key });
        }
        let key = op.key();
        if let Some(failure) = self.refused.get(&key) {
            return Err(failure.error(op));
        }
        let fault = self.take_fault(|f| match f {
            FaultKind::Op { kind, failure } if *kind == key.kind() => Some(*failure),
            FaultKind::Key {
                key: wanted,
                failure,
            } if *wanted == key => Some(*failure),
            _ => None,
        });
        if let Some(failure) = fault {
            return Err(failure.error(op));
        }
        self.check_features(op.object())?;
        let is_ignored =
            |f: &FaultKind| matches!(f, FaultKind::Ignored { kind } if *kind == key.kind());
        if self.take_fault(|f| is_ignored(f).then_some(())).is_some() {
            return Ok(());
        }
        self.host.apply(op)
    }

    fn check_features(&self, object: &Object) -> Result<()> {
        let lacks = match object {
            Object::Link(Link {
                kind: LinkKind::Vxlan(_),
                ..
            }) if !self.features.vxlan => "VXLAN devices",
            Object::Link(Link {
                kind: LinkKind::Tun(_),
                ..
            }) if !self.features.tun => "TUN devices",
            Object::Tunnel(_) | Object::TunnelPeer(_) if !self.features.tunnels => "packet paths",
            Object::Nexthop(_) if !self.features.nexthops => "nexthop objects",
            Object::Sysctl(_) if !self.features.sysctls => "writing settings",
            Object::Offload(_) if !self.features.offloads => "setting offloads",
            _ => return Ok(()),
        };
        Err(Error::Unsupported {
            what: lacks.to_owned(),
        })
    }

    /// The next fault of a reading.
    fn fail_reading(&mut self) -> Result<()> {
        let fault = self.take_fault(|f| match f {
            FaultKind::Observe { failure } => Some(*failure),
            _ => None,
        });
        fault.map_or(Ok(()), |failure| Err(failure.bare()))
    }

    fn read(&mut self, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
        self.fail_reading()?;
        let in_scope = |key: &&ObjectKey| match key {
            ObjectKey::Nexthop(_) => self.features.nexthops,
            ObjectKey::Route { table, .. } => *table == MAIN_TABLE,
            _ => true,
        };
        let found = keys.iter().filter(in_scope);
        Ok(found
            .filter_map(|key| Some((key.clone(), self.host.get(key)?)))
            .collect())
    }

    fn observe(&mut self, scope: &Scope) -> Result<Observed> {
        self.fail_reading()?;
        let mut objects: Objects = self
            .host
            .objects()
            .iter()
            .filter(|(key, object)| match object {
                Object::Fdb(_) | Object::Neighbour(_) => {
                    object.dev().is_some_and(|dev| scope.devices.contains(&dev))
                }
                Object::Nexthop(_) => self.features.nexthops,
                Object::Route(route) => route.table == MAIN_TABLE,
                Object::Sysctl(_) | Object::Offload(_) => scope.settings.contains(key),
                _ => true,
            })
            .map(|(key, object)| (key.clone(), object.clone()))
            .collect();
        for key in &scope.settings {
            if let Some(setting) = self.host.get(key) {
                objects.insert(key.clone(), setting);
            }
        }
        Ok(Observed {
            links: self.host.link_infos(),
            addresses: self.host.address_infos(),
            objects,
        })
    }
}

/// A default route through an interface.
pub(crate) fn default_route(dev: IfName, gateway: IpAddr, metric: u32) -> Object {
    let any = match gateway {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    Object::Route(Route {
        table: MAIN_TABLE,
        dst: Subnet::new(any, 0).expect("a subnet"),
        metric,
        target: RouteTarget::Gateway {
            gateway,
            dev,
            onlink: false,
        },
        protocol: RouteProtocol::BOOT,
        source: None,
    })
}

#[async_trait]
impl Kernel for FakeKernel {
    async fn features(&self) -> Result<Features> {
        self.wait().await;
        Ok(self.state().features.clone())
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed> {
        self.wait().await;
        let mut state = self.state();
        state.observations += 1;
        state.observe(scope)
    }

    async fn read(&self, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
        self.wait().await;
        self.state().read(keys)
    }

    async fn links(&self) -> Result<Observed> {
        self.wait().await;
        let mut observed = self.state().observe(&Scope::default())?;
        let is_asked =
            |key: &ObjectKey| matches!(key, ObjectKey::Link(_) | ObjectKey::Address { .. });
        observed.objects.retain(|key, _| is_asked(key));
        Ok(observed)
    }

    async fn host_facts(&self, questions: &Questions) -> Result<HostFacts> {
        self.wait().await;
        let mut state = self.state();
        state.looks += 1;
        Ok(state.host.facts(questions))
    }

    async fn apply(&self, ops: &[Op]) -> Vec<Result<()>> {
        self.wait().await;
        self.state().apply(ops)
    }

    async fn claim(&self, name: &OverlayName, replace: bool) -> Result<Claim> {
        self.wait().await;
        self.claims.claim(name, replace, self.pid).await
    }

    fn path_faults(&self) -> Vec<PathFault> {
        let faults = self.state().path_faults.clone().into_iter();
        faults
            .map(|(dev, problem)| PathFault { dev, problem })
            .collect()
    }

    fn changes(&self) -> ChangeStream {
        #[allow(
            clippy::disallowed_methods,
            reason = "a test makes no more hints than it has edits"
        )]
        let (sender, receiver) = mpsc::unbounded_channel();
        sender.send((Duration::ZERO, Change::All)).ok();
        self.state().watchers.push(sender);
        Box::pin(Hints {
            receiver,
            late: None,
            _kernel: self.clone(),
        })
    }
}

/// Notifications; holds the kernel so that the stream does not end when the last other handle goes.
struct Hints {
    receiver: mpsc::UnboundedReceiver<(Duration, Change)>,
    /// One that is late, and all after it with it.
    late: Option<(Pin<Box<Sleep>>, Change)>,
    _kernel: FakeKernel,
}

impl Stream for Hints {
    type Item = Change;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        loop {
            if let Some((sleep, _)) = &mut self.late {
                if sleep.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                return Poll::Ready(self.late.take().map(|(_, change)| change));
            }
            match self.receiver.poll_recv(cx) {
                Poll::Ready(Some((late, change))) if !late.is_zero() => {
                    self.late = Some((Box::pin(tokio::time::sleep(late)), change));
                }
                Poll::Ready(Some((_, change))) => return Poll::Ready(Some(change)),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// What the fake says of a link beside the object.
fn link_info(link: &Link, index: u32) -> LinkInfo {
    LinkInfo {
        name: link.name,
        index,
        mtu: link.mtu.unwrap_or(1500),
        up: link.up,
        running: link.up,
        loopback: link.kind == LinkKind::Loopback,
        mac: link.mac,
        master: None,
    }
}
