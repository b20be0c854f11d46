//! Reading a range of any size: in pages that are bounded in bytes, without the values of what can
//! be no lease.

use std::time::Duration;

use flannel_core::{LeaseKey, Revision, wire};

use crate::layout::Layout;
use crate::store::{KeyRange, KeyValue, Page, RangeAnswer, Store, StoreError, StoreResult};

/// How many entries are read at once: some 1.5 MB of leases.
const PAGE: usize = 5_000;

/// By how much a page is made smaller that was too large.
const SHRINK: usize = 8;

/// Reads config and records, all at one revision. Each page has this long, where that is said; a
/// value that can be none of a lease is left out, or not even asked for ([`KeyValue::omitted`]).
pub(super) async fn read_all<S: Store>(
    store: &S,
    layout: &Layout,
    patience: Option<Duration>,
) -> StoreResult<RangeAnswer> {
    let mut reading = Reading {
        store,
        layout,
        patience,
        at: None,
        entries: Vec::new(),
    };
    let mut rest = Some(layout.range());
    while let Some(range) = rest {
        let page = reading.page(range.clone(), PAGE, false).await;
        rest = match page {
            Ok((entries, more)) => {
                let next = more.then(|| behind(&entries, &range)).flatten();
                reading.take(entries);
                next
            }
            Err(StoreError::TooLarge) => reading.sift(range).await?,
            Err(error) => return Err(error),
        };
    }
    Ok(RangeAnswer {
        revision: reading.at.unwrap_or_default(),
        entries: reading.entries,
    })
}

/// What of a range comes behind the last entry of a page.
fn behind(page: &[KeyValue], range: &KeyRange) -> Option<KeyRange> {
    let last = page.last()?;
    Some(KeyRange::Between(format!("{}\0", last.key), range.end()?))
}

struct Reading<'a, S> {
    store: &'a S,
    layout: &'a Layout,
    patience: Option<Duration>,
    /// All pages are of the revision of the first.
    at: Option<Revision>,
    entries: Vec<KeyValue>,
}

impl<S: Store> Reading<'_, S> {
    /// One page, and whether there is more behind it.
    async fn page(
        &mut self,
        range: KeyRange,
        limit: usize,
        keys_only: bool,
    ) -> StoreResult<(Vec<KeyValue>, bool)> {
        let page = Page {
            range,
            limit,
            at: self.at,
            keys_only,
        };
        let reading = self.store.page(page);
        let answer = match self.patience {
            None => reading.await?,
            Some(patience) => {
                let answer = tokio::time::timeout(patience, reading).await;
                answer.map_err(|_| StoreError::unavailable("a page took too long"))??
            }
        };
        self.at.get_or_insert(answer.revision);
        Ok((answer.entries, answer.more))
    }

    fn take(&mut self, page: Vec<KeyValue>) {
        self.entries.extend(page.into_iter().map(|mut entry| {
            if entry.value.len() > wire::MAX_VALUE_LEN {
                entry.value = Vec::new();
                entry.omitted = true;
            }
            entry
        }));
    }

    /// Reads one page of keys, then the values of those that may be leases; answers what comes behind.
    async fn sift(&mut self, range: KeyRange) -> StoreResult<Option<KeyRange>> {
        let mut limit = PAGE;
        let (keys, more) = loop {
            match self.page(range.clone(), limit, true).await {
                Err(StoreError::TooLarge) if limit > 1 => limit = (limit / SHRINK).max(1),
                // A single key too large to be told.
                Err(StoreError::TooLarge) => {
                    let reason = "a key is larger than an answer may be".to_owned();
                    return Err(StoreError::Refused { reason });
                }
                page => break page?,
            }
        };
        let next = more.then(|| behind(&keys, &range)).flatten();
        let mut run: Vec<KeyValue> = Vec::new();
        for key in keys {
            if self.may_be_of_use(&key.key) {
                run.push(key);
                continue;
            }
            self.values(std::mem::take(&mut run)).await?;
            self.entries.push(KeyValue {
                omitted: true,
                ..key
            });
        }
        self.values(run).await?;
        Ok(next)
    }

    /// Reads the values of keys that stand together.
    async fn values(&mut self, keys: Vec<KeyValue>) -> StoreResult<()> {
        let mut keys = keys.as_slice();
        let mut limit = PAGE;
        while let [first, .., last] | [first @ last] = keys {
            let range = KeyRange::Between(first.key.clone(), format!("{}\0", last.key));
            match self.page(range, limit.min(keys.len()), false).await {
                Ok((entries, _)) if entries.is_empty() => break,
                Ok((entries, _)) => {
                    keys = keys.get(entries.len()..).unwrap_or_default();
                    self.take(entries);
                }
                Err(StoreError::TooLarge) if limit.min(keys.len()) > 1 => {
                    limit = (limit.min(keys.len()) / SHRINK).max(1);
                }
                Err(StoreError::TooLarge) => {
                    self.entries.push(KeyValue {
                        omitted: true,
                        ..first.clone()
                    });
                    keys = keys.get(1..).unwrap_or_default();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn may_be_of_use(&self, key: &str) -> bool {
        let is_record = self.layout.is_record(key) && key.len() <= LeaseKey::MAX_LEN;
        key == self.layout.config() || is_record && wire::parse_subnet_key(key).is_ok()
    }
}
