//! A node's address is replaced by another while its connections to a real etcd are bound to it: how
//! long it takes until the record in the store has the new one.
#![allow(
    clippy::print_stderr,
    missing_docs,
    reason = "tests; how long it took is printed"
)]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etcd_client::{Client, WatchOptions, WatchStream};
use flannel_core::Family;
use flannel_e2e::{DUAL, Program, V4, run_in, within};
use flannel_testkit::netns::{Host, Lab, Ns};
use flannel_testkit::require_tool;
use flannel_testkit::servers::Etcd;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

const NODE: &str = env!("CARGO_BIN_EXE_flannel-e2e-etcd-node");
const CONFIG: &str = "/coreos.com/network/config";
const SUBNETS: &str = "/coreos.com/network/subnets/";

/// The goal is a second, of which half is the wait for the address to come back. Left to themselves,
/// connections to the store were given up after 4.4 s.
const LIMIT: Duration = Duration::from_secs(3);

/// An etcd that the nodes of an underlay reach at its router.
struct Store {
    etcd: Etcd,
    endpoint: String,
}

impl Store {
    async fn on(router: &Ns, address: IpAddr, config: &str) -> Self {
        let etcd = Etcd::start().expect("etcd starts");
        let listener = router.run(|| std::net::TcpListener::bind((address, 0)));
        let listener = listener.expect("entered").expect("a port");
        listener.set_nonblocking(true).expect("it can be");
        let endpoint = format!("http://{}", listener.local_addr().expect("it is bound"));
        let listener = TcpListener::from_std(listener).expect("a listener");
        tokio::spawn(relay(listener, etcd.address()));
        let this = Self { etcd, endpoint };
        let mut client = this.client().await;
        client.put(CONFIG, config, None).await.expect("an answer");
        this
    }

    async fn client(&self) -> Client {
        let client = Client::connect([self.etcd.endpoint()], None).await;
        client.expect("a client")
    }

    /// The records, from now on.
    async fn records(&self) -> WatchStream {
        let all = WatchOptions::new().with_prefix();
        let watch = self.client().await.watch(SUBNETS, Some(all)).await;
        watch.expect("a watch")
    }
}

async fn relay(listener: TcpListener, to: SocketAddr) {
    while let Ok((mut from, _)) = listener.accept().await {
        tokio::spawn(async move {
            if let Ok(mut to) = TcpStream::connect(to).await {
                tokio::io::copy_bidirectional(&mut from, &mut to).await.ok();
            }
        });
    }
}

/// Waits for a record that tells an address.
async fn published(records: &mut WatchStream, address: &str) {
    let told = format!("\":\"{address}\"");
    loop {
        let answer = records.message().await.expect("a watch");
        let answer = answer.expect("it does not end");
        let mut entries = answer.events().iter().filter_map(|event| event.kv());
        if entries.any(|entry| String::from_utf8_lossy(entry.value()).contains(&told)) {
            return;
        }
    }
}

/// The ways in which a node's address of a family is replaced: the milliseconds without any.
const GAPS: [u64; 4] = [0, 50, 500, 1500];

#[tokio::test(flavor = "multi_thread")]
async fn a_new_address_is_in_the_store_soon_and_the_time_is_told() {
    if !require_tool("etcd-address", "etcd") || !require_tool("etcd-address", "ip") {
        return;
    }
    let Some(lab) = Lab::for_test("etcd-address") else {
        return;
    };
    let underlay = lab.underlay(1).expect("an underlay");
    let (router, Host { ns, ips, .. }) = (&underlay.router, &underlay.nodes[0]);
    for (family, config, store) in [
        (Family::V4, V4, "203.0.113.200"),
        // The kernel sends from any device's address where that of the way is gone: from the overlay's.
        (Family::V6, DUAL, "2001:db8:ffff::1"),
    ] {
        // Behind the router, so that the way there is a default route.
        run_in(router, &format!("ip addr add {store} dev lo"));
        let store = Store::on(router, store.parse().expect("an address"), config).await;
        let args = ["--endpoints", &store.endpoint, "--node", "a"];
        let node = ns.run(|| Program::start(NODE, &args)).expect("entered");
        node.line("ready ");
        let mut records = store.records().await;
        let gateway = underlay.segments[0].gateways.ip(family).expect("one");
        let subnet = underlay.segments[0].subnets.get(family).copied();
        let subnet = subnet.expect("both families");
        let mut old = ips.ip(family).expect("both families");
        let flags = if family == Family::V6 { " nodad" } else { "" };
        for (n, gap) in (101..).zip(GAPS) {
            let new = subnet.nth(n).expect("it is large");
            let len = subnet.len();
            run_in(ns, &format!("ip addr del {old}/{len} dev eth0"));
            tokio::time::sleep(Duration::from_millis(gap)).await;
            run_in(ns, &format!("ip addr add {new}/{len} dev eth0{flags}"));
            let start = Instant::now();
            run_in(
                ns,
                &format!("ip route replace default via {gateway} dev eth0"),
            );
            let address = new.to_string();
            let told = published(&mut records, &address);
            within("it is published", LIMIT, told).await;
            let took = start.elapsed();
            eprintln!("{gap} ms without an address: {new} is in the store after {took:?}");
            old = new;
        }
        drop(node);
        run_in(ns, "ip link del flannel.1");
    }
}
