//! [`KvManager`]: leases on a store as flannel lays them out, beside Go flannel.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::manager::{Error, Result};
use flannel_core::{
    Capabilities, EventStream, Lease, LeaseAttrs, LeaseKey, LeaseRequest, Manager, NetworkConfig,
    Revision,
};

use crate::ask::{Answers, Asking, Question, open_questions};
use crate::decide::{View, decide, removal, value};
use crate::former::candidates;
use crate::layout::{Layout, Record, lease_key};
use crate::list_watch::ListWatch;
use crate::paging::read_all;
use crate::standing::{Seen, Standing};
use crate::store::{KeyRange, KeyValue, LeaseId, Store, StoreError};
use crate::txn::{Compare, Op, Txn, TxnAnswer};

/// How a [`KvManager`] uses the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvOptions {
    /// The keys.
    pub layout: Layout,
    /// How long a lease lasts. Default: 24 hours, as flannel's.
    pub ttl: Duration,
    /// How often a silent watch is asked how far it is. Default: 2 s.
    pub progress_interval: Duration,
    /// How long a watch may be silent after it was asked, and how long each page of a reading may
    /// take. Default: 3 s.
    pub patience: Duration,
    /// Whether to write records of other families than those of the records of Go flannel, whose
    /// nodes they crash. Default: no.
    pub mixed_families: bool,
    /// The time that a machine of the same node id is given to answer that it lives. Default: 15 s.
    pub holder_patience: Duration,
}

impl Default for KvOptions {
    fn default() -> Self {
        Self {
            layout: Layout::default(),
            ttl: Duration::from_secs(24 * 3600),
            progress_interval: Duration::from_secs(2),
            patience: Duration::from_secs(3),
            mixed_families: false,
            holder_patience: Duration::from_secs(15),
        }
    }
}

/// How often a claim is tried anew before the caller is told to come again.
const ATTEMPTS: usize = 64;

/// After how many claims that came too late everything is read anew: each of them tells only of what
/// it wanted.
const STALE: usize = 4;

/// How often a claim without an answer is looked after before the caller is told.
const SILENCES: usize = 2;

/// A subnet manager on a revisioned key-value store, in flannel's etcd layout.
///
/// - A lease is claimed in one transaction per candidate. It is conditional on the config and on
///   the candidate alone, so that nodes which join at once are in each other's way only where they
///   want the same subnet; when it fails, it brings the reading that the next one starts from.
/// - Each family of a record has a marker key of its own, and so has its node, outside of what Go
///   flannel reads, that live and die with the record: so two dual-stack records cannot share one
///   half, and a claim that arrives late cannot give a node a second record.
/// - Writes are conditional on the revision at which the record was last seen, and the record is
///   looked at before: the revisions of a store that was restored from a backup are used twice.
/// - Where Go flannel, which asks nobody, has written an overlapping record, ours is given up. Only
///   what Go flannel can have written under a config that was seen counts for that; what no node can
///   have written is gone round, and nobody gives way to it.
/// - A node id that another machine holds is taken only if that one does not answer a question in
///   time, or on request; a machine that comes back under another node id takes its record along.
/// - A claim reads in bounded pages, and what it writes is answered for by few keys: a store of any
///   size can be joined. An answer that cannot be read is an unknown one, and nothing is taken back
///   that may have been done.
/// - The watch is a reading and a watch, and again from the beginning whenever anything is wrong
///   with it, silence included.
///
/// It does nothing for a network without IPv4, for which flannel has no keys.
#[derive(Debug, Clone)]
pub struct KvManager<S> {
    store: S,
    options: Arc<KvOptions>,
    known: Arc<Mutex<Known>>,
}

/// What a manager remembers.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// The lease that we hold, as far as we know.
    own: Option<Lease>,
    /// The configs that were read.
    seen: Seen,
    /// The record of ours that was given up last, and why.
    gave_way: Option<(LeaseKey, String)>,
    /// There are records in the network that Go flannel can have written.
    pub(crate) has_gos: bool,
    /// We wrote our record, and have not put it again since.
    pub(crate) unheard: bool,
    /// Our record was put again: its key, and the revisions before and after.
    echo: Option<(LeaseKey, Revision, Revision)>,
    /// Records of our former name that a claim came by, for the watch.
    pub(crate) former: Vec<Record>,
    /// The questions that stand.
    pub(crate) asking: BTreeMap<Question, Asking>,
}

impl Known {
    /// The lease that we hold, as far as we know.
    pub(crate) const fn own(&self) -> Option<&Lease> {
        self.own.as_ref()
    }
}

/// A lease of the store that a claim hangs its record on.
#[derive(Debug, Default)]
struct Granted {
    lease: Option<LeaseId>,
    /// A record may hang on it.
    used: bool,
}

impl<S: Store> KvManager<S> {
    /// A manager that reaches its store over this link.
    pub fn new(store: S, options: KvOptions) -> Self {
        Self {
            store,
            options: Arc::new(options),
            known: Arc::default(),
        }
    }

    /// The way to the store.
    pub const fn store(&self) -> &S {
        &self.store
    }

    /// How the store is used.
    pub fn options(&self) -> &KvOptions {
        &self.options
    }

    pub(crate) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_own(&self, lease: Option<Lease>) {
        self.known().own = lease;
    }

    /// Forgets a lease that we had as another machine: we are that one no longer, and must not answer
    /// for it.
    fn forget_another(&self, request: &LeaseRequest) {
        let mut known = self.known();
        let is_another = |own: &Lease| {
            own.node == request.node && own.instance.is_some() && own.instance != request.instance
        };
        known.own = known.own.take().filter(|own| !is_another(own));
    }

    /// The question to a later run of our machine, which has written a record under another node id since
    /// we had our lease: if it lives it goes on, and this one does not take the record back.
    fn later_run(&self, view: &View, request: &LeaseRequest) -> Option<Question> {
        let own = self.known().own.clone()?;
        let is_same_run = own.node == request.node && own.instance == request.instance;
        let mut records = view.records.iter();
        if !is_same_run
            || request.take_over
            || records.any(|record| record.node().as_ref() == Some(&own.node))
        {
            return None;
        }
        let mut formers = candidates(request, &view.records);
        let later = formers.find(|record| {
            record.instance() == own.instance && record.entry.modified > own.revision
        });
        Some(Question {
            node: later?.node()?,
            holder: own.instance,
        })
    }

    /// Remembers a config: what can be written under it counts from now on.
    pub(crate) fn saw(&self, config: &NetworkConfig) {
        self.known().seen.add(config);
    }

    async fn view(&self) -> Result<View> {
        let layout = &self.options.layout;
        // How long that may take, the caller says.
        let answer = read_all(&self.store, layout, None).await?;
        let seen = self.known().seen.clone();
        let view = View::new(layout, answer.entries).with_seen(seen);
        self.known().seen = view.seen().clone();
        Ok(view)
    }

    /// Writes until a record of ours stands that nobody else has a better claim to.
    async fn claim(
        &self,
        request: &LeaseRequest,
        granted: &mut Granted,
        answers: &mut Answers,
    ) -> Result<Lease> {
        let mut view = self.view().await?;
        let (mut silences, mut lost) = (0, 0);
        for _ in 0..ATTEMPTS {
            let open = open_questions(&view, request, answers);
            if !open.is_empty() {
                self.ask(open, request, answers).await?;
                view = self.view().await?;
                continue;
            }
            if let Some(question) = self.later_run(&view, request) {
                match answers.is_silent(&question) {
                    None => {
                        self.ask(vec![question], request, answers).await?;
                        view = self.view().await?;
                        continue;
                    }
                    Some(false) => return Err(Error::renamed(&question.node)),
                    Some(true) => {}
                }
            }
            let layout = &self.options.layout;
            let mixed = self.options.mixed_families;
            let decision = decide(layout, &view, request, answers, mixed)?;
            let former = candidates(request, &view.records).cloned();
            self.known().former = former.collect();
            if let Some((record, lease)) = decision.standing_already(&view) {
                // Nothing is to be written: it works while the store takes no writes.
                let held = self.held(record)?;
                match self.extend(&held, lease).await {
                    Err(Error::LeaseLost { .. }) => view = self.view().await?,
                    extended => return extended,
                }
                continue;
            }
            let used = match (decision.reserved, granted.lease) {
                (true, _) => None,
                (false, Some(lease)) => Some(lease),
                (false, None) => {
                    let (lease, _) = self.store.grant(self.options.ttl).await?;
                    granted.lease = Some(lease);
                    Some(lease)
                }
            };
            let answer = match self.store.txn(decision.txn(used)).await {
                // It may have been done: then there is a record of ours to be found.
                Err(StoreError::Unavailable { .. }) if silences < SILENCES => {
                    granted.used = true;
                    silences += 1;
                    view = self.view().await?;
                    continue;
                }
                Err(error @ StoreError::Unavailable { .. }) => {
                    granted.used = true;
                    return Err(error.into());
                }
                answer => answer?,
            };
            if !answer.succeeded {
                lost += 1;
                for (range, found) in decision.compared().zip(answer.ranges()) {
                    view.learn(range, found);
                }
                if lost % STALE == 0 || view.misses_a_holder() {
                    let markers = view.markers();
                    view = self.view().await?.with_markers(markers);
                }
                continue;
            }
            granted.used = true;
            self.known().unheard = true;
            if decision.subnets.v6.is_none() {
                // The conditions are about every record with this IPv4 half.
                let lease = decision.lease(request, answer.revision, &view);
                let ttl = granted.lease.filter(|_| !decision.reserved);
                return Ok(Lease {
                    ttl: ttl.map(|_| self.options.ttl),
                    ..lease
                });
            }
            let markers = view.markers();
            view = self.view().await?.with_markers(markers);
            let is_ours = |record: &&Record| record.entry.key == decision.key;
            let Some(ours) = view.records.iter().find(is_ours) else {
                continue;
            };
            let held = self.held(ours)?;
            let mut others = view.records.iter();
            let Some(other) = others.find(|other| view.yields(ours, other)) else {
                return Ok(held);
            };
            // Go flannel was faster, with an IPv6 half that no condition could see.
            self.give_way(&held, other).await?;
            view = self.view().await?;
        }
        Err(Error::Conflict {
            reason: format!("{ATTEMPTS} claims in a row came too late"),
        })
    }

    /// The lease of a record of ours.
    fn held(&self, record: &Record) -> Result<Lease> {
        let held = record.lease(self.options.ttl);
        held.map_err(|unreadable| Error::Corrupt {
            key: unreadable.key,
            reason: unreadable.reason,
        })
    }

    /// Removes our record because of another one, and remembers why.
    async fn give_way(&self, own: &Lease, other: &Record) -> Result<(), StoreError> {
        let whose = match other.node() {
            Some(node) => format!("of node {node}"),
            None => "of nobody knows whom".to_owned(),
        };
        let by = if other.is_gos() { "Go flannel" } else { "it" };
        let reason = format!(
            "it overlaps {} {whose}, and {by} does not give way: we removed our record",
            lease_key(&other.entry.key)
        );
        tracing::warn!(key = %own.key, reason, "our record gives way");
        self.known().gave_way = Some((own.key.clone(), reason));
        self.store.txn(removal(&self.options.layout, own)).await?;
        Ok(())
    }

    /// Our record, if it stands as we know it; nothing if it is gone.
    async fn find_ours(&self, lease: &Lease) -> Result<Option<Record>> {
        let key = KeyRange::key(lease.key.as_str());
        let found = self.store.range(key).await?.entries.pop();
        still_ours(lease, found)
    }

    /// Extends the lease of a record that needs no change.
    async fn extend(&self, lease: &Lease, held: LeaseId) -> Result<Lease> {
        let ttl = match self.store.keep_alive(held).await {
            Err(StoreError::LeaseNotFound { .. }) => return Err(self.gone(lease)),
            ttl => ttl?,
        };
        // It may have been taken from us meanwhile, together with its lease or without.
        match self.find_ours(lease).await? {
            Some(record) if record.entry.lease == Some(held) => Ok(Lease {
                ttl: Some(ttl),
                ..lease.clone()
            }),
            _ => Err(self.gone(lease)),
        }
    }

    /// Writes a record anew under a new lease, if it was not written since it was seen.
    async fn write(
        &self,
        lease: &Lease,
        record: &Record,
        value: String,
        expires: bool,
    ) -> Result<Lease> {
        let granted = match expires {
            false => None,
            true => Some(self.store.grant(self.options.ttl).await?),
        };
        let mut renewed = lease.clone();
        renewed.ttl = granted.map(|(_, ttl)| ttl);
        let granted = granted.map(|(lease, _)| lease);
        let key = lease.key.as_str();
        let markers = self.options.layout.markers(&lease.node, &record.taken);
        let mut then = vec![Op::put(key, value.as_str(), granted)];
        then.extend(markers.into_iter().map(|m| Op::put(m, key, granted)));
        let txn = Txn {
            compares: vec![Compare::unchanged(key, lease.revision)],
            then,
            or_else: vec![Op::Range(KeyRange::key(key))],
        };
        match self.store.txn(txn).await {
            Ok(answer) if answer.succeeded => {
                renewed.revision = answer.revision;
                self.known().unheard = true;
                Ok(renewed)
            }
            Ok(answer) => {
                if let Some(granted) = granted {
                    self.store.revoke(granted).await.ok();
                }
                still_ours(lease, found(answer))?;
                Err(self.gone(lease))
            }
            Err(error @ StoreError::Unavailable { .. }) => {
                // It may have been done: what stands there now tells.
                let there = self.store.range(KeyRange::key(key)).await?.entries.pop();
                match there {
                    Some(entry)
                        if entry.value == value.as_bytes()
                            && entry.lease == granted
                            && entry.modified > lease.revision =>
                    {
                        renewed.revision = entry.modified;
                        Ok(renewed)
                    }
                    there => {
                        still_ours(lease, there)?.ok_or_else(|| self.gone(lease))?;
                        Err(error.into())
                    }
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Refuses attributes that would crash dual-stack Go nodes, if there are any.
    async fn check_attrs(&self, lease: &Lease) -> Result<()> {
        let lacks_address = lease.subnet.v6.is_some() && lease.attrs.public_ip.v6.is_none();
        if self.options.mixed_families || !lacks_address {
            return Ok(());
        }
        self.view().await?.check_go(&lease.subnet, &lease.attrs)
    }

    /// Gives our lease up if Go flannel has written a record that overlaps it.
    pub(crate) async fn yield_to(&self, other: &Record) -> Result<(), StoreError> {
        if !self.is_gos(other) {
            return Ok(());
        }
        let own = {
            let known = self.known();
            let Some(own) = known.own.as_ref() else {
                return Ok(());
            };
            let is_in_the_way =
                other.taken.overlaps(&own.subnet) && lease_key(&other.entry.key) != own.key;
            if !is_in_the_way {
                return Ok(());
            }
            own.clone()
        };
        self.give_way(&own, other).await
    }

    /// Whether Go flannel can have written a record.
    pub(crate) fn is_gos(&self, record: &Record) -> bool {
        Standing::of(&self.options.layout, &self.known().seen, record) == Standing::Go
    }

    /// Puts our record again as it is, so that whoever missed the last write hears of it. Whether
    /// there was one to be put.
    pub(crate) async fn put_again(&self) -> Result<bool, StoreError> {
        let Some(own) = self.known().own.clone() else {
            return Ok(false);
        };
        let key = own.key.as_str();
        let found = self.store.range(KeyRange::key(key)).await?.entries.pop();
        let Some(record) = found.map(Record::parse) else {
            return Ok(false);
        };
        if record.node().as_ref() != Some(&own.node) || record.instance() != own.instance {
            return Ok(false);
        }
        let before = record.entry.modified;
        let txn = Txn {
            compares: vec![Compare::unchanged(key, before)],
            then: vec![Op::put(key, record.entry.value, record.entry.lease)],
            or_else: Vec::new(),
        };
        let answer = self.store.txn(txn).await?;
        if answer.succeeded {
            let mut known = self.known();
            known.echo = Some((own.key.clone(), before, answer.revision));
            known.unheard = false;
        }
        Ok(answer.succeeded)
    }

    /// The lease with the revision that its record has, if only we ourselves put it again.
    pub(crate) fn as_put_again(&self, lease: &Lease) -> Lease {
        let mut lease = lease.clone();
        if let Some((key, before, after)) = &self.known().echo
            && *key == lease.key
            && *before == lease.revision
        {
            lease.revision = *after;
        }
        lease
    }

    /// Our record is not there any more.
    fn gone(&self, lease: &Lease) -> Error {
        let known = self.known();
        let gave_way = known.gave_way.as_ref().filter(|(key, _)| *key == lease.key);
        Error::LeaseLost {
            key: lease.key.clone(),
            reason: gave_way.map_or_else(
                || "the record is gone".to_owned(),
                |(_, reason)| reason.clone(),
            ),
        }
    }
}

/// The record of a lease if it was not written since; an error if it was.
fn still_ours(lease: &Lease, found: Option<KeyValue>) -> Result<Option<Record>> {
    let Some(record) = found.map(Record::parse) else {
        return Ok(None);
    };
    let lost = |reason: String| {
        Err(Error::LeaseLost {
            key: lease.key.clone(),
            reason,
        })
    };
    let (node, revision) = (record.node(), record.entry.modified);
    // A revision alone proves nothing: a store that was restored uses it a second time.
    if node.as_ref() != Some(&lease.node) {
        return lost(match node {
            Some(node) => format!("it belongs to node {node} now"),
            None => "it cannot be read any more".to_owned(),
        });
    }
    if record.instance() != lease.instance {
        let ips = record.attrs().map(|attrs| attrs.public_ip);
        let at = ips.and_then(|ips| ips.ips().next());
        let at = at.map_or_else(String::new, |ip| format!(" at {ip}"));
        return lost(format!("another machine{at} holds the node id now"));
    }
    if revision != lease.revision {
        let held = lease.revision;
        return lost(format!(
            "it was written at revision {revision}, after our {held}"
        ));
    }
    Ok(Some(record))
}

/// The single entry that a failed transaction of ours read.
fn found(answer: TxnAnswer) -> Option<KeyValue> {
    answer.ranges().next()?.pop()
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Denied { reason } => Self::Denied { reason },
            StoreError::Refused { reason } => Self::Invalid { reason },
            error => Self::Unavailable {
                reason: "a call to the store failed".to_owned(),
                source: Some(Box::new(error)),
            },
        }
    }
}

#[async_trait]
impl<S: Store> Manager for KvManager<S> {
    fn name(&self) -> &'static str {
        self.store.kind()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::ALL
    }

    fn reconnect(&self) {
        self.store.reconnect();
    }

    async fn network_config(&self) -> Result<NetworkConfig> {
        self.view().await?.config()
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease> {
        let previous = request.previous.check_families();
        previous.map_err(|error| Error::Invalid {
            reason: error.to_string(),
        })?;
        self.forget_another(request);
        let (mut granted, mut answers) = (Granted::default(), Answers::default());
        let claimed = self.claim(request, &mut granted, &mut answers).await;
        match (&claimed, granted.lease) {
            (Ok(lease), _) => self.set_own(Some(lease.clone())),
            // Nobody uses it; if it cannot be given back it runs out by itself.
            (Err(_), Some(lease)) if !granted.used => drop(self.store.revoke(lease).await),
            // A record of ours may hang on it.
            (Err(_), _) => {}
        }
        if claimed.is_ok() {
            self.withdraw_all(&answers).await;
        }
        claimed
    }

    /// Where nothing that is published has changed, the store's lease is extended and the record is
    /// left as it is: no other node is told of it, and a store that takes no writes can do it.
    ///
    /// A node of Go flannel's that once missed a write of ours hears of us at the next one only, so
    /// beside such nodes each renewal writes, as theirs do.
    async fn renew_lease(&self, lease: &Lease) -> Result<Lease> {
        let lease = &self.as_put_again(lease);
        let record = self.find_ours(lease).await?;
        let record = record.ok_or_else(|| self.gone(lease))?;
        self.check_attrs(lease).await?;
        let value = value(&lease.node, lease.instance, &lease.attrs)?;
        let renewed = match record.entry.lease {
            Some(held) if record.entry.value == value.as_bytes() && !self.known().has_gos => {
                self.extend(lease, held).await?
            }
            held => self.write(lease, &record, value, held.is_some()).await?,
        };
        self.set_own(Some(renewed.clone()));
        Ok(renewed)
    }

    /// A reservation is kept for its node: its record stays, without what the node published.
    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        let lease = &self.as_put_again(lease);
        let Some(record) = self.find_ours(lease).await? else {
            return Ok(());
        };
        let mut txn = removal(&self.options.layout, lease);
        if record.entry.lease.is_none() {
            let attrs = LeaseAttrs {
                public_ip: lease.attrs.public_ip,
                ..LeaseAttrs::default()
            };
            let value = value(&lease.node, None, &attrs)?;
            txn.then = vec![Op::put(lease.key.as_str(), value, None)];
        }
        match self.store.txn(txn).await {
            Ok(answer) if answer.succeeded => {}
            Ok(answer) => {
                still_ours(lease, found(answer))?;
            }
            // It may have been done.
            Err(error @ StoreError::Unavailable { .. }) => {
                if self.find_ours(lease).await?.is_some() {
                    return Err(error.into());
                }
            }
            Err(error) => return Err(error.into()),
        }
        self.set_own(None);
        Ok(())
    }

    fn watch_leases(&self) -> EventStream {
        Box::pin(ListWatch::new(self.clone()))
    }
}
