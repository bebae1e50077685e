//! Prometheus' text exposition format 0.0.4.

use std::fmt::Write as _;
use std::sync::atomic::Ordering::Relaxed;

use super::Kind;
use super::family::{FamilyInner, Totals};

/// Appends one family; nothing at all while it has no series.
pub(crate) fn family(out: &mut String, family: &FamilyInner) {
    let series = family.snapshot();
    if series.is_empty() {
        return;
    }
    let kind = match family.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram => "histogram",
    };
    if !family.help.is_empty() {
        let _ = writeln!(
            out,
            "# HELP {} {}",
            family.name,
            family.help.replace('\\', "\\\\").replace('\n', "\\n")
        );
    }
    let _ = writeln!(out, "# TYPE {} {kind}", family.name);
    for (values, totals) in &series {
        let labels = label_list(&family.labels, values);
        match family.kind {
            Kind::Counter => {
                let _ = writeln!(out, "{}{} {}", family.name, braces(&labels), totals.count);
            }
            Kind::Gauge => {
                let _ = writeln!(out, "{}{} {}", family.name, braces(&labels), number(totals.sum));
            }
            Kind::Histogram => histogram(out, family, &labels, totals),
        }
    }
    let refused = family.refused.load(Relaxed);
    if refused > 0 {
        let _ = writeln!(
            out,
            "# mantlet: {refused} series of {} were not kept, the family is full",
            family.name
        );
    }
}

fn histogram(out: &mut String, family: &FamilyInner, labels: &str, totals: &Totals) {
    let separator = if labels.is_empty() { "" } else { "," };
    let mut cumulative = 0;
    for (bound, count) in family.bounds.iter().zip(&totals.buckets) {
        cumulative += count;
        let _ = writeln!(
            out,
            "{}_bucket{{{labels}{separator}le=\"{}\"}} {cumulative}",
            family.name,
            number(*bound)
        );
    }
    // The last line says the number of observations, so it is derived from the same buckets: a scrape during an
    // observation must not show a bucket above the total.
    cumulative += totals.buckets.last().copied().unwrap_or(0);
    let _ = writeln!(
        out,
        "{}_bucket{{{labels}{separator}le=\"+Inf\"}} {cumulative}",
        family.name
    );
    let _ = writeln!(out, "{}_sum{} {}", family.name, braces(labels), number(totals.sum));
    let _ = writeln!(out, "{}_count{} {cumulative}", family.name, braces(labels));
}

fn braces(labels: &str) -> String {
    if labels.is_empty() {
        String::new()
    } else {
        format!("{{{labels}}}")
    }
}

fn label_list(names: &[Box<str>], values: &[Box<str>]) -> String {
    let mut out = String::new();
    for (name, value) in names.iter().zip(values) {
        if !out.is_empty() {
            out.push(',');
        }
        let _ = write!(out, "{name}=\"");
        for c in value.chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '"' => out.push_str("\\\""),
                '\n' => out.push_str("\\n"),
                c => out.push(c),
            }
        }
        out.push('"');
    }
    out
}

fn number(value: f64) -> String {
    if value == f64::INFINITY {
        "+Inf".to_owned()
    } else if value == f64::NEG_INFINITY {
        "-Inf".to_owned()
    } else if value.is_nan() {
        "NaN".to_owned()
    } else {
        format!("{value}")
    }
}
