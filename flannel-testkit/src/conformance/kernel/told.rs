//! What a kernel tells of changes is enough to keep a copy of it: without doubt, the copy is right.

use std::collections::BTreeSet;
use std::time::Duration;

use flannel_core::{
    Change, ChangeStream, Family, IfName, Link, MacAddr, Object, ObjectKey, Objects, Op, Route,
    RouteTarget,
};

use super::Outcome;
use super::contract::{drain, next_fitting};
use super::fixture::{KernelFixture, making, same, text};

/// Our own changes are told like everybody's: with what now is, or as doubt about it.
pub async fn own_changes_are_told(fixture: &KernelFixture) -> Outcome {
    let mut told = fixture.kernel.changes();
    drain(&mut told).await;
    let mut ops: Vec<_> = fixture.world().into_iter().map(making).collect();
    let deletes: Vec<_> = ops
        .iter()
        .rev()
        .map(|op| Op::Delete(op.object().clone()))
        .collect();
    ops.extend(deletes);
    for op in ops {
        drain(&mut told).await;
        fixture.apply(std::slice::from_ref(&op)).await?;
        let fits = |change: &Change| match change {
            Change::Set(object) => {
                let is_it = match (object, op.object()) {
                    (Object::Link(told), Object::Link(asked)) => told.name == asked.name,
                    (told, asked) => told == asked,
                };
                is_it && !matches!(op, Op::Delete(_))
            }
            Change::Gone(key) => *key == op.key() && matches!(op, Op::Delete(_)),
            doubt => is_about(doubt, op.object()),
        };
        if next_fitting(&mut told, fits).await.is_none() {
            return Err(format!("nothing told of {} {}", op.verb(), op.object()));
        }
    }
    Ok(())
}

/// Whether doubt is about an object by itself.
fn is_about(doubt: &Change, object: &Object) -> bool {
    match (doubt, object) {
        (Change::All, _) | (Change::Route, Object::Nexthop(_) | Object::Route(_)) => true,
        (Change::Key(key), object) => *key == object.key(),
        (Change::Link(dev), Object::Link(_))
        | (Change::Address(dev), Object::Address(_))
        | (Change::Neighbour(dev), Object::Fdb(_) | Object::Neighbour(_)) => {
            dev.is_none() || *dev == object.dev()
        }
        _ => false,
    }
}

/// Whatever happens: who follows what is told, and doubts what needs a link, an address or a nexthop
/// object of which something else was told, believes of no key anything but what is there.
pub async fn the_last_word_about_a_key_is_right(fixture: &KernelFixture) -> Outcome {
    for family in fixture.families() {
        for (what, disturbance) in disturbances(fixture, family) {
            let mut told = fixture.kernel.changes();
            let mut objects = vec![fixture.vxlan(family)];
            for n in 2..6 {
                objects.extend(fixture.path(family, n));
            }
            objects.sort_by_key(Object::key);
            objects.dedup_by_key(|object| object.key());
            fixture.make(&objects).await?;
            drain(&mut told).await;
            let mut belief = Belief {
                objects: fixture.observe(&objects).await?.objects,
                doubts: BTreeSet::new(),
            };
            for op in disturbance {
                fixture.by_others(op).await?;
            }
            while let Some(change) = next(&mut told).await {
                belief.follow(change);
            }
            let observed = fixture.observe(&objects).await?.objects;
            belief
                .check(&observed)
                .map_err(|wrong| format!("{what}, {family}: {wrong}"))?;
            let device = fixture.vxlan(family);
            fixture.by_others(Op::Delete(device)).await?;
        }
    }
    Ok(())
}

async fn next(told: &mut ChangeStream) -> Option<Change> {
    let next = std::future::poll_fn(|cx| told.as_mut().poll_next(cx));
    tokio::time::timeout(Duration::from_millis(200), next)
        .await
        .ok()
        .flatten()
}

/// What others may do to the paths of peers, each from the beginning.
fn disturbances(fixture: &KernelFixture, family: Family) -> Vec<(&'static str, Vec<Op>)> {
    let path = fixture.path(family, 3);
    let of = |kind: &str| path.iter().find(|object| object.key().kind() == kind);
    let mut all = Vec::new();
    let Object::Link(link) = fixture.vxlan(family) else {
        return all;
    };
    for kind in ["fdb", "neighbour", "nexthop", "route", "address"] {
        if let Some(object) = of(kind) {
            all.push((kind, vec![Op::Delete(object.clone())]));
        }
    }
    if let Some(Object::Route(route)) = of("route") {
        let theirs = Route {
            target: RouteTarget::Device(link.name),
            ..route.clone()
        };
        let ours = Object::Route(route.clone());
        all.push((
            "a route there and back",
            vec![
                Op::Change(Object::Route(theirs.clone())),
                Op::Delete(Object::Route(theirs)),
                Op::Create(ours.clone()),
                Op::Delete(ours.clone()),
                Op::Create(ours),
            ],
        ));
    }
    if let Some(Object::Neighbour(neighbour)) = of("neighbour") {
        let mut other = neighbour.clone();
        other.mac = MacAddr([0x0e, 9, 9, 9, 9, 9]);
        all.push((
            "another neighbour",
            vec![Op::Change(Object::Neighbour(other))],
        ));
    }
    let down = Link {
        up: false,
        ..link.clone()
    };
    let mac = Link {
        mac: Some(MacAddr([0x0e, 0, 0, 0, 0, 9])),
        ..link.clone()
    };
    let [down, mac, up] = [down, mac, link].map(Object::Link);
    all.push(("down", vec![Op::Change(down.clone())]));
    all.push((
        "down and up",
        vec![Op::Change(down), Op::Change(up.clone())],
    ));
    all.push(("another MAC", vec![Op::Change(mac)]));
    all.push(("made anew", vec![Op::Delete(up.clone()), Op::Create(up)]));
    all
}

/// What is believed of a kernel.
struct Belief {
    objects: Objects,
    doubts: BTreeSet<ObjectKey>,
}

impl Belief {
    fn follow(&mut self, change: Change) {
        match change {
            Change::Set(object) => {
                self.objects.insert(object.key(), object);
            }
            Change::Gone(key) => {
                self.objects.remove(&key);
                match key {
                    ObjectKey::Link(dev) | ObjectKey::Address { dev, .. } => self.doubt(dev),
                    ObjectKey::Nexthop(id) => {
                        let through = |object: &Object| {
                            matches!(object, Object::Route(route)
                                if route.target == RouteTarget::Nexthop(id))
                        };
                        self.doubt_all(through);
                    }
                    _ => {}
                }
            }
            Change::Key(key) => {
                self.doubts.insert(key);
            }
            Change::Link(Some(dev)) | Change::Address(Some(dev)) | Change::Neighbour(Some(dev)) => {
                self.doubt(dev);
            }
            _ => self.doubt_all(|_| true),
        }
    }

    fn doubt(&mut self, dev: IfName) {
        let nexthops: BTreeSet<u32> = self
            .objects
            .values()
            .filter_map(|object| match object {
                Object::Nexthop(nexthop) if nexthop.dev == dev => Some(nexthop.id),
                _ => None,
            })
            .collect();
        self.doubt_all(|object| {
            object.dev() == Some(dev)
                || matches!(object, Object::Route(route)
                    if matches!(route.target, RouteTarget::Nexthop(id) if nexthops.contains(&id)))
        });
    }

    fn doubt_all(&mut self, fits: impl Fn(&Object) -> bool) {
        let keys = self.objects.iter().filter(|(_, object)| fits(object));
        let keys: Vec<_> = keys.map(|(key, _)| key.clone()).collect();
        self.doubts.extend(keys);
    }

    fn check(&self, observed: &Objects) -> Outcome {
        for key in self.objects.keys().chain(observed.keys()) {
            // Links and addresses are read; a link's own address comes when it likes.
            let is_read = matches!(key, ObjectKey::Link(_) | ObjectKey::Address { .. });
            let (believed, is) = (self.objects.get(key), observed.get(key));
            if !is_read && believed != is && !self.doubts.contains(key) {
                return Err(format!(
                    "{key} is believed to be {believed:?} and is {is:?}"
                ));
            }
        }
        Ok(())
    }
}

/// What is read of some keys alone is what a reading of everything shows of them.
pub async fn keys_alone_are_those_of_the_whole(fixture: &KernelFixture) -> Outcome {
    let samples = fixture.samples();
    fixture.make(&samples).await?;
    let mut keys: BTreeSet<ObjectKey> = samples.iter().map(Object::key).collect();
    let mut whole = fixture.observe(&samples).await?.objects;
    whole.retain(|key, _| keys.contains(key));
    // Of these there are none.
    for family in fixture.families() {
        keys.extend(fixture.path(family, 200).iter().map(Object::key));
    }
    let own: BTreeSet<ObjectKey> = whole.keys().cloned().collect();
    keys.retain(|key| own.contains(key) || !matches!(key, ObjectKey::Address { .. }));
    let alone = fixture.kernel.read(&keys).await.map_err(text)?;
    same("keys, read alone,", &whole, &alone)?;
    for key in keys {
        let alone = fixture.kernel.read(&[key.clone()].into()).await;
        let alone = alone.map_err(text)?;
        if alone.get(&key) != whole.get(&key) || alone.len() > 1 {
            return Err(format!("{key}: {alone:?} instead of {:?}", whole.get(&key)));
        }
    }
    Ok(())
}

/// Links and addresses that are read alone are those that a reading of everything shows.
pub async fn links_alone_are_those_of_the_whole(fixture: &KernelFixture) -> Outcome {
    fixture.make(&fixture.samples()).await?;
    let mut whole = fixture.observe(&[]).await?;
    let is_asked = |key: &ObjectKey| matches!(key, ObjectKey::Link(_) | ObjectKey::Address { .. });
    whole.objects.retain(|key, _| is_asked(key));
    let alone = fixture.kernel.links().await.map_err(text)?;
    same("state, links read alone,", &whole, &alone)
}
