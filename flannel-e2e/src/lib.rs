//! The SDK whole, on a real kernel.
#![forbid(unsafe_code)]
