//! What a forwarder lives through.

use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use flannel_backend_udp::table::TableBuilder;
use flannel_backend_udp::{Error, Forwarder, HandoverError, Options, Report, Threads};
use flannel_core::{DualStack, Family, Tunnel};
use flannel_testkit::prober::{self, Prober};

use crate::bed::{Bed, DEVICE, ip, output, remember, subnets, wait_until};

/// Whoever is started in the place of one that was killed, Go flannel too, finds nothing in its
/// way: a device without a reader, with routes that are longer than its own, would swallow every
/// packet.
#[test]
fn a_device_goes_with_its_forwarder_unless_it_is_handed_over() {
    let Some(bed) = Bed::new("udp-goes", 2, Family::V4) else {
        return;
    };
    let is_there = || output(bed.ns(0), "ip", &["link", "show", DEVICE]).0;
    // Before it has all that it needs, the device is not its own.
    let holder = bed.ns(0).run(|| UdpSocket::bind(bed.endpoint(0)));
    let holder = holder.expect("the namespace").expect("a socket");
    let sockets = bed.sockets(0);
    let refused = Forwarder::start(bed.tunnel(0), Options::default(), sockets, Arc::new(|_| {}));
    assert!(matches!(refused, Err(Error::Socket { .. })), "{refused:?}");
    assert!(is_there());
    drop(holder);

    let forwarder = bed.start(0, Options::default());
    let forwarder = bed.hand_over(0, forwarder);
    assert!(is_there());
    forwarder.stop();
    assert!(!is_there());
    let (_, routes) = output(bed.ns(0), "ip", &["route"]);
    assert!(!routes.contains("10.42.2.0/24"), "{routes}");
}

#[test]
fn a_device_that_is_made_anew_is_found() {
    let Some(bed) = Bed::new("udp-anew", 2, Family::V4) else {
        return;
    };
    let (watch, reports) = remember();
    let first = bed.start_watched(0, Options::default(), watch);
    let _second = bed.start(1, Options::default());
    bed.assert_reachable();
    ip(bed.ns(0), &["link", "delete", DEVICE]);
    wait_until("it is missed", || !first.health().is_running);
    // Nothing is made in its place.
    wait_until("it is waited for", || {
        let reports = reports.lock().expect("no panic");
        reports
            .iter()
            .any(|report| matches!(report, Report::Waiting { .. }))
    });
    assert!(!output(bed.ns(0), "ip", &["link", "show", DEVICE]).0);
    bed.add_device(0);
    wait_until("it is found", || first.health().is_running);
    bed.assert_reachable();
    assert!(first.health().restarts > 0);
    let reports = reports.lock().expect("no panic");
    assert!(matches!(reports[0], Report::Failed { .. }), "{reports:?}");
    assert_eq!(reports.last(), Some(&Report::Recovered));
}

#[test]
fn a_device_that_goes_down_comes_up_again() {
    let Some(bed) = Bed::new("udp-down", 2, Family::V4) else {
        return;
    };
    let first = bed.start(0, Options::default());
    let _second = bed.start(1, Options::default());
    bed.assert_reachable();
    ip(bed.ns(0), &["link", "delete", DEVICE]);
    bed.add_device(0);
    wait_until("it is found", || {
        first.health().restarts > 0 && first.health().is_running
    });
    bed.assert_reachable();
    ip(bed.ns(0), &["link", "set", DEVICE, "down"]);
    ip(bed.ns(0), &["link", "set", DEVICE, "up"]);
    for subnet in subnets(1).values() {
        ip(
            bed.ns(0),
            &["route", "replace", &subnet.to_string(), "dev", DEVICE],
        );
    }
    bed.assert_reachable();
}

#[test]
fn another_address_of_the_underlay_needs_no_restart() {
    let Some(bed) = Bed::new("udp-rebind", 2, Family::V4) else {
        return;
    };
    let forwarders = [0, 1].map(|node| bed.start(node, Options::default()));
    bed.assert_reachable();
    bed.ns(0)
        .add_address("eth0", [192, 0, 2, 200].into(), 24)
        .expect("an address");
    // By way of all addresses: the new socket and the old one cannot be there at once.
    for listen in ["0.0.0.0:8285", "192.0.2.200:8285"] {
        let listen: SocketAddr = listen.parse().expect("an address");
        let tunnel = Tunnel {
            listen: DualStack::v4(listen),
            ..bed.tunnel(0)
        };
        let altered = forwarders[0].alter(tunnel.clone());
        altered.expect("another address");
        assert_eq!(forwarders[0].tunnel(), tunnel);
        if listen.ip().is_unspecified() {
            bed.assert_reachable();
        }
    }
    let mut peers = TableBuilder::new();
    for subnet in subnets(0).values() {
        peers.insert(*subnet, "192.0.2.200:8285".parse().expect("an address"));
    }
    forwarders[1].set_table(peers.build());
    bed.assert_reachable();
    // A port that is taken: the old socket stays.
    let taken: SocketAddr = "192.0.2.200:9999".parse().expect("an address");
    let holder = bed.ns(0).run(|| UdpSocket::bind(taken));
    let _holder = holder.expect("the namespace").expect("a socket");
    let wrong = Tunnel {
        listen: DualStack::v4(taken),
        ..bed.tunnel(0)
    };
    let refused = forwarders[0].alter(wrong);
    assert!(matches!(refused, Err(Error::Socket { .. })), "{refused:?}");
    bed.assert_reachable();
    assert_eq!(forwarders[0].health().restarts, 0);
}

#[test]
fn no_packet_is_lost_when_a_forwarder_is_handed_over() {
    let Some(bed) = Bed::new("udp-handover", 2, Family::V4) else {
        return;
    };
    for threads in [Threads::One, Threads::PerDirection, Threads::Auto] {
        let options = Options {
            threads,
            ..Options::default()
        };
        let mut forwarder = bed.start(0, options.clone());
        let _other = bed.start(1, options);
        bed.assert_reachable();
        let flow = prober::Options {
            packets: 6_000,
            rate: 3_000,
            ..prober::Options::default()
        };
        let ends = [0, 1].map(|node| (&bed.pods[node].ns, bed.pod_ip(node, Family::V4)));
        let prober = Prober::start(ends[0], ends[1], flow).expect("a prober");
        for round in 1..=4 {
            assert!(prober.wait_received(round * 1_000, Duration::from_secs(10)));
            forwarder = bed.hand_over(0, forwarder);
            assert_eq!(forwarder.tunnel(), bed.tunnel(0));
            assert_eq!(forwarder.peers().len(), 1);
        }
        let report = prober.finish();
        assert_eq!(report.lost(), 0, "{report}");
        assert_eq!(
            (report.forth.reordered, report.back.reordered),
            (0, 0),
            "{report}"
        );
    }
}

#[test]
fn a_handover_that_fails_leaves_the_old_one_running() {
    let Some(bed) = Bed::new("udp-failed", 2, Family::V4) else {
        return;
    };
    let mut forwarder = bed.start(0, Options::default());
    let _other = bed.start(1, Options::default());
    bed.assert_reachable();
    for answer in [&[][..], &[1], &[2], &[1, 9]] {
        use std::io::{Read, Write};
        let (old, mut new) = UnixStream::pair().expect("a pair");
        let answering = thread::spawn(move || {
            let mut head = [0; 16];
            new.read_exact(&mut head).expect("a head");
            let mut body =
                vec![0; u32::from_be_bytes(head[12..].try_into().expect("four")) as usize];
            new.read_exact(&mut body).expect("a body");
            new.write_all(answer).expect("answered");
        });
        let Err((back, _)) = forwarder.hand_over(&old) else {
            panic!("nobody took it");
        };
        forwarder = back;
        answering.join().expect("no panic");
        assert!(forwarder.health().is_running);
        bed.assert_reachable();
    }
}

#[test]
fn an_offer_is_looked_at_before_it_is_taken() {
    use std::io::Write;
    let head = |version: u16, fds: u16, len: u32| {
        let mut head = b"FLNUDP".to_vec();
        head.extend(version.to_be_bytes());
        head.extend(fds.to_be_bytes());
        head.extend([0, 0]);
        head.extend(len.to_be_bytes());
        head
    };
    let offers = [
        b"something else, long enough".to_vec(),
        head(3, 0, 0),
        head(2, 0, 0),
        head(2, 65, 0),
        head(2, 0, u32::MAX),
        // Its lowest version is above its highest.
        [&head(2, 0, 0)[..10], &[3, 2, 0, 0, 0, 0]].concat(),
        [head(2, 0, 2), b"{}".to_vec()].concat(),
        head(2, 0, 1_000_000),
        b"FLN".to_vec(),
    ];
    for offer in offers {
        let (mut old, new) = UnixStream::pair().expect("a pair");
        old.write_all(&offer).expect("written");
        drop(old);
        let sockets = Arc::new(flannel_backend_udp::InNamespace::current());
        let taken = Forwarder::take_over(&new, sockets, Arc::new(|_| {}));
        let error = taken.expect_err("it is nonsense");
        let is_version = matches!(error, HandoverError::Version { theirs } if theirs.has(3));
        assert_eq!(is_version, offer.get(7) == Some(&3), "{error:?}");
    }
}

#[test]
fn what_cannot_be_is_refused_at_once() {
    let Some(bed) = Bed::new("udp-cannot", 2, Family::V4) else {
        return;
    };
    let start = |tunnel, options| {
        let started = Forwarder::start(tunnel, options, bed.sockets(0), Arc::new(|_| {}));
        started.expect_err("it cannot be")
    };
    let missing = Tunnel {
        dev: "absent0".parse().expect("a name"),
        ..bed.tunnel(0)
    };
    let error = start(missing, Options::default());
    assert!(matches!(error, Error::Device { .. }), "{error:?}");
    assert!(!output(bed.ns(0), "ip", &["link", "show", "absent0"]).0);
    let faults = [
        DualStack::default(),
        DualStack::v6(bed.endpoint(0)),
        DualStack::v4(SocketAddr::new(bed.endpoint(0).ip(), 0)),
    ];
    for listen in faults {
        let wrong = Tunnel {
            listen,
            ..bed.tunnel(0)
        };
        let error = start(wrong, Options::default());
        let is_told = matches!(
            error,
            Error::Invalid {
                field: "tunnel",
                ..
            }
        );
        assert!(is_told, "{error:?}");
    }
    let holder = bed.ns(0).run(|| UdpSocket::bind(bed.endpoint(0)));
    let _holder = holder.expect("the namespace").expect("a socket");
    assert!(matches!(
        start(bed.tunnel(0), Options::default()),
        Error::Socket { .. }
    ));
    let none = Options {
        workers: 0,
        ..Options::default()
    };
    assert!(matches!(
        start(bed.tunnel(0), none),
        Error::Invalid {
            field: "workers",
            ..
        }
    ));
}
