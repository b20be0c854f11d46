//! Hints, and readings while the state changes.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "tests live in real time, run other tools, and say why they are skipped"
)]

mod common;
mod strategies;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;
use flannel_core::kernel::Error;
use flannel_core::{
    Change, ChangeStream, Family, Fdb, Kernel, Link, LinkKind, MacAddr, Neighbour, Object, Op,
};
use flannel_netlink::{NetlinkKernel, NetlinkOptions};

/// The hints that are there already.
async fn pending(hints: &mut ChangeStream) -> Vec<Change> {
    let mut found = Vec::new();
    while let std::task::Poll::Ready(Some(hint)) =
        std::future::poll_fn(|cx| std::task::Poll::Ready(hints.as_mut().poll_next(cx))).await
    {
        found.push(hint);
    }
    found
}

/// All hints up to the one at a marker: hints are told in the order of the events, so what comes
/// before the marker is there when the marker is. Each marker is another device, lest the end of
/// one is taken for the beginning of the next.
async fn up_to_marker(net: &Net, hints: &mut ChangeStream, number: usize) -> Vec<Change> {
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
    let mut found = Vec::new();
    while !found
        .iter()
        .any(|change| matches!(change, Change::Set(Object::Link(link)) if link.name == name))
    {
        found.push(next(hints).await);
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
        for line in [
            "ip neigh add 192.0.2.66 lladdr 0e:00:00:00:00:66 dev u0 nud stale",
            "ip neigh change 192.0.2.66 lladdr 0e:00:00:00:00:67 dev u0 nud reachable",
        ] {
            if run(line).is_none() {
                return;
            }
        }
        let found = up_to_marker(&net, &mut hints, 0).await;
        let is_neighbour = |change: &Change| {
            matches!(
                change,
                Change::Set(Object::Neighbour(_)) | Change::Gone(_) | Change::Neighbour(_)
            )
        };
        assert!(!found.iter().any(is_neighbour), "{found:?}");
        // What somebody configured is told of, however it ends.
        let neighbour = |on: &str, address: &str| Neighbour {
            dev: dev(on),
            ip: address.parse().expect("an address"),
            mac: MacAddr([0x0e, 0, 0, 0, 0, 0x66]),
        };
        let of_u0 = Object::Neighbour(neighbour("u0", "192.0.2.68"));
        let of_overlay = Object::Neighbour(neighbour("flannel.1", "10.5.9.9"));
        let entry = Object::Fdb(Fdb {
            dev: dev("flannel.1"),
            mac: MacAddr([0x0e, 0, 0, 0, 0, 0x71]),
            remote: ip("192.0.2.71"),
        });
        let (set, gone) = (Change::Set, |object: &Object| Change::Gone(object.key()));
        let lines = [
            (
                "ip neigh add 192.0.2.68 lladdr 0e:00:00:00:00:66 dev u0 nud permanent",
                set(of_u0.clone()),
            ),
            ("ip neigh del 192.0.2.68 dev u0", gone(&of_u0)),
            (
                "ip neigh add 10.5.9.9 lladdr 0e:00:00:00:00:66 dev flannel.1 nud permanent",
                set(of_overlay.clone()),
            ),
            (
                "ip neigh change 10.5.9.9 lladdr 0e:00:00:00:00:66 dev flannel.1 nud reachable",
                gone(&of_overlay),
            ),
            (
                "bridge fdb add 0e:00:00:00:00:71 dst 192.0.2.71 dev flannel.1",
                set(entry.clone()),
            ),
            (
                "bridge fdb del 0e:00:00:00:00:71 dst 192.0.2.71 dev flannel.1",
                gone(&entry),
            ),
        ];
        for (at, (line, told)) in lines.into_iter().enumerate() {
            if run(line).is_none() {
                return;
            }
            let found = up_to_marker(&net, &mut hints, 1 + at).await;
            assert!(found.contains(&told), "{line}: {found:?}");
        }
    });
}

/// A device that is made or renamed while we watch is called by its name.
/// That filters changed is told once for all that changes within a second, and each time.
#[test]
fn changes_of_packet_filters_are_hinted_at_together() {
    if !flannel_testkit::require_tool("watch-filters", "nft") {
        return;
    }
    netns(async |net| {
        let mut hints = net.kernel.changes();
        assert_eq!(next(&mut hints).await, Change::All);
        run("nft add table inet guard").expect("nf_tables");
        assert_eq!(next(&mut hints).await, Change::Policy);
        let start = std::time::Instant::now();
        for n in 0..20 {
            run(&format!("nft add chain inet guard chain{n}")).expect("nf_tables");
        }
        let seconds = 1 + usize::try_from(start.elapsed().as_secs()).expect("a few");
        assert_eq!(next(&mut hints).await, Change::Policy);
        let more = pending(&mut hints).await.len();
        assert!(more < seconds, "{more} hints more within {seconds} s");
        // What was in the quiet second is not forgotten.
        run("nft delete table inet guard").expect("it is there");
        while pending(&mut hints).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(start.elapsed() < Duration::from_secs(5), "it is not told");
        }
    });
}

#[test]
fn hints_follow_the_names() {
    netns(async |net| {
        let mut hints = net.kernel.changes();
        assert_eq!(next(&mut hints).await, Change::All);
        net.with_vxlan().await;
        let found = up_to_marker(&net, &mut hints, 0).await;
        let is_made = |change: &Change| matches!(change, Change::Set(Object::Link(link)) if link.name == dev("flannel.1"));
        assert!(found.iter().any(is_made), "{found:?}");
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
        assert!(found.contains(&Change::Link(Some(dev("flannel.1")))));
        let is_of_other = |change: &Change| matches!(change, Change::Set(Object::Neighbour(entry)) if entry.dev == dev("other"));
        assert!(found.iter().any(is_of_other), "{found:?}");
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
