//! Hints, and readings while the state changes.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "tests live in real time, run other tools, and say why they are skipped"
)]

mod common;
mod strategies;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;
use flannel_core::kernel::Error;
use flannel_core::{Change, ChangeStream, Family, Fdb, Kernel, Link, LinkKind, Object, Op};
use flannel_netlink::{NetlinkKernel, NetlinkOptions};

/// The hints that are there already.
async fn pending(hints: &mut ChangeStream) -> BTreeSet<Change> {
    let mut found = BTreeSet::new();
    while let std::task::Poll::Ready(Some(hint)) =
        std::future::poll_fn(|cx| std::task::Poll::Ready(hints.as_mut().poll_next(cx))).await
    {
        found.insert(hint);
    }
    found
}

/// All hints up to the one at a marker: hints are told in the order of the events, so what comes
/// before the marker is there when the marker is. Each marker is another device, lest the end of
/// one is taken for the beginning of the next.
async fn up_to_marker(net: &Net, hints: &mut ChangeStream, number: usize) -> BTreeSet<Change> {
    let name = dev(&format!("marker{number}"));
    let marker = Object::Link(Link {
        name,
        kind: LinkKind::Bridge,
        mtu: None,
        mac: None,
        up: false,
        alias: None,
    });
    net.ok(&[Op::Create(marker)]).await;
    let mut found = BTreeSet::new();
    while !found.contains(&Change::Link(Some(name))) {
        found.insert(next(hints).await);
    }
    found.extend(pending(hints).await);
    found
}

#[test]
fn neighbours_that_come_by_themselves_are_not_hinted() {
    netns(async |net| {
        net.with_vxlan().await;
        let mut hints = net.kernel.changes();
        assert_eq!(next(&mut hints).await, Change::All);
        let of_u0 = Change::Neighbour(Some(dev("u0")));
        let of_overlay = Change::Neighbour(Some(dev("flannel.1")));
        for line in [
            "ip neigh add 192.0.2.66 lladdr 0e:00:00:00:00:66 dev u0 nud stale",
            "ip neigh change 192.0.2.66 lladdr 0e:00:00:00:00:67 dev u0 nud reachable",
        ] {
            if run(line).is_none() {
                return;
            }
        }
        let found = up_to_marker(&net, &mut hints, 0).await;
        assert!(!found.contains(&of_u0), "{found:?}");
        // What somebody configured is hinted at, however it ends.
        let lines = [
            "ip neigh add 192.0.2.68 lladdr 0e:00:00:00:00:66 dev u0 nud permanent",
            "ip neigh del 192.0.2.68 dev u0",
        ];
        for (at, line) in lines.into_iter().enumerate() {
            run(line);
            let found = up_to_marker(&net, &mut hints, 1 + at).await;
            assert!(found.contains(&of_u0), "{line}: {found:?}");
        }
        let lines = [
            "ip neigh add 10.5.9.9 lladdr 0e:00:00:00:00:66 dev flannel.1 nud permanent",
            "ip neigh change 10.5.9.9 lladdr 0e:00:00:00:00:66 dev flannel.1 nud reachable",
            "bridge fdb add 0e:00:00:00:00:71 dst 192.0.2.71 dev flannel.1",
            "bridge fdb del 0e:00:00:00:00:71 dst 192.0.2.71 dev flannel.1",
        ];
        for (at, line) in lines.into_iter().enumerate() {
            if run(line).is_none() {
                return;
            }
            let found = up_to_marker(&net, &mut hints, 10 + at).await;
            assert!(found.contains(&of_overlay), "{line}: {found:?}");
        }
    });
}

/// A device that is made or renamed while we watch is called by its name.
#[test]
fn hints_follow_the_names() {
    netns(async |net| {
        let mut hints = net.kernel.changes();
        assert_eq!(next(&mut hints).await, Change::All);
        net.with_vxlan().await;
        let found = up_to_marker(&net, &mut hints, 0).await;
        assert!(found.contains(&Change::Link(Some(dev("flannel.1")))));
        assert!(found.contains(&Change::Address(Some(dev("u0")))));
        for line in [
            "ip link set flannel.1 down",
            "ip link set flannel.1 name other",
            "ip link set other up",
            "ip neigh add 10.5.9.9 lladdr 0e:00:00:00:00:66 dev other nud permanent",
        ] {
            if run(line).is_none() {
                return;
            }
        }
        let found = up_to_marker(&net, &mut hints, 1).await;
        assert!(
            found.contains(&Change::Neighbour(Some(dev("other")))),
            "{found:?}"
        );
    });
}

/// An answer that did not fit into the receive buffer never passes for success.
#[test]
fn lost_answers_are_no_success() {
    netns_with(
        NetlinkOptions::new().receive_buffer(16 * 1024),
        async |net| {
            net.with_vxlan().await;
            // An IPv4 device cannot send to an IPv6 remote: the kernel refuses each.
            let bad: Vec<_> = (0..2000)
                .map(|n| {
                    Object::Fdb(Fdb {
                        dev: dev("flannel.1"),
                        mac: mac(n),
                        remote: ip("2001:db8::9"),
                    })
                })
                .collect();
            let results = net.kernel.apply(&creates(&bad)).await;
            assert!(results.iter().all(Result::is_err));
            let lost = results
                .iter()
                .filter(|result| matches!(result, Err(Error::Connection { .. })))
                .count();
            assert!(lost > 0, "the buffer was not too small");
            // The next call has a new connection.
            net.ok(&creates(&peer(1, Family::V4))).await;
            net.observe().await;
        },
    );
}

/// While links and routes come and go, a reading holds all that stays, or is an error.
#[test]
fn a_reading_under_churn_is_whole_or_an_error() {
    netns(async |net| {
        net.with_vxlan().await;
        let both = |n| {
            Family::ALL
                .into_iter()
                .flat_map(move |family| peer(n, family))
        };
        let stays: Vec<_> = (0..300).flat_map(both).collect();
        net.ok(&creates(&stays)).await;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let namespace = this_namespace();
        let churn = std::thread::spawn(move || {
            let kernel = NetlinkKernel::in_namespace_fd(namespace).expect("a kernel");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build()
                .expect("a runtime");
            let mut objects = vec![Object::Link(Link {
                name: dev("churn"),
                kind: LinkKind::Bridge,
                mtu: None,
                mac: None,
                up: true,
                alias: None,
            })];
            objects.push(address("churn", "10.66.0.1", 24));
            objects.extend((400..600).flat_map(both));
            let mut rounds = 0;
            while !stopped.load(Ordering::Relaxed) {
                runtime.block_on(kernel.apply(&creates(&objects)));
                runtime.block_on(kernel.apply(&deletes(&objects)));
                rounds += 1;
            }
            rounds
        });
        let mut whole = 0;
        for _ in 0..200 {
            match net.kernel.observe(&scope()).await {
                Ok(observed) => {
                    whole += 1;
                    for object in &stays {
                        assert_eq!(observed.objects.get(&object.key()), Some(object));
                    }
                }
                Err(error) => assert!(matches!(error, Error::Interrupted), "{error}"),
            }
        }
        stop.store(true, Ordering::Relaxed);
        let rounds = churn.join().expect("the churn");
        assert!(rounds > 2, "there was no churn");
        assert!(whole > 0, "no reading succeeded");
    });
}

/// The kernel's own dump leaves out entries that stay when others go while it is read.
#[test]
fn forwarding_entries_are_read_whole_while_others_go() {
    netns(async |net| {
        net.with_vxlan().await;
        let entries = |numbers: std::ops::Range<u16>| -> Vec<_> {
            let entry = |n| Fdb {
                dev: dev("flannel.1"),
                mac: mac(n),
                remote: ip("192.0.2.9"),
            };
            numbers.map(entry).map(Object::Fdb).collect()
        };
        let stays = entries(0..3000);
        net.ok(&creates(&stays)).await;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let namespace = this_namespace();
        let (comes, goes) = (creates(&entries(4000..4600)), deletes(&entries(4000..4600)));
        let churn = std::thread::spawn(move || {
            let kernel = NetlinkKernel::in_namespace_fd(namespace).expect("a kernel");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build()
                .expect("a runtime");
            while !stopped.load(Ordering::Relaxed) {
                runtime.block_on(kernel.apply(&comes));
                runtime.block_on(kernel.apply(&goes));
                // Without a pause no reading would ever be undisturbed.
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let mut whole = 0;
        for _ in 0..150 {
            match net.kernel.observe(&scope()).await {
                Ok(observed) => {
                    whole += 1;
                    for object in &stays {
                        assert_eq!(observed.objects.get(&object.key()), Some(object));
                    }
                }
                Err(error) => assert!(matches!(error, Error::Interrupted), "{error}"),
            }
        }
        stop.store(true, Ordering::Relaxed);
        churn.join().expect("the churn");
        assert!(whole > 0, "no reading succeeded");
    });
}
