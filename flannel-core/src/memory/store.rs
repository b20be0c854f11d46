//! The store behind a [`MemoryManager`](super::MemoryManager): records, allocation, subscribers.
//! Every call is complete in itself, so whoever holds the lock sees a whole state.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use crate::alloc::{Allocator, choose};
use crate::clock::{Clock, Moment};
use crate::config::NetworkConfig;
use crate::event::{Event, Snapshot};
use crate::family::{DualStack, PublicIp};
use crate::holder::Holder;
use crate::lease::{Lease, LeaseKey, Revision};
use crate::manager::{Error, LeaseRequest, Result};
use crate::node::{InstanceId, NodeId};
use crate::subnet::Subnet;

/// How many events wait for a slow subscriber before a fresh snapshot takes their place.
const MAX_QUEUE: usize = 1024;

/// A record: the lease as it was written, and when its time runs out.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) lease: Lease,
    pub(super) expires: Option<Moment>,
}

impl Record {
    /// The lease with the time that is left.
    pub(super) fn at(&self, now: Moment) -> Lease {
        let mut lease = self.lease.clone();
        lease.ttl = self.expires.map(|expires| expires.since(now));
        lease
    }
}

/// The machine that got its lease by a clone of the manager, known to that and to its watches.
#[derive(Debug, Clone, Default)]
pub(super) struct Machine(Arc<Mutex<Known>>);

/// The machine as the store knows it.
#[derive(Debug, Clone, Default)]
struct Known {
    instance: Option<InstanceId>,
    /// The node id that it had a lease by last, and when that was written.
    had: Option<(NodeId, Revision)>,
}

impl Machine {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn instance(&self) -> Option<InstanceId> {
        self.known().instance
    }

    /// The machine asks; as another instance than it was it is another one.
    fn asks(&self, instance: Option<InstanceId>) {
        let mut known = self.known();
        if known.instance != instance {
            let had = None;
            *known = Known { instance, had };
        }
    }

    /// The machine has a lease.
    fn has(&self, lease: &Lease) {
        *self.known() = Known {
            instance: lease.instance,
            had: Some((lease.node.clone(), lease.revision)),
        };
    }

    /// Tells if a record was written by a later run of the machine, under another node id than that by
    /// which it had its lease.
    fn is_of_a_later_run(&self, node: &NodeId, lease: &Lease) -> bool {
        let known = self.known();
        let had = known.had.as_ref();
        lease.instance == known.instance
            && had.is_some_and(|(had, written)| had == node && lease.revision > *written)
    }
}

/// What one watch has not fetched yet.
#[derive(Debug)]
struct Subscriber {
    machine: Machine,
    /// The next event is a snapshot.
    resync: bool,
    queue: VecDeque<Event>,
    waker: Option<Waker>,
}

#[derive(Debug)]
pub(super) struct Store {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) ttl: Option<Duration>,
    config: NetworkConfig,
    revision: Revision,
    records: BTreeMap<LeaseKey, Record>,
    by_node: BTreeMap<NodeId, BTreeSet<LeaseKey>>,
    by_address: BTreeMap<PublicIp, BTreeSet<LeaseKey>>,
    by_expiry: BTreeSet<(Moment, LeaseKey)>,
    reservations: BTreeMap<NodeId, DualStack<Subnet>>,
    /// Every record and every reservation is marked as taken, once each.
    allocators: DualStack<Allocator>,
    subscribers: BTreeMap<u64, Subscriber>,
    last_subscriber: u64,
    wakers: Vec<Waker>,
}

impl Store {
    pub(super) fn new(config: NetworkConfig, clock: Arc<dyn Clock>) -> Self {
        let mut store = Self {
            clock,
            ttl: None,
            allocators: DualStack::default(),
            config,
            revision: Revision(0),
            records: BTreeMap::new(),
            by_node: BTreeMap::new(),
            by_address: BTreeMap::new(),
            by_expiry: BTreeSet::new(),
            reservations: BTreeMap::new(),
            subscribers: BTreeMap::new(),
            last_subscriber: 0,
            wakers: Vec::new(),
        };
        store.rebuild_allocators();
        store
    }

    pub(super) const fn config(&self) -> &NetworkConfig {
        &self.config
    }

    pub(super) const fn revision(&self) -> Revision {
        self.revision
    }

    pub(super) const fn records(&self) -> &BTreeMap<LeaseKey, Record> {
        &self.records
    }

    pub(super) const fn reservations(&self) -> &BTreeMap<NodeId, DualStack<Subnet>> {
        &self.reservations
    }

    pub(super) fn set_config(&mut self, config: NetworkConfig) {
        self.next_revision();
        self.config = config;
        self.rebuild_allocators();
        self.publish(&Event::Config(self.config.clone()));
    }

    /// Replaces everything; watches start again.
    pub(super) fn replace(
        &mut self,
        config: NetworkConfig,
        revision: Revision,
        records: Vec<Record>,
        reservations: BTreeMap<NodeId, DualStack<Subnet>>,
    ) {
        let mut fresh = Self::new(config, Arc::clone(&self.clock));
        fresh.ttl = self.ttl;
        fresh.reservations = reservations;
        records.into_iter().for_each(|record| fresh.insert(record));
        fresh.rebuild_allocators();
        fresh.revision = Revision(revision.max(self.revision).0.saturating_add(1));
        fresh.last_subscriber = self.last_subscriber;
        fresh.wakers = std::mem::take(&mut self.wakers);
        fresh.subscribers = std::mem::take(&mut self.subscribers);
        *self = fresh;
        for subscriber in self.subscribers.values_mut() {
            subscriber.resync = true;
            self.wakers.extend(subscriber.waker.take());
        }
    }

    // Leases

    /// Tells if a machine follows the store that it got a lease from.
    fn lives(&self, instance: InstanceId) -> bool {
        let mut watches = self.subscribers.values();
        watches.any(|watch| watch.machine.instance() == Some(instance))
    }

    /// Tells if another run of a machine follows the store that it got a lease from.
    fn runs_elsewhere(&self, machine: &Machine) -> bool {
        let mut watches = self.subscribers.values();
        watches.any(|watch| {
            !Arc::ptr_eq(&watch.machine.0, &machine.0)
                && watch.machine.instance() == machine.instance()
        })
    }

    pub(super) fn acquire(
        &mut self,
        now: Moment,
        machine: &Machine,
        request: &LeaseRequest,
    ) -> Result<Lease> {
        let node = &request.node;
        check_families(&request.previous)?;
        if !self.allocators.same_families(self.config.pools()) {
            return Err(Error::Invalid {
                reason: "the network config was read with PoolMode::Assigned, which leaves no \
                         subnets to give out: read it with PoolMode::Allocated"
                    .to_owned(),
            });
        }
        machine.asks(request.instance);
        let (own, former) = self.records_of(request)?;
        let later = former
            .iter()
            .find(|lease| machine.is_of_a_later_run(node, lease) && self.runs_elsewhere(machine));
        let is_outdated = own.is_empty() && !request.take_over;
        if let (Some(later), true) = (later, is_outdated) {
            return Err(Error::renamed(&later.node));
        }
        // What the machine uses stays, be it of a former name.
        let kept = own
            .iter()
            .chain(&former)
            .filter(|lease| self.fits(&lease.subnet))
            .min_by_key(|lease| lease.subnet != request.previous);
        let (key, subnet) = match kept {
            Some(lease) => (lease.key.clone(), lease.subnet),
            None => {
                let held = [own.clone(), former.clone()].concat();
                let subnet = self.choose(request, &held)?;
                let key = subnet_key(&subnet);
                // Only a raw write leaves a record under a key that is not that of its subnets.
                if self.records.contains_key(&key) && held.iter().all(|lease| lease.key != key) {
                    return Err(Error::Conflict {
                        reason: format!("the record {key} is there and names other subnets"),
                    });
                }
                for lease in &held {
                    self.delete(&lease.key);
                }
                (key, subnet)
            }
        };
        let stays_own = own.iter().any(|lease| lease.key == key);
        let own = own.iter().filter(|_| !stays_own);
        for lease in former.iter().chain(own).filter(|lease| lease.key != key) {
            self.delete(&lease.key);
        }
        let lease = Lease {
            ttl: self.ttl_of(node, &subnet),
            key,
            node: node.clone(),
            instance: request.instance,
            subnet,
            attrs: request.attrs.clone(),
            created: Revision::default(),
            revision: Revision::default(),
        };
        let lease = self.write(now, lease);
        machine.has(&lease);
        Ok(lease)
    }

    /// Subnets for a node that has to move from its own records, or has none.
    fn choose(&mut self, request: &LeaseRequest, own: &[Lease]) -> Result<DualStack<Subnet>> {
        let reserved = self.reservations.get(&request.node).copied();
        let held: Vec<DualStack<Subnet>> = own.iter().map(|lease| lease.subnet).collect();
        let held = || held.iter().chain(&reserved);
        held().for_each(|subnets| self.allocators.release(subnets));
        let allocators = DualStack::new(self.allocators.v4.as_ref(), self.allocators.v6.as_ref());
        let wanted = reserved.unwrap_or(request.previous);
        let chosen = choose(&allocators, &request.node, &wanted);
        held().for_each(|subnets| self.allocators.take(subnets));
        Ok(chosen?)
    }

    pub(super) fn renew(&mut self, now: Moment, machine: &Machine, lease: &Lease) -> Result<Lease> {
        let mut renewed = match self.find_ours(lease)? {
            Some(record) => record.lease.clone(),
            None => return Err(lost(lease, "the record is gone")),
        };
        renewed.attrs = lease.attrs.clone();
        renewed.ttl = self.ttl_of(&renewed.node, &renewed.subnet);
        let renewed = self.write(now, renewed);
        machine.has(&renewed);
        Ok(renewed)
    }

    pub(super) fn release(&mut self, lease: &Lease) -> Result<()> {
        if self.find_ours(lease)?.is_some() {
            self.delete(&lease.key);
        }
        Ok(())
    }

    /// The record of a lease; an error if it was written since, by whomever.
    fn find_ours(&self, lease: &Lease) -> Result<Option<&Record>> {
        let Some(record) = self.records.get(&lease.key) else {
            return Ok(None);
        };
        let found = &record.lease;
        if found.node != lease.node {
            return Err(lost(
                lease,
                &format!("it belongs to node {} now", found.node),
            ));
        }
        if found.instance != lease.instance {
            return Err(lost(lease, "another machine has taken the node id"));
        }
        if found.revision != lease.revision {
            let (found, held) = (found.revision, lease.revision);
            let reason = format!("it was written at revision {found}, after our {held}");
            return Err(lost(lease, &reason));
        }
        Ok(Some(record))
    }

    pub(super) fn put_raw(&mut self, now: Moment, lease: Lease) -> Result<Lease> {
        check_families(&lease.subnet)?;
        Ok(self.write(now, lease))
    }

    /// The asker's own records, and those of its former name, the oldest claims first.
    fn records_of(&self, request: &LeaseRequest) -> Result<(Vec<Lease>, Vec<Lease>)> {
        let own = self.own_records(&request.node);
        for lease in &own {
            let holder = Holder::of(request, &lease.node, lease.instance, &lease.attrs);
            if let Holder::Twin(instance) = holder
                && !request.take_over
                && self.lives(instance)
            {
                return Err(Error::NodeIdHeld {
                    node: lease.node.clone(),
                    public_ip: lease.attrs.public_ip,
                });
            }
        }
        let there = self.by_address.get(&request.attrs.public_ip);
        let records = there
            .into_iter()
            .flatten()
            .filter_map(|key| self.records.get(key));
        let is_former = |lease: &Lease| {
            lease.node != request.node
                && !self.reservations.contains_key(&lease.node)
                && match Holder::of(request, &lease.node, lease.instance, &lease.attrs) {
                    Holder::Own => true,
                    Holder::Former(instance) => {
                        request.take_over || !instance.is_some_and(|instance| self.lives(instance))
                    }
                    Holder::Twin(_) | Holder::Other => false,
                }
        };
        let leases = records.map(|record| &record.lease);
        let mut former: Vec<Lease> = leases.filter(|lease| is_former(lease)).cloned().collect();
        former.sort_by_key(Lease::seniority);
        Ok((own, former))
    }

    /// The records of a node, the oldest claim first.
    fn own_records(&self, node: &NodeId) -> Vec<Lease> {
        let keys = self.by_node.get(node).into_iter().flatten();
        let records = keys.filter_map(|key| self.records.get(key));
        let mut leases: Vec<Lease> = records.map(|record| record.lease.clone()).collect();
        leases.sort_by_key(Lease::seniority);
        leases
    }

    /// Whether the config allows a node these subnets.
    fn fits(&self, subnets: &DualStack<Subnet>) -> bool {
        self.config.fits(subnets)
    }

    /// How long a node's lease lasts: for ever, if it is of what was reserved for it.
    fn ttl_of(&self, node: &NodeId, subnets: &DualStack<Subnet>) -> Option<Duration> {
        self.ttl
            .filter(|_| self.reservations.get(node) != Some(subnets))
    }

    // Reservations

    pub(super) fn reserve(&mut self, node: &NodeId, subnets: DualStack<Subnet>) -> Result<()> {
        let invalid = |reason: String| Err(Error::Invalid { reason });
        check_families(&subnets)?;
        if !self.fits(&subnets) {
            return invalid(format!(
                "{subnets} is not what the network config gives a node"
            ));
        }
        let own = self.own_records(node);
        if let Some(lease) = own.iter().find(|lease| lease.subnet != subnets) {
            let held = lease.subnet;
            return invalid(format!("node {node} holds {held}: release that first"));
        }
        let taken = self
            .records
            .values()
            .find(|record| record.lease.node != *node && record.lease.subnet.overlaps(&subnets));
        if let Some(record) = taken {
            let Lease { node, subnet, .. } = &record.lease;
            return invalid(format!(
                "{subnets} overlaps {subnet}, which node {node} holds"
            ));
        }
        let mut reserved = self.reservations.iter();
        if let Some((other, theirs)) =
            reserved.find(|(other, theirs)| *other != node && theirs.overlaps(&subnets))
        {
            return invalid(format!(
                "{subnets} overlaps {theirs}, reserved for node {other}"
            ));
        }
        self.unreserve(node);
        self.allocators.take(&subnets);
        self.reservations.insert(node.clone(), subnets);
        Ok(())
    }

    pub(super) fn unreserve(&mut self, node: &NodeId) -> bool {
        let reserved = self.reservations.remove(node);
        reserved
            .iter()
            .for_each(|subnets| self.allocators.release(subnets));
        reserved.is_some()
    }

    // Records

    /// Writes a record under the next revision; the claim is as old as the record.
    fn write(&mut self, now: Moment, mut lease: Lease) -> Lease {
        lease.revision = self.next_revision();
        lease.created = lease.revision;
        if let Some(old) = self.take_out(&lease.key) {
            lease.created = old.lease.created;
        }
        let expires = lease.ttl.map(|ttl| now + ttl);
        self.allocators.take(&lease.subnet);
        self.publish(&Event::Put(lease.clone()));
        self.insert(Record {
            lease: lease.clone(),
            expires,
        });
        lease
    }

    pub(super) fn delete(&mut self, key: &LeaseKey) -> bool {
        let found = self.take_out(key).is_some();
        if found {
            let revision = self.next_revision();
            self.publish(&Event::Delete {
                key: key.clone(),
                revision,
            });
        }
        found
    }

    /// Deletes the records whose time has run out.
    pub(super) fn expire(&mut self, now: Moment) {
        while let Some((expires, key)) = self.by_expiry.first().cloned() {
            if expires > now {
                break;
            }
            self.delete(&key);
        }
    }

    /// The time until the next record expires.
    pub(super) fn next_expiry(&self, now: Moment) -> Option<Duration> {
        self.by_expiry
            .first()
            .map(|(expires, _)| expires.since(now))
    }

    fn insert(&mut self, record: Record) {
        let Lease { key, node, .. } = &record.lease;
        let keys = self.by_node.entry(node.clone()).or_default();
        keys.insert(key.clone());
        let there = self.by_address.entry(record.lease.attrs.public_ip);
        there.or_default().insert(key.clone());
        if let Some(expires) = record.expires {
            self.by_expiry.insert((expires, key.clone()));
        }
        self.records.insert(key.clone(), record);
    }

    fn take_out(&mut self, key: &LeaseKey) -> Option<Record> {
        let record = self.records.remove(key)?;
        if let Some(keys) = self.by_node.get_mut(&record.lease.node) {
            keys.remove(key);
            if keys.is_empty() {
                self.by_node.remove(&record.lease.node);
            }
        }
        let public_ip = record.lease.attrs.public_ip;
        if let Some(keys) = self.by_address.get_mut(&public_ip) {
            keys.remove(key);
            if keys.is_empty() {
                self.by_address.remove(&public_ip);
            }
        }
        if let Some(expires) = record.expires {
            self.by_expiry.remove(&(expires, key.clone()));
        }
        self.allocators.release(&record.lease.subnet);
        Some(record)
    }

    fn next_revision(&mut self) -> Revision {
        self.revision = Revision(self.revision.0.saturating_add(1));
        self.revision
    }

    fn rebuild_allocators(&mut self) {
        let pools = self.config.pools();
        self.allocators = DualStack::new(
            pools.v4.as_ref().and_then(Allocator::new),
            pools.v6.as_ref().and_then(Allocator::new),
        );
        for record in self.records.values() {
            self.allocators.take(&record.lease.subnet);
        }
        for subnets in self.reservations.values() {
            self.allocators.take(subnets);
        }
    }

    // Watching

    pub(super) fn snapshot(&self, now: Moment) -> Snapshot {
        Snapshot {
            leases: self.records.values().map(|record| record.at(now)).collect(),
            unreadable: Vec::new(),
            revision: self.revision,
            unconfigured: false,
        }
    }

    pub(super) fn subscribe(&mut self, machine: Machine) -> u64 {
        self.last_subscriber += 1;
        let subscriber = Subscriber {
            machine,
            resync: true,
            queue: VecDeque::new(),
            waker: None,
        };
        self.subscribers.insert(self.last_subscriber, subscriber);
        self.last_subscriber
    }

    pub(super) fn unsubscribe(&mut self, id: u64) {
        self.subscribers.remove(&id);
    }

    /// The next event for a subscriber; if there is none, it will be woken when there is.
    pub(super) fn next_event(&mut self, id: u64, now: Moment, waker: &Waker) -> Option<Event> {
        let snapshot = match self.subscribers.get(&id) {
            Some(Subscriber { resync: true, .. }) => Some(self.snapshot(now)),
            _ => None,
        };
        let subscriber = self.subscribers.get_mut(&id)?;
        if let Some(snapshot) = snapshot {
            subscriber.resync = false;
            subscriber.queue = VecDeque::from([Event::Config(self.config.clone())]);
            return Some(Event::Snapshot(snapshot));
        }
        let event = subscriber.queue.pop_front();
        if event.is_none() {
            subscriber.waker = Some(waker.clone());
        }
        event
    }

    fn publish(&mut self, event: &Event) {
        for subscriber in self.subscribers.values_mut() {
            if subscriber.queue.len() >= MAX_QUEUE {
                subscriber.resync = true;
            }
            if subscriber.resync {
                subscriber.queue = VecDeque::new();
            } else {
                subscriber.queue.push_back(event.clone());
            }
            self.wakers.extend(subscriber.waker.take());
        }
    }

    pub(super) fn take_wakers(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.wakers)
    }
}

impl DualStack<Allocator> {
    fn take(&mut self, subnets: &DualStack<Subnet>) {
        for (family, subnet) in subnets.iter() {
            if let Some(allocator) = self.get_mut(family) {
                allocator.take(subnet);
            }
        }
    }

    fn release(&mut self, subnets: &DualStack<Subnet>) {
        for (family, subnet) in subnets.iter() {
            if let Some(allocator) = self.get_mut(family) {
                allocator.release(subnet);
            }
        }
    }
}

/// Flannel's key for these subnets, also where it has none (IPv6 alone).
fn subnet_key(subnets: &DualStack<Subnet>) -> LeaseKey {
    let parts: Vec<String> = subnets
        .values()
        .map(|subnet| format!("{}-{}", subnet.address(), subnet.len()))
        .collect();
    LeaseKey::new(parts.join("&"))
}

pub(super) fn check_families(subnets: &DualStack<Subnet>) -> Result<()> {
    subnets.check_families().map_err(|error| Error::Invalid {
        reason: error.to_string(),
    })
}

fn lost(lease: &Lease, reason: &str) -> Error {
    Error::LeaseLost {
        key: lease.key.clone(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::TokioClock;
    use crate::config::PoolMode;

    /// From outside it cannot be seen how much waits for a watch that fetches nothing.
    #[test]
    fn what_waits_for_a_watch_stays_bounded() {
        let text = r#"{"Network":"10.5.0.0/16"}"#;
        let config = NetworkConfig::from_json(text, PoolMode::Allocated).expect("a valid config");
        let mut store = Store::new(config.clone(), Arc::new(TokioClock::new()));
        let ids = [0, 1].map(|_| store.subscribe(Machine::default()));
        store.next_event(ids[1], Moment::default(), Waker::noop());
        for _ in 0..5 * MAX_QUEUE {
            store.set_config(config.clone());
            assert!(
                store
                    .subscribers
                    .values()
                    .all(|s| s.queue.len() <= MAX_QUEUE)
            );
        }
        store.unsubscribe(ids[0]);
        assert_eq!(store.subscribers.len(), 1);
    }
}
