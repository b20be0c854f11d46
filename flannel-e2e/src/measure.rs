//! Measuring what is lost while something is done.

use std::time::Duration;

use flannel_core::Family;
use flannel_testkit::netns::Host;
use flannel_testkit::prober::{Options, Prober, Report};

use crate::wait::until;

/// Two pods and the family in which packets run between them.
pub type Path<'a> = (&'a Host, &'a Host, Family);

/// Packets per second in each direction.
const RATE: u32 = 2_000;

/// The least that counts as a rate of a thousand each way, and packets in all on a path.
const LEAST_RATE: f64 = 1_000.0;
const LEAST_PACKETS: u32 = 10_000;

/// Runs numbered packets over each path, both ways, while something is done; at least 10,000 a path.
/// The first packets have arrived before it begins, and packets are still sent when it ends.
///
/// # Panics
/// If packets do not flow at the start, or were no longer sent at the end.
pub async fn probe(paths: &[Path<'_>], during: impl AsyncFnOnce()) -> Vec<Report> {
    let options = Options {
        rate: RATE,
        packets: RATE * 120,
        linger: Duration::from_millis(500),
    };
    let ip = |host: &Host, family| host.ips.ip(family).expect("the pod has this family");
    let probers: Vec<Prober> = paths
        .iter()
        .map(|(a, b, family)| {
            let (from, to) = ((&a.ns, ip(a, *family)), (&b.ns, ip(b, *family)));
            Prober::start(from, to, options).expect("packets can be sent")
        })
        .collect();
    let limit = Duration::from_secs(20);
    until("packets flow", limit, async || {
        probers.iter().all(|prober| prober.received() >= 500)
    })
    .await;
    during().await;
    until("enough packets are sent", limit, async || {
        probers
            .iter()
            .all(|prober| prober.sent() > LEAST_PACKETS / 2)
    })
    .await;
    for prober in &probers {
        assert!(
            prober.sent() < options.packets,
            "packets were no longer sent when it was over"
        );
        prober.stop();
    }
    probers.into_iter().map(Prober::finish).collect()
}

/// Does something while packets run over each path, and asserts that not one is lost. Answers
/// whether that was measured: false if the machine was too busy, which shows as receive buffers
/// that overflow or as a rate below a thousand a second.
///
/// # Panics
/// If a packet is lost.
#[allow(clippy::print_stderr, reason = "a second chance is not to be silent")]
pub async fn try_no_loss(what: &str, paths: &[Path<'_>], during: impl AsyncFnOnce()) -> bool {
    let reports = probe(paths, during).await;
    let mut flows = reports.iter().flat_map(|r| [&r.forth, &r.back]);
    if !flows.all(|flow| flow.overflowed == 0 && flow.rate() >= LEAST_RATE) {
        eprintln!("{what}: not measured, the machine is too busy: {reports:?}");
        return false;
    }
    for report in &reports {
        assert!(report.sent() >= LEAST_PACKETS, "{what}: {report}");
        assert_eq!(report.lost(), 0, "{what}: {report}");
    }
    true
}

/// The same with a second chance for a busy machine; a loss has none.
///
/// # Panics
/// If a packet is lost, or the machine is too busy twice.
pub async fn no_loss(what: &str, paths: &[Path<'_>], mut during: impl AsyncFnMut()) {
    if !try_no_loss(what, paths, &mut during).await {
        let measured = try_no_loss(what, paths, &mut during).await;
        assert!(measured, "{what}: the machine is too busy to measure");
    }
}
