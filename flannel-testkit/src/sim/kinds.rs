//! The kinds of things that happen in simulated clusters.

use flannel_core::{BackendType, NetworkConfig};

/// Every kind that is counted in a run of the default simulation, as [`Report::counts`] names it. A
/// run of thousands of seeds in which one of them never took effect proves less than it seems to:
/// [`Report::missing`] says which.
///
/// [`Report::counts`]: super::Report::counts
/// [`Report::missing`]: super::Report::missing
pub const KINDS: &[&str] = &[
    "go Kill",
    "go Start",
    "kernel Accept",
    "kernel Alter address",
    "kernel Alter fdb",
    "kernel Alter link",
    "kernel Alter neighbour",
    "kernel Alter nexthop",
    "kernel Alter route",
    "kernel Alter sysctl",
    "kernel ApplyTimesOut",
    "kernel Delete address",
    "kernel Delete fdb",
    "kernel Delete link",
    "kernel Delete neighbour",
    "kernel Delete nexthop",
    "kernel Delete route",
    "kernel DeviceDeleted",
    "kernel FailKey",
    "kernel FailObserve Busy",
    "kernel FailObserve Connection",
    "kernel FailObserve Exists",
    "kernel FailObserve Interrupted",
    "kernel FailObserve NoSuchDevice",
    "kernel FailObserve NotFound",
    "kernel FailObserve NotPermitted",
    "kernel FailObserve Rejected",
    "kernel FailObserve TimedOut",
    "kernel FailObserve Unsupported",
    "kernel FailOp Busy",
    "kernel FailOp Connection",
    "kernel FailOp Exists",
    "kernel FailOp Interrupted",
    "kernel FailOp NoSuchDevice",
    "kernel FailOp NotFound",
    "kernel FailOp NotPermitted",
    "kernel FailOp Rejected",
    "kernel FailOp TimedOut",
    "kernel FailOp Unsupported",
    "kernel ForeignDevice",
    "kernel ForeignGone",
    "kernel ForeignRoute",
    "kernel ForwardingOff",
    "kernel ForwardingOn",
    "kernel HintsLate",
    "kernel HintsLost",
    "kernel HintsReordered",
    "kernel HintsRepeated",
    "kernel HintsTorn",
    "kernel Latency",
    "kernel LinkDown",
    "kernel Overrun",
    "kernel Refuse",
    "kernel RuleGone",
    "kernel RuleInFront",
    "kernel SecondUplink",
    "kernel SecondUplinkGone",
    "kernel UnderlayAddress",
    "kernel UnderlayBare",
    "kernel UnderlayDown",
    "kernel UnderlayDressed",
    "kernel UnderlayFlap long",
    "kernel UnderlayFlap short",
    "kernel UnderlayFree",
    "kernel UnderlayMtu",
    "kernel UnderlayPort Bond",
    "kernel UnderlayPort Bridge",
    "kernel UnderlayPort Vrf",
    "kernel UnderlayRemade",
    "kernel UnderlayRenamed",
    "kernel UnderlayRenumbered",
    "kernel UnderlayUp",
    "kernel Unmark",
    "link Break",
    "link Cut refusing",
    "link Cut silent",
    "link Delay",
    "link End",
    "link Heal",
    "link Hold Late",
    "link Hold Reordered",
    "link Hold Repeated",
    "link Hold Squashed",
    "link LoseAnswer",
    "link LoseRequest",
    "link Resnapshot",
    "node Jump",
    "node Leave",
    "node Reboot",
    "node Rename Forgotten",
    "node Rename Kept",
    "node Rename Moved",
    "node Resume",
    "node Start",
    "node Stop",
    "node Suspend",
    "node crash after a call",
    "node crash before a call",
    "node crash in a batch",
    "node crash now",
    "state Lost",
    "state Old",
    "state ReadFails",
    "state WriteFails",
    "state WriteTorn",
    "store Backup",
    "store BadConfig",
    "store Compact",
    "store Config",
    "store Debris Half",
    "store Debris Huge",
    "store Debris InOwn",
    "store Debris Lan",
    "store Debris OtherStack",
    "store Empty all",
    "store Empty records",
    "store Garble",
    "store Junk",
    "store Put AroundOwn",
    "store Put BadPublicIp",
    "store Put Clone",
    "store Put DefaultRoute",
    "store Put DuplicateMac",
    "store Put Honest",
    "store Put HugeData",
    "store Put InnerPublicIp",
    "store Put InsideOwn",
    "store Put MalformedData",
    "store Put Multicast",
    "store Put MulticastMac",
    "store Put NoData",
    "store Put NoPublicIp",
    "store Put OtherBackend",
    "store Put OtherFamily",
    "store Put OtherVni",
    "store Put OutsidePool",
    "store Put OwnPublicIp",
    "store Put OwnSubnet",
    "store Put Underlay",
    "store Put WholePool",
    "store Remove",
    "store RemoveOf",
    "store Reserve",
    "store Restore",
    "store Take",
    "store Unreserve",
    "trial better uplinks",
    "trial node renamed",
    "trial node renamed and moved",
    "trial node renamed under another VNI",
    "trial node renamed without state",
    "trial records copied",
    "trial uplinks down",
    "trial uplinks down for a moment",
    "trial uplinks in VRFs",
    "trial uplinks in bonds",
    "trial uplinks in bridges",
    "trial uplinks renamed",
    "trial uplinks renumbered",
    "trial uplinks without addresses",
    "wire answer lost",
    "wire call denied",
    "wire call failed",
    "wire call held up",
    "wire request lost",
    "wire request parked",
    "wire watch broken",
    "wire watch deaf",
    "wire watch delayed",
    "wire watch reordered",
    "wire watch repeated",
    "wire watch split",
    "wire watch squashed",
];

/// The kinds that only some backends know, with these: others have nothing that it could happen to.
const ONLY: &[(&str, &[&str])] = &[
    ("kernel Alter address", DEVICE),
    ("kernel Alter fdb", DEVICE),
    ("kernel Alter link", DEVICE),
    ("kernel Alter neighbour", DEVICE),
    ("kernel Alter sysctl", DEVICE),
    ("kernel Delete address", DEVICE),
    ("kernel Delete fdb", DEVICE),
    ("kernel Delete link", DEVICE),
    ("kernel Delete neighbour", DEVICE),
    ("kernel DeviceDeleted", DEVICE),
    ("kernel ForeignDevice", DEVICE),
    ("kernel LinkDown", DEVICE),
    ("store Put HugeData", DATA),
    ("store Put MalformedData", DATA),
    ("store Put MulticastMac", DATA),
    ("store Put OtherVni", DATA),
    ("trial node renamed under another VNI", DATA),
];

/// Backends with a device of their own. Where VXLAN has forwarding entries and neighbours on it, UDP
/// has a packet path and the peers of that.
const DEVICE: &[&str] = &["udp", "vxlan"];

/// Backends that publish data.
const DATA: &[&str] = &["vxlan"];

/// Flannel's backends: of another nobody knows what does not apply to it.
const KNOWN: &[&str] = &["host-gw", "udp", "vxlan"];

/// The acts that mend a host need it spoilt by the same history before: too rare to insist on, and
/// done at the end of each history.
const MENDING: [&str; 2] = ["kernel ForwardingOn", "kernel RuleGone"];

/// The kinds that must take effect in clusters with one or more of these configs.
pub(super) fn kinds_under(configs: &[NetworkConfig]) -> Vec<&'static str> {
    let applies = |kind: &&&str, backend: &BackendType| {
        let backend = backend.as_str();
        let only = ONLY.iter().find(|(of, _)| *of == **kind);
        only.is_none_or(|(_, backends)| backends.contains(&backend)) || !KNOWN.contains(&backend)
    };
    let backends = || configs.iter().map(|config| config.backend().backend_type());
    KINDS
        .iter()
        .filter(|kind| !MENDING.contains(kind))
        .filter(|kind| backends().any(|backend| applies(kind, backend)))
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_some_backends_know_is_a_kind() {
        assert!(ONLY.iter().all(|(kind, _)| KINDS.contains(kind)));
        let names = ONLY.iter().flat_map(|(_, backends)| backends.iter());
        assert!({ names }.all(|name| KNOWN.contains(name)));
    }
}
