//! Waiting for observed state instead of sleeping.

use std::fmt::Debug;
use std::future::Future;
use std::time::{Duration, Instant};

/// What one look has found: a value, or a reason why there is none yet.
pub trait Look {
    /// What is waited for.
    type Value;

    /// The value, or the reason as text.
    fn seen(self) -> Result<Self::Value, String>;
}

impl<T, E: Debug> Look for Result<T, E> {
    type Value = T;

    fn seen(self) -> Result<T, String> {
        self.map_err(|reason| format!("{reason:?}"))
    }
}

impl<T> Look for Option<T> {
    type Value = T;

    fn seen(self) -> Result<T, String> {
        self.ok_or_else(|| "nothing".to_owned())
    }
}

/// Asks `observe` until it gives a value, at most `limit`; panics with `what` and the last reason otherwise.
pub async fn eventually<F, Fut>(what: &str, limit: Duration, mut observe: F) -> <Fut::Output as Look>::Value
where
    F: FnMut() -> Fut,
    Fut: Future<Output: Look>,
{
    let start = Instant::now();
    loop {
        match observe().await.seen() {
            Ok(value) => return value,
            Err(reason) if start.elapsed() > limit => panic!("{what}: not within {limit:?}, last: {reason}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}
