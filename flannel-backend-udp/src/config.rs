//! The backend's own keys of the network config.

use flannel_core::backend::Result;
use flannel_core::config::{Error, NetworkConfig};
use flannel_core::{Family, mtu};

/// The UDP port where the config names none: flannel's.
pub const DEFAULT_PORT: u16 = 8285;

/// The keys of a `Backend` object of type `udp`, with flannel's defaults.
///
/// Flannel's own backend carries IPv4 over IPv4 alone and crashes where there is none. Here each
/// family of the config is carried over the underlay of the same family, IPv6 alone included; a Go
/// node in such a network serves its IPv4 half.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpConfig {
    /// `Port`: the UDP port on which **every** node receives, and from which it sends; 1 to 65535.
    pub port: u16,
    /// `MTU`, which flannel does not know: of the **outer** packets, in bytes; absent: that of the
    /// external interface.
    pub mtu: Option<u32>,
}

impl UdpConfig {
    /// Reads the keys out of a network config.
    ///
    /// # Errors
    /// [`Error::Key`] names the key that breaks a rule.
    pub fn from_network(config: &NetworkConfig) -> Result<Self, Error> {
        let backend = config.backend();
        let ports = 1..=u32::from(u16::MAX);
        let port = backend.u32("Port", u32::from(DEFAULT_PORT), ports)?;
        let mtu = match backend.u32("MTU", 0, 0..=65_535)? {
            0 => None,
            mtu => Some(mtu),
        };
        Ok(Self {
            port: u16::try_from(port).unwrap_or(DEFAULT_PORT),
            mtu,
        })
    }

    /// The largest inner packet of a family over an external interface of the given MTU: never more
    /// than the interface carries, whatever the config says.
    ///
    /// # Errors
    /// As [`mtu::inner`].
    pub fn inner_mtu(&self, family: Family, external: u32) -> Result<u32> {
        // No datagram is larger, whatever the interface carries (a loopback device, 65536).
        let external = external.min(MAX_OUTER);
        mtu::inner(self.mtu, external, family, mtu::udp_overhead(family))
    }
}

/// The largest outer packet: the length of an IPv4 packet has 16 bits (RFC 791, section 3.1).
const MAX_OUTER: u32 = 65_535;
