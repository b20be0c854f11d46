//! A stand-in for the third party's store: a key-value store with transactions and a blocking
//! query, as Consul has them.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::sync::watch;

/// A value with the index of its creation and of its last change.
pub(crate) type Row = (u64, u64, String);

/// The store's content.
#[derive(Debug, Default, Clone)]
pub(crate) struct Table {
    pub(crate) index: u64,
    pub(crate) rows: BTreeMap<String, Row>,
}

/// A client of the store; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Store(Arc<(Mutex<Table>, watch::Sender<u64>)>);

impl Store {
    pub(crate) fn new() -> Self {
        Self(Arc::new((Mutex::default(), watch::Sender::new(0))))
    }

    /// The table now, and again after every change, turned into something else.
    pub(crate) fn watch<T>(&self, turn: fn(Table) -> T) -> Pin<Box<dyn Stream<Item = T> + Send>>
    where
        T: 'static,
    {
        Box::pin(Watch {
            next: Box::pin(next(self.clone(), u64::MAX)),
            turn,
        })
    }

    pub(crate) fn read(&self) -> Table {
        self.0
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn get(&self, key: &str) -> Option<Row> {
        self.read().rows.get(key).cloned()
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

/// A blocking query: answers once the index is another than the one seen.
async fn next(store: Store, seen: u64) -> (Store, Table) {
    let mut index = store.0.1.subscribe();
    index.wait_for(|index| *index != seen).await.ok();
    let table = store.read();
    (store, table)
}

struct Watch<T> {
    next: Pin<Box<dyn Future<Output = (Store, Table)> + Send>>,
    turn: fn(Table) -> T,
}

impl<T> Stream for Watch<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let turn = self.turn;
        self.next.as_mut().poll(cx).map(|(store, table)| {
            self.next = Box::pin(next(store, table.index));
            Some(turn(table))
        })
    }
}
