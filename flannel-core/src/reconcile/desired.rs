//! [`Desired`]: what the kernel should have, compiled from a network and its peers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::{Network, Rejection};
use crate::compact::{BULK, compact_map};
use crate::family::{DualStack, Family};
use crate::lease::{BackendType, LeaseKey, Revision, Seniority};
use crate::lease_set::{LeaseDelta, LeaseSet, Peer};
use crate::node::OverlayName;
use crate::object::{
    Fdb, MacAddr, Neighbour, Object, ObjectKey, Objects, RouteProtocol, RouteTarget,
};
use crate::reconcile::own_claim::{OwnClaim, RIVALS};
use crate::reconcile::ownership::nexthop_id;
use crate::settle::{Claimant, Settlement};
use crate::subnet::Subnet;

/// An object that is wanted, and for whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The object.
    pub object: Object,
    /// The peer that it serves; `None`: the node itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<LeaseKey>,
}

/// What the kernel should have. As JSON, the objects are a list in the order of making.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Desired {
    /// The objects by the kernel's key.
    #[serde(with = "wanted_list")]
    pub objects: BTreeMap<ObjectKey, Wanted>,
    /// Nothing is removed for being unwanted, because it is not yet certain what is wanted: the
    /// first snapshot has not come, or it withdraws too much at once.
    pub hold_orphans: bool,
    /// Devices of these backends are not removed for being unwanted, nor their addresses: peers of
    /// these backends may still send to them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub held_backends: BTreeSet<BackendType>,
    /// Routes to these are not removed for being unwanted, nor what they need: they were there at
    /// the start, and the records that would say more cannot be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spared: Vec<Subnet>,
}

/// Wanted objects as a JSON array (a map's keys would have to be texts).
mod wanted_list {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serializer};

    use super::{ObjectKey, Wanted};

    type Map = BTreeMap<ObjectKey, Wanted>;

    pub(super) fn serialize<S: Serializer>(objects: &Map, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(objects.values())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Map, D::Error> {
        let list = Vec::<Wanted>::deserialize(d)?;
        Ok(list
            .into_iter()
            .map(|wanted| (wanted.object.key(), wanted))
            .collect())
    }
}

/// Why a peer, or one family of it (`None`: all of it), is not programmed.
pub type Rejections = Vec<(Option<Family>, Rejection)>;

/// Keeps [`Desired`] in step with a network and its peers, in time proportional to what changes.
///
/// One family of one peer is one unit: it is wanted whole or not at all, so that no half of a path
/// is ever built. Units that want objects of one key are settled by seniority. What comes out
/// depends on the network and the peers only, not on how they came to be.
///
/// A backend is not trusted with what peers may cause: forwarding entries and neighbours on the
/// node's own devices, peers of the node's own packet path at the peer's public address, nexthops
/// with an id of ours, and routes into the peer's admitted subnet.
#[derive(Debug, Clone)]
pub struct Compiler {
    overlay: OverlayName,
    protocol: RouteProtocol,
    network: Option<Arc<dyn Network>>,
    local: Local,
    peers: BTreeMap<LeaseKey, Compiled>,
    keys: Settlement<ObjectKey>,
    desired: Desired,
    rejected: BTreeMap<LeaseKey, Rejections>,
    /// The number of changes to that.
    rejections: u64,
    /// The claim that our own record makes on other nodes.
    own: Option<OwnClaim>,
    /// Records that want a key of that, which is why this node rejects them.
    rivals: BTreeSet<Seniority>,
}

/// The MAC of a peer's device that an object leads to.
const fn mac_behind(object: &Object) -> Option<MacAddr> {
    match object {
        Object::Fdb(Fdb { mac, .. }) | Object::Neighbour(Neighbour { mac, .. }) => Some(*mac),
        Object::Link(_)
        | Object::Sysctl(_)
        | Object::Offload(_)
        | Object::Address(_)
        | Object::Tunnel(_)
        | Object::TunnelPeer(_)
        | Object::Nexthop(_)
        | Object::Route(_) => None,
    }
}

/// What the node itself needs.
#[derive(Debug, Clone, Default)]
struct Local {
    objects: Objects,
    macs: BTreeSet<MacAddr>,
}

/// The part of a network's answer for a peer that is kept. The objects are in [`Desired`]; where they are not, or
/// no longer, the network makes them once more.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Compiled {
    created: Revision,
    doubted: bool,
    /// The families that have objects.
    families: DualStack<()>,
    /// Why there are not more, conflicts with other peers not counted.
    rejections: Rejections,
}

/// The objects of the families of a peer, each sorted by key.
type Units = DualStack<Vec<Object>>;

impl Compiled {
    fn claimant(&self, key: &LeaseKey, family: Family) -> Claimant {
        Claimant {
            doubted: self.doubted,
            seniority: Seniority {
                created: self.created,
                key: key.clone(),
            },
            family,
        }
    }
}

impl Compiler {
    /// A compiler without a network: nothing is wanted yet, and nothing may be removed.
    ///
    /// Links without an alias get the overlay's, routes and nexthops without a protocol get
    /// `protocol`: the marks by which a fresh process knows them again.
    pub fn new(overlay: OverlayName, protocol: RouteProtocol) -> Self {
        Self {
            overlay,
            protocol,
            network: None,
            local: Local::default(),
            peers: BTreeMap::new(),
            keys: Settlement::default(),
            desired: Desired {
                objects: BTreeMap::new(),
                hold_orphans: true,
                held_backends: BTreeSet::new(),
                spared: Vec::new(),
            },
            rejected: BTreeMap::new(),
            rejections: 0,
            own: None,
            rivals: BTreeSet::new(),
        }
    }

    /// What the kernel should have.
    pub const fn desired(&self) -> &Desired {
        &self.desired
    }

    /// Why peers are not programmed: what the lease set found, what the backend said, and what
    /// older peers hold.
    pub const fn rejected(&self) -> &BTreeMap<LeaseKey, Rejections> {
        &self.rejected
    }

    /// A number that is another whenever [`rejected`](Self::rejected) is.
    pub(crate) const fn rejections(&self) -> u64 {
        self.rejections
    }

    /// Why other nodes must reject our own record: an older one makes them want an object of the same
    /// key, such as a forwarding entry of the same MAC.
    pub fn own_rejected(&self, peers: &LeaseSet) -> Option<Rejection> {
        let (network, own) = (self.network.as_ref()?, self.own.as_ref()?);
        let older = self.rivals.range(..&own.seniority).take(RIVALS);
        older
            .filter_map(|rival| peers.peer(&rival.key))
            .find_map(|rival| {
                let key = own.shared(&**network, rival, &peers.claims_of(rival))?;
                let by = rival.lease.key.clone();
                Some(Rejection::KeyTaken { key, by })
            })
    }

    /// Of which backends devices are to stay that are not wanted ([`Desired::held_backends`]).
    pub fn hold_backends(&mut self, backends: BTreeSet<BackendType>) {
        self.desired.held_backends = backends;
    }

    /// Compiles everything anew for a network. Returns the keys under which something else is
    /// wanted than before.
    pub fn set_network(
        &mut self,
        network: Arc<dyn Network>,
        peers: &LeaseSet,
    ) -> BTreeSet<ObjectKey> {
        let mut fresh = Self::new(self.overlay.clone(), self.protocol);
        fresh.desired.held_backends = self.desired.held_backends.clone();
        fresh.local = fresh.compile_local(network.local());
        for (key, object) in &fresh.local.objects {
            let object = object.clone();
            let wanted = Wanted { object, peer: None };
            fresh.desired.objects.insert(key.clone(), wanted);
        }
        fresh.own = Some(OwnClaim::of(&*network));
        fresh.network = Some(network);
        fresh.compile(peers.peers().keys(), peers);
        fresh.rejections += self.rejections + 1;
        let before = std::mem::replace(self, fresh).desired.objects;
        let now = &self.desired.objects;
        let gone_or_different = before.iter().filter(|(key, was)| now.get(key) != Some(was));
        let new = now.keys().filter(|key| !before.contains_key(key));
        gone_or_different
            .map(|(key, _)| key)
            .chain(new)
            .cloned()
            .collect()
    }

    /// Follows a change of the peers: `delta` is what led to `peers`. Returns the keys under which
    /// something else is wanted than before. That orphans are now (or no longer) held is told by
    /// [`Desired::hold_orphans`] and [`Desired::spared`] only.
    pub fn update(&mut self, delta: &LeaseDelta, peers: &LeaseSet) -> BTreeSet<ObjectKey> {
        self.compile(delta.keys(), peers)
    }

    fn compile<'a>(
        &mut self,
        changed: impl Iterator<Item = &'a LeaseKey>,
        peers: &LeaseSet,
    ) -> BTreeSet<ObjectKey> {
        self.desired.hold_orphans = self.network.is_none() || peers.hold_orphans();
        self.desired.spared = peers.spared().copied().collect();
        let Some(network) = self.network.clone() else {
            return BTreeSet::new();
        };
        let mut claims = Vec::new();
        let mut affected = BTreeSet::new();
        let mut reported = BTreeSet::new();
        let mut made: BTreeMap<LeaseKey, Units> = BTreeMap::new();
        for key in changed {
            let old = self.peers.remove(key);
            let peer = peers.peer(key);
            let new = peer.map(|peer| self.compile_peer(&*network, peer));
            if let Some(old) = &old {
                let (created, key) = (old.created, key.clone());
                self.rivals.remove(&Seniority { created, key });
            }
            if let (Some(peer), Some((new, _))) = (peer, &new)
                && !new.rejections.is_empty()
            {
                self.note_rival(&*network, peer, peers);
            }
            let both = old.as_ref().zip(new.as_ref());
            let same = both
                .is_some_and(|(old, (new, units))| old == new && self.claims_same(key, new, units));
            // Withdrawals come first: the new claims may be those of the same claimant.
            if let Some(old) = &old {
                for family in old.families.families() {
                    let claimant = old.claimant(key, family);
                    affected.extend(self.keys.claims(&claimant).iter().cloned());
                    if !same {
                        claims.push((claimant, Vec::new()));
                    }
                }
            }
            if let Some((new, units)) = new {
                if !same {
                    for (family, unit) in units.iter() {
                        let keys: Vec<_> = unit.iter().map(Object::key).collect();
                        affected.extend(keys.iter().cloned());
                        claims.push((new.claimant(key, family), keys));
                    }
                }
                self.peers.insert(key.clone(), new);
                made.insert(key.clone(), units);
            }
            if !same {
                reported.insert(key.clone());
            }
        }
        for touched in self.keys.update(claims) {
            affected.extend(self.keys.claims(&touched).iter().cloned());
            reported.insert(touched.seniority.key);
        }
        for key in reported {
            self.report(key);
        }
        affected.retain(|key| {
            let wanted = self.keys.holder(key).and_then(|who| {
                let of = &who.seniority.key;
                if !made.contains_key(of) {
                    // It has this now because another has it no longer.
                    let (_, units) = self.compile_peer(&*network, peers.peer(of)?);
                    made.insert(of.clone(), units);
                }
                let unit = made.get(of)?.get(who.family)?;
                let at = unit.binary_search_by(|object| object.key().cmp(key)).ok()?;
                Some(Wanted {
                    object: unit.get(at)?.clone(),
                    peer: Some(of.clone()),
                })
            });
            self.want(key, wanted)
        });
        if affected.len() > BULK {
            compact_map(&mut self.peers);
            compact_map(&mut self.desired.objects);
        }
        affected
    }

    /// Notes whether a peer that is rejected here wants what others want for us, if it has its subnets.
    fn note_rival(&mut self, network: &dyn Network, peer: &Peer, peers: &LeaseSet) {
        let claims = peers.screened_claims_of(peer);
        let own = self.own.as_ref();
        if own.is_some_and(|own| own.shared(network, peer, &claims).is_some()) {
            self.rivals.insert(peer.lease.seniority());
        }
    }

    /// Tells if a peer claims the keys of these objects already, and no others.
    fn claims_same(&self, key: &LeaseKey, compiled: &Compiled, units: &Units) -> bool {
        units.iter().all(|(family, unit)| {
            let claimed = self.keys.claims(&compiled.claimant(key, family));
            unit.len() == claimed.len() && unit.iter().zip(claimed).all(|(o, key)| o.key() == *key)
        })
    }

    /// Brings what is wanted under one key up to date; whether that changed it.
    fn want(&mut self, key: &ObjectKey, wanted: Option<Wanted>) -> bool {
        if self.desired.objects.get(key) == wanted.as_ref() {
            return false;
        }
        match wanted {
            Some(wanted) => self.desired.objects.insert(key.clone(), wanted),
            None => self.desired.objects.remove(key),
        };
        true
    }

    /// Brings what is said of one peer up to date.
    fn report(&mut self, key: LeaseKey) {
        let Some(peer) = self.peers.get(&key) else {
            self.rejections += u64::from(self.rejected.remove(&key).is_some());
            return;
        };
        let mut all = peer.rejections.clone();
        for family in peer.families.families() {
            if let Some(lost) = self.keys.lost(&peer.claimant(&key, family)) {
                let rejection = Rejection::KeyTaken {
                    key: lost.claim.clone(),
                    by: lost.by.seniority.key.clone(),
                };
                all.push((Some(family), rejection));
            }
        }
        let is_rejected = !all.is_empty();
        let before = match is_rejected {
            true => self.rejected.insert(key, all),
            false => self.rejected.remove(&key),
        };
        self.rejections += u64::from(is_rejected || before.is_some());
    }

    fn compile_local(&self, objects: Vec<Object>) -> Local {
        let mut local = Local::default();
        for mut object in objects {
            self.stamp(&mut object);
            if let Object::Link(link) = &object {
                local.macs.extend(link.mac);
            }
            local.objects.entry(object.key()).or_insert(object);
        }
        local
    }

    fn compile_peer(&self, network: &dyn Network, peer: &Peer) -> (Compiled, Units) {
        let mut units = Units::default();
        let mut compiled = Compiled {
            created: peer.lease.created,
            doubted: peer.doubted,
            families: DualStack::default(),
            rejections: Vec::new(),
        };
        for (family, rejection) in peer.rejected.iter() {
            let entry = (scope(family, rejection), rejection.clone());
            if !compiled.rejections.contains(&entry) {
                compiled.rejections.push(entry);
            }
        }
        if peer.subnets.is_empty() {
            return (compiled, units);
        }
        let answers = network.peer(&peer.lease, &peer.subnets);
        for (family, subnet) in peer.subnets.iter() {
            let objects = match answers.get(family) {
                Some(Ok(objects)) => objects.clone(),
                Some(Err(rejection)) => {
                    let rejection = rejection.clone();
                    compiled.rejections.push((Some(family), rejection));
                    continue;
                }
                None => continue,
            };
            let public_ip = peer.lease.attrs.public_ip(family);
            match self.check_unit(objects, subnet, public_ip, &units) {
                Ok(unit) => {
                    compiled.families.set(family, Some(()));
                    units.set(family, Some(unit));
                }
                Err(rejection) => compiled.rejections.push((Some(family), rejection)),
            }
        }
        (compiled, units)
    }

    /// A unit's objects, marked, if a peer may cause each of them.
    fn check_unit(
        &self,
        objects: Vec<Object>,
        subnet: &Subnet,
        public_ip: Option<IpAddr>,
        other: &DualStack<Vec<Object>>,
    ) -> Result<Vec<Object>, Rejection> {
        let mut unit = Objects::new();
        for mut object in objects {
            self.stamp(&mut object);
            let key = object.key();
            let other = other.values().flatten().find(|other| other.key() == key);
            let twice = unit.get(&key).or(other).is_some_and(|o| *o != object);
            if twice {
                let reason = "two different objects of this key are wanted for one peer";
                return Err(refuse(key, reason));
            }
            unit.insert(key, object);
        }
        let mut macs = unit.values().filter_map(mac_behind);
        if let Some(mac) = macs.find(|mac| self.local.macs.contains(mac)) {
            return Err(Rejection::OwnMac { mac });
        }
        for (key, object) in &unit {
            if let Err(reason) = self.check(key, object, subnet, public_ip, &unit) {
                return Err(refuse(key.clone(), reason));
            }
        }
        Ok(unit.into_values().collect())
    }

    /// The safety rule: whether a peer that holds a subnet may cause an object.
    fn check(
        &self,
        key: &ObjectKey,
        object: &Object,
        subnet: &Subnet,
        public_ip: Option<IpAddr>,
        unit: &Objects,
    ) -> Result<(), &'static str> {
        let local = &self.local;
        let makes = |key: ObjectKey| local.objects.contains_key(&key);
        if local.objects.contains_key(key) {
            return Err("the node itself needs it");
        }
        match object {
            Object::Link(_) | Object::Sysctl(_) | Object::Offload(_) | Object::Address(_) => {
                Err("a peer causes no device, address or setting")
            }
            Object::Tunnel(_) => Err("a peer causes no packet path"),
            Object::TunnelPeer(o) => {
                if !makes(ObjectKey::Tunnel(o.dev)) {
                    Err("it is of a packet path that the node does not make")
                } else if !subnet.contains(&o.subnet) {
                    Err("it is not in the peer's subnet")
                } else if Some(o.endpoint.ip()) != public_ip || o.endpoint.port() == 0 {
                    Err("its endpoint is not at the peer's public address")
                } else {
                    Ok(())
                }
            }
            Object::Fdb(Fdb { dev, mac, .. }) | Object::Neighbour(Neighbour { dev, mac, .. }) => {
                if !makes(ObjectKey::Link(*dev)) {
                    Err("it is on a device that the node does not make")
                } else if !mac.is_unicast() {
                    Err("its MAC is not that of one device")
                } else {
                    Ok(())
                }
            }
            Object::Nexthop(o) => {
                if o.id == nexthop_id(&self.overlay, o.gateway, o.dev, o.onlink) {
                    Ok(())
                } else {
                    Err("its id is not the one that nexthop_id gives")
                }
            }
            Object::Route(o) => {
                if !subnet.contains(&o.dst) {
                    return Err("its destination is not in the peer's subnet");
                }
                match &o.target {
                    RouteTarget::Gateway { .. }
                    | RouteTarget::Device(_)
                    | RouteTarget::Blackhole => Ok(()),
                    RouteTarget::Nexthop(id) => {
                        let nexthop = ObjectKey::Nexthop(*id);
                        if unit.contains_key(&nexthop) || makes(nexthop) {
                            Ok(())
                        } else {
                            Err("its nexthop is neither the peer's nor the node's")
                        }
                    }
                    RouteTarget::Paths(_) | RouteTarget::Other(_) => {
                        Err("its target is nothing that can be made")
                    }
                }
            }
        }
    }

    /// Puts the marks of ownership on.
    fn stamp(&self, object: &mut Object) {
        match object {
            Object::Link(link) => {
                link.alias.get_or_insert_with(|| self.overlay.link_alias());
            }
            Object::Nexthop(o) if o.protocol == RouteProtocol::UNSPEC => {
                o.protocol = self.protocol;
            }
            Object::Route(o) if o.protocol == RouteProtocol::UNSPEC => o.protocol = self.protocol,
            Object::Nexthop(_)
            | Object::Route(_)
            | Object::Sysctl(_)
            | Object::Offload(_)
            | Object::Address(_)
            | Object::Tunnel(_)
            | Object::TunnelPeer(_)
            | Object::Fdb(_)
            | Object::Neighbour(_) => {}
        }
    }
}

/// The family that a rejection is about; none if it is about the whole peer.
const fn scope(family: Family, rejection: &Rejection) -> Option<Family> {
    match rejection {
        Rejection::BackendType { .. } | Rejection::NoSubnet => None,
        _ => Some(family),
    }
}

fn refuse(key: ObjectKey, reason: &str) -> Rejection {
    Rejection::Unsafe {
        key,
        reason: reason.to_owned(),
    }
}
