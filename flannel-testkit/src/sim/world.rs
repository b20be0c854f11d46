//! The simulated cluster: does what actions say, lets time pass, and looks at all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use flannel_core::{
    Clock, ConditionType, Lease, LeaseKey, NetworkConfig, NodeId, Op, Overlay, OverlayEvent,
    Snapshot, Status, stable_hash,
};
use tokio::sync::{Notify, broadcast};
use tokio::time::{Instant, sleep_until, timeout};

use super::action::{Action, CrashPoint, KernelAction, LinkAction, NodeAction};
use super::cluster::{Cluster, Founding, Tamper};
use super::go::Go;
use super::hardware;
use super::host_acts::HostState;
use super::io::Io;
use super::judge::{Invariant, Judge};
use super::link::{Faulty, Link};
use super::node::{Disk, Latency, Node, NodeClock, NodeDisk, NodeKernel, Process};
use super::trace::Trace;
use super::uplink::{Uplink, asked};
use super::wall::Deadline;
use super::{History, Setup};
use crate::go_peer::GoMode;

/// The longest time without a look at the cluster.
const SLICE: Duration = Duration::from_secs(5);

/// How many calls to kernel and store a node may make at once, and then per second.
const CALM: (u64, u64) = (400, 100);

/// A cluster in one run.
pub(super) struct World {
    pub(super) setup: Arc<Setup>,
    pub(super) cluster: Arc<dyn Cluster>,
    pub(super) judge: Arc<Judge>,
    pub(super) nodes: Vec<Node>,
    /// The config in force, and the one of the backup.
    pub(super) config: NetworkConfig,
    pub(super) backup: Option<NetworkConfig>,
    /// The number of times that a config was written, or deleted.
    pub(super) config_writes: AtomicU64,
    /// Keys that others wrote or deleted records under.
    pub(super) written: BTreeSet<LeaseKey>,
    /// Nodes whose lease others may have taken away, and who may not know it yet.
    pub(super) misled: BTreeSet<usize>,
    /// Somebody lost the uplink that carried it while it had another one: nobody needs stay.
    pub(super) may_move: bool,
    /// The seed of the history: it says what is tried at the end.
    pub(super) seed: u64,
    /// The deeds in kernels since the list was begun.
    pub(super) deeds: Vec<(usize, Op)>,
    pub(super) counts: BTreeMap<String, u64>,
    pub(super) trace: Trace,
    pub(super) gos: Vec<Go>,
    /// The records that are known to harm no Go peer of this mode.
    pub(super) harmless: Option<(Arc<Snapshot>, GoMode)>,
    deadline: Deadline,
    died: Arc<Notify>,
    seen: Vec<Option<Arc<Status>>>,
}

impl World {
    /// The cluster of a history, before anything happens in it.
    pub(super) fn new(
        setup: &Arc<Setup>,
        history: &History,
        keep_trace: bool,
        deadline: Deadline,
    ) -> Self {
        let found = |config: usize| {
            let config = setup.configs[config % setup.configs.len()].clone();
            let cluster = (setup.cluster)(&Founding {
                config: config.clone(),
                ttl: history.ttl,
            });
            (config, cluster)
        };
        let (mut config, mut cluster) = found(history.config);
        if !cluster.supports(&config) {
            (config, cluster) = found(0);
        }
        let ids: Vec<NodeId> = (0..history.nodes)
            .map(|n| NodeId::new(format!("node-{n}")).expect("a node id"))
            .collect();
        let judge = Arc::new(Judge::new(Arc::clone(&cluster), ids.iter().cloned()));
        judge.config(&config);
        let mut world = Self {
            setup: Arc::clone(setup),
            cluster,
            judge,
            nodes: Vec::new(),
            config,
            backup: None,
            config_writes: AtomicU64::new(0),
            written: BTreeSet::new(),
            misled: BTreeSet::new(),
            may_move: false,
            seed: history.seed,
            deeds: Vec::new(),
            counts: BTreeMap::new(),
            trace: Trace::new(keep_trace),
            gos: Vec::new(),
            harmless: None,
            deadline,
            died: Arc::new(Notify::new()),
            seen: vec![None; ids.len()],
        };
        for (at, id) in ids.into_iter().enumerate() {
            let number = u8::try_from(at + 1).unwrap_or(u8::MAX);
            world.nodes.push(Node {
                id,
                number,
                kernel: hardware::machine(number, 0, 0),
                disk: Arc::new(Disk::default()),
                clock: Arc::new(NodeClock::new()),
                link: Arc::new(Link::default()),
                process: None,
                starts: 0,
                frozen: false,
                member: false,
                address: 0,
                unplugged: false,
                uplink: Uplink::default(),
                renamings: 0,
                host: HostState::default(),
                forgetful: false,
                faults: Vec::new(),
                refused: Vec::new(),
                taken: None,
                unmarked: None,
                lacked: None,
                latency: Arc::new(Latency::default()),
            });
            world.furnish(at);
        }
        world.gos = (0..history.gos).map(Go::new).collect();
        world
    }

    /// Puts what others have into a kernel that is new, and watches over it.
    fn furnish(&mut self, at: usize) {
        let kernel = &self.nodes[at].kernel;
        let foreign = hardware::furnish(kernel, self.nodes[at].number);
        self.judge.set_foreign(at, foreign);
        let judge = Arc::clone(&self.judge);
        kernel.set_witness(move |objects, entry| judge.op(at, objects, entry));
    }

    pub(super) fn count(&mut self, kind: impl Into<String>) {
        *self.counts.entry(kind.into()).or_default() += 1;
    }

    /// Does what an action says, as far as that is possible now.
    pub(super) async fn act(&mut self, action: &Action) {
        let at = |node: usize| node % self.nodes.len();
        let done = match *action {
            Action::Wait => true,
            Action::Node(node, what) => self.act_on_node(at(node), what).await,
            Action::Link(node, what) => {
                // Counted once it takes effect.
                self.act_on_link(at(node), what);
                matches!(what, LinkAction::Heal)
            }
            Action::Go(peer, what) => self.act_on_go(peer, what).await,
            Action::Kernel(node, KernelAction::UnderlayFlap(time)) => {
                self.flap(at(node), time).await
            }
            Action::Kernel(node, KernelAction::UnderlayRenumbered(set, gap)) => {
                self.renumber(at(node), set, gap).await
            }
            Action::Kernel(node, what) => self.act_on_kernel(at(node), what),
            Action::Store(what) => {
                let done = self.act_on_store(what);
                if done {
                    self.misled.extend(0..self.nodes.len());
                }
                self.judge.catch_up();
                done
            }
        };
        let word = if done { "" } else { " (nothing came of it)" };
        self.trace.add(&format!("{action}{word}"));
        // These are counted when they come.
        let comes_later = match action {
            Action::Node(_, NodeAction::State(_)) => true,
            Action::Node(_, NodeAction::Crash(point)) => !matches!(point, CrashPoint::Now),
            _ => false,
        };
        if done && !comes_later {
            self.count(action.kind());
        }
    }

    fn act_on_link(&self, at: usize, action: LinkAction) {
        let node = &self.nodes[at];
        match action {
            LinkAction::Wire(action) => {
                self.cluster.disturb(&node.id, action);
            }
            action => node.link.act(action),
        }
    }

    async fn act_on_node(&mut self, at: usize, action: NodeAction) -> bool {
        match action {
            NodeAction::Start => return self.start(at).await,
            NodeAction::Stop => {
                let Some(process) = self.take_idle_process(at) else {
                    return false;
                };
                let stopped = timeout(Duration::from_secs(5), process.overlay.stop()).await;
                self.drain(at, process.events);
                return matches!(stopped, Ok(Ok(())));
            }
            NodeAction::Leave => return self.leave(at).await,
            NodeAction::Crash(CrashPoint::Now) => return self.kill(at).await,
            NodeAction::Crash(point) => match &self.nodes[at].process {
                Some(process) => process.io.crash_at(point),
                None => return false,
            },
            NodeAction::Reboot => {
                self.kill(at).await;
                let node = &mut self.nodes[at];
                node.kernel = hardware::machine(node.number, node.address, node.starts + 1);
                node.faults.clear();
                node.refused.clear();
                node.taken = None;
                node.unplugged = false;
                node.uplink = Uplink::default();
                node.host = HostState::default();
                node.frozen = false;
                node.link.freeze(false);
                self.furnish(at);
                self.judge.doubt_all(at);
            }
            NodeAction::Suspend => {
                if self.nodes[at].frozen || self.nodes[at].process.is_none() {
                    return false;
                }
                self.freeze(at, true);
            }
            NodeAction::Resume => {
                if !self.nodes[at].frozen {
                    return false;
                }
                self.freeze(at, false);
            }
            NodeAction::Jump(by) => self.nodes[at].clock.jump(by),
            NodeAction::State(fault) => self.nodes[at].disk.act(fault),
            NodeAction::Rename(renaming) => return self.rename(at, renaming).await,
        }
        true
    }

    /// Starts a node's program.
    pub(super) async fn start(&mut self, at: usize) -> bool {
        if self.nodes[at].process.is_some() {
            return false;
        }
        self.note_start(at);
        let node = &mut self.nodes[at];
        node.member = true;
        self.judge.started(at, node.disk.remembered());
        let io = Arc::new(Io::new(node.frozen, Arc::clone(&self.died)));
        let manager = Faulty {
            node: node.id.clone(),
            inner: self.cluster.manager(&node.id),
            link: Arc::clone(&node.link),
            io: Arc::clone(&io),
            judge: Arc::clone(&self.judge),
        };
        let kernel = NodeKernel {
            node: at,
            fake: node.kernel.clone(),
            clock: Arc::clone(&node.clock),
            latency: Arc::clone(&node.latency),
            io: Arc::clone(&io),
            judge: Arc::clone(&self.judge),
        };
        let disk = NodeDisk {
            disk: Arc::clone(&node.disk),
            io: Arc::clone(&io),
        };
        node.starts += 1;
        let seed = format!("{}, start {}", node.id, node.starts);
        let builder = Overlay::builder(node.id.clone())
            .seed(stable_hash(seed.as_bytes()))
            .manager(manager)
            .kernel(kernel)
            .state(disk)
            .underlay(asked(node.number));
        let overlay = (self.setup.backend)(builder)
            .start()
            .await
            .expect("all parts are there");
        let events = overlay.events();
        node.process = Some(Process {
            overlay,
            events,
            io,
        });
        true
    }

    /// Ends a node's program without a word to it.
    pub(super) async fn kill(&mut self, at: usize) -> bool {
        let process = self.nodes[at].process.take();
        self.seen[at] = None;
        let killed = process.is_some();
        if let Some(process) = process {
            drop(process.overlay);
            self.drain(at, process.events);
            // Its task is dropped when it is next due.
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
        }
        if killed {
            // Who is killed hands nothing over.
            self.nodes[at].kernel.lose_tunnels();
        }
        killed
    }

    /// Takes the process of a node that runs and can hear.
    fn take_idle_process(&mut self, at: usize) -> Option<Process> {
        if self.nodes[at].frozen {
            return None;
        }
        self.seen[at] = None;
        self.nodes[at].process.take()
    }

    async fn leave(&mut self, at: usize) -> bool {
        let Some(process) = self.take_idle_process(at) else {
            return false;
        };
        self.judge.doubt_all(at);
        let grace = Duration::from_secs(1);
        let left = timeout(Duration::from_secs(90), process.overlay.drain(grace)).await;
        self.drain(at, process.events);
        let node = &mut self.nodes[at];
        node.member = false;
        node.disk = Arc::new(Disk::default());
        let left = matches!(left, Ok(Ok(())));
        let forgetful = std::mem::replace(&mut node.forgetful, true);
        if left && !forgetful {
            let rest = hardware::ours(&node.kernel.objects());
            if let Some(object) = rest.first() {
                let what = format!("{object} is still there");
                self.judge.broken(Invariant::LeavesNothing, Some(at), what);
            }
        }
        left
    }

    pub(super) fn freeze(&mut self, at: usize, frozen: bool) {
        let node = &mut self.nodes[at];
        node.frozen = frozen;
        node.link.freeze(frozen);
        if let Some(process) = &node.process {
            process.io.freeze(frozen);
        }
    }

    /// Lets time pass.
    pub(super) async fn pass(&mut self, time: Duration) {
        let end = Instant::now() + time;
        let died = Arc::clone(&self.died);
        loop {
            let slice = end.min(Instant::now() + SLICE);
            let begun = Instant::now();
            let calls = self.calls();
            loop {
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                }
                tokio::select! {
                    biased;
                    () = died.notified() => self.bury().await,
                    () = sleep_until(slice) => break,
                }
            }
            self.look();
            self.check_calm(&calls, begun.elapsed());
            if Instant::now() >= end || self.is_over() {
                return;
            }
        }
    }

    /// Tells if nothing more is to happen: something broke, or the run is given up.
    pub(super) fn is_over(&self) -> bool {
        self.judge.verdict().is_some() || self.is_given_up()
    }

    /// Tells if the run is given up because it may cost no more.
    pub(super) fn is_given_up(&self) -> bool {
        self.deadline.is_over()
    }

    fn calls(&self) -> Vec<u64> {
        let calls = |node: &Node| node.process.as_ref().map_or(0, |p| p.io.look());
        self.nodes.iter().map(calls).collect()
    }

    fn check_calm(&self, before: &[u64], time: Duration) {
        let most = CALM.0 + CALM.1 * time.as_secs();
        for (at, (was, is)) in before.iter().zip(self.calls()).enumerate() {
            let calls = is.saturating_sub(*was);
            if calls > most {
                let what = format!("{calls} calls to kernel and store in {time:?}");
                self.judge.broken(Invariant::StaysCalm, Some(at), what);
            }
        }
    }

    /// Takes the dead away.
    async fn bury(&mut self) {
        for at in 0..self.nodes.len() {
            let dead = |process: &Process| process.io.is_dead();
            if self.nodes[at].process.as_ref().is_some_and(dead) {
                if self.nodes[at]
                    .process
                    .as_ref()
                    .is_some_and(|p| p.io.ran_wild())
                {
                    let what = "it runs in circles".to_owned();
                    self.judge.broken(Invariant::StaysCalm, Some(at), what);
                }
                if let Some(point) = self.nodes[at].process.as_ref().and_then(|p| p.io.died_of()) {
                    self.count(Action::Node(at, NodeAction::Crash(point)).kind());
                }
                self.kill(at).await;
            }
        }
    }

    /// Looks at everything that can be seen, and judges what must hold at every moment.
    pub(super) fn look(&mut self) {
        self.judge.catch_up();
        for at in 0..self.nodes.len() {
            self.look_at(at);
        }
        self.check_held();
        self.look_at_gos();
        self.judge.check_records(&self.written);
        for note in self.judge.take_notes() {
            self.trace.add(&note);
        }
    }

    fn look_at(&mut self, at: usize) {
        self.gather_effects(at);
        for entry in self.nodes[at].kernel.take_log() {
            let (op, answer) = (&entry.op, &entry.result);
            let line = format!("node {at}: {} {} {answer:?}", op.verb(), op.object());
            self.trace.add(&line);
            self.deeds.push((at, entry.op));
        }
        let Some(process) = &mut self.nodes[at].process else {
            return;
        };
        let mut lines = Vec::new();
        take_events(&self.judge, at, &mut process.events, &mut lines);
        let status = process.overlay.status();
        let ended = process.overlay.watch_status().has_changed().is_err();
        lines.into_iter().for_each(|line| self.trace.add(&line));
        let news = self.seen[at]
            .as_ref()
            .is_none_or(|seen| !Arc::ptr_eq(seen, &status));
        if news {
            let text = serde_json::to_string(&*status).unwrap_or_default();
            self.trace.add(&format!("node {at}: {text}"));
            self.seen[at] = Some(Arc::clone(&status));
        }
        if let Some(lease) = &status.lease {
            self.judge.remembers(at, lease.subnet);
        }
        if ended
            && !self.nodes[at]
                .process
                .as_ref()
                .is_some_and(|p| p.io.is_dead())
        {
            let what = "its task has ended".to_owned();
            self.judge.broken(Invariant::NeverEnds, Some(at), what);
        }
    }

    /// Notes what a program that is gone said last.
    fn drain(&mut self, at: usize, mut events: broadcast::Receiver<OverlayEvent>) {
        let mut lines = Vec::new();
        take_events(&self.judge, at, &mut events, &mut lines);
        lines.into_iter().for_each(|line| self.trace.add(&line));
    }

    /// Counts the faults that took effect.
    pub(super) fn gather_effects(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        let disk = node.disk.take_felt();
        node.forgetful |= !disk.is_empty();
        let mut felt: Vec<String> = disk
            .into_iter()
            .map(|fault| Action::Node(at, NodeAction::State(fault)).kind())
            .collect();
        let mut pending = node.kernel.pending_faults();
        node.faults.retain(|(fault, kind)| {
            let waits = pending.iter().position(|other| other == fault);
            match waits {
                Some(place) => {
                    pending.remove(place);
                }
                None => felt.push(kind.clone()),
            }
            waits.is_some()
        });
        for (kind, times) in node.link.take_effects() {
            *self.counts.entry(kind).or_default() += times;
        }
        for (what, times) in self.cluster.felt(&self.nodes[at].id) {
            *self.counts.entry(format!("wire {what}")).or_default() += times;
        }
        felt.into_iter().for_each(|kind| self.count(kind));
    }

    /// All nodes, from one on.
    pub(super) fn nodes_from(&self, first: usize) -> impl Iterator<Item = usize> + use<> {
        let count = self.nodes.len();
        (first..first + count).map(move |at| at % count)
    }

    /// The record of a node's lease, if there is one.
    pub(super) fn record_of(&self, at: usize) -> Option<Lease> {
        let records = self.cluster.truth().leases;
        let id = &self.nodes[at].id;
        records.into_iter().find(|lease| lease.node == *id)
    }

    /// Two nodes that both hold a lease, each by its own clock, never hold one subnet.
    fn check_held(&mut self) {
        let records = self.judge.records();
        let mut held = Vec::new();
        for (at, node) in self.nodes.iter().enumerate() {
            let Some(process) = &node.process else {
                continue;
            };
            let status = process.overlay.status();
            let Some(lease) = status.lease.as_ref().filter(|lease| lease.confirmed) else {
                continue;
            };
            let is_true = records.leases.iter().any(|record| {
                record.key == lease.key && record.node == node.id && record.subnet == lease.subnet
            });
            if is_true {
                self.misled.remove(&at);
            }
            let runs = lease.expires.is_none_or(|end| end > node.clock.now())
                && status.is_true(ConditionType::Lease);
            if runs && !self.misled.contains(&at) {
                held.push((at, lease.subnet));
            }
        }
        for (n, (a, subnets)) in held.iter().enumerate() {
            if let Some((b, _)) = held[n + 1..]
                .iter()
                .find(|(_, other)| other.overlaps(subnets))
            {
                let what = format!("nodes {a} and {b} both hold {subnets}");
                self.judge.broken(Invariant::NoOverlap, Some(*a), what);
            }
        }
    }

    pub(super) fn tamper(&self, tamper: Tamper) -> bool {
        let is_config = matches!(
            tamper,
            Tamper::Config(_) | Tamper::BadConfig | Tamper::NoConfig | Tamper::Restore
        );
        self.config_writes
            .fetch_add(is_config.into(), Ordering::Relaxed);
        self.cluster.tamper(tamper)
    }
}

/// Takes what a program said, in its order.
fn take_events(
    judge: &Judge,
    at: usize,
    events: &mut broadcast::Receiver<OverlayEvent>,
    lines: &mut Vec<String>,
) {
    loop {
        match events.try_recv() {
            Ok(event) => {
                judge.event(at, &event);
                let text = serde_json::to_string(&event).unwrap_or_default();
                lines.push(format!("node {at}: {text}"));
            }
            Err(broadcast::error::TryRecvError::Lagged(missed)) => {
                lines.push(format!("node {at}: {missed} events missed"));
            }
            Err(_) => return,
        }
    }
}
