//! Flannel's subnet manager on a revisioned key-value store such as etcd v3: everything but the
//! store's client.
//!
//! [`KvManager`] implements [`flannel_core::Manager`] in flannel's own layout ([`Layout`]) on
//! whatever implements [`Store`]: `flannel-subnet-etcd` brings a client of etcd,
//! `flannel-testkit` a fake store on which everything can go wrong. What a node writes to hold a
//! lease is decided by a pure function, [`decide`].
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod ask;
mod decide;
mod former;
mod layout;
mod list_watch;
mod manager;
mod paging;
mod standing;
mod store;
mod txn;

pub use ask::{Answers, Question};
pub use decide::{Decision, View, decide};
pub use layout::Layout;
pub use manager::{KvManager, KvOptions};
pub use store::{
    KeyEvent, KeyRange, KeyValue, LeaseId, Page, PageAnswer, RangeAnswer, Store, StoreError,
    StoreResult, StoreWatch, WatchAnswer,
};
pub use txn::{Compare, Expectation, Op, OpAnswer, Txn, TxnAnswer};
