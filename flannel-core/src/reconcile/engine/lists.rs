//! The long lists of the status: made again only when they are others, and the longer the seldomer.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Engine;
use crate::clock::Moment;
use crate::lease::LeaseKey;
use crate::listed::Listed;
use crate::status::RejectedPeer;

/// The wait for each entry of a list from its making to the next: it takes some microseconds, so that lists
/// cost a tenth of the time at most, whatever is written to the store.
const PAUSE: Duration = Duration::from_micros(20);

/// Lists up to this length are made whenever they are others.
const SHORT: usize = 1_000;

/// Peers that are rejected, and records that cannot be read.
#[derive(Debug, Default)]
pub(super) struct Lists {
    pub(super) rejected: Listed<Vec<RejectedPeer>>,
    pub(super) unreadable: Listed<BTreeMap<LeaseKey, String>>,
    /// The versions of compiler and lease set that they were made of.
    made_of: (u64, u64),
    /// When they may be made again.
    at: Moment,
    /// When they are to be made again, since they are others.
    pub(super) due: Option<Moment>,
}

impl Engine {
    /// Makes the lists anew, if they are others than they were and it is time for it.
    pub(super) fn make_lists(&mut self) {
        let now = self.now();
        let is = (self.compiler.rejections(), self.leases.spoilings());
        let lists = &mut self.lists;
        lists.due = None;
        if lists.made_of == is {
            return;
        }
        if now < lists.at {
            lists.due = Some(lists.at);
            return;
        }
        if lists.made_of.0 != is.0 {
            let rejected = self.compiler.rejected().iter().flat_map(|(key, reasons)| {
                reasons.iter().map(|(family, reason)| RejectedPeer {
                    key: key.clone(),
                    family: *family,
                    reason: reason.clone(),
                })
            });
            lists.rejected = Listed::from(rejected.collect::<Vec<_>>());
        }
        if lists.made_of.1 != is.1 {
            let unreadable = self.leases.unreadable();
            let unreadable = unreadable.map(|record| (record.key.clone(), record.reason.clone()));
            lists.unreadable = Listed::from(unreadable.collect::<BTreeMap<_, _>>());
        }
        lists.made_of = is;
        let len = lists.rejected.len() + lists.unreadable.len();
        let entries = u32::try_from(len).unwrap_or(u32::MAX);
        lists.at = match len {
            ..=SHORT => now,
            _ => now + PAUSE.saturating_mul(entries),
        };
    }
}
