//! Senders hear what a router would tell them.

use flannel_backend_udp::Options;
use flannel_core::{DualStack, Family, Tunnel};
use flannel_testkit::require_tool;

use crate::bed::{Bed, output};

#[test]
fn senders_hear_what_a_router_would_tell_them() {
    if !require_tool("udp-errors", "ping") {
        return;
    }
    let Some(bed) = Bed::new("udp-errors", 2, Family::V4) else {
        return;
    };
    let forwarders = [0, 1].map(|node| bed.start(node, Options::default()));
    bed.assert_reachable();
    let pod = &bed.pods[0].ns;
    let hears = |arguments: &[&str], what: &str| {
        let (_, text) = output(pod, "ping", arguments);
        assert!(text.contains(what), "ping {arguments:?}: {text}");
    };
    // A subnet that is routed to the device and that no peer has.
    hears(&["-c1", "-W2", "10.42.7.2"], "Destination Net Unreachable");
    hears(&["-c1", "-W2", "fd00:42:7::2"], "No route");
    // From a pod: 3 is 2 on the device, 1 at the peer's node, which says so itself.
    let (v4, v6) = (bed.pod_ip(1, Family::V4), bed.pod_ip(1, Family::V6));
    let (v4, v6) = (v4.to_string(), v6.to_string());
    hears(&["-c1", "-W2", "-t2", &v4], "From 10.42.1.0 ");
    hears(&["-c1", "-W2", "-t2", &v4], "Time to live exceeded");
    hears(&["-c1", "-W2", "-t3", &v4], "Time to live exceeded");
    hears(&["-c1", "-W2", "-t4", &v4], "1 received");
    hears(&["-c1", "-W2", "-t2", &v6], "Hop limit");
    hears(&["-c1", "-W2", "-t4", &v6], "1 received");
    // The limit is lower than what the device lets through.
    let tunnel = Tunnel {
        mtu: DualStack::both(1400, 1380),
        ..bed.tunnel(0)
    };
    forwarders[0].alter(tunnel).expect("another limit");
    hears(&["-c1", "-W2", "-Mdo", "-s1373", &v4], "mtu = 1400");
    hears(&["-c1", "-W2", "-Mdo", "-s1333", &v6], "mtu=1380");
    let totals = forwarders[0].totals();
    assert_eq!(
        (totals.no_route >= 2, totals.too_big),
        (true, 2),
        "{totals:?}"
    );
    assert_eq!(totals.ttl_exceeded, 3);
    assert_eq!(totals.icmp_sent, 7);
}

#[test]
fn errors_are_not_sent_without_end() {
    if !require_tool("udp-flood", "ping") {
        return;
    }
    let Some(bed) = Bed::new("udp-flood", 2, Family::V4) else {
        return;
    };
    let options = Options {
        icmp_rate: 3,
        ..Options::default()
    };
    let forwarder = bed.start(0, options);
    output(
        &bed.pods[0].ns,
        "ping",
        &["-c20", "-i0.01", "-W1", "10.42.7.2"],
    );
    let totals = forwarder.totals();
    assert!(totals.icmp_sent <= 9, "{totals:?}");
    assert!(totals.icmp_suppressed >= 11, "{totals:?}");
}

#[test]
fn a_path_that_takes_less_is_told_to_the_sender() {
    if !require_tool("udp-path", "ping") {
        return;
    }
    let Some(bed) = Bed::new("udp-path", 2, Family::V4) else {
        return;
    };
    let forwarders = [0, 1].map(|node| bed.start(node, Options::default()));
    bed.assert_reachable();
    // Below the forwarder, behind its back.
    bed.ns(0).set_mtu("eth0", 1300).expect("a smaller link");
    let to = bed.pod_ip(1, Family::V4).to_string();
    let arguments = ["-c1", "-W2", "-Mdo", "-s1400", to.as_str()];
    let (_, text) = output(&bed.pods[0].ns, "ping", &arguments);
    assert!(text.contains("mtu = 1272"), "{text}");
    assert!(forwarders[0].totals().too_big >= 1);
}
