//! What is allowed and present, found out without changing anything.

use std::os::unix::fs::MetadataExt;

use flannel_core::{Features, TunFault};
use nix::errno::Errno;

use crate::error::Failure;
use crate::worker::Worker;
use crate::{CREATE, EXCL, link, nexthop, sysctl, tun};

/// Probes the namespace.
pub(crate) fn probe(worker: &mut Worker) -> Result<Features, Failure> {
    let connection = &mut worker.route;
    // The kernel asks for the right before it looks at the request.
    let net_admin = match answer(connection.request(link::RTM_SETLINK, 0, &link::harmless()))? {
        Some(Errno::EPERM | Errno::EACCES) => false,
        Some(_) | None => true,
    };
    let vxlan = if net_admin {
        let request = link::incomplete_vxlan();
        let number = answer(connection.request(link::RTM_NEWLINK, CREATE | EXCL, &request))?;
        number == Some(Errno::EINVAL)
    } else {
        lists_only_vxlan(worker)?
    };
    let connection = &mut worker.route;
    // Nobody needs to have this number: not there is an answer too.
    let request = nexthop::reference(u32::MAX);
    let nexthops = match answer(connection.request(nexthop::RTM_GETNEXTHOP, 0, &request))? {
        None | Some(Errno::ENOENT) => true,
        Some(_) => false,
    };
    let mut features = Features::all();
    features.net_admin = net_admin;
    features.vxlan = vxlan;
    features.nexthops = nexthops;
    features.ipv6 = sysctl::number("/proc/sys/net/ipv6/conf/all/disable_ipv6") == Some(0);
    features.sysctls = sysctl::writable();
    features.tun_fault = match net_admin {
        true => tun::fault(),
        false => Some(TunFault::NoRight),
    };
    features.tun = features.tun_fault.is_none();
    features.tunnels = false;
    features.offloads = worker.ethtool.family()?.is_some();
    features.namespace = namespace();
    features.release = std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default();
    Ok(features)
}

/// Names the namespace of this thread: the boot, and the file that stands for it (namespaces(7)).
fn namespace() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let file = std::fs::metadata("/proc/thread-self/ns/net").ok()?;
    Some(format!("{}/{}:{}", boot.trim(), file.dev(), file.ino()))
}

/// The kernel's number as an answer, not a failure.
fn answer(result: Result<(), Failure>) -> Result<Option<Errno>, Failure> {
    match result {
        Ok(()) => Ok(None),
        Err(Failure::Refused { errno, .. }) => Ok(Some(errno)),
        Err(other) => Err(other),
    }
}

/// Without the right to ask for a new device: a dump of the devices of a kind that the kernel does
/// not know is a dump of all, and the loopback device, which every namespace has, is no VXLAN.
///
/// A kernel that would load the module on demand is taken for one without.
fn lists_only_vxlan(worker: &mut Worker) -> Result<bool, Failure> {
    let devices = worker
        .route
        .dump(link::RTM_GETLINK, &link::incomplete_vxlan(), |message| {
            Ok(Some(link::decode(message.body)?))
        })?;
    Ok(devices.iter().all(link::Device::is_vxlan))
}
