//! Test tools for the flannel overlay SDK.
#![forbid(unsafe_code)]

pub mod conformance;
pub mod fake_kernel;
#[cfg(feature = "lab")]
pub mod netns;
pub mod permute;
#[cfg(feature = "lab")]
pub mod prober;
#[cfg(feature = "proptest")]
pub mod strategies;
