//! Transactions: all or nothing, on a condition.

use flannel_core::Revision;

use crate::store::{KeyRange, KeyValue, LeaseId};

/// What an entry must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expectation {
    /// Made at this revision; 0 for a key that is not there.
    Created(Revision),
    /// Last written at this revision; 0 for a key that is not there.
    Modified(Revision),
    /// Of this value. A key that is not there has none.
    Value(Vec<u8>),
    /// Attached to this lease, or to none.
    Lease(Option<LeaseId>),
}

/// A condition: every entry of a range is as expected. If there is none, one stands for them that
/// was never made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// The entries.
    pub range: KeyRange,
    /// What they must be.
    pub expected: Expectation,
}

impl Compare {
    /// Nothing of the range is there.
    pub const fn absent(range: KeyRange) -> Self {
        Self {
            range,
            expected: Expectation::Created(Revision(0)),
        }
    }

    /// The key was not written since this revision.
    pub fn unchanged(key: impl Into<String>, modified: Revision) -> Self {
        Self {
            range: KeyRange::key(key),
            expected: Expectation::Modified(modified),
        }
    }
}

/// What a transaction does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes a key.
    Put {
        /// The key.
        key: String,
        /// Its value.
        value: Vec<u8>,
        /// The lease it is attached to from now on.
        lease: Option<LeaseId>,
    },
    /// Deletes what there is of a range.
    Delete(KeyRange),
    /// Reads a range, as the ops before this one have left it.
    Range(KeyRange),
}

impl Op {
    /// Writes a key.
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>, lease: Option<LeaseId>) -> Self {
        Self::Put {
            key: key.into(),
            value: value.into(),
            lease,
        }
    }

    /// Deletes a key.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete(KeyRange::key(key))
    }
}

/// A transaction: if all compares hold the one list of ops, else the other, at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// The conditions.
    pub compares: Vec<Compare>,
    /// What is done if they hold.
    pub then: Vec<Op>,
    /// What is done if one does not.
    pub or_else: Vec<Op>,
}

/// What one op did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpAnswer {
    /// The key is written.
    Put,
    /// So many keys were deleted.
    Deleted(usize),
    /// What was found.
    Range(Vec<KeyValue>),
}

/// What a transaction did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnAnswer {
    /// Whether the conditions held.
    pub succeeded: bool,
    /// The revision of the store after it.
    pub revision: Revision,
    /// What each op did, in their order.
    pub results: Vec<OpAnswer>,
}

impl TxnAnswer {
    /// What the range reads found, in their order.
    pub fn ranges(self) -> impl Iterator<Item = Vec<KeyValue>> {
        self.results.into_iter().filter_map(|result| match result {
            OpAnswer::Range(entries) => Some(entries),
            OpAnswer::Put | OpAnswer::Deleted(_) => None,
        })
    }
}
