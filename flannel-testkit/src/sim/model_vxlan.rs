//! What VXLAN should make of a node and its peers, said a second time.

use std::collections::BTreeSet;

use flannel_core::{
    Address, BackendData, BackendType, Family, Fdb, IfName, Link, LinkKind, MacAddr, Neighbour,
    NetworkConfig, Object, Objects, OverlayName, Sysctl, Vxlan,
};

use super::model::{Expected, Hop, Me, Model, Usable, mac};

/// The model of flannel's VXLAN: a device of each family; to each peer a route through its subnet's
/// first address, which is a neighbour with the peer's MAC, which is forwarded to the peer's public
/// address. With `DirectRouting`, peers on the same link are routed without the tunnel.
#[derive(Debug, Clone, Copy, Default)]
pub struct VxlanModel;

/// The backend's keys of a network config.
struct Keys {
    vni: u32,
    port: u16,
    mtu: Option<u32>,
    direct: bool,
    learning: bool,
}

impl Keys {
    fn of(config: &NetworkConfig) -> Self {
        let number = |key| config.backend().u32(key, 0, 0..=u32::MAX).unwrap_or(0);
        let switch = |key| config.backend().bool(key, false).unwrap_or(false);
        Self {
            vni: number("VNI").max(1),
            port: match number("Port") {
                0 => 8472,
                port => u16::try_from(port).unwrap_or(8472),
            },
            mtu: Some(number("MTU")).filter(|mtu| *mtu > 0),
            direct: switch("DirectRouting"),
            learning: switch("Learning"),
        }
    }

    fn device(&self, family: Family) -> IfName {
        let prefix = match family {
            Family::V4 => "flannel",
            Family::V6 => "flannel-v6",
        };
        IfName::new(format!("{prefix}.{}", self.vni)).expect("a VNI of few digits")
    }
}

/// VNI and MAC of a record's backend data, if they can be read.
fn read(data: Option<&BackendData>) -> Option<(u32, MacAddr)> {
    let value: serde_json::Value = serde_json::from_str(data?.as_json()).ok()?;
    let vni = value.get("VNI").map_or(Some(0), |vni| {
        vni.as_u64().and_then(|vni| u32::try_from(vni).ok())
    })?;
    Some((vni, mac(value.get("VtepMAC")?.as_str()?)?))
}

fn write(vni: u32, mac: MacAddr) -> Option<BackendData> {
    BackendData::from_json(&format!(r#"{{"VNI":{vni},"VtepMAC":"{mac}"}}"#)).ok()
}

/// The overlay's default name, which the simulator's nodes have.
fn alias() -> String {
    OverlayName::default().link_alias()
}

impl Model for VxlanModel {
    fn backend_type(&self, _: &NetworkConfig) -> BackendType {
        BackendType::vxlan()
    }

    fn reaches(&self, _: &NetworkConfig) -> Vec<BackendType> {
        vec![BackendType::host_gw(), BackendType::udp()]
    }

    fn expect(&self, me: &Me<'_>, peers: &[Usable<'_>]) -> Expected {
        let keys = Keys::of(me.config);
        let mut expected = Expected::default();
        let mut objects = Objects::new();
        let mut own_macs = Vec::new();
        for family in me.config.families() {
            let dev = keys.device(family);
            let published = read(me.lease.attrs.backend_data.get(family)).map(|(_, mac)| mac);
            own_macs.extend(published);
            let overhead = if family == Family::V4 { 50 } else { 70 };
            add(
                &mut objects,
                Object::Link(Link {
                    name: dev,
                    kind: LinkKind::Vxlan(Vxlan {
                        vni: keys.vni,
                        port: keys.port,
                        underlay: Some(me.external),
                        local: me.public_ip.ip(family),
                        learning: keys.learning,
                        gbp: false,
                    }),
                    mtu: Some(keys.mtu.map_or(me.mtu, |mtu| mtu.min(me.mtu)) - overhead),
                    mac: published,
                    up: true,
                    alias: Some(alias()),
                }),
            );
            let settings = match family {
                Family::V4 => &["accept_ra"][..],
                Family::V6 => &["accept_ra", "disable_ipv6"],
            };
            for name in settings {
                add(
                    &mut objects,
                    Object::Sysctl(Sysctl {
                        dev,
                        family: Family::V6,
                        name: (*name).to_owned(),
                        value: "0".to_owned(),
                    }),
                );
            }
            if let Some(subnet) = me.lease.subnet.get(family) {
                let ip = subnet.address();
                let prefix_len = family.bits();
                add(
                    &mut objects,
                    Object::Address(Address {
                        dev,
                        ip,
                        prefix_len,
                    }),
                );
            }
        }
        let mut taken: BTreeSet<String> = BTreeSet::new();
        for peer in peers {
            let Usable {
                lease,
                family,
                subnet,
            } = *peer;
            let dev = keys.device(family);
            let remote = lease.attrs.public_ip(family);
            // Who runs host-gw has no end of a tunnel, who runs UDP one of another kind.
            let udp = lease.attrs.is_backend(&BackendType::udp());
            if udp {
                expected.may_stay.insert(BackendType::udp());
            }
            let host_gw = udp || lease.attrs.is_backend(&BackendType::host_gw());
            let on_link = remote.and_then(|ip| Some((ip, me.on_link(ip)?)));
            let direct = on_link.filter(|_| keys.direct || host_gw);
            if host_gw && direct.is_none() {
                expected.rejected.insert(lease.key.clone());
                continue;
            }
            if let Some((gateway, dev)) = direct {
                if taken.insert(format!("next node {gateway}")) {
                    expected.routes.insert(subnet, Some(Hop { dev, gateway }));
                } else {
                    expected.rejected.insert(lease.key.clone());
                }
                continue;
            }
            let data = read(lease.attrs.backend_data.get(family))
                .filter(|(vni, mac)| *vni == keys.vni && !own_macs.contains(mac));
            let (Some((_, mac)), Some(remote)) = (data, remote) else {
                expected.rejected.insert(lease.key.clone());
                continue;
            };
            if !taken.insert(format!("{mac} on {dev}")) {
                expected.rejected.insert(lease.key.clone());
                continue;
            }
            let gateway = subnet.address();
            add(&mut objects, Object::Fdb(Fdb { dev, mac, remote }));
            add(
                &mut objects,
                Object::Neighbour(Neighbour {
                    dev,
                    ip: gateway,
                    mac,
                }),
            );
            expected.routes.insert(subnet, Some(Hop { dev, gateway }));
        }
        expected.objects = Some(objects);
        expected
    }

    fn fault_of_own(&self, me: &Me<'_>) -> Option<String> {
        let keys = Keys::of(me.config);
        let attrs = &me.lease.attrs;
        if !attrs.is_backend(&BackendType::vxlan()) {
            return Some("it is not of type vxlan".to_owned());
        }
        me.config.families().find_map(|family| {
            let of_address = me.fault_of_address(family);
            of_address.or_else(|| match read(attrs.backend_data.get(family)) {
                Some((vni, _)) if vni == keys.vni => None,
                found => Some(format!("its {family} data is {found:?}")),
            })
        })
    }

    fn data(&self, config: &NetworkConfig, number: u64) -> Option<BackendData> {
        write(
            Keys::of(config).vni,
            MacAddr::local(0x50_0000_0000_0000 | number << 16),
        )
    }

    fn wrong_data(&self, config: &NetworkConfig, number: u64) -> Option<BackendData> {
        let vni = Keys::of(config).vni;
        let texts = [
            r#"{"VNI":1}"#.to_owned(),
            r#""VtepMAC""#.to_owned(),
            r#"{"VNI":"1","VtepMAC":"02:00:00:00:00:01"}"#.to_owned(),
            r#"{"VNI":1,"VtepMAC":"02:00:00:00:00"}"#.to_owned(),
            format!(r#"{{"VNI":{vni},"VtepMAC":"01:00:5e:00:00:01"}}"#),
            format!(r#"{{"VNI":{vni},"VtepMAC":"00:00:00:00:00:00"}}"#),
            format!(r#"{{"VNI":{},"VtepMAC":"02:00:00:00:00:07"}}"#, vni + 1),
            "[".repeat(100) + &"]".repeat(100),
            format!(
                r#"{{"VNI":{vni},"padding":"{}"}}"#,
                "x".repeat(BackendData::MAX_LEN - 64)
            ),
        ];
        let at = usize::try_from(number).unwrap_or_default() % texts.len();
        BackendData::from_json(&texts[at]).ok()
    }
}

fn add(objects: &mut Objects, object: Object) {
    objects.insert(object.key(), object);
}
