//! Many nodes at once on a real etcd.

mod common;

use std::collections::BTreeSet;

use common::{acquire, manager, options, request, server};
use flannel_core::manager::Error;
use flannel_core::{DualStack, Family, Lease, Manager, Subnet};
use flannel_testkit::servers::EtcdVersion;
use tokio::task::JoinSet;

common::on_each_etcd! {
    sixty_four_nodes_fill_a_pool_of_exactly_64
    three_hundred_nodes_join_at_once
    no_half_of_a_dual_stack_record_is_given_twice
    subnets_of_two_lengths_do_not_overlap
}

/// Lets so many nodes, each with a client of its own, ask for a lease at once.
async fn join(endpoint: &str, nodes: u16) -> (Vec<Lease>, Vec<u64>) {
    let mut joining = JoinSet::new();
    for n in 0..nodes {
        let manager = manager(options(endpoint));
        joining.spawn(async move {
            let [high, low] = n.to_be_bytes();
            let mut wants = request(&format!("node-{n}"), 1);
            wants.attrs.public_ip.v4 = Some([198, 18, high, low].into());
            let lease = acquire(&manager, &wants).await;
            (lease, manager.store().calls().txns)
        });
    }
    let (leases, mut txns): (Vec<Lease>, Vec<u64>) = joining.join_all().await.into_iter().unzip();
    txns.sort_unstable();
    (leases, txns)
}

fn check(leases: &[Lease]) {
    let mut taken: BTreeSet<Subnet> = BTreeSet::new();
    for lease in leases {
        for subnet in lease.subnet.values() {
            assert!(taken.insert(*subnet), "{subnet} was given twice");
        }
    }
}

async fn sixty_four_nodes_fill_a_pool_of_exactly_64(version: EtcdVersion) {
    let config = r#"{"Network":"10.5.0.0/20","SubnetLen":26,"SubnetMin":"10.5.0.0","Backend":{"Type":"vxlan"}}"#;
    let (etcd, _client) = server(version, config).await;
    let (leases, _) = join(&etcd.endpoint(), 64).await;
    check(&leases);
    assert_eq!(leases.len(), 64);
    let late = manager(options(etcd.endpoint()))
        .acquire_lease(&request("late", 99))
        .await;
    let family = Family::V4;
    assert!(
        matches!(&late, Err(Error::PoolExhausted { family: full }) if *full == family),
        "{late:?}"
    );
}

async fn three_hundred_nodes_join_at_once(version: EtcdVersion) {
    let (etcd, _client) = server(version, common::CONFIG).await;
    // Without the first subnet, which flannel leaves out, 255 are too few: half as long ones.
    let mut client = common::hand(&etcd).await;
    let config = r#"{"Network":"10.5.0.0/16","SubnetLen":25,"Backend":{"Type":"vxlan"}}"#;
    common::put(&mut client, "/coreos.com/network/config", config).await;
    let (leases, txns) = join(&etcd.endpoint(), 300).await;
    check(&leases);
    assert_eq!(leases.len(), 300);
    #[allow(clippy::print_stderr, reason = "a figure that users ask for")]
    {
        let (median, most) = (txns[txns.len() / 2], txns[txns.len() - 1]);
        eprintln!("transactions a node: median {median}, most {most}");
    }
}

async fn no_half_of_a_dual_stack_record_is_given_twice(version: EtcdVersion) {
    let config = r#"{"EnableIPv6":true,"Network":"10.5.0.0/20","SubnetLen":26,"SubnetMin":"10.5.0.0","IPv6Network":"fd00:5::/56","IPv6SubnetLen":64,"Backend":{"Type":"vxlan"}}"#;
    let (etcd, mut client) = server(version, config).await;
    let (leases, _) = join(&etcd.endpoint(), 64).await;
    check(&leases);
    assert!(leases.iter().all(|lease| lease.subnet.v6.is_some()));
    // Each half stands in one key.
    let options = etcd_client::GetOptions::new().with_prefix();
    let stored = client
        .get("/coreos.com/network/subnets/", Some(options))
        .await;
    let mut halves = BTreeSet::new();
    for kv in stored.expect("an answer").kvs() {
        let key = kv
            .key_str()
            .expect("text")
            .rsplit_once('/')
            .expect("a path")
            .1;
        for half in key.split('&') {
            assert!(halves.insert(half.to_owned()), "{half}");
        }
    }
    assert_eq!(halves.len(), 128);
}

async fn subnets_of_two_lengths_do_not_overlap(version: EtcdVersion) {
    let (etcd, mut client) = server(
        version,
        r#"{"Network":"10.5.0.0/20","SubnetLen":24,"SubnetMin":"10.5.0.0","Backend":{"Type":"vxlan"}}"#,
    )
    .await;
    let (long, _) = join(&etcd.endpoint(), 6).await;
    let config = r#"{"Network":"10.5.0.0/20","SubnetLen":26,"SubnetMin":"10.5.0.0","Backend":{"Type":"vxlan"}}"#;
    common::put(&mut client, "/coreos.com/network/config", config).await;
    let mut joining = JoinSet::new();
    for n in 0..40_u8 {
        let manager = manager(options(etcd.endpoint()));
        joining.spawn(
            async move { acquire(&manager, &request(&format!("short-{n}"), n + 100)).await },
        );
    }
    let short = joining.join_all().await;
    let all: Vec<DualStack<Subnet>> = long
        .iter()
        .chain(&short)
        .map(|lease| lease.subnet)
        .collect();
    for (n, a) in all.iter().enumerate() {
        assert!(all[n + 1..].iter().all(|b| !a.overlaps(b)), "{a} overlaps");
    }
}
