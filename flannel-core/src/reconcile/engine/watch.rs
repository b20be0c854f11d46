//! The engine's watch of the store: peers, and what happens to our own record.

use std::future::poll_fn;
use std::task::Poll;

use super::local::adopted_routes;
use super::store::LeaseState;
use super::{BATCH, Engine};
use crate::condition::ConditionType;
use crate::error_chain::error_chain;
use crate::event::{Event, EventStream};
use crate::lease::{Lease, LeaseAttrs};
use crate::lease_set::{Applied, Held, HeldReason, LeaseDelta, OwnChange};
use crate::manager;
use crate::status::OverlayEvent;

/// The watch of the store: waits until the stream has something, then takes all that is ready.
pub(super) struct Watch(pub(super) Option<EventStream>);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Watch(open: {})", self.0.is_some())
    }
}

impl Watch {
    pub(super) async fn next(&mut self) -> Vec<Option<manager::Result<Event>>> {
        let Some(stream) = &mut self.0 else {
            return std::future::pending().await;
        };
        let mut batch = Vec::new();
        poll_fn(|cx| {
            while batch.len() < BATCH {
                match stream.as_mut().poll_next(cx) {
                    Poll::Ready(item) => {
                        let end = item.is_none();
                        batch.push(item);
                        if end {
                            break;
                        }
                    }
                    Poll::Pending if batch.is_empty() => return Poll::Pending,
                    Poll::Pending => break,
                }
            }
            Poll::Ready(())
        })
        .await;
        batch
    }
}

impl Engine {
    /// Opens the watch of the store once we know who we are in it.
    pub(super) fn open_watch(&mut self) {
        let now = self.now();
        if self.confirm_at.is_some_and(|at| at <= now) {
            self.confirm_at = None;
            self.confirming = true;
            self.watch.0 = None;
            self.watch_at = now;
        }
        if self.watch.0.is_some() || now < self.watch_at || self.lease.lease().is_none() {
            return;
        }
        if !self.adopted {
            let Some(observed) = self.reconciler.observed() else {
                return;
            };
            self.adopted = true;
            let adopted = adopted_routes(observed, &self.ownership());
            self.leases.set_adopted(adopted);
        }
        self.watch.0 = Some(self.parts.manager.watch_leases());
        if self.parts.manager.capabilities().watches_config {
            self.config_poll_at = None;
        }
    }

    /// Takes what the watch delivered. Answers whether nothing follows from it yet.
    pub(super) async fn watched(&mut self, batch: Vec<Option<manager::Result<Event>>>) -> bool {
        let mut waits = true;
        for item in batch {
            match item {
                Some(Ok(event)) => {
                    waits &= self.conditions.reason(ConditionType::Store) == "Connected";
                    waits &= self.waits_for_others(&event);
                    self.watch_failures = 0;
                    // The store is back. Whose lease ended meanwhile asks for it now: peers that
                    // come back too must find the record before they believe that it is gone.
                    if std::mem::take(&mut self.watch_broken) && self.store_is_down {
                        self.call_at = self.now();
                    }
                    self.holds(ConditionType::Store, "Connected", self.parts.manager.name());
                    self.event(event).await;
                }
                Some(Err(error)) => {
                    waits = false;
                    self.watch_broken = true;
                    let permanent = matches!(error, manager::Error::Denied { .. });
                    let message = format!(
                        "{}; the last known peers stay in force",
                        error_chain(&error)
                    );
                    self.fails(ConditionType::Store, "WatchFailed", message, permanent);
                }
                None => {
                    waits = false;
                    self.watch.0 = None;
                    self.watch_failures = self.watch_failures.saturating_add(1);
                    let wait = self.retry.after(self.watch_failures, &mut self.parts.rng);
                    self.watch_at = self.now() + wait;
                }
            }
        }
        waits
    }

    /// Tells if an event is only kept for a while, to be judged with those that come with it.
    fn waits_for_others(&self, event: &Event) -> bool {
        matches!(event, Event::Delete { key, .. } if !self.leases.is_own_key(key))
    }

    pub(super) async fn event(&mut self, event: Event) {
        let is_whole = matches!(event, Event::Snapshot(_));
        let now = self.now();
        match &event {
            Event::Snapshot(_) => drop(self.burst.take_all()),
            Event::Put(lease) => self.burst.written(&lease.key, lease.revision),
            Event::Unreadable(record) => self.burst.written(&record.key, record.revision),
            Event::Delete { key, revision } if self.waits_for_others(&event) => {
                self.burst.add(key.clone(), *revision, now);
                return;
            }
            Event::Delete { .. } => self.burst.add_own(now),
            _ => {}
        }
        let applied = match event {
            Event::Config(config) => {
                self.config_is_saved = false;
                self.set_config(config).await;
                self.configured();
                return;
            }
            Event::ConfigUnreadable { reason } => {
                self.config_unreadable(reason);
                return;
            }
            Event::Snapshot(snapshot) if self.confirming => {
                self.confirming = false;
                self.leases.apply_confirming(snapshot)
            }
            Event::Snapshot(snapshot) if std::mem::take(&mut self.doubting) => {
                self.leases.apply_doubting(snapshot)
            }
            event => self.leases.apply(event),
        };
        self.applied(applied, is_whole);
        if self.saved.instance != Some(self.instance) {
            self.save().await;
        }
    }

    /// Judges the deletes that have come together, once no more of them come.
    pub(super) fn end_burst(&mut self) {
        let now = self.now();
        if self.burst.due().is_some_and(|due| due <= now) {
            let deletes = self.burst.take(now);
            let applied = self.leases.apply_burst(deletes);
            self.applied(applied, false);
        }
    }

    /// Does what follows from a change of the set of peers.
    fn applied(&mut self, applied: Applied, is_whole: bool) {
        let Applied {
            delta, own, held, ..
        } = applied;
        // Ours comes first: until it is written again, the others miss us.
        if let Some(own) = own {
            self.own_record(own, is_whole);
        }
        self.peers_differ(&delta);
        if let Some(held) = held {
            self.confirm_at = match held.reason {
                HeldReason::Share => Some(self.now() + self.parts.options.withdrawal_grace),
                // What is held meanwhile puts no reading off that is due since the config is back.
                HeldReason::NoConfig => self.confirm_at,
            };
            let Held {
                withdrawn,
                known,
                reason,
            } = held;
            tracing::warn!(
                withdrawn,
                known,
                ?reason,
                "a withdrawal is not believed yet"
            );
            self.emit(OverlayEvent::WithdrawalHeld {
                withdrawn,
                known,
                reason,
            });
        }
    }

    /// The store has a config again: what it lacks is a statement from the next reading on, and
    /// whose record is gone asks for it now.
    pub(super) fn configured(&mut self) {
        let is_no_statement = |held: &Held| held.reason == HeldReason::NoConfig;
        if self.leases.held().is_some_and(is_no_statement) && self.confirm_at.is_none() {
            self.confirm_at = Some(self.now() + self.parts.options.withdrawal_grace);
        }
        if self.wants_acquire() {
            self.call_at = self.now();
        }
    }

    /// Something happened to our own record. What is certain is found out by a renewal, whose
    /// condition the store checks.
    ///
    /// A single write that is older than ours came late. In a whole snapshot it may be all that is
    /// left of our record, because a backup was restored.
    pub(super) fn own_record(&mut self, change: OwnChange, is_whole: bool) {
        let now = self.now();
        if let OwnChange::Written(record) = &change
            && !is_whole
            && self.is_a_clones(record)
        {
            tracing::warn!(
                public_ip = ?record.attrs.public_ip,
                "another machine runs with a copy of our saved state: we are a new instance"
            );
            self.instance = self.parts.fresh_instance;
        }
        let LeaseState::Held { lease, keeper } = &mut self.lease else {
            return;
        };
        match change {
            // The echo of a write of ours, perhaps of one whose answer was lost, or of another run of
            // this machine: what both publish is the same.
            OwnChange::Written(record)
                if record.key == lease.key
                    && record.subnet == lease.subnet
                    && record.attrs == lease.attrs =>
            {
                if record.revision > lease.revision {
                    lease.revision = record.revision;
                    lease.instance = record.instance;
                }
            }
            OwnChange::Written(record) if !is_whole && record.revision <= lease.revision => {}
            _ => keeper.publish(now),
        }
    }

    /// Tells if a record is one that our own instance wrote after ours, at an address that never was
    /// ours: a machine was cloned together with its saved state.
    fn is_a_clones(&self, record: &Lease) -> bool {
        let Some(held) = self.lease.held() else {
            return false;
        };
        let theirs = record.attrs.public_ip;
        let is_ours = |attrs: &LeaseAttrs| attrs.public_ip == theirs;
        record.key == held.key
            && record.revision > held.revision
            && record.node == self.parts.node
            && record.instance == Some(self.instance)
            && !is_ours(&held.attrs)
            && !self.attrs.as_ref().is_some_and(is_ours)
    }

    pub(super) fn peers_differ(&mut self, delta: &LeaseDelta) {
        if delta.is_empty() {
            return;
        }
        self.peers_changed = true;
        if !delta.added.is_empty() {
            let (peers, now) = (self.leases.peers().len(), self.now());
            self.host_checks.hint_of_peers(peers, now);
        }
        for key in delta.added.iter().chain(&delta.changed) {
            if let Some(peer) = self.leases.peer(key) {
                for ip in peer.lease.attrs.public_ip.ips() {
                    self.reconciler.now_matters(ip);
                }
            }
        }
        let changed = self.compiler.update(delta, &self.leases);
        self.reconciler.desired_changed(changed);
        if self.events.receiver_count() == 0 {
            return;
        }
        let peer = |key| self.leases.peer(key);
        for key in &delta.removed {
            self.emit(OverlayEvent::PeerRemoved { key: key.clone() });
        }
        for found in delta.changed.iter().filter_map(peer) {
            let (key, node) = (found.lease.key.clone(), found.lease.node.clone());
            self.emit(OverlayEvent::PeerChanged {
                key,
                node,
                subnet: found.subnets,
            });
        }
        for found in delta.added.iter().filter_map(peer) {
            let (key, node) = (found.lease.key.clone(), found.lease.node.clone());
            self.emit(OverlayEvent::PeerAdded {
                key,
                node,
                subnet: found.subnets,
            });
        }
    }
}
