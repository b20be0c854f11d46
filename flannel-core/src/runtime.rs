//! [`runtime_fault`]: a tokio runtime that cannot carry us is an error of the call, not a panic
//! later.

use std::time::Duration;

/// Tells what the tokio runtime lacks that this is called in, and how to have it; `None`: nothing.
///
/// Tokio says so only by a panic of whoever uses a timer. It is caught here, once, at the start;
/// where panics abort the process, or are printed by a hook, that is so here too.
pub fn runtime_fault() -> Option<&'static str> {
    if tokio::runtime::Handle::try_current().is_err() {
        return Some("there is no tokio runtime here: call it inside of one");
    }
    let use_one = || drop(tokio::time::sleep(Duration::ZERO));
    match std::panic::catch_unwind(use_one) {
        Ok(()) => None,
        Err(_) => {
            Some("the tokio runtime has no timers: build it with enable_time() or enable_all()")
        }
    }
}
