//! Address family as data: code iterates over families instead of branching on them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// An address family of the overlay or of the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, IPv4 first: the order in which everything is iterated.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The length of an address of this family in bits: 32 or 128.
    pub const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// The family of an address.
    pub const fn of(ip: &IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// One value per address family, each of which may be absent.
///
/// Used wherever flannel has an IPv4 field and an IPv6 field side by side: subnets, public
/// addresses, pools, backend data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DualStack<A, B = A> {
    /// The IPv4 half.
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub v4: Option<A>,
    /// The IPv6 half.
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub v6: Option<B>,
}

fn none<T>() -> Option<T> {
    None
}

impl<A, B> Default for DualStack<A, B> {
    fn default() -> Self {
        Self { v4: None, v6: None }
    }
}

impl<A, B> DualStack<A, B> {
    /// Both halves as given.
    pub const fn new(v4: Option<A>, v6: Option<B>) -> Self {
        Self { v4, v6 }
    }

    /// Only the IPv4 half.
    pub const fn v4(v4: A) -> Self {
        Self {
            v4: Some(v4),
            v6: None,
        }
    }

    /// Only the IPv6 half.
    pub const fn v6(v6: B) -> Self {
        Self {
            v4: None,
            v6: Some(v6),
        }
    }

    /// Both halves present.
    pub const fn both(v4: A, v6: B) -> Self {
        Self {
            v4: Some(v4),
            v6: Some(v6),
        }
    }

    /// Whether neither half is present.
    pub const fn is_empty(&self) -> bool {
        self.v4.is_none() && self.v6.is_none()
    }

    /// Whether the half of a family is present.
    pub const fn has(&self, family: Family) -> bool {
        match family {
            Family::V4 => self.v4.is_some(),
            Family::V6 => self.v6.is_some(),
        }
    }

    /// The families that are present, IPv4 first.
    pub fn families(&self) -> impl Iterator<Item = Family> + use<A, B> {
        let present = [self.has(Family::V4), self.has(Family::V6)];
        Family::ALL
            .into_iter()
            .zip(present)
            .filter_map(|(family, has)| has.then_some(family))
    }

    /// Whether both values have the same families present.
    pub fn same_families<C, D>(&self, other: &DualStack<C, D>) -> bool {
        Family::ALL
            .into_iter()
            .all(|family| self.has(family) == other.has(family))
    }
}

impl<T> DualStack<T> {
    /// The half of a family.
    pub const fn get(&self, family: Family) -> Option<&T> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    /// The half of a family, to change it.
    pub const fn get_mut(&mut self, family: Family) -> &mut Option<T> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// Puts a value into the half of a family.
    pub fn set(&mut self, family: Family, value: Option<T>) {
        *self.get_mut(family) = value;
    }

    /// The halves that are present, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = (Family, &T)> {
        Family::ALL
            .into_iter()
            .filter_map(|family| self.get(family).map(|value| (family, value)))
    }

    /// The values that are present, IPv4 first.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.iter().map(|(_, value)| value)
    }

    /// Each present half turned into another value.
    pub fn map<U>(&self, mut f: impl FnMut(Family, &T) -> U) -> DualStack<U> {
        DualStack {
            v4: self.v4.as_ref().map(|value| f(Family::V4, value)),
            v6: self.v6.as_ref().map(|value| f(Family::V6, value)),
        }
    }
}

/// The addresses by which other nodes reach a node on the underlay.
pub type PublicIp = DualStack<Ipv4Addr, Ipv6Addr>;

impl PublicIp {
    /// The address of a family.
    pub fn ip(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.v4.map(IpAddr::V4),
            Family::V6 => self.v6.map(IpAddr::V6),
        }
    }

    /// The addresses that are present, IPv4 first.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + use<> {
        [self.ip(Family::V4), self.ip(Family::V6)]
            .into_iter()
            .flatten()
    }

    /// The addresses in words, IPv4 first; `None` if there is none.
    pub(crate) fn in_words(&self) -> Option<String> {
        let ips: Vec<String> = self.ips().map(|ip| ip.to_string()).collect();
        (!ips.is_empty()).then(|| ips.join(" and "))
    }

    /// Puts an address into the half of its family.
    pub fn set_ip(&mut self, ip: IpAddr) {
        match ip {
            IpAddr::V4(ip) => self.v4 = Some(ip),
            IpAddr::V6(ip) => self.v6 = Some(ip),
        }
    }
}
