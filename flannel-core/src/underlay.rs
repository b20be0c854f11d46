//! What we know of the host's own network, and which part of it carries the overlay.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::family::PublicIp;
use crate::object::{IfName, MacAddr, Route};

/// A link of the host with what an [`Object::Link`](crate::Object::Link) does not say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkInfo {
    /// Its name.
    pub name: IfName,
    /// Its index in the namespace; changes when the device is made again.
    pub index: u32,
    /// The largest packet it carries, in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it has a carrier (`IFF_LOWER_UP`).
    pub running: bool,
    /// Whether it is the loopback device.
    pub loopback: bool,
    /// Its hardware address, if it has one of six bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// The bridge or bond it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub master: Option<IfName>,
}

/// An address of the host with what an [`Object::Address`](crate::Object::Address) does not say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressInfo {
    /// The device.
    pub dev: IfName,
    /// The address.
    pub ip: IpAddr,
    /// The length of its on-link prefix.
    pub prefix_len: u8,
    /// Whether it is meant to be used no further than the link (`RT_SCOPE_LINK` and narrower).
    #[serde(default)]
    pub link_scope: bool,
    /// It may no longer be used for new connections (`IFA_F_DEPRECATED`).
    #[serde(default)]
    pub deprecated: bool,
    /// It does not expire (`IFA_F_PERMANENT`).
    #[serde(default)]
    pub permanent: bool,
    /// IPv6: a temporary address; IPv4: a secondary one (the same flag bit, 0x01).
    #[serde(default)]
    pub temporary: bool,
    /// Duplicate detection has not passed yet, or has failed (`IFA_F_TENTATIVE`,
    /// `IFA_F_DADFAILED`): it cannot be used.
    #[serde(default)]
    pub tentative: bool,
}

/// The host's own network: everything that is not the overlay's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Underlay {
    /// The links, in the kernel's order.
    pub links: Vec<LinkInfo>,
    /// The addresses, in the kernel's order.
    pub addresses: Vec<AddressInfo>,
    /// The routes of the main table.
    pub routes: Vec<Route>,
}

/// The external interface: what carries the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct External {
    /// The device.
    pub dev: IfName,
    /// Its index.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The device's own addresses: what outer packets are sent from.
    pub local: PublicIp,
    /// The addresses peers are told: the device's own, unless set otherwise (NAT).
    pub public: PublicIp,
    /// Why this one was chosen, in words.
    pub reason: String,
}
