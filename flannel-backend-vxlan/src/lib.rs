//! The VXLAN backend of the flannel overlay SDK.
#![forbid(unsafe_code)]
