//! The backend's own keys of the network config.

use flannel_core::backend::Result;
use flannel_core::config::{Error, NetworkConfig};
use flannel_core::{Family, IfName, mtu};

/// The UDP port of VXLAN where the config names none: the Linux kernel's default, which is older
/// than the port 4789 of RFC 7348 and what flannel uses.
pub const DEFAULT_PORT: u16 = 8472;

/// The keys of a `Backend` object of type `vxlan`, with flannel's defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanConfig {
    /// `VNI`: the VXLAN network identifier, 1 to 16777215; default 1.
    pub vni: u32,
    /// `Port`: the UDP port; 0 or absent is [`DEFAULT_PORT`].
    pub port: u16,
    /// `MTU`: of the **outer** packets, in bytes; absent: that of the external interface.
    pub mtu: Option<u32>,
    /// `GBP`: carry group policy marks.
    pub gbp: bool,
    /// `Learning`: learn forwarding entries from received packets.
    pub learning: bool,
    /// `DirectRouting`: no tunnel to peers that are on a link of this node.
    pub direct_routing: bool,
}

impl VxlanConfig {
    /// Reads the keys out of a network config.
    ///
    /// # Errors
    /// [`Error::Key`] names the key that breaks a rule.
    pub fn from_network(config: &NetworkConfig) -> Result<Self, Error> {
        let backend = config.backend();
        let vni = backend.u32("VNI", 1, 1..=0xff_ffff)?;
        for family in config.families() {
            if device_name(family, vni).is_none() {
                let most = if family == Family::V6 {
                    9_999
                } else {
                    9_999_999
                };
                return Err(Error::key(
                    "Backend.VNI",
                    vni,
                    format!(
                        "must be at most {most} for {family}, because it is part of the name of \
                         a device, which has at most {} characters",
                        IfName::MAX_LEN
                    ),
                ));
            }
        }
        let port = backend.u32("Port", 0, 0..=u32::from(u16::MAX))?;
        let port = u16::try_from(port)
            .ok()
            .filter(|port| *port != 0)
            .unwrap_or(DEFAULT_PORT);
        let mtu = match backend.u32("MTU", 0, 0..=65_535)? {
            0 => None,
            mtu => Some(mtu),
        };
        let config = Self {
            vni,
            port,
            mtu,
            gbp: backend.bool("GBP", false)?,
            learning: backend.bool("Learning", false)?,
            direct_routing: backend.bool("DirectRouting", false)?,
        };
        Ok(config)
    }

    /// The MTU of the overlay device of a family over an external interface of the given MTU:
    /// never more than the interface carries, whatever the config says.
    ///
    /// # Errors
    /// As [`mtu::inner`].
    pub fn device_mtu(&self, family: Family, external: u32) -> Result<u32> {
        mtu::inner(self.mtu, external, family, mtu::vxlan_overhead(family))
    }
}

/// The name of the overlay device of a family: flannel's. `None` if it would be too long.
pub(crate) fn device_name(family: Family, vni: u32) -> Option<IfName> {
    let name = match family {
        Family::V4 => format!("flannel.{vni}"),
        Family::V6 => format!("flannel-v6.{vni}"),
    };
    IfName::new(name).ok()
}
