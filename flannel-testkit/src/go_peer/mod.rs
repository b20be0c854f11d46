//! [`GoPeer`]: a node that acts as Go flanneld does on etcd with the VXLAN backend, for mixed
//! clusters in simulation.
//!
//! It does what the facts about Go flannel say (sections 3, 5.2, 7.1 and 13), whether that is wise
//! or not: it writes without a condition over whatever is there, takes over any lease with its
//! address, believes every record, drops all routes when it cannot read one, and ends where the
//! real process would. [`read_record`] says what it does with one record: nothing that the SDK
//! writes may crash or empty it.

mod daemon;
mod leases;
mod record;
mod vxlan;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use flannel_core::{DualStack, PublicIp, Subnet};

pub use daemon::GoPeer;
pub use record::{GoAttrs, GoLease, GoNet, KeyNets, parse, parse_key};
pub use vxlan::GoMode;
use vxlan::{Effect, effect};

/// What Go flannel makes of a record that is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GoReads {
    /// A lease that it routes to, all of it as far as its own families go.
    Lease(GoLease),
    /// A lease that counts as taken and is not routed to, or not whole.
    Ignored {
        /// The lease.
        lease: GoLease,
        /// Why.
        why: String,
    },
    /// Nothing that it can read. In a list it is passed over; as an event it is taken for an empty
    /// snapshot, and every route is dropped.
    Error {
        /// Why.
        why: String,
    },
    /// The process ends.
    Crash {
        /// Why.
        why: String,
    },
}

impl GoReads {
    /// Whether it does harm to the node that reads it.
    pub const fn is_harmful(&self) -> bool {
        matches!(self, Self::Error { .. } | Self::Crash { .. })
    }
}

/// What a Go node of a mode makes of a record that is written.
pub fn read_record(mode: GoMode, key: &str, value: &[u8]) -> GoReads {
    let lease = match parse(key, value) {
        Ok(lease) => lease,
        Err(why) => return GoReads::Error { why },
    };
    match effect(mode, &lease) {
        Effect::Routes(_, None) => GoReads::Lease(lease),
        Effect::Routes(_, Some(why)) => GoReads::Ignored { lease, why },
        Effect::Crash(why) => GoReads::Crash { why },
    }
}

/// How a [`GoPeer`] is started: the flags of flanneld, and what it finds on its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoOptions {
    /// The prefix of the keys.
    pub prefix: String,
    /// How long a lease lasts. 24 h, unless tests are short of time.
    pub ttl: Duration,
    /// How long before its end a lease is renewed.
    pub renew_margin: Duration,
    /// The subnets in the subnet file of an earlier run.
    pub previous: DualStack<Subnet>,
    /// What its random choices come from.
    pub seed: u64,
}

impl Default for GoOptions {
    fn default() -> Self {
        Self {
            prefix: "/coreos.com/network".to_owned(),
            ttl: Duration::from_secs(24 * 3600),
            renew_margin: Duration::from_secs(3600),
            previous: DualStack::default(),
            seed: 0,
        }
    }
}

/// How a [`GoPeer`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GoState {
    /// It has no lease yet.
    Starting,
    /// It has a lease and runs.
    Running,
    /// It runs on, and has dropped all its routes at least once since it was started.
    Emptied {
        /// The record at which it did.
        key: String,
        /// Whether that cannot be read; else it could not ask the store for its time to live.
        unreadable: bool,
        /// Why.
        why: String,
    },
    /// A panic: it has to be started again, and its routes stay.
    Crashed {
        /// Why.
        why: String,
    },
    /// It ended by itself, and its routes stay.
    Exited {
        /// With this code.
        code: i32,
        /// Why.
        why: String,
    },
}

impl GoState {
    /// Whether the process is there.
    pub const fn is_alive(&self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Emptied { .. })
    }
}

#[derive(Debug)]
struct Shared {
    state: GoState,
    routes: BTreeSet<Subnet>,
    subnet: DualStack<Subnet>,
}

/// What can be seen of a [`GoPeer`] from outside, while it runs and afterwards.
#[derive(Debug, Clone)]
pub struct GoView(Arc<Mutex<Shared>>);

impl GoView {
    fn new(routes: BTreeSet<Subnet>) -> Self {
        Self(Arc::new(Mutex::new(Shared {
            state: GoState::Starting,
            routes,
            subnet: DualStack::default(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it is.
    pub fn state(&self) -> GoState {
        self.lock().state.clone()
    }

    /// The subnets that its kernel has routes to.
    pub fn routes(&self) -> BTreeSet<Subnet> {
        self.lock().routes.clone()
    }

    /// The subnets that it believes to hold; none before it has a lease. It writes them to its
    /// subnet file, and they stay there when it ends.
    pub fn subnet(&self) -> DualStack<Subnet> {
        self.lock().subnet
    }
}

/// The value of a VXLAN node's record, byte for byte.
fn vxlan_value(mode: GoMode, ip: &PublicIp, macs: [&str; 2]) -> String {
    let v4 = ip.v4.unwrap_or(Ipv4Addr::UNSPECIFIED);
    let data = |mac| format!("{{\"VNI\":1,\"VtepMAC\":\"{mac}\"}}");
    let data4 = data(macs[0]);
    match mode {
        GoMode::V4 => format!(
            "{{\"PublicIP\":\"{v4}\",\"PublicIPv6\":null,\"BackendType\":\"vxlan\",\
             \"BackendData\":{data4}}}"
        ),
        GoMode::Dual => {
            let v6 = ip.v6.unwrap_or(Ipv6Addr::UNSPECIFIED);
            let data6 = data(macs[1]);
            format!(
                "{{\"PublicIP\":\"{v4}\",\"PublicIPv6\":\"{v6}\",\"BackendType\":\"vxlan\",\
                 \"BackendData\":{data4},\"BackendV6Data\":{data6}}}"
            )
        }
    }
}
