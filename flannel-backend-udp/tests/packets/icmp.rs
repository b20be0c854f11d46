//! Errors as a router sends them, and to whom it sends none.

use std::net::IpAddr;
use std::time::Duration;

use flannel_backend_udp::packet::icmp::{MAX_LEN, Problem, error};
use flannel_backend_udp::packet::ip::Ip;
use flannel_backend_udp::packet::rate::TokenBucket;
use proptest::prelude::*;

use crate::make::{is_right, shape, slow_sum};

const V4: &str = "10.42.9.0";
const V6: &str = "fd00:9::";

fn source(v6: bool) -> IpAddr {
    let text = if v6 { V6 } else { V4 };
    text.parse().expect("an address")
}

fn make(problem: Problem, packet: &[u8]) -> Option<Vec<u8>> {
    let ip = Ip::parse(packet).expect("whole");
    let mut out = [0; MAX_LEN];
    let len = error(problem, &ip, packet, source(ip.src.is_ipv6()), &mut out)?;
    Some(out[..len].to_vec())
}

proptest! {
    #[test]
    fn an_error_goes_to_the_sender_and_quotes_the_packet(
        shape in shape(),
        payload in prop::collection::vec(any::<u8>(), 0..1500),
        which in 0u8..3,
        mtu in 576u32..65_536,
    ) {
        let packet = shape.packet(&payload);
        let (problem, v4, v6) = match which {
            0 => (Problem::NoRoute, [3, 0], [1, 0]),
            1 => (Problem::TooBig(mtu), [3, 4], [2, 0]),
            _ => (Problem::TimeExceeded, [11, 0], [3, 0]),
        };
        let out = make(problem, &packet).expect("deserves one");
        let ip = Ip::parse(&out).expect("whole");
        prop_assert_eq!(ip.src, source(shape.v6));
        prop_assert_eq!(ip.dst, shape.addresses().0);
        prop_assert!(ip.ttl >= 64);
        prop_assert_eq!(ip.total, out.len());
        let kind = &out[ip.header..ip.header + 2];
        prop_assert_eq!(kind, if shape.v6 { &v6 } else { &v4 });
        let told = u32::from_be_bytes(out[ip.header + 4..ip.header + 8].try_into().expect("four"));
        prop_assert_eq!(told, if which == 1 { mtu.min(if shape.v6 { u32::MAX } else { 65_535 }) } else { 0 });
        let quoted = &out[ip.header + 8..];
        prop_assert_eq!(quoted, &packet[..quoted.len()]);
        let most = if shape.v6 { 1232 } else { 548 };
        prop_assert!(quoted.len() >= packet.len().min(most));
        if shape.v6 {
            prop_assert!(is_right(&out));
        } else {
            prop_assert_eq!(slow_sum(&[&out[..20]]), 0xffff);
            prop_assert_eq!(slow_sum(&[&out[20..]]), 0xffff);
        }
        // There is no error about an error.
        prop_assert_eq!(make(Problem::NoRoute, &out), None);
    }
}

#[test]
fn some_packets_deserve_no_error() {
    let mut base = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
    base.extend([10, 1, 1, 1, 10, 2, 2, 2]);
    base.extend([0; 8]);
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut packet = base.clone();
        change(&mut packet);
        make(Problem::NoRoute, &packet).is_some()
    };
    assert!(with(&|_| ()));
    assert!(with(&|packet| packet[6] = 0x20), "the first fragment");
    assert!(!with(&|packet| packet[7] = 1), "a later fragment");
    assert!(!with(&|packet| packet[12] = 0), "from nobody");
    assert!(!with(&|packet| packet[12] = 127), "from loopback");
    assert!(!with(&|packet| packet[12] = 224), "from many");
    assert!(!with(&|packet| packet[16] = 224), "to many");
    assert!(!with(&|packet| packet[16..20].fill(255)), "to all");
    for (kind, deserves) in [
        (8, true),
        (0, true),
        (3, false),
        (11, false),
        (12, false),
        (5, false),
    ] {
        let icmp = |packet: &mut Vec<u8>| {
            packet[9] = 1;
            packet[20] = kind;
        };
        assert_eq!(with(&icmp), deserves, "ICMP type {kind}");
    }
    // 40 bytes of options: a header of 60, which flannel's proxy does not answer.
    let mut options = vec![
        0x4f, 0, 0, 68, 0, 0, 0, 0, 64, 17, 0, 0, 10, 1, 1, 1, 10, 2, 2, 2,
    ];
    options.extend([1; 40]);
    options.extend([0; 8]);
    let answer = make(Problem::NoRoute, &options).expect("deserves one");
    assert_eq!(&answer[28..], options);
}

#[test]
fn ipv6_packets_to_many_hear_of_their_size_only() {
    let mut packet = vec![0x60, 0, 0, 0, 0, 8, 17, 64];
    packet.extend([0xfd; 16]);
    packet.extend([0xff; 16]);
    packet.extend([0; 8]);
    assert!(make(Problem::TooBig(1280), &packet).is_some());
    assert!(make(Problem::NoRoute, &packet).is_none());
    // An ICMPv6 error behind an extension header is still one.
    let mut error = vec![0x60, 0, 0, 0, 0, 16, 0, 64];
    error.extend([0xfd; 32]);
    error.extend([58, 0, 0, 0, 0, 0, 0, 0]);
    error.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(make(Problem::NoRoute, &error).is_none());
    error[48] = 128;
    assert!(make(Problem::NoRoute, &error).is_some());
}

#[test]
fn a_bucket_gives_its_rate_and_no_more() {
    let mut bucket = TokenBucket::new(10);
    let taken = |bucket: &mut TokenBucket, now: u64| {
        (0..100)
            .filter(|_| bucket.take(Duration::from_millis(now)))
            .count()
    };
    assert_eq!(taken(&mut bucket, 0), 10);
    assert_eq!(taken(&mut bucket, 50), 0);
    assert_eq!(taken(&mut bucket, 100), 1);
    assert_eq!(taken(&mut bucket, 600), 5);
    assert_eq!(
        taken(&mut bucket, 500),
        0,
        "time that goes back gives nothing"
    );
    assert_eq!(taken(&mut bucket, 3_600_000), 10);
}
