//! A manager whose calls have deadlines, on a tokio runtime without timers.

use flannel_core::manager::Error;
use flannel_core::{
    DualStack, Lease, LeaseAttrs, LeaseKey, LeaseRequest, Manager, NodeId, Revision,
};

/// Asserts that each call of a manager whose calls have deadlines is an error that names the remedy,
/// and no panic, on a tokio runtime without timers. For a `#[test]` without a runtime.
///
/// # Panics
/// If a call does something else.
pub fn assert_timers_are_asked_for(manager: &dyn Manager) {
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
