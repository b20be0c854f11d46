//! What the UDP backend should make of a node and its peers, said a second time.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use flannel_core::{
    Address, BackendData, BackendType, DualStack, Family, IfName, Link, LinkKind, NetworkConfig,
    Object, Objects, OverlayName, Sysctl, Tun, Tunnel, TunnelPeer,
};

use super::model::{Expected, Hop, Me, Model, Usable};

/// The model of flannel's UDP backend: one TUN device, a packet path on it, and of each peer an
/// endpoint at the port of the config and a route. Peers of host-gw and VXLAN are routed directly.
#[derive(Debug, Clone, Copy, Default)]
pub struct UdpModel;

fn number(config: &NetworkConfig, key: &str) -> Option<u32> {
    let number = config.backend().u32(key, 0, 0..=u32::MAX).unwrap_or(0);
    (number > 0).then_some(number)
}

fn port(config: &NetworkConfig) -> u16 {
    let port = number(config, "Port").and_then(|port| u16::try_from(port).ok());
    port.unwrap_or(8285)
}

impl Model for UdpModel {
    fn backend_type(&self, _: &NetworkConfig) -> BackendType {
        BackendType::udp()
    }

    fn reaches(&self, _: &NetworkConfig) -> Vec<BackendType> {
        vec![BackendType::host_gw(), BackendType::vxlan()]
    }

    fn expect(&self, me: &Me<'_>, peers: &[Usable<'_>]) -> Expected {
        let dev = IfName::new("flannel0").expect("a device name");
        let outer = number(me.config, "MTU").map_or(me.mtu, |mtu| mtu.min(me.mtu));
        let mut tunnel = Tunnel {
            dev,
            listen: DualStack::default(),
            own: DualStack::default(),
            mtu: DualStack::default(),
        };
        let mut objects = Objects::new();
        let mut add = |object: Object| objects.insert(object.key(), object);
        let mut least = u32::MAX;
        for family in me.config.families() {
            let mtu = outer - if family == Family::V4 { 28 } else { 48 };
            least = least.min(mtu);
            tunnel.mtu.set(family, Some(mtu));
            let local = me.public_ip.ip(family);
            let listen = local.map(|ip| SocketAddr::new(ip, port(me.config)));
            tunnel.listen.set(family, listen);
            if let Some(subnet) = me.lease.subnet.get(family) {
                tunnel.own.set(family, Some(*subnet));
                add(Object::Address(Address {
                    dev,
                    ip: subnet.address(),
                    prefix_len: family.bits(),
                }));
            }
        }
        add(Object::Link(Link {
            name: dev,
            kind: LinkKind::Tun(Tun {
                persistent: true,
                multi_queue: true,
                vnet_header: true,
                queue: Some(5_000),
            }),
            mtu: Some(least),
            mac: None,
            up: true,
            alias: Some(OverlayName::default().link_alias()),
        }));
        for name in ["accept_ra", "disable_ipv6"] {
            add(Object::Sysctl(Sysctl {
                dev,
                family: Family::V6,
                name: name.to_owned(),
                value: "0".to_owned(),
            }));
        }
        add(Object::Tunnel(Box::new(tunnel)));
        let mut expected = Expected::default();
        let mut taken: BTreeSet<IpAddr> = BTreeSet::new();
        for peer in peers {
            let Some(gateway) = peer.lease.attrs.public_ip(peer.family) else {
                continue;
            };
            if peer.lease.attrs.is_backend(&BackendType::vxlan()) {
                expected.may_stay.insert(BackendType::vxlan());
            }
            // Who runs another backend is reached without a tunnel or not at all.
            if !peer.lease.attrs.is_backend(&BackendType::udp()) {
                let on_link = me.on_link(gateway);
                if let Some(dev) = on_link.filter(|_| taken.insert(gateway)) {
                    let hop = Some(Hop { dev, gateway });
                    expected.routes.insert(peer.subnet, hop);
                } else {
                    expected.rejected.insert(peer.lease.key.clone());
                    continue;
                }
            } else {
                let hop = Some(Hop { dev, gateway });
                expected.routes.insert(peer.subnet, hop);
            }
            // Of everybody, because who changes to this backend sends before it is heard of.
            add(Object::TunnelPeer(TunnelPeer {
                dev,
                subnet: peer.subnet,
                endpoint: SocketAddr::new(gateway, port(me.config)),
            }));
        }
        expected.objects = Some(objects);
        expected
    }

    fn fault_of_own(&self, me: &Me<'_>) -> Option<String> {
        let attrs = &me.lease.attrs;
        if attrs.backend_type.is_some() || !attrs.backend_data.is_empty() {
            return Some("it has a type or data, as none of flannel's has".to_owned());
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
