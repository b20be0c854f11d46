//! The host's doings with packets: settings, look-ups, rules and packet filters put together.

use std::fs;

use flannel_core::kernel::Result;
use flannel_core::{
    Family, Firewall, HostFacts, IfName, MAIN_TABLE, PacketSettings, Questions, ReversePath, Routed,
};
use nix::errno::Errno;

use crate::worker::Worker;
use crate::{filter, lookup, sysctl};

/// Answers the questions, as far as that can be done.
pub(crate) fn facts(worker: &mut Worker, questions: &Questions) -> Result<HostFacts> {
    let mut facts = HostFacts::default();
    for family in &questions.families {
        let devices = questions.devices.iter().map(|dev| Some(*dev));
        for dev in devices.chain([None]) {
            facts
                .settings
                .insert((*family, dev), settings(*family, dev));
        }
    }
    facts.routed = lookup::ask(&mut worker.route, &questions.lookups)
        .map_err(|failure| failure.meaning(None, || "looking routes up".to_owned()))?;
    let is_main = |answer: &Option<Routed>| match answer {
        Some(Routed::Through { table, .. }) => *table == MAIN_TABLE,
        Some(Routed::Local) | None => true,
        Some(_) => false,
    };
    if !facts.routed.iter().all(is_main) {
        for family in Family::ALL {
            // Without them it is not said by which rule it is so.
            let rules = lookup::rules(&mut worker.route, family).unwrap_or_default();
            facts.rules.extend(rules);
        }
    }
    if questions.firewall {
        facts.firewall = Some(firewall(worker));
    }
    Ok(facts)
}

fn settings(family: Family, dev: Option<IfName>) -> PacketSettings {
    let of_device = |dev: IfName, name: &str| {
        let found = sysctl::read(dev, family, name).ok().flatten()?;
        found.value.parse::<i64>().ok()
    };
    let (forwarding, filter) = match (family, dev) {
        (Family::V4, None) => (
            sysctl::number("/proc/sys/net/ipv4/ip_forward"),
            sysctl::number("/proc/sys/net/ipv4/conf/all/rp_filter"),
        ),
        (Family::V4, Some(dev)) => (of_device(dev, "forwarding"), of_device(dev, "rp_filter")),
        (Family::V6, None) => (
            sysctl::number("/proc/sys/net/ipv6/conf/all/forwarding"),
            None,
        ),
        (Family::V6, Some(dev)) => (of_device(dev, "force_forwarding"), None),
    };
    let mut settings = PacketSettings::default();
    settings.forwarding = forwarding.map(|value| value != 0);
    settings.reverse_path = filter.map(|value| match value {
        0 => ReversePath::Off,
        1 => ReversePath::Strict,
        _ => ReversePath::Loose,
    });
    settings
}

/// Reads the chains of nf_tables, and of its predecessor only that it is there.
fn firewall(worker: &mut Worker) -> Firewall {
    let mut firewall = Firewall::default();
    match filter::dropping(&mut worker.filter) {
        Ok(chains) => firewall.dropping = chains,
        // This kernel has no nf_tables.
        Err(failure)
            if matches!(
                failure.errno(),
                Some(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOENT)
            ) => {}
        Err(failure) => {
            let error = failure.meaning(None, || "reading packet filters".to_owned());
            firewall.unread = Some(format!("packet filters cannot be read: {error}"));
        }
    }
    for (names, command) in [
        ("/proc/thread-self/net/ip_tables_names", "iptables-legacy"),
        ("/proc/thread-self/net/ip6_tables_names", "ip6tables-legacy"),
    ] {
        let tables = fs::read_to_string(names).unwrap_or_default();
        if tables.lines().any(|table| table == "filter") {
            firewall.unread = Some(format!(
                "there is a legacy table filter, which cannot be read: see {command} -S FORWARD"
            ));
        }
    }
    firewall
}
