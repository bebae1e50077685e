//! The part of JSONPath that printer columns and scale subresources use: fields, indices, wildcards and equality filters.
//!
//! Pure; parsed once per column.

use serde_json::Value;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Field(String),
    Index(i64),
    All,
    Filter {
        field: Vec<String>,
        equal: bool,
        value: Value,
    },
}

/// A parsed path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Path(Vec<Step>);

impl Path {
    /// Parses `.spec.hosts`, `.status.conditions[?(@.type=="Ready")].status`, `.metadata.labels['a.b/c']`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let text = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).unwrap_or(text);
        let text = text.strip_prefix('$').unwrap_or(text);
        if !text.starts_with(['.', '[']) {
            return Err("must be a json path that starts with '.'".to_owned());
        }
        let mut steps = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            if let Some(tail) = rest.strip_prefix('.') {
                let mut name = String::new();
                let mut chars = tail.char_indices().peekable();
                let mut end = tail.len();
                while let Some((i, c)) = chars.next() {
                    match c {
                        '\\' => {
                            if let Some((_, next)) = chars.next() {
                                name.push(next);
                            }
                        }
                        '.' | '[' => {
                            end = i;
                            break;
                        }
                        c => name.push(c),
                    }
                }
                rest = &tail[end..];
                match name.as_str() {
                    "*" => steps.push(Step::All),
                    "" if rest.starts_with('[') => {}
                    "" if rest.is_empty() && steps.is_empty() => {}
                    "" => return Err("is not a valid json path: empty field name".to_owned()),
                    _ => steps.push(Step::Field(name)),
                }
            } else if let Some(tail) = rest.strip_prefix('[') {
                let end = tail.find(']').ok_or("is not a valid json path: unterminated array")?;
                // A filter's literal may hold a bracket; take up to ")]" then.
                let end = if tail.starts_with('?') {
                    tail.find(")]").ok_or("is not a valid json path: unterminated filter")? + 1
                } else {
                    end
                };
                let inner = &tail[..end];
                rest = &tail[end + 1..];
                steps.push(parse_bracket(inner)?);
            } else {
                return Err(format!("is not a valid json path: unexpected {rest:?}"));
            }
        }
        Ok(Self(steps))
    }

    /// All values at the path.
    pub(crate) fn find<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        let mut at = vec![value];
        for step in &self.0 {
            let mut next = Vec::new();
            for v in at {
                match step {
                    Step::Field(name) => next.extend(v.get(name)),
                    Step::Index(i) => {
                        if let Some(list) = v.as_array() {
                            let i = if *i < 0 { list.len() as i64 + i } else { *i };
                            next.extend(usize::try_from(i).ok().and_then(|i| list.get(i)));
                        }
                    }
                    Step::All => match v {
                        Value::Array(list) => next.extend(list),
                        Value::Object(map) => next.extend(map.values()),
                        _ => {}
                    },
                    Step::Filter { field, equal, value } => {
                        for item in v.as_array().into_iter().flatten() {
                            let found = field.iter().try_fold(item, |v, f| v.get(f));
                            if (found == Some(value)) == *equal && found.is_some() {
                                next.push(item);
                            }
                        }
                    }
                }
            }
            at = next;
        }
        at
    }

    /// Sets a value at a path of plain fields, creating objects on the way.
    pub(crate) fn set(&self, target: &mut Value, value: Value) -> bool {
        let mut at = target;
        for step in &self.0 {
            let Step::Field(name) = step else { return false };
            if !at.is_object() {
                *at = Value::Object(serde_json::Map::new());
            }
            at = &mut at[name.as_str()];
        }
        *at = value;
        true
    }
}

fn parse_bracket(inner: &str) -> Result<Step, String> {
    let inner = inner.trim();
    if inner == "*" {
        return Ok(Step::All);
    }
    if let Ok(i) = inner.parse() {
        return Ok(Step::Index(i));
    }
    for quote in ['\'', '"'] {
        if let Some(name) = inner.strip_prefix(quote).and_then(|t| t.strip_suffix(quote)) {
            return Ok(Step::Field(name.to_owned()));
        }
    }
    if let Some(filter) = inner.strip_prefix("?(").and_then(|t| t.strip_suffix(')')) {
        let (left, equal, right) = match (filter.split_once("=="), filter.split_once("!=")) {
            (Some((l, r)), _) => (l, true, r),
            (_, Some((l, r))) => (l, false, r),
            _ => return Err("is not a valid json path: only == and != filters are supported".to_owned()),
        };
        let field = left
            .trim()
            .strip_prefix('@')
            .ok_or("is not a valid json path: a filter must start with '@'")?;
        let field = field.split('.').filter(|f| !f.is_empty()).map(str::to_owned).collect();
        let right = right.trim();
        let value = match right.strip_prefix('\'').and_then(|r| r.strip_suffix('\'')) {
            Some(text) => Value::String(text.to_owned()),
            None => {
                serde_json::from_str(right).map_err(|_| format!("is not a valid json path: bad literal {right}"))?
            }
        };
        return Ok(Step::Filter { field, equal, value });
    }
    Err(format!("is not a valid json path: [{inner}]"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_of_printer_columns() {
        let v = json!({"spec": {"hosts": ["a", "b"], "n": 3}, "status": {"conditions": [
            {"type": "Ready", "status": "True"}, {"type": "Other", "status": "False"}]}, "metadata": {"labels": {"a.b/c": "d"}}});
        let get = |p: &str| {
            Path::parse(p)
                .unwrap()
                .find(&v)
                .into_iter()
                .cloned()
                .collect::<Vec<_>>()
        };
        assert_eq!(get(".spec.hosts"), [json!(["a", "b"])]);
        assert_eq!(get(".spec.hosts[*]"), [json!("a"), json!("b")]);
        assert_eq!(get(".spec.hosts[-1]"), [json!("b")]);
        assert_eq!(get(".status.conditions[?(@.type==\"Ready\")].status"), [json!("True")]);
        assert_eq!(get(".status.conditions[?(@.type=='Other')].status"), [json!("False")]);
        assert_eq!(get(".metadata.labels['a.b/c']"), [json!("d")]);
        assert_eq!(get(".metadata.labels.a\\.b/c"), [json!("d")]);
        assert!(get(".spec.none.deeper").is_empty());
        for bad in ["spec", ".a[", ".a[?(@.x>1)]", "", ".a..b"] {
            assert!(Path::parse(bad).is_err(), "{bad}");
        }
        let mut target = json!({});
        assert!(Path::parse(".spec.replicas").unwrap().set(&mut target, json!(2)));
        assert_eq!(target, json!({"spec": {"replicas": 2}}));
    }
}
