//! When to renew a workload certificate (S4.81). Pure arithmetic; the caller brings clock and dice.

use time::{Duration, OffsetDateTime};

/// `SECRET_GRACE_PERIOD_RATIO`.
pub const DEFAULT_GRACE_RATIO: f64 = 0.5;
/// `SECRET_GRACE_PERIOD_RATIO_JITTER`.
pub const DEFAULT_GRACE_JITTER: f64 = 0.01;

/// The moment to renew: `ratio` of the life that was left at `received` remains then. `dice` in [-1, 1] spreads the
/// ratio by up to `jitter`, so that a fleet started together does not renew together. Life counts from the receipt, not
/// from NotBefore, so a certificate with a back-dated start is not renewed early.
pub fn renewal_time(
    received: OffsetDateTime,
    not_after: OffsetDateTime,
    ratio: f64,
    jitter: f64,
    dice: f64,
) -> OffsetDateTime {
    let life = not_after - received;
    if life <= Duration::ZERO {
        return received;
    }
    let wanted = ratio + jitter * dice.clamp(-1.0, 1.0);
    let grace = if wanted.is_nan() {
        DEFAULT_GRACE_RATIO
    } else {
        wanted.clamp(0.0, 1.0)
    };
    (not_after - life * grace).max(received)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_day_long_certificate_renews_near_noon() {
        let received = OffsetDateTime::UNIX_EPOCH;
        let at = renewal_time(received, received + Duration::hours(24), 0.5, 0.01, 0.0);
        assert_eq!(at, received + Duration::hours(12));
        let early = renewal_time(received, received + Duration::hours(24), 0.5, 0.01, 1.0);
        assert!(early < at && early > received + Duration::hours(11));
    }

    proptest! {
        #[test]
        fn never_before_receipt_and_never_after_expiry(life in -10i64..1_000_000, ratio in -2.0f64..3.0, jitter in 0.0f64..2.0, dice in -2.0f64..2.0) {
            let received = OffsetDateTime::UNIX_EPOCH;
            let end = received + Duration::seconds(life);
            let at = renewal_time(received, end, ratio, jitter, dice);
            prop_assert!(at >= received);
            prop_assert!(at <= end.max(received));
        }
    }
}
