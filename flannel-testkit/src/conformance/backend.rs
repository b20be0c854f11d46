//! What every [`Backend`] and [`Network`] promises.
//!
//! Each law is a function of a backend and an [`Input`]; [`all`] runs them. None needs a kernel or
//! any right.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use flannel_core::reconcile::desired::Compiler;
use flannel_core::{
    AddressInfo, Backend, BackendData, BackendType, DualStack, Event, External, Family, Features,
    IfName, Lease, LeaseAttrs, LeaseKey, LeaseSet, LinkInfo, MAIN_TABLE, MacAddr, Network,
    NetworkConfig, NodeContext, NodeId, Object, ObjectKey, Observed, OverlayName, Own, PoolMode,
    PublicIp, Rejection, Revision, Route, RouteProtocol, RouteTarget, Subnet, Underlay, config,
};

use super::difference::{difference, differences};

/// The outcome of a law; the text says how it was broken.
pub type Outcome = Result<(), String>;

/// A node to test on: owns what a [`NodeContext`] borrows.
///
/// Its one device with carrier is `eth0`, MTU 1500, with `192.0.2.<n>/24`, `2001:db8::<n>/64` and
/// a default route of each family.
#[derive(Debug, Clone)]
pub struct NodeFixture {
    /// The number of the node on its link.
    pub number: u8,
    /// The overlay's name.
    pub overlay: OverlayName,
    /// The node's id: `node<n>`.
    pub node: NodeId,
    /// The network config.
    pub config: NetworkConfig,
    /// The external interface, `eth0`.
    pub external: External,
    /// The host's network.
    pub underlay: Arc<Underlay>,
    /// Everything is there and allowed.
    pub features: Features,
    /// The kernel has nothing of ours.
    pub observed: Observed,
    /// The lease held now.
    pub held: Option<Lease>,
    /// The lease of an earlier run.
    pub previous: Option<Lease>,
}

impl NodeFixture {
    /// Node 1 of a network, given flannel's JSON.
    ///
    /// # Errors
    /// If the config cannot be used.
    pub fn new(config: &str) -> Result<Self, config::Error> {
        let config = NetworkConfig::from_json(config, PoolMode::Allocated)?;
        Ok(Self::numbered(config, 1))
    }

    /// A node of a network by its number on the link, from 1 to 250.
    pub fn numbered(config: NetworkConfig, number: u8) -> Self {
        let dev = IfName::new("eth0").expect("a valid name");
        let v4 = Ipv4Addr::new(192, 0, 2, number);
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into());
        let ips = DualStack::both(v4, v6);
        let external = External {
            others: Vec::new(),
            dev,
            index: 2,
            mtu: 1500,
            local: ips,
            public: ips,
            reason: "the only one".to_owned(),
        };
        Self {
            number,
            overlay: OverlayName::default(),
            node: NodeId::new(format!("node{number}")).expect("a valid id"),
            config,
            underlay: Arc::new(underlay(&external, number)),
            external,
            features: Features::all(),
            observed: Observed::default(),
            held: None,
            previous: None,
        }
    }

    /// The same with another MTU of the external interface.
    #[must_use]
    pub fn with_mtu(mut self, mtu: u32) -> Self {
        self.external.mtu = mtu;
        self.underlay = Arc::new(underlay(&self.external, self.number));
        self
    }

    /// The context of the node.
    pub const fn cx(&self) -> NodeContext<'_> {
        NodeContext {
            overlay: &self.overlay,
            node: &self.node,
            config: &self.config,
            external: &self.external,
            underlay: &self.underlay,
            features: &self.features,
            observed: &self.observed,
            held: self.held.as_ref(),
            previous: self.previous.as_ref(),
        }
    }

    /// The lease of the node, with the subnets of its number in each of the config's pools.
    pub fn lease(&self, attrs: LeaseAttrs) -> Lease {
        let mut subnet = DualStack::default();
        for (family, pool) in self.config.pools().iter() {
            let first = pool.range().map(|(first, _)| first);
            let nth = std::iter::successors(first, Subnet::next)
                .nth(usize::from(self.number.saturating_sub(1)))
                .filter(|subnet| pool.fits(subnet));
            subnet.set(family, nth);
        }
        let revision = Revision(self.number.into());
        Lease {
            key: LeaseKey::new(format!("lease{}", self.number)),
            node: self.node.clone(),
            instance: None,
            subnet,
            attrs,
            ttl: None,
            created: revision,
            revision,
        }
    }

    /// A lease set of this node that holds one lease of somebody else's.
    pub fn lease_set(&self, backend: &dyn Backend, own: &Lease, other: Lease) -> LeaseSet {
        let mut set = LeaseSet::default();
        set.set_own(Own {
            node: self.node.clone(),
            key: Some(own.key.clone()),
            subnets: own.subnet,
            public_ip: self.external.public,
        });
        set.set_pools(*self.config.pools());
        set.set_backends(backend.backend_type(), backend.reaches());
        set.apply(Event::Put(other));
        set
    }
}

fn underlay(external: &External, number: u8) -> Underlay {
    let link = |name: &str, index, mtu, loopback| LinkInfo {
        name: IfName::new(name).expect("a valid name"),
        index,
        mtu,
        up: true,
        running: true,
        loopback,
        mac: (!loopback).then(|| MacAddr::local(u64::from(number) << 32)),
        master: None,
    };
    let dev = external.dev;
    let mut addresses = Vec::new();
    let mut routes = Vec::new();
    for (ip, prefix_len, gateway) in [
        (external.local.ip(Family::V4), 24, "192.0.2.254"),
        (external.local.ip(Family::V6), 64, "2001:db8::fffe"),
    ] {
        let Some(ip) = ip else { continue };
        addresses.push(AddressInfo {
            dev,
            ip,
            prefix_len,
            link_scope: false,
            deprecated: false,
            permanent: true,
            temporary: false,
            tentative: false,
        });
        let link = Subnet::new(ip, prefix_len).expect("a valid length");
        let route = |dst: Subnet, target, protocol| Route {
            table: MAIN_TABLE,
            dst,
            metric: Route::default_metric(dst.family()),
            target,
            protocol,
            source: None,
        };
        let gateway = RouteTarget::Gateway {
            gateway: gateway.parse().expect("a valid address"),
            dev,
            onlink: false,
        };
        let everything = link.supernet(0).expect("length 0 is shorter");
        routes.push(route(link, RouteTarget::Device(dev), RouteProtocol::KERNEL));
        routes.push(route(everything, gateway, RouteProtocol::BOOT));
    }
    Underlay {
        links: vec![
            link("lo", 1, 65_536, true),
            link("eth0", external.index, external.mtu, false),
        ],
        addresses,
        routes,
        ..Underlay::default()
    }
}

/// What the laws are checked on.
#[derive(Debug, Clone)]
pub struct Input {
    /// The node that the network is made on.
    pub node: NodeFixture,
    /// Leases of others, honest and hostile.
    pub leases: Vec<Lease>,
    /// How many bytes the backend adds to each packet, at least.
    pub overhead: u32,
}

impl Input {
    /// Node 1 of a network and many odd leases: what others with this backend would publish, and
    /// that spoilt in every field.
    ///
    /// # Errors
    /// If the config cannot be used, or the backend has nothing to publish.
    pub fn new(backend: &dyn Backend, config: &str, overhead: u32) -> Result<Self, String> {
        let node = NodeFixture::new(config).map_err(|error| error.to_string())?;
        let mut leases = Vec::new();
        for number in 2..5 {
            let other = NodeFixture::numbered(node.config.clone(), number);
            let attrs = backend
                .attrs(&other.cx())
                .map_err(|error| error.to_string())?;
            spoil(&other.lease(attrs), &mut leases);
        }
        Ok(Self {
            node,
            leases,
            overhead,
        })
    }

    /// Makes a network of the node's own lease.
    async fn network(&self, backend: &dyn Backend) -> Result<Arc<dyn Network>, String> {
        register(backend, &self.node).await
    }

    /// Each lease with what a lease set admits of it.
    fn admitted(
        &self,
        backend: &dyn Backend,
        own: &Lease,
    ) -> impl Iterator<Item = (&Lease, DualStack<Subnet>)> {
        self.leases.iter().filter_map(move |lease| {
            let set = self.node.lease_set(backend, own, lease.clone());
            let subnets = set.peer(&lease.key)?.subnets;
            (!subnets.is_empty()).then_some((lease, subnets))
        })
    }

    /// A lease as a reader wants to be told of it: whose it is, and what is odd about it.
    fn tell(&self, lease: &Lease) -> String {
        let mut of_key = self.leases.iter().filter(|other| other.key == lease.key);
        // The first under a key is the honest one.
        let odd = of_key.next().map(|honest| differences(lease, honest));
        let odd: Vec<String> = odd.iter().flatten().map(ToString::to_string).collect();
        match odd.is_empty() {
            true => format!("{} as it is published", lease.key),
            false => format!("{} with {}", lease.key, odd.join("; ")),
        }
    }
}

/// A lease, and the same with one thing wrong each time.
fn spoil(lease: &Lease, into: &mut Vec<Lease>) {
    into.push(lease.clone());
    let mut push = |change: &dyn Fn(&mut Lease)| {
        let mut spoilt = lease.clone();
        change(&mut spoilt);
        into.push(spoilt);
    };
    let junk = [
        "null",
        "{}",
        "[]",
        "0",
        "\"\"",
        "{\"VNI\":-1}",
        "{\"VNI\":4294967296}",
        "{\"VNI\":1,\"VtepMAC\":\"\"}",
        "{\"VNI\":1,\"VtepMAC\":null}",
        "{\"VNI\":1,\"VtepMAC\":\"00:00:00:00:00:00\"}",
        "{\"VNI\":1,\"VtepMAC\":\"ff:ff:ff:ff:ff:ff\"}",
        "{\"VNI\":1,\"VtepMAC\":\"01:00:5e:00:00:01\"}",
        "{\"VNI\":1,\"VtepMAC\":\"0e:00:00:00:00:01:02:03\"}",
        "{\"PublicKey\":\"\",\"Port\":-1}",
        "{\"Port\":70000}",
    ];
    for text in junk {
        for family in Family::ALL {
            let data = BackendData::from_json(text).ok();
            push(&|lease| lease.attrs.backend_data.set(family, data.clone()));
        }
    }
    for family in Family::ALL {
        push(&|lease| lease.subnet.set(family, None));
        push(&|lease| lease.attrs.backend_data.set(family, None));
    }
    push(&|lease| {
        std::mem::swap(
            &mut lease.attrs.backend_data.v4,
            &mut lease.attrs.backend_data.v6,
        )
    });
    push(&|lease| std::mem::swap(&mut lease.subnet.v4, &mut lease.subnet.v6));
    push(&|lease| lease.attrs.backend_type = None);
    push(&|lease| lease.attrs.public_ip = PublicIp::default());
    push(&|lease| lease.attrs.public_ip.v4 = None);
    push(&|lease| lease.attrs.public_ip.v6 = None);
    // Behind a router.
    push(&|lease| {
        lease.attrs.public_ip = DualStack::both(
            Ipv4Addr::new(198, 51, 100, 1),
            Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1),
        );
    });
    // The smallest subnets there are.
    push(&|lease| {
        lease.subnet = lease.subnet.map(|_, subnet| Subnet::host(subnet.address()));
    });
}

async fn register(backend: &dyn Backend, node: &NodeFixture) -> Result<Arc<dyn Network>, String> {
    let cx = node.cx();
    let attrs = backend
        .attrs(&cx)
        .map_err(|error| format!("attrs: {error}"))?;
    let lease = node.lease(attrs);
    let network = backend.register_network(&cx, lease).await;
    network.map_err(|error| format!("register_network: {error}"))
}

/// Runs every law.
pub async fn all(backend: &dyn Backend, input: &Input) -> Vec<(&'static str, Outcome)> {
    vec![
        (
            "attrs_are_a_pure_function",
            attrs_are_a_pure_function(backend, input),
        ),
        (
            "peers_accept_what_we_publish",
            peers_accept_what_we_publish(backend, input).await,
        ),
        ("network_is_pure", network_is_pure(backend, input).await),
        (
            "peer_objects_are_closed_under_needs",
            peer_objects_are_closed_under_needs(backend, input).await,
        ),
        (
            "peer_objects_stay_in_bounds",
            peer_objects_stay_in_bounds(backend, input).await,
        ),
        (
            "hostile_leases_never_panic",
            hostile_leases_never_panic(backend, input).await,
        ),
        (
            "mtu_leaves_room_for_the_overhead",
            mtu_leaves_room_for_the_overhead(backend, input).await,
        ),
    ]
}

/// The same context, the same attributes; no lease is needed.
///
/// # Errors
/// How the law was broken.
pub fn attrs_are_a_pure_function(backend: &dyn Backend, input: &Input) -> Outcome {
    let attrs = || {
        backend
            .attrs(&input.node.cx())
            .map_err(|error| error.to_string())
    };
    let (first, second) = (attrs()?, attrs()?);
    same("attrs", &first, &second)?;
    if first.is_backend(&backend.backend_type()) {
        Ok(())
    } else {
        Err(format!(
            "the type published is {}, not {}",
            first
                .backend_type
                .as_ref()
                .map_or("none", BackendType::as_str),
            backend.backend_type()
        ))
    }
}

/// What one node publishes, another one programs, whole and without complaint.
///
/// # Errors
/// How the law was broken.
pub async fn peers_accept_what_we_publish(backend: &dyn Backend, input: &Input) -> Outcome {
    let here = &input.node;
    let network = input.network(backend).await?;
    let there = NodeFixture::numbered(here.config.clone(), if here.number == 2 { 3 } else { 2 });
    let attrs = backend
        .attrs(&there.cx())
        .map_err(|error| error.to_string())?;
    let lease = there.lease(attrs);
    let answers = ask(&*network, &lease, &lease.subnet)?;
    for (family, subnet) in lease.subnet.iter() {
        match answers.get(family) {
            Some(Ok(objects)) if !objects.is_empty() => {}
            Some(Ok(_)) => return Err(format!("nothing leads to {subnet}: no objects")),
            Some(Err(reason)) => return Err(format!("nothing leads to {subnet}: {reason}")),
            None => return Err(format!("nothing leads to {subnet}: no answer for {family}")),
        }
    }
    let set = here.lease_set(backend, network.lease(), lease.clone());
    let mut compiler = compiler(here);
    compiler.set_network(Arc::clone(&network), &set);
    if let Some(rejections) = compiler.rejected().get(&lease.key) {
        let reasons = rejections.iter().map(|(_, reason)| reason.to_string());
        let reasons: Vec<String> = reasons.collect();
        let reasons = reasons.join("; ");
        return Err(format!(
            "{} as it is published is rejected: {reasons}",
            lease.key
        ));
    }
    Ok(())
}

/// The same inputs, the same objects, in whatever order peers are asked for.
///
/// # Errors
/// How the law was broken.
pub async fn network_is_pure(backend: &dyn Backend, input: &Input) -> Outcome {
    let first = input.network(backend).await?;
    let second = input.network(backend).await?;
    same("the lease", first.lease(), second.lease())?;
    same("the MTU", &first.mtu(), &second.mtu())?;
    same("the node's objects", &first.local(), &second.local())?;
    let admitted: Vec<_> = input.admitted(backend, first.lease()).collect();
    let mut answers = Vec::new();
    for (lease, subnets) in &admitted {
        answers.push(ask(&*first, lease, subnets)?);
    }
    for ((lease, subnets), answer) in admitted.iter().zip(&answers).rev() {
        let again = ask(&*second, lease, subnets)?;
        let what = || format!("what {} causes", input.tell(lease));
        same_of(what, answer, &again)?;
    }
    same(
        "the node's objects, after peers",
        &first.local(),
        &second.local(),
    )
}

/// What a peer's object needs is among that peer's, the node's own, or on a device that the node
/// does not make.
///
/// # Errors
/// How the law was broken.
pub async fn peer_objects_are_closed_under_needs(backend: &dyn Backend, input: &Input) -> Outcome {
    let network = input.network(backend).await?;
    let local: BTreeSet<_> = network.local().iter().map(Object::key).collect();
    let links = &input.node.underlay.links;
    let made_by_others = |need: &ObjectKey| match need {
        ObjectKey::Link(name) => links.iter().any(|link| link.name == *name),
        ObjectKey::Neighbour { dev, .. } | ObjectKey::Fdb { dev, .. } => {
            !local.contains(&ObjectKey::Link(*dev))
        }
        ObjectKey::TunnelPeer { dev, .. } => !local.contains(&ObjectKey::Tunnel(*dev)),
        _ => false,
    };
    for object in network.local() {
        for need in object.needs() {
            if !local.contains(&need) && !made_by_others(&need) {
                return Err(format!("the node's {object} needs {need}"));
            }
        }
    }
    for (lease, subnets) in input.admitted(backend, network.lease()) {
        let answers = ask(&*network, lease, &subnets)?;
        for objects in answers.values().flatten() {
            let own: BTreeSet<_> = objects.iter().map(Object::key).collect();
            for object in objects {
                for need in object.needs() {
                    if !own.contains(&need) && !local.contains(&need) && !made_by_others(&need) {
                        let lease = input.tell(lease);
                        return Err(format!("{object} of {lease} needs {need}"));
                    }
                }
            }
        }
    }
    Ok(())
}

/// A peer causes nothing that the [`Compiler`] would refuse, and is answered for no family but the
/// admitted ones, and for each of these.
///
/// # Errors
/// How the law was broken.
pub async fn peer_objects_stay_in_bounds(backend: &dyn Backend, input: &Input) -> Outcome {
    let network = input.network(backend).await?;
    let mut keys = BTreeSet::new();
    for object in network.local() {
        if !keys.insert(object.key()) {
            return Err(format!("the node wants two objects under {}", object.key()));
        }
    }
    for (lease, subnets) in input.admitted(backend, network.lease()) {
        let answers = ask(&*network, lease, &subnets)?;
        if !answers.same_families(&subnets) {
            let families: Vec<String> = answers.iter().map(|(f, _)| f.to_string()).collect();
            return Err(format!(
                "asked for {subnets} of {}, answered for {}",
                input.tell(lease),
                families.join(" and ")
            ));
        }
        let set = input
            .node
            .lease_set(backend, network.lease(), lease.clone());
        let mut compiler = compiler(&input.node);
        compiler.set_network(Arc::clone(&network), &set);
        for (_, rejection) in compiler.rejected().values().flatten() {
            if let Rejection::Unsafe { .. } = rejection {
                return Err(format!("{}: {rejection}", input.tell(lease)));
            }
        }
    }
    Ok(())
}

/// No lease makes the backend or its network panic: not a peer's, and not the one this node is
/// said to have held before.
///
/// # Errors
/// How the law was broken.
pub async fn hostile_leases_never_panic(backend: &dyn Backend, input: &Input) -> Outcome {
    let network = input.network(backend).await?;
    for (lease, subnets) in input.admitted(backend, network.lease()) {
        ask(&*network, lease, &subnets)
            .map_err(|_| format!("peer() panics on {}", input.tell(lease)))?;
    }
    for lease in &input.leases {
        let mut node = input.node.clone();
        node.previous = Some(lease.clone());
        let publish = AssertUnwindSafe(|| backend.attrs(&node.cx()).is_ok());
        catch_unwind(publish).map_err(|_| {
            let lease = input.tell(lease);
            format!("attrs() panics on a previous {lease}")
        })?;
    }
    Ok(())
}

/// Packets of the network's MTU fit through the underlay with the overhead added, and a larger
/// underlay never makes a smaller network.
///
/// # Errors
/// How the law was broken.
pub async fn mtu_leaves_room_for_the_overhead(backend: &dyn Backend, input: &Input) -> Outcome {
    let mut last = 0;
    for mtu in [576, 1280, 1330, 1350, 1400, 1499, 1500, 1550, 9000, 65_535] {
        let network = match register(backend, &input.node.clone().with_mtu(mtu)).await {
            Ok(network) => network,
            // It may refuse a small underlay, but not the usual one.
            Err(_) if mtu < 1500 && last == 0 => continue,
            Err(error) => return Err(format!("underlay of {mtu}: {error}")),
        };
        let ours = network.mtu();
        let links = network
            .local()
            .into_iter()
            .filter_map(|object| match object {
                Object::Link(link) => link.mtu,
                _ => None,
            });
        for size in links.chain([ours]) {
            if u64::from(size) + u64::from(input.overhead) > u64::from(mtu) {
                let overhead = input.overhead;
                return Err(format!(
                    "{size} and {overhead} more do not fit an underlay of {mtu}"
                ));
            }
        }
        if ours < last {
            return Err(format!(
                "an underlay of {mtu} gives {ours}, a smaller one {last}"
            ));
        }
        last = ours;
    }
    Ok(())
}

/// What a network makes of a peer; a panic is an outcome like others.
fn ask(
    network: &dyn Network,
    lease: &Lease,
    subnets: &DualStack<Subnet>,
) -> Result<DualStack<Result<Vec<Object>, Rejection>>, String> {
    catch_unwind(AssertUnwindSafe(|| network.peer(lease, subnets)))
        .map_err(|_| format!("peer() panics on {}", lease.key))
}

fn compiler(node: &NodeFixture) -> Compiler {
    Compiler::new(node.overlay.clone(), RouteProtocol::OURS)
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, a: &T, b: &T) -> Outcome {
    same_of(|| what.to_owned(), a, b)
}

/// Compares a second answer with the first; an error names the fields that differ.
fn same_of<T: PartialEq + std::fmt::Debug>(
    what: impl Fn() -> String,
    first: &T,
    second: &T,
) -> Outcome {
    if first == second {
        return Ok(());
    }
    let what = what();
    let difference = difference(second, first);
    Err(format!(
        "{what}: the second answer is not the first:{difference}"
    ))
}
