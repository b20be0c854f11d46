//! Waiting for a condition with a deadline.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

/// How long anything may take to become right.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Waits until something holds, looking every few milliseconds; answers how long it took.
///
/// # Panics
/// If it does not within `limit`.
pub async fn until(what: &str, limit: Duration, mut holds: impl AsyncFnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !holds().await {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        sleep(Duration::from_millis(2)).await;
    }
    start.elapsed()
}

/// Waits for a future.
///
/// # Panics
/// If it does not end within `limit`.
pub async fn within<T>(what: &str, limit: Duration, future: impl Future<Output = T>) -> T {
    match timeout(limit, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {limit:?}: {what}"),
    }
}
