//! The simulation as mutants meet it: one history after the other, up to the first that breaks
//! something.
#![allow(missing_docs, reason = "tests")]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use flannel_backend_vxlan::VxlanBackend;
use flannel_testkit::sim::{MemoryCluster, Sim};

/// The histories: a defect that none of these shows is not caught.
const SEEDS: Range<u64> = 0..150;

/// Unlike the report of many seeds, this ends at the first violation and makes no history small:
/// all that is asked of a mutant is whether there is one. What other threads are at then is left
/// behind: a defect may keep one busy for minutes.
fn run(sim: Sim) {
    let (sim, next) = (Arc::new(sim), Arc::new(AtomicU64::new(SEEDS.start)));
    let (tell, told) = mpsc::sync_channel(16);
    for _ in 0..thread::available_parallelism().map_or(2, Into::into) {
        let (sim, next, tell) = (Arc::clone(&sim), Arc::clone(&next), tell.clone());
        thread::spawn(move || {
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if !SEEDS.contains(&seed) {
                    return;
                }
                let violation = sim.run(seed).violation;
                if tell.send((seed, violation)).is_err() {
                    return;
                }
            }
        });
    }
    drop(tell);
    let mut runs = 0;
    for (seed, violation) in told {
        runs += 1;
        if let Some(violation) = violation {
            panic!("seed {seed}: {violation}");
        }
    }
    let all = SEEDS.end - SEEDS.start;
    assert_eq!(runs, all, "a run panicked");
}

#[test]
fn no_seed_breaks_anything() {
    run(Sim::new(VxlanBackend::new));
}

/// Records reach the core here in forms that flannel's keys and values cannot express.
#[test]
fn no_seed_breaks_anything_on_the_manager_in_memory() {
    run(Sim::new(VxlanBackend::new).cluster(MemoryCluster::new));
}
