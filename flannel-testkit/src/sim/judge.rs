//! What must never be: checked while a node's program works on its kernel, op by op.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use flannel_core::manager;
use flannel_core::{
    DualStack, Family, Lease, LeaseKey, LinkKind, NetworkConfig, NodeId, Object, ObjectKey,
    Objects, Op, OverlayEvent, Revision, RouteProtocol, Snapshot, Subnet,
};
use serde::Serialize;
use tokio::time::Instant;

use super::cluster::Cluster;
use super::hardware::PLACE_TAKEN;
use super::model::is_host;
use super::path::{Way, is_whole, link, routes_to, whole};
use super::uplink::is_uplink;
use crate::fake_kernel::LogEntry;

/// What must hold in every history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[non_exhaustive]
pub enum Invariant {
    /// No two leases of the cluster's nodes overlap, in either family.
    NoOverlap,
    /// Nothing outside of the network is ever programmed.
    InsideThePool,
    /// No object of others is touched.
    ForeignUntouched,
    /// No route is withdrawn because news are old or a record cannot be read.
    NothingWithdrawn,
    /// The node's own subnet is never routed to a peer.
    OwnNotRouted,
    /// A subnet that stays, or moves to another node, is routed somewhere whole at every moment.
    NoBlackHole,
    /// Once faults stop, every kernel is as the model says within a bound of time.
    Converges,
    /// A cluster that has converged rests: nothing is changed any more.
    Rests,
    /// A node that leaves takes everything of the overlay with it.
    LeavesNothing,
    /// An overlay ends only when it is told to.
    NeverEnds,
    /// However things are, a node does not keep its kernel or its store busy.
    StaysCalm,
    /// A node does not say that it works while it cannot.
    TellsTheTruth,
    /// Nothing that a node writes crashes or empties a Go peer.
    GoPeersLive,
    /// A node says what about its host keeps packets from passing, and that it does no more.
    Tells,
    /// The overlay follows the interface that carries it, and stays with it while that can be.
    Follows,
    /// A node is the same under another id, and none other is because a record says so.
    StaysItself,
}

impl fmt::Display for Invariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoOverlap => "no two live leases overlap",
            Self::InsideThePool => "nothing outside of the pool is programmed",
            Self::ForeignUntouched => "no object of others is touched",
            Self::NothingWithdrawn => "no route is withdrawn for staleness or unreadable records",
            Self::OwnNotRouted => "the own subnet is never routed to a peer",
            Self::NoBlackHole => "no black hole is opened",
            Self::Converges => "every kernel equals the model in time",
            Self::Rests => "what has converged rests",
            Self::LeavesNothing => "a node that leaves leaves nothing",
            Self::NeverEnds => "an overlay ends only when told to",
            Self::StaysCalm => "a node stays calm",
            Self::TellsTheTruth => "a node that cannot work does not say that it does",
            Self::GoPeersLive => "nothing crashes or empties a Go peer",
            Self::Tells => "a node tells what is off about its host",
            Self::Follows => "the overlay follows the interface that carries it",
            Self::StaysItself => "a node stays itself",
        })
    }
}

/// That something did not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// What did not hold.
    pub invariant: Invariant,
    /// Where.
    pub node: Option<NodeId>,
    /// How.
    pub what: String,
    /// When, in virtual time since the beginning.
    pub at: Duration,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken after {:?}: {}", self.at, self.invariant)?;
        if let Some(node) = &self.node {
            write!(f, ", on {node}")?;
        }
        write!(f, ": {}", self.what)
    }
}

/// Sees all that a cluster does, and judges.
#[derive(Debug)]
pub(super) struct Judge {
    cluster: Arc<dyn Cluster>,
    start: Instant,
    state: Mutex<State>,
}

/// The version of a store, as [`Cluster::version`] tells it.
type Version = Option<(u64, Revision)>;

#[derive(Debug, Default)]
struct State {
    /// The last readable content of every record that is there.
    truth: BTreeMap<LeaseKey, Lease>,
    /// The nodes that ever had a record of a key.
    holders: BTreeMap<LeaseKey, BTreeSet<NodeId>>,
    /// Those of them that cannot be read now.
    unreadable: BTreeSet<LeaseKey>,
    /// The networks of all configs there ever were.
    networks: Vec<Subnet>,
    /// The networks of the config that is in force.
    in_force: Vec<Subnet>,
    /// What was last read in the store, and at which version of it.
    read: Option<(Version, Arc<Snapshot>)>,
    /// What `truth` was last made of.
    caught_up: Option<Arc<Snapshot>>,
    nodes: Vec<View>,
    violations: Vec<Violation>,
    notes: Vec<String>,
    /// How often something changed in the store that means something to peers.
    changes: u64,
}

/// The longest time from a reading to the changes that follow from it, with the latency of a kernel both
/// ways.
const PLANNED: Duration = Duration::from_secs(2);

/// What is known of one node.
#[derive(Debug)]
struct View {
    id: NodeId,
    /// The ids that it had before.
    former: Vec<NodeId>,
    /// What others have in its kernel.
    foreign: BTreeMap<ObjectKey, Object>,
    /// The subnets it holds, as far as it knows.
    own: DualStack<Subnet>,
    /// The subnets that it last held.
    last_own: DualStack<Subnet>,
    /// Subnets of which something changed that it may not know of yet: it may rightly withdraw
    /// their routes.
    doubted: BTreeSet<Subnet>,
    doubts_all: bool,
    batch: BatchView,
    /// When somebody's device came to stand in the place of ours.
    stranger: Option<Instant>,
    /// How many ops its program gave to its kernel.
    ops: u64,
    /// Its program was given a lease.
    acquired: bool,
}

impl State {
    /// Whose record it is that a node has to route a subnet for, as long as it has not heard of any
    /// change. Nobody's outside of the networks in force: who forgot an earlier network finds its
    /// routes when its peers are certain, however late that is. A record that cannot be read is its
    /// node's only until that has written a newer one, and the route may go at any time after that.
    fn holder(&self, node: &NodeId, subnet: &Subnet) -> Option<&Lease> {
        if !self.in_force.iter().any(|network| network.contains(subnet)) {
            return None;
        }
        self.truth.values().find(|lease| {
            lease.node != *node
                && lease.subnet.values().any(|other| other == subnet)
                && !self.is_replaced(lease)
        })
    }

    /// Whether a record cannot be read, and its node has written a newer one: it holds nothing.
    fn is_replaced(&self, lease: &Lease) -> bool {
        let mut all = self.truth.values();
        self.unreadable.contains(&lease.key)
            && all.any(|other| other.node == lease.node && other.revision > lease.revision)
    }
}

impl View {
    /// Tells if a record bears its id, or one that it had before.
    fn is(&self, lease: &Lease) -> bool {
        self.id == lease.node || self.former.contains(&lease.node)
    }

    fn set_own(&mut self, own: DualStack<Subnet>) {
        if self.last_own != own {
            self.last_own = own;
            self.doubts_all = true;
        }
        self.own = own;
    }
}

#[derive(Debug, Default)]
struct BatchView {
    before: BTreeMap<Subnet, Way>,
    /// Subnets that were whole before the batch, and with which op they were no longer.
    gaps: BTreeMap<Subnet, String>,
    /// Subnets whose route an op removed.
    removed: BTreeMap<Subnet, String>,
    /// Something failed: gaps are allowed.
    failed: bool,
    /// A device was touched: what is on it may go.
    shaken: bool,
}

impl Judge {
    pub(super) fn new(cluster: Arc<dyn Cluster>, nodes: impl Iterator<Item = NodeId>) -> Self {
        let nodes = nodes.map(|id| View {
            id,
            former: Vec::new(),
            foreign: BTreeMap::new(),
            own: DualStack::default(),
            last_own: DualStack::default(),
            doubted: BTreeSet::new(),
            doubts_all: false,
            batch: BatchView::default(),
            stranger: None,
            ops: 0,
            acquired: false,
        });
        Self {
            cluster,
            start: Instant::now(),
            state: Mutex::new(State {
                nodes: nodes.collect(),
                ..State::default()
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time since the beginning.
    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    pub(super) fn broken(&self, invariant: Invariant, node: Option<usize>, what: String) {
        let at = self.elapsed();
        let mut state = self.state();
        let node = node.and_then(|node| state.nodes.get(node).map(|view| view.id.clone()));
        state.violations.push(Violation {
            invariant,
            node,
            what,
            at,
        });
    }

    /// The first violation, if there is any.
    pub(super) fn verdict(&self) -> Option<Violation> {
        self.state().violations.first().cloned()
    }

    /// What is worth a line in the trace since the last call.
    pub(super) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut self.state().notes)
    }

    /// The network of this config may be programmed from now on.
    pub(super) fn config(&self, config: &NetworkConfig) {
        let mut state = self.state();
        state.in_force = config.pools().values().map(|pool| pool.network()).collect();
        for pool in config.pools().values() {
            if !state.networks.contains(&pool.network()) {
                state.networks.push(pool.network());
            }
        }
        for view in &mut state.nodes {
            view.doubts_all = true;
        }
    }

    /// How many ops each node's program gave to its kernel.
    pub(super) fn ops(&self) -> Vec<u64> {
        self.state().nodes.iter().map(|view| view.ops).collect()
    }

    /// How often something changed in the store that means something to peers.
    pub(super) fn changes(&self) -> u64 {
        self.state().changes
    }

    /// The only node that ever had a record of this key. Of several, nodes may know different last
    /// values.
    pub(super) fn only_node_of(&self, key: &LeaseKey) -> Option<NodeId> {
        let state = self.state();
        let holders = state.holders.get(key)?;
        holders.first().filter(|_| holders.len() == 1).cloned()
    }

    /// A node has another id from now on.
    pub(super) fn renamed(&self, node: usize, id: NodeId) {
        let view = &mut self.state().nodes[node];
        let former = std::mem::replace(&mut view.id, id);
        view.former.push(former);
    }

    /// A node may rightly withdraw any route.
    pub(super) fn doubt_all(&self, node: usize) {
        self.state().nodes[node].doubts_all = true;
    }

    /// Tells if a node may rightly withdraw some route.
    pub(super) fn doubts(&self, node: usize) -> bool {
        let view = &self.state().nodes[node];
        view.doubts_all || !view.doubted.is_empty()
    }

    /// A node knows everything.
    pub(super) fn trust(&self, node: usize) {
        let mut state = self.state();
        state.nodes[node].doubts_all = false;
        state.nodes[node].doubted.clear();
    }

    /// Others have these objects in a node's kernel now, and no other ones.
    pub(super) fn set_foreign(&self, node: usize, foreign: BTreeMap<ObjectKey, Object>) {
        self.state().nodes[node].foreign = foreign;
    }

    /// Somebody's device stands in the place of one of ours from now on.
    pub(super) fn stranger_came(&self, node: usize) {
        self.state().nodes[node].stranger = Some(Instant::now());
    }

    pub(super) fn foreign(&self, node: usize) -> BTreeMap<ObjectKey, Object> {
        self.state().nodes[node].foreign.clone()
    }

    /// A node's program was started with a saved state that names these subnets. What it held before
    /// and has forgotten may be another's by now.
    pub(super) fn started(&self, node: usize, remembered: DualStack<Subnet>) {
        let view = &mut self.state().nodes[node];
        view.acquired = false;
        view.own = remembered;
    }

    /// The subnets that a node's status names. What its events say is newer.
    pub(super) fn remembers(&self, node: usize, own: DualStack<Subnet>) {
        let mut state = self.state();
        if !state.nodes[node].acquired {
            state.nodes[node].set_own(own);
        }
    }

    /// What is in the store now. The time that leases have left is that of the last change.
    pub(super) fn records(&self) -> Arc<Snapshot> {
        let version = self.cluster.version();
        let read = self.state().read.clone();
        if let Some((_, snapshot)) = read.filter(|(of, _)| of.is_some() && *of == version) {
            return snapshot;
        }
        let snapshot = Arc::new(self.cluster.truth());
        self.state().read = Some((version, Arc::clone(&snapshot)));
        snapshot
    }

    /// Looks at the store: what changed there a node may not know.
    pub(super) fn catch_up(&self) {
        let snapshot = self.records();
        let mut state = self.state();
        let known = state.caught_up.as_ref();
        if known.is_some_and(|known| Arc::ptr_eq(known, &snapshot)) {
            return;
        }
        let was_restored = known.is_some_and(|known| snapshot.revision < known.revision);
        state.caught_up = Some(Arc::clone(&snapshot));
        let mut new: BTreeMap<LeaseKey, Lease> = snapshot
            .leases
            .iter()
            .map(|lease| (lease.key.clone(), lease.clone()))
            .collect();
        for record in &snapshot.unreadable {
            if let Some(last) = state.truth.get(&record.key) {
                let mut last = last.clone();
                // The revision of a history that has ended: whatever its node writes now is newer.
                if was_restored {
                    last.revision = Revision(0);
                }
                new.insert(record.key.clone(), last);
            }
        }
        let keys: BTreeSet<&LeaseKey> = state.truth.keys().chain(new.keys()).collect();
        let mut touched: Vec<Lease> = Vec::new();
        let mut notes = Vec::new();
        for key in keys {
            let (old, now) = (state.truth.get(key), new.get(key));
            if old.map(|lease| lease.revision) != now.map(|lease| lease.revision) {
                notes.push(match now {
                    Some(now) => format!(
                        "record {key}: {} of {} at {}",
                        now.subnet, now.node, now.revision
                    ),
                    None => format!("record {key}: gone"),
                });
            }
            if !same(old, now) {
                touched.extend(old.into_iter().chain(now).cloned());
            }
        }
        if !touched.is_empty() {
            state.changes += 1;
            // What else hangs together with them: who was in the way of one may have kept another
            // from being in the way of a third.
            let mut rest: Vec<&Lease> = new.values().collect();
            let mut seen = 0;
            while seen < touched.len() {
                let (rivals, others) = rest
                    .into_iter()
                    .partition::<Vec<_>, _>(|lease| are_rivals(lease, &touched[seen]));
                touched.extend(rivals.into_iter().cloned());
                rest = others;
                seen += 1;
            }
            let related: Vec<Subnet> = touched
                .iter()
                .flat_map(|lease| lease.subnet.values().copied())
                .collect();
            for view in &mut state.nodes {
                view.doubted.extend(related.iter().copied());
            }
        }
        for (key, lease) in &new {
            let holders = state.holders.entry(key.clone()).or_default();
            holders.insert(lease.node.clone());
        }
        state.truth = new;
        let unreadable = snapshot.unreadable.iter();
        state.unreadable = unreadable.map(|record| record.key.clone()).collect();
        state.notes.extend(notes);
    }

    /// A node's call to the store was made.
    pub(super) fn called(&self, node: &NodeId, what: &str, error: Option<&manager::Error>) {
        let note = match error {
            Some(error) => format!("{node} {what}: {error}"),
            None => format!("{node} {what}: ok"),
        };
        self.state().notes.push(note);
        self.catch_up();
    }

    /// Something happened in a node's program.
    pub(super) fn event(&self, node: usize, event: &OverlayEvent) {
        match event {
            OverlayEvent::LeaseAcquired { subnet } => {
                let mut state = self.state();
                state.nodes[node].acquired = true;
                state.nodes[node].set_own(*subnet);
            }
            OverlayEvent::Step { step, .. } => {
                if let Op::Create(Object::Route(route)) | Op::Change(Object::Route(route)) =
                    &step.op
                {
                    let own = self.state().nodes[node].own;
                    if own.values().any(|own| own.overlaps(&route.dst)) {
                        let what = format!("{} while it holds {own}", step.op.object());
                        self.broken(Invariant::OwnNotRouted, Some(node), what);
                    }
                }
            }
            _ => {}
        }
    }

    /// A node's program gives its kernel a batch of ops.
    pub(super) fn batch_begins(&self, node: usize, objects: &Objects, ops: &[Op]) {
        self.catch_up();
        let (networks, stranger) = {
            let state = self.state();
            (state.networks.clone(), state.nodes[node].stranger)
        };
        // A device is named by its name: what was planned before a stranger had it goes to that one.
        let is_new = stranger.is_some_and(|came| came.elapsed() < PLANNED);
        for op in ops {
            if let Err(why) = check_op(op, objects, ops, &networks, is_new) {
                let what = format!("{} {}: {why}", op.verb(), op.object());
                self.broken(Invariant::InsideThePool, Some(node), what);
            }
        }
        let mut state = self.state();
        state.nodes[node].batch = BatchView {
            before: whole(objects, RouteProtocol::OURS),
            shaken: ops.iter().any(|op| match op {
                Op::Change(Object::Link(_)) => true,
                // A device that is made anew takes what is on it along.
                Op::Delete(Object::Link(link)) => ops
                    .iter()
                    .any(|op| matches!(op, Op::Create(Object::Link(new)) if new.name == link.name)),
                _ => false,
            }),
            ..BatchView::default()
        };
    }

    /// One op of a batch was made, or was not.
    pub(super) fn op(&self, node: usize, objects: &Objects, entry: &LogEntry) {
        let mut state = self.state();
        let view = &mut state.nodes[node];
        view.ops += 1;
        let touched = view
            .foreign
            .iter()
            .find(|(key, object)| objects.get(key) != Some(*object))
            .map(|(key, object)| {
                let now = objects
                    .get(key)
                    .map_or_else(|| "nothing".to_owned(), ToString::to_string);
                format!(
                    "{object} became {now} by {} {}",
                    entry.op.verb(),
                    entry.op.object()
                )
            });
        if let Some(what) = touched {
            view.foreign
                .retain(|key, object| objects.get(key) == Some(object));
            drop(state);
            self.broken(Invariant::ForeignUntouched, Some(node), what);
            return;
        }
        // A device that vanished without being asked to takes what is on it along.
        let vanished = view.batch.before.values().any(|way| {
            link(objects, way.dev).is_none() && entry.op.key() != ObjectKey::Link(way.dev)
        });
        view.batch.failed |= entry.result.is_err();
        view.batch.shaken |= vanished;
        if matches!(entry.op, Op::Create(_)) {
            return;
        }
        let op = || format!("{} {}", entry.op.verb(), entry.op.object());
        for subnet in view.batch.before.keys() {
            if is_whole(objects, RouteProtocol::OURS, subnet) {
                continue;
            }
            view.batch.gaps.entry(*subnet).or_insert_with(op);
            if routes_to(objects, subnet).next().is_none() {
                view.batch.removed.entry(*subnet).or_insert_with(op);
            }
        }
    }

    /// A batch is done.
    pub(super) fn batch_ended(&self, node: usize, objects: &Objects) {
        let mut broken = Vec::new();
        {
            let mut state = self.state();
            let batch = std::mem::take(&mut state.nodes[node].batch);
            let view = &state.nodes[node];
            for (subnet, op) in &batch.gaps {
                let again = is_whole(objects, RouteProtocol::OURS, subnet);
                if again && !batch.failed && !batch.shaken {
                    let what = format!("{subnet} was not routed for a moment, from {op} on");
                    broken.push((Invariant::NoBlackHole, what));
                }
            }
            for (subnet, op) in &batch.removed {
                let gone = routes_to(objects, subnet).next().is_none();
                let doubted = view.doubts_all || view.doubted.iter().any(|d| d.overlaps(subnet));
                let holder = state.holder(&view.id, subnet);
                if let (true, false, Some(holder)) = (gone && !batch.shaken, doubted, holder) {
                    let what = format!(
                        "the route to {subnet} was withdrawn by {op}, though record {} is as ever",
                        holder.key
                    );
                    broken.push((Invariant::NothingWithdrawn, what));
                }
            }
        }
        for (invariant, what) in broken {
            self.broken(invariant, Some(node), what);
        }
    }

    /// Whether two nodes' records overlap in the store. `written` are the keys that others wrote.
    pub(super) fn check_records(&self, written: &BTreeSet<LeaseKey>) {
        let overlap = {
            let state = self.state();
            let of_ours = |lease| {
                let mut nodes = state.nodes.iter();
                Some((nodes.position(|view| view.is(lease))?, lease))
            };
            let ours: Vec<(usize, &Lease)> = state
                .truth
                .values()
                .filter(|lease| !written.contains(&lease.key))
                .filter(|lease| !state.is_replaced(lease))
                .filter_map(of_ours)
                .collect();
            ours.iter().enumerate().find_map(|(nth, (at, a))| {
                let (_, b) = ours[nth + 1..]
                    .iter()
                    .find(|(of, b)| at != of && a.subnet.overlaps(&b.subnet))?;
                Some(format!(
                    "records {} of {} and {} of {}",
                    a.key, a.node, b.key, b.node
                ))
            })
        };
        if let Some(what) = overlap {
            self.broken(Invariant::NoOverlap, None, what);
        }
    }
}

/// Whether two records are in each other's way.
fn are_rivals(a: &Lease, b: &Lease) -> bool {
    let same_data = a
        .attrs
        .backend_data
        .values()
        .any(|data| b.attrs.backend_data.values().any(|other| other == data));
    let same_ip = a
        .attrs
        .public_ip
        .ips()
        .any(|ip| b.attrs.public_ip.ips().any(|other| other == ip));
    a.subnet.overlaps(&b.subnet) || same_data || same_ip || a.node == b.node
}

/// Whether two states of a record mean the same to peers.
fn same(a: Option<&Lease>, b: Option<&Lease>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => {
            a.node == b.node && a.subnet == b.subnet && a.attrs == b.attrs && a.created == b.created
        }
        _ => false,
    }
}

/// Whether a node's program may ask its kernel for this at all.
///
/// `stranger_is_new`: a device of somebody else's has just come to the place of one of ours.
fn check_op(
    op: &Op,
    objects: &Objects,
    ops: &[Op],
    networks: &[Subnet],
    stranger_is_new: bool,
) -> Result<(), String> {
    if matches!(op, Op::Delete(_)) {
        return Ok(());
    }
    let is_inner = |ip| networks.iter().any(|network| network.contains_ip(ip));
    let is_underlay = |dev| {
        let is_overlays = |link: &flannel_core::Link| {
            let alias = link.alias.as_deref().unwrap_or_default();
            // Of such a name none but an overlay's is there that somebody took the mark of.
            let is_bare = link.name.as_str().starts_with("flannel") && alias != PLACE_TAKEN;
            matches!(link.kind, LinkKind::Vxlan(_) | LinkKind::Tun(_))
                && (alias.starts_with("flannel:") || is_bare)
        };
        let made = ops.iter().any(|op| {
            matches!(op, Op::Create(Object::Link(link)) | Op::Change(Object::Link(link))
                if link.name == dev && is_overlays(link))
        });
        // An uplink may be renamed, or gone, since this was planned.
        let was_one = || link(objects, dev).is_none() && is_uplink(dev);
        !made && (was_one() || link(objects, dev).is_some_and(|link| !is_overlays(link)))
    };
    let is_of_others = |dev| !stranger_is_new && is_underlay(dev);
    let complain = |bad: bool, why: &str| if bad { Err(why.to_owned()) } else { Ok(()) };
    match op.object() {
        Object::Route(route) => {
            let network = networks.iter().find(|network| network.contains(&route.dst));
            complain(
                network.is_none_or(|network| route.dst.len() < network.len() + 2),
                "its destination is not a subnet of the network",
            )?;
            complain(
                route.protocol != RouteProtocol::OURS,
                "it does not bear our mark",
            )
        }
        Object::Nexthop(nexthop) => complain(
            !is_inner(nexthop.gateway) && !is_underlay(nexthop.dev) || !is_host(nexthop.gateway),
            "its gateway is neither in the network nor on the underlay",
        ),
        Object::Neighbour(neighbour) => {
            complain(!is_inner(neighbour.ip), "its address is not in the network")?;
            complain(is_of_others(neighbour.dev), "it is on a device of others")
        }
        Object::Fdb(fdb) => {
            complain(
                is_inner(fdb.remote) || !is_host(fdb.remote),
                "its remote is no host of the underlay",
            )?;
            complain(is_of_others(fdb.dev), "it is on a device of others")
        }
        Object::Address(address) => {
            complain(!is_inner(address.ip), "it is not in the network")?;
            complain(
                address.prefix_len != Family::of(&address.ip).bits(),
                "it is not a single address",
            )?;
            complain(is_of_others(address.dev), "it is on a device of others")
        }
        Object::Tunnel(tunnel) => {
            let own = tunnel
                .own
                .values()
                .all(|own| networks.iter().any(|network| network.contains(own)));
            complain(!own, "a subnet of its own is not in the network")?;
            complain(is_of_others(tunnel.dev), "it is on a device of others")
        }
        Object::TunnelPeer(peer) => {
            let network = networks
                .iter()
                .find(|network| network.contains(&peer.subnet));
            complain(
                network.is_none_or(|network| peer.subnet.len() < network.len() + 2),
                "its subnet is not one of the network",
            )?;
            complain(
                is_inner(peer.endpoint.ip()) || !is_host(peer.endpoint.ip()),
                "its endpoint is no host of the underlay",
            )?;
            complain(is_of_others(peer.dev), "it is on a device of others")
        }
        Object::Sysctl(setting) => complain(is_of_others(setting.dev), "it is of others"),
        Object::Offload(offload) => complain(is_of_others(offload.dev), "it is of others"),
        Object::Link(link) => complain(
            link.alias
                .as_deref()
                .is_none_or(|alias| !alias.starts_with("flannel:")),
            "it does not bear our mark",
        ),
        _ => Ok(()),
    }
}
