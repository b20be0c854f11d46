//! The simulation as mutants meet it: one history after the other, up to the first that breaks
//! something.
#![allow(missing_docs, reason = "tests")]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use flannel_backend_vxlan::VxlanBackend;
use flannel_testkit::sim::{MemoryCluster, Sim};

/// The histories: a defect that none of these shows is not caught.
const SEEDS: Range<u64> = 0..150;

/// Unlike the report of many seeds, this ends at the first violation and makes no history small:
/// all that is asked of a mutant is whether there is one.
fn run(sim: &Sim) {
    let next = AtomicU64::new(SEEDS.start);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, Into::into) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if !SEEDS.contains(&seed) {
                        return;
                    }
                    if let Some(violation) = sim.run(seed).violation {
                        next.store(SEEDS.end, Ordering::Relaxed);
                        panic!("seed {seed}: {violation}");
                    }
                }
            });
        }
    });
}

#[test]
fn no_seed_breaks_anything() {
    run(&Sim::new(VxlanBackend::new));
}

/// Records reach the core here in forms that flannel's keys and values cannot express.
#[test]
fn no_seed_breaks_anything_on_the_manager_in_memory() {
    run(&Sim::new(VxlanBackend::new).cluster(MemoryCluster::new));
}
