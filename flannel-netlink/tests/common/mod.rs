//! A network namespace of its own for each test.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "shared by several test binaries; a skipped test says why"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::Duration;

use flannel_core::kernel::Result;
use flannel_core::{
    Address, Change, ChangeStream, Family, Fdb, IfName, Kernel, Link, LinkKind, MAIN_TABLE,
    MacAddr, Neighbour, Nexthop, Object, ObjectKey, Observed, Op, Route, RouteProtocol,
    RouteTarget, Scope, Subnet, Vxlan,
};
use flannel_netlink::{NetlinkKernel, NetlinkOptions};
use nix::sched::{CloneFlags, unshare};

/// Runs a test on a thread of its own in an anonymous network namespace of its own, which ends
/// with the thread. Skipped, with the reason, where no namespace can be had.
pub fn netns<T: Send + 'static>(test: impl AsyncFnOnce(Net) -> T + Send + 'static) -> Option<T> {
    netns_with(NetlinkOptions::new(), test)
}

pub fn netns_with<T: Send + 'static>(
    options: NetlinkOptions,
    test: impl AsyncFnOnce(Net) -> T + Send + 'static,
) -> Option<T> {
    enter(options, |runtime, net| runtime.block_on(test(net)))
}

/// As [`netns`], for a test that drives the runtime itself.
pub fn netns_blocking<T: Send + 'static>(
    test: impl FnOnce(&tokio::runtime::Runtime, Net) -> T + Send + 'static,
) -> Option<T> {
    enter(NetlinkOptions::new(), test)
}

fn enter<T: Send + 'static>(
    options: NetlinkOptions,
    test: impl FnOnce(&tokio::runtime::Runtime, Net) -> T + Send + 'static,
) -> Option<T> {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let thread = std::thread::spawn(move || {
        if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
            let reason = format!("no network namespace can be made: {errno}");
            flannel_testkit::require(&name, Some(&reason));
            return None;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        let kernel = options.open().expect("a kernel");
        Some(test(&runtime, Net { kernel }))
    });
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The network namespace of the calling thread.
pub fn this_namespace() -> std::os::fd::OwnedFd {
    std::fs::File::open("/proc/thread-self/ns/net")
        .expect("a namespace")
        .into()
}

/// Waits until a condition holds, for ten seconds at most.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let limit = tokio::time::Instant::now() + Duration::from_secs(10);
    while !condition().await {
        assert!(tokio::time::Instant::now() < limit, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn dev(name: &str) -> IfName {
    IfName::new(name).expect("a device name")
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub fn net(text: &str) -> Subnet {
    text.parse().expect("a subnet")
}

pub fn mac(last: u16) -> MacAddr {
    let [a, b] = last.to_be_bytes();
    MacAddr([0x0e, 0x11, 0x22, 0x33, a, b])
}

/// A namespace with `u0` (192.0.2.1/24, 2001:db8::1/64) paired with `u1`, both up.
pub struct Net {
    pub kernel: NetlinkKernel,
}

impl Net {
    pub async fn with_underlay(&self) {
        self.kernel
            .create_veth(dev("u0"), 1500, dev("u1"), None)
            .await
            .expect("a veth pair");
        self.ok(&[
            Op::Change(veth("u0", "u1", true)),
            Op::Change(veth("u1", "u0", true)),
            Op::Create(address("u0", "192.0.2.1", 24)),
            Op::Create(address("u0", "2001:db8::1", 64)),
        ])
        .await;
    }

    /// With `flannel.1` and `flannel-v6.1` on it, up.
    pub async fn with_vxlan(&self) {
        self.with_underlay().await;
        let devices =
            ["flannel.1", "flannel-v6.1"].map(|name| Op::Create(Object::Link(vxlan(name))));
        self.ok(&devices).await;
        self.ok(&[Op::Create(address("flannel.1", "10.5.0.0", 32))])
            .await;
    }

    /// Applies ops that must all succeed.
    pub async fn ok(&self, ops: &[Op]) {
        for (op, result) in ops.iter().zip(self.kernel.apply(ops).await) {
            if let Err(error) = result {
                panic!("{} {}: {error}", op.verb(), op.object());
            }
        }
    }

    /// Applies one op.
    pub async fn one(&self, op: Op) -> Result<()> {
        let mut results = self.kernel.apply(&[op]).await;
        assert_eq!(results.len(), 1);
        results.remove(0)
    }

    pub async fn observe(&self) -> Observed {
        self.kernel.observe(&scope()).await.expect("the state")
    }

    pub async fn find(&self, key: &ObjectKey) -> Option<Object> {
        self.observe().await.objects.get(key).cloned()
    }

    /// Whether an object is there, just so.
    pub async fn has(&self, object: &Object) -> bool {
        self.find(&object.key()).await.as_ref() == Some(object)
    }
}

/// Runs a command in the namespace of the calling thread; `None`: there is no such command.
pub fn run(line: &str) -> Option<String> {
    let mut words = line.split_whitespace();
    let program = words.next().expect("a program");
    let output = match Command::new(program).args(words).output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            flannel_testkit::require(line, Some(&format!("there is no program {program}")));
            return None;
        }
        Err(error) => panic!("{line}: {error}"),
    };
    assert!(
        output.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub fn scope() -> Scope {
    Scope {
        devices: [dev("flannel.1"), dev("flannel-v6.1"), dev("u0")].into(),
        settings: [
            ObjectKey::Sysctl {
                dev: dev("flannel.1"),
                family: Family::V6,
                name: "accept_ra".to_owned(),
            },
            ObjectKey::Sysctl {
                dev: dev("flannel.1"),
                family: Family::V4,
                name: "rp_filter".to_owned(),
            },
            ObjectKey::Offload {
                dev: dev("flannel.1"),
                feature: "tx-checksum-ip-generic".to_owned(),
            },
        ]
        .into(),
    }
}

pub fn veth(name: &str, peer: &str, up: bool) -> Object {
    Object::Link(Link {
        name: dev(name),
        kind: LinkKind::Veth {
            peer: Some(dev(peer)),
        },
        mtu: None,
        mac: None,
        up,
        alias: None,
    })
}

pub fn vxlan(name: &str) -> Link {
    let v6 = name.contains("-v6");
    Link {
        name: dev(name),
        kind: LinkKind::Vxlan(Vxlan {
            vni: 1,
            port: 8472,
            underlay: Some(dev("u0")),
            local: Some(ip(if v6 { "2001:db8::1" } else { "192.0.2.1" })),
            learning: false,
            gbp: false,
        }),
        mtu: Some(if v6 { 1430 } else { 1450 }),
        mac: Some(mac(1)),
        up: true,
        alias: Some("flannel overlay test".to_owned()),
    }
}

pub fn address(name: &str, text: &str, prefix_len: u8) -> Object {
    Object::Address(Address {
        dev: dev(name),
        ip: ip(text),
        prefix_len,
    })
}

pub fn route(dst: &str, target: RouteTarget) -> Route {
    let dst = net(dst);
    Route {
        table: MAIN_TABLE,
        dst,
        metric: Route::default_metric(dst.family()),
        target,
        protocol: RouteProtocol::OURS,
        source: None,
    }
}

pub fn via(gateway: &str) -> RouteTarget {
    RouteTarget::Gateway {
        gateway: ip(gateway),
        dev: dev("flannel.1"),
        onlink: true,
    }
}

/// The objects of peer `n` on `flannel.1`: what VXLAN has for it, through a nexthop object.
pub fn peer(n: u16, family: Family) -> [Object; 4] {
    let [a, b] = n.to_be_bytes();
    let (gateway, remote, len) = match family {
        Family::V4 => (
            IpAddr::V4(Ipv4Addr::new(10, 128 | a, b, 0)),
            IpAddr::V4(Ipv4Addr::new(192, 0, 3 + a, b)),
            24,
        ),
        Family::V6 => (
            IpAddr::V6(Ipv6Addr::new(0xfd00, 5, n, 0, 0, 0, 0, 0)),
            IpAddr::V4(Ipv4Addr::new(192, 0, 3 + a, b)),
            64,
        ),
    };
    let id = u32::from(n) + if family == Family::V4 { 1 } else { 100_001 };
    let device = dev("flannel.1");
    [
        Object::Fdb(Fdb {
            dev: device,
            mac: mac(n.wrapping_add(2)),
            remote,
        }),
        Object::Neighbour(Neighbour {
            dev: device,
            ip: gateway,
            mac: mac(n.wrapping_add(2)),
        }),
        Object::Nexthop(Nexthop {
            id,
            gateway,
            dev: device,
            onlink: true,
            protocol: RouteProtocol::OURS,
        }),
        Object::Route(Route {
            table: MAIN_TABLE,
            dst: Subnet::new(gateway, len).expect("a subnet"),
            metric: Route::default_metric(family),
            target: RouteTarget::Nexthop(id),
            protocol: RouteProtocol::OURS,
            source: None,
        }),
    ]
}

pub fn creates(objects: &[Object]) -> Vec<Op> {
    objects.iter().cloned().map(Op::Create).collect()
}

pub fn deletes(objects: &[Object]) -> Vec<Op> {
    objects.iter().rev().cloned().map(Op::Delete).collect()
}

/// The next hint.
pub async fn next(hints: &mut ChangeStream) -> Change {
    let next = std::future::poll_fn(|cx| hints.as_mut().poll_next(cx));
    tokio::time::timeout(Duration::from_secs(10), next)
        .await
        .expect("a hint in time")
        .expect("the stream never ends")
}
