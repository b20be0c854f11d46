//! The copy against a kernel of a few objects, under every history of changes and notifications.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;

use super::{Copy, TOLD_WITHIN};
use crate::clock::Moment;
use crate::kernel::{Change, Observed, Op};
use crate::object::{
    IfName, Link, LinkKind, MAIN_TABLE, MacAddr, Neighbour, Nexthop, Object, ObjectKey, Route,
    RouteProtocol, RouteTarget,
};

/// Objects are told apart by number; each may be in one of several ways, the first of which is wanted.
const NEIGHBOURS: u8 = 2;
const NEXTHOPS: u8 = 2;
const ROUTES: u8 = 4;
const ALL: u8 = NEIGHBOURS + NEXTHOPS + ROUTES;
const WAYS: u8 = 3;

#[derive(Debug, Clone)]
enum Act {
    /// Somebody makes an object so, or removes it.
    Foreign(u8, Option<u8>),
    /// We make it as wanted, or remove it.
    Ours(u8, bool),
    /// The same, and the kernel says that it did and does not.
    Ignored(u8, bool),
    /// The device goes down, or down and up again.
    Down,
    Flap,
    /// The device is made anew.
    Remade,
    /// So many notifications arrive.
    Deliver(u8),
    /// All that were not delivered are lost, and that is told.
    Lose,
    /// What is in doubt is read.
    Serve,
    /// Everything is read.
    ReadAll,
    /// A reading of everything begins, or is done that began before.
    Aside,
    Pass(u64),
    /// The notification with this number comes twice, the second time last.
    Repeat(u8),
    /// Two notifications change places.
    Swap(u8, u8),
}

fn act(with_disorder: bool) -> impl Strategy<Value = Act> {
    let object = 0..ALL;
    let way = prop::option::of(0..WAYS);
    let disorder = if with_disorder { 3 } else { 1 };
    prop_oneof![
        6 => (object.clone(), way).prop_map(|(n, way)| Act::Foreign(n, way)),
        4 => (object.clone(), any::<bool>()).prop_map(|(n, made)| Act::Ours(n, made)),
        1 => (object, any::<bool>()).prop_map(|(n, made)| Act::Ignored(n, made)),
        1 => Just(Act::Down),
        1 => Just(Act::Flap),
        1 => Just(Act::Remade),
        5 => (0_u8..6).prop_map(Act::Deliver),
        1 => Just(Act::Lose),
        2 => Just(Act::Serve),
        1 => Just(Act::ReadAll),
        3 => Just(Act::Aside),
        3 => (0_u64..400).prop_map(Act::Pass),
        disorder => (0_u8..8).prop_map(Act::Repeat),
        disorder => (0_u8..8, 0_u8..8).prop_map(|(a, b)| Act::Swap(a, b)),
    ]
    .prop_filter("in order", move |act| {
        with_disorder || !matches!(act, Act::Repeat(_) | Act::Swap(..))
    })
}

fn dev() -> IfName {
    IfName::new("flannel.1").expect("a device name")
}

fn ip(n: u8) -> IpAddr {
    [10, 0, n, 0].into()
}

/// The object with a number, in one of its ways.
fn object(n: u8, way: u8) -> Object {
    if n < NEIGHBOURS {
        return Object::Neighbour(Neighbour {
            dev: dev(),
            ip: ip(n),
            mac: MacAddr([2, 0, 0, 0, n, way]),
        });
    }
    let n = n - NEIGHBOURS;
    if n < NEXTHOPS {
        return Object::Nexthop(Nexthop {
            id: u32::from(n) + 1,
            gateway: ip(n + 10 * way),
            dev: dev(),
            onlink: true,
            protocol: RouteProtocol::OURS,
        });
    }
    let n = n - NEXTHOPS;
    let target = match way {
        0 => RouteTarget::Nexthop(u32::from(n % NEXTHOPS) + 1),
        1 => RouteTarget::Device(dev()),
        _ => RouteTarget::Blackhole,
    };
    Object::Route(Route {
        table: MAIN_TABLE,
        dst: format!("10.0.{n}.0/24").parse().expect("a subnet"),
        metric: 0,
        target,
        protocol: RouteProtocol::OURS,
        source: None,
    })
}

fn wanted() -> Vec<Object> {
    (0..ALL).map(|n| object(n, 0)).collect()
}

struct World {
    kernel: Observed,
    /// Told and not delivered.
    told: VecDeque<Change>,
    copy: Copy,
    /// What is being read aside: the kernel as it was at some moment since that began.
    aside: Option<Observed>,
    now: Moment,
    wanted: Vec<Object>,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            kernel: Observed::default(),
            told: VecDeque::new(),
            copy: Copy::default(),
            aside: None,
            now: Moment::default(),
            wanted: wanted(),
        };
        world.put_link(true);
        world.told.clear();
        world.read_all();
        world
    }

    fn put_link(&mut self, up: bool) {
        let link = Object::Link(Link {
            name: dev(),
            kind: LinkKind::Bridge,
            mtu: None,
            mac: None,
            up,
            alias: None,
        });
        self.kernel.objects.insert(link.key(), link.clone());
        self.told.push_back(if up {
            Change::Set(link)
        } else {
            Change::Link(Some(dev()))
        });
    }

    fn has(&self, key: &ObjectKey) -> bool {
        self.kernel.objects.contains_key(key)
    }

    /// As Linux has it: what is under the key, and what the route needs.
    fn make(&mut self, object: Object) {
        let fits = match &object {
            Object::Route(Route {
                target: RouteTarget::Nexthop(id),
                ..
            }) => self.has(&ObjectKey::Nexthop(*id)),
            _ => true,
        };
        let is_up = matches!(self.kernel.objects.get(&ObjectKey::Link(dev())),
            Some(Object::Link(link)) if link.up);
        if fits && is_up && self.kernel.objects.get(&object.key()) != Some(&object) {
            self.kernel.objects.insert(object.key(), object.clone());
            self.told.push_back(Change::Set(object));
        }
    }

    fn remove(&mut self, key: &ObjectKey) {
        if self.kernel.objects.remove(key).is_none() {
            return;
        }
        self.told.push_back(Change::Gone(key.clone()));
        if let ObjectKey::Nexthop(id) = key {
            self.kernel.objects.retain(|_, object| {
                !matches!(object, Object::Route(route) if route.target == RouteTarget::Nexthop(*id))
            });
        }
    }

    /// Neighbours go with a word, nexthop objects and routes without; black holes stay.
    fn down(&mut self) {
        self.put_link(false);
        let on_it = |object: &Object| match object {
            Object::Nexthop(_) => true,
            Object::Route(route) => route.target != RouteTarget::Blackhole,
            _ => false,
        };
        self.kernel.objects.retain(|_, object| !on_it(object));
        for n in 0..NEIGHBOURS {
            self.remove(&object(n, 0).key());
        }
    }

    fn read_all(&mut self) {
        let devices = BTreeSet::from([dev()]);
        self.copy.read_all(self.kernel.clone(), devices, self.now);
        self.aside = None;
    }

    fn deliver(&mut self, count: usize) {
        let changes: Vec<_> = self.told.drain(..count.min(self.told.len())).collect();
        let wanted = |key: &ObjectKey| self.wanted.iter().find(|object| object.key() == *key);
        self.copy.told(changes, self.now, wanted);
    }

    fn serve(&mut self) {
        for _ in 0..4 {
            let doubts = self.copy.doubts();
            let (all, links, keys) = (doubts.all, doubts.links, doubts.keys.clone());
            if all {
                self.read_all();
            } else if links {
                self.copy.read_links(self.kernel.clone());
            } else {
                let mut found = self.kernel.objects.clone();
                found.retain(|key, _| keys.contains(key));
                self.copy.read_keys(keys, found, self.now);
            }
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Foreign(n, Some(way)) => self.make(object(n, way)),
            Act::Foreign(n, None) => self.remove(&object(n, 0).key()),
            Act::Ours(n, made) => {
                let object = object(n, 0);
                let op = if made {
                    self.make(object.clone());
                    Op::Change(object.clone())
                } else {
                    self.remove(&object.key());
                    Op::Delete(object.clone())
                };
                // One that the kernel refused is no change of ours.
                if self.has(&object.key()) == made {
                    self.copy.changed(&op, self.now);
                }
            }
            Act::Ignored(n, made) => {
                let object = object(n, 0);
                let op = if made {
                    Op::Create(object)
                } else {
                    Op::Delete(object)
                };
                self.copy.changed(&op, self.now);
            }
            Act::Down => self.down(),
            Act::Flap => {
                self.down();
                self.put_link(true);
            }
            Act::Remade => {
                self.down();
                self.remove(&ObjectKey::Link(dev()));
                self.put_link(true);
            }
            Act::Deliver(count) => self.deliver(count.into()),
            Act::Lose => self.told = [Change::All].into(),
            Act::Serve => self.serve(),
            Act::ReadAll => self.read_all(),
            Act::Aside => match self.aside.take() {
                Some(found) => self.copy.read_aside(found, self.now),
                None => {
                    self.copy.begin_aside();
                    self.aside = Some(self.kernel.clone());
                }
            },
            Act::Pass(millis) => {
                self.now = self.now + Duration::from_millis(millis);
                self.copy.pass(self.now);
            }
            Act::Repeat(n) => {
                let again = self.told.get(usize::from(n)).cloned();
                self.told.extend(again);
            }
            Act::Swap(a, b) => {
                let (a, b) = (usize::from(a), usize::from(b));
                if a.max(b) < self.told.len() {
                    self.told.swap(a, b);
                }
            }
        }
    }

    /// Everything that is under way arrives, and what is in doubt is read.
    fn come_to_rest(&mut self) {
        for _ in 0..3 {
            self.deliver(usize::MAX);
            self.now = self.now + TOLD_WITHIN;
            self.copy.pass(self.now);
            self.serve();
        }
        assert!(self.copy.is_settled(), "{:?}", self.copy);
    }

    fn copied(&self) -> &Observed {
        self.copy.observed().expect("it was read")
    }
}

proptest! {
    /// Whatever is done by whom, and lost with a word: once all has arrived, the copy is the kernel.
    #[test]
    fn once_all_has_arrived_the_copy_is_the_kernel(acts in prop::collection::vec(act(false), 0..60)) {
        let mut world = World::new();
        for act in acts {
            world.act(act);
        }
        world.come_to_rest();
        prop_assert_eq!(&world.copied().objects, &world.kernel.objects);
    }

    /// Without doubt and without a reading, too: what others do one after the other is copied.
    #[test]
    fn without_doubt_the_copy_is_the_kernel(
        acts in prop::collection::vec((0..ALL, prop::option::of(0..WAYS)), 0..60),
    ) {
        let mut world = World::new();
        world.act(Act::Pass(1000));
        for (n, way) in acts {
            world.act(Act::Foreign(n, way));
            world.deliver(usize::MAX);
            let doubts = world.copy.doubts();
            for key in (0..ALL).map(|n| object(n, 0).key()) {
                if !doubts.keys.contains(&key) {
                    prop_assert_eq!(
                        world.copied().objects.get(&key),
                        world.kernel.objects.get(&key)
                    );
                }
            }
            world.serve();
            world.act(Act::Pass(1000));
        }
    }

    /// Even if notifications are repeated and come in any order: what is believed to be as wanted is.
    #[test]
    fn old_news_hide_no_fault(acts in prop::collection::vec(act(true), 0..60)) {
        let mut world = World::new();
        for act in acts {
            world.act(act);
        }
        world.come_to_rest();
        for object in &world.wanted {
            let key = object.key();
            if world.copied().objects.get(&key) == Some(object) {
                prop_assert_eq!(world.kernel.objects.get(&key), Some(object));
            }
        }
    }
}

fn at(millis: u64) -> Moment {
    Moment::from_duration(Duration::from_millis(millis))
}

/// A change of ours is believed at once and confirmed by its notification; without that its key is
/// read.
#[test]
fn a_change_without_its_notification_is_doubt_about_its_key() {
    let mut world = World::new();
    world.act(Act::Pass(1000));
    world.act(Act::Foreign(2, Some(0)));
    world.deliver(1);
    world.serve();
    world.act(Act::Ours(0, true));
    assert_eq!(world.copy.deadline(), Some(world.now + TOLD_WITHIN));
    world.deliver(1);
    assert_eq!(world.copy.deadline(), None);
    assert_eq!(
        world.copy.take_news().confirmed.last(),
        Some(&object(0, 0).key())
    );
    world.act(Act::Ignored(1, true));
    assert!(!world.copy.is_settled());
    world.act(Act::Pass(
        TOLD_WITHIN.as_millis().try_into().expect("short"),
    ));
    assert!(world.copy.doubts().keys.contains(&object(1, 0).key()));
}

/// A notification that waited while the kernel was read does not undo the reading.
#[test]
fn what_was_told_before_a_reading_does_not_undo_it() {
    let mut world = World::new();
    world.act(Act::Pass(1000));
    let (there, key) = (object(0, 1), object(0, 1).key());
    world.act(Act::Foreign(0, Some(1)));
    world.act(Act::Foreign(0, None));
    world.read_all();
    // Only the first arrives.
    world.deliver(1);
    assert_ne!(world.copied().objects.get(&key), Some(&there));
    assert!(world.copy.doubts().keys.contains(&key));
}

/// A device's own word costs a reading of what is on it; that of one with nothing on it, only of
/// links.
#[test]
fn a_link_is_doubt_about_what_is_on_it_alone() {
    let mut world = World::new();
    world.act(Act::Pass(1000));
    for n in 0..ALL {
        world.act(Act::Foreign(n, Some(0)));
    }
    world.deliver(usize::MAX);
    world.serve();
    world.act(Act::Pass(1000));
    let veth = IfName::new("veth0").expect("a device name");
    world
        .copy
        .told(vec![Change::Link(Some(veth))], at(5000), |_| None);
    assert!(world.copy.doubts().links && world.copy.doubts().keys.is_empty());
    world
        .copy
        .told(vec![Change::Link(Some(dev()))], at(5000), |_| None);
    assert_eq!(world.copy.doubts().keys.len(), usize::from(ALL));
}
