//! A tokio runtime without timers is an error of the call, not a panic.
#![allow(missing_docs, reason = "tests")]

use flannel_subnet_kube::{Access, AnnotationPrefix, ConfigSource, KubeManager, KubeOptions};
use flannel_testkit::conformance::manager::assert_timers_are_asked_for;

#[test]
fn a_runtime_without_timers_is_an_error_of_every_call() {
    let access = Access::kubeconfig("/nowhere/kubeconfig", None);
    let config = ConfigSource::file("/nowhere/net-conf.json");
    let options = KubeOptions::new(access, config, AnnotationPrefix::default());
    let manager = KubeManager::new(options).expect("options that fit");
    assert_timers_are_asked_for(&manager);
}
