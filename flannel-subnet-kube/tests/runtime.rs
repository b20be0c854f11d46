//! A tokio runtime without timers is an error of the call, not a panic.
#![allow(missing_docs, reason = "tests")]

use flannel_core::manager::Error;
use flannel_core::{
    DualStack, Lease, LeaseAttrs, LeaseKey, LeaseRequest, Manager, NodeId, Revision,
};
use flannel_subnet_kube::{Access, AnnotationPrefix, ConfigSource, KubeManager, KubeOptions};

fn manager() -> KubeManager {
    let access = Access::kubeconfig("/nowhere/kubeconfig", None);
    let config = ConfigSource::file("/nowhere/net-conf.json");
    let options = KubeOptions::new(access, config, AnnotationPrefix::default());
    KubeManager::new(options).expect("options that fit")
}

#[test]
fn a_runtime_without_timers_is_an_error_of_every_call() {
    let manager = manager();
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.build().expect("a runtime");
    let node = NodeId::new("a").expect("a node id");
    let request = LeaseRequest::new(node.clone(), LeaseAttrs::default());
    let lease = Lease {
        key: LeaseKey::new("a"),
        node,
        instance: None,
        subnet: DualStack::default(),
        attrs: LeaseAttrs::default(),
        ttl: None,
        created: Revision(1),
        revision: Revision(1),
    };
    let errors = [
        runtime.block_on(manager.network_config()).err(),
        runtime.block_on(manager.acquire_lease(&request)).err(),
        runtime.block_on(manager.renew_lease(&lease)).err(),
        runtime.block_on(manager.release_lease(&lease)).err(),
    ];
    for error in errors {
        let error = error.expect("it has no timers");
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        assert!(error.to_string().contains("enable_time"), "{error}");
    }
}
