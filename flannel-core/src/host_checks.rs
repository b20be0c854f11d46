//! The judge of the host around an overlay: from what the overlay counts on and the kernel's
//! [`HostFacts`] to [`Finding`]s. Pure.
//!
//! Nothing is said to be off that the kernel does not say itself: where it cannot answer the
//! finding is `Unknown`, and a firewall's rules, which nobody can judge from outside, leave it at
//! that as well.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::condition::{ConditionStatus, ConditionType};
use crate::family::Family;
use crate::host_facts::{HostFacts, Lookup, Refused, ReversePath, Routed};
use crate::lease::LeaseKey;
use crate::object::{IfName, MAIN_TABLE, Object, ObjectKey, Objects, RouteTarget};
use crate::subnet::Subnet;

/// The reason of `Forwarding` where packets of no family of the network are all forwarded.
pub(crate) const FORWARDING_OFF: &str = "ForwardingOff";
/// The same where those of one family are not, and those of the other are.
pub(crate) const FORWARDING_OFF_IN_ONE: &str = "ForwardingOffInOneFamily";
/// The reason of `Routes` where no peer asked about is reached as planned in one of the families.
pub(crate) const ALL_ELSEWHERE: &str = "RoutedElsewhere";
/// The reason of `ReversePath` where packets of all peers asked about are dropped.
pub(crate) const ALL_DROPPED: &str = "ReversePathDrops";

/// The most of a kind that a message names.
const NAMED: usize = 3;

/// The things that an overlay counts on, as far as the kernel is asked about them.
#[derive(Debug, Clone, Default)]
pub(crate) struct HostPlan {
    /// The overlay's networks.
    pub(crate) networks: Vec<Subnet>,
    /// Devices on which packets come in that are to be forwarded.
    pub(crate) inputs: BTreeSet<(Family, IfName)>,
    /// The ways of packets, in the order in which the kernel is asked about them.
    pub(crate) ways: Vec<Way>,
}

/// The way of a packet to or from a peer.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    pub(crate) peer: LeaseKey,
    /// An address of the peer's containers.
    pub(crate) about: IpAddr,
    pub(crate) lookup: Lookup,
    pub(crate) kind: WayKind,
}

/// The expectation of a way.
#[derive(Debug, Clone)]
pub(crate) enum WayKind {
    /// It is the route of this destination: through a device, perhaps to a gateway.
    Out {
        route: ObjectKey,
        dev: IfName,
        gateway: Option<IpAddr>,
    },
    /// No filter is in it: a container's packet, or one that carries such packets.
    In { carries: bool },
}

/// The finding about a condition of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) kind: ConditionType,
    pub(crate) status: ConditionStatus,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Finding {
    fn new(kind: ConditionType, status: ConditionStatus, reason: &'static str) -> Self {
        Self {
            kind,
            status,
            reason,
            message: String::new(),
        }
    }

    fn with(self, message: String) -> Self {
        Self { message, ..self }
    }

    pub(crate) fn is_off(&self) -> bool {
        self.status == ConditionStatus::False
    }
}

/// Judges a host. `found` is what the kernel has, by which a route that is in the way is named.
pub(crate) fn judge(plan: &HostPlan, facts: &HostFacts, found: &Objects) -> [Finding; 4] {
    [
        forwarding(plan, facts),
        routes(plan, facts, found),
        reverse_path(plan, facts),
        firewall(plan, facts),
    ]
}

/// The addresses of peers whose packets go elsewhere, or are dropped.
pub(crate) fn suspects(plan: &HostPlan, facts: &HostFacts) -> BTreeSet<IpAddr> {
    let ways = plan.ways.iter().enumerate();
    ways.filter(|(at, way)| is_as_planned(way, facts, *at) == Some(false))
        .map(|(_, way)| way.about)
        .collect()
}

/// Tells if packets that come in on a device are forwarded; `None`: not known.
fn forwards(facts: &HostFacts, family: Family, dev: IfName) -> Option<bool> {
    let own = facts.setting(family, Some(dev)).forwarding;
    let global = facts.setting(family, None).forwarding;
    match family {
        Family::V4 => own.or(global),
        Family::V6 => global.map(|global| global || own == Some(true)),
    }
}

fn forwarding(plan: &HostPlan, facts: &HostFacts) -> Finding {
    use ConditionStatus::{False, True, Unknown};
    let finding = |status, reason| Finding::new(ConditionType::Forwarding, status, reason);
    let answers = plan.inputs.iter();
    let answers = answers.map(|(family, dev)| (*family, *dev, forwards(facts, *family, *dev)));
    let off: Vec<(Family, IfName)> = answers
        .clone()
        .filter(|(.., on)| *on == Some(false))
        .map(|(family, dev, _)| (family, dev))
        .collect();
    if !off.is_empty() {
        let messages: BTreeSet<String> = off
            .iter()
            .map(|(family, dev)| {
                let is_on = facts.setting(*family, None).forwarding == Some(true);
                let what = switch(*family, is_on.then_some(*dev));
                let on = match is_on {
                    true => format!(" that come in on {dev}"),
                    false => String::new(),
                };
                format!("{family} packets{on} are not forwarded: sysctl -w {what}=1")
            })
            .collect();
        let is_off = |family: &Family| off.iter().any(|(of, _)| of == family);
        let reason = match plan.inputs.iter().all(|(family, _)| is_off(family)) {
            true => FORWARDING_OFF,
            false => FORWARDING_OFF_IN_ONE,
        };
        return finding(False, reason).with(named(messages.into_iter()));
    }
    let unknown: Vec<IfName> = answers
        .filter(|(.., on)| on.is_none())
        .map(|(_, dev, _)| dev)
        .collect();
    if let [dev, ..] = unknown.as_slice() {
        return finding(Unknown, "NotKnown").with(format!(
            "the kernel does not say whether {dev} forwards packets"
        ));
    }
    // A device that is made later is as the global setting says.
    let is_v4 = plan.inputs.iter().any(|(family, _)| *family == Family::V4);
    if is_v4 && facts.setting(Family::V4, None).forwarding == Some(false) {
        let what = switch(Family::V4, None);
        return finding(Unknown, "OffForLaterDevices").with(format!(
            "the devices at hand forward IPv4 packets, but {what} is off, and so will be those that \
             containers get: sysctl -w {what}=1"
        ));
    }
    finding(True, "On")
}

/// The name of the setting that switches forwarding on: of a device, or of all.
fn switch(family: Family, dev: Option<IfName>) -> String {
    match (family, dev) {
        (Family::V4, None) => "net.ipv4.ip_forward".to_owned(),
        (Family::V4, Some(dev)) => of_device(dev, "forwarding"),
        (Family::V6, _) => "net.ipv6.conf.all.forwarding".to_owned(),
    }
}

/// The name of a device's IPv4 setting as sysctl(8) takes it, which separates by dots: those of the
/// device's name become slashes.
fn of_device(dev: IfName, setting: &str) -> String {
    let dev = dev.as_str().replace('.', "/");
    format!("net.ipv4.conf.{dev}.{setting}")
}

/// Tells if a way is as planned; `None`: not known.
fn is_as_planned(way: &Way, facts: &HostFacts, at: usize) -> Option<bool> {
    let answer = facts.routed.get(at)?.as_ref()?;
    match &way.kind {
        WayKind::Out { dev, gateway, .. } => Some(match answer {
            Routed::Through {
                dev: through,
                gateway: hop,
                ..
            } => through == dev && hop.or(Some(way.lookup.dst)) == gateway.or(Some(way.lookup.dst)),
            Routed::Local | Routed::Refused(_) => false,
        }),
        WayKind::In { .. } => {
            let is_dropped = *answer == Routed::Refused(Refused::Dropped);
            Some(!is_dropped || filter(facts, way) == Some(ReversePath::Off))
        }
    }
}

/// The reverse-path filter in force where a packet comes in: the higher of two.
fn filter(facts: &HostFacts, way: &Way) -> Option<ReversePath> {
    let of = |dev| facts.setting(Family::V4, dev).reverse_path;
    of(None).max(of(way.lookup.input))
}

/// The ways of a kind that are not as planned, whether these are all, and whether nothing is known.
struct Judged<'a> {
    off: Vec<(usize, &'a Way)>,
    are_all: bool,
    is_unknown: bool,
}

fn judge_ways<'a>(
    plan: &'a HostPlan,
    facts: &HostFacts,
    is_meant: impl Fn(&Way) -> bool,
) -> Judged<'a> {
    let ways = plan
        .ways
        .iter()
        .enumerate()
        .filter(|(_, way)| is_meant(way));
    let (mut asked, mut known, mut off) = (0_usize, 0_usize, Vec::new());
    for (at, way) in ways {
        let answer = is_as_planned(way, facts, at);
        asked += 1;
        known += usize::from(answer.is_some());
        if answer == Some(false) {
            off.push((at, way));
        }
    }
    Judged {
        are_all: !off.is_empty() && off.len() == known,
        off,
        is_unknown: asked > 0 && known == 0,
    }
}

fn routes(plan: &HostPlan, facts: &HostFacts, found: &Objects) -> Finding {
    use ConditionStatus::{False, True, Unknown};
    let finding = |status, reason| Finding::new(ConditionType::Routes, status, reason);
    let judged = Family::ALL.map(|family| {
        let is_of = |way: &Way| Family::of(&way.lookup.dst) == family;
        let is_meant = |way: &Way| matches!(way.kind, WayKind::Out { .. }) && is_of(way);
        judge_ways(plan, facts, is_meant)
    });
    let off = judged.iter().flat_map(|judged| &judged.off);
    let mut messages = off
        .filter_map(|(at, way)| elsewhere(way, facts, *at, found))
        .peekable();
    if messages.peek().is_none() {
        return match judged.iter().any(|judged| judged.is_unknown) {
            true => finding(Unknown, "NotKnown")
                .with("the kernel does not say where it sends packets to peers".to_owned()),
            false => finding(True, "AsPlanned"),
        };
    }
    let reason = match judged.iter().any(|judged| judged.are_all) {
        true => ALL_ELSEWHERE,
        false => "SomeRoutedElsewhere",
    };
    finding(False, reason).with(named(messages))
}

/// Where packets go instead, what leads them there, and what mends it.
fn elsewhere(way: &Way, facts: &HostFacts, at: usize, found: &Objects) -> Option<String> {
    let WayKind::Out { route, dev, .. } = &way.kind else {
        return None;
    };
    let dst = way.lookup.dst;
    let instead = match facts.routed.get(at)?.as_ref()? {
        Routed::Through {
            dev,
            gateway: Some(gateway),
            ..
        } => format!("the kernel sends them through {dev} to {gateway}"),
        Routed::Through { dev, .. } => format!("the kernel sends them through {dev}"),
        Routed::Local => "the kernel takes them for its own".to_owned(),
        Routed::Refused(Refused::NoRoute) => "the kernel has no route for them".to_owned(),
        Routed::Refused(Refused::Unreachable) => "the kernel calls them unreachable".to_owned(),
        Routed::Refused(Refused::Prohibited) => "the kernel prohibits them".to_owned(),
        Routed::Refused(Refused::Dropped) => "the kernel drops them".to_owned(),
    };
    let table = match facts.routed.get(at)?.as_ref()? {
        Routed::Through { table, .. } => Some(*table),
        Routed::Local | Routed::Refused(_) => None,
    };
    let ip = match Family::of(&dst) {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    };
    let in_the_way = in_the_way(route, dst, found);
    let why = match (table, in_the_way) {
        (None | Some(MAIN_TABLE), Some(Object::Route(theirs))) => {
            let kind = match theirs.target {
                RouteTarget::Blackhole => "blackhole ",
                _ => "",
            };
            let (dst, metric) = (theirs.dst, theirs.metric);
            format!("by its route to {dst}: {ip} route del {kind}{dst} metric {metric}")
        }
        (None, _) => by_rules(facts, Family::of(&dst), None, ip),
        (Some(MAIN_TABLE), _) => {
            format!("by a route of the main table: see {ip} route get {dst}")
        }
        (Some(table), _) => by_rules(facts, Family::of(&dst), Some(table), ip),
    };
    let peer = &way.peer;
    Some(format!(
        "packets to {dst} (peer {peer}) are to leave through {dev}, and {instead}, {why}"
    ))
}

/// The rules that lead to a table, or may lead somewhere.
fn by_rules(facts: &HostFacts, family: Family, table: Option<u32>, ip: &str) -> String {
    let leads = |to: Option<u32>| table.is_none() || to == table;
    let rules = facts.rules.iter();
    let mut rules = rules.filter(|rule| rule.family == family && leads(rule.table));
    let table = table.map_or_else(String::new, |table| format!(" by table {table}"));
    match (rules.next(), rules.next()) {
        (Some(rule), None) => {
            let priority = rule.priority;
            format!("by policy rule {priority}{table}: {ip} rule del pref {priority}")
        }
        (Some(_), Some(_)) => format!("by a policy rule{table}: see {ip} rule show"),
        (None, _) => format!("by no rule that can be named{table}: see {ip} rule show"),
    }
}

/// The route of the main table that packets to an address take before ours, by what was read.
pub(crate) fn in_the_way<'a>(
    ours: &ObjectKey,
    ip: IpAddr,
    found: &'a Objects,
) -> Option<&'a Object> {
    let ObjectKey::Route { dst, metric, .. } = *ours else {
        return None;
    };
    (dst.len()..=dst.family().bits()).rev().find_map(|len| {
        let within = Subnet::new(ip, len).ok()?;
        let key = |metric| ObjectKey::Route {
            table: MAIN_TABLE,
            dst: within,
            metric,
        };
        let end = if within == dst { metric } else { u32::MAX };
        let mut routes = found.range(key(0)..=key(end)).map(|(_, object)| object);
        routes.find(|object| object.key() != *ours)
    })
}

fn reverse_path(plan: &HostPlan, facts: &HostFacts) -> Finding {
    use ConditionStatus::{False, True, Unknown};
    let finding = |status, reason| Finding::new(ConditionType::ReversePath, status, reason);
    let [inner, outer] = [false, true].map(|carried| {
        let is_meant =
            move |way: &Way| matches!(way.kind, WayKind::In { carries } if carries == carried);
        judge_ways(plan, facts, is_meant)
    });
    if inner.off.is_empty() && outer.off.is_empty() {
        return match inner.is_unknown || outer.is_unknown {
            true => finding(Unknown, "NotKnown")
                .with("the kernel does not say whether it drops packets of peers".to_owned()),
            false => finding(True, "Passes"),
        };
    }
    let reason = match inner.are_all || outer.are_all {
        true => ALL_DROPPED,
        false => "ReversePathDropsSome",
    };
    let messages = inner.off.iter().chain(&outer.off).filter_map(|(_, way)| {
        let (src, dev) = (way.lookup.src?, way.lookup.input?);
        let why = match filter(facts, way) {
            Some(ReversePath::Loose) => format!("because there is no way back: ip route get {src}"),
            Some(ReversePath::Off | ReversePath::Strict) | None => format!(
                "because the way back is not through {dev}: sysctl -w {}=2",
                of_device(dev, "rp_filter")
            ),
        };
        Some(format!(
            "packets from {src} (peer {}) that come in on {dev} are dropped by the reverse-path \
             filter, {why}",
            way.peer
        ))
    });
    finding(False, reason).with(named(messages))
}

fn firewall(plan: &HostPlan, facts: &HostFacts) -> Finding {
    use ConditionStatus::{True, Unknown};
    let finding = |status, reason| Finding::new(ConditionType::Firewall, status, reason);
    let Some(firewall) = &facts.firewall else {
        return finding(Unknown, "NotKnown")
            .with("the kernel does not say which packets are filtered".to_owned());
    };
    let of_network = |family: Family| plan.networks.iter().find(move |n| n.family() == family);
    let chains = firewall.dropping.iter().filter_map(|chain| {
        let is_seen = |family: &Family| chain.families.sees(*family);
        let network = Family::ALL.into_iter().filter(is_seen).find_map(of_network)?;
        let word = match network.family() {
            Family::V4 => "ip",
            Family::V6 => "ip6",
        };
        let (families, table, chain) = (chain.families, &chain.table, &chain.chain);
        Some(format!(
            "table {families} {table}, chain {chain} has policy drop, and its rules are not judged: \
             packets from and to {network} must be accepted, e.g. nft insert rule {families} {table} \
             {chain} {word} saddr {network} accept, and the same with daddr"
        ))
    });
    let mut chains = chains.peekable();
    if chains.peek().is_some() {
        return finding(Unknown, "PolicyDrop").with(named(chains));
    }
    match &firewall.unread {
        Some(what) => finding(Unknown, "CannotBeRead").with(what.clone()),
        None => finding(True, "Clear"),
    }
}

/// The first of some messages, and how many more there are.
fn named(mut messages: impl Iterator<Item = String>) -> String {
    let mut text = messages.by_ref().take(NAMED).collect::<Vec<_>>().join("; ");
    let more = messages.count();
    if more > 0 {
        text += &format!("; {more} more");
    }
    text
}

#[cfg(test)]
mod tests;
