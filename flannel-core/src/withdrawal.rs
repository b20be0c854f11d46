//! [`WithdrawalGuard`]: when a snapshot withdraws too much to be believed at once.

use serde::{Deserialize, Serialize};

/// The share of the peers that a snapshot may withdraw without being asked again.
///
/// A store that was emptied by mistake, or that answers with half of its records, would otherwise
/// cut the overlay on every node at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct WithdrawalGuard {
    /// The share in percent: what is withdrawn beyond it is held. 100 switches the guard off.
    pub share_percent: u8,
    /// The guard works from this many known peers up.
    pub floor: usize,
}

impl Default for WithdrawalGuard {
    /// Half of the peers, from three up.
    fn default() -> Self {
        Self {
            share_percent: 50,
            floor: 3,
        }
    }
}

impl WithdrawalGuard {
    /// A guard that holds what goes beyond this share, in percent, from so many known peers up.
    pub const fn new(share_percent: u8, floor: usize) -> Self {
        Self {
            share_percent,
            floor,
        }
    }

    /// Holds whatever is withdrawn, if only one peer.
    pub(crate) const DOUBTING: Self = Self {
        share_percent: 0,
        floor: 1,
    };

    /// Whether a withdrawal is to be confirmed by a second reading.
    pub fn holds(&self, held: Held) -> bool {
        let Held {
            withdrawn, known, ..
        } = held;
        known >= self.floor
            && withdrawn as u128 * 100 > known as u128 * u128::from(self.share_percent)
    }
}

/// A withdrawal that is not believed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// How many peers the store lacks.
    pub withdrawn: usize,
    /// How many were known before, those included whose routes were found in the kernel.
    pub known: usize,
    /// Why it is not believed.
    pub reason: HeldReason,
}

/// Why a withdrawal is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum HeldReason {
    /// It is more than the guard lets pass: a second reading decides.
    Share,
    /// The store has no network config, so it may have lost everything: nothing is decided before
    /// there is one.
    NoConfig,
}
