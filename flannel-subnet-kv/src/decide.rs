//! What a node that asks for a lease is to write, decided from what it read: pure.

use std::collections::BTreeMap;

use flannel_core::alloc::choose_among;
use flannel_core::manager::Error;
use flannel_core::{
    DualStack, Holder, InstanceId, Lease, LeaseAttrs, LeaseRequest, NetworkConfig, NodeId,
    PoolMode, Revision, Subnet, wire,
};

use crate::ask::{Answers, Question};
use crate::layout::{Layout, Record, lease_key};
use crate::standing::{Seen, Standing, blocked_by};
use crate::store::{KeyRange, KeyValue, LeaseId};
use crate::txn::{Compare, Expectation, Op, Txn};

/// What a node knows of the store: one reading of config and leases, and what it learnt of markers
/// when transactions failed.
#[derive(Debug, Clone, Default)]
pub struct View {
    layout: Layout,
    seen: Seen,
    pub(super) config: Option<KeyValue>,
    pub(super) records: Vec<Record>,
    markers: BTreeMap<String, KeyValue>,
}

impl View {
    /// What a reading of [`Layout::range`] says.
    pub fn new(layout: &Layout, entries: Vec<KeyValue>) -> Self {
        let mut view = Self {
            layout: layout.clone(),
            ..Self::default()
        };
        view.read(entries);
        view
    }

    /// Takes a later reading; what is known of markers and of earlier configs stays.
    pub fn read(&mut self, entries: Vec<KeyValue>) {
        (self.config, self.records) = (None, Vec::new());
        for entry in entries {
            if entry.key == self.layout.config() {
                self.config = Some(entry);
            } else if self.layout.is_record(&entry.key) {
                self.records.push(Record::parse(entry));
            }
        }
        if let Ok(config) = self.config() {
            self.seen.add(&config);
        }
    }

    /// Counts what could be written under these configs too.
    pub(super) fn with_seen(mut self, seen: Seen) -> Self {
        self.seen = seen;
        if let Ok(config) = self.config() {
            self.seen.add(&config);
        }
        self
    }

    /// The configs under which records are judged.
    pub(super) const fn seen(&self) -> &Seen {
        &self.seen
    }

    /// What a record counts for.
    fn standing(&self, record: &Record) -> Standing {
        Standing::of(&self.layout, &self.seen, record)
    }

    /// Whether a record of ours gives way to another: to Go flannel's always, as that never does; to
    /// any other that peers accept if it is older; to nothing else.
    pub(super) fn yields(&self, ours: &Record, other: &Record) -> bool {
        let age = |record: &Record| (record.entry.created, record.entry.key.clone());
        other.taken.overlaps(&ours.taken)
            && match self.standing(other) {
                Standing::Go => true,
                // Peers honour the older claim. What was there first, a claim goes round; so this
                // is about one that came between our looking and our writing.
                Standing::Node | Standing::Taken => age(other) < age(ours),
                Standing::Debris => false,
            }
    }

    /// Takes what stands in a range now.
    pub(super) fn learn(&mut self, range: &KeyRange, found: Vec<KeyValue>) {
        if range.contains(&self.layout.config()) {
            self.config = found.into_iter().next();
            if let Ok(config) = self.config() {
                self.seen.add(&config);
            }
        } else if self.layout.is_record(range.first()) {
            self.records
                .retain(|record| !range.contains(&record.entry.key));
            self.records.extend(found.into_iter().map(Record::parse));
        } else {
            self.markers.retain(|key, _| !range.contains(key));
            let found = found.into_iter().map(|entry| (entry.key.clone(), entry));
            self.markers.extend(found);
        }
    }

    /// Whether a marker names a record that is not known: it is gone, or it came later.
    pub(super) fn misses_a_holder(&self) -> bool {
        let is_known = |holder: &str| self.records.iter().any(|r| r.entry.key == holder);
        let mut holders = self
            .markers
            .values()
            .map(|entry| String::from_utf8_lossy(&entry.value));
        holders.any(|holder| !is_known(&holder))
    }

    /// What is known of markers.
    pub(super) fn markers(&self) -> BTreeMap<String, KeyValue> {
        self.markers.clone()
    }

    /// The same with what is known of markers.
    pub(super) fn with_markers(mut self, markers: BTreeMap<String, KeyValue>) -> Self {
        self.markers = markers;
        self
    }

    /// When a record was last written; 0 if it is not there.
    fn modified(&self, key: &str) -> Revision {
        let record = self.records.iter().find(|record| record.entry.key == key);
        record.map_or(Revision(0), |record| record.entry.modified)
    }

    /// Refuses a record that would crash Go nodes, judged by the records they have written.
    pub(super) fn check_go(
        &self,
        subnets: &DualStack<Subnet>,
        attrs: &LeaseAttrs,
    ) -> Result<(), Error> {
        check_go(self, subnets, attrs, &self.records)
    }

    /// The network config, as it is used for allocation.
    ///
    /// # Errors
    /// [`Error::NoConfig`], [`Error::Config`], or [`Error::Invalid`] for a network of IPv6 alone, for
    /// which flannel has no keys.
    pub fn config(&self) -> Result<NetworkConfig, Error> {
        let entry = self.config.as_ref().ok_or_else(|| Error::NoConfig {
            hint: "put flannel's JSON under <prefix>/config".to_owned(),
        })?;
        parse_config(&entry.value)
    }
}

/// Reads the value of the config key.
pub(super) fn parse_config(value: &[u8]) -> Result<NetworkConfig, Error> {
    let text = String::from_utf8_lossy(value);
    let config = NetworkConfig::from_json(&text, PoolMode::Allocated)?;
    if config.pools().v4.is_none() {
        return Err(Error::Invalid {
            reason: "EnableIPv4 = false: flannel's layout has no key for a network of IPv6 alone"
                .to_owned(),
        });
    }
    Ok(config)
}

/// What is to be written, and on what condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The record's key.
    pub key: String,
    /// The subnets that it names.
    pub subnets: DualStack<Subnet>,
    /// Whether the record must not expire: it is a reservation.
    pub reserved: bool,
    value: String,
    compares: Vec<Compare>,
    deletes: Vec<String>,
    /// The markers' keys.
    markers: Vec<String>,
}

/// Decides what a node writes to hold a lease.
///
/// In this order: a record of its own that the config still allows and nobody else has a better
/// claim to, its previous subnets, the slot of its hash, the next free one. Its other records go in
/// the same transaction. `mixed` lets it write a record of other families than those of Go
/// flannel's records, which makes Go nodes crash.
///
/// # Errors
/// Those of [`View::config`], [`Error::PoolExhausted`], and [`Error::Invalid`] if there is no such
/// record or it would crash a Go node; [`Error::NodeIdHeld`] if a machine answered for the node id.
pub fn decide(
    layout: &Layout,
    view: &View,
    request: &LeaseRequest,
    answers: &Answers,
    mixed: bool,
) -> Result<Decision, Error> {
    let config = view.config()?;
    let config_revision = view.config.as_ref().map(|entry| entry.modified);
    let is_former = |record: &Record| record.node().is_none_or(|node| node != request.node);
    let (mut own, others): (Vec<&Record>, Vec<&Record>) = view
        .records
        .iter()
        .partition(|record| is_own(record, request, answers));
    let holder = answers.holder_of(&request.node);
    if let Some(public_ip) = holder.filter(|_| !own.iter().any(|record| !is_former(record))) {
        return Err(Error::NodeIdHeld {
            node: request.node.clone(),
            public_ip,
        });
    }
    // If one of them is what the node uses, that one stays, be it of a former name; else the oldest,
    // and one of a former name only where there is no other.
    own.sort_by_key(|record| {
        let used = record.taken == request.previous;
        let age = (record.entry.created, record.entry.key.clone());
        (!used, is_former(record) && !record.is_gos(), age)
    });
    let kept = own.iter().find(|record| {
        config.fits(&record.taken) && !others.iter().any(|other| view.yields(record, other))
    });
    let subnets = match kept {
        Some(record) => record.taken,
        None => choose(layout, view, &config, request, &own, &others)?,
    };
    if !mixed {
        check_go(view, &subnets, &request.attrs, others.iter().copied())?;
    }
    let key = match kept {
        Some(record) => record.entry.key.clone(),
        None => layout.record(&subnets)?,
    };
    let mut decision = Decision {
        reserved: kept.is_some_and(|record| record.entry.lease.is_none()),
        value: value(&request.node, request.instance, &request.attrs)?,
        compares: vec![Compare {
            range: KeyRange::key(layout.config()),
            expected: Expectation::Modified(config_revision.unwrap_or_default()),
        }],
        deletes: Vec::new(),
        markers: layout.markers(&request.node, &subnets),
        key,
        subnets,
    };
    for record in &own {
        let key = record.entry.key.clone();
        decision
            .compares
            .push(Compare::unchanged(&key, record.entry.modified));
        if key != decision.key {
            decision.deletes.push(key);
            let markers = record.taken.values().map(|subnet| layout.marker(subnet));
            decision.deletes.extend(markers);
        }
        if is_former(record)
            && !record.is_gos()
            && let Some(node) = record.node()
        {
            decision.let_go(layout.marker_of_node(&node), record, view);
        }
    }
    if kept.is_none() {
        decision.claim(layout, view, &own);
    }
    let written = |key: &String| *key == decision.key || decision.markers.contains(key);
    decision.deletes = std::mem::take(&mut decision.deletes)
        .into_iter()
        .filter(|key| !written(key))
        .collect();
    Ok(decision)
}

/// Tells if a record is the asker's, by what it says or as nobody answers for it.
pub(super) fn is_own(record: &Record, request: &LeaseRequest, answers: &Answers) -> bool {
    let is_silent = || {
        let question = Question::of(request, record);
        question
            .is_some_and(|question| request.take_over || answers.is_silent(&question) == Some(true))
    };
    record.holder(request) == Holder::Own && !is_kept_for_another(record, request) || is_silent()
}

/// Tells if a record is kept for another node: it has no lease, so it is no machine's.
fn is_kept_for_another(record: &Record, request: &LeaseRequest) -> bool {
    let node = record.node();
    record.entry.lease.is_none()
        && !record.is_gos()
        && node.is_some_and(|node| node != request.node)
}

/// Chooses subnets that nobody has: those that the node had before, else some that debris leaves
/// alone, else, where debris leaves none, some whose records can be made.
fn choose(
    layout: &Layout,
    view: &View,
    config: &NetworkConfig,
    request: &LeaseRequest,
    own: &[&Record],
    others: &[&Record],
) -> Result<DualStack<Subnet>, Error> {
    let pools = config.pools();
    let mut taken: Vec<Subnet> = marked(layout, view, own, others).collect();
    let mut covered = Vec::new();
    for other in others {
        let subnets = other.taken.values().copied();
        if view.standing(other) == Standing::Debris {
            covered.extend(subnets);
            taken.extend(blocked_by(layout, pools, &other.entry.key));
        } else {
            taken.extend(subnets);
        }
    }
    let of = |taken: &[&[Subnet]]| {
        let taken = taken.concat();
        choose_among(pools, taken, &request.node, &request.previous)
    };
    let anywhere = of(&[&taken])?;
    if covered.is_empty() || anywhere == request.previous {
        return Ok(anywhere);
    }
    Ok(of(&[&taken, &covered]).unwrap_or(anywhere))
}

/// The subnets whose marker names a record that is there: they are taken, whatever it is. A marker
/// whose record is gone, or is ours, counts for nothing.
fn marked<'a>(
    layout: &'a Layout,
    view: &'a View,
    own: &'a [&Record],
    others: &'a [&Record],
) -> impl Iterator<Item = Subnet> + 'a {
    view.markers.iter().filter_map(move |(key, entry)| {
        let holder = String::from_utf8_lossy(&entry.value);
        let is_holder = |record: &&Record| record.entry.key == holder;
        if own.iter().any(is_holder) || !others.iter().any(is_holder) {
            return None;
        }
        layout.marked(key)
    })
}

/// The value of the node's record.
pub(super) fn value(
    node: &NodeId,
    instance: Option<InstanceId>,
    attrs: &LeaseAttrs,
) -> Result<String, Error> {
    wire::lease_value(node, instance, attrs).map_err(|error| Error::Invalid {
        reason: error.to_string(),
    })
}

/// Refuses what would crash Go nodes, whose records are among those of others: a node of one
/// family reads no record of two, and the other way round.
fn check_go<'a>(
    view: &View,
    subnets: &DualStack<Subnet>,
    attrs: &LeaseAttrs,
    others: impl IntoIterator<Item = &'a Record>,
) -> Result<(), Error> {
    let refuse = |reason: &str, key: &str| {
        Err(Error::Invalid {
            reason: format!(
                "{reason}, such as the one that wrote {key}: allow it explicitly if there are no \
                 such nodes any more"
            ),
        })
    };
    let is_gos = |other: &&Record| Standing::is_gos_of_any_family(&view.layout, &view.seen, other);
    for other in others.into_iter().filter(is_gos) {
        let key = &other.entry.key;
        if subnets.v6.is_some() && other.taken.v6.is_none() {
            return refuse(
                "a dual-stack record crashes the Go nodes that run IPv4 alone",
                key,
            );
        }
        if subnets.v6.is_none() && other.taken.v6.is_some() {
            return refuse(
                "an IPv4 record crashes dual-stack Go nodes when they start",
                key,
            );
        }
        if subnets.v6.is_some() && attrs.public_ip.v6.is_none() {
            return refuse(
                "a dual-stack record without PublicIPv6 crashes Go nodes",
                key,
            );
        }
    }
    Ok(())
}

impl Decision {
    /// The conditions under which new subnets may be claimed.
    fn claim(&mut self, layout: &Layout, view: &View, own: &[&Record]) {
        let is_own = |key: &str| own.iter().any(|record| record.entry.key == key);
        if !is_own(&self.key) {
            let key = KeyRange::key(&self.key);
            self.compares.push(Compare::absent(key));
        }
        // No other record with this IPv4 half, whatever its IPv6 half is.
        if let Some(same) = self.subnets.v4.map(|v4| layout.records_of(&v4))
            && !own.iter().any(|record| same.contains(&record.entry.key))
        {
            self.compares.push(Compare::absent(same));
        }
        for marker in &self.markers {
            let Some(entry) = view.markers.get(marker) else {
                self.compares.push(Compare::absent(KeyRange::key(marker)));
                continue;
            };
            // A marker that outlived its record, which somebody deleted alone or took over.
            let holder = String::from_utf8_lossy(&entry.value);
            self.compares
                .push(Compare::unchanged(marker, entry.modified));
            if *holder != self.key && !is_own(&holder) {
                let modified = view.modified(&holder);
                self.compares.push(Compare::unchanged(holder, modified));
            }
        }
    }

    /// Removes the marker of a former node id if it names the record that was the node's: a machine that
    /// has the id now has a marker of its own there. One that is not known is taken to be none, and learnt
    /// of if it is one.
    fn let_go(&mut self, marker: String, record: &Record, view: &View) {
        match view.markers.get(&marker) {
            None => self.compares.push(Compare::absent(KeyRange::key(marker))),
            Some(entry) if entry.value == record.entry.key.as_bytes() => {
                self.compares
                    .push(Compare::unchanged(&marker, entry.modified));
                self.deletes.push(marker);
            }
            Some(_) => {}
        }
    }

    /// The record and its lease, if it stands already as it is to be: then it needs but time.
    pub(super) fn standing_already<'a>(&self, view: &'a View) -> Option<(&'a Record, LeaseId)> {
        let is_it = |record: &&Record| record.entry.key == self.key;
        let record = view.records.iter().find(is_it)?;
        let same = record.entry.value == self.value.as_bytes() && self.deletes.is_empty();
        Some((record, record.entry.lease.filter(|_| same)?))
    }

    /// The lease that the record is, once it is written at a revision.
    pub(super) fn lease(&self, request: &LeaseRequest, written: Revision, view: &View) -> Lease {
        let before = view
            .records
            .iter()
            .find(|record| record.entry.key == self.key);
        Lease {
            key: lease_key(&self.key),
            node: request.node.clone(),
            instance: request.instance.filter(|_| !request.node.is_derived()),
            subnet: self.subnets,
            attrs: request.attrs.clone(),
            ttl: None,
            created: before.map_or(written, |record| record.entry.created),
            revision: written,
        }
    }

    /// What the transaction compares, and reads when it fails.
    pub(super) fn compared(&self) -> impl Iterator<Item = &KeyRange> {
        self.compares.iter().map(|compare| &compare.range)
    }

    /// The transaction that does it. When it fails it reads what it compared.
    pub fn txn(&self, lease: Option<LeaseId>) -> Txn {
        let mut then = vec![Op::put(&self.key, self.value.as_str(), lease)];
        for marker in &self.markers {
            then.push(Op::put(marker, self.key.as_str(), lease));
        }
        then.extend(self.deletes.iter().map(Op::delete));
        Txn {
            compares: self.compares.clone(),
            then,
            or_else: self.compared().cloned().map(Op::Range).collect(),
        }
    }
}

/// The transaction that removes a lease's record and its markers, if it was not written since.
pub(super) fn removal(layout: &Layout, lease: &Lease) -> Txn {
    let key = lease.key.as_str();
    let markers = layout.markers(&lease.node, &lease.subnet);
    let mut then = vec![Op::delete(key)];
    then.extend(markers.into_iter().map(Op::delete));
    Txn {
        compares: vec![Compare::unchanged(key, lease.revision)],
        then,
        or_else: vec![Op::Range(KeyRange::key(key))],
    }
}
