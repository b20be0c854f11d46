//! The Internet checksum (RFC 1071), and changing one without the packet (RFC 1624).

use super::ip::Ip;

/// A sum of 16-bit words in ones' complement that is not finished yet.
///
/// It is kept in the byte order of the machine, which the sum does not mind (RFC 1071, 2B).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sum(u64);

impl Sum {
    /// The sum of nothing.
    pub const fn new() -> Self {
        Self(0)
    }

    /// The sum of the addresses, the length and the protocol that TCP and UDP checksums include.
    pub fn pseudo(ip: &Ip, packet: &[u8], protocol: u8, len: usize) -> Self {
        let addresses = packet.get(ip.addresses()).unwrap_or_default();
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        Self::new()
            .with(addresses)
            .with(&len.to_be_bytes())
            .with(&[0, protocol])
    }

    /// Adds bytes. What was added before must have been of even length.
    #[must_use]
    pub fn with(self, bytes: &[u8]) -> Self {
        // Eight lanes of 64 bits hold 2^32 words each, so nothing can overflow, and the loop is of
        // the kind that compilers make vectors of.
        let mut lanes = [0u64; 8];
        let mut blocks = bytes.chunks_exact(32);
        for block in &mut blocks {
            for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(4)) {
                *lane += u64::from(native32(word));
            }
        }
        let mut sum: u64 = lanes.iter().sum();
        let mut words = blocks.remainder().chunks_exact(4);
        for word in &mut words {
            sum += u64::from(native32(word));
        }
        sum += match *words.remainder() {
            [a] => u64::from(u16::from_ne_bytes([a, 0])),
            [a, b] => u64::from(u16::from_ne_bytes([a, b])),
            [a, b, c] => {
                u64::from(u16::from_ne_bytes([a, b])) + u64::from(u16::from_ne_bytes([c, 0]))
            }
            _ => 0,
        };
        Self(self.0 + u64::from(fold(sum)))
    }

    /// The checksum, as the number that stands in the packet in network order.
    pub fn checksum(self) -> u16 {
        u16::from_be(!fold(self.0))
    }

    /// The sum itself, as the number that stands in a packet whose checksum is left to the device.
    pub fn partial(self) -> u16 {
        u16::from_be(fold(self.0))
    }

    /// Whether a sum over everything, checksum included, says that nothing was damaged.
    pub fn is_valid(self) -> bool {
        fold(self.0) == 0xffff
    }
}

/// The checksum of a packet of which one word changed from `old` to `new` (RFC 1624, equation 3).
pub fn replace(checksum: u16, old: u16, new: u16) -> u16 {
    let sum = u64::from(!checksum) + u64::from(!old) + u64::from(new);
    !fold(sum)
}

fn native32(word: &[u8]) -> u32 {
    match *word {
        [a, b, c, d] => u32::from_ne_bytes([a, b, c, d]),
        _ => 0,
    }
}

fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
