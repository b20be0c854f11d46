//! Two nodes on a cable, a pod behind each, and one of several ways between the pods.

use std::cell::Cell;
use std::net::IpAddr;
use std::time::Duration;

use clap::ValueEnum;
use flannel_core::{DualStack, Family, IfName, Object, Offload, Op, PublicIp, Subnet};
use flannel_e2e::run_in;
use flannel_testkit::netns::{Host, Lab};
use flannel_testkit::prober::ping;

use crate::Congestion;
use crate::traffic::Between;

/// What the devices of the underlay do for the kernel (`ethtool -K`). The other devices are as they
/// are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// All they can: packets of 64 KB cross whole, as between virtual machines of one host.
    Super,
    /// Checksums and merging on receipt but no segmentation: a network card without it.
    Nic,
    /// Nothing.
    Wire,
}

impl Mode {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Super => "super",
            Self::Nic => "nic",
            Self::Wire => "wire",
        }
    }

    /// The kernel's names of the features that are switched, in an order it accepts.
    fn features(self) -> Vec<(&'static str, bool)> {
        let segmentation = [
            "tx-tcp-segmentation",
            "tx-tcp-ecn-segmentation",
            "tx-tcp6-segmentation",
            "tx-udp-segmentation",
            "tx-generic-segmentation",
        ];
        let segmentation = |on| segmentation.map(|name| (name, on));
        match self {
            Self::Super => [
                &[("tx-checksum-ip-generic", true), ("rx-checksum", true)][..],
                &[("tx-scatter-gather", true), ("rx-gro", false)],
                &segmentation(true),
            ]
            .concat(),
            Self::Nic => [
                &[("tx-checksum-ip-generic", true), ("rx-checksum", true)][..],
                &[("tx-scatter-gather", true)],
                &segmentation(false),
                &[("rx-gro", true)],
            ]
            .concat(),
            Self::Wire => [
                &segmentation(false)[..],
                &[("tx-scatter-gather", false), ("rx-gro", false)],
                &[("tx-checksum-ip-generic", false), ("rx-checksum", false)],
            ]
            .concat(),
        }
    }
}

/// Two nodes and two pods; nothing leads from one pod to the other yet.
#[derive(Debug)]
pub(crate) struct Ground {
    lab: Lab,
    pub(crate) nodes: [Host; 2],
    pub(crate) pods: Vec<Host>,
    /// The processor of each node and its pod, where they have one each.
    pub(crate) processors: Option<[usize; 2]>,
    congestion: Cell<Congestion>,
}

/// The device of a node on the cable.
pub(crate) const CABLE: &str = "eth0";
/// The device of a node to its pod.
const TO_POD: &str = "veth-pod";

impl Ground {
    /// The nodes alone, on a cable with an MTU; `None` if that is not permitted here.
    pub(crate) fn new(name: &str, mtu: u32) -> Option<Self> {
        let lab = Lab::for_test(name)?;
        let namespace = |name: &str| lab.namespace(name).expect("a namespace");
        let (a, b) = (namespace("node-1"), namespace("node-2"));
        a.add_veth(CABLE, &b, CABLE, mtu).expect("a cable");
        let dev = IfName::new(CABLE).expect("a name");
        let mut number = 0;
        let nodes = [a, b].map(|ns| {
            number += 1;
            let ip = |text: String| text.parse::<IpAddr>().expect("an address");
            let v4 = ip(format!("192.0.2.{number}"));
            let v6 = ip(format!("2001:db8:1::{number}"));
            ns.set_sysctl("ipv6/conf/eth0/accept_dad", "0")
                .expect("set");
            ns.set_up(CABLE).expect("up");
            ns.add_address(CABLE, v4, 24).expect("an address");
            ns.add_address(CABLE, v6, 64).expect("an address");
            ns.set_forwarding(true).expect("it forwards");
            for tree in ["all", "default", CABLE] {
                let key = format!("ipv4/conf/{tree}/rp_filter");
                ns.set_sysctl(&key, "0").expect("set");
            }
            run_in(&ns, "ip route add default via 192.0.2.254 dev eth0");
            run_in(&ns, "ip -6 route add default via 2001:db8:1::ff dev eth0");
            let (IpAddr::V4(v4), IpAddr::V6(v6)) = (v4, v6) else {
                unreachable!("written so above")
            };
            let ips = PublicIp {
                v4: Some(v4),
                v6: Some(v6),
            };
            Host { ns, dev, ips }
        });
        Some(Self {
            lab,
            nodes,
            pods: Vec::new(),
            processors: None,
            congestion: Cell::new(Congestion::Cubic),
        })
    }

    /// Gives each node a pod with addresses out of its subnets, on a cable of its own: what a
    /// bridge costs is not asked here.
    pub(crate) fn add_pods(&mut self, subnets: [DualStack<Subnet>; 2], mtu: u32) {
        for (i, subnets) in subnets.into_iter().enumerate() {
            let node = &self.nodes[i].ns;
            let pod = self.lab.namespace(&format!("pod-{}", i + 1));
            let pod = pod.expect("a namespace");
            node.add_veth(TO_POD, &pod, CABLE, mtu).expect("a cable");
            for (ns, dev) in [(node, TO_POD), (&pod, CABLE)] {
                let no_dad = format!("ipv6/conf/{dev}/accept_dad");
                ns.set_sysctl(&no_dad, "0").expect("set");
                ns.set_up(dev).expect("up");
            }
            let mut ips = PublicIp::default();
            for (family, subnet) in subnets.iter() {
                let nth = |n| subnet.nth(n).expect("it has many addresses");
                let (gateway, ip) = (nth(1), nth(2));
                let len = subnet.len();
                node.add_address(TO_POD, gateway, len).expect("an address");
                pod.add_address(CABLE, ip, len).expect("an address");
                let any = match family {
                    Family::V4 => "0.0.0.0/0",
                    Family::V6 => "::/0",
                };
                let any = any.parse().expect("a prefix");
                pod.add_route(any, gateway, CABLE).expect("a route");
                match ip {
                    IpAddr::V4(ip) => ips.v4 = Some(ip),
                    IpAddr::V6(ip) => ips.v6 = Some(ip),
                }
            }
            let dev = IfName::new(CABLE).expect("a name");
            self.pods.push(Host { ns: pod, dev, ips });
        }
    }

    /// Switches what the connections that the pods make from now on go by.
    pub(crate) fn set_congestion(&self, congestion: Congestion) {
        self.congestion.set(congestion);
    }

    /// Waits until the pods reach one another.
    pub(crate) fn assert_reachable(&self, name: &str, family: Family) {
        let ip = self.path(family).ip;
        for _ in 0..50 {
            if ping(&self.pods[0].ns, None, ip, Duration::from_millis(200)).is_ok() {
                return;
            }
        }
        panic!("{name}: no packet passes");
    }

    /// From the first pod to the second.
    pub(crate) fn path(&self, family: Family) -> Between<'_> {
        Between {
            from: &self.pods[0].ns,
            to: &self.pods[1].ns,
            ip: self.pods[1].ips.ip(family).expect("both families"),
            processors: self.processors,
            congestion: self.congestion.get(),
        }
    }

    /// Switches the devices of the cable.
    pub(crate) fn set_mode(&self, mode: Mode) {
        for node in &self.nodes {
            for (feature, on) in mode.features() {
                let op = Op::Change(Object::Offload(Offload {
                    dev: node.dev,
                    feature: feature.to_owned(),
                    on,
                }));
                node.ns
                    .apply(&[op])
                    .unwrap_or_else(|error| panic!("{}, {feature}: {error}", mode.name()));
            }
        }
    }

    /// Drops so many of a hundred packets that arrive at either node.
    pub(crate) fn lose(&self, percent: u32) {
        for node in &self.nodes {
            let rule = format!("numgen random mod 100 < {percent} drop");
            run_in(&node.ns, "nft add table ip lossy");
            run_in(
                &node.ns,
                "nft add chain ip lossy in { type filter hook prerouting priority -500 ; }",
            );
            run_in(
                &node.ns,
                &format!("nft add rule ip lossy in iifname eth0 {rule}"),
            );
        }
    }

    /// And lets them pass again.
    pub(crate) fn lose_none(&self) {
        for node in &self.nodes {
            run_in(&node.ns, "nft delete table ip lossy");
        }
    }
}
