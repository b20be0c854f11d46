//! Trials, of which each history ends with one, when everything is as it should be: the uplink of
//! each node moves, a node gets another id, a stranger copies records. Here it can be told exactly
//! what may come of it, as nothing else happens.

use std::time::Duration;

use flannel_core::{
    Condition, ConditionStatus, ConditionType, DualStack, LeaseAttrs, LeaseKey, NodeId, Object, Op,
    Revision, Subnet,
};

use super::action::{Hostile, KernelAction, LOST, Master, NodeAction, Renaming, StoreAction};
use super::cluster::Tamper;
use super::hardware::addresses;
use super::judge::Invariant;
use super::model::own_record;
use super::node::Node;
use super::settle::BOUND;
use super::uplink::{is_named, second, second_addresses};
use super::world::World;

/// The time between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// The time in which nothing may come of what changes nothing.
const QUIET: Duration = Duration::from_secs(4);

/// The time beside a wait that a node may take to notice something and to publish what follows.
const NOTICED: Duration = Duration::from_secs(3);

/// The time for which an uplink is lost that is waited for.
const MOMENT: Duration = Duration::from_secs(2);

/// The time between two addresses of one interface that a DHCP client takes.
const RENEWAL: Duration = Duration::from_millis(200);

/// The time that a call waits for its answer, and a little more.
const ANSWERED: Duration = Duration::from_secs(35);

/// The longest time that records last which are removed before anything is tried: their end would be
/// taken for what came of it.
const SHORT: Duration = Duration::from_secs(90);

/// A trial.
#[derive(Debug, Clone, Copy)]
enum Trial {
    /// The uplinks get other names.
    Renamed,
    /// The uplinks become ports.
    Port(Master),
    /// Second uplinks come, look better, and go.
    Second,
    /// The uplinks go down for a moment.
    Flap,
    /// The uplinks go down while there are others.
    Down,
    /// The uplinks lose their addresses while there are others.
    Bare,
    /// The uplinks get other addresses.
    Renumbered,
    /// A node gets another id.
    Node(Renaming),
    /// A node gets another id, and the network another VNI.
    NodeAndVni,
    /// Somebody writes copies of nodes' records under other ids.
    Copies,
}

const TRIALS: [Trial; 14] = [
    Trial::Renamed,
    Trial::Node(Renaming::Kept),
    Trial::Port(Master::Bridge),
    Trial::Second,
    Trial::Down,
    Trial::Node(Renaming::Forgotten),
    Trial::Port(Master::Bond),
    Trial::Renumbered,
    Trial::NodeAndVni,
    Trial::Copies,
    Trial::Flap,
    Trial::Port(Master::Vrf),
    Trial::Node(Renaming::Moved),
    Trial::Bare,
];

impl Trial {
    /// The kind by which it is counted.
    const fn kind(self) -> &'static str {
        match self {
            Self::Renamed => "trial uplinks renamed",
            Self::Port(Master::Bridge) => "trial uplinks in bridges",
            Self::Port(Master::Bond) => "trial uplinks in bonds",
            Self::Port(Master::Vrf) => "trial uplinks in VRFs",
            Self::Second => "trial better uplinks",
            Self::Flap => "trial uplinks down for a moment",
            Self::Down => "trial uplinks down",
            Self::Bare => "trial uplinks without addresses",
            Self::Renumbered => "trial uplinks renumbered",
            Self::Node(Renaming::Kept) => "trial node renamed",
            Self::Node(Renaming::Forgotten) => "trial node renamed without state",
            Self::Node(Renaming::Moved) => "trial node renamed and moved",
            Self::NodeAndVni => "trial node renamed under another VNI",
            Self::Copies => "trial records copied",
        }
    }
}

/// The record of a node as peers see it.
type Published = Option<(LeaseKey, DualStack<Subnet>, LeaseAttrs, Revision)>;

impl World {
    /// Tries one thing, by the seed, and sees to it that everything is right again.
    pub(super) async fn is_tried(&mut self) -> Option<()> {
        let count = TRIALS.len() as u64;
        let trial = TRIALS[usize::try_from(self.seed % count).unwrap_or_default()];
        self.end_calls().await?;
        self.remove_short_lived().await?;
        self.trace.add(trial.kind());
        self.deeds.clear();
        let done = match trial {
            Trial::Renamed => self.try_renamed().await?,
            Trial::Port(master) => self.try_port(master).await?,
            Trial::Second => self.try_second().await?,
            Trial::Flap => self.try_flap().await?,
            Trial::Down => {
                let (take, give) = (KernelAction::UnderlayDown, KernelAction::UnderlayUp);
                self.try_loss(take, give).await?
            }
            Trial::Bare => {
                let (take, give) = (KernelAction::UnderlayBare, KernelAction::UnderlayDressed);
                self.try_loss(take, give).await?
            }
            Trial::Renumbered => self.try_renumbered().await?,
            Trial::Node(Renaming::Moved) => self.try_node_moved().await?,
            Trial::Node(renaming) => self.try_node(renaming).await?,
            Trial::NodeAndVni => self.try_node_and_vni().await?,
            Trial::Copies => self.try_copies().await?,
        };
        if done {
            self.count(trial.kind());
        }
        self.is_right_again(trial.kind()).await
    }

    async fn is_right_again(&mut self, after: &str) -> Option<()> {
        let begun = self.judge.elapsed();
        loop {
            self.pass(LOOK).await;
            if self.is_over() {
                return None;
            }
            let mut problems = self.problems();
            let took = self.judge.elapsed().saturating_sub(begun);
            if problems.is_empty() {
                return Some(());
            }
            if took > BOUND {
                let (node, what) = problems.swap_remove(0);
                let what = format!("after {after}, not within {BOUND:?}: {what}");
                self.judge.broken(Invariant::Converges, node, what);
                return None;
            }
        }
    }

    /// Waits for the calls that faults left without an answer: what came of their end would be taken for
    /// what came of the trial.
    async fn end_calls(&mut self) -> Option<()> {
        let is_busy = |node: &Node| node.process.as_ref().is_some_and(|p| p.io.is_busy());
        if !self.nodes.iter().any(is_busy) {
            return Some(());
        }
        let begun = self.judge.elapsed();
        while self.nodes.iter().any(is_busy)
            && self.judge.elapsed().saturating_sub(begun) < ANSWERED
        {
            self.pass(LOOK).await;
            if self.is_over() {
                return None;
            }
        }
        self.is_right_again("calls ended").await
    }

    /// Removes records of others that would soon end by themselves.
    async fn remove_short_lived(&mut self) -> Option<()> {
        let records = self.judge.records();
        let is_nodes = |node: &NodeId| self.nodes.iter().any(|n| n.id == *node);
        let is_short = |ttl: Option<Duration>| ttl.is_some_and(|ttl| ttl <= SHORT);
        let goes = records.leases.iter();
        let goes = goes.filter(|lease| is_short(lease.ttl) && !is_nodes(&lease.node));
        let goes = goes.filter(|lease| self.written.contains(&lease.key));
        let keys: Vec<LeaseKey> = goes.map(|lease| lease.key.clone()).collect();
        if keys.is_empty() {
            return Some(());
        }
        for key in keys {
            self.tamper(Tamper::Remove(key));
        }
        self.is_right_again("records were removed").await
    }

    /// The nodes that their first uplink carries.
    fn carried_by_first(&self) -> Vec<usize> {
        let all = 0..self.nodes.len();
        let is_carried = |at: &usize| {
            let node = &self.nodes[*at];
            node.member && self.external_of(*at) == Some(node.uplink.dev())
        };
        all.filter(is_carried).collect()
    }

    fn external_of(&self, at: usize) -> Option<flannel_core::IfName> {
        let process = self.nodes[at].process.as_ref()?;
        let status = process.overlay.status();
        status.external.as_ref().map(|external| external.dev)
    }

    fn condition_of(&self, at: usize, kind: ConditionType) -> Option<Condition> {
        let process = self.nodes[at].process.as_ref()?;
        process.overlay.status().condition(kind).cloned()
    }

    fn published(&self, at: usize) -> Published {
        let records = self.judge.records();
        let record = own_record(&self.nodes[at].id, &self.config, &records.leases)?;
        let attrs = record.attrs.clone();
        Some((record.key.clone(), record.subnet, attrs, record.created))
    }

    fn published_by(&self, nodes: &[usize]) -> Vec<Published> {
        nodes.iter().map(|at| self.published(*at)).collect()
    }

    /// Lets time pass in which nothing comes of what was done: nodes publish what they published, and
    /// tear down nothing that packets need.
    async fn keeps(&mut self, nodes: &[usize], before: &[Published], time: Duration) -> Option<()> {
        let begun = self.judge.elapsed();
        while self.judge.elapsed().saturating_sub(begun) < time {
            self.pass(LOOK.min(time)).await;
            if self.is_over() {
                return None;
            }
            for (at, before) in nodes.iter().zip(before) {
                let now = self.published(*at);
                if now != *before {
                    let what = format!("it publishes {now:?}, not {before:?}");
                    return self.fails(Invariant::Follows, *at, what);
                }
            }
        }
        self.nothing_torn(nodes, before)
    }

    fn nothing_torn(&mut self, nodes: &[usize], before: &[Published]) -> Option<()> {
        let deeds = std::mem::take(&mut self.deeds);
        let subnets = subnets(before);
        let tears = |op: &Op| tears(op) && serves(op.object(), &subnets);
        let mut of_nodes = deeds.into_iter().filter(|(at, _)| nodes.contains(at));
        match of_nodes.find(|(_, op)| tears(op)) {
            Some((at, op)) => {
                let what = format!("{} {}", op.verb(), op.object());
                self.fails(Invariant::Follows, at, what)
            }
            None => Some(()),
        }
    }

    fn fails(&self, invariant: Invariant, at: usize, what: String) -> Option<()> {
        self.judge.broken(invariant, Some(at), what);
        None
    }

    /// The uplinks are lost for now: nodes say so, and name them.
    fn tell_loss(&self, nodes: &[usize]) -> Option<()> {
        for at in nodes {
            let dev = self.external_of(*at).map(|dev| dev.to_string());
            let told = self.condition_of(*at, ConditionType::Underlay);
            let is_told = told.as_ref().is_some_and(|condition| {
                condition.status == ConditionStatus::False
                    && condition.reason == "Lost"
                    && dev.is_some_and(|dev| condition.message.contains(&dev))
            });
            if !is_told {
                let what = format!("its interface is lost, and it says {told:?}");
                return self.fails(Invariant::Tells, *at, what);
            }
        }
        Some(())
    }

    async fn try_renamed(&mut self) -> Option<bool> {
        let mut nodes = self.carried_by_first();
        nodes.retain(|at| !self.nodes[*at].uplink.has_master());
        let before = self.published_by(&nodes);
        for at in &nodes {
            self.act_on_kernel(*at, KernelAction::UnderlayRenamed);
        }
        self.keeps(&nodes, &before, QUIET).await?;
        self.follow_first(&nodes)?;
        Some(!nodes.is_empty())
    }

    /// The nodes are carried by their first uplinks, whatever became of these.
    fn follow_first(&self, nodes: &[usize]) -> Option<()> {
        for at in nodes {
            let (found, expected) = (self.external_of(*at), self.nodes[*at].uplink.dev());
            if found != Some(expected) {
                let what = format!("{found:?} carries it, not {expected}");
                return self.fails(Invariant::Follows, *at, what);
            }
        }
        Some(())
    }

    async fn try_port(&mut self, master: Master) -> Option<bool> {
        let mut nodes = self.carried_by_first();
        nodes.retain(|at| !self.nodes[*at].uplink.has_master());
        let before = self.published_by(&nodes);
        for at in &nodes {
            self.judge.doubt_all(*at);
            self.become_port(*at, master);
            self.follow_foreign(*at);
        }
        self.keeps(&nodes, &before, 2 * LOOK).await?;
        self.tell_loss(&nodes)?;
        for at in &nodes {
            self.put_addresses(*at);
        }
        self.keeps(&nodes, &before, QUIET).await?;
        self.follow_first(&nodes)?;
        Some(!nodes.is_empty())
    }

    async fn try_second(&mut self) -> Option<bool> {
        let mut nodes = self.carried_by_first();
        nodes.retain(|at| !self.nodes[*at].uplink.has_second());
        let before = self.published_by(&nodes);
        for action in [KernelAction::SecondUplink, KernelAction::SecondUplinkGone] {
            for at in &nodes {
                self.act_on_kernel(*at, action);
            }
            self.deeds.clear();
            self.keeps(&nodes, &before, QUIET).await?;
            self.follow_first(&nodes)?;
        }
        Some(!nodes.is_empty())
    }

    async fn try_flap(&mut self) -> Option<bool> {
        let nodes = self.carried_by_first();
        let before = self.published_by(&nodes);
        for at in &nodes {
            self.act_on_kernel(*at, KernelAction::UnderlayDown);
        }
        self.keeps(&nodes, &before, MOMENT).await?;
        self.tell_loss(&nodes)?;
        for at in &nodes {
            self.act_on_kernel(*at, KernelAction::UnderlayUp);
        }
        self.keeps(&nodes, &before, QUIET).await?;
        self.follow_first(&nodes)?;
        Some(!nodes.is_empty())
    }

    /// The first uplinks are lost for longer than they are waited for: the second ones carry the overlay
    /// then, and nodes say why.
    async fn try_loss(&mut self, take: KernelAction, give: KernelAction) -> Option<bool> {
        let mut nodes = self.carried_by_first();
        nodes.retain(|at| !is_named(self.nodes[*at].number));
        for at in &nodes {
            self.act_on_kernel(*at, KernelAction::SecondUplink);
        }
        self.pass(LOOK).await;
        for at in &nodes {
            self.act_on_kernel(*at, take);
        }
        self.pass(MOMENT).await;
        if self.is_over() {
            return None;
        }
        self.tell_loss(&nodes)?;
        self.pass(LOST + NOTICED - MOMENT).await;
        if self.is_over() {
            return None;
        }
        for at in &nodes {
            let found = self.external_of(*at);
            let has = second_addresses(self.nodes[*at].number);
            let published = self.published(*at);
            let is_published = published.as_ref().is_some_and(|(_, _, attrs, _)| {
                let mut families = self.config.families();
                families.all(|family| attrs.public_ip(family) == has.ip(family))
            });
            let told = self.condition_of(*at, ConditionType::Underlay);
            let is_told = told.as_ref().is_some_and(|condition| {
                condition.status == ConditionStatus::True
                    && condition.message.contains("before it was")
            });
            if found != Some(second()) || !is_published || !is_told {
                let what =
                    format!("{found:?} carries it, it publishes {published:?}, says {told:?}");
                self.fails(Invariant::Follows, *at, what)?;
            }
        }
        for at in &nodes {
            self.act_on_kernel(*at, give);
        }
        Some(!nodes.is_empty())
    }

    async fn try_renumbered(&mut self) -> Option<bool> {
        let nodes = self.carried_by_first();
        let before = self.published_by(&nodes);
        for at in &nodes {
            self.act_on_kernel(*at, KernelAction::UnderlayBare);
        }
        self.pass(RENEWAL).await;
        for at in &nodes {
            self.nodes[*at].address = (self.nodes[*at].address + 1) % 4;
            self.act_on_kernel(*at, KernelAction::UnderlayDressed);
        }
        self.pass(NOTICED).await;
        if self.is_over() {
            return None;
        }
        for (at, before) in nodes.iter().zip(before) {
            let node = &self.nodes[*at];
            let has = addresses(node.number, node.address);
            let now = self.published(*at);
            let is_right = match (&now, &before) {
                (Some((key, subnet, attrs, _)), Some((old_key, old_subnet, ..))) => {
                    let mut families = self.config.families();
                    (key, subnet) == (old_key, old_subnet)
                        && families.all(|family| attrs.public_ip(family) == has.ip(family))
                }
                _ => false,
            };
            if !is_right {
                let what = format!("it publishes {now:?}, before its address changed {before:?}");
                self.fails(Invariant::Follows, *at, what)?;
            }
        }
        self.follow_first(&nodes)?;
        Some(!nodes.is_empty())
    }

    /// A node that is known again whatever its saved state says: with one uplink, that it finds.
    fn some_node(&self) -> Option<usize> {
        let mut nodes = self.carried_by_first();
        nodes.retain(|at| {
            let node = &self.nodes[*at];
            let is_plain =
                !node.uplink.has_master() && node.uplink.dev() == super::hardware::external();
            !node.uplink.has_second() && (is_plain || !is_named(node.number))
        });
        let nth = usize::try_from(self.seed / TRIALS.len() as u64).unwrap_or_default();
        let nth = nth.checked_rem(nodes.len())?;
        Some(nodes[nth])
    }

    /// A node gets another id: what it has stays its own, and others do nothing.
    async fn try_node(&mut self, renaming: Renaming) -> Option<bool> {
        let Some(at) = self.some_node() else {
            return Some(false);
        };
        // Whoever knows the last value of what cannot be read holds it against all but its very node id.
        let mut differs = self.remove_unreadable_of(&self.nodes[at].id);
        if let Some(record) = self.record_of(at) {
            // What is reserved for an id is not its successor's.
            differs |= self.tamper(Tamper::Unreserve(record.node, record.subnet));
        }
        if differs {
            self.is_right_again("a node's records were mended").await?;
        }
        let former = self.nodes[at].id.clone();
        let before = self.published(at);
        self.deeds.clear();
        self.act_on_node_now(at, renaming).await;
        self.is_right_again("a node was renamed").await?;
        let now = self.published(at);
        let subnet = |published: &Published| {
            published
                .as_ref()
                .map(|(key, subnet, ..)| (key.clone(), *subnet))
        };
        if subnet(&now) != subnet(&before) {
            let what = format!("under its new id it has {now:?}, not {before:?}");
            self.fails(Invariant::StaysItself, at, what)?;
        }
        let subnets = subnets(std::slice::from_ref(&before));
        let mut deeds = std::mem::take(&mut self.deeds).into_iter();
        let of_others = |(of, op): &(usize, Op)| *of != at && serves(op.object(), &subnets);
        if let Some((other, op)) = deeds.find(of_others) {
            let what = format!("another node was renamed: {} {}", op.verb(), op.object());
            self.fails(Invariant::StaysItself, other, what)?;
        }
        let records = self.judge.records();
        let mut records = records.leases.iter();
        if let Some(left) = records.find(|lease| lease.node == former && lease.ttl.is_some()) {
            let what = format!("its record {} of {} is still there", left.key, left.node);
            self.fails(Invariant::StaysItself, at, what)?;
        }
        Some(true)
    }

    async fn act_on_node_now(&mut self, at: usize, renaming: Renaming) {
        self.remove_unreadable_of(&self.nodes[at].id);
        let action = super::action::Action::Node(at, NodeAction::Rename(renaming));
        self.act(&action).await;
    }

    /// A node gets another id and another address: nothing says that it is the same one. It has a record
    /// that names its address, and tells if others must reject it for the one that it left.
    async fn try_node_moved(&mut self) -> Option<bool> {
        let Some(at) = self.some_node() else {
            return Some(false);
        };
        self.act_on_node_now(at, Renaming::Moved).await;
        self.is_right_again("a node was renamed and moved").await?;
        self.tells_what_remains(at)?;
        Some(true)
    }

    /// Where peers must reject a node's record for another, its status names that.
    fn tells_what_remains(&self, at: usize) -> Option<()> {
        let lease = self.condition_of(at, ConditionType::Lease);
        let records = self.judge.records();
        let mut keys = records.leases.iter().map(|lease| lease.key.as_str());
        let own = self.published(at).map(|(key, ..)| key.as_str().to_owned());
        let mut names_one = |condition: &Condition| {
            keys.any(|key| Some(key) != own.as_deref() && condition.message.contains(key))
        };
        match lease {
            Some(condition) if condition.reason == "Rejected" && !names_one(&condition) => {
                let what = format!("it does not say for which record: {}", condition.message);
                self.fails(Invariant::Tells, at, what)
            }
            _ => Some(()),
        }
    }

    async fn try_node_and_vni(&mut self) -> Option<bool> {
        let vni = |config: &flannel_core::NetworkConfig| {
            config.backend().u32("VNI", 1, 0..=u32::MAX).ok()
        };
        let is_next = |config: &flannel_core::NetworkConfig| {
            config.pools() == self.config.pools()
                && config.backend().backend_type() == self.config.backend().backend_type()
                && vni(config) != vni(&self.config)
        };
        let next = self.setup.configs.iter().position(is_next);
        let (Some(at), Some(next)) = (self.some_node(), next) else {
            return Some(false);
        };
        self.kill(at).await;
        if !self.act_on_store(StoreAction::Config(next)) {
            return Some(false);
        }
        self.act_on_node_now(at, Renaming::Kept).await;
        self.is_right_again("a node was renamed and the VNI changed")
            .await?;
        self.tells_what_remains(at)?;
        Some(true)
    }

    /// Copies of records change nothing for those whose they are.
    async fn try_copies(&mut self) -> Option<bool> {
        let is_held = |at: &usize| {
            let lease = self.condition_of(*at, ConditionType::Lease);
            lease.is_some_and(|lease| lease.reason == "Held")
        };
        // What others reject already they may reject for the copy.
        let nodes: Vec<usize> = (0..self.nodes.len()).filter(is_held).collect();
        // And a copy in the place of what cannot be read would be as old as that.
        let remove = |at: &usize| self.remove_unreadable_of(&self.nodes[*at].id);
        if nodes.iter().filter(|at| remove(at)).count() > 0 {
            self.is_right_again("what cannot be read was removed")
                .await?;
        }
        let before = self.published_by(&nodes);
        let mut done = false;
        for at in &nodes {
            let n = u8::try_from(13 * at % 250).unwrap_or_default();
            done |= self.act_on_store(StoreAction::Put(Hostile::Clone, *at, n));
        }
        let subnets = subnets(&before);
        let begun = self.judge.elapsed();
        while self.judge.elapsed().saturating_sub(begun) < 4 * QUIET {
            self.pass(LOOK).await;
            if self.is_over() {
                return None;
            }
            for (at, before) in nodes.iter().zip(&before) {
                let now = self.published(*at);
                let lease = self.condition_of(*at, ConditionType::Lease);
                let is_held = lease.as_ref().is_some_and(|lease| lease.reason == "Held");
                if now != *before || !is_held {
                    let what =
                        format!("a copy of its record came: {now:?}, not {before:?}; {lease:?}");
                    self.fails(Invariant::StaysItself, *at, what)?;
                }
            }
            let deeds = std::mem::take(&mut self.deeds);
            if let Some((at, op)) = deeds
                .into_iter()
                .find(|(_, op)| serves(op.object(), &subnets))
            {
                let what = format!("records were copied: {} {}", op.verb(), op.object());
                self.fails(Invariant::StaysItself, at, what)?;
            }
        }
        Some(done)
    }
}

fn subnets(published: &[Published]) -> Vec<Subnet> {
    let of_each = published.iter().flatten();
    of_each
        .flat_map(|(_, subnet, ..)| subnet.values().copied())
        .collect()
}

/// Tells if an op takes what packets need, or makes anew what they went through.
fn tears(op: &Op) -> bool {
    match op {
        Op::Create(object) => matches!(object, Object::Link(_) | Object::Tunnel(_)),
        Op::Delete(object) => !matches!(object, Object::Nexthop(_)),
        Op::Change(_) => false,
    }
}

/// Tells if an object serves one of these subnets, or all.
fn serves(object: &Object, subnets: &[Subnet]) -> bool {
    match object {
        Object::Route(route) => subnets.contains(&route.dst),
        Object::TunnelPeer(peer) => subnets.contains(&peer.subnet),
        Object::Neighbour(neighbour) => subnets
            .iter()
            .any(|subnet| subnet.contains_ip(neighbour.ip)),
        Object::Link(_) | Object::Tunnel(_) | Object::Address(_) => true,
        _ => false,
    }
}
