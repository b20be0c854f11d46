//! [`VxlanNetwork`]: from leases to kernel objects.

use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::{
    Address, BackendType, DualStack, Family, Fdb, Gateways, Hop, IfName, Lease, Link, LinkKind,
    MacAddr, Neighbour, Network, Note, Object, Offload, OverlayName, Rejection, Subnet, Sysctl,
    Underlay, Vxlan, mtu, no_public_ip,
};

use crate::config::VxlanConfig;
use crate::data::VxlanData;

/// The overlay device of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) name: IfName,
    pub(crate) mac: MacAddr,
    pub(crate) local: IpAddr,
    pub(crate) mtu: u32,
}

/// The network of one lease over VXLAN.
#[derive(Debug)]
pub(crate) struct VxlanNetwork {
    pub(crate) overlay: OverlayName,
    pub(crate) config: VxlanConfig,
    /// The device that outer packets leave through; `None`: any of several.
    pub(crate) external: Option<IfName>,
    pub(crate) underlay: Arc<Underlay>,
    pub(crate) devices: DualStack<Device>,
    pub(crate) checksums: Option<bool>,
    pub(crate) lacks: DualStack<String>,
    /// IPv6 settings of a device can be set.
    pub(crate) may_set: bool,
    pub(crate) gateways: Gateways,
    pub(crate) notes: Vec<Note>,
    pub(crate) lease: Lease,
}

impl VxlanNetwork {
    fn peer_family(
        &self,
        peer: &Lease,
        family: Family,
        subnet: Subnet,
    ) -> Result<Vec<Object>, Rejection> {
        let device = self.devices.get(family).ok_or(Rejection::NoSubnet)?;
        let is = |backend| peer.attrs.is_backend(&backend);
        if is(BackendType::host_gw()) || is(BackendType::udp()) {
            let public_ip = peer.attrs.public_ip(family);
            return self.gateways.direct(&self.underlay, subnet, public_ip);
        }
        let remote = peer
            .attrs
            .public_ip(family)
            .ok_or_else(|| no_public_ip(family))?;
        if self.config.direct_routing
            && let Ok(objects) = self.gateways.direct(&self.underlay, subnet, Some(remote))
        {
            return Ok(objects);
        }
        let data = peer
            .attrs
            .backend_data
            .get(family)
            .ok_or_else(|| Rejection::BackendData {
                reason: format!("there is none for {family}"),
            })?;
        let data = VxlanData::decode(data)?;
        if data.vni != self.config.vni {
            return Err(Rejection::BackendData {
                reason: format!("its VNI is {}, ours is {}", data.vni, self.config.vni),
            });
        }
        let (dev, gateway) = (device.name, subnet.address());
        let mut objects = vec![
            Object::Fdb(Fdb {
                dev,
                mac: data.vtep_mac,
                remote,
            }),
            Object::Neighbour(Neighbour {
                dev,
                ip: gateway,
                mac: data.vtep_mac,
            }),
        ];
        let hop = Hop {
            gateway,
            dev,
            onlink: true,
        };
        objects.extend(self.gateways.route(subnet, hop));
        Ok(objects)
    }
}

#[async_trait]
impl Network for VxlanNetwork {
    fn lease(&self) -> &Lease {
        &self.lease
    }

    fn mtu(&self) -> u32 {
        // Containers have one interface for both families: the tighter tunnel decides.
        self.devices
            .values()
            .map(|device| device.mtu)
            .min()
            .unwrap_or_default()
    }

    fn local(&self) -> Vec<Object> {
        let mut objects = Vec::new();
        for (family, device) in self.devices.iter() {
            let dev = device.name;
            objects.push(Object::Link(Link {
                name: dev,
                kind: LinkKind::Vxlan(Vxlan {
                    vni: self.config.vni,
                    port: self.config.port,
                    underlay: self.external,
                    local: Some(device.local),
                    learning: self.config.learning,
                    gbp: self.config.gbp,
                }),
                mtu: Some(device.mtu),
                mac: Some(device.mac),
                up: true,
                alias: Some(self.overlay.link_alias()),
            }));
            // A device whose packets are smaller has no IPv6.
            if self.may_set && device.mtu >= mtu::MIN_IPV6 {
                objects.push(Object::Sysctl(Sysctl::no_router_advertisements(dev)));
                if family == Family::V6 {
                    objects.push(Object::Sysctl(Sysctl::with_ipv6(dev)));
                }
            }
            if let Some(on) = self.checksums {
                let feature = "tx-checksum-ip-generic".to_owned();
                objects.push(Object::Offload(Offload { dev, feature, on }));
            }
            if let Some(subnet) = self.lease.subnet.get(family) {
                objects.push(Object::Address(Address::of_tunnel(dev, *subnet)));
            }
        }
        objects
    }

    fn peer(
        &self,
        peer: &Lease,
        subnets: &DualStack<Subnet>,
    ) -> DualStack<Result<Vec<Object>, Rejection>> {
        subnets.map(|family, subnet| self.peer_family(peer, family, *subnet))
    }

    fn notes(&self) -> Vec<Note> {
        self.notes.clone()
    }

    fn lacks(&self) -> DualStack<String> {
        self.lacks.clone()
    }
}
