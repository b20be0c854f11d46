//! A dry run without root and without a kernel: what would be done on a node, given the network
//! config, the leases, and optionally what the node's kernel has.
//!
//! `cargo run --example plan -- --config net.json --leases leases.json --node node-1`

#![allow(
    clippy::disallowed_methods,
    clippy::exit,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a program for the terminal"
)]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use flannel::kernel::Features;
use flannel::reconcile::desired::Compiler;
use flannel::reconcile::ownership::Ownership;
use flannel::reconcile::plan::{Plan, Why, plan};
use flannel::{
    Address, AddressInfo, Backend, Event, Family, IfName, Interface, Kernel, Lease, LeaseSet, Link,
    LinkInfo, LinkKind, NetlinkKernel, NetworkConfig, NodeContext, Object, ObjectKey, Observed,
    OverlayName, Own, PoolMode, Route, RouteProtocol, RouteTarget, Scope, Snapshot, Underlay,
    UnderlayOptions, VxlanBackend, WithdrawalGuard, error_chain,
};
use serde_json::json;

type Error = Box<dyn std::error::Error>;

/// Shows what would be changed in a node's kernel, and why. Needs no root and touches nothing.
#[derive(Parser)]
struct Flags {
    /// The network config: JSON as in the store
    #[arg(long, value_name = "FILE", required_unless_present = "dump_observed")]
    config: Option<PathBuf>,
    /// The leases: a JSON array of {"key","node"?,"subnet","ipv6_subnet"?,"attrs":{..},"created"?}
    #[arg(long, value_name = "FILE", required_unless_present = "dump_observed")]
    leases: Option<PathBuf>,
    /// The node whose kernel is planned; its lease must be among the leases
    #[arg(long, value_name = "NAME", required_unless_present = "dump_observed")]
    node: Option<String>,
    /// What the node's kernel has, as --dump-observed prints it [default: one interface eth0 with
    /// the node's public address, and nothing else]
    #[arg(long, value_name = "FILE")]
    observed: Option<PathBuf>,
    /// Print what the kernel of this network namespace has (as root), for --observed elsewhere
    #[arg(long, exclusive = true)]
    dump_observed: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Flags::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("plan: {}", error_chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn run(flags: Flags) -> Result<(), Error> {
    if flags.dump_observed {
        return dump_observed().await;
    }
    let (Some(config), Some(leases), Some(node)) = (&flags.config, &flags.leases, &flags.node)
    else {
        return Err("--config, --leases and --node are needed".into());
    };
    let config = NetworkConfig::from_json(&read(config)?, PoolMode::Allocated)
        .map_err(|error| format!("{}: {error}", config.display()))?;
    let leases: Vec<Lease> = serde_json::from_str(&read(leases)?)
        .map_err(|error| format!("{}: {error}", leases.display()))?;
    let own = leases
        .iter()
        .find(|lease| lease.node.as_str() == *node)
        .cloned()
        .ok_or_else(|| {
            let known: Vec<&str> = leases.iter().map(|lease| lease.node.as_str()).collect();
            format!(
                "no lease is node {node}'s: the leases are those of {}",
                known.join(", ")
            )
        })?;
    let observed = match &flags.observed {
        Some(file) => serde_json::from_str(&read(file)?)
            .map_err(|error| format!("{}: {error}", file.display()))?,
        None => bare_node(&own)?,
    };
    let (plan, compiler) = work_out(&config, leases, own, &observed).await?;
    if flags.json {
        print_json(&plan, &compiler)
    } else {
        print_text(&plan, &compiler);
        Ok(())
    }
}

/// The pure heart of the SDK, step by step: underlay, network, peers, desired objects, plan.
async fn work_out(
    config: &NetworkConfig,
    leases: Vec<Lease>,
    own: Lease,
    observed: &Observed,
) -> Result<(Plan, Compiler), Error> {
    let overlay = OverlayName::default();
    let networks: Vec<_> = config.pools().values().map(|pool| pool.network()).collect();
    let ownership = Ownership {
        overlay: overlay.clone(),
        protocol: RouteProtocol::OURS,
        networks: networks.clone(),
        adopt_flannel: true,
        known: Vec::new(),
    };
    let alias = overlay.link_alias();
    let ours: BTreeSet<IfName> = observed
        .objects
        .values()
        .filter_map(|object| match object {
            Object::Link(link) if link.alias.as_ref() == Some(&alias) => Some(link.name),
            _ => None,
        })
        .collect();
    let underlay = Arc::new(Underlay::from_observed(observed, &networks, &[], |dev| {
        ours.contains(&dev)
    }));
    let told = own.attrs.public_ip;
    let options = UnderlayOptions::of(told.ips().take(1).map(Interface::Address)).public_ip(told);
    let families: Vec<Family> = config.families().collect();
    let external = underlay
        .choose(&options, &families)
        .or_else(|_| underlay.choose(&UnderlayOptions::default(), &families))?;

    let backend = VxlanBackend::new();
    if *config.backend().backend_type() != backend.backend_type() {
        let kind = config.backend().backend_type();
        return Err(format!("Backend.Type = {kind}: this example knows vxlan only").into());
    }
    let features = Features::all();
    let cx = NodeContext {
        overlay: &overlay,
        node: &own.node,
        config,
        external: &external,
        underlay: &underlay,
        features: &features,
        observed,
        held: Some(&own),
        previous: None,
    };
    backend.attrs(&cx)?;
    let network = backend.register_network(&cx, own.clone()).await?;

    let mut set = LeaseSet::new(WithdrawalGuard::default());
    set.set_backends(backend.backend_type(), backend.reaches());
    set.set_pools(*config.pools());
    set.set_own(Own {
        node: own.node.clone(),
        key: Some(own.key.clone()),
        subnets: own.subnet,
        public_ip: own.attrs.public_ip,
    });
    set.apply(Event::Snapshot(Snapshot {
        leases,
        ..Snapshot::default()
    }));
    let mut compiler = Compiler::new(overlay.clone(), ownership.protocol);
    compiler.set_network(network, &set);
    Ok((plan(observed, compiler.desired(), &ownership), compiler))
}

/// A node with nothing but one interface that has the public addresses of its lease.
fn bare_node(own: &Lease) -> Result<Observed, Error> {
    let dev = IfName::new("eth0")?;
    let mut observed = Observed::default();
    let link = Link {
        name: dev,
        kind: LinkKind::Other(String::new()),
        mtu: Some(1500),
        mac: None,
        up: true,
        alias: None,
    };
    let objects = std::iter::once(Object::Link(link)).chain(own.attrs.public_ip.ips().map(|ip| {
        Object::Address(Address {
            dev,
            ip,
            prefix_len: Family::of(&ip).bits(),
        })
    }));
    observed.objects = objects.map(|object| (object.key(), object)).collect();
    observed.links.push(LinkInfo {
        name: dev,
        index: 2,
        mtu: 1500,
        up: true,
        running: true,
        loopback: false,
        mac: None,
        master: None,
    });
    observed.addresses = own
        .attrs
        .public_ip
        .ips()
        .map(|ip| AddressInfo {
            dev,
            ip,
            prefix_len: Family::of(&ip).bits(),
            link_scope: false,
            deprecated: false,
            permanent: true,
            temporary: false,
            tentative: false,
        })
        .collect();
    Ok(observed)
}

async fn dump_observed() -> Result<(), Error> {
    let kernel = NetlinkKernel::new()?;
    let mut scope = Scope::default();
    let observed = kernel.observe(&scope).await?;
    for object in observed.objects.values() {
        if let Object::Link(Link {
            name,
            kind: LinkKind::Vxlan(_),
            ..
        }) = object
        {
            scope.devices.insert(*name);
        }
    }
    println!(
        "{}",
        serde_json::to_string_pretty(&kernel.observe(&scope).await?)?
    );
    Ok(())
}

fn why_text(why: &Why) -> String {
    match why {
        Why::Missing => "missing".to_owned(),
        Why::Orphan => "orphan".to_owned(),
        Why::Drifted { field } => format!("drifted: {field}"),
        Why::Rebuild { field } => format!("rebuild: {field}"),
        Why::InTheWay { of } => format!("in the way of {of}"),
        other => format!("{other:?}"),
    }
}

/// An object in words; a route through a nexthop object as the way that it stands for.
fn describe(object: &Object, compiler: &Compiler) -> String {
    if let Object::Route(Route {
        target: RouteTarget::Nexthop(id),
        ..
    }) = object
    {
        let nexthop = compiler.desired().objects.get(&ObjectKey::Nexthop(*id));
        if let Some(Object::Nexthop(nexthop)) = nexthop.map(|wanted| &wanted.object) {
            let onlink = if nexthop.onlink { " onlink" } else { "" };
            let (gateway, dev) = (nexthop.gateway, nexthop.dev);
            return format!("{} via {gateway} dev {dev}{onlink}", object.key());
        }
    }
    object.to_string()
}

fn print_json(plan: &Plan, compiler: &Compiler) -> Result<(), Error> {
    let steps: Vec<_> = plan
        .steps
        .iter()
        .map(|step| {
            json!({
                "op": step.op.verb(),
                "object": describe(step.op.object(), compiler),
                "why": why_text(&step.why),
                "peer": step.peer.as_ref().map(|peer| peer.as_str()),
            })
        })
        .collect();
    let rejected: Vec<_> = rejections(compiler)
        .map(|(key, reason)| json!({ "key": key, "reason": reason }))
        .collect();
    let foreign: Vec<_> = plan
        .foreign
        .iter()
        .map(|blocked| {
            json!({
                "wanted": blocked.wanted.to_string(),
                "found": blocked.found.to_string(),
                "peer": blocked.peer.as_ref().map(|peer| peer.as_str()),
            })
        })
        .collect();
    let document = json!({ "steps": steps, "rejected": rejected, "foreign": foreign });
    println!("{}", serde_json::to_string_pretty(&document)?);
    Ok(())
}

fn print_text(plan: &Plan, compiler: &Compiler) {
    for step in &plan.steps {
        let peer = step
            .peer
            .as_ref()
            .map(|peer| format!("  for {peer}"))
            .unwrap_or_default();
        let object = describe(step.op.object(), compiler);
        println!(
            "{:<7} {object}  ({}){peer}",
            step.op.verb(),
            why_text(&step.why)
        );
    }
    for (key, reason) in rejections(compiler) {
        println!("reject  {key}: {reason}");
    }
    for blocked in &plan.foreign {
        println!("blocked {}: there is {}", blocked.wanted, blocked.found);
    }
    if plan.steps.is_empty() && plan.foreign.is_empty() {
        println!("nothing to do: the kernel has all that it should have");
    }
}

fn rejections(compiler: &Compiler) -> impl Iterator<Item = (String, String)> + '_ {
    compiler.rejected().iter().flat_map(|(key, reasons)| {
        reasons
            .iter()
            .map(|(_, reason)| (key.to_string(), reason.to_string()))
    })
}

fn read(path: &PathBuf) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()).into())
}
