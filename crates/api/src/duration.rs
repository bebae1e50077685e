//! Durations as Istio writes them: protobuf JSON (`1.5s`) and the Go form people type (`1h30m`, `250ms`).
//!
//! Used by every kind that has a timeout. Knows nothing of what a duration is for; range rules stand with the field.

use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A non-negative span of time with nanosecond resolution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Duration(pub std::time::Duration);

/// Why a text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid duration {text:?}: {reason}")]
pub struct DurationError {
    text: String,
    reason: &'static str,
}

impl Duration {
    /// A duration of whole seconds.
    pub const fn from_secs(secs: u64) -> Self {
        Self(std::time::Duration::from_secs(secs))
    }

    /// A duration of whole milliseconds.
    pub const fn from_millis(millis: u64) -> Self {
        Self(std::time::Duration::from_millis(millis))
    }

    /// True for `0s`, which several Istio fields use for "off".
    pub fn is_zero(&self) -> bool {
        self.0.is_zero()
    }
}

impl FromStr for Duration {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Self, DurationError> {
        let fail = |reason| DurationError {
            text: text.chars().take(64).collect(),
            reason,
        };
        let trimmed = text.strip_prefix('+').unwrap_or(text);
        if trimmed.starts_with('-') {
            return Err(fail("must not be negative"));
        }
        if trimmed == "0" {
            return Ok(Self::default());
        }
        if trimmed.is_empty() {
            return Err(fail("is empty"));
        }
        let mut rest = trimmed;
        let mut total: u128 = 0;
        while !rest.is_empty() {
            let digits = rest
                .find(|c: char| !c.is_ascii_digit() && c != '.')
                .unwrap_or(rest.len());
            let (number, tail) = rest.split_at(digits);
            let unit_len = tail
                .find(|c: char| c.is_ascii_digit() || c == '.')
                .unwrap_or(tail.len());
            let (unit, next) = tail.split_at(unit_len);
            let unit_nanos: u128 = match unit {
                "ns" => 1,
                "us" | "µs" | "μs" => 1_000,
                "ms" => 1_000_000,
                "s" => 1_000_000_000,
                "m" => 60_000_000_000,
                "h" => 3_600_000_000_000,
                "" => return Err(fail("missing unit")),
                _ => return Err(fail("unknown unit")),
            };
            let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
            if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || number.len() > 40 {
                return Err(fail("bad number"));
            }
            let whole: u128 = if whole.is_empty() {
                0
            } else {
                whole.parse().map_err(|_| fail("bad number"))?
            };
            total = total
                .checked_add(whole.checked_mul(unit_nanos).ok_or_else(|| fail("is too large"))?)
                .ok_or_else(|| fail("is too large"))?;
            let mut scale = unit_nanos;
            for digit in fraction.bytes() {
                scale /= 10;
                total += u128::from(digit - b'0') * scale;
            }
            rest = next;
        }
        let secs = u64::try_from(total / 1_000_000_000).map_err(|_| fail("is too large"))?;
        // Go's and protobuf's durations both end near 292 years; what is beyond cannot be meant.
        if secs > 9_223_372_036 {
            return Err(fail("is too large"));
        }
        let nanos = u32::try_from(total % 1_000_000_000).map_err(|_| fail("is too large"))?;
        Ok(Self(std::time::Duration::new(secs, nanos)))
    }
}

impl fmt::Display for Duration {
    /// Protobuf's JSON form: seconds, with as many fraction digits as needed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.subsec_nanos();
        if nanos == 0 {
            return write!(f, "{}s", self.0.as_secs());
        }
        let fraction = format!("{nanos:09}");
        write!(f, "{}.{}s", self.0.as_secs(), fraction.trim_end_matches('0'))
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Duration {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_notations() {
        for (text, millis) in [
            ("1s", 1_000),
            ("1.5s", 1_500),
            ("250ms", 250),
            ("1h30m", 5_400_000),
            ("0", 0),
            ("0s", 0),
            (".5s", 500),
            ("1m0.5s", 60_500),
        ] {
            assert_eq!(
                text.parse::<Duration>().unwrap(),
                Duration::from_millis(millis),
                "{text}"
            );
        }
    }

    #[test]
    fn refused() {
        for text in [
            "",
            "1",
            "s",
            "-1s",
            "1x",
            "1.2.3s",
            ".s",
            "99999999999h",
            "1 s",
            "s1",
            "１s",
        ] {
            assert!(text.parse::<Duration>().is_err(), "{text:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn display_reads_back(secs in 0u64..9_000_000_000, nanos in 0u32..1_000_000_000) {
            let duration = Duration(std::time::Duration::new(secs, nanos));
            prop_assert_eq!(duration.to_string().parse::<Duration>().unwrap(), duration);
        }

        #[test]
        fn never_panics(text in ".{0,80}") {
            let _ = text.parse::<Duration>();
        }
    }
}
