//! What happens in a node's kernel: faults, and what strangers do there.

use std::net::SocketAddr;

use flannel_core::{
    Address, Family, Fdb, Link, MAIN_TABLE, MacAddr, Neighbour, Nexthop, Object, ObjectKey, Op,
    Route, RouteTarget, Subnet, Sysctl, TunnelPeer,
};

use super::action::{Action, KernelAction, Kind};
use super::hardware::{STATIC, addresses, ours, router};
use super::strangers::is_taken;
use super::world::World;
use crate::fake_kernel::FaultKind;

impl World {
    pub(super) fn act_on_kernel(&mut self, at: usize, action: KernelAction) -> bool {
        let at = self.first_to_mend(at, action);
        let done = match action {
            KernelAction::FailOp(kind, fails) => {
                let (kind, failure) = (self.word_there(at, kind), fails.into());
                return self.fail(at, action, FaultKind::Op { kind, failure });
            }
            KernelAction::FailKey(n, fails) => {
                let Some(object) = self.nth_of_ours(at, None, n) else {
                    return false;
                };
                let (key, failure) = (object.key(), fails.into());
                return self.fail(at, action, FaultKind::Key { key, failure });
            }
            KernelAction::FailObserve(fails) => {
                let failure = fails.into();
                return self.fail(at, action, FaultKind::Observe { failure });
            }
            KernelAction::ApplyTimesOut(after) => {
                let after = after.into();
                return self.fail(at, action, FaultKind::ApplyTimesOut { after });
            }
            KernelAction::DeviceDeleted(after) => {
                let Some(Object::Link(link)) = self.nth_of_ours(at, Some(Kind::Link), after) else {
                    return false;
                };
                let (dev, after) = (link.name, after.into());
                return self.fail(at, action, FaultKind::DeviceDeleted { dev, after });
            }
            KernelAction::Overrun => return self.fail(at, action, FaultKind::Overrun),
            KernelAction::HintsLost => return self.fail(at, action, FaultKind::HintsLost),
            KernelAction::HintsTorn => return self.fail(at, action, FaultKind::HintsTorn),
            KernelAction::HintsRepeated => return self.fail(at, action, FaultKind::HintsRepeated),
            KernelAction::HintsReordered => {
                return self.fail(at, action, FaultKind::HintsReordered);
            }
            KernelAction::HintsLate(by) => {
                return self.fail(at, action, FaultKind::HintsLate { by });
            }
            KernelAction::Refuse(n, fails) => {
                let Some(object) = self.nth_of_ours(at, None, n) else {
                    return false;
                };
                let node = &mut self.nodes[at];
                node.kernel.refuse(object.key(), fails.into());
                node.refused.push(object.key());
                true
            }
            KernelAction::Accept => self.accept_all(at),
            KernelAction::Latency(latency) => {
                self.nodes[at].latency.set(latency);
                true
            }
            KernelAction::Delete(kind, n) => match self.nth_of_ours(at, Some(kind), n) {
                Some(Object::Sysctl(_)) | None => false,
                Some(object) => {
                    self.nodes[at].kernel.delete(&object.key());
                    true
                }
            },
            KernelAction::Alter(kind, n) => self
                .nth_of_ours(at, Some(kind), n)
                .and_then(|object| self.altered(at, object, n))
                .is_some_and(|op| self.nodes[at].kernel.external(&op).is_ok()),
            KernelAction::LinkDown(n) => match self.nth_of_ours(at, Some(Kind::Link), n) {
                Some(Object::Link(link)) => {
                    self.nodes[at].kernel.set_link_down(link.name);
                    true
                }
                _ => false,
            },
            KernelAction::Unmark(n) => self.unmark(at, n),
            KernelAction::ForeignRoute(n) => return self.take_place_of_route(at, n),
            KernelAction::ForwardingOff
            | KernelAction::ForwardingOn
            | KernelAction::RuleInFront
            | KernelAction::RuleGone => return self.act_on_host(at, action),
            KernelAction::ForeignDevice(n) => return self.take_place_of_device(at, n),
            KernelAction::ForeignGone => {
                let devices = self.give_devices_back(at);
                return self.give_places_back(at) || devices;
            }
            KernelAction::UnderlayDown
            | KernelAction::UnderlayUp
            | KernelAction::UnderlayRemade
            | KernelAction::UnderlayMtu(_)
            | KernelAction::UnderlayAddress(_)
            | KernelAction::UnderlayRenamed
            | KernelAction::UnderlayPort(_)
            | KernelAction::UnderlayFree
            | KernelAction::UnderlayBare
            | KernelAction::UnderlayDressed
            | KernelAction::SecondUplink
            | KernelAction::SecondUplinkGone => self.act_on_uplink(at, action),
            // They take time.
            KernelAction::UnderlayFlap(_) | KernelAction::UnderlayRenumbered(..) => false,
        };
        self.follow_foreign(at);
        done
    }

    /// The first node, from one on, on which there is anything to mend; if there is none, that one.
    fn first_to_mend(&self, at: usize, action: KernelAction) -> usize {
        let can = |at: &usize| match action {
            KernelAction::Accept => !self.nodes[*at].refused.is_empty(),
            KernelAction::UnderlayUp => self.nodes[*at].unplugged,
            KernelAction::UnderlayFree => self.nodes[*at].uplink.has_master(),
            KernelAction::UnderlayDressed => self.nodes[*at].uplink.is_bare(),
            KernelAction::SecondUplinkGone => self.nodes[*at].uplink.has_second(),
            KernelAction::ForwardingOn => self.nodes[*at].host.forwarding.is_some(),
            KernelAction::RuleGone => self.nodes[*at].host.rule.is_some(),
            KernelAction::ForeignGone => {
                let foreign = self.judge.foreign(*at);
                let is_place = |object: &Object| self.is_in_our_place(object) || is_taken(object);
                foreign.values().any(is_place)
            }
            _ => true,
        };
        self.nodes_from(at).find(can).unwrap_or(at)
    }

    /// The word for a kind by which a node has objects of ours; if it has none of the kind, that for
    /// routes, which every backend has.
    fn word_there(&self, at: usize, kind: Kind) -> &'static str {
        let ours = ours(&self.nodes[at].kernel.objects());
        let is_there = |word: &&str| ours.iter().any(|object| object.key().kind() == *word);
        let word = kind.words().into_iter().find(is_there);
        word.unwrap_or(Kind::Route.word())
    }

    /// Sets a fault; it is counted once it has come.
    fn fail(&mut self, at: usize, action: KernelAction, fault: FaultKind) -> bool {
        let node = &mut self.nodes[at];
        node.kernel.fail_next(fault.clone());
        node.faults.push((fault, Action::Kernel(at, action).kind()));
        false
    }

    /// The kernel accepts everything again; whether it did not.
    pub(super) fn accept_all(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        let refused = std::mem::take(&mut node.refused);
        for key in &refused {
            node.kernel.accept(key);
        }
        !refused.is_empty()
    }

    /// What strangers did may have cost others something too: that is theirs, not ours.
    pub(super) fn follow_foreign(&self, at: usize) {
        let mut foreign = self.judge.foreign(at);
        let objects = self.nodes[at].kernel.objects();
        foreign.retain(|key, object| objects.get(key) == Some(object));
        self.judge.set_foreign(at, foreign);
    }

    pub(super) fn nth_of_ours(&self, at: usize, kind: Option<Kind>, n: u8) -> Option<Object> {
        let mut all = ours(&self.nodes[at].kernel.objects());
        all.retain(|object| kind.is_none_or(|kind| kind.words().contains(&object.key().kind())));
        let n = usize::from(n).checked_rem(all.len())?;
        Some(all.swap_remove(n))
    }

    /// What a stranger makes of an object of ours.
    fn altered(&self, at: usize, object: Object, n: u8) -> Option<Op> {
        let mac = MacAddr([0x02, 0x66, 0, 0, 0, n]);
        let altered = match object {
            Object::Link(link) if n.is_multiple_of(2) => Object::Link(Link {
                mtu: link.mtu.map(|mtu| mtu - 10),
                ..link
            }),
            Object::Link(link) => Object::Link(Link {
                mac: Some(mac),
                ..link
            }),
            Object::Sysctl(setting) => Object::Sysctl(Sysctl {
                value: "2".to_owned(),
                ..setting
            }),
            // An address cannot be changed: the device gets one more.
            Object::Address(address) => {
                let network = self.config.pools().get(Family::of(&address.ip))?.network();
                // Of another network the node may never have heard.
                if !network.contains_ip(address.ip) {
                    return None;
                }
                let ip = network.nth(u128::from(n) + 2)?;
                return Some(Op::Create(Object::Address(Address { ip, ..address })));
            }
            Object::Fdb(fdb) => Object::Fdb(Fdb {
                remote: addresses(190 + n % 32, 0).ip(Family::of(&fdb.remote))?,
                ..fdb
            }),
            Object::Neighbour(neighbour) => Object::Neighbour(Neighbour { mac, ..neighbour }),
            Object::Nexthop(nexthop) => {
                let bits = Family::of(&nexthop.gateway).bits();
                let gateway = Subnet::new(nexthop.gateway, bits - 8).ok()?.nth(7)?;
                Object::Nexthop(Nexthop { gateway, ..nexthop })
            }
            Object::Route(route) => {
                let objects = self.nodes[at].kernel.objects();
                let target = match &route.target {
                    RouteTarget::Nexthop(id) => {
                        RouteTarget::Device(objects.get(&ObjectKey::Nexthop(*id))?.dev()?)
                    }
                    RouteTarget::Gateway { dev, .. } => RouteTarget::Device(*dev),
                    RouteTarget::Device(_) => RouteTarget::Gateway {
                        gateway: router(route.dst.family()),
                        dev: self.nodes[at].uplink.dev(),
                        onlink: false,
                    },
                    _ => return None,
                };
                Object::Route(Route { target, ..route })
            }
            Object::Tunnel(mut tunnel) => {
                tunnel.mtu = tunnel.mtu.map(|_, mtu| mtu - 10);
                Object::Tunnel(tunnel)
            }
            Object::TunnelPeer(peer) => {
                let port = peer.endpoint.port().wrapping_add(1);
                let endpoint = SocketAddr::new(peer.endpoint.ip(), port);
                Object::TunnelPeer(TunnelPeer { endpoint, ..peer })
            }
            _ => return None,
        };
        Some(Op::Change(altered))
    }

    /// Somebody replaces a route of ours by their own.
    fn take_place_of_route(&self, at: usize, n: u8) -> bool {
        let Some(Object::Route(route)) = self.nth_of_ours(at, Some(Kind::Route), n) else {
            return false;
        };
        let theirs = Object::Route(Route {
            target: RouteTarget::Gateway {
                gateway: router(route.dst.family()),
                dev: self.nodes[at].uplink.dev(),
                onlink: false,
            },
            protocol: STATIC,
            ..route
        });
        let done = self.nodes[at]
            .kernel
            .external(&Op::Change(theirs.clone()))
            .is_ok();
        if done {
            let mut foreign = self.judge.foreign(at);
            foreign.insert(theirs.key(), theirs);
            self.judge.set_foreign(at, foreign);
            self.judge.doubt_all(at);
        }
        done
    }

    /// Whoever took a place of ours gives it back.
    fn give_places_back(&self, at: usize) -> bool {
        let taken: Vec<ObjectKey> = self
            .judge
            .foreign(at)
            .into_iter()
            .filter(|(_, object)| self.is_in_our_place(object))
            .map(|(key, _)| key)
            .collect();
        for key in &taken {
            self.nodes[at].kernel.delete(key);
        }
        self.follow_foreign(at);
        !taken.is_empty()
    }

    /// Whether an object of others is where a route to a peer would be.
    pub(super) fn is_in_our_place(&self, object: &Object) -> bool {
        matches!(object, Object::Route(route)
            if route.metric == Route::default_metric(route.dst.family())
                && route.table == MAIN_TABLE
                && self.config.pools().values().any(|pool| pool.network().contains(&route.dst)))
    }

    /// Everything in a node's kernel works, and its external interface is up.
    pub(super) fn repair_kernel(&mut self, at: usize) {
        self.gather_effects(at);
        let node = &mut self.nodes[at];
        node.kernel.take_pending_faults();
        node.faults.clear();
        node.latency.set(std::time::Duration::ZERO);
        self.accept_all(at);
        self.act_on_host(at, KernelAction::ForwardingOn);
        self.act_on_host(at, KernelAction::RuleGone);
        self.give_marks_back(at);
        self.repair_uplink(at);
    }
}
