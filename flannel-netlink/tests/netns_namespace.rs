//! Namespaces, rights and lives: where a kernel is, what it may do, and when it ends.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "tests live in real time, run other tools, and say why they are skipped"
)]

mod common;
mod strategies;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use common::*;
use flannel_core::kernel::Error;
use flannel_core::{
    Change, Clock, Family, Kernel, Link, LinkKind, Object, ObjectKey, Op, Scope, Sysctl,
};
use flannel_netlink::{BootClock, NetlinkKernel};

/// A pair of devices between namespaces, a bridge with a port, a device that moves.
#[test]
fn devices_between_namespaces() {
    netns(async |net| {
        let (send, receive) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            netns_blocking(move |runtime, other| {
                send.send(this_namespace()).expect("sent");
                wait.recv().expect("a word");
                let observed = runtime.block_on(other.observe());
                let names: BTreeSet<_> = observed.links.iter().map(|link| link.name).collect();
                assert_eq!(names, [dev("lo"), dev("p1"), dev("p2")].into());
            })
        });
        let namespace = receive.recv().expect("a namespace");
        net.kernel
            .create_veth(dev("p0"), 1400, dev("p1"), Some(namespace.as_fd()))
            .await
            .expect("a pair");
        net.kernel
            .create_veth(dev("p3"), 1400, dev("p2"), None)
            .await
            .expect("a pair");
        net.kernel
            .move_link(dev("p2"), namespace.as_fd())
            .await
            .expect("moved");
        let bridge = Object::Link(Link {
            name: dev("br0"),
            kind: LinkKind::Bridge,
            mtu: None,
            mac: None,
            up: true,
            alias: None,
        });
        net.ok(&[Op::Create(bridge)]).await;
        net.kernel
            .set_master(dev("p0"), Some(dev("br0")))
            .await
            .expect("enslaved");
        let master = |observed: flannel_core::Observed| {
            let port = observed
                .links
                .into_iter()
                .find(|link| link.name == dev("p0"));
            port.expect("p0").master
        };
        let observed = net.observe().await;
        // The other end is elsewhere, where its index says nothing.
        let p0 = Object::Link(Link {
            name: dev("p0"),
            kind: LinkKind::Veth { peer: None },
            mtu: Some(1400),
            mac: observed
                .links
                .iter()
                .find(|link| link.name == dev("p0"))
                .and_then(|link| link.mac),
            up: false,
            alias: None,
        });
        assert_eq!(observed.objects.get(&p0.key()), Some(&p0));
        assert_eq!(master(observed), Some(dev("br0")));
        net.kernel.set_master(dev("p0"), None).await.expect("freed");
        assert_eq!(master(net.observe().await), None);
        for result in [
            net.kernel.set_master(dev("p9"), None).await,
            net.kernel.set_master(dev("p0"), Some(dev("br9"))).await,
            net.kernel.move_link(dev("p9"), namespace.as_fd()).await,
        ] {
            assert!(
                matches!(result, Err(Error::NoSuchDevice { .. })),
                "{result:?}"
            );
        }
        done.send(()).expect("sent");
        other.join().expect("the other namespace");
    });
}

/// Kernel and watch hold no namespace beyond their lives: a veth pair ends with one of them.
#[test]
fn dropping_the_kernel_and_the_watch_frees_the_namespace() {
    netns(async |net| {
        let (send, receive) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            netns_blocking(move |runtime, other| {
                let hints = other.kernel.changes();
                runtime.block_on(other.observe());
                send.send((this_namespace(), other.kernel, hints))
                    .expect("sent");
            })
        });
        let (namespace, kernel, mut hints) = receive.recv().expect("a namespace");
        thread.join().expect("a thread");
        assert_eq!(next(&mut hints).await, Change::All);
        net.kernel
            .create_veth(dev("p0"), 1500, dev("p1"), Some(namespace.as_fd()))
            .await
            .expect("a pair");
        drop((namespace, kernel));
        assert!(net.find(&ObjectKey::Link(dev("p0"))).await.is_some());
        drop(hints);
        until("the namespace is freed", async || {
            net.find(&ObjectKey::Link(dev("p0"))).await.is_none()
        })
        .await;
    });
}

#[test]
fn a_namespace_is_entered_by_path_or_file() {
    netns(async |net| {
        net.with_underlay().await;
        let path = format!(
            "/proc/{}/task/{}/ns/net",
            std::process::id(),
            nix::unistd::gettid()
        );
        let opened = std::thread::spawn(move || {
            let file = std::fs::File::open(&path).expect("a namespace");
            [
                NetlinkKernel::in_namespace(&path).expect("a kernel"),
                NetlinkKernel::in_namespace_fd(file.into()).expect("a kernel"),
            ]
        });
        for kernel in opened.join().expect("a thread") {
            let observed = kernel.observe(&Scope::default()).await.expect("the state");
            assert!(observed.objects.contains_key(&ObjectKey::Link(dev("u0"))));
        }
        let missing = NetlinkKernel::in_namespace("/no/such/namespace");
        assert!(
            matches!(missing, Err(Error::NotFound { .. })),
            "{missing:?}"
        );
        let no_namespace = NetlinkKernel::in_namespace("/proc/self/status");
        assert!(
            matches!(no_namespace, Err(Error::Connection { .. })),
            "{no_namespace:?}"
        );
    });
}

/// An apply that nobody waits for does no harm to the next.
#[test]
fn an_abandoned_apply_harms_nothing() {
    netns(async |net| {
        net.with_vxlan().await;
        let objects: Vec<_> = (0..2000).flat_map(|n| peer(n, Family::V4)).collect();
        for _ in 0..5 {
            let ops = creates(&objects);
            let mut apply = net.kernel.apply(&ops);
            let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(apply.as_mut().poll(cx)));
            assert!(polled.await.is_pending());
            drop(apply);
        }
        net.ok(&creates(&objects)).await;
        let observed = net.observe().await;
        for object in &objects {
            assert_eq!(observed.objects.get(&object.key()), Some(object));
        }
    });
}

#[test]
fn probing_tells_what_is_there() {
    netns(async |net| {
        net.with_underlay().await;
        let features = net.kernel.features().await.expect("an answer");
        assert!(features.net_admin && features.vxlan && features.ipv6 && features.sysctls);
        assert!(!features.release.is_empty());
        let observed = net.observe().await;
        assert_eq!(observed.links.len(), 3, "{:?}", observed.links);
    });
}

/// Set for the child of the test below.
const CHILD: &str = "FLANNEL_TEST_WITHOUT_RIGHTS";

/// Without rights everything is seen and nothing is done, and both are said.
#[test]
fn without_rights_it_is_said() {
    netns(async |net| {
        net.with_vxlan().await;
        let binary = std::env::current_exe().expect("this program");
        let output = Command::new(&binary)
            .args(["--exact", "without_rights_child", "--nocapture"])
            .env(CHILD, "1")
            .env("RUST_BACKTRACE", "0")
            .uid(65_534)
            .gid(65_534)
            .output();
        match output {
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{text}");
                assert!(text.contains("child ran"), "{text}");
            }
            // Somebody without rights may not be let into the folder of the test programs.
            Err(error) => flannel_testkit::skip("without_rights_it_is_said", &error.to_string()),
        }
    });
}

/// What the test above runs as nobody, in its namespace.
#[test]
fn without_rights_child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let kernel = NetlinkKernel::new().expect("a kernel");
        let features = kernel.features().await.expect("an answer");
        assert!(!features.net_admin && !features.sysctls, "{features:?}");
        assert!(
            features.vxlan && features.nexthops && features.ipv6,
            "{features:?}"
        );
        let observed = kernel.observe(&scope()).await.expect("the state");
        assert!(
            observed
                .objects
                .contains_key(&ObjectKey::Link(dev("flannel.1")))
        );
        let ops = [
            Op::Create(address("flannel.1", "10.5.0.1", 32)),
            Op::Change(Object::Link(vxlan("flannel.1"))),
            Op::Change(Object::Sysctl(Sysctl {
                dev: dev("flannel.1"),
                family: Family::V6,
                name: "accept_ra".to_owned(),
                value: "7".to_owned(),
            })),
            Op::Change(Object::Link(Link {
                mtu: Some(1300),
                ..vxlan("flannel.1")
            })),
        ];
        let results = kernel.apply(&ops).await;
        for (at, result) in results.iter().enumerate() {
            // What is right already needs no right.
            let fits = match result {
                Ok(()) => at == 1,
                Err(error) => matches!(error, Error::NotPermitted { .. }) && at != 1,
            };
            assert!(fits, "{at}: {result:?}");
        }
        let mut hints = kernel.changes();
        assert_eq!(next(&mut hints).await, Change::All);
    });
    eprintln!("child ran");
}

#[test]
fn the_clock_counts_from_the_start_of_the_machine() {
    let clock = BootClock::new();
    let (first, second) = (clock.now(), clock.now());
    assert!(second >= first);
    let uptime = std::fs::read_to_string("/proc/uptime").expect("Linux");
    let uptime: f64 = uptime
        .split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .expect("seconds");
    assert!((clock.now().as_duration().as_secs_f64() - uptime).abs() < 5.0);
}
