//! A simulated node: its kernel, its saved state, its clock, and the program while it runs.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::kernel::Result;
use flannel_core::reconcile::known::KnownLink;
use flannel_core::{
    ChangeStream, Claim, Clock, DualStack, Features, HostFacts, IfName, Kernel, Moment,
    NetworkConfig, NodeId, ObjectKey, Objects, Observed, Op, Overlay, OverlayEvent, OverlayName,
    PathFault, Questions, SavedState, Scope, StateStore, Subnet, TokioClock,
};
use tokio::sync::broadcast;

use super::action::StateFault;
use super::host_acts::HostState;
use super::io::{Batch, Io};
use super::judge::Judge;
use super::link::Link;
use super::strangers::Taken;
use super::uplink::Uplink;
use crate::fake_kernel::{FakeKernel, FaultKind};

/// A node. What a crash leaves is here; what it takes is in [`Process`].
#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: NodeId,
    /// Its number on the underlay, from 1.
    pub(super) number: u8,
    pub(super) kernel: FakeKernel,
    pub(super) disk: Arc<Disk>,
    pub(super) clock: Arc<NodeClock>,
    pub(super) link: Arc<Link>,
    pub(super) process: Option<Process>,
    /// The number of its starts.
    pub(super) starts: u64,
    pub(super) frozen: bool,
    /// It takes part: at the end it is to run.
    pub(super) member: bool,
    /// Which of its addresses it has on the underlay.
    pub(super) address: u8,
    /// The external interface is down.
    pub(super) unplugged: bool,
    pub(super) uplink: Uplink,
    pub(super) host: HostState,
    /// The number of its renamings.
    pub(super) renamings: u64,
    /// Something went wrong with its saved state: it may not know its old networks.
    pub(super) forgetful: bool,
    /// The faults given to the kernel, with the kinds of their actions.
    pub(super) faults: Vec<(FaultKind, String)>,
    pub(super) refused: Vec<ObjectKey>,
    /// The device of ours whose place somebody took last.
    pub(super) taken: Option<Taken>,
    /// Somebody took marks of its objects, first when so many configs had been written.
    pub(super) unmarked: Option<u64>,
    /// A device that it lacked for long while it said that it works, and the config then.
    pub(super) lacked: Option<(IfName, NetworkConfig)>,
    pub(super) latency: Arc<Latency>,
}

/// How long every call of a kernel takes.
#[derive(Debug, Default)]
pub(super) struct Latency(AtomicU64);

impl Latency {
    pub(super) fn set(&self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.0.store(micros, Ordering::Relaxed);
    }

    async fn pass(&self) {
        let latency = Duration::from_micros(self.0.load(Ordering::Relaxed));
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
    }
}

/// A running program.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) overlay: Overlay,
    pub(super) events: broadcast::Receiver<OverlayEvent>,
    pub(super) io: Arc<Io>,
}

/// Tokio's clock and the time by which the node jumped ahead of it.
#[derive(Debug)]
pub(super) struct NodeClock {
    tokio: TokioClock,
    ahead: AtomicU64,
}

impl NodeClock {
    pub(super) fn new() -> Self {
        Self {
            tokio: TokioClock::new(),
            ahead: AtomicU64::new(0),
        }
    }

    pub(super) fn jump(&self, by: Duration) {
        let millis = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.ahead.fetch_add(millis, Ordering::Relaxed);
    }
}

impl Clock for NodeClock {
    fn now(&self) -> Moment {
        self.tokio.now() + Duration::from_millis(self.ahead.load(Ordering::Relaxed))
    }
}

/// The node's kernel as its program sees it.
#[derive(Debug)]
pub(super) struct NodeKernel {
    pub(super) node: usize,
    pub(super) fake: FakeKernel,
    pub(super) clock: Arc<NodeClock>,
    pub(super) latency: Arc<Latency>,
    pub(super) io: Arc<Io>,
    pub(super) judge: Arc<Judge>,
}

#[async_trait]
impl Kernel for NodeKernel {
    async fn features(&self) -> Result<Features> {
        self.io.before().await;
        self.latency.pass().await;
        let answer = self.fake.features().await;
        self.io.after().await;
        answer
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed> {
        self.io.before().await;
        self.latency.pass().await;
        let answer = self.fake.observe(scope).await;
        self.io.after().await;
        answer
    }

    async fn settings(&self, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
        self.io.before().await;
        self.latency.pass().await;
        let answer = self.fake.settings(keys).await;
        self.io.after().await;
        answer
    }

    async fn read(&self, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
        self.io.before().await;
        self.latency.pass().await;
        let answer = self.fake.read(keys).await;
        self.io.after().await;
        answer
    }

    async fn links(&self) -> Result<Observed> {
        self.io.before().await;
        self.latency.pass().await;
        let answer = self.fake.links().await;
        self.io.after().await;
        answer
    }

    async fn host_facts(&self, questions: &Questions) -> Result<HostFacts> {
        self.io.before().await;
        self.latency.pass().await;
        let answer = self.fake.host_facts(questions).await;
        self.io.after().await;
        answer
    }

    async fn apply(&self, ops: &[Op]) -> Vec<Result<()>> {
        self.io.before().await;
        self.latency.pass().await;
        let (ops, dies) = match self.io.batch(ops.len()) {
            Batch::Whole => (ops, false),
            Batch::Cut(at) => (&ops[..at], true),
        };
        self.judge
            .batch_begins(self.node, &self.fake.objects(), ops);
        let answers = self.fake.apply(ops).await;
        self.judge.batch_ended(self.node, &self.fake.objects());
        if dies {
            self.io.die().await;
        }
        self.io.after().await;
        answers
    }

    async fn claim(&self, name: &OverlayName, replace: bool) -> Result<Claim> {
        self.fake.claim(name, replace).await
    }

    fn path_faults(&self) -> Vec<PathFault> {
        self.fake.path_faults()
    }

    fn changes(&self) -> ChangeStream {
        self.fake.changes()
    }

    fn clock(&self) -> Option<Arc<dyn Clock>> {
        Some(Arc::clone(&self.clock) as Arc<dyn Clock>)
    }
}

/// The place of a node's saved state: what a crash leaves.
#[derive(Debug, Default)]
pub(super) struct Disk {
    state: Mutex<DiskState>,
}

#[derive(Debug, Default)]
struct DiskState {
    now: Content,
    before: Content,
    write_fails: Vec<StateFault>,
    read_fails: bool,
    felt: Vec<StateFault>,
}

#[derive(Debug, Clone, Default)]
enum Content {
    #[default]
    Nothing,
    Torn,
    State(Box<SavedState>),
}

impl Disk {
    fn state(&self) -> MutexGuard<'_, DiskState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn act(&self, fault: StateFault) {
        let mut state = self.state();
        match fault {
            StateFault::WriteFails | StateFault::WriteTorn => state.write_fails.push(fault),
            StateFault::ReadFails => state.read_fails = true,
            StateFault::Lost => {
                let had = !matches!(state.now, Content::Nothing);
                state.now = Content::Nothing;
                state.felt.extend(had.then_some(fault));
            }
            StateFault::Old => {
                state.now = state.before.clone();
                state.felt.push(fault);
            }
        }
    }

    /// Nothing fails any more.
    pub(super) fn repair(&self) {
        let mut state = self.state();
        state.write_fails.clear();
        state.read_fails = false;
    }

    /// The faults that took effect.
    pub(super) fn take_felt(&self) -> Vec<StateFault> {
        std::mem::take(&mut self.state().felt)
    }

    /// Tells if the saved state names a device by its name and index.
    pub(super) fn knows(&self, dev: IfName, index: Option<u32>) -> bool {
        let is_it = |known: &KnownLink| known.link.name == dev && Some(known.index) == index;
        matches!(&self.state().now, Content::State(saved) if saved.devices.iter().any(is_it))
    }

    /// Tells if the saved state can be read and names an interface.
    pub(super) fn remembers_interface(&self) -> bool {
        let state = self.state();
        let names_one = |saved: &SavedState| saved.interface.is_some();
        matches!(&state.now, Content::State(saved) if !state.read_fails && names_one(saved))
    }

    /// The subnets of the lease that the saved state names, if it can be read.
    pub(super) fn remembered(&self) -> DualStack<Subnet> {
        let state = self.state();
        match &state.now {
            Content::State(saved) if !state.read_fails => {
                let lease = saved.lease.as_ref();
                lease.map(|lease| lease.subnet).unwrap_or_default()
            }
            _ => DualStack::default(),
        }
    }

    fn load(&self) -> io::Result<Option<SavedState>> {
        let mut state = self.state();
        if std::mem::take(&mut state.read_fails) {
            state.felt.push(StateFault::ReadFails);
            return Err(io::Error::other("the disk cannot be read"));
        }
        match &state.now {
            Content::Nothing => Ok(None),
            Content::Torn => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file ends in the middle",
            )),
            Content::State(saved) => Ok(Some((**saved).clone())),
        }
    }

    fn save(&self, saved: &SavedState) -> io::Result<()> {
        let mut state = self.state();
        if !state.write_fails.is_empty() {
            let fault = state.write_fails.remove(0);
            state.felt.push(fault);
            if fault == StateFault::WriteTorn {
                state.now = Content::Torn;
            }
            return Err(io::Error::other("the disk is full"));
        }
        let new = Content::State(Box::new(saved.clone()));
        state.before = std::mem::replace(&mut state.now, new);
        Ok(())
    }
}

/// A node's disk as its program sees it.
#[derive(Debug)]
pub(super) struct NodeDisk {
    pub(super) disk: Arc<Disk>,
    pub(super) io: Arc<Io>,
}

#[async_trait]
impl StateStore for NodeDisk {
    async fn load(&self) -> io::Result<Option<SavedState>> {
        self.io.before().await;
        let answer = self.disk.load();
        self.io.after().await;
        answer
    }

    async fn save(&self, state: &SavedState) -> io::Result<()> {
        self.io.before().await;
        let answer = self.disk.save(state);
        self.io.after().await;
        answer
    }
}
