//! Waiting for observed state instead of sleeping.

use std::future::Future;
use std::time::{Duration, Instant};

/// Asks `observe` until it gives a value, at most `limit`; panics with `what` and the last reason otherwise.
pub async fn eventually<T, E, F, Fut>(what: &str, limit: Duration, mut observe: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, E>>,
    E: std::fmt::Debug,
{
    let start = Instant::now();
    loop {
        match observe().await {
            Ok(value) => return value,
            Err(reason) if start.elapsed() > limit => panic!("{what}: not within {limit:?}, last: {reason:?}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}
