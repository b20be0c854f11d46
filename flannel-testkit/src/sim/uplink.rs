//! The uplinks of simulated machines. The one that carries the overlay at first is renamed, becomes a
//! port, goes down for a while and loses its addresses; a second one that looks better comes and goes.
//!
//! Bonds and VRFs exist in no kernel that this is tested on: they are tested here alone. All that a node
//! sees of either is a device with the address, and ports that belong to it. A VRF has a table of its
//! own beside, which the fake has not: its routes are in the main table, as if a rule led there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use flannel_core::{
    Address, External, Family, IfName, Interface, Link, LinkKind, MAIN_TABLE, Object, ObjectKey,
    PublicIp, Subnet, UnderlayOptions,
};

use super::action::{KernelAction, Master};
use super::hardware::{
    FIRST_METRIC, addresses, external, inner_addresses, name, prefix_len, router, with_external,
};
use super::path::link;
use super::world::World;
use crate::fake_kernel::default_route;

/// The metric of the default routes of the second uplink: they are better.
const SECOND_METRIC: u32 = 50;

/// The other name of the external interface.
const RENAMED: &str = "wan0";

/// The second uplink.
const SECOND: &str = "eth1";

/// The names of all devices that can be an uplink.
const NAMES: [&str; 6] = ["eth0", RENAMED, SECOND, "br0", "bond0", "vrf0"];

/// The first uplink of a machine, and whether it has a second one.
#[derive(Debug)]
pub(super) struct Uplink {
    /// The hardware, under the name that it has now.
    port: IfName,
    /// The device that it is a port of, which has its addresses.
    master: Option<IfName>,
    /// It has no address.
    bare: bool,
    second: bool,
}

impl Default for Uplink {
    fn default() -> Self {
        Self {
            port: external(),
            master: None,
            bare: false,
            second: false,
        }
    }
}

impl Uplink {
    /// The device that has the addresses.
    pub(super) fn dev(&self) -> IfName {
        self.master.unwrap_or(self.port)
    }

    pub(super) const fn has_master(&self) -> bool {
        self.master.is_some()
    }

    pub(super) const fn is_bare(&self) -> bool {
        self.bare
    }

    pub(super) const fn has_second(&self) -> bool {
        self.second
    }
}

/// The second uplink.
pub(super) fn second() -> IfName {
    name(SECOND)
}

/// Tells if a device of this name is an uplink, or was one.
pub(super) fn is_uplink(dev: IfName) -> bool {
    NAMES.contains(&dev.as_str())
}

/// The addresses of a machine on its second uplink.
pub(super) fn second_addresses(number: u8) -> PublicIp {
    PublicIp::both(
        Ipv4Addr::new(198, 51, 100, number),
        Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, number.into()),
    )
}

fn second_router(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(198, 51, 100, 254).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0xfe).into(),
    }
}

/// Tells if the program of a node is told the name of its external interface.
pub(super) const fn is_named(number: u8) -> bool {
    number % 3 == 2
}

/// The options by which the program of a node is told of its external interface.
pub(super) fn asked(number: u8) -> UnderlayOptions {
    let interfaces = match is_named(number) {
        true => vec![Interface::Name(external())],
        false => Vec::new(),
    };
    UnderlayOptions::of(interfaces)
}

/// All addresses of a machine that are not the overlay's, and the links that it is on.
pub(super) type Addresses = (Vec<(IpAddr, u8)>, Vec<(IfName, Subnet)>);

impl World {
    pub(super) fn act_on_uplink(&mut self, at: usize, action: KernelAction) -> bool {
        self.judge.doubt_all(at);
        let done = match action {
            KernelAction::UnderlayDown => self.set_down(at),
            KernelAction::UnderlayUp => self.set_up(at),
            KernelAction::UnderlayRemade => self.remake(at),
            KernelAction::UnderlayMtu(mtu) => self.set_mtu(at, mtu),
            KernelAction::UnderlayAddress(set) => self.add_then_remove(at, set),
            KernelAction::UnderlayRenamed => self.rename_uplink(at),
            KernelAction::UnderlayPort(master) => {
                let done = self.become_port(at, master);
                if done {
                    self.put_addresses(at);
                }
                done
            }
            KernelAction::UnderlayFree => self.become_free(at),
            KernelAction::UnderlayBare => self.strip(at),
            KernelAction::UnderlayDressed => self.nodes[at].uplink.bare && self.dress(at),
            KernelAction::SecondUplink => self.add_second(at),
            KernelAction::SecondUplinkGone => self.remove_second(at),
            _ => false,
        };
        self.note_losses();
        done
    }

    /// The external interface is down for so long.
    pub(super) async fn flap(&mut self, at: usize, time: Duration) -> bool {
        let done = self.act_on_kernel(at, KernelAction::UnderlayDown);
        if done {
            self.pass(time).await;
            self.act_on_kernel(at, KernelAction::UnderlayUp);
        }
        done
    }

    /// The external interface loses its addresses, and has others after so long.
    pub(super) async fn renumber(&mut self, at: usize, set: u8, gap: Duration) -> bool {
        let node = &self.nodes[at];
        if node.unplugged || set % 4 == node.address {
            return false;
        }
        let done = self.act_on_kernel(at, KernelAction::UnderlayBare);
        if done {
            self.pass(gap).await;
            self.nodes[at].address = set % 4;
            self.act_on_kernel(at, KernelAction::UnderlayDressed);
        }
        done
    }

    /// From a machine that loses its first uplink and has a second one on, no node needs stay where it
    /// was: that one moves, and others follow their peers.
    fn note_losses(&mut self) {
        let may_move = self
            .nodes
            .iter()
            .any(|node| node.uplink.second && (node.unplugged || node.uplink.bare));
        self.may_move |= may_move;
    }

    /// A program is started: one that remembers no interface takes the one that looks best.
    pub(super) fn note_start(&mut self, at: usize) {
        let node = &self.nodes[at];
        self.may_move |= node.uplink.second && !node.disk.remembers_interface();
    }

    fn set_down(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        if node.unplugged {
            return false;
        }
        node.unplugged = true;
        node.kernel.set_link_down(node.uplink.dev());
        true
    }

    fn set_up(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        if !node.unplugged {
            return false;
        }
        node.unplugged = false;
        node.kernel.set_link_up(node.uplink.dev(), true);
        self.put_addresses(at);
        true
    }

    fn remake(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        if node.uplink.has_master() {
            return false;
        }
        let second = node.uplink.second;
        node.kernel.delete_link(node.uplink.port);
        node.unplugged = false;
        node.uplink = Uplink {
            second,
            ..Uplink::default()
        };
        node.kernel = with_external(node.kernel.clone(), node.number, node.address);
        // It was gone, if only for a moment.
        self.may_move |= second;
        true
    }

    fn set_mtu(&self, at: usize, mtu: u16) -> bool {
        let node = &self.nodes[at];
        let found = link(&node.kernel.objects(), node.uplink.dev()).cloned();
        let Some(found) = found.filter(|found| found.mtu != Some(mtu.into())) else {
            return false;
        };
        let changed = Object::Link(Link {
            mtu: Some(mtu.into()),
            mac: None,
            ..found
        });
        let op = flannel_core::Op::Change(changed);
        node.kernel.external(&op).is_ok()
    }

    fn add_then_remove(&mut self, at: usize, set: u8) -> bool {
        let node = &mut self.nodes[at];
        if set % 4 == node.address {
            return false;
        }
        let old = addresses(node.number, node.address);
        node.address = set % 4;
        self.put_addresses(at);
        self.remove_addresses(at, old);
        true
    }

    /// Gives the external interface its other name.
    fn rename_uplink(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        if node.uplink.has_master() {
            return false;
        }
        let (from, to) = match node.uplink.port == external() {
            true => (external(), name(RENAMED)),
            false => (node.uplink.port, external()),
        };
        node.kernel.rename_link(from, to);
        node.uplink.port = to;
        // What others have names it otherwise now.
        let objects = node.kernel.objects();
        let foreign = self.judge.foreign(at).into_keys();
        let foreign = foreign.filter_map(|key| Some((key.clone(), objects.get(&key)?.clone())));
        self.judge.set_foreign(at, foreign.collect());
        true
    }

    /// Makes the external interface a port of a device of a kind, which has no address yet.
    pub(super) fn become_port(&mut self, at: usize, master: Master) -> bool {
        let node = &mut self.nodes[at];
        if node.uplink.has_master() || node.unplugged || node.uplink.bare {
            return false;
        }
        let (dev, kind) = master.device();
        let port = node.uplink.port;
        let mtu = link(&node.kernel.objects(), port).and_then(|link| link.mtu);
        let made = Object::Link(Link {
            name: dev,
            kind,
            mtu,
            mac: None,
            up: true,
            alias: None,
        });
        if node.kernel.insert_foreign(made).is_err() {
            return false;
        }
        node.kernel.set_master(port, Some(dev));
        let has = addresses(node.number, node.address);
        self.remove_addresses(at, has);
        self.remove_default_routes(at);
        self.nodes[at].uplink.master = Some(dev);
        true
    }

    /// The external interface is no port any more, and has its addresses and routes itself.
    fn become_free(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        let Some(master) = node.uplink.master.take() else {
            return false;
        };
        node.kernel.set_master(node.uplink.port, None);
        node.kernel.delete_link(master);
        node.unplugged = false;
        self.put_addresses(at);
        // The addresses were nowhere, if only for a moment.
        self.may_move |= self.nodes[at].uplink.second;
        true
    }

    /// Takes the addresses of the external interface, and the routes by which it leads elsewhere.
    fn strip(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        if node.uplink.bare || node.unplugged {
            return false;
        }
        node.uplink.bare = true;
        let has = addresses(node.number, node.address);
        self.remove_addresses(at, has);
        self.remove_default_routes(at);
        true
    }

    fn dress(&mut self, at: usize) -> bool {
        self.put_addresses(at);
        true
    }

    fn add_second(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        if node.uplink.second {
            return false;
        }
        // Who has chosen none yet takes the better one.
        let process = node.process.as_ref();
        let lacks_one = process.is_some_and(|p| p.overlay.status().external.is_none());
        self.may_move |= lacks_one && !node.disk.remembers_interface();
        node.uplink.second = true;
        let has = second_addresses(node.number);
        let has = has.ips().map(|ip| (ip, prefix_len(Family::of(&ip))));
        let has: Vec<(IpAddr, u8)> = has.collect();
        let kernel = node.kernel.clone().with_link(SECOND, 1500, &has);
        for family in Family::ALL {
            let route = default_route(second(), second_router(family), SECOND_METRIC);
            kernel.insert_foreign(route).ok();
        }
        true
    }

    fn remove_second(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        if !std::mem::take(&mut node.uplink.second) {
            return false;
        }
        node.kernel.delete_link(second());
        true
    }

    /// Gives the external interface its addresses and default routes, as far as it has them not.
    pub(super) fn put_addresses(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        node.uplink.bare = false;
        let dev = node.uplink.dev();
        for ip in addresses(node.number, node.address).ips() {
            let family = Family::of(&ip);
            node.kernel.insert_foreign(address(dev, ip)).ok();
            let route = default_route(dev, router(family), FIRST_METRIC);
            node.kernel.insert_foreign(route).ok();
        }
    }

    fn remove_addresses(&self, at: usize, all: PublicIp) {
        let node = &self.nodes[at];
        for ip in all.ips() {
            let key = address(node.uplink.dev(), ip).key();
            node.kernel.delete(&key);
        }
    }

    fn remove_default_routes(&self, at: usize) {
        for family in Family::ALL {
            let dst = Subnet::new(any(family), 0).expect("a subnet");
            self.nodes[at].kernel.delete(&ObjectKey::Route {
                table: MAIN_TABLE,
                dst,
                metric: FIRST_METRIC,
            });
        }
    }

    /// The external interface works, and a program that is told its name finds it, or found it before.
    pub(super) fn repair_uplink(&mut self, at: usize) {
        let node = &self.nodes[at];
        let dev = node.uplink.dev();
        let carrier = node.process.as_ref().and_then(|process| {
            let status = process.overlay.status();
            status.external.as_ref().map(|external| external.dev)
        });
        let is_lost = is_named(node.number) && dev != external() && carrier != Some(dev);
        let mut mend = Vec::new();
        if node.unplugged {
            mend.push(KernelAction::UnderlayUp);
        }
        if node.uplink.bare {
            mend.push(KernelAction::UnderlayDressed);
        }
        if is_lost && node.uplink.has_master() {
            mend.push(KernelAction::UnderlayFree);
        }
        if is_lost && node.uplink.port != external() {
            mend.push(KernelAction::UnderlayRenamed);
        }
        for action in mend {
            self.act_on_kernel(at, action);
        }
    }

    /// The addresses of a node that are not the overlay's, and the links that it is on now.
    pub(super) fn addresses_of(&self, at: usize) -> Addresses {
        let node = &self.nodes[at];
        let first = addresses(node.number, node.address);
        let second_has = second_addresses(node.number);
        let mut has: Vec<(IfName, IpAddr)> = Vec::new();
        if !node.unplugged && !node.uplink.bare {
            has.extend(first.ips().map(|ip| (node.uplink.dev(), ip)));
        }
        if node.uplink.second {
            has.extend(second_has.ips().map(|ip| (second(), ip)));
        }
        let links = has.iter().map(|(dev, ip)| (*dev, link_of(*ip))).collect();
        let outer = has.iter().map(|(_, ip)| (*ip, prefix_len(Family::of(ip))));
        let all = outer.chain(inner_addresses(node.number)).collect();
        (all, links)
    }

    /// The uplink that carries a node's overlay, with all its addresses; an error if that may not be.
    pub(super) fn carrier(
        &self,
        at: usize,
        says: Option<&External>,
    ) -> Result<(IfName, PublicIp), String> {
        let node = &self.nodes[at];
        let says = says.ok_or("nothing carries it")?;
        let is_second = node.uplink.second && says.dev == second();
        if !is_second && says.dev != node.uplink.dev() {
            return Err(format!("{says} carries it, and is no uplink"));
        }
        if is_second && (is_named(node.number) || !self.may_move) {
            return Err(format!(
                "{says} carries it, and did no more than look better"
            ));
        }
        let has = match is_second {
            true => second_addresses(node.number),
            false => addresses(node.number, node.address),
        };
        let mut families = self.config.families();
        match families.find(|family| says.local.ip(*family) != has.ip(*family)) {
            Some(family) => Err(format!("{says} carries it, with another {family} address")),
            None => Ok((says.dev, has)),
        }
    }
}

/// The links of a host that is on all of them.
pub(super) fn all_links() -> Vec<(IfName, Subnet)> {
    let first = addresses(1, 0);
    let second_has = second_addresses(1);
    let first = first.ips().map(|ip| (external(), link_of(ip)));
    let other = second_has.ips().map(|ip| (second(), link_of(ip)));
    first.chain(other).collect()
}

fn link_of(ip: IpAddr) -> Subnet {
    Subnet::new(ip, prefix_len(Family::of(&ip))).expect("a prefix")
}

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn address(dev: IfName, ip: IpAddr) -> Object {
    Object::Address(Address {
        dev,
        ip,
        prefix_len: prefix_len(Family::of(&ip)),
    })
}

impl Master {
    fn device(self) -> (IfName, LinkKind) {
        let (name_, kind) = match self {
            Self::Bridge => ("br0", LinkKind::Bridge),
            Self::Bond => ("bond0", LinkKind::Other("bond".to_owned())),
            Self::Vrf => ("vrf0", LinkKind::Other("vrf".to_owned())),
        };
        (name(name_), kind)
    }
}
