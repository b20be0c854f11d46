//! Leases as they are stored: the key and the value of flannel's, and our own JSON.

use flannel_core::wire::{
    LeaseRecord, MAX_KEY_LEN, MAX_VALUE_LEN, lease_value as write_value, parse_lease_value,
    parse_subnet_key, subnet_key,
};
use flannel_core::{BackendData, BackendType, Lease, LeaseAttrs, LeaseKey, NodeId, SavedState};

use crate::backend::same_data;
use crate::explained;

pub(crate) const KEY_WORDS: &[&str] = &[
    "10.5.1.0-24",
    "fd00:5:0:1::-64",
    "&",
    "-",
    "-0",
    "-31",
    "-32",
    "-127",
    "-128",
    "-256",
    "::",
    "::ffff:1.2.3.4",
    "0.0.0.0-0",
    "/coreos.com/network/subnets/",
];

pub(crate) const WORDS: &[&str] = &[
    "\"PublicIP\"",
    "\"PublicIPv6\"",
    "\"BackendType\"",
    "\"BackendData\"",
    "\"BackendV6Data\"",
    "\"NodeID\"",
    "\"Instance\"",
    "\"VNI\"",
    "\"VtepMAC\"",
    "\"vxlan\"",
    "\"host-gw\"",
    "\"1.2.3.4\"",
    "\"fd00::1\"",
    "\"::ffff:1.2.3.4\"",
    "\"::1.2.3.4\"",
    "\"0.0.0.0\"",
    "\"ip=1.2.3.4\"",
    "\"key\"",
    "\"node\"",
    "\"subnet\"",
    "\"ipv6_subnet\"",
    "\"attrs\"",
    "\"ttl_seconds\"",
    "\"revision\"",
    "\"c6:d2:32:6f:8f:44\"",
    "null",
    "18446744073709551615",
    "\\u003c",
    "\\ud800",
    "[[[[",
];

pub(crate) fn lease_key(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let key = LeaseKey::new(&text);
    assert!(key.as_str().len() <= LeaseKey::MAX_LEN);
    assert!(text.starts_with(key.as_str()), "more than a cut");
    match parse_subnet_key(&text) {
        Ok(subnets) => {
            assert!(text.len() <= MAX_KEY_LEN);
            subnets.check_families().expect("each half of its family");
            let v4 = subnets.v4.expect("a key has an IPv4 subnet");
            assert!((1..=31).contains(&v4.len()), "{v4}");
            assert!(subnets.v6.is_none_or(|v6| (1..=127).contains(&v6.len())));
            if let Ok(written) = subnet_key(&subnets) {
                assert_eq!(parse_subnet_key(&written), Ok(subnets), "{written}");
            } else {
                // Go flannel reads some addresses in a form that it does not write.
                assert!(subnets.v6.is_some(), "{v4} has no key");
            }
            true
        }
        Err(error) => {
            explained(&error);
            false
        }
    }
}

pub(crate) fn lease_value(bytes: &[u8]) -> bool {
    let record = match parse_lease_value(bytes) {
        Ok(record) => record,
        Err(error) => {
            explained(&error);
            return false;
        }
    };
    assert!(bytes.len() <= MAX_VALUE_LEN);
    within_bounds(&record.attrs);
    let Ok(node) = record.node_id() else {
        return true;
    };
    assert!(node.is_derived() || node.as_str().len() <= NodeId::MAX_LEN);
    // What cannot be written would be read back as something else.
    let Ok(written) = write_value(&node, record.instance, &record.attrs) else {
        return true;
    };
    let again = parse_lease_value(written.as_bytes()).expect("what we write can be read");
    same_record(&record, &again);
    let twice = write_value(&node, again.instance, &again.attrs);
    assert_eq!(twice.as_ref(), Ok(&written), "written twice");
    true
}

fn within_bounds(attrs: &LeaseAttrs) {
    assert!(!attrs.public_ip.v4.is_some_and(|ip| ip.is_unspecified()));
    assert!(!attrs.public_ip.v6.is_some_and(|ip| ip.is_unspecified()));
    if let Some(backend_type) = &attrs.backend_type {
        let name = backend_type.as_str();
        assert!((1..=BackendType::MAX_LEN).contains(&name.len()), "{name}");
        assert_eq!(name, name.to_ascii_lowercase());
    }
    for data in attrs.backend_data.values() {
        assert!(data.as_json().len() <= BackendData::MAX_LEN);
    }
}

fn same_record(one: &LeaseRecord, other: &LeaseRecord) {
    assert_eq!(one.node_id(), other.node_id());
    same_attrs(&one.attrs, &other.attrs);
}

fn same_attrs(one: &LeaseAttrs, other: &LeaseAttrs) {
    assert_eq!(one.public_ip, other.public_ip);
    assert_eq!(one.backend_type, other.backend_type);
    assert!(one.backend_data.same_families(&other.backend_data));
    for (family, data) in one.backend_data.iter() {
        let other = other
            .backend_data
            .get(family)
            .expect("of the same families");
        same_data(data, other);
    }
}

/// A lease in a file, and the state that a node saves, which holds one.
pub(crate) fn lease_json(bytes: &[u8]) -> bool {
    let state = serde_json::from_slice::<SavedState>(bytes);
    if let Ok(state) = &state {
        if let Some(lease) = &state.lease {
            check_lease(lease);
        }
        if let Ok(text) = serde_json::to_vec(state) {
            let again: SavedState = serde_json::from_slice(&text).expect("what we save is read");
            assert_eq!(again.config, state.config);
            assert_eq!(again.networks, state.networks);
            assert_eq!(again.lease.is_some(), state.lease.is_some());
        }
    }
    let lease = serde_json::from_slice::<Lease>(bytes);
    if let Ok(lease) = &lease {
        check_lease(lease);
    }
    lease.is_ok() || state.is_ok_and(|state| state.lease.is_some())
}

fn check_lease(lease: &Lease) {
    assert!(lease.key.as_str().len() <= LeaseKey::MAX_LEN);
    lease
        .subnet
        .check_families()
        .expect("each half of its family");
    within_bounds(&lease.attrs);
    // A lease whose derived node id is not that of its addresses cannot be written.
    let Ok(text) = serde_json::to_string(lease) else {
        return;
    };
    let again: Lease = serde_json::from_str(&text).expect("what we write can be read");
    same_attrs(&lease.attrs, &again.attrs);
    let rest = |lease: &Lease| Lease {
        attrs: LeaseAttrs::default(),
        ..lease.clone()
    };
    assert_eq!(rest(lease), rest(&again));
    assert_eq!(
        serde_json::to_string(&again).ok(),
        Some(text),
        "written twice"
    );
}
