//! A node of VXLAN without a peer, as several benchmarks need it.
#![allow(dead_code, unreachable_pub, reason = "shared by several benchmarks")]

use std::sync::Arc;

use flannel_backend_vxlan::VxlanBackend;
use flannel_core::reconcile::desired::Compiler;
use flannel_core::{
    Backend, DualStack, Lease, LeaseSet, NetworkConfig, OverlayName, Own, RouteProtocol, Subnet,
    WithdrawalGuard,
};
use flannel_testkit::conformance::backend::NodeFixture;

/// The network of the benchmarks.
pub const CONFIG: &str = r#"{"Network":"10.0.0.0/8","SubnetLen":28,"Backend":{"Type":"vxlan"}}"#;

/// A node whose network is there.
pub struct Node {
    pub config: NetworkConfig,
    pub own: Lease,
    pub set: LeaseSet,
    pub compiler: Compiler,
}

/// A node that holds a subnet.
pub fn node(subnet: Subnet) -> Node {
    let fixture = NodeFixture::new(CONFIG).expect("a valid config");
    let backend = VxlanBackend::new();
    let cx = fixture.cx();
    let mut own = fixture.lease(backend.attrs(&cx).expect("attributes"));
    own.subnet = DualStack::v4(subnet);
    own.created.0 = 1_000_000;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let network = runtime
        .block_on(backend.register_network(&cx, own.clone()))
        .expect("a network");
    let mut set = LeaseSet::new(WithdrawalGuard::default());
    set.set_backends(backend.backend_type(), backend.reaches());
    set.set_pools(*fixture.config.pools());
    set.set_own(Own {
        node: own.node.clone(),
        key: Some(own.key.clone()),
        subnets: own.subnet,
        public_ip: own.attrs.public_ip,
    });
    let mut compiler = Compiler::new(OverlayName::default(), RouteProtocol::OURS);
    compiler.set_network(Arc::clone(&network), &set);
    Node {
        config: fixture.config.clone(),
        own,
        set,
        compiler,
    }
}
