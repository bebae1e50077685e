//! Repairs of single places: keys, values, quotes, tabs.
//!
//! Edits come from the [`Fix`]es of findings, are cut into the text at the places of the tree, and keep the rest of each line.

use crate::diagnostic::{Diagnostic, Fix, Hint};
use crate::spans::{Content, Node};

/// A piece of the text and what replaces it.
struct Edit {
    from: usize,
    to: usize,
    with: String,
    what: String,
}

/// Applies the findings' fixes; none if no finding has one that applies.
pub(super) fn apply(text: &str, tree: &Node, findings: &[Diagnostic]) -> Option<(String, Vec<String>)> {
    let mut edits: Vec<Edit> = findings
        .iter()
        .filter(|f| !matches!(f.fix, Some(Fix::Wrap)))
        .filter_map(|f| edit(text, tree, f))
        .collect();
    if edits.is_empty() {
        // A wrapped block moves lines, so it is done alone.
        let finding = findings.iter().find(|f| matches!(f.fix, Some(Fix::Wrap)))?;
        edits.push(wrap(text, tree, finding)?);
    }
    edits.sort_by_key(|e| e.from);
    let mut out = String::with_capacity(text.len() + 64);
    let mut changes = Vec::new();
    let mut at = 0;
    for edit in edits {
        if edit.from < at {
            continue;
        }
        out.push_str(&text[at..edit.from]);
        out.push_str(&edit.with);
        at = edit.to;
        changes.push(edit.what);
    }
    out.push_str(&text[at..]);
    (out != text).then_some((out, changes))
}

fn edit(text: &str, tree: &Node, finding: &Diagnostic) -> Option<Edit> {
    let meant = || match &finding.hint {
        Some(Hint::DidYouMean(new)) => Some(new),
        _ => None,
    };
    match finding.fix? {
        Fix::RenameKey => {
            let new = meant()?;
            let (at, whole) = tree.locate(&finding.path);
            let old = finding.path.rsplit('.').next().unwrap_or_default();
            // The key's own place and extent, from the map around it.
            let parent = finding.path.strip_suffix(old)?.trim_end_matches('.');
            let entry = tree.at(parent)?.get(old)?;
            (whole && entry.at == at).then(|| Edit {
                from: entry.at.offset,
                to: entry.key_end,
                with: new.clone(),
                what: format!("{old:?} becomes {new:?}"),
            })
        }
        Fix::Text => {
            let new = meant()?;
            let node = tree.at(&finding.path)?;
            let Content::Scalar { text: old, plain } = &node.content else {
                return None;
            };
            Some(Edit {
                from: node.start.offset,
                to: node.end,
                with: if *plain && safe_plain(new) && unquoted(old).is_none() {
                    new.clone()
                } else {
                    quoted(new)
                },
                what: format!("{old:?} becomes {new:?}"),
            })
        }
        Fix::Quote => {
            let node = tree.at(&finding.path)?;
            let Content::Scalar { plain: true, .. } = &node.content else {
                return None;
            };
            let raw = text.get(node.start.offset..node.end)?;
            Some(Edit {
                from: node.start.offset,
                to: node.end,
                with: quoted(raw),
                what: format!("{raw} gets quotes"),
            })
        }
        Fix::Wrap => None,
    }
}

/// Makes a value the only item of a list.
fn wrap(text: &str, tree: &Node, finding: &Diagnostic) -> Option<Edit> {
    let node = tree.at(&finding.path)?;
    let raw = text.get(node.start.offset..node.end)?;
    let what = format!("the value of {:?} becomes the item of a list", finding.path);
    let (from, to) = (node.start.offset, node.end);
    let flow = raw.starts_with(['{', '[']);
    let with = match &node.content {
        Content::Scalar { text: value, plain } => {
            let inner = if *plain && !safe_plain(value) {
                quoted(value)
            } else {
                raw.to_string()
            };
            if raw.contains('\n') {
                return None;
            }
            format!("[{inner}]")
        }
        Content::Mapping(_) if flow => format!("[{raw}]"),
        // A block stands on lines of its own; all of them move to the right.
        Content::Mapping(_) => format!("- {}", raw.replace('\n', "\n  ")),
        _ => return None,
    };
    Some(Edit { from, to, with, what })
}

/// True when a text can stand without quotes, in a flow list as well.
fn safe_plain(text: &str) -> bool {
    let number = text.parse::<f64>().is_ok();
    let word = matches!(
        text.to_ascii_lowercase().as_str(),
        "null" | "true" | "false" | "yes" | "no" | "on" | "off" | "y" | "n"
    );
    !number
        && !word
        && text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '/')
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '@'))
}

fn quoted(text: &str) -> String {
    serde_json::Value::String(text.to_string()).to_string()
}

/// Typographic double quotes.
const DOUBLE: [char; 4] = ['“', '”', '„', '‟'];
/// Typographic single quotes.
const SINGLE: [char; 4] = ['‘', '’', '‚', '‛'];

/// The text between typographic quotes, if the whole text stands between two.
pub(crate) fn unquoted(text: &str) -> Option<&str> {
    let one = |set: [char; 4]| {
        let inner = text.strip_prefix(set)?.strip_suffix(set)?;
        (!inner.contains(set)).then_some(inner)
    };
    one(DOUBLE).or_else(|| one(SINGLE))
}

/// What keeps a text from being YAML at all: blanks that are none, typographic quotes around values, tabs. None if nothing of that is there or
/// if the text does not become readable in exactly one way.
pub(super) fn characters(text: &str) -> Option<(String, Vec<String>)> {
    let mut changes = Vec::new();
    let mut lines = Vec::new();
    for line in text.split('\n') {
        let body = line.trim_start_matches(['\u{a0}', '\u{2002}', '\u{2003}', '\u{3000}', ' ', '\t']);
        let head = &line[..line.len() - body.len()];
        let mut new: String = head
            .chars()
            .map(|c| if c == '\t' || c == ' ' { c } else { ' ' })
            .collect();
        if new != head {
            changes.push("blanks in front of a line become plain ones".to_string());
        }
        match straight_quotes(body) {
            Some(straight) => {
                changes.push("typographic quotes become plain ones".into());
                new.push_str(&straight);
            }
            None => new.push_str(body),
        }
        lines.push(new);
    }
    let joined = lines.join("\n");
    if super::read(&joined).is_some() {
        return (joined != text).then_some((joined, changes));
    }
    // A tab is as wide as the writer's editor made it; that is known only if all usual widths say the same or the others say nothing.
    let mut readings: Vec<(String, serde_json::Value)> = Vec::new();
    for width in [2, 4, 8] {
        let spaced: Vec<String> = lines
            .iter()
            .map(|line| {
                let body = line.trim_start_matches(['\t', ' ']);
                let head = &line[..line.len() - body.len()];
                format!("{}{body}", head.replace('\t', &" ".repeat(width)))
            })
            .collect();
        let candidate = spaced.join("\n");
        if candidate != joined
            && let Some(reading) = super::read(&candidate)
            && !readings.iter().any(|(_, value)| *value == reading.value)
        {
            readings.push((candidate, reading.value));
        }
    }
    if readings.len() != 1 {
        return None;
    }
    changes.push("tabs in front of lines become blanks".into());
    readings.pop().map(|(text, _)| (text, changes))
}

/// A line whose only value stands between typographic quotes, with plain ones.
fn straight_quotes(line: &str) -> Option<String> {
    let start = line.find(DOUBLE)?;
    let end = line.rfind(DOUBLE)?;
    let width = |at: usize| line[at..].chars().next().map_or(0, char::len_utf8);
    let before = line[..start].trim_end();
    let inner = line.get(start + width(start)..end)?;
    let after = line[end + width(end)..].trim();
    let fits = start < end
        && (before.is_empty() || before.ends_with([':', '-', '[', '{', ',']))
        && !inner.contains(['"', '\\'])
        && !inner.contains(DOUBLE)
        && (after.is_empty() || after.starts_with(['#', ',', ']', '}']));
    fits.then(|| format!("{}\"{inner}\"{}", &line[..start], &line[end + width(end)..]))
}
