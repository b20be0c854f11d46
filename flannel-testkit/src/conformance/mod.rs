//! One suite per trait: every implementation runs the same functions.

pub mod backend;
mod difference;
pub mod kernel;
pub mod manager;
