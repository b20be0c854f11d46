//! [`Kernel`]: the seam to the system that holds the objects.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use futures_core::Stream;
use serde::{Deserialize, Serialize};

use crate::backend::Note;
use crate::claim::{Claim, Claimant};
use crate::clock::Clock;
use crate::host_facts::{HostFacts, Questions};
use crate::manager::BoxError;
use crate::node::OverlayName;
use crate::object::{IfName, Object, ObjectKey, Objects};
use crate::path_fault::PathFault;
use crate::traffic::Traffic;
use crate::tun_fault::TunFault;
use crate::underlay::{AddressInfo, LinkInfo};

/// The result of a kernel call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the kernel did not do what was asked. `message` is the kernel's own text where it gave one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The process may not do this in this namespace.
    #[error("not permitted: {message}")]
    NotPermitted {
        /// The thing that was tried or the answer of the kernel, and what it needs.
        message: String,
    },
    /// The kernel has no such kind of object or no such attribute.
    #[error("the kernel does not support {what}")]
    Unsupported {
        /// What is not supported.
        what: String,
    },
    /// The device an object is on does not exist.
    #[error("there is no device {dev}")]
    NoSuchDevice {
        /// The device.
        dev: String,
    },
    /// What the operation acts on does not exist.
    #[error("it does not exist: {message}")]
    NotFound {
        /// What was looked for or what the kernel said.
        message: String,
    },
    /// Something else is in the place.
    #[error("something else is in its place: {message}")]
    Exists {
        /// What the kernel said.
        message: String,
    },
    /// Somebody else has what there is only once.
    #[error("{what} is in use by {by}")]
    InUse {
        /// Such as `UDP port 8472`.
        what: String,
        /// Its holder, in words.
        by: String,
    },
    /// The kernel is busy or out of a resource; later it may work.
    #[error("busy: {message}")]
    Busy {
        /// What the kernel said.
        message: String,
    },
    /// A reading of the kernel's state was disturbed by changes again and again.
    #[error("the kernel's state kept changing while it was read")]
    Interrupted,
    /// The kernel did not answer in time.
    #[error("no answer from the kernel within the deadline")]
    TimedOut,
    /// The kernel refuses the object as it is.
    #[error("rejected: {message}")]
    Rejected {
        /// What the kernel said.
        message: String,
    },
    /// The operation was not tried, because one that it depends on failed.
    #[error("not tried, because {key} failed")]
    Skipped {
        /// What failed.
        key: ObjectKey,
    },
    /// Somebody else runs the overlay in this network namespace.
    #[error("{by} runs this overlay in this network namespace")]
    Held {
        /// The one who does.
        by: Claimant,
    },
    /// The connection to the kernel broke; it is opened anew for the next call.
    #[error("the connection to the kernel broke: {reason}")]
    Connection {
        /// What happened.
        reason: String,
        /// What the system said.
        #[source]
        source: Option<BoxError>,
    },
}

impl Error {
    /// The refusal for lack of rights over the namespace. `message` is what the kernel said.
    pub fn lacks_net_admin(message: impl std::fmt::Display) -> Self {
        Self::NotPermitted {
            message: format!("{message}; CAP_NET_ADMIN in the network namespace is needed"),
        }
    }

    /// Whether the same call may succeed later without anybody's doing.
    pub const fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Busy { .. }
                | Self::InUse { .. }
                | Self::Interrupted
                | Self::TimedOut
                | Self::Skipped { .. }
                | Self::Connection { .. }
                | Self::NoSuchDevice { .. }
                | Self::Held { .. }
        )
    }
}

/// One change to the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Make an object whose key is free. Something else under the key is [`Error::Exists`]; the
    /// very object is success.
    Create(Object),
    /// Make the object under this key be as given, in place and without a gap. What the kernel
    /// cannot change in place is [`Error::Unsupported`].
    Change(Object),
    /// Remove the object. That it is gone already is success; what is under its key now but
    /// differs in [`Object::key`] only by owner is *not* removed.
    Delete(Object),
}

impl Op {
    /// The object made, changed or removed.
    pub const fn object(&self) -> &Object {
        match self {
            Self::Create(object) | Self::Change(object) | Self::Delete(object) => object,
        }
    }

    /// The key of the object.
    pub fn key(&self) -> ObjectKey {
        self.object().key()
    }

    /// What is done, in one word.
    pub const fn verb(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Change(_) => "change",
            Self::Delete(_) => "delete",
        }
    }
}

/// What to read beside what is always read (links, addresses, nexthops, and routes of the tables).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scope {
    /// The devices whose neighbours and forwarding entries are read.
    pub devices: BTreeSet<IfName>,
    /// The settings and offloads to read: keys of kind sysctl and offload.
    pub settings: BTreeSet<ObjectKey>,
}

/// What the kernel has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Observed {
    /// Every object in the scope, whoever made it. Of neighbours and forwarding entries only
    /// permanent ones; of routes those of the main table, without multicast and the like.
    #[serde(with = "object_list")]
    pub objects: Objects,
    /// Every link with what an [`Object`] does not say of it.
    #[serde(default)]
    pub links: Vec<LinkInfo>,
    /// Every address with what an [`Object`] does not say of it.
    #[serde(default)]
    pub addresses: Vec<AddressInfo>,
}

/// Objects as a JSON array (a map's keys would have to be texts).
pub(crate) mod object_list {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::object::{Object, Objects};

    pub(crate) fn serialize<S: Serializer>(objects: &Objects, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(objects.values())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Objects, D::Error> {
        let list = Vec::<Object>::deserialize(d)?;
        Ok(list
            .into_iter()
            .map(|object| (object.key(), object))
            .collect())
    }
}

/// A notification: what a key holds now, or doubt about what it holds.
///
/// Contents save readings. They are believed only as far as a mistake does no harm: an older one that
/// comes late, or twice, leads to a reading or to a change that changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Under its key there is this now. Of a link it also says that it took nothing along when it
    /// became so.
    Set(Object),
    /// Under this key there is nothing now, or nothing that an [`Object`] can describe.
    Gone(ObjectKey),
    /// What is under this key may be something else.
    Key(ObjectKey),
    /// A device came, went or changed. What needs it may have gone without a word of its own.
    Link(Option<IfName>),
    /// An address of a device. What needs it may have gone without a word of its own.
    Address(Option<IfName>),
    /// A neighbour or forwarding entry of a device.
    Neighbour(Option<IfName>),
    /// A route or a nexthop object.
    Route,
    /// A thing that decides about packets and is no object: a policy rule, a route of another table
    /// than the main one, a setting of forwarding or of reverse-path filters.
    Policy,
    /// Anything may have changed: notifications were lost, or the watch starts.
    All,
}

/// A stream of notifications; it never ends by itself.
pub type ChangeStream = Pin<Box<dyn Stream<Item = Change> + Send>>;

/// What the kernel and the process's rights allow, as probed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Features {
    /// The process may change the network configuration of the namespace (CAP_NET_ADMIN).
    pub net_admin: bool,
    /// VXLAN devices can be made.
    pub vxlan: bool,
    /// Nexthop objects exist (Linux 5.3).
    pub nexthops: bool,
    /// IPv6 is there and not switched off.
    pub ipv6: bool,
    /// Settings under `/proc/sys/net` can be written.
    pub sysctls: bool,
    /// Offloads can be read and set (ethtool over netlink, Linux 5.6).
    pub offloads: bool,
    /// TUN devices can be made (`/dev/net/tun` is there and may be opened).
    pub tun: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tun_fault: Option<TunFault>,
    /// Packet paths run here: objects of kind tunnel can be made. No system kernel has them by
    /// itself; whoever wraps one and adds them says so.
    pub tunnels: bool,
    /// The name that tells the namespace from every other one that ever was, as long as it is
    /// there: of an index of a device it then says whose it is. `None`: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The kernel's release, such as `6.1.0-18-amd64`.
    pub release: String,
}

impl Features {
    /// Everything allowed and present, as a fake kernel has it.
    pub fn all() -> Self {
        Self {
            net_admin: true,
            vxlan: true,
            nexthops: true,
            ipv6: true,
            sysctls: true,
            offloads: true,
            tun: true,
            tun_fault: None,
            tunnels: true,
            namespace: None,
            release: "fake".to_owned(),
        }
    }
}

/// The system that holds the objects: Linux over netlink, or a fake.
///
/// What every implementation promises, and the test of `flannel_testkit::conformance::kernel` that
/// checks it:
///
/// - *Apply, then observe, returns what was asked*, for every kind and value
///   (`apply_then_observe_returns_what_was_asked`).
/// - [`Op::Create`] never takes the place of something else (`create_never_overwrites`), and of
///   what is there already is success (`create_is_idempotent`); [`Op::Delete`] of what is gone is
///   success (`delete_is_idempotent`); [`Op::Delete`] spares an object that is another's
///   (`delete_spares_what_is_not_meant`).
/// - [`Op::Change`] alters in place: what depends on the object stays
///   (`change_keeps_dependants`).
/// - [`apply`](Self::apply) answers one result per op, in order; a failed op does not stop those
///   that do not need it (`one_bad_op_does_not_stop_the_others`).
/// - [`observe`](Self::observe) is complete or an error, never a shorter list, and shows what
///   others made (`observe_shows_foreign_objects`).
/// - [`read`](Self::read) and [`links`](Self::links) show what [`observe`](Self::observe) shows
///   (`keys_alone_are_those_of_the_whole`, `links_alone_are_those_of_the_whole`).
/// - [`changes`](Self::changes) tells of every change within a second, whoever made it: with what now
///   is, or as doubt (`foreign_changes_are_hinted`, `own_changes_are_told`). What vanishes with a link,
///   an address or a nexthop object may do so without a word, but not that one. Of one key, what is
///   told last is what is (`the_last_word_about_a_key_is_right`); after lost notifications there is
///   [`Change::All`], and nothing that is older comes after it.
/// - [`host_facts`](Self::host_facts) says what the kernel would do, or nothing: the answer to a look-up
///   is the route that is there, black holes included (`a_lookup_answers_the_route`,
///   `a_lookup_tells_a_black_hole`), and forwarding that is switched off is told and hinted
///   (`forwarding_that_is_off_is_told`).
/// - Setting a device down drops its routes and permanent neighbours and keeps its forwarding
///   entries; deleting a device drops all on it (`link_down_drops_routes_and_neighbours`,
///   `deleting_a_link_drops_what_is_on_it`).
/// - A [`claim`](Self::claim) is granted to one at a time until it is dropped, and whoever asks for it
///   is told of (`an_overlay_is_claimed_by_one_at_a_time`, `a_claim_is_handed_over_on_request`).
#[async_trait]
pub trait Kernel: Debug + Send + Sync + 'static {
    /// Probes what is allowed and present. Changes nothing.
    ///
    /// # Errors
    /// Only if the kernel cannot be talked to at all; what is missing is in the answer.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn features(&self) -> Result<Features>;

    /// Reads what the kernel has.
    ///
    /// # Errors
    /// [`Error::Interrupted`], [`Error::TimedOut`], [`Error::Connection`]. A device of the scope
    /// that does not exist is no error.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn observe(&self, scope: &Scope) -> Result<Observed>;

    /// Reads settings and offloads alone: keys of kind sysctl and offload. Of these the kernel gives
    /// no hint, so they are looked at often; a kernel that can should read nothing else for it.
    ///
    /// # Errors
    /// As [`observe`](Self::observe). One that does not exist is left out.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn settings(&self, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
        let scope = Scope {
            settings: keys.clone(),
            ..Scope::default()
        };
        let mut objects = self.observe(&scope).await?.objects;
        objects.retain(|key, _| keys.contains(key));
        Ok(objects)
    }

    /// Reads what is under some keys. Where more than one object has a key, it is the one that
    /// [`observe`](Self::observe) shows. A kernel that can should read nothing else for it.
    ///
    /// # Errors
    /// As [`observe`](Self::observe). What does not exist is left out.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn read(&self, keys: &BTreeSet<ObjectKey>) -> Result<Objects> {
        let settings = keys
            .iter()
            .filter(|key| matches!(key, ObjectKey::Sysctl { .. } | ObjectKey::Offload { .. }));
        let scope = Scope {
            devices: keys.iter().filter_map(ObjectKey::dev).collect(),
            settings: settings.cloned().collect(),
        };
        let mut objects = self.observe(&scope).await?.objects;
        objects.retain(|key, _| keys.contains(key));
        Ok(objects)
    }

    /// Reads links and addresses alone: both as objects, and what these do not say of them.
    ///
    /// # Errors
    /// As [`observe`](Self::observe).
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn links(&self) -> Result<Observed> {
        let mut observed = self.observe(&Scope::default()).await?;
        let is_asked =
            |key: &ObjectKey| matches!(key, ObjectKey::Link(_) | ObjectKey::Address { .. });
        observed.objects.retain(|key, _| is_asked(key));
        Ok(observed)
    }

    /// Carries out changes in their order; returns one result per op, in the same order.
    ///
    /// # Cancel safety
    /// Some of the changes may have been made. Observe again.
    async fn apply(&self, ops: &[Op]) -> Vec<Result<()>>;

    /// Tells of changes from the call on, our own included. The first item is [`Change::All`].
    fn changes(&self) -> ChangeStream;

    /// Claims an overlay in this kernel's network namespace: of all processes there, one at a time is
    /// the overlay of a name, and nothing is changed for an overlay that is not claimed. A claim is
    /// held until it is dropped or its process ends. Whoever has no rights over the namespace keeps
    /// nobody out.
    ///
    /// With `replace` whoever has it is asked for it and waited for, a while.
    ///
    /// A kernel that cannot keep others out grants every claim.
    ///
    /// # Errors
    /// [`Error::Held`] names who has it; [`Error::Connection`], [`Error::TimedOut`].
    ///
    /// # Cancel safety
    /// Cancel safe: what was granted is released.
    async fn claim(&self, name: &OverlayName, replace: bool) -> Result<Claim> {
        let _ = (name, replace);
        Ok(Claim::free())
    }

    /// Says what the host does with packets beside what the objects say. Changes nothing.
    ///
    /// # Errors
    /// Only if the kernel cannot be talked to; what it cannot say is left out of the answer.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn host_facts(&self, questions: &Questions) -> Result<HostFacts> {
        let _ = questions;
        Ok(HostFacts::default())
    }

    /// What packet paths in user space have counted; empty where there are none.
    fn traffic(&self) -> Vec<Traffic> {
        Vec::new()
    }

    /// Packet paths in user space that carry nothing at the moment, with the reason; empty where there
    /// are none. A change of these is told as some [`Change`], if only [`Change::Link`].
    fn path_faults(&self) -> Vec<PathFault> {
        Vec::new()
    }

    /// What is worth telling about how this system does what it is asked, such as which offloads a
    /// packet path does without, and why.
    fn notes(&self) -> Vec<Note> {
        Vec::new()
    }

    /// A clock that counts time asleep, if this system has one.
    fn clock(&self) -> Option<Arc<dyn Clock>> {
        None
    }
}
