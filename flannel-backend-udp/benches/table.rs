//! What a lookup costs with few peers and with many, with and without the caches that the forwarder
//! has: `cargo bench -p flannel-backend-udp --bench table`.
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a program that measures"
)]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use flannel_backend_udp::table::TableBuilder;
use flannel_core::Subnet;

const LOOKUPS: u32 = 4_000_000;
const ROUNDS: usize = 5;

fn subnet(number: u32, v6: bool) -> Subnet {
    let ip: IpAddr = match v6 {
        false => Ipv4Addr::from_bits((10 << 24) + (number << 8)).into(),
        true => Ipv6Addr::from_bits((0xfd00_u128 << 112) + (u128::from(number) << 64)).into(),
    };
    Subnet::new(ip, if v6 { 64 } else { 24 }).expect("a length of the family")
}

/// Nanoseconds of a lookup of a random peer's address.
fn measure(peers: u32, v6: bool) -> f64 {
    let mut builder = TableBuilder::new();
    for number in 0..peers {
        let endpoint = SocketAddr::from((
            [172, (number >> 16) as u8, (number >> 8) as u8, number as u8],
            8285,
        ));
        builder.insert(subnet(number, v6), endpoint);
    }
    let table = builder.build();
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let mut state = 1u32;
        for _ in 0..LOOKUPS {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let number = ((u64::from(state) * u64::from(peers)) >> 32) as u32;
            let address = match v6 {
                false => IpAddr::from(Ipv4Addr::from_bits((10 << 24) + (number << 8) + 2)),
                true => Ipv6Addr::from_bits((0xfd00_u128 << 112) + (u128::from(number) << 64) + 2)
                    .into(),
            };
            black_box(table.lookup(black_box(address)));
        }
        best = best.min(start.elapsed().as_nanos() as f64 / f64::from(LOOKUPS));
    }
    best
}

fn main() {
    for v6 in [false, true] {
        let family = if v6 { "IPv6" } else { "IPv4" };
        let few = measure(50, v6);
        for peers in [50, 500, 5_000, 50_000] {
            let cost = measure(peers, v6);
            println!(
                "{family} {peers:>6} peers: {cost:5.1} ns a lookup, {:.2} of 50 peers'",
                cost / few
            );
        }
    }
    let mut builder = TableBuilder::new();
    for number in 0..50_000 {
        builder.insert(
            subnet(number, false),
            SocketAddr::from((
                [172, (number >> 16) as u8, (number >> 8) as u8, number as u8],
                8285,
            )),
        );
    }
    let start = Instant::now();
    let table = black_box(builder.build());
    println!("a table of 50,000 peers is made in {:?}", start.elapsed());
    drop(table);
}
