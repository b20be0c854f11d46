//! Changes carried out in their order, each by whom it concerns.

use std::collections::BTreeMap;
use std::sync::Arc;

use flannel_core::kernel::{Error, Result};
use flannel_core::{IfName, Kernel, Object, ObjectKey, Op, Tunnel, TunnelPeer};
use tokio::sync::MutexGuard;

use super::{Peers, Running, WithTunnels};

/// Carries out ops in their order: what stands together for the kernel inside, or changes peers of
/// one packet path, is done together.
pub(super) async fn apply<K: Kernel>(kernel: &WithTunnels<K>, ops: &[Op]) -> Vec<Result<()>> {
    let mut run = Run {
        kernel,
        ops,
        results: ops.iter().map(|_| None).collect(),
        failed: BTreeMap::new(),
        inner: Vec::new(),
        peers: Vec::new(),
        changing: None,
    };
    for (at, op) in ops.iter().enumerate() {
        run.take(at, op).await;
    }
    run.flush_inner().await;
    run.flush_peers().await;
    let results = run.results.into_iter();
    let missing = || {
        Err(Error::Connection {
            reason: "the kernel answered fewer results than it was given ops".to_owned(),
            source: None,
        })
    };
    results
        .map(|result| result.unwrap_or_else(missing))
        .collect()
}

struct Run<'a, K> {
    kernel: &'a WithTunnels<K>,
    ops: &'a [Op],
    results: Vec<Option<Result<()>>>,
    /// What was not made, with what keeps from being made whatever needs it.
    failed: BTreeMap<ObjectKey, ObjectKey>,
    /// The places of the ops that wait to be given to the kernel inside.
    inner: Vec<usize>,
    /// The places of the ops on peers that wait to be carried out.
    peers: Vec<usize>,
    /// That nobody else changes packet paths, from the first change on.
    changing: Option<MutexGuard<'a, ()>>,
}

impl<K: Kernel> Run<'_, K> {
    async fn take(&mut self, at: usize, op: &Op) {
        match op.object() {
            Object::Tunnel(tunnel) => {
                self.flush_inner().await;
                self.flush_peers().await;
                if !self.is_skipped(at) {
                    let result = self.tunnel(op, tunnel).await;
                    self.finish(at, result);
                }
            }
            Object::TunnelPeer(_) => {
                self.flush_inner().await;
                if !self.is_skipped(at) {
                    self.peers.push(at);
                }
            }
            _ => {
                self.flush_peers().await;
                if !self.is_skipped(at) {
                    self.inner.push(at);
                }
            }
        }
    }

    /// Whether an op needs what was not made; it then has its result.
    fn is_skipped(&mut self, at: usize) -> bool {
        let op = &self.ops[at];
        if self.failed.is_empty() || matches!(op, Op::Delete(_)) {
            return false;
        }
        let needs = op.object().needs();
        let Some(key) = needs.iter().find_map(|need| self.failed.get(need)).cloned() else {
            return false;
        };
        self.finish(at, Err(Error::Skipped { key }));
        true
    }

    fn finish(&mut self, at: usize, result: Result<()>) {
        let op = &self.ops[at];
        if !matches!(op, Op::Delete(_)) {
            match &result {
                Ok(()) => self.failed.remove(&op.key()),
                Err(Error::Skipped { key }) => self.failed.insert(op.key(), key.clone()),
                Err(_) => self.failed.insert(op.key(), op.key()),
            };
        }
        self.results[at] = Some(result);
    }

    async fn flush_inner(&mut self) {
        let places = std::mem::take(&mut self.inner);
        if places.is_empty() {
            return;
        }
        let ops: Vec<Op> = places.iter().map(|at| self.ops[*at].clone()).collect();
        let results = self.kernel.inner.apply(&ops).await;
        for (at, result) in places.into_iter().zip(results) {
            self.finish(at, result);
        }
    }

    async fn lock(&mut self) {
        if self.changing.is_none() {
            self.changing = Some(self.kernel.changing.lock().await);
        }
    }

    async fn tunnel(&mut self, op: &Op, asked: &Tunnel) -> Result<()> {
        self.lock().await;
        let path = &self.kernel.path;
        if let Op::Delete(_) = op {
            path.close(asked.dev).await;
            return Ok(());
        }
        if let Some(fault) = asked.fault() {
            return Err(rejected(fault, op));
        }
        match (op, self.kernel.running_on(asked.dev)) {
            (_, None) => path.open(asked).await,
            (_, Some(Running { tunnel, .. })) if tunnel == *asked => Ok(()),
            (Op::Create(_), Some(_)) => Err(exists(op)),
            (_, Some(_)) => path.alter(asked).await,
        }
    }

    /// Carries out the ops on peers that wait: those of one packet path at once.
    async fn flush_peers(&mut self) {
        let places = std::mem::take(&mut self.peers);
        if places.is_empty() {
            return;
        }
        self.lock().await;
        let ops = self.ops;
        let mut by_dev: BTreeMap<IfName, Vec<usize>> = BTreeMap::new();
        for at in places {
            if let Some(dev) = ops[at].object().dev() {
                by_dev.entry(dev).or_default().push(at);
            }
        }
        for (dev, places) in by_dev {
            let running = self.kernel.running_on(dev);
            let mut peers = running.as_ref().map(|running| Arc::clone(&running.peers));
            let mut changed = Vec::new();
            for at in places {
                let result = match (&running, &mut peers) {
                    (Some(Running { tunnel, .. }), Some(peers)) => edit(tunnel, peers, &ops[at]),
                    _ => nowhere(&ops[at]),
                };
                match result {
                    Ok(true) => changed.push(at),
                    Ok(false) => self.finish(at, Ok(())),
                    Err(error) => self.finish(at, Err(error)),
                }
            }
            let Some(peers) = peers.filter(|_| !changed.is_empty()) else {
                continue;
            };
            let result = self.kernel.path.set_peers(dev, peers).await;
            let reason = result.err().map(|error| error.to_string());
            for at in changed {
                let result = match &reason {
                    None => Ok(()),
                    Some(message) => Err(Error::NotFound {
                        message: message.clone(),
                    }),
                };
                self.finish(at, result);
            }
        }
    }
}

/// The answer where no packet path runs: what is to be removed is gone.
fn nowhere(op: &Op) -> Result<bool> {
    match (op, op.object().dev()) {
        (Op::Create(_) | Op::Change(_), Some(dev)) => Err(Error::NotFound {
            message: ObjectKey::Tunnel(dev).to_string(),
        }),
        _ => Ok(false),
    }
}

/// Carries out an op on a peer; whether that changed anything.
fn edit(tunnel: &Tunnel, peers: &mut Arc<Peers>, op: &Op) -> Result<bool> {
    let Object::TunnelPeer(peer) = op.object() else {
        return Ok(false);
    };
    let TunnelPeer {
        subnet, endpoint, ..
    } = *peer;
    let found = peers.get(&subnet).copied();
    if !matches!(op, Op::Delete(_))
        && let Some(fault) = tunnel.fault_of(peer)
    {
        return Err(rejected(fault, op));
    }
    match (op, found) {
        (Op::Delete(_), None) => Ok(false),
        (Op::Delete(_), Some(_)) => Ok(Arc::make_mut(peers).remove(&subnet).is_some()),
        (_, Some(found)) if found == endpoint => Ok(false),
        (Op::Create(_), Some(_)) => Err(exists(op)),
        _ => {
            Arc::make_mut(peers).insert(subnet, endpoint);
            Ok(true)
        }
    }
}

fn exists(op: &Op) -> Error {
    Error::Exists {
        message: op.key().to_string(),
    }
}

fn rejected(why: &str, op: &Op) -> Error {
    Error::Rejected {
        message: format!("{why}: {}", op.object()),
    }
}
