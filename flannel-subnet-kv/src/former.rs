//! Records of a machine's former name, beside the one that it has: they go once nobody answers for
//! them.
//!
//! Peers accept the older of two records of one address and MAC, so until the former one is gone they
//! reject the machine's own.

use std::collections::BTreeMap;
use std::time::Duration;

use flannel_core::manager::Result;
use flannel_core::{Holder, LeaseRequest};
use tokio::time::Instant;

use crate::ask::{LOOK_EVERY, Progress, Question};
use crate::layout::{Record, lease_key};
use crate::manager::KvManager;
use crate::store::{KeyRange, KeyValue, Store};
use crate::txn::{Compare, Op, Txn};

/// The most such records that are looked after; a machine has one former name.
const MOST: usize = 8;

/// The time that a record is left alone which a machine answered for.
const REST: Duration = Duration::from_secs(60);

/// The wait after a failure.
const RETRY: Duration = Duration::from_secs(5);

/// The least time between two looks: whoever writes such records again and again gets no more of us.
const PAUSE: Duration = Duration::from_millis(50);

/// A record that looks as if our machine had written it under another name.
#[derive(Debug, Clone)]
struct Former {
    record: Record,
    due: Instant,
}

/// The outcome of a look at one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// There may be an answer yet.
    Open,
    /// A machine that lives answered for it.
    Answered,
    /// It was removed, or somebody wrote it since.
    Done,
}

/// The records of our former name.
#[derive(Debug, Default)]
pub(super) struct Formers {
    records: BTreeMap<String, Former>,
    /// When the next one may be looked at.
    pause: Option<Instant>,
}

impl Formers {
    /// Forgets all: everything is read anew.
    pub(super) fn clear(&mut self) {
        self.records.clear();
    }

    /// The record is gone.
    pub(super) fn forget(&mut self, key: &str) {
        self.records.remove(key);
    }

    /// When one of them is to be looked at.
    pub(super) fn due(&self) -> Option<Instant> {
        let due = self.records.values().map(|former| former.due).min()?;
        Some(self.pause.map_or(due, |pause| due.max(pause)))
    }

    /// Takes note of a record, whatever it is.
    pub(super) fn note<S: Store>(&mut self, manager: &KvManager<S>, record: &Record) {
        let key = &record.entry.key;
        self.records.remove(key);
        if is_former(manager, record) {
            let former = Former {
                record: record.clone(),
                due: Instant::now(),
            };
            self.records.insert(key.clone(), former);
        }
        if self.records.len() > MOST {
            // Peers reject ours for the older ones.
            let age = |former: &&Former| former.record.entry.created;
            let youngest = self.records.values().max_by_key(age);
            if let Some(key) = youngest.map(|former| former.record.entry.key.clone()) {
                self.records.remove(&key);
            }
        }
    }

    /// Looks at the one that is due: asks for whoever wrote it, and removes it if nobody answers.
    pub(super) async fn look<S: Store>(&mut self, manager: &KvManager<S>) {
        let due = self.records.values_mut().min_by_key(|former| former.due);
        let Some(former) = due else {
            return;
        };
        // This may be given up on.
        let now = Instant::now();
        self.pause = Some(now + PAUSE);
        former.due = now + RETRY;
        // Our own record may say something else since this one was noted.
        let done = match is_former(manager, &former.record) {
            true => manager.look_at_former(&former.record).await,
            false => Ok(Look::Done),
        };
        let wait = match done {
            Ok(Look::Open) => Some(LOOK_EVERY),
            Ok(Look::Answered) => Some(REST),
            Ok(Look::Done) => None,
            Err(error) => {
                tracing::debug!(%error, "a record of our former name is looked at later");
                Some(RETRY)
            }
        };
        match wait {
            Some(wait) => former.due = Instant::now() + wait,
            None => {
                let key = former.record.entry.key.clone();
                self.records.remove(&key);
            }
        }
    }
}

/// The request by which our lease would be ours.
fn request_of<S: Store>(manager: &KvManager<S>) -> Option<LeaseRequest> {
    let known = manager.known();
    let own = known.own()?;
    Some(LeaseRequest {
        instance: own.instance,
        ..LeaseRequest::new(own.node.clone(), own.attrs.clone())
    })
}

/// Those of the records read that are of our former name by what they say.
pub(super) fn candidates<'a>(
    request: &'a LeaseRequest,
    records: &'a [Record],
) -> impl Iterator<Item = &'a Record> {
    records.iter().filter(|record| says_former(request, record))
}

/// Tells if a record bears another node id, and is of the asker's machine by what it says.
fn says_former(request: &LeaseRequest, record: &Record) -> bool {
    record.node().is_some_and(|node| node != request.node)
        && !record.is_gos()
        && record.entry.lease.is_some()
        && matches!(record.holder(request), Holder::Own | Holder::Former(_))
}

/// Tells if a record is another than ours, and of our machine by what it says.
fn is_former<S: Store>(manager: &KvManager<S>, record: &Record) -> bool {
    let Some(request) = request_of(manager) else {
        return false;
    };
    let is_ours = manager
        .known()
        .own()
        .is_some_and(|own| own.key == lease_key(&record.entry.key));
    !is_ours && says_former(&request, record)
}

impl<S: Store> KvManager<S> {
    /// Asks for whoever wrote a record, and removes it if that was us or nobody answers.
    async fn look_at_former(&self, record: &Record) -> Result<Look> {
        let Some(request) = request_of(self) else {
            return Ok(Look::Done);
        };
        let question = Question::of(&request, record);
        if let Some(question) = &question {
            match self.look(question, &request).await? {
                Progress::Open => return Ok(Look::Open),
                Progress::Answered(_) => return Ok(Look::Answered),
                Progress::Silent => {}
            }
        }
        let key = &record.entry.key;
        let markers = self.markers_of(record).await?;
        tracing::warn!(
            key,
            "a record of our machine under its former name is removed"
        );
        // Only while ours stands: else another run of our machine may have that one.
        let Some(own) = self.known().own().cloned() else {
            return Ok(Look::Done);
        };
        let own = self.as_put_again(&own);
        let mut compares = vec![
            Compare::unchanged(own.key.as_str(), own.revision),
            Compare::unchanged(key, record.entry.modified),
        ];
        let mut then = vec![Op::delete(key)];
        for marker in markers {
            compares.push(Compare::unchanged(&marker.key, marker.modified));
            then.push(Op::delete(marker.key));
        }
        let txn = Txn {
            compares,
            then,
            or_else: vec![Op::Range(KeyRange::key(key))],
        };
        let answer = self.store().txn(txn).await?;
        if !answer.succeeded {
            let is_as_read = |entry: &KeyValue| entry.modified == record.entry.modified;
            // Else ours was written meanwhile, or a marker: that is looked at again.
            return Ok(
                match answer.ranges().flatten().any(|entry| is_as_read(&entry)) {
                    true => Look::Open,
                    false => Look::Done,
                },
            );
        }
        if let Some(question) = &question {
            self.withdraw(question).await;
        }
        Ok(Look::Done)
    }

    /// Those markers of a record's node and subnets that name it. A machine that has the node id now has
    /// its own under the same key.
    async fn markers_of(&self, record: &Record) -> Result<Vec<KeyValue>> {
        let Some(node) = record.node() else {
            return Ok(Vec::new());
        };
        let markers = self.options().layout.markers(&node, &record.taken);
        let txn = Txn {
            then: markers
                .into_iter()
                .map(|key| Op::Range(KeyRange::key(key)))
                .collect(),
            ..Txn::default()
        };
        let found = self.store().txn(txn).await?.ranges().flatten();
        let names_it = |marker: &KeyValue| marker.value == record.entry.key.as_bytes();
        Ok(found.filter(names_it).collect())
    }
}
