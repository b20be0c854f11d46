//! [`Store`]: what is asked of a key-value store, and the values that go to it and come back.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::Revision;

use crate::txn::{Txn, TxnAnswer};

/// The result of a call to the store.
pub type StoreResult<T, E = StoreError> = Result<T, E>;

/// Why the store, or the way to it, did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There was no answer. What was asked for may have been done.
    #[error("no answer: {reason}")]
    Unavailable {
        /// What happened, without any secret.
        reason: String,
    },
    /// The store does not let us.
    #[error("permission denied: {reason}")]
    Denied {
        /// What the store said.
        reason: String,
    },
    /// The revision is no longer in the history.
    #[error("the history begins at revision {revision}")]
    Compacted {
        /// The first revision that still is.
        revision: Revision,
    },
    /// The store has not come that far.
    #[error("revision {asked} is in the future, the store is at {current}")]
    FutureRevision {
        /// The revision asked for.
        asked: Revision,
        /// That of the store.
        current: Revision,
    },
    /// There is no such lease, or not any more.
    #[error("there is no lease {}", .lease.0)]
    LeaseNotFound {
        /// The lease.
        lease: LeaseId,
    },
    /// The answer is larger than is taken. Of a call that writes this is never said: whether it was
    /// done is not known then ([`Unavailable`](Self::Unavailable)).
    #[error("the answer is larger than is taken")]
    TooLarge,
    /// The call itself is wrong, or the store cannot take it (its space is used up).
    #[error("the call is refused: {reason}")]
    Refused {
        /// What is wrong with it.
        reason: String,
    },
}

impl StoreError {
    /// There was no answer.
    pub fn unavailable(reason: impl Into<String>) -> Self {
        Self::Unavailable {
            reason: reason.into(),
        }
    }
}

/// A revisioned key-value store as etcd v3 is: one revision for the whole store, conditional
/// transactions over keys and ranges, leases that take their keys along when they end, a history
/// that can be watched.
///
/// A call may hang: whoever calls gives up in time. What was asked for may then still be done.
#[async_trait]
pub trait Store: Debug + Clone + Send + Sync + 'static {
    /// A watch of this store.
    type Watch: StoreWatch;

    /// A short name of the kind of store, for status and logs: `etcd`.
    fn kind(&self) -> &'static str;

    /// Drops all connections: the host has lost an address that they may be bound to. By default
    /// there are none.
    fn reconnect(&self) {}

    /// What tells this client from others of the store: the seed of its jitter.
    fn name(&self) -> &str;

    /// Reads one page of a range.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] or [`StoreError::Denied`]; [`StoreError::TooLarge`] where a
    /// smaller page may be taken; [`StoreError::Compacted`] if the revision is too old by now.
    ///
    /// # Cancel safety
    /// Cancel safe: reads only.
    async fn page(&self, page: Page) -> StoreResult<PageAnswer>;

    /// Reads a range of few entries as it is now, in one page.
    ///
    /// # Errors
    /// As [`page`](Self::page).
    ///
    /// # Cancel safety
    /// Cancel safe: reads only.
    async fn range(&self, range: KeyRange) -> StoreResult<RangeAnswer> {
        let page = Page {
            range,
            limit: usize::MAX,
            at: None,
            keys_only: false,
        };
        let PageAnswer {
            revision, entries, ..
        } = self.page(page).await?;
        Ok(RangeAnswer { revision, entries })
    }

    /// Does a transaction.
    ///
    /// # Errors
    /// As [`range`](Self::range), and [`StoreError::Refused`] or [`StoreError::LeaseNotFound`]:
    /// nothing is changed then.
    ///
    /// # Cancel safety
    /// The transaction may have been done, or be done later.
    async fn txn(&self, txn: Txn) -> StoreResult<TxnAnswer>;

    /// Grants a lease of whole seconds; says for how long it was granted.
    ///
    /// # Errors
    /// As [`range`](Self::range).
    ///
    /// # Cancel safety
    /// A lease may have been granted that nobody uses.
    async fn grant(&self, ttl: Duration) -> StoreResult<(LeaseId, Duration)>;

    /// Gives a lease its full time again, and says how long that is.
    ///
    /// # Errors
    /// As [`range`](Self::range), and [`StoreError::LeaseNotFound`].
    ///
    /// # Cancel safety
    /// The lease may have been extended.
    async fn keep_alive(&self, lease: LeaseId) -> StoreResult<Duration>;

    /// Ends a lease and deletes its keys.
    ///
    /// # Errors
    /// As [`range`](Self::range), and [`StoreError::LeaseNotFound`].
    ///
    /// # Cancel safety
    /// The lease may have ended.
    async fn revoke(&self, lease: LeaseId) -> StoreResult<()>;

    /// Watches what is written to a range from now on.
    ///
    /// # Errors
    /// As [`range`](Self::range).
    ///
    /// # Cancel safety
    /// Cancel safe: a watch that nobody holds is none.
    async fn watch(&self, range: KeyRange) -> StoreResult<Self::Watch>;
}

/// A watch of a range.
#[async_trait]
pub trait StoreWatch: Debug + Send + 'static {
    /// Asks the store to say how far it is. A watch that lives answers with
    /// [`WatchAnswer::Progress`], after all that was written until then.
    ///
    /// # Errors
    /// The watch is over.
    ///
    /// # Cancel safety
    /// The store may or may not have been asked.
    async fn ask_progress(&mut self) -> StoreResult<()>;

    /// The next that the watch delivers.
    ///
    /// # Errors
    /// The watch is over: [`StoreError::Unavailable`] if it broke, [`StoreError::Compacted`] if it
    /// missed something.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn next(&mut self) -> StoreResult<WatchAnswer>;
}

/// What a watch delivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchAnswer {
    /// Writes, those of one key in their order.
    Events {
        /// The revision of the store when they were sent.
        revision: Revision,
        /// The writes.
        events: Vec<KeyEvent>,
    },
    /// All that was written up to this revision has been delivered.
    Progress {
        /// The revision.
        revision: Revision,
    },
}

/// The name of a lease of the store: keys that are attached to it are deleted when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// A key with its value and its place in the store's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// The value; empty in the event of a deletion.
    pub value: Vec<u8>,
    /// When the key was made; 0 in the event of a deletion.
    pub created: Revision,
    /// When it was last written or, in the event of a deletion, deleted.
    pub modified: Revision,
    /// How often it was written since it was made; 0 in the event of a deletion.
    pub version: u64,
    /// The lease that it is attached to.
    pub lease: Option<LeaseId>,
    /// The value was not read, or not kept: it is too large, or its key is no lease's.
    pub omitted: bool,
}

impl KeyValue {
    /// What a condition compares a key with that is not there, as etcd does.
    pub const fn absent() -> Self {
        Self {
            key: String::new(),
            value: Vec::new(),
            created: Revision(0),
            modified: Revision(0),
            version: 0,
            lease: None,
            omitted: false,
        }
    }
}

/// One write, as a watch tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyEvent {
    /// The key was written.
    Put(KeyValue),
    /// The key was deleted, or its lease ended.
    Delete {
        /// The key.
        key: String,
        /// When.
        revision: Revision,
    },
}

impl KeyEvent {
    /// The key that was written or deleted.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }

    /// When it was.
    pub const fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.modified,
            Self::Delete { revision, .. } => *revision,
        }
    }

    /// Does to a set of keys what was done.
    pub fn apply(self, keys: &mut BTreeMap<String, KeyValue>) {
        match self {
            Self::Put(entry) => drop(keys.insert(entry.key.clone(), entry)),
            Self::Delete { key, .. } => drop(keys.remove(&key)),
        }
    }
}

/// Which keys are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyRange {
    /// One key.
    Key(String),
    /// Every key that begins with this text.
    Prefix(String),
    /// Every key from the first text on that sorts before the second.
    Between(String, String),
}

impl KeyRange {
    /// One key.
    pub fn key(key: impl Into<String>) -> Self {
        Self::Key(key.into())
    }

    /// Every key that begins with this text.
    pub fn prefix(prefix: impl Into<String>) -> Self {
        Self::Prefix(prefix.into())
    }

    /// Whether a key is meant.
    pub fn contains(&self, key: &str) -> bool {
        match self {
            Self::Key(only) => only == key,
            Self::Prefix(prefix) => key.starts_with(prefix.as_str()),
            Self::Between(from, to) => (from.as_str()..to.as_str()).contains(&key),
        }
    }

    /// The key that the range begins with.
    pub const fn first(&self) -> &String {
        match self {
            Self::Key(key) => key,
            Self::Prefix(prefix) => prefix,
            Self::Between(from, _) => from,
        }
    }

    /// The first text behind all keys that are meant; `None` where there is none.
    pub fn end(&self) -> Option<String> {
        match self {
            Self::Key(key) => Some(format!("{key}\0")),
            Self::Between(_, to) => Some(to.clone()),
            Self::Prefix(prefix) => {
                let mut end: Vec<char> = prefix.chars().collect();
                while let Some(last) = end.pop() {
                    // The numbers of surrogates are no characters.
                    let next = (u32::from(last) + 1..=0xE000).find_map(char::from_u32);
                    let next = next.or_else(|| char::from_u32(u32::from(last) + 1));
                    if let Some(next) = next {
                        end.push(next);
                        return Some(end.into_iter().collect());
                    }
                }
                None
            }
        }
    }

    /// The entries that are meant, in the order of their keys.
    pub fn of<'a>(
        &self,
        keys: &'a BTreeMap<String, KeyValue>,
    ) -> impl Iterator<Item = &'a KeyValue> + use<'a, '_> {
        let behind = keys.range::<String, _>(self.first()..);
        behind
            .take_while(|(key, _)| self.contains(key))
            .map(|(_, entry)| entry)
    }
}

/// A part of a range that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The range, from where the page begins.
    pub range: KeyRange,
    /// The most entries that it may have.
    pub limit: usize,
    /// The revision to be read; `None`: the latest.
    pub at: Option<Revision>,
    /// Whether values are left out.
    pub keys_only: bool,
}

/// A part of a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageAnswer {
    /// The revision that was read.
    pub revision: Revision,
    /// The entries in the order of their keys.
    pub entries: Vec<KeyValue>,
    /// Whether there are more of them behind these.
    pub more: bool,
}

/// What a range read found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeAnswer {
    /// The revision of the store when it answered, whichever revision was read.
    pub revision: Revision,
    /// The entries in the order of their keys.
    pub entries: Vec<KeyValue>,
}
