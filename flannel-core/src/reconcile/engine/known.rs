//! The devices that are known as ours by more than their mark, over restarts too.

use super::Engine;
use crate::object::{Object, ObjectKey};
use crate::reconcile::known::{KnownLink, held_by_us};

/// The most devices that are remembered: a node has one a family and backend.
const MOST: usize = 8;

impl Engine {
    /// Takes up what an earlier run knew, if the namespace is the one that it knew it in.
    pub(super) fn remember_devices(&mut self) {
        let here = self.features.as_ref().and_then(|f| f.namespace.as_ref());
        if here.is_some() && here == self.saved.namespace.as_ref() {
            let saved = self.saved.devices.iter().take(MOST);
            self.known = saved.cloned().collect();
        }
    }

    /// Learns which devices are ours, whenever links were read: those that are wanted and bear our mark,
    /// and those whose packets this process carries.
    pub(super) fn know_devices(&mut self) {
        if !self.reconciler.links_were_read() {
            return;
        }
        let Some(observed) = self.reconciler.observed() else {
            return;
        };
        let alias = self.parts.name.link_alias();
        let objects = &observed.objects;
        let link_of = |key: &ObjectKey| match objects.get(key) {
            Some(Object::Link(link)) => Some(link),
            _ => None,
        };
        let wanted = self.compiler.desired().objects.keys();
        let wanted = wanted.map_while(|key| match key {
            ObjectKey::Link(_) => Some(link_of(key)),
            _ => None,
        });
        let marked = wanted
            .flatten()
            .filter(|link| link.alias.as_ref() == Some(&alias));
        let marked = marked.filter_map(|link| KnownLink::of(link, observed));
        let first = ObjectKey::Tunnel(crate::object::IfName::FIRST);
        let held = objects.range(first..);
        let held = held.map_while(|(key, _)| match key {
            ObjectKey::Tunnel(dev) => Some(link_of(&ObjectKey::Link(*dev))),
            _ => None,
        });
        let held = held.flatten().filter_map(|link| held_by_us(link, observed));
        let found: Vec<KnownLink> = marked.chain(held).collect();
        for known in found {
            match self
                .known
                .iter_mut()
                .find(|k| k.link.name == known.link.name)
            {
                Some(before) => *before = known,
                None => self.known.insert(0, known),
            }
        }
        self.known.truncate(MOST);
    }
}
