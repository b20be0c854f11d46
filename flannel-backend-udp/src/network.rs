//! [`UdpNetwork`]: from leases to a TUN device, a packet path, its peers and their routes.

use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::{
    Address, BackendType, DualStack, Family, Gateways, IfName, Lease, Link, LinkKind, MAIN_TABLE,
    Network, Note, Object, OverlayName, Rejection, Route, RouteProtocol, RouteTarget, Subnet,
    Sysctl, Tun, Tunnel, TunnelPeer, Underlay, mtu, no_public_ip,
};

/// Our end of the tunnel in one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) listen: SocketAddr,
    pub(crate) mtu: u32,
}

/// The network of one lease over UDP.
///
/// Flannel routes the whole network into its device and has its proxy answer for what is nobody's.
/// Here only peers' subnets are: a packet to any other address of the network takes the node's other
/// routes or is refused by its kernel, at no cost in userspace; a peer's route is there exactly
/// while its packets can be carried; and a subnet that moves to a node that is reached otherwise
/// needs no exception from a wider route.
#[derive(Debug)]
pub(crate) struct UdpNetwork {
    pub(crate) overlay: OverlayName,
    pub(crate) device: IfName,
    pub(crate) port: u16,
    pub(crate) ends: DualStack<End>,
    pub(crate) gateways: Gateways,
    pub(crate) underlay: Arc<Underlay>,
    pub(crate) lacks: DualStack<String>,
    /// IPv6 settings of a device can be set.
    pub(crate) may_set: bool,
    pub(crate) notes: Vec<Note>,
    pub(crate) lease: Lease,
}

impl UdpNetwork {
    fn peer_family(
        &self,
        peer: &Lease,
        family: Family,
        subnet: Subnet,
    ) -> Result<Vec<Object>, Rejection> {
        if !self.ends.has(family) {
            return Err(Rejection::NoSubnet);
        }
        let public_ip = peer.attrs.public_ip(family);
        let ways = if peer.attrs.is_backend(&BackendType::udp()) {
            vec![Object::Route(Route {
                table: MAIN_TABLE,
                dst: subnet,
                metric: Route::default_metric(family),
                target: RouteTarget::Device(self.device),
                protocol: RouteProtocol::UNSPEC,
                source: None,
            })]
        } else {
            // Flannel's own takes everybody for one of its kind, and sends to who does not listen.
            self.gateways.direct(&self.underlay, subnet, public_ip)?
        };
        // Also of a peer of another backend, which is sent to without the tunnel: once it is of this
        // one its packets are here before its record is.
        let peer = TunnelPeer {
            dev: self.device,
            subnet,
            // The record names no port: as in flannel it is that of the config.
            endpoint: SocketAddr::new(public_ip.ok_or_else(|| no_public_ip(family))?, self.port),
        };
        let objects = [Object::TunnelPeer(peer)].into_iter().chain(ways);
        Ok(objects.collect())
    }
}

#[async_trait]
impl Network for UdpNetwork {
    fn lease(&self) -> &Lease {
        &self.lease
    }

    fn mtu(&self) -> u32 {
        // Containers have one interface for both families: the tighter tunnel decides.
        let mtus = self.ends.values().map(|end| end.mtu);
        mtus.min().unwrap_or_default()
    }

    fn local(&self) -> Vec<Object> {
        let dev = self.device;
        let mut objects = vec![Object::Link(Link {
            name: dev,
            kind: LinkKind::Tun(Tun::FOR_TUNNEL),
            mtu: Some(self.mtu()),
            mac: None,
            up: true,
            alias: Some(self.overlay.link_alias()),
        })];
        // A device whose packets are smaller has no IPv6.
        if self.may_set && self.mtu() >= mtu::MIN_IPV6 {
            objects.push(Object::Sysctl(Sysctl::no_router_advertisements(dev)));
            // Also where the network has no IPv6 now: the same device serves it when it has.
            objects.push(Object::Sysctl(Sysctl::with_ipv6(dev)));
        }
        let own = self
            .ends
            .map(|family, _| self.lease.subnet.get(family).copied());
        for subnet in own.values().flatten() {
            objects.push(Object::Address(Address::of_tunnel(dev, *subnet)));
        }
        objects.push(Object::Tunnel(Box::new(Tunnel {
            dev,
            listen: self.ends.map(|_, end| end.listen),
            own: DualStack::new(own.v4.flatten(), own.v6.flatten()),
            mtu: self.ends.map(|_, end| end.mtu),
        })));
        objects
    }

    fn peer(
        &self,
        peer: &Lease,
        subnets: &DualStack<Subnet>,
    ) -> DualStack<Result<Vec<Object>, Rejection>> {
        subnets.map(|family, subnet| self.peer_family(peer, family, *subnet))
    }

    fn notes(&self) -> Vec<Note> {
        self.notes.clone()
    }

    fn lacks(&self) -> DualStack<String> {
        self.lacks.clone()
    }
}
