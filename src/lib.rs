//! Overlay networks as a library.
#![forbid(unsafe_code)]

pub use flannel_core::*;
