//! [`KnownLink`]: a device of ours by what cannot be taken from it as its mark can.

use serde::{Deserialize, Serialize};

use super::ownership::bears_the_mark_of_an_overlay;
use super::plan::difference;
use crate::kernel::Observed;
use crate::object::{Link, Object, ObjectKey};

/// A device that bore our mark, or whose queues this process holds. As long as its namespace is the same,
/// its index is that of no other device, so it stays ours though somebody takes its alias away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownLink {
    /// Its index in the namespace.
    pub index: u32,
    /// The device as it was last seen, without what is changed in place.
    pub link: Link,
}

impl KnownLink {
    /// A device that is there, as ours.
    pub(crate) fn of(link: &Link, observed: &Observed) -> Option<Self> {
        let index = index_of(link, observed)?;
        let link = Link {
            mtu: None,
            up: true,
            alias: None,
            ..link.clone()
        };
        Some(Self { index, link })
    }

    /// Tells if a device that is there is this one: the same name, index and hardware address, and
    /// nothing else about it that only a new device could have. That of another overlay is not.
    pub fn is(&self, link: &Link, observed: &Observed) -> bool {
        let alias = link.alias.as_deref().unwrap_or_default();
        link.name == self.link.name
            && link.mac == self.link.mac
            && !bears_the_mark_of_an_overlay(alias)
            && self.is_of_one_nature(link)
            && index_of(link, observed) == Some(self.index)
    }

    fn is_of_one_nature(&self, link: &Link) -> bool {
        let (known, found) = (Object::Link(self.link.clone()), Object::Link(link.clone()));
        difference(&known, &found).is_none_or(|difference| difference.in_place)
    }
}

/// The device of a packet path that runs in this process, as one that is known: nobody but its holder
/// attaches to it. `None`: it is no TUN device, or bears a mark.
pub(crate) fn held_by_us(link: &Link, observed: &Observed) -> Option<KnownLink> {
    let alias = link.alias.as_deref().unwrap_or_default();
    let runs = observed.objects.contains_key(&ObjectKey::Tunnel(link.name));
    let is_ours = runs && !bears_the_mark_of_an_overlay(alias);
    KnownLink::of(link, observed).filter(|_| is_ours)
}

/// The index of a device, as links are read.
fn index_of(link: &Link, observed: &Observed) -> Option<u32> {
    let found = observed.links.iter().find(|info| info.name == link.name)?;
    Some(found.index)
}
