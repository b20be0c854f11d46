//! From packets to messages: which packets go out in one `UDP_SEGMENT` message.

use flannel_core::Family;

/// The most datagrams of one message that every kernel takes.
pub const MAX_SEGMENTS: u16 = 64;

/// The most bytes of one message: what a length field of IP leaves to UDP's payload.
pub const fn max_bytes(family: Family) -> u32 {
    match family {
        Family::V4 => 65_507,
        // The kernel counts the header of IPv6 as it counts that of IPv4.
        Family::V6 => 65_487,
    }
}

/// Packets that stand one behind the other in a buffer and go to one peer as one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Whose they are.
    pub peer: u32,
    /// Where the first begins.
    pub start: u32,
    /// Where the last ends.
    pub end: u32,
    /// Bytes of each but the last.
    pub segment: u16,
    /// How many they are.
    pub count: u16,
}

impl Message {
    /// Bytes of all packets.
    pub const fn len(&self) -> u32 {
        self.end - self.start
    }

    /// Whether there is nothing in it; never true of what a grouper makes.
    pub const fn is_empty(&self) -> bool {
        self.end == self.start
    }
}

/// Makes messages of packets, in their order.
///
/// All packets of a message have the same length but the last, which may be shorter.
#[derive(Debug)]
pub struct Grouper {
    messages: Vec<Message>,
    max_bytes: u32,
    max_segments: u16,
}

impl Grouper {
    /// One for sockets of a family; `segments` is 1 where the socket cannot take more.
    pub fn new(family: Family, segments: u16) -> Self {
        Self {
            messages: Vec::with_capacity(256),
            max_bytes: max_bytes(family),
            max_segments: segments.clamp(1, MAX_SEGMENTS),
        }
    }

    /// From now on at most so many packets in a message.
    pub fn set_segments(&mut self, segments: u16) {
        self.max_segments = segments.clamp(1, MAX_SEGMENTS);
    }

    /// Adds a packet to the last message, or begins one with it.
    pub fn push(&mut self, peer: u32, start: u32, len: u16) {
        let end = start + u32::from(len);
        if let Some(last) = self.messages.last_mut() {
            let full = u32::from(last.segment) * u32::from(last.count) == last.len();
            let fits = last.count < self.max_segments && end - last.start <= self.max_bytes;
            if last.peer == peer && last.end == start && len <= last.segment && full && fits {
                last.end = end;
                last.count += 1;
                return;
            }
        }
        self.messages.push(Message {
            peer,
            start,
            end,
            segment: len,
            count: 1,
        });
    }

    /// What was made since the last [`clear`](Self::clear).
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Forgets what was made.
    pub fn clear(&mut self) {
        self.messages.clear();
    }
}
