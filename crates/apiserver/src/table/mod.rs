//! Server-side tables: what `kubectl get` prints.
//!
//! Called by the read handlers when the client asks for `as=Table`. Built-in columns are in `columns`, custom ones come from the
//! definition. Ages are computed at the time given, so tables can be tested.

mod columns;

use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::jsonpath;
use crate::resources::Resource;

/// What of the object each row carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Include {
    /// Only metadata (the default).
    Metadata,
    /// The whole object.
    Object,
    /// Nothing.
    None,
}

impl Include {
    /// Reads `includeObject`.
    pub(crate) fn parse(text: Option<&str>) -> Self {
        match text {
            Some("Object") => Self::Object,
            Some("None") => Self::None,
            _ => Self::Metadata,
        }
    }
}

/// One column.
#[derive(Debug, Clone)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) format: String,
    pub(crate) description: String,
    pub(crate) priority: i64,
}

impl Column {
    fn new(name: &str, kind: &str, priority: i64) -> Self {
        Self {
            name: name.into(),
            kind: kind.into(),
            format: if name == "Name" { "name".into() } else { String::new() },
            description: String::new(),
            priority,
        }
    }
}

/// Columns of a resource.
pub(crate) fn columns(resource: &Resource) -> Vec<Column> {
    if let Some(custom) = &resource.custom {
        let mut out = vec![Column::new("Name", "string", 0)];
        if custom.columns.is_empty() {
            out.push(Column::new("Age", "date", 0));
        }
        for c in &custom.columns {
            out.push(Column {
                name: c["name"].as_str().unwrap_or_default().to_owned(),
                kind: c["type"].as_str().unwrap_or("string").to_owned(),
                format: c["format"].as_str().unwrap_or_default().to_owned(),
                description: c["description"].as_str().unwrap_or_default().to_owned(),
                priority: c["priority"].as_i64().unwrap_or(0),
            });
        }
        return out;
    }
    columns::of(&resource.group, &resource.kind)
        .iter()
        .map(|(name, priority)| {
            let numeric = matches!(
                *name,
                "Desired" | "Current" | "Up-to-date" | "Available" | "Data" | "Secrets" | "Webhooks"
            ) || (*name == "Ready"
                && matches!(
                    resource.kind.as_str(),
                    "ReplicaSet" | "DaemonSet" | "ReplicationController"
                ));
            Column::new(name, if numeric { "integer" } else { "string" }, *priority)
        })
        .collect()
}

/// Cells of one object.
pub(crate) fn cells(resource: &Resource, object: &Value, now: OffsetDateTime) -> Vec<Value> {
    let Some(custom) = &resource.custom else {
        return columns::cells(&resource.group, &resource.kind, object, now);
    };
    let mut out = vec![object["metadata"]["name"].clone()];
    if custom.columns.is_empty() {
        out.push(age(&object["metadata"]["creationTimestamp"], now).into());
    }
    for c in &custom.columns {
        let path = jsonpath::Path::parse(c["jsonPath"].as_str().unwrap_or_default());
        let found = path.as_ref().map(|p| p.find(object)).unwrap_or_default();
        let cell = match (found.as_slice(), c["type"].as_str().unwrap_or("string")) {
            ([], _) => Value::Null,
            ([one], "date") => age(one, now).into(),
            ([one], "integer" | "number" | "boolean") => (*one).clone(),
            ([Value::String(s)], _) => Value::String(s.clone()),
            ([one], _) => one.to_string().into(),
            (many, _) => many
                .iter()
                .map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
                .collect::<Vec<_>>()
                .join(",")
                .into(),
        };
        out.push(cell);
    }
    out
}

/// A table of objects.
pub(crate) fn table(
    resource: &Resource,
    objects: &[Value],
    list_meta: Value,
    include: Include,
    beta: bool,
    with_columns: bool,
) -> Value {
    let now = OffsetDateTime::now_utc();
    let version = if beta { "meta.k8s.io/v1beta1" } else { "meta.k8s.io/v1" };
    let definitions: Vec<Value> = if with_columns {
        columns(resource)
            .into_iter()
            .map(|c| {
                json!({"name": c.name, "type": c.kind, "format": c.format, "description": c.description, "priority": c.priority})
            })
            .collect()
    } else {
        vec![]
    };
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut row = json!({"cells": cells(resource, object, now)});
            match include {
                Include::Metadata => row["object"] = partial(object, beta),
                Include::Object => row["object"] = object.clone(),
                Include::None => {}
            }
            row
        })
        .collect();
    json!({
        "kind": "Table", "apiVersion": version, "metadata": list_meta,
        "columnDefinitions": definitions, "rows": rows,
    })
}

/// The metadata of an object as `PartialObjectMetadata`.
pub(crate) fn partial(object: &Value, beta: bool) -> Value {
    let version = if beta { "meta.k8s.io/v1beta1" } else { "meta.k8s.io/v1" };
    json!({"kind": "PartialObjectMetadata", "apiVersion": version, "metadata": object["metadata"]})
}

/// How long ago a time was, as kubectl writes it; `<unknown>` without one.
pub(crate) fn age(at: &Value, now: OffsetDateTime) -> String {
    at.as_str()
        .and_then(crate::meta::parse_time)
        .map_or_else(|| "<unknown>".to_owned(), |t| human(now - t))
}

/// `5s`, `2m3s`, `4h5m`, `3d`, `2y10d`.
pub(crate) fn human(d: time::Duration) -> String {
    let s = d.whole_seconds();
    if s < -1 {
        return "<invalid>".into();
    }
    let s = s.max(0);
    let (m, h, days) = (s / 60, s / 3600, s / 86400);
    let two = |a: i64, ua: &str, b: i64, ub: &str| {
        if b == 0 {
            format!("{a}{ua}")
        } else {
            format!("{a}{ua}{b}{ub}")
        }
    };
    match () {
        () if s < 120 => format!("{s}s"),
        () if m < 10 => two(m, "m", s % 60, "s"),
        () if m < 180 => format!("{m}m"),
        () if h < 8 => two(h, "h", m % 60, "m"),
        () if h < 48 => format!("{h}h"),
        () if days < 8 => two(days, "d", h % 24, "h"),
        () if days < 730 => format!("{days}d"),
        () if days < 365 * 8 => two(days / 365, "y", days % 365, "d"),
        () => format!("{}y", days / 365),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        for (s, want) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (599, "9m59s"),
            (600, "10m"),
            (10799, "179m"),
            (10800, "3h"),
            (29000, "8h"),
            (25260, "7h1m"),
            (172800, "2d"),
            (180000, "2d2h"),
            (700_000, "8d"),
            (63_072_000, "2y"),
            (-5, "<invalid>"),
        ] {
            assert_eq!(human(time::Duration::seconds(s)), want, "{s}");
        }
    }
}
