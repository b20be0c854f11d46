//! Offloads of devices: the feature messages of ethtool over generic netlink (Linux 5.6;
//! `linux/ethtool_netlink.h`).

use std::collections::{BTreeMap, BTreeSet};

use flannel_core::kernel::{Error, Result};
use flannel_core::{IfName, Offload};
use nix::errno::Errno;

use crate::connection::Connection;
use crate::error::{Failure, no_device};
use crate::wire::{Attributes, Body, Malformed, read_text, read_u16};

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const FEATURES_GET: u8 = 11;
const FEATURES_SET: u8 = 12;
const FEATURES_HEADER: u16 = 1;
const FEATURES_HW: u16 = 2;
const FEATURES_WANTED: u16 = 3;
const FEATURES_ACTIVE: u16 = 4;
const FEATURES_NOCHANGE: u16 = 5;
const HEADER_DEV_NAME: u16 = 2;
const BITSET_BITS: u16 = 3;
const BITS_BIT: u16 = 1;
const BIT_NAME: u16 = 2;
const BIT_VALUE: u16 = 3;

/// The length of `struct genlmsghdr`.
const HEADER: usize = 4;

/// The features of a device by name: whether each is on.
pub(crate) type States = BTreeMap<String, bool>;

/// The ethtool family of generic netlink.
#[derive(Debug)]
pub(crate) struct Ethtool {
    connection: Connection,
    family: Option<u16>,
}

fn header(command: u8) -> Body {
    Body::new(&[command, 1, 0, 0])
}

fn text(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// The question for the features of a device.
pub(crate) fn query(dev: IfName) -> Body {
    let mut body = header(FEATURES_GET);
    body.nested(FEATURES_HEADER, |header| {
        header.attribute(HEADER_DEV_NAME, &text(dev.as_str()));
    });
    body
}

/// The message that switches a feature on or off.
pub(crate) fn message(offload: &Offload) -> Body {
    let mut body = header(FEATURES_SET);
    body.nested(FEATURES_HEADER, |header| {
        header.attribute(HEADER_DEV_NAME, &text(offload.dev.as_str()));
    });
    // A bit that is in the list is meant; it is on if its value is there.
    body.nested(FEATURES_WANTED, |bitset| {
        bitset.nested(BITSET_BITS, |bits| {
            bits.nested(BITS_BIT, |bit| {
                bit.attribute(BIT_NAME, &text(&offload.feature));
                if offload.on {
                    bit.attribute(BIT_VALUE, &[]);
                }
            });
        });
    });
    body
}

/// Reads the answer to a question for the features of a device.
///
/// # Errors
/// [`Malformed`] if it is cut.
pub(crate) fn decode(body: &[u8]) -> Result<States, Malformed> {
    let mut known = BTreeSet::new();
    let mut active = BTreeSet::new();
    for attribute in Attributes::after(body, HEADER)? {
        let (kind, value) = attribute?;
        match kind {
            FEATURES_HW | FEATURES_WANTED | FEATURES_NOCHANGE => names(value, &mut known)?,
            FEATURES_ACTIVE => names(value, &mut active)?,
            _ => {}
        }
    }
    known.extend(active.iter().cloned());
    Ok(known
        .into_iter()
        .map(|name| {
            let on = active.contains(&name);
            (name, on)
        })
        .collect())
}

/// Adds the names of a bitset without a mask, in which only bits that are set are listed.
fn names(bitset: &[u8], names: &mut BTreeSet<String>) -> Result<(), Malformed> {
    for attribute in Attributes(bitset) {
        let (BITSET_BITS, bits) = attribute? else {
            continue;
        };
        for bit in Attributes(bits) {
            for field in Attributes(bit?.1) {
                if let (BIT_NAME, name) = field? {
                    names.insert(read_text(name));
                }
            }
        }
    }
    Ok(())
}

impl Ethtool {
    pub(crate) const fn new(connection: Connection) -> Self {
        Self {
            connection,
            family: None,
        }
    }

    /// The number of the family; `None`: this kernel has none.
    pub(crate) fn family(&mut self) -> Result<Option<u16>, Failure> {
        if self.family.is_none() {
            let mut request = header(CTRL_CMD_GETFAMILY);
            request.attribute(CTRL_ATTR_FAMILY_NAME, &text("ethtool"));
            let answer = self.connection.get(GENL_ID_CTRL, 0, &request, |message| {
                for attribute in Attributes::after(message.body, HEADER)? {
                    if let (CTRL_ATTR_FAMILY_ID, id) = attribute? {
                        return Ok(Some(read_u16(id)?));
                    }
                }
                Ok(None)
            });
            self.family = match answer {
                Err(failure) if failure.errno() == Some(Errno::ENOENT) => None,
                other => other?,
            };
        }
        Ok(self.family)
    }

    /// The features of a device; `None`: there is no such device, or no ethtool.
    pub(crate) fn read(&mut self, dev: IfName) -> Result<Option<States>, Failure> {
        let Some(family) = self.family()? else {
            return Ok(None);
        };
        let answer = self.connection.get(family, 0, &query(dev), |message| {
            Ok(Some(decode(message.body)?))
        });
        match answer {
            Err(failure) if matches!(failure.errno(), Some(Errno::ENODEV | Errno::EOPNOTSUPP)) => {
                Ok(None)
            }
            other => other,
        }
    }

    /// Switches a feature and reads it back: the kernel may leave it as it was because another
    /// feature demands it.
    pub(crate) fn write(&mut self, offload: &Offload) -> Result<()> {
        let failed =
            |failure: Failure| failure.meaning(Some(offload.dev), || offload.feature.clone());
        let Some(family) = self.family().map_err(failed)? else {
            return Err(Error::Unsupported {
                what: "ethtool over netlink".to_owned(),
            });
        };
        let state = |ethtool: &mut Self| -> Result<bool> {
            let states = ethtool
                .read(offload.dev)
                .map_err(failed)?
                .ok_or_else(|| no_device(offload.dev))?;
            states
                .get(&offload.feature)
                .copied()
                .ok_or_else(|| Error::Unsupported {
                    what: format!("the offload {:?} on {}", offload.feature, offload.dev),
                })
        };
        if state(self)? == offload.on {
            return Ok(());
        }
        self.connection
            .request(family, 0, &message(offload))
            .map_err(failed)?;
        if state(self)? == offload.on {
            Ok(())
        } else {
            Err(Error::Rejected {
                message: format!(
                    "{} of {} stays {}: the device or another offload demands it",
                    offload.feature,
                    offload.dev,
                    if offload.on { "off" } else { "on" }
                ),
            })
        }
    }
}
