//! Packets that are not forwarded are counted; the holder of a port that is refused is named.

use std::net::UdpSocket;

use flannel_backend_udp::{Forwarders, Options, PacketPath};
use flannel_core::kernel::Error;
use flannel_core::{Family, Tunnel};

use crate::bed::{Bed, wait_until};

/// An inner packet of UDP to port 9, between hosts of nodes' subnets.
fn inner(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 17, 0, 0];
    packet.extend(from);
    packet.extend(to);
    packet.extend([0, 9, 0, 9, 0, 8, 0, 0]);
    packet
}

#[test]
fn strangers_liars_and_nonsense_are_dropped_and_counted() {
    let Some(bed) = Bed::new("udp-refused", 3, Family::V4) else {
        return;
    };
    let forwarder = bed.start(0, Options::default());
    // Node 3 is no peer.
    let mut peers = flannel_backend_udp::table::TableBuilder::new();
    peers.insert("10.42.2.0/24".parse().expect("a subnet"), bed.endpoint(1));
    peers.insert("10.42.5.0/24".parse().expect("a subnet"), bed.endpoint(1));
    let other = "192.0.2.250:8285".parse().expect("an address");
    peers.insert("10.42.6.0/24".parse().expect("a subnet"), other);
    forwarder.set_table(peers.build());
    let socket = |node: usize, port: u16| {
        let mut from = bed.endpoint(node);
        from.set_port(port);
        let socket = bed.ns(node).run(|| UdpSocket::bind(from));
        socket.expect("the namespace").expect("a socket")
    };
    let (peer, stranger, port) = (socket(1, 8285), socket(2, 8285), socket(1, 8286));
    let (good, here) = ([10, 42, 2, 2], [10, 42, 1, 2]);
    let send = |socket: &UdpSocket, packet: &[u8]| {
        let sent = socket.send_to(packet, bed.endpoint(0));
        assert_eq!(sent.expect("sent"), packet.len());
    };
    send(&stranger, &inner(good, here));
    send(&port, &inner(good, here));
    send(&peer, &inner([10, 42, 3, 2], here));
    send(&peer, &inner([10, 42, 1, 9], here));
    send(&peer, &inner([10, 42, 6, 9], here));
    send(&peer, &inner(good, [10, 42, 3, 2]));
    send(&peer, &inner(good, [127, 0, 0, 1]));
    send(&peer, &inner(good, [224, 0, 0, 1]));
    send(&peer, &[]);
    send(&peer, b"x");
    send(&peer, &[0x60; 60]);
    send(&peer, &inner(good, here)[..27]);
    send(&peer, &inner(good, here));
    send(&peer, &inner([10, 42, 5, 200], here));
    wait_until("all have come", || {
        forwarder.totals().received_packets == 14
    });
    wait_until("the good ones are written", || {
        forwarder.totals().tun_writes == 2
    });
    let totals = forwarder.totals();
    assert_eq!(totals.stranger, 2, "{totals:?}");
    assert_eq!(totals.spoofed, 3, "{totals:?}");
    assert_eq!(totals.not_ours, 3, "{totals:?}");
    assert_eq!(totals.malformed, 4, "{totals:?}");
    let peers = forwarder.peers();
    assert_eq!(
        (peers[0].received_packets, peers[0].dropped),
        (2, 10),
        "{peers:?}"
    );
}

/// The address and port of a packet path is there once: who has it is named, at the start and when the
/// address changes, and nobody who has the port elsewhere. Once it is free all is well.
#[test]
fn who_has_the_port_of_a_packet_path_is_named() {
    let Some(bed) = Bed::new("udp-port", 1, Family::V4) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime");
    let paths = Forwarders::new(Options::default(), bed.sockets(0));
    let bind = |address: &str| {
        let address = address.to_owned();
        let socket = bed.ns(0).run(|| UdpSocket::bind(address));
        socket.expect("the namespace").expect("a socket")
    };
    let us = format!("process {} (", std::process::id());
    let tunnel = bed.tunnel(0);
    let listen = bed.endpoint(0);
    let is_ours = |result| match result {
        Err(Error::InUse { what, by }) => {
            assert_eq!(
                what,
                format!("UDP port {} on {}", listen.port(), listen.ip())
            );
            assert!(by.starts_with(&us), "{by}");
        }
        result => panic!("{result:?}"),
    };
    // In nobody's way, and first in the list of sockets where the kernel's order makes it so.
    let elsewhere = bind("127.0.0.1:8285");
    let taken = bind(&listen.to_string());
    is_ours(runtime.block_on(paths.open(&tunnel)));
    assert_eq!(paths.running(), []);
    drop(taken);
    runtime.block_on(paths.open(&tunnel)).expect("it is free");
    let mut other = listen;
    other.set_port(8286);
    let moved = |to| Tunnel {
        listen: flannel_core::DualStack::v4(to),
        ..tunnel.clone()
    };
    runtime.block_on(paths.alter(&moved(other))).expect("free");
    let taken = bind("0.0.0.0:8287");
    let mut other = listen;
    other.set_port(8287);
    match runtime.block_on(paths.alter(&moved(other))) {
        Err(Error::InUse { by, .. }) => assert!(by.starts_with(&us), "{by}"),
        result => panic!("{result:?}"),
    }
    drop((taken, elsewhere));
}
