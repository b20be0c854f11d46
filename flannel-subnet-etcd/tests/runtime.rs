//! A tokio runtime without timers is an error of the call, not a panic.
#![allow(missing_docs, reason = "tests")]

use flannel_subnet_etcd::{EtcdManager, EtcdOptions};
use flannel_testkit::conformance::manager::assert_timers_are_asked_for;

#[test]
fn a_runtime_without_timers_is_an_error_of_every_call() {
    let options = EtcdOptions::new(["http://127.0.0.1:9"]).expect("a URL");
    let manager = EtcdManager::new(options).expect("options that fit");
    assert_timers_are_asked_for(&manager);
}
