//! `validate`: what is wrong with files before they are applied, each finding with file, line and column.
//!
//! The frame is Istio's (`"file" is valid`, `Error: N errors occurred:`, exit code 1); the findings are those of
//! [`mantlet_api::strict`], which says at once what `kubectl`, the API server and the webhook would say one after the other. With `--fix`, [`fix`]
//! repairs what can be meant in one way only. It must not need a cluster.

mod fix;
#[cfg(test)]
mod tests;

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::bail;
use mantlet_api::diagnostic::{Code, Diagnostic, Severity};
use mantlet_api::spans::{Content, Node, Position};
use mantlet_api::{repair, strict};
use serde_json::Value;

use crate::files::{self, Chunk, Document};

/// Options of `validate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Files or directories to validate, - for standard input
    #[arg(short = 'f', long = "filename", value_name = "FILE")]
    filenames: Vec<PathBuf>,
    /// As --filename
    #[arg(value_name = "FILE")]
    more: Vec<PathBuf>,
    /// Enable structural validation for policy and telemetry; always on
    #[arg(short = 'x', long, hide = true)]
    referential: Option<Option<bool>>,
    /// Repair what can be meant in one way only, write the files and show what changed
    #[arg(long)]
    fix: bool,
    /// With --fix: show what would change, write nothing
    #[arg(long, requires = "fix")]
    dry_run: bool,
    /// How findings are shown
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

/// What is printed, where, and the exit code.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// For standard output.
    pub text: String,
    /// For standard error.
    pub error: String,
    /// 0 if all files are valid, else 1.
    pub code: u8,
}

/// A finding with its place.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Located {
    /// The file.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// `Kind/namespace/name` of the object, as far as it has them.
    pub object: String,
    /// What.
    #[serde(flatten)]
    pub finding: Diagnostic,
}

impl Located {
    /// `file:line:column: field.path: message (allowed: …; did you mean …?)`.
    pub fn line(&self) -> String {
        let mut text = format!("{}:{}:{}: ", self.file, self.line, self.column);
        if !self.finding.path.is_empty() {
            let _ = write!(text, "{}: ", self.finding.path);
        }
        text + &self.finding.full()
    }
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<Answer> {
    let paths: Vec<PathBuf> = args.filenames.iter().chain(&args.more).cloned().collect();
    if paths.is_empty() {
        bail!("filename is required (see --filename)");
    }
    if args.fix {
        return fix::run(&paths, !args.dry_run, args.output == Output::Json);
    }
    let sources = files::texts(&paths)?;
    let mut all = Vec::new();
    for (file, text) in &sources {
        all.push((file.display().to_string(), findings(&files::split(file, text))));
    }
    Ok(match args.output {
        Output::Text => shown(&all),
        Output::Json => json(&all)?,
    })
}

/// The findings about the documents of a file, in the order of their places.
pub fn findings(chunks: &[Chunk]) -> Vec<Located> {
    let mut all = Vec::new();
    for chunk in chunks {
        match chunk.read() {
            Err(fault) => {
                let advice = syntax_advice(&chunk.text, fault.line - chunk.line);
                all.push(Located {
                    file: fault.file.display().to_string(),
                    line: fault.line,
                    column: fault.column,
                    object: String::new(),
                    finding: Diagnostic::new(Code::SYNTAX, Severity::Error, "", fault.message).with_hint(advice),
                });
            }
            Ok(documents) => match repair::layout(&chunk.text) {
                Some(layout) => all.extend(lost_indentation(chunk, &layout)),
                None => all.extend(documents.iter().flat_map(about)),
            },
        }
    }
    all.sort_by_key(|one| (one.line, one.column));
    all
}

/// The findings about one object.
fn about(document: &Document) -> Vec<Located> {
    let tree = document.tree();
    let object = name_of(&document.value);
    strict::document(&document.value)
        .into_iter()
        .map(|finding| {
            let at = tree.as_ref().map(|tree| place(tree, &finding)).unwrap_or_default();
            Located {
                file: document.file.display().to_string(),
                line: document.line + at.line.max(1) - 1,
                column: at.column.max(1),
                object: object.clone(),
                finding,
            }
        })
        .collect()
}

/// `Kind/namespace/name`.
fn name_of(value: &Value) -> String {
    let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    format!(
        "{}/{}/{}",
        text("/kind"),
        text("/metadata/namespace"),
        text("/metadata/name")
    )
}

/// A wrong field is at its key, a wrong value at the value, if that is on the line of its key.
fn place(tree: &Node, finding: &Diagnostic) -> Position {
    let key = tree.locate(&finding.path).0;
    let empty = |node: &Node| matches!(&node.content, Content::Scalar { text, plain: true } if text.is_empty());
    tree.at(&finding.path)
        .filter(|node| finding.code != Code::UNKNOWN_FIELD && node.start.line == key.line && !empty(node))
        .map_or(key, |node| node.start)
}

/// Most lines of a layout that is shown.
const MAX_LAYOUT: usize = 60;

/// One finding that shows how the lines should stand, and those about what is in them, at the places that the lines have now.
fn lost_indentation(chunk: &Chunk, layout: &repair::Layout) -> Vec<Located> {
    let file = chunk.file.display().to_string();
    let moved = Chunk {
        text: layout.text.as_str().into(),
        ..chunk.clone()
    };
    let Ok(documents) = moved.read() else { return Vec::new() };
    let mut all: Vec<Located> = documents.iter().flat_map(about).collect();
    for one in &mut all {
        let index = one.line.saturating_sub(chunk.line);
        let indent = layout
            .text
            .lines()
            .nth(index)
            .map_or(0, |line| line.len() - line.trim_start().len());
        if let Some((line, column)) = layout.from.get(index) {
            one.line = chunk.line + line - 1;
            one.column = (one.column.saturating_sub(indent).max(1) + column)
                .saturating_sub(1)
                .max(1);
        }
    }
    let first = layout
        .text
        .lines()
        .zip(&layout.from)
        .find(|(line, _)| line.starts_with(' '))
        .map_or((1, 1), |(_, from)| *from);
    let mut shown: Vec<&str> = layout
        .text
        .lines()
        .skip_while(|line| *line == "---")
        .take(MAX_LAYOUT + 1)
        .collect();
    if shown.len() > MAX_LAYOUT {
        shown[MAX_LAYOUT] = "…";
    }
    let block: String = shown.iter().map(|line| format!("\n\t\t| {line}")).collect();
    all.push(Located {
        file,
        line: chunk.line + first.0 - 1,
        column: first.1,
        object: documents.first().map(|d| name_of(&d.value)).unwrap_or_default(),
        finding: Diagnostic::new(
            Code::INDENTATION,
            Severity::Error,
            "",
            format!("the indentation is lost; by their names the lines belong together like this:{block}"),
        ),
    });
    all
}

/// What usually is behind a text that is no YAML.
fn syntax_advice(text: &str, line: usize) -> Option<mantlet_api::diagnostic::Hint> {
    let at = text.lines().nth(line).unwrap_or_default();
    let before = line
        .checked_sub(1)
        .and_then(|l| text.lines().nth(l))
        .unwrap_or_default();
    let indent = |line: &str| line.chars().take_while(|c| c.is_whitespace()).collect::<String>();
    let advice = if indent(at).contains('\t') || indent(before).contains('\t') {
        "YAML does not allow tabs in indentation: use blanks"
    } else if at.contains(['“', '”', '„', '‘', '’']) || before.contains(['“', '”', '„', '‘', '’']) {
        "typographic quotes are no quotes in YAML: use \" or '"
    } else if at.trim_start().starts_with('*') || at.contains(": *") || at.contains("[*") || at.contains("- *") {
        "a value that begins with * needs quotes"
    } else if at.contains(": ") && before.contains(": ") && indent(at).len() > indent(before).len() {
        "this line is indented deeper than the one before it, which already has a value"
    } else {
        return None;
    };
    Some(mantlet_api::diagnostic::Hint::Advice(advice.into()))
}

/// Istio's frame around the findings: a line for each file, the errors in one list at the end.
pub fn shown(all: &[(String, Vec<Located>)]) -> Answer {
    let mut answer = Answer::default();
    let mut errors = Vec::new();
    let mut repairable = false;
    for (file, found) in all {
        let (bad, warnings): (Vec<_>, Vec<_>) = found.iter().partition(|f| f.finding.severity == Severity::Error);
        if !warnings.is_empty() {
            let _ = writeln!(answer.text, "{file:?} has warnings:");
            for warning in &warnings {
                let _ = writeln!(answer.text, "\t* {}", warning.line());
            }
        } else if bad.is_empty() {
            let _ = writeln!(answer.text, "{file:?} is valid");
        }
        repairable |= bad
            .iter()
            .any(|f| f.finding.fix.is_some() || f.finding.code == Code::INDENTATION);
        errors.extend(bad);
    }
    if !errors.is_empty() {
        answer.code = 1;
        let s = if errors.len() == 1 { "" } else { "s" };
        let _ = writeln!(answer.error, "Error: {} error{s} occurred:", errors.len());
        for error in &errors {
            let _ = writeln!(answer.error, "\t* {}", error.line());
        }
        if repairable {
            let _ = writeln!(
                answer.error,
                "\nWhat can be meant in one way only is repaired by: mantlet validate --fix -f FILE"
            );
        }
    }
    answer
}

/// The findings as a JSON list.
fn json(all: &[(String, Vec<Located>)]) -> anyhow::Result<Answer> {
    let flat: Vec<&Located> = all.iter().flat_map(|(_, found)| found).collect();
    let bad = flat.iter().any(|f| f.finding.severity == Severity::Error);
    Ok(Answer {
        text: serde_json::to_string_pretty(&flat)? + "\n",
        error: String::new(),
        code: u8::from(bad),
    })
}
