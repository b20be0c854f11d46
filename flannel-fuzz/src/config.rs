//! The network config.

use flannel_backend_vxlan::VxlanConfig;
use flannel_core::{Family, NetworkConfig, Pool, PoolMode, mtu};

use crate::explained;

pub(crate) const WORDS: &[&str] = &[
    "\"Network\"",
    "\"IPv6Network\"",
    "\"EnableIPv4\"",
    "\"EnableIPv6\"",
    "\"EnableNFTables\"",
    "\"SubnetLen\"",
    "\"SubnetMin\"",
    "\"SubnetMax\"",
    "\"IPv6SubnetLen\"",
    "\"IPv6SubnetMin\"",
    "\"IPv6SubnetMax\"",
    "\"Backend\"",
    "\"Type\"",
    "\"vxlan\"",
    "\"VNI\"",
    "\"Port\"",
    "\"MTU\"",
    "\"10.5.0.0/16\"",
    "\"fd00:5::/48\"",
    "\"0.0.0.0/0\"",
    "\"::/0\"",
    "true",
    "false",
    "null",
    "4294967296",
    "18446744073709551616",
    "-1",
    "1e9",
    "\\u017f",
    "\\ud800",
];

pub(crate) fn network_config(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let mut accepted = false;
    for mode in [PoolMode::Allocated, PoolMode::Assigned] {
        match NetworkConfig::from_json(&text, mode) {
            Ok(config) => {
                accepted = true;
                check(&config, mode);
            }
            Err(error) => explained(&error),
        }
    }
    accepted
}

fn check(config: &NetworkConfig, mode: PoolMode) {
    assert!(config.text().len() <= NetworkConfig::MAX_LEN);
    assert_eq!(config.mode(), mode);
    let again = NetworkConfig::from_json(config.text(), mode);
    assert_eq!(again.as_ref(), Ok(config), "read again");
    assert!(!config.pools().is_empty(), "a network without a family");
    for (family, pool) in config.pools().iter() {
        check_pool(family, pool, mode);
    }
    match VxlanConfig::from_network(config) {
        Ok(vxlan) => check_vxlan(&vxlan, config),
        Err(error) => explained(&error),
    }
}

fn check_pool(family: Family, pool: &Pool, mode: PoolMode) {
    let network = pool.network();
    assert_eq!(network.family(), family);
    assert!(network.len() > 0, "a network of all addresses");
    assert_eq!(pool.range().is_some(), mode == PoolMode::Allocated);
    let Some((first, last)) = pool.range() else {
        return;
    };
    assert!(first <= last, "an empty range");
    assert_eq!(first.len(), last.len());
    assert!(
        first.len() >= network.len() + 2,
        "{network} holds no four subnets of length {}",
        first.len()
    );
    for end in [first, last] {
        assert!(network.contains(&end), "{end} is not in {network}");
        assert!(pool.fits(&end) && pool.admits(&end), "{end} does not fit");
    }
    assert!(!pool.fits(&network) && !pool.admits(&network));
}

fn check_vxlan(vxlan: &VxlanConfig, config: &NetworkConfig) {
    assert!((1..=0xff_ffff).contains(&vxlan.vni), "VNI {}", vxlan.vni);
    assert_ne!(vxlan.port, 0);
    for family in config.families() {
        for external in [0, 576, 1280, 1500, 9000, u32::MAX] {
            match vxlan.device_mtu(family, external) {
                Ok(inner) => {
                    let outer = u64::from(inner) + u64::from(mtu::vxlan_overhead(family));
                    assert!(outer <= u64::from(external), "{inner} in {external}");
                    assert!(inner >= mtu::min(family));
                }
                Err(error) => explained(&error),
            }
        }
    }
}
