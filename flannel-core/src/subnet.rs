//! [`Subnet`]: a canonical CIDR of either family.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::family::{DualStack, Family};

/// Why a text or an address with a length is no subnet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubnetError {
    /// The text is not of the form `address/length`.
    #[error("{text:?} is not a subnet: write it as address/length, such as 10.5.0.0/16")]
    Syntax {
        /// What was given.
        text: String,
    },
    /// The length is longer than an address of the family.
    #[error("prefix length {len} is too long for {family}: at most {}", .family.bits())]
    Length {
        /// The family of the address.
        family: Family,
        /// The length given.
        len: u8,
    },
    /// Bits behind the prefix are set where a network address is required.
    #[error("{ip}/{len} has host bits set: the network address is {network}")]
    HostBits {
        /// The address given.
        ip: IpAddr,
        /// The length given.
        len: u8,
        /// The same with host bits cleared.
        network: Subnet,
    },
    /// A subnet of one family stands where the other is required.
    #[error("{subnet} is not an {family} subnet")]
    Family {
        /// The family required.
        family: Family,
        /// What was given.
        subnet: Subnet,
    },
}

/// A CIDR prefix whose host bits are zero.
///
/// Two subnets are equal exactly when they cover the same addresses; that does not hold for
/// [`IpNetwork`], which keeps host bits and compares them. Parsing clears host bits (as flannel
/// does with its `Network` key); [`Subnet::strict`] refuses them. Ordered by family, then address,
/// then length, so that in a sorted map a subnet stands directly before what it contains.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    family: Family,
    /// The network address as a number, IPv4 in the low 32 bits, highest byte first: in this form the
    /// order of bytes is that of numbers, and a subnet takes 18 bytes where a number would make it 32.
    bits: [u8; 16],
    len: u8,
}

/// The network mask of a length as a number of the family's width.
const fn mask(family: Family, len: u8) -> u128 {
    let host = family.bits() - len;
    let ones = match family {
        Family::V4 => u32::MAX as u128,
        Family::V6 => u128::MAX,
    };
    if host == 128 {
        0
    } else {
        ones & (u128::MAX << host)
    }
}

/// An address as a number: IPv4 in the low 32 bits.
pub(crate) fn ip_to_bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// A number as an address; an IPv4 number is cut to 32 bits.
pub(crate) fn bits_to_ip(family: Family, bits: u128) -> IpAddr {
    match family {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "an IPv4 number has 32 bits"
        )]
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(bits as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(bits)),
    }
}

impl Subnet {
    /// The subnet of the given length that holds an address; host bits are cleared.
    ///
    /// # Errors
    /// [`SubnetError::Length`] if the length is longer than the address.
    pub fn new(ip: impl Into<IpAddr>, len: u8) -> Result<Self, SubnetError> {
        let ip = ip.into();
        let family = Family::of(&ip);
        if len > family.bits() {
            return Err(SubnetError::Length { family, len });
        }
        Ok(Self {
            family,
            bits: (ip_to_bits(ip) & mask(family, len)).to_be_bytes(),
            len,
        })
    }

    /// The subnet of a network address, refusing host bits.
    ///
    /// # Errors
    /// [`SubnetError::Length`] as [`Subnet::new`]; [`SubnetError::HostBits`] if the address is not
    /// the first of its subnet.
    pub fn strict(ip: impl Into<IpAddr>, len: u8) -> Result<Self, SubnetError> {
        let ip = ip.into();
        let network = Self::new(ip, len)?;
        if network.address() == ip {
            Ok(network)
        } else {
            Err(SubnetError::HostBits { ip, len, network })
        }
    }

    /// The subnet that holds nothing but one address.
    pub fn host(ip: impl Into<IpAddr>) -> Self {
        let ip = ip.into();
        let family = Family::of(&ip);
        Self {
            family,
            bits: ip_to_bits(ip).to_be_bytes(),
            len: family.bits(),
        }
    }

    /// A subnet from a number: IPv4 in the low 32 bits. Host bits and a length too long are cut.
    pub(crate) const fn from_bits(family: Family, bits: u128, len: u8) -> Self {
        let len = if len > family.bits() {
            family.bits()
        } else {
            len
        };
        Self {
            family,
            bits: (bits & mask(family, len)).to_be_bytes(),
            len,
        }
    }

    /// The address family.
    pub const fn family(&self) -> Family {
        self.family
    }

    /// The network address: the first of the subnet.
    pub fn address(&self) -> IpAddr {
        bits_to_ip(self.family, self.first_bits())
    }

    /// The prefix length in bits.
    #[allow(
        clippy::len_without_is_empty,
        reason = "the length of a prefix, never of a container"
    )]
    pub const fn len(&self) -> u8 {
        self.len
    }

    /// The last address of the subnet.
    pub fn last_address(&self) -> IpAddr {
        bits_to_ip(self.family, self.last_bits())
    }

    /// The network address as a number.
    pub(crate) const fn first_bits(&self) -> u128 {
        u128::from_be_bytes(self.bits)
    }

    /// The last address as a number.
    pub(crate) const fn last_bits(&self) -> u128 {
        let ones = match self.family {
            Family::V4 => u32::MAX as u128,
            Family::V6 => u128::MAX,
        };
        self.first_bits() | (ones & !mask(self.family, self.len))
    }

    /// The address `n` places behind the network address, if it is still in the subnet.
    pub fn nth(&self, n: u128) -> Option<IpAddr> {
        let bits = self.first_bits().checked_add(n)?;
        (bits <= self.last_bits()).then(|| bits_to_ip(self.family, bits))
    }

    /// Whether an address lies in the subnet.
    pub fn contains_ip(&self, ip: IpAddr) -> bool {
        Family::of(&ip) == self.family
            && ip_to_bits(ip) & mask(self.family, self.len) == self.first_bits()
    }

    /// Whether every address of `other` lies in this subnet.
    pub const fn contains(&self, other: &Self) -> bool {
        self.family as u8 == other.family as u8
            && self.len <= other.len
            && other.first_bits() & mask(self.family, self.len) == self.first_bits()
    }

    /// Whether the two have an address in common.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.contains(other) || other.contains(self)
    }

    /// The subnet of a shorter (or the same) length that holds this one.
    pub const fn supernet(&self, len: u8) -> Option<Self> {
        if len > self.len {
            return None;
        }
        Some(Self {
            family: self.family,
            bits: (self.first_bits() & mask(self.family, len)).to_be_bytes(),
            len,
        })
    }

    /// The subnet behind this one of the same length, if the family has one.
    pub fn next(&self) -> Option<Self> {
        let bits = self.last_bits().checked_add(1)?;
        (self.family == Family::V6 || bits <= u128::from(u32::MAX)).then_some(Self {
            bits: bits.to_be_bytes(),
            ..*self
        })
    }

    /// The subnets of a longer (or the same) length inside this one, in order.
    pub fn subnets(&self, len: u8) -> impl Iterator<Item = Self> + use<> {
        let whole = *self;
        let mut next = (len >= self.len && len <= self.family.bits()).then_some(Self {
            family: self.family,
            bits: self.bits,
            len,
        });
        std::iter::from_fn(move || {
            let current = next?;
            next = current.next().filter(|subnet| whole.contains(subnet));
            Some(current)
        })
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address(), self.len)
    }
}

impl fmt::Debug for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Subnet {
    type Err = SubnetError;

    /// Reads `address/length` and clears host bits. A bare address or a netmask is refused.
    fn from_str(text: &str) -> Result<Self, SubnetError> {
        let syntax = || SubnetError::Syntax {
            text: text.chars().take(64).collect(),
        };
        let (ip, len) = text.split_once('/').ok_or_else(syntax)?;
        let ip: IpAddr = ip.parse().map_err(|_| syntax())?;
        if len.is_empty() || len.len() > 3 || !len.bytes().all(|b| b.is_ascii_digit()) {
            return Err(syntax());
        }
        let len: u16 = len.parse().map_err(|_| syntax())?;
        let len = u8::try_from(len).map_err(|_| SubnetError::Length {
            family: Family::of(&ip),
            len: u8::MAX,
        })?;
        Self::new(ip, len)
    }
}

impl From<IpNetwork> for Subnet {
    /// Clears host bits.
    fn from(network: IpNetwork) -> Self {
        let family = Family::of(&network.ip());
        Self::from_bits(family, ip_to_bits(network.ip()), network.prefix())
    }
}

impl From<Subnet> for IpNetwork {
    fn from(subnet: Subnet) -> Self {
        match subnet.address() {
            IpAddr::V4(ip) => ipnetwork::Ipv4Network::new(ip, subnet.len)
                .map_or_else(|_| Self::from(IpAddr::V4(ip)), Self::V4),
            IpAddr::V6(ip) => ipnetwork::Ipv6Network::new(ip, subnet.len)
                .map_or_else(|_| Self::from(IpAddr::V6(ip)), Self::V6),
        }
    }
}

impl Serialize for Subnet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Subnet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl DualStack<Subnet> {
    /// Each subnet put into the half of its family; the last of a family wins.
    pub fn of_subnets(subnets: impl IntoIterator<Item = Subnet>) -> Self {
        let mut all = Self::default();
        for subnet in subnets {
            all.set(subnet.family(), Some(subnet));
        }
        all
    }

    /// Checks that each half holds a subnet of its own family.
    ///
    /// # Errors
    /// [`SubnetError::Family`] names the half that does not.
    pub fn check_families(&self) -> Result<(), SubnetError> {
        match self
            .iter()
            .find(|(family, subnet)| subnet.family() != *family)
        {
            Some((family, subnet)) => Err(SubnetError::Family {
                family,
                subnet: *subnet,
            }),
            None => Ok(()),
        }
    }

    /// Whether any half overlaps the half of the same family.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.values()
            .any(|mine| other.values().any(|theirs| mine.overlaps(theirs)))
    }
}

impl fmt::Display for DualStack<Subnet> {
    /// The subnets that are present, separated by a comma.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, subnet) in self.values().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            fmt::Display::fmt(subnet, f)?;
        }
        Ok(())
    }
}
