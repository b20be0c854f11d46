//! Where a large packet is read to, so that it is cut without being moved.
//!
//! The segments of a packet stand one behind the other when they are sent, each behind headers of
//! its own, while the kernel gives their payload in one piece. But it gives it to as many places as
//! it is told, and packets of a stream are alike: the places of the next one are known from the last.
//! So each piece of payload is read to where it is sent from, and only headers remain to be written.

use std::io::IoSliceMut;

use super::split::Splitter;

/// The most places: a packet of more segments is not worth it.
pub const MAX_PLACES: usize = 64;
/// The most bytes of a packet.
const MAX_PACKET: usize = 65_535;
/// A packet of fewer segments is not worth it.
const MIN_SEGMENTS: usize = 4;

/// How the segments of a packet will stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    headers: usize,
    size: usize,
}

impl Layout {
    /// That of a packet's segments; `None` if it would gain nothing.
    pub fn of(splitter: &Splitter<'_>) -> Option<Self> {
        let this = Self {
            headers: splitter.headers(),
            size: splitter.size(),
        };
        let is_worth = splitter.count() >= MIN_SEGMENTS && this.places() <= MAX_PLACES;
        is_worth.then_some(this)
    }

    /// Bytes of each segment's headers.
    pub const fn headers(&self) -> usize {
        self.headers
    }

    /// Segments of the largest packet.
    const fn places(&self) -> usize {
        MAX_PACKET.saturating_sub(self.headers).div_ceil(self.size)
    }

    /// Bytes that the segments of the largest packet take.
    pub const fn room(&self) -> usize {
        self.places() * (self.headers + self.size)
    }

    /// Names the places in `room` of a packet that is read: its headers and the first segment's
    /// payload, then each other segment's payload. Returns how many `parts` they are.
    pub fn parts<'a>(&self, room: &'a mut [u8], parts: &mut [IoSliceMut<'a>]) -> usize {
        let segments = room.chunks_exact_mut(self.headers + self.size);
        let mut count = 0;
        for (segment, part) in segments.take(self.places()).zip(parts) {
            let from = if count == 0 { 0 } else { self.headers };
            *part = IoSliceMut::new(&mut segment[from..]);
            count += 1;
        }
        count
    }

    /// Whether the segments of a packet that was read to these places stand where they belong.
    pub fn fits(&self, splitter: &Splitter<'_>) -> bool {
        splitter.headers() == self.headers && splitter.size() == self.size
    }

    /// Puts a packet of `len` bytes together that was read to these places.
    pub fn gather(&self, room: &[u8], len: usize, out: &mut [u8]) {
        let mut out = &mut out[..len];
        for (index, segment) in room.chunks_exact(self.headers + self.size).enumerate() {
            let piece = if index == 0 {
                segment
            } else {
                &segment[self.headers..]
            };
            let (to, rest) = out.split_at_mut(piece.len().min(out.len()));
            to.copy_from_slice(&piece[..to.len()]);
            out = rest;
            if out.is_empty() {
                return;
            }
        }
    }
}
