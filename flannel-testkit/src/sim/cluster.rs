//! [`Cluster`]: the store of a simulated cluster, as the simulator needs it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use flannel_core::{
    DualStack, Event, EventStream, Lease, LeaseKey, Manager, MemoryManager, MemoryState,
    NetworkConfig, NodeId, PublicIp, Revision, Snapshot, Subnet,
};

use super::action::WireAction;
use crate::go_peer::{GoMode, GoOptions, GoPeer};

/// What a store is to begin with.
#[derive(Debug, Clone)]
pub struct Founding {
    /// The network config in it.
    pub config: NetworkConfig,
    /// How long leases last without renewal; `None`: for ever.
    pub ttl: Option<Duration>,
}

/// What others do to a store.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Tamper {
    /// They write a record, whatever is there.
    Put(Lease),
    /// They delete a record, whosever it is.
    Remove(LeaseKey),
    /// They write something that cannot be read under a record's key.
    Garble(LeaseKey),
    /// They write a value under a key of records, given by its last part.
    Raw(String, Vec<u8>),
    /// They write another network config.
    Config(NetworkConfig),
    /// They write a network config that cannot be read.
    BadConfig,
    /// They delete the network config.
    NoConfig,
    /// They make a backup; there is one at a time.
    Backup,
    /// They restore the backup.
    Restore,
    /// They let the store forget its history.
    Compact,
    /// They reserve subnets for a node.
    Reserve(NodeId, DualStack<Subnet>),
    /// They end a node's reservation of these subnets.
    Unreserve(NodeId, DualStack<Subnet>),
}

/// The store that a simulated cluster shares.
///
/// Made anew for every run, inside of the run's tokio runtime, whose clock is paused. All that it
/// does must follow from what is asked of it and from tokio's time: no entropy, no other clock.
pub trait Cluster: Debug + Send + Sync + 'static {
    /// The manager of a node. Asked for whenever the node's program is started.
    fn manager(&self, node: &NodeId) -> Arc<dyn Manager>;

    /// What is in the store now: the truth, past any fault between it and the nodes.
    fn truth(&self) -> Snapshot;

    /// A number for what is in the store now: while it is the same, so is the
    /// [`truth`](Self::truth), but for the time that leases have left. `None`, as by default: not
    /// known, so that the truth is read whenever it is asked for.
    fn version(&self) -> Option<(u64, Revision)> {
        None
    }

    /// Does what others do. Whether anything came of it: `false` also if the store cannot do this.
    fn tamper(&self, tamper: Tamper) -> bool;

    /// The key of a record of these subnets; `None` if it cannot have one. By default flannel's.
    fn record_key(&self, subnets: &DualStack<Subnet>) -> Option<LeaseKey> {
        let part = |subnet: &Subnet| format!("{}-{}", subnet.address(), subnet.len());
        let parts: Vec<String> = subnets.values().map(part).collect();
        Some(LeaseKey::new(parts.join("&")))
    }

    /// Whether it can keep a network of this config. By default any.
    fn supports(&self, config: &NetworkConfig) -> bool {
        let _ = config;
        true
    }

    /// Lets something go wrong on the wire between a node's manager and the store. Whether it can.
    fn disturb(&self, node: &NodeId, action: WireAction) -> bool {
        let _ = (node, action);
        false
    }

    /// Whether a node's manager has been told everything that there is to tell.
    fn is_caught_up(&self, node: &NodeId) -> bool {
        let _ = node;
        true
    }

    /// What took effect on a node's wire since the last call, and how often.
    fn felt(&self, node: &NodeId) -> BTreeMap<&'static str, u64> {
        let _ = node;
        BTreeMap::new()
    }

    /// Lets a node's wire work as it should from now on.
    fn repair(&self, node: &NodeId) {
        let _ = node;
    }

    /// A Go peer on this store; prefix and times are those of the store.
    fn go_peer(&self, name: &NodeId, public_ip: PublicIp, options: GoOptions) -> Option<GoPeer> {
        let _ = (name, public_ip, options);
        None
    }

    /// What harm a record does to Go peers of a mode; `None`: none.
    fn harm_to_go(&self, mode: GoMode, record: &LeaseKey) -> Option<String> {
        let _ = (mode, record);
        None
    }
}

/// [`MemoryManager`] as the store of a simulated cluster.
#[derive(Debug)]
pub struct MemoryCluster {
    manager: MemoryManager,
    backup: Mutex<Option<MemoryState>>,
}

impl MemoryCluster {
    /// A store as described.
    pub fn new(founding: &Founding) -> Self {
        let manager = MemoryManager::new(founding.config.clone());
        let manager = match founding.ttl {
            Some(ttl) => manager.with_ttl(ttl),
            None => manager,
        };
        Self {
            manager,
            backup: Mutex::new(None),
        }
    }
}

impl Cluster for MemoryCluster {
    fn manager(&self, _: &NodeId) -> Arc<dyn Manager> {
        Arc::new(self.manager.clone())
    }

    fn truth(&self) -> Snapshot {
        self.manager.snapshot()
    }

    fn tamper(&self, tamper: Tamper) -> bool {
        let mut backup = self.backup.lock().unwrap_or_else(PoisonError::into_inner);
        match tamper {
            Tamper::Put(lease) => self.manager.put_raw(lease).is_ok(),
            Tamper::Remove(key) => self.manager.remove(&key),
            Tamper::Config(config) => {
                self.manager.set_config(config);
                true
            }
            Tamper::Backup => {
                *backup = Some(self.manager.export());
                true
            }
            Tamper::Restore => backup
                .as_ref()
                .is_some_and(|state| self.manager.import(state).is_ok()),
            Tamper::Reserve(node, subnets) => self.manager.reserve(&node, subnets).is_ok(),
            Tamper::Unreserve(node, _) => self.manager.unreserve(&node),
            Tamper::Garble(_)
            | Tamper::Raw(..)
            | Tamper::BadConfig
            | Tamper::NoConfig
            | Tamper::Compact => false,
        }
    }
}

/// Makes the manager of a node.
type Make = dyn Fn(&NodeId) -> Arc<dyn Manager> + Send + Sync;

/// Managers of one's own as the store of a simulated cluster: all that the simulator knows of it is
/// what a watch of its own tells.
pub struct Managers {
    make: Box<Make>,
    known: Mutex<Known>,
}

struct Known {
    watch: EventStream,
    records: Snapshot,
}

impl Debug for Managers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Managers")
    }
}

impl Managers {
    /// The managers that a function gives to nodes, all of one store. It is asked for one more, of
    /// the node `observer`, whose watch must answer without waiting.
    ///
    /// # Panics
    /// Never: `observer` is a node id.
    pub fn new(make: impl Fn(&NodeId) -> Arc<dyn Manager> + Send + Sync + 'static) -> Self {
        let observer = NodeId::new("observer").expect("a node id");
        let watch = make(&observer).watch_leases();
        Self {
            make: Box::new(make),
            known: Mutex::new(Known {
                watch,
                records: Snapshot::default(),
            }),
        }
    }
}

impl Cluster for Managers {
    fn manager(&self, node: &NodeId) -> Arc<dyn Manager> {
        (self.make)(node)
    }

    fn truth(&self) -> Snapshot {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Known { watch, records } = &mut *known;
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(item)) = watch.as_mut().poll_next(&mut cx) {
            match item {
                Ok(Event::Snapshot(snapshot)) => *records = snapshot,
                Ok(Event::Put(lease)) => {
                    forget(records, &lease.key);
                    records.leases.push(lease);
                }
                Ok(Event::Delete { key, .. }) => forget(records, &key),
                Ok(Event::Unreadable(record)) => {
                    forget(records, &record.key);
                    records.unreadable.push(record);
                }
                _ => {}
            }
        }
        records.clone()
    }

    fn tamper(&self, _: Tamper) -> bool {
        false
    }
}

fn forget(records: &mut Snapshot, key: &LeaseKey) {
    records.leases.retain(|lease| lease.key != *key);
    records.unreadable.retain(|record| record.key != *key);
}
