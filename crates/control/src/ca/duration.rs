//! Go's duration notation, in which Istio's variables and messages are written.

use time::Duration;

/// `24h0m0s`, `10m0s`, `30s`, `1.5s`, as Go prints a duration of at least a second (smaller ones: as a fraction).
pub(crate) fn format(duration: Duration) -> String {
    let total = duration.whole_seconds();
    if total == 0 && duration.subsec_nanoseconds() == 0 {
        return "0s".to_owned();
    }
    let sign = if duration.is_negative() { "-" } else { "" };
    let total = total.unsigned_abs();
    let (hours, minutes, seconds) = (total / 3600, total / 60 % 60, total % 60);
    let nanos = duration.subsec_nanoseconds().unsigned_abs();
    let fraction = if nanos == 0 {
        String::new()
    } else {
        format!(".{}", format!("{nanos:09}").trim_end_matches('0'))
    };
    match (hours, minutes) {
        (0, 0) => format!("{sign}{seconds}{fraction}s"),
        (0, _) => format!("{sign}{minutes}m{seconds}{fraction}s"),
        _ => format!("{sign}{hours}h{minutes}m{seconds}{fraction}s"),
    }
}

/// Reads `24h`, `1h30m`, `90s`, `1.5h`, `100ms`; a bare `0` is zero. None for anything else.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut seconds = 0f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit_len = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let factor = match &rest[..unit_len] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += number * factor;
        rest = &rest[unit_len..];
    }
    // A century is beyond every use here and far from overflow.
    if !seconds.is_finite() || seconds > 3.2e9 {
        return None;
    }
    let duration = Duration::seconds_f64(seconds);
    Some(if negative { -duration } else { duration })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_go_prints_and_reads() {
        for (seconds, text) in [
            (86_400, "24h0m0s"),
            (600, "10m0s"),
            (30, "30s"),
            (5430, "1h30m30s"),
            (0, "0s"),
        ] {
            assert_eq!(format(Duration::seconds(seconds)), text);
            assert_eq!(parse(text), Some(Duration::seconds(seconds)));
        }
        assert_eq!(format(Duration::milliseconds(1500)), "1.5s");
        assert_eq!(parse("1.5h"), Some(Duration::minutes(90)));
        assert_eq!(parse("100ms"), Some(Duration::milliseconds(100)));
        assert_eq!(parse("-5s"), Some(Duration::seconds(-5)));
        for bad in ["", "5", "h", "5x", "1..5s", "1h5", "9999999999999h", "-"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
