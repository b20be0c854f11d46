//! One record of the store as Go flannel reads it (facts 3.1 and 3.2). Written anew from those
//! facts and not with the SDK's own reader, which it is there to judge.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::{DualStack, Subnet};
use serde_json::value::RawValue;

/// A network as Go flannel keeps it: host bits and all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GoNet<A> {
    /// The address as it stands in the key.
    pub ip: A,
    /// The length of the prefix.
    pub len: u8,
}

impl<A: Copy + Into<IpAddr>> GoNet<A> {
    /// The network that it counts as when it is compared with others.
    pub fn masked(&self) -> Option<Subnet> {
        Subnet::new(self.ip, self.len).ok()
    }

    /// The destination of its route; none if there are host bits, which the kernel refuses.
    pub fn destination(&self) -> Option<Subnet> {
        Subnet::strict(self.ip, self.len).ok()
    }
}

/// What Go flannel keeps of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoLease {
    /// The IPv4 half of the key. Every record in etcd has one.
    pub v4: GoNet<Ipv4Addr>,
    /// The IPv6 half of the key.
    pub v6: Option<GoNet<Ipv6Addr>>,
    /// The value.
    pub attrs: GoAttrs,
}

impl GoLease {
    /// The subnets that nobody else can be given.
    pub fn taken(&self) -> DualStack<Subnet> {
        DualStack::new(self.v4.masked(), self.v6.and_then(|v6| v6.masked()))
    }
}

/// What Go flannel reads out of a record's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoAttrs {
    /// `PublicIP`; `0.0.0.0` if it is missing.
    pub public_ip: Ipv4Addr,
    /// `PublicIPv6`.
    pub public_ipv6: Option<Ipv6Addr>,
    /// `BackendType`; empty if it is missing.
    pub backend_type: String,
    /// `BackendData` and `BackendV6Data` as their JSON text.
    pub backend_data: DualStack<String>,
}

impl Default for GoAttrs {
    fn default() -> Self {
        Self {
            public_ip: Ipv4Addr::UNSPECIFIED,
            public_ipv6: None,
            backend_type: String::new(),
            backend_data: DualStack::default(),
        }
    }
}

/// Reads a record.
///
/// # Errors
/// Why Go flannel cannot parse it.
pub fn parse(key: &str, value: &[u8]) -> Result<GoLease, String> {
    let (v4, v6) = parse_key(key).ok_or_else(|| format!("{key} names no subnet"))?;
    let attrs = parse_attrs(value)?;
    Ok(GoLease { v4, v6, attrs })
}

/// The nets that a key names.
pub type KeyNets = (GoNet<Ipv4Addr>, Option<GoNet<Ipv6Addr>>);

/// Reads a key: what it ends in, `d.d.d.d-len` and perhaps `&x:y::z-len`, wherever that begins.
pub fn parse_key(key: &str) -> Option<KeyNets> {
    let v6 = key.rfind('&').and_then(|at| {
        let (ip, len) = key[at + 1..].split_once('-')?;
        let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f' | b':');
        let matches = !ip.is_empty() && ip.bytes().all(hex) && is_number(len);
        matches.then_some((&key[..at], ip, len))
    });
    let head = v6.map_or(key, |(head, _, _)| head);
    let (head, len) = head.rsplit_once('-').filter(|(_, len)| is_number(len))?;
    let mut rest = head;
    for part in 0..4 {
        if part > 0 {
            rest = rest.strip_suffix('.')?;
        }
        let before = rest.trim_end_matches(|c: char| c.is_ascii_digit());
        if before.len() == rest.len() {
            return None;
        }
        rest = before;
    }
    let v4 = GoNet {
        ip: head[rest.len()..].parse().ok()?,
        len: length(len, 5)?,
    };
    let v6 = match v6 {
        None => None,
        Some((_, ip, len)) => Some(GoNet {
            ip: ip.parse().ok()?,
            len: length(len, 7)?,
        }),
    };
    Some((v4, v6))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// A length, read as a number of so many bits.
fn length(text: &str, bits: u32) -> Option<u8> {
    text.parse().ok().filter(|len| *len < 1 << bits)
}

fn parse_attrs(value: &[u8]) -> Result<GoAttrs, String> {
    let text = String::from_utf8_lossy(value);
    let members: Members = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let mut attrs = GoAttrs::default();
    for (name, json) in members.0 {
        let json = json.get();
        let is = |field: &str| name.eq_ignore_ascii_case(field);
        if is("PublicIP") {
            // Go looks at the bytes between the quotes.
            let text = json.trim_matches('"');
            let ip = text.parse().map_err(|_| format!("PublicIP is {json}"))?;
            attrs.public_ip = ip;
        } else if is("PublicIPv6") {
            attrs.public_ipv6 = match json {
                "null" => None,
                text => match text.trim_matches('"').parse() {
                    Ok(IpAddr::V4(ip)) => Some(ip.to_ipv6_mapped()),
                    Ok(IpAddr::V6(ip)) => Some(ip),
                    Err(_) => return Err(format!("PublicIPv6 is {json}")),
                },
            };
        } else if is("BackendType") {
            if let Some(text) = string(json)? {
                attrs.backend_type = text;
            }
        } else if is("BackendData") {
            attrs.backend_data.v4 = Some(json.to_owned());
        } else if is("BackendV6Data") {
            attrs.backend_data.v6 = Some(json.to_owned());
        }
    }
    Ok(attrs)
}

/// A string; `null` leaves the field as it was.
fn string(json: &str) -> Result<Option<String>, String> {
    serde_json::from_str(json).map_err(|_| format!("BackendType is {json}"))
}

/// The members of a JSON object in their order. `null` is an empty one to Go.
pub(super) struct Members(pub(super) Vec<(String, Box<RawValue>)>);

impl<'de> serde::Deserialize<'de> for Members {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_unit<E>(self) -> Result<Members, E> {
                Ok(Members(Vec::new()))
            }

            fn visit_map<M: serde::de::MapAccess<'de>>(
                self,
                mut map: M,
            ) -> Result<Members, M::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}
