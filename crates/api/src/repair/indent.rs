//! Restoring indentation that was lost on the way, as when an article is copied from a web page.
//!
//! The lines are taken without their indentation, and every nesting is looked for in which each key is a field of what surrounds it, by
//! the schema of the kind. Only if there is exactly one is it taken. A key that its surroundings know as a field is never taken for a
//! label or another free key, for that is how a line that lost its place would go unnoticed.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::diagnostic::nearest;
use crate::{crd, kind, strict, yaml};

/// Most lines.
const MAX_LINES: usize = 2_000;
/// Most steps of the search.
const MAX_STEPS: usize = 50_000;

/// What the search found.
pub(super) enum Found {
    /// Exactly one nesting.
    One {
        /// The text with it.
        text: String,
        /// What was done.
        changes: Vec<String>,
        /// For each of its lines the line and column that it had, from 1.
        from: Vec<(usize, usize)>,
    },
    /// More than one.
    Several,
    /// None, with the reason if it is worth telling.
    None(Option<String>),
}

/// A line with content.
#[derive(Debug)]
struct Line {
    /// It is the first of a list's item.
    dash: bool,
    /// The key as written, and as a text.
    key: Option<(String, String)>,
    /// What stands behind the key or dash, with its comment.
    raw: String,
    /// What that says.
    value: Value,
    /// Lines without content in front of it.
    before: Vec<String>,
    /// Its number in the text, from 1, and the column of its first character.
    at: (usize, usize),
}

/// A container that is open at some line.
#[derive(Clone)]
struct Frame<'a> {
    schema: &'a Value,
    /// Keys it has; none for a list.
    keys: Option<BTreeSet<String>>,
    /// Column of its keys or dashes.
    indent: usize,
}

struct Search<'a> {
    lines: &'a [Line],
    steps: usize,
    solutions: Vec<Vec<(usize, String)>>,
}

/// Looks for the one nesting of the lines of `text`. With `rename`, keys get the names they are near to; without, they stay as they are.
pub(super) fn restore(text: &str, rename: bool) -> Found {
    let (lines, tail) = match lines(text) {
        Ok(lines) => lines,
        Err(why) => return Found::None(Some(why)),
    };
    let top = |key: &str| {
        let mut all = lines
            .iter()
            .filter(|line| line.key.as_ref().is_some_and(|(_, name)| name == key) && line.value.is_string());
        let first = all.next()?.value.as_str()?.to_string();
        Some(first)
    };
    let row = top("kind").zip(top("apiVersion")).and_then(|(k, v)| kind::find(&k, &v));
    let Some(spec) = row.and_then(crd::spec_schema) else {
        return Found::None(None);
    };
    let root = root_schema(spec);
    let mut search = Search {
        lines: &lines,
        steps: 0,
        solutions: Vec::new(),
    };
    let start = Frame {
        schema: &root,
        keys: Some(BTreeSet::new()),
        indent: 0,
    };
    search.step(0, &[start], &mut Vec::new());
    if search.steps > MAX_STEPS {
        return Found::None(Some("the indentation can be restored in too many ways".into()));
    }
    let solution = match search.solutions.as_slice() {
        [one] => one,
        [] => return Found::None(None),
        _ => return Found::Several,
    };
    let mut out = String::new();
    let mut changes = Vec::new();
    let mut from = Vec::new();
    for (line, (indent, key)) in lines.iter().zip(solution) {
        for (k, before) in line.before.iter().enumerate() {
            from.push((line.at.0.saturating_sub(line.before.len() - k), 1));
            let before = before.trim();
            if before.starts_with('#') {
                out.push_str(&" ".repeat(*indent));
            }
            out.push_str(before);
            out.push('\n');
        }
        from.push(line.at);
        out.push_str(&" ".repeat(*indent));
        if line.dash {
            out.push_str("- ");
        }
        if let Some((written, name)) = &line.key {
            if name == key || !rename {
                out.push_str(written);
            } else {
                changes.push(format!("{name:?} becomes {key:?}"));
                out.push_str(key);
            }
            out.push(':');
            if !line.raw.is_empty() {
                out.push(' ');
            }
        }
        out.push_str(&line.raw);
        out.push('\n');
    }
    for line in tail {
        out.push_str(line.trim_end());
        out.push('\n');
    }
    if !text.ends_with('\n') {
        out.pop();
    }
    changes.insert(0, "the indentation is restored".into());
    Found::One {
        text: out,
        changes,
        from,
    }
}

/// The schema of a whole object.
fn root_schema(spec: &Value) -> Value {
    let texts = json!({"type": "object", "additionalProperties": {"type": "string"}});
    let mut metadata = Map::new();
    for key in strict::METADATA {
        let schema = match key {
            "labels" | "annotations" => texts.clone(),
            "ownerReferences" | "managedFields" | "finalizers" => json!({"type": "array", "items": {}}),
            "generation" | "deletionGracePeriodSeconds" => json!({"type": "integer"}),
            _ => json!({"type": "string"}),
        };
        metadata.insert(key.into(), schema);
    }
    json!({"type": "object", "properties": {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object", "properties": metadata},
        "spec": spec,
    }})
}

/// The lines with content, and what follows the last one.
fn lines(text: &str) -> Result<(Vec<Line>, Vec<String>), String> {
    let mut lines: Vec<Line> = Vec::new();
    let mut before = Vec::new();
    let mut rest = text.lines().enumerate().peekable();
    while let Some((number, line)) = rest.next() {
        let content = line.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
        if content.is_empty() || content.starts_with('#') || content == "---" || content == "..." {
            before.push(line.to_string());
            continue;
        }
        if lines.len() >= MAX_LINES {
            return Err(format!("more than {MAX_LINES} lines are not repaired"));
        }
        let refuse = |what: &str| Err(format!("line {}: {what}", number + 1));
        let mut content = content.to_string();
        // A flow list or map, or a quoted text, may go on in the lines that follow.
        let mut joined = 0;
        while !balanced(&content) {
            match rest.next() {
                Some((_, next)) if joined < 100 => content = format!("{content} {}", next.trim()),
                _ => return refuse("brackets or quotes are not closed"),
            }
            joined += 1;
        }
        let mut column = 1 + line.chars().take_while(|c| c.is_whitespace()).count();
        let (dash, body) = match content.strip_prefix('-') {
            // "-key: value" is an item whose blank got lost.
            Some(inner) if inner.is_empty() || inner.starts_with([' ', '\t']) => (true, inner.trim_start()),
            Some(inner) if inner.starts_with(|c: char| c.is_ascii_alphabetic()) && key_of(inner).is_some() => {
                // The blank that is put in moves the rest of the line.
                column -= 1;
                (true, inner)
            }
            _ => (false, content.as_str()),
        };
        if body.starts_with("- ") || body.starts_with(['?', '&', '*', '!', '|', '>', '%']) {
            return refuse("only plain lists and maps are repaired");
        }
        let (key, raw) = match key_of(body) {
            Some((written, name, raw)) => (Some((written, name)), raw),
            None if dash => (None, body.to_string()),
            None => return refuse("this is no \"key: value\""),
        };
        if raw.starts_with(['|', '>', '&', '*', '!']) {
            return refuse("texts of several lines, anchors and tags are not repaired");
        }
        let value = yaml::read_one(&raw).map_err(|e| format!("line {}: {e}", number + 1))?;
        lines.push(Line {
            dash,
            key,
            raw,
            value,
            before: std::mem::take(&mut before),
            at: (number + 1, column),
        });
    }
    Ok((lines, before))
}

/// Splits `key: value`: the key as written, as a text, and the rest.
fn key_of(body: &str) -> Option<(String, String, String)> {
    let (written, name, rest) = match body.chars().next()? {
        quote @ ('"' | '\'') => {
            let end = body[1..].find(quote)? + 1;
            (&body[..=end], body[1..end].to_string(), body[end + 1..].trim_start())
        }
        '{' | '[' | '#' => return None,
        _ => {
            let end = body
                .char_indices()
                .find(|(at, c)| *c == ':' && body[at + 1..].chars().next().is_none_or(char::is_whitespace))?
                .0;
            (&body[..end], body[..end].trim().to_string(), &body[end..])
        }
    };
    let rest = rest.strip_prefix(':')?;
    if !(rest.is_empty() || rest.starts_with(char::is_whitespace)) || name.is_empty() {
        return None;
    }
    Some((written.trim_end().to_string(), name, rest.trim().to_string()))
}

/// True when all brackets and quotes of a line are closed.
fn balanced(line: &str) -> bool {
    let mut depth = 0i32;
    let mut quote = None;
    let mut last = ' ';
    let mut flow = false;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match quote {
            Some('"') if c == '\\' => {
                chars.next();
            }
            Some(q) if c == q => quote = None,
            Some(_) => {}
            None => match c {
                '"' | '\'' if last.is_whitespace() || matches!(last, '[' | '{' | ',' | ':') => quote = Some(c),
                '[' | '{' if flow || last.is_whitespace() => {
                    depth += 1;
                    flow = true;
                }
                ']' | '}' if flow => depth -= 1,
                '#' if last.is_whitespace() => break,
                _ => {}
            },
        }
        last = c;
    }
    depth <= 0 && quote.is_none()
}

impl<'a> Search<'a> {
    fn step(&mut self, at: usize, stack: &[Frame<'_>], placed: &mut Vec<(usize, String)>) {
        self.steps += 1;
        if self.steps > MAX_STEPS || self.solutions.len() > 1 {
            return;
        }
        let Some(line) = self.lines.get(at) else {
            if !self.solutions.contains(placed) {
                self.solutions.push(placed.clone());
            }
            return;
        };
        for (mut open, key) in places(line, stack) {
            let Some(frame) = open.last() else { continue };
            // The dash stands in the list's column, the key behind it.
            let column = if line.dash {
                frame.indent.saturating_sub(2)
            } else {
                frame.indent
            };
            let inner = line
                .key
                .as_ref()
                .and_then(|_| field(frame.schema, &key).map(|(schema, _)| schema));
            let indent = frame.indent;
            if let Some(keys) = open.last_mut().and_then(|f| f.keys.as_mut()) {
                keys.insert(key.clone());
            }
            let column = if line.key.is_none() { indent } else { column };
            if let Some(schema) = inner.filter(|_| line.value.is_null()) {
                match type_of(schema) {
                    "object" => open.push(Frame {
                        schema,
                        keys: Some(BTreeSet::new()),
                        indent: indent + 2,
                    }),
                    "array" => open.push(Frame {
                        schema,
                        keys: None,
                        indent: indent + 2,
                    }),
                    _ => {}
                }
            }
            placed.push((column, key));
            self.step(at + 1, &open, placed);
            placed.pop();
        }
    }
}

/// How well a key fits a map, best first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    Known,
    Free,
    Near,
}

/// The frames that stay open and the key, for each place a line can go to.
fn places<'s>(line: &Line, stack: &[Frame<'s>]) -> Vec<(Vec<Frame<'s>>, String)> {
    let mut found: Vec<(Fit, Vec<Frame<'s>>, String)> = Vec::new();
    for depth in (0..stack.len()).rev() {
        let frame = &stack[depth];
        let mut open: Vec<Frame<'s>> = stack[..=depth].to_vec();
        if line.dash != frame.keys.is_none() {
            continue;
        }
        if line.dash {
            let Some(items) = frame.schema.get("items") else {
                continue;
            };
            let Some((_, name)) = &line.key else {
                if fits(&line.value, items) && !line.value.is_null() {
                    found.push((Fit::Known, open, String::new()));
                }
                continue;
            };
            open.push(Frame {
                schema: items,
                keys: Some(BTreeSet::new()),
                indent: frame.indent + 2,
            });
            if let Some((fit, key)) = admit(name, &line.value, items, &BTreeSet::new()) {
                found.push((fit, open, key));
            }
        } else if let (Some((_, name)), Some(keys)) = (&line.key, &frame.keys)
            && let Some((fit, key)) = admit(name, &line.value, frame.schema, keys)
        {
            found.push((fit, open, key));
        }
    }
    let best = found.iter().map(|(fit, ..)| *fit).min();
    found
        .into_iter()
        .filter(|(fit, ..)| Some(*fit) == best)
        .map(|(_, open, key)| (open, key))
        .collect()
}

/// Whether a map takes a key with a value, and under which name.
fn admit(name: &str, value: &Value, schema: &Value, taken: &BTreeSet<String>) -> Option<(Fit, String)> {
    let properties = schema.get("properties").and_then(Value::as_object);
    let ok = |key: &str| !taken.contains(key) && field(schema, key).is_some_and(|(inner, _)| fits(value, inner));
    if properties.is_some_and(|p| p.contains_key(name)) {
        return ok(name).then(|| (Fit::Known, name.to_string()));
    }
    if let Some((inner, true)) = field(schema, name)
        // `app:` alone is no label.
        && !(value.is_null() && type_of(inner) == "string")
    {
        return ok(name).then(|| (Fit::Free, name.to_string()));
    }
    let known: Vec<&str> = properties?.keys().map(String::as_str).collect();
    let (near, only) = nearest(name, known)?;
    (only && ok(near)).then(|| (Fit::Near, near.to_string()))
}

/// The schema of a key, and whether the key is free.
fn field<'s>(schema: &'s Value, key: &str) -> Option<(&'s Value, bool)> {
    if let Some(inner) = schema.get("properties").and_then(|p| p.get(key)) {
        return Some((inner, false));
    }
    schema
        .get("additionalProperties")
        .filter(|inner| inner.is_object())
        .map(|inner| (inner, true))
}

fn type_of(schema: &Value) -> &str {
    schema.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// Whether a value can stand there, or could after a repair of its own.
fn fits(value: &Value, schema: &Value) -> bool {
    match (type_of(schema), value) {
        (_, Value::Null) | ("", _) => true,
        ("object", other) => other.is_object(),
        ("array", other) => !matches!(other, Value::Bool(_)),
        ("string", other) => !other.is_object() && !other.is_array(),
        ("integer" | "number", other) => other.is_number(),
        ("boolean", other) => other.is_boolean(),
        _ => true,
    }
}
