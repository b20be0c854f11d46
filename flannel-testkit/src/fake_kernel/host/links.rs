//! Devices: what can be made and changed of them, and what goes with them.

use std::net::{IpAddr, Ipv6Addr};

use flannel_core::kernel::{Error, Result};
use flannel_core::{
    Address, Change, Family, IfName, Link, LinkKind, MacAddr, Object, ObjectKey, Tun, Vxlan,
};

use super::{Host, no_device, rejected};

impl Host {
    pub(super) fn create_link(&mut self, link: &Link, any_kind: bool) -> Result<()> {
        match &link.kind {
            LinkKind::Vxlan(vxlan) => {
                if let Some(dev) = vxlan.underlay {
                    self.need_device(dev)?;
                }
                if vxlan.vni >= 1 << 24 || vxlan.port == 0 {
                    return Err(rejected("VNI or port out of range", link.name));
                }
                self.check_vxlan_free(link.name, vxlan)?;
            }
            LinkKind::Bridge => {}
            LinkKind::Tun(_) if link.mac.is_none() => {}
            LinkKind::Veth { peer } => {
                if peer.is_some_and(|peer| peer == link.name || self.link(peer).is_some()) {
                    return Err(Error::Exists {
                        message: "the name of the other end is taken".to_owned(),
                    });
                }
            }
            _ if any_kind => {}
            other => {
                return Err(Error::Unsupported {
                    what: format!("making a device of kind {other:?}"),
                });
            }
        }
        if !link.mtu.is_none_or(|mtu| fits(mtu, &link.kind)) {
            return Err(rejected("MTU out of range", link.name));
        }
        // Linux cuts it without a word; the kernel crate then unmakes the device and says so.
        if !any_kind && self.lacks_room(link.mtu, &link.kind) {
            return Err(rejected("the MTU does not fit the underlay's", link.name));
        }
        if link.mac.is_some_and(|mac| !mac.is_unicast()) {
            return Err(rejected("no unicast hardware address", link.name));
        }
        if link.up {
            self.check_socket_free(link.name, &link.kind)?;
        }
        if !any_kind && matches!(link.kind, LinkKind::Vxlan(_) | LinkKind::Tun(_)) {
            // The kernel crate switches this off, others do not.
            self.without_own_address.insert(link.name);
        }
        self.add_link(link);
        if let LinkKind::Veth { peer: Some(peer) } = link.kind {
            self.add_link(&Link {
                name: peer,
                kind: LinkKind::Veth {
                    peer: Some(link.name),
                },
                mtu: link.mtu,
                mac: None,
                up: false,
                alias: None,
            });
        }
        Ok(())
    }

    /// Puts a link in that was found fit, and sets it up if that is asked for.
    fn add_link(&mut self, link: &Link) {
        self.made += 1;
        self.indices.insert(link.name, self.made);
        let room = self.room(&link.kind);
        let mac = (!matches!(link.kind, LinkKind::Loopback | LinkKind::Tun(_)))
            .then(|| MacAddr::local(u64::from(self.made) << 16 | 0xfa_0000_0000_0000));
        let kind = match &link.kind {
            LinkKind::Tun(tun) => LinkKind::Tun(Tun {
                queue: tun.queue.or(Some(500)),
                ..*tun
            }),
            kind => kind.clone(),
        };
        let made = Link {
            kind,
            mtu: Some(match (link.mtu, room) {
                (Some(mtu), Some(room)) => mtu.min(room),
                (Some(mtu), None) => mtu,
                (None, room) => room.unwrap_or(1500),
            }),
            mac: link.mac.or(mac),
            up: false,
            ..link.clone()
        };
        self.told.push(Change::Set(Object::Link(made.clone())));
        self.objects
            .insert(ObjectKey::Link(link.name), Object::Link(made));
        self.set_up(link.name, link.up);
    }

    pub(in crate::fake_kernel) fn set_alias(&mut self, dev: IfName, alias: Option<&str>) {
        if let Some(Object::Link(link)) = self.objects.get_mut(&ObjectKey::Link(dev)) {
            link.alias = alias.map(str::to_owned);
            self.told.push(Change::Set(Object::Link(link.clone())));
        }
    }

    /// The largest packet that a VXLAN device has room for in those of its underlay.
    fn room(&self, kind: &LinkKind) -> Option<u32> {
        let LinkKind::Vxlan(vxlan) = kind else {
            return None;
        };
        let overhead = match vxlan_family(vxlan) {
            Family::V4 => 50,
            Family::V6 => 70,
        };
        Some(
            self.link(vxlan.underlay?)?
                .mtu?
                .saturating_sub(overhead)
                .max(68),
        )
    }

    fn lacks_room(&self, mtu: Option<u32>, kind: &LinkKind) -> bool {
        mtu.zip(self.room(kind))
            .is_some_and(|(mtu, room)| mtu > room)
    }

    fn check_vxlan_free(&self, name: IfName, vxlan: &Vxlan) -> Result<()> {
        let taken = self.links().find(|other| {
            other.name != name
                && matches!(&other.kind, LinkKind::Vxlan(v)
                    if v.vni == vxlan.vni
                        && v.port == vxlan.port
                        && v.gbp == vxlan.gbp
                        && vxlan_family(v) == vxlan_family(vxlan))
        });
        match taken {
            Some(other) => Err(Error::Exists {
                message: format!(
                    "A VXLAN device with the specified VNI already exists: {}",
                    other.name
                ),
            }),
            None => Ok(()),
        }
    }

    /// VXLAN devices of one port and family share a socket, which either has group policy or not.
    fn check_socket_free(&self, name: IfName, kind: &LinkKind) -> Result<()> {
        let LinkKind::Vxlan(vxlan) = kind else {
            return Ok(());
        };
        let socket = |vxlan: &Vxlan| (vxlan.port, vxlan_family(vxlan));
        let taken = self.links().find(|other| {
            other.up
                && other.name != name
                && matches!(&other.kind, LinkKind::Vxlan(v)
                    if socket(v) == socket(vxlan) && v.gbp != vxlan.gbp)
        });
        match taken {
            None => Ok(()),
            Some(other) => Err(Error::InUse {
                what: format!("UDP port {}", vxlan.port),
                by: format!("the VXLAN device {}", other.name),
            }),
        }
    }

    pub(super) fn change_link(&mut self, link: &Link) -> Result<()> {
        let Some(found) = self.link(link.name).cloned() else {
            return Err(no_device(link.name));
        };
        let kind = match (&found.kind, &link.kind) {
            (LinkKind::Vxlan(is), LinkKind::Vxlan(asked)) => {
                if let Some(underlay) = asked.underlay {
                    self.need_device(underlay)?;
                }
                let fixed = |vxlan: &Vxlan| {
                    let family = vxlan_family(vxlan);
                    (vxlan.vni, vxlan.port, vxlan.gbp, family)
                };
                let is_freed = is.underlay.is_some() && asked.underlay.is_none();
                if fixed(is) != fixed(asked) || is_freed {
                    return Err(Error::Unsupported {
                        what: "changing VNI, port, GBP or family of a VXLAN device, or its \
                               underlay to none"
                            .to_owned(),
                    });
                }
                link.kind.clone()
            }
            (LinkKind::Veth { .. }, LinkKind::Veth { .. }) => found.kind.clone(),
            (LinkKind::Tun(is), LinkKind::Tun(asked)) if is.is_like(*asked) => LinkKind::Tun(Tun {
                queue: asked.queue.or(is.queue),
                ..*is
            }),
            (is, asked) if is == asked => found.kind.clone(),
            _ => {
                return Err(Error::Unsupported {
                    what: "changing the kind of a device".to_owned(),
                });
            }
        };
        if let Some(mtu) = link.mtu.filter(|mtu| Some(*mtu) != found.mtu)
            && (!fits(mtu, &kind) || self.lacks_room(Some(mtu), &kind))
        {
            return Err(rejected("MTU out of range", link.name));
        }
        if link.mac.is_some_and(|mac| !mac.is_unicast()) {
            return Err(rejected("no unicast hardware address", link.name));
        }
        if link.up && !found.up {
            self.check_socket_free(link.name, &kind)?;
        }
        if matches!(kind, LinkKind::Tun(_)) && link.mac.is_some() {
            return Err(Error::Unsupported {
                what: "a hardware address of a TUN device".to_owned(),
            });
        }
        let new_mac = link.mac.is_some_and(|mac| Some(mac) != found.mac);
        let changed = Link {
            kind,
            mtu: link.mtu.or(found.mtu),
            mac: link.mac.or(found.mac),
            alias: link.alias.clone().or(found.alias),
            ..found
        };
        self.told.push(Change::Set(Object::Link(changed.clone())));
        self.objects
            .insert(ObjectKey::Link(link.name), Object::Link(changed));
        if new_mac {
            self.drop_neighbours(link.name, None);
        }
        self.set_up(link.name, link.up);
        Ok(())
    }

    /// Sets a device up or down with what follows from it.
    pub(in crate::fake_kernel) fn set_up(&mut self, dev: IfName, up: bool) {
        let Some(link) = self.link(dev) else {
            return;
        };
        if link.up == up {
            return;
        }
        let (mac, kind) = (link.mac, link.kind.clone());
        if up && self.check_socket_free(dev, &kind).is_err() {
            return;
        }
        if let Some(Object::Link(link)) = self.objects.get_mut(&ObjectKey::Link(dev)) {
            link.up = up;
            let told = if up {
                Change::Set(Object::Link(link.clone()))
            } else {
                Change::Link(Some(dev))
            };
            self.told.push(told);
        }
        if !up {
            self.drop_paths(dev);
            self.drop_neighbours(dev, None);
            let lost: Vec<_> = self
                .addresses_of(dev)
                .filter(|address| address.ip.is_ipv6())
                .map(|address| Object::Address(address.clone()).key())
                .collect();
            for key in lost {
                self.objects.remove(&key);
                self.told.push(Change::Address(Some(dev)));
            }
            return;
        }
        let gives_itself_one = kind != LinkKind::Loopback && self.has_own_address(dev);
        if let Some(mac) = mac.filter(|_| gives_itself_one) {
            let address = Object::Address(Address {
                dev,
                ip: link_local(mac),
                prefix_len: 64,
            });
            self.tell_set(&address);
            self.objects.insert(address.key(), address);
        }
        for address in self.addresses_of(dev).cloned().collect::<Vec<_>>() {
            self.connect(&address);
        }
    }

    /// Deletes a device with all on it, and the devices bound to it.
    pub(in crate::fake_kernel) fn delete_link(&mut self, dev: IfName) {
        let mut going = vec![dev];
        while let Some(dev) = going.pop() {
            let Some(Object::Link(link)) = self.objects.remove(&ObjectKey::Link(dev)) else {
                continue;
            };
            self.indices.remove(&dev);
            self.without_own_address.remove(&dev);
            self.masters
                .retain(|port, master| *port != dev && *master != dev);
            self.told.push(Change::Link(Some(dev)));
            if let LinkKind::Veth { peer: Some(peer) } = link.kind {
                going.push(peer);
            }
            going.extend(
                self.links()
                    .filter(|other| {
                        matches!(&other.kind, LinkKind::Vxlan(v) if v.underlay == Some(dev))
                    })
                    .map(|other| other.name),
            );
            self.drop_paths(dev);
            self.objects.retain(|_, object| object.dev() != Some(dev));
        }
    }
}

/// Whether a device of a kind can have an MTU at all.
fn fits(mtu: u32, kind: &LinkKind) -> bool {
    let most = match kind {
        LinkKind::Loopback => 65_536,
        _ => 65_535,
    };
    (68..=most).contains(&mtu)
}

/// Whether two devices are of one kind, and if of VXLAN, of one VXLAN network.
pub(super) fn same_kind(one: &LinkKind, other: &LinkKind) -> bool {
    match (one, other) {
        (LinkKind::Vxlan(one), LinkKind::Vxlan(other)) => one.vni == other.vni,
        (LinkKind::Other(one), LinkKind::Other(other)) => one == other,
        _ => std::mem::discriminant(one) == std::mem::discriminant(other),
    }
}

/// The family of a VXLAN device's outer packets: two devices may share VNI and port if it differs.
pub(super) const fn vxlan_family(vxlan: &Vxlan) -> Family {
    match vxlan.local {
        Some(IpAddr::V6(_)) => Family::V6,
        _ => Family::V4,
    }
}

/// The link-local address that the kernel makes of a hardware address (RFC 4291, appendix A).
fn link_local(mac: MacAddr) -> IpAddr {
    let [a, b, c, d, e, f] = mac.0;
    IpAddr::V6(Ipv6Addr::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ]))
}
