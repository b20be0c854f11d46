//! The table against a plain list of subnets.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use flannel_backend_udp::table::TableBuilder;
use flannel_core::Subnet;
use proptest::prelude::*;

fn endpoint(n: u16, v6: bool) -> SocketAddr {
    let ip: IpAddr = if v6 {
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n % 7).into()
    } else {
        Ipv4Addr::new(192, 168, 0, (n % 7) as u8).into()
    };
    SocketAddr::new(ip, 8285 + n / 7)
}

/// Addresses close to one another, so that prefixes meet.
fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0u8..4, 0u8..4, 0u8..8).prop_map(|(a, b, c)| Ipv4Addr::new(10, a, b, c).into()),
        any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
        (0u16..4, 0u16..4, 0u16..8)
            .prop_map(|(a, b, c)| Ipv6Addr::new(0xfd00, a, b, 0, 0, 0, 0, c).into()),
        any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
    ]
}

fn subnet() -> impl Strategy<Value = Subnet> {
    (address(), 0u8..=128).prop_map(|(ip, len)| {
        let most = if ip.is_ipv4() { 32 } else { 128 };
        Subnet::new(ip, len % (most + 1)).expect("a length of the family")
    })
}

proptest! {
    #[test]
    fn lookups_are_those_of_a_plain_list(
        changes in prop::collection::vec((subnet(), prop::option::weighted(0.8, 0u16..20)), 0..60),
        asked in prop::collection::vec(address(), 1..60),
    ) {
        let mut builder = TableBuilder::new();
        let mut model: BTreeMap<Subnet, SocketAddr> = BTreeMap::new();
        for (subnet, to) in changes {
            match to {
                Some(n) => {
                    let to = endpoint(n, n % 2 == 0);
                    builder.insert(subnet, to);
                    model.insert(subnet, to);
                }
                None => prop_assert_eq!(builder.remove(subnet), model.remove(&subnet)),
            }
        }
        let table = builder.build();
        prop_assert_eq!(table.routes(), model.clone().into_iter().collect::<Vec<_>>());
        let ends = model.keys().flat_map(|subnet| [subnet.address(), subnet.last_address()]);
        for ip in asked.into_iter().chain(ends) {
            let longest = model
                .iter()
                .filter(|(subnet, _)| subnet.contains_ip(ip))
                .max_by_key(|(subnet, _)| subnet.len())
                .map(|(_, endpoint)| *endpoint);
            let found = table.lookup(ip).map(|peer| table.peer(peer).expect("there").endpoint());
            prop_assert_eq!(found, longest, "{}", ip);
        }
        for n in 0..20 {
            let endpoint = endpoint(n, n % 2 == 0);
            let found = table.peer_at(endpoint).map(|peer| table.peer(peer).expect("there").endpoint());
            let known = model.values().any(|known| *known == endpoint);
            prop_assert_eq!(found, known.then_some(endpoint));
        }
    }
}

#[test]
fn an_empty_table_knows_nobody() {
    let table = TableBuilder::new().build();
    assert_eq!(table.lookup(Ipv4Addr::LOCALHOST.into()), None);
    assert_eq!(table.peer_at(endpoint(1, false)), None);
    assert_eq!(
        flannel_backend_udp::table::Table::default().lookup(Ipv6Addr::LOCALHOST.into()),
        None
    );
}
