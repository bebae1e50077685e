//! The table of bounds in `docs/security.md`: every constant of the product that limits a size, a count, a queue or a time.
//!
//! `tidy` compares the table with the sources, `bounds` writes it. The text of a row is the constant's own doc comment, so that
//! a bound is explained where it is set.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

const DOCUMENT: &str = "docs/security.md";
const BEGIN: &str = "<!-- bounds: begin (cargo run -p xtask -- bounds) -->";
const END: &str = "<!-- bounds: end -->";
/// Crates that meet bytes from outside, in the order of the table.
const CRATES: [&str; 9] = [
    "proxy",
    "control",
    "xds",
    "apiserver",
    "node",
    "identity",
    "api",
    "model",
    "runtime",
];
/// Numbers whose names say that they are a bound.
const WORDS: [&str; 14] = [
    "MAX", "LIMIT", "QUEUE", "CAPACITY", "TIMEOUT", "BUFFER", "BACKLOG", "WINDOW", "LONGEST", "DEPTH", "BUDGET",
    "LEAST", "ATTEMPTS", "PERIOD",
];

#[derive(Debug, PartialEq, Eq)]
struct Bound {
    name: String,
    value: String,
    meaning: String,
}

/// What of the document does not agree with the sources.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(root.join(DOCUMENT)).context(DOCUMENT)?;
    let (_, table, _) = split(&text)?;
    let wanted = render(root)?;
    if table.trim() == wanted.trim() {
        return Ok(Vec::new());
    }
    let lines = |text: &str| {
        text.lines()
            .map(str::to_string)
            .collect::<std::collections::BTreeSet<_>>()
    };
    let (have, want) = (lines(table), lines(&wanted));
    let mut out: Vec<String> = want
        .difference(&have)
        .map(|row| format!("{DOCUMENT}: missing: {row}"))
        .collect();
    out.extend(
        have.difference(&want)
            .map(|row| format!("{DOCUMENT}: no longer so: {row}")),
    );
    out.push(format!(
        "{DOCUMENT}: cargo run -p xtask -- bounds writes the table anew"
    ));
    Ok(out)
}

/// Writes the table anew.
pub(crate) fn write(root: &Path) -> Result<Vec<String>> {
    let path = root.join(DOCUMENT);
    let text = fs::read_to_string(&path).context(DOCUMENT)?;
    let (head, _, tail) = split(&text)?;
    fs::write(&path, format!("{head}{BEGIN}\n{}\n{END}{tail}", render(root)?.trim()))?;
    Ok(Vec::new())
}

fn split(text: &str) -> Result<(&str, &str, &str)> {
    between(text, DOCUMENT, BEGIN, END)
}

/// What stands before, between and after two marks of a document.
pub(crate) fn between<'a>(
    text: &'a str,
    document: &str,
    begin: &str,
    end: &str,
) -> Result<(&'a str, &'a str, &'a str)> {
    let (Some((head, rest)), true) = (text.split_once(begin), text.contains(end)) else {
        bail!("{document}: the marks {begin} and {end} are needed");
    };
    let (table, tail) = rest.split_once(end).context("the end mark comes before the other")?;
    Ok((head, table, tail))
}

fn render(root: &Path) -> Result<String> {
    let mut out = String::new();
    for name in CRATES {
        let folder = root.join("crates").join(name).join("src");
        let mut rows = Vec::new();
        for file in crate::tidy::files(&folder, "rs")? {
            let place = file.strip_prefix(&folder)?.display().to_string();
            if place
                .split(['/', '.'])
                .any(|part| part == "tests" || part.ends_with("_tests"))
            {
                continue;
            }
            for bound in bounds(&fs::read_to_string(&file)?) {
                rows.push(format!(
                    "| `{}` | `{}` | {} | `{place}` |",
                    bound.name, bound.value, bound.meaning
                ));
            }
        }
        rows.sort();
        out.push_str(&format!(
            "\n### {name}\n\n| bound | value | of what | in `crates/{name}/src/` |\n|---|---|---|---|\n"
        ));
        for row in rows {
            out.push_str(&row);
            out.push('\n');
        }
    }
    Ok(out)
}

/// The bounds of one file before its tests.
fn bounds(text: &str) -> Vec<Bound> {
    let mut out = Vec::new();
    let mut doc = String::new();
    let mut lines = text.lines().map(str::trim);
    while let Some(line) = lines.next() {
        if line == "#[cfg(test)]" {
            break;
        }
        if let Some(more) = line.strip_prefix("///") {
            doc = format!("{doc} {}", more.trim()).trim().to_string();
            continue;
        }
        if line.starts_with("#[") {
            continue;
        }
        let meaning = std::mem::take(&mut doc);
        let Some((_, definition)) = line.split_once("const ") else {
            continue;
        };
        let before = line.split("const ").next().unwrap_or_default();
        let declared = before.is_empty() || before.starts_with("pub");
        let Some((name, rest)) = definition.split_once(": ").filter(|_| declared) else {
            continue;
        };
        let mut rest = rest.to_string();
        while !rest.ends_with(';') {
            match lines.next() {
                Some(more) => rest.push_str(more),
                None => break,
            }
        }
        let Some((kind, value)) = rest.trim_end_matches(';').split_once(" = ") else {
            continue;
        };
        let number = ["usize", "u64", "u32", "u16", "u8", "i64", "i32"].contains(&kind);
        let named = name.split('_').any(|word| WORDS.contains(&word));
        if kind.ends_with("Duration") || (number && named) {
            out.push(Bound {
                name: name.to_string(),
                value: value.replace("Duration::", "").replace('|', "\\|"),
                meaning: first_sentence(&meaning),
            });
        }
    }
    out
}

fn first_sentence(text: &str) -> String {
    let end = text.find(". ").map_or(text.len(), |at| at + 1);
    text[..end].trim_end_matches('.').replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_found_with_their_meaning() {
        let text = "\
/// Longest token. Longer ones are refused.
pub const MAX_TOKEN: usize = 64 * 1024;
/// Time for one answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// A name, no bound.
const MAX_NAME: &str = \"x\";
const PORT: u16 = 80;
fn f(max: usize) { let x: *const u8 = p; }
#[cfg(test)]
const MAX_TEST: usize = 1;
";
        let bound = |name: &str, value: &str, meaning: &str| Bound {
            name: name.into(),
            value: value.into(),
            meaning: meaning.into(),
        };
        assert_eq!(
            bounds(text),
            [
                bound("MAX_TOKEN", "64 * 1024", "Longest token"),
                bound("PATIENCE", "from_secs(5)", "Time for one answer"),
            ]
        );
    }
}
