//! Real packets between namespaces: single echoes ([`ping`]) and a stream of numbered packets that
//! shows every loss ([`Prober`]).
//!
//! All of it runs on threads of its own with blocking sockets, so that it neither disturbs nor is
//! disturbed by the async runtime under test.

mod ping;
mod stream;

pub use ping::{Error, Pinged, ping, ping_each, ping_matrix};
pub use stream::{Flow, Options, Prober, Report};
