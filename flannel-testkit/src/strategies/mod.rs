//! proptest strategies for the values of the SDK.

pub mod config;
pub mod leases;
pub mod objects;
