//! The identity of a node: [`NodeId`], the machine behind it ([`InstanceId`]), and the name of the overlay it
//! belongs to.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Nothing, or more than is allowed.
    #[error("{what} must have 1 to {max} characters, not {len}")]
    Length {
        /// What the text was to name.
        what: &'static str,
        /// The longest that is allowed, in bytes.
        max: usize,
        /// The length given, in bytes.
        len: usize,
    },
    /// Another length than the only one there is.
    #[error("{what} must have {len} characters, not {found}")]
    ExactLength {
        /// The thing that the text was to name.
        what: &'static str,
        /// The length that it must have, in bytes.
        len: usize,
        /// The length given, in bytes.
        found: usize,
    },
    /// A character that is not allowed.
    #[error("{what} {text:?} may hold only {allowed}")]
    Character {
        /// What the text was to name.
        what: &'static str,
        /// The text given, cut to 64 characters.
        text: String,
        /// The characters that are allowed, in words.
        allowed: &'static str,
    },
}

/// The stable identity of a node: chosen by the host program, kept over restarts and changes of
/// address (a machine id, a Kubernetes node name, a UUID).
///
/// 1 to 253 characters out of ASCII letters, digits and `-_.:`. A record that Go flannel wrote
/// carries no node id; its identity is then derived from the public address
/// ([`NodeId::from_public_ip`]) and holds a character that no chosen id can hold.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// The longest node id, in bytes (that of a DNS name).
    pub const MAX_LEN: usize = 253;

    /// A node id chosen by the host program.
    ///
    /// # Errors
    /// [`NameError`] if the text is empty, too long or holds another character.
    pub fn new(id: impl AsRef<str>) -> Result<Self, NameError> {
        let id = id.as_ref();
        check_name(
            "the node id",
            id,
            Self::MAX_LEN,
            "letters, digits and -_.:",
            |b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b),
        )?;
        Ok(Self(id.into()))
    }

    /// The identity of a node that published no id: derived from its public address.
    pub fn from_public_ip(ip: IpAddr) -> Self {
        Self(format!("ip={ip}").into())
    }

    /// Whether this id was derived from a public address.
    pub fn is_derived(&self) -> bool {
        self.0.starts_with("ip=")
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Checks a name's length in bytes and its characters.
pub(crate) fn check_name(
    what: &'static str,
    text: &str,
    max: usize,
    allowed: &'static str,
    ok: impl Fn(u8) -> bool,
) -> Result<(), NameError> {
    if text.is_empty() || text.len() > max {
        return Err(NameError::Length {
            what,
            max,
            len: text.len(),
        });
    }
    if !text.bytes().all(ok) {
        return Err(NameError::Character {
            what,
            text: text.chars().take(64).collect(),
            allowed,
        });
    }
    Ok(())
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({})", self.0)
    }
}

impl FromStr for NodeId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl Borrow<str> for NodeId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl Serialize for NodeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for NodeId {
    /// Accepts chosen and derived ids.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.strip_prefix("ip=").and_then(|ip| ip.parse().ok()) {
            Some(ip) => Ok(Self::from_public_ip(ip)),
            None => Self::new(&text).map_err(serde::de::Error::custom),
        }
    }
}

/// The machine that acts under a [`NodeId`]: made at random once, and kept with the saved state.
///
/// Two machines of one host name have one node id and two instances; that is how they find out. Its
/// text has 32 lower-case hexadecimal digits, as that of a machine id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId([u8; 16]);

impl InstanceId {
    /// The instance of these 128 bits, which no other machine must have.
    pub const fn from_bits(bits: u128) -> Self {
        Self(bits.to_be_bytes())
    }

    /// A new one, from the entropy that the standard library's maps are seeded with.
    pub fn random() -> Self {
        Self::from_halves(|| RandomState::new().build_hasher().finish())
    }

    /// A new one, of two draws.
    pub(crate) fn from_halves(mut draw: impl FnMut() -> u64) -> Self {
        let mut half = || u128::from(draw());
        Self::from_bits(half() << 64 | half())
    }

    /// An instance id as it is written; digits may be in either case.
    ///
    /// # Errors
    /// [`NameError`] if the text has not 32 hexadecimal digits.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        const WHAT: &str = "the instance id";
        const LEN: usize = 32;
        if text.len() != LEN {
            return Err(NameError::ExactLength {
                what: WHAT,
                len: LEN,
                found: text.len(),
            });
        }
        check_name(WHAT, text, LEN, "hexadecimal digits", |b| {
            b.is_ascii_hexdigit()
        })?;
        let bits = u128::from_str_radix(text, 16).unwrap_or_default();
        Ok(Self::from_bits(bits))
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InstanceId({self})")
    }
}

impl FromStr for InstanceId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

impl Serialize for InstanceId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for InstanceId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// The name of one overlay on a host, so that several can live side by side.
///
/// It goes into the alias of every device that we make (`flannel:<name>`) and into the ids of our
/// nexthop objects: that is how a fresh process knows what is its own. 1 to 32 characters out of
/// ASCII letters, digits and `-_.`; the default is `flannel`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct OverlayName(Arc<str>);

impl OverlayName {
    /// The longest name, in bytes.
    pub const MAX_LEN: usize = 32;

    /// A name chosen by the host program.
    ///
    /// # Errors
    /// [`NameError`] if the text is empty, too long or holds another character.
    pub fn new(name: impl AsRef<str>) -> Result<Self, NameError> {
        let name = name.as_ref();
        check_name(
            "the overlay name",
            name,
            Self::MAX_LEN,
            "letters, digits and -_.",
            |b| b.is_ascii_alphanumeric() || b"-_.".contains(&b),
        )?;
        Ok(Self(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The alias that marks a device as belonging to this overlay.
    pub fn link_alias(&self) -> String {
        format!("flannel:{}", self.0)
    }
}

impl Default for OverlayName {
    fn default() -> Self {
        Self("flannel".into())
    }
}

impl fmt::Display for OverlayName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for OverlayName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OverlayName({})", self.0)
    }
}
