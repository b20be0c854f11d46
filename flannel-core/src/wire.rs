//! Flannel's stored forms: the value and the key of a lease in etcd (v3).
//!
//! A lease's **value** is a JSON object with the members `PublicIP`, `PublicIPv6`, `BackendType`,
//! `BackendData` and `BackendV6Data`; we write the same bytes as Go flannel. A node with an id of
//! its own adds two last members, `NodeID` and the `Instance` behind it, which Go flannel ignores. We
//! read what Go's decoder reads
//! (any order and case of names, unknown and missing members), within a bound.
//!
//! A lease's **key** names its subnets: `10.5.1.0-24`, or `10.5.1.0-24&fd00:5:0:1::-64`. We never
//! write a key that a Go node cannot read, because such a key makes it drop every route it has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::family::{DualStack, Family, PublicIp};
use crate::gojson::{Members, Scalar, is_key};
use crate::lease::{BackendData, BackendType, LeaseAttrs};
use crate::node::{InstanceId, NodeId};
use crate::subnet::Subnet;

/// The longest lease value that is read, in bytes. Flannel's own have under 500.
pub const MAX_VALUE_LEN: usize = 64 * 1024;

/// The longest lease key that is read, in bytes. Flannel's own have under 100.
pub const MAX_KEY_LEN: usize = 1024;

/// Why a stored form cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// More bytes than are accepted.
    #[error("the {what} has {len} bytes, more than the {max} that are accepted")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The longest accepted, in bytes.
        max: usize,
    },
    /// The value is not a JSON object.
    #[error("the lease value is not a JSON object: {reason}")]
    Json {
        /// What the parser said.
        reason: String,
    },
    /// A member of the value breaks a rule.
    #[error("{name} = {value}: {rule}")]
    Member {
        /// The member, as flannel spells it.
        name: &'static str,
        /// What it holds, cut to 64 characters.
        value: String,
        /// The rule.
        rule: String,
    },
    /// The record has neither a node id nor an address to derive one from.
    #[error("the record does not say whose it is: it needs a PublicIP, a PublicIPv6 or a NodeID")]
    NoIdentity,
    /// The node's id is derived from an address, and the value would be read as another node's.
    #[error("node {node} cannot publish {}: give it an id of its own", addresses(.public_ip))]
    Identity {
        /// The node.
        node: NodeId,
        /// The addresses that the value would carry.
        public_ip: PublicIp,
    },
    /// The subnets have no key that Go flannel can read.
    #[error("subnet {subnets} cannot be written as a flannel key: {rule}")]
    Unwritable {
        /// The subnets, separated by a comma.
        subnets: String,
        /// The rule.
        rule: &'static str,
    },
    /// The key names no subnet.
    #[error("{key:?} is no lease key: {rule}")]
    Key {
        /// The key, cut to 64 characters.
        key: String,
        /// The rule.
        rule: String,
    },
}

impl Error {
    fn member(name: &'static str, value: &str, rule: impl Into<String>) -> Self {
        Self::Member {
            name,
            value: value.chars().take(64).collect(),
            rule: rule.into(),
        }
    }
}

fn addresses(public_ip: &PublicIp) -> String {
    let words = public_ip.in_words();
    words.unwrap_or_else(|| "no address".to_owned())
}

/// What a lease's value says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LeaseRecord {
    /// What the node publishes.
    pub attrs: LeaseAttrs,
    /// The id the node chose; `None` in a record of Go flannel.
    pub node: Option<NodeId>,
    /// The machine that wrote it; `None` in a record of Go flannel.
    pub instance: Option<InstanceId>,
}

impl LeaseRecord {
    /// The node that the record belongs to: the id it carries, else one derived from its public
    /// address, IPv4 before IPv6.
    ///
    /// # Errors
    /// [`Error::NoIdentity`] if it has neither.
    pub fn node_id(&self) -> Result<NodeId, Error> {
        self.node
            .clone()
            .or_else(|| derived_id(&self.attrs.public_ip))
            .ok_or(Error::NoIdentity)
    }
}

fn derived_id(public_ip: &PublicIp) -> Option<NodeId> {
    public_ip.ips().next().map(NodeId::from_public_ip)
}

/// The value of a node's lease, byte for byte as Go flannel writes it; an id that the node chose
/// follows as one more member, and the machine's behind it as another. Where the id is derived from
/// an address, the address says which machine it is, and there is no more member.
///
/// # Errors
/// [`Error::Member`] for what would be read back as something else, [`Error::Identity`] if the id
/// is a derived one and not that of these addresses.
pub fn lease_value(
    node: &NodeId,
    instance: Option<InstanceId>,
    attrs: &LeaseAttrs,
) -> Result<String, Error> {
    let public_ip = attrs.public_ip;
    if node.is_derived() && derived_id(&public_ip).as_ref() != Some(node) {
        return Err(Error::Identity {
            node: node.clone(),
            public_ip,
        });
    }
    let v4 = public_ip.v4.unwrap_or(Ipv4Addr::UNSPECIFIED);
    let v6 = match public_ip.v6 {
        None => "null".to_owned(),
        Some(ip) => format!("\"{}\"", public_ipv6_text(ip)?),
    };
    let mut value = format!("{{\"PublicIP\":\"{v4}\",\"PublicIPv6\":{v6}");
    if let Some(backend_type) = &attrs.backend_type {
        value += &format!(",\"BackendType\":\"{backend_type}\"");
    }
    for (family, data) in attrs.backend_data.iter() {
        let (name, data) = (data_name(family), html_escaped(data.as_json()));
        if data.len() > BackendData::MAX_LEN {
            return Err(Error::TooLong {
                what: name,
                len: data.len(),
                max: BackendData::MAX_LEN,
            });
        }
        value += &format!(",\"{name}\":{data}");
    }
    if !node.is_derived() {
        value += &format!(",\"NodeID\":\"{node}\"");
        if let Some(instance) = instance {
            value += &format!(",\"Instance\":\"{instance}\"");
        }
    }
    value.push('}');
    Ok(value)
}

const fn data_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "BackendData",
        Family::V6 => "BackendV6Data",
    }
}

/// Reads the value of a lease as Go flannel does.
///
/// A `NodeID` or an `Instance` that is no valid id is an error and not ignored: without it the record
/// would pass for that of the node whose address it names, which anyone can write.
///
/// # Errors
/// [`Error::TooLong`], [`Error::Json`], or [`Error::Member`] for the first member found that
/// breaks a rule. A record with an error is there all the same: it counts neither as a lease nor
/// as deleted.
pub fn parse_lease_value(value: &[u8]) -> Result<LeaseRecord, Error> {
    if value.len() > MAX_VALUE_LEN {
        return Err(Error::TooLong {
            what: "lease value",
            len: value.len(),
            max: MAX_VALUE_LEN,
        });
    }
    // As Go: bytes that are no text become U+FFFD inside strings, and are an error outside.
    let text = String::from_utf8_lossy(value);
    let members = Members::parse(&text).map_err(|error| Error::Json {
        reason: error.to_string(),
    })?;
    let mut record = LeaseRecord::default();
    for (key, value) in members.0 {
        record.read(&key, value.get())?;
    }
    // Without an id of its own a node is its address, and so is the machine.
    record.instance = record.instance.filter(|_| record.node.is_some());
    Ok(record)
}

impl LeaseRecord {
    /// Takes one member; a later one of the same name replaces it.
    fn read(&mut self, key: &str, json: &str) -> Result<(), Error> {
        let attrs = &mut self.attrs;
        if is_key(key, "PublicIP") {
            let ip = match Scalar::of(json) {
                Scalar::Text(text) => text.parse::<Ipv4Addr>().ok(),
                _ => None,
            };
            let ip =
                ip.ok_or_else(|| Error::member("PublicIP", json, "must be an IPv4 address"))?;
            attrs.public_ip.v4 = (!ip.is_unspecified()).then_some(ip);
        } else if is_key(key, "PublicIPv6") {
            let ip = match Scalar::of(json) {
                Scalar::Null => Ipv6Addr::UNSPECIFIED,
                Scalar::Text(text) => ipv6_from_text(&text).ok_or_else(|| {
                    Error::member("PublicIPv6", json, "must be an IPv6 address or null")
                })?,
                _ => {
                    let rule = "must be an IPv6 address or null";
                    return Err(Error::member("PublicIPv6", json, rule));
                }
            };
            attrs.public_ip.v6 = (!ip.is_unspecified()).then_some(ip);
        } else if is_key(key, "BackendType") {
            if let Some(name) = text_member("BackendType", json)? {
                attrs.backend_type =
                    match name.as_str() {
                        "" => None,
                        name => Some(BackendType::new(name).map_err(|error| {
                            Error::member("BackendType", json, error.to_string())
                        })?),
                    };
            }
        } else if is_key(key, "NodeID") {
            if let Some(id) = text_member("NodeID", json)? {
                let id = NodeId::new(id)
                    .map_err(|error| Error::member("NodeID", json, error.to_string()))?;
                self.node = Some(id);
            }
        } else if is_key(key, "Instance") {
            if let Some(id) = text_member("Instance", json)? {
                let id = InstanceId::parse(&id)
                    .map_err(|error| Error::member("Instance", json, error.to_string()))?;
                self.instance = Some(id);
            }
        } else {
            for family in Family::ALL {
                let name = data_name(family);
                if is_key(key, name) {
                    // No error repeats it: some backends publish much, and it is theirs to judge.
                    let data = BackendData::from_json(json)
                        .map_err(|error| Error::member(name, "…", error.to_string()))?;
                    attrs.backend_data.set(family, Some(data));
                }
            }
        }
        Ok(())
    }
}

/// A member that is a string; `null` leaves what an earlier one said.
fn text_member(name: &'static str, json: &str) -> Result<Option<String>, Error> {
    match Scalar::of(json) {
        Scalar::Null => Ok(None),
        Scalar::Text(text) => Ok(Some(text)),
        _ => Err(Error::member(name, json, "must be a string")),
    }
}

/// Go's JSON writer makes the text safe inside HTML, also within raw values that it copies. In
/// JSON these characters stand only inside strings.
fn html_escaped(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                out += &format!("\\u{:04x}", u32::from(c));
            }
            _ => out.push(c),
        }
    }
    out
}

/// A public IPv6 address as flannel writes it. What it writes in dotted form is read back as
/// `::ffff:a.b.c.d`, so another address of that form must not be written.
fn public_ipv6_text(ip: Ipv6Addr) -> Result<String, Error> {
    let text = ipv6_text(ip);
    if ip.is_unspecified() || ipv6_from_text(&text) != Some(ip) {
        let rule = "is no address at which a peer can reach the node";
        return Err(Error::member("PublicIPv6", &ip.to_string(), rule));
    }
    Ok(text)
}

/// The text of an IPv6 address as Go flannel prints it: like everybody, except that an
/// IPv4-mapped address, and any from `::100:0` to `::ffff:ffff`, shows only its last 32 bits as an
/// IPv4 address.
fn ipv6_text(ip: Ipv6Addr) -> String {
    let bits = ip.to_bits();
    let compatible = (0x0100_0000..=u128::from(u32::MAX)).contains(&bits);
    match ip.to_ipv4_mapped() {
        Some(v4) => v4.to_string(),
        None if compatible => {
            let [.., a, b, c, d] = ip.octets();
            Ipv4Addr::new(a, b, c, d).to_string()
        }
        None => ip.to_string(),
    }
}

/// An IPv6 address as Go flannel reads it: an IPv4 address becomes IPv4-mapped.
fn ipv6_from_text(text: &str) -> Option<Ipv6Addr> {
    match text.parse().ok()? {
        IpAddr::V4(ip) => Some(ip.to_ipv6_mapped()),
        IpAddr::V6(ip) => Some(ip),
    }
}

/// The longest IPv4 subnet in a key: Go flannel reads the length as five bits.
const MAX_V4_LEN: u8 = 31;
/// The longest IPv6 subnet in a key: Go flannel reads the length as seven bits.
const MAX_V6_LEN: u8 = 127;

/// The last part of the key of a lease: `10.5.1.0-24`, or `10.5.1.0-24&fd00:5:0:1::-64`.
///
/// # Errors
/// [`Error::Unwritable`] if there is no such key that Go flannel reads as these subnets. There is
/// none without IPv4: Go's own form for it makes every node the owner of every lease.
pub fn subnet_key(subnets: &DualStack<Subnet>) -> Result<String, Error> {
    let refuse = |rule| {
        Err(Error::Unwritable {
            subnets: subnets.to_string(),
            rule,
        })
    };
    if subnets.check_families().is_err() {
        return refuse("each half must be of its own family");
    }
    let Some(v4) = subnets.v4 else {
        return refuse("a key begins with an IPv4 subnet");
    };
    if !(1..=MAX_V4_LEN).contains(&v4.len()) {
        return refuse("the length of an IPv4 subnet must be 1 to 31");
    }
    let mut key = format!("{}-{}", v4.address(), v4.len());
    if let Some(v6) = subnets.v6 {
        let IpAddr::V6(ip) = v6.address() else {
            return refuse("each half must be of its own family");
        };
        if !(1..=MAX_V6_LEN).contains(&v6.len()) {
            return refuse("the length of an IPv6 subnet must be 1 to 127");
        }
        let text = ipv6_text(ip);
        if text.contains('.') {
            return refuse("flannel writes this IPv6 address as an IPv4 address");
        }
        key += &format!("&{text}-{}", v6.len());
    }
    Ok(key)
}

/// Reads the subnets that a lease's key names.
///
/// As Go flannel does, it looks only at the end of the key, so that a prefix (or any junk) before
/// the IPv4 address is no hindrance: what counts as a lease for a Go node must count as taken for
/// us. Unlike it, it refuses host bits and the empty network `0.0.0.0/0`.
///
/// # Errors
/// [`Error::TooLong`] or [`Error::Key`].
pub fn parse_subnet_key(key: &str) -> Result<DualStack<Subnet>, Error> {
    if key.len() > MAX_KEY_LEN {
        return Err(Error::TooLong {
            what: "lease key",
            len: key.len(),
            max: MAX_KEY_LEN,
        });
    }
    let refuse = |rule: String| Error::Key {
        key: key.chars().take(64).collect(),
        rule,
    };
    let (head, v6) = match key.rsplit_once('&') {
        Some((head, tail)) => match split_v6(tail) {
            Some(v6) => (head, Some(v6)),
            None => (key, None),
        },
        None => (key, None),
    };
    let (ip, len) = split_v4(head).ok_or_else(|| {
        refuse("it must end in address-length, or in that, & and the same for IPv6".to_owned())
    })?;
    let v4 = key_subnet::<Ipv4Addr>(ip, len, MAX_V4_LEN).map_err(refuse)?;
    let v6 = v6
        .map(|(ip, len)| key_subnet::<Ipv6Addr>(ip, len, MAX_V6_LEN))
        .transpose()
        .map_err(refuse)?;
    Ok(DualStack { v4: Some(v4), v6 })
}

/// The address and the length of `…d.d.d.d-n`.
fn split_v4(text: &str) -> Option<(&str, &str)> {
    let (head, len) = text.rsplit_once('-').filter(|(_, len)| is_digits(len))?;
    let start = head
        .rfind(|c: char| c != '.' && !c.is_ascii_digit())
        .and_then(|at| head[at..].chars().next().map(|c| at + c.len_utf8()))
        .unwrap_or(0);
    let dotted = &head[start..];
    let fourth_dot = dotted
        .rmatch_indices('.')
        .nth(3)
        .map_or(0, |(at, _)| at + 1);
    Some((&dotted[fourth_dot..], len))
}

/// The address and the length of `x:y::z-n`, which must be all of the text.
fn split_v6(text: &str) -> Option<(&str, &str)> {
    let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b) || b == b':';
    text.split_once('-')
        .filter(|(ip, len)| !ip.is_empty() && ip.bytes().all(lower_hex) && is_digits(len))
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// The subnet of an address and a length as they stand in a key.
fn key_subnet<A>(ip: &str, len: &str, max: u8) -> Result<Subnet, String>
where
    A: std::str::FromStr + Into<IpAddr>,
{
    let ip: IpAddr = ip
        .parse::<A>()
        .map_err(|_| format!("{ip} is no address"))?
        .into();
    let len = len
        .parse::<u8>()
        .ok()
        .filter(|len| *len <= max)
        .ok_or_else(|| {
            format!(
                "the length of an {} subnet must be at most {max}",
                Family::of(&ip)
            )
        })?;
    if len == 0 {
        return Err(format!("{ip}/0 is the empty network, not a subnet"));
    }
    Subnet::strict(ip, len).map_err(|error| error.to_string())
}
