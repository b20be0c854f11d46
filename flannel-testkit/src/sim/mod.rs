//! Deterministic simulation: a cluster of overlays on fakes, one seed, one thread, a paused clock.
//!
//! A [`Sim`] draws a [`History`] from a seed: nodes crash and come back, sleep and leave; the way to
//! the store is cut, slow and out of order; kernels refuse, forget and are changed by strangers; the
//! store is tampered with. While that happens, everything that must always hold is checked after
//! every change to any kernel and after every step ([`Invariant`]); then the faults stop, and within
//! a bound of virtual time every kernel must be what an independent [`model`] says.
//!
//! One seed gives one history, and one history one run, bit for bit ([`Run::digest`]). A history that
//! fails is made smaller until nothing can be left out of it ([`Sim::shrink`]).
//!
//! It needs no right and no kernel, and takes any [`Manager`](flannel_core::Manager) (by
//! [`Sim::cluster`]) and any [`Backend`] (by [`Sim::new`] and [`Sim::model`]):
//!
//! ```no_run
//! use flannel_backend_vxlan::VxlanBackend;
//! use flannel_testkit::sim::Sim;
//!
//! let report = Sim::new(VxlanBackend::new).nodes(3).seeds(0..1000, 2, &|_| {});
//! assert!(report.failed.is_empty(), "{report}");
//! ```

mod action;
mod cluster;
mod generate;
mod go;
mod hardware;
mod host_acts;
mod io;
mod judge;
mod kernel_acts;
mod kinds;
mod link;
pub mod model;
mod model_hostgw;
mod model_udp;
mod model_vxlan;
mod node;
pub mod path;
mod rename;
mod report;
mod run;
mod settle;
mod shrink;
mod store_acts;
mod store_cluster;
mod strangers;
mod trace;
mod trials;
mod uplink;
mod wall;
mod watch;
mod world;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::{Backend, NetworkConfig, OverlayBuilder, PoolMode};
use serde::Serialize;

pub use action::{
    Action, CrashPoint, Debris, Delivery, Fails, GoAction, Hostile, KernelAction, Kind, LinkAction,
    Master, NodeAction, Renaming, StateFault, Step, StoreAction, WireAction,
};
pub use cluster::{Cluster, Founding, Managers, MemoryCluster, Tamper};
pub use judge::{Invariant, Violation};
pub use kinds::KINDS;
pub use report::{Failure, Progress, Report};
pub use run::Run;
pub use shrink::Shrunk;
pub use store_cluster::StoreCluster;

use model::{ChangingModel, HostGwModel, Model, UdpModel, VxlanModel};

/// How long the failures of a report are made smaller at most, unless set otherwise.
const SHRINK_FOR: Duration = Duration::from_secs(120);

/// Makes the store of a cluster.
type Found = dyn Fn(&Founding) -> Arc<dyn Cluster> + Send + Sync;

/// A simulation of clusters of one kind.
#[derive(Clone)]
pub struct Sim {
    setup: Arc<Setup>,
}

/// What all runs of a simulation have in common.
#[derive(Clone)]
pub(crate) struct Setup {
    nodes: usize,
    steps: usize,
    configs: Vec<NetworkConfig>,
    backend: Arc<dyn Fn(OverlayBuilder) -> OverlayBuilder + Send + Sync>,
    cluster: Arc<Found>,
    model: Arc<dyn Model>,
    shrink_for: Duration,
}

/// All that happens in a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct History {
    /// The seed it was drawn from.
    pub seed: u64,
    /// How many nodes there are.
    pub nodes: usize,
    /// How many Go peers there are, where the store can have any.
    pub gos: usize,
    /// The config that the store holds at first, by number.
    pub config: usize,
    /// How long leases last.
    pub ttl: Option<Duration>,
    /// What happens, in its order.
    pub actions: Vec<Step>,
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (nodes, gos, config) = (self.nodes, self.gos, self.config);
        write!(
            f,
            "seed {}: {nodes} nodes, {gos} Go peers, config {config}, ",
            self.seed
        )?;
        match self.ttl {
            Some(ttl) => writeln!(f, "leases of {ttl:?}")?,
            None => writeln!(f, "leases without end")?,
        }
        for (n, step) in self.actions.iter().enumerate() {
            writeln!(f, "{:4}  {step}", n + 1)?;
        }
        Ok(())
    }
}

/// The configs that clusters have unless set otherwise; the first one is the usual one.
const CONFIGS: [&str; 9] = [
    r#"{"Network":"10.42.0.0/20","SubnetLen":24,"EnableIPv6":true,"IPv6Network":"fd00:42::/60",
        "IPv6SubnetLen":64,"Backend":{"Type":"vxlan"}}"#,
    r#"{"Network":"10.42.0.0/20","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#,
    r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:42::/60","IPv6SubnetLen":64,
        "Backend":{"Type":"vxlan"}}"#,
    r#"{"Network":"10.43.0.0/20","SubnetLen":24,"EnableIPv6":true,"IPv6Network":"fd00:42::/60",
        "IPv6SubnetLen":64,"Backend":{"Type":"vxlan"}}"#,
    r#"{"Network":"10.42.0.0/20","SubnetLen":25,"EnableIPv6":true,"IPv6Network":"fd00:42::/60",
        "IPv6SubnetLen":65,"Backend":{"Type":"vxlan"}}"#,
    r#"{"Network":"10.42.0.0/20","SubnetLen":24,"EnableIPv6":true,"IPv6Network":"fd00:42::/60",
        "IPv6SubnetLen":64,"Backend":{"Type":"vxlan","VNI":7}}"#,
    r#"{"Network":"10.42.0.0/20","SubnetLen":24,"EnableIPv6":true,"IPv6Network":"fd00:42::/60",
        "IPv6SubnetLen":64,"Backend":{"Type":"vxlan","DirectRouting":true}}"#,
    r#"{"Network":"10.42.0.0/20","SubnetLen":24,"EnableIPv6":true,"IPv6Network":"fd00:42::/60",
        "IPv6SubnetLen":64,"Backend":{"Type":"vxlan","Port":4790,"MTU":1400}}"#,
    r#"{"Network":"10.42.0.0/20","SubnetLen":24,"EnableIPv6":true,"IPv6Network":"fd00:42::/60",
        "IPv6SubnetLen":64,"Backend":{"Type":"vxlan","Learning":true}}"#,
];

/// The first of them have no key of VXLAN's own but the type: with another they are configs of that.
const COMMON: usize = 4;

/// Network configs out of flannel's JSON.
fn configs(texts: impl IntoIterator<Item = impl AsRef<str>>) -> Vec<NetworkConfig> {
    let config = |text: &str| NetworkConfig::from_json(text, PoolMode::Allocated);
    let configs = texts
        .into_iter()
        .map(|text| config(text.as_ref()).expect("a valid config"));
    configs.collect()
}

/// The configs of clusters that run VXLAN.
fn of_vxlan() -> Vec<NetworkConfig> {
    configs(CONFIGS)
}

/// The configs of clusters that run host-gw, in the order of [`CONFIGS`].
fn of_host_gw() -> Vec<NetworkConfig> {
    configs(CONFIGS[..COMMON].iter().map(|text| of(text, "host-gw")))
}

/// The configs of clusters that run the UDP backend.
fn of_udp() -> Vec<NetworkConfig> {
    let mut texts: Vec<String> = CONFIGS[..COMMON]
        .iter()
        .map(|text| of(text, "udp"))
        .collect();
    for key in [r#""Port":9000"#, r#""MTU":1400"#] {
        texts.push(texts[0].replace(r#""udp""#, &format!(r#""udp",{key}"#)));
    }
    configs(texts)
}

/// A config of VXLAN with another type of backend.
fn of(text: &str, backend: &str) -> String {
    text.replace("vxlan", backend)
}

impl Sim {
    /// A simulation of nodes with this backend: of four nodes, histories of 40 steps and flannel's
    /// subnet manager on a fake store, unless set otherwise.
    ///
    /// The configs and the model are those of VXLAN: for another backend say
    /// [`configs`](Self::configs) and [`model`](Self::model).
    ///
    /// # Panics
    /// Never: the configs are valid.
    pub fn new<B: Backend>(backend: impl Fn() -> B + Send + Sync + 'static) -> Self {
        Self {
            setup: Arc::new(Setup {
                nodes: 4,
                steps: 40,
                configs: of_vxlan(),
                backend: Arc::new(move |builder| builder.backend(backend())),
                cluster: Arc::new(|founding| Arc::new(StoreCluster::new(founding))),
                model: Arc::new(VxlanModel),
                shrink_for: SHRINK_FOR,
            }),
        }
    }

    /// The same nodes with one more backend: the config picks one by type.
    #[must_use]
    pub fn with<B: Backend>(mut self, backend: impl Fn() -> B + Send + Sync + 'static) -> Self {
        let others = Arc::clone(&self.setup.backend);
        self.setup_mut().backend = Arc::new(move |builder| others(builder).backend(backend()));
        self
    }

    /// The same with another number of nodes, at least one and at most 30.
    #[must_use]
    pub fn nodes(mut self, nodes: usize) -> Self {
        self.setup_mut().nodes = nodes.clamp(1, 30);
        self
    }

    /// The same with histories of another length.
    #[must_use]
    pub fn steps(mut self, steps: usize) -> Self {
        self.setup_mut().steps = steps;
        self
    }

    /// The same with other network configs: the first is the usual one, the others are changed to.
    /// Without any, nothing changes.
    #[must_use]
    pub fn configs(mut self, configs: Vec<NetworkConfig>) -> Self {
        if !configs.is_empty() {
            self.setup_mut().configs = configs;
        }
        self
    }

    /// The same with configs and model of host-gw.
    #[must_use]
    pub fn of_host_gw(self) -> Self {
        self.configs(of_host_gw()).model(HostGwModel)
    }

    /// The same with configs and model of the UDP backend. Whoever is killed loses its packet path;
    /// whoever stops has handed it over.
    #[must_use]
    pub fn of_udp(self) -> Self {
        self.configs(of_udp()).model(UdpModel)
    }

    /// The same with configs of host-gw and of VXLAN, so that clusters change between them, and the
    /// model of both; the nodes need both backends ([`with`](Self::with)).
    #[must_use]
    pub fn of_both(self) -> Self {
        self.configs([of_host_gw(), of_vxlan()].concat())
            .model(ChangingModel)
    }

    /// The same with configs of UDP, host-gw and VXLAN, so that clusters change between all three;
    /// the nodes need all three backends.
    #[must_use]
    pub fn of_all(self) -> Self {
        self.configs([of_udp(), of_host_gw(), of_vxlan()].concat())
            .model(ChangingModel)
    }

    /// The same with another model: what the backend should make of a node and its peers.
    #[must_use]
    pub fn model(mut self, model: impl Model) -> Self {
        self.setup_mut().model = Arc::new(model);
        self
    }

    /// The same with another bound of wall time for making the histories small that failed; two
    /// minutes unless set otherwise.
    #[must_use]
    pub fn shrink_for(mut self, time: Duration) -> Self {
        self.setup_mut().shrink_for = time;
        self
    }

    /// The same on another store. For managers of one's own, [`Managers`] is enough.
    #[must_use]
    pub fn cluster<C: Cluster>(
        mut self,
        cluster: impl Fn(&Founding) -> C + Send + Sync + 'static,
    ) -> Self {
        self.setup_mut().cluster = Arc::new(move |founding| Arc::new(cluster(founding)));
        self
    }

    /// The kinds of [`KINDS`] that apply to the backends of its configs.
    pub fn kinds(&self) -> Vec<&'static str> {
        kinds::kinds_under(&self.setup.configs)
    }

    fn setup_mut(&mut self) -> &mut Setup {
        Arc::make_mut(&mut self.setup)
    }

    /// The history that a seed gives.
    pub fn history(&self, seed: u64) -> History {
        let Setup {
            nodes,
            steps,
            configs,
            ..
        } = &*self.setup;
        generate::history(seed, *nodes, *steps, configs.len())
    }
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sim")
            .field("nodes", &self.setup.nodes)
            .field("steps", &self.setup.steps)
            .finish_non_exhaustive()
    }
}
