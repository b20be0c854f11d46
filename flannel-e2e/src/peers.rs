//! Records as other hosts would write them, and small values.

use std::net::{IpAddr, Ipv4Addr};

use flannel_backend_vxlan::VxlanData;
use flannel_core::{
    BackendType, DualStack, IfName, Lease, LeaseAttrs, LeaseKey, MAIN_TABLE, MacAddr,
    NetworkConfig, NodeId, ObjectKey, PoolMode, PublicIp, Revision, Route, Subnet,
};

/// A network config.
pub fn config(text: &str) -> NetworkConfig {
    NetworkConfig::from_json(text, PoolMode::Allocated).expect("a valid config")
}

/// A device name.
pub fn dev(name: &str) -> IfName {
    IfName::new(name).expect("a device name")
}

/// The key of the route to a subnet.
pub const fn route_key(dst: Subnet) -> ObjectKey {
    ObjectKey::Route {
        table: MAIN_TABLE,
        dst,
        metric: Route::default_metric(dst.family()),
    }
}

/// Numbered IPv4 peers that exist in the store alone: `/24` subnets from `first` on, public
/// addresses from 172.16.0.1 on.
#[derive(Debug, Clone, Copy)]
pub struct Peers {
    /// The first address of the first peer's subnet.
    pub first: Ipv4Addr,
    /// The VXLAN network identifier they publish.
    pub vni: u32,
}

impl Peers {
    /// The subnet of a peer.
    pub fn subnet(&self, n: u32) -> Subnet {
        Subnet::new(Ipv4Addr::from(u32::from(self.first) + (n << 8)), 24).expect("24 bits")
    }

    /// The VTEP MAC of a peer.
    pub fn mac(&self, n: u32) -> MacAddr {
        let [a, b, c, d] = n.to_be_bytes();
        MacAddr([0x0e, 0x77, a, b, c, d])
    }

    /// The record of a peer.
    pub fn lease(&self, n: u32) -> Lease {
        let data = VxlanData {
            vni: self.vni,
            vtep_mac: self.mac(n),
        };
        let subnet = self.subnet(n);
        Lease {
            key: LeaseKey::new(format!("{}-{}", subnet.address(), subnet.len())),
            node: NodeId::new(format!("peer-{n}")).expect("a node id"),
            instance: None,
            subnet: DualStack::v4(subnet),
            attrs: LeaseAttrs {
                public_ip: PublicIp::v4(Ipv4Addr::from(0xac10_0001 + n)),
                backend_type: Some(BackendType::vxlan()),
                backend_data: DualStack::v4(data.encode().expect("it is short")),
            },
            ttl: None,
            created: Revision(0),
            revision: Revision(0),
        }
    }

    /// The record of a peer that runs host-gw.
    pub fn gw_lease(&self, n: u32) -> Lease {
        let mut lease = self.lease(n);
        lease.attrs.backend_type = Some(BackendType::host_gw());
        lease.attrs.backend_data = DualStack::default();
        lease
    }

    /// Puts a node on a link with all of them: an address, with its length, in their network.
    pub const fn link() -> (IpAddr, u8) {
        (IpAddr::V4(Ipv4Addr::new(172, 31, 255, 254)), 12)
    }
}
