//! Go peers in a simulated cluster: nodes that act as Go flanneld does.

use std::collections::BTreeSet;
use std::sync::Arc;

use flannel_core::{Family, NodeId, Subnet};
use tokio::task::JoinHandle;

use super::action::GoAction;
use super::hardware::addresses;
use super::judge::Invariant;
use super::world::World;
use crate::go_peer::{GoMode, GoOptions, GoState, GoView};

/// A host with Go flanneld.
#[derive(Debug)]
pub(super) struct Go {
    id: NodeId,
    number: u8,
    process: Option<JoinHandle<()>>,
    view: Option<GoView>,
    /// What was last seen of it.
    seen: Option<GoState>,
}

impl Go {
    pub(super) fn new(at: usize) -> Self {
        let number = u8::try_from(at).unwrap_or(u8::MAX);
        Self {
            id: NodeId::new(format!("go-{at}")).expect("a node id"),
            number: number.saturating_add(200),
            process: None,
            view: None,
            seen: None,
        }
    }

    fn kill(&mut self) -> bool {
        let process = self.process.take();
        if let Some(process) = &process {
            process.abort();
        }
        process.is_some()
    }
}

impl Drop for Go {
    fn drop(&mut self) {
        self.kill();
    }
}

impl World {
    pub(super) async fn act_on_go(&mut self, peer: usize, action: GoAction) -> bool {
        let Some(at) = peer.checked_rem(self.gos.len()) else {
            return false;
        };
        match action {
            GoAction::Start => self.start_go(at),
            GoAction::Kill => {
                let killed = self.gos[at].kill();
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                }
                killed
            }
        }
    }

    fn start_go(&mut self, at: usize) -> bool {
        let go = &mut self.gos[at];
        let runs = go.process.as_ref().is_some_and(|p| !p.is_finished());
        if runs {
            return false;
        }
        let left = go.view.take();
        let previous = left.as_ref().map(GoView::subnet);
        let options = GoOptions {
            previous: previous.unwrap_or_default(),
            ..GoOptions::default()
        };
        let ip = addresses(go.number, 0);
        let Some(peer) = self.cluster.go_peer(&go.id, ip, options) else {
            return false;
        };
        let routes: BTreeSet<Subnet> = left.map(|view| view.routes()).unwrap_or_default();
        let peer = peer.with_routes(routes);
        go.view = Some(peer.view());
        go.process = Some(tokio::spawn(peer.run()));
        true
    }

    /// Go peers reach the store again; those that ended are started, as their supervisor would.
    pub(super) fn repair_gos(&mut self) {
        for at in 0..self.gos.len() {
            self.cluster.repair(&self.gos[at].id);
            if self.gos[at].view.is_some() {
                self.start_go(at);
            }
        }
    }

    /// Nothing that our nodes wrote harms a Go peer.
    pub(super) fn look_at_gos(&mut self) {
        if self.gos.is_empty() {
            return;
        }
        let mode = if self.config.pools().has(Family::V6) {
            GoMode::Dual
        } else {
            GoMode::V4
        };
        let records = self.judge.records();
        let known = self.harmless.take();
        let known = known.is_some_and(|(known, of)| Arc::ptr_eq(&known, &records) && of == mode);
        let mut harmless = true;
        for lease in records.leases.iter().filter(|_| !known) {
            let ours = self.nodes.iter().any(|node| node.id == lease.node);
            if !ours || self.written.contains(&lease.key) {
                continue;
            }
            if let Some(harm) = self.cluster.harm_to_go(mode, &lease.key) {
                let what = format!("record {} of {}: {harm}", lease.key, lease.node);
                self.judge.broken(Invariant::GoPeersLive, None, what);
                harmless = false;
            }
        }
        self.harmless = harmless.then_some((records, mode));
        for go in &mut self.gos {
            let state = go.view.as_ref().map(GoView::state);
            if state != go.seen {
                self.trace.add(&format!("{}: {state:?}", go.id));
                let crashed = matches!(state, Some(GoState::Crashed { .. }));
                if crashed && self.written.is_empty() {
                    let what = format!("{}: {state:?}, and all records are honest", go.id);
                    self.judge.broken(Invariant::GoPeersLive, None, what);
                }
                go.seen = state;
            }
        }
    }
}
