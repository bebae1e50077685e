//! Repairing the text of an object where only one thing can have been meant.
//!
//! Called by `validate --fix`. Text in, text out: comments, order and everything that is not wrong stay as they are, a valid text is
//! never touched, and a second repair changes nothing. What is ambiguous is left alone and told. It must not know files.

pub(crate) mod edit;
mod indent;

use serde_json::Value;

use crate::diagnostic::{Code, Diagnostic, Severity};
use crate::spans::{self, Node};
use crate::{strict, yaml};

/// Longest text that is repaired, bytes.
pub const MAX_BYTES: usize = 1 << 20;
/// Most rounds of edits; each brings up what the errors before it hid.
const MAX_ROUNDS: usize = 64;

/// What became of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repair {
    /// The text, repaired as far as that is safe.
    pub text: String,
    /// What was done, in words, in order.
    pub changes: Vec<String>,
    /// Why more was not done.
    pub refused: Vec<String>,
}

/// A text that could be read, with all errors found in it.
struct Reading {
    value: Value,
    tree: Node,
    errors: Vec<Diagnostic>,
}

/// Reads a text as `validate` does; none if it is no YAML.
fn read(text: &str) -> Option<Reading> {
    let tree = spans::parse(text).ok()??;
    if !tree.duplicates().is_empty() {
        return None;
    }
    let value = yaml::read_one(text).ok()?;
    let errors = strict::document(&value)
        .into_iter()
        .filter(|f| f.severity == Severity::Error)
        .collect();
    Some(Reading { value, tree, errors })
}

/// Repairs one YAML document.
pub fn document(text: &str) -> Repair {
    let mut repair = Repair {
        text: text.to_string(),
        ..Repair::default()
    };
    if text.len() > MAX_BYTES {
        repair
            .refused
            .push(format!("a text over {} KiB is not repaired", MAX_BYTES >> 10));
        return repair;
    }
    for _ in 0..MAX_ROUNDS {
        let Some(next) = round(&repair.text, &mut repair.refused) else {
            break;
        };
        repair.text = next.0;
        repair.changes.extend(next.1);
        // Only what still stands in the way is worth telling.
        repair.refused.clear();
    }
    repair
}

/// One step, or none if nothing (more) can be done.
fn round(text: &str, refused: &mut Vec<String>) -> Option<(String, Vec<String>)> {
    let reading = read(text);
    if let Some(reading) = &reading {
        if reading.errors.is_empty() || reading.value.get("items").is_some_and(Value::is_array) {
            return None;
        }
        if let Some(done) = edit::apply(text, &reading.tree, &reading.errors) {
            return Some(done);
        }
        if !reading
            .errors
            .iter()
            .any(|e| matches!(e.code, Code::UNKNOWN_FIELD | Code::DECODE))
        {
            return None;
        }
    } else if let Some(done) = edit::characters(text) {
        return Some(done);
    }
    let unknown = |errors: &[Diagnostic]| errors.iter().filter(|e| e.code == Code::UNKNOWN_FIELD).count();
    match indent::restore(text, true) {
        indent::Found::One { text: new, changes, .. } => {
            let after = read(&new)?;
            let better =
                unknown(&after.errors) == 0 && reading.is_none_or(|before| after.errors.len() < before.errors.len());
            (better && new != text).then_some((new, changes))
        }
        indent::Found::Several => {
            refused.push("the indentation can be restored in more than one way".into());
            None
        }
        indent::Found::None(why) => {
            refused.extend(why);
            None
        }
    }
}

/// A text with its indentation restored and nothing else changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The text.
    pub text: String,
    /// For each of its lines the line and column, from 1, at which it stood.
    pub from: Vec<(usize, usize)>,
}

/// The layout of a text that lost its indentation, for findings about what is in it. None if its indentation is not what is wrong, or if more
/// than one nesting is possible.
pub fn layout(text: &str) -> Option<Layout> {
    if text.len() > MAX_BYTES {
        return None;
    }
    if let Some(reading) = read(text) {
        // Fields at the top that only spec or metadata has.
        let lost = |e: &Diagnostic| e.path == "metadata" || (e.code == Code::UNKNOWN_FIELD && !e.path.contains('.'));
        let flat = reading.errors.iter().filter(|e| lost(e)).count();
        if flat < 2 || reading.value.get("items").is_some_and(Value::is_array) {
            return None;
        }
    }
    match indent::restore(text, false) {
        indent::Found::One { text: new, from, .. } if read(&new).is_some() && new != text => {
            Some(Layout { text: new, from })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
