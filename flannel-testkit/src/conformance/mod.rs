//! One suite per trait: every implementation runs the same functions.

pub mod backend;
pub mod kernel;
pub mod manager;
