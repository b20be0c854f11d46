//! What is fed with hostile bytes, and what must hold of whatever comes of them.
//!
//! A [`Target`] is a function of bytes that panics if a rule is broken: not only must nothing
//! panic, what is accepted must also stay within its bounds, and what is written must be read back
//! as the same. Each target is run
//!
//! - by `cargo fuzz run NAME` in the repository's root, on a nightly Rust, for as long as one likes;
//! - by this crate's tests on the committed corpus and mutations of it, on every Rust.
//!
//! The corpus is `fuzz/corpus/NAME/`. A file whose name begins with `ok-` is accepted, one with
//! `bad-` is refused, and the tests check that; `ok-kernel-…` is what Linux 6.18 sent. An input for
//! which a rule was once broken is kept as `found-…`; what else a fuzzer adds is not committed.
//! `cargo run -p flannel-fuzz` writes those that are made from values, the golden inputs among them.
#![forbid(unsafe_code)]

mod backend;
mod config;
pub mod corpus;
mod lease;
mod netlink;
mod packet;
mod peer;
pub mod seeds;

/// Something that reads bytes from outside.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, which is also that of its corpus and of the binary in `fuzz/`.
    pub name: &'static str,
    /// Feeds it; whether it accepted the bytes. Panics if a rule is broken.
    pub run: fn(&[u8]) -> bool,
    /// Words that mean something to it, for mutations.
    pub words: &'static [&'static str],
}

/// Every target, sorted by name.
pub const TARGETS: &[Target] = &[
    Target {
        name: "backend_data",
        run: backend::backend_data,
        words: backend::WORDS,
    },
    Target {
        name: "datagrams",
        run: packet::datagrams,
        words: &[],
    },
    Target {
        name: "ethtool",
        run: netlink::ethtool,
        words: &[],
    },
    Target {
        name: "lease_json",
        run: lease::lease_json,
        words: lease::WORDS,
    },
    Target {
        name: "lease_key",
        run: lease::lease_key,
        words: lease::KEY_WORDS,
    },
    Target {
        name: "lease_value",
        run: lease::lease_value,
        words: lease::WORDS,
    },
    Target {
        name: "netlink",
        run: netlink::datagram,
        words: &[],
    },
    Target {
        name: "netlink_answer",
        run: netlink::answer,
        words: &[],
    },
    Target {
        name: "netlink_message",
        run: netlink::message,
        words: &[],
    },
    Target {
        name: "network_config",
        run: config::network_config,
        words: config::WORDS,
    },
    Target {
        name: "peer",
        run: peer::peer,
        words: lease::WORDS,
    },
    Target {
        name: "tun_packet",
        run: packet::tun_packet,
        words: &[],
    },
];

/// A target by its name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Feeds a target: the whole body of a binary in `fuzz/`.
///
/// # Panics
/// If a rule is broken, or there is no target of this name.
pub fn feed(name: &str, bytes: &[u8]) {
    let Some(target) = target(name) else {
        panic!("there is no target {name}");
    };
    (target.run)(bytes);
}

/// An error says something, and repeats of what it was given a few quotations of at most 64
/// characters each.
fn explained(error: &dyn std::error::Error) {
    const LONGEST: usize = 2048;
    let said = error.to_string();
    assert!(!said.is_empty(), "an error without words");
    assert!(said.len() <= LONGEST, "a long error: {said}");
}
