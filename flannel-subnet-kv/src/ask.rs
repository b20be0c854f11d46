//! Questions from one machine to another: does whoever wrote this record still live?
//!
//! A machine that finds its node id, or its own address under another one, held by another machine puts
//! a question where that one watches and Go flannel does not look. A machine that lives answers in its
//! place. A question hangs on a lease of its asker's and dies with it, answered or not.

use std::time::Duration;

use flannel_core::manager::{Error, Result};
use flannel_core::{Holder, InstanceId, Lease, LeaseRequest, NodeId, PublicIp, wire};
use tokio::time::Instant;

use crate::decide::{View, value};
use crate::layout::{Layout, Record};
use crate::manager::KvManager;
use crate::store::{KeyRange, KeyValue, LeaseId, Store, StoreError, StoreResult};
use crate::txn::{Compare, Op, Txn};

/// How often an open question is looked at.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How often it is put again: a watch that was opened meanwhile has not seen it.
const PUT_EVERY: Duration = Duration::from_secs(4);

/// How much longer than its patience an asker's question stands.
const LINGER: Duration = Duration::from_secs(30);

/// Who is asked, of which record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Question {
    /// The record's key.
    pub record: String,
    /// The node id that it bears.
    pub node: NodeId,
    /// The machine that wrote it, if it says so; else nobody can answer.
    pub holder: Option<InstanceId>,
}

impl Question {
    /// The question of a record that is the asker's if nobody answers for it.
    pub(super) fn of(request: &LeaseRequest, record: &Record) -> Option<Self> {
        let holder = match record.holder(request) {
            Holder::Twin(instance) => Some(instance),
            // A record without a lease is kept for its node, not held by a machine.
            Holder::Former(instance) if record.entry.lease.is_some() => instance,
            Holder::Former(_) | Holder::Own | Holder::Other => return None,
        };
        Some(Self {
            record: record.entry.key.clone(),
            node: record.node()?,
            holder,
        })
    }
}

/// What is known of the holders of records.
#[derive(Debug, Clone, Default)]
pub struct Answers(Vec<(Question, Option<PublicIp>)>);

impl Answers {
    /// Notes who answered a question; `None`: nobody.
    pub fn note(&mut self, question: Question, answered: Option<PublicIp>) {
        self.0.push((question, answered));
    }

    /// Whether nobody answered; nothing if that is not known.
    pub(super) fn is_silent(&self, question: &Question) -> Option<bool> {
        let known = self.0.iter().find(|(asked, _)| asked == question)?;
        Some(known.1.is_none())
    }

    /// Where the machine is that holds a node id and answered.
    pub(super) fn holder_of(&self, node: &NodeId) -> Option<PublicIp> {
        let mut known = self.0.iter();
        known.find_map(|(asked, answered)| (asked.node == *node).then_some(*answered)?)
    }
}

/// The question that is to be settled before it can be decided what to write.
///
/// Of records of a former name only while the node has no record of its own: with one it can work, and
/// the watch sees to the other.
pub(super) fn open_question(
    view: &View,
    request: &LeaseRequest,
    answers: &Answers,
) -> Option<Question> {
    if request.take_over {
        return None;
    }
    let questions = || {
        let records = view.records.iter();
        records.filter_map(|record| Some((record, Question::of(request, record)?)))
    };
    let is_open = |question: &Question| answers.is_silent(question).is_none();
    let is_twin = |record: &Record| record.node().as_ref() == Some(&request.node);
    let twin = questions().find(|(record, question)| is_twin(record) && is_open(question));
    let has_own = || view.records.iter().any(&is_twin);
    let open = match twin {
        None if !has_own() => questions().find(|(_, question)| is_open(question)),
        twin => twin,
    };
    open.map(|(_, question)| question)
}

/// How far a question is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// There may be an answer yet.
    Open,
    /// A machine at this address answered.
    Answered(PublicIp),
    /// Nobody answered in time.
    Silent,
}

/// A question that was put.
#[derive(Debug, Clone)]
pub(crate) struct Asking {
    lease: LeaseId,
    /// Since when it has stood where it can be seen.
    since: Instant,
    put: Instant,
}

impl<S: Store> KvManager<S> {
    /// Asks, and waits for an answer as long as is patient. The time goes on while nobody waits.
    pub(super) async fn ask(
        &self,
        question: &Question,
        request: &LeaseRequest,
    ) -> Result<Option<PublicIp>> {
        loop {
            match self.look(question, request).await? {
                Progress::Open => tokio::time::sleep(LOOK_EVERY).await,
                Progress::Answered(public_ip) => return Ok(Some(public_ip)),
                Progress::Silent => return Ok(None),
            }
        }
    }

    /// Puts a question if it does not stand yet, and looks for an answer.
    pub(super) async fn look(
        &self,
        question: &Question,
        request: &LeaseRequest,
    ) -> Result<Progress> {
        // It stays known if this is given up on.
        let asking = self.asking(question);
        let (progress, asking) = self.look_at(asking, question, request).await?;
        match progress {
            Progress::Open => drop(self.known().asking.insert(question.clone(), asking)),
            // What is settled needs no question any more; else it ends with its lease.
            Progress::Answered(_) | Progress::Silent => {
                self.known().asking.remove(question);
                drop(self.store().revoke(asking.lease).await);
            }
        }
        Ok(progress)
    }

    /// A question that stands. Those that nobody came back to are forgotten.
    fn asking(&self, question: &Question) -> Option<Asking> {
        let stands = self.options().holder_patience + LINGER;
        let now = Instant::now();
        let mut known = self.known();
        known.asking.retain(|_, asking| now < asking.put + stands);
        known.asking.get(question).cloned()
    }

    async fn look_at(
        &self,
        asking: Option<Asking>,
        question: &Question,
        request: &LeaseRequest,
    ) -> Result<(Progress, Asking)> {
        let asker = request.instance.ok_or_else(|| Error::Invalid {
            reason: "a request without an instance asks nobody".to_owned(),
        })?;
        let patience = self.options().holder_patience;
        let key = self
            .options()
            .layout
            .question(&question.node, question.holder, asker);
        let value = value(&request.node, request.instance, &request.attrs)?;
        let Some(mut asking) = asking else {
            let (lease, _) = self.store().grant(patience + LINGER).await?;
            self.put_question(&key, &value, lease).await?;
            let now = Instant::now();
            let asking = Asking {
                lease,
                since: now,
                put: now,
            };
            return Ok((Progress::Open, asking));
        };
        let found = self.store().range(KeyRange::key(&key)).await?.entries.pop();
        if let Some(answer) = found.as_ref().and_then(|entry| answer(entry, question)) {
            return Ok((Progress::Answered(answer), asking));
        }
        let now = Instant::now();
        if found.is_none() {
            // Somebody took it away, or its lease has ended: nobody can have seen it since.
            let (lease, _) = self.store().grant(patience + LINGER).await?;
            asking.lease = lease;
            asking.since = now;
        } else if now >= asking.since + patience {
            return Ok((Progress::Silent, asking));
        }
        if found.is_none() || now >= asking.put + PUT_EVERY {
            self.put_question(&key, &value, asking.lease).await?;
            asking.put = now;
        }
        Ok((Progress::Open, asking))
    }

    async fn put_question(&self, key: &str, value: &str, lease: LeaseId) -> StoreResult<()> {
        let txn = Txn {
            compares: Vec::new(),
            then: vec![Op::put(key, value, Some(lease))],
            or_else: Vec::new(),
        };
        self.store().txn(txn).await?;
        Ok(())
    }

    /// Answers a question in its place, if it is about us and nobody wrote it since.
    pub(super) async fn answer(&self, asked: &KeyValue) -> StoreResult<()> {
        let Some(own) = self.own_if_asked(&asked.key) else {
            return Ok(());
        };
        let Ok(value) = value(&own.node, own.instance, &own.attrs) else {
            return Ok(());
        };
        if asked.value == value.as_bytes() {
            return Ok(());
        }
        tracing::info!(key = asked.key, "another machine asks whether we live");
        let txn = Txn {
            compares: vec![Compare::unchanged(&asked.key, asked.modified)],
            then: vec![Op::put(&asked.key, value, asked.lease)],
            or_else: Vec::new(),
        };
        match self.store().txn(txn).await {
            // The asker is gone, and its lease with it.
            Err(StoreError::LeaseNotFound { .. }) => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// Our lease, if a question is about us.
    pub(super) fn own_if_asked(&self, key: &str) -> Option<Lease> {
        let own = self.known().own()?.clone();
        let about_us = self.options().layout.questions_to(&own.node, own.instance?);
        key.starts_with(&about_us).then_some(own)
    }
}

/// The address of the machine that answered a question.
fn answer(entry: &KeyValue, question: &Question) -> Option<PublicIp> {
    let record = wire::parse_lease_value(&entry.value).ok()?;
    let is_answer = record.instance.is_some() && record.instance == question.holder;
    is_answer.then_some(record.attrs.public_ip)
}

impl Layout {
    /// The key of a question to the machine that holds a node id.
    fn question(&self, node: &NodeId, holder: Option<InstanceId>, asker: InstanceId) -> String {
        match holder {
            Some(holder) => format!("{}{asker}", self.questions_to(node, holder)),
            None => format!("{}/{node}/-/{asker}", self.questions()),
        }
    }

    /// What the keys of all questions to a machine begin with.
    fn questions_to(&self, node: &NodeId, holder: InstanceId) -> String {
        format!("{}/{node}/{holder}/", self.questions())
    }
}
