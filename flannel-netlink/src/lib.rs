//! The Linux kernel of the flannel overlay SDK.
#![forbid(unsafe_code)]
