//! YAML in and out, as JSON values.
//!
//! Reading refuses duplicate keys, bounds aliases, and takes several documents. Writing is deterministic and quotes every text that a
//! YAML 1.1 reader (kubectl's) could take for something else, so that what is printed reads back as the same value everywhere.

use std::fmt::Write;

use serde_json::Value;

/// Most bytes of one file.
pub const MAX_BYTES: usize = 8 << 20;

/// Why a text is not YAML (or too large), with line and column.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct YamlError(String);

/// Reads exactly one document; an empty text is null.
pub fn read_one(text: &str) -> Result<Value, YamlError> {
    let mut all = read_all(text)?;
    match all.len() {
        0 => Ok(Value::Null),
        1 => Ok(all.remove(0)),
        n => Err(YamlError(format!("expected one YAML document, found {n}"))),
    }
}

/// Reads all documents, leaving out empty ones.
pub fn read_all(text: &str) -> Result<Vec<Value>, YamlError> {
    if text.len() > MAX_BYTES {
        return Err(YamlError(format!(
            "YAML text of {} bytes is over the limit of {MAX_BYTES}",
            text.len()
        )));
    }
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|e| YamlError(format!("invalid YAML: {e}")))?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// Writes one document in block style, without a leading `---`.
pub fn write(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => mapping(&mut out, map, 0),
        Value::Array(items) if !items.is_empty() => sequence(&mut out, items, 0),
        other => {
            scalar(&mut out, other, 0);
            out.push('\n');
        }
    }
    out
}

/// Writes several documents separated by `---`.
pub fn write_all<'a>(values: impl IntoIterator<Item = &'a Value>) -> String {
    let mut out = String::new();
    for (i, value) in values.into_iter().enumerate() {
        if i > 0 {
            out.push_str("---\n");
        }
        out.push_str(&write(value));
    }
    out
}

fn indent(out: &mut String, depth: usize) {
    for _ in 0..depth {
        out.push_str("  ");
    }
}

fn mapping(out: &mut String, map: &serde_json::Map<String, Value>, depth: usize) {
    for (i, (key, value)) in map.iter().enumerate() {
        if i > 0 || depth == 0 || out.ends_with('\n') {
            indent(out, depth);
        }
        text(out, key, None);
        out.push(':');
        after_key(out, value, depth);
    }
}

fn after_key(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push('\n');
            mapping(out, map, depth + 1);
        }
        Value::Array(items) if !items.is_empty() => {
            out.push('\n');
            sequence(out, items, depth);
        }
        other => {
            out.push(' ');
            scalar(out, other, depth + 1);
            out.push('\n');
        }
    }
}

fn sequence(out: &mut String, items: &[Value], depth: usize) {
    for item in items {
        indent(out, depth);
        out.push('-');
        match item {
            Value::Object(map) if !map.is_empty() => {
                out.push(' ');
                mapping(out, map, depth + 1);
            }
            Value::Array(inner) if !inner.is_empty() => {
                out.push('\n');
                sequence(out, inner, depth + 1);
            }
            other => {
                out.push(' ');
                scalar(out, other, depth + 1);
                out.push('\n');
            }
        }
    }
}

fn scalar(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Object(_) => out.push_str("{}"),
        Value::Array(_) => out.push_str("[]"),
        Value::String(s) => text(out, s, Some(depth)),
        other => {
            let _ = write!(out, "{other}");
        }
    }
}

/// Writes a text: plain if nothing can misread it, as a literal block if it has lines (and `block` gives the depth), else as JSON,
/// which is a YAML double-quoted text.
fn text(out: &mut String, s: &str, block: Option<usize>) {
    if is_plain(s) {
        out.push_str(s);
    } else if let Some(depth) = block.filter(|_| fits_block(s)) {
        let keep = if s.ends_with('\n') { "|" } else { "|-" };
        out.push_str(keep);
        for line in s.strip_suffix('\n').unwrap_or(s).split('\n') {
            out.push('\n');
            if !line.is_empty() {
                indent(out, depth);
                out.push_str(line);
            }
        }
    } else {
        out.push_str(&Value::String(s.to_string()).to_string());
    }
}

fn fits_block(s: &str) -> bool {
    let body = s.strip_suffix('\n').unwrap_or(s);
    body.contains('\n')
        && !body.starts_with([' ', '\n'])
        && !body.ends_with(['\n', ' '])
        && s.chars()
            .all(|c| c == '\n' || (!c.is_control() && !matches!(c, '\u{85}' | '\u{2028}' | '\u{2029}' | '\u{feff}')))
}

fn is_plain(s: &str) -> bool {
    let Some(first) = s.chars().next() else { return false };
    let words = [
        "null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf",
    ];
    // Numbers, dates, merge keys and the like all begin with a digit, a sign or a dot: quote whatever does.
    (first.is_ascii_alphabetic() || first == '/' || first == '_')
        && s.chars()
            .all(|c| c.is_ascii_alphanumeric() || "/_-.$()=+;@,<> :'\"*%".contains(c))
        && !s.contains(": ")
        && !s.contains(" #")
        && !s.ends_with([':', ' '])
        && !words.contains(&s.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn shape() {
        let value =
            json!({"a": {"b": [1, "x: y", {"c": null, "d": []}], "yes": "no"}, "t": "l1\nl2\n", "e": {}, "v": "1.0"});
        let expected = "a:\n  b:\n  - 1\n  - \"x: y\"\n  - c: null\n    d: []\n  \"yes\": \"no\"\nt: |\n  l1\n  l2\ne: {}\nv: \"1.0\"\n";
        assert_eq!(write(&value), expected);
        assert_eq!(read_one(expected).unwrap(), value);
    }

    #[test]
    fn bad_input() {
        assert!(read_one("a: 1\na: 2\n").is_err(), "duplicate key accepted");
        assert!(read_one("a: [").is_err());
        assert!(read_one("a: 1\n---\nb: 2\n").is_err());
        assert_eq!(read_all("---\n---\na: 1\n---\n").unwrap(), vec![json!({"a": 1})]);
        assert!(read_one(&"x".repeat(MAX_BYTES + 1)).is_err());
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[ -~\n]{0,20}".prop_map(Value::from),
            "(yes|no|on|0x1|1e3|~|null|- a|a: b|#x|'|\"|\\*a|&a|!t|%|@|`|<<|=|\\||>)".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[ -~]{0,8}", inner, 0..5)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn reads_back(value in any_value()) {
            let value = json!({"root": value});
            prop_assert_eq!(read_one(&write(&value)).unwrap(), value);
        }
    }
}
