//! Questions from one machine to another: does whoever wrote this record still live?
//!
//! A machine that finds its node id, or its own address under another one, held by another machine puts
//! a question where that one watches and Go flannel does not look. A machine that lives answers in its
//! place. A question hangs on a lease of its asker's and dies with it, answered or not.

use std::time::Duration;

use flannel_core::manager::{Error, Result};
use flannel_core::{Holder, InstanceId, Lease, LeaseRequest, NodeId, PublicIp, wire};
use tokio::time::Instant;

use crate::decide::{View, is_own, value};
use crate::layout::{Layout, Record};
use crate::manager::KvManager;
use crate::store::{KeyRange, KeyValue, LeaseId, Store, StoreError, StoreResult};
use crate::txn::{Compare, Op, Txn};

/// The wait between two looks at an open question.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The age at which it is put again: a watch that was opened meanwhile has not seen it.
const PUT_EVERY: Duration = Duration::from_secs(4);

/// The greatest age of the last put at which silence counts: whoever came back since then has not seen
/// it.
const FRESH: Duration = Duration::from_secs(10);

/// The time that a question stands beyond its asker's patience: longer than an asker that is cut
/// short time and again waits between two tries.
const LINGER: Duration = Duration::from_secs(90);

/// The most machines that are asked at once: of more records, those with the oldest claims count.
const MOST: usize = 8;

/// The machine that is asked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Question {
    /// The node id that its record bears.
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
            node: record.node()?,
            holder,
        })
    }
}

/// The answers, and the silences, of the holders of records.
#[derive(Debug, Clone, Default)]
pub struct Answers(Vec<(Question, Option<PublicIp>)>);

impl Answers {
    /// Notes who answered a question; `None`: nobody.
    pub fn note(&mut self, question: Question, answered: Option<PublicIp>) {
        self.0.push((question, answered));
    }

    /// Tells if nobody answered; `None` while that is not known.
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

/// The questions that are to be settled before it can be decided what to write; they are asked
/// together, so however many records there are, they cost the time of one.
///
/// Records of a former name are asked for only while the machine has none of its own: with one it works,
/// and the watch sees to the others.
pub(super) fn open_questions(
    view: &View,
    request: &LeaseRequest,
    answers: &Answers,
) -> Vec<Question> {
    if request.take_over || answers.holder_of(&request.node).is_some() {
        return Vec::new();
    }
    let bears_our_id = |record: &&Record| record.node().as_ref() == Some(&request.node);
    let ours: Vec<&Record> = view.records.iter().filter(bears_our_id).collect();
    let is_own = |record: &Record| is_own(record, request, answers);
    let has_own = || ours.iter().any(|record| is_own(record));
    let has_former = || view.records.iter().any(is_own);
    let asked = |of_our_id: bool| {
        let mut known = answers.0.iter();
        known.any(|(asked, _)| (asked.node == request.node) == of_our_id)
    };
    let mut records = match ours.is_empty() {
        // Whoever took the node id from the machine that we asked is to be asked, too.
        false if !asked(true) || !has_own() => ours,
        true if !asked(false) && !has_former() => view.records.iter().collect(),
        _ => return Vec::new(),
    };
    records.sort_by_cached_key(|record| (record.entry.created, record.entry.key.clone()));
    let mut open: Vec<Question> = Vec::new();
    let asked = records
        .iter()
        .filter_map(|record| Question::of(request, record));
    for question in asked {
        if open.len() < MOST && answers.is_silent(&question).is_none() && !open.contains(&question)
        {
            open.push(question);
        }
    }
    open
}

/// The state of a question.
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
    /// Asks all of them at once, and waits for answers as long as is patient, or until it is known
    /// that a machine holds the node id. The time goes on while nobody waits.
    pub(super) async fn ask(
        &self,
        mut open: Vec<Question>,
        request: &LeaseRequest,
        answers: &mut Answers,
    ) -> Result<()> {
        loop {
            let mut still_open = Vec::new();
            for question in open {
                match self.look(&question, request).await? {
                    Progress::Open => still_open.push(question),
                    Progress::Answered(public_ip) => answers.note(question, Some(public_ip)),
                    Progress::Silent => answers.note(question, None),
                }
            }
            if still_open.is_empty() || answers.holder_of(&request.node).is_some() {
                return Ok(());
            }
            open = still_open;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Puts a question if it does not stand yet, and looks for an answer. One without an answer stands
    /// until it is [withdrawn](Self::withdraw): what follows may have to be tried again.
    pub(super) async fn look(
        &self,
        question: &Question,
        request: &LeaseRequest,
    ) -> Result<Progress> {
        // It stays known if this is given up on.
        let asking = self.asking(question);
        let (progress, asking) = self.look_at(asking, question, request).await?;
        self.known().asking.insert(question.clone(), asking);
        if matches!(progress, Progress::Answered(_)) {
            self.withdraw(question).await;
        }
        Ok(progress)
    }

    /// Takes a question away that is settled; else it ends with its lease.
    pub(super) async fn withdraw(&self, question: &Question) {
        let asking = self.known().asking.remove(question);
        if let Some(asking) = asking {
            drop(self.store().revoke(asking.lease).await);
        }
    }

    /// Takes all questions away that nobody answered.
    pub(super) async fn withdraw_all(&self, answers: &Answers) {
        for (question, answered) in &answers.0 {
            if answered.is_none() {
                self.withdraw(question).await;
            }
        }
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
        }
        let is_over = now >= asking.since + patience && now < asking.put + FRESH;
        if found.is_some() && is_over {
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

    /// Our answer to a question, if it is about us and not answered yet.
    pub(super) fn answer_to(&self, asked: &KeyValue) -> Option<String> {
        let own = self.own_if_asked(&asked.key)?;
        let answer = value(&own.node, own.instance, &own.attrs).ok()?;
        (asked.value != answer.as_bytes()).then_some(answer)
    }

    /// Answers a question in its place, if it is about us and nobody wrote it since.
    pub(super) async fn answer(&self, asked: &KeyValue) -> StoreResult<()> {
        let Some(value) = self.answer_to(asked) else {
            return Ok(());
        };
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
    fn own_if_asked(&self, key: &str) -> Option<Lease> {
        let own = self.known().own()?.clone();
        let about_us = self.options().layout.questions_to(&own.node, own.instance?);
        let asker = key.strip_prefix(&about_us)?;
        InstanceId::parse(asker).is_ok().then_some(own)
    }
}

/// The address of the machine that answered a question.
fn answer(entry: &KeyValue, question: &Question) -> Option<PublicIp> {
    let record = wire::parse_lease_value(&entry.value).ok()?;
    let is_answer = record.instance.is_some()
        && record.instance == question.holder
        && record.node.as_ref() == Some(&question.node);
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

    /// The text that the keys of all questions to a machine begin with.
    fn questions_to(&self, node: &NodeId, holder: InstanceId) -> String {
        format!("{}/{node}/{holder}/", self.questions())
    }
}
