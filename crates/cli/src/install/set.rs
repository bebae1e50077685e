//! `--set path=value`: parses the path, finds the type the value must have, and writes it into the spec tree.

use anyhow::{Result, bail};
use mantlet_api::diagnostic::{Hint, did_you_mean};
use mantlet_api::yaml;
use serde_json::{Value, json};

/// One step of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// A field.
    Field(String),
    /// A list item by position.
    Index(usize),
    /// A list item by a field's value, e.g. `[name:istio-ingressgateway]`.
    Key(String, String),
}

/// Applies one `path=value` to the tree. `schema` says which fields exist.
pub(super) fn apply(tree: &mut Value, assignment: &str, schema: &Value) -> Result<()> {
    let Some((path, text)) = split_assignment(assignment) else {
        bail!("bad --set {assignment:?}: use path=value");
    };
    let steps = parse(&path).map_err(|reason| anyhow::anyhow!("bad --set path {path:?}: {reason}"))?;
    let kind = check(&steps, schema, &path)?;
    let value = parse_value(text, kind.as_deref())
        .map_err(|reason| anyhow::anyhow!("bad --set value of {path}: {text:?} {reason}"))?;
    write(tree, &steps, value).map_err(|reason| anyhow::anyhow!("cannot set {path}: {reason}"))
}

/// Splits at the first `=` that is not inside brackets.
fn split_assignment(text: &str) -> Option<(String, &str)> {
    let mut depth = 0usize;
    for (i, c) in text.char_indices() {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            '=' if depth == 0 && i > 0 => return Some((text[..i].to_string(), &text[i + 1..])),
            _ => {}
        }
    }
    None
}

/// Parses `a.b[0].c`, `a.[name:x].b`; `\.` is a dot inside a field.
fn parse(path: &str) -> Result<Vec<Step>, String> {
    let mut steps = Vec::new();
    let mut field = String::new();
    let mut chars = path.chars();
    let mut expect_field = true;
    while let Some(c) = chars.next() {
        match c {
            '\\' => field.push(chars.next().ok_or("ends in a backslash")?),
            '.' => {
                if !field.is_empty() {
                    steps.push(Step::Field(std::mem::take(&mut field)));
                } else if expect_field {
                    return Err("has an empty step".into());
                }
                expect_field = true;
                continue;
            }
            '[' => {
                if !field.is_empty() {
                    steps.push(Step::Field(std::mem::take(&mut field)));
                }
                let inner: String = chars.by_ref().take_while(|c| *c != ']').collect();
                if let Ok(index) = inner.parse::<usize>() {
                    if index > 100 {
                        return Err(format!("list position {index} is too large"));
                    }
                    steps.push(Step::Index(index));
                } else if let Some((key, value)) = inner.split_once(':') {
                    steps.push(Step::Key(key.to_string(), value.to_string()));
                } else {
                    return Err(format!("[{inner}] is neither a position nor key:value"));
                }
            }
            other => field.push(other),
        }
        expect_field = false;
    }
    if !field.is_empty() {
        steps.push(Step::Field(field));
    } else if expect_field {
        return Err("ends in a dot".into());
    }
    Ok(steps)
}

/// Follows the path through the schema; returns the type at its end, if the schema knows it.
fn check(steps: &[Step], schema: &Value, path: &str) -> Result<Option<String>> {
    let mut at = schema;
    let mut walked = String::new();
    for step in steps {
        match step {
            Step::Field(name) => {
                if !walked.is_empty() {
                    walked.push('.');
                }
                walked.push_str(name);
                let properties = at.get("properties").and_then(Value::as_object);
                if let Some(inner) = properties.and_then(|p| p.get(name)) {
                    at = inner;
                } else if let Some(inner) = at.get("additionalProperties").filter(|a| a.is_object()) {
                    at = inner;
                } else if at.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true)) {
                    return Ok(None);
                } else {
                    let known = properties.into_iter().flat_map(|p| p.keys().map(String::as_str));
                    let hint = match did_you_mean(name, known) {
                        Some(Hint::DidYouMean(near)) => {
                            let parent = walked.strip_suffix(name.as_str()).unwrap_or_default();
                            format!(" (did you mean \"{parent}{near}\"?)")
                        }
                        _ => String::new(),
                    };
                    bail!("unknown field \"{walked}\" in --set {path}{hint}");
                }
            }
            Step::Index(_) | Step::Key(..) => match at.get("items") {
                Some(inner) => at = inner,
                None if at.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true)) => return Ok(None),
                None => bail!("{walked} in --set {path} is no list"),
            },
        }
    }
    Ok(at.get("type").and_then(Value::as_str).map(str::to_string))
}

/// Reads a value as the type wanted; without one as YAML reads it.
fn parse_value(text: &str, kind: Option<&str>) -> Result<Value, String> {
    if kind == Some("string") {
        return Ok(json!(text.trim_matches('"')));
    }
    let value = yaml::read_one(text).map_err(|e| format!("does not parse: {e}"))?;
    let fits = match kind {
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object() || value.is_null(),
        _ => true,
    };
    match (fits, kind) {
        (true, _) => Ok(value),
        (false, Some(kind)) => Err(format!("is not of type {kind}")),
        (false, None) => Err("does not fit".into()),
    }
}

fn write(tree: &mut Value, steps: &[Step], value: Value) -> Result<(), String> {
    let Some((step, rest)) = steps.split_first() else {
        *tree = value;
        return Ok(());
    };
    match step {
        Step::Field(name) => {
            if tree.is_null() {
                *tree = json!({});
            }
            let map = tree
                .as_object_mut()
                .ok_or_else(|| format!("{name} stands inside something that is no object"))?;
            write(map.entry(name.clone()).or_insert(Value::Null), rest, value)
        }
        Step::Index(index) => {
            if tree.is_null() {
                *tree = json!([]);
            }
            let list = tree.as_array_mut().ok_or("not a list")?;
            if *index > list.len() {
                return Err(format!(
                    "list has {} items, position {index} is beyond its end",
                    list.len()
                ));
            }
            if *index == list.len() {
                list.push(Value::Null);
            }
            write(&mut list[*index], rest, value)
        }
        Step::Key(key, wanted) => {
            if tree.is_null() {
                *tree = json!([]);
            }
            let list = tree.as_array_mut().ok_or("not a list")?;
            let at = list
                .iter()
                .position(|item| item.get(key).and_then(Value::as_str) == Some(wanted));
            let at = at.unwrap_or_else(|| {
                list.push(json!({ key: wanted }));
                list.len() - 1
            });
            write(&mut list[at], rest, value)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema() -> Value {
        json!({"type": "object", "properties": {
            "profile": {"type": "string"},
            "a": {"type": "object", "properties": {
                "flag": {"type": "boolean"}, "tag": {"type": "string"}, "n": {"type": "integer"},
                "list": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}, "on": {"type": "boolean"}}}},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            }},
        }})
    }

    #[test]
    fn sets() {
        let mut tree = json!({"a": {"list": [{"name": "x", "on": false}]}});
        for text in [
            "profile=demo",
            "a.flag=true",
            "a.tag=1.10",
            "a.n=3",
            "a.list[0].on=true",
            "a.list.[name:y].on=true",
            r"a.labels.example\.com/x=b=c",
            "a.free.any.thing=5",
        ] {
            apply(&mut tree, text, &schema()).unwrap();
        }
        assert_eq!(
            tree,
            json!({"a": {
                "list": [{"name": "x", "on": true}, {"name": "y", "on": true}],
                "flag": true, "tag": "1.10", "n": 3, "labels": {"example.com/x": "b=c"}, "free": {"any": {"thing": 5}},
            }, "profile": "demo"})
        );
    }

    #[test]
    fn refused() {
        for (text, part) in [
            ("profile", "use path=value"),
            ("=x", "use path=value"),
            ("proflie=x", "did you mean \"profile\""),
            ("a.flags=true", "did you mean \"a.flag\""),
            ("a.flag=maybe", "is not of type boolean"),
            ("a.n=x", "is not of type integer"),
            ("a..b=1", "empty step"),
            ("a.=1", "ends in a dot"),
            ("a.list[5].on=true", "beyond its end"),
            ("a.list[x].on=true", "neither a position"),
            ("a.tag[0]=x", "is no list"),
            ("a.list[99999999].on=true", "too large"),
        ] {
            let error = apply(&mut json!({"a": {"list": []}}), text, &schema())
                .unwrap_err()
                .to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
