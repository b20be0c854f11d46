//! Ready-made topologies: nodes on an underlay of one or more subnets, and pods behind nodes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use flannel_core::{DualStack, Family, IfName, Neighbour, Object, Op, PublicIp, Scope, Subnet};

use super::{Error, Lab, Ns, Result, links};
use crate::prober::ping_each;

/// The MTU of an underlay's links, in bytes.
const UNDERLAY_MTU: u32 = 1500;

/// The most nodes of one underlay subnet; the addresses behind them are the router's.
pub(super) const MAX_NODES: usize = 250;

/// The most nodes that find one another by ARP and neighbour discovery.
///
/// The kernel has room for 1024 learnt neighbours in all namespaces together
/// (`net.ipv4.neigh.default.gc_thresh3`), and only the host could change that. When it is full,
/// packets are dropped. Entries made by hand do not count.
const MAX_LEARNING: usize = 16;

/// The IPv4 networks of underlay subnets: those for documentation (RFC 5737).
const SEGMENTS: [Ipv4Addr; 3] = [
    Ipv4Addr::new(192, 0, 2, 0),
    Ipv4Addr::new(198, 51, 100, 0),
    Ipv4Addr::new(203, 0, 113, 0),
];

/// A namespace with one device to the outside: a node on the underlay, or a pod.
#[derive(Debug, Clone)]
pub struct Host {
    /// The namespace.
    pub ns: Ns,
    /// Its device to the outside.
    pub dev: IfName,
    /// The device's addresses.
    pub ips: PublicIp,
}

/// A subnet of the underlay: a bridge in the router's namespace.
#[derive(Debug, Clone)]
pub struct Segment {
    /// The bridge, on which the router has the gateway's addresses.
    pub bridge: IfName,
    /// The addresses of the subnet.
    pub subnets: DualStack<Subnet>,
    /// The router's addresses in it, to which its nodes' default routes lead.
    pub gateways: PublicIp,
}

/// Nodes that reach one another in both families, as machines in a data centre do.
#[derive(Debug, Clone)]
pub struct Underlay {
    /// The namespace of the router, with one bridge for each subnet.
    pub router: Ns,
    /// The subnets.
    pub segments: Vec<Segment>,
    /// The nodes, `node-1` first, those of one subnet next to one another. Each has `eth0` with
    /// an address of each family, default routes to the router, and forwards packets.
    pub nodes: Vec<Host>,
}

impl Lab {
    /// An underlay of one subnet (192.0.2.0/24 and 2001:db8:1::/64, MTU 1500) with `n` nodes.
    /// More than 16 nodes get permanent neighbour entries for one another, because the kernel has
    /// no room to learn so many.
    ///
    /// # Errors
    /// If a namespace or an object cannot be made, or more than 250 nodes are asked for.
    pub fn underlay(&self, n: usize) -> Result<Underlay> {
        self.routed_underlay(&[n])
    }

    /// An underlay of up to three subnets, each with so many nodes, and a router between them.
    ///
    /// # Errors
    /// If a namespace or an object cannot be made, or too many subnets or nodes are asked for.
    pub fn routed_underlay(&self, nodes: &[usize]) -> Result<Underlay> {
        if nodes.len() > SEGMENTS.len() || nodes.iter().any(|n| *n > MAX_NODES) {
            return Err(Error::Address {
                what: "the underlay".to_owned(),
                reason: format!(
                    "it has at most {} subnets of at most {MAX_NODES} nodes",
                    SEGMENTS.len()
                ),
            });
        }
        let router = self.namespace("underlay")?;
        router.set_forwarding(true)?;
        let mut underlay = Underlay {
            router,
            segments: Vec::new(),
            nodes: Vec::new(),
        };
        for (index, count) in nodes.iter().enumerate() {
            let segment = Segment::build(&underlay.router, index)?;
            let first = underlay.nodes.len();
            for host in 1..=*count {
                let number = underlay.nodes.len() + 1;
                let ns = self.namespace(&format!("node-{number}"))?;
                let port = format!("node{number}");
                let node = segment.attach(&underlay.router, ns, &port, host as u128)?;
                node.ns.set_forwarding(true)?;
                underlay.nodes.push(node);
            }
            if *count > MAX_LEARNING {
                introduce(&underlay.nodes[first..])?;
            }
            underlay.segments.push(segment);
        }
        let ips = underlay.nodes.iter().flat_map(|node| node.ips.ips());
        wait_answer(&underlay.router, &ips.collect::<Vec<_>>())?;
        Ok(underlay)
    }

    /// A pod named `NAME` on a node: a namespace with `eth0` behind the bridge `cni0`, which the
    /// node gets with the first host address of each subnet; the pod gets the second, and default
    /// routes to the first.
    ///
    /// # Errors
    /// If a namespace or an object cannot be made, such as `cni0` a second time, or a subnet has
    /// no two host addresses.
    pub fn pod(
        &self,
        name: &str,
        node: &Ns,
        subnets: &DualStack<Subnet>,
        mtu: u32,
    ) -> Result<Host> {
        // Asked for here too, so that nothing is made for subnets that are too small.
        nth_ips(node.name(), subnets, 2)?;
        build_pod(self.namespace(name)?, node, subnets, mtu)
    }
}

/// A pod in a namespace that is empty yet: see [`Lab::pod`].
pub(super) fn build_pod(ns: Ns, node: &Ns, subnets: &DualStack<Subnet>, mtu: u32) -> Result<Host> {
    let gateways = nth_ips(node.name(), subnets, 1)?;
    let ips = nth_ips(node.name(), subnets, 2)?;
    node.add_bridge("cni0", mtu)?;
    address(node, "cni0", subnets, gateways)?;
    connect(node, "cni0", "veth-pod", &ns, mtu)?;
    let pod = configure(ns, subnets, ips, gateways)?;
    wait_answer(node, &ips.ips().collect::<Vec<_>>())?;
    Ok(pod)
}

impl Segment {
    /// What the subnet of a number looks like, without making it.
    pub(super) fn plan(index: usize) -> Result<Self> {
        let third = u16::try_from(index + 1).unwrap_or(u16::MAX);
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, third, 0, 0, 0, 0, 0);
        let subnets = DualStack::both(subnet(SEGMENTS[index], 24)?, subnet(v6, 64)?);
        Ok(Self {
            bridge: links::name(&format!("br{index}"))?,
            gateways: nth_ips("the router", &subnets, 254)?,
            subnets,
        })
    }

    pub(super) fn build(router: &Ns, index: usize) -> Result<Self> {
        let segment = Self::plan(index)?;
        let bridge = segment.bridge.as_str();
        router.add_bridge(bridge, UNDERLAY_MTU)?;
        address(router, bridge, &segment.subnets, segment.gateways)?;
        Ok(segment)
    }

    /// Connects a node, whose addresses are the `host`-th of the subnet.
    pub(super) fn attach(&self, router: &Ns, ns: Ns, port: &str, host: u128) -> Result<Host> {
        connect(router, self.bridge.as_str(), port, &ns, UNDERLAY_MTU)?;
        let ips = nth_ips(ns.name(), &self.subnets, host)?;
        configure(ns, &self.subnets, ips, self.gateways)
    }
}

/// A pair of devices: `port` on a bridge, `eth0` in another namespace; both up.
fn connect(bridge_ns: &Ns, bridge: &str, port: &str, ns: &Ns, mtu: u32) -> Result<()> {
    bridge_ns.add_veth(port, ns, "eth0", mtu)?;
    bridge_ns.set_master(port, Some(bridge))?;
    bridge_ns.set_up(port)?;
    ns.set_up("eth0")
}

/// Gives a device its addresses.
///
/// A device takes a moment to carry packets after it is set up. A request for a neighbour that
/// falls into it is lost; the kernel would repeat it after a second, which is long for a lab.
fn address(ns: &Ns, dev: &str, subnets: &DualStack<Subnet>, ips: PublicIp) -> Result<()> {
    for (family, subnet) in subnets.iter() {
        let tree = match family {
            Family::V4 => "ipv4",
            Family::V6 => "ipv6",
        };
        ns.set_sysctl(&format!("{tree}/neigh/{dev}/retrans_time_ms"), "50")?;
        if let Some(ip) = ips.ip(family) {
            ns.add_address(dev, ip, subnet.len())?;
        }
    }
    Ok(())
}

/// Gives `eth0` its addresses and the namespace its default routes.
fn configure(
    ns: Ns,
    subnets: &DualStack<Subnet>,
    ips: PublicIp,
    gateways: PublicIp,
) -> Result<Host> {
    address(&ns, "eth0", subnets, ips)?;
    for gateway in gateways.ips() {
        ns.add_route(whole(Family::of(&gateway))?, gateway, "eth0")?;
    }
    Ok(Host {
        dev: links::name("eth0")?,
        ns,
        ips,
    })
}

/// Tells the nodes of a subnet one another's hardware addresses.
fn introduce(nodes: &[Host]) -> Result<()> {
    let mut macs = Vec::new();
    for node in nodes {
        let observed = node.ns.observe(&Scope::default())?;
        let link = observed.links.iter().find(|link| link.name == node.dev);
        let mac = link.and_then(|link| link.mac);
        macs.push(mac.ok_or_else(|| Error::NoSuchDevice {
            dev: node.dev,
            ns: node.ns.name().to_owned(),
        })?);
    }
    for (i, node) in nodes.iter().enumerate() {
        let others = nodes.iter().zip(&macs).enumerate().filter(|(j, _)| *j != i);
        let entries = others.flat_map(|(_, (other, mac))| {
            other.ips.ips().map(|ip| {
                Op::Create(Object::Neighbour(Neighbour {
                    dev: node.dev,
                    ip,
                    mac: *mac,
                }))
            })
        });
        node.ns.apply(&entries.collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Waits until all addresses answer: the kernel says that a device is up before it carries packets.
#[allow(
    clippy::disallowed_methods,
    reason = "waits for a real kernel in real time"
)]
pub(super) fn wait_answer(ns: &Ns, ips: &[IpAddr]) -> Result<()> {
    const DEADLINE: Duration = Duration::from_secs(5);
    const ROUND: Duration = Duration::from_millis(250);
    let start = Instant::now();
    let mut silent = ips.to_vec();
    loop {
        let answers = ping_each(ns, None, &silent, ROUND);
        let mut failed = Vec::new();
        let mut reason = String::new();
        for (ip, answer) in silent.into_iter().zip(answers) {
            if let Err(error) = answer {
                failed.push(ip);
                reason = error.to_string();
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        if start.elapsed() > DEADLINE {
            return Err(Error::NotReady {
                ns: ns.name().to_owned(),
                reason,
            });
        }
        silent = failed;
    }
}

/// The `n`-th address of each subnet.
pub(super) fn nth_ips(whose: &str, subnets: &DualStack<Subnet>, n: u128) -> Result<PublicIp> {
    let mut ips = PublicIp::default();
    for subnet in subnets.values() {
        // The last address of an IPv4 subnet is its broadcast address.
        let ip = subnet
            .nth(n)
            .filter(|ip| subnet.family() == Family::V6 || *ip != subnet.last_address());
        let ip = ip.ok_or_else(|| Error::Address {
            what: whose.to_owned(),
            reason: format!("{subnet} has no host address number {n}"),
        })?;
        ips.set_ip(ip);
    }
    Ok(ips)
}

fn subnet(ip: impl Into<IpAddr>, len: u8) -> Result<Subnet> {
    Subnet::new(ip, len).map_err(|error| Error::Address {
        what: "the lab".to_owned(),
        reason: error.to_string(),
    })
}

/// All addresses of a family.
fn whole(family: Family) -> Result<Subnet> {
    match family {
        Family::V4 => subnet(Ipv4Addr::UNSPECIFIED, 0),
        Family::V6 => subnet(Ipv6Addr::UNSPECIFIED, 0),
    }
}
