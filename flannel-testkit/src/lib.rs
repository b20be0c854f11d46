//! Test tools for the flannel overlay SDK.
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod conformance;
pub mod fake_kernel;
pub mod fake_store;
pub mod go_peer;
#[cfg(all(feature = "lab", target_os = "linux"))]
pub mod netns;
pub mod permute;
#[cfg(all(feature = "lab", target_os = "linux"))]
pub mod prober;
#[cfg(all(feature = "servers", target_os = "linux"))]
pub mod servers;
#[cfg(feature = "sim")]
pub mod sim;
mod skipping;
pub mod staged;
#[cfg(feature = "proptest")]
pub mod strategies;

pub use skipping::{SKIPS_VARIABLE, in_ci, require, require_tool, skip};
