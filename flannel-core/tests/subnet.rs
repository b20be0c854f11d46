//! Laws of subnets, checked through the addresses they hold.

use std::net::IpAddr;

use flannel_core::{Family, Subnet, SubnetError};
use flannel_testkit::strategies::config::{family, ip, subnet, subnet_within};
use ipnetwork::IpNetwork;
use proptest::prelude::*;

fn any_subnet() -> impl Strategy<Value = Subnet> {
    family().prop_flat_map(subnet)
}

/// Two subnets of one family that are often related.
fn two_subnets() -> impl Strategy<Value = (Subnet, Subnet)> {
    any_subnet().prop_flat_map(|outer| {
        let other = prop_oneof![
            subnet_within(outer).boxed(),
            subnet(outer.family()).boxed(),
            Just(outer.next().unwrap_or(outer)).boxed(),
        ];
        (Just(outer), other)
    })
}

proptest! {
    #[test]
    fn text_is_read_back(subnet in any_subnet()) {
        prop_assert_eq!(subnet.to_string().parse(), Ok(subnet));
        prop_assert_eq!(Subnet::from(IpNetwork::from(subnet)), subnet);
    }

    #[test]
    fn host_bits_make_no_difference(
        (family, ip, len) in family().prop_flat_map(|f| (Just(f), ip(f), 0..=f.bits())))
    {
        let subnet = Subnet::new(ip, len).expect("a length of the family");
        prop_assert_eq!(format!("{ip}/{len}").parse(), Ok(subnet));
        prop_assert!(subnet.contains_ip(ip) && subnet.family() == family);
        prop_assert_eq!(Subnet::strict(ip, len).is_ok(), subnet.address() == ip);
        prop_assert_eq!(Subnet::new(subnet.last_address(), len), Ok(subnet));
    }

    #[test]
    fn containing_and_overlapping_are_about_addresses((a, b) in two_subnets()) {
        let contains = a.contains_ip(b.address()) && a.contains_ip(b.last_address());
        prop_assert_eq!(a.contains(&b), contains);
        let apart = a.last_address() < b.address() || b.last_address() < a.address();
        prop_assert_eq!(a.overlaps(&b), !apart);
        prop_assert_eq!(a.overlaps(&b), b.overlaps(&a));
        prop_assert_eq!(a == b, a.contains(&b) && b.contains(&a));
        // In a sorted map a subnet stands directly before what it contains.
        if a.contains(&b) && a != b {
            prop_assert!(a < b);
        }
        prop_assert_eq!(b.supernet(a.len()), (a.len() <= b.len()).then(|| {
            Subnet::new(b.address(), a.len()).expect("a length of the family")
        }));
    }

    #[test]
    fn subnets_of_a_subnet_tile_it(outer in any_subnet(), more in 0u8..8) {
        let len = outer.len().saturating_add(more);
        let parts: Vec<Subnet> = outer.subnets(len).collect();
        if len > outer.family().bits() {
            prop_assert!(parts.is_empty());
        } else {
            prop_assert_eq!(parts.len(), 1 << more);
            prop_assert_eq!(parts[0].address(), outer.address());
            prop_assert_eq!(parts[parts.len() - 1].last_address(), outer.last_address());
            for pair in parts.windows(2) {
                prop_assert_eq!(pair[0].next(), Some(pair[1]));
                prop_assert!(!pair[0].overlaps(&pair[1]) && outer.contains(&pair[1]));
            }
        }
    }

    #[test]
    fn the_next_subnet_begins_behind_the_last_address(subnet in any_subnet()) {
        let end = match subnet.family() {
            Family::V4 => IpAddr::from([255; 4]),
            Family::V6 => IpAddr::from([255; 16]),
        };
        match subnet.next() {
            None => prop_assert_eq!(subnet.last_address(), end),
            Some(next) => {
                prop_assert_eq!(next.len(), subnet.len());
                prop_assert!(!next.overlaps(&subnet));
                prop_assert!(next.address() > subnet.last_address());
            }
        }
    }

    #[test]
    fn no_text_panics(text in "[0-9a-f.:/]{0,30}") {
        let _ = text.parse::<Subnet>();
    }
}

#[test]
fn what_is_no_subnet_says_why() {
    let parse = |text: &str| text.parse::<Subnet>();
    for text in [
        "",
        "10.0.0.0",
        "10.0.0.0/",
        "10.0.0.0/+8",
        "10.0.0.0/255.0.0.0",
        "/8",
        "10.0.0/8",
        "10.0.0.0/ 8",
        "fe80::%1/64",
        "10.0.0.0/0008",
    ] {
        assert!(
            matches!(parse(text), Err(SubnetError::Syntax { .. })),
            "{text}"
        );
    }
    for text in ["10.0.0.0/33", "fd00::/129", "fd00::/999"] {
        assert!(
            matches!(parse(text), Err(SubnetError::Length { .. })),
            "{text}"
        );
    }
}

#[test]
fn places_inside_a_subnet_end_with_it() {
    let subnet: Subnet = "255.255.255.252/30".parse().expect("a subnet");
    assert_eq!(subnet.nth(3), Some(IpAddr::from([255, 255, 255, 255])));
    assert_eq!(subnet.nth(4), None);
    assert_eq!(subnet.nth(u128::MAX), None);
}
