//! A stand-in for the third party's store: a key-value store with transactions and a blocking
//! query, as Consul has them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// The store's content: text by key, with the index of its creation and of its last change.
#[derive(Debug, Default, Clone)]
pub(crate) struct Table {
    pub(crate) index: u64,
    pub(crate) rows: BTreeMap<String, (u64, u64, String)>,
}

/// A client of the store; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Store(Arc<(Mutex<Table>, watch::Sender<u64>)>);

impl Store {
    pub(crate) fn new() -> Self {
        Self(Arc::new((Mutex::default(), watch::Sender::new(0))))
    }

    /// Waits until the index is another than the last one seen; the first call returns at once.
    pub(crate) async fn wait(&self, seen: u64) -> Table {
        let mut index = self.0.1.subscribe();
        index.wait_for(|index| *index != seen).await.ok();
        self.read()
    }

    pub(crate) fn read(&self) -> Table {
        self.0
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Writes (with `None`: deletes) all keys, if the last change of each is the one expected (0:
    /// there is no such key); else nothing. Says whether it was done.
    pub(crate) fn commit(&self, writes: &[(&str, u64, Option<String>)]) -> bool {
        let mut table = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = |table: &Table, key: &str| table.rows.get(key).map_or((0, 0), |r| (r.0, r.1));
        if writes
            .iter()
            .any(|(key, expected, _)| now(&table, key).1 != *expected)
        {
            return false;
        }
        table.index += 1;
        let index = table.index;
        for (key, expected, value) in writes {
            let created = if *expected == 0 {
                index
            } else {
                now(&table, key).0
            };
            match value.clone() {
                Some(value) => table
                    .rows
                    .insert((*key).to_owned(), (created, index, value)),
                None => table.rows.remove(*key),
            };
        }
        drop(table);
        self.0.1.send_replace(index);
        true
    }
}
