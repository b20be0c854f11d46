//! What came out: for people, and one JSON document for programs.

use std::time::Duration;

use flannel::{DualStack, Subnet};
use serde::Serialize;

use crate::pool::Pool;
use crate::storm::Joined;
use crate::{Error, Flags};

/// The JSON document.
#[derive(Serialize)]
pub(crate) struct Report {
    nodes: u32,
    failures: usize,
    duplicate_subnets: usize,
    txns_per_node: Spread<u64>,
    lease_ms: Spread<f64>,
    /// How many subnets there were to be had.
    pool: u32,
    /// How often nodes were told to come again.
    retries: u32,
    seconds: f64,
    #[serde(skip)]
    times: Vec<Duration>,
    /// Why the first one failed that did.
    #[serde(skip)]
    why: Option<String>,
    /// Records in etcd that no node holds, or the other way round.
    #[serde(skip)]
    astray: usize,
}

/// The middle, the last but a hundredth, and the end of a row.
#[derive(Serialize)]
struct Spread<T> {
    p50: T,
    p99: T,
    max: T,
}

impl<T: Copy + Default + PartialOrd> Spread<T> {
    /// Of numbers in their order.
    fn of(sorted: &[T]) -> Self {
        let at = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).copied().unwrap_or_default()
        };
        Self {
            p50: at(50),
            p99: at(99),
            max: at(100),
        }
    }
}

impl Report {
    pub(crate) fn new(
        flags: &Flags,
        pool: &Pool,
        joined: &[Joined],
        records: &[DualStack<Subnet>],
    ) -> Self {
        let held: Vec<DualStack<Subnet>> = joined
            .iter()
            .filter_map(|node| node.lease.as_ref().ok().copied())
            .collect();
        let mut times: Vec<Duration> = joined
            .iter()
            .filter(|node| node.lease.is_ok())
            .map(|node| node.took)
            .collect();
        times.sort_unstable();
        let mut txns: Vec<u64> = joined.iter().map(|node| node.txns).collect();
        txns.sort_unstable();
        let millis = |time: &Duration| (time.as_secs_f64() * 10_000.0).round() / 10.0;
        Self {
            nodes: flags.nodes,
            failures: joined.len() - held.len(),
            duplicate_subnets: duplicates(&held),
            txns_per_node: Spread::of(&txns),
            lease_ms: Spread::of(&times.iter().map(millis).collect::<Vec<_>>()),
            pool: pool.subnets,
            retries: joined.iter().map(|node| node.retries).sum(),
            seconds: times.last().map_or(0.0, |last| millis(last) / 1000.0),
            why: joined.iter().find_map(|node| node.lease.clone().err()),
            astray: astray(&held, records),
            times,
        }
    }

    pub(crate) fn times(&self) -> &[Duration] {
        &self.times
    }

    /// What was done, in one line.
    pub(crate) fn title(&self) -> String {
        format!(
            "{} nodes lease one of {} subnets on etcd at once",
            self.nodes, self.pool
        )
    }

    pub(crate) fn print(&self, json: bool) -> Result<(), Error> {
        if json {
            println!("{}", serde_json::to_string(self)?);
            return Ok(());
        }
        println!("{}", self.title());
        println!("{:>22} {:>9} {:>9} {:>9}", "", "p50", "p99", "max");
        let Spread { p50, p99, max } = self.txns_per_node;
        println!("{:>22} {p50:>9} {p99:>9} {max:>9}", "transactions a node");
        let Spread { p50, p99, max } = self.lease_ms;
        println!("{:>22} {p50:>9.1} {p99:>9.1} {max:>9.1}", "lease after ms");
        println!(
            "{} failures, {} duplicate subnets, {} retries",
            self.failures, self.duplicate_subnets, self.retries
        );
        Ok(())
    }

    /// What is not as it should be.
    pub(crate) fn problem(&self) -> Option<String> {
        if let Some(why) = &self.why {
            return Some(format!("{} nodes got no lease: {why}", self.failures));
        }
        if self.duplicate_subnets > 0 {
            return Some(format!(
                "{} subnets are held by more than one node",
                self.duplicate_subnets
            ));
        }
        (self.astray > 0).then(|| {
            format!(
                "{} subnets are held without a record in etcd, or recorded and not held",
                self.astray
            )
        })
    }
}

/// How many subnets overlap one that another node holds.
fn duplicates(held: &[DualStack<Subnet>]) -> usize {
    let mut all: Vec<&Subnet> = held.iter().flat_map(DualStack::values).collect();
    all.sort_unstable();
    all.windows(2)
        .filter(|pair| pair[0].overlaps(pair[1]))
        .count()
}

/// How many subnets are in one list only.
fn astray(held: &[DualStack<Subnet>], records: &[DualStack<Subnet>]) -> usize {
    let lacks = |list: &[DualStack<Subnet>], one: &DualStack<Subnet>| !list.contains(one);
    let held_alone = held.iter().filter(|one| lacks(records, one)).count();
    held_alone + records.iter().filter(|one| lacks(held, one)).count()
}
