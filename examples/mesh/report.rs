//! What is told: tables for people, one JSON document for programs.

use std::collections::BTreeMap;
use std::time::Duration;

use flannel::Family;
use flannel_testkit::prober::{Pinged, Report as Probed};
use serde::Serialize;

use crate::cluster::Cluster;
use crate::repair::Repair;
use crate::{Backend, Error, Flags};

/// How it went.
pub(crate) enum Outcome {
    Good,
    Problem(String),
}

#[derive(Serialize)]
struct Lease {
    node: String,
    subnet: Option<String>,
    ipv6_subnet: Option<String>,
    mtu: u32,
}

#[derive(Default, Serialize)]
struct Count {
    sent: u64,
    received: u64,
}

/// The JSON document.
#[derive(Serialize)]
pub(crate) struct Report {
    nodes: u16,
    backend: &'static str,
    family: &'static str,
    leases: Vec<Lease>,
    pings: Count,
    repairs: Vec<Repair>,
    restart: Count,
    seconds: f64,
}

impl Report {
    pub(crate) fn new(flags: &Flags) -> Self {
        Self {
            nodes: flags.nodes,
            backend: flags.backend.name(),
            family: flags.family.name(),
            leases: Vec::new(),
            pings: Count::default(),
            repairs: Vec::new(),
            restart: Count::default(),
            seconds: 0.0,
        }
    }

    pub(crate) fn leases(&mut self, cluster: &Cluster) {
        let text = |subnet: Option<flannel::Subnet>| subnet.map(|subnet| subnet.to_string());
        let leases = cluster.nodes.iter().map(|node| Lease {
            node: node.name.clone(),
            subnet: text(node.subnets.v4),
            ipv6_subnet: text(node.subnets.v6),
            mtu: node.mtu,
        });
        self.leases = leases.collect();
    }

    /// Every pair and family counts once: a second round can only make it worse.
    pub(crate) fn pings(&mut self, pings: &[Pinged]) {
        let received = pings.iter().filter(|ping| ping.result.is_ok()).count() as u64;
        let first = self.pings.sent == 0;
        self.pings.received = if first {
            received
        } else {
            received.min(self.pings.received)
        };
        self.pings.sent = pings.len() as u64;
    }

    pub(crate) fn repairs(&mut self, repairs: Vec<Repair>) {
        self.repairs = repairs;
    }

    pub(crate) fn restart(&mut self, probed: &Probed) {
        self.restart = Count {
            sent: probed.sent().into(),
            received: probed.received().into(),
        };
    }

    pub(crate) fn finish(mut self, elapsed: Duration, json: bool) -> Result<Outcome, Error> {
        self.seconds = elapsed.as_secs_f64();
        if json {
            println!("{}", serde_json::to_string(&self)?);
        } else {
            println!("done in {:.1} s", self.seconds);
        }
        let unrepaired: Vec<&str> = self
            .repairs
            .iter()
            .filter(|repair| repair.repaired_ms.is_none())
            .map(|repair| repair.object.as_str())
            .collect();
        let lost = |count: &Count| count.sent - count.received;
        Ok(if lost(&self.pings) > 0 {
            let (lost, sent) = (lost(&self.pings), self.pings.sent);
            Outcome::Problem(format!("{lost} of {sent} pings were not answered"))
        } else if !unrepaired.is_empty() {
            Outcome::Problem(format!("not repaired in time: {}", unrepaired.join(", ")))
        } else if lost(&self.restart) > 0 || self.restart.sent == 0 {
            let (lost, sent) = (lost(&self.restart), self.restart.sent);
            Outcome::Problem(format!(
                "{lost} of {sent} packets were lost over the restart"
            ))
        } else {
            Outcome::Good
        })
    }
}

pub(crate) fn show_nodes(cluster: &Cluster) {
    println!(
        "{:<8} {:<18} {:<24} {:>5} {:>7}  external",
        "node", "subnet", "ipv6 subnet", "mtu", "objects"
    );
    for node in &cluster.nodes {
        let status = node.overlay.status();
        let text = |subnet: Option<flannel::Subnet>| {
            subnet.map_or_else(|| "-".to_owned(), |subnet| subnet.to_string())
        };
        let external = status
            .external
            .as_ref()
            .map_or_else(String::new, |external| {
                let ips: Vec<String> = external.public.ips().map(|ip| ip.to_string()).collect();
                format!("{} {}", external.dev, ips.join(" "))
            });
        println!(
            "{:<8} {:<18} {:<24} {:>5} {:>7}  {external}",
            node.name,
            text(node.subnets.v4),
            text(node.subnets.v6),
            node.mtu,
            status.objects,
        );
    }
    println!();
}

/// A grid of round trips for each family; beyond 16 nodes just the counts.
pub(crate) fn show_pings(cluster: &Cluster, pings: &[Pinged]) {
    for family in Family::ALL {
        let cells: BTreeMap<(usize, usize), String> = pings
            .iter()
            .filter(|ping| ping.family == family)
            .map(|ping| {
                let cell = match &ping.result {
                    Ok(time) => format!("{:.2}", time.as_secs_f64() * 1000.0),
                    Err(_) => "LOST".to_owned(),
                };
                ((ping.from, ping.to), cell)
            })
            .collect();
        if cells.is_empty() {
            continue;
        }
        let answered = cells.values().filter(|cell| *cell != "LOST").count();
        println!(
            "{family}: {answered} of {} pings answered, times in ms",
            cells.len()
        );
        if cluster.nodes.len() <= 16 {
            print!("{:>10}", "from \\ to");
            for to in 0..cluster.nodes.len() {
                print!(" {:>7}", format!("pod-{}", to + 1));
            }
            println!();
            for from in 0..cluster.nodes.len() {
                print!("{:>10}", format!("pod-{}", from + 1));
                for to in 0..cluster.nodes.len() {
                    print!(" {:>7}", cells.get(&(from, to)).map_or("-", String::as_str));
                }
                println!();
            }
        }
        println!();
    }
}

pub(crate) fn show_repairs(repairs: &[Repair]) {
    println!(
        "{:<8} {:<58} {:<12} {:>12}",
        "node", "object", "was", "right again"
    );
    for repair in repairs {
        let time = match repair.repaired_ms {
            Some(ms) => format!("{ms:.1} ms"),
            None => "NOT IN 5 s".to_owned(),
        };
        println!(
            "{:<8} {:<58} {:<12} {time:>12}",
            repair.node, repair.object, repair.action
        );
    }
    println!();
}

pub(crate) fn show_restart(probed: &Probed) {
    println!(
        "restart of node-1: {} packets sent both ways, {} received, {} lost, longest gap {:.1} ms\n",
        probed.sent(),
        probed.received(),
        probed.lost(),
        probed
            .forth
            .longest_gap
            .max(probed.back.longest_gap)
            .as_secs_f64()
            * 1000.0,
    );
}

pub(crate) fn how_to_look(backend: Backend, namespaces: &[String]) {
    println!("kept: {}", namespaces.join(" "));
    println!("look:   ip netns exec mesh-node-1 ip route; ip netns exec mesh-node-1 ip nexthop");
    if backend == Backend::Vxlan {
        println!("        ip netns exec mesh-node-1 ip -d link show type vxlan");
        println!("        ip netns exec mesh-node-1 bridge fdb show dev flannel.1");
    }
    if backend == Backend::Udp {
        println!("        ip netns exec mesh-node-1 ip -d link show type tun");
        println!("        (packets were carried by this program: from now on they are not)");
    }
    println!(
        "remove: for ns in {}; do ip netns del $ns; done",
        namespaces.join(" ")
    );
}
