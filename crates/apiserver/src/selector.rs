//! Label and field selectors, as list, watch and deletecollection take them.
//!
//! Pure: parses the text forms and matches them against JSON documents.

use serde_json::Value;

use crate::error::{ApiError, ApiResult};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Missing,
    Greater(i64),
    Less(i64),
}

/// A label selector: all requirements must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LabelSelector(Vec<(String, Test)>);

fn valid_label_key(key: &str) -> bool {
    let (prefix, name) = match key.split_once('/') {
        Some((p, n)) => (Some(p), n),
        None => (None, key),
    };
    crate::names::qualified_part(name) && prefix.is_none_or(crate::names::is_dns1123_subdomain)
}

impl LabelSelector {
    /// Parses `a=b,c!=d,e in (f,g),!h,i,j>1`.
    pub(crate) fn parse(text: &str) -> ApiResult<Self> {
        let bad = |why: String| ApiError::bad_request(format!("unable to parse requirement: {why}"));
        let mut out = Vec::new();
        for part in split_outside_parens(text) {
            let part = part.trim();
            if part.is_empty() {
                if text.trim().is_empty() {
                    continue;
                }
                return Err(bad("found '', expected: identifier after ','".into()));
            }
            let (key, test) = if let Some(rest) = part.strip_prefix('!') {
                (rest.trim(), Test::Missing)
            } else if let Some((k, v)) = part.split_once("!=") {
                (k.trim(), Test::NotIn(vec![v.trim().to_owned()]))
            } else if let Some((k, v)) = part.split_once("==") {
                (k.trim(), Test::In(vec![v.trim().to_owned()]))
            } else if let Some((k, v)) = part.split_once('=') {
                (k.trim(), Test::In(vec![v.trim().to_owned()]))
            } else if let Some((k, v)) = part.split_once(['>', '<']) {
                let n = v
                    .trim()
                    .parse()
                    .map_err(|_| bad(format!("for 'Gt', 'Lt' operators, the value must be an integer: {v}")))?;
                (
                    k.trim(),
                    if part.contains('>') {
                        Test::Greater(n)
                    } else {
                        Test::Less(n)
                    },
                )
            } else if let Some((head, tail)) = part.split_once('(') {
                let values = tail
                    .strip_suffix(')')
                    .ok_or_else(|| bad(format!("found {part:?}, expected: ')'")))?;
                let values: Vec<String> = values.split(',').map(|v| v.trim().to_owned()).collect();
                let mut words = head.split_whitespace();
                let key = words.next().unwrap_or_default();
                let test = match words.next() {
                    Some("in") => Test::In(values),
                    Some("notin") => Test::NotIn(values),
                    _ => return Err(bad(format!("found {part:?}, expected: in, notin, =, ==, !=, gt, lt"))),
                };
                (key, test)
            } else {
                (part, Test::Exists)
            };
            if !valid_label_key(key) {
                return Err(bad(format!(
                    "<nil>: Invalid value: {key:?}: {}",
                    crate::names::QUALIFIED_NAME_MSG
                )));
            }
            if let Test::In(values) | Test::NotIn(values) = &test
                && let Some(v) = values.iter().find(|v| !crate::names::is_label_value(v))
            {
                return Err(bad(format!(
                    "values[0][{key}]: Invalid value: {v:?}: {}",
                    crate::names::LABEL_VALUE_MSG
                )));
            }
            out.push((key.to_owned(), test));
        }
        Ok(Self(out))
    }

    /// Reads a `metav1.LabelSelector` object (`matchLabels`, `matchExpressions`). An absent selector matches nothing is the
    /// caller's business; an empty one matches everything.
    pub(crate) fn from_object(selector: &Value) -> ApiResult<Self> {
        let mut out = Vec::new();
        if let Some(labels) = selector["matchLabels"].as_object() {
            for (k, v) in labels {
                out.push((k.clone(), Test::In(vec![v.as_str().unwrap_or_default().to_owned()])));
            }
        }
        for e in selector["matchExpressions"].as_array().into_iter().flatten() {
            let values: Vec<String> = e["values"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|v| v.as_str().map(str::to_owned))
                .collect();
            let test = match e["operator"].as_str() {
                Some("In") => Test::In(values),
                Some("NotIn") => Test::NotIn(values),
                Some("Exists") => Test::Exists,
                Some("DoesNotExist") => Test::Missing,
                other => {
                    let other = other.unwrap_or_default();
                    return Err(ApiError::bad_request(format!(
                        "{other:?} is not a valid label selector operator"
                    )));
                }
            };
            out.push((e["key"].as_str().unwrap_or_default().to_owned(), test));
        }
        Ok(Self(out))
    }

    /// Whether the labels of `object` satisfy every requirement.
    pub(crate) fn matches(&self, object: &Value) -> bool {
        self.matches_labels(&object["metadata"]["labels"])
    }

    /// Whether a label map satisfies every requirement.
    pub(crate) fn matches_labels(&self, labels: &Value) -> bool {
        self.0.iter().all(|(key, test)| {
            let value = labels.get(key).and_then(Value::as_str);
            match test {
                Test::In(values) => value.is_some_and(|v| values.iter().any(|x| x == v)),
                Test::NotIn(values) => value.is_none_or(|v| values.iter().all(|x| x != v)),
                Test::Exists => value.is_some(),
                Test::Missing => value.is_none(),
                Test::Greater(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *n),
                Test::Less(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *n),
            }
        })
    }

    /// Whether there is no requirement.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn split_outside_parens(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0_i32, 0);
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

/// A field selector: all comparisons must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FieldSelector(Vec<(String, bool, String)>);

impl FieldSelector {
    /// Parses `metadata.name=x,status.phase!=Running` and checks that the fields can be selected for this kind.
    pub(crate) fn parse(text: &str, kind: &str, custom: bool) -> ApiResult<Self> {
        let mut out = Vec::new();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (field, equal, value) = if let Some((f, v)) = part.split_once("!=") {
                (f, false, v)
            } else if let Some((f, v)) = part.split_once("==") {
                (f, true, v)
            } else if let Some((f, v)) = part.split_once('=') {
                (f, true, v)
            } else {
                return Err(ApiError::bad_request(format!(
                    "invalid field selector {text:?}: found {part:?}, expected: field=value or field!=value"
                )));
            };
            let field = field.trim();
            let generic = matches!(field, "metadata.name" | "metadata.namespace");
            if !generic && (custom || !selectable(kind, field)) {
                return Err(ApiError::bad_request(format!("field label not supported: {field}")));
            }
            let value = value
                .trim()
                .replace("\\,", ",")
                .replace("\\=", "=")
                .replace("\\\\", "\\");
            out.push((field.to_owned(), equal, value));
        }
        Ok(Self(out))
    }

    /// The name that must match exactly, if the selector pins one.
    pub(crate) fn exact_name(&self) -> Option<&str> {
        self.0
            .iter()
            .find(|(f, eq, _)| f == "metadata.name" && *eq)
            .map(|(_, _, v)| v.as_str())
    }

    /// Whether `object` satisfies every comparison.
    pub(crate) fn matches(&self, object: &Value) -> bool {
        self.0
            .iter()
            .all(|(field, equal, value)| (field_text(object, field) == *value) == *equal)
    }
}

fn selectable(kind: &str, field: &str) -> bool {
    let allowed: &[&str] = match kind {
        "Pod" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.podIPs",
            "status.nominatedNodeName",
        ],
        "Event" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "reportingController",
        ],
        "Secret" => &["type"],
        "Namespace" => &["status.phase"],
        "Node" => &["spec.unschedulable"],
        "Service" => &["spec.clusterIP", "spec.type"],
        "ReplicaSet" | "ReplicationController" => &["status.replicas"],
        "Job" => &["status.successful"],
        "CertificateSigningRequest" => &["spec.signerName"],
        _ => &[],
    };
    allowed.contains(&field)
}

fn field_text(object: &Value, field: &str) -> String {
    // `source` of an event selects its component; the two event APIs name some fields differently.
    let path = match field {
        "source" => "source.component",
        "reportingController" => "reportingComponent",
        other => other,
    };
    let mut at = object;
    for step in path.split('.') {
        let renamed = if step == "regarding" && at.get("regarding").is_none() {
            "involvedObject"
        } else {
            step
        };
        at = &at[renamed];
    }
    match at {
        Value::String(s) => s.clone(),
        Value::Null if matches!(path, "spec.unschedulable" | "spec.hostNetwork") => "false".into(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn label_forms() {
        let pod = json!({"metadata": {"labels": {"app": "x", "tier": "web", "n": "5"}}});
        for (text, want) in [
            ("app=x", true),
            ("app==x,tier!=web", false),
            ("app in (x,y),tier notin (db)", true),
            ("!gone", true),
            ("app", true),
            ("!app", false),
            ("n>4", true),
            ("n<4", false),
            ("", true),
            ("missing!=v", true),
            ("missing notin (v)", true),
            ("app=", false),
        ] {
            assert_eq!(LabelSelector::parse(text).unwrap().matches(&pod), want, "{text}");
        }
        for text in ["a in x", "a=b,,c", "a b", "-a=b", "a in (x", "a=b c"] {
            assert!(LabelSelector::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn field_forms() {
        let pod = json!({"metadata": {"name": "a", "namespace": "b"}, "status": {"phase": "Running"}});
        let sel = |t: &str| FieldSelector::parse(t, "Pod", false);
        assert!(
            sel("metadata.name=a,metadata.namespace!=kube-system,status.phase==Running")
                .unwrap()
                .matches(&pod)
        );
        assert!(!sel("status.phase!=Running").unwrap().matches(&pod));
        assert!(sel("spec.hostNetwork=false").unwrap().matches(&pod));
        assert!(sel("spec.image=x").is_err());
        assert_eq!(sel("metadata.name=a").unwrap().exact_name(), Some("a"));
    }
}
