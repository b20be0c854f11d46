//! proptest strategies for the values of the SDK.

pub mod objects;
