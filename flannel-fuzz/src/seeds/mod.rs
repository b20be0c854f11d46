//! The part of the corpus that is made from values: golden inputs, and what is nearly one.

mod netlink;
mod packets;
mod text;

use crate::corpus::Entry;

/// Every seed with the name of its target.
pub fn all() -> Vec<(&'static str, Entry)> {
    let mut all = text::seeds();
    all.extend(netlink::seeds());
    all.extend(packets::seeds());
    all
}

fn seed(
    target: &'static str,
    name: impl Into<String>,
    bytes: impl Into<Vec<u8>>,
) -> (&'static str, Entry) {
    let (name, bytes) = (name.into(), bytes.into());
    (target, Entry { name, bytes })
}
