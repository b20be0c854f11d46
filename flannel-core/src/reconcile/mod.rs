//! Desired state against the kernel's: what is wanted, what is there, and the way from one to the
//! other.

mod contention;
mod copy;
pub mod desired;
pub(crate) mod engine;
pub mod known;
mod own_claim;
pub mod ownership;
pub mod plan;
pub(crate) mod reconciler;
