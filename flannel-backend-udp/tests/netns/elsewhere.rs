//! Devices that are not, or no longer, in the network namespace that a forwarder serves.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use flannel_backend_udp::{Forwarders, HandoverError, InNamespace, Options, PacketPath};
use flannel_core::Family;

use crate::bed::{Bed, DEVICE, ip, wait_until};

/// A node that is started anew in another namespace is another node: what it is offered by the process
/// that kept the packets of the former one carries nothing there.
#[test]
fn a_device_of_another_namespace_is_refused_with_the_reason_and_goes_on() {
    let Some(bed) = Bed::new("udp-elsewhere", 2, Family::V4) else {
        return;
    };
    let forwarder = bed.start(0, Options::default());
    let _other = bed.start(1, Options::default());
    bed.assert_reachable();
    let (old, new) = UnixStream::pair().expect("a pair");
    let elsewhere = bed.sockets(1);
    let taking = thread::spawn(move || {
        let taker = Forwarders::new(Options::default(), elsewhere);
        let taken = taker.take_over(&new);
        (taken, taker.running())
    });
    let Err((forwarder, refused)) = forwarder.hand_over(&old) else {
        panic!("it was taken");
    };
    let (taken, running) = taking.join().expect("no panic");
    assert!(
        matches!(taken, Err(HandoverError::Namespace { dev }) if dev.as_str() == DEVICE),
        "{taken:?}"
    );
    assert_eq!(running, []);
    let reason = match refused {
        HandoverError::Refused { reason } => reason,
        other => panic!("{other:?}"),
    };
    assert!(reason.contains("another network namespace"), "{reason}");
    assert!(forwarder.health().is_running);
    bed.assert_reachable();
    // In its own one it is taken.
    let _taken = bed.hand_over(0, forwarder);
    bed.assert_reachable();
}

/// Queues go with their device wherever it goes, and say no word.
#[test]
fn a_packet_path_whose_device_was_moved_or_renamed_does_not_run() {
    for how in ["moved", "renamed"] {
        let Some(bed) = Bed::new("udp-moved", 2, Family::V4) else {
            return;
        };
        let fd = bed.ns(0).fd().try_clone_to_owned().expect("a descriptor");
        let paths = Forwarders::new(Options::default(), Arc::new(InNamespace::fd(fd)));
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().expect("a runtime");
        runtime
            .block_on(paths.open(&bed.tunnel(0)))
            .expect("it opens");
        assert_eq!(paths.running().len(), 1, "{how}");
        let there = bed.ns(1).path().display().to_string();
        if how == "moved" {
            ip(bed.ns(1), &["link", "delete", DEVICE]);
            ip(bed.ns(0), &["link", "set", DEVICE, "netns", &there]);
        } else {
            ip(bed.ns(0), &["link", "set", DEVICE, "down"]);
            ip(bed.ns(0), &["link", "set", DEVICE, "name", "away0"]);
        }
        assert_eq!(paths.running(), [], "{how}");
        // It has let go of its port: the one on the device that comes instead gets it.
        bed.add_device(0);
        let opened = runtime.block_on(paths.open(&bed.tunnel(0)));
        opened.expect("it opens again");
        wait_until("it runs", || paths.running().len() == 1);
    }
}
