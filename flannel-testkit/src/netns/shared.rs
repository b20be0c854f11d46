//! [`SharedLab`]: one underlay for the nodes of several processes.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use flannel_core::{DualStack, Link, Object, Scope, Subnet};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::lab::{NAMED, check_name, check_permitted, publish, unmount_name};
use super::topology::{MAX_NODES, Segment, build_pod, nth_ips, wait_answer};
use super::{Error, Host, Ns, Result, links};

/// One process's node in a lab that it shares with other processes: namespaces named
/// `PREFIX-underlay`, `PREFIX-NODE` and `PREFIX-NODE-pod`, which `ip netns exec` finds.
///
/// - Whoever comes first makes the underlay (192.0.2.0/24 and 2001:db8:1::/64); everybody adds a
///   node of their own. At most 16 nodes, or the kernel has no room for what they learn of one
///   another.
/// - A node is one process's at a time. One that a process left behind, by [`leave`](Self::leave)
///   or because it was killed, is taken over as it is: what it had programmed still carries
///   packets.
/// - The last process to [`leave`](Self::leave) removes everything. Who the last one is the
///   kernel knows: a process holds a lock on its node's namespace as long as it lives. So nothing
///   is kept in files.
/// - Dropping it lets go of the node and removes nothing.
///
/// Processes take turns, under the lock on `/run/netns` that `ip netns` uses too: a call may wait
/// until another process is done.
#[derive(Debug)]
pub struct SharedLab {
    prefix: String,
    name: String,
    router: Ns,
    node: Host,
    held: Flock<File>,
}

impl SharedLab {
    /// Takes part with a node, which is made unless it is there.
    ///
    /// # Errors
    /// [`Error::NotPermitted`], [`Error::Name`]; [`Error::InUse`] if another process runs that
    /// node; [`Error::NameTaken`] if a namespace has the name of one of ours and is none; or what
    /// system and kernel said.
    pub fn join(prefix: &str, node: &str) -> Result<Self> {
        check_permitted()?;
        let name = format!("{prefix}-{node}");
        for name in [prefix, node, &pod_of(&name)] {
            check_name(name)?;
        }
        let _turn = Turn::take()?;
        let router = underlay(prefix)?;
        let (node, held) = take_node(&router, &name)?;
        Ok(Self {
            prefix: prefix.to_owned(),
            name,
            router,
            node,
            held,
        })
    }

    /// This process's node: `eth0` with an address of each family on the underlay, default routes,
    /// forwarding.
    pub const fn node(&self) -> &Host {
        &self.node
    }

    /// The pod behind the node, as [`Lab::pod`](super::Lab::pod) makes it; if it is there with
    /// these addresses it is left alone, and packets flow on.
    ///
    /// # Errors
    /// As there.
    pub fn pod(&self, subnets: &DualStack<Subnet>, mtu: u32) -> Result<Host> {
        let _turn = Turn::take()?;
        let node = &self.node.ns;
        let name = pod_of(&self.name);
        let ips = nth_ips(node.name(), subnets, 2)?;
        if let Some(ns) = Ns::named(&name)? {
            let host = Host {
                ns,
                dev: links::name("eth0")?,
                ips,
            };
            if has_addresses(&host)? {
                return Ok(host);
            }
            remove_name(&name)?;
        }
        // What an earlier lease has left.
        for dev in ["veth-pod", "cni0"] {
            remove_link(node, dev)?;
        }
        let ns = Ns::anonymous(name)?;
        let pod = build_pod(ns, node, subnets, mtu)?;
        named(pod)
    }

    /// Removes the node with its pod from the lab, at once.
    ///
    /// # Errors
    /// [`Error::System`], [`Error::Kernel`].
    pub fn remove_node(&self) -> Result<()> {
        let _turn = Turn::take()?;
        for (port, name) in ports(&self.router)? {
            if name == self.name {
                remove_link(&self.router, &port)?;
            }
        }
        remove_name(&pod_of(&self.name))?;
        remove_name(&self.name)
    }

    /// All namespaces of the lab: those of every node, then the underlay.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn namespaces(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for (_, name) in ports(&self.router)? {
            let pod = pod_of(&name);
            let is_there = |name: &String| Path::new(NAMED).join(name).exists();
            names.extend([name, pod].into_iter().filter(is_there));
        }
        names.push(self.router.name().to_owned());
        Ok(names)
    }

    /// Lets go of the node. It stays as it is as long as another process takes part; the last one
    /// removes all namespaces of the lab. Answers whether this was the last one.
    ///
    /// # Errors
    /// [`Error::System`], [`Error::Kernel`].
    pub fn leave(self) -> Result<bool> {
        let _turn = Turn::take()?;
        let names = self.namespaces()?;
        drop(self.held);
        let underlay = self.router.name();
        for name in names.iter().filter(|name| *name != underlay) {
            if let Some(ns) = Ns::named(name)?
                && lock(&ns)?.is_none()
            {
                return Ok(false);
            }
        }
        for name in &names {
            remove_name(name)?;
        }
        tracing::debug!(lab = self.prefix, "all namespaces are removed");
        Ok(true)
    }
}

/// Held while namespaces are made and removed.
struct Turn(#[expect(dead_code, reason = "dropping it ends the turn")] Flock<File>);

impl Turn {
    fn take() -> Result<Self> {
        let system = |source: io::Error| Error::System {
            what: "waiting for the lock on /run/netns".to_owned(),
            ns: "/run/netns".to_owned(),
            source,
        };
        std::fs::create_dir_all(NAMED).map_err(system)?;
        let folder = File::open(NAMED).map_err(system)?;
        let locked = Flock::lock(folder, FlockArg::LockExclusive);
        locked.map(Self).map_err(|(_, errno)| system(errno.into()))
    }
}

/// The underlay, which is made unless it is there. It gets its name when it is complete.
fn underlay(prefix: &str) -> Result<Ns> {
    let name = format!("{prefix}-underlay");
    if let Some(ns) = Ns::named(&name)? {
        let bridge = Segment::plan(0)?.bridge;
        let is_ours = all_links(&ns)?.iter().any(|link| link.name == bridge);
        return if is_ours {
            Ok(ns)
        } else {
            Err(Error::NameTaken { name })
        };
    }
    let ns = Ns::anonymous(name)?;
    ns.set_forwarding(true)?;
    Segment::build(&ns, 0)?;
    publish(ns)
}

/// A node and the lock on it. The alias of its port on the underlay's bridge says that it is ours;
/// the port's name says which address it has.
fn take_node(router: &Ns, name: &str) -> Result<(Host, Flock<File>)> {
    let segment = Segment::plan(0)?;
    let ports = ports(router)?;
    let port = ports.iter().find(|(_, owner)| owner == name);
    match (port, Ns::named(name)?) {
        (Some((port, _)), Some(ns)) => {
            let held = lock(&ns)?.ok_or_else(|| Error::InUse {
                name: name.to_owned(),
            })?;
            let number = number(port).unwrap_or_default();
            let host = Host {
                dev: links::name("eth0")?,
                ips: nth_ips(ns.name(), &segment.subnets, number)?,
                ns,
            };
            return Ok((host, held));
        }
        // Its namespace was deleted by hand, and something in it is still running.
        (Some((port, _)), None) => remove_link(router, port)?,
        (None, Some(_)) => {
            return Err(Error::NameTaken {
                name: name.to_owned(),
            });
        }
        (None, None) => {}
    }
    let all = all_links(router)?;
    let is_free = |n: &u128| {
        all.iter()
            .all(|link| number(link.name.as_str()) != Some(*n))
    };
    let number = (1..=MAX_NODES as u128).find(is_free);
    let number = number.ok_or_else(|| Error::Address {
        what: format!("namespace {name}"),
        reason: format!("the underlay has room for {MAX_NODES} nodes"),
    })?;
    let ns = Ns::anonymous(name.to_owned())?;
    let port = format!("node{number}");
    let node = segment.attach(router, ns, &port, number)?;
    node.ns.set_forwarding(true)?;
    wait_answer(router, &node.ips.ips().collect::<Vec<_>>())?;
    let node = named(node)?;
    router.set_alias(&port, name)?;
    let held = lock(&node.ns)?.ok_or_else(|| Error::InUse {
        name: name.to_owned(),
    })?;
    Ok((node, held))
}

/// The nodes' ports on the underlay's bridge with the names of the nodes' namespaces.
fn ports(router: &Ns) -> Result<Vec<(String, String)>> {
    let links = all_links(router)?.into_iter();
    let ports = links.filter(|link| number(link.name.as_str()).is_some());
    Ok(ports
        .filter_map(|link| Some((link.name.to_string(), link.alias?)))
        .collect())
}

/// The number of a port named `nodeN`.
fn number(port: &str) -> Option<u128> {
    port.strip_prefix("node")?.parse().ok()
}

fn pod_of(node: &str) -> String {
    format!("{node}-pod")
}

/// Whether the host's device has its addresses and no others.
fn has_addresses(host: &Host) -> Result<bool> {
    let observed = host.ns.observe(&Scope::default())?;
    let addresses = observed.addresses.iter();
    let here: Vec<_> = addresses
        .filter(|address| address.dev == host.dev)
        .map(|address| address.ip)
        .collect();
    // The kernel gives IPv6 devices a link-local address of its own.
    let is_link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    let ours = here.iter().filter(|ip| !is_link_local(ip));
    Ok(host.ips.ips().all(|ip| here.contains(&ip)) && ours.count() == host.ips.ips().count())
}

fn all_links(ns: &Ns) -> Result<Vec<Link>> {
    let observed = ns.observe(&Scope::default())?;
    let objects = observed.objects.into_values();
    Ok(objects
        .filter_map(|object| match object {
            Object::Link(link) => Some(link),
            _ => None,
        })
        .collect())
}

fn remove_link(ns: &Ns, dev: &str) -> Result<()> {
    match ns.remove_link(dev) {
        Err(Error::NoSuchDevice { .. }) => Ok(()),
        removed => removed,
    }
}

/// Gives a host's namespace its name.
fn named(host: Host) -> Result<Host> {
    Ok(Host {
        ns: publish(host.ns)?,
        ..host
    })
}

fn remove_name(name: &str) -> Result<()> {
    unmount_name(&Path::new(NAMED).join(name)).map_err(|source| Error::System {
        what: "removing its name".to_owned(),
        ns: name.to_owned(),
        source,
    })
}

/// Locks a named namespace; `None` if another process has.
fn lock(ns: &Ns) -> Result<Option<Flock<File>>> {
    let system = |source: io::Error| Error::System {
        what: "locking its file".to_owned(),
        ns: ns.name().to_owned(),
        source,
    };
    let file = File::open(ns.path()).map_err(system)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => Ok(Some(held)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(system(errno.into())),
    }
}
