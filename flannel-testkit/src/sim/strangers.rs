//! The acts of strangers on the devices of ours: they take their marks, or their places.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use flannel_core::reconcile::ownership::nexthop_id;
use flannel_core::{
    Family, IfName, Link, LinkKind, NetworkConfig, Nexthop, Object, ObjectKey, Objects, Op,
    OverlayName, Route, RouteProtocol, RouteTarget, Vxlan,
};
use tokio::time::Instant;

use super::action::Kind;
use super::hardware::{PLACE_TAKEN, STATIC, ours};
use super::judge::Invariant;
use super::path::link;
use super::uplink::is_uplink;
use super::world::World;

/// The time that a node may take to notice that its place is taken: the longest wait for a kernel
/// that refused, a whole reading, and the longest sleep of an engine.
const NOTICED: Duration = Duration::from_secs(30 + 11 + 15);

/// A device of ours whose place somebody took.
#[derive(Debug)]
pub(super) struct Taken {
    name: IfName,
    since: Instant,
    /// The config that asked for it, and how often one had been written by then.
    config: NetworkConfig,
    writes: u64,
    /// The number of times that the program had been started by then.
    starts: u64,
}

fn vxlan_family(vxlan: &Vxlan) -> Family {
    match vxlan.local {
        Some(IpAddr::V6(_)) => Family::V6,
        _ => Family::V4,
    }
}

impl World {
    /// Takes the mark of one of those objects of ours that are ours without it, to whom knows them.
    pub(super) fn unmark(&mut self, at: usize, n: u8) -> bool {
        let writes = self.config_writes.load(Ordering::Relaxed);
        self.nodes[at].unmarked.get_or_insert(writes);
        let kernel = &self.nodes[at].kernel;
        let objects = kernel.objects();
        let mut all = ours(&objects);
        all.retain(|object| match object {
            Object::Link(_) | Object::Nexthop(_) => true,
            // Straight to a node leads the route of anybody.
            Object::Route(route) => dev_of(route, &objects).is_some_and(|dev| !is_uplink(dev)),
            _ => false,
        });
        let Some(nth) = usize::from(n).checked_rem(all.len()) else {
            return false;
        };
        match all.swap_remove(nth) {
            Object::Link(link) => {
                let alias = n.is_multiple_of(3).then_some("somebody's");
                kernel.set_alias(link.name, alias);
                true
            }
            Object::Nexthop(nexthop) => {
                let theirs = Object::Nexthop(Nexthop {
                    protocol: STATIC,
                    ..nexthop
                });
                kernel.external(&Op::Change(theirs)).is_ok()
            }
            Object::Route(route) => {
                let theirs = Object::Route(Route {
                    protocol: STATIC,
                    ..route
                });
                kernel.external(&Op::Change(theirs)).is_ok()
            }
            _ => false,
        }
    }

    /// Puts a device of somebody else's where one of ours is, by its name or by what no two devices share.
    pub(super) fn take_place_of_device(&mut self, at: usize, n: u8) -> bool {
        let Some(Object::Link(ours)) = self.nth_of_ours(at, Some(Kind::Link), n) else {
            return false;
        };
        // A device that is deleted by a fault is ours then, too.
        if !self.nodes[at].faults.is_empty() {
            return false;
        }
        let kernel = &self.nodes[at].kernel;
        let (name, kind) = match &ours.kind {
            LinkKind::Vxlan(vxlan) if n % 2 == 1 && vxlan_family(vxlan) == Family::V4 => {
                let theirs = Vxlan {
                    underlay: None,
                    local: None,
                    ..vxlan.clone()
                };
                (IfName::new("vx0").expect("a name"), LinkKind::Vxlan(theirs))
            }
            _ => (ours.name, LinkKind::Bridge),
        };
        kernel.delete_link(ours.name);
        let theirs = Object::Link(Link {
            name,
            kind,
            mtu: Some(1400),
            mac: None,
            up: true,
            alias: Some(PLACE_TAKEN.to_owned()),
        });
        let key = theirs.key();
        let done = kernel.insert_foreign(theirs).is_ok();
        self.follow_foreign(at);
        if let Some(found) = self.nodes[at].kernel.get(&key).filter(|_| done) {
            let mut foreign = self.judge.foreign(at);
            foreign.insert(key, found);
            self.judge.set_foreign(at, foreign);
        }
        self.judge.doubt_all(at);
        self.judge.stranger_came(at);
        self.nodes[at].taken = Some(Taken {
            name: ours.name,
            since: Instant::now(),
            config: self.config.clone(),
            writes: self.config_writes.load(Ordering::Relaxed),
            starts: self.nodes[at].starts,
        });
        done
    }

    /// At the end of a history: lets nodes whose devices have no place notice that, and gives it back.
    pub(super) async fn end_takings(&mut self) {
        let writes = self.config_writes.load(Ordering::Relaxed);
        let mut are_taken = false;
        for at in 0..self.nodes.len() {
            are_taken |= self.judge.foreign(at).values().any(is_taken);
            let node = &mut self.nodes[at];
            if let Some(taken) = &mut node.taken {
                (taken.since, taken.writes, taken.starts) = (Instant::now(), writes, node.starts);
            }
        }
        if are_taken {
            self.pass(NOTICED + Duration::from_secs(5)).await;
        }
        for at in 0..self.nodes.len() {
            self.give_devices_back(at);
        }
    }

    /// Whoever took a place of a device of ours gives it back; who lacked it has said so.
    pub(super) fn give_devices_back(&mut self, at: usize) -> bool {
        let foreign = self.judge.foreign(at);
        let places = foreign.iter().filter(|(_, object)| is_taken(object));
        let places: Vec<ObjectKey> = places.map(|(key, _)| key.clone()).collect();
        if places.is_empty() {
            return false;
        }
        self.check_blocked(at);
        for key in &places {
            self.nodes[at].kernel.delete(key);
        }
        self.judge.doubt_all(at);
        self.follow_foreign(at);
        true
    }

    /// A node that knows everything, and whose device somebody has kept from being made for a while, does
    /// not say that it works.
    fn check_blocked(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        let Some(taken) = node.taken.take() else {
            return;
        };
        let Some(process) = &node.process else {
            return;
        };
        let knows = !node.frozen
            && node.link.is_quiet()
            && self.cluster.is_caught_up(&node.id)
            && !process.io.is_busy()
            && taken.config == self.config
            && taken.writes == self.config_writes.load(Ordering::Relaxed)
            && taken.starts == node.starts
            && taken.since.elapsed() > NOTICED;
        let status = process.overlay.status();
        let is_there = link(&node.kernel.objects(), taken.name)
            .is_some_and(|link| link.alias.as_deref() != Some(PLACE_TAKEN));
        if knows && !is_there && status.working {
            self.nodes[at].lacked = Some((taken.name, self.config.clone()));
        }
    }

    /// Judges, when everything is as it should be, what nodes said while they lacked a device: if it is
    /// there again, they needed it.
    pub(super) fn check_lacked(&mut self) {
        let alias = OverlayName::default().link_alias();
        for at in 0..self.nodes.len() {
            let node = &mut self.nodes[at];
            let Some((name, config)) = node.lacked.take() else {
                continue;
            };
            let is_ours = link(&node.kernel.objects(), name)
                .is_some_and(|link| link.alias.as_deref() == Some(alias.as_str()));
            if is_ours && config == self.config {
                let what = format!("it said that it works without {name}");
                self.judge.broken(Invariant::TellsTheTruth, Some(at), what);
            }
        }
    }

    /// Somebody gives marks back where no program can know what bore them: its memory is lost or was
    /// never written, what it wants has changed while it did not run, or has changed before it came to
    /// mend them.
    pub(super) fn give_marks_back(&self, at: usize) {
        let node = &self.nodes[at];
        let objects = node.kernel.objects();
        for dev in bare_devices(&objects) {
            if node.forgetful || !node.disk.knows(dev, node.kernel.index_of(dev)) {
                let alias = OverlayName::default().link_alias();
                node.kernel.set_alias(dev, Some(&alias));
            }
        }
        let writes = self.config_writes.load(Ordering::Relaxed);
        let wants_the_same = node.unmarked.is_none_or(|before| before == writes);
        if node.process.is_some() && wants_the_same {
            return;
        }
        for object in unmarked(&objects) {
            let protocol = RouteProtocol::OURS;
            let marked = match object {
                Object::Route(route) => Object::Route(Route { protocol, ..route }),
                Object::Nexthop(nexthop) => Object::Nexthop(Nexthop {
                    protocol,
                    ..nexthop
                }),
                _ => continue,
            };
            node.kernel.external(&Op::Change(marked)).ok();
        }
    }
}

/// The objects that are ours by all but their mark, which somebody took: devices of an overlay's
/// name, what leads through them, and nexthop objects of our numbers.
pub(super) fn unmarked(objects: &Objects) -> Vec<Object> {
    let bare = bare_devices(objects);
    let is_flannels = |dev: IfName| dev.as_str().starts_with("flannel");
    let lacks_mark = |object: &&Object| match object {
        Object::Link(link) => bare.contains(&link.name),
        Object::Nexthop(nexthop) => nexthop.protocol == STATIC && has_our_id(nexthop),
        Object::Route(route) => {
            route.protocol == STATIC && dev_of(route, objects).is_some_and(is_flannels)
        }
        _ => false,
    };
    objects.values().filter(lacks_mark).cloned().collect()
}

fn has_our_id(nexthop: &Nexthop) -> bool {
    let name = OverlayName::default();
    let Nexthop {
        gateway,
        dev,
        onlink,
        ..
    } = *nexthop;
    nexthop.id == nexthop_id(&name, gateway, dev, onlink)
}

/// The device that a route leads through at last.
fn dev_of(route: &Route, objects: &Objects) -> Option<IfName> {
    match &route.target {
        RouteTarget::Gateway { dev, .. } | RouteTarget::Device(dev) => Some(*dev),
        RouteTarget::Nexthop(id) => objects.get(&ObjectKey::Nexthop(*id))?.dev(),
        _ => None,
    }
}

/// Tells if somebody put this in the place of a device of ours.
pub(super) fn is_taken(object: &Object) -> bool {
    matches!(object, Object::Link(link) if link.alias.as_deref() == Some(PLACE_TAKEN))
}

/// Devices as overlays have them that do not bear a mark.
fn bare_devices(objects: &Objects) -> Vec<IfName> {
    let names = objects.keys().filter_map(|key| match key {
        ObjectKey::Link(dev) => Some(*dev),
        _ => None,
    });
    let is_bare = |dev: &IfName| {
        let alias = OverlayName::default().link_alias();
        matches!(link(objects, *dev), Some(Link { kind: LinkKind::Vxlan(_) | LinkKind::Tun(_), alias: found, .. })
            if found.as_deref() != Some(alias.as_str()))
            && dev.as_str().starts_with("flannel")
    };
    names.filter(is_bare).collect()
}
