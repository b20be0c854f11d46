//! The acts of others on the interfaces of a namespace: they rename them, make them ports, set
//! flags of addresses.

use std::net::IpAddr;

use flannel_core::{AddressInfo, Change, IfName, LinkKind, Object, Route, RouteTarget};

use super::FakeKernel;
use super::host::Host;

impl FakeKernel {
    /// Renames a device with all that is on it, as `ip link set name` does. A name that is taken
    /// changes nothing.
    pub fn rename_link(&self, from: IfName, to: IfName) {
        let mut state = self.state();
        state.host.rename(from, to);
        state.tell();
    }

    /// The index of a device.
    pub fn index_of(&self, dev: IfName) -> Option<u32> {
        self.state().host.indices.get(&dev).copied()
    }

    /// Makes a device a port of another one, or of none.
    pub fn set_master(&self, dev: IfName, master: Option<IfName>) {
        let mut state = self.state();
        state.host.set_master(dev, master);
        state.tell();
    }

    /// Sets what an address is beside itself: tentative, deprecated and the like.
    pub fn set_address(&self, dev: IfName, ip: IpAddr, set: impl FnOnce(&mut AddressInfo)) {
        let mut state = self.state();
        if let Some(info) = state
            .host
            .address_infos()
            .iter()
            .find(|a| (a.dev, a.ip) == (dev, ip))
        {
            let mut info = info.clone();
            set(&mut info);
            state.host.marks.insert((dev, ip), info);
            state.host.told.push(Change::Address(Some(dev)));
        }
        state.tell();
    }
}

impl Host {
    fn rename(&mut self, from: IfName, to: IfName) {
        let Some(index) = self.indices.get(&from).copied() else {
            return;
        };
        if self.indices.contains_key(&to) {
            return;
        }
        self.indices.remove(&from);
        self.indices.insert(to, index);
        self.objects = std::mem::take(&mut self.objects)
            .into_values()
            .map(|mut object| {
                rename(&mut object, from, to);
                (object.key(), object)
            })
            .collect();
        let marks = std::mem::take(&mut self.marks).into_iter();
        self.marks = marks
            .map(|((dev, ip), mut info)| {
                let dev = if dev == from { to } else { dev };
                info.dev = dev;
                ((dev, ip), info)
            })
            .collect();
        let new_name = |dev: IfName| if dev == from { to } else { dev };
        self.masters = std::mem::take(&mut self.masters)
            .into_iter()
            .map(|(port, master)| (new_name(port), new_name(master)))
            .collect();
        if self.without_own_address.remove(&from) {
            self.without_own_address.insert(to);
        }
        for dev in [from, to] {
            self.told.push(Change::Link(Some(dev)));
        }
    }

    fn set_master(&mut self, dev: IfName, master: Option<IfName>) {
        match master {
            Some(master) => self.masters.insert(dev, master),
            None => self.masters.remove(&dev),
        };
        self.told.push(Change::Link(Some(dev)));
    }

    /// The addresses with what an object does not say of them.
    pub(super) fn address_infos(&self) -> Vec<AddressInfo> {
        let addresses = self.objects.values().filter_map(|object| match object {
            Object::Address(address) => Some(address),
            _ => None,
        });
        addresses
            .map(|address| {
                let plain = AddressInfo {
                    dev: address.dev,
                    ip: address.ip,
                    prefix_len: address.prefix_len,
                    link_scope: matches!(address.ip, IpAddr::V6(ip) if ip.is_unicast_link_local()),
                    deprecated: false,
                    permanent: true,
                    temporary: false,
                    tentative: false,
                };
                let marked = self.marks.get(&(address.dev, address.ip));
                marked.cloned().unwrap_or(plain)
            })
            .collect()
    }
}

/// Gives an object that is on a device, or through it, the device's new name.
fn rename(object: &mut Object, from: IfName, to: IfName) {
    let name = |dev: &mut IfName| {
        if *dev == from {
            *dev = to;
        }
    };
    match object {
        Object::Link(o) => {
            name(&mut o.name);
            if let LinkKind::Vxlan(vxlan) = &mut o.kind
                && let Some(underlay) = &mut vxlan.underlay
            {
                name(underlay);
            }
        }
        Object::Sysctl(o) => name(&mut o.dev),
        Object::Offload(o) => name(&mut o.dev),
        Object::Address(o) => name(&mut o.dev),
        Object::Tunnel(o) => name(&mut o.dev),
        Object::TunnelPeer(o) => name(&mut o.dev),
        Object::Fdb(o) => name(&mut o.dev),
        Object::Neighbour(o) => name(&mut o.dev),
        Object::Nexthop(o) => name(&mut o.dev),
        Object::Route(Route { target, .. }) => match target {
            RouteTarget::Gateway { dev, .. } | RouteTarget::Device(dev) => name(dev),
            RouteTarget::Paths(paths) => paths.iter_mut().for_each(|path| name(&mut path.dev)),
            _ => {}
        },
        _ => {}
    }
}
