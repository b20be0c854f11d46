//! [`Manager`]: the store that hands out leases and tells of the leases of others.

use std::fmt::Debug;

use async_trait::async_trait;

use crate::config::{self, NetworkConfig};
use crate::event::EventStream;
use crate::family::{DualStack, Family, PublicIp};
use crate::lease::{Lease, LeaseAttrs, LeaseKey};
use crate::node::{InstanceId, NodeId};
use crate::runtime::runtime_fault;
use crate::subnet::Subnet;

/// An error of somebody else's, kept as the source of one of ours.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// The result of a manager's call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a manager could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The lease is no longer ours: deleted, expired, or written by someone else since.
    #[error("lease {key} is lost: {reason}")]
    LeaseLost {
        /// The record.
        key: LeaseKey,
        /// What was found instead.
        reason: String,
    },
    /// No free subnet is left.
    #[error("no free {family} subnet is left in the pool")]
    PoolExhausted {
        /// The family whose pool is full.
        family: Family,
    },
    /// Others were faster, again and again.
    #[error("the write lost against others too often: {reason}")]
    Conflict {
        /// What was tried.
        reason: String,
    },
    /// The store cannot answer yet and will by itself (a Kubernetes node without a pod CIDR).
    #[error("not ready: {reason}")]
    NotReady {
        /// What is missing.
        reason: String,
    },
    /// The store cannot be reached or does not answer.
    #[error("the store is unavailable: {reason}")]
    Unavailable {
        /// What was tried.
        reason: String,
        /// What the client library said.
        #[source]
        source: Option<BoxError>,
    },
    /// The store refused: authentication or permissions.
    #[error("the store denied access: {reason}")]
    Denied {
        /// What is missing.
        reason: String,
    },
    /// The network config is missing or cannot be used.
    #[error("the network config cannot be used")]
    Config(#[from] config::Error),
    /// There is no network config in the store.
    #[error("there is no network config in the store: {hint}")]
    NoConfig {
        /// How to write one.
        hint: String,
    },
    /// A record of our own cannot be read.
    #[error("record {key} cannot be read: {reason}")]
    Corrupt {
        /// The record.
        key: LeaseKey,
        /// What is wrong with it.
        reason: String,
    },
    /// Another machine holds the node id, and it lives.
    #[error("node id {node} is held by another machine{}: give this one a node id of its own, or \
             let it take the id over", at(.public_ip))]
    NodeIdHeld {
        /// The node id.
        node: NodeId,
        /// Where the other machine is.
        public_ip: PublicIp,
    },
    /// The request itself is wrong and will never succeed.
    #[error("the request is wrong: {reason}")]
    Invalid {
        /// What is wrong with it.
        reason: String,
    },
}

/// Refuses a tokio runtime without timers, for managers that need them.
///
/// # Errors
/// [`Error::Invalid`] says what the runtime lacks.
pub fn check_runtime() -> Result<()> {
    match runtime_fault() {
        None => Ok(()),
        Some(reason) => Err(Error::Invalid {
            reason: reason.to_owned(),
        }),
    }
}

/// Where a machine is, in words.
fn at(public_ip: &PublicIp) -> String {
    let words = public_ip.in_words();
    words.map_or_else(String::new, |words| format!(" at {words}"))
}

impl Error {
    /// The store does not answer.
    pub fn unavailable(reason: impl Into<String>) -> Self {
        Self::Unavailable {
            reason: reason.into(),
            source: None,
        }
    }

    /// A later run of the machine has its lease under another node id: the one that asks is outdated.
    pub fn renamed(node: &NodeId) -> Self {
        Self::Invalid {
            reason: format!(
                "a later run of this machine has its lease under the node id {node}: stop this one"
            ),
        }
    }

    /// Whether the same call may succeed later without anybody's doing.
    pub const fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Conflict { .. } | Self::NotReady { .. } | Self::Unavailable { .. }
        )
    }
}

/// What a node asks of its store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRequest {
    /// Who asks.
    pub node: NodeId,
    /// The machine that asks. `None`: it is not told from others of its node id, nor known again
    /// under another.
    pub instance: Option<InstanceId>,
    /// Takes the node id from another machine that holds it, without asking if that one lives.
    pub take_over: bool,
    /// What the node publishes.
    pub attrs: LeaseAttrs,
    /// The subnets the node held before, wanted again if they are free and still fit the config.
    pub previous: DualStack<Subnet>,
}

impl LeaseRequest {
    /// A request of a node that had no subnets before and does not say which machine it is.
    pub fn new(node: NodeId, attrs: LeaseAttrs) -> Self {
        Self {
            node,
            instance: None,
            take_over: false,
            attrs,
            previous: DualStack::default(),
        }
    }
}

/// What a manager can do; the conformance suite asks for exactly this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// It chooses subnets itself (etcd); otherwise it is told them (Kubernetes' pod CIDR).
    pub allocates: bool,
    /// Leases expire unless renewed.
    pub expires: bool,
    /// A subnet can be kept for a node without expiry.
    pub reserves: bool,
    /// Changes of the network config are delivered by the watch.
    pub watches_config: bool,
    /// Machines of one node id are told apart by their instance, and one is known again under another
    /// node id; otherwise the store itself sees to it (Kubernetes' Node).
    pub knows_instances: bool,
}

impl Capabilities {
    /// None of the capabilities; switch on what holds.
    pub const NONE: Self = Self {
        allocates: false,
        expires: false,
        reserves: false,
        watches_config: false,
        knows_instances: false,
    };
    /// All of the capabilities; switch off what does not hold.
    pub const ALL: Self = Self {
        allocates: true,
        expires: true,
        reserves: true,
        watches_config: true,
        knows_instances: true,
    };

    /// The same with or without allocation.
    #[must_use]
    pub const fn with_allocates(mut self, yes: bool) -> Self {
        self.allocates = yes;
        self
    }

    /// The same with or without expiry.
    #[must_use]
    pub const fn with_expires(mut self, yes: bool) -> Self {
        self.expires = yes;
        self
    }

    /// The same with or without reservations.
    #[must_use]
    pub const fn with_reserves(mut self, yes: bool) -> Self {
        self.reserves = yes;
        self
    }

    /// The same with or without machines told apart.
    #[must_use]
    pub const fn with_knows_instances(mut self, yes: bool) -> Self {
        self.knows_instances = yes;
        self
    }

    /// The same with or without delivery of config changes.
    #[must_use]
    pub const fn with_watches_config(mut self, yes: bool) -> Self {
        self.watches_config = yes;
        self
    }
}

/// A subnet manager: hands out leases and tells of everybody's.
///
/// What every implementation promises, and the test of
/// `flannel_testkit::conformance::manager` that checks it:
///
/// - [`acquire_lease`](Self::acquire_lease) is idempotent per node id: the same node gets the same
///   subnet (`acquire_is_idempotent_per_node`), unless the config no longer allows it
///   (`a_lease_that_no_longer_fits_is_replaced`).
/// - Two nodes never hold one subnet, whatever the race (`no_two_nodes_share_a_subnet`); a pool
///   serves exactly as many nodes as it has subnets, then says
///   [`Error::PoolExhausted`] (`pool_is_used_to_the_last_subnet`). What a foreign record covers
///   that peers accept, however long its subnet is, counts as taken
///   (`records_of_any_length_are_respected`); what no peer accepts costs nobody a lease and stops
///   no join (`what_no_peer_accepts_is_in_nobodys_way`).
/// - The previous subnet is honoured when free (`previous_subnet_is_honoured`) and not when
///   another holds it (`taken_previous_subnet_is_not_given`). A reserved subnet goes to its node
///   alone and does not expire, where [`Capabilities::reserves`] says so
///   (`reserved_subnet_is_kept`).
/// - [`renew_lease`](Self::renew_lease) publishes the lease's attributes and extends it only while
///   its revision is current, else [`Error::LeaseLost`]; it never creates a record
///   (`renew_publishes_attributes`, `renewal_extends_the_lease`,
///   `renewal_never_revives_a_lost_lease`, `stale_renewal_is_refused`).
/// - [`release_lease`](Self::release_lease) of a lease that is gone is `Ok`; of one that was
///   written since its revision, by whomever, or that is another's by now, it is
///   [`Error::LeaseLost`] and changes nothing (`release_frees_the_subnet`,
///   `release_is_idempotent`, `release_of_anothers_lease_changes_nothing`). A record that was
///   written in another's name is no longer ours (`a_record_that_another_wrote_is_lost`).
/// - A node id that another machine holds is not given while that one lives: [`Error::NodeIdHeld`]
///   (`a_node_id_in_use_is_refused`), unless the request takes it over
///   (`a_node_id_is_taken_over_on_request`). The same machine is known again, by its instance or by
///   what it publishes (`the_same_machine_keeps_its_lease`), also under another node id: it keeps its
///   record (`a_renamed_machine_keeps_its_subnet`), unless a machine that lives answers for that
///   (`a_copy_of_a_living_node_takes_nothing`). All where [`Capabilities::knows_instances`] says so.
/// - A dual-stack node gets both families or none (`both_families_or_none`).
/// - Dropping the future of a call leaves the store as it was or as the call would have left it;
///   asking again is safe (`a_dropped_acquire_is_safe_to_repeat`).
#[async_trait]
pub trait Manager: Debug + Send + Sync + 'static {
    /// A short name for logs and status: `memory`, `etcd`, `kube`.
    fn name(&self) -> &'static str;

    /// What this manager can do.
    fn capabilities(&self) -> Capabilities;

    /// Reads the network config.
    ///
    /// # Errors
    /// [`Error::NoConfig`], [`Error::Config`], or a transient error.
    ///
    /// # Cancel safety
    /// Cancel safe: reads only.
    async fn network_config(&self) -> Result<NetworkConfig>;

    /// Gets the node's lease: the one it holds, else the previous subnet, else a free one; the
    /// request's attributes are published with it.
    ///
    /// # Errors
    /// [`Error::PoolExhausted`], [`Error::NotReady`], [`Error::NodeIdHeld`], [`Error::Invalid`], or a
    /// transient error.
    ///
    /// # Cancel safety
    /// The lease may or may not have been taken; asking again returns it.
    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease>;

    /// Publishes `lease.attrs` and extends the lease, if `lease.revision` is still current.
    ///
    /// # Errors
    /// [`Error::LeaseLost`] if the record is gone, expired or was written since; or a transient
    /// error.
    ///
    /// # Cancel safety
    /// The lease may or may not have been renewed. A following renewal with the old revision may
    /// then say [`Error::LeaseLost`]; [`acquire_lease`](Self::acquire_lease) finds out.
    async fn renew_lease(&self, lease: &Lease) -> Result<Lease>;

    /// Gives the lease up, so that peers drop the node, if `lease.revision` is still current.
    ///
    /// # Errors
    /// [`Error::LeaseLost`] if the record was written since, by this node too, or is by now
    /// another's; or a transient error. A record that is gone is no error.
    ///
    /// # Cancel safety
    /// The lease may or may not have been released.
    async fn release_lease(&self, lease: &Lease) -> Result<()>;

    /// Watches all records and the network config.
    ///
    /// The promises, again with their tests:
    ///
    /// - The first successful lease item is a [`Snapshot`](crate::Event::Snapshot), complete or
    ///   not sent at all (`watch_starts_with_a_snapshot`); after any gap the next one is a
    ///   snapshot too (`a_gap_is_followed_by_a_snapshot`).
    /// - A record that cannot be read is reported as such; its subnets stay taken, and it hides no
    ///   other (`an_unreadable_record_hides_nobody`).
    /// - Puts and deletes follow (`watch_delivers_puts_and_deletes`), a delete also when a lease
    ///   runs out (`expiry_is_delivered`), every change of any field
    ///   (`every_field_change_is_delivered`), our own lease included.
    /// - Revisions never go back, except when the store itself was restored; per key the order is
    ///   the store's. Repeats are allowed (`revisions_never_go_back`).
    /// - An `Err` item is a report and not the end: the stream heals itself. It ends only when
    ///   dropped or after a permanent error.
    /// - Several watches at once see the same (`watchers_are_independent`).
    /// - A changed config is delivered where [`Capabilities::watches_config`] says so
    ///   (`config_change_is_delivered`).
    ///
    /// The stream does nothing until it is polled, and stops when it is dropped.
    fn watch_leases(&self) -> EventStream;

    /// The host has lost an address that connections to the store may be bound to, so that nothing
    /// would ever come on them. Drops them: what waits for an answer fails or is asked again, a watch
    /// is opened anew. Does nothing where there are no connections.
    fn reconnect(&self) {}
}
