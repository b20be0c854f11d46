//! The engine and the external interface: the host's own network is followed where that matters to us.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::Engine;
use super::local::own_links;
use crate::condition::ConditionType;
use crate::config::Pool;
use crate::family::Family;
use crate::kernel;
use crate::lease_set::HostAddresses;
use crate::object::{IfName, LinkKind, Object, ObjectKey};
use crate::status::OverlayEvent;
use crate::subnet::Subnet;
use crate::underlay::in_use::{Found, InUse, SAMPLE};
use crate::underlay::{self, External, Interface, Underlay, UnderlayOptions};

pub(super) fn link_ids(underlay: &Underlay) -> BTreeSet<(IfName, u32, bool, bool)> {
    let links = underlay.links.iter();
    links
        .map(|link| (link.name, link.index, link.up, link.running))
        .collect()
}

/// The addresses that are used beyond their link: those of IPv6 that every device has come and go
/// with the links of containers.
fn addresses(underlay: &Underlay) -> BTreeSet<(IfName, IpAddr, u8)> {
    let addresses = underlay.addresses.iter();
    addresses
        .filter(|a| !matches!(a.ip, IpAddr::V6(ip) if ip.is_unicast_link_local()))
        .map(|address| (address.dev, address.ip, address.prefix_len))
        .collect()
}

/// The addresses that no peer may have, and the LANs around them.
fn host_addresses(underlay: &Underlay, observed: &kernel::Observed) -> HostAddresses {
    let is_flannels = |dev| match observed.objects.get(&ObjectKey::Link(dev)) {
        Some(Object::Link(link)) => is_flannels_name(dev.as_str(), &link.kind),
        _ => false,
    };
    let addresses = underlay.addresses.iter();
    addresses
        .filter(|address| !address.link_scope && !is_flannels(address.dev))
        .map(|address| (address.ip, address.prefix_len))
        .collect()
}

/// Tells if Go flannel gives its devices of a kind such a name.
fn is_flannels_name(name: &str, kind: &LinkKind) -> bool {
    let is_numbered = |start: &str| {
        let number = name.strip_prefix(start);
        number
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    };
    match kind {
        LinkKind::Vxlan(_) => is_numbered("flannel.") || is_numbered("flannel-v6."),
        LinkKind::Tun(_) => is_numbered("flannel"),
        _ => matches!(name, "flannel-wg" | "flannel-wg-v6" | "flannel.ipip"),
    }
}

impl Engine {
    /// Follows the host's own network where that matters to us.
    ///
    /// On a busy router routes change all the time. Those count that decide which interface is the
    /// external one, or how a peer is reached.
    pub(super) fn follow_host(&mut self) {
        let now = self.now();
        let Self {
            leases,
            networks,
            in_use,
            ..
        } = self;
        let interfaces = &in_use.options().interfaces;
        let matters = |dst: &Subnet| {
            let is_inside = networks.iter().any(|network| network.contains(dst));
            let is_sought = |interface: &Interface| matches!(interface, Interface::Reaching(ip) if dst.contains_ip(*ip));
            let leads_to_peer = || {
                let mut peers = leases.peers().values();
                peers.any(|peer| {
                    let mut ips = peer.lease.attrs.public_ip.ips();
                    ips.any(|ip| dst.contains_ip(ip))
                })
            };
            !is_inside && (dst.len() == 0 || interfaces.iter().any(is_sought) || leads_to_peer())
        };
        let is_due = in_use.look_at().is_some_and(|at| at <= now);
        if self.reconciler.host_changed(matters) || is_due {
            self.look_at_underlay();
        }
    }

    fn look_at_underlay(&mut self) {
        self.reconciler.host_seen();
        let Some((underlay, host)) = self.host() else {
            return;
        };
        self.follow_addresses(&underlay);
        let (families, sample, now) = (self.families(), self.some_peers(), self.now());
        let found = self.in_use.look(&underlay, &families, &sample, now);
        self.found_interface(found, underlay);
        let delta = self.leases.set_host(host);
        self.peers_differ(&delta);
    }

    /// Has connections to the store made anew when an address that they may be bound to is gone, and once
    /// more when another one comes: the kernel gives what is connected in between the address of any
    /// device, be it one of ours, to which no answer comes.
    fn follow_addresses(&mut self, underlay: &Underlay) {
        let addresses = underlay.addresses.iter();
        let addresses = addresses.filter(|a| !a.link_scope && !underlay.inward.contains(&a.dev));
        let addresses: BTreeSet<IpAddr> = addresses.map(|address| address.ip).collect();
        let former = std::mem::replace(&mut self.addresses, addresses);
        let gone = former.difference(&self.addresses);
        let come = self.addresses.difference(&former);
        let gone: BTreeSet<Family> = gone.map(Family::of).collect();
        let come: BTreeSet<Family> = come.map(Family::of).collect();
        if !gone.is_empty() || !self.gone.is_disjoint(&come) {
            tracing::info!(
                ?gone,
                ?come,
                "addresses are others: the store is connected to anew"
            );
            self.parts.manager.reconnect();
        }
        self.gone.extend(gone);
        self.gone.retain(|family| !come.contains(family));
    }

    /// Goes over to the interface that the host program asks for now.
    ///
    /// # Errors
    /// [`underlay::Error`] if there is none; then everything stays as it was.
    pub(super) fn ask_for_interface(&mut self, options: UnderlayOptions) -> underlay::Result<()> {
        let Some((underlay, _)) = self.host() else {
            self.in_use = InUse::new(options);
            return Ok(());
        };
        let found = self.in_use.take(options, &underlay, &self.families())?;
        self.found_interface(found, underlay);
        Ok(())
    }

    fn families(&self) -> Vec<Family> {
        let config = self.config.iter();
        config.flat_map(|config| config.families()).collect()
    }

    /// The host's own network, and what no peer may have of it, once kernel and config are known.
    fn host(&self) -> Option<(Underlay, HostAddresses)> {
        let observed = self.reconciler.observed()?;
        let config = self.config.as_ref()?;
        let links = self.compiler.desired().objects.values();
        let links = links.map_while(|wanted| match &wanted.object {
            Object::Link(link) => Some(link.name),
            _ => None,
        });
        let ours: BTreeSet<IfName> = links.chain(own_links(observed, &self.parts.name)).collect();
        let now: Vec<Subnet> = config.pools().values().map(Pool::network).collect();
        let underlay =
            Underlay::from_observed(observed, &now, &self.networks, |dev| ours.contains(&dev));
        let host = host_addresses(&underlay, observed);
        Some((underlay, host))
    }

    /// Follows what became of the external interface.
    fn found_interface(&mut self, found: Found, underlay: Underlay) {
        match found {
            Found::Is {
                external,
                lacking,
                moved,
            } => {
                if let Some((former, why)) = moved {
                    tracing::warn!(from = %former, to = %external, why, "the external interface moves");
                    self.moved = format!("; before it was {former}, but {why}");
                    self.emit(OverlayEvent::InterfaceChanged {
                        from: *former,
                        to: (*external).clone(),
                        why,
                    });
                }
                let message = format!("{external}: {}{}", external.reason, self.moved);
                self.holds(ConditionType::Underlay, "Chosen", message);
                self.lacking = lacking;
                self.use_interface(*external, underlay);
            }
            // The last one stays in force: it may only be gone for a moment.
            Found::Waits { lost, until } => {
                let wait = until.since(self.now()).as_secs_f32();
                let message =
                    format!("{lost}; unless that changes, another is taken in {wait:.1} s");
                self.fails(ConditionType::Underlay, "Lost", message, false);
            }
            // And where there was none yet, a host that boots gets its addresses and routes later.
            Found::None(error) => {
                let permanent = !error.can_pass();
                let message = error.to_string();
                self.fails(ConditionType::Underlay, "NoInterface", message, permanent);
            }
        }
    }

    fn use_interface(&mut self, external: External, underlay: Underlay) {
        let links_changed = link_ids(&underlay) != link_ids(&self.underlay);
        let external_changed = self.external.as_ref() != Some(&external);
        if links_changed || external_changed {
            self.reconciler.retry_now();
        }
        // Links of containers come and go: only what a network depends on makes it new.
        let network_changed = underlay.routes != self.underlay.routes
            || addresses(&underlay) != addresses(&self.underlay);
        if external_changed || network_changed {
            self.underlay = Arc::new(underlay);
        } else if links_changed {
            Arc::make_mut(&mut self.underlay).links = underlay.links;
        }
        self.external = Some(external);
    }

    /// Public addresses of some peers, evenly out of all.
    fn some_peers(&self) -> Vec<IpAddr> {
        let peers = self.leases.peers();
        let step = peers.len().div_ceil(SAMPLE).max(1);
        let some = peers.values().step_by(step);
        some.flat_map(|peer| peer.lease.attrs.public_ip.ips())
            .collect()
    }
}
