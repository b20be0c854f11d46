//! [`Copy`]: what the kernel is believed to have, kept up by its own notifications.
//!
//! A whole reading makes the copy; from then on notifications and our own changes alter it, each in a
//! time that does not depend on how much there is. What cannot be known from them is *doubt*, which
//! names what is to be read: some keys, the links and addresses, or everything.
//!
//! A notification can be older than what the copy has: it waited in a queue while the kernel was read
//! or changed. So each entry bears a stamp. A notification that contradicts an entry that was read or
//! changed a short while ago is no fact but doubt about that key, and so is one that says that all is as
//! wanted where it was not: believed wrongly, it would hide a fault. All others are facts, because what
//! follows from a wrong one is a change that makes nothing that is not there already, and such a change
//! is not told, so that its key is read.
//!
//! Of each change that we make its notification is awaited. It is the kernel's own word for what it has
//! now; without it the key is read.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Moment;
use crate::compact::compact_map;
use crate::kernel::{Change, Observed, Op};
use crate::object::{IfName, Link, Object, ObjectKey, Objects, Route, RouteTarget};
use crate::subnet::Subnet;
use crate::underlay::LinkInfo;

/// The longest time that a notification is expected to take. Linux puts it into the queue before it
/// answers, so this is how long our own threads may be kept from running.
pub(super) const TOLD_WITHIN: Duration = Duration::from_millis(200);

/// More doubtful keys than these are read with everything else.
pub(super) const MANY: usize = 1000;

/// The copy.
#[derive(Debug, Default)]
pub(super) struct Copy {
    observed: Option<Arc<Observed>>,
    /// How many routes lead through a nexthop object.
    through: BTreeMap<u32, u32>,
    /// The devices whose neighbours and forwarding entries it has.
    devices: BTreeSet<IfName>,
    /// When everything was read.
    read: Moment,
    /// The stamps of entries that are younger than the whole reading.
    stamps: BTreeMap<ObjectKey, Stamp>,
    /// The stamps in the order of time; one that was replaced since stands here still.
    queue: VecDeque<(Moment, ObjectKey)>,
    /// How many of the stamps are of changes whose notification is awaited.
    awaited: usize,
    doubts: Doubts,
    news: News,
    /// While everything is read aside: what else was learnt since that began.
    aside: Option<Aside>,
}

/// What is younger than a reading that is under way.
#[derive(Debug, Default)]
struct Aside {
    keys: BTreeSet<ObjectKey>,
    /// Links and addresses were read.
    links: bool,
}

/// When and how an entry came to be what it is.
#[derive(Debug, PartialEq, Eq)]
enum Stamp {
    Read(Moment),
    /// Changed by us: what its notification should say.
    Changed(Moment, Option<Object>),
}

/// What has to be read before it is believed again.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Doubts {
    /// Everything.
    pub(super) all: bool,
    /// Links and addresses.
    pub(super) links: bool,
    /// What is under these keys.
    pub(super) keys: BTreeSet<ObjectKey>,
}

impl Doubts {
    fn add(&mut self, key: ObjectKey) {
        match key {
            ObjectKey::Link(_) | ObjectKey::Address { .. } => self.links = true,
            key => {
                self.keys.insert(key);
            }
        }
        if self.keys.len() > MANY {
            self.all = true;
            self.keys.clear();
        }
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What the copy has learnt since it was asked last.
#[derive(Debug, Default)]
pub(super) struct News {
    /// The keys under which there is something else than was believed.
    pub(super) touched: BTreeSet<ObjectKey>,
    /// Changes of ours that the kernel has confirmed.
    pub(super) confirmed: Vec<ObjectKey>,
    /// Destinations of routes that came, went or changed.
    pub(super) routes: BTreeSet<Subnet>,
    /// Routes that are what they were but for their number: before and after.
    pub(super) renumbered: Vec<(Route, Route)>,
    /// Links or addresses are not what they were.
    pub(super) host: bool,
    /// Links were read.
    pub(super) links: bool,
}

impl Copy {
    pub(super) const fn observed(&self) -> Option<&Arc<Observed>> {
        self.observed.as_ref()
    }

    pub(super) const fn doubts(&self) -> &Doubts {
        &self.doubts
    }

    pub(super) fn take_news(&mut self) -> News {
        std::mem::take(&mut self.news)
    }

    /// Whether nothing is in doubt and no notification is awaited.
    pub(super) fn is_settled(&self) -> bool {
        self.awaited == 0 && self.doubts.is_empty()
    }

    /// When the first notification that is awaited has to be there.
    pub(super) fn deadline(&self) -> Option<Moment> {
        if self.awaited == 0 {
            return None;
        }
        let is_awaited = |(at, key): &&(Moment, ObjectKey)| matches!(self.stamps.get(key), Some(Stamp::Changed(since, _)) if since == at);
        let (at, _) = self.queue.iter().find(is_awaited)?;
        Some(*at + TOLD_WITHIN)
    }

    /// Forgets stamps that say nothing any more. Whose notification has not come is in doubt.
    pub(super) fn pass(&mut self, now: Moment) {
        while self
            .queue
            .front()
            .is_some_and(|(at, _)| *at + TOLD_WITHIN <= now)
        {
            let Some((at, key)) = self.queue.pop_front() else {
                return;
            };
            match self.stamps.get(&key) {
                Some(Stamp::Read(since)) if *since == at => {
                    self.stamps.remove(&key);
                }
                Some(Stamp::Changed(since, _)) if *since == at => {
                    self.unstamp(&key);
                    self.doubts.add(key);
                }
                _ => {}
            }
        }
        // After very many changes it is long and empty.
        if self.queue.is_empty() && self.queue.capacity() > MANY {
            self.queue = VecDeque::new();
        }
    }

    pub(super) fn doubt_all(&mut self) {
        self.doubts.all = true;
    }

    pub(super) fn doubt(&mut self, keys: impl IntoIterator<Item = ObjectKey>) {
        for key in keys {
            self.doubts.add(key);
        }
    }

    /// Takes notifications in. `wanted` is what should be under a key.
    pub(super) fn told<'a>(
        &mut self,
        changes: Vec<Change>,
        now: Moment,
        wanted: impl Fn(&ObjectKey) -> Option<&'a Object>,
    ) {
        let mut fallen = BTreeSet::new();
        for change in changes {
            match change {
                Change::Set(Object::Link(_) | Object::Address(_)) => self.doubts.links = true,
                Change::Set(object) => {
                    let key = object.key();
                    let is_wanted = wanted(&key) == Some(&object);
                    self.told_of(key, Some(object), now, is_wanted);
                }
                Change::Link(Some(dev))
                | Change::Address(Some(dev))
                | Change::Gone(ObjectKey::Link(dev) | ObjectKey::Address { dev, .. }) => {
                    self.doubts.links = true;
                    fallen.insert(dev);
                }
                Change::Gone(key) => self.told_of(key, None, now, false),
                Change::Key(key) if self.is_out_of_scope(&key) => {}
                Change::Key(key) => self.doubts.add(key),
                Change::Neighbour(Some(dev)) if !self.devices.contains(&dev) => {}
                // No object: the checks of the host hear of it.
                Change::Policy => {}
                Change::Link(None)
                | Change::Address(None)
                | Change::Neighbour(_)
                | Change::Route
                | Change::All => self.doubts.all = true,
            }
        }
        self.doubt_what_is_on(&fallen);
    }

    fn told_of(&mut self, key: ObjectKey, is: Option<Object>, now: Moment, is_wanted: bool) {
        let Some(observed) = &self.observed else {
            return;
        };
        if self.is_out_of_scope(&key) {
            return;
        }
        if let Some(aside) = &mut self.aside {
            aside.keys.insert(key.clone());
        }
        let was = observed.objects.get(&key);
        let is_confirmed = was == is.as_ref()
            && matches!(self.stamps.get(&key), Some(Stamp::Changed(_, told)) if *told == is);
        if is_confirmed {
            self.unstamp(&key);
            self.news.confirmed.push(key);
            return;
        }
        if was == is.as_ref() {
            self.doubt_what_fell_with(&key, is.is_none());
            return;
        }
        let several = [was, is.as_ref()].into_iter().flatten().any(may_be_several);
        self.doubt_what_fell_with(&key, is.is_none());
        let is_young = self.read + TOLD_WITHIN > now || self.stamps.contains_key(&key);
        if is_young || is_wanted || several {
            self.doubts.add(key);
        } else {
            self.set(key, is);
        }
    }

    fn is_out_of_scope(&self, key: &ObjectKey) -> bool {
        matches!(key, ObjectKey::Fdb { dev, .. } | ObjectKey::Neighbour { dev, .. }
            if !self.devices.contains(dev))
    }

    /// Notes a change of ours that succeeded.
    pub(super) fn changed(&mut self, op: &Op, now: Moment) {
        let key = op.key();
        let is = outcome(op);
        self.put(&key, is.clone());
        match (&key, op) {
            (ObjectKey::Link(_), _) => {
                self.doubts.all = true;
                return;
            }
            // Routes and neighbours go with the last address of a device.
            (ObjectKey::Address { dev, .. }, Op::Delete(_)) => {
                self.doubt_what_is_on(&BTreeSet::from([*dev]));
            }
            (ObjectKey::Nexthop(id), Op::Delete(_)) => self.doubt_routes_through(*id),
            // Of these there is no word: they are looked at.
            (
                ObjectKey::Sysctl { .. }
                | ObjectKey::Offload { .. }
                | ObjectKey::Tunnel(_)
                | ObjectKey::TunnelPeer { .. },
                _,
            ) => {
                self.doubts.add(key);
                return;
            }
            _ => {}
        }
        self.stamp(key, now, Stamp::Changed(now, is));
    }

    /// The same of one of so many changes that everything is read after them.
    pub(super) fn changed_among_many(&mut self, op: &Op) {
        self.unstamp(&op.key());
        self.put(&op.key(), outcome(op));
    }

    /// Takes a whole reading in.
    pub(super) fn read_all(
        &mut self,
        mut observed: Observed,
        devices: BTreeSet<IfName>,
        now: Moment,
    ) {
        compact_map(&mut observed.objects);
        let before = self.observed.take().unwrap_or_default();
        let changed = different(&before.objects, &observed.objects);
        let renumbered = changed
            .filter_map(|key| renumbered(before.objects.get(key), observed.objects.get(key)))
            .collect();
        *self = Self {
            through: count_routes(&observed.objects),
            observed: Some(Arc::new(observed)),
            devices,
            read: now,
            news: News {
                host: true,
                links: true,
                renumbered,
                ..News::default()
            },
            ..Self::default()
        };
    }

    /// A reading of everything begins that is taken in when it is done, and nobody waits for it.
    pub(super) fn begin_aside(&mut self) {
        self.aside = Some(Aside::default());
    }

    /// Takes in the reading that began then. What was learnt since may be younger: it stays, and is in
    /// doubt where the reading has something else.
    pub(super) fn read_aside(&mut self, mut found: Observed, now: Moment) {
        let Some(Aside { keys, links }) = self.aside.take() else {
            return;
        };
        let Some(observed) = &self.observed else {
            return;
        };
        let is_host =
            |key: &ObjectKey| matches!(key, ObjectKey::Link(_) | ObjectKey::Address { .. });
        if links {
            self.doubts.links = true;
            found.objects.retain(|key, _| !is_host(key));
            let own = observed.objects.range(..ObjectKey::Tunnel(IfName::FIRST));
            let own = own.filter(|(key, _)| is_host(key));
            found
                .objects
                .extend(own.map(|(key, o)| (key.clone(), o.clone())));
            found.links.clone_from(&observed.links);
            found.addresses.clone_from(&observed.addresses);
        }
        for key in keys {
            let believed = observed.objects.get(&key);
            if believed == found.objects.get(&key) {
                continue;
            }
            match believed {
                Some(object) => found.objects.insert(key.clone(), object.clone()),
                None => found.objects.remove(&key),
            };
            self.doubts.add(key);
        }
        self.news.links = true;
        self.news.host |= observed.links != found.links || observed.addresses != found.addresses;
        for key in different(&observed.objects, &found.objects) {
            let changed = renumbered(observed.objects.get(key), found.objects.get(key));
            self.news.renumbered.extend(changed);
            if let ObjectKey::Route { dst, .. } = key {
                self.news.routes.insert(*dst);
            }
            self.news.touched.insert(key.clone());
        }
        compact_map(&mut found.objects);
        self.through = count_routes(&found.objects);
        self.read = now;
        self.observed = Some(Arc::new(found));
    }

    /// Takes a reading of some keys in.
    pub(super) fn read_keys(&mut self, keys: BTreeSet<ObjectKey>, mut found: Objects, now: Moment) {
        for key in keys {
            self.doubts.keys.remove(&key);
            if let Some(aside) = &mut self.aside {
                aside.keys.insert(key.clone());
            }
            let is = found.remove(&key);
            let was = self.observed.as_ref().and_then(|o| o.objects.get(&key));
            if was == is.as_ref() {
                self.news.confirmed.push(key.clone());
            } else {
                self.set(key.clone(), is);
            }
            self.stamp(key, now, Stamp::Read(now));
        }
    }

    /// Takes a reading of links and addresses in. What is on a device that is not what it was may have
    /// gone with that, and not every kernel says so.
    pub(super) fn read_links(&mut self, found: Observed) {
        self.doubts.links = false;
        if let Some(aside) = &mut self.aside {
            aside.links = true;
        }
        let Some(observed) = &mut self.observed else {
            return;
        };
        self.news.links = true;
        let is_host =
            |key: &ObjectKey| matches!(key, ObjectKey::Link(_) | ObjectKey::Address { .. });
        let mut fallen = BTreeSet::new();
        let mut touched = BTreeSet::new();
        let was: Vec<_> = observed
            .objects
            .range(..ObjectKey::Tunnel(IfName::FIRST))
            .filter(|(key, _)| is_host(key))
            .map(|(key, object)| (key.clone(), object.clone()))
            .collect();
        let info = |links: &[LinkInfo]| -> BTreeMap<IfName, (u32, Option<IfName>)> {
            let links = links.iter();
            links
                .map(|link| (link.name, (link.index, link.master)))
                .collect()
        };
        let (were, are) = (info(&observed.links), info(&found.links));
        for (key, was) in &was {
            let is = found.objects.get(key);
            if is == Some(was)
                && (!matches!(key, ObjectKey::Link(_)) || same_info(key, &were, &are))
            {
                continue;
            }
            touched.insert(key.clone());
            if is.is_none_or(|is| takes_along(was, is)) || !same_info(key, &were, &are) {
                fallen.extend(was.dev());
            }
        }
        let new = found
            .objects
            .iter()
            .filter(|(key, _)| is_host(key) && !observed.objects.contains_key(key));
        for (key, _) in new {
            touched.insert(key.clone());
            // What is on it was never read.
            self.doubts.all |= matches!(key, ObjectKey::Link(dev) if self.devices.contains(dev));
        }
        self.news.host |= observed.links != found.links || observed.addresses != found.addresses;
        let observed = Arc::make_mut(observed);
        for (key, _) in was {
            observed.objects.remove(&key);
        }
        observed.links = found.links;
        observed.addresses = found.addresses;
        let host = found.objects.into_iter().filter(|(key, _)| is_host(key));
        observed.objects.extend(host);
        for key in &touched {
            if let Some(Stamp::Changed(..)) = self.stamps.get(key) {
                self.unstamp(key);
            }
        }
        self.confirm_host();
        self.news.touched.extend(touched);
        self.doubt_what_is_on(&fallen);
    }

    /// Changes of addresses are confirmed by a reading that shows them.
    fn confirm_host(&mut self) {
        let host = |(key, stamp): (&ObjectKey, &Stamp)| {
            let is_address = matches!(key, ObjectKey::Address { .. });
            (is_address && matches!(stamp, Stamp::Changed(..))).then(|| key.clone())
        };
        let confirmed: Vec<_> = self.stamps.iter().filter_map(host).collect();
        for key in confirmed {
            self.unstamp(&key);
            self.news.confirmed.push(key);
        }
    }

    fn doubt_what_is_on(&mut self, devs: &BTreeSet<IfName>) {
        let Some(observed) = self.observed.clone().filter(|_| !devs.is_empty()) else {
            return;
        };
        let is_on = |dev: Option<IfName>| dev.is_some_and(|dev| devs.contains(&dev));
        let may_be_on = |object: &Object| match object {
            Object::Link(_) | Object::Address(_) => false,
            Object::Route(route) => match route.target {
                // Through one that is not known it may lead anywhere.
                RouteTarget::Nexthop(id) => observed
                    .objects
                    .get(&ObjectKey::Nexthop(id))
                    .is_none_or(|nexthop| is_on(nexthop.dev())),
                _ => is_on(object.dev()),
            },
            object => is_on(object.dev()),
        };
        for (key, object) in &observed.objects {
            if may_be_on(object) {
                self.doubts.add(key.clone());
            }
        }
    }

    /// Believes something else of a key than before, with what follows from it.
    fn set(&mut self, key: ObjectKey, is: Option<Object>) {
        self.unstamp(&key);
        let was = self.observed.as_ref().and_then(|o| o.objects.get(&key));
        self.news.renumbered.extend(renumbered(was, is.as_ref()));
        let is_gone = is.is_none();
        self.put(&key, is);
        if let ObjectKey::Route { dst, .. } = key {
            self.news.routes.insert(dst);
        }
        self.doubt_what_fell_with(&key, is_gone);
        self.news.touched.insert(key);
    }

    /// What goes without a word with what was under a key, if that is gone, be it for a moment.
    fn doubt_what_fell_with(&mut self, key: &ObjectKey, is_gone: bool) {
        match (key, &self.observed) {
            (ObjectKey::Nexthop(id), _) if is_gone => self.doubt_routes_through(*id),
            (ObjectKey::Tunnel(dev), Some(observed)) => {
                let peers = observed.objects.range(key.clone()..);
                let peers = peers.map(|(key, _)| key).filter(
                    |key| matches!(key, ObjectKey::TunnelPeer { dev: on, .. } if on == dev),
                );
                for key in peers {
                    self.doubts.add(key.clone());
                }
            }
            _ => {}
        }
    }

    /// IPv4 routes go so with a nexthop object.
    fn doubt_routes_through(&mut self, id: u32) {
        let Some(observed) = self
            .observed
            .as_ref()
            .filter(|_| self.through.contains_key(&id))
        else {
            return;
        };
        let routes = observed.objects.range(ObjectKey::Nexthop(u32::MAX)..);
        for (key, _) in routes.filter(|(_, object)| nexthop_of(object) == Some(id)) {
            self.doubts.add(key.clone());
        }
    }

    fn put(&mut self, key: &ObjectKey, is: Option<Object>) {
        if let Some(aside) = &mut self.aside {
            aside.keys.insert(key.clone());
        }
        let observed = Arc::make_mut(self.observed.get_or_insert_default());
        if let Some(id) = is.as_ref().and_then(nexthop_of) {
            *self.through.entry(id).or_default() += 1;
        }
        let was = match is {
            Some(object) => observed.objects.insert(key.clone(), object),
            None => observed.objects.remove(key),
        };
        if let Some(id) = was.as_ref().and_then(nexthop_of)
            && let Some(count) = self.through.get_mut(&id)
        {
            *count -= 1;
            if *count == 0 {
                self.through.remove(&id);
            }
        }
    }

    fn stamp(&mut self, key: ObjectKey, now: Moment, stamp: Stamp) {
        self.unstamp(&key);
        self.awaited += usize::from(matches!(stamp, Stamp::Changed(..)));
        self.queue.push_back((now, key.clone()));
        self.stamps.insert(key, stamp);
    }

    fn unstamp(&mut self, key: &ObjectKey) {
        if let Some(Stamp::Changed(..)) = self.stamps.remove(key) {
            self.awaited -= 1;
        }
    }
}

/// The route before and after, if only its number is another.
fn renumbered(was: Option<&Object>, is: Option<&Object>) -> Option<(Route, Route)> {
    let (Some(Object::Route(was)), Some(Object::Route(is))) = (was, is) else {
        return None;
    };
    let alike = was.protocol != is.protocol && was.target == is.target;
    (alike && was.with_number(is.protocol) == *is).then(|| (was.clone(), is.clone()))
}

/// The nexthop object that a route leads through.
const fn nexthop_of(object: &Object) -> Option<u32> {
    match object {
        Object::Route(route) => match route.target {
            RouteTarget::Nexthop(id) => Some(id),
            _ => None,
        },
        _ => None,
    }
}

/// How many routes lead through each nexthop object.
fn count_routes(objects: &Objects) -> BTreeMap<u32, u32> {
    let mut through = BTreeMap::new();
    let routes = objects.range(ObjectKey::Nexthop(u32::MAX)..);
    for id in routes.filter_map(|(_, object)| nexthop_of(object)) {
        *through.entry(id).or_default() += 1;
    }
    through
}

/// The keys under which two readings have not the same.
fn different<'a>(one: &'a Objects, other: &'a Objects) -> impl Iterator<Item = &'a ObjectKey> {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    std::iter::from_fn(move || {
        loop {
            let order = match (one.peek(), other.peek()) {
                (Some((a, _)), Some((b, _))) => a.cmp(b),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return None,
            };
            match order {
                Ordering::Less => return one.next().map(|(key, _)| key),
                Ordering::Greater => return other.next().map(|(key, _)| key),
                Ordering::Equal => {
                    let (a, b) = (one.next(), other.next());
                    if a != b {
                        return a.map(|(key, _)| key);
                    }
                }
            }
        }
    })
}

/// What is under the key of a change that succeeded.
fn outcome(op: &Op) -> Option<Object> {
    match op {
        Op::Create(object) | Op::Change(object) => Some(object.clone()),
        Op::Delete(_) => None,
    }
}

/// Whether there may be more of its kind under one key: connected and default routes, of which each
/// device may have its own.
fn may_be_several(object: &Object) -> bool {
    matches!(object, Object::Route(route)
        if route.dst.len() == 0 || matches!(route.target, RouteTarget::Device(_)))
}

fn same_info(
    key: &ObjectKey,
    were: &BTreeMap<IfName, (u32, Option<IfName>)>,
    are: &BTreeMap<IfName, (u32, Option<IfName>)>,
) -> bool {
    match key {
        ObjectKey::Link(dev) => were.get(dev) == are.get(dev),
        _ => true,
    }
}

/// Whether a link that became another takes along what is on it.
fn takes_along(was: &Object, is: &Object) -> bool {
    match (was, is) {
        (Object::Link(was), Object::Link(is)) => {
            let Link { up, mac, kind, .. } = is;
            (was.up && !up) || was.mac != *mac || was.kind != *kind
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
