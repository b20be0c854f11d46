//! [`NetworkConfig`]: the network as flannel's JSON describes it, valid by construction.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::family::{DualStack, Family};
use crate::gojson::{Members, Scalar, is_key};
use crate::lease::BackendType;
use crate::reserved;
use crate::subnet::{Subnet, ip_to_bits};

/// Why a network config cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not a JSON object.
    #[error("the network config is not a JSON object: {reason}")]
    Json {
        /// What the parser said.
        reason: String,
    },
    /// A key holds a value that breaks a rule.
    #[error("{key} = {value}: {rule}")]
    Key {
        /// The key, with `Backend.` before a backend's own.
        key: String,
        /// The value, cut to 64 characters; `missing` if there is none.
        value: String,
        /// The rule, and where it helps, the way out.
        rule: String,
    },
}

impl Error {
    /// A key that breaks a rule.
    pub fn key(key: impl Into<String>, value: impl ToString, rule: impl Into<String>) -> Self {
        let value = value.to_string().chars().take(64).collect();
        Self::Key {
            key: key.into(),
            value,
            rule: rule.into(),
        }
    }
}

/// Where a pool's subnets come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolMode {
    /// Our store chooses them (etcd): length, minimum and maximum are derived and checked.
    Allocated,
    /// Someone else assigns them (Kubernetes' pod CIDRs): only the network itself counts.
    Assigned,
}

/// The part of the network of one family: where subnets lie and how long they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    pub(crate) network: Subnet,
    /// The first and the last subnet; `None` where subnets are assigned by someone else.
    pub(crate) range: Option<(Subnet, Subnet)>,
}

impl Pool {
    /// The whole network.
    pub const fn network(&self) -> Subnet {
        self.network
    }

    /// The first and the last subnet to be given out, both of the subnet length; `None` where
    /// subnets are assigned by someone else.
    pub const fn range(&self) -> Option<(Subnet, Subnet)> {
        self.range
    }

    /// The length of a node's subnet; `None` where subnets are assigned by someone else.
    pub const fn subnet_len(&self) -> Option<u8> {
        match self.range {
            Some((first, _)) => Some(first.len()),
            None => None,
        }
    }

    /// Whether a node may hold this subnet under this config: of the right length and in the
    /// range, or inside the network where subnets are assigned.
    pub fn fits(&self, subnet: &Subnet) -> bool {
        match self.range {
            None => self.network.contains(subnet),
            Some((first, last)) => {
                self.network.contains(subnet)
                    && subnet.len() == first.len()
                    && *subnet >= first
                    && *subnet <= last
            }
        }
    }

    /// Whether a peer's subnet may be routed: inside the network, and where subnets are given out
    /// by length, no larger than a quarter of it (flannel refuses configs with fewer than four).
    pub fn admits(&self, subnet: &Subnet) -> bool {
        self.network.contains(subnet)
            && (self.range.is_none() || subnet.len() >= self.network.len().saturating_add(2))
    }

    /// Whether an address lies in the network.
    pub fn contains_ip(&self, ip: IpAddr) -> bool {
        self.network.contains_ip(ip)
    }
}

/// The backend that the config selects, with the backend's own keys.
///
/// A backend reads its keys with [`u32`](Self::u32), [`u64`](Self::u64), [`i64`](Self::i64),
/// [`f64`](Self::f64), [`bool`](Self::bool) and [`string`](Self::string), under the same rules as
/// the config itself, which are Go's: names match without regard to case, of several entries each
/// must be of the kind and the last one counts, `null` says nothing, and a number in quotes is a
/// string.
#[derive(Clone, PartialEq, Eq)]
pub struct BackendConfig {
    backend_type: BackendType,
    /// The members of the `Backend` object in the order of the text, each value as its JSON text.
    members: Arc<[(String, String)]>,
}

impl BackendConfig {
    fn absent() -> Self {
        Self {
            backend_type: BackendType::udp(),
            members: Arc::new([]),
        }
    }

    fn parse(json: &str) -> Result<Self, Error> {
        let no_type = "names no backend: give it a Type, such as {\"Type\": \"vxlan\"}, or leave \
                       Backend out for the type udp";
        if matches!(Scalar::of(json), Scalar::Null) {
            return Err(Error::key("Backend", "null", no_type));
        }
        let members = Members::parse(json).map_err(|_| {
            Error::key(
                "Backend",
                Scalar::of(json).kind(),
                "must be an object such as {\"Type\": \"vxlan\"}",
            )
        })?;
        let mut config = Self::absent();
        config.members = members
            .0
            .into_iter()
            .map(|(key, value)| (key, value.get().to_owned()))
            .collect();
        let name = config.string("Type")?.unwrap_or_default();
        if name.is_empty() {
            return Err(Error::key("Backend.Type", "missing", no_type));
        }
        config.backend_type = BackendType::new(&name)
            .map_err(|error| Error::key("Backend.Type", &name, error.to_string()))?;
        Ok(config)
    }

    /// The selected type.
    pub const fn backend_type(&self) -> &BackendType {
        &self.backend_type
    }

    /// A number among the backend's keys, or the default where the key is missing.
    ///
    /// # Errors
    /// [`Error::Key`] if it is not written as an unsigned integer or lies outside the range (the
    /// default is not held against it).
    pub fn u32(&self, key: &str, default: u32, range: RangeInclusive<u32>) -> Result<u32, Error> {
        let refuse = |json: &str| {
            let (low, high) = (range.start(), range.end());
            let rule = format!("must be a whole number from {low} to {high}");
            Error::key(backend_key(key), json, rule)
        };
        let mut found = None;
        for (json, value) in self.entries(key) {
            let number = value.unsigned().and_then(|n| u32::try_from(n).ok());
            found = Some((json, number.ok_or_else(|| refuse(json))?));
        }
        match found {
            None => Ok(default),
            Some((_, number)) if range.contains(&number) => Ok(number),
            Some((json, _)) => Err(refuse(json)),
        }
    }

    /// A number of any size and sign among the backend's keys; `None` where the key is missing.
    ///
    /// # Errors
    /// [`Error::Key`] if it is not written as an integer or does not fit 64 bits.
    pub fn i64(&self, key: &str) -> Result<Option<i64>, Error> {
        let rule = "must be a whole number of 64 bits";
        self.number(key, rule, |digits| digits.parse().ok())
    }

    /// An unsigned number of any size among the backend's keys; `None` where the key is missing.
    ///
    /// # Errors
    /// [`Error::Key`] if it is not written as an unsigned integer or does not fit 64 bits.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, Error> {
        let rule = "must be a whole number of 64 bits without a sign";
        self.number(key, rule, |digits| digits.parse().ok())
    }

    /// A number with a fraction or exponent among the backend's keys; `None` where the key is
    /// missing.
    ///
    /// # Errors
    /// [`Error::Key`] if it is no number, or too large for 64 bits.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, Error> {
        let finite = |digits: &str| digits.parse().ok().filter(|n: &f64| n.is_finite());
        self.number(key, "must be a number", finite)
    }

    /// The number of a key. As Go does, every entry must be one, and the last one counts.
    fn number<T>(
        &self,
        key: &str,
        rule: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let mut found = None;
        for (json, value) in self.entries(key) {
            let number = match &value {
                Scalar::Number(digits) => parse(digits),
                Scalar::Null | Scalar::Bool(_) | Scalar::Text(_) | Scalar::Other => None,
            };
            // What is no number may be a secret under a wrong key.
            let shown = match value {
                Scalar::Number(_) => json,
                Scalar::Null | Scalar::Bool(_) | Scalar::Text(_) | Scalar::Other => value.kind(),
            };
            found = Some(number.ok_or_else(|| Error::key(backend_key(key), shown, rule))?);
        }
        Ok(found)
    }

    /// A switch among the backend's keys, or the default where the key is missing.
    ///
    /// # Errors
    /// [`Error::Key`] if it is neither `true` nor `false`.
    pub fn bool(&self, key: &str, default: bool) -> Result<bool, Error> {
        let mut found = default;
        for (json, value) in self.entries(key) {
            found = boolean(&backend_key(key), json, &value)?;
        }
        Ok(found)
    }

    /// A text among the backend's keys. It may be a secret: no error repeats it.
    ///
    /// # Errors
    /// [`Error::Key`] if it is not a string.
    pub fn string(&self, key: &str) -> Result<Option<String>, Error> {
        let mut found = None;
        for (_, value) in self.entries(key) {
            match value {
                Scalar::Text(text) => found = Some(text),
                other => {
                    return Err(Error::key(
                        backend_key(key),
                        other.kind(),
                        "must be a string",
                    ));
                }
            }
        }
        Ok(found)
    }

    /// The entries of one key that say something, in the order of the text.
    fn entries(&self, key: &str) -> impl Iterator<Item = (&str, Scalar)> {
        self.members
            .iter()
            .filter(move |(name, _)| is_key(name, key))
            .map(|(_, json)| (json.as_str(), Scalar::of(json)))
            .filter(|(_, value)| !matches!(value, Scalar::Null))
    }
}

fn backend_key(key: &str) -> String {
    format!("Backend.{key}")
}

impl fmt::Debug for BackendConfig {
    /// The type and the names of the keys; their values may be secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys: Vec<&str> = self.members.iter().map(|(key, _)| key.as_str()).collect();
        f.debug_struct("BackendConfig")
            .field("backend_type", &self.backend_type)
            .field("keys", &keys)
            .finish_non_exhaustive()
    }
}

/// The network: pools, firewall mode and backend.
///
/// Read from flannel's JSON with flannel's own keys, defaults and checks:
///
/// ```
/// use flannel_core::{NetworkConfig, PoolMode};
///
/// let config = NetworkConfig::from_json(
///     r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": 5}}"#,
///     PoolMode::Allocated,
/// )?;
/// let pool = config.pools().v4.expect("IPv4 is on by default");
/// assert_eq!(pool.subnet_len(), Some(24));
/// assert_eq!(config.backend().u32("VNI", 1, 0..=0xff_ffff)?, 5);
/// # Ok::<(), flannel_core::config::Error>(())
/// ```
///
/// Stricter than Go flannel in five places, where Go accepts what can never work: an IPv4 value
/// under an IPv6 key, a `SubnetMin` behind `SubnetMax`, both families off, a missing network of
/// an enabled family also where subnets are assigned, and a network in a reserved range (0.0.0.0/8,
/// 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4; `::/8`, `fe80::/10`, `ff00::/8`).
#[derive(Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    pools: DualStack<Pool>,
    nftables: bool,
    backend: BackendConfig,
    /// The text it was read from, for saving and comparing.
    text: Arc<str>,
    mode: PoolMode,
}

impl NetworkConfig {
    /// The longest config text, in bytes. Real ones have a few hundred.
    pub const MAX_LEN: usize = 64 * 1024;

    /// Reads flannel's network config.
    ///
    /// # Errors
    /// [`Error::Json`] if the text is no JSON object or too long, [`Error::Key`] for the first key
    /// found that breaks a rule.
    pub fn from_json(text: &str, mode: PoolMode) -> Result<Self, Error> {
        if text.len() > Self::MAX_LEN {
            let (len, max) = (text.len(), Self::MAX_LEN);
            return Err(Error::Json {
                reason: format!("it has {len} bytes, more than the {max} that are accepted"),
            });
        }
        if text.starts_with('\u{feff}') {
            return Err(Error::Json {
                reason: "it begins with a byte-order mark (U+FEFF): save it as UTF-8 without one"
                    .to_owned(),
            });
        }
        let members = Members::parse(text).map_err(|error| Error::Json {
            reason: error.to_string(),
        })?;
        let mut draft = Draft::default();
        for (key, value) in members.0 {
            draft.read(&key, value.get())?;
        }
        let mut pools = DualStack::default();
        for (names, family) in [(&V4, &draft.v4), (&V6, &draft.v6)] {
            if family.enabled {
                pools.set(names.family, Some(family.pool(names, mode)?));
            }
        }
        if pools.is_empty() {
            return Err(Error::key(
                "EnableIPv4",
                false,
                "must be true unless EnableIPv6 is: a network needs a family",
            ));
        }
        Ok(Self {
            pools,
            nftables: draft.nftables,
            backend: match draft.backend {
                Some(json) => BackendConfig::parse(&json)?,
                None => BackendConfig::absent(),
            },
            text: text.into(),
            mode,
        })
    }

    /// The pools of the families that are on.
    pub const fn pools(&self) -> &DualStack<Pool> {
        &self.pools
    }

    /// Whether a node may hold these subnets under this config: one for each family, each of which
    /// [fits](Pool::fits) its pool.
    pub fn fits(&self, subnets: &DualStack<Subnet>) -> bool {
        let fits = |(family, pool): (Family, &Pool)| {
            subnets.get(family).is_some_and(|subnet| pool.fits(subnet))
        };
        self.pools.same_families(subnets) && self.pools.iter().all(fits)
    }

    /// The families that are on, IPv4 first.
    pub fn families(&self) -> impl Iterator<Item = Family> + use<> {
        self.pools.families()
    }

    /// Whether traffic rules go into nftables instead of iptables.
    pub const fn nftables(&self) -> bool {
        self.nftables
    }

    /// The backend and its keys.
    pub const fn backend(&self) -> &BackendConfig {
        &self.backend
    }

    /// The text it was read from. May hold secrets (a backend's pre-shared key).
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Where the subnets come from.
    pub const fn mode(&self) -> PoolMode {
        self.mode
    }
}

impl fmt::Debug for NetworkConfig {
    /// All but the text, which may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetworkConfig")
            .field("pools", &self.pools)
            .field("nftables", &self.nftables)
            .field("backend", &self.backend)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

/// How flannel spells the keys of one family.
struct Names {
    family: Family,
    enable: &'static str,
    network: &'static str,
    len: &'static str,
    min: &'static str,
    max: &'static str,
    example: &'static str,
}

const V4: Names = Names {
    family: Family::V4,
    enable: "EnableIPv4",
    network: "Network",
    len: "SubnetLen",
    min: "SubnetMin",
    max: "SubnetMax",
    example: "10.5.0.0/16",
};

const V6: Names = Names {
    family: Family::V6,
    enable: "EnableIPv6",
    network: "IPv6Network",
    len: "IPv6SubnetLen",
    min: "IPv6SubnetMin",
    max: "IPv6SubnetMax",
    example: "fd00:5::/48",
};

/// What the text says, before anything is derived from it.
struct Draft {
    v4: FamilyDraft,
    v6: FamilyDraft,
    nftables: bool,
    backend: Option<String>,
}

impl Default for Draft {
    fn default() -> Self {
        Self {
            v4: FamilyDraft {
                enabled: true,
                ..FamilyDraft::default()
            },
            v6: FamilyDraft::default(),
            nftables: false,
            backend: None,
        }
    }
}

impl Draft {
    /// Takes one member of the config; a later one of the same key replaces it.
    fn read(&mut self, key: &str, json: &str) -> Result<(), Error> {
        if is_key(key, "EnableNFTables") {
            if let Some(value) = given(json) {
                self.nftables = boolean("EnableNFTables", json, &value)?;
            }
        } else if is_key(key, "Backend") {
            self.backend = Some(json.to_owned());
        } else {
            self.v4.read(&V4, key, json)?;
            self.v6.read(&V6, key, json)?;
        }
        Ok(())
    }
}

/// The part of the text that belongs to one family.
#[derive(Default)]
struct FamilyDraft {
    enabled: bool,
    network: Option<Subnet>,
    /// Zero: not given.
    len: u64,
    min: Option<IpAddr>,
    max: Option<IpAddr>,
}

impl FamilyDraft {
    fn read(&mut self, names: &Names, key: &str, json: &str) -> Result<(), Error> {
        if is_key(key, names.enable) {
            if let Some(value) = given(json) {
                self.enabled = boolean(names.enable, json, &value)?;
            }
        } else if is_key(key, names.network) {
            self.network = names.network(json)?;
        } else if is_key(key, names.len) {
            if let Some(value) = given(json) {
                self.len = value.unsigned().ok_or_else(|| {
                    Error::key(
                        names.len,
                        json,
                        "must be a whole number, without point, exponent or quotes",
                    )
                })?;
            }
        } else if is_key(key, names.min) {
            self.min = names.bound(names.min, json)?;
        } else if is_key(key, names.max) {
            self.max = names.bound(names.max, json)?;
        }
        Ok(())
    }

    /// The pool with everything that was not given derived, and all of it checked.
    fn pool(&self, names: &Names, mode: PoolMode) -> Result<Pool, Error> {
        let network = self.network.ok_or_else(|| {
            let (family, example, enable) = (names.family, names.example, names.enable);
            Error::key(
                names.network,
                "missing",
                format!("must be an {family} network such as {example}, unless {enable} is false"),
            )
        })?;
        if let Some((range, what)) = reserved::around(&network) {
            let rule = format!(
                "{range} {what}: choose another network, such as {}",
                names.example
            );
            return Err(Error::key(names.network, network, rule));
        }
        let range = match mode {
            PoolMode::Assigned => None,
            PoolMode::Allocated => Some(self.range(names, network)?),
        };
        Ok(Pool { network, range })
    }

    /// The first and the last subnet to be given out.
    fn range(&self, names: &Names, network: Subnet) -> Result<(Subnet, Subnet), Error> {
        let len = self.subnet_len(names, network)?;
        let outside = |key, ip| Error::key(key, ip, format!("must lie in the network {network}"));
        let unaligned = |key, ip, subnet: Subnet| {
            let start = subnet.address();
            Error::key(
                key,
                ip,
                format!("must be the start of a /{len} subnet, such as {start}"),
            )
        };
        let whole = Subnet::from_bits(network.family(), network.first_bits(), len);
        // The first subnet is left out unless asked for, as flannel does.
        let min = self
            .min
            .or_else(|| whole.next().map(|second| second.address()));
        let min = min.unwrap_or_else(|| whole.address());
        if !network.contains_ip(min) {
            return Err(outside(names.min, min));
        }
        let max = self.max.unwrap_or_else(|| {
            Subnet::from_bits(network.family(), network.last_bits(), len).address()
        });
        if !network.contains_ip(max) {
            return Err(outside(names.max, max));
        }
        let mut ends = [whole; 2];
        for ((key, ip), end) in [(names.min, min), (names.max, max)]
            .into_iter()
            .zip(&mut ends)
        {
            *end = Subnet::from_bits(network.family(), ip_to_bits(ip), len);
            if end.address() != ip {
                return Err(unaligned(key, ip, *end));
            }
        }
        let [first, last] = ends;
        if first > last {
            return Err(Error::key(
                names.min,
                min,
                format!(
                    "must not lie behind {} ({max}): no subnet would be left",
                    names.max
                ),
            ));
        }
        Ok((first, last))
    }

    /// The length of a node's subnet: as given, or flannel's usual one, or a quarter of a network
    /// too small for that.
    fn subnet_len(&self, names: &Names, network: Subnet) -> Result<u8, Error> {
        let (longest, usual) = match names.family {
            Family::V4 => (30, 24),
            Family::V6 => (126, 64),
        };
        let quarter = network.len().saturating_add(2);
        if self.len == 0 {
            if quarter.saturating_add(2) > names.family.bits() {
                return Err(Error::key(
                    names.network,
                    network,
                    format!("is too small: use a /{} or larger", names.family.bits() - 4),
                ));
            }
            return Ok(quarter.max(usual));
        }
        let refuse = |rule| Err(Error::key(names.len, self.len, rule));
        match u8::try_from(self.len) {
            Ok(len) if len > longest => refuse(format!("must be at most {longest}")),
            Err(_) => refuse(format!("must be at most {longest}")),
            Ok(len) if len < quarter => refuse(format!(
                "must be at least {quarter}, so that the network {network} holds four subnets"
            )),
            Ok(len) => Ok(len),
        }
    }
}

impl Names {
    /// The value of the network key. A network of all addresses is as good as none.
    fn network(&self, json: &str) -> Result<Option<Subnet>, Error> {
        let subnet = match Scalar::of(json) {
            Scalar::Text(text) => text.parse::<Subnet>().ok(),
            _ => None,
        };
        match subnet.filter(|subnet| subnet.family() == self.family) {
            Some(subnet) => Ok((subnet.len() > 0).then_some(subnet)),
            None => Err(Error::key(
                self.network,
                json,
                format!(
                    "must be an {} network such as {}",
                    self.family, self.example
                ),
            )),
        }
    }

    /// The value of one end of the range. The unspecified address means that none is given, and so
    /// does `null`, but only for IPv6.
    fn bound(&self, key: &str, json: &str) -> Result<Option<IpAddr>, Error> {
        let ip = match Scalar::of(json) {
            Scalar::Null if self.family == Family::V6 => return Ok(None),
            Scalar::Text(text) => match self.family {
                Family::V4 => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
                Family::V6 => text.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            },
            _ => None,
        };
        match ip {
            Some(ip) => Ok((!ip.is_unspecified()).then_some(ip)),
            None => Err(Error::key(
                key,
                json,
                format!("must be an {} address", self.family),
            )),
        }
    }
}

/// A value, unless it is `null`, which leaves what an earlier entry said.
fn given(json: &str) -> Option<Scalar> {
    Some(Scalar::of(json)).filter(|value| !matches!(value, Scalar::Null))
}

fn boolean(key: &str, json: &str, value: &Scalar) -> Result<bool, Error> {
    match value {
        Scalar::Bool(yes) => Ok(*yes),
        _ => Err(Error::key(
            key,
            json,
            "must be true or false, without quotes",
        )),
    }
}
