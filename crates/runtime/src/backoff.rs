//! Waiting between attempts: decorrelated jitter, so that a thousand proxies that lost one control plane do not return in
//! step.

use std::time::Duration;

/// The state of one retry loop.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    last: Duration,
}

impl Backoff {
    /// Waits start near `base` and never exceed `cap`.
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self {
            base,
            cap: cap.max(base),
            last: base,
        }
    }

    /// The next wait for a random number in [0, 1): uniformly between `base` and three times the last wait.
    pub fn next_with(&mut self, random: f64) -> Duration {
        let upper = (self.last * 3).min(self.cap).max(self.base);
        let span = upper.saturating_sub(self.base);
        self.last = self.base + span.mul_f64(random.clamp(0.0, 1.0));
        self.last
    }

    /// The next wait, with the thread's random generator.
    pub fn next_wait(&mut self) -> Duration {
        self.next_with(rand::random::<f64>())
    }

    /// Back to the start, after a success.
    pub fn reset(&mut self) {
        self.last = self.base;
    }

    /// Sleeps for the next wait.
    pub async fn sleep(&mut self) {
        tokio::time::sleep(self.next_wait()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn waits_stay_between_base_and_cap(base in 1u64..1000, cap in 1u64..100_000, dice in proptest::collection::vec(0.0f64..1.0, 1..50)) {
            let (base, cap) = (Duration::from_millis(base), Duration::from_millis(cap));
            let mut backoff = Backoff::new(base, cap);
            for random in dice {
                let wait = backoff.next_with(random);
                prop_assert!(wait >= base && wait <= cap.max(base));
            }
        }
    }

    #[test]
    fn waits_grow_to_the_cap_and_start_again_after_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let waits: Vec<_> = (0..6).map(|_| backoff.next_with(1.0)).collect();
        assert_eq!(waits[0], Duration::from_millis(300));
        assert_eq!(waits[1], Duration::from_millis(900));
        assert_eq!(*waits.last().unwrap(), Duration::from_secs(5));
        backoff.reset();
        assert_eq!(backoff.next_with(1.0), Duration::from_millis(300));
        assert_eq!(backoff.next_with(0.0), Duration::from_millis(100));
    }
}
