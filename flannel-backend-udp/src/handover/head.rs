//! [`Head`]: what stands before every offer, in every version.

use std::fmt;

use super::{HandoverError, wrong};
use crate::sys::descriptors;

/// The first bytes of a head.
const MAGIC: [u8; 6] = *b"FLNUDP";
/// The bytes of a head.
pub(super) const LEN: usize = 16;
/// More than a million peers.
const MAX_BODY: u32 = 128 << 20;

/// Versions of the description that one side writes and reads: from the lowest to the highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    lowest: u8,
    highest: u8,
}

impl Versions {
    /// Those of this program.
    pub const OURS: Self = Self {
        lowest: 2,
        highest: 2,
    };

    /// The versions of a program that knows but one.
    pub(super) fn only(version: u16) -> Self {
        let version = u8::try_from(version).unwrap_or(u8::MAX);
        Self {
            lowest: version,
            highest: version,
        }
    }

    /// The version of what this side offers first.
    pub(super) const fn highest(self) -> u16 {
        self.highest as u16
    }

    /// Tells if one is among them.
    pub const fn has(self, version: u16) -> bool {
        self.lowest as u16 <= version && version <= self.highest as u16
    }

    /// The highest one that both sides have.
    pub fn common(self, other: Self) -> Option<u16> {
        let highest = self.highest.min(other.highest);
        (highest >= self.lowest.max(other.lowest)).then_some(highest.into())
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.lowest == self.highest {
            true => write!(f, "version {}", self.highest),
            false => write!(f, "versions {} to {}", self.lowest, self.highest),
        }
    }
}

/// The part that stands before everything. Its form is the same in all versions: magic, version of
/// the description that follows, number of descriptors, lowest and highest version that the sender
/// writes (both 0 from whoever knows but one and does not negotiate), length of the description.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    pub(super) version: u16,
    pub(super) descriptors: u16,
    /// Those that the sender may be asked for; `None`: it may be asked for nothing.
    pub(super) versions: Option<Versions>,
    pub(super) body: u32,
}

impl Head {
    pub(super) fn encode(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..6].copy_from_slice(&MAGIC);
        bytes[6..8].copy_from_slice(&self.version.to_be_bytes());
        bytes[8..10].copy_from_slice(&self.descriptors.to_be_bytes());
        if let Some(Versions { lowest, highest }) = self.versions {
            (bytes[10], bytes[11]) = (lowest, highest);
        }
        bytes[12..].copy_from_slice(&self.body.to_be_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; LEN]) -> Result<Self, HandoverError> {
        if bytes[..6] != MAGIC {
            return Err(wrong("it does not begin as a handover does"));
        }
        let (lowest, highest) = (bytes[10], bytes[11]);
        if lowest > highest {
            return Err(wrong("its lowest version is above its highest"));
        }
        let this = Self {
            version: u16::from_be_bytes([bytes[6], bytes[7]]),
            descriptors: u16::from_be_bytes([bytes[8], bytes[9]]),
            versions: (highest > 0).then_some(Versions { lowest, highest }),
            body: u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]),
        };
        if usize::from(this.descriptors) > descriptors::MAX || this.body > MAX_BODY {
            return Err(wrong("it is larger than any forwarder"));
        }
        Ok(this)
    }
}
