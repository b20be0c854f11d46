//! What is told on stdout: one line for each thing that happens, as `what field=value …`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;

use flannel::{DualStack, Family, LeaseKey, NodeId, OverlayEvent, Status, Subnet};

/// Prints the lines. It remembers the peers, because of one that is removed only the record's key
/// is told.
#[derive(Default)]
pub(crate) struct Teller {
    peers: BTreeMap<LeaseKey, (NodeId, DualStack<Subnet>)>,
}

impl Teller {
    pub(crate) fn ready(&self, node: &NodeId, status: &Status) {
        let subnets = status.lease.as_ref().map(|lease| lease.subnet);
        let mut line = format!("ready node={node}{}", fields(&subnets.unwrap_or_default()));
        if let Some(mtu) = status.mtu {
            write!(line, " mtu={mtu}").ok();
        }
        if let Some(backend) = &status.backend {
            write!(line, " backend={backend}").ok();
        }
        for ip in status.lease.iter().flat_map(|lease| lease.public_ip.ips()) {
            write!(line, " public_ip={ip}").ok();
        }
        say(&line);
    }

    /// Answers the subnets of a peer that is new or has changed.
    pub(crate) fn event(&mut self, event: OverlayEvent) -> Option<DualStack<Subnet>> {
        match event {
            OverlayEvent::PeerAdded { key, node, subnet } => {
                say(&format!("peer added node={node}{}", fields(&subnet)));
                self.peers.insert(key, (node, subnet));
                Some(subnet)
            }
            OverlayEvent::PeerChanged { key, node, subnet } => {
                say(&format!("peer changed node={node}{}", fields(&subnet)));
                let before = self.peers.insert(key, (node, subnet));
                before
                    .is_none_or(|(_, old)| old != subnet)
                    .then_some(subnet)
            }
            OverlayEvent::PeerRemoved { key } => {
                let (node, subnet) = self.peers.remove(&key)?;
                say(&format!("peer removed node={node}{}", fields(&subnet)));
                None
            }
            OverlayEvent::Condition(condition) => {
                let mut line = format!("condition {condition}");
                if !condition.message.is_empty() {
                    write!(line, " message={:?}", condition.message).ok();
                }
                say(&line);
                None
            }
            OverlayEvent::LeaseLost { reason } => {
                say(&format!("lease lost reason={reason:?}"));
                None
            }
            _ => None,
        }
    }

    pub(crate) fn status(&self, status: &Status) {
        let lease = status.lease.as_ref();
        let mut line = format!("status ready={} working={}", status.ready, status.working);
        if let Some(external) = &status.external {
            write!(line, " iface={}", external.dev).ok();
        }
        for ip in lease.iter().flat_map(|lease| lease.public_ip.ips()) {
            write!(line, " public_ip={ip}").ok();
        }
        write!(
            line,
            " peers={} rejected={} failing={} foreign={} unreadable={} objects={} repairs={}{}",
            status.peers,
            status.rejected.len(),
            status.failing.len(),
            status.foreign.len(),
            status.unreadable.len(),
            status.objects,
            status.repairs,
            lease.map_or_else(String::new, |lease| fields(&lease.subnet)),
        )
        .ok();
        if let Some(condition) = status.obstacle() {
            write!(line, " reason={}", condition.reason).ok();
        }
        say(&line);
    }

    /// The subnets of the peers.
    pub(crate) fn peers(&self) -> impl Iterator<Item = &DualStack<Subnet>> {
        self.peers.values().map(|(_, subnets)| subnets)
    }
}

/// The subnets as fields, a blank before each.
fn fields(subnets: &DualStack<Subnet>) -> String {
    let mut text = String::new();
    for (family, subnet) in subnets.iter() {
        let field = match family {
            Family::V4 => "subnet",
            Family::V6 => "ipv6_subnet",
        };
        write!(text, " {field}={subnet}").ok();
    }
    text
}

/// Prints a line. Whoever read them may be gone, which is no reason to stop.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).ok();
}
