//! A real etcd of three members, of which one dies or freezes, whichever it is: no call is lost, and
//! the watch goes on.

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{CONFIG, SOON, acquire, begun, manager, request, until};
use etcd_client::Client;
use flannel_core::{Event, EventStream, Lease, Manager};
use flannel_subnet_etcd::{EtcdManager, EtcdOptions};
use flannel_testkit::servers::{Etcd, EtcdVersion};
use tokio::time::{sleep, timeout};

common::on_each_etcd! {
    a_member_that_is_frozen_loses_no_call
    a_member_that_is_killed_loses_no_call
}

/// How many calls are made while a member is away.
const CALLS: usize = 10;

/// A client of some members that is not ours. Waits until they have a leader.
async fn hand<'a>(members: impl IntoIterator<Item = &'a Etcd>) -> Client {
    let endpoints: Vec<String> = members.into_iter().map(Etcd::endpoint).collect();
    let client = async {
        loop {
            if let Ok(mut client) = Client::connect(&endpoints, None).await
                && client.put("/awake", "", None).await.is_ok()
            {
                return client;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(SOON, client).await.expect("a leader, soon")
}

struct World {
    members: Vec<Etcd>,
    ours: EtcdManager,
    lease: Lease,
    watch: EventStream,
    /// The number of the next record of others.
    next: u8,
}

impl World {
    async fn new(version: EtcdVersion) -> Self {
        let members = Etcd::cluster(version, 3).expect("etcd starts");
        let mut client = hand(&members).await;
        let config = client.put("/coreos.com/network/config", CONFIG, None).await;
        config.expect("an answer");
        let endpoints: Vec<String> = members.iter().map(Etcd::endpoint).collect();
        let ours = manager(EtcdOptions::new(endpoints).expect("endpoints"));
        let lease = acquire(&ours, &request("a", 1)).await;
        let watch = begun(&ours).await;
        Self {
            members,
            ours,
            lease,
            watch,
            next: 1,
        }
    }

    /// Every call is answered, and what others write is heard, while this member is away.
    async fn goes_on_without(&mut self, away: usize) {
        for _ in 0..CALLS {
            let renewed = self.ours.renew_lease(&self.lease).await;
            self.lease = renewed.expect("no call is lost");
            self.ours.network_config().await.expect("no call is lost");
        }
        let others = self.members.iter().enumerate();
        let others = others.filter(|(n, _)| *n != away).map(|(_, etcd)| etcd);
        let mut client = hand(others).await;
        let key = format!("/coreos.com/network/subnets/10.5.{}.0-24", self.next);
        self.next += 1;
        let value = r#"{"PublicIP":"192.0.2.9","PublicIPv6":null}"#;
        client
            .put(key.as_str(), value, None)
            .await
            .expect("an answer");
        until(&mut self.watch, |item| match item {
            Ok(Event::Put(lease)) => (lease.key.as_str() == key).then_some(()),
            Ok(Event::Snapshot(snapshot)) => {
                let keys: BTreeSet<&str> = snapshot
                    .leases
                    .iter()
                    .map(|lease| lease.key.as_str())
                    .collect();
                keys.contains(key.as_str()).then_some(())
            }
            _ => None,
        })
        .await;
    }
}

async fn a_member_that_is_frozen_loses_no_call(version: EtcdVersion) {
    let mut world = World::new(version).await;
    // One of them is the leader, and one of them is the one that is asked.
    for away in 0..world.members.len() {
        world.members[away].freeze();
        world.goes_on_without(away).await;
        world.members[away].thaw();
        hand(&world.members).await;
    }
}

async fn a_member_that_is_killed_loses_no_call(version: EtcdVersion) {
    let mut world = World::new(version).await;
    for away in 0..world.members.len() {
        world.members[away].kill();
        world.goes_on_without(away).await;
        world.members[away].restart().expect("it starts again");
        hand(&world.members).await;
    }
}
