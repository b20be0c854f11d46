//! The fate of packets: settings, policy rules, routes in the order in which Linux asks them,
//! and the filter by the way back.

use std::collections::BTreeMap;
use std::net::IpAddr;

use flannel_core::{
    Change, DualStack, Family, Firewall, HostFacts, IfName, Lookup, MAIN_TABLE, Object, ObjectKey,
    PacketSettings, PolicyRule, Questions, Refused, ReversePath, Route, RouteTarget, Routed,
    Subnet,
};

use super::{FORWARDING, Host};

/// The place of the rule that leads to the main table.
const MAIN_RULE: u32 = 32_766;

/// The host's doings with packets beside what its objects say.
#[derive(Debug)]
pub(in super::super) struct Policy {
    /// The global settings of forwarding, which new IPv4 devices get.
    forwarding: DualStack<bool>,
    /// The global filter by the way back.
    reverse_path: ReversePath,
    /// Rules in front of the main table: by family and place, the destinations and the table.
    rules: BTreeMap<(Family, u32), (Subnet, Option<u32>)>,
    pub(in super::super) firewall: Option<Firewall>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            forwarding: DualStack::both(true, true),
            reverse_path: ReversePath::Off,
            rules: BTreeMap::new(),
            firewall: Some(Firewall::default()),
        }
    }
}

impl Host {
    /// Writes the global setting of forwarding, which IPv4 copies to all devices.
    pub(in super::super) fn set_forwarding(&mut self, family: Family, on: bool) {
        self.policy.forwarding.set(family, Some(on));
        self.objects.retain(|key, _| {
            !matches!(key, ObjectKey::Sysctl { family: of, name, .. }
                if *of == family && name == FORWARDING)
        });
        self.told.push(Change::Policy);
    }

    pub(in super::super) fn set_reverse_path(&mut self, filter: ReversePath) {
        self.policy.reverse_path = filter;
        self.told.push(Change::Policy);
    }

    /// Makes a rule; the one that was in the place is gone.
    pub(in super::super) fn set_rule(&mut self, at: u32, to: Subnet, table: Option<u32>) {
        self.policy.rules.insert((to.family(), at), (to, table));
        self.told.push(Change::Policy);
    }

    pub(in super::super) fn delete_rule(&mut self, family: Family, at: u32) {
        if self.policy.rules.remove(&(family, at)).is_some() {
            self.told.push(Change::Policy);
        }
    }

    /// The setting of forwarding that a device has which nobody has written.
    pub(super) fn default_forwarding(&self, family: Family) -> bool {
        family == Family::V6 || self.policy.forwarding.get(family) == Some(&true)
    }

    pub(in super::super) fn facts(&self, questions: &Questions) -> HostFacts {
        let mut facts = HostFacts::default();
        for family in &questions.families {
            let mut global = PacketSettings::default();
            global.forwarding = self.policy.forwarding.get(*family).copied();
            global.reverse_path = Some(self.policy.reverse_path);
            facts.settings.insert((*family, None), global);
            for dev in &questions.devices {
                if self.link(*dev).is_some() {
                    let settings = self.packet_settings(*family, *dev);
                    facts.settings.insert((*family, Some(*dev)), settings);
                }
            }
        }
        let lookups = questions.lookups.iter();
        facts.routed = lookups.map(|lookup| Some(self.way_of(lookup))).collect();
        let is_main = |answer: &Option<Routed>| match answer {
            Some(Routed::Through { table, .. }) => *table == MAIN_TABLE,
            Some(Routed::Local) | None => true,
            Some(_) => false,
        };
        if !facts.routed.iter().all(is_main) {
            let rules = self.policy.rules.iter();
            let rules = rules.map(|((family, priority), (_, table))| PolicyRule {
                family: *family,
                priority: *priority,
                table: *table,
            });
            facts.rules = rules.collect();
        }
        facts.firewall = self.policy.firewall.clone().filter(|_| questions.firewall);
        facts
    }

    fn packet_settings(&self, family: Family, dev: IfName) -> PacketSettings {
        let number = |name: &str| {
            let key = ObjectKey::Sysctl {
                dev,
                family,
                name: name.to_owned(),
            };
            match self.get(&key) {
                Some(Object::Sysctl(sysctl)) => sysctl.value.parse::<i32>().ok(),
                _ => None,
            }
        };
        let mut settings = PacketSettings::default();
        if family == Family::V4 {
            settings.forwarding = number(FORWARDING).map(|value| value != 0);
            settings.reverse_path = number("rp_filter").map(|value| match value {
                0 => ReversePath::Off,
                1 => ReversePath::Strict,
                _ => ReversePath::Loose,
            });
        }
        settings
    }

    fn way_of(&self, lookup: &Lookup) -> Routed {
        let family = Family::of(&lookup.dst);
        let way = self.way_to(lookup.dst);
        let (Some(dev), Some(src)) = (lookup.input, lookup.src) else {
            return way;
        };
        let settings = self.packet_settings(family, dev);
        if self.is_filtered(src, dev, settings) {
            return Routed::Refused(Refused::Dropped);
        }
        let is_forwarded = settings.forwarding.unwrap_or(true);
        match way {
            Routed::Through { .. } if !is_forwarded => Routed::Refused(Refused::Unreachable),
            way => way,
        }
    }

    /// Tells if the filter by the way back drops what comes from an address on a device.
    fn is_filtered(&self, src: IpAddr, dev: IfName, settings: PacketSettings) -> bool {
        let filter = settings.reverse_path.max(Some(self.policy.reverse_path));
        let back = self.way_to(src);
        match (filter, back) {
            (_, Routed::Local) => true,
            (Some(ReversePath::Strict), Routed::Through { dev: through, .. }) => through != dev,
            (None | Some(ReversePath::Off), _) | (_, Routed::Through { .. }) => false,
            (Some(ReversePath::Strict | ReversePath::Loose), _) => src.is_ipv4(),
        }
    }

    /// The way to an address: this host, then the tables in the order of the rules.
    fn way_to(&self, dst: IpAddr) -> Routed {
        let mut objects = self.objects.values();
        if objects.any(|object| matches!(object, Object::Address(o) if o.ip == dst)) {
            return Routed::Local;
        }
        let family = Family::of(&dst);
        let rules = self.policy.rules.range((family, 0)..(family, MAIN_RULE));
        let rules = rules.filter(|(_, (to, _))| to.contains_ip(dst));
        let tables = rules
            .map(|(_, (_, table))| *table)
            .chain([Some(MAIN_TABLE)]);
        for table in tables {
            let Some(table) = table else {
                return Routed::Refused(Refused::Dropped);
            };
            if let Some(route) = self.route_in(table, dst) {
                return self.along(route);
            }
        }
        Routed::Refused(Refused::NoRoute)
    }

    /// The route of a table that a packet takes: the longest prefix, then the lowest metric.
    fn route_in(&self, table: u32, dst: IpAddr) -> Option<&Route> {
        (0..=Family::of(&dst).bits()).rev().find_map(|len| {
            let dst = Subnet::new(dst, len).ok()?;
            let key = |metric| ObjectKey::Route { table, dst, metric };
            match self.objects.range(key(0)..=key(u32::MAX)).next()?.1 {
                Object::Route(route) => Some(route),
                _ => None,
            }
        })
    }

    fn along(&self, route: &Route) -> Routed {
        let table = route.table;
        let through = |dev: IfName, gateway| Routed::Through {
            dev,
            gateway,
            table,
        };
        match &route.target {
            RouteTarget::Gateway { gateway, dev, .. } => through(*dev, Some(*gateway)),
            RouteTarget::Device(dev) => through(*dev, None),
            RouteTarget::Nexthop(id) => match self.objects.get(&ObjectKey::Nexthop(*id)) {
                Some(Object::Nexthop(nexthop)) => through(nexthop.dev, Some(nexthop.gateway)),
                _ => Routed::Refused(Refused::NoRoute),
            },
            RouteTarget::Blackhole => Routed::Refused(Refused::Dropped),
            _ => Routed::Refused(Refused::Unreachable),
        }
    }
}
