//! Every order in which the steps of two nodes can follow one another on one store, with a crash or
//! a stranger's hand between any two of them: not a sample, but all of them.
//!
//! Between any two calls of one node the other may make its own. A node that dies does so between
//! two calls, or after one was done and before it has the answer.
#![allow(missing_docs, reason = "tests")]

#[path = "store/common.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod common;

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use common::{V4, World, request};
use flannel_core::manager::{Error, Result};
use flannel_core::{DualStack, Lease, LeaseRequest, Manager, PublicIp, Subnet};
use flannel_testkit::fake_store::{KeyRange, StoreManager};

const DUAL: &str = r#"{"Network":"10.5.0.0/20","SubnetLen":24,"EnableIPv6":true,
    "IPv6Network":"fd00:5::/56","IPv6SubnetLen":64}"#;

/// What a node asks for that had these subnets before.
fn wanting(name: &str, subnets: &[&str]) -> LeaseRequest {
    let subnets = subnets.iter().map(|text| text.parse().expect("a subnet"));
    LeaseRequest {
        previous: DualStack::of_subnets(subnets),
        ..request(name)
    }
}

/// Decides what comes next, so that in the end everything has come once.
#[derive(Default)]
struct Choices {
    /// What was chosen, of how many.
    path: Vec<(usize, usize)>,
    at: usize,
}

impl Choices {
    /// One of so many, which is not zero.
    fn pick(&mut self, of: usize) -> usize {
        if self.at == self.path.len() {
            self.path.push((0, of));
        }
        let (chosen, was) = self.path[self.at];
        assert_eq!(was, of, "the same choices lead to the same place");
        self.at += 1;
        chosen
    }

    /// Goes on to the next path; false after the last.
    fn next(&mut self) -> bool {
        self.at = 0;
        while let Some((chosen, of)) = self.path.pop() {
            if chosen + 1 < of {
                self.path.push((chosen + 1, of));
                return true;
            }
        }
        false
    }
}

/// Runs a trial once for each path of its choices; answers how many there were.
fn every_path(mut trial: impl FnMut(&mut Choices)) -> u32 {
    let mut choices = Choices::default();
    let mut paths = 0;
    loop {
        paths += 1;
        trial(&mut choices);
        if !choices.next() {
            return paths;
        }
    }
}

type Task = Pin<Box<dyn Future<Output = Result<Lease>>>>;

/// A node in the middle of something.
struct Node {
    task: Option<Task>,
    result: Option<Result<Lease>>,
}

impl Node {
    fn doing(task: impl Future<Output = Result<Lease>> + 'static) -> Self {
        let mut node = Self {
            task: Some(Box::pin(task)),
            result: None,
        };
        // To its first call.
        node.half();
        node
    }

    /// Makes one call, takes the answer and goes to the next.
    fn step(&mut self) {
        self.half();
        self.half();
    }

    /// A call stops twice: on its way to the store, and on its way back, when it is done.
    fn half(&mut self) {
        let Some(task) = &mut self.task else { return };
        if let Poll::Ready(result) = task.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            self.task = None;
            self.result = Some(result);
        }
    }
}

fn acquiring(manager: StoreManager, request: LeaseRequest) -> Node {
    Node::doing(async move { manager.acquire_lease(&request).await })
}

/// Each record is readable and overlaps no other, each marker names a record that is there and
/// names its subnet, and each half of a record has its marker.
fn check_store(world: &World) {
    let everything = world.store.entries(&KeyRange::prefix(""));
    let (start, taken) = (
        format!("{}/", world.layout.subnets()),
        format!("{}/taken/", world.layout.prefix()),
    );
    let mut records: Vec<(String, DualStack<Subnet>)> = Vec::new();
    for entry in &everything {
        if let Some(name) = entry.key.strip_prefix(&start) {
            let subnets = flannel_core::wire::parse_subnet_key(name).expect("flannel's key");
            for (other, others) in &records {
                assert!(!subnets.overlaps(others), "{name} overlaps {other}");
            }
            records.push((entry.key.clone(), subnets));
        }
    }
    for entry in &everything {
        if entry.key.starts_with(&taken) {
            let record = String::from_utf8_lossy(&entry.value).into_owned();
            let is_there = records.iter().any(|(key, _)| *key == record);
            assert!(is_there, "{} names {record}, which is gone", entry.key);
        }
    }
    for (key, subnets) in &records {
        for subnet in subnets.values() {
            let marker = KeyRange::key(world.layout.marker(subnet));
            let marker = world.store.entries(&marker);
            let names = marker.first().map(|marker| marker.value.as_slice());
            assert_eq!(names, Some(key.as_bytes()), "the marker of {subnet}");
        }
    }
}

/// Two nodes ask at once for what only one can have; up to so many times one of them dies, at any
/// point, and asks again.
fn two_nodes_and_a_crash(config: &str, wishes: [&[&str]; 2], most_deaths: usize) {
    let mut crashed = 0;
    let paths = every_path(|choices| {
        let world = World::new(config);
        let requests = [wanting("a", wishes[0]), wanting("b", wishes[1])];
        let mut nodes = ["a", "b"].map(|name| {
            let request = requests[usize::from(name == "b")].clone();
            acquiring(world.node(name), request)
        });
        let mut deaths = most_deaths;
        while nodes.iter().any(|node| node.task.is_some()) {
            // Whose turn it is, and how it ends: well, dead before its call or dead after it.
            let mut options = Vec::new();
            for n in (0..2).filter(|n| nodes[*n].task.is_some()) {
                options.push((n, None));
                if deaths > 0 {
                    options.extend([(n, Some(false)), (n, Some(true))]);
                }
            }
            let (n, dies) = options[choices.pick(options.len())];
            match dies {
                None => nodes[n].step(),
                Some(after) => {
                    if after {
                        nodes[n].half();
                    }
                    deaths -= 1;
                    crashed += 1;
                    let name = ["a", "b"][n];
                    nodes[n] = acquiring(world.node(name), requests[n].clone());
                }
            }
        }
        let leases = nodes.map(|node| node.result.expect("it ended").expect("a lease"));
        assert!(
            !leases[0].subnet.overlaps(&leases[1].subnet),
            "{} and {}",
            leases[0].subnet,
            leases[1].subnet
        );
        check_store(&world);
        let records = KeyRange::prefix(format!("{}/", world.layout.subnets()));
        assert_eq!(world.store.entries(&records).len(), 2, "a record each");
    });
    assert!(
        paths > 500 && crashed > 300,
        "{paths} paths, {crashed} crashes"
    );
}

#[test]
fn two_nodes_that_want_one_subnet() {
    two_nodes_and_a_crash(V4, [&["10.5.3.0/24"], &["10.5.3.0/24"]], 2);
}

#[test]
fn two_nodes_that_want_one_half() {
    two_nodes_and_a_crash(
        DUAL,
        [
            &["10.5.3.0/24", "fd00:5:0:4::/64"],
            &["10.5.7.0/24", "fd00:5:0:4::/64"],
        ],
        // A claim of both families makes one call more.
        1,
    );
}

/// A node renews and publishes something new, while somebody deletes its record and another node
/// takes the subnet.
#[test]
fn a_renewal_revives_nothing_and_overwrites_nobody() {
    let mut lost = 0;
    let mut renewed = 0;
    every_path(|choices| {
        let world = World::new(V4);
        let (a, wants) = (world.node("a"), wanting("a", &["10.5.3.0/24"]));
        let mut first = acquiring(a.clone(), wants);
        while first.task.is_some() {
            first.step();
        }
        let lease = first.result.expect("it ended").expect("a lease");
        let mut changed = lease.clone();
        changed.attrs.public_ip = PublicIp::v4([192, 0, 2, 99].into());
        let mut nodes = [
            Node::doing(async move { a.renew_lease(&changed).await }),
            acquiring(world.node("b"), wanting("b", &["10.5.3.0/24"])),
        ];
        let mut deleted = false;
        while nodes.iter().any(|node| node.task.is_some()) {
            let mut options: Vec<usize> = (0..2).filter(|n| nodes[*n].task.is_some()).collect();
            if !deleted {
                options.push(2);
            }
            match options[choices.pick(options.len())] {
                2 => {
                    deleted = true;
                    world.store.delete(lease.key.as_str());
                }
                n => nodes[n].step(),
            }
        }
        let [ours, theirs] = nodes.map(|node| node.result.expect("it ended"));
        let theirs = theirs.expect("a lease");
        let there = world.store.entries(&KeyRange::key(lease.key.as_str()));
        match ours {
            Err(Error::LeaseLost { .. }) => {
                lost += 1;
                assert!(deleted, "nobody took it");
            }
            Ok(_) => {
                renewed += 1;
                // Whoever deleted it did so afterwards, or not at all.
                let is_ours = there.first().is_some_and(|entry| {
                    String::from_utf8_lossy(&entry.value).contains("192.0.2.99")
                });
                assert!(is_ours || deleted, "a renewed record is gone by itself");
            }
            Err(error) => panic!("{error:?}"),
        }
        if theirs.subnet == lease.subnet {
            let value = String::from_utf8_lossy(&there[0].value).into_owned();
            assert!(value.contains(r#""NodeID":"b""#), "{value}");
        }
    });
    assert!(lost > 5 && renewed > 5, "{lost} lost, {renewed} renewed");
}
