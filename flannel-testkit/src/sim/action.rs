//! What can happen to a simulated cluster: each thing a value that can be printed and done again.
//!
//! Actions name what they are about by number and never by value, so that an action still means
//! something after others were taken out of its history: *the third object of ours that is there
//! then*, not *the route 10.42.7.0/24*.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::fake_kernel::Failure;

/// The time that an interface is waited for that is lost.
pub(super) const LOST: Duration = Duration::from_secs(3);

/// One thing that happens, and the time that passes after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What happens.
    pub action: Action,
    /// How long nothing else happens then, in virtual time.
    pub then: Duration,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, then {:?}", self.action, self.then)
    }
}

/// Something that happens. Nodes are counted from 0; a number that is too large is taken modulo
/// what there is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Action {
    /// Nothing but time.
    Wait,
    /// To a node as a whole.
    Node(usize, NodeAction),
    /// Between a node and the store.
    Link(usize, LinkAction),
    /// In a node's kernel.
    Kernel(usize, KernelAction),
    /// In the store.
    Store(StoreAction),
    /// To a Go peer.
    Go(usize, GoAction),
}

/// What happens to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum NodeAction {
    /// The program is started, if it does not run.
    Start,
    /// The program is told to stop.
    Stop,
    /// The node leaves: its lease is given up, its kernel objects are removed, its state is lost.
    Leave,
    /// The program dies.
    Crash(CrashPoint),
    /// The machine starts anew: its kernel is empty, the program does not run.
    Reboot,
    /// The machine sleeps; its clock goes on.
    Suspend,
    /// The machine wakes.
    Resume,
    /// The node's clock jumps forward: it slept while its timers stood still.
    Jump(Duration),
    /// Something is wrong with the place of the saved state.
    State(StateFault),
    /// The program dies and is started under another node id.
    Rename(Renaming),
}

/// The other things that happen to a node that is renamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Renaming {
    /// Nothing.
    Kept,
    /// Its saved state is lost.
    Forgotten,
    /// It has other addresses on the underlay.
    Moved,
}

impl Renaming {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Kept, Self::Forgotten, Self::Moved];
}

/// When a program dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum CrashPoint {
    /// At once.
    Now,
    /// Directly before it would do something outside of itself (ask the store, read or change the
    /// kernel, save its state), after so many such things.
    Before(u8),
    /// Directly after something was done, before it is told so.
    After(u8),
    /// In the middle of a batch of changes to the kernel, after so many changes.
    InBatch(u8),
}

/// What is wrong with the place of the saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum StateFault {
    /// The next write fails and leaves what was there.
    WriteFails,
    /// The next write is torn: nothing can be read afterwards.
    WriteTorn,
    /// The next reading fails.
    ReadFails,
    /// It is empty again.
    Lost,
    /// The state of one write before is back.
    Old,
}

/// What happens between a node and the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum LinkAction {
    /// Nothing passes any more.
    Cut {
        /// Whether calls wait (packets are dropped) or fail at once (refused).
        silent: bool,
    },
    /// Everything passes again.
    Heal,
    /// Calls and deliveries take longer; zero: no longer.
    Delay(Duration),
    /// The next call fails and is not made.
    LoseRequest,
    /// The next call is made and its answer is lost.
    LoseAnswer,
    /// Deliveries of the watch are held for a while, then come as said.
    Hold(Duration, Delivery),
    /// The watch breaks; it reports that and starts again.
    Break,
    /// The watch ends for good; the next one starts with a snapshot.
    End,
    /// The watch has lost history: its next item is a snapshot.
    Resnapshot,
    /// Something on the wire, below the manager.
    Wire(WireAction),
}

/// What happens on the wire between a manager and a store that has one ([`Cluster::disturb`]).
///
/// [`Cluster::disturb`]: super::Cluster::disturb
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum WireAction {
    /// Nothing passes and nobody says so.
    Cut,
    /// Every call fails at once; watches break.
    Refuse,
    /// The store denies every call; watches break.
    Deny,
    /// The wire works again.
    Heal,
    /// Each call takes so long each way.
    Latency(Duration),
    /// A call is lost on its way there.
    LoseRequest {
        /// The one after so many others.
        after: u8,
        /// Its caller is not told.
        hangs: bool,
    },
    /// A call's answer is lost.
    LoseAnswer {
        /// The one after so many others.
        after: u8,
        /// Its caller is not told.
        hangs: bool,
    },
    /// A call is held up on its way there, until [`DeliverParked`](Self::DeliverParked).
    Park {
        /// The one after so many others.
        after: u8,
        /// Its caller is not told.
        hangs: bool,
    },
    /// What was held up arrives, and is done.
    DeliverParked,
    /// How watches deliver from now on, one bit each: squashed, reordered, split, repeated, held,
    /// late.
    Deliver(u8),
    /// Watches break.
    Break,
    /// Open watches deliver nothing any more, and do not say so.
    Deafen,
}

/// What happens to a Go peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum GoAction {
    /// It is started, with what it left on its host.
    Start,
    /// It is killed.
    Kill,
}

/// How held deliveries come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Delivery {
    /// In order, only late.
    Late,
    /// In another order across records.
    Reordered,
    /// Each once more, after all of them.
    Repeated,
    /// Of each record only the last.
    Squashed,
}

/// What happens in a node's kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum KernelAction {
    /// The next op on an object of a kind fails.
    FailOp(Kind, Fails),
    /// The next op on the object of ours with this number fails.
    FailKey(u8, Fails),
    /// The next reading fails.
    FailObserve(Fails),
    /// The next batch times out after so many ops.
    ApplyTimesOut(u8),
    /// A device of ours is deleted in the middle of the next batch longer than this.
    DeviceDeleted(u8),
    /// The next hints are lost, and the watch knows it.
    Overrun,
    /// The next hints are lost, and nobody knows it.
    HintsLost,
    /// Of the next notifications a part is lost, and the watch knows it.
    HintsTorn,
    /// The next notifications come a second time, after others.
    HintsRepeated,
    /// The next notifications come in the reverse order.
    HintsReordered,
    /// The next notifications come late.
    HintsLate(Duration),
    /// Every op on the object of ours with this number fails, until all is accepted.
    Refuse(u8, Fails),
    /// Everything is accepted again, by the next node that refuses something.
    Accept,
    /// Every call takes so long; zero: none.
    Latency(Duration),
    /// Somebody deletes an object of ours of a kind, the one with this number.
    Delete(Kind, u8),
    /// Somebody alters an object of ours of a kind, the one with this number.
    Alter(Kind, u8),
    /// Somebody sets a device of ours down.
    LinkDown(u8),
    /// Somebody takes the mark of an object of ours, the one with this number.
    Unmark(u8),
    /// Somebody puts a route of their own in the place of one of ours, the one with this number.
    ForeignRoute(u8),
    /// Somebody puts a device of their own in the place of one of ours, the one with this number: of its
    /// name, or of its VNI and port.
    ForeignDevice(u8),
    /// Somebody takes all such routes and devices away, on the next node that has some.
    ForeignGone,
    /// The external interface goes down.
    UnderlayDown,
    /// The external interface comes up with its addresses and routes, on the next node where it is
    /// down.
    UnderlayUp,
    /// The external interface is taken out and comes back, with another index.
    UnderlayRemade,
    /// The external interface has another MTU.
    UnderlayMtu(u16),
    /// The node has other addresses on the underlay: its own ones of this number.
    UnderlayAddress(u8),
    /// The external interface gets its other name, or its first one again.
    UnderlayRenamed,
    /// The external interface becomes a port, and the device that it belongs to has its addresses and
    /// routes.
    UnderlayPort(Master),
    /// The external interface is no port any more and has its addresses and routes itself, on the next
    /// node where it is one.
    UnderlayFree,
    /// The external interface goes down for so long.
    UnderlayFlap(Duration),
    /// The external interface loses its addresses and default routes.
    UnderlayBare,
    /// It has them again, on the next node where it lacks them.
    UnderlayDressed,
    /// The external interface loses its addresses, and after so long it has the node's own ones of this
    /// number.
    UnderlayRenumbered(u8, Duration),
    /// A second uplink comes, with better default routes.
    SecondUplink,
    /// It goes, on the next node that has one.
    SecondUplinkGone,
    /// Somebody switches forwarding off.
    ForwardingOff,
    /// It is switched on, on the next node where it is off.
    ForwardingOn,
    /// Somebody puts a policy rule in front of all routes into the overlay.
    RuleInFront,
    /// It is taken away, on the next node that has one.
    RuleGone,
}

/// Devices that interfaces can be ports of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Master {
    /// A bridge.
    Bridge,
    /// A bond.
    Bond,
    /// A VRF.
    Vrf,
}

impl Master {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bridge, Self::Bond, Self::Vrf];
}

/// The kinds of kernel objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Kind {
    /// A device.
    Link,
    /// A setting.
    Sysctl,
    /// An address.
    Address,
    /// A forwarding entry.
    Fdb,
    /// A neighbour.
    Neighbour,
    /// A nexthop object.
    Nexthop,
    /// A route.
    Route,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Link,
        Self::Sysctl,
        Self::Address,
        Self::Fdb,
        Self::Neighbour,
        Self::Nexthop,
        Self::Route,
    ];

    /// The words of [`flannel_core::ObjectKey::kind`] that it stands for: a packet path has a tunnel
    /// and its peers where VXLAN has forwarding entries and neighbours.
    pub const fn words(self) -> [&'static str; 2] {
        match self {
            Self::Fdb => [self.word(), "tunnel"],
            Self::Neighbour => [self.word(), "tunnel-peer"],
            _ => [self.word(), self.word()],
        }
    }

    /// The word of [`flannel_core::ObjectKey::kind`].
    pub const fn word(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Sysctl => "sysctl",
            Self::Address => "address",
            Self::Fdb => "fdb",
            Self::Neighbour => "neighbour",
            Self::Nexthop => "nexthop",
            Self::Route => "route",
        }
    }
}

/// How a kernel call fails: a [`Failure`] by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the classes of flannel_core::kernel::Error")]
pub enum Fails {
    Busy,
    NotPermitted,
    Unsupported,
    Exists,
    NotFound,
    NoSuchDevice,
    Rejected,
    TimedOut,
    Interrupted,
    Connection,
}

impl Fails {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Busy,
        Self::NotPermitted,
        Self::Unsupported,
        Self::Exists,
        Self::NotFound,
        Self::NoSuchDevice,
        Self::Rejected,
        Self::TimedOut,
        Self::Interrupted,
        Self::Connection,
    ];
}

impl From<Fails> for Failure {
    fn from(fails: Fails) -> Self {
        match fails {
            Fails::Busy => Self::Busy,
            Fails::NotPermitted => Self::NotPermitted,
            Fails::Unsupported => Self::Unsupported,
            Fails::Exists => Self::Exists,
            Fails::NotFound => Self::NotFound,
            Fails::NoSuchDevice => Self::NoSuchDevice,
            Fails::Rejected => Self::Rejected,
            Fails::TimedOut => Self::TimedOut,
            Fails::Interrupted => Self::Interrupted,
            Fails::Connection => Self::Connection,
        }
    }
}

/// What happens in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum StoreAction {
    /// Somebody writes a record that is not to be trusted, made from a node's own (the first
    /// number) and unlike others of the kind (the second).
    Put(Hostile, usize, u8),
    /// Somebody writes over a node's record in another's name.
    Take(usize),
    /// Somebody deletes a node's record.
    RemoveOf(usize),
    /// Somebody deletes the record with this number, whosever it is.
    Remove(u8),
    /// A node's record is overwritten with what nobody can read.
    Garble(usize),
    /// What nobody can read is put under a key of its own.
    Junk(u8),
    /// Somebody puts what no node can have written beside or over a node's record.
    Debris(Debris, usize, u8),
    /// Somebody deletes all records, and the network config with them or not: the next one that is
    /// written is the one that was there.
    Empty {
        /// With the config.
        all: bool,
    },
    /// Another network config is written.
    Config(usize),
    /// A config that nobody can read is written.
    BadConfig,
    /// A backup is made.
    Backup,
    /// The last backup is restored.
    Restore,
    /// History is forgotten.
    Compact,
    /// A node's subnets are reserved for it.
    Reserve(usize),
    /// A node's reservation ends: that of the next node that has one.
    Unreserve(usize),
}

/// What stands under keys of records and is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Debris {
    /// An empty object under the key of a part of the node's subnet.
    InOwn,
    /// An empty object under the key of half of the network.
    Half,
    /// A record of Go flannel's for a network of other families.
    OtherStack,
    /// So much that no answer may hold it.
    Huge,
    /// A record of a part of the LAN that some nodes have inside of the network.
    Lan,
}

impl Debris {
    /// All of it.
    pub const ALL: [Self; 5] = [
        Self::InOwn,
        Self::Half,
        Self::OtherStack,
        Self::Huge,
        Self::Lan,
    ];
}

/// Records that are not to be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Hostile {
    /// An honest one, as of a node of another program.
    Honest,
    /// It has the other family only.
    OtherFamily,
    /// Its subnet is the node's own.
    OwnSubnet,
    /// Its subnet lies in the node's own.
    InsideOwn,
    /// Its subnet covers the node's own and its neighbour.
    AroundOwn,
    /// Its subnet lies outside of the network.
    OutsidePool,
    /// Its subnet is everything.
    DefaultRoute,
    /// Its subnet is multicast.
    Multicast,
    /// Its subnet is the whole network.
    WholePool,
    /// Its subnet is the underlay.
    Underlay,
    /// Its subnet is a part of the LAN that some nodes have inside of the network. Drawn as
    /// [`Debris::Lan`].
    Lan,
    /// Its VTEP MAC is the node's.
    DuplicateMac,
    /// Its VTEP MAC is no single device's.
    MulticastMac,
    /// Its public address is the node's.
    OwnPublicIp,
    /// Its public address is no host's.
    BadPublicIp,
    /// Its public address lies in the overlay.
    InnerPublicIp,
    /// It has no public address.
    NoPublicIp,
    /// It is of another backend.
    OtherBackend,
    /// It has no backend data.
    NoData,
    /// Its backend data is not of the form.
    MalformedData,
    /// Its backend data is as large as is accepted.
    HugeData,
    /// It is of another overlay: another VNI.
    OtherVni,
    /// Its address and its data are the node's: a machine that was cloned, or a copy of its record
    /// under another id, of no machine, of one that nobody knows, or of the node's own.
    Clone,
}

impl Hostile {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::Honest,
        Self::OtherFamily,
        Self::OwnSubnet,
        Self::InsideOwn,
        Self::AroundOwn,
        Self::OutsidePool,
        Self::DefaultRoute,
        Self::Multicast,
        Self::WholePool,
        Self::Underlay,
        Self::DuplicateMac,
        Self::MulticastMac,
        Self::OwnPublicIp,
        Self::BadPublicIp,
        Self::InnerPublicIp,
        Self::NoPublicIp,
        Self::OtherBackend,
        Self::NoData,
        Self::MalformedData,
        Self::HugeData,
        Self::OtherVni,
        Self::Clone,
    ];
}

impl Action {
    /// The kind of fault or event, by which it is counted: without numbers and times.
    pub fn kind(&self) -> String {
        match self {
            Self::Wait => "wait".to_owned(),
            Self::Node(_, action) => match action {
                NodeAction::Crash(CrashPoint::Now) => "node crash now".to_owned(),
                NodeAction::Crash(CrashPoint::Before(_)) => "node crash before a call".to_owned(),
                NodeAction::Crash(CrashPoint::After(_)) => "node crash after a call".to_owned(),
                NodeAction::Crash(CrashPoint::InBatch(_)) => "node crash in a batch".to_owned(),
                NodeAction::State(fault) => format!("state {fault:?}"),
                NodeAction::Rename(renaming) => format!("node Rename {renaming:?}"),
                other => format!("node {}", word(other)),
            },
            Self::Link(_, action) => match action {
                LinkAction::Cut { silent: true } => "link Cut silent".to_owned(),
                LinkAction::Cut { silent: false } => "link Cut refusing".to_owned(),
                LinkAction::Hold(_, delivery) => format!("link Hold {delivery:?}"),
                other => format!("link {}", word(other)),
            },
            Self::Kernel(_, action) => match action {
                KernelAction::FailOp(_, fails) => format!("kernel FailOp {fails:?}"),
                KernelAction::Delete(kind, _) => format!("kernel Delete {}", kind.word()),
                KernelAction::Alter(kind, _) => format!("kernel Alter {}", kind.word()),
                KernelAction::FailObserve(fails) => format!("kernel FailObserve {fails:?}"),
                KernelAction::UnderlayPort(master) => format!("kernel UnderlayPort {master:?}"),
                KernelAction::UnderlayFlap(time) => match *time < LOST {
                    true => "kernel UnderlayFlap short".to_owned(),
                    false => "kernel UnderlayFlap long".to_owned(),
                },
                other => format!("kernel {}", word(other)),
            },
            Self::Go(_, action) => format!("go {}", word(action)),
            Self::Store(action) => match action {
                StoreAction::Put(hostile, ..) => format!("store Put {hostile:?}"),
                StoreAction::Debris(debris, ..) => format!("store Debris {debris:?}"),
                StoreAction::Empty { all: true } => "store Empty all".to_owned(),
                StoreAction::Empty { all: false } => "store Empty records".to_owned(),
                other => format!("store {}", word(other)),
            },
        }
    }
}

/// The name of a variant.
fn word(value: &impl fmt::Debug) -> String {
    let text = format!("{value:?}");
    let end = text
        .find(|c: char| !c.is_ascii_alphanumeric())
        .unwrap_or(text.len());
    text[..end].to_owned()
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wait => f.write_str("wait"),
            Self::Node(node, action) => write!(f, "node {node}: {action:?}"),
            Self::Link(node, action) => write!(f, "link of node {node}: {action:?}"),
            Self::Kernel(node, action) => write!(f, "kernel of node {node}: {action:?}"),
            Self::Store(action) => write!(f, "store: {action:?}"),
            Self::Go(peer, action) => write!(f, "Go peer {peer}: {action:?}"),
        }
    }
}
