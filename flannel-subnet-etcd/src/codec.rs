//! Between the values of [`flannel_subnet_kv`] and those of the client library.

use std::time::Duration;

use etcd_client as etcd;
use flannel_core::Revision;
use flannel_subnet_kv::{
    Compare, Expectation, KeyEvent, KeyRange, KeyValue, LeaseId, Op, OpAnswer, Page, StoreError,
    StoreResult, Txn, TxnAnswer,
};

/// The first key, and where the range ends if it is not that key alone.
pub(crate) fn bounds(range: &KeyRange) -> (Vec<u8>, Option<Vec<u8>>) {
    match range {
        KeyRange::Key(key) => (key.clone().into_bytes(), None),
        KeyRange::Prefix(prefix) => {
            let first = prefix.clone().into_bytes();
            let end = end_of(&first);
            (first, Some(end))
        }
        KeyRange::Between(from, to) => (from.clone().into_bytes(), Some(to.clone().into_bytes())),
    }
}

/// The key after all that begin with these bytes, as etcd wants it: a zero byte for no end.
fn end_of(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// How a page is read, up to where its range ends.
pub(crate) fn page_options(page: &Page, end: Option<Vec<u8>>) -> etcd::GetOptions {
    let mut options = etcd::GetOptions::new();
    // Without a limit etcd sends all there is.
    if let Ok(limit) = i64::try_from(page.limit) {
        options = options.with_limit(limit);
    }
    if let Some(end) = end {
        options = options.with_range(end);
    }
    if let Some(at) = page.at {
        options = options.with_revision(signed(at));
    }
    if page.keys_only {
        options = options.with_keys_only();
    }
    options
}

fn revision(revision: i64) -> Revision {
    Revision(u64::try_from(revision).unwrap_or_default())
}

fn signed(revision: Revision) -> i64 {
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}

/// etcd's number of a lease: any 64 bits but zero.
pub(crate) const fn lease_number(lease: LeaseId) -> i64 {
    lease.0.cast_signed()
}

pub(crate) const fn lease_id(number: i64) -> LeaseId {
    LeaseId(number.cast_unsigned())
}

/// A time to live in whole seconds, rounded up.
pub(crate) fn seconds(ttl: Duration) -> i64 {
    let up = u64::from(ttl.subsec_nanos() > 0);
    i64::try_from(ttl.as_secs().saturating_add(up)).unwrap_or(i64::MAX)
}

/// An entry. A key that is no text is written so that it can be told, and can be no lease.
pub(crate) fn entry(kv: &etcd::KeyValue) -> KeyValue {
    KeyValue {
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        value: kv.value().to_vec(),
        created: revision(kv.create_revision()),
        modified: revision(kv.mod_revision()),
        version: u64::try_from(kv.version()).unwrap_or_default(),
        lease: (kv.lease() != 0).then(|| lease_id(kv.lease())),
        omitted: false,
    }
}

/// What a watch told of a key. Of a deletion etcd sends the key and when, and nothing else: its
/// version is 0, which no key has that is there.
pub(crate) fn event(kv: &etcd::KeyValue) -> KeyEvent {
    let entry = entry(kv);
    if entry.version == 0 {
        return KeyEvent::Delete {
            key: entry.key,
            revision: entry.modified,
        };
    }
    KeyEvent::Put(entry)
}

/// The revision of a store's answer.
pub(crate) fn answered(header: Option<&etcd::ResponseHeader>) -> StoreResult<Revision> {
    match header {
        Some(header) => Ok(revision(header.revision())),
        None => Err(StoreError::unavailable("an answer without a header")),
    }
}

fn compare(compare: &Compare) -> etcd::Compare {
    use etcd::CompareOp::Equal;
    let (key, end) = bounds(&compare.range);
    let condition = match &compare.expected {
        Expectation::Created(at) => etcd::Compare::create_revision(key, Equal, signed(*at)),
        Expectation::Modified(at) => etcd::Compare::mod_revision(key, Equal, signed(*at)),
        Expectation::Value(value) => etcd::Compare::value(key, Equal, value.clone()),
        Expectation::Lease(lease) => {
            etcd::Compare::lease(key, Equal, lease.map_or(0, lease_number))
        }
    };
    match end {
        Some(end) => condition.with_range(end),
        None => condition,
    }
}

fn op(op: &Op) -> etcd::TxnOp {
    match op {
        Op::Put { key, value, lease } => {
            let options = etcd::PutOptions::new();
            let options = match lease {
                Some(lease) => options.with_lease(lease_number(*lease)),
                None => options,
            };
            etcd::TxnOp::put(key.as_str(), value.clone(), Some(options))
        }
        Op::Delete(range) => {
            let (key, end) = bounds(range);
            let options = end.map(|end| etcd::DeleteOptions::new().with_range(end));
            etcd::TxnOp::delete(key, options)
        }
        Op::Range(range) => {
            let (key, end) = bounds(range);
            let options = end.map(|end| etcd::GetOptions::new().with_range(end));
            etcd::TxnOp::get(key, options)
        }
    }
}

pub(crate) fn txn(txn: &Txn) -> etcd::Txn {
    let compares: Vec<_> = txn.compares.iter().map(compare).collect();
    let then: Vec<_> = txn.then.iter().map(op).collect();
    let or_else: Vec<_> = txn.or_else.iter().map(op).collect();
    etcd::Txn::new()
        .when(compares)
        .and_then(then)
        .or_else(or_else)
}

pub(crate) fn txn_answer(answer: &etcd::TxnResponse) -> StoreResult<TxnAnswer> {
    let results = answer
        .op_responses()
        .into_iter()
        .map(|result| match result {
            etcd::TxnOpResponse::Put(_) => Ok(OpAnswer::Put),
            etcd::TxnOpResponse::Delete(deleted) => Ok(OpAnswer::Deleted(
                usize::try_from(deleted.deleted()).unwrap_or_default(),
            )),
            etcd::TxnOpResponse::Get(got) => {
                Ok(OpAnswer::Range(got.kvs().iter().map(entry).collect()))
            }
            etcd::TxnOpResponse::Txn(_) => {
                Err(StoreError::unavailable("an answer to another call"))
            }
        });
    Ok(TxnAnswer {
        succeeded: answer.succeeded(),
        revision: answered(answer.header())?,
        results: results.collect::<StoreResult<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix_is_the_key_after_all_that_begin_so() {
        assert_eq!(end_of(b"/a/subnets"), b"/a/subnett");
        assert_eq!(end_of(b"a\xff\xff"), b"b");
        assert_eq!(end_of(b"\xff"), b"\0");
        assert_eq!(end_of(b""), b"\0");
    }

    #[test]
    fn a_time_to_live_is_never_cut_short() {
        assert_eq!(seconds(Duration::from_millis(1)), 1);
        assert_eq!(seconds(Duration::from_secs(86_400)), 86_400);
        assert_eq!(seconds(Duration::MAX), i64::MAX);
    }

    #[test]
    fn lease_numbers_go_there_and_back() {
        for number in [1, -1, i64::MIN, i64::MAX] {
            assert_eq!(lease_number(lease_id(number)), number);
        }
    }
}
