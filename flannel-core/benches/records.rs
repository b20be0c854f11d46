//! The time of one change among thousands of records of one state: it is to be in proportion to the
//! change, whatever the others are.
#![allow(missing_docs, reason = "criterion's macros make undocumented items")]

mod common;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use flannel_backend_vxlan::{VxlanBackend, VxlanData};
use flannel_core::reconcile::desired::Compiler;
use flannel_core::{
    BackendType, DualStack, Event, Lease, LeaseAttrs, LeaseKey, LeaseSet, MacAddr, MemoryManager,
    NetworkConfig, NodeId, Overlay, PoolMode, PublicIp, Revision, Snapshot, Subnet, Unreadable,
};
use flannel_testkit::fake_kernel::FakeKernel;

/// The state that all records are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Peers that are programmed.
    Accepted,
    /// Their subnets are not in the network.
    Outside,
    /// Their subnets are that of an older record.
    Taken,
    /// Their MAC is that of an older record.
    SameMac,
    /// Their address and MAC are this node's.
    Clones,
    /// Records of a backend that ours reaches without a tunnel.
    OtherBackend,
    /// They cannot be read, and never could.
    Unreadable,
    /// They cannot be read any more.
    Spoilt,
    /// All of one node, and cannot be read any more.
    SpoiltOfOneNode,
}

const STATES: [State; 9] = [
    State::Accepted,
    State::Outside,
    State::Taken,
    State::SameMac,
    State::Clones,
    State::OtherBackend,
    State::Unreadable,
    State::Spoilt,
    State::SpoiltOfOneNode,
];

fn subnet(a: u8, n: u32) -> Subnet {
    let [_, _, high, low] = (n << 4).to_be_bytes();
    let address = [a, 1 + (n >> 12) as u8, high, low];
    Subnet::new(address, 28).expect("a valid length")
}

fn data(mac: MacAddr) -> DualStack<flannel_core::BackendData> {
    let data = VxlanData {
        vni: 1,
        vtep_mac: mac,
    };
    DualStack::v4(data.encode().expect("valid"))
}

/// A peer as it should be; another `version` is at another address.
fn good(n: u32, version: u8) -> Lease {
    let [_, a, b, c] = n.to_be_bytes();
    let subnet = subnet(10, n);
    Lease {
        key: LeaseKey::new(format!("{n}-28")),
        node: NodeId::new(format!("peer-{n}")).expect("a node id"),
        instance: None,
        subnet: DualStack::v4(subnet),
        attrs: LeaseAttrs {
            public_ip: PublicIp::v4([172, 16 + version, b, c].into()),
            backend_type: Some(BackendType::vxlan()),
            backend_data: data(MacAddr([0x0e, 0, version, a, b, c])),
        },
        ttl: None,
        created: Revision(u64::from(n) + 10),
        revision: Revision(u64::from(n) + 10),
    }
}

/// A record of a state; another `version` differs in something.
fn record(state: State, n: u32, version: u8, own: &Lease) -> Lease {
    let mut lease = good(n, version);
    match state {
        State::Accepted | State::Unreadable | State::Spoilt => {}
        State::Outside => lease.subnet = DualStack::v4(subnet(11, n)),
        State::Taken => lease.subnet = DualStack::v4(subnet(10, 60_000)),
        State::SameMac => lease.attrs.backend_data = data(MacAddr([0x0e, 9, 9, 9, 9, version])),
        State::Clones => {
            lease.attrs = own.attrs.clone();
            lease.subnet = DualStack::v4(subnet(10, n + 30_000 * u32::from(version)));
        }
        State::OtherBackend => {
            lease.attrs.backend_type = Some(BackendType::host_gw());
            lease.attrs.backend_data = DualStack::default();
        }
        State::SpoiltOfOneNode => lease.node = NodeId::new("one").expect("a node id"),
    }
    lease
}

struct World {
    set: LeaseSet,
    compiler: Compiler,
    own: Lease,
    revision: u64,
}

impl World {
    fn new(state: State, records: u32) -> Self {
        let common::Node {
            own, set, compiler, ..
        } = common::node(subnet(10, 61_000));
        let mut world = Self {
            set,
            compiler,
            own,
            revision: 2_000_000,
        };
        let mut leases: Vec<Lease> = (0..records)
            .map(|n| record(state, n, 0, &world.own))
            .collect();
        if state == State::Taken {
            let mut holder = good(60_000, 0);
            holder.created = Revision(1);
            leases.push(holder);
        }
        if state == State::Unreadable {
            leases.clear();
        }
        world.apply(Event::Snapshot(Snapshot {
            leases,
            revision: Revision(1_000_000),
            ..Snapshot::default()
        }));
        if matches!(
            state,
            State::Unreadable | State::Spoilt | State::SpoiltOfOneNode
        ) {
            (0..records).for_each(|n| world.change(state, n, 0));
        }
        world
    }

    fn apply(&mut self, event: Event) {
        let applied = self.set.apply(event);
        self.compiler.update(&applied.delta, &self.set);
    }

    /// Writes one record anew, in another version or, where it cannot be read, as unreadable as it was.
    fn change(&mut self, state: State, n: u32, version: u8) {
        self.revision += 1;
        let revision = Revision(self.revision);
        let mut lease = record(state, n, version, &self.own);
        lease.revision = revision;
        let unreadable = |lease: &Lease| {
            Event::Unreadable(Unreadable {
                key: lease.key.clone(),
                revision,
                reason: format!("version {version}"),
            })
        };
        let event = match state {
            State::Unreadable | State::Spoilt | State::SpoiltOfOneNode => unreadable(&lease),
            _ => Event::Put(lease),
        };
        self.apply(event);
    }
}

fn changes(c: &mut Criterion) {
    let mut group = c.benchmark_group("one change among records that are");
    group.sample_size(20);
    for state in STATES {
        for records in [1_000, 10_000, 50_000] {
            let mut world = World::new(state, records);
            let mut version = 0;
            let mut n = 0;
            group.bench_function(BenchmarkId::new(format!("{state:?}"), records), |b| {
                b.iter(|| {
                    version ^= 1;
                    n = (n + 7919) % records;
                    world.change(state, n, version);
                });
            });
        }
    }
    group.finish();
}

/// The cost of a look at the kernel for a node that has so many records of no use in its store: a
/// wake, in which nothing about them changes.
fn wakes(c: &mut Criterion) {
    let mut group = c.benchmark_group("one wake beside records that are");
    group.sample_size(20);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    for records in [1_000, 10_000, 50_000] {
        let config = NetworkConfig::from_json(common::CONFIG, PoolMode::Allocated);
        let manager = MemoryManager::new(config.expect("a valid config"));
        let own = common::node(subnet(10, 61_000)).own;
        for n in 0..records {
            let lease = record(State::Outside, n, 0, &own);
            manager.put_raw(lease).expect("it is written");
        }
        let overlay = runtime.block_on(async {
            let overlay = Overlay::builder(NodeId::new("a").expect("a node id"))
                .manager(manager)
                .backend(VxlanBackend::new())
                .kernel(FakeKernel::node(1))
                .start()
                .await
                .expect("all parts");
            let all = records as usize;
            let knows = overlay.wait_for(|status| status.ready && status.rejected.len() == all);
            knows.await.expect("running");
            overlay
        });
        group.bench_function(BenchmarkId::new("Outside", records), |b| {
            b.iter(|| runtime.block_on(overlay.plan()).expect("a plan"));
        });
    }
    group.finish();
}

criterion_group!(benches, changes, wakes);
criterion_main!(benches);
