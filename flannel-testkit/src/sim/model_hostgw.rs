//! What host-gw should make of a node and its peers, said a second time; and a cluster that changes
//! between host-gw, VXLAN and UDP.

use std::collections::BTreeSet;
use std::net::IpAddr;

use flannel_core::{BackendData, BackendType, NetworkConfig, Objects};

use super::model::{Expected, Hop, Me, Model, UdpModel, Usable, VxlanModel};

/// The model of flannel's host-gw: a route to each peer's public address, if that is on a
/// link, and nothing else. Peers of VXLAN and of UDP are reached in the same way,
/// and while there are any, what their backend once made may stay.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostGwModel;

impl Model for HostGwModel {
    fn backend_type(&self, _: &NetworkConfig) -> BackendType {
        BackendType::host_gw()
    }

    fn reaches(&self, _: &NetworkConfig) -> Vec<BackendType> {
        vec![BackendType::vxlan(), BackendType::udp()]
    }

    fn expect(&self, me: &Me<'_>, peers: &[Usable<'_>]) -> Expected {
        let mut expected = Expected {
            objects: Some(Objects::new()),
            ..Expected::default()
        };
        let mut taken: BTreeSet<IpAddr> = BTreeSet::new();
        for peer in peers {
            for other in [BackendType::vxlan(), BackendType::udp()] {
                if peer.lease.attrs.is_backend(&other) {
                    expected.may_stay.insert(other);
                }
            }
            let remote = peer.lease.attrs.public_ip(peer.family);
            let on_link = remote.and_then(|ip| Some((ip, me.on_link(ip)?)));
            match on_link.filter(|(ip, _)| taken.insert(*ip)) {
                Some((gateway, dev)) => {
                    let hop = Some(Hop { dev, gateway });
                    expected.routes.insert(peer.subnet, hop);
                }
                None => {
                    expected.rejected.insert(peer.lease.key.clone());
                }
            }
        }
        expected
    }

    fn fault_of_own(&self, me: &Me<'_>) -> Option<String> {
        let attrs = &me.lease.attrs;
        if !attrs.is_backend(&BackendType::host_gw()) {
            return Some("it is not of type host-gw".to_owned());
        }
        if !attrs.backend_data.is_empty() {
            return Some("it has backend data".to_owned());
        }
        me.config
            .families()
            .find_map(|family| me.fault_of_address(family))
    }

    fn data(&self, _: &NetworkConfig, _: u64) -> Option<BackendData> {
        None
    }

    fn wrong_data(&self, _: &NetworkConfig, _: u64) -> Option<BackendData> {
        None
    }
}

/// The model of nodes that have all backends, of which the config names one.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChangingModel;

impl ChangingModel {
    fn of(config: &NetworkConfig) -> &'static dyn Model {
        match config.backend().backend_type().as_str() {
            "host-gw" => &HostGwModel,
            "udp" => &UdpModel,
            _ => &VxlanModel,
        }
    }
}

impl Model for ChangingModel {
    fn backend_type(&self, config: &NetworkConfig) -> BackendType {
        Self::of(config).backend_type(config)
    }

    fn reaches(&self, config: &NetworkConfig) -> Vec<BackendType> {
        Self::of(config).reaches(config)
    }

    fn expect(&self, me: &Me<'_>, peers: &[Usable<'_>]) -> Expected {
        Self::of(me.config).expect(me, peers)
    }

    fn fault_of_own(&self, me: &Me<'_>) -> Option<String> {
        Self::of(me.config).fault_of_own(me)
    }

    fn data(&self, config: &NetworkConfig, number: u64) -> Option<BackendData> {
        Self::of(config).data(config, number)
    }

    fn wrong_data(&self, config: &NetworkConfig, number: u64) -> Option<BackendData> {
        Self::of(config).wrong_data(config, number)
    }
}
