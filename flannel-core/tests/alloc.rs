//! Allocation against a model that knows no trick: a list of what is taken, and a loop.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::alloc::{Allocator, PoolExhausted, choose};
use flannel_core::{DualStack, Family, NetworkConfig, NodeId, Pool, PoolMode, Subnet};
use proptest::prelude::*;

fn config(text: &str) -> NetworkConfig {
    NetworkConfig::from_json(text, PoolMode::Allocated)
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn pool(network: &str, len: u8) -> Pool {
    let text = if network.contains(':') {
        format!(
            r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}","IPv6SubnetLen":{len}}}"#
        )
    } else {
        format!(r#"{{"Network":"{network}","SubnetLen":{len}}}"#)
    };
    let pools = *config(&text).pools();
    pools.v4.or(pools.v6).expect("one family")
}

fn subnet(text: &str) -> Subnet {
    text.parse().expect("a subnet")
}

fn node(n: u64) -> NodeId {
    NodeId::new(format!("node-{n}")).expect("a node id")
}

/// A pool of at most 61 slots, anywhere in the space of its family, its ends included, with a
/// first and a last subnet that need not be those of the network.
fn small_pool(family: Family) -> impl Strategy<Value = Pool> {
    let bits = family.bits();
    let place = prop_oneof![2 => any::<u128>(), 1 => Just(u128::MAX), 1 => Just(0)];
    (place, 2u8..=6, 2u8..=12, any::<[prop::sample::Index; 2]>()).prop_filter_map(
        "a pool",
        move |(place, slot_bits, host_bits, ends)| {
            let len = bits - host_bits;
            let ip: IpAddr = match family {
                #[allow(clippy::cast_possible_truncation, reason = "any 32 bits will do")]
                Family::V4 => Ipv4Addr::from_bits(place as u32).into(),
                Family::V6 => Ipv6Addr::from_bits(place).into(),
            };
            let network = Subnet::new(ip, len - slot_bits).ok()?;
            let slots: Vec<Subnet> = network.subnets(len).collect();
            let mut ends = ends.map(|end| end.index(slots.len()));
            ends.sort_unstable();
            let [min, max] = ends.map(|end| slots[end].address());
            let [prefix, enable] = match family {
                Family::V4 => ["", r#""EnableIPv4":true"#],
                Family::V6 => ["IPv6", r#""EnableIPv4":false,"EnableIPv6":true"#],
            };
            let text = format!(
                r#"{{{enable},"{prefix}Network":"{network}","{prefix}SubnetLen":{len},
                    "{prefix}SubnetMin":"{min}","{prefix}SubnetMax":"{max}"}}"#
            );
            // An end of 0.0.0.0 or :: counts as not given; with another end before the second
            // subnet that leaves nothing.
            let config = NetworkConfig::from_json(&text, PoolMode::Allocated).ok()?;
            config.pools().get(family).copied()
        },
    )
}

/// Any subnet that may matter to a pool: around it, larger, smaller, nested, beside it.
fn near(pool: &Pool) -> impl Strategy<Value = Subnet> + use<> {
    let (first, _) = pool.range().expect("allocated from");
    let (family, len) = (first.family(), first.len());
    let lens = prop_oneof![
        3 => Just(len),
        2 => pool.network().len().saturating_sub(1)..=len,
        3 => len..=family.bits(),
        1 => 0..=family.bits(),
    ];
    // How many bits of the place vary: two slots, the network, twice the network.
    let network_bits = family.bits() - pool.network().len();
    let reach = prop::sample::select(vec![
        family.bits() - len + 1,
        network_bits,
        network_bits + 1,
    ]);
    (any::<u128>(), lens, reach).prop_map(move |(n, len, reach)| {
        let place = match first.address() {
            IpAddr::V4(ip) => u128::from(ip.to_bits()),
            IpAddr::V6(ip) => ip.to_bits(),
        };
        let bits = place ^ (n & ((1u128 << reach) - 1));
        let ip: IpAddr = match family {
            #[allow(
                clippy::cast_possible_truncation,
                reason = "an IPv4 number has 32 bits"
            )]
            Family::V4 => Ipv4Addr::from_bits(bits as u32).into(),
            Family::V6 => Ipv6Addr::from_bits(bits).into(),
        };
        Subnet::new(ip, len).expect("a length of the family")
    })
}

#[derive(Debug, Clone)]
enum Op {
    Take(Subnet),
    /// Releases the n-th of what is taken.
    Release(prop::sample::Index),
    /// Releases what may not be taken at all.
    ReleaseAny(Subnet),
    /// Takes the n-th of what is taken once more.
    Again(prop::sample::Index),
}

fn ops(pool: &Pool) -> impl Strategy<Value = Vec<Op>> + use<> {
    let op = prop_oneof![
        4 => near(pool).prop_map(Op::Take),
        4 => any::<prop::sample::Index>().prop_map(Op::Release),
        1 => near(pool).prop_map(Op::ReleaseAny),
        1 => any::<prop::sample::Index>().prop_map(Op::Again),
    ];
    prop::collection::vec(op, 0..40)
}

fn any_family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::V4), Just(Family::V6)]
}

fn pool_and_ops() -> impl Strategy<Value = (Pool, Vec<Op>)> {
    any_family()
        .prop_flat_map(small_pool)
        .prop_flat_map(|pool| (Just(pool), ops(&pool)))
}

/// All that can be given out, and what is taken, as plain lists.
struct Model {
    network: Subnet,
    slots: Vec<Subnet>,
    taken: Vec<Subnet>,
}

impl Model {
    fn new(pool: &Pool) -> Self {
        let (first, last) = pool.range().expect("allocated from");
        let slots = pool.network().subnets(first.len());
        let slots = slots.filter(|slot| *slot >= first && *slot <= last);
        Self {
            network: pool.network(),
            slots: slots.collect(),
            taken: Vec::new(),
        }
    }

    fn is_free(&self, subnet: &Subnet) -> bool {
        // What is larger than a quarter of the network, or not in it, no peer accepts.
        let network = self.network;
        let counts = |taken: &&Subnet| network.contains(taken) && taken.len() >= network.len() + 2;
        let mut taken = self.taken.iter().filter(counts);
        !taken.any(|taken| taken.overlaps(subnet))
    }

    fn free(&self) -> BTreeSet<Subnet> {
        let free = self.slots.iter().filter(|slot| self.is_free(slot));
        free.copied().collect()
    }

    fn apply(&mut self, op: &Op, allocator: &mut Allocator) {
        match op {
            Op::Take(subnet) => {
                self.taken.push(*subnet);
                allocator.take(subnet);
            }
            Op::Again(n) if !self.taken.is_empty() => {
                let subnet = self.taken[n.index(self.taken.len())];
                self.taken.push(subnet);
                allocator.take(&subnet);
            }
            Op::Release(n) if !self.taken.is_empty() => {
                let subnet = self.taken.swap_remove(n.index(self.taken.len()));
                allocator.release(&subnet);
            }
            Op::ReleaseAny(subnet) => {
                if let Some(at) = self.taken.iter().position(|taken| taken == subnet) {
                    self.taken.swap_remove(at);
                }
                allocator.release(subnet);
            }
            Op::Again(_) | Op::Release(_) => {}
        }
    }
}

/// Every free slot, found by asking on and on.
fn walk(allocator: &Allocator) -> Vec<Subnet> {
    let mut found = Vec::new();
    let mut slot = 0;
    while slot < allocator.slots() {
        match allocator.next_free_from(slot) {
            Some(free) if free >= slot => {
                found.push(allocator.subnet(free).expect("a slot of the pool"));
                slot = free + 1;
            }
            _ => break,
        }
    }
    found
}

proptest! {
    #[test]
    fn any_history_of_takes_and_releases_equals_the_model((pool, ops) in pool_and_ops()) {
        let mut allocator = Allocator::new(&pool).expect("allocated from");
        let mut model = Model::new(&pool);
        prop_assert_eq!(allocator.slots(), model.slots.len() as u128);
        for op in &ops {
            model.apply(op, &mut allocator);
            let free = model.free();
            prop_assert_eq!(walk(&allocator), free.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(allocator.free_count(), free.len() as u128);
        }
        for slot in &model.slots {
            prop_assert_eq!(allocator.is_free(slot), model.is_free(slot), "{}", slot);
        }
    }

    #[test]
    fn a_subnet_of_any_length_is_free_when_it_overlaps_nothing(
        (pool, ops, asked) in any_family().prop_flat_map(small_pool).prop_flat_map(|pool| {
            (Just(pool), ops(&pool), prop::collection::vec(near(&pool), 20))
        }))
    {
        let mut allocator = Allocator::new(&pool).expect("allocated from");
        let mut model = Model::new(&pool);
        ops.iter().for_each(|op| model.apply(op, &mut allocator));
        let (first, last) = pool.range().expect("allocated from");
        let beside = |subnet: &Subnet| {
            subnet.last_address() < first.address() || subnet.address() > last.last_address()
        };
        model.taken.retain(|taken| !beside(taken));
        for subnet in &asked {
            prop_assert_eq!(allocator.is_free(subnet), model.is_free(subnet), "{}", subnet);
        }
    }

    #[test]
    fn releasing_everything_frees_everything((pool, mut ops) in pool_and_ops()) {
        let mut allocator = Allocator::new(&pool).expect("allocated from");
        let mut model = Model::new(&pool);
        ops.retain(|op| !matches!(op, Op::ReleaseAny(_)));
        ops.iter().for_each(|op| model.apply(op, &mut allocator));
        model.taken.iter().for_each(|subnet| allocator.release(subnet));
        prop_assert_eq!(allocator.free_count(), allocator.slots());
        prop_assert_eq!(walk(&allocator), model.slots);
    }

    #[test]
    fn a_subnet_is_found_exactly_when_one_is_free(
        (pools, ops4, ops6, previous) in (small_pool(Family::V4), small_pool(Family::V6), 1..4)
            .prop_flat_map(|(v4, v6, which)| {
                let pools = DualStack::new(
                    (which & 1 != 0).then_some(v4),
                    (which & 2 != 0).then_some(v6),
                );
                let previous = (prop::option::of(near(&v4)), prop::option::of(near(&v6)));
                (Just(pools), ops(&v4), ops(&v6), previous)
            }),
        n in 0u64..1000)
    {
        let mut allocators = pools.map(|_, pool| Allocator::new(pool).expect("allocated from"));
        let mut models = pools.map(|_, pool| Model::new(pool));
        for (family, ops) in [(Family::V4, &ops4), (Family::V6, &ops6)] {
            if let (Some(allocator), Some(model)) =
                (allocators.get_mut(family), models.get_mut(family))
            {
                ops.iter().for_each(|op| model.apply(op, allocator));
            }
        }
        let previous = DualStack::new(previous.0, previous.1);
        let borrowed = DualStack::new(allocators.v4.as_ref(), allocators.v6.as_ref());
        let chosen = choose(&borrowed, &node(n), &previous);
        prop_assert_eq!(chosen, choose(&borrowed, &node(n), &previous));

        let full = models.iter().find(|(_, model)| model.free().is_empty());
        match (chosen, full) {
            (Err(PoolExhausted { family }), Some((full, _))) => prop_assert_eq!(family, full),
            (Ok(chosen), None) => {
                prop_assert!(chosen.same_families(&pools) && chosen.check_families().is_ok());
                for (family, subnet) in chosen.iter() {
                    let (pool, model) = (pools.get(family), models.get(family));
                    let (pool, model) = (pool.expect("chosen from"), model.expect("chosen from"));
                    prop_assert!(pool.fits(subnet), "{} is not of the pool", subnet);
                    prop_assert!(model.is_free(subnet), "{} is taken", subnet);
                    if let Some(previous) = previous.get(family) {
                        let wanted = pool.fits(previous) && model.is_free(previous);
                        prop_assert!(!wanted || previous == subnet);
                    }
                }
            }
            (chosen, _) => prop_assert!(false, "{:?} although free is otherwise", chosen),
        }
    }

    #[test]
    fn a_node_that_lost_its_memory_finds_its_subnet_again(
        pool in any_family().prop_flat_map(small_pool),
        others in prop::collection::vec(1u64..1000, 0..60))
    {
        let family = pool.network().family();
        let choose = |allocator: &Allocator, node: &NodeId| {
            let mut allocators = DualStack::default();
            allocators.set(family, Some(allocator));
            choose(&allocators, node, &DualStack::default())
                .map(|chosen| *chosen.get(family).expect("chosen"))
        };
        let mut allocator = Allocator::new(&pool).expect("allocated from");
        let mine = choose(&allocator, &node(0)).expect("an empty pool");
        allocator.take(&mine);
        for other in others {
            if let Ok(subnet) = choose(&allocator, &node(other)) {
                prop_assert_ne!(subnet, mine);
                allocator.take(&subnet);
            }
        }
        allocator.release(&mine);
        prop_assert_eq!(choose(&allocator, &node(0)), Ok(mine));
    }
}

#[test]
fn a_pool_at_the_end_of_the_space_does_not_wrap() {
    for (network, len, last) in [
        ("255.255.0.0/16", 24, "255.255.255.0/24"),
        ("255.255.255.240/28", 30, "255.255.255.252/30"),
        ("240.0.0.0/4", 30, "255.255.255.252/30"),
        (
            "8000::/1",
            126,
            "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffc/126",
        ),
        ("::/1", 126, "7fff:ffff:ffff:ffff:ffff:ffff:ffff:fffc/126"),
    ] {
        let pool = pool(network, len);
        let last = subnet(last);
        let mut allocator = Allocator::new(&pool).expect("allocated from");
        let slots = allocator.slots();
        assert_eq!(slots, (1 << (len - pool.network().len())) - 1, "{network}");
        assert_eq!(allocator.subnet(slots - 1), Some(last), "{network}");
        assert_eq!(allocator.subnet(slots), None, "{network}");
        allocator.take(&last);
        assert_eq!(allocator.next_free_from(slots - 1), Some(0), "{network}");
        assert_eq!(allocator.next_free_from(u128::MAX), Some(0), "{network}");
        let quarters: Vec<Subnet> = pool.network().subnets(pool.network().len() + 2).collect();
        quarters.iter().for_each(|quarter| allocator.take(quarter));
        assert_eq!(allocator.next_free_from(0), None, "{network}");
        allocator.release(&last);
        allocator.take(&last);
        quarters
            .iter()
            .for_each(|quarter| allocator.release(quarter));
        assert_eq!(allocator.free_count(), slots - 1, "{network}");
        allocator.release(&last);
        assert_eq!(allocator.free_count(), slots, "{network}");
    }
}

#[test]
fn what_no_peer_accepts_leaves_a_subnet_for_everybody() {
    let pool = pool("10.5.0.0/22", 24);
    let mut allocator = Allocator::new(&pool).expect("allocated from");
    for nobodys in [
        "0.0.0.0/0",
        "10.0.0.0/8",
        "10.5.0.0/22",
        "10.5.0.0/23",
        "10.5.2.0/23",
    ] {
        allocator.take(&subnet(nobodys));
        assert_eq!(allocator.free_count(), allocator.slots(), "{nobodys}");
        allocator.release(&subnet(nobodys));
        assert_eq!(allocator.free_count(), allocator.slots(), "{nobodys}");
    }
    allocator.take(&subnet("10.5.1.0/24"));
    assert!(
        allocator.free_count() < allocator.slots(),
        "a quarter counts"
    );
}

#[test]
fn both_families_or_none_are_chosen() {
    let (v4, v6) = (pool("10.0.0.0/16", 24), pool("fd00::/124", 126));
    let (v4, mut v6) = (
        Allocator::new(&v4).expect("v4"),
        Allocator::new(&v6).expect("v6"),
    );
    for quarter in ["fd00::/126", "fd00::4/126", "fd00::8/126", "fd00::c/126"] {
        v6.take(&subnet(quarter));
    }
    let full = choose(&DualStack::both(&v4, &v6), &node(1), &DualStack::default());
    assert_eq!(full, Err(PoolExhausted { family: Family::V6 }));
}

#[test]
fn assigned_pools_have_no_allocator() {
    let config = NetworkConfig::from_json(r#"{"Network":"10.0.0.0/16"}"#, PoolMode::Assigned);
    let pool = config.expect("valid").pools().v4.expect("IPv4 is on");
    assert!(Allocator::new(&pool).is_none());
}

#[test]
fn the_choice_of_a_node_is_the_same_in_every_version() {
    let v4 = Allocator::new(&pool("10.0.0.0/8", 24)).expect("v4");
    let v6 = Allocator::new(&pool("fd00::/48", 64)).expect("v6");
    let chosen = ["a", "worker-1", "worker-2"].map(|id| {
        let node = NodeId::new(id).expect("a node id");
        choose(&DualStack::both(&v4, &v6), &node, &DualStack::default())
            .expect("an empty pool")
            .to_string()
    });
    assert_eq!(
        chosen,
        [
            "10.226.37.0/24,fd00:0:0:bc01::/64",
            "10.202.128.0/24,fd00:0:0:8b9c::/64",
            "10.139.46.0/24,fd00:0:0:eb80::/64"
        ]
    );
}

#[test]
fn nodes_that_join_together_spread() {
    let v4 = Allocator::new(&pool("10.0.0.0/12", 24)).expect("v4");
    let chosen: BTreeSet<String> = (0..200)
        .map(|n| {
            choose(&DualStack::v4(&v4), &node(n), &DualStack::default())
                .expect("an empty pool")
                .to_string()
        })
        .collect();
    // 200 throws into 4,095 slots collide about five times.
    assert!(chosen.len() >= 185, "{}", chosen.len());
}
