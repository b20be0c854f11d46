//! How long the pure parts take: planning for thousands of peers, one lease change end to end, and
//! allocation in a pool of a million subnets at any fill.
#![allow(missing_docs, reason = "criterion's macros make undocumented items")]

mod common;

use std::collections::BTreeSet;
use std::hint::black_box;

use common::CONFIG;
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use flannel_backend_vxlan::VxlanData;
use flannel_core::alloc::{Allocator, choose};
use flannel_core::reconcile::desired::Compiler;
use flannel_core::reconcile::ownership::Ownership;
use flannel_core::reconcile::plan::{plan, plan_keys};
use flannel_core::{
    BackendType, DualStack, Event, Lease, LeaseAttrs, LeaseKey, LeaseSet, MacAddr, NetworkConfig,
    NodeId, Observed, OverlayName, PoolMode, PublicIp, Revision, RouteProtocol, Snapshot, Subnet,
};

/// The record of peer `n`; another `version` is at another address.
fn peer(n: u32, version: u8) -> Lease {
    let [_, a, b, c] = n.to_be_bytes();
    let subnet = Subnet::new(
        [
            10,
            1 + (n >> 12) as u8,
            (n >> 4) as u8,
            ((n & 15) << 4) as u8,
        ],
        28,
    );
    let subnet = subnet.expect("a valid length");
    let data = VxlanData {
        vni: 1,
        vtep_mac: MacAddr([0x0e, 0, version, a, b, c]),
    };
    Lease {
        key: LeaseKey::new(format!("{}-28", subnet.address())),
        instance: None,
        node: NodeId::new(format!("peer-{n}")).expect("a node id"),
        subnet: DualStack::v4(subnet),
        attrs: LeaseAttrs {
            public_ip: PublicIp::v4([172, 16 + version, b, c].into()),
            backend_type: Some(BackendType::vxlan()),
            backend_data: DualStack::v4(data.encode().expect("valid")),
        },
        ttl: None,
        created: Revision(u64::from(n) + 1),
        revision: Revision(u64::from(n) + 1 + u64::from(version) * 1_000_000),
    }
}

struct World {
    set: LeaseSet,
    compiler: Compiler,
    ownership: Ownership,
    observed: Observed,
}

/// A node with so many peers whose kernel has all that it should have.
fn world(peers: u32) -> World {
    let subnet = Subnet::new([10, 255, 0, 0], 28).expect("a valid length");
    let common::Node {
        config,
        mut set,
        mut compiler,
        ..
    } = common::node(subnet);
    let leases = (0..peers).map(|n| peer(n, 0)).collect();
    let revision = Revision(u64::from(peers));
    let applied = set.apply(Event::Snapshot(Snapshot {
        leases,
        revision,
        ..Snapshot::default()
    }));
    compiler.update(&applied.delta, &set);
    assert!(compiler.rejected().is_empty(), "every peer is accepted");
    let objects = compiler.desired().objects.iter();
    let objects = objects
        .map(|(key, wanted)| (key.clone(), wanted.object.clone()))
        .collect();
    let ownership = Ownership {
        overlay: OverlayName::default(),
        protocol: RouteProtocol::OURS,
        networks: config.pools().values().map(|pool| pool.network()).collect(),
        adopt_flannel: true,
        known: Vec::new(),
    };
    let observed = Observed {
        objects,
        ..Observed::default()
    };
    let steps = plan(&observed, compiler.desired(), &ownership).steps;
    assert!(steps.is_empty(), "the kernel has all: {}", steps.len());
    World {
        set,
        compiler,
        ownership,
        observed,
    }
}

fn planning(c: &mut Criterion) {
    let mut group = c.benchmark_group("plan");
    group.sample_size(20);
    for peers in [1_000, 5_000, 20_000] {
        let world = world(peers);
        let desired = world.compiler.desired();
        group.bench_function(BenchmarkId::new("all right", peers), |b| {
            b.iter(|| plan(black_box(&world.observed), desired, &world.ownership));
        });
        let empty = Observed::default();
        group.bench_function(BenchmarkId::new("all missing", peers), |b| {
            b.iter(|| plan(black_box(&empty), desired, &world.ownership));
        });
        group.bench_function(
            BenchmarkId::new("one lease change: event to plan", peers),
            |b| {
                b.iter_batched(
                    || (world.set.clone(), world.compiler.clone()),
                    |(mut set, mut compiler)| {
                        let applied = set.apply(Event::Put(peer(peers / 2, 1)));
                        let keys: BTreeSet<_> = compiler.update(&applied.delta, &set);
                        let plan =
                            plan_keys(&world.observed, compiler.desired(), &world.ownership, &keys);
                        assert!(!plan.steps.is_empty());
                        (plan, set, compiler)
                    },
                    BatchSize::LargeInput,
                );
            },
        );
    }
    group.finish();
}

fn allocation(c: &mut Criterion) {
    let mut group = c.benchmark_group("alloc");
    group.sample_size(20);
    let config = NetworkConfig::from_json(CONFIG, PoolMode::Allocated).expect("a valid config");
    let pool = config.pools().v4.as_ref().expect("an IPv4 pool");
    for (name, taken_of_1024) in [
        ("empty", 0),
        ("half full", 512),
        ("one in 1024 free", 1023),
        ("full", 1024),
    ] {
        let mut allocator = Allocator::new(pool).expect("an allocated pool");
        for slot in 0..1_u128 << 20 {
            // Spread, so that the free slots are as many runs as can be.
            if slot.wrapping_mul(0x9e37_79b1) % 1024 < taken_of_1024
                && let Some(subnet) = allocator.subnet(slot)
            {
                allocator.take(&subnet);
            }
        }
        let mut n = 0_u32;
        group.bench_function(BenchmarkId::new("choose in a pool of 2^20", name), |b| {
            b.iter(|| {
                n += 1;
                let node = NodeId::new(format!("node-{n}")).expect("a node id");
                choose(&DualStack::v4(&allocator), &node, &DualStack::default())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, planning, allocation);
criterion_main!(benches);
