//! Where the node runs: the namespace that the program was started in, or one of a lab.

use std::env;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use flannel::{DualStack, NetlinkKernel, NodeId, Overlay, Subnet, error_chain};
use flannel_testkit::netns::{Error as LabError, Lab, SharedLab};
use tokio::task::block_in_place;

use super::path::Paths;
use super::{Common, End, Error, PATIENCE};

/// Where the node runs.
pub(crate) struct Place {
    lab: Option<SharedLab>,
    pub(crate) paths: Paths,
    /// The pod's namespace, and what it was made for.
    pod: Option<(String, DualStack<Subnet>, u32)>,
}

/// Whether the process may do what it is to do, before anything is tried; `again` is the command
/// that may.
pub(crate) async fn check_rights(flags: &Common, again: &str) -> Result<(), End> {
    let missing = match &flags.lab {
        // Makes nothing yet.
        Some(lab) => match Lab::new(lab) {
            Ok(_) => return Ok(()),
            Err(LabError::NotPermitted { missing }) => missing,
            Err(error) => return Err(End::usage(format!("--lab: {error}"))),
        },
        None => {
            let kernel = NetlinkKernel::new().map_err(|error| failed(&error))?;
            let node = NodeId::new("any").map_err(End::failed)?;
            let preflight = Overlay::builder(node).kernel(kernel).preflight().await;
            if preflight.map_err(|error| failed(&error))?.ok() {
                return Ok(());
            }
            "CAP_NET_ADMIN".to_owned()
        }
    };
    let args: String = env::args().skip(1).map(|arg| format!(" {arg}")).collect();
    Err(End::failed(format!("lacks {missing}: {again}{args}")))
}

fn failed(error: &(dyn std::error::Error + 'static)) -> End {
    End::failed(error_chain(error))
}

impl Place {
    pub(crate) fn find(flags: &Common, node: &NodeId) -> Result<Self, End> {
        let pod = None;
        let mut paths = block_in_place(|| Paths::find(flags, node))?;
        let Some(lab) = &flags.lab else {
            let lab = None;
            return Ok(Self { lab, paths, pod });
        };
        let is_handed_over = paths.are_taken || paths.replaces;
        let joined = block_in_place(|| join(lab, node, is_handed_over));
        let lab = joined.map_err(|error| match error {
            LabError::Name { .. } => End::usage(format!("--lab, --node: {error}")),
            error => failed(&error),
        })?;
        eprintln!("the node runs in the namespace {}", lab.node().ns.name());
        if !paths.are_taken {
            let namespace = lab.node().ns.fd().try_clone_to_owned();
            paths.in_namespace(namespace.map_err(End::failed)?);
        }
        let lab = Some(lab);
        Ok(Self { lab, paths, pod })
    }

    /// Tells if the next process has to wait for this one to let go of the node's namespace.
    pub(crate) const fn is_held(&self) -> bool {
        self.lab.is_some()
    }

    /// Another process is the node now.
    pub(crate) fn let_go(&mut self) {
        self.lab = None;
    }

    /// The kernel where the node runs.
    pub(crate) fn kernel(&self) -> Result<NetlinkKernel, Error> {
        Ok(match &self.lab {
            None => NetlinkKernel::new()?,
            Some(lab) => NetlinkKernel::in_namespace_fd(lab.node().ns.fd().try_clone_to_owned()?)?,
        })
    }

    /// In a lab: makes the pod for a lease, unless it is there.
    pub(crate) fn make_pod(&mut self, subnets: DualStack<Subnet>, mtu: u32) -> Result<(), Error> {
        let Some(lab) = &self.lab else {
            return Ok(());
        };
        if matches!(&self.pod, Some((_, old, old_mtu)) if *old == subnets && *old_mtu == mtu) {
            return Ok(());
        }
        let made = block_in_place(|| lab.pod(&subnets, mtu))?;
        let ips: Vec<String> = made.ips.ips().map(|ip| ip.to_string()).collect();
        eprintln!("its pod is {} at {}", made.ns.name(), ips.join(" and "));
        self.pod = Some((made.ns.name().to_owned(), subnets, mtu));
        Ok(())
    }

    /// In a lab: how the pod of another node is pinged from ours.
    pub(crate) fn show_ping(&self, subnets: &DualStack<Subnet>) {
        let Some((pod, ..)) = &self.pod else {
            return;
        };
        // A lab's pods have the second host address of their node's subnets.
        let ips = subnets.values().filter_map(|subnet| subnet.nth(2));
        for ip in ips.filter(|ip| matches!(ip, IpAddr::V4(_)) || subnets.v4.is_none()) {
            eprintln!("try: sudo ip netns exec {pod} ping -c 3 {ip}");
        }
    }

    /// In a lab: leaves it in good order.
    pub(crate) fn leave(self, flags: &Common) -> Result<(), End> {
        let Some(lab) = self.lab else {
            return Ok(());
        };
        let node = lab.node().ns.name().to_owned();
        let left = block_in_place(|| {
            if flags.keep {
                how_to_look(&node, &lab.namespaces()?);
                return Ok(());
            }
            if flags.teardown {
                lab.remove_node()?;
            }
            if lab.leave()? {
                eprintln!("it was the last node: all namespaces of the lab are removed");
            } else if flags.teardown {
                eprintln!("the namespaces of the node are removed");
            } else {
                eprintln!("{node} is still there; the last node to stop removes it");
            }
            Ok(())
        });
        left.map_err(|error: LabError| failed(&error))
    }
}

/// Takes part in the lab. Who has handed the node over ends soon, if it has not ended.
fn join(lab: &str, node: &NodeId, is_handed_over: bool) -> Result<SharedLab, LabError> {
    let start = Instant::now();
    loop {
        match SharedLab::join(lab, node.as_str()) {
            Err(LabError::InUse { .. }) if is_handed_over && start.elapsed() < PATIENCE => {
                thread::sleep(Duration::from_millis(10));
            }
            joined => return joined,
        }
    }
}

fn how_to_look(node: &str, namespaces: &[String]) {
    eprintln!("kept:   {}", namespaces.join(" "));
    eprintln!("look:   ip netns exec {node} ip -d link");
    eprintln!("        ip netns exec {node} ip route; ip netns exec {node} ip nexthop");
    eprintln!(
        "remove: for ns in {}; do ip netns del $ns; done",
        namespaces.join(" ")
    );
}
